r"""What "massive" may mean, and summaries that stream.

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
1/125 of its RMS.

Sources: massive-activations paper (row ratio; its code has the layer ratio as an option,
``batch_median``); Sun et al. 2024 (rule); He et al. 2024 (kurtosis).
"""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mapkg.models.edge_attention import SCORE_CLAMP

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

    NaN in rows that are not finite or whose median is zero.

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
    """Which activations are massive: a ratio above a positive threshold. NaN is not massive."""
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


LOG_EPS = 2.220446049250313e-16
"""Added to a ratio before its logarithm, as in the published distribution figure."""

# 1000 bins as in the published figure, but of a fixed range, so that they can stream; it holds
# 15.65, where the published epsilon puts an activation of exactly zero.
NEG_LOG_RATIO_BINS = (-8.0, 17.0, 1000)
"""Range and number of the bins of -log10 ratio."""

DECADES = (-40.0, 40.0, 16_000)
"""Range and number of the bins of log10 of what a row has, of 0.005 decades or 1.2 %."""

QUANTILES = {f"row_max_ratio_q{round(100 * q):02d}": q for q in (0.01, 0.25, 0.5, 0.75, 0.99)}
"""Quantiles over rows that a summary reports."""


class StreamingHistogram:
    """Counts of values in equal bins, filled batch by batch, and quantiles from them.

    Values outside of the range ``low`` to ``high`` are counted apart, never dropped.
    """

    def __init__(self, low: float, high: float, bins: int) -> None:
        if not (low < high and bins > 0):
            raise ValueError(f"expected low < high and bins > 0, got {low}, {high}, {bins}")
        self.low, self.high, self.bins = low, high, bins
        self._counts = torch.zeros(bins + 2, dtype=torch.long)  # below, the bins, above
        self.min, self.max = math.inf, -math.inf

    @classmethod
    def from_counts(
        cls, low: float, high: float, counts: Int[Tensor, " bins"]
    ) -> "StreamingHistogram":
        """A histogram that was filled elsewhere, with how many values each bin holds."""
        histogram = cls(low, high, len(counts))
        histogram.counts[:] = counts
        histogram.min, histogram.max = low, high
        return histogram

    def update(self, values: Tensor) -> None:
        """Count finite values of any shape."""
        if values.numel() == 0:
            return
        width = (self.high - self.low) / self.bins
        index = (values.flatten().double() - self.low).div_(width).floor_().clamp_(-1, self.bins)
        counts = torch.bincount(index.long().add_(1), minlength=self.bins + 2)
        self._counts += counts.cpu()
        least, greatest = values.aminmax()
        self.min = min(self.min, least.item())
        self.max = max(self.max, greatest.item())

    @property
    def counts(self) -> Int[Tensor, " bins"]:
        """Counts per bin."""
        return self._counts[1:-1]

    @property
    def edges(self) -> Float[Tensor, " edges"]:
        """The bins + 1 edges of the bins."""
        return torch.linspace(self.low, self.high, self.bins + 1, dtype=torch.double)

    @property
    def num_outside(self) -> int:
        """How many values lie outside of the range."""
        return int(self._counts[0] + self._counts[-1])

    def quantile(self, q: float) -> float:
        """The center of the bin of the q-quantile; outside of the range, an extreme value seen."""
        total = int(self._counts.sum())
        if total == 0:
            return math.nan
        index = int(torch.searchsorted(self._counts.cumsum(0), max(1, math.ceil(q * total))))
        if index in (0, self.bins + 1):
            return self.max if index else self.min
        center = self.low + (index - 0.5) * (self.high - self.low) / self.bins
        return min(max(center, self.min), self.max)


class ActivationSummary:
    """What one layer's activations look like by the row ratio, gathered batch by batch.

    Memory does not grow with the number of batches, apart from one number per graph in
    ``graph_maxima``. Summaries of a batch of graphs and of the same graphs one by one are equal.

    Args:
        heads: of scores, for the share of summed ones beyond the clamp.
        threshold: the ratio above which an activation is massive.
    """

    def __init__(self, *, heads: int | None = None, threshold: float = MASSIVE_RATIO) -> None:
        self.heads, self.threshold = heads, threshold
        self.massive_by_channel = torch.zeros(0, dtype=torch.long)
        self.graph_maxima: list[float] = []
        self.neg_log_ratio = StreamingHistogram(*NEG_LOG_RATIO_BINS)
        names = ("rows", "channels", "zero_medians", "nonfinite_rows", "rows_with_massive")
        self._counts, self._saturated = dict.fromkeys(names, 0), [0, 0]
        self._ratio, self._largest, self._median = (StreamingHistogram(*DECADES) for _ in range(3))

    def update(
        self,
        x: Float[Tensor, "rows channels"],
        graph: Int[Tensor, " rows"] | None = None,
        num_graphs: int = 1,
    ) -> None:
        """Add a batch of as many channels as before; without ``graph``, its rows are of one."""
        num_rows, num_channels = x.shape
        if not self._counts["channels"]:
            self._counts["channels"] = num_channels
            self.massive_by_channel = torch.zeros(num_channels, dtype=torch.long)
        if num_channels != (before := self._counts["channels"]):
            raise ValueError(f"expected {before} channels as before, got {num_channels}")
        if graph is None:
            graph = torch.zeros(num_rows, dtype=torch.long, device=x.device)

        magnitude = x.abs()
        median, largest = (part.double() for part in ratio_parts(magnitude))
        finite = largest.isfinite()
        # A ratio may exceed what single precision holds.
        row_ratio = largest / median.where(finite & (median > 0), torch.nan)
        usable = row_ratio.isfinite()
        if self.heads is not None:
            sums = _kept(x, finite).double().unflatten(-1, (self.heads, -1)).sum(dim=-1)
            self._saturated[0] += int((sums.abs() > SCORE_CLAMP).sum())
            self._saturated[1] += sums.numel()

        magnitude, median, largest, row_ratio = (
            _kept(part, usable) for part in (magnitude, median, largest, row_ratio)
        )
        ratio = magnitude.double() / median.unsqueeze(-1)
        has_massive = row_ratio > self.threshold
        self.massive_by_channel += (ratio[has_massive] > self.threshold).sum(dim=0).cpu()
        self._counts["rows"] += num_rows
        self._counts["zero_medians"] += int((finite & ~usable).sum())
        self._counts["nonfinite_rows"] += int((~finite).sum())
        self._counts["rows_with_massive"] += int(has_massive.sum())
        self.neg_log_ratio.update(ratio.add_(LOG_EPS).log10_().neg_())
        self._ratio.update(row_ratio.log10())
        self._largest.update(largest.log10())
        self._median.update(median.log10())

        maxima = torch.full((num_graphs,), torch.nan, dtype=torch.double, device=x.device)
        maxima.scatter_reduce_(0, _kept(graph, usable), row_ratio, "amax", include_self=False)
        self.graph_maxima += maxima.tolist()

    def statistics(self) -> dict[str, Any]:
        """The summary as one flat row.

        Rows that are not finite or have a zero median are counted and left out of what follows:
        shares, NaN without a usable row; ``max_ratio`` and ``row_max_ratio_qXX``, maximum and
        quantiles over rows, exact to 0.6 %, of the row's largest ratio; ``max_abs``;
        ``row_max_abs_q50`` and ``row_median_q50``, of the row's largest and median magnitude; and
        ``share_saturated``, of (finite row, head), whose summed score lies outside the clamp.
        """
        rows, channels, *left_out, with_massive = self._counts.values()
        usable, massive = rows - sum(left_out), self.massive_by_channel
        return {
            **self._counts,
            "share_rows_with_massive": _share(with_massive, usable),
            "share_massive": _share(int(massive.sum()), usable * channels),
            "share_channels_with_massive": _share(int((massive > 0).sum()), usable and channels),
            "max_ratio": _power(self._ratio.max),
            **{name: _power(self._ratio.quantile(q)) for name, q in QUANTILES.items()},
            "max_abs": _power(self._largest.max),
            "row_max_abs_q50": _power(self._largest.quantile(0.5)),
            "row_median_q50": _power(self._median.quantile(0.5)),
            "share_saturated": None if self.heads is None else _share(*self._saturated),
        }


def _kept(rows: Tensor, chosen: Tensor) -> Tensor:
    """The chosen rows, without a copy if that is all of them."""
    return rows if chosen.all() else rows[chosen]


def _share(count: int, total: int) -> float:
    return count / total if total else math.nan


def _power(exponent: float) -> float:
    return 10.0**exponent if math.isfinite(exponent) else math.nan
