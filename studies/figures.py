"""Figures: their look, panels, and lines over seeds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

THRESHOLD_LOOK = dict(color="black", ls="--", lw=1)
STATES = {
    "base": "untrained, as published",
    "base_calibrated": "untrained, BatchNorm calibrated",
    "best": "trained, best validation epoch",
    "last": "trained, last epoch",
}
STATE_COLORS = {
    "base": "#EB6123",
    "base_calibrated": "#7A7A7A",
    "best": "#51288C",
    "last": "#2A9D8F",
}
LABELS = {
    "max_ratio": "largest activation ratio",
    "max_abs": "largest |score|",
    "row_median_q50": "typical row median of |score|",
    "share_rows_with_massive": "share of edges with an MA",
    "share_saturated": "share of head sums beyond the clamp",
}


def use_style() -> None:
    """Set the look of all figures."""
    look = {
        "figure.dpi": 110,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "legend.frameon": False,
    }
    sns.set_theme(context="notebook", style="ticks", font_scale=0.9, rc=look)


def over_seeds(
    table: pd.DataFrame,
    *,
    x: str,
    y: str,
    color: str,
    panel: str | None = None,
    columns: int = 4,
    log: str = "",
    labels: Mapping[str, str],
    size: tuple[float, float] = (2.6, 2.1),
    estimator: str = "median",
    sharing: Mapping[str, bool | str] | None = None,
    **look: Any,
) -> sns.FacetGrid:
    """A line over seeds, in a band from the least to the greatest, a panel for each group."""
    grid = sns.relplot(
        table,
        **dict(kind="line", x=x, y=y, hue=color, col=panel, facet_kws=sharing),
        **dict(height=size[1], aspect=size[0] / size[1]),
        col_wrap=min(columns, table[panel].nunique()) if panel else None,
        **dict(estimator=estimator, errorbar=("pi", 100), marker="o", ms=3.5, lw=1.3) | look,
    )
    grid.set_titles("{col_name}")
    grid.set_axis_labels(labels.get(x, x), labels.get(y, y))
    for axis in log:
        grid.set(**{f"{axis}scale": "log"})
    grid.legend.set_title(None)
    return grid


def panels(
    count: int, columns: int, size: tuple[float, float] = (2.6, 2.1), **sharing: Any
) -> tuple[Figure, list[Axes]]:
    """Panels of ``size`` inches in rows of at most ``columns``, with room for a legend."""
    columns = min(columns, count)
    rows = -(-count // columns)
    inches = (size[0] * columns + 2.2, size[1] * rows + 0.8)
    look = dict(figsize=inches, squeeze=False, layout="constrained")
    figure, axes = plt.subplots(rows, columns, **look, **sharing)
    for ax in axes.flat[count:]:
        ax.remove()
    return figure, list(axes.flat[:count])


def band(ax: Axes, by_seed: pd.DataFrame, **look: Any) -> None:
    """The median over columns as a line, in a band from the least to the greatest."""
    (line,) = ax.plot(by_seed.index, by_seed.median(axis=1), **dict(lw=1.3) | look)
    edges = by_seed.min(axis=1), by_seed.max(axis=1)
    ax.fill_between(by_seed.index, *edges, color=line.get_color(), alpha=0.2, lw=0)


def legend_once(figure: Figure, **where: Any) -> None:
    """One legend of a figure for what is labeled in any of its panels."""
    pairs = [zip(*ax.get_legend_handles_labels(), strict=True) for ax in figure.axes]
    handles = {label: handle for panel in pairs for handle, label in panel}
    figure.legend(handles.values(), handles, **where)


def layer_colors(layers: Iterable[int]) -> dict[int, tuple[float, float, float]]:
    """A color for each layer, from the first to the last."""
    ordered = sorted(set(layers))
    return dict(zip(ordered, sns.color_palette("viridis", len(ordered)), strict=True))


def whole_ticks(grid: sns.FacetGrid, axes: str = "x", number: int = 6) -> None:
    """Ticks at whole numbers, for layers and steps, no more than about so many."""
    for ax in grid.axes.flat:
        for axis in axes:
            getattr(ax, f"{axis}axis").set_major_locator(MaxNLocator(number, integer=True))


def draw_score(ax: Axes) -> None:
    """Where the score sits in a GraphTransformer layer, as a diagram."""
    boxes = {
        "nodes": (0.07, 0.62, "node features\n$h_j,\\ h_i$"),
        "edges": (0.07, 0.22, "edge features\n$e_{ji}$"),
        "value": (0.28, 0.90, "value\n$V_j$"),
        "pair": (0.28, 0.62, "key of source, query of target\n$K_j \\odot Q_i\\,/\\sqrt{d}$"),
        "gate": (0.28, 0.22, "edge gate\n$E_{ji}$"),
        "score": (0.50, 0.42, "score\n$s_{ji}$  [E, D]"),
        "weight": (0.67, 0.62, "sum per head, clamp,\nexp, normalize: $\\alpha_{ji}$"),
        "attended": (0.81, 0.90, "attended\n$o_i = \\sum_j \\alpha_{ji} V_j$  [N, D]"),
        "node_block": (0.96, 0.62, "node block\n$h_i'$"),
        "edge_block": (0.96, 0.22, "edge block\n$e_{ji}'$"),
    }
    arrows = "nodes>value nodes>pair edges>gate pair>score gate>score score>weight"
    arrows += " value>attended weight>attended attended>node_block score>edge_block"
    patches = {}
    for name, (x, y, text) in boxes.items():
        look = dict(boxstyle="round,pad=0.5", edgecolor="#444444")
        look["facecolor"] = "#FFE0B2" if name in ("score", "attended") else "white"
        label = ax.text(x, y, text, ha="center", va="center", fontsize=10, bbox=look)
        patches[name] = label.get_bbox_patch()
    for start, end in (arrow.split(">") for arrow in arrows.split()):
        look = dict(arrowstyle="-|>", color="#444444", shrinkA=3, shrinkB=3)
        look |= dict(patchA=patches[start], patchB=patches[end])
        ax.annotate("", xy=boxes[end][:2], xytext=boxes[start][:2], arrowprops=look)
    ax.set(xlim=(0, 1.03), ylim=(0.1, 1.0))
    ax.set_axis_off()


def pipeline(steps: Mapping[str, Tensor], rows: Sequence[str]) -> Figure:
    """Numbers of one computation, a panel for each step [rows] or [rows, channels], by its title.

    A step with fewer rows than there are names ends above the last ones.
    """
    tables = [values.reshape(len(values), -1) for values in steps.values()]
    ratios = dict(width_ratios=[1 + table.size(1) for table in tables])
    figure, axes = plt.subplots(1, len(steps), figsize=(10, 2.2), gridspec_kw=ratios)
    for title, table, ax in zip(steps, tables, axes, strict=True):
        largest = table.abs().max().item()
        look = dict(cmap="vlag", cbar=False, annot_kws={"size": 8}, linewidths=1)
        look |= dict(vmin=-largest, vmax=largest, xticklabels=False, yticklabels=False)
        sns.heatmap(table.numpy(), annot=True, fmt=".2f", ax=ax, **look)
        ax.set_title(title, fontsize=9)
        ax.set_ylim(len(rows), 0)
    axes[0].set_yticks([number + 0.5 for number in range(len(rows))], rows)
    axes[0].tick_params(left=False)
    return figure
