r"""What "massive" may mean, and the ratio of a row.

A row is one edge (or node), its D channels are those of all heads together. Rows that are not
finite have no measure. Which activations are massive depends on the measure, so say which one:

============  ================================================  ==================================
measure       massive is                                        use it
============  ================================================  ==================================
row ratio     abs(x) > 1000 medians of its row                  as in the published figures
layer ratio   abs(x) > 1000 medians of its layer                where rows may be large as a whole
Sun's rule    abs(x) > 100 and > 1000 medians of its graph      as for language models
spread        a standard deviation of ln abs(x) beyond chance   across widths and sizes
isolation     largest over second largest beyond chance         for one large channel alone
============  ================================================  ==================================

The first three need one extreme value, and find more of them in more data. Spread and isolation
have no threshold and are compared with a null (``mapkg.nulls``). A ratio depends on what it is
divided by: max <= sqrt(D) RMS, so a row ratio above 1000 at D = 64 needs half of the row below
1/125 of its RMS. ``mapkg.all_measures`` streams all of them.

Sources: massive-activations paper (row ratio; its code has the layer ratio as an option,
``batch_median``); Sun et al. 2024 (rule); He et al. 2024 (kurtosis).
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

MASSIVE_RATIO = 1000.0
"""An activation ratio above this is massive (massive-activations paper, its figures)."""


MEASURES = {
    "row": "the row ratio",
    "layer": "the layer ratio",
    "sun": "Sun's rule",
    "spread": "the spread",
    "isolation": "isolation",
}
"""The measures of the table above, and what sentences call them."""


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
        Ratios, shape [rows, channels]; NaN in rows that are not finite or whose median is zero.

    Raises:
        ValueError: if x is no tensor of real numbers of that shape.

    Source: massive-activations paper, Equation (1). differs: zero medians gave infinity.
    """
    if not isinstance(x, Tensor) or x.dim() != 2 or not (x.size(1) and x.is_floating_point()):
        found = f"{x.dtype} of shape {[*x.shape]}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: expected a tensor of floats, [rows, channels], got {found}")
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
    if not threshold > 0:
        raise ValueError(f"threshold: expected a ratio above 0, got {threshold!r}")
    if ratio.dtype in (torch.float16, torch.bfloat16):  # which would round the threshold, too
        ratio = ratio.float()
    return ratio > threshold


def ratio_parts(
    magnitude: Float[Tensor, "rows channels"],
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Median and maximum of each row of magnitudes, NaN where the row has a NaN."""
    largest = magnitude.amax(dim=-1)
    plain = magnitude.dtype in (torch.float32, torch.float64) and not magnitude.requires_grad
    if magnitude.device.type != "cpu" or not plain:
        return magnitude.median(dim=-1).values, largest
    # numpy selects in rows this short many times faster than torch, but takes NaN for the largest.
    middle = (magnitude.size(-1) - 1) // 2
    values = np.partition(magnitude.numpy(), middle, axis=-1)[..., middle]
    return torch.from_numpy(values.copy()).where(~largest.isnan(), torch.nan), largest


QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
"""Quantiles over rows that summaries report."""
