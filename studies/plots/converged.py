"""A run to the end of its schedule: before and after the learning rate falls, and its errors."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mapkg.measures import MASSIVE_RATIO
from studies.figures import STATE_COLORS
from studies.plots.style import legend_once, panel_grid

PHASE_COLOURS = {"high": STATE_COLORS["base"], "last": STATE_COLORS["best"]}
PHASES = {"high": "before the rate is halved", "last": "end of training"}


def seeds_before_and_after(counted: pd.DataFrame, seeds: int) -> Figure:
    """In how many seeds each layer has a measure, before and after the rate falls.

    Args:
        counted: of ``experiments.converged.seeds_by_layer``; a panel per measure.
        seeds: how many there are.
    """
    measures = counted.index.unique("measure")
    figure = panel_grid(len(measures), 4, size=(2.5, 2.0), sharex=True, sharey=True)
    layers = [name for name in counted.columns if isinstance(name, int)]
    marks = {"high": dict(marker="o", mfc="white", ms=8), "last": dict(marker="s", ms=4)}
    for number, (ax, measure) in enumerate(zip(figure.axes, measures, strict=True)):
        before, after = (counted.loc[(measure, state), layers] for state in PHASES)
        ax.vlines(layers, before, after, color="0.7", lw=1.5, zorder=1)
        for state, values in (("high", before), ("last", after)):
            look = dict(color=PHASE_COLOURS[state], ls="none", label=PHASES[state])
            ax.plot(layers, values, **look, **marks[state], clip_on=False)
        ax.set_title(measure, fontsize="small")
        ax.set(ylim=(0, seeds), xticks=layers, yticks=range(0, seeds + 1, 4))
        if number % 4 == 0:
            ax.set_ylabel(f"seeds of {seeds}")
        if number + 4 >= len(measures):
            ax.set_xlabel("layer")
        ax.tick_params(labelbottom=True)
    legend_once(figure, loc="outside lower center", ncols=2)
    return figure


def through_schedule(
    table: pd.DataFrame, layers: Sequence[int], values: Mapping[str, str]
) -> Figure:
    """Statistics of some layers through training, a line per seed, apart by phase.

    Args:
        table: of ``experiments.converged.read_converged``.
        layers: a column of panels each.
        values: columns of the table, with the label of their axis; a row of panels each.
    """
    figure, axes = plt.subplots(
        len(values),
        len(layers),
        figsize=(1.5 + 2.6 * len(layers), 0.8 + 2.1 * len(values)),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, (value, title) in zip(axes, values.items(), strict=True):
        for ax, layer in zip(row, layers, strict=True):
            for _, seed in table[table["layer"] == layer].groupby("seed"):
                last_high = seed.loc[seed["state"] == "high", "epoch"].item()
                parts = {"high": seed["epoch"] <= last_high, "last": seed["epoch"] >= last_high}
                for state, rows in parts.items():
                    look = dict(color=PHASE_COLOURS[state], lw=1, alpha=0.8)
                    look |= dict(ls="--" if state == "high" else "-", label=PHASES[state])
                    ax.plot(seed.loc[rows, "epoch"], seed.loc[rows, value], **look)
            if value == "max_ratio":
                ax.set_yscale("log")
                ax.axhline(MASSIVE_RATIO, color="black", ls=":", lw=1)
            if ax in axes[0]:
                ax.set_title(f"layer {layer}")
            if ax in axes[-1]:
                ax.set_xlabel("epoch")
        row[0].set_ylabel(title)
    labels = {"high": PHASES["high"], "last": "after the first halving"}
    handles, _ = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[:2], labels.values(), loc="outside lower center", ncols=2)
    return figure


def beside_anchor(last: pd.DataFrame, anchor: Mapping[str, Any]) -> Figure:
    """Error and length of each seed's training beside the mean of a published run.

    Args:
        last: columns ``epoch``, ``train`` and ``test``, a row per seed.
        anchor: ``train`` and ``test``, mean and deviation, and ``epochs``.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8.0, 3.2), layout="constrained")
    for ax, split in zip(axes, ("test", "train"), strict=True):
        mean, deviation = anchor[split]
        ax.plot(last["epoch"], last[split], "s", color=PHASE_COLOURS["last"], label="a seed, here")
        look = dict(color="black", marker="D", ls="none", capsize=3)
        label = "published, mean and deviation"
        ax.errorbar(anchor["epochs"], mean, yerr=deviation, label=label, **look)
        ax.set(xlabel="last epoch", ylabel=f"{split} MAE at the last epoch")
        ax.xaxis.set_major_locator(MaxNLocator(5))
    legend_once(figure, loc="outside lower center", ncols=2)
    return figure
