"""Networks with something against massive activations beside each other, and under attack."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, NullFormatter

from mapkg.measures import MASSIVE_RATIO
from studies.plots.style import panel_grid

TERM_COLOURS = {False: "#264653", True: "#E76F51"}
"""Without and with a term."""


def arms(
    late: pd.DataFrame, values: Mapping[str, str], *, logarithmic: Sequence[str] = ()
) -> Figure:
    """Values of networks with different remedies, a row of panels per architecture.

    Every seed is a dot; a line is at the mean over seeds, the geometric one on a logarithmic
    axis.

    Args:
        late: columns ``label`` (architecture), ``run`` (remedy), ``seed`` and those of
            ``values``.
        values: columns to draw, with the label of their axis.
        logarithmic: which of them have a logarithmic axis.
    """
    labels, runs = late["label"].unique(), list(late["run"].unique())
    colours = dict(zip(runs, sns.color_palette("colorblind", len(runs)), strict=True))
    figure, axes = plt.subplots(
        len(labels),
        len(values),
        figsize=(2.0 + 2.0 * len(values), 0.6 + (0.5 + 0.22 * len(runs)) * len(labels)),
        sharex="col",
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for number, (row, label) in enumerate(zip(axes, labels, strict=True)):
        for ax, (value, title) in zip(row, values.items(), strict=True):
            for place, run in enumerate(runs):
                found = late.loc[(late["label"] == label) & (late["run"] == run), value]
                if found.empty:
                    continue
                is_log = value in logarithmic
                mean = np.exp(np.log(found).mean()) if is_log else found.mean()
                ax.plot(found, [place] * len(found), "o", ms=4, alpha=0.8, color=colours[run])
                ax.plot([mean] * 2, [place - 0.35, place + 0.35], lw=1.5, color=colours[run])
            if value in logarithmic:
                ax.set_xscale("log")
            if value in ("max_ratio", "largest"):
                ax.axvline(MASSIVE_RATIO, color="black", ls="--", lw=1)
            if number == len(labels) - 1:
                ax.set_xlabel(title)
        row[0].set_yticks(range(len(runs)), runs)
        row[0].set_ylabel(label)
    for ax, value in zip(axes[-1], values, strict=True):
        if value in logarithmic:  # often less than a decade; of more than two, labels have no room
            low, high = ax.get_xlim()
            ax.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 3)))
            powers = high > 10_000 * low  # of ten, beside which 10000 and 1e+06 would read badly
            ax.xaxis.set_major_formatter(LogFormatterSciNotation() if powers else "{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].invert_yaxis()  # shared by all
    return figure


def with_and_without_term(table: pd.DataFrame, *, panel: str = "label") -> Figure:
    """Ratio, magnitude and median of the scores of each layer, without a term and with one.

    Args:
        table: of ``experiments.explicit_bias.idle_term``, with a column ``seed`` if there are
            several.
        panel: column whose values are the rows of panels, if there is such a column.
    """
    values = {
        "max_ratio": "largest ratio",
        "max_abs": "largest |s|",
        "row_median_q50": "typical median |s|",
    }
    groups = dict(list(table.groupby(panel, sort=False))) if panel in table else {"": table}
    figure, axes = plt.subplots(
        len(groups),
        len(values),
        figsize=(8.2, 0.9 + 1.9 * len(groups)),
        sharex=True,
        sharey="col",
        squeeze=False,
        layout="constrained",
    )
    for number, (row, title) in enumerate(zip(axes, groups, strict=True)):
        of_panel = groups[title]
        for ax, (value, name) in zip(row, values.items(), strict=True):
            by = ["term"] + (["seed"] if "seed" in of_panel else [])
            for key, lines in of_panel.groupby(by):
                colour = TERM_COLOURS[bool(key[0])]
                ax.plot(lines["layer"], lines[value], color=colour, lw=1.2, marker=".", ms=4)
            ax.set(yscale="log")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            if value == "max_ratio":
                ax.axhline(MASSIVE_RATIO, color="black", ls="--", lw=1)
            if number == 0:
                ax.set_title(name)
            if number == len(groups) - 1:
                ax.set_xlabel("layer")
        row[0].set_ylabel(title)
    lines = [Line2D([], [], color=colour) for colour in TERM_COLOURS.values()]
    names = ("without the term", "with it")
    figure.legend(lines, names, loc="outside lower center", ncols=2)
    return figure


def losses_under_attack(
    damage: pd.DataFrame, *, runs: Sequence[str] = (), columns: int = 3
) -> Figure:
    """The loss under noise of each size, a panel per network, a colour per remedy.

    A line is the geometric mean over seeds, in a band from the least to the greatest: dashed for
    random noise, solid for optimised noise; a dotted line is the loss without noise.

    Args:
        damage: of ``experiments.robustness.damage``, of one kind of noise.
        runs: the remedies that come first, in this order; the others follow as they come.
        columns: panels in a row.
    """
    labels, found = list(damage["label"].unique()), list(damage["run"].unique())
    every = [*dict.fromkeys(run for run in (*runs, *found) if run in found)]
    colours = dict(zip(every, sns.color_palette("colorblind", len(every)), strict=True))
    figure = panel_grid(len(labels), columns, size=(2.5, 2.6), margin=(1.0, 1.0), sharey=True)
    for ax, label in zip(figure.axes, labels, strict=True):
        for (run,), losses in damage[damage["label"] == label].groupby(["run"], sort=False):
            clean = np.exp(np.log(losses["none"]).mean())
            ax.axhline(clean, color=colours[run], ls=":", lw=1)
            for noise, look in (("random", "--"), ("optimised", "-")):
                by_sigma = losses.groupby("sigma")[noise]
                mean = by_sigma.agg(lambda loss: np.exp(np.log(loss).mean()))
                ax.plot(mean.index, mean, look, color=colours[run], lw=1.4, marker=".", ms=5)
                band = dict(color=colours[run], alpha=0.15, lw=0)
                ax.fill_between(mean.index, by_sigma.min(), by_sigma.max(), **band)
        ax.set(xscale="log", yscale="log", title=label, xlabel=r"$\sigma$")
    figure.axes[0].set_ylabel("loss")
    entries = {run: Line2D([], [], color=colour) for run, colour in colours.items()}
    entries |= {"optimised noise": Line2D([], [], color="grey")}
    entries |= {"random noise": Line2D([], [], color="grey", ls="--")}
    entries |= {"no noise": Line2D([], [], color="grey", ls=":")}
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=4)
    return figure
