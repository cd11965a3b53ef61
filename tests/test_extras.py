"""Fake edges, GraphiT's kernel, SAN's gamma and its encoding: dense references and limits."""

import networkx as nx
import numpy as np
import pytest
import torch
from random_graphs import molecule
from torch_geometric.data import Batch
from torch_geometric.utils import from_networkx

from mapkg import models
from mapkg.hooks import record
from studies import extras
from studies.published import CONFIGS

EXACT = dict(rtol=1e-10, atol=1e-10)
GRAPHIT = CONFIGS["GraphiT-ZINC"].replace(hidden_channels=48, heads=4, num_layers=2)
THREE = [molecule(seed, nodes) for seed, nodes in enumerate((9, 5, 12))]
BATCH = Batch.from_data_list(THREE)


def test_fake_edges_of_small_graphs_by_hand():
    for edges, batch, expected in (
        ([[0, 1, 1, 2], [1, 0, 2, 1]], [0, 0, 0], [[0, 2], [2, 0]]),
        # A complete graph, a lonely node, two nodes, and a graph 3 without nodes.
        ([[0, 1], [1, 0]], [0, 0, 1, 2, 2, 4], [[3, 4], [4, 3]]),
        # Parallel edges and self-loops stay real and get no fake twin.
        ([[0, 0, 1, 2], [1, 1, 0, 2]], [0, 0, 0], [[0, 1, 2, 2], [2, 2, 0, 1]]),
    ):
        assert extras.fake_edges(torch.tensor(edges), torch.tensor(batch)).tolist() == expected


@pytest.mark.parametrize(("gamma", "power"), [(0.25, 16), (0.5, 1), (1.0, 3)])
def test_the_kernel_agrees_with_a_dense_computation_per_molecule(gamma, power):
    fake, first = extras.fake_edges(BATCH.edge_index, BATCH.batch), BATCH.ptr[BATCH.batch]
    kernels = []
    for graph in THREE:
        undirected = nx.Graph(graph.edge_index.T.tolist())
        laplacian = nx.normalized_laplacian_matrix(undirected, range(graph.num_nodes)).toarray()
        steps = np.eye(graph.num_nodes) - gamma * laplacian
        kernels.append(np.linalg.matrix_power(steps, power))
    found = extras.DiffusionKernel(gamma, power)(BATCH.edge_index, fake, BATCH.batch)
    pairs = torch.cat([BATCH.edge_index, fake], dim=1).T.tolist()
    expected = [kernels[BATCH.batch[i]][i - first[i], j - first[j]] for i, j in pairs]
    torch.testing.assert_close(found[:, 0], torch.tensor(expected), **EXACT)
    # Every ordered pair of different nodes of a graph, once.
    assert len(pairs) == len({tuple(pair) for pair in pairs}) == 9 * 8 + 5 * 4 + 12 * 11


def test_the_kernel_of_a_pair_follows_the_direction_of_its_edge():
    # 0 -> 1 alone: both nodes count as of degree 1, (I - L/4)^2 = (3/4 I + 1/4 A)^2 has
    # 2 * 3/4 * 1/4 from 0 to 1 and nothing from 1 to 0.
    edge, fake = torch.tensor([[0], [1]]), torch.tensor([[1], [0]])
    factor = extras.DiffusionKernel(power=2)(edge, fake, torch.zeros(2, dtype=torch.long))
    assert factor.flatten().tolist() == pytest.approx([0.375, 0.0], abs=1e-15)


@pytest.mark.parametrize(("value", "share"), [(0.25, 0.2), (-0.5, 0.0), (3.0, 0.5)])
def test_shares_of_real_and_fake_edges_with_a_gamma_that_is_clamped(value, share):
    learned = extras.FakeEdgeShare().double()
    assert learned.gamma.item() == pytest.approx(0.1)  # the published start
    with torch.no_grad():
        learned.gamma.fill_(value)
    real, fake = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long)
    found = learned(real, fake, torch.zeros(1, dtype=torch.long)).flatten().tolist()
    assert found == pytest.approx([1 - share] * 3 + [share] * 2)
    if value == 0.25:
        fixed = extras.FakeEdgeShare(value)
        assert not list(fixed.parameters())
        assert fixed(real, fake, torch.zeros(1).long()).flatten().tolist() == pytest.approx(found)
    else:
        with pytest.raises(ValueError, match=r"gamma: expected a value in \[0, 1\]"):
            extras.FakeEdgeShare(value)


def attention_by_loop(a, x, edges, fake, factor):
    """The full-graph equations pair by pair: score [E + F, D], attended [N, D]."""
    scores, total = [], torch.full((len(x), 2), 1e-6).double()
    value, brought = a.value(x).view(-1, 2, 4), torch.zeros(len(x), 2, 4).double()
    for prefix, index, rows in (("", *edges), ("fake_", *fake)):
        query, key, edge = (getattr(a, f"{prefix}{name}") for name in ("query", "key", "edge"))
        for (j, i), row in zip(index.T.tolist(), rows, strict=True):
            gate = 1 if edge is None else edge(row)
            score = key(x[j]) * query(x[i]) / 2 * gate
            weight = score.view(2, 4).sum(dim=1).clamp(-5, 5).exp() * factor[len(scores)]
            brought[i] += weight.unsqueeze(1) * value[j]
            total[i] += weight
            scores.append(score)
    return torch.stack(scores), (brought / total.unsqueeze(2)).flatten(1)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"attention": "no_edge"}], ids=str)
def test_the_equations_agree_with_a_loop_over_pairs(options):
    torch.manual_seed(0)
    attention = extras.FullGraphAttention(8, 2, **options).double()
    x, edge_attr, no_edge = (
        torch.randn(n, 8).double() for n in (BATCH.num_nodes, BATCH.num_edges, 1)
    )
    fake_index = extras.fake_edges(BATCH.edge_index, BATCH.batch)
    factor = extras.FakeEdgeShare(0.3)(BATCH.edge_index, fake_index, BATCH.batch)
    completion = extras.Completion(fake_index, no_edge, factor)
    attended, score = attention(x, BATCH.edge_index, edge_attr, completion)
    fake = completion.edge_index, no_edge.expand(completion.edge_index.size(1), -1)
    edges = BATCH.edge_index, edge_attr
    expected = attention_by_loop(attention, x, edges, fake, completion.factor)
    torch.testing.assert_close((score, attended), expected, **EXACT)


def test_edges_of_several_columns_or_of_floats_have_an_edge_that_is_not_there():
    graph = THREE[0]
    columns = graph.edge_attr.unsqueeze(1).repeat(1, 2)
    for changes, edge_attr in (
        (dict(num_edge_types=(4, 5)), columns),
        (dict(num_edge_types=None, edge_channels=2), columns.double()),
    ):
        model = extras.build(GRAPHIT.replace(full_graph=True, **changes)).double()
        with record(model, "edge_embedding") as seen:
            model(graph.x, graph.edge_index, edge_attr)
        edges, no_edge = seen["edge_embedding"]
        assert len(edges) == graph.num_edges
        embedding = model.edge_embedding  # id 0 of each column, or the map of zeros
        is_map = isinstance(embedding, torch.nn.Linear)
        expected = embedding.bias if is_map else embedding.weight[[0, 4]].sum(dim=0)
        torch.testing.assert_close(no_edge[0], expected, **EXACT)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("GT-ZINC", dict(full_graph=True), "one of graphit and san with full_graph, got 'gt'"),
        ("GraphiT-PROTEINS", dict(full_graph=True), "readout: expected whole graphs"),
        ("GraphiT-ZINC", dict(full_graph=True, gamma=0.5), r"gamma: expected None .*got 0\.5"),
        ("SAN-ZINC", dict(gamma=0.5), "gamma: expected None but for san with full_graph"),
        ("SAN-ZINC", dict(full_graph=True, gamma=1.5), r"in \[0, 1\] .* got 1\.5"),
        ("SAN-ZINC", dict(laplacian_sign_flips=True), "expected laplacian_encoding with it"),
        ("SAN-ZINC", dict(laplacian_encoding=True, hidden_channels=8), "more than the 8"),
        ("SAN-ZINC", dict(full_graph=True, explicit_bias="sink"), r"expected one of \('none',\)"),
    ],
)
def test_a_mechanism_that_does_not_fit_is_an_error(name, changes, message):
    with pytest.raises(ValueError, match=message):
        extras.build(CONFIGS[name].replace(**changes))
    if len(changes) == 1:
        with pytest.raises(ValueError, match=r"full_graph|use studies\.extras\.build"):
            models.build(CONFIGS[name].replace(**changes))


def tree(seed, nodes):
    return nx.random_labeled_tree(nodes, seed=seed)


def together(*graphs):
    """Edges and the graph of each node of several networkx graphs."""
    batch = Batch.from_data_list([from_networkx(graph) for graph in graphs])
    return batch.edge_index, batch.batch


def random_encoding(**options):
    torch.manual_seed(0)
    return extras.LaplacianEncoding(feedforward_channels=16, **options).double().eval()


def test_the_pairs_are_those_of_the_smallest_eigenvalues_of_each_graph():
    graphs = tree(0, 14), nx.petersen_graph(), tree(2, 4)
    edge_index, batch = together(*graphs)
    vectors, values, missing = (
        t.numpy() for t in extras.laplacian_eigenpairs(edge_index, batch, 6)
    )
    for number, graph in enumerate(graphs):
        rows = batch.numpy() == number
        laplacian = nx.laplacian_matrix(graph, nodelist=sorted(graph)).toarray()
        known = min(6, len(graph))
        assert missing[rows].tolist() == [[k >= known for k in range(6)]] * len(graph)
        expected = np.linalg.eigvalsh(laplacian)[:known]
        np.testing.assert_allclose(values[rows][:, :known] - expected, 0, atol=1e-9)
        v = vectors[rows][:, :known]
        np.testing.assert_allclose(laplacian @ v, v * expected, atol=1e-9)
        np.testing.assert_allclose(v.T @ v, np.eye(known), atol=1e-9)
        assert (vectors[rows][:, known:] == 0).all()
        assert ((v**3).sum(axis=0) > -1e-9).all()


def test_lonely_nodes_and_edges_one_way():
    batch = torch.tensor([0, 2])  # graph 1 has no nodes
    vectors, values, missing = extras.laplacian_eigenpairs(torch.empty(2, 0).long(), batch, 3)
    assert vectors.tolist() == [[1, 0, 0]] * 2
    assert values.tolist() == [[0, 0, 0]] * 2
    assert missing.tolist() == [[False, True, True]] * 2
    with pytest.raises(ValueError, match="expected each edge both ways"):
        extras.laplacian_eigenpairs(torch.tensor([[0, 1, 2], [1, 2, 1]]), torch.zeros(3).long(), 2)


def test_a_graph_with_fewer_nodes_than_pairs_is_encoded_without_padding():
    encoding = random_encoding()
    graphs = tree(0, 4), tree(1, 15)
    edge_index, batch = together(*graphs)
    found = encoding(edge_index, batch)
    vectors, values, _ = extras.laplacian_eigenpairs(edge_index, batch, 10)
    expected = []
    for node, graph in enumerate(batch.tolist()):
        pairs = torch.stack([vectors[node], values[node]], dim=1)[: min(10, len(graphs[graph]))]
        pairs = encoding.project(pairs).unsqueeze(0)
        for layer in encoding.layers:
            pairs = layer(pairs)
        expected.append(pairs.sum(dim=1))
    torch.testing.assert_close(found, torch.cat(expected), **EXACT)
    with torch.no_grad():  # torch has another path for it
        torch.testing.assert_close(encoding(edge_index, batch), torch.cat(expected), **EXACT)


def test_sign_flips_are_drawn_in_training_per_graph_and_eigenvector():
    encoding = random_encoding(num_layers=0, sign_flips=True)
    graphs = together(tree(5, 10), tree(5, 10))
    # Without a transformer a pass gives sum_k s_k v_k(i) w + c_i, and V is orthogonal.
    vectors, weight = extras.laplacian_eigenpairs(*graphs, 10)[0], encoding.project.weight[:, 0]
    torch.manual_seed(0)
    signs = []
    for _ in range(20):
        change = encoding.train()(*graphs) - encoding.eval()(*graphs)
        change = (change @ weight / weight.square().sum()).view(2, 10, 1)  # V (s - 1)
        signs.append((vectors.view(2, 10, 10).mT @ change).flatten() + 1)
    signs = torch.stack(signs)
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs), **EXACT)
    # Each of the 20 takes both values, and no two agree in all passes or in none.
    assert (signs.mean(dim=0).abs() < 0.99).all()
    assert ((signs.T @ signs / 20).fill_diagonal_(0).abs() < 0.99).all()
    encoding.sign_flips = False
    assert torch.equal(encoding.train()(*graphs), encoding.eval()(*graphs))
