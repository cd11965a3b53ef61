"""The activation ratio, and when an activation is massive."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MASSIVE_RATIO = 1000.0
"""An activation ratio above this is massive (massive-activations paper, its figures)."""


def row_median(x: Float[Tensor, "rows channels"]) -> Float[Tensor, " rows"]:
    """Median magnitude of each row: the lower middle one if the number of channels is even.

    Source: massive-activations paper, code of its base-against-trained figure (torch's
    median). differs: its distribution figure averages the two middle magnitudes instead.
    """
    return x.abs().median(dim=-1).values


def activation_ratio(x: Float[Tensor, "rows channels"]) -> Float[Tensor, "rows channels"]:
    """Magnitude of each activation over the median magnitude of its row.

    Args:
        x: activations, shape [rows, channels].

    Returns:
        Ratios, shape [rows, channels]. Rows whose median is zero or not finite are NaN, so
        that they can be counted and never enter a statistic as infinity.

    Source: massive-activations paper, Equation (1). differs: zero medians gave infinity.
    """
    median = row_median(x)
    usable = (median > 0) & x.isfinite().all(dim=-1)
    # NaN, not a tiny epsilon: an epsilon would turn each such row into massive activations.
    return x.abs() / median.where(usable, torch.nan).unsqueeze(-1)


def is_massive(
    ratio: Float[Tensor, "rows channels"], threshold: float = MASSIVE_RATIO
) -> Bool[Tensor, "rows channels"]:
    """Which activations are massive: a ratio above the threshold. NaN is not massive.

    Args:
        ratio: as ``activation_ratio`` returns it, shape [rows, channels].
        threshold: a positive number.
    """
    return ratio > threshold
