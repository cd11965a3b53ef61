"""One table and one verdict per layer, for any torch model::

    print(report(model, loader))
    print(report(model, loader, names="convs.*:message", null=untrained_models))
    report(model, loader, measure="all").plot()

What is looked at is named as for ``mapkg.hooks``; ``mapkg.measures`` says which measure to use.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Report:
    """What ``report`` found.

    Attributes:
        table: a row per layer, in the model's order, and measure. ``layer``, its name; ``axes``,
            how its output was read; ``rows`` and ``channels`` of the activations;
            ``distinct_rows``, to ten bits of precision, which chance is reckoned by;
            ``zero_medians`` and ``nonfinite_rows``, rows with no ratio; ``floored_rows``, whose
            median a ReLU or an epsilon has made tiny and which are compared with the median above
            it. By the row ratio: ``max_ratio``, the largest, ``rows_with_massive``,
            ``massive_channels``, how many channels have a massive activation, and
            ``top_channels``, pairs (channel, rows in which it is massive). ``max_abs``, the largest
            magnitude of rows with a ratio. By the ``measure``: ``value`` (the largest row or layer
            ratio; the share of rows that Sun's rule names; the root of the mean variance of
            ``ln |x|`` in rows; the median over rows of largest over second largest);
            ``share_rows_with_massive``, NaN without a threshold; ``chance_level``, what the null
            exceeds in one case of twenty; ``p_value``, how likely it exceeds the value;
            ``massive``, and ``verdict``, in words.
        model: the name of the model's class.
        threshold: the ratio above which an activation is massive.
        null: what the p-values are relative to.
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
        lines = (
            f"{layer:<{width}}  {verdict}"
            for layer, verdict in zip(self.table["layer"], self.table["verdict"], strict=True)
        )
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

        Args:
            ax: axes of matplotlib to draw on; None makes new ones.

        Returns:
            The axes. An ImportError says so if matplotlib is not installed.
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
    top: int = 5,
    progress: bool = False,
) -> Report:
    """Which layers of a model have massive activations, by which measure, how unlikely.

    The model is run in evaluation mode over all batches; nothing is kept of them but counts.

    Args:
        model: any module.
        loader: batches, for example of a PyG ``DataLoader``; moved to the model's device.
        measure: what "massive" means, one of ``mapkg.measures.MEASURES``, or ``"all"`` for all side
            by side in one pass.
        over: the median of the layer ratio is that of each ``"graph"`` or ``"batch"``, exact, or of
            the ``"data"``, to 0.6 %. Graphs, also of Sun's rule, are those of a PyG batch; where
            it does not say which graph a row is of, the batch is one.
        names: submodules or stages of them whose output is looked at, names or patterns as for
            ``hooks.record``: outputs of shape [rows, channels], or [rows, heads, channels] where
            the layer or the batch says so. None means identity modules called ``score``, as in
            this package's networks, or, where there are none, the messages of all PyG
            ``MessagePassing`` modules.
        null: what values are compared with. None means as many distinct rows, as wide, of
            products of three normals (``ProductNull.chance``), of which no scale follows and so
            no null of Sun's rule. Models, for example untrained ones of other seeds, are run over
            the same batches, one after another, so that an iterator that makes them is welcome;
            the p-value is then by rank (``p_value``). A mapping holds, for each layer, values of
            one measure that were found before.
        threshold: the row or layer ratio above which an activation is massive. Spread and
            isolation have none: massive is what is above the ``chance_level``.
        forward: runs the model on a batch, as for ``hooks.scan``; what it returns is not used.
        rows: makes rows of channels of outputs that have another shape, of the module that was
            named, its output and the batch, as in ``lambda module, output, batch:
            standard.recorded_rows(module, output, batch.batch)`` for the layers of
            ``mapkg.models.pyg_layers``.
        top: how many of the most frequent channels are listed.
        progress: whether to show a bar over batches.

    Raises:
        KeyError: if a name matches nothing, or the null lacks a layer.
        ValueError: if a measure is not known; if it is not known which axes of an output are rows;
            without batches; if several models need a loader that can be run through only once.
        TypeError: if an output is not a tensor of real numbers, or it is not clear how to call
            the model.
    """
    if names is None and isinstance(model, nn.Module):
        names = default_names(model)
    if not threshold > 0:
        raise ValueError(f"threshold: expected a positive ratio, got {threshold!r}")
    if measure not in (known := (*MEASURES, "all")):
        raise ValueError(f"measure: expected one of {', '.join(known)}, got {measure!r}")
    if over not in UNITS:
        raise ValueError(f"over: expected one of {', '.join(UNITS)}, got {over!r}")
    measures = [*MEASURES] if measure == "all" else [measure]
    if isinstance(null, Mapping) and len(measures) > 1:
        raise ValueError("null: expected models for several measures, got values; ask for one")
    settings = dict(measures=measures, threshold=threshold, over=over)
    settings |= dict(names=names, forward=forward, rows=rows, progress=progress)
    if null is not None and not isinstance(null, Mapping) and iter(loader) is loader:
        raise ValueError(
            "expected a loader that can be run through for each model of the null, got a one-time "
            f"{type(loader).__name__}: pass list(loader)"
        )
    layers, source, draws = _layers(model, loader, **settings), "product of normals", None
    if isinstance(null, Mapping):
        source, draws = "values given", {(name, measure): null[name] for name in null}
    elif null is not None:
        drawn = []
        for other in null:
            found = {each.name: each.statistics() for each in _layers(other, loader, **settings)}
            drawn.append({(name, m): found[name][m] for name in found for m in measures})
        if not drawn:
            raise ValueError("expected at least one model as null, got none")
        source = f"{len(drawn)} null model{'s' if len(drawn) > 1 else ''}"
        draws = {key: [each[key] for each in drawn] for key in drawn[0]}
    for name in (layer.name for layer in layers if draws is not None):
        if (name, measures[0]) not in draws:
            there = ", ".join(name for name, _ in draws)
            raise KeyError(f"the null has no values for {name!r}; it has {there}")
    table = [
        layer.row(each, source, draws and draws[layer.name, each], top)
        for layer in layers
        for each in measures
    ]
    return Report(pd.DataFrame(table), type(model).__name__, threshold, source)


def _layers(
    model, loader, *, names, forward, progress, threshold: float, **settings: Any
) -> list["_Layer"]:
    """What was looked at, in the model's order."""
    layers = {
        name: _Layer(name, module, ActivationSummary(threshold=threshold), **settings)
        for name, module in hooks.resolve(model, names).items()
    }
    if not layers:
        raise ValueError("names: expected at least one name or pattern, got none")

    about = dict(forward=forward, reduce=lambda name, *seen: layers[name].update(*seen))
    passes = hooks.scan(model, loader, names, **about)
    total = len(loader) if hasattr(loader, "__len__") else None
    name = type(model).__name__
    num_batches = sum(1 for _ in tqdm(passes, name, total, disable=not progress))
    if num_batches == 0:
        raise ValueError("expected batches, got an empty loader (or one that was used up)")
    for layer in layers.values():
        layer.runs /= num_batches
    return list(layers.values())


@dataclass
class _Layer:
    """What streams of one layer."""

    name: str
    module: nn.Module
    summary: ActivationSummary
    measures: list[str]
    over: str
    rows: Rows | None
    axes: list[str] = field(default_factory=list)
    distinct: set[int] = field(default_factory=set)
    others: AllMeasures | None = None
    runs: float = 0.0
    floored: int = 0

    def update(self, output: Any, batch: Any) -> None:
        """Read an output as rows and add them."""
        x, axes = as_rows(self.name, self.module, output, batch, self.rows)
        if axes not in self.axes:
            self.axes.append(axes)
        x, floored = off_floor(x)
        try:
            self.summary.update(x)
        except ValueError as error:  # another width than before
            raise ValueError(f"{self.name!r}: {error}; name a module of one width") from error
        self.runs += 1
        self.floored += floored
        if len(self.distinct) <= MAX_DISTINCT:
            self.distinct.update(row_codes(x[x.isfinite().all(dim=1)]))
        if self.measures != ["row"] and x.size(1) > 1:
            if self.others is None:
                settings = dict(threshold=self.summary.threshold, over=self.over, device=x.device)
                self.others = AllMeasures(x.size(1), **settings)
            graph, graphs = graphs_of_rows(batch, x)
            self.others.update(x.unsqueeze(0), graph.unsqueeze(0), graphs)

    def statistics(self) -> dict[str, Any]:
        """All that was found, and by the name of each measure its value, NaN without one."""
        found = dict.fromkeys((*COLUMNS, "spread_rms"), math.nan)
        if self.others is not None:
            found |= {name: value.item() for name, value in self.others.statistics().items()}
        found |= {"max_abs_of_all": found["max_abs"], **self.summary.statistics()}
        found["share_sun"] = found["sun_edges"] / (found["rows"] or math.nan)
        sources = ("max_ratio", "max_layer_ratio", "share_sun", "spread_rms", "max_over_second_q50")
        finite = (found[name] if math.isfinite(found[name]) else math.nan for name in sources)
        return found | dict(zip(MEASURES, finite, strict=True))

    def row(self, measure: str, source: str, draws: Values | None, top: int) -> dict[str, Any]:
        """The layer in the table."""
        found, by_channel = self.statistics(), self.summary.massive_by_channel
        usable = found["rows"] - found["zero_medians"] - found["nonfinite_rows"]
        counts = [] if by_channel is None else by_channel.tolist()
        massive = sorted(((c, n) for c, n in enumerate(counts) if n), key=lambda pair: -pair[1])
        value, distinct, p, chance = found[measure], usable, math.nan, math.nan
        if len(self.distinct) <= MAX_DISTINCT:
            distinct = min(usable, len(self.distinct))
        if draws is not None:
            p, chance = float(p_value(value, draws)), float(np.nanquantile(draws, 0.95))
        elif measure != "sun" and value == value and 2 <= found["channels"] <= MAX_CHANNELS:
            chance, p = ProductNull(found["channels"]).chance(measure, value, distinct)
        shares = {"row": "share_rows_with_massive", "layer": "share_rows_with_layer_massive"}
        shares["sun"] = "share_sun"
        row = {
            "layer": self.name,
            "measure": measure,
            "axes": " or ".join(self.axes),
            **{key: found[key] for key in ("rows", "channels")},
            "distinct_rows": distinct,
            **{key: found[key] for key in ("zero_medians", "nonfinite_rows")},
            "floored_rows": self.floored,
            **{key: found[key] for key in ("max_abs", "max_ratio", "rows_with_massive")},
            "massive_channels": len(massive),
            "top_channels": tuple(massive[:top]),
            "value": value,
            "share_rows_with_massive": found.get(shares.get(measure), math.nan),
            "chance_level": chance,
            "p_value": p,
        }
        if draws is None and distinct < usable:
            source = f"{source}, {distinct:,} distinct row{'s' if distinct > 1 else ''}"
        verdict = _verdict(row, self, found, source)
        return row | {"massive": verdict.startswith("massive"), "verdict": verdict}


def _verdict(row: Mapping[str, Any], layer: _Layer, found: Mapping[str, Any], source: str) -> str:
    measure, value, share = row["measure"], row["value"], row["share_rows_with_massive"]
    reasons = {"nonfinite_rows": "with NaN or infinity"}
    if measure not in ("layer", "sun"):
        reasons = {"zero_medians": "with a zero median"} | reasons
    if measure == "spread":
        reasons["rows_with_zero"] = "with a zero"
    left_out = [
        f"{found[column]:,.0f} {'row' if found[column] == 1 else 'rows'} {reason}"
        for column, reason in reasons.items()
        if found[column] > 0
    ]
    if not row["rows"]:
        return "undefined: no rows came; the module did not run, or on graphs without edges"
    if row["channels"] == 1:
        return "undefined: a single channel is its own median"
    if math.isnan(value):
        what = {"spread": "spread", "layer": "ratio to a median that is not zero"}
        why = f" ({', '.join(left_out)})" if left_out else ""
        return f"undefined: no row has a {what.get(measure, 'ratio')}{why}"
    large = f"{value:{',.0f' if value >= 1000 else ',.3g'}}"
    words = {
        "row": f"up to {large} x the median",
        "layer": f"up to {large} x the median of the {layer.over}",
        "sun": f"|x| up to {found['max_abs_of_all']:,.3g}",
        "spread": f"{value:.3g}",
        "isolation": f"largest / second {value:.3g}",
    }[measure]
    is_massive, level = share > 0, row["chance_level"]
    if measure in ("spread", "isolation"):
        is_massive = value > level
        words += ", no chance level" if math.isnan(level) else f", chance up to {level:.3g}"
    if is_massive and measure == "row":
        words = f"{row['massive_channels']:,} of {row['channels']:,} channels, {words}"
    if is_massive and measure == "sun":
        words += f", in {found['sun_molecules']:,.0f} of {found['molecules']:,.0f} graphs"
    if share > 0:
        words += f", in {_percent(share)} of rows"
    words = f"{'massive' if is_massive else 'none'} by {MEASURES[measure]}: {words}"
    if not math.isnan(p := row["p_value"]):
        words += f"; {'p < 0.000001' if p < 1e-6 else f'p = {p:.2g}'} ({source})"
    if floored := row["floored_rows"]:
        words += (
            f"; {floored:,} row{'s' if floored > 1 else ''} on a floor (a ReLU, an epsilon), "
            "compared with the median above it"
        )
    if layer.runs > 1:
        words += f"; runs {layer.runs:.3g} times a batch"
    return words + (f"; left out: {', '.join(left_out)}" if left_out else "")


def _percent(share: float) -> str:
    if share >= 0.995:
        return "100 %" if share == 1 else "over 99 %"
    return f"{100 * share:.2g} %" if share >= 1e-4 else "under 0.01 %"
