"""Figures of many runs show the numbers they were given."""

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: tests have no screen

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from scipy import stats

from mapkg.measures import NEG_LOG_RATIO_BINS
from studies import plots
from studies.figures import STATE_COLORS
from studies.laws import LAWS

TITLES = {"b": "second run", "a": "first run"}
"""In an order that is neither that of the tables nor alphabetical."""


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def curves(ax):
    return {line.get_label(): line.get_xydata() for line in ax.lines}


def bands(ax):
    """Least and greatest value at each place of the filled bands, in the order of drawing."""
    found = []
    for collection in ax.collections:
        (path,) = collection.get_paths()
        points = pd.DataFrame(path.vertices, columns=["x", "y"])
        found.append(points.groupby("x")["y"].agg(["min", "max"]))
    return found


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


# ------------------------------------------------------------------------------
# Graphs by rank


@pytest.fixture
def graph_maxima():
    """Two runs, three seeds, two layers, four graphs in no order; every number is its own."""
    rows = [
        (run, seed, state, layer, graph, scale * (shift + 100 * layer + value) + 10 * seed)
        for run, shift in (("a", 0.0), ("b", 1000.0))
        for seed in (0, 1, 5)
        for state, scale in (("base", 1.0), ("base_calibrated", 2.0), ("best", 7.0), ("last", 9.0))
        for layer in (0, 1)
        for graph, value in enumerate((3.0, 1.0, 4.0, 2.0))
    ]
    return pd.DataFrame(rows, columns=["run", "seed", "state", "layer", "graph", "max_ratio"])


def test_a_panel_shows_each_layer_at_the_median_over_seeds_of_the_graphs_of_each_rank(graph_maxima):
    figure = plots.rank_grid(graph_maxima, TITLES, threshold=50.0)
    assert [ax.get_title() for ax in figure.axes] == ["second run", "first run"]
    for ax, shift in zip(figure.axes, (1000.0, 0.0), strict=True):
        drawn = curves(ax)
        for layer in (0, 1):
            expected = 7 * (shift + 100 * layer + np.array([1, 2, 3, 4])) + 10  # of seed 1
            np.testing.assert_allclose(drawn[f"layer {layer}"][:, 1], expected)
            np.testing.assert_allclose(drawn[f"layer {layer}"][:, 0], [0, 1 / 3, 2 / 3, 1])
        np.testing.assert_allclose(drawn["threshold 50"][:, 1], 50)
        assert ax.get_yscale() == "log"


def test_the_band_of_a_layer_reaches_from_the_least_to_the_greatest_seed(graph_maxima):
    figure = plots.rank_grid(graph_maxima, TITLES)
    for layer, band in enumerate(bands(figure.axes[1])):
        middle = 7 * (100 * layer + np.array([1, 2, 3, 4]))
        np.testing.assert_allclose(band["min"], middle)
        np.testing.assert_allclose(band["max"], middle + 50)
    assert len(bands(figure.axes[1])) == 2


def test_untrained_networks_are_bands_over_all_layers_graphs_and_seeds(graph_maxima):
    figure = plots.rank_grid(graph_maxima, TITLES)
    for ax, shift in zip(figure.axes, (1000.0, 0.0), strict=True):
        found = {patch.get_label(): patch.get_bbox() for patch in ax.patches}
        published = found["untrained, as published"]
        assert (published.y0, published.y1) == (shift + 1, shift + 104 + 50)
        calibrated = found["untrained, BatchNorm calibrated"]
        assert (calibrated.y0, calibrated.y1) == (2 * (shift + 1), 2 * (shift + 104) + 50)


def test_another_trained_state_can_be_drawn(graph_maxima):
    figure = plots.rank_grid(graph_maxima, TITLES, trained="last")
    np.testing.assert_allclose(curves(figure.axes[1])["layer 0"][:, 1], [19, 28, 37, 46])


def test_tables_without_the_calibrated_state_have_one_band(graph_maxima):
    few = graph_maxima[graph_maxima["state"].isin(["base", "best"])]
    figure = plots.rank_grid(few, TITLES)
    for ax in figure.axes:
        assert [patch.get_label() for patch in ax.patches] == ["untrained, as published"]


def test_a_graph_without_a_ratio_with_one_seed_leaves_the_other_ranks_where_they_are(graph_maxima):
    chosen = (graph_maxima["state"] == "best") & (graph_maxima["seed"] == 0)
    graph_maxima.loc[chosen & (graph_maxima["graph"] == 0), "max_ratio"] = np.nan  # the third
    figure = plots.rank_grid(graph_maxima, TITLES)
    drawn = curves(figure.axes[1])["layer 0"]
    np.testing.assert_allclose(drawn, [[0, 17], [1 / 3, 24], [2 / 3, 31], [1, 38]])
    least = bands(figure.axes[1])[0]["min"]  # of the seed with the values 7, 14 and 28
    np.testing.assert_allclose(least, [7, 7 + 7 * 2 / 3, 14 + 14 / 3, 28])


def test_the_panels_stand_in_rows_and_share_their_axis_and_one_legend(graph_maxima):
    three = pd.concat([graph_maxima, graph_maxima[graph_maxima["run"] == "a"].assign(run="c")])
    figure = plots.rank_grid(three, {**TITLES, "c": "third"}, columns=2)
    assert [ax.get_title() for ax in figure.axes] == ["second run", "first run", "third"]
    figure.draw_without_rendering()
    places = [ax.get_position() for ax in figure.axes]
    assert places[0].y0 == pytest.approx(places[1].y0)
    assert places[2].y1 < places[0].y0
    assert places[2].x0 == pytest.approx(places[0].x0)
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    assert legend_of(figure) == [
        "untrained, as published",
        "untrained, BatchNorm calibrated",
        "layer 0",
        "layer 1",
        "threshold 1000",
    ]


# ------------------------------------------------------------------------------
# Trained layers among untrained ones


@pytest.fixture
def layers():
    """Summary, untrained networks and chance of two runs of two layers."""
    keys = ["run", "seed", "layer"]
    trained = [
        (run, seed, layer, shift + 10 * layer + seed)
        for run, shift in (("a", 100.0), ("b", 5000.0))
        for layer in (0, 1)
        for seed in (0, 1)
    ]
    summary = pd.DataFrame(trained, columns=[*keys, "max_ratio"])
    summary = pd.concat([summary.assign(state="best"), summary.assign(state="base", max_ratio=1.0)])
    nulls = [
        (run, seed, layer, state, scale * (shift + layer + 2 * seed))
        for run, shift, networks in (("a", 10.0, 3), ("b", 20.0, 4))
        for seed in range(1000, 1000 + networks)
        for layer in (0, 1)
        for state, scale in (("base", 0.5), ("base_calibrated", 1.0))
    ]
    untrained = pd.DataFrame(nulls, columns=[*keys, "state", "max_ratio"])
    chance = [("a", 200.0), ("a", 210.0), ("b", 300.0), ("b", 300.0)]
    return summary, untrained, pd.DataFrame(chance, columns=["run", "chance_threshold"])


def test_every_network_is_a_mark_at_its_layer(layers):
    figure = plots.against_untrained(*layers, TITLES, threshold=700.0)
    assert [ax.get_title() for ax in figure.axes] == ["second run", "first run"]
    drawn = curves(figure.axes[1])
    assert drawn["trained, best validation epoch"].tolist() == [
        [0, 100],
        [0, 101],
        [1, 110],
        [1, 111],
    ]
    assert drawn["untrained, 3 networks"].tolist() == [
        [layer, 10 + layer + 2 * seed] for seed in (1000, 1001, 1002) for layer in (0, 1)
    ]
    assert "untrained, 4 networks" in curves(figure.axes[0])
    for ax in figure.axes:
        assert ax.get_yscale() == "log"
        assert curves(ax)["threshold 700"][:, 1].tolist() == [700, 700]


def test_the_line_of_chance_is_the_largest_threshold_of_the_layers(layers):
    figure = plots.against_untrained(*layers, TITLES)
    for ax, expected in zip(figure.axes, (300.0, 210.0), strict=True):
        line = curves(ax)["product of normals, 5 % family-wise"]
        assert line[:, 1].tolist() == [expected, expected]
    assert legend_of(figure).count("product of normals, 5 % family-wise") == 1


def test_marks_of_another_state_have_its_colour_and_name(layers):
    figure = plots.against_untrained(*layers, TITLES, trained="base")
    (line,) = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert line.get_label() == "untrained, as published"
    assert line.get_color() == STATE_COLORS["base"]
    assert set(line.get_ydata()) == {1.0}


# ------------------------------------------------------------------------------
# Through training


@pytest.fixture
def trajectory():
    """Three seeds of one run, the third of which is a few epochs shorter, and a second run."""
    rows = [
        ("a", seed, epoch, layer, 10.0 * (epoch + 1) + 3 * seed + (100 if layer == epoch else 0))
        for seed, epochs in ((0, 4), (1, 4), (2, 3))
        for epoch in range(epochs)
        for layer in range(4)
    ]
    rows += [("b", 0, epoch, 0, 7.0) for epoch in (0, 5)]
    return pd.DataFrame(rows, columns=["run", "seed", "epoch", "layer", "max_ratio"])


def test_a_run_is_the_median_over_seeds_of_its_largest_layer_in_a_band_of_the_seeds(trajectory):
    _, ax = plt.subplots()
    assert plots.through_training(trajectory, {"b": "other", "a": "GT"}, ax, threshold=20.0) is ax
    drawn = curves(ax)
    assert drawn["GT"].tolist() == [[0, 113], [1, 123], [2, 133]], "epochs that all seeds have"
    assert drawn["other"].tolist() == [[0, 7], [5, 7]]
    assert drawn["threshold 20"][:, 1].tolist() == [20, 20]
    band = bands(ax)[1]
    assert band["min"].tolist() == [110, 120, 130]
    assert band["max"].tolist() == [116, 126, 136]
    assert ax.get_yscale() == "log"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["other", "GT", "threshold 20"]


def test_a_band_has_the_colour_of_its_line(trajectory):
    _, ax = plt.subplots()
    plots.through_training(trajectory, {"a": "GT", "b": "other"}, ax)
    for line, band in zip(ax.lines, ax.collections, strict=False):
        assert to_rgba(line.get_color(), alpha=0.2) == pytest.approx(band.get_facecolor()[0])


def test_every_layer_of_a_run_is_the_median_over_seeds_in_a_band_of_them(trajectory):
    figure = plots.layers_through_training(trajectory, {"b": "other", "a": "GT"}, threshold=20.0)
    assert [ax.get_title() for ax in figure.axes] == ["other", "GT"]
    drawn = curves(figure.axes[1])
    assert drawn["layer 0"].tolist() == [[0, 113], [1, 23], [2, 33]], "epochs that all seeds have"
    assert drawn["layer 1"].tolist() == [[0, 13], [1, 123], [2, 33]]
    band = bands(figure.axes[1])[1]
    assert band["min"].tolist() == [10, 120, 30]
    assert band["max"].tolist() == [16, 126, 36]
    assert curves(figure.axes[0])["layer 0"].tolist() == [[0, 7], [5, 7]]
    names = [f"layer {layer}" for layer in range(4)]
    assert sorted(legend_of(figure)) == [*names, "threshold 20"]
    colours = {line.get_label(): line.get_color() for line in figure.axes[1].lines}
    assert len(set(colours.values())) == 5
    assert colours["layer 0"] == figure.axes[0].lines[0].get_color(), "in all panels alike"


def test_a_control_is_shown_beside_its_run_up_to_the_last_epoch_of_both(trajectory):
    control = trajectory[trajectory["run"] == "a"].assign(run="a_permuted")
    control["max_ratio"] += 1000
    control = control[control["epoch"] < 2]
    tables = pd.concat([trajectory, control, control.assign(run="b_permuted")])
    controls = {"b_permuted": "b", "a_permuted": "a"}
    figure = plots.against_permuted(tables, controls, {"a": "GT", "b": "other"}, threshold=20.0)
    assert [ax.get_title() for ax in figure.axes] == ["other", "GT"]
    drawn = curves(figure.axes[1])
    assert drawn["targets of the data"].tolist() == [[0, 113], [1, 123]]
    assert drawn["targets permuted"].tolist() == [[0, 1113], [1, 1123]]
    assert drawn["threshold 20"][:, 1].tolist() == [20, 20]
    assert curves(figure.axes[0])["targets of the data"].tolist() == [[0, 7]]
    assert figure.axes[1].get_yscale() == "log"
    assert legend_of(figure) == ["targets of the data", "targets permuted", "threshold 20"]
    one, other = figure.axes[1].lines[:2]
    assert one.get_color() != other.get_color()


# ------------------------------------------------------------------------------
# A distribution and the laws fitted to it


@pytest.fixture
def histogram():
    """A million values in the proportions of a gamma law, rounded to whole counts."""
    low, high, bins = NEG_LOG_RATIO_BINS
    edges = np.linspace(low, high, bins + 1)
    counts = np.round(1e6 * np.diff(stats.gamma(4.0, -1.0, 0.5).cdf(edges))).astype(int)
    filled = counts.nonzero()[0]
    return pd.DataFrame({"bin": filled, "low": edges[filled], "count": counts[filled]})


def test_the_bars_are_the_counts_with_the_empty_bins(histogram):
    gap = histogram[histogram["bin"] != 320]  # a table has no row for an empty bin
    _, ax = plt.subplots()
    assert plots.fitted_distribution(gap, ax, state="best") is ax
    (bars,) = ax.patches
    counts, edges, _ = bars.get_data()
    first, last = histogram["bin"].min(), histogram["bin"].max()
    expected = histogram.set_index("bin")["count"].reindex(range(first, last + 1), fill_value=0)
    assert counts.tolist() == [0 if b == 320 else n for b, n in expected.items()]
    np.testing.assert_allclose(edges, -8 + 0.025 * np.arange(first, last + 2), atol=1e-12)
    assert bars.get_facecolor()[:3] == to_rgba(STATE_COLORS["best"])[:3]


def test_the_curve_of_a_law_goes_through_the_counts_it_was_fitted_to(histogram):
    _, ax = plt.subplots()
    plots.fitted_distribution(histogram, ax, state="best")
    curve = curves(ax)["gamma"]
    y, values = curve.T
    expected = 1e6 * 0.025 * stats.gamma(4.0, -1.0, 0.5).pdf(y)
    np.testing.assert_allclose(values, expected, atol=0.01 * values.max())
    assert (y[0], y[-1]) == pytest.approx((histogram["low"].min(), histogram["low"].max() + 0.025))
    # The area under bars and curve is the number of values times the width of a bin.
    assert np.trapezoid(values, y) == pytest.approx(1e6 * 0.025, rel=0.01)


def test_the_note_says_distance_and_likelihood_of_the_first_law(histogram):
    _, ax = plt.subplots()
    plots.fitted_distribution(histogram, ax, state="base", laws=("gamma", "normal"))
    entropy = stats.gamma(4.0, -1.0, 0.5).entropy()
    assert [text.get_text() for text in ax.texts] == [f"KS 0.000\nlog-lik. {-entropy:.2f}"]
    _, ax = plt.subplots()
    plots.fitted_distribution(histogram, ax, state="base", laws=("normal",))
    (note,) = [text.get_text() for text in ax.texts]
    distance = float(note.split()[1])
    y = np.linspace(-1, 10, 10_001)
    law = stats.gamma(4.0, -1.0, 0.5)
    gap = np.abs(law.cdf(y) - stats.norm(law.mean(), law.std()).cdf(y)).max()
    assert distance == pytest.approx(gap, abs=0.001)


def test_every_law_that_is_asked_for_is_drawn_in_a_style_of_its_own(histogram):
    _, ax = plt.subplots()
    plots.fitted_distribution(histogram, ax, state="base", laws=LAWS)
    drawn = [line for line in ax.lines if not line.get_label().startswith("_")]
    assert tuple(line.get_label() for line in drawn) == LAWS
    images = []
    for line in drawn:  # what is seen of each alone
        for other in drawn:
            other.set_visible(other is line)
        line.set_ydata(np.full(500, 1e3))
        ax.figure.canvas.draw()
        images.append(np.asarray(ax.figure.canvas.buffer_rgba()).tobytes())
    assert len(set(images)) == len(LAWS)


def test_the_threshold_is_at_minus_three_and_the_note_stands_above_the_counts(histogram):
    _, ax = plt.subplots()
    plots.fitted_distribution(histogram, ax, state="base")
    assert list(ax.lines[-1].get_xdata()) == pytest.approx([-3, -3])
    bottom, top = ax.get_ylim()
    assert 0 < bottom < 1, "a bin that holds one value is seen"
    assert top > 2 * histogram["count"].max()
    assert ax.get_yscale() == "log"


@pytest.mark.parametrize("layers, shape", [(3, (2, 3)), (7, (4, 5))])
def test_a_grid_of_distributions_has_every_layer_in_every_state(histogram, layers, shape):
    parts = [
        histogram.assign(layer=layer, state=state, count=(layer + 1) * histogram["count"] * times)
        for layer in reversed(range(layers))
        for state, times in (("best", 100), ("base", 1))
    ]
    figure = plots.distribution_grid(pd.concat(parts, ignore_index=True))
    titles = [f"layer {layer}, {state}" for state in ("base", "best") for layer in range(layers)]
    assert [ax.get_title() for ax in figure.axes] == titles
    assert figure.axes[0].get_subplotspec().get_geometry()[:2] == shape
    for ax in figure.axes:
        _, layer, state = ax.get_title().replace(",", "").split()
        (bars,) = ax.patches
        expected = (int(layer) + 1) * histogram["count"].sum() * {"base": 1, "best": 100}[state]
        assert bars.get_data().values.sum() == expected
        assert to_rgba(bars.get_facecolor())[:3] == to_rgba(STATE_COLORS[state])[:3]


def test_a_state_that_was_not_recorded_is_named(histogram):
    with pytest.raises(ValueError, match="no histogram of best; there are base"):
        plots.distribution_grid(histogram.assign(layer=0, state="base"))
