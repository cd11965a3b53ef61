"""Training on the nodes of one graph; every step sees the whole graph."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from mapkg.hooks import evaluating
from studies.data import NodesOfGraph, Splits
from studies.deep import gradient_norms
from studies.train import Schedule, Task


@dataclass
class NodeTask(Task):
    """Classes of nodes; the loss of an epoch is that before its step.

    A run ends with a loss that is not finite; such a network predicts the first class everywhere.

    Attributes:
        evaluate: whether val_loss, val_accuracy and test_accuracy follow each step; without, the
            learning rate stays.

    Source: LipschitzNorm paper, training scripts of its code.
    """

    splits: Splits
    evaluate: bool = True
    adam: ClassVar[dict[str, Any]] = {}
    may_diverge: ClassVar[bool] = True

    def to(self, device: torch.device) -> "NodeTask":
        graph = self.splits.train.graph.clone().to(device)
        return replace(self, splits=_with_graph(self.splits, graph))

    def steps(self, model, schedule):
        yield self._loss(self._scores(model), "train"), 1, {}

    @torch.no_grad()
    def validate(self, model: nn.Module, schedule: Schedule) -> dict[str, float]:
        if not self.evaluate:
            return {}
        with evaluating(model):
            scores = self._scores(model)
        right = scores.nan_to_num().argmax(dim=1) == self.splits.train.graph.y
        accuracies = {
            f"{name}_accuracy": right[getattr(self.splits, name).nodes].double().mean().item()
            for name in ("val", "test")
        }
        return {"val_loss": self._loss(scores, "val").item(), **accuracies}

    def _scores(self, model: nn.Module) -> torch.Tensor:
        graph = self.splits.train.graph
        return model(graph.x, graph.edge_index)

    def _loss(self, scores: torch.Tensor, name: str) -> torch.Tensor:
        nodes = getattr(self.splits, name).nodes
        return nn.functional.cross_entropy(scores[nodes], self.splits.train.graph.y[nodes])


COLUMNS = ("epochs", "lr", "weight_decay", "lr_factor", "lr_patience", "min_lr")
"""What tables of nodes say of a schedule."""


def observe_gradients(model: nn.Module, epoch: int) -> list[dict[str, Any]]:
    """The ``deep.gradient_norms`` of an epoch, a row per layer and kind, for ``fit``."""
    return [
        {"epoch": epoch, "layer": layer, "kind": kind, "norm": norm}
        for kind, norms in (gradient_norms(model) if epoch else {}).items()
        for layer, norm in enumerate(norms)
    ]


def hide_features(splits: Splits, rate: float, seed: int = 0) -> Splits:
    """The same graph with features of zero at a share of the nodes outside the training set.

    Source: PairNorm paper, missing features.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a share in [0, 1], got {rate}")
    graph = splits.train.graph.clone()
    is_train = torch.zeros(graph.num_nodes, dtype=torch.bool)
    is_train[splits.train.nodes] = True
    others = (~is_train).nonzero().flatten()
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    graph.x = graph.x.clone()
    graph.x[others[order[: round(rate * len(others))]]] = 0
    about = splits.description
    hidden = _with_graph(splits, graph)
    return replace(hidden, description=replace(about, title=f"{about.title}, {rate:.0%} missing"))


def _with_graph(splits: Splits, graph: Any) -> Splits:
    names = ("train", "val", "test")
    return replace(splits, **{n: NodesOfGraph(graph, getattr(splits, n).nodes) for n in names})
