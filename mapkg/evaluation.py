"""Predictions over a data set, their losses and metrics, and BatchNorm statistics.

Predictions and targets have one shape, [rows, targets]. Predictions of a classification (the
loss ``"bce"``) are logits, and a NaN among its targets is unlabeled and left out. In a
regression (``"l1"``) a NaN is a bad value and shows in the loss.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from scipy import stats
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from mapkg.calling import call as predict
from mapkg.hooks import scan
from mapkg.models.config import LOSSES

Graphs = Sequence[Data]
"""What a model is run on."""

# Not "rows targets" for both: losses() itself says what is wrong if the shapes differ.
Values, Targets = Float[Tensor, "_ _"], Shaped[Tensor, "_ _"]


def batches(
    graphs: Graphs, batch_size: int, device: str | torch.device = "cpu", *, shuffle: bool = False
) -> Iterator[Any]:
    """PyG batches of graphs on a device; shuffled by torch's generator, or in order."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 graph or more, got {batch_size}")
    for batch in DataLoader(graphs, batch_size, shuffle=shuffle):
        yield batch.to(device)


def targets(batch: Any) -> Tensor:
    """The targets of a PyG batch, in the shape of its predictions."""
    return batch.y


def check_targets(graphs: Graphs, loss: str = "") -> None:
    """Raise ValueError if there is no graph, a target is missing or, with ``"l1"``, not finite."""
    if not graphs:
        raise ValueError("expected graphs with targets y, got none")
    for place, graph in enumerate(graphs):
        if getattr(graph, "y", None) is None:
            raise ValueError(f"graph {place} has no target y, of shape [1 or nodes, targets]")
        if loss == "l1" and not torch.as_tensor(graph.y).isfinite().all():
            raise ValueError(
                f"graph {place}: expected numbers as targets of loss 'l1', got NaN or inf"
            )


def predictions(
    model: nn.Module, graphs: Graphs, *, batch_size: int = 128
) -> tuple[Float[Tensor, "rows targets"], Float[Tensor, "rows targets"]]:
    """Predictions and targets ``y`` of all graphs, or of their nodes, in evaluation mode."""
    check_targets(graphs)
    passes = scan(model, batches(graphs, batch_size), "")
    predicted, target = zip(*((seen[""], targets(batch)) for batch, seen in passes), strict=True)
    return torch.cat(predicted), torch.cat(target)


def evaluate(model: nn.Module, graphs: Graphs, *, loss: str = "l1", batch_size: int = 128) -> float:
    """The mean loss of a model over all labeled targets, in evaluation mode."""
    metrics = measure(*predictions(model, graphs, batch_size=batch_size), loss)
    return metrics["mae" if loss == "l1" else loss]


def each_loss(predicted: Values, target: Targets, loss: str) -> Values:
    """The loss of every entry where it stands, NaN where a target is NaN.

    ``"l1"`` is the absolute error, ``"bce"`` the binary cross-entropy of logits with targets of 0,
    1, or NaN where unlabeled. ValueError says what does not fit.
    """
    if predicted.shape != target.shape:  # broadcasting would hide it
        shapes = f"{tuple(predicted.shape)} for targets of shape {tuple(target.shape)}"
        advice = "give each graph, or each node if there is no readout, a row of as many targets"
        raise ValueError(f"the model predicts {shapes}; {advice}")
    if loss == "l1":
        return (predicted - target).abs()
    if loss != "bce":
        raise ValueError(f"loss: expected one of {LOSSES}, got {loss!r}")
    if not ((target == 0) | (target == 1) | target.isnan()).all():
        raise ValueError("loss 'bce': expected targets 0, 1 or NaN (unlabeled)")
    kind = torch.promote_types(predicted.dtype, torch.float)
    each = nn.functional.binary_cross_entropy_with_logits(
        predicted.to(kind), target.nan_to_num().to(kind), reduction="none"
    )
    return each.where(~target.isnan(), torch.nan)


def losses(predicted: Values, target: Targets, loss: str) -> Float[Tensor, " labeled"]:
    """The loss of every labeled entry, flat; otherwise as ``each_loss``."""
    each = each_loss(predicted, target, loss)
    return each.flatten() if loss == "l1" else each[~target.isnan()]


def measure(predicted: Values, target: Targets, loss: str) -> dict[str, float]:
    """The metrics that go with a loss, over all labeled entries.

    Returns:
        ``{"mae": ...}`` for ``"l1"``; ``{"bce": ..., "roc_auc": ..., "accuracy": ...}`` for
        ``"bce"``. Accuracy is that of a threshold at probability 0.5.
    """
    values = losses(predicted, target, loss)
    if values.numel() == 0:
        raise ValueError("every target is NaN (unlabeled): there is nothing to measure")
    mean = values.double().mean().item()
    if loss == "l1":
        return {"mae": mean}
    labeled = ~target.isnan()
    accuracy = ((predicted > 0) == (target == 1))[labeled].double().mean().item()
    return {"bce": mean, "roc_auc": mean_roc_auc(predicted, target), "accuracy": accuracy}


def mean_roc_auc(logits: Values, target: Targets) -> float:
    """Area under the ROC curve, the mean over targets.

    As in Open Graph Benchmark, a target counts only if it has both classes; NaN if none has.
    """
    areas = []
    for column, labels in zip(logits.detach().cpu().double().T, target.cpu().T, strict=True):
        positive, negative = column[labels == 1].numpy(), column[labels == 0].numpy()
        if positive.size and negative.size:
            # The area is the Mann-Whitney statistic, as a share of all pairs of two classes.
            wins = stats.mannwhitneyu(positive, negative, method="asymptotic").statistic
            areas.append(wins / (positive.size * negative.size))
    return float(sum(areas) / len(areas)) if areas else float("nan")


def pooled_mean(
    sums: Shaped[np.ndarray, " graphs"],
    numbers: Shaped[np.ndarray, " graphs"],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """A mean over all entries of all graphs, and the ends of its 95 % percentile interval.

    ``sums`` and ``numbers`` are those of the entries of each graph; graphs with some are drawn, two
    or more.
    """
    sums, numbers = sums[numbers > 0], numbers[numbers > 0]
    if len(sums) < 2:
        raise ValueError(f"expected two labeled graphs or more, to draw from, got {len(sums)}")
    if not np.isfinite(sums).all():  # there is no mean
        return math.nan, math.nan, math.nan

    def ratio(values: np.ndarray, counts: np.ndarray, axis: int = 0) -> Any:
        return np.sum(values, axis=axis) / np.sum(counts, axis=axis)

    options = dict(method="percentile", n_resamples=resamples, rng=np.random.default_rng(seed))
    interval = stats.bootstrap((sums, numbers), ratio, paired=True, vectorized=True, **options)
    low, high = map(float, interval.confidence_interval)
    return float(ratio(sums, numbers)), low, high


def calibrate_batch_norm(
    model: nn.Module, graphs: Graphs, *, batch_size: int | None = None
) -> nn.Module:
    """Set BatchNorm statistics to those of the data, in place, with dropout off.

    Without ``batch_size`` all graphs are one batch; otherwise statistics are the mean over such
    batches, in which every layer normalizes as in training, and depend on the number.
    """
    if len(graphs) == 0:
        raise ValueError("graphs: expected 1 graph or more, got 0")
    size = len(graphs) if batch_size is None else batch_size
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    before = [copy.deepcopy(norm.state_dict()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average

    def forward(model: nn.Module, batch: Any) -> None:
        for norm in norms:
            norm.train()
        predict(model, batch)

    try:
        for _ in scan(model, batches(graphs, size), (), forward=forward):
            pass
    except BaseException:
        for norm, state in zip(norms, before, strict=True):
            norm.load_state_dict(state)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model
