"""What figures share: their look, the names and colours of states and layers, panels."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LAYER_PALETTE = "viridis"

STATES = {
    "base": "untrained, as published",
    "base_calibrated": "untrained, BatchNorm calibrated",
    "best": "trained, best validation epoch",
    "last": "trained, last epoch",
}
STATE_COLOURS = {
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
    layers = sorted(table["layer"].unique().tolist())
    return dict(zip(layers, sns.color_palette(LAYER_PALETTE, len(layers)), strict=True))


def threshold_line(ax: Axes, threshold: float) -> None:
    """A dashed horizontal line where activations become massive."""
    ax.axhline(threshold, color="black", ls="--", lw=1, label=f"threshold {threshold:g}")
