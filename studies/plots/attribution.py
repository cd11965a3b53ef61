"""What massive activations sit on, and what follows from their removal."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

HEAT_PALETTE = "rocket_r"
AXES = {
    "share": "share of edges with an MA",
    "enrichment": "enrichment",
    "max_ratio": "typical largest ratio",
    "change": "|change of prediction|",
    "absolute_error": "absolute error",
    "difference": "area, less that of random orders",
    "loss_change": "change of the mean loss",
}


def heat_maps(
    heat: pd.DataFrame,
    edges: Mapping[str, int],
    *,
    heads: int,
    channels: int,
    layer: int = 0,
    threshold: float = 1000.0,
) -> Figure:
    """Percentage of edges that are massive in each channel, a panel for each type of edge.

    Args:
        heat: columns ``layer``, ``threshold``, ``label``, ``channel`` (head-major) and
            ``percent``; a channel that is not there has 0.
        edges: how many edges have each label, in the order of the panels.
        heads: number of heads, rows of a panel.
        channels: channels of a head, columns of a panel.
        layer: which layer.
        threshold: which threshold; it must be one that the table was made for.

    Raises:
        ValueError: if there is no type of edge.

    Source: massive-activations paper, its bond-type heat map. differs: the labels of its two
    axes are swapped.
    """
    if not edges:
        raise ValueError("expected at least one type of edge with its number of edges, got none")
    chosen = heat.query("layer == @layer and threshold == @threshold")
    of_all = sum(edges.values())
    vmax = max(chosen["percent"].max(), 1.0) if len(chosen) else 1.0
    figure, axes = plt.subplots(
        1, len(edges), figsize=(3.1 * len(edges) + 0.6, 3.4), layout="constrained", squeeze=False
    )
    image = None
    for ax, (label, number) in zip(axes.flat, edges.items(), strict=True):
        ax.set_title(f"{label}: {number / of_all:.2%} of edges" if of_all else label)
        values = np.zeros(heads * channels)
        rows = chosen[chosen["label"] == label]
        values[rows["channel"].to_numpy(int)] = rows["percent"].to_numpy(float)
        image = ax.imshow(
            values.reshape(heads, channels), cmap=HEAT_PALETTE, vmin=0, vmax=vmax, aspect="auto"
        )
        ax.set(xlabel="channel of the head", ylabel="head" if ax is axes.flat[0] else None)
        ax.set(xticks=range(channels), yticks=range(heads))
        if not values.any():
            note = "no such edge" if number == 0 else "nothing above the threshold"
            ax.text(0.5, 0.5, note, transform=ax.transAxes, ha="center", va="center")
    figure.colorbar(image, ax=axes, label="% of edges of the type", pad=0.01)
    figure.suptitle(f"layer {layer}, ratio above {threshold:g}")
    return figure


def by_label(
    rows: pd.DataFrame,
    *,
    value: str = "share",
    panel: str = "run",
    columns: int = 3,
    log: bool = False,
    line: float | None = None,
    axis: str | None = None,
) -> Figure:
    """A dot for each seed and label, with its interval if there is one, a panel for each run.

    Args:
        rows: columns ``label``, ``seed``, ``panel`` and ``value``; ``value_low`` and
            ``value_high``, if they are there, are the ends of an interval. Labels and panels
            are drawn in the order in which they come.
        value: what is drawn, for example ``"share"`` or ``"enrichment"``.
        panel: column whose values are the panels.
        columns: panels in a row.
        log: whether the axis of the value is logarithmic.
        line: where a dotted line is drawn across.
        axis: label of the axis of the value; None takes one that is known, or the column.
    """
    panels, seeds = rows[panel].unique(), sorted(rows["seed"].unique())
    columns = min(columns, len(panels))
    height = -(-len(panels) // columns)
    most = rows.groupby(panel)["label"].nunique().max()
    width = 8.6 if columns > 2 else columns * max(3.6, 0.35 * most)
    figure, axes = plt.subplots(
        height,
        columns,
        figsize=(1.4 + width, 0.6 + 2.4 * height),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, panels, strict=False):
        of_panel = rows[rows[panel] == name]
        labels = list(of_panel["label"].unique())
        _dots(ax, of_panel, labels, seeds, value)
        if sum(map(len, labels)) > 80 // columns:
            turned = {"rotation": 90} if len(labels) > 9 else {"rotation": 30, "ha": "right"}
            ax.set_xticks(range(len(labels)), labels, fontsize="small", **turned)
        ax.set(title=name, yscale="log" if log else "linear")
        if line is not None:
            ax.axhline(line, color="black", lw=0.8, ls=":")
    for ax in axes[:, 0]:
        ax.set_ylabel(axis or AXES.get(value, value))
    if value == "share":
        axes[0, 0].set_ylim(-0.03, 1.03)
    _seed_legend(figure, axes.flat[0], seeds)
    return figure


def variants(shares: pd.DataFrame, losses: pd.DataFrame) -> Figure:
    """Share of massive edges and enrichment by type, a column per variant, and their losses.

    Args:
        shares: columns ``run``, ``label``, ``seed``, and ``share`` and ``enrichment`` with
            ``_low`` and ``_high``; one layer and threshold.
        losses: columns ``run``, ``seed`` and ``loss`` with ``loss_low`` and ``loss_high``.
    """
    runs, seeds = list(shares["run"].unique()), sorted(shares["seed"].unique())
    figure, axes = plt.subplots(
        2,
        len(runs) + 1,
        figsize=(2.2 * len(runs) + 3.0, 5.4),
        sharey="row",
        width_ratios=[1.0] * len(runs) + [1.3],
        layout="constrained",
        squeeze=False,
    )
    for column, run in zip(axes.T, runs, strict=False):
        of_run = shares[shares["run"] == run]
        labels = list(of_run["label"].unique())
        for ax, value in zip(column, ("share", "enrichment"), strict=True):
            _dots(ax, of_run, labels, seeds, value)
            ax.set_xticks(range(len(labels)), labels, fontsize="small", rotation=30, ha="right")
        column[0].set_xticklabels([])
        column[0].set_title(run)
        column[1].axhline(1, color="black", lw=0.8, ls=":")
    axes[0, 0].set(ylabel=AXES["share"], ylim=(-0.03, 1.03))
    axes[1, 0].set(ylabel=AXES["enrichment"], ylim=(-0.05, None))
    for ax in axes[:, -1]:
        ax.remove()
    ax = figure.add_subplot(axes[0, 0].get_gridspec()[:, -1])
    _dots(ax, losses.assign(label=losses["run"]), runs, seeds, "loss")
    ax.set_xticks(range(len(runs)), runs, fontsize="small", rotation=30, ha="right")
    ax.set(title="mean absolute error", ylim=(0, None))
    _seed_legend(figure, axes[0, 0], seeds)
    return figure


def _dots(
    ax: Axes, rows: pd.DataFrame, labels: Sequence[Any], seeds: Sequence[Any], value: str
) -> None:
    """A dot for each seed at each label, with an interval if the table has its ends."""
    colours = sns.color_palette("colorblind", len(seeds))
    offsets = np.linspace(-0.22, 0.22, len(seeds)) if len(seeds) > 1 else [0.0]
    for seed, colour, offset in zip(seeds, colours, offsets, strict=True):
        points = rows[rows["seed"] == seed].set_index("label").reindex(labels)
        middle, place = points[value].to_numpy(float), np.arange(len(labels)) + offset
        ends = None
        if f"{value}_low" in points:
            ends = np.abs(points[[f"{value}_low", f"{value}_high"]].to_numpy(float).T - middle)
        ax.errorbar(place, middle, ends, fmt="o", ms=4.5, color=colour, lw=1.2, label=seed)
    ax.set_xticks(range(len(labels)), labels, fontsize="small")
    ax.set_xlim(-0.5, len(labels) - 0.5)


def _seed_legend(figure: Figure, ax: Axes, seeds: Sequence[Any]) -> None:
    if len(seeds) > 1:
        handles, texts = ax.get_legend_handles_labels()
        figure.legend(handles, texts, title="seed", loc="outside right upper")


def measured_and_predicted(logs: pd.DataFrame, *, measured: str, predicted: str) -> Figure:
    """Measured against predicted values of each channel, a panel for each type of edge.

    Args:
        logs: columns ``label``, ``measured`` and ``predicted``.
        measured: what is measured, the label of the vertical axis.
        predicted: the same for the horizontal one.
    """
    labels = logs["label"].unique()
    figure, axes = plt.subplots(
        1,
        len(labels),
        figsize=(3.0 * len(labels) + 0.4, 3.2),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for ax, label in zip(axes.flat, labels, strict=True):
        points = logs[logs["label"] == label]
        ax.plot(points["predicted"], points["measured"], "o", ms=3.5, alpha=0.7)
        ends = [
            logs[["predicted", "measured"]].min().min(),
            logs[["predicted", "measured"]].max().max(),
        ]
        ax.plot(ends, ends, color="black", lw=0.8, ls=":")
        correlation = np.corrcoef(points["predicted"], points["measured"])[0, 1]
        ax.set(title=f"{label}, correlation {correlation:.4f}", xlabel=predicted)
    axes[0, 0].set_ylabel(measured)
    return figure


def types_through_training(
    first_layer: pd.DataFrame,
    values: Mapping[str, str],
    *,
    panel: str = "run",
    logarithmic: Sequence[str] | None = None,
) -> Figure:
    """What the first layer does with each type of edge, epoch by epoch.

    Args:
        first_layer: columns ``epoch``, ``seed``, ``label``, ``panel`` and those of ``values``.
        values: columns to draw, a row of panels each, with the label of their axis.
        panel: column whose values are the columns of panels.
        logarithmic: which of the columns have a logarithmic axis; None means all.
    """
    panels, labels = first_layer[panel].unique(), list(first_layer["label"].unique())
    colours = dict(zip(labels, sns.color_palette("colorblind", len(labels)), strict=True))
    figure, axes = plt.subplots(
        len(values),
        len(panels),
        figsize=(1.6 + 2.7 * len(panels), 0.7 + 2.2 * len(values)),
        sharex=True,
        sharey="row",
        layout="constrained",
        squeeze=False,
    )
    for row, (value, text) in zip(axes, values.items(), strict=True):
        for ax, name in zip(row, panels, strict=True):
            of_panel = first_layer[first_layer[panel] == name]
            for (_, label), run in of_panel.groupby(["seed", "label"], sort=False):
                ax.plot(run["epoch"], run[value], color=colours[label], lw=1.2, marker=".", ms=4)
            if logarithmic is None or value in logarithmic:
                ax.set_yscale("log")
        row[0].set_ylabel(text)
    for ax, name in zip(axes[0], panels, strict=True):
        ax.set_title(name)
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
    lines = [Line2D([], [], color=colour) for colour in colours.values()]
    figure.legend(lines, labels, loc="outside lower center", ncols=min(len(labels), 5))
    return figure


def faithfulness(
    curves: pd.DataFrame, *, value: str = "change", panel: str = "run", highlight: str = "ratio"
) -> Figure:
    """Means over molecules with their intervals after each share of bonds, a line per method.

    Args:
        curves: columns ``fraction``, ``method``, ``order``, ``panel`` and ``value`` with
            ``_low`` and ``_high``.
        value: ``"change"`` of the prediction, or ``"absolute_error"``.
        panel: column whose values are the columns of panels; the orders are the rows.
        highlight: method that is drawn thick; random orders are dashed.
    """
    panels, orders = curves[panel].unique(), curves["order"].unique()
    methods = curves["method"].unique()
    figure, axes = plt.subplots(
        len(orders),
        len(panels),
        figsize=(1.4 + (2.8 if len(panels) > 1 else 5.0) * len(panels), 0.8 + 2.5 * len(orders)),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    colours = dict(zip(methods, sns.color_palette("colorblind", len(methods)), strict=True))
    colours["random"] = "black"
    for row, order in zip(axes, orders, strict=True):
        for ax, name in zip(row, panels, strict=True):
            shown = curves[(curves["order"] == order) & (curves[panel] == name)]
            for method, line in shown.groupby("method", sort=False):
                ax.plot(
                    line["fraction"],
                    line[value],
                    color=colours[method],
                    lw=2.6 if method == highlight else 1.3,
                    ls="--" if method == "random" else "-",
                    label=method,
                )
                if method in (highlight, "random"):
                    ends = (line[f"{value}_low"], line[f"{value}_high"])
                    ax.fill_between(line["fraction"], *ends, color=colours[method], alpha=0.15)
            ax.set_title(f"{name}, {order}")
        row[0].set_ylabel(AXES[value])
    for ax in axes[-1]:
        ax.set_xlabel("share of bonds removed")
    handles, texts = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=4)
    return figure
