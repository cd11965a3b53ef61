"""Figures of smoothing show the numbers they were given."""

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


def curves(ax):
    return {line.get_label(): line.get_xydata().tolist() for line in ax.lines}


def test_spreads_are_medians_over_seeds_and_zeros_are_left_out():
    rows = [
        dict(layer=layer, seed=seed, features=10.0**-layer * (seed + 1), errors=float(layer))
        for layer in range(3)
        for seed in range(3)
    ]
    figure = plots.spread_by_layer({"GNN": pd.DataFrame(rows)})
    forward, backward = figure.axes
    assert np.allclose(curves(forward)["GNN"], [[0, 2], [1, 0.2], [2, 0.02]])
    assert curves(backward)["GNN"] == [[1, 1], [2, 2]]
    assert forward.get_yscale() == "log"
    band = forward.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.01) and band[:, 1].max() == pytest.approx(3)


def test_matrices_are_shown_as_they_are():
    matrices = {
        kind: {k: torch.full((50, 3), value * k) for k in (1, 2)}
        for kind, value in (("features", 0.25), ("errors", -0.5))
    }
    figure = plots.collapse(matrices, nodes=20)
    shown = [ax.images[0].get_array() for ax in figure.axes]
    assert [picture.shape for picture in shown] == [(20, 3)] * 4
    assert [picture[0, 0] for picture in shown] == [0.25, 0.5, -0.5, -1.0]
    assert [ax.get_title() for ax in figure.axes[:2]] == ["layer 1", "layer 2"]
    assert figure.axes[0].images[0].get_clim() == (-1, 1)


def test_gradients_before_and_after_stand_in_a_panel_per_network():
    rows = [
        dict(variant=v, num_layers=d, seed=s, before=1.0 + s, after=10.0**-d)
        for v in ("GNN", "MLP")
        for d in (2, 4)
        for s in range(3)
    ]
    figure = plots.last_layer_gradients(pd.DataFrame(rows))
    assert [ax.get_title() for ax in figure.axes] == ["GNN", "MLP"]
    found = curves(figure.axes[0])
    assert found["before"] == [[2, 2], [4, 2]]
    assert np.allclose(found["after"], [[2, 1e-2], [4, 1e-4]])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["2", "4"]


def test_losses_are_shares_of_the_best_constant():
    rows = [
        dict(variant="GNN", num_layers=d, seed=s, step=t, loss=0.2 / (t + 1), constant_loss=0.1)
        for d in (1, 8)
        for s in range(2)
        for t in (0, 1)
    ]
    (ax,) = plots.losses_in_training(pd.DataFrame(rows)).axes
    found = curves(ax)
    assert found["1"] == found["8"] == [[0, 2], [1, 1]]
