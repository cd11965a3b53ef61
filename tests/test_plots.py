"""Figures show the numbers they were given."""

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: tests have no screen

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from studies import plots


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def graph_maxima():
    """Two seeds, two layers, three graphs, in no order."""
    rows = [
        (seed, state, layer, graph, scale * (10 * layer + value) + seed)
        for seed in (0, 1)
        for state, scale in (("base", 1.0), ("base_calibrated", 2.0), ("best", 100.0))
        for layer in (0, 1)
        for graph, value in enumerate((3.0, 1.0, 2.0))
    ]
    return pd.DataFrame(rows, columns=["seed", "state", "layer", "graph", "max_ratio"])


def curves(ax):
    return {line.get_label(): line.get_xydata() for line in ax.lines}


def test_the_base_is_a_band_over_all_layers_and_the_trained_network_a_sorted_line_per_layer(
    graph_maxima,
):
    figure = plots.base_against_trained(graph_maxima, threshold=500.0)
    assert [ax.get_title() for ax in figure.axes] == ["seed 0", "seed 1"]
    for seed, ax in enumerate(figure.axes):
        drawn = curves(ax)
        np.testing.assert_allclose(drawn["layer 0"][:, 1], np.array([100, 200, 300]) + seed)
        np.testing.assert_allclose(drawn["layer 1"][:, 1], np.array([1100, 1200, 1300]) + seed)
        np.testing.assert_allclose(drawn["layer 0"][:, 0], [1, 2, 3])
        np.testing.assert_allclose(drawn["threshold 500"][:, 1], 500)
        bands = {patch.get_label(): patch.get_bbox() for patch in ax.patches}
        published = bands["untrained, as published"]
        assert (published.y0, published.y1) == (1 + seed, 13 + seed)
        calibrated = bands["untrained, BatchNorm calibrated"]
        assert (calibrated.y0, calibrated.y1) == (2 + seed, 26 + seed)
        assert ax.get_yscale() == "log"
        assert ax.get_xlabel() == "test graph, by rank"
    assert "ratio" in figure.axes[0].get_ylabel()


def test_graphs_without_a_ratio_are_left_out_of_the_lines(graph_maxima):
    chosen = (graph_maxima["state"] == "best") & (graph_maxima["graph"] == 0)
    graph_maxima.loc[chosen, "max_ratio"] = np.nan
    figure = plots.base_against_trained(graph_maxima)
    np.testing.assert_allclose(curves(figure.axes[0])["layer 0"][:, 1], [100, 200])


def test_the_trajectory_has_a_line_per_layer_and_a_panel_per_seed():
    rows = [(s, e, y, 1.0 + s + 10 * e + 100 * y) for s in (3, 5) for e in (0, 1) for y in (0, 1)]
    table = pd.DataFrame(rows, columns=["seed", "epoch", "layer", "max_ratio"])
    figure = plots.trajectory(table)
    assert [ax.get_title() for ax in figure.axes] == ["seed 3", "seed 5"]
    np.testing.assert_allclose(curves(figure.axes[1])["layer 1"], [[0, 106], [1, 116]])


def test_statistics_by_layer_are_the_mean_over_seeds_with_every_seed_as_a_dot():
    rows = [
        (s, state, y, 1.0 + 2 * s + y) for s in (0, 1) for state in ("base", "best") for y in (0, 1)
    ]
    table = pd.DataFrame(rows, columns=["seed", "state", "layer", "max_abs"])
    figure = plots.by_layer(table, ["max_abs"], states=("base", "best"))
    mean, dots = figure.axes[0].lines[:2]
    np.testing.assert_allclose(mean.get_ydata(), [2, 3])
    assert sorted(dots.get_ydata()) == [1, 2, 3, 4]
    assert figure.axes[0].get_yscale() == "log"


def test_the_distribution_marks_the_threshold_at_minus_three():
    table = pd.DataFrame({"state": ["base", "best"], "low": [0.0, -3.5], "count": [5, 2]})
    _, ax = plt.subplots()
    plots.ratio_distribution(table, ax)
    assert ax.lines[-1].get_xdata()[0] == pytest.approx(-3)
    assert ax.lines[1].get_xydata().tolist() == [[-3.5, 2]]


def test_row_maxima_show_the_share_of_rows_above_each_value():
    _, ax = plt.subplots()
    plots.row_maxima({"sample": torch.tensor([4.0, 1.0, 2.0, 3.0])}, ax)
    assert curves(ax)["sample"].tolist() == [[1, 1], [2, 0.75], [3, 0.5], [4, 0.25]]


def test_the_diagram_names_what_hooks_can_read():
    _, ax = plt.subplots()
    plots.score_in_layer(ax)
    texts = " ".join(text.get_text() for text in ax.texts)
    assert "score" in texts
    assert "attended" in texts
