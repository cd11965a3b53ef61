"""Tree-NeighborsMatch: an example, and how well it is learnt by depth."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from studies.plots.style import legend_once, panel_grid, seed_band, seed_means

ASKED_COLOUR, OTHER_COLOUR = "#E76F51", "#B8C4CC"
_PUBLISHED = dict(color="black", ls="--", lw=1.2, marker="D", ms=4, mfc="white", label="published")


def tree_example(pairs: Int[Tensor, "nodes 2"], ax: Axes) -> Axes:
    """One example, the way from the leaf that is asked for to the root in colour.

    Args:
        pairs: key and value of every node in **level order**, shape [nodes, 2].
        ax: where to draw.
    """
    nodes = len(pairs)
    depth = (nodes + 1).bit_length() - 2
    level = np.array([(place + 1).bit_length() - 1 for place in range(nodes)])
    inside = np.arange(nodes) - 2**level + 1
    x, y = (inside + 0.5) / 2**level, -level
    key = int(pairs[0, 0])
    place = 2**depth - 2 + key
    asked = {0}
    while place:
        asked.add(place)
        place = (place - 1) // 2
    for child in range(1, nodes):
        parent = (child - 1) // 2
        colour = ASKED_COLOUR if child in asked else OTHER_COLOUR
        look = dict(arrowstyle="->", color=colour, lw=1.6, shrinkA=11, shrinkB=11)
        ends = dict(xy=(x[parent], y[parent]), xytext=(x[child], y[child]))
        ax.annotate("", arrowprops=look, **ends)
    colours = [ASKED_COLOUR if place in asked else OTHER_COLOUR for place in range(nodes)]
    ax.scatter(x, y, s=420, c=colours, zorder=2)
    for place in range(nodes):
        own_key, value = pairs[place].tolist()
        text = "" if not own_key else f"{own_key}, ?" if not place else f"{own_key}, {value}"
        ax.text(x[place], y[place], text, ha="center", va="center", fontsize=8)
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(-depth - 0.4, 0.4))
    return ax


def tree_accuracy(
    runs: pd.DataFrame, published: Mapping[str, Sequence[float]], *, value: str = "best"
) -> Figure:
    """Accuracy against the depth of the tree, a panel per architecture, a line per norm.

    A line is the mean over seeds; a bar goes from the least to the greatest.

    Args:
        runs: of ``experiments.trees.read_trees``.
        published: accuracies from depth 2 on by architecture, empty where there are none.
        value: column to draw.
    """
    panels, variants = list(runs["panel"].unique()), list(runs["variant"].unique())
    colours = dict(zip(variants, sns.color_palette("colorblind", len(variants)), strict=True))
    size, margin = (2.5, 2.6), (1.2, 0.9)
    figure = panel_grid(
        len(panels), len(panels), size=size, margin=margin, sharex=True, sharey=True
    )
    depths = sorted(runs["depth"].unique())
    for ax, panel in zip(figure.axes, panels, strict=True):
        of_panel = runs[runs["panel"] == panel]
        for variant, rows in of_panel.groupby("variant", sort=False):
            seed_means(ax, rows.set_index("depth")[value], colours[variant], variant)
        known = dict(enumerate(published.get(of_panel["architecture"].iloc[0], ()), start=2))
        known = {depth: known[depth] for depth in depths if depth in known}
        if known:
            ax.plot(list(known), list(known.values()), zorder=3, **_PUBLISHED)
        chance = [1 / 2**depth for depth in depths]
        ax.plot(depths, chance, color="grey", ls=":", lw=1.2, label="chance")
        ax.set(title=panel, xlabel="depth of the tree", xticks=depths, ylim=(0, 1.05))
    figure.axes[0].set_ylabel("accuracy")
    last = ("published", "chance")
    legend_once(figure, last=last, loc="outside lower center", ncols=4)
    return figure


def tree_curves(curves: pd.DataFrame, *, columns: int = 4) -> Figure:
    """Training accuracy against passes over the examples, a panel per architecture.

    A line is the median over seeds, in a band from the least to the greatest; it ends where the
    first seed's training ends.

    Args:
        curves: of ``experiments.trees.read_trees``, of one depth.
        columns: panels in a row.
    """
    panels, variants = list(curves["panel"].unique()), list(curves["variant"].unique())
    colours = dict(zip(variants, sns.color_palette("colorblind", len(variants)), strict=True))
    figure = panel_grid(
        len(panels), columns, size=(2.6, 2.4), margin=(3.0, 0.5), sharex=True, sharey=True
    )
    for ax, panel in zip(figure.axes, panels, strict=True):
        rows = curves[curves["panel"] == panel]
        for variant, own in rows.groupby("variant", sort=False):
            wide = own.pivot(index="passes", columns="seed", values="train_accuracy").dropna()
            seed_band(ax, wide, colours[variant], variant)
        ax.set(title=panel, ylim=(0, 1.05))
    figure.supxlabel("passes over the training examples", fontsize="medium")
    figure.supylabel("training accuracy", fontsize="medium")
    legend_once(figure, loc="outside right upper")
    return figure
