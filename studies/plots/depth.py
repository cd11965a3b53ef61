"""Lipschitz constants, gradients of deep networks, and what depth does to loss and accuracy."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from studies.plots.style import legend_once, panel_grid, seed_band, seed_means

RAW_COLOUR, NORMALISED_COLOUR = "#E76F51", "#264653"


def constants(table: pd.DataFrame) -> Figure:
    """Local constants of raw and normalised attention against the size of the input.

    Args:
        table: of ``experiments.lipschitz_constants.constants_against_scale``.
    """
    scores = list(table["score"].unique())
    figure, axes = plt.subplots(
        1,
        len(scores),
        figsize=(1.0 + 3.6 * len(scores), 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, score in zip(axes[0], scores, strict=True):
        for is_normalised, colour, name in (
            (False, RAW_COLOUR, "raw"),
            (True, NORMALISED_COLOUR, "normalised"),
        ):
            rows = table[(table["score"] == score) & (table["normalised"] == is_normalised)]
            ax.plot(rows["scale"], rows["constant"], "o-", ms=4, color=colour, label=name)
            look = dict(color=colour, ls=":", lw=1.2, label=f"{name}, lemma")
            ax.plot(rows["scale"], rows["lemma"], **look)
            if is_normalised:
                look = dict(color=colour, ls="--", lw=1.2, label="theorem")
                ax.plot(rows["scale"], rows["theorem"], **look)
        ax.set(xscale="log", yscale="log", title=f"{score} score", xlabel="size of the input")
    axes[0, 0].set_ylabel("largest local Lipschitz constant")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def gradient_heat(
    gradients: pd.DataFrame, *, kind: str = "weights", columns: int = 3, seed: int | None = None
) -> Figure:
    """Gradient norms of every layer after every step, a panel per variant.

    Args:
        gradients: of ``experiments.depth.gradient_evolution``.
        kind: ``"weights"`` or ``"attention"``.
        columns: panels in a row.
        seed: which one; None means the first.
    """
    rows = gradients[gradients["kind"] == kind]
    rows = rows[rows["seed"] == (rows["seed"].iloc[0] if seed is None else seed)]
    variants = list(rows["variant"].unique())
    figure = panel_grid(
        len(variants), columns, size=(3.0, 2.4), margin=(1.2, 0.6), sharex=True, sharey=True
    )
    axes = figure.axes
    finite = rows.loc[np.isfinite(rows["norm"]) & (rows["norm"] > 0), "norm"]
    norm = LogNorm(finite.min(), finite.max())
    for ax, variant in zip(axes, variants, strict=True):
        wide = rows[rows["variant"] == variant].pivot(index="layer", columns="epoch", values="norm")
        mesh = ax.pcolormesh(wide.columns, wide.index, wide, norm=norm, cmap="magma")
        ax.set_title(variant)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel("layer", fontsize="medium")
    figure.colorbar(mesh, ax=axes, label="norm of the gradient")
    return figure


def largest_gradients(gradients: pd.DataFrame, ax: Axes, *, kind: str = "weights") -> Axes:
    """The largest gradient norm of any layer against the step, with bands over seeds.

    A line is the median over seeds, in a band from the least to the greatest. It ends where a
    gradient is no longer finite.

    Args:
        gradients: of ``experiments.depth.gradient_evolution``.
        ax: where to draw.
        kind: ``"weights"`` or ``"attention"``.
    """
    rows = gradients[gradients["kind"] == kind]
    variants = list(rows["variant"].unique())
    for variant, colour in zip(variants, _colours(variants), strict=True):
        of_variant = rows[rows["variant"] == variant]
        largest = of_variant.groupby(["epoch", "seed"])["norm"].max().unstack()
        largest = largest[np.isfinite(largest).all(axis=1)]
        seed_band(ax, largest, colour, variant)
    ax.set(yscale="log", xlabel="step", ylabel="largest gradient norm of any layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def loss_by_depth(
    curves: pd.DataFrame,
    titles: Mapping[str, str] | None = None,
    *,
    columns: int = 4,
    top: float = 10.0,
) -> Figure:
    """Training losses, a panel per normalisation, a colour per number of layers.

    A line is the median over seeds, in a band from the least to the greatest.

    Args:
        curves: columns ``variant``, ``num_layers``, ``seed``, ``epoch`` and ``train_loss``.
        titles: from variant to the title of its panel, in reading order; None means all variants
            under their own names.
        columns: panels in a row.
        top: the largest loss that is shown; what is above is cut.
    """
    if titles is None:
        titles = {variant: variant for variant in curves["variant"].unique()}
    figure = panel_grid(
        len(titles), columns, size=(2.7, 2.3), margin=(1.2, 0.6), sharex=True, sharey=True
    )
    depths = sorted(curves["num_layers"].unique())
    colours = dict(zip(depths, sns.color_palette("viridis", len(depths)), strict=True))
    for ax, (variant, title) in zip(figure.axes, titles.items(), strict=True):
        of_variant = curves[curves["variant"] == variant]
        for depth, rows in of_variant.groupby("num_layers"):
            losses = rows.groupby(["epoch", "seed"])["train_loss"].first().unstack()
            seed_band(ax, losses, colours[depth], f"{depth} layer{'s' * (depth > 1)}", lw=1.2)
        ax.set(yscale="log", title=title)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    top = min(figure.axes[0].get_ylim()[1], top)
    figure.axes[0].set_ylim(top=top)
    figure.supxlabel("epoch", fontsize="medium")
    figure.supylabel("training loss", fontsize="medium")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    return figure


def by_depth(
    runs: pd.DataFrame,
    values: Sequence[str],
    titles: Mapping[str, str],
    *,
    panel: str = "panel",
    variants: Sequence[str] | None = None,
) -> Figure:
    """Values against the number of layers, a line per variant, a row of panels per value.

    A line is the mean over seeds; a bar goes from the least to the greatest.

    Args:
        runs: columns ``num_layers``, ``seed``, ``variant``, ``panel`` and those of ``values``.
        values: columns to draw.
        titles: from column to the label of its axis.
        panel: column whose values are the columns of panels.
        variants: colours are given out in this order, so that figures of some of them have the
            same colours; None means those of ``runs``.
    """
    panels = list(runs[panel].unique())
    variants = list(runs["variant"].unique()) if variants is None else variants
    colours = dict(zip(variants, _colours(variants), strict=True))
    figure, axes = plt.subplots(
        len(values),
        len(panels),
        figsize=(1.2 + 2.7 * len(panels), 0.8 + 2.4 * len(values)),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, value in zip(axes, values, strict=True):
        for ax, name in zip(row, panels, strict=True):
            for variant, rows in runs[runs[panel] == name].groupby("variant", sort=False):
                seed_means(ax, rows.set_index("num_layers")[value], colours[variant], variant)
        row[0].set_ylabel(titles[value])
    for ax, name in zip(axes[0], panels, strict=True):
        ax.set_title(name)
    for ax in axes[-1]:
        ax.set_xlabel("layers")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn = runs["variant"].nunique()
    legend_once(figure, loc="outside lower center", ncols=min(drawn, 2 * len(panels)))
    return figure


def _colours(names: Sequence[str]) -> list[tuple[float, float, float]]:
    return sns.color_palette("colorblind", len(names))
