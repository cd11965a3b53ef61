"""Losses and metrics of the tasks.

Every function takes predictions and targets of one shape, [rows, targets]. Predictions of a
classification are logits, and a NaN among its targets is unlabelled and left out. In a
regression a NaN is a bad value and shows in the loss.
"""

import numpy as np
import torch
from jaxtyping import Float, Shaped
from scipy import stats
from torch import Tensor

from mapkg.models.config import LOSSES

# Not "rows targets" for both: losses() itself says what is wrong if the shapes differ.
Values = Float[Tensor, "_ _"]


def losses(predicted: Values, target: Values, loss: str) -> Float[Tensor, " labelled"]:
    """The loss of every labelled entry, flat.

    Args:
        predicted: predictions; logits for ``"bce"``.
        target: for ``"bce"`` 0, 1, or NaN where unlabelled.
        loss: ``"l1"`` (absolute error) or ``"bce"`` (binary cross-entropy).

    Raises:
        ValueError: if the shapes differ, the loss is unknown, or a target of ``"bce"`` is
            neither 0 nor 1 nor NaN.
    """
    if predicted.shape != target.shape:  # broadcasting would hide it
        raise ValueError(
            f"the model predicts {tuple(predicted.shape)} for targets of shape "
            f"{tuple(target.shape)}; set out_channels to the number of targets"
        )
    if loss == "l1":
        return (predicted - target).abs().flatten()
    if loss == "bce":
        labelled = ~target.isnan()
        predicted, target = predicted[labelled], target[labelled]
        if not ((target == 0) | (target == 1)).all():
            raise ValueError("loss 'bce': expected targets 0, 1 or NaN (unlabelled)")
        return torch.nn.functional.binary_cross_entropy_with_logits(
            predicted, target, reduction="none"
        )
    raise ValueError(f"loss: expected one of {LOSSES}, got {loss!r}")


def each_loss(predicted: Values, target: Values, loss: str) -> Values:
    """The loss of every entry where it stands, NaN where a target is NaN.

    Args, Raises:
        As for ``losses``.
    """
    if predicted.shape != target.shape:
        return losses(predicted, target, loss)  # raises
    labelled = ~target.isnan()
    found = losses(predicted[labelled].unsqueeze(1), target[labelled].unsqueeze(1), loss)
    return torch.full_like(predicted, torch.nan).masked_scatter(labelled, found)


def measure(predicted: Values, target: Values, loss: str) -> dict[str, float]:
    """The metrics that go with a loss, over all labelled entries.

    Args:
        predicted, target, loss: as for ``losses``.

    Returns:
        ``{"mae": ...}`` for ``"l1"``; ``{"bce": ..., "roc_auc": ..., "accuracy": ...}`` for
        ``"bce"``. Accuracy is that of a threshold at probability 0.5.

    Raises:
        ValueError: as ``losses``, or if nothing is labelled.
    """
    values = losses(predicted, target, loss)
    if values.numel() == 0:
        raise ValueError("every target is NaN (unlabelled): there is nothing to measure")
    mean = values.double().mean().item()
    if loss == "l1":
        return {"mae": mean}
    labelled = ~target.isnan()
    right = (predicted[labelled] > 0) == (target[labelled] == 1)
    return {
        "bce": mean,
        "roc_auc": mean_roc_auc(predicted, target),
        "accuracy": right.double().mean().item(),
    }


def best_constant(target: Values, loss: str) -> Float[Tensor, " targets"]:
    """The prediction of each target that has the least loss if no graph is looked at.

    Args:
        target, loss: as for ``losses``.

    Returns:
        The median of each target's labels; for ``"bce"`` the logit of their mean, which is at most
        a million to one where all labels are alike.
    """
    if loss == "bce":
        return target.nanmean(dim=0).logit(eps=1e-6)
    return target.quantile(0.5, dim=0)


def pooled_mean(
    sums: Shaped[np.ndarray, " graphs"],
    numbers: Shaped[np.ndarray, " graphs"],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """A mean over all entries of all graphs, and its bootstrap interval over graphs.

    Args:
        sums: of the entries of each graph.
        numbers: how many entries a graph has.
        resamples: number of bootstrap samples.
        confidence: of the interval, in (0, 1).
        seed: of the bootstrap.

    Returns:
        The mean, and the lower and upper end of its percentile interval.

    Raises:
        ValueError: if there are fewer than two graphs.
    """
    if len(sums) < 2:
        raise ValueError(f"expected two graphs or more, to draw from, got {len(sums)}")
    interval = stats.bootstrap(
        (sums, numbers),
        _ratio,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=resamples,
        confidence_level=confidence,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(_ratio(sums, numbers)), float(interval.low), float(interval.high)


def _ratio(values: np.ndarray, numbers: np.ndarray, axis: int = 0) -> np.ndarray | np.float64:
    return np.sum(values, axis=axis) / np.sum(numbers, axis=axis)


def mean_roc_auc(logits: Values, target: Values) -> float:
    """Area under the ROC curve, the mean over targets.

    As in Open Graph Benchmark, a target counts only if both classes are among its labelled
    rows; NaN if no target does.
    """
    areas = []
    for column, labels in zip(logits.T, target.T, strict=True):
        labelled = ~labels.isnan()
        positive = (labels[labelled] == 1).cpu().numpy()
        positives, negatives = positive.sum(), (~positive).sum()
        if positives and negatives:
            # The area is the Mann-Whitney statistic, as a share of all pairs of two classes.
            ranks = stats.rankdata(column[labelled].detach().cpu())
            wins = ranks[positive].sum() - positives * (positives + 1) / 2
            areas.append(wins / (positives * negatives))
    return float(sum(areas) / len(areas)) if areas else float("nan")
