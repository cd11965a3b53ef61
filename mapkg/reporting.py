"""One table and one verdict per layer, for any torch model::

    print(report(model, loader))
    print(report(model, loader, names="convs.*:message", null=untrained_models))
    report(model, loader).plot()

What is looked at is named as for ``mapkg.hooks``.
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
from mapkg.measures import MASSIVE_RATIO, ActivationSummary
from mapkg.nulls import MAX_CHANNELS, ProductNull, Values, p_value
from mapkg.rows import Rows, as_rows, default_names, off_floor, row_codes

PRODUCT_NULL = "product of normals"
"""What p-values are relative to if no null is given."""

MAX_DISTINCT = 100_000
"""How many different rows are counted; where there are more, all are taken as different."""


@dataclass(frozen=True)
class Report:
    """What ``report`` found.

    Attributes:
        table: a row per layer, in the model's order: ``layer``, its name; ``axes``, how its output
            was read; ``rows`` and ``channels`` of the activations; ``distinct_rows``, to ten bits
            of precision, which chance is reckoned by; ``zero_medians`` and ``nonfinite_rows``,
            rows with no ratio, which no other column looks at; ``floored_rows``, whose median a
            ReLU or an epsilon has made tiny and which are compared with the median above it;
            ``max_ratio``, the largest activation ratio; ``max_abs``, the largest magnitude;
            ``rows_with_massive``, their number, and ``share_rows_with_massive``, of rows that
            have a ratio; ``massive_channels``, how many channels have a massive activation in any
            row; ``top_channels``, pairs (channel, rows in which it is massive), the most frequent
            first; ``chance_level``, what the null exceeds in one case of twenty; ``p_value``, how
            likely it exceeds ``max_ratio``; and ``verdict``, the row in words.
        model: the name of the model's class.
        threshold: the ratio above which an activation is massive.
        null: what the p-values are relative to.
    """

    table: pd.DataFrame
    model: str
    threshold: float
    null: str

    def __str__(self) -> str:
        width = max(map(len, self.table["layer"]))
        lines = (
            f"{layer:<{width}}  {verdict}"
            for layer, verdict in zip(self.table["layer"], self.table["verdict"], strict=True)
        )
        return "\n".join([self._title(), *lines])

    def _repr_html_(self) -> str:
        ratios = self.table["max_ratio"]
        decades = math.log10(max(self.threshold, ratios.max(), 10))
        widths = 120 * np.log10(ratios.clip(lower=1).fillna(1)) / decades
        bar = '<div style="background:{};height:.7em;width:{:.0f}px"></div>'.format
        columns = {
            "layer": self.table["layer"].map(html.escape),
            "log ratio": list(map(bar, self._colors(), widths)),
            "largest ratio": ratios,
            "chance level": self.table["chance_level"],
            "verdict": self.table["verdict"].map(html.escape),
        }
        style = dict(index=False, escape=False, na_rep="", float_format="{:,.3g}".format)
        with pd.option_context("display.max_colwidth", None):
            table = pd.DataFrame(columns).to_html(**style)
        return f"<p>{html.escape(self._title())}</p>\n{table}"

    def _colors(self) -> list[str]:
        massive = self.table["verdict"].str.startswith("massive")
        return ["#c44e52" if is_massive else "#8c9db5" for is_massive in massive]

    def _title(self) -> str:
        return (
            f"{self.model}: activations above {self.threshold:,g} times the median of their row; "
            f"null: {self.null}"
        )

    def plot(self, ax: Any = None) -> Any:
        """Draw each layer's largest ratio on a log axis, its chance level and the threshold.

        Args:
            ax: axes of matplotlib to draw on; None makes new ones.

        Returns:
            The axes. An ImportError says so if matplotlib is not installed.
        """
        table, places = self.table, range(len(self.table))
        shape = {"figsize": (7, 1.5 + 0.35 * len(table))} if ax is None else {"ax": ax}
        ax = table.plot.barh(x="layer", y="max_ratio", color=self._colors(), log=True, **shape)
        ax.plot(table["chance_level"], places, "|", ms=14, color="black", label="chance level")
        ax.axvline(self.threshold, color="black", ls="--", lw=1, label="threshold")
        ax.set(xlabel="largest activation ratio", ylabel="")
        ax.set(xlim=(1, None), ylim=(len(table) - 0.5, -0.5))
        ax.set_title(self.model, loc="left")
        marks = (each[:2] for each in ax.get_legend_handles_labels())
        ax.legend(*marks, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
        return ax


def report(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    names: str | Sequence[str] | None = None,
    null: Iterable[nn.Module] | Mapping[str, Values] | None = None,
    threshold: float = MASSIVE_RATIO,
    forward: hooks.Forward | None = None,
    rows: Rows | None = None,
    top: int = 5,
    progress: bool = False,
) -> Report:
    """Which layers of a model have massive activations, in which channels, how unlikely.

    The model is run in evaluation mode over all batches; nothing is kept of them but counts.
    Afterwards each of its modules is in the mode it was in.

    Args:
        model: any module.
        loader: batches, for example of a PyG ``DataLoader``; moved to the model's device.
        names: submodules or stages of them whose output is looked at, names or patterns as for
            ``hooks.record``: outputs of shape [rows, channels], or [rows, heads, channels] with
            the ratio taken over all heads of a row, where the layer or the batch says so. None
            means identity modules called ``score``, as in this package's networks, or, where
            there are none, the messages of all PyG ``MessagePassing`` modules.
        null: what ``max_ratio`` is compared with. None means as many distinct rows, as wide, of
            products of three normals (``ProductNull``). Models, for example untrained ones of
            other seeds, are run over the same batches, one after another, so that an iterator
            that makes them is welcome; the p-value is then by rank (``p_value``). A mapping
            holds, for each layer, largest ratios that were found before.
        threshold: the ratio above which an activation is massive.
        forward: runs the model on a batch, as for ``hooks.scan``; what it returns is not used.
        rows: makes rows of channels of outputs that have another shape; it is given the module
            that was named, its output and the batch, as in ``lambda module, output, batch:
            standard.recorded_rows(module, output, batch.batch)`` for the layers of
            ``mapkg.models.pyg_layers``.
        top: how many of the most frequent channels are listed.
        progress: whether to show a bar over batches.

    Raises:
        KeyError: if a name matches nothing, or the null lacks a layer.
        ValueError: if it is not known which axes of an output are rows; if there are no batches;
            if a loader that can be run through only once is to serve several models.
        TypeError: if an output is not a tensor of real numbers, or it is not clear how to call
            the model.
    """
    if names is None and isinstance(model, nn.Module):
        names = default_names(model)
    if not threshold > 0:
        raise ValueError(f"threshold: expected a positive ratio, got {threshold!r}")
    settings = dict(names=names, threshold=threshold, forward=forward, rows=rows, progress=progress)
    if null is not None and not isinstance(null, Mapping) and iter(loader) is loader:
        raise ValueError(
            "expected a loader that can be run through again, for each model of the null, got "
            f"a one-time {type(loader).__name__}: pass list(loader)"
        )
    layers = _layers(model, loader, **settings)
    source, draws = PRODUCT_NULL, None
    if isinstance(null, Mapping):
        source, draws = "values given", null
    elif null is not None:
        maxima = [
            {layer.name: layer.summary.statistics()["max_ratio"] for layer in found}
            for found in (_layers(other, loader, **settings) for other in null)
        ]
        if not maxima:
            raise ValueError("expected at least one model as null, got none")
        source = f"{len(maxima)} null model{'s' if len(maxima) > 1 else ''}"
        draws = {layer.name: [found[layer.name] for found in maxima] for layer in layers}
    for layer in layers:
        if draws is not None and layer.name not in draws:
            raise KeyError(f"the null has no values for {layer.name!r}; it has {', '.join(draws)}")
    table = [layer.row(source, draws and draws[layer.name], top) for layer in layers]
    return Report(pd.DataFrame(table), type(model).__name__, threshold, source)


def _layers(
    model: nn.Module,
    loader: Iterable[Any],
    names: str | Sequence[str],
    threshold: float,
    forward: hooks.Forward | None,
    rows: Rows | None,
    progress: bool,
) -> list["_Layer"]:
    """What was looked at, in the model's order."""
    layers = {
        name: _Layer(name, module, threshold, rows)
        for name, module in hooks.resolve(model, names).items()
    }
    if not layers:
        raise ValueError("names: expected at least one name or pattern, got none")

    def update(name: str, output: Any, batch: Any) -> None:
        layers[name].update(output, batch)

    passes = hooks.scan(model, loader, names, forward=forward, reduce=update)
    total = len(loader) if hasattr(loader, "__len__") else None
    name = type(model).__name__
    num_batches = sum(1 for _ in tqdm(passes, name, total, disable=not progress))
    if num_batches == 0:
        raise ValueError("expected batches, got an empty loader (or one that was used up)")
    for layer in layers.values():
        layer.runs /= num_batches
    return list(layers.values())


class _Layer:
    """What streams of one layer."""

    def __init__(self, name: str, module: nn.Module, threshold: float, rows: Rows | None) -> None:
        self.name, self.module, self.rows = name, module, rows
        self.summary = ActivationSummary(threshold=threshold)
        self.axes: list[str] = []
        self.distinct: set[int] = set()
        self.runs, self.floored = 0.0, 0

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

    def row(self, source: str, draws: Values | None, top: int) -> dict[str, Any]:
        """The layer in the table."""
        found, by_channel = self.summary.statistics(), self.summary.massive_by_channel
        usable = found["rows"] - found["zero_medians"] - found["nonfinite_rows"]
        counts = [] if by_channel is None else by_channel.tolist()
        massive = sorted(((c, n) for c, n in enumerate(counts) if n), key=lambda pair: -pair[1])
        distinct, p, chance = usable, math.nan, math.nan
        if len(self.distinct) <= MAX_DISTINCT:
            distinct = min(usable, len(self.distinct))
        if draws is not None:
            p = float(p_value(found["max_ratio"], draws))
            chance = float(np.nanquantile(draws, 0.95))
        elif usable and 2 <= found["channels"] <= MAX_CHANNELS:
            null = ProductNull(found["channels"])
            p = float(null.exceedance(found["max_ratio"], distinct))
            chance = null.threshold(0.05, distinct)
        row = {
            "layer": self.name,
            "axes": " or ".join(self.axes),
            **{key: found[key] for key in ("rows", "channels")},
            "distinct_rows": distinct,
            **{key: found[key] for key in ("zero_medians", "nonfinite_rows")},
            "floored_rows": self.floored,
            **{key: found[key] for key in ("max_ratio", "max_abs", "rows_with_massive")},
            "share_rows_with_massive": found["share_rows_with_massive"],
            "massive_channels": len(massive),
            "top_channels": tuple(massive[:top]),
            "chance_level": chance,
            "p_value": p,
        }
        if draws is None and distinct < usable:
            source = f"{source}, {distinct:,} distinct row{'s' if distinct > 1 else ''}"
        return row | {"verdict": _verdict(row, source, self.runs)}


def _verdict(row: Mapping[str, Any], source: str, runs: float) -> str:
    left_out = [
        f"{row[column]:,} {'row' if row[column] == 1 else 'rows'} {reason}"
        for column, reason in (
            ("zero_medians", "with a zero median"),
            ("nonfinite_rows", "with NaN or infinity"),
        )
        if row[column]
    ]
    if not row["rows"]:
        return "undefined: no rows came; the module did not run, or on graphs without edges"
    if row["channels"] == 1:
        return "undefined: a single channel is its own median"
    if math.isnan(row["max_ratio"]):
        return f"undefined: no row has a ratio ({', '.join(left_out)})"
    large = row["max_ratio"] >= 1000
    found = f"up to {row['max_ratio']:{',.0f' if large else ',.3g'}} x the median"
    found = f"none: {found}"
    if row["massive_channels"]:
        found = (
            f"massive: {row['massive_channels']:,} of {row['channels']:,} channels, "
            f"{found.removeprefix('none: ')}, in {_percent(row['share_rows_with_massive'])} of rows"
        )
    if not math.isnan(p := row["p_value"]):
        found += f"; {'p < 0.000001' if p < 1e-6 else f'p = {p:.2g}'} ({source})"
    if floored := row["floored_rows"]:
        found += (
            f"; {floored:,} row{'s' if floored > 1 else ''} on a floor (a ReLU, an epsilon), "
            "compared with the median above it"
        )
    if runs > 1:
        found += f"; runs {runs:.3g} times a batch"
    return found + (f"; left out: {', '.join(left_out)}" if left_out else "")


def _percent(share: float) -> str:
    if share >= 0.995:
        return "100 %" if share == 1 else "over 99 %"
    return f"{100 * share:.2g} %" if share >= 1e-4 else "under 0.01 %"
