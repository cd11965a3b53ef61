"""Train a network to classify the nodes of one graph; every step sees the whole graph."""

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from mapkg.hooks import evaluating
from studies.data import NodesOfGraph, Splits
from studies.deep import gradient_norms


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How nodes are trained on, full batch with Adam.

    Attributes:
        epochs: steps; each is a pass over the graph.
        lr: learning rate.
        weight_decay: of Adam, on all weights.
        lr_factor, lr_patience: the rate is multiplied by the factor after so many epochs without
            a lower validation loss; a patience of None leaves it.
        min_lr: training ends when the rate falls below it, since Adam's steps are about as large
            as the rate and nothing moves any more; 0 goes on to the last epoch.

    Raises:
        ValueError: if a value is out of range.

    Source: LipschitzNorm paper, published code; its command lines for the rate and the number of
    epochs, up to 2,500 there. differs: training goes on there when the rate has died.
    """

    epochs: int = 200
    lr: float = 0.005
    weight_decay: float = 5e-4
    lr_factor: float = 0.1
    lr_patience: int | None = 10
    min_lr: float = 1e-6

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs: expected 1 or more, got {self.epochs}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected a value above 0, got {self.lr}")
        if not 0 < self.lr_factor < 1:
            raise ValueError(f"lr_factor: expected a value in (0, 1), got {self.lr_factor}")
        if not 0 <= self.min_lr < self.lr:
            raise ValueError(f"min_lr: expected a value in [0, lr), got {self.min_lr}")


@dataclass(frozen=True)
class NodeFit:
    """What training on nodes gave.

    Attributes:
        history: a row per epoch: ``epoch`` from 1, ``train_loss`` before its step, ``lr``, and,
            unless it was left out, after the step ``val_loss``, ``val_accuracy`` and
            ``test_accuracy``. It ends early if the rate has died, or if the loss is no longer
            finite; such a network predicts the first class for all nodes.
        gradients: a row per epoch, layer and kind, ``weights`` and ``attention``, with the
            ``norm`` of ``models.deep.gradient_norms``; empty if it was not recorded.
        stop_reason: ``"epochs"``, ``"rate"`` (below ``min_lr``) or ``"not finite"``.
    """

    history: pd.DataFrame
    gradients: pd.DataFrame
    stop_reason: str


def fit_nodes(
    network: nn.Module,
    splits: Splits,
    schedule: Schedule | None = None,
    *,
    seed: int = 0,
    evaluate: bool = True,
    record_gradients: bool = False,
    progress: bool = True,
) -> NodeFit:
    """Train a network on the training nodes of a graph, in place.

    Args:
        network: called as ``network(x, edge_index)``, giving scores of the classes [N, classes];
            ``models.deep.DeepNetwork`` if gradients are recorded.
        splits: of ``NodesOfGraph``, on one graph.
        schedule: None means the published one.
        seed: of dropout.
        evaluate: whether each epoch is evaluated on the other splits; without it the learning
            rate stays.
        record_gradients: whether each layer's gradient norms are kept.
        progress: whether to show a progress bar on stderr.

    Raises:
        ValueError: if the splits are no nodes of one graph, or none is there to train on.

    Source: LipschitzNorm paper, training scripts of its code.
    """
    schedule = Schedule() if schedule is None else schedule
    parts = {name: getattr(splits, name) for name in ("train", "val", "test")}
    if not all(isinstance(part, NodesOfGraph) for part in parts.values()):
        raise ValueError(
            "splits: expected nodes of one graph, as load('citation') gives them, got "
            f"{splits.description.title}"
        )
    if len(splits.train) == 0:
        raise ValueError("the train split is empty; training needs at least one node")
    graph = splits.train.graph
    optimizer = torch.optim.Adam(
        network.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay
    )
    patience = schedule.lr_patience if evaluate else None
    scheduler = (
        None
        if patience is None
        else ReduceLROnPlateau(optimizer, factor=schedule.lr_factor, patience=patience)
    )
    history: list[dict[str, Any]] = []
    gradients: list[dict[str, Any]] = []
    stop_reason = "epochs"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        bar = tqdm(range(1, schedule.epochs + 1), "epochs", file=sys.stderr, disable=not progress)
        for epoch in bar:
            network.train()
            optimizer.zero_grad()
            loss = _loss(network(graph.x, graph.edge_index), graph.y, splits.train.nodes)
            loss.backward()
            if record_gradients:
                gradients += [
                    {"epoch": epoch, "layer": layer, "kind": kind, "norm": norm}
                    for kind, norms in gradient_norms(network).items()
                    for layer, norm in enumerate(norms)
                ]
            row = {"epoch": epoch, "train_loss": loss.item(), "lr": optimizer.param_groups[0]["lr"]}
            optimizer.step()
            if evaluate:
                row |= _evaluated(network, parts)
            history.append(row)
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k not in ("epoch", "lr")})
            if not math.isfinite(row["train_loss"]):
                stop_reason = "not finite"
                break
            if scheduler is not None:
                scheduler.step(row["val_loss"])
                if optimizer.param_groups[0]["lr"] < schedule.min_lr:
                    stop_reason = "rate"
                    break
    network.eval()
    return NodeFit(pd.DataFrame(history), pd.DataFrame(gradients), stop_reason)


def hide_features(splits: Splits, rate: float, seed: int = 0) -> Splits:
    """The same graph with features of zero at some nodes outside the training set.

    Args:
        splits: of ``NodesOfGraph``, on one graph.
        rate: share of the nodes outside the training set, in [0, 1]; 1 hides all of them.
        seed: of the draw.

    Raises:
        ValueError: if the rate is not in [0, 1].

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
    about = replace(about, title=f"{about.title}, {rate:.0%} missing")
    parts = {n: NodesOfGraph(graph, getattr(splits, n).nodes) for n in ("train", "val", "test")}
    return Splits(**parts, description=about)


def _loss(
    scores: Float[Tensor, "N classes"], y: Int[Tensor, " N"], nodes: Int[Tensor, " n"]
) -> Float[Tensor, ""]:
    return nn.functional.cross_entropy(scores[nodes], y[nodes])


@torch.no_grad()
def _evaluated(network: nn.Module, parts: dict[str, NodesOfGraph]) -> dict[str, float]:
    graph = parts["val"].graph
    with evaluating(network):
        scores = network(graph.x, graph.edge_index)
    right = scores.nan_to_num().argmax(dim=1) == graph.y
    return {
        "val_loss": _loss(scores, graph.y, parts["val"].nodes).item(),
        "val_accuracy": right[parts["val"].nodes].double().mean().item(),
        "test_accuracy": right[parts["test"].nodes].double().mean().item(),
    }
