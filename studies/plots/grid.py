"""Many runs beside each other: models, data sets, variants, controls."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mapkg.measures import MASSIVE_RATIO
from studies.figures import STATE_COLORS, STATES
from studies.plots.style import layer_colours, panel_grid, threshold_line

CHANCE_COLOUR = "#2A9D8F"


def rank_grid(
    graph_maxima: pd.DataFrame,
    titles: Mapping[str, str],
    *,
    columns: int = 3,
    trained: str = "best",
    threshold: float = MASSIVE_RATIO,
) -> Figure:
    """Figure A of the massive-activations paper, a panel per run, with bands over seeds.

    Test graphs are sorted by their largest ratio, per layer and seed. The untrained networks
    are bands from the least to the greatest value of all their layers, graphs and seeds. A
    layer of the trained networks is a line at the median over seeds of the graphs of each
    rank, in a band from the least to the greatest.

    Args:
        graph_maxima: of ``experiments.grid.read_runs``.
        titles: from run to the title of its panel, in reading order.
        columns: panels in a row.
        trained: which state to draw as lines.
        threshold: where the line of massive activations is drawn.
    """
    figure = panel_grid(len(titles), columns, sharey=True)
    colours = layer_colours(graph_maxima)
    for ax, (run, title) in _panels(figure, titles):
        table = graph_maxima[graph_maxima["run"] == run].dropna(subset="max_ratio")
        for state in ("base", "base_calibrated"):
            values = table.loc[table["state"] == state, "max_ratio"]
            if len(values):
                look = dict(color=STATE_COLORS[state], alpha=0.25, lw=0, label=STATES[state])
                ax.axhspan(values.min(), values.max(), **look)
        for layer, of_layer in table[table["state"] == trained].groupby("layer"):
            by_seed = [np.sort(maxima["max_ratio"]) for _, maxima in of_layer.groupby("seed")]
            rank = np.linspace(0, 1, max(map(len, by_seed)))
            # A graph without a ratio is left out, so that seeds may differ in their number.
            ranked = np.stack(
                [np.interp(rank, np.linspace(0, 1, len(values)), values) for values in by_seed]
            )
            ax.fill_between(
                rank, ranked.min(axis=0), ranked.max(axis=0), color=colours[layer], alpha=0.2, lw=0
            )
            ax.plot(
                rank,
                np.median(ranked, axis=0),
                color=colours[layer],
                lw=1.2,
                label=f"layer {layer}",
            )
        threshold_line(ax, threshold)
        ax.set(yscale="log", title=title)
    figure.supxlabel("test graphs, by rank", fontsize="medium")
    figure.supylabel("largest activation ratio in the graph", fontsize="medium")
    _legend(figure)
    return figure


def against_untrained(
    summary: pd.DataFrame,
    untrained: pd.DataFrame,
    unlikely: pd.DataFrame,
    titles: Mapping[str, str],
    *,
    columns: int = 3,
    trained: str = "best",
    threshold: float = MASSIVE_RATIO,
) -> Figure:
    """The largest ratio of each layer of trained networks, among untrained ones and chance.

    Args:
        summary: of ``experiments.grid.read_runs``.
        untrained: of ``experiments.grid.read_untrained``.
        unlikely: of ``experiments.grid.how_unlikely``.
        titles: from run to the title of its panel, in reading order.
        columns: panels in a row.
        trained: which state.
        threshold: where the line of massive activations is drawn.
    """
    figure = panel_grid(len(titles), columns, sharey=True)
    for ax, (run, title) in _panels(figure, titles):
        nulls = untrained[(untrained["run"] == run) & (untrained["state"] == "base_calibrated")]
        look = dict(ls="", marker="_", ms=9, alpha=0.5, color=STATE_COLORS["base_calibrated"])
        number = nulls["seed"].nunique()
        ax.plot(nulls["layer"], nulls["max_ratio"], label=f"untrained, {number} networks", **look)
        rows = summary[(summary["run"] == run) & (summary["state"] == trained)]
        look = dict(ls="", marker="o", ms=4, alpha=0.8, color=STATE_COLORS[trained])
        ax.plot(rows["layer"], rows["max_ratio"], label=STATES[trained], **look)
        chance = unlikely.loc[unlikely["run"] == run, "chance_threshold"]
        label = "product of normals, 5 % family-wise"
        ax.axhline(chance.max(), color=CHANCE_COLOUR, lw=1, label=label)
        threshold_line(ax, threshold)
        ax.set(yscale="log", title=title)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("layer", fontsize="medium")
    figure.supylabel("largest activation ratio, test split", fontsize="medium")
    _legend(figure)
    return figure


def through_training(
    trajectory: pd.DataFrame,
    titles: Mapping[str, str],
    ax: Axes,
    *,
    threshold: float = MASSIVE_RATIO,
) -> Axes:
    """The largest ratio of any layer after each epoch, a line per run, a band over seeds.

    Args:
        trajectory: of ``experiments.grid.read_runs``.
        titles: from run to its label.
        ax: where to draw.
        threshold: where the line of massive activations is drawn.
    """
    for run, title in titles.items():
        _over_epochs(trajectory[trajectory["run"] == run], ax, label=title)
    threshold_line(ax, threshold)
    ax.set(yscale="log", xlabel="epoch", ylabel="largest activation ratio of any layer")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def layers_through_training(
    trajectory: pd.DataFrame,
    titles: Mapping[str, str],
    *,
    columns: int = 3,
    threshold: float = MASSIVE_RATIO,
) -> Figure:
    """The largest ratio of each layer after each epoch, a panel per run.

    A layer is a line at the median over seeds, in a band from the least to the greatest.

    Args:
        trajectory: of ``experiments.grid.read_runs``.
        titles: from run to the title of its panel, in reading order.
        columns: panels in a row.
        threshold: where the line of massive activations is drawn.
    """
    figure = panel_grid(len(titles), columns, sharey=True)
    colours = layer_colours(trajectory)
    for ax, (run, title) in _panels(figure, titles):
        for layer, rows in trajectory[trajectory["run"] == run].groupby("layer"):
            _over_epochs(rows, ax, label=f"layer {layer}", color=colours[layer])
        threshold_line(ax, threshold)
        ax.set(yscale="log", title=title)
    figure.supxlabel("epoch", fontsize="medium")
    figure.supylabel("largest activation ratio, test split", fontsize="medium")
    _legend(figure)
    return figure


def against_permuted(
    trajectory: pd.DataFrame,
    controls: Mapping[str, str],
    titles: Mapping[str, str],
    *,
    columns: int = 3,
    threshold: float = MASSIVE_RATIO,
) -> Figure:
    """The largest ratio of any layer after each epoch, beside that on permuted targets.

    A panel per control, up to the last epoch that both runs have; lines and bands as in
    ``through_training``.

    Args:
        trajectory: of ``experiments.grid.read_runs``.
        controls: from a run on permuted targets to the run on the targets of the data.
        titles: from the latter to the title of the panel.
        columns: panels in a row.
        threshold: where the line of massive activations is drawn.
    """
    figure = panel_grid(len(controls), columns, sharey=True)
    for ax, (permuted, run) in _panels(figure, controls):
        rows = {name: trajectory[trajectory["run"] == name] for name in (run, permuted)}
        last = min(table["epoch"].max() for table in rows.values())
        for name, label, state in (
            (run, "targets of the data", "best"),
            (permuted, "targets permuted", "base"),
        ):
            shown = rows[name][rows[name]["epoch"] <= last]
            _over_epochs(shown, ax, label=label, color=STATE_COLORS[state])
        threshold_line(ax, threshold)
        ax.set(yscale="log", title=titles[run])
    figure.supxlabel("epoch", fontsize="medium")
    figure.supylabel("largest activation ratio", fontsize="medium")
    _legend(figure)
    return figure


def _over_epochs(rows: pd.DataFrame, ax: Axes, **look: Any) -> None:
    """The median over seeds of the largest ratio of any layer, in a band over seeds."""
    largest = rows.groupby(["epoch", "seed"])["max_ratio"].max().unstack().dropna()
    (line,) = ax.plot(largest.index, largest.median(axis=1), lw=1.4, **look)
    band = dict(color=line.get_color(), alpha=0.2, lw=0)
    ax.fill_between(largest.index, largest.min(axis=1), largest.max(axis=1), **band)


def _panels(figure: Figure, titles: Mapping[str, str]) -> Iterator[tuple[Axes, tuple[str, str]]]:
    return zip(figure.axes, titles.items(), strict=True)


def _legend(figure: Figure) -> None:
    """One legend for all panels: what several have is named once."""
    entries = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= {label: handle for handle, label in zip(handles, labels, strict=True)}
    figure.legend(entries.values(), entries, loc="outside right center")
