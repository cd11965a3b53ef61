"""Features and errors that become alike, and what that does to training."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from torch import Tensor

from studies.plots.style import panel_grid, seed_band

FEATURES, ERRORS = "features", "errors"
_TITLES = {FEATURES: "features, forward", ERRORS: "errors, backward"}


def spread_by_layer(
    tables: Mapping[str, pd.DataFrame], *, columns: tuple[str, str] = (FEATURES, ERRORS)
) -> Figure:
    """Relative spreads of features and of errors by layer, a line per network.

    A line is the median over seeds, in a band from the least to the greatest; spreads of exactly
    zero are left out.

    Args:
        tables: of ``experiments.backward_smoothing.smoothing`` by title.
        columns: for features and for errors.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True, layout="constrained")
    colours = sns.color_palette("colorblind", len(tables))
    for ax, column, title in zip(axes, columns, _TITLES.values(), strict=True):
        for (name, table), colour in zip(tables.items(), colours, strict=True):
            _band(ax, table[table[column] > 0], "layer", column, colour, name)
        ax.set(yscale="log", title=title, xlabel="layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("relative spread over nodes")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def collapse(matrices: Mapping[str, Mapping[int, Tensor]], *, nodes: int = 40) -> Figure:
    """Features and errors as pictures, a row of them for each, a column per layer.

    A picture has a row per node and a column per channel; once all nodes are alike it is striped.

    Args:
        matrices: of ``experiments.backward_smoothing.layer_matrices``.
        nodes: how many are shown.
    """
    layers = list(next(iter(matrices.values())))
    figure, axes = plt.subplots(
        len(matrices),
        len(layers),
        figsize=(0.8 + 1.35 * len(layers), 0.5 + 1.35 * len(matrices)),
        layout="constrained",
        squeeze=False,
    )
    for number, (kind, of_layer) in enumerate(matrices.items()):
        for ax, layer in zip(axes[number], layers, strict=True):
            picture = of_layer[layer][:nodes].numpy()
            ax.imshow(picture, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="none")
            ax.set(xticks=[], yticks=[])
            if number == 0:
                ax.set_title(f"layer {layer}")
        axes[number, 0].set_ylabel(_TITLES[kind])
    return figure


def last_layer_gradients(table: pd.DataFrame) -> Figure:
    """The gradient of hidden layers before and after the last layer is trained, by depth.

    Args:
        table: of ``experiments.backward_smoothing.last_layer_study``.
    """
    variants = list(table["variant"].unique())
    figure, axes = plt.subplots(
        1,
        len(variants),
        figsize=(1.0 + 2.6 * len(variants), 3.0),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, variant in zip(axes[0], variants, strict=True):
        rows = table[table["variant"] == variant]
        for column, colour in (("before", "#8D99AE"), ("after", "#E76F51")):
            _band(ax, rows, "num_layers", column, colour, column, marker="o")
        ax.set(xscale="log", yscale="log", title=variant, xlabel="hidden layers")
        depths = sorted(rows["num_layers"].unique())
        ax.set_xticks(depths, [str(depth) for depth in depths])
        ax.minorticks_off()
    axes[0, 0].set_ylabel("gradient of hidden layers")
    axes[0, 0].legend()
    return figure


def losses_in_training(table: pd.DataFrame, *, bottom: float = 1e-3) -> Figure:
    """Training loss over that of the best constant, by step; a panel per network.

    Args:
        table: of ``experiments.backward_smoothing.full_training``.
        bottom: the smallest share that is shown; what is below is cut.
    """
    variants = list(table["variant"].unique())
    depths = sorted(table["num_layers"].unique())
    colours = dict(zip(depths, sns.color_palette("viridis", len(depths)), strict=True))
    figure = panel_grid(
        len(variants), len(variants), size=(3.4, 3.2), margin=(1.2, 0.0), sharey=True
    )
    axes = figure.axes
    shares = table.assign(share=table["loss"] / table["constant_loss"])
    for ax, variant in zip(axes, variants, strict=True):
        for depth, rows in shares[shares["variant"] == variant].groupby("num_layers"):
            _band(ax, rows, "step", "share", colours[depth], f"{depth}")
        ax.axhline(1, color="black", lw=0.8, ls=":")
        ax.set(yscale="log", title=variant, xlabel="step")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylim(bottom=max(axes[0].get_ylim()[0], bottom))
    axes[0].set_ylabel("loss over that of a constant")
    axes[-1].legend(title="hidden layers", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _band(
    ax: Axes, rows: pd.DataFrame, x: str, y: str, colour: object, label: str, **look: object
) -> None:
    by_seed = rows.groupby([x, "seed"])[y].first().unstack()
    seed_band(ax, by_seed, colour, label, ms=4, **look)
