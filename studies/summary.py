"""What streams of one layer by the row ratio: counts, quantiles, the histogram of the book."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mapkg.measures import MASSIVE_RATIO, QUANTILES, is_massive, ratio_parts

LOG_EPS = 2.220446049250313e-16
"""Added to a ratio before its logarithm, as in the published distribution figure."""

# 1000 bins as in the published figure, but of a fixed range, so that they can stream; it holds
# 15.65, where the published epsilon puts an activation of exactly zero.
NEG_LOG_RATIO_BINS = (-8.0, 17.0, 1000)
"""Range and number of the bins of -log10 ratio."""


class StreamingHistogram:
    """Counts of values in equal bins; those below or above the range are counted apart."""

    def __init__(self, low: float, high: float, bins: int) -> None:
        self.low, self.high, self.bins = low, high, bins
        self._counts = torch.zeros(bins + 2, dtype=torch.long)  # below, the bins, above
        self.min, self.max = math.inf, -math.inf

    @classmethod
    def from_counts(
        cls, low: float, high: float, counts: Int[Tensor, " bins"]
    ) -> "StreamingHistogram":
        """One that was filled elsewhere; ``min`` and ``max`` are outer edges of filled bins."""
        histogram = cls(low, high, len(counts))
        histogram._counts[1:-1] = counts
        filled = counts.nonzero().flatten()
        if len(filled):
            histogram.min = histogram.edges[filled[0]].item()
            histogram.max = histogram.edges[filled[-1] + 1].item()
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
    def outside(self) -> int:
        """How many values lie below or above the range."""
        return int(self._counts[0] + self._counts[-1])

    def quantile(self, q: float) -> float:
        """The center of the bin of the q-quantile, not beyond the values seen; NaN of none."""
        total = int(self._counts.sum())
        if total == 0:
            return math.nan
        rank = max(1, math.ceil(q * total))
        index = int(torch.searchsorted(self._counts.cumsum(0), rank))
        if index in (0, self.bins + 1):
            return self.min if index == 0 else self.max
        center = self.low + (index - 0.5) * (self.high - self.low) / self.bins
        return min(max(center, self.min), self.max)


class ActivationSummary:
    """The statistics of one layer's activations by the row ratio, gathered batch by batch.

    Summaries of a batch of graphs and of the same graphs one by one are equal. ``heads`` is for
    the share of summed scores of a head beyond the ``clamp``, None if these are no scores.
    """

    def __init__(
        self, *, heads: int | None = None, threshold: float = MASSIVE_RATIO, clamp: float = 5.0
    ) -> None:
        self.heads, self.threshold, self.clamp = heads, threshold, clamp
        self.num_rows = self.num_zero_medians = self.num_nonfinite_rows = 0
        self.num_rows_with_massive = self.num_saturated = self.num_head_sums = 0
        self.massive_by_channel = torch.zeros(0, dtype=torch.long)
        self.graph_maxima: list[float] = []
        self.neg_log_ratio = StreamingHistogram(*NEG_LOG_RATIO_BINS)
        # Decades of a row's quantities: 0.005 decades are 1.2 %.
        self._row_max_ratio, self._row_max, self._row_median = (
            StreamingHistogram(-40.0, 40.0, 16_000) for _ in range(3)
        )

    def update(
        self,
        x: Float[Tensor, "rows channels"],
        graph: Int[Tensor, " rows"] | None = None,
        num_graphs: int = 1,
    ) -> None:
        """Add rows; ``graph`` says which of ``num_graphs`` of this batch each is of."""
        if graph is None:
            graph = torch.zeros(len(x), dtype=torch.long, device=x.device)
        magnitude = x.abs()
        median, largest = (part.double() for part in ratio_parts(magnitude))
        finite = largest.isfinite()
        # A ratio may exceed what single precision holds.
        row_max_ratio = largest / median.where(finite & (median > 0), torch.nan)
        usable = row_max_ratio.isfinite()
        self.num_rows += len(x)
        self.num_nonfinite_rows += int((~finite).sum())
        self.num_zero_medians += int((finite & ~usable).sum())
        if self.heads is not None:
            sums = _kept(x, finite).double().unflatten(-1, (self.heads, -1)).sum(dim=-1)
            self.num_saturated += int((sums.abs() > self.clamp).sum())
            self.num_head_sums += sums.numel()

        magnitude, median, largest, row_max_ratio = (
            _kept(part, usable) for part in (magnitude, median, largest, row_max_ratio)
        )
        ratio = magnitude.double() / median.unsqueeze(-1)
        has_massive = row_max_ratio > self.threshold
        self.num_rows_with_massive += int(has_massive.sum())
        massive = is_massive(ratio[has_massive], self.threshold).sum(dim=0).cpu()
        self.massive_by_channel = massive + (self.massive_by_channel if self._channels else 0)
        self.neg_log_ratio.update(ratio.add_(LOG_EPS).log10_().neg_())
        self._row_max_ratio.update(row_max_ratio.log10())
        self._row_max.update(largest.log10())
        self._row_median.update(median.log10())

        maxima = torch.full((num_graphs,), torch.nan, dtype=torch.double, device=x.device)
        maxima.scatter_reduce_(0, _kept(graph, usable), row_max_ratio, "amax", include_self=False)
        self.graph_maxima += maxima.tolist()

    @property
    def _channels(self) -> int:
        return len(self.massive_by_channel)

    def statistics(self) -> dict[str, Any]:
        """The summary as one flat row.

        Rows with a zero median and rows that are not finite are counted and left out of the rest,
        but for the share of saturated head sums. Quantiles are exact to 0.6 %. NaN without rows.
        """
        usable = self.num_rows - self.num_zero_medians - self.num_nonfinite_rows
        channels, massive = self._channels, self.massive_by_channel
        saturated = _share(self.num_saturated, self.num_head_sums)
        shown = channels if usable else 0
        return {
            "rows": self.num_rows,
            "channels": channels,
            "zero_medians": self.num_zero_medians,
            "nonfinite_rows": self.num_nonfinite_rows,
            "rows_with_massive": self.num_rows_with_massive,
            "share_rows_with_massive": _share(self.num_rows_with_massive, usable),
            "share_massive": _share(int(massive.sum()), usable * channels),
            "share_channels_with_massive": _share(int((massive > 0).sum()), shown),
            "max_ratio": _power(self._row_max_ratio.max),
            **{
                f"row_max_ratio_q{round(100 * q):02d}": _power(self._row_max_ratio.quantile(q))
                for q in QUANTILES
            },
            "max_abs": _power(self._row_max.max),
            "row_max_abs_q50": _power(self._row_max.quantile(0.5)),
            "row_median_q50": _power(self._row_median.quantile(0.5)),
            "share_saturated": None if self.heads is None else saturated,
        }


def _kept(rows: Tensor, chosen: Tensor) -> Tensor:
    """The chosen rows, without a copy if that is all of them."""
    return rows if chosen.all() else rows[chosen]


def _share(count: int, total: int) -> float:
    return count / total if total else math.nan


def _power(exponent: float) -> float:
    return 10.0**exponent if math.isfinite(exponent) else math.nan
