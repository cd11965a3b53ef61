"""What figures share: their look, the names and colours of states and layers, panels."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.figures import layer_colors


def panels_in_a_row(count: int) -> tuple[Figure, np.ndarray]:
    """Panels side by side that share their vertical axis, with room for a legend."""
    width = 8.0 if count == 1 else 2.0 + 2.8 * count
    figure, axes = plt.subplots(
        1, count, figsize=(width, 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    return figure, axes[0]


def panel_grid(
    panels: int,
    columns: int,
    *,
    size: tuple[float, float] = (2.6, 2.1),
    margin: tuple[float, float] = (2.2, 0.8),
    **sharing: bool,
) -> Figure:
    """Panels in rows, no more than there are; ``figure.axes`` has them in reading order.

    Args:
        panels: how many.
        columns: in a row, at most.
        size: width and height of a panel, inches.
        margin: width and height of what is around them.
        **sharing: ``sharex``, ``sharey``.
    """
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    inches = (size[0] * columns + margin[0], size[1] * rows + margin[1])
    figure, axes = plt.subplots(
        rows, columns, figsize=inches, squeeze=False, layout="constrained", **sharing
    )
    for ax in axes.flat[panels:]:
        ax.remove()
    return figure


def layer_colours(table: pd.DataFrame) -> dict[int, tuple[float, float, float]]:
    """A colour for each layer in a table, from the first to the last."""
    return layer_colors(table["layer"].unique().tolist())


def threshold_line(ax: Axes, threshold: float) -> None:
    """A dashed horizontal line where activations become massive."""
    ax.axhline(threshold, color="black", ls="--", lw=1, label=f"threshold {threshold:g}")


def seed_band(ax: Axes, by_seed: pd.DataFrame, colour: object, label: str, **look: object) -> None:
    """The median over seeds as a line, in a band from the least to the greatest.

    Args:
        ax: where to draw.
        by_seed: values, a row per place on the horizontal axis and a column per seed.
        colour: of both.
        label: of the line.
        **look: of the line.
    """
    look = dict(color=colour, lw=1.4, label=label) | look
    ax.plot(by_seed.index, by_seed.median(axis=1), **look)
    band = dict(color=colour, alpha=0.2, lw=0)
    ax.fill_between(by_seed.index, by_seed.min(axis=1), by_seed.max(axis=1), **band)


def seed_means(ax: Axes, values: pd.Series, colour: object, label: str) -> None:
    """Means over seeds, joined, with bars from the least to the greatest.

    Args:
        ax: where to draw.
        values: their index is the place on the horizontal axis, the same for all seeds.
        colour: of line and bars.
        label: of the line.
    """
    found = values.groupby(level=0).agg(["mean", "min", "max"])
    ends = [found["mean"] - found["min"], found["max"] - found["mean"]]
    ends = [end.clip(lower=0) for end in ends]  # a mean of equals may be off by an ulp
    look = dict(color=colour, lw=1.3, marker="o", ms=3.5, capsize=2)
    ax.errorbar(found.index, found["mean"], yerr=ends, label=label, **look)


def legend_once(figure: Figure, *, last: Sequence[str] = (), **where: object) -> None:
    """One legend of a figure for what is labelled in any of its panels.

    Args:
        figure: with its panels drawn.
        last: labels that come after all others.
        **where: of ``Figure.legend``.
    """
    labelled = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    order = sorted(labelled, key=lambda label: label in last)
    figure.legend([labelled[label] for label in order], order, **where)
