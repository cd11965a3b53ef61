"""Tree-NeighborsMatch: the answer is at a leaf, and only the root is asked.

A complete binary tree carries messages from its leaves to its root. The root has a key k, leaf t
has the pair (t, pi(t)) with a permutation pi, and the root's class is pi(k): all of a permutation
has to pass through every node, whose features are of a fixed size (Alon and Yahav, 2021).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import factorial

import numpy as np
import torch
from jaxtyping import Int
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch_geometric.data import Data

from studies.data.description import Description, Splits

PUBLISHED_SEED = 11
"""The seed of the published code."""


@dataclass(frozen=True, eq=False)
class Trees(Sequence[Data]):
    """Examples on one tree: a sequence of graphs, and the same as tensors."""

    pairs: Int[Tensor, "B nodes 2"]  # key and value of every node in pre-order
    y: Int[Tensor, " B"]  # class of the root, a value from 1 to the number of leaves
    edge_index: Int[Tensor, "2 E"]  # child to parent, then a self-loop of each node

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int | slice | Tensor) -> "Data | Trees":
        """A graph with ``x`` [nodes, 2], ``edge_index`` and ``y`` [1]; or ``Trees`` of places."""
        if isinstance(index, slice | Tensor):
            return Trees(self.pairs[index], self.y[index], self.edge_index)
        x, y = self.pairs[index].long(), self.y[index].long().view(1)  # IndexError ends a loop
        return Data(x=x, edge_index=self.edge_index, y=y, num_nodes=len(x))


def tree_edges(depth: int) -> Int[Tensor, "2 E"]:
    """Edges of a complete binary tree from child to parent, and a self-loop of each node.

    Nodes are numbered in pre-order: the root is 0, then come the left half and the right half.

    Source: Tree-NeighborsMatch, published code ``tasks/tree_dataset.py``.
    """
    nodes = level_order(depth)
    child = torch.arange(1, len(nodes))
    edges = torch.stack([nodes[child], nodes[(child - 1) // 2]])
    loops = torch.arange(len(nodes)).repeat(2, 1)
    return torch.cat([edges[:, edges[0].argsort()], loops], dim=1)


def level_order(depth: int) -> Int[Tensor, " nodes"]:
    """Pre-order numbers of the nodes level by level; the children of place p are 2p + 1, 2p + 2."""
    nodes = torch.zeros(1, dtype=torch.long)
    levels = [nodes]
    for height in range(depth, 0, -1):
        half = 2**height - 1  # nodes below each child, itself included
        nodes = torch.stack([nodes + 1, nodes + 1 + half], dim=1).flatten()
        levels.append(nodes)
    return torch.cat(levels)


def neighbors_match(depth: int, seed: int = PUBLISHED_SEED) -> Trees:
    """All examples of a depth: every key with every permutation drawn.

    Up to depth 3, 1,000 different permutations of the leaves' values, or all if there are fewer;
    from depth 4 on, as many independent draws, but no more than give 32,000 examples.

    Source: Tree-NeighborsMatch, published code ``tasks/dictionary_lookup.py``.
    """
    nodes, leaves = level_order(depth), 2**depth
    number = min(1000, 32_000 // leaves)
    if leaves <= 8:
        every = list(permutations(range(1, leaves + 1)))
        drawn = torch.tensor(random.Random(seed).sample(every, min(number, factorial(leaves))))
    else:
        generator = np.random.default_rng(seed)
        rows = [generator.permutation(leaves) + 1 for _ in range(number)]
        drawn = torch.from_numpy(np.stack(rows))
    pairs = torch.zeros(len(drawn), leaves, len(nodes), 2, dtype=torch.int16)
    keys = torch.arange(1, leaves + 1)
    pairs[:, :, nodes[-leaves:], 0] = keys.short()
    pairs[:, :, nodes[-leaves:], 1] = drawn[:, None].short()
    pairs[:, :, 0, 0] = keys.short()
    y = drawn.flatten()  # key k asks for the value of leaf k
    return Trees(pairs.flatten(0, 1), y, tree_edges(depth))


def load_trees(depth: int, seed: int = PUBLISHED_SEED) -> Splits:
    """The examples of a depth, four fifths to train on, the rest in ``test``; ``val`` is empty.

    Both parts have the same share of each class; a permutation may be in both, with other keys.
    """
    trees = neighbors_match(depth, seed)
    train, test = train_test_split(
        np.arange(len(trees)), train_size=0.8, stratify=trees.y.numpy(), random_state=seed
    )
    size = 2**depth + 1
    about = Description(
        **dict(name=f"trees-{depth}", title=f"trees of depth {depth}", task="graph classification"),
        **dict(target="value of the leaf whose key the root has", num_targets=size),
        **dict(num_node_types=(size, size), num_edge_types=None),
        source="drawn by studies.data.trees.neighbors_match (Alon and Yahav, 2021)",
        licence="none needed: synthetic",
    )
    train, test = (trees[torch.from_numpy(np.sort(part))] for part in (train, test))
    return Splits(train, trees[:0], test, about)
