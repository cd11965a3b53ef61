"""Figures: their look, and lines over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.ticker import MaxNLocator

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
    color: str | None = None,
    panel: str | None = None,
    columns: int = 4,
    log: str = "",
    threshold: float | None = None,
    labels: Mapping[str, str] = LABELS,
    size: tuple[float, float] = (2.6, 2.1),
    estimator: str = "median",
    sharing: Mapping[str, bool | str] | None = None,
    **look: Any,
) -> sns.FacetGrid:
    """A line over seeds, in a band from the least to the greatest, a panel for each group.

    Args:
        table: a row per place on the horizontal axis, group and seed.
        x, y: its columns that are drawn.
        color: the column that tells lines apart.
        panel: the column that tells panels apart.
        columns: panels in a row, at most.
        log: which axes are logarithmic, ``"y"`` or ``"xy"``.
        threshold: where a dashed line says that activations are massive; None draws none.
        labels: what axes say in place of a column's name.
        size: width and height of a panel, inches.
        estimator: of the line, ``"median"`` or ``"mean"``.
        sharing: ``sharex`` and ``sharey``, see seaborn's ``FacetGrid``.
        **look: of seaborn's ``relplot``, ``palette`` for example.
    """
    look = dict(marker="o", ms=3.5, lw=1.3) | look
    grid = sns.relplot(
        table,
        kind="line",
        x=x,
        y=y,
        hue=color,
        col=panel,
        col_wrap=min(columns, table[panel].nunique()) if panel else None,
        height=size[1],
        aspect=size[0] / size[1],
        estimator=estimator,
        errorbar=("pi", 100),
        facet_kws=dict(sharing or {}),
        **look,
    )
    grid.set_titles("{col_name}")
    grid.set_axis_labels(labels.get(x, x.replace("_", " ")), labels.get(y, y.replace("_", " ")))
    for axis in log:
        grid.set(**{f"{axis}scale": "log"})
    if threshold is not None:
        grid.refline(y=threshold, **THRESHOLD_LOOK)
    if grid.legend is not None:
        grid.legend.set_title(None)
    return grid


def layer_colors(layers: Sequence[int]) -> dict[int, tuple[float, float, float]]:
    """A color for each layer, from the first to the last."""
    ordered = sorted(set(layers))
    return dict(zip(ordered, sns.color_palette("viridis", len(ordered)), strict=True))


def whole_ticks(grid: sns.FacetGrid, axes: str = "x", number: int = 6) -> None:
    """Ticks at whole numbers, for layers and steps, no more than about so many."""
    for ax in grid.axes.flat:
        for axis in axes:
            getattr(ax, f"{axis}axis").set_major_locator(MaxNLocator(number, integer=True))
