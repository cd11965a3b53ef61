"""Smoothness against hand values, and its limits on regular and on other graphs."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch_geometric.nn import GATConv, GCNConv
from torch_geometric.utils import to_undirected

from mapkg.oversmoothing import (
    limits,
    rank_one_distance,
    relative_spread,
    smoothing_by_layer,
    spread,
    uniform_attention_limits,
)
from studies.backward_oversmoothing import VanillaNetwork
from studies.data.networks import regular_task

TRIANGLE_WITH_TAIL = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 3]])


@torch.no_grad()
def operator_of(kind, edge_index, nodes):
    """The matrix with which a layer of PyG averages, read off the unit vectors."""
    layer, unit = kind(nodes, nodes, bias=False).double(), torch.eye(nodes, dtype=torch.double)
    layer.lin.weight.copy_(unit)
    if kind is GATConv:
        layer.att_src.zero_(), layer.att_dst.zero_()  # scores of zero: all weights alike
    return layer(unit, edge_index)


def test_hand_values():
    x = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    # Mean 2, differences of one: sqrt(2) over sqrt(10).
    assert relative_spread(x) == pytest.approx((2 / 10) ** 0.5)
    assert spread(x) == pytest.approx(1.0)
    assert relative_spread(x, torch.tensor([3.0, 1.0])) == pytest.approx(0, abs=1e-6)
    assert relative_spread(x, torch.tensor([7.0, 7.0])) == pytest.approx((2 / 10) ** 0.5)
    assert relative_spread(1e-7 * x) == pytest.approx(relative_spread(x))
    assert relative_spread(torch.zeros(3, 2)) == 0
    diagonal = torch.diag(torch.tensor([3.0, 4.0]))
    assert rank_one_distance(diagonal) == pytest.approx(3 / 5)
    assert rank_one_distance(torch.zeros(2, 2)) == 0


@pytest.mark.parametrize("measure", [relative_spread, spread, rank_one_distance])
def test_half_precision_does_not_overflow(measure):
    x = 300 + 20 * torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    for kind in (torch.half, torch.bfloat16):
        x = x.to(kind)
        assert measure(x) == measure(x.float()) > 0.05


@pytest.mark.parametrize("measure", [relative_spread, rank_one_distance])
def test_how_alike_rows_are_does_not_depend_on_their_scale(measure):
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    for scale in (1e-30, 1e-20, 1e20, 1e35):
        assert measure(scale * x) == pytest.approx(measure(x), rel=1e-5)
    x[3, 4] = np.nan
    assert np.isnan(measure(x))


def test_limits_of_a_regular_graph_are_constant_and_its_contraction_the_second_eigenvalue():
    operator = regular_task(60, 6, seed=1).operator
    found = limits(3 * operator)
    for vector in (found.features, found.errors):
        torch.testing.assert_close(vector, vector.new_full((60,), 60**-0.5))
    values = np.sort(np.abs(np.linalg.eigvalsh(operator.numpy())))
    assert found.contraction == pytest.approx(values[-2] / values[-1])


def test_limits_of_a_graph_that_is_not_regular():
    edge_index = to_undirected(TRIANGLE_WITH_TAIL)
    degree = torch.tensor([3.0, 3.0, 4.0, 2.0], dtype=torch.double)  # with self-loops
    symmetric = limits(operator_of(GCNConv, edge_index, 4))
    for vector in (symmetric.features, symmetric.errors):
        torch.testing.assert_close(vector, degree.sqrt() / degree.sqrt().norm())
    by_rows = operator_of(GATConv, edge_index, 4)
    walk = limits(by_rows)  # features become constant, errors gather where degrees are large
    torch.testing.assert_close(walk.features, torch.full((4,), 0.5, dtype=torch.double))
    torch.testing.assert_close(walk.errors, degree / degree.norm())
    assert walk.contraction == pytest.approx(symmetric.contraction)  # similar matrices
    x = torch.randn(4, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    back = torch.linalg.matrix_power(by_rows.t(), 200) @ x
    assert relative_spread(back, walk.errors) < 1e-12 < relative_spread(back)


@pytest.mark.parametrize("is_regular", [False, True])
def test_limits_of_uniform_attention_are_those_of_its_matrix(is_regular):
    edge_index = to_undirected(TRIANGLE_WITH_TAIL)
    if is_regular:
        adjacency = regular_task(30, 4, seed=2).operator.fill_diagonal_(0)
        edge_index = adjacency.nonzero().t()
    nodes = 30 if is_regular else 4
    expected = limits(operator_of(GATConv, edge_index, nodes))
    itself = torch.stack([torch.arange(nodes)] * 2)
    for edges in (edge_index, torch.cat([edge_index, itself], dim=1)):
        found = uniform_attention_limits(edges, nodes)
        torch.testing.assert_close(found.features, expected.features)
        torch.testing.assert_close(found.errors, expected.errors)
        assert found.contraction == pytest.approx(expected.contraction)


def test_a_long_ring_has_the_contraction_of_its_cosines():
    nodes = 3000
    ring = torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])
    expected = (1 + 2 * np.cos(2 * np.pi / nodes)) / 3
    assert uniform_attention_limits(to_undirected(ring), nodes).contraction == pytest.approx(
        expected, abs=1e-12
    )


def test_what_has_no_limits_is_refused():
    for operator, message in (
        ([[0.5, 0.5], [0.0, 1.0]], "got one of 2 parts; features"),
        ([[0.0, 1.0], [1.0, 0.0]], "bipartite graph without self-loops"),
        ([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], "got several"),
        ([[1.0, -1.0], [1.0, 1.0]], "of numbers that are not negative, got others"),
        ([[1.0, np.nan], [1.0, 1.0]], "of numbers that are not negative"),
        ([[1.0, 1.0]], "square matrix"),
        ([[]], r"square matrix .*, got shape \(1, 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            limits(torch.tensor(operator))
    apart = to_undirected(torch.tensor([[0, 2], [1, 3]]))
    for edges, message in ((TRIANGLE_WITH_TAIL, "both directions"), (apart, "one of 2 parts")):
        with pytest.raises(ValueError, match=message):
            uniform_attention_limits(edges, 4)


def test_layers_of_a_network_written_out():
    torch.manual_seed(0)
    task = regular_task(20, 4, channels=3, seed=0)
    network = VanillaNetwork(task, 2, 0, hidden_channels=5)
    first, second, last = (layer.weight.detach().t() for layer in network.layers)
    p = task.operator
    h0 = p @ task.x @ first
    h1 = p @ h0.relu() @ second
    error = (p @ h1.relu() @ last - task.y) / len(task.y)
    b1 = (h1 > 0) * (p.t() @ error @ last.t())
    b0 = (h0 > 0) * (p.t() @ b1 @ second.t())

    def loss():
        return 0.5 * (network(task.x) - task.y).square().mean()

    table = smoothing_by_layer(network, loss, "activations.*", "layers.*")
    assert table["layer"].tolist() == [0, 1, 2]
    features, errors = (h0.relu(), h1.relu()), (b0, b1, error)
    for column, of_layers in (("features", features), ("errors", errors)):
        for name, value in (("", relative_spread), ("_rank_one", rank_one_distance)):
            expected = [*map(value, of_layers), np.nan][:3]  # the last layer has no activation
            assert table[column + name].tolist() == pytest.approx(expected, nan_ok=True)
    assert table["features_spread"].tolist()[:2] == pytest.approx([*map(spread, features)])
    assert table["error"].tolist() == pytest.approx([b.norm().item() for b in errors])
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("frozen", [[], [0], [0, 2, 4]])
def test_frozen_layers_and_what_is_changed_in_place_are_measured_as_they_were(frozen):
    def table(in_place, frozen=frozen):
        torch.manual_seed(0)
        parts = [m for _ in range(3) for m in (nn.Linear(4, 4), nn.ReLU(inplace=in_place))]
        network, x = nn.Sequential(*parts), torch.randn(9, 4)
        for place in frozen:
            network[place].requires_grad_(False)
        return smoothing_by_layer(network, lambda: network(x).square().sum(), ["0", "2", "4"])

    expected = table(in_place=False, frozen=[])
    pd.testing.assert_frame_equal(table(in_place=False), expected)
    pd.testing.assert_frame_equal(table(in_place=True), expected)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_what_cannot_be_measured_is_refused():
    torch.manual_seed(0)
    network, x = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), torch.randn(3, 2)
    a, b = network.values()
    network["two"] = two = Pair()
    for loss, names, words in (
        (lambda: a(a(x)).sum(), "a", "a: expected one forward pass, it ran more than once"),
        (lambda: a(x).sum(), ["a", "b"], "b: expected the loss to run it"),
        (lambda: a(x).sum() + 0 * len(b(x)), ["a", "b"], "b: expected a loss that depends on its"),
        (lambda: a(x).sum(), "convs.*", "convs"),
        (lambda: two(x)[0].sum(), "two", "two: expected a tensor of features, got a tuple"),
    ):
        with pytest.raises((ValueError, KeyError, TypeError), match=words):
            smoothing_by_layer(network, loss, names)
    with pytest.raises(ValueError, match="one value for each of 3 nodes, got shape"):
        relative_spread(x, torch.ones(2))
