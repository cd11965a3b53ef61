"""How ratios grow: base against trained, through training, by layer."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from mapkg.measures import MASSIVE_RATIO
from studies.figures import LABELS, STATE_COLORS, STATES
from studies.plots.style import layer_colours, panels_in_a_row, threshold_line


def base_against_trained(
    graph_maxima: pd.DataFrame,
    *,
    trained: str = "best",
    threshold: float = MASSIVE_RATIO,
    by: str = "seed",
) -> Figure:
    """Figure A of the massive-activations paper: each graph's largest ratio, graphs in rank order.

    Graphs are sorted by their largest ratio, per layer. The untrained network is a band from
    the least to the greatest value of all its layers and graphs, drawn with BatchNorm
    statistics at 0 and 1 (as published) and calibrated on training data. The trained network
    is one line per layer.

    Args:
        graph_maxima: the table of ``experiments.Emergence``.
        trained: which state to draw as lines, ``"best"`` or ``"last"``.
        threshold: where the line of massive activations is drawn.
        by: column that tells the panels apart.
    """
    panels = sorted(graph_maxima[by].unique())
    figure, axes = panels_in_a_row(len(panels))
    colours = layer_colours(graph_maxima)
    for ax, panel in zip(axes, panels, strict=True):
        table = graph_maxima[graph_maxima[by] == panel]
        for state in ("base", "base_calibrated"):
            values = table.loc[table["state"] == state, "max_ratio"]
            look = dict(color=STATE_COLORS[state], alpha=0.25, lw=0, label=STATES[state])
            ax.axhspan(values.min(), values.max(), **look)
        for layer, lines in table[table["state"] == trained].groupby("layer"):
            values = np.sort(lines["max_ratio"].dropna())
            ax.plot(
                np.arange(1, len(values) + 1), values, color=colours[layer], label=f"layer {layer}"
            )
        threshold_line(ax, threshold)
        ax.set(yscale="log", title=f"{by} {panel}", xlabel="test graph, by rank")
    axes[0].set_ylabel("largest activation ratio in the graph")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right center")
    return figure


def trajectory(
    table: pd.DataFrame, *, y: str = "max_ratio", threshold: float | None = MASSIVE_RATIO
) -> Figure:
    """A statistic of each layer after each observed epoch, one panel per seed.

    Args:
        table: the trajectory of ``experiments.Emergence``.
        y: which statistic.
        threshold: where a line is drawn; None draws none.
    """
    seeds = sorted(table["seed"].unique())
    figure, axes = panels_in_a_row(len(seeds))
    for ax, seed in zip(axes, seeds, strict=True):
        for layer, colour in layer_colours(table).items():
            line = table[(table["seed"] == seed) & (table["layer"] == layer)]
            ax.plot(line["epoch"], line[y], color=colour, label=f"layer {layer}", lw=1.3)
        if threshold is not None:
            threshold_line(ax, threshold)
        ax.set(yscale="log", title=f"seed {seed}", xlabel="epoch")
    axes[0].set_ylabel(LABELS.get(y, y.replace("_", " ")))
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right center")
    return figure


def by_layer(
    summary: pd.DataFrame,
    statistics: Sequence[str],
    *,
    states: Sequence[str] = ("base", "base_calibrated", "best"),
) -> Figure:
    """Statistics by layer and state, one panel each: the mean over seeds, each seed as a dot.

    Args:
        summary: the summary of ``experiments.Emergence``.
        statistics: its columns to show; magnitudes are on a logarithmic axis, shares are not.
        states: which states, in order.
    """
    figure, axes = plt.subplots(
        1, len(statistics), figsize=(3.4 * len(statistics), 3.4), layout="constrained"
    )
    for ax, y in zip(np.atleast_1d(axes), statistics, strict=True):
        for state in states:
            rows = summary[summary["state"] == state]
            colour = STATE_COLORS[state]
            mean = rows.groupby("layer")[y].mean()
            ax.plot(mean.index, mean, color=colour, lw=1.4, label=STATES[state])
            ax.plot(rows["layer"], rows[y], "o", color=colour, ms=3.5, alpha=0.5, lw=0)
        ax.set(xlabel="layer", title=LABELS.get(y, y.replace("_", " ")))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not y.startswith("share"):
            ax.set_yscale("log")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(states))
    return figure


def row_maxima(
    values: dict[str, np.ndarray | Tensor], ax: Axes, *, threshold: float = MASSIVE_RATIO
) -> Axes:
    """Share of rows whose largest ratio exceeds each value, for several samples.

    Args:
        values: from label to the largest ratio of each row.
        ax: where to draw.
        threshold: where the line of massive activations is drawn.
    """
    for label, sample in values.items():
        sample = np.sort(np.asarray(sample))
        share = 1 - np.arange(len(sample)) / len(sample)
        ax.plot(sample, share, label=label, lw=1.3)
    ax.axvline(threshold, color="black", ls="--", lw=1, label=f"threshold {threshold:g}")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="largest activation ratio of the row, r",
        ylabel="share of rows above r",
    )
    ax.legend()
    return ax
