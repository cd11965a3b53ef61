"""One table and one verdict per layer, for any torch model::

    print(report(model, loader))
    print(report(model, loader, names="convs.*:message", null=untrained_models))
    report(model, loader, measure="all").plot()

What is looked at is named as for ``mapkg.hooks``; ``mapkg.measures`` says which measure to use.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from tqdm import tqdm

from mapkg import hooks
from mapkg.all_measures import COLUMNS, UNITS, AllMeasures
from mapkg.measures import MASSIVE_RATIO, MEASURES, ActivationSummary
from mapkg.nulls import MAX_CHANNELS, ProductNull, Values, p_value
from mapkg.rows import Rows, as_rows, default_names, graphs_of_rows, off_floor, row_codes

MAX_DISTINCT = 100_000
"""How many different rows are counted; where there are more, all are taken as different."""

_COLUMNS = (
    *("layer", "measure", "axes", "rows", "channels", "distinct_rows"),
    *("zero_medians", "nonfinite_rows", "floored_rows", "max_abs", "max_ratio"),
    *("rows_with_massive", "massive_channels", "top_channels", "value"),
    *("share_rows_with_massive", "chance_level", "p_value", "massive", "verdict"),
)


@dataclass(frozen=True)
class Report:
    """What ``report`` found.

    Attributes:
        table: a row per layer, in the model's order, and measure. ``axes``, how the output was
            read; ``distinct_rows``, to ten bits of precision, which chance is reckoned by;
            ``zero_medians`` and ``nonfinite_rows``, which have no ratio; ``floored_rows``, whose
            median a ReLU or an epsilon has made tiny and which the row ratio compares with the
            median above it (other measures take rows as they are). By the row ratio: ``max_ratio``,
            ``rows_with_massive``, ``massive_channels`` (how many) and ``top_channels``, five pairs
            (channel, rows in which it is massive); ``max_abs`` of rows with a ratio. By the
            ``measure``: ``value`` (the largest row or layer ratio; the share of rows that Sun's
            rule names; the root of the mean variance of ``ln |x|`` in rows; the median over rows of
            largest over second largest); ``share_rows_with_massive``, NaN without a threshold;
            ``chance_level``, what the null exceeds in one case of twenty, NaN with fewer than 19
            models; ``p_value``, how likely it exceeds the value.
        model, threshold, null: the model's class, and what values are compared with.
    """

    table: pd.DataFrame
    model: str
    threshold: float
    null: str

    @property
    def measures(self) -> pd.DataFrame:
        """The value of each measure, a row per layer."""
        wide = self.table.pivot(index="layer", columns="measure", values="value")
        return wide.loc[self.table["layer"].unique(), self.table["measure"].unique()]

    def __str__(self) -> str:
        width = max(map(len, self.table["layer"]))
        lines = self.table["layer"].str.ljust(width + 2) + self.table["verdict"]
        return "\n".join([self._title(), *lines])

    def _repr_html_(self) -> str:
        values = self.table["value"]
        decades = math.log10(max(self.threshold, values.max(), 10))
        widths = 120 * np.log10(values.clip(lower=1).fillna(1)) / decades
        bar = '<div style="background:{};height:.7em;width:{:.0f}px"></div>'.format
        columns = {
            "layer": self.table["layer"].map(html.escape),
            "log value": list(map(bar, self._colors(), widths)),
            "value": values,
            "chance level": self.table["chance_level"],
            "verdict": self.table["verdict"].map(html.escape),
        }
        style = dict(index=False, escape=False, na_rep="", float_format="{:,.3g}".format)
        with pd.option_context("display.max_colwidth", None):
            table = pd.DataFrame(columns).to_html(**style)
        return f"<p>{html.escape(self._title())}</p>\n{table}"

    def _colors(self) -> list[str]:
        return self.table["massive"].map({True: "#c44e52", False: "#8c9db5"}).tolist()

    def _title(self) -> str:
        names = ", ".join(MEASURES[measure] for measure in self.table["measure"].unique())
        return f"{self.model}: {names}, threshold {self.threshold:,g}; null: {self.null}"

    def plot(self, ax: Any = None) -> Any:
        """Draw each layer's value on a log axis, its chance level and the threshold.

        Needs matplotlib. Returns the axes given, or new ones.
        """
        table, measures = self.table, self.table["measure"].unique()
        if len(measures) > 1:
            table = table.assign(layer=table["layer"] + ", " + table["measure"])
        shape = {"figsize": (7, 1.5 + 0.35 * len(table))} if ax is None else {"ax": ax}
        ax = table.plot.barh(x="layer", y="value", color=self._colors(), log=True, **shape)
        look = dict(ms=14, color="black", label="chance level")
        ax.plot(table["chance_level"], range(len(table)), "|", **look)
        if {"row", "layer"} & {*measures}:
            ax.axvline(self.threshold, color="black", ls="--", lw=1, label="threshold")
            ax.set(xlim=(1, None))
        ax.set(xlabel=", ".join(MEASURES[measure] for measure in measures), ylabel="")
        ax.set(ylim=(len(table) - 0.5, -0.5))
        ax.set_title(self.model, loc="left")
        marks = (each[:2] for each in ax.get_legend_handles_labels())
        ax.legend(*marks, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
        return ax


def report(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    measure: str = "row",
    over: str = "data",
    names: str | Sequence[str] | None = None,
    null: Iterable[nn.Module] | Mapping[str, Values] | None = None,
    threshold: float = MASSIVE_RATIO,
    forward: hooks.Forward | None = None,
    rows: Rows | None = None,
    progress: bool = False,
) -> Report:
    """Which layers of a model have massive activations, by which measure, how unlikely.

    The model is run in evaluation mode over all batches; nothing is kept of them but counts.

    Args:
        model, loader, forward: as for ``hooks.scan``.
        measure: what "massive" means, one of ``mapkg.measures.MEASURES``, or ``"all"`` for all side
            by side in one pass.
        over: the median of the layer ratio is that of each ``"graph"`` or ``"batch"``, exact, or of
            the ``"data"``, to 0.6 %. Graphs, also of Sun's rule, are those of a PyG batch; where
            it does not say which graph a row is of, the batch is one.
        names: as for ``hooks.record``, of outputs of shape [rows, channels], or [rows, heads,
            channels] where the layer or the batch says so; None those of ``rows.default_names``.
        null: what values are compared with. None means as many distinct rows, as wide, of products
            of three normals (``ProductNull.chance``), of which no scale follows and so no null of
            Sun's rule, nor one of layer ratios over graphs or batches. Models, for example
            untrained ones of other seeds, are run over the same batches, one after another, as an
            iterator makes them; the p-value is then by rank (``p_value``). A mapping holds, for
            each layer, values that were found before.
        threshold: the row or layer ratio above which an activation is massive. Spread and
            isolation have none: massive is what is above the ``chance_level``.
        rows: makes rows of channels of outputs that have another shape, as in ``lambda module,
            output, batch: standard.recorded_rows(module, output, batch.batch)`` for the layers of
            ``mapkg.models.pyg_layers``.
        progress: whether to show a bar over batches.

    Raises:
        KeyError, TypeError: as ``hooks.scan`` and ``rows.as_rows``.
        ValueError: likewise; without batches; if an option is out of its range, or several models
            need a loader that can be used only once.
    """
    if names is None and isinstance(model, nn.Module):
        names = default_names(model)
    names = names if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    if not threshold > 0:
        raise ValueError(f"threshold: expected a positive ratio, got {threshold!r}")
    for option, given, known in (("measure", measure, (*MEASURES, "all")), ("over", over, UNITS)):
        if given not in known:
            raise ValueError(f"{option}: expected one of {', '.join(known)}, got {given!r}")
    measures = [*MEASURES] if measure == "all" else [measure]
    if null is not None and not isinstance(null, Mapping) and iter(loader) is loader:
        once = f"a one-time {type(loader).__name__}: pass list(loader)"
        raise ValueError(f"expected a loader to run through for each model of the null, got {once}")
    settings = dict(measures=measures, threshold=threshold, over=over)
    settings |= dict(names=names, forward=forward, rows=rows, progress=progress)
    layers, source, draws = _layers(model, loader, **settings), "product of normals", None
    if isinstance(null, Mapping):
        if len(measures) > 1:
            raise ValueError("null: expected models for several measures, got values; ask for one")
        source, draws = "values given", {(name, measure): null[name] for name in null}
    elif null is not None:
        drawn = [
            {layer.name: layer.statistics() for layer in _layers(other, loader, **settings)}
            for other in null
        ]
        if not drawn:
            raise ValueError("expected at least one model as null, got none")
        source = f"{len(drawn)} null model{'s' if len(drawn) > 1 else ''}"
        draws = {(n, m): [one[n][m] for one in drawn] for n in drawn[0] for m in measures}
    for name in (layer.name for layer in layers if draws is not None):
        if (name, measures[0]) not in draws:
            there = ", ".join(name for name, _ in draws)
            raise KeyError(f"the null has no values for {name!r}; it has {there}")
    table = [
        layer.row(each, source, draws and draws[layer.name, each])
        for layer in layers
        for each in measures
    ]
    return Report(pd.DataFrame(table), type(model).__name__, threshold, source)


def _layers(model, loader, *, names, forward, progress, **settings: Any) -> list["_Layer"]:
    """What was looked at, in the model's order."""
    found = hooks.resolve(model, names).items()
    layers = {name: _Layer(name, module, **settings) for name, module in found}
    if not layers:
        raise ValueError("names: expected at least one name or pattern, got none")
    reduce = lambda name, *seen: layers[name].update(*seen)  # noqa: E731
    passes = hooks.scan(model, loader, [*layers], forward=forward, reduce=reduce)
    total = len(loader) if hasattr(loader, "__len__") else None
    num_batches = sum(1 for _ in tqdm(passes, total=total, disable=not progress))
    if num_batches == 0:
        raise ValueError("expected batches, got an empty loader (or one that was used up)")
    for layer in layers.values():
        layer.runs /= num_batches
    return list(layers.values())


class _Layer:
    """What streams of one layer."""

    def __init__(self, name, module, *, measures, threshold, over, rows) -> None:
        self.name, self.module, self.measures, self.rows = name, module, measures, rows
        self.summary = ActivationSummary(threshold=threshold)
        self.axes: dict[str, None] = {}  # in the order in which they came
        self.distinct: set[int] = set()
        self.over, self.others, self.runs, self.floored = over, None, 0, 0

    def update(self, output: Any, batch: Any) -> None:
        """Read an output as rows and add them."""
        x, axes = as_rows(self.name, self.module, output, batch, self.rows)
        self.axes[axes] = None
        lifted, floored = off_floor(x)
        try:
            self.summary.update(lifted)
        except ValueError as error:  # another width than before
            raise ValueError(f"{self.name!r}: {error}; name a module of one width") from error
        self.runs += 1
        self.floored += floored
        if len(self.distinct) <= MAX_DISTINCT:
            self.distinct.update(row_codes(x[x.isfinite().all(dim=1)]))
        if self.measures != ["row"] and x.size(1) > 1:
            if self.others is None:
                settings = dict(threshold=self.summary.threshold, over=self.over, device=x.device)
                self.others = AllMeasures(**settings)
            graph, graphs = graphs_of_rows(self.name, batch, x)
            self.others.update(x.unsqueeze(0), graph.unsqueeze(0), graphs)

    def statistics(self) -> dict[str, Any]:
        """All that was found, and by the name of each measure its value, NaN without one."""
        found = dict.fromkeys((*COLUMNS, "spread_rms"), math.nan)
        if self.others is not None:
            found |= {name: value.item() for name, value in self.others.statistics().items()}
        found |= {"max_abs_of_all": found["max_abs"], **self.summary.statistics()}
        finite_rows = found["rows"] - found["nonfinite_rows"]
        found["share_sun"] = found["sun_edges"] / (finite_rows or math.nan)
        sources = ("max_ratio", "max_layer_ratio", "share_sun", "spread_rms", "max_over_second_q50")
        finite = (found[name] if math.isfinite(found[name]) else math.nan for name in sources)
        return found | dict(zip(MEASURES, finite, strict=True))

    def row(self, measure: str, source: str, draws: list[float] | None) -> dict[str, Any]:
        """The layer in the table."""
        found = self.statistics()
        usable = found["rows"] - found["zero_medians"] - found["nonfinite_rows"]
        counts = enumerate(self.summary.massive_by_channel.tolist())
        massive = sorted(((c, n) for c, n in counts if n), key=lambda pair: -pair[1])
        value, distinct, p, chance = found[measure], usable, math.nan, math.nan
        if len(self.distinct) <= MAX_DISTINCT:
            distinct = min(usable, len(self.distinct))
        # Products of normals have no scale, and say nothing of the largest over many medians.
        has_null = measure != "sun" and (measure != "layer" or self.over == "data")
        if measure == "spread" and value == value:
            distinct = min(distinct, int(usable - found["rows_with_zero"]))
        if draws is not None:
            p, chance = float(p_value(value, draws)), _level(draws)
        elif has_null and value == value and 2 <= found["channels"] <= MAX_CHANNELS:
            chance, p = ProductNull(found["channels"]).chance(measure, value, distinct)
            if distinct < usable:
                source += f", {_rows(distinct, 'distinct ')}"
        shares = {"row": "share_rows_with_massive", "layer": "share_rows_with_layer_massive"}
        share = found.get((shares | {"sun": "share_sun"}).get(measure), math.nan)
        found |= dict(layer=self.name, measure=measure, axes=" or ".join(self.axes))
        found |= dict(distinct_rows=distinct, floored_rows=self.floored, value=value)
        found |= dict(massive_channels=len(massive), top_channels=tuple(massive[:5]))
        found |= dict(share_rows_with_massive=share, chance_level=chance, p_value=p)
        found["verdict"] = self._verdict(found, source)
        found["massive"] = found["verdict"].startswith("massive")
        return {column: found[column] for column in _COLUMNS}

    def _verdict(self, found: Mapping[str, Any], source: str) -> str:
        keys = ("measure", "value", "share_rows_with_massive", "chance_level", "p_value")
        measure, value, share, level, p = (found[key] for key in keys)
        reasons = {"nonfinite_rows": "with NaN or infinity"}
        if measure not in ("layer", "sun"):
            reasons = {"zero_medians": "with a zero median"} | reasons
        if measure == "spread":
            reasons["rows_with_zero"] = "with a zero"
        some = [(found[column], reason) for column, reason in reasons.items() if found[column] > 0]
        left_out = ", ".join(f"{_rows(number)} {reason}" for number, reason in some)
        if not found["rows"]:
            return "undefined: no rows came; the module did not run, or on graphs without edges"
        if found["channels"] == 1:
            return "undefined: a single channel is its own median"
        if math.isnan(value):
            what = {"spread": "spread", "sun": "finite value"}
            what |= {"layer": "ratio to a median that is not zero"}
            why = f" ({left_out})" if left_out else ""
            return f"undefined: no row has a {what.get(measure, 'ratio')}{why}"
        large = f"{value:{',.0f' if value >= 1000 else ',.3g'}}"
        words = {
            "row": f"up to {large} x the median",
            "layer": f"up to {large} x the median of the {self.over}",
            "sun": f"|x| up to {found['max_abs_of_all']:,.3g}",
            "spread": f"{value:.3g}",
            "isolation": f"largest / second {value:.3g}",
        }[measure]
        is_massive = share > 0
        if measure in ("spread", "isolation"):
            is_massive = value > level
            words += ", no chance level" if math.isnan(level) else f", chance up to {level:.3g}"
        if is_massive and measure == "row":
            words = f"{found['massive_channels']:,} of {found['channels']:,} channels, {words}"
        if is_massive and measure == "sun":
            words += f", in {found['sun_molecules']:,.0f} of {found['molecules']:,.0f} graphs"
        if share > 0:
            words += f", in {_percent(share)} of rows"
        words = f"{'massive' if is_massive else 'none'} by {MEASURES[measure]}: {words}"
        if not math.isnan(p):
            words += f"; {'p < 0.000001' if p < 1e-6 else f'p = {p:.2g}'} ({source})"
        if self.floored and measure == "row":
            words += f"; {_rows(self.floored)} on a floor (a ReLU, an epsilon), compared with the "
            words += "median above it"
        if self.runs > 1:
            words += f"; runs {self.runs:.3g} times a batch"
        return words + (f"; left out: {left_out}" if left_out else "")


def _level(draws: Sequence[float]) -> float:
    """What a value must exceed for a p-value by rank of 0.05; NaN with fewer than 19 draws."""
    among = np.sort(draws)[: (~np.isnan(draws)).sum()]
    count = (len(among) + 1) // 20
    return float(among[-count]) if count else math.nan


def _rows(number: float | int, kind: str = "") -> str:
    return f"{number:,.0f} {kind}row{'' if number == 1 else 's'}"


def _percent(share: float) -> str:
    if share >= 0.995:
        return "100 %" if share == 1 else "over 99 %"
    return f"{100 * share:.2g} %" if share >= 1e-4 else "under 0.01 %"
