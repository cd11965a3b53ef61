"""All measures of ``mapkg.measures``, of rows in hand or streamed on the device."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mapkg.measures import DECADES, MASSIVE_RATIO, QUANTILES
from mapkg.models.edge_attention import SCORE_CLAMP

SUN_MAGNITUDE = 100.0
"""A massive activation after Sun et al. (2024) is larger than this, too."""


def row_measures(
    x: Float[Tensor, "*stack rows channels"],
) -> dict[str, Float[Tensor, "*stack rows"]]:
    """What each row is by all measures that look at rows.

    Args:
        x: activations, shape [rows, channels], or several such.

    Returns:
        A dict of tensors with one number per row. ``largest`` and ``median`` magnitude (the lower
        middle one) and ``ratio`` of both; ``spread``, the standard deviation of ``ln |x|`` (divisor
        D - 1); ``max_over_second`` and ``max_over_q90``, the largest over the second largest and
        over the ceil(0.9 D)-th from below; ``kurtosis``, mean(x^4) / mean(x^2)^2. NaN where a row
        is not finite, where its median is zero, and ``spread`` where any channel is.
    """
    ascending = _sorted_magnitudes(x)
    return _of_rows(ascending, ascending.log10())


def _sorted_magnitudes(x: Tensor) -> Tensor:
    """Magnitudes in each row from the least to the largest, NaN last; half precision as single."""
    magnitude = (x.float() if x.element_size() < 4 else x).detach().abs()
    if magnitude.device.type != "cpu":
        return magnitude.sort(dim=-1).values
    magnitude.numpy().sort(axis=-1)  # in rows this short many times faster than torch
    return magnitude


def _of_rows(ascending: Tensor, log10: Tensor) -> dict[str, Tensor]:
    """``row_measures`` of magnitudes in order, and their logarithms."""
    width = ascending.size(-1)
    if width < 2:
        raise ValueError(
            f"expected rows of at least 2 channels, got {width}: a single channel is its own "
            "median and has no spread; name a layer with more"
        )
    median, q90, second, largest = (
        ascending[..., i].contiguous()
        for i in ((width - 1) // 2, math.ceil(0.9 * width) - 1, -2, -1)
    )
    squares = (ascending / largest.unsqueeze(-1)).square_()
    deviation = torch.linalg.vector_norm(log10 - log10.mean(dim=-1, keepdim=True), dim=-1)
    spread = deviation * (math.log(10) / math.sqrt(width - 1))
    of_rows = {
        "largest": largest,
        "median": median,
        "ratio": largest.double() / median,  # beyond what single precision may hold
        "spread": spread.where(ascending[..., 0] > 0, torch.nan),
        "max_over_second": largest / second,
        "max_over_q90": largest / q90,
        "kurtosis": torch.linalg.vecdot(squares, squares) * width / squares.sum(dim=-1).square(),
    }
    usable = largest.isfinite() & (median > 0)
    return {name: value.where(usable, torch.nan) for name, value in of_rows.items()}


def layer_ratio(
    x: Float[Tensor, "rows channels"], graph: Int[Tensor, " rows"] | None = None
) -> Float[Tensor, "rows channels"]:
    """Magnitude of each activation over the median magnitude of its layer.

    Args:
        x: activations, shape [rows, channels].
        graph: which graph each row is of, shape [rows]; the median is then that of all rows of
            the graph. None takes that of all rows, of a batch or of a data set.

    Returns:
        Ratios, shape [rows, channels], exact; NaN in rows that are not finite, which count in no
        median, and where a median is zero.

    Source: massive-activations paper, option ``batch_median`` of its code.
    """
    magnitude, median = _with_graph_median(x, graph)
    return magnitude / median.where(median > 0, torch.nan)


def is_massive_by_sun(
    x: Float[Tensor, "rows channels"], graph: Int[Tensor, " rows"] | None = None
) -> Bool[Tensor, "rows channels"]:
    """Which activations are above 100 and above 1000 times the median of their graph.

    Arguments as for ``layer_ratio``.

    Source: Sun et al. 2024, of the tensor of one sequence. differs: of one graph.
    """
    magnitude, median = _with_graph_median(x, graph)
    return (magnitude > SUN_MAGNITUDE) & (magnitude > MASSIVE_RATIO * median)


def _with_graph_median(
    x: Float[Tensor, "rows channels"], graph: Int[Tensor, " rows"] | None
) -> tuple[Float[Tensor, "rows channels"], Float[Tensor, "rows 1"]]:
    """Magnitudes, and the median of its graph beside each row; NaN for rows that are not finite."""
    ascending = _sorted_magnitudes(x)
    graph = torch.zeros_like(x[:, 0], dtype=torch.long) if graph is None else graph
    graphs = int(graph.max()) + 1 if len(x) else 0
    place = graph.where(ascending[:, -1].isfinite(), graphs).unsqueeze(0)
    medians = _graph_medians(ascending.unsqueeze(0), place, graphs)
    medians[:, -1] = torch.nan
    return x.abs().to(ascending.dtype), medians.gather(1, place).T


@torch.no_grad()
def _graph_medians(
    ascending: Float[Tensor, "stack rows channels"], graph: Int[Tensor, "stack rows"], graphs: int
) -> Float[Tensor, "stack graphs_and_rest"]:
    """The lower median of the magnitudes of each graph; last that of rows of none, or anything."""
    if graph.device.type != "cpu":
        return _bisected_medians(ascending, graph, graphs)
    medians = ascending.new_full((len(graph), graphs + 1), torch.nan)
    for found, rows, index in zip(medians, ascending, graph, strict=True):
        order = (index < graphs).nonzero().flatten()
        order = order[index[order].argsort()]
        which, sizes = index[order].unique_consecutive(return_counts=True)
        parts = rows.index_select(0, order).split(sizes.tolist())
        for i, part in zip(which.tolist(), parts, strict=True):
            middle = (part.numel() - 1) // 2
            found[i] = float(np.partition(part.numpy().ravel(), middle)[middle])
    return medians


def _bisected_medians(
    ascending: Float[Tensor, "stack rows channels"], graph: Int[Tensor, "stack rows"], graphs: int
) -> Float[Tensor, "stack graphs_and_rest"]:
    """``_graph_medians`` without waiting for the device, and as exact.

    By bisection on the bits of the magnitudes, which are ordered as these are: each step counts
    the entries below a value in sorted rows.
    """
    integer = torch.int32 if ascending.dtype == torch.float else torch.int64
    zeros = torch.zeros(len(graph), graphs + 1, dtype=torch.long, device=graph.device)
    rows = zeros.scatter_add(1, graph, torch.ones_like(graph))
    needed = (rows * ascending.size(-1) - 1) // 2 + 1
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


UNITS = ("graph", "batch", "data")
"""What the median of the layer ratio may be taken over."""

_LOW, _HIGH, _BINS = DECADES  # float32 holds no magnitude outside
BIN = (_HIGH - _LOW) / _BINS
"""Width of the bins of all histograms, in decades."""

_COUNTS = (
    *("rows", "zero_medians", "nonfinite_rows", "rows_with_zero", "rows_with_massive"),
    *("layer_massive", "sun_edges", "sun_molecules", "molecules", "saturated"),
)
_MAXIMA = ("max_abs", "max_ratio", "max_layer_ratio")
_OF_ROWS = ("largest", "median", "ratio", "max_over_second", "max_over_q90", "kurtosis")
_BINNED = ("magnitude", "finite", *_OF_ROWS)

COLUMNS = (
    *("rows", "zero_medians", "nonfinite_rows", "rows_with_zero"),
    *("max_ratio", *QUANTILES, "rows_with_massive", "share_rows_with_massive"),
    *("max_abs", "row_max_abs_q50", "row_median_q50"),
    *("layer_median", "max_layer_ratio", "share_rows_with_layer_massive"),
    *("molecules", "sun_molecules", "sun_edges", "spread_mean", "spread_sd"),
    *("max_over_second_q50", "max_over_q90_q50", "kurtosis_q50", "share_saturated"),
)
"""What ``AllMeasures.table`` gives.

Rows that are not finite or have a zero median are counted and left out of the rest. Rows with a
zero median do count where no row median is asked for: in ``max_abs``, ``layer_median``,
``max_layer_ratio``, Sun's rule and ``share_saturated``. Rows with a zero have no ln and no spread.
``molecules`` are graphs with a finite row, ``sun_molecules`` and ``sun_edges`` the graphs and rows
that have an activation that is massive by Sun's rule.
"""


class AllMeasures:
    """Every measure of a layer's rows in one pass, for a stack of networks at once.

    Memory does not depend on the data. Nothing waits for the device and shapes are fixed, so that
    updates can be captured in a CUDA graph. Maxima, counts, means, and medians of a graph or a
    batch are exact. Quantiles over rows and the median of a data set come from histograms of bins
    of ``BIN`` decades: they are exact to half a bin, 0.6 %, and so is a layer ratio over "data".

    Args:
        networks: how many are stacked.
        heads, threshold: as for ``ActivationSummary``; the layer ratio's threshold, too.
        over: what the median of the layer ratio is taken over, one of ``UNITS``.
        device: where rows come from.
    """

    def __init__(
        self,
        networks: int = 1,
        *,
        heads: int | None = None,
        threshold: float = MASSIVE_RATIO,
        over: str = "data",
        device: str | torch.device = "cpu",
    ) -> None:
        self.heads, self.threshold, self.over = heads, threshold, over

        def zeros(names: Iterable[str], *size: int, dtype: torch.dtype) -> dict[str, Tensor]:
            shape, about = (networks, *size), dict(dtype=dtype, device=device)
            return {name: torch.zeros(shape, **about) for name in names}

        self._counts = zeros(_COUNTS, dtype=torch.long)
        self._sums = zeros((*_MAXIMA, "spread", "spread_square"), dtype=torch.double)
        # One bin below the range, one above, and one for what is not counted.
        size = (len(_BINNED), networks, _BINS + 3)
        self._counted = torch.zeros(size, dtype=torch.int32, device=device)

    def reset(self) -> None:
        """Forget everything."""
        for tensor in (*self._counts.values(), *self._sums.values(), self._counted):
            tensor.zero_()

    @torch.no_grad()
    def update(
        self,
        x: Float[Tensor, "stack rows channels"],
        graph: Int[Tensor, "stack rows"],
        graphs: int,
        mask: Bool[Tensor, "stack rows"] | None = None,
    ) -> None:
        """Add a batch of so many graphs; ``mask`` has the rows that are no padding, None all."""
        if x.size(1) == 0:
            return
        ascending = _sorted_magnitudes(x)
        log10 = ascending.log10()
        of_rows = _of_rows(ascending, log10)
        least, median, largest = (
            ascending[..., i].contiguous() for i in (0, (x.size(-1) - 1) // 2, -1)
        )
        mask = torch.ones_like(graph, dtype=torch.bool) if mask is None else mask
        finite = mask & largest.isfinite()
        usable = finite & (median > 0)
        with_log = usable & (least > 0)
        _bin(self._counted[0], log10, finite.unsqueeze(-1))
        # The largest of a row without a median, too.
        rows = [largest, *(of_rows[name] for name in _OF_ROWS)]
        valid = torch.stack([finite] + [usable] * len(_OF_ROWS))
        _bin(self._counted[1:], torch.stack([row.double() for row in rows]).log10_(), valid)
        spread = of_rows["spread"].where(with_log, 0).double()
        self._sums["spread"] += spread.sum(dim=1)
        self._sums["spread_square"] += spread.square().sum(dim=1)

        graph = graph.where(finite, graphs)
        is_large, asked = finite & (largest > SUN_MAGNITUDE), graph
        if self.over != "graph":  # Sun's rule only asks for the medians of graphs where it can hold
            has_large = _any_of(graph, is_large, graphs + 1).gather(1, graph)
            asked = graph.where(has_large, graphs)
        of_graph = _graph_medians(ascending, asked, graphs).gather(1, asked)
        sun = is_large & (largest > MASSIVE_RATIO * of_graph)
        unit = of_graph
        if self.over == "batch":
            whole = (~finite).long()
            unit = _graph_medians(ascending, whole, 1).gather(1, whole)
        layer_ratio, has_unit = largest.double() / unit, finite & (unit > 0)
        for name, values, which in (
            ("max_abs", largest, finite),
            ("max_ratio", of_rows["ratio"], usable),
            ("max_layer_ratio", layer_ratio, has_unit),
        ):
            largest_of = values.where(which, 0).double().amax(dim=1)
            self._sums[name].copy_(torch.maximum(self._sums[name], largest_of))
        counted = {
            "rows": mask,
            "nonfinite_rows": mask & ~finite,
            "zero_medians": finite & ~usable,
            "rows_with_zero": usable & ~with_log,
            "rows_with_massive": usable & (of_rows["ratio"] > self.threshold),
            "layer_massive": has_unit & (layer_ratio > self.threshold),
            "sun_edges": sun,
            "sun_molecules": _any_of(graph, sun, graphs),
            "molecules": _any_of(graph, finite, graphs),
        }
        if self.heads is not None:
            sums = x.unflatten(-1, (self.heads, -1)).sum(dim=-1)
            counted["saturated"] = (sums.abs() > SCORE_CLAMP) & finite.unsqueeze(-1)
        for name, which in counted.items():
            self._counts[name] += which.flatten(1).sum(dim=1)

    @property
    def _bins(self) -> dict[str, Tensor]:
        return dict(zip(_BINNED, self._counted, strict=True))

    def table(self) -> Float[Tensor, "stack columns"]:
        """``COLUMNS`` of each network, on the CPU."""
        columns = self.statistics()
        return torch.stack([columns[name] for name in COLUMNS], dim=-1).cpu()

    def statistics(self) -> dict[str, Float[Tensor, " stack"]]:
        """``COLUMNS``, and ``spread_rms``, the root of the mean variance of ``ln |x|`` in rows."""
        count = {name: counts.double() for name, counts in self._counts.items()}
        finite = count["rows"] - count["nonfinite_rows"]
        usable = finite - count["zero_medians"]
        with_log = usable - count["rows_with_zero"]
        middle = {name: self._quantile(name, 0.5) for name in self._bins}
        largest, ratio, by_layer, spread, square = self._sums.values()
        layer_massive = count["layer_massive"] / finite
        if self.over == "data":
            by_layer = largest / middle["magnitude"]
            layer_massive = self._share_above(self.threshold * middle["magnitude"])
            layer_massive = layer_massive.where(middle["magnitude"] > 0, 0)
        mean = spread / with_log
        variance = (square - with_log * mean.square()).clamp(min=0) / (with_log - 1)
        return {
            **count,
            "max_ratio": ratio.where(usable > 0, torch.nan),
            **{name: self._quantile("ratio", q) for name, q in QUANTILES.items()},
            "share_rows_with_massive": count["rows_with_massive"] / usable,
            "max_abs": largest,
            "row_max_abs_q50": middle["largest"],
            "row_median_q50": middle["median"],
            "layer_median": middle["magnitude"],
            "max_layer_ratio": by_layer.where((by_layer > 0) & by_layer.isfinite(), torch.nan),
            "share_rows_with_layer_massive": layer_massive,
            "spread_mean": mean,
            "spread_rms": (square / with_log).sqrt(),
            "spread_sd": variance.sqrt().where(with_log > 1, torch.nan),
            **{f"{name}_q50": middle[name] for name in _OF_ROWS[3:]},
            "share_saturated": count["saturated"] / (finite * (self.heads or 0)),
        }

    def _quantile(self, name: str, q: float) -> Float[Tensor, " stack"]:
        """The center of the bin of the q-quantile, as ``StreamingHistogram`` takes it."""
        sums = self._bins[name][:, :-1].long().cumsum(dim=-1)
        rank = (q * sums[:, -1:].double()).ceil().clamp(min=1).long()
        index = torch.searchsorted(sums, rank).squeeze(-1)
        center = 10.0 ** (_LOW + (index.double() - 0.5) * BIN)
        center = center.where(index > 0, 0.0).where(index <= _BINS, torch.inf)
        return center.where(sums[:, -1] > 0, torch.nan)

    def _share_above(self, magnitude: Float[Tensor, " stack"]) -> Float[Tensor, " stack"]:
        """The share of finite rows whose largest magnitude lies in a bin above a magnitude."""
        sums = self._bins["finite"][:, :-1].long().cumsum(dim=-1)
        index = ((magnitude.log10() - _LOW) / BIN).floor().clamp(-1, _BINS).nan_to_num(-1) + 1
        below = sums.gather(-1, index.long().unsqueeze(-1)).squeeze(-1)
        return 1 - below / sums[:, -1]


def _bin(bins: Tensor, log10: Tensor, valid: Tensor) -> None:
    """Count values [*bins.shape[:-1], ...] by log10 of them, which is overwritten.

    Those that are not valid go to the last bin.
    """
    last = _BINS + 2
    least = torch.where(valid, 0, last).to(log10.dtype)  # with a mask it would take much longer
    place = log10.sub_(_LOW).div_(BIN).floor_().add_(1).clamp_(max=last - 1).clamp_(min=least)
    index = place.nan_to_num_(last).view(*bins.shape[:-1], -1).int()
    bins.scatter_add_(-1, index.long(), torch.ones_like(index))


def _any_of(graph: Tensor, which: Tensor, graphs: int) -> Bool[Tensor, "stack graphs"]:
    """The graphs that have one of these rows."""
    zeros = torch.zeros(len(graph), graphs + 1, dtype=torch.long, device=graph.device)
    return zeros.scatter_add(1, graph, which.long())[:, :graphs] > 0
