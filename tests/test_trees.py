"""Tree-NeighborsMatch against a brute force that builds each tree by recursion."""

from collections import Counter
from itertools import permutations
from math import factorial

import numpy as np
import pytest
import torch
from torch_geometric.loader import DataLoader

from studies.data import Trees, load
from studies.data.trees import level_order, load_trees, neighbors_match, tree_edges


def by_recursion(depth):
    """Edges from child to parent and the leaves from left to right, as the paper draws them."""
    edges, leaves = set(), []

    def grow(node, last, height):
        if height == 0:
            leaves.append(node)
            return
        left, right = node + 1, node + 1 + (last - node) // 2
        edges.update({(left, node), (right, node)})
        grow(left, right - 1, height - 1)
        grow(right, last, height - 1)

    grow(0, 2 ** (depth + 1) - 2, depth)
    return edges, leaves


@pytest.mark.parametrize("depth", range(1, 6))
def test_edges_go_from_child_to_parent_in_pre_order_and_each_node_has_a_loop(depth):
    edges, leaves = by_recursion(depth)
    nodes = range(2 ** (depth + 1) - 1)
    found = [tuple(edge) for edge in tree_edges(depth).t().tolist()]
    assert len(found) == len(set(found))
    assert set(found) == edges | {(node, node) for node in nodes}
    order = level_order(depth)
    assert sorted(order.tolist()) == list(nodes)
    assert order[-(2**depth) :].tolist() == leaves
    for place in range(2**depth - 1):
        assert (int(order[2 * place + 1]), int(order[place])) in edges
        assert (int(order[2 * place + 2]), int(order[place])) in edges


@pytest.mark.parametrize("depth", range(1, 6))
def test_the_label_is_the_value_of_the_leaf_with_the_key_of_the_root(depth):
    trees = neighbors_match(depth, seed=3)
    _, leaves = by_recursion(depth)
    chosen = np.random.default_rng(depth).choice(len(trees), min(200, len(trees)), replace=False)
    inner = [n for n in range(1, 2 ** (depth + 1) - 1) if n not in leaves]
    for number in chosen.tolist():
        graph = trees[number]
        key, nothing = graph.x[0].tolist()
        pairs = dict(graph.x[leaves].tolist())
        assert nothing == 0
        assert list(pairs) == list(range(1, 2**depth + 1))  # keys from left to right
        assert sorted(pairs.values()) == list(range(1, 2**depth + 1))
        assert graph.y.item() == pairs[key]
        assert not graph.x[inner].any()


@pytest.mark.parametrize(
    ("depth", "number", "train"),
    [(2, 96, 76), (3, 8000, 6400), (4, 16000, 12800), (5, 32000, 25600)],
)
def test_there_are_as_many_examples_as_published(depth, number, train):
    splits = load(f"trees-{depth}")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (train, 0, number - train)
    assert splits.train[0].num_nodes == 2 ** (depth + 1) - 1


def test_all_permutations_of_four_leaves_are_there_with_every_key():
    trees = neighbors_match(2)
    _, leaves = by_recursion(2)
    found = {(int(g.x[0, 0]), tuple(g.x[leaves, 1].tolist())) for g in trees}
    wanted = {(key, order) for key in range(1, 5) for order in permutations(range(1, 5))}
    assert found == wanted


def test_a_thousand_different_permutations_of_eight_leaves():
    trees = neighbors_match(3)
    _, leaves = by_recursion(3)
    of_first_key = trees.pairs[trees.pairs[:, 0, 0] == 1]
    assert len(of_first_key) == 1000 < factorial(8)
    assert len({tuple(row) for row in of_first_key[:, leaves, 1].tolist()}) == 1000


def test_the_parts_share_no_example_and_have_the_same_classes():
    splits = load("trees-3")
    seen = [{row.tobytes() for row in part.pairs.numpy()} for part in (splits.train, splits.test)]
    assert len(seen[0]) == 6400 and len(seen[1]) == 1600 and not seen[0] & seen[1]
    assert set(Counter(splits.train.y.tolist()).values()) == {800}
    assert set(Counter(splits.test.y.tolist()).values()) == {200}


def test_the_seed_decides():
    first, again, other = load_trees(3), load_trees(3), load_trees(3, seed=0)
    for part in ("train", "test"):
        assert torch.equal(getattr(first, part).pairs, getattr(again, part).pairs)
        assert torch.equal(getattr(first, part).y, getattr(again, part).y)
    assert not torch.equal(first.train.pairs, other.train.pairs)


def test_trees_are_a_sequence_of_graphs_that_pyg_batches():
    trees = load("trees-2").train
    assert isinstance(trees[:5], Trees) and len(trees[:5]) == 5
    assert torch.equal(trees[-1].x, trees[len(trees) - 1].x)
    with pytest.raises(IndexError, match="tree 76 of 76"):
        trees[76]
    batch = next(iter(DataLoader(trees, batch_size=10)))
    assert batch.x.shape == (70, 2) and batch.y.shape == (10,)
    assert batch.edge_index.shape == (2, 10 * (6 + 7))
    assert len(trees.at(trees.y == 1)) == 19


def test_a_depth_below_one_is_refused():
    for function in (tree_edges, level_order, neighbors_match):
        with pytest.raises(ValueError, match="depth: expected 1 or more, got 0"):
            function(0)
