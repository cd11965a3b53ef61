"""SAN's learned Laplacian encoding: eigenpairs against numpy, signs, padding, invariances."""

import networkx as nx
import numpy as np
import pytest
import torch
from torch_geometric.utils import to_undirected

from studies.extras.laplacian_encoding import LaplacianEncoding, laplacian_eigenpairs

EXACT = dict(rtol=1e-9, atol=1e-9)


def both_ways(graph):
    pairs = torch.tensor(list(graph.edges)).T
    return torch.cat([pairs, pairs.flip(0)], dim=1)


def random_tree(seed, nodes):
    return nx.random_labeled_tree(nodes, seed=seed)


def together(*graphs):
    """Edges and the graph of each node of several networkx graphs."""
    sizes = [len(graph) for graph in graphs]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    edges = [both_ways(graph) + first for graph, first in zip(graphs, firsts, strict=True)]
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return torch.cat(edges, dim=1), batch


def random_encoding(seed=0, **options):
    torch.manual_seed(seed)
    return LaplacianEncoding(feedforward_channels=16, **options).double().eval()


# Eigenpairs.


def test_a_path_of_three_by_hand():
    # D - A = [[1, -1, 0], [-1, 2, -1], [0, -1, 1]]: eigenvalues 0, 1, 3 with eigenvectors
    # (1, 1, 1), (1, 0, -1) and (-1, 2, -1), the last with cubes that sum to 6 > 0.
    vectors, values, missing = laplacian_eigenpairs(*together(nx.path_graph(3)), 4)
    expected = torch.tensor([[0.0, 1, 3, 0]] * 3).double()
    torch.testing.assert_close(values, expected, **EXACT)
    expected = torch.tensor([[1, 1, -1, 0], [1, 0, 2, 0], [1, -1, -1, 0]]).double()
    expected[:, :3] /= torch.tensor([3.0, 2, 6]).double().sqrt()
    signs = torch.tensor([1, vectors[0, 1].sign(), 1, 1])  # a symmetry leaves this one open
    torch.testing.assert_close(vectors, expected * signs, **EXACT)
    assert missing.tolist() == [[False, False, False, True]] * 3


def test_the_pairs_are_those_of_the_smallest_eigenvalues_of_each_graph():
    graphs = random_tree(0, 14), nx.petersen_graph(), random_tree(2, 4)
    edge_index, batch = together(*graphs)
    vectors, values, missing = (t.numpy() for t in laplacian_eigenpairs(edge_index, batch, 6))
    for number, graph in enumerate(graphs):
        rows = batch.numpy() == number
        laplacian = nx.laplacian_matrix(graph, nodelist=sorted(graph)).toarray()
        known = min(6, len(graph))
        assert missing[rows].tolist() == [[k >= known for k in range(6)]] * len(graph)
        expected = np.linalg.eigvalsh(laplacian)[:known]
        np.testing.assert_allclose(values[rows][:, :known] - expected, 0, atol=1e-9)
        assert (values >= 0).all()
        v = vectors[rows][:, :known]
        np.testing.assert_allclose(laplacian @ v, v * expected, atol=1e-9)
        np.testing.assert_allclose(v.T @ v, np.eye(known), atol=1e-9)
        assert (vectors[rows][:, known:] == 0).all()
        assert ((v**3).sum(axis=0) > -1e-9).all()


def test_relabelling_nodes_moves_the_entries_and_changes_none():
    edge_index, batch = together(random_tree(2, 13))
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    vectors, values, _ = laplacian_eigenpairs(edge_index, batch, 10)
    assert (values[0].diff() > 1e-6).all(), "the case is worth its name for simple eigenvalues"
    assert (vectors.pow(3).sum(dim=0).abs() > 1e-6).all(), "and for signs that the rule fixes"
    moved, moved_values, _ = laplacian_eigenpairs(order.argsort()[edge_index], batch, 10)
    torch.testing.assert_close(moved, vectors[order], **EXACT)
    torch.testing.assert_close(moved_values, values, **EXACT)


def test_lonely_nodes_have_the_one_pair_there_is():
    batch = torch.tensor([0, 2])  # graph 1 has no nodes
    vectors, values, missing = laplacian_eigenpairs(torch.empty(2, 0).long(), batch, 3)
    assert vectors.tolist() == [[1, 0, 0]] * 2
    assert values.tolist() == [[0, 0, 0]] * 2
    assert missing.tolist() == [[False, True, True]] * 2


def test_edges_that_are_there_one_way_only_are_an_error_that_says_what_to_do():
    one_way = torch.tensor([[0, 1, 2], [1, 2, 1]])
    with pytest.raises(ValueError, match="expected each edge both ways"):
        laplacian_eigenpairs(one_way, torch.zeros(3, dtype=torch.long), 2)
    vectors, _, _ = laplacian_eigenpairs(to_undirected(one_way), torch.zeros(3).long(), 2)
    assert vectors.isfinite().all()


# The encoding.


def test_it_has_the_published_size():
    # Linear 2 -> 8: 24. A layer: attention 4 * (64 + 8), feed-forward 2 * 8 * 2048 + 2048 + 8,
    # two norms 2 * 16: 35144.
    encoding = LaplacianEncoding()
    assert sum(p.numel() for p in encoding.parameters()) == 24 + 2 * 35144
    assert encoding.layers[0].self_attn.num_heads == 4
    assert encoding.eigenpairs == 10
    first, second = (layer.linear1.weight for layer in encoding.layers)
    assert not torch.equal(first, second)


def test_a_graph_with_fewer_nodes_than_pairs_is_encoded_without_padding():
    encoding = random_encoding()
    graphs = random_tree(0, 4), random_tree(1, 15)
    edge_index, batch = together(*graphs)
    found = encoding(edge_index, batch)
    vectors, values, _ = laplacian_eigenpairs(edge_index, batch, 10)
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
    assert (found.std(dim=0) > 1e-3).all()


def drawn_signs(encoding, edge_index, batch, graph):
    """The signs that a pass has drawn for one graph, from an encoding without a transformer.

    It is then sum_k s_k v_k(i) w + c_i with the same c_i in evaluation mode, and V is orthogonal.
    """
    difference = encoding.train()(edge_index, batch) - encoding.eval()(edge_index, batch)
    weight = encoding.project.weight[:, 0]
    change = difference @ weight / weight.square().sum()  # V (s - 1)
    rows = batch == graph
    vectors = laplacian_eigenpairs(edge_index, batch, encoding.eigenpairs)[0][rows]
    return vectors.T @ change[rows] + 1


def test_sign_flips_are_drawn_in_training_per_graph_and_eigenvector():
    encoding = random_encoding(num_layers=0, sign_flips=True)
    edge_index, batch = together(random_tree(5, 10), random_tree(5, 10))
    seen = []
    for _ in range(20):
        torch.manual_seed(len(seen))
        first = drawn_signs(encoding, edge_index, batch, 0)
        torch.manual_seed(len(seen))
        second = drawn_signs(encoding, edge_index, batch, 1)
        torch.testing.assert_close(first.abs(), torch.ones(10).double(), **EXACT)
        torch.testing.assert_close(second.abs(), torch.ones(10).double(), **EXACT)
        seen.append(torch.cat([first, second]))
    signs = torch.stack(seen)
    # Each of the 20 takes both values, and no two agree in all passes or in none.
    agreement = signs.T @ signs / 20
    assert (signs.mean(dim=0).abs() < 0.99).all()
    assert (agreement.fill_diagonal_(0).abs() < 0.99).all()


def test_without_them_training_draws_nothing():
    encoding, graphs = random_encoding(num_layers=0).train(), together(random_tree(5, 10))
    state = torch.get_rng_state()
    found = encoding(*graphs)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found, encoding.eval()(*graphs))
