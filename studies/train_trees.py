"""Training on Tree-NeighborsMatch."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mapkg.hooks import evaluating
from studies.data import Splits, Trees
from studies.data.trees import level_order
from studies.train import Schedule, Task
from studies.tree_networks import TreeNetwork

SAMPLINGS = ("grouped", "shuffled")
"""How batches are drawn, whole permutations with their keys, or examples as published."""

TREES = Schedule(
    **dict(epochs=500, batch_size=1024, lr=1e-3, weight_decay=0.0, min_lr=0.0),
    **dict(block=10, lr_factor=0.5, lr_patience=10, patience=20),
)
"""The published schedule but for its length, up to 50,000 epochs in blocks of 100, with batches of
64 up to depth 3. Progress is a gain in ``train_accuracy`` while training."""


class TreeTask(Task):
    """Trees, until a block of epochs is without an error.

    Args:
        sampling: ``"shuffled"`` draws examples as published. ``"grouped"`` draws permutations, and
            takes all keys of one after another, so that a batch has few different trees.

    Source: Tree-NeighborsMatch, published code ``experiment.py``.
    """

    plateau: ClassVar = dict(threshold_mode="abs")
    may_diverge: ClassVar = True
    solved: ClassVar = -1.0

    def __init__(self, splits: Splits, sampling: str = "grouped"):
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling: expected one of {SAMPLINGS}, got {sampling!r}")
        self.splits, self.sampling = splits, sampling
        self.train, self.test = Examples(splits.train), Examples(splits.test)

    def steps(self, model, schedule):
        for chosen in self.train.batches(schedule.batch_size, self.sampling):
            scores, y = self.train.scores(model, chosen), self.train.y[chosen]
            right = int((scores.argmax(dim=1) == y).sum())
            yield nn.functional.cross_entropy(scores, y), len(y), {"train_accuracy": right}

    def score(self, row):
        return -row["train_accuracy"]

    def settings(self, schedule, model):
        return super().settings(schedule, model) | {"sampling": self.sampling}

    def accuracies(self, model: TreeNetwork) -> dict[str, float]:
        """Of the network as it is, no longer changing."""
        parts = {"train": self.train, "test": self.test}
        return {f"{name}_accuracy": part.accuracy(model) for name, part in parts.items()}


class Examples:
    """Trees as training wants them.

    Attributes:
        pairs: of every example in level order.
        y: their classes.
        group: the permutation of every example.
    """

    pairs: Int[Tensor, "B nodes 2"]
    y: Int[Tensor, " B"]
    group: Int[Tensor, " B"]

    def __init__(self, trees: Trees):
        if not isinstance(trees, Trees):
            raise ValueError(
                f"splits: expected Trees, as load('trees-4') gives them, got {type(trees).__name__}"
            )
        depth = trees.pairs.size(1).bit_length() - 1
        self.pairs, self.y = trees.pairs[:, level_order(depth)], trees.y
        self.group = self.pairs[:, -(2**depth) :, 1].unique(dim=0, return_inverse=True)[1]

    def batches(self, batch_size: int | None, sampling: str) -> Iterator[Tensor]:
        """Places of the examples of each batch of one epoch, drawn from torch's generator."""
        order = torch.randperm(len(self.y))
        if sampling == "grouped":
            rank = torch.randperm(int(self.group.max()) + 1)
            order = order[rank[self.group[order]].argsort(stable=True)]
        yield from order.split(batch_size or len(order))

    def scores(self, network: TreeNetwork, chosen: Tensor) -> Tensor:
        if self.pairs.size(1) != network.num_nodes:
            raise ValueError(
                f"splits: expected trees of the network's depth {network.depth}, with "
                f"{network.num_nodes} nodes, got {self.pairs.size(1)} nodes"
            )
        if not network.can_share:
            return network.dense(self.pairs[chosen])
        groups, tree = self.group[chosen].unique(return_inverse=True)
        first = torch.empty_like(groups).scatter_(0, tree, chosen)  # any example of each
        return network.shared(self.pairs[first], self.pairs[chosen, 0, 0], tree)

    @torch.no_grad()
    def accuracy(self, network: TreeNetwork) -> float:
        """Share of right answers; NaN without examples."""
        if not len(self.y):
            return float("nan")
        with evaluating(network):
            places = torch.arange(len(self.y)).split(1024)
            right = [self.scores(network, p).argmax(dim=1) == self.y[p] for p in places]
        return torch.cat(right).double().mean().item()
