"""Figures of attribution show the numbers of their tables."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from studies import plots


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


HEAT = pd.DataFrame(
    {
        "layer": [0, 0, 0, 1],
        "threshold": [1000.0, 1000.0, 3000.0, 1000.0],
        "label": ["single", "double", "single", "triple"],
        "channel": [5, 0, 3, 2],
        "percent": [80.0, 20.0, 7.0, 50.0],
    }
)
BONDS = {"single": 75, "double": 24, "triple": 1, "none": 0}


def test_a_heat_map_has_heads_as_rows_and_one_scale():
    figure = plots.heat_maps(HEAT, BONDS, heads=2, channels=3)
    panels = figure.axes[:4]
    images = [ax.images[0] for ax in panels]
    assert images[0].get_array()[1, 2] == 80  # channel 5 is the third one of the second head
    assert images[1].get_array()[0, 0] == 20
    assert sum(image.get_array().sum() for image in images) == 100
    assert {image.get_clim() for image in images} == {(0, 80)}
    assert [ax.get_title() for ax in panels][:2] == [
        "single: 75.00% of edges",
        "double: 24.00% of edges",
    ]
    assert panels[0].get_ylabel() == "head"
    assert panels[0].get_xlabel() == "channel of the head"


def test_an_empty_panel_says_why():
    figure = plots.heat_maps(HEAT, BONDS, heads=2, channels=3)
    texts = [[text.get_text() for text in ax.texts] for ax in figure.axes[:4]]
    assert texts == [[], [], ["nothing above the threshold"], ["no such edge"]]
    nothing = plots.heat_maps(HEAT.iloc[:0], BONDS, heads=2, channels=3, threshold=4000.0)
    assert [ax.texts[0].get_text() for ax in nothing.axes[:3]] == [
        "nothing above the threshold"
    ] * 3
    with pytest.raises(ValueError, match="at least one type of edge"):
        plots.heat_maps(HEAT, {}, heads=2, channels=3)


def test_another_layer_and_threshold_are_other_rows():
    figure = plots.heat_maps(HEAT, BONDS, heads=2, channels=3, threshold=3000.0)
    assert figure.axes[0].images[0].get_array()[1, 0] == 7
    figure = plots.heat_maps(HEAT, BONDS, heads=2, channels=3, layer=1)
    assert figure.axes[2].images[0].get_array()[0, 2] == 50


def rows(**columns):
    table = pd.DataFrame(
        [(run, seed, label) for run in ("A", "B") for seed in (0, 1) for label in ("x", "y")],
        columns=["run", "seed", "label"],
    )
    table["share"] = np.linspace(0.1, 0.8, len(table))
    return table.assign(**columns)


def test_dots_stand_at_their_values_with_their_intervals():
    table = rows()
    table = table.assign(share_low=table["share"] - 0.05, share_high=table["share"] + 0.1)
    figure = plots.by_label(table)
    for ax, run in zip(figure.axes, "AB", strict=True):
        assert ax.get_title() == run
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["x", "y"]
        for seed, container in zip((0, 1), ax.containers, strict=True):
            of_seed = table[(table["run"] == run) & (table["seed"] == seed)]
            line, _, (bars,) = container.lines
            np.testing.assert_allclose(line.get_ydata(), of_seed["share"])
            ends = np.array([segment[:, 1] for segment in bars.get_segments()])
            np.testing.assert_allclose(ends, of_seed[["share_low", "share_high"]])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "1"]


def test_dots_without_intervals_may_have_a_logarithmic_axis_and_a_line():
    table = rows(max_ratio=[10.0**k for k in range(8)])
    figure = plots.by_label(table, value="max_ratio", log=True, line=1000.0)
    ax = figure.axes[0]
    assert ax.get_yscale() == "log"
    assert ax.get_ylabel() == "typical largest ratio"
    assert [1000, 1000] in [list(line.get_ydata()) for line in ax.lines]
    assert all(container.lines[2] == () for container in ax.containers)


def test_a_label_that_a_run_lacks_has_no_place_there():
    table = rows()
    table = table[(table["run"] == "A") | (table["label"] == "y")]
    figure = plots.by_label(table)
    assert [len(ax.get_xticklabels()) for ax in figure.axes] == [2, 1]


def test_predictions_are_drawn_with_their_correlation():
    values = pd.DataFrame(
        {
            "label": ["x"] * 3 + ["y"] * 3,
            "measured": [1.0, 2, 4, 3, 2, 1],
            "predicted": [1.0, 2, 3] * 2,
        }
    )
    figure = plots.measured_and_predicted(values, measured="m", predicted="p")
    points = figure.axes[0].lines[0]
    np.testing.assert_array_equal(points.get_xydata(), [[1, 1], [2, 2], [3, 4]])
    assert figure.axes[1].get_title() == "y, correlation -1.0000"
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("p", "m")


def test_types_have_a_colour_and_runs_a_column_of_panels():
    table = pd.DataFrame(
        [
            (run, seed, label, epoch, 10.0 ** (epoch + seed), 2.0)
            for run in ("A", "B")
            for seed in (0, 1)
            for label in ("x", "y")
            for epoch in (0, 5)
        ],
        columns=["run", "seed", "label", "epoch", "gate", "median"],
    )
    figure = plots.types_through_training(table, {"gate": "gate of a type", "median": "median"})
    axes = np.array(figure.axes).reshape(2, 2)
    assert [ax.get_title() for ax in axes[0]] == ["A", "B"]
    assert axes[0, 0].get_ylabel() == "gate of a type"
    lines = axes[0, 0].lines
    assert len(lines) == 4
    np.testing.assert_allclose(lines[0].get_xydata(), [[0, 1], [5, 1e5]])
    assert len({line.get_color() for line in lines}) == 2


def test_curves_have_a_panel_per_order_and_the_ratio_is_thick():
    table = pd.DataFrame(
        [
            (order, method, fraction, fraction * (1 + (method == "ratio")))
            for order in ("descending", "ascending")
            for method in ("ratio", "edge mask", "random")
            for fraction in (0.0, 0.5, 1.0)
        ],
        columns=["order", "method", "fraction", "change"],
    ).assign(run="A")
    table = table.assign(change_low=table["change"] - 0.1, change_high=table["change"] + 0.1)
    figure = plots.faithfulness(table)
    assert [ax.get_title() for ax in figure.axes] == ["A, descending", "A, ascending"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_array_equal(lines["ratio"].get_ydata(), [0, 1, 2])
    assert lines["ratio"].get_linewidth() > lines["edge mask"].get_linewidth()
    assert lines["random"].get_linestyle() == "--"
    assert len(figure.axes[0].collections) == 2


def test_variants_show_shares_and_enrichment_by_type_and_the_losses_beside_them():
    rows = [
        {"run": run, "label": label, "seed": seed, "share": share, "enrichment": 2 * share}
        for run, labels in (("one", ["a", "b"]), ("other", ["a", "b", "c"]))
        for label in labels
        for seed, share in ((0, 0.25), (1, 0.5))
    ]
    shares = pd.DataFrame(rows)
    for value in ("share", "enrichment"):
        shares = shares.assign(
            **{f"{value}_low": shares[value] - 0.1, f"{value}_high": shares[value] + 0.2}
        )
    losses = pd.DataFrame(
        {"run": ["one", "other"], "seed": 0, "loss": [0.4, 0.3], "loss_low": 0.2, "loss_high": 0.5}
    )
    losses = pd.concat([losses, losses.assign(seed=1, loss=0.35)])
    figure = plots.variants(shares, losses)
    panels = [ax for ax in figure.axes if ax.has_data()]
    by_title = {ax.get_title(): ax for ax in panels if ax.get_title()}
    assert list(by_title) == ["one", "other", "mean absolute error"]
    first, second = by_title["other"].containers
    np.testing.assert_allclose(first.lines[0].get_ydata(), [0.25] * 3)
    np.testing.assert_allclose(second.lines[0].get_ydata(), [0.5] * 3)
    enrichment = next(ax for ax in panels if ax.get_ylabel() == "enrichment")
    assert [text.get_text() for text in enrichment.get_xticklabels()] == ["a", "b"]
    np.testing.assert_allclose(enrichment.containers[1].lines[0].get_ydata(), [1.0, 1.0])
    (bars,) = by_title["mean absolute error"].containers[0].lines[2]
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, [[0.2, 0.5]] * 2)
    assert [text.get_text() for text in by_title["mean absolute error"].get_xticklabels()] == [
        *("one", "other"),
    ]
