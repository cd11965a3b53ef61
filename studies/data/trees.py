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
from typing import overload

import numpy as np
import torch
from jaxtyping import Bool, Int
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch_geometric.data import Data

from studies.data.description import Description, Splits

MOST_PERMUTATIONS = 1000
MOST_EXAMPLES = 32_000
TRAIN_SHARE = 0.8
PUBLISHED_SEED = 11
"""The seed of the published code."""


@dataclass(frozen=True, eq=False)
class Trees(Sequence[Data]):
    """Examples on one tree: a sequence of graphs, and the same as tensors.

    Attributes:
        pairs: key and value of every node in pre-order, shape [B, nodes, 2].
        y: class of the root, a value from 1 to the number of leaves, shape [B].
        edge_index: child to parent, then a self-loop of each node, shape [2, E].
    """

    pairs: Int[Tensor, "B nodes 2"]
    y: Int[Tensor, " B"]
    edge_index: Int[Tensor, "2 E"]

    def __len__(self) -> int:
        return len(self.y)

    @overload
    def __getitem__(self, index: int) -> Data: ...

    @overload
    def __getitem__(self, index: slice) -> "Trees": ...

    def __getitem__(self, index: int | slice) -> "Data | Trees":
        """A graph with ``x`` [nodes, 2], ``edge_index`` and ``y`` [1]; for a slice, ``Trees``."""
        if isinstance(index, slice):
            return Trees(self.pairs[index], self.y[index], self.edge_index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"tree {index} of {len(self)}")
        x, y = self.pairs[index].long(), self.y[index].long().view(1)
        return Data(x=x, edge_index=self.edge_index, y=y, num_nodes=len(x))

    def at(self, chosen: Int[Tensor, " n"] | Bool[Tensor, " B"]) -> "Trees":
        """Those of some places, or where a mask is true."""
        return Trees(self.pairs[chosen], self.y[chosen], self.edge_index)


def tree_edges(depth: int) -> Int[Tensor, "2 E"]:
    """Edges of a complete binary tree from child to parent, and a self-loop of each node.

    Nodes are numbered in pre-order: the root is 0, then come the left half and the right half.

    Source: Tree-NeighborsMatch, published code ``tasks/tree_dataset.py``.
    """
    level_order = _pre_order(depth)  # node of each place in level order
    child = np.arange(1, len(level_order))
    edges = np.stack([level_order[child], level_order[(child - 1) // 2]])
    edges = edges[:, edges[0].argsort()]
    loops = np.tile(np.arange(len(level_order)), (2, 1))
    return torch.from_numpy(np.concatenate([edges, loops], axis=1))


def level_order(depth: int) -> Int[Tensor, " nodes"]:
    """Pre-order numbers of the nodes level by level; the children of place p are 2p + 1, 2p + 2."""
    return torch.from_numpy(_pre_order(depth))


def neighbors_match(depth: int, seed: int = PUBLISHED_SEED) -> Trees:
    """All examples of a depth: every key with every permutation drawn.

    Up to depth 3, 1,000 different permutations of the leaves' values, or all if there are fewer;
    from depth 4 on, as many independent draws, but no more than give 32,000 examples.

    Source: Tree-NeighborsMatch, published code ``tasks/dictionary_lookup.py``.
    """
    nodes = level_order(depth)
    leaves = 2**depth
    drawn = _draw_permutations(leaves, seed)
    pairs = torch.zeros(len(drawn), leaves, 2 ** (depth + 1) - 1, 2, dtype=torch.int16)
    keys = torch.arange(1, leaves + 1)
    pairs[:, :, nodes[-leaves:], 0] = keys.short()
    pairs[:, :, nodes[-leaves:], 1] = drawn[:, None].short()
    pairs[:, :, 0, 0] = keys.short()
    y = drawn.flatten()  # key k asks for the value of leaf k
    return Trees(pairs.flatten(0, 1), y, tree_edges(depth))


def load_trees(depth: int, seed: int = PUBLISHED_SEED) -> Splits:
    """The examples of a depth, 2 or more, four fifths to train on and the rest in ``test``.

    Both parts have the same share of each class; a permutation may be in both, with other keys.
    There is no validation part: ``val`` is empty.
    """
    trees = neighbors_match(depth, seed)
    train, test = train_test_split(
        np.arange(len(trees)), train_size=TRAIN_SHARE, stratify=trees.y.numpy(), random_state=seed
    )
    size = 2**depth + 1
    return Splits(
        train=trees.at(torch.from_numpy(train).sort().values),
        val=trees[:0],
        test=trees.at(torch.from_numpy(test).sort().values),
        description=Description(
            name=f"trees-{depth}",
            title=f"trees of depth {depth}",
            task="graph classification",
            target="value of the leaf whose key the root has",
            num_node_types=(size, size),
            num_edge_types=None,
            num_targets=size,
            source="drawn by studies.data.trees.neighbors_match (Alon and Yahav, 2021)",
            licence="none needed: synthetic",
        ),
    )


def _pre_order(depth: int) -> np.ndarray:
    if depth < 1:
        raise ValueError(f"depth: expected 1 or more, got {depth}")
    nodes = np.zeros(1, dtype=np.int64)
    levels = [nodes]
    for height in range(depth, 0, -1):
        half = 2**height - 1  # nodes below each child, itself included
        nodes = np.stack([nodes + 1, nodes + 1 + half], axis=1).ravel()
        levels.append(nodes)
    return np.concatenate(levels)


def _draw_permutations(leaves: int, seed: int) -> Int[Tensor, "P leaves"]:
    """Values of the leaves, from 1, a row for each permutation."""
    number = min(MOST_PERMUTATIONS, MOST_EXAMPLES // leaves)
    if leaves <= 8:
        every = list(permutations(range(1, leaves + 1)))
        drawn = random.Random(seed).sample(every, min(number, factorial(leaves)))
        return torch.tensor(drawn)
    generator = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([generator.permutation(leaves) + 1 for _ in range(number)]))
