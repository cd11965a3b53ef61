"""Train a network on Tree-NeighborsMatch."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from mapkg.hooks import evaluating
from studies.data import Splits, Trees
from studies.data.trees import level_order
from studies.tree_networks import TreeNetwork

SAMPLINGS = ("grouped", "shuffled")
"""How batches are drawn, whole permutations with their keys, or examples as published."""


@dataclass(frozen=True, kw_only=True)
class TreeSchedule:
    """How networks are trained on trees, with Adam.

    Attributes:
        passes: over the training examples.
        batch_size: examples of a step.
        lr: learning rate.
        block: passes whose training accuracy is averaged, the unit of what follows.
        lr_factor, lr_patience: the rate is multiplied by the factor after so many blocks without a
            higher training accuracy.
        patience: blocks without a gain of ``GAIN`` after which training stops.
        sampling: ``"shuffled"`` draws examples as published. ``"grouped"`` draws permutations, and
            takes all keys of one after another, so that a batch has few different trees; keys of
            one permutation may be cut over two batches.

    Raises:
        ValueError: if a value is out of range.

    Source: Tree-NeighborsMatch, published code ``experiment.py``, with up to 50,000 passes in
    blocks of 100 and batches of 64 up to depth 3 and of 1,024 beyond.
    """

    passes: int = 500
    batch_size: int = 1024
    lr: float = 1e-3
    block: int = 10
    lr_factor: float = 0.5
    lr_patience: int = 10
    patience: int = 20
    sampling: str = "grouped"

    def __post_init__(self) -> None:
        for name in ("passes", "batch_size", "block", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected a value above 0, got {self.lr}")
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling: expected one of {SAMPLINGS}, got {self.sampling!r}")


GAIN = 1e-4
"""What a block has to gain in training accuracy not to count as without progress."""


@dataclass(frozen=True)
class TreeFit:
    """What training on trees gave.

    Attributes:
        history: a row per block: ``passes`` so far, ``train_accuracy`` and ``train_loss`` while
            training within it, ``lr``.
        best: the highest ``train_accuracy`` of a block, what the paper reports.
        train_accuracy, test_accuracy: of the trained network, no longer changing.
        stop_reason: ``"solved"`` (a block without an error), ``"plateau"`` or ``"passes"``.
    """

    history: pd.DataFrame
    best: float
    train_accuracy: float
    test_accuracy: float
    stop_reason: str


def fit_trees(
    network: TreeNetwork,
    splits: Splits,
    schedule: TreeSchedule | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> TreeFit:
    """Train a network on the trees of its depth, in place.

    Args:
        network: of ``models.trees.tree_network``.
        splits: of ``Trees``, as ``load("trees-4")`` gives them.
        schedule: None means 500 passes.
        seed: of the order of examples.
        progress: whether to show a progress bar on stderr.

    Raises:
        ValueError: if the splits are no trees, or of another depth than the network.

    Source: Tree-NeighborsMatch, published code ``experiment.py``.
    """
    schedule = TreeSchedule() if schedule is None else schedule
    train = _Examples.of(splits.train, network)
    test = _Examples.of(splits.test, network)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=schedule.lr, fused=True)
    scheduler = ReduceLROnPlateau(
        optimizer,
        mode="max",
        factor=schedule.lr_factor,
        patience=schedule.lr_patience,
        threshold_mode="abs",
    )
    history: list[dict[str, Any]] = []
    best, since_gain, stop_reason = 0.0, 0, "passes"
    network.train()
    starts = range(0, schedule.passes, schedule.block)
    bar = tqdm(starts, "blocks", file=sys.stderr, disable=not progress)
    for start in bar:
        number = min(schedule.block, schedule.passes - start)
        right, loss = 0, 0.0
        for _ in range(number):
            for chosen in train.batches(schedule, generator):
                scores = train.scores(network, chosen)
                y = train.y[chosen]
                step = nn.functional.cross_entropy(scores, y)
                optimizer.zero_grad()
                step.backward()
                optimizer.step()
                right += int((scores.argmax(dim=1) == y).sum())
                loss += step.item() * len(y)
        seen = number * len(train.y)
        accuracy = right / seen
        history.append(
            {
                "passes": start + number,
                "train_accuracy": accuracy,
                "train_loss": loss / seen,
                "lr": optimizer.param_groups[0]["lr"],
            }
        )
        bar.set_postfix(train=f"{accuracy:.4f}", best=f"{max(best, accuracy):.4f}")
        since_gain = 0 if accuracy > best + GAIN else since_gain + 1
        best = max(best, accuracy)
        if right == seen:
            stop_reason = "solved"
            break
        if since_gain >= schedule.patience:
            stop_reason = "plateau"
            break
        scheduler.step(accuracy)
    return TreeFit(
        history=pd.DataFrame(history),
        best=best,
        train_accuracy=train.accuracy(network),
        test_accuracy=test.accuracy(network),
        stop_reason=stop_reason,
    )


@dataclass(frozen=True)
class _Examples:
    """Trees as training wants them.

    Attributes:
        pairs: of every example in level order.
        y: their classes.
        group: the permutation of every example.
    """

    pairs: Int[Tensor, "B nodes 2"]
    y: Int[Tensor, " B"]
    group: Int[Tensor, " B"]

    @classmethod
    def of(cls, trees: Any, network: TreeNetwork) -> "_Examples":
        if not isinstance(trees, Trees):
            raise ValueError(
                f"splits: expected Trees, as load('trees-4') gives them, got {type(trees).__name__}"
            )
        if trees.pairs.size(1) != network.num_nodes:
            raise ValueError(
                f"splits: expected trees of the network's depth {network.depth}, with "
                f"{network.num_nodes} nodes, got {trees.pairs.size(1)} nodes"
            )
        pairs = trees.pairs[:, level_order(network.depth)]
        values = pairs[:, -(2**network.depth) :, 1]
        return cls(pairs, trees.y, values.unique(dim=0, return_inverse=True)[1])

    def batches(self, schedule: TreeSchedule, generator: torch.Generator) -> Iterator[Tensor]:
        """Places of the examples of each batch of one pass."""
        order = torch.randperm(len(self.y), generator=generator)
        if schedule.sampling == "grouped":
            rank = torch.randperm(int(self.group.max()) + 1, generator=generator)
            order = order[rank[self.group[order]].argsort(stable=True)]
        yield from order.split(schedule.batch_size)

    def scores(self, network: TreeNetwork, chosen: Tensor) -> Tensor:
        if not network.can_share:
            return network.dense(self.pairs[chosen])
        groups, tree = self.group[chosen].unique(return_inverse=True)
        first = torch.empty_like(groups).scatter_(0, tree, chosen)  # any example of each
        return network.shared(self.pairs[first], self.pairs[chosen, 0, 0], tree)

    @torch.no_grad()
    def accuracy(self, network: TreeNetwork) -> float:
        if not len(self.y):
            return float("nan")
        with evaluating(network):
            places = torch.arange(len(self.y)).split(1024)
            right = [self.scores(network, p).argmax(dim=1) == self.y[p] for p in places]
        return torch.cat(right).double().mean().item()
