"""What the theory of backward oversmoothing expects, on regular graphs."""

import numpy as np
import pytest
import torch

from mapkg.data.regular import regular_task
from mapkg.experiments.backward_smoothing import (
    Vanilla,
    full_training,
    hidden_gradient,
    last_layer_study,
    layer_matrices,
    linear_limit_errors,
    smoothing,
    squared_loss,
    train_last_layer,
)
from mapkg.smoothing import limits, relative_spread

SMALL = dict(hidden_channels=32)


@pytest.mark.parametrize("activation", ["relu", "tanh", "linear"])
def test_features_smooth_as_fast_as_the_second_eigenvalue_says(activation):
    table = smoothing(Vanilla(activation=activation), seeds=[0])
    contraction = limits(regular_task(seed=0).operator).contraction
    logs = np.log(table["features"].dropna())
    slope = np.polyfit(np.arange(5, 25), logs[5:25], 1)[0]
    assert slope == pytest.approx(np.log(contraction), rel=0.2)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_errors_are_smoothest_in_the_middle(activation, seed):
    errors = smoothing(Vanilla(activation=activation), seeds=[seed])["errors"].to_numpy()
    least = errors.argmin()
    assert 3 < least < 27
    assert errors[least] < 1e-3 * min(errors[0], errors[-1])


def test_errors_of_a_linear_network_smooth_all_the_way():
    errors = smoothing(Vanilla(activation="linear"), seeds=[0])["errors"].to_numpy()
    assert (np.diff(errors[:-1]) > 0).all()
    assert errors[0] < 1e-9 and errors[-1] > 0.5


def test_far_from_both_ends_errors_follow_their_mean():
    table = smoothing(Vanilla(), seeds=[0])
    assert table["limit_error"].iloc[18:22].max() < 1e-3
    assert table["limit_error"].iloc[[0, -2]].min() > 0.1
    linear = smoothing(Vanilla(activation="linear"), seeds=[0])
    torch.testing.assert_close(  # the mean of errors of a linear network is their limit
        torch.tensor(linear["limit_error"]), torch.tensor(linear["errors"]), rtol=1e-6, atol=1e-12
    )


def test_large_weights_keep_features_and_errors_apart():
    def at(gain):
        variant = Vanilla(activation="tanh", gain=gain, draw="normal")
        return smoothing(variant, num_layers=40, degree=6, seeds=[0])

    one, large = at(1.0), at(12.0)
    assert one["features"].iloc[39] < 1e-3
    assert large["features"].iloc[39] > 0.1
    assert large["errors"].iloc[2:35].min() > 0.5 > one["errors"].iloc[2:35].max()


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
        (gradient,) = torch.autograd.grad(squared_loss(expected, task), weight)
        with torch.no_grad():
            weight -= rate * gradient
    torch.testing.assert_close(found.layers[-1].weight, weight)
    torch.testing.assert_close(found.layers[0].weight, expected.layers[0].weight, rtol=0, atol=0)


def test_the_hidden_gradient_is_that_of_all_weights_but_the_last():
    task = regular_task(30, 4, channels=3, seed=0)
    network = Vanilla(hidden_channels=5).build(task, 3, 0)
    found = hidden_gradient(network, task)
    squared_loss(network, task).backward()
    total = sum(layer.weight.grad.square().sum() for layer in network.layers[:3])
    assert found == pytest.approx(total.sqrt().item())


def test_the_last_layer_alone_makes_a_deep_gnn_stationary_but_not_an_mlp():
    variants = {"GNN": Vanilla(**SMALL), "MLP": Vanilla(is_graph=False, **SMALL)}
    table = last_layer_study(variants, depths=[2, 16, 32], progress=False)
    assert len(table) == 18
    left = table.assign(left=table["after"] / table["before"]).set_index(["variant", "num_layers"])
    assert (left.loc["GNN", "left"].loc[[16, 32]] < 1e-4).all()
    assert (left.loc["MLP", "left"] > 1e-2).all()
    deep = left.loc["GNN"].loc[[16, 32]]
    assert (deep["loss"] / deep["constant_loss"]).to_numpy() == pytest.approx(1, abs=0.01)
    shallow = left.loc["GNN"].loc[[2]]
    assert (shallow["loss"] < 0.95 * shallow["constant_loss"]).all()


def test_training_a_deep_gnn_ends_at_the_best_constant_and_an_mlp_does_not():
    variants = {"GNN": Vanilla(**SMALL), "MLP": Vanilla(is_graph=False, **SMALL)}
    table = full_training(variants, depths=[1, 8], seeds=[0], progress=False)
    last = table[table["step"] == 1000].set_index(["variant", "num_layers"])
    share = last["loss"] / last["constant_loss"]
    assert share["GNN", 8] == pytest.approx(1, abs=0.01)
    assert share["GNN", 1] < 0.9
    assert share["MLP", 8] < 0.1
    assert table["step"].unique().tolist() == list(range(0, 1001, 10))


def test_an_optimiser_that_is_none_is_refused():
    with pytest.raises(ValueError, match="optimiser: expected one of gradient descent, Adam"):
        full_training({"GNN": Vanilla()}, optimiser="sgd", progress=False)


def test_matrices_to_be_looked_at_are_those_that_are_measured():
    found = layer_matrices(Vanilla(), [0, 12], num_layers=20, seed=1)
    table = smoothing(Vanilla(), num_layers=20, seeds=[1]).set_index("layer")
    for kind, of_layer in found.items():
        for layer, matrix in of_layer.items():
            assert matrix.shape == (200, 64) and matrix.abs().max() == 1
            assert relative_spread(matrix) == pytest.approx(table.loc[layer, kind], rel=1e-6)
