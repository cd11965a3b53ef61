"""Figures of remedies and attacks show the numbers they were given."""

import itertools

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: tests have no screen

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from studies import plots
from studies.plots.remedies import TERM_COLOURS


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_every_arm_has_its_seeds_and_their_mean():
    rows = [
        dict(label=label, run=run, seed=seed, share=seed / 10 + shift, max_ratio=10.0 ** (seed + 1))
        for label in ("GT", "SAN")
        for run, shift in (("none", 0), ("sink", 0.5))
        for seed in range(3)
        if (label, run) != ("SAN", "sink")
    ]
    values = {"share": "a share", "max_ratio": "a ratio"}
    figure = plots.arms(pd.DataFrame(rows), values, logarithmic=["max_ratio"])
    axes = np.reshape(figure.axes, (2, 2))
    assert [ax.get_xlabel() for ax in axes[1]] == ["a share", "a ratio"]
    assert [ax.get_xlabel() for ax in axes[0]] == ["", ""]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["GT", "SAN"]
    names = [text.get_text() for text in axes[0, 0].get_yticklabels()]
    assert names == ["none", "sink"]
    dots, mean = axes[0, 0].lines[2:4]  # the second arm
    assert dots.get_xdata() == pytest.approx([0.5, 0.6, 0.7])
    assert set(dots.get_ydata()) == {1}
    assert mean.get_xdata() == pytest.approx([0.6, 0.6])
    assert axes[0, 1].lines[1].get_xdata() == pytest.approx([100, 100])  # geometric
    assert axes[0, 1].get_xscale() == "log"
    assert len(axes[1, 0].lines) == 2  # SAN has no sink
    low, high = axes[0, 0].get_ylim()
    assert low > high  # the first arm is on top


def test_the_threshold_is_drawn_where_ratios_are():
    rows = [dict(label="GT", run="none", seed=s, max_ratio=5.0, max_abs=1.0) for s in (0, 1)]
    values = {"max_ratio": "r", "max_abs": "m"}
    ratio, magnitude = plots.arms(pd.DataFrame(rows), values).axes
    assert [line.get_xdata()[0] for line in ratio.lines if line.get_linestyle() == "--"] == [1000]
    assert not [line for line in magnitude.lines if line.get_linestyle() == "--"]


@pytest.mark.parametrize(
    ("most", "labels"),
    [
        (900.0, "30 100 300 1000"),
        (30_000.0, "100 1000 10000"),
        (3e7, r"$\mathdefault{10^{2}}$ $\mathdefault{10^{4}}$ $\mathdefault{10^{6}}$"),
    ],
)
def test_labels_of_a_logarithmic_axis_have_room(most, labels):
    values = {name: name for name in ("a", "b", "c", "largest")}  # as wide as on the page
    rows = [dict(label="GT", run="none", seed=0) | dict.fromkeys(values, r) for r in (30.0, most)]
    figure = plots.arms(pd.DataFrame(rows), values, logarithmic=["largest"])
    figure.draw_without_rendering()
    ax = figure.axes[-1]
    low, high = ax.get_xlim()
    shown = [t for t in ax.get_xticklabels() if t.get_text() and low <= t.get_position()[0] <= high]
    assert " ".join(text.get_text() for text in shown) == labels
    boxes = [text.get_window_extent() for text in shown]
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))


@pytest.mark.parametrize("seeds", [None, (0, 1)])
def test_layers_are_drawn_without_the_term_and_with_it(seeds):
    rows = [
        dict(layer=layer, term=term, max_ratio=10.0 + layer + 100 * term, max_abs=1.0)
        | dict(row_median_q50=0.1 * (1 + term))
        | ({} if seeds is None else dict(seed=seed, label="SAN"))
        for seed in seeds or [0]
        for term in (False, True)
        for layer in range(3)
    ]
    figure = plots.with_and_without_term(pd.DataFrame(rows))
    ratio, *_ = figure.axes
    assert [ax.get_title() for ax in figure.axes] == [
        *("largest ratio", "largest |s|", "typical median |s|")
    ]
    assert all(ax.get_xlabel() == "layer" for ax in figure.axes)
    assert ratio.get_ylabel() == ("" if seeds is None else "SAN")
    lines = [line for line in ratio.lines if line.get_linestyle() != "--"]
    assert len(lines) == 2 * len(seeds or [0])
    for line in lines:
        with_term = line.get_ydata()[0] > 100
        assert to_hex(line.get_color()) == TERM_COLOURS[with_term].lower()
        assert line.get_ydata().tolist() == [10 + layer + 100 * with_term for layer in range(3)]
    assert legend_of(figure) == ["without the term", "with it"]


def test_losses_are_means_and_bands_over_seeds():
    rows = [
        dict(label=label, run=run, sigma=sigma, seed=seed, none=1.0)
        | dict(random=2.0, optimised=sigma * 10.0**seed)
        for label in ("GT", "SAN")
        for run in ("none", "sink")
        for sigma in (0.01, 0.1)
        for seed in (1, 2, 3)
    ]
    figure = plots.losses_under_attack(pd.DataFrame(rows))
    assert [ax.get_title() for ax in figure.axes] == ["GT", "SAN"]
    ax = figure.axes[0]
    clean, random, optimised = ax.lines[:3]
    assert clean.get_ydata() == pytest.approx([1, 1])
    assert random.get_ydata() == pytest.approx([2, 2])
    assert optimised.get_xdata() == pytest.approx([0.01, 0.1])
    assert optimised.get_ydata() == pytest.approx([1, 10])
    (path,) = ax.collections[1].get_paths()
    assert path.vertices[:, 1].min() == pytest.approx(0.1)
    assert path.vertices[:, 1].max() == pytest.approx(100)
    assert legend_of(figure) == [*("none", "sink", "optimised noise", "random noise", "no noise")]


def test_remedies_that_are_named_come_first_whichever_network_has_them():
    rows = [
        dict(label=label, run=run, seed=0, sigma=0.1, none=1.0, random=1.0, optimised=2.0)
        for label, run in (("GT", "sink"), ("GT", "none"), ("SAN", "term"))
    ]
    figure = plots.losses_under_attack(pd.DataFrame(rows), runs=["none", "term", "absent"])
    assert legend_of(figure)[:3] == ["none", "term", "sink"]
    dotted = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    by_colour = {line.get_color() for line in dotted}
    assert len(by_colour) == 2 and figure.axes[1].lines[0].get_color() not in by_colour
