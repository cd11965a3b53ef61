"""Fake edges, GraphiT's kernel and SAN's gamma: dense references, limits and invariances."""

import math

import networkx as nx
import numpy as np
import pytest
import torch
from random_graphs import molecule
from torch_geometric.data import Batch

from mapkg import models
from mapkg.hooks import record
from mapkg.models.edge_attention import NodeStreamLayer
from studies.extras import build
from studies.extras.full_graph import (
    DiffusionKernel,
    FakeEdgeShare,
    FullGraphAttention,
    FullGraphLayer,
    complete,
    fake_edges,
)
from studies.published import CONFIGS

EXACT = dict(rtol=1e-10, atol=1e-10)
SIZES = dict(hidden_channels=48, heads=4, num_layers=2)
GRAPHIT = CONFIGS["GraphiT-ZINC"].replace(**SIZES, lr=7e-4)
SAN = CONFIGS["SAN-ZINC"].replace(**SIZES)
THREE = [molecule(seed, nodes) for seed, nodes in enumerate((9, 5, 12))]
BATCH = Batch.from_data_list(THREE)


def network(config, seed=0):
    torch.manual_seed(seed)
    return build(config).double().eval()


def random_layer(seed=0, channels=8, heads=2, layer=FullGraphLayer, **options):
    torch.manual_seed(seed)
    return layer(channels, heads, **options).double().eval()


def random_features(graph, seed=0, channels=8):
    generator = torch.Generator().manual_seed(seed)
    nodes, edges = graph.num_nodes, graph.num_edges
    rows = torch.randn(nodes + edges + 1, channels, generator=generator, dtype=torch.float64)
    return rows[:nodes], rows[nodes:-1], rows[-1:]


# Fake edges.


def test_a_path_of_three_by_hand():
    path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    batch = torch.zeros(3, dtype=torch.long)
    assert fake_edges(path, batch).tolist() == [[0, 2], [2, 0]]


def test_fake_edges_are_the_complement_of_each_graph():
    graphs, batch = THREE, BATCH
    found = fake_edges(batch.edge_index, batch.batch)
    expected, first = [], 0
    for graph in graphs:
        complement = nx.complement(nx.Graph(graph.edge_index.T.tolist())).to_directed()
        expected += sorted((first + i, first + j) for i, j in complement.edges)
        first += graph.num_nodes
    assert found.T.tolist() == [list(pair) for pair in expected]
    # With the edges of the data: every ordered pair of different nodes of a graph, once.
    pairs = torch.cat([batch.edge_index, found], dim=1).T.tolist()
    assert len(pairs) == len({tuple(pair) for pair in pairs}) == 9 * 8 + 5 * 4 + 12 * 11


def test_a_complete_graph_a_lonely_node_and_a_graph_without_edges():
    batch = torch.tensor([0, 0, 1, 2, 2, 4])  # graph 3 has no nodes
    edge_index = torch.tensor([[0, 1], [1, 0]])
    assert fake_edges(edge_index, batch).tolist() == [[3, 4], [4, 3]]
    nothing = torch.empty(2, 0, dtype=torch.long)
    assert fake_edges(nothing, torch.zeros(1, dtype=torch.long)).shape == (2, 0)


def test_parallel_edges_and_self_loops_stay_real_and_get_no_fake_twin():
    edge_index = torch.tensor([[0, 0, 1, 2], [1, 1, 0, 2]])
    found = fake_edges(edge_index, torch.zeros(3, dtype=torch.long))
    assert found.tolist() == [[0, 1, 2, 2], [2, 2, 0, 1]]


def test_nodes_of_graphs_that_are_mixed_up_are_an_error():
    with pytest.raises(ValueError, match="nodes of one graph after those of another"):
        fake_edges(torch.tensor([[0], [2]]), torch.tensor([0, 1, 0]))


# GraphiT's kernel.


def kernel_by_networkx(graph, gamma, power):
    undirected = nx.Graph()
    undirected.add_nodes_from(range(graph.num_nodes))
    undirected.add_edges_from(graph.edge_index.T.tolist())
    laplacian = nx.normalized_laplacian_matrix(undirected).toarray()
    return np.linalg.matrix_power(np.eye(graph.num_nodes) - gamma * laplacian, power)


@pytest.mark.parametrize(("gamma", "power"), [(0.25, 16), (0.5, 1), (1.0, 3)])
def test_the_kernel_agrees_with_a_dense_computation_per_molecule(gamma, power):
    graphs, batch = THREE, BATCH
    fake = fake_edges(batch.edge_index, batch.batch)
    found = DiffusionKernel(gamma, power)(batch.edge_index, fake, batch.batch)
    first = batch.ptr[batch.batch]
    expected = [
        kernel_by_networkx(graphs[batch.batch[i]], gamma, power)[i - first[i], j - first[j]]
        for i, j in torch.cat([batch.edge_index, fake], dim=1).T.tolist()
    ]
    torch.testing.assert_close(found[:, 0], torch.tensor(expected), **EXACT)


def test_the_kernel_of_a_pair_follows_the_direction_of_its_edge():
    # 0 -> 1 alone: both nodes count as of degree 1, (I - L/4)^2 = (3/4 I + 1/4 A)^2 has
    # 2 * 3/4 * 1/4 from 0 to 1 and nothing from 1 to 0.
    edge, fake = torch.tensor([[0], [1]]), torch.tensor([[1], [0]])
    factor = DiffusionKernel(power=2)(edge, fake, torch.zeros(2, dtype=torch.long))
    assert factor.flatten().tolist() == pytest.approx([0.375, 0.0], abs=1e-15)


def test_pairs_further_apart_than_the_steps_or_not_connected_get_nothing():
    path = torch.stack([torch.arange(5), torch.arange(1, 6)])  # 0 - 1 - ... - 5, and 6 alone
    edge_index = torch.cat([path, path.flip(0)], dim=1)
    batch = torch.zeros(7, dtype=torch.long)
    fake = fake_edges(edge_index, batch)
    factor = DiffusionKernel(power=3)(edge_index, fake, batch).flatten()
    assert factor.isfinite().all()
    for (i, j), value in zip(torch.cat([edge_index, fake], 1).T.tolist(), factor, strict=True):
        near = max(i, j) < 6 and abs(i - j) <= 3
        assert (value > 0) == near, (i, j)


# SAN's gamma.


def test_the_shares_of_real_and_fake_edges():
    real, fake = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long)
    share = FakeEdgeShare(0.25)
    found = share(real, fake, torch.zeros(1, dtype=torch.long))
    assert found.flatten().tolist() == [0.8, 0.8, 0.8, 0.2, 0.2]
    assert not list(share.parameters())
    assert not share.state_dict()


@pytest.mark.parametrize(("value", "clamped"), [(0.1, 0.1), (-0.5, 0.0), (3.0, 1.0)])
def test_a_learned_gamma_is_clamped(value, clamped):
    share = FakeEdgeShare().double()
    assert share.gamma.item() == pytest.approx(0.1)  # the published start
    with torch.no_grad():
        share.gamma.fill_(value)
    edge = torch.zeros(2, 1, dtype=torch.long)
    found = share(edge, edge, torch.zeros(1, dtype=torch.long))
    assert found.flatten().tolist() == pytest.approx([1 / (1 + clamped), clamped / (1 + clamped)])


@pytest.mark.parametrize("gamma", [-0.1, 1.5, math.nan])
def test_a_gamma_out_of_range_is_an_error(gamma):
    with pytest.raises(ValueError, match=r"gamma: expected a value in \[0, 1\]"):
        FakeEdgeShare(gamma)


# The attention.


def attention_by_loop(attention, x, edges, fake, factor):
    """The full-graph equations pair by pair in numpy: score [E + F, D], attended [N, D]."""

    def affine(linear, rows):
        bias = 0.0 if linear.bias is None else linear.bias.detach().numpy()
        return rows.detach().numpy() @ linear.weight.detach().numpy().T + bias

    def gate(linear, rows):
        return np.ones(rows.shape) if linear is None else affine(linear, rows)

    a = attention
    kinds = [
        (*edges, affine(a.query, x), affine(a.key, x), gate(a.edge, edges[1])),
        (*fake, affine(a.fake_query, x), affine(a.fake_key, x), gate(a.fake_edge, fake[1])),
    ]
    value, heads, width = affine(a.value, x), a.heads, a.head_channels
    numerator, denominator = np.zeros((len(x), heads, width)), np.zeros((len(x), heads))
    scores, weights = [], iter(factor.flatten().tolist())
    for index, _, query, key, gate in kinds:
        for edge, (source, target) in enumerate(index.T.tolist()):
            score = key[source] * query[target] / math.sqrt(width) * gate[edge]
            scores.append(score)
            share = next(weights)
            for head in range(heads):
                channels = slice(head * width, (head + 1) * width)
                weight = share * math.exp(min(5.0, max(-5.0, score[channels].sum())))
                numerator[target, head] += weight * value[source, channels]
                denominator[target, head] += weight
    attended = numerator / (denominator[..., None] + 1e-6)
    return np.stack(scores), attended.reshape(len(x), -1)


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"attention": "no_edge"}], ids=str)
@pytest.mark.parametrize("factor", [DiffusionKernel(), FakeEdgeShare(0.3)], ids=["k", "gamma"])
def test_the_equations_agree_with_a_loop_over_pairs(factor, options):
    torch.manual_seed(0)
    attention = FullGraphAttention(8, 2, **options).double()
    batch = BATCH
    x, edge_attr, no_edge = random_features(batch)
    completion = complete(batch.edge_index, batch.batch, no_edge, factor)
    fakes = completion.edge_index.size(1)
    with record(attention, ["score", "attended"]) as seen:
        attended, score = attention(x, batch.edge_index, edge_attr, completion)
    expected_score, expected = attention_by_loop(
        attention,
        x,
        (batch.edge_index, edge_attr),
        (completion.edge_index, no_edge.expand(fakes, -1)),
        completion.factor,
    )
    torch.testing.assert_close(score, torch.from_numpy(expected_score), **EXACT)
    torch.testing.assert_close(attended, torch.from_numpy(expected), **EXACT)
    assert torch.equal(seen["score"][0], score)
    assert len(score) == batch.num_edges + fakes


def test_fake_edges_of_no_weight_leave_the_sparse_layer():
    full, sparse = random_layer(), random_layer(1, layer=NodeStreamLayer)
    sparse.load_state_dict({k: v for k, v in full.state_dict().items() if "fake" not in k})
    graph = molecule(0, 9)
    x, edge_attr, no_edge = random_features(graph)
    completion = complete(
        graph.edge_index, torch.zeros(9, dtype=torch.long), no_edge, FakeEdgeShare(0.0)
    )
    found, edges = full(x, graph.edge_index, edge_attr, completion)
    expected, _ = sparse(x, graph.edge_index, edge_attr)
    torch.testing.assert_close(found, expected, **EXACT)
    assert edges is edge_attr


def test_without_edges_real_and_fake_differ_by_their_projections_only():
    attention = FullGraphAttention(8, 2, attention="no_edge")
    names = {name.split(".")[0] for name, _ in attention.named_parameters()}
    assert names == {"query", "key", "value", "fake_query", "fake_key"}


# Networks.


def test_with_their_mechanisms_off_graphit_and_san_are_the_same_function():
    graphit, san = network(GRAPHIT), network(SAN, seed=1)
    san.load_state_dict(graphit.state_dict())
    batch = BATCH.x, BATCH.edge_index, BATCH.edge_attr, BATCH.batch
    assert torch.equal(graphit(*batch), san(*batch))


def test_edges_of_several_columns_or_of_floats_have_an_edge_that_is_not_there():
    graph = THREE[0]
    columns = graph.edge_attr.unsqueeze(1).repeat(1, 2)
    for changes, edge_attr in (
        (dict(num_edge_types=(4, 5)), columns),
        (dict(num_edge_types=None, edge_channels=2), columns.double()),
    ):
        model = network(GRAPHIT.replace(full_graph=True, **changes))
        with record(model, "edge_embedding") as seen:
            model(graph.x, graph.edge_index, edge_attr)
        edges, no_edge = seen["edge_embedding"]
        assert len(edges) == graph.num_edges
        embedding = model.edge_embedding  # id 0 of each column, or the map of zeros
        is_map = isinstance(embedding, torch.nn.Linear)
        expected = embedding.bias if is_map else embedding.weight[[0, 4]].sum(dim=0)
        torch.testing.assert_close(no_edge[0], expected, **EXACT)


# Configurations.


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("GT-ZINC", dict(full_graph=True), "only graphit and san"),
        ("GAT-ZINC", dict(full_graph=True), "only graphit and san"),
        ("GraphiT-PROTEINS", dict(full_graph=True), "node-level task"),
        ("SAN-PROTEINS", dict(laplacian_encoding=True), "node-level task"),
        ("GraphiT-ZINC", dict(full_graph=True, gamma=0.5), "gamma: expected a value"),
        ("SAN-ZINC", dict(gamma=0.5), "gamma: expected a value"),
        ("SAN-ZINC", dict(full_graph=True, gamma=1.5), r"in \[0, 1\] .* got 1\.5"),
        ("SAN-ZINC", dict(laplacian_sign_flips=True), "expected laplacian_encoding=True"),
        ("SAN-ZINC", dict(laplacian_encoding=True, hidden_channels=8), "hidden_channels"),
        ("SAN-ZINC", dict(full_graph=True, explicit_bias="sink"), r"expected one of \('none',\)"),
    ],
)
def test_a_mechanism_that_does_not_fit_is_an_error(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(CONFIGS[name].replace(**changes))


@pytest.mark.parametrize(
    "changes", [dict(full_graph=True), dict(laplacian_encoding=True), dict(gamma=0.0)], ids=str
)
def test_the_library_refuses_a_mechanism_and_says_what_builds_it(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=rf"{name}: .* use studies\.extras\.build"):
        models.build(SAN.replace(**changes))
