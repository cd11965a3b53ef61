"""One table and one verdict per layer, for any torch model::

    print(report(model, loader))
    print(report(model, loader, names="convs.*:message", null=untrained_models))

What is looked at is named as for ``mapkg.hooks``.
"""

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import MessagePassing

from mapkg import hooks
from mapkg.measures import MASSIVE_RATIO, ActivationSummary
from mapkg.nulls import MAX_CHANNELS, ProductNull, Values, p_value

Rows = Callable[[nn.Module, Any, Any], Tensor]
"""Called as ``rows(module, output, batch)``; returns [rows, channels]."""

PRODUCT_NULL = "product of normals"
"""What p-values are relative to if no null is given."""


@dataclass(frozen=True)
class Report:
    """What ``report`` found.

    Attributes:
        table: a row per layer, in the model's order: ``layer``, its name; ``rows`` and
            ``channels`` of the activations; ``zero_medians`` and ``nonfinite_rows``, rows with
            no ratio, which no other column looks at; ``max_ratio``, the largest activation
            ratio; ``max_abs``, the largest magnitude; ``rows_with_massive``, their number, and
            ``share_rows_with_massive``, of rows that have a ratio; ``massive_channels``, how
            many channels have a massive activation in any row; ``top_channels``, pairs
            (channel, rows in which it is massive), the most frequent first; ``p_value``, how
            likely the null exceeds ``max_ratio``; and ``verdict``, the row in words.
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
        table = self.table.to_html(index=False, na_rep="", float_format="{:.3g}".format)
        return f"<p>{html.escape(self._title())}</p>\n{table}"

    def _title(self) -> str:
        return (
            f"{self.model}: activations above {self.threshold:,g} times the median of their row; "
            f"null: {self.null}"
        )


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
) -> Report:
    """Which layers of a model have massive activations, in which channels, how unlikely.

    The model is run in evaluation mode over all batches; nothing is kept of them but counts.
    Afterwards each of its modules is in the mode it was in.

    Args:
        model: any module.
        loader: batches, for example of a PyG ``DataLoader``; moved to the model's device.
        names: submodules or stages of them whose output is looked at, names or patterns as for
            ``hooks.record``: outputs of shape [rows, channels], or [rows, heads, channels] with
            the ratio taken over all heads of a row, if a batch has as many nodes or edges as there
            are rows. None means identity modules called ``score``, as in this package's networks,
            or, where there are none, the messages of all PyG ``MessagePassing`` modules.
        null: what ``max_ratio`` is compared with. None means as many rows, as wide, of
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

    Raises:
        KeyError: if a name matches nothing, or the null lacks a layer.
        ValueError: if an output has another shape, or three axes and no batch says which are rows;
            if there are no batches; if a loader that
            can be run through only once is to serve several models.
        TypeError: if an output is not a tensor of real numbers, or it is not clear how to call
            the model.
    """
    if names is None:
        names = _default_names(model)
    settings = dict(names=names, threshold=threshold, forward=forward, rows=rows)
    models = null is not None and not isinstance(null, Mapping)
    if models and iter(loader) is loader:
        raise ValueError(
            "expected a loader that can be run through again, for each model of the null, got "
            f"a one-time {type(loader).__name__}: pass list(loader)"
        )
    summaries = _summaries(model, loader, **settings)
    source, draws = PRODUCT_NULL, None
    if isinstance(null, Mapping):
        source, draws = "values given", null
    elif null is not None:
        maxima = [_max_ratios(_summaries(other, loader, **settings)) for other in null]
        if not maxima:
            raise ValueError("expected at least one model as null, got none")
        source = f"{len(maxima)} null model{'s' if len(maxima) > 1 else ''}"
        draws = {name: [found[name] for found in maxima] for name in summaries}
    table = []
    for name, summary in summaries.items():
        if draws is not None and name not in draws:
            raise KeyError(f"the null has no values for {name!r}; it has {', '.join(draws)}")
        table.append(_row(name, summary, source, None if draws is None else draws[name], top))
    return Report(pd.DataFrame(table), type(model).__name__, threshold, source)


def _summaries(
    model: nn.Module,
    loader: Iterable[Any],
    names: str | Sequence[str],
    threshold: float,
    forward: hooks.Forward | None,
    rows: Rows | None,
) -> dict[str, ActivationSummary]:
    """A summary per layer, in the model's order."""
    modules = hooks.resolve(model, names)
    summaries = {name: ActivationSummary(threshold=threshold) for name in modules}

    def update(name: str, output: Any, batch: Any) -> None:
        if rows is None:
            _check_rows(name, output, batch)
        else:
            output = rows(modules[name], output, batch)
        x = _flattened(name, output)
        try:
            summaries[name].update(x)
        except ValueError as error:  # another width than before
            raise ValueError(f"{name!r}: {error}; name a module of one width") from error

    passes = sum(1 for _ in hooks.scan(model, loader, names, forward=forward, reduce=update))
    if passes == 0:
        raise ValueError("expected batches, got an empty loader (or one that was used up)")
    return summaries


def _max_ratios(summaries: Mapping[str, ActivationSummary]) -> dict[str, float]:
    return {name: summary.statistics()["max_ratio"] for name, summary in summaries.items()}


def _row(
    name: str, summary: ActivationSummary, source: str, draws: Values | None, top: int
) -> dict[str, Any]:
    found = summary.statistics()
    usable = found["rows"] - found["zero_medians"] - found["nonfinite_rows"]
    counts = [] if summary.massive_by_channel is None else summary.massive_by_channel.tolist()
    massive = sorted(((c, n) for c, n in enumerate(counts) if n), key=lambda pair: -pair[1])
    if draws is not None:
        p = float(p_value(found["max_ratio"], draws))
    elif usable and 2 <= found["channels"] <= MAX_CHANNELS:
        p = float(ProductNull(found["channels"]).exceedance(found["max_ratio"], usable))
    else:
        p = math.nan
    row = {
        "layer": name,
        **{key: found[key] for key in ("rows", "channels", "zero_medians", "nonfinite_rows")},
        **{key: found[key] for key in ("max_ratio", "max_abs", "rows_with_massive")},
        "share_rows_with_massive": found["share_rows_with_massive"],
        "massive_channels": len(massive),
        "top_channels": tuple(massive[:top]),
        "p_value": p,
    }
    return row | {"verdict": _verdict(row, source)}


def _verdict(row: Mapping[str, Any], source: str) -> str:
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
        if row["zero_medians"] == row["rows"]:
            return "undefined: all medians are zero"
        if row["nonfinite_rows"] == row["rows"]:
            return "undefined: no row is finite"
        return f"undefined: no row has a ratio ({', '.join(left_out)})"
    largest = f"up to {row['max_ratio']:,.3g} x the median"
    if row["max_ratio"] >= 1000:
        largest = f"up to {row['max_ratio']:,.0f} x the median"
    if row["massive_channels"]:
        found = (
            f"massive: {row['massive_channels']:,} of {row['channels']:,} channels, {largest}, "
            f"in {_percent(row['share_rows_with_massive'])} of rows"
        )
    else:
        found = f"none: {largest}"
    chance = "" if math.isnan(row["p_value"]) else f"; {_p(row['p_value'])} ({source})"
    return found + chance + (f"; left out: {', '.join(left_out)}" if left_out else "")


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share >= 1e-4 else "under 0.01 %"


def _p(p: float) -> str:
    return "p < 0.000001" if p < 1e-6 else f"p = {p:.2g}"


def _check_rows(name: str, output: Any, batch: Any) -> None:
    """Raise ValueError if it is not known that the first axis of three is that of the rows."""
    if not isinstance(output, Tensor) or not (output.is_nested or output.dim() == 3):
        return
    known: set[int] = set()
    if isinstance(batch, Data) and isinstance(batch.edge_index, Tensor):
        nodes, edges = batch.num_nodes, batch.num_edges
        loops = int((batch.edge_index[0] == batch.edge_index[1]).sum())
        known = {nodes, edges, edges + nodes, edges - loops + nodes}
    if output.is_nested or len(output) not in known:
        shape = "a nested tensor" if output.is_nested else f"{list(output.shape)}"
        raise ValueError(
            f"{name!r} returned {shape}, of which the batch does not say what a row is: pass rows="
            "lambda module, output, batch: output.flatten(1) if rows come first, [rows, heads, "
            "channels]; output.flatten(0, 1) if they are the first two axes, [graphs, nodes or "
            "tokens, channels]; output.values() if it is nested"
        )


def _flattened(name: str, output: Any) -> Tensor:
    """One row per edge or node, heads side by side."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = (
            f"a tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        )
        raise TypeError(
            f"expected {name!r} to return a tensor of real numbers, got {kind}; name the module "
            "that makes the tensor itself"
        )
    if output.dim() not in (2, 3):
        raise ValueError(
            f"expected {name!r} to return [rows, channels] or [rows, heads, channels], got "
            f"{list(output.shape)}; name a module with one row per edge or node, or pass rows=, a "
            "function that makes rows of it"
        )
    return output.flatten(start_dim=1)


def _default_names(model: nn.Module) -> str | list[str]:
    modules = dict(model.named_modules())
    # A head that is called "score" computes something: it is not where attention is looked at.
    scores = [
        name
        for name, module in modules.items()
        if name.rpartition(".")[2] == "score" and type(module) is nn.Identity
    ]
    if scores:
        return scores
    if any(isinstance(module, MessagePassing) for module in modules.values()):
        return "*:message"
    known = ", ".join(filter(None, modules)) or "its submodules (it has none)"
    raise KeyError(
        f"{type(model).__name__} has no identity module called 'score' and no MessagePassing "
        f"module: pass names=, of {known}"
    )
