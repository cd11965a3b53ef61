"""Figures of constants, gradients and depth show the numbers they were given."""

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: tests have no screen

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from studies import plots


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def curves(ax):
    return {line.get_label(): line.get_xydata().tolist() for line in ax.lines}


def test_constants_are_drawn_with_their_bounds():
    rows = [
        dict(scale=scale, score=score, normalised=normalised, constant=scale * (2 - normalised))
        | dict(lemma=3 * scale, theorem=5.0 if normalised else np.nan)
        for score in ("linear", "quadratic")
        for normalised in (False, True)
        for scale in (0.1, 10.0)
    ]
    figure = plots.constants(pd.DataFrame(rows))
    assert [ax.get_title() for ax in figure.axes] == ["linear score", "quadratic score"]
    found = curves(figure.axes[1])
    assert found["raw"] == [[0.1, 0.2], [10, 20]]
    assert found["normalised"] == [[0.1, 0.1], [10, 10]]
    assert found["theorem"] == [[0.1, 5], [10, 5]]
    assert np.allclose(found["raw, lemma"], [[0.1, 0.3], [10, 30]])
    assert figure.axes[0].get_yscale() == "log"


@pytest.fixture
def gradients():
    return pd.DataFrame(
        [
            dict(variant=variant, seed=seed, epoch=epoch, layer=layer, kind=kind)
            | dict(norm=10.0 ** (epoch + layer) * (seed + 1) * (2 if kind == "attention" else 1))
            for variant in ("none", "pair")
            for seed in (0, 1, 2)
            for epoch in (1, 2, 3)
            for layer in (0, 1)
            for kind in ("weights", "attention")
        ]
    )


def test_a_heat_map_has_a_row_per_layer_and_a_column_per_step(gradients):
    figure = plots.gradient_heat(gradients, seed=1)
    first, second, bar = figure.axes
    assert [first.get_title(), second.get_title()] == ["none", "pair"]
    (mesh,) = first.collections
    expected = [[2 * 10.0 ** (epoch + layer) for epoch in (1, 2, 3)] for layer in (0, 1)]
    assert np.allclose(mesh.get_array().reshape(2, 3), expected)
    assert mesh.norm.vmin == 20
    assert mesh.norm.vmax == 20000
    assert bar.get_ylabel() == "norm of the gradient"


def test_the_largest_gradient_is_over_layers_with_a_band_over_seeds(gradients):
    ax = plots.largest_gradients(gradients, plt.figure().subplots(), kind="attention")
    assert np.allclose(curves(ax)["pair"], [[e, 4 * 10.0 ** (e + 1)] for e in (1, 2, 3)])
    (path,) = ax.collections[0].get_paths()
    assert path.vertices[:, 1].min() == pytest.approx(200)
    assert path.vertices[:, 1].max() == pytest.approx(60000)


def test_a_line_ends_where_a_gradient_is_not_finite(gradients):
    gradients.loc[(gradients["epoch"] == 3) & (gradients["seed"] == 2), "norm"] = np.inf
    ax = plots.largest_gradients(gradients, plt.figure().subplots())
    assert [x for x, _ in curves(ax)["none"]] == [1, 2]


def test_losses_have_a_colour_per_depth():
    rows = [
        dict(variant=v, num_layers=d, seed=s, epoch=e, train_loss=d / e + s)
        for v in ("none", "pair")
        for d in (1, 5)
        for s in (0, 1, 2)
        for e in (1, 2)
    ]
    titles = {"pair": "PairNorm", "none": "no norm"}
    figure = plots.loss_by_depth(pd.DataFrame(rows), titles)
    assert [ax.get_title() for ax in figure.axes] == ["PairNorm", "no norm"]
    found = curves(figure.axes[0])
    assert found == {"1 layer": [[1, 2], [2, 1.5]], "5 layers": [[1, 6], [2, 3.5]]}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["1 layer", "5 layers"]
    rows[0]["train_loss"] = 50.0
    cut = plots.loss_by_depth(pd.DataFrame(rows), top=7.0)
    assert [ax.get_title() for ax in cut.axes] == ["none", "pair"]
    assert cut.axes[0].get_ylim()[1] == 7


def test_means_over_seeds_have_bars_to_their_ends():
    rows = [
        dict(panel=p, variant=v, num_layers=d, seed=s, test=d + s, loss=d * s)
        for p in ("Cora", "CiteSeer")
        for v in ("none", "pair")
        for d in (1, 5)
        for s in (0, 1, 5)
    ]
    titles = {"loss": "a loss", "test": "an accuracy"}
    figure = plots.by_depth(pd.DataFrame(rows), ["test", "loss"], titles)
    axes = np.reshape(figure.axes, (2, 2))
    assert [ax.get_title() for ax in axes[0]] == ["Cora", "CiteSeer"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["an accuracy", "a loss"]
    line, _, (bars,) = axes[0, 0].containers[0]
    assert line.get_xydata().tolist() == [[1, 3], [5, 7]]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[1, 6], [5, 10]]


def test_three_equal_values_have_a_bar_of_no_length():
    values = [0.188, 0.188, 0.188]
    assert np.mean(values) > 0.188, "the mean is off by rounding"
    rows = [dict(panel="p", variant="v", num_layers=1, seed=s, a=a) for s, a in enumerate(values)]
    figure = plots.by_depth(pd.DataFrame(rows), ["a"], {"a": "a"})
    (_, _, (bars,)) = figure.axes[0].containers[0]
    assert np.ptp(bars.get_segments()[0][:, 1]) < 1e-12
