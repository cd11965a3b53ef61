r"""Every measure of massive activations at once, of many networks, streamed on the device.

Of each network and layer, over the edges of a data set. A row is the score s of one edge, its D
channels those of all heads. With \|s\| sorted within a row, its *median* is the lower middle one
(``measures.row_median``), its *90 % quantile* the ceil(0.9 D)-th.

- Row ratio (the published definition): largest over median of the row.
- Layer ratio (the option ``batch_median`` of the published code): \|s\| over the median of \|s\|
  over all edges of the data set.
- Sun's rule: \|s\| > 100 and > 1000 times the median of the molecule's own score tensor.
- Spread: the standard deviation of ln \|s\| within a row (divisor D - 1).
- Isolation: largest over second largest, largest over 90 % quantile, and the kurtosis
  mean(s^4) / mean(s^2)^2 of a row.

Nothing here waits for the device, and all shapes are fixed, so that updates can be captured in
a CUDA graph. Maxima, counts, means and the medians of molecules are exact; quantiles over rows
and the median of a layer come from histograms of bins of ``BIN`` decades: they are exact to half
a bin, 0.6 %, and so is the layer ratio.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mapkg.measures import MASSIVE_RATIO, QUANTILES
from mapkg.models.edge_attention import SCORE_CLAMP

SUN_MAGNITUDE = 100.0
"""A massive activation after Sun et al. (2024) is larger than this, too."""

BIN = 0.005
"""Width of the bins of all histograms, in decades."""

_LOW, _BINS = -40.0, 16_000  # decades; float32 holds no magnitude outside

_COUNTS = (
    *("rows", "zero_medians", "nonfinite_rows", "rows_with_zero", "rows_with_massive"),
    *("sun_edges", "sun_molecules", "molecules", "saturated", "head_sums"),
)
_HISTOGRAMS = ("magnitude", "ratio", "largest", "median", "second", "q90", "kurtosis")

COLUMNS = (
    *("rows", "zero_medians", "nonfinite_rows", "rows_with_zero"),
    *("max_ratio", *(f"row_max_ratio_q{round(100 * q):02d}" for q in QUANTILES)),
    *("rows_with_massive", "share_rows_with_massive"),
    *("max_abs", "row_max_abs_q50", "row_median_q50"),
    *("layer_median", "max_layer_ratio", "share_rows_with_layer_massive"),
    *("molecules", "sun_molecules", "sun_edges"),
    *("spread_mean", "spread_sd"),
    *("max_over_second_q50", "max_over_q90_q50", "kurtosis_q50"),
    "share_saturated",
)
"""What ``ScoreMeasures.table`` gives for each network and layer.

Rows that are not finite and rows whose median is zero are counted and left out of the rest. Rows
with a zero median do count where no row median is asked for: in ``max_abs``, ``layer_median``,
``max_layer_ratio``, Sun's rule and ``share_saturated``. Rows with a zero among their entries
have no ln and are left out of the spread.
"""


class ScoreMeasures:
    """The measures of S networks with L layers each; ``heads`` is None without a clamp."""

    def __init__(
        self,
        networks: int,
        layers: int,
        channels: int,
        *,
        heads: int | None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float,
    ) -> None:
        self.heads, self.channels = heads, channels
        shape = layers, networks
        self._counts = torch.zeros(len(_COUNTS), *shape, dtype=torch.long, device=device)
        self._maxima = torch.zeros(2, *shape, dtype=dtype, device=device)
        self._spreads = torch.zeros(2, *shape, dtype=torch.double, device=device)
        # One bin below the range, one above, and one for what is not counted.
        bins = len(_HISTOGRAMS), *shape, _BINS + 3
        self._bins = torch.zeros(bins, dtype=torch.int32, device=device)
        self._one = torch.ones((), dtype=torch.int32, device=device)
        self._network = torch.arange(networks, device=device)

    def reset(self) -> None:
        """Forget everything."""
        for tensor in (self._counts, self._maxima, self._spreads, self._bins):
            tensor.zero_()

    @torch.no_grad()
    def update(
        self,
        layer: int,
        score: Float[Tensor, "S E D"],
        mask: Bool[Tensor, "S E"],
        graph: Int[Tensor, "S E"],
        num_graphs: int,
    ) -> None:
        """Add the scores of a batch in one layer; ``mask`` tells edges from padding.

        ``graph`` is the molecule of each edge, 0 to num_graphs - 1, anything for padding.
        """
        width = self.channels
        ascending = score.abs().sort(dim=-1).values  # NaN last
        least, median, largest = (ascending[..., i] for i in (0, (width - 1) // 2, width - 1))
        finite = mask & largest.isfinite()
        usable = finite & (median > 0)
        ratio = largest / median
        massive = usable & (ratio > MASSIVE_RATIO)
        for index, maximum in enumerate((largest.where(finite, 0), ratio.where(usable, 0))):
            # A row without a usable median has no ratio, but a largest magnitude.
            self._maxima[index, layer] = torch.maximum(
                self._maxima[index, layer], maximum.amax(dim=1)
            )
        log = ascending.log()
        self._bin("magnitude", layer, log / math.log(10), finite.unsqueeze(-1))
        squares = (ascending / largest.unsqueeze(-1)).square()
        q90 = ascending[..., math.ceil(0.9 * width) - 1]
        for name, value in (
            ("ratio", ratio),
            ("median", median),
            ("second", largest / ascending[..., width - 2]),
            ("q90", largest / q90),
            ("kurtosis", squares.square().mean(-1) / squares.mean(-1).square()),
        ):
            self._bin(name, layer, value.log10(), usable)
        self._bin("largest", layer, largest.log10(), usable)
        with_log = usable & (least > 0)
        spread = log.std(dim=-1).where(with_log, 0).double()
        self._spreads[0, layer] += spread.sum(dim=1)
        self._spreads[1, layer] += spread.square().sum(dim=1)

        counted = {
            "rows": mask,
            "nonfinite_rows": mask & ~finite,
            "zero_medians": finite & ~usable,
            "rows_with_zero": usable & ~with_log,
            "rows_with_massive": massive,
        }
        graph = graph.where(finite, num_graphs)
        median = _molecule_medians(ascending, graph, num_graphs)
        sun = finite & (largest > SUN_MAGNITUDE)
        sun &= largest > MASSIVE_RATIO * median.gather(1, graph)
        counted |= {"sun_edges": sun, "sun_molecules": _any_of(graph, sun, num_graphs)}
        counted["molecules"] = _any_of(graph, finite, num_graphs)
        if self.heads is not None:
            sums = score.unflatten(-1, (self.heads, -1)).sum(dim=-1)
            counted["saturated"] = (sums.abs() > SCORE_CLAMP) & finite.unsqueeze(-1)
            counted["head_sums"] = finite.unsqueeze(-1).expand_as(sums)
        for name, which in counted.items():
            self._counts[_COUNTS.index(name), layer] += which.flatten(1).sum(dim=1)

    def _bin(self, name: str, layer: int, decades: Tensor, valid: Tensor) -> None:
        """Count decades, shape [S, E] or [S, E, D]; those that are not valid go to the last bin."""
        index = ((decades - _LOW) / BIN).floor().clamp(-1, _BINS).nan_to_num(-1).long() + 1
        index = index.where(valid, _BINS + 2).flatten(1)
        bins = self._bins[_HISTOGRAMS.index(name), layer]
        index = index + self._network.unsqueeze(1) * bins.size(1)
        bins.view(-1).scatter_add_(0, index.flatten(), self._one.expand(index.numel()))

    def table(self) -> Float[Tensor, "S L columns"]:
        """The measures of each network and layer, NaN where there is none, on the CPU."""
        count = dict(zip(_COUNTS, self._counts.double(), strict=True))
        usable = count["rows"] - count["zero_medians"] - count["nonfinite_rows"]
        spreads = usable - count["rows_with_zero"]
        largest, ratio = self._maxima.double()
        row_q50 = {name: self._quantile(name, 0.5) for name in _HISTOGRAMS}
        layer_median = row_q50["magnitude"]
        spread = self._spreads[0] / spreads
        variance = (self._spreads[1] - spreads * spread.square()).clamp(min=0) / (spreads - 1)
        columns = {
            **count,
            "max_ratio": ratio.where(usable > 0, torch.nan),
            **{
                f"row_max_ratio_q{round(100 * q):02d}": self._quantile("ratio", q)
                for q in QUANTILES
            },
            "share_rows_with_massive": count["rows_with_massive"] / usable,
            "max_abs": largest,
            "row_max_abs_q50": row_q50["largest"],
            "row_median_q50": row_q50["median"],
            "layer_median": layer_median,
            "max_layer_ratio": largest / layer_median,
            "share_rows_with_layer_massive": self._share_above(MASSIVE_RATIO * layer_median),
            "spread_mean": spread,
            "spread_sd": variance.sqrt().where(spreads > 1, torch.nan),
            "max_over_second_q50": row_q50["second"],
            "max_over_q90_q50": row_q50["q90"],
            "kurtosis_q50": row_q50["kurtosis"],
            "share_saturated": count["saturated"] / count["head_sums"],
        }
        return torch.stack([columns[name] for name in COLUMNS], dim=-1).transpose(0, 1).cpu()

    def _histogram(self, name: str) -> Int[Tensor, "L S bins"]:
        return self._bins[_HISTOGRAMS.index(name), ..., :-1].long()

    def _quantile(self, name: str, q: float) -> Float[Tensor, "L S"]:
        """The center of the bin of the q-quantile, as ``StreamingHistogram`` takes it."""
        sums = self._histogram(name).cumsum(dim=-1)
        rank = (q * sums[..., -1:].double()).ceil().clamp(min=1).long()
        index = torch.searchsorted(sums, rank).squeeze(-1)
        center = 10.0 ** (_LOW + (index.double() - 0.5) * BIN)
        center = center.where(index > 0, 0.0).where(index <= _BINS, torch.inf)
        return center.where(sums[..., -1] > 0, torch.nan)

    def _share_above(self, magnitude: Float[Tensor, "L S"]) -> Float[Tensor, "L S"]:
        """The share of usable rows whose largest magnitude lies in a bin above a magnitude."""
        sums = self._histogram("largest").cumsum(dim=-1)
        index = ((magnitude.log10() - _LOW) / BIN).floor().clamp(-1, _BINS).nan_to_num(-1) + 1
        below = sums.gather(-1, index.long().unsqueeze(-1)).squeeze(-1)
        return 1 - below / sums[..., -1]


def _molecule_medians(
    ascending: Float[Tensor, "S E D"], graph: Int[Tensor, "S E"], num_graphs: int
) -> Float[Tensor, "S graphs"]:
    """The lower median of each molecule's entries, and of what is in no molecule, last.

    Bisection on the bits of the magnitudes, which are ordered as the magnitudes are: in each
    step the entries below a value are counted in sorted rows.
    """
    integer = torch.int32 if ascending.dtype == torch.float else torch.int64
    zeros = torch.zeros(len(graph), num_graphs + 1, dtype=torch.long, device=graph.device)
    edges = zeros.scatter_add(1, graph, torch.ones_like(graph))
    needed = (edges * ascending.size(-1) - 1) // 2 + 1
    low = torch.zeros_like(zeros, dtype=integer)
    high = torch.full_like(zeros, torch.inf, dtype=ascending.dtype).view(integer)
    for _ in range(torch.iinfo(integer).bits - 1):
        middle = low + (high - low) // 2
        value = middle.view(ascending.dtype).gather(1, graph).unsqueeze(-1)
        below = torch.searchsorted(ascending, value, right=True).squeeze(-1)
        enough = zeros.scatter_add(1, graph, below) >= needed
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle + 1)
    return high.view(ascending.dtype)


def _any_of(graph: Tensor, which: Tensor, num_graphs: int) -> Bool[Tensor, "S graphs"]:
    """The molecules that have one of these edges."""
    zeros = torch.zeros(len(graph), num_graphs + 1, dtype=torch.long, device=graph.device)
    return zeros.scatter_add(1, graph, which.long())[:, :num_graphs] > 0
