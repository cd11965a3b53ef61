"""How ratios are distributed, and the laws fitted to them."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mapkg.measures import MASSIVE_RATIO
from studies.figures import STATE_COLORS, STATES
from studies.laws import fit_law, histogram_from_table

_LINE_STYLES = ("-", ":", "-.", "--", (0, (5, 5)))  # as many as there are laws


def ratio_distribution(
    histogram: pd.DataFrame, ax: Axes, *, states: Sequence[str] = ("base", "best")
) -> Axes:
    """Distribution of -log10 ratio over all activations of a layer, as in the paper's figure B.

    Args:
        histogram: rows of one layer and seed of the histogram of ``experiments.Emergence``.
        ax: where to draw.
        states: which states, in order.
    """
    for state in states:
        bins = histogram[histogram["state"] == state]
        colour = STATE_COLORS[state]
        ax.step(bins["low"], bins["count"], where="post", color=colour, lw=1, label=STATES[state])
    ax.axvline(-np.log10(MASSIVE_RATIO), color="black", ls="--", lw=1)
    ax.set(yscale="log", xlabel="$-\\log_{10}$ activation ratio", ylabel="activations")
    ax.legend()
    return ax


def fitted_distribution(
    histogram: pd.DataFrame, ax: Axes, *, state: str, laws: Sequence[str] = ("gamma",)
) -> Axes:
    """Figure B of the massive-activations paper: a distribution of ratios and laws fitted to it.

    The mean log-likelihood and the Kolmogorov-Smirnov distance of the first law are noted.

    Args:
        histogram: rows of one layer, seed and state of the histogram of
            ``experiments.Emergence``.
        ax: where to draw.
        state: which state these rows are of; it gives the colour.
        laws: which laws, see ``laws.LAWS``.
    """
    counted = histogram_from_table(histogram)  # with the empty bins, which the table leaves out
    first, last = histogram["bin"].min(), histogram["bin"].max() + 1
    counts = counted.counts[first:last].numpy()
    edges = counted.edges[first : last + 1].numpy()
    ax.stairs(counts, edges, fill=True, color=STATE_COLORS[state], alpha=0.8)
    width = (counted.high - counted.low) / counted.bins
    y = np.linspace(edges[0], edges[-1], 500)
    fits = [fit_law(counted, law) for law in laws]
    for fit, style in zip(fits, _LINE_STYLES, strict=False):
        curve = fit.pdf(y) * fit.num_values * width
        ax.plot(y, curve, color="black", ls=style, lw=1, label=fit.law)
    ax.axvline(-np.log10(MASSIVE_RATIO), color="black", ls="--", lw=1)
    ax.set(yscale="log", xlabel="$-\\log_{10}$ activation ratio", ylabel="activations")
    ax.set_ylim(bottom=0.5, top=10 * histogram["count"].max())
    ax.label_outer()
    note = f"KS {fits[0].ks.statistic:.3f}\nlog-lik. {fits[0].log_likelihood:.2f}"
    ax.text(0.97, 0.95, note, transform=ax.transAxes, ha="right", va="top", fontsize="small")
    return ax


def distribution_grid(
    histogram: pd.DataFrame,
    *,
    states: Sequence[str] = ("base", "best"),
    columns: int = 5,
    laws: Sequence[str] = ("gamma",),
) -> Figure:
    """Figure B for all layers of one network: the panels of one state, then those of the next.

    Args:
        histogram: rows of one run and seed of the histogram of ``experiments.Emergence``.
        states: which states, from top to bottom.
        columns: panels in a row.
        laws: which laws are fitted to each.

    Raises:
        ValueError: if a state is not among the rows.
    """
    there = histogram["state"].unique()
    missing = [state for state in states if state not in there]
    if missing:
        raise ValueError(f"no histogram of {', '.join(missing)}; there are {', '.join(there)}")
    layers = sorted(histogram["layer"].unique())
    columns = min(columns, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure, axes = plt.subplots(
        rows * len(states),
        columns,
        figsize=(1.9 * columns + 0.5, 1.75 * rows * len(states) + 0.6),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for number, state in enumerate(states):
        panels = axes[rows * number : rows * (number + 1)].ravel()
        for layer, ax in zip(layers, panels, strict=False):
            bins = histogram[(histogram["layer"] == layer) & (histogram["state"] == state)]
            fitted_distribution(bins, ax, state=state, laws=laws)
            ax.set(title=f"layer {layer}, {state}", xlabel="", ylabel="")
        for ax in panels[len(layers) :]:
            ax.remove()
    figure.supxlabel("$-\\log_{10}$ activation ratio", fontsize="medium")
    figure.supylabel("activations", fontsize="medium")
    return figure
