"""What the theory of backward oversmoothing expects, on regular graphs."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from mapkg.oversmoothing import limits, relative_spread
from studies.backward_oversmoothing import (
    Vanilla,
    collapse,
    full_training,
    hidden_gradient,
    last_layer_gradients,
    last_layer_study,
    layer_matrices,
    linear_limit_errors,
    losses_in_training,
    shrinkage,
    smoothing,
    spread_by_layer,
    squared_loss,
    train_last_layer,
    training_table,
)
from studies.data.networks import regular_task

SMALL = dict(hidden_channels=32)


@pytest.fixture(scope="module")
def usual():
    """Of thirty layers with the usual settings and three seeds, by activation."""
    return {name: smoothing(Vanilla(activation=name)) for name in ("relu", "tanh", "linear")}


def of_seed(table, seed):
    return table[table["seed"] == seed].reset_index(drop=True)


@pytest.mark.parametrize("activation", ["relu", "tanh", "linear"])
def test_features_smooth_as_fast_as_the_second_eigenvalue_says(usual, activation):
    rates = shrinkage(usual[activation])
    assert list(rates.index) == [0, 1, 2]
    for seed, rate in rates.items():
        contraction = limits(regular_task(seed=seed).operator).contraction
        assert np.log(rate) == pytest.approx(np.log(contraction), rel=0.2)
    table = usual[activation]
    assert table.loc[table["layer"] == 29, "features"].max() < 1e-11


def test_shrinkage_is_the_slope_of_each_seed():
    rows = [
        dict(seed=seed, layer=layer, features=9.0 if layer < 5 else (0.1 * (seed + 1)) ** layer)
        for seed in range(2)
        for layer in range(9)
    ]
    rows.append(dict(seed=0, layer=9, features=0.0))  # all alike: no logarithm
    assert shrinkage(pd.DataFrame(rows)).to_dict() == pytest.approx({0: 0.1, 1: 0.2})


@pytest.mark.parametrize("gain", [0.01, 1.0, 100.0])
def test_of_relu_no_scale_of_weights_keeps_features_apart(usual, gain):
    table = smoothing(Vanilla(gain=gain), seeds=[0])
    expected = of_seed(usual["relu"], 0)
    assert table["features"].iloc[:20].tolist() == pytest.approx(
        expected["features"].iloc[:20].tolist(), rel=1e-4
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_errors_are_smoothest_in_the_middle(usual, activation, seed):
    errors = of_seed(usual[activation], seed)["errors"].to_numpy()
    least = errors.argmin()
    assert 3 < least < 27
    assert errors[least] < 1e-3 * min(errors[0], errors[-1])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_errors_of_relu_drop_where_no_node_differs_in_a_sign(usual, seed):
    task = regular_task(seed=seed)
    network = Vanilla().build(task, 30, seed)
    signs, x = [], task.x
    for layer, activation in zip(network.layers, network.activations, strict=False):
        h = layer(network.average(x))
        signs.append(bool(((h > 0) == (h[0] > 0)).all()))
        x = activation(h)
    # From the last layer on in which any sign differs, all slopes are alike.
    first = max(k for k, is_alike in enumerate(signs) if not is_alike) + 1
    errors = of_seed(usual["relu"], seed)["errors"].to_numpy()
    assert errors[first - 1] > 1e4 * errors[first]
    assert (np.diff(errors[first:]) > 0).all()


def test_errors_of_a_linear_network_smooth_all_the_way(usual):
    errors = of_seed(usual["linear"], 0)["errors"].to_numpy()
    slope = np.polyfit(np.arange(5, 21), np.log(errors[5:21]), 1)[0]
    contraction = limits(regular_task(seed=0).operator).contraction
    assert slope == pytest.approx(-np.log(contraction), rel=0.2)
    assert (np.diff(errors[:-1]) > 0).all()
    assert errors[0] < 1e-9 and errors[-1] > 0.5


def test_far_from_both_ends_errors_follow_their_mean(usual):
    table = of_seed(usual["relu"], 0)
    assert table["limit_error"].iloc[18:22].max() < 1e-3
    assert table["limit_error"].iloc[[0, -2]].min() > 0.1
    linear = of_seed(usual["linear"], 0)
    torch.testing.assert_close(  # the mean of errors of a linear network is their limit
        torch.tensor(linear["limit_error"]), torch.tensor(linear["errors"]), rtol=1e-6, atol=1e-12
    )


def test_limit_errors_of_a_network_written_out():
    task = regular_task(20, 4, channels=3, seed=0)
    network = Vanilla(activation="tanh", hidden_channels=4).build(task, 1, 0)
    first, last = (layer.weight.detach().t() for layer in network.layers)
    p = task.operator
    x = (p @ task.x @ first).tanh()
    error = (p @ x @ last - task.y) / len(task.y)
    slope = 1 - x.square()
    b0 = slope * (p.t() @ error @ last.t())
    mean = error.mean(dim=0)
    lower = slope.mean(dim=0) * (last @ mean)
    expected = [
        ((b0 - lower).norm() / b0.norm()).item(),
        ((error - mean).norm() / error.norm()).item(),
    ]
    assert linear_limit_errors(network, task) == pytest.approx(expected)


def test_training_the_last_layer_is_gradient_descent_on_it():
    task = regular_task(30, 4, channels=3, seed=0)
    found, expected = (Vanilla(hidden_channels=5).build(task, 2, 0) for _ in range(2))
    train_last_layer(found, task, steps=25)
    hidden = task.operator @ task.x
    with torch.no_grad():
        for layer, activation in zip(expected.layers, expected.activations, strict=False):
            hidden = task.operator @ activation(layer(hidden))
    rate = 1 / torch.linalg.eigvalsh(hidden.t() @ hidden / 30)[-1]
    weight = expected.layers[-1].weight
    for _ in range(25):
        (gradient,) = torch.autograd.grad(squared_loss(expected(task.x), task), weight)
        with torch.no_grad():
            weight -= rate * gradient
    torch.testing.assert_close(found.layers[-1].weight, weight)
    torch.testing.assert_close(found.layers[0].weight, expected.layers[0].weight, rtol=0, atol=0)


def test_the_hidden_gradient_is_that_of_all_weights_but_the_last():
    task = regular_task(30, 4, channels=3, seed=0)
    network = Vanilla(hidden_channels=5).build(task, 3, 0)
    found = hidden_gradient(network, task)
    squared_loss(network(task.x), task).backward()
    total = sum(layer.weight.grad.square().sum() for layer in network.layers[:3])
    assert found == pytest.approx(total.sqrt().item())


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_last_layer_alone_makes_a_deep_gnn_stationary_but_not_an_mlp(activation):
    small = dict(activation=activation, **SMALL)
    variants = {"GNN": Vanilla(**small), "MLP": Vanilla(is_graph=False, **small)}
    table = last_layer_study(variants, depths=[2, 16, 32], progress=False)
    assert len(table) == 18
    left = table.assign(left=table["after"] / table["before"]).set_index(["variant", "num_layers"])
    assert (left.loc["GNN", "left"].loc[[16, 32]] < 1e-4).all()
    assert (left.loc["MLP", "left"] > 1e-2).all()
    deep = left.loc["GNN"].loc[[16, 32]]
    assert (deep["loss"] / deep["constant_loss"]).to_numpy() == pytest.approx(1, abs=0.01)
    shallow = left.loc["GNN"].loc[[2]]
    assert (shallow["loss"] < 0.95 * shallow["constant_loss"]).all()
    assert (left.loc["MLP", "after"].loc[[2, 16, 32]] > 0.05).all(), (
        "even where loss is a constant's"
    )
    mlp = left.loc["MLP"].loc[[2, 16]]
    assert (mlp["loss"] < 0.98 * mlp["constant_loss"]).all()


def test_tanh_with_a_gain_of_six_keeps_large_gradients_at_the_loss_of_a_constant():
    variants = {"GNN": Vanilla(activation="tanh", gain=6.0, **SMALL)}
    table = last_layer_study(variants, depths=[16, 32], progress=False).set_index("num_layers")
    assert (table["loss"] / table["constant_loss"]).to_numpy() == pytest.approx(1, abs=0.01)
    assert (table["after"] / table["before"] < 1e-3).all()
    # Every layer multiplies rounding, too: with 32, the largest was 100 to 300 on two machines.
    assert table.loc[32, "after"].max() > 10 and (table["after"] > 0.01).all()
    usual = {"GNN": Vanilla(activation="tanh", **SMALL)}
    table = last_layer_study(usual, depths=[16], progress=False)
    assert (table["after"] < 1e-6).all()


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "gain"), [("relu", None), ("tanh", 1.2)])
def test_training_a_deep_gnn_ends_at_the_best_constant_and_an_mlp_does_not(activation, gain):
    small = dict(activation=activation, gain=gain, **SMALL)
    variants = {"GNN": Vanilla(**small), "MLP": Vanilla(is_graph=False, **small)}
    table = full_training(variants, depths=[1, 8], seeds=[0], progress=False)
    last = table[table["step"] == 1000].set_index(["variant", "num_layers"])
    share = last["loss"] / last["constant_loss"]
    assert share["GNN", 8] == pytest.approx(1, abs=0.01)
    assert share["GNN", 1] < 0.9
    assert share["MLP", 8] < 0.1
    assert table["step"].unique().tolist() == list(range(0, 1001, 10))


def test_the_table_of_trainings_is_of_their_last_step():
    rows = [
        dict(variant=v, num_layers=d, seed=s, step=t, loss=0.2 * d * s / (t + 1), gradient=d + s)
        for v in ("MLP", "GNN")
        for d in (1, 8)
        for s in range(3)
        for t in (0, 1)
    ]
    table = pd.DataFrame(rows).assign(constant_loss=0.1, optimiser="Adam")
    found = training_table(table)
    assert list(found.index) == [("Adam", "MLP"), ("Adam", "GNN")]
    assert found.loc[("Adam", "GNN")].to_dict() == pytest.approx({1: 1.0, 8: 8.0})
    gradients = training_table(table, "gradient")
    assert gradients.loc[("Adam", "MLP")].to_dict() == {1: 2, 8: 9}


def test_matrices_to_be_looked_at_are_those_that_are_measured():
    found = layer_matrices(Vanilla(), [0, 12], num_layers=20, seed=1)
    table = smoothing(Vanilla(), num_layers=20, seeds=[1]).set_index("layer")
    for kind, of_layer in found.items():
        for layer, matrix in of_layer.items():
            assert matrix.shape == (200, 64) and matrix.abs().max() == 1
            assert relative_spread(matrix) == pytest.approx(table.loc[layer, kind], rel=1e-6)


def lines(ax):
    return [line.get_xydata().tolist() for line in ax.lines if len(line.get_xydata())]


def test_figures_show_medians_over_seeds_shares_and_no_zeros():
    rows = [
        dict(layer=layer, seed=seed, features=10.0**-layer * (seed + 1), errors=float(layer))
        for layer in range(3)
        for seed in range(3)
    ]
    forward, backward = spread_by_layer({"GNN": pd.DataFrame(rows)}).axes.flat
    assert np.allclose(lines(forward), [[[0, 2], [1, 0.2], [2, 0.02]]])
    assert lines(backward) == [[[1, 1], [2, 2]]]
    matrices = {"errors": {k: torch.full((50, 3), -0.25 * k) for k in (1, 2)}}
    pictures = [ax.images[0].get_array() for ax in collapse(matrices, nodes=20).axes]
    assert [(picture.shape, picture[0, 0]) for picture in pictures] == [
        ((20, 3), -0.25),
        ((20, 3), -0.5),
    ]
    rows = [
        dict(variant="GNN", num_layers=d, seed=s, before=1.0 + s, after=10.0**-d, step=t)
        | dict(loss=0.2 / (t + 1), constant_loss=0.1)
        for d in (2, 4)
        for s in range(3)
        for t in (0, 1)
    ]
    (ax,) = last_layer_gradients(pd.DataFrame(rows)).axes.flat
    assert np.allclose(lines(ax), [[[2, 2], [4, 2]], [[2, 1e-2], [4, 1e-4]]])
    (ax,) = losses_in_training(pd.DataFrame(rows)).axes.flat
    assert lines(ax)[:2] == [[[0, 2], [1, 1]]] * 2
    plt.close("all")
