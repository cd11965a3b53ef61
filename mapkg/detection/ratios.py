"""The activation ratio, and when an activation is massive."""

import numpy as np
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
    return ratio_parts(x.abs())[0]


def activation_ratio(x: Float[Tensor, "rows channels"]) -> Float[Tensor, "rows channels"]:
    """Magnitude of each activation over the median magnitude of its row.

    Args:
        x: activations, shape [rows, channels].

    Returns:
        Ratios, shape [rows, channels]. Rows whose median is zero or not finite are NaN, so
        that they can be counted and never enter a statistic as infinity.

    Source: massive-activations paper, Equation (1). differs: zero medians gave infinity.
    """
    magnitude = x.abs()
    median, largest = ratio_parts(magnitude)
    usable = (median > 0) & largest.isfinite()
    # NaN, not a tiny epsilon: an epsilon would turn each such row into massive activations.
    return magnitude / median.where(usable, torch.nan).unsqueeze(-1)


def is_massive(
    ratio: Float[Tensor, "rows channels"], threshold: float = MASSIVE_RATIO
) -> Bool[Tensor, "rows channels"]:
    """Which activations are massive: a ratio above the threshold. NaN is not massive.

    Args:
        ratio: as ``activation_ratio`` returns it, shape [rows, channels].
        threshold: a positive number.
    """
    return ratio > threshold


def ratio_parts(
    magnitude: Float[Tensor, "rows channels"],
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Median and maximum of each row of magnitudes, NaN where the row has a NaN.

    Args:
        magnitude: as ``x.abs()``, shape [rows, channels].
    """
    largest = magnitude.amax(dim=-1)
    return _lower_median(magnitude, largest), largest


def _lower_median(
    magnitude: Float[Tensor, "rows channels"], largest: Float[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    plain = magnitude.dtype in (torch.float32, torch.float64) and not magnitude.requires_grad
    if magnitude.device.type != "cpu" or not plain:
        return magnitude.median(dim=-1).values
    # numpy selects in rows this short many times faster than torch, but takes NaN for the largest.
    middle = (magnitude.size(-1) - 1) // 2
    values = np.partition(magnitude.numpy(), middle, axis=-1)[..., middle]
    return torch.from_numpy(values.copy()).where(~largest.isnan(), torch.nan)
