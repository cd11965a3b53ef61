"""What the theory of backward oversmoothing expects, on regular graphs."""

import pytest
import torch

from studies import backward_oversmoothing as study
from studies.data.networks import regular_task


@pytest.fixture
def task():
    return regular_task(30, 4, channels=3, seed=0)


def test_metropolis_weights_average_an_irregular_graph():
    p, regular = (study.FAMILIES[name](seed=0).operator for name in ("irregular", "regular"))
    torch.testing.assert_close(p.sum(dim=1), torch.ones(200, dtype=torch.float64))
    assert torch.equal(p, p.t()) and (p >= 0).all()
    degrees = (p > 0).sum(dim=0) - 1
    assert degrees.unique().numel() > 10 and len((regular > 0).sum(dim=0).unique()) == 1
    i, j = ((p > 0) & ~torch.eye(200, dtype=torch.bool)).nonzero()[7]
    assert p[i, j] == 1 / (1 + max(degrees[i], degrees[j]).item())


def test_limit_errors_of_a_network_written_out():
    task = regular_task(20, 4, channels=3, seed=0)
    network = study.VanillaNetwork(task, 1, 0, activation="tanh", hidden_channels=4)
    first, last = (layer.weight.detach().t() for layer in network.layers)
    p = task.operator
    x = (p @ task.x @ first).tanh()
    error = (p @ x @ last - task.y) / len(task.y)
    slope = 1 - x.square()
    b0 = slope * (p.t() @ error @ last.t())
    mean = error.mean(dim=0)
    lower = slope.mean(dim=0) * (last @ mean)
    expected = [((b - m).norm() / b.norm()).item() for b, m in ((b0, lower), (error, mean))]
    assert study.linear_limit_errors(network, task) == pytest.approx(expected)


def test_training_the_last_layer_is_gradient_descent_on_it(task):
    network, expected = (study.VanillaNetwork(task, 2, 0, hidden_channels=5) for _ in range(2))
    study.train_last_layer(network, task, steps=25)
    hidden = task.operator @ expected.trace(task.x)[0][-1][1].detach()
    rate = 1 / torch.linalg.eigvalsh(hidden.t() @ hidden / 30)[-1]
    weight = expected.layers[-1].weight
    for _ in range(25):
        (gradient,) = torch.autograd.grad(study.squared_loss(expected(task.x), task), weight)
        with torch.no_grad():
            weight -= rate * gradient
    torch.testing.assert_close(network.layers[-1].weight, weight)
    torch.testing.assert_close(network.layers[0].weight, expected.layers[0].weight, rtol=0, atol=0)


def test_the_hidden_gradient_is_that_of_all_weights_but_the_last(task):
    network = study.VanillaNetwork(task, 3, 0, hidden_channels=5)
    total = study.hidden_gradient(network, task)
    study.squared_loss(network(task.x), task).backward()
    squares = sum(layer.weight.grad.square().sum() for layer in network.layers[:3])
    assert total == pytest.approx(squares.sqrt().item())


def test_training_all_layers_is_measured_before_each_step(task, monkeypatch):
    monkeypatch.setitem(study.FAMILIES, "regular", lambda seed: task)
    variants = {"MLP": dict(hidden_channels=5, is_graph=False)}
    table = study.full_training(variants, depths=[3], seeds=[0], steps=12, progress=False)
    assert table["step"].tolist() == [0, 10, 12]
    network = study.VanillaNetwork(task, 3, 0, hidden_channels=5, is_graph=False)
    descent = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(12):
        descent.zero_grad()
        study.squared_loss(network(task.x), task).backward()
        descent.step()
    assert table["loss"].iloc[2] == pytest.approx(study.squared_loss(network(task.x), task).item())
    assert table["gradient"].iloc[2] == pytest.approx(study.hidden_gradient(network, task))
