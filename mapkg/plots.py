"""Figures: from tidy tables to matplotlib Axes, one function per figure."""

import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rdkit import Chem
from rdkit.Chem.Draw import rdMolDraw2D
from torch import Tensor

from mapkg.detection import MASSIVE_RATIO

LAYER_PALETTE = "viridis"


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


def molecule(
    graph_molecule: Chem.Mol,
    ax: Axes,
    *,
    atom_notes: Sequence[str] | None = None,
    bond_notes: Sequence[str] | None = None,
) -> Axes:
    """Draw a molecule, kekulised, with a note at each atom and bond if given.

    Args:
        graph_molecule: as ``data.to_molecule`` returns it.
        ax: where to draw.
        atom_notes: one text per atom, in its order.
        bond_notes: one text per bond, in its order.
    """
    drawn = Chem.Mol(graph_molecule)
    Chem.Kekulize(drawn, clearAromaticFlags=True)
    for notes, parts in ((atom_notes, drawn.GetAtoms()), (bond_notes, drawn.GetBonds())):
        key = "atomNote" if notes is atom_notes else "bondNote"
        for note, part in zip(notes or (), parts, strict=notes is not None):
            part.SetProp(key, note)
    canvas = rdMolDraw2D.MolDraw2DCairo(900, 600)
    options = canvas.drawOptions()
    options.annotationFontScale = 0.7
    if atom_notes is not None:
        options.useBWAtomPalette()
    options.prepareMolsBeforeDrawing = False
    rdMolDraw2D.PrepareMolForDrawing(drawn, kekulize=True)
    canvas.DrawMolecule(drawn)
    canvas.FinishDrawing()
    ax.imshow(plt.imread(io.BytesIO(canvas.GetDrawingText())))
    ax.set_axis_off()
    return ax


def type_counts(counts: pd.DataFrame, ax: Axes, *, x: str, hue: str | None = None) -> Axes:
    """Bars of how often each type occurs, on a logarithmic axis.

    Args:
        counts: columns ``x``, ``count`` and, if given, ``hue``.
        ax: where to draw.
        x: column of the type.
        hue: column to tell bars apart by.
    """
    sns.barplot(counts, x=x, y="count", hue=hue, ax=ax)
    ax.set_yscale("log")
    for container in ax.containers:
        ax.bar_label(container, fmt="{:,.0f}", fontsize="x-small", padding=1)
    return ax


def base_against_trained(
    graph_maxima: pd.DataFrame,
    *,
    trained: str = "best",
    threshold: float = MASSIVE_RATIO,
    by: str = "seed",
) -> Figure:
    """Figure A of the massive-activations paper: each graph's largest ratio, graphs in rank order.

    Graphs are sorted by their largest ratio, per layer. The untrained network is a band from
    the least to the greatest value of all its layers and graphs, drawn with BatchNorm
    statistics at 0 and 1 (as published) and calibrated on training data. The trained network
    is one line per layer.

    Args:
        graph_maxima: the table of ``experiments.Emergence``.
        trained: which state to draw as lines, ``"best"`` or ``"last"``.
        threshold: where the line of massive activations is drawn.
        by: column that tells the panels apart.
    """
    panels = sorted(graph_maxima[by].unique())
    figure, axes = _panels(len(panels))
    colours = _layer_colours(graph_maxima)
    for ax, panel in zip(axes, panels, strict=True):
        table = graph_maxima[graph_maxima[by] == panel]
        for state in ("base", "base_calibrated"):
            values = table.loc[table["state"] == state, "max_ratio"]
            look = dict(color=_STATE_COLOURS[state], alpha=0.25, lw=0, label=_STATES[state])
            ax.axhspan(values.min(), values.max(), **look)
        for layer, lines in table[table["state"] == trained].groupby("layer"):
            values = np.sort(lines["max_ratio"].dropna())
            ax.plot(
                np.arange(1, len(values) + 1), values, color=colours[layer], label=f"layer {layer}"
            )
        _threshold_line(ax, threshold)
        ax.set(yscale="log", title=f"{by} {panel}", xlabel="test graph, by rank")
    axes[0].set_ylabel("largest activation ratio in the graph")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right center")
    return figure


def trajectory(
    table: pd.DataFrame, *, y: str = "max_ratio", threshold: float | None = MASSIVE_RATIO
) -> Figure:
    """A statistic of each layer after each observed epoch, one panel per seed.

    Args:
        table: the trajectory of ``experiments.Emergence``.
        y: which statistic.
        threshold: where a line is drawn; None draws none.
    """
    seeds = sorted(table["seed"].unique())
    figure, axes = _panels(len(seeds))
    for ax, seed in zip(axes, seeds, strict=True):
        for layer, colour in _layer_colours(table).items():
            line = table[(table["seed"] == seed) & (table["layer"] == layer)]
            ax.plot(line["epoch"], line[y], color=colour, label=f"layer {layer}", lw=1.3)
        if threshold is not None:
            _threshold_line(ax, threshold)
        ax.set(yscale="log", title=f"seed {seed}", xlabel="epoch")
    axes[0].set_ylabel(_LABELS.get(y, y.replace("_", " ")))
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right center")
    return figure


def by_layer(
    summary: pd.DataFrame,
    statistics: Sequence[str],
    *,
    states: Sequence[str] = ("base", "base_calibrated", "best"),
) -> Figure:
    """Statistics by layer and state, one panel each: the mean over seeds, each seed as a dot.

    Args:
        summary: the summary of ``experiments.Emergence``.
        statistics: its columns to show; magnitudes are on a logarithmic axis, shares are not.
        states: which states, in order.
    """
    figure, axes = plt.subplots(
        1, len(statistics), figsize=(3.4 * len(statistics), 3.4), layout="constrained"
    )
    for ax, y in zip(np.atleast_1d(axes), statistics, strict=True):
        for state in states:
            rows = summary[summary["state"] == state]
            colour = _STATE_COLOURS[state]
            mean = rows.groupby("layer")[y].mean()
            ax.plot(mean.index, mean, color=colour, lw=1.4, label=_STATES[state])
            ax.plot(rows["layer"], rows[y], "o", color=colour, ms=3.5, alpha=0.5, lw=0)
        ax.set(xlabel="layer", title=_LABELS.get(y, y.replace("_", " ")))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not y.startswith("share"):
            ax.set_yscale("log")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(states))
    return figure


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
        colour = _STATE_COLOURS[state]
        ax.step(bins["low"], bins["count"], where="post", color=colour, lw=1, label=_STATES[state])
    ax.axvline(-np.log10(MASSIVE_RATIO), color="black", ls="--", lw=1)
    ax.set(yscale="log", xlabel="$-\\log_{10}$ activation ratio", ylabel="activations")
    ax.legend()
    return ax


def row_maxima(
    values: dict[str, np.ndarray | Tensor], ax: Axes, *, threshold: float = MASSIVE_RATIO
) -> Axes:
    """Share of rows whose largest ratio exceeds each value, for several samples.

    Args:
        values: from label to the largest ratio of each row.
        ax: where to draw.
        threshold: where the line of massive activations is drawn.
    """
    for label, sample in values.items():
        sample = np.sort(np.asarray(sample))
        share = 1 - np.arange(len(sample)) / len(sample)
        ax.plot(sample, share, label=label, lw=1.3)
    ax.axvline(threshold, color="black", ls="--", lw=1, label=f"threshold {threshold:g}")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="largest activation ratio of the row, r",
        ylabel="share of rows above r",
    )
    ax.legend()
    return ax


def score_in_layer(ax: Axes) -> Axes:
    """Where the score sits in a GraphTransformer layer, as a diagram."""
    plain, watched = "white", "#FFE0B2"
    boxes = {
        "nodes": (0.07, 0.62, "node features\n$h_j,\\ h_i$", plain),
        "edges": (0.07, 0.22, "edge features\n$e_{ji}$", plain),
        "value": (0.28, 0.90, "value\n$V_j$", plain),
        "key_query": (
            0.28,
            0.62,
            "key of source, query of target\n$K_j \\odot Q_i\\,/\\sqrt{d}$",
            plain,
        ),
        "gate": (0.28, 0.22, "edge gate\n$E_{ji}$", plain),
        "score": (0.50, 0.42, "score\n$s_{ji}$  [E, D]", watched),
        "weight": (0.67, 0.62, "sum per head, clamp,\nexp, normalise: $\\alpha_{ji}$", plain),
        "attended": (0.81, 0.90, "attended\n$o_i = \\sum_j \\alpha_{ji} V_j$  [N, D]", watched),
        "node_block": (0.96, 0.62, "node block\n$h_i'$", plain),
        "edge_block": (0.96, 0.22, "edge block\n$e_{ji}'$", plain),
    }
    arrows = [
        *(("nodes", "value"), ("nodes", "key_query"), ("edges", "gate")),
        *(("key_query", "score"), ("gate", "score"), ("score", "weight"), ("score", "edge_block")),
        *(("value", "attended"), ("weight", "attended"), ("attended", "node_block")),
    ]
    look = dict(boxstyle="round,pad=0.5", edgecolor="#444444")
    texts = {
        name: ax.text(
            x, y, text, ha="center", va="center", fontsize=10, bbox=dict(facecolor=colour, **look)
        )
        for name, (x, y, text, colour) in boxes.items()
    }
    for start, end in arrows:
        ax.annotate(
            "",
            xy=boxes[end][:2],
            xytext=boxes[start][:2],
            arrowprops=dict(
                arrowstyle="-|>",
                color="#444444",
                patchA=texts[start].get_bbox_patch(),
                patchB=texts[end].get_bbox_patch(),
                shrinkA=3,
                shrinkB=3,
            ),
        )
    ax.set(xlim=(0, 1.03), ylim=(0.1, 1.0))
    ax.set_axis_off()
    return ax


_STATES = {
    "base": "untrained, as published",
    "base_calibrated": "untrained, BatchNorm calibrated",
    "best": "trained, best validation epoch",
    "last": "trained, last epoch",
}
_STATE_COLOURS = {
    "base": "#EB6123",
    "base_calibrated": "#7A7A7A",
    "best": "#51288C",
    "last": "#2A9D8F",
}
_LABELS = {
    "max_ratio": "largest activation ratio",
    "max_abs": "largest |score|",
    "row_median_q50": "typical row median of |score|",
    "share_rows_with_massive": "share of edges with an MA",
    "share_saturated": "share of head sums beyond the clamp",
}


def _panels(count: int) -> tuple[Figure, np.ndarray]:
    """Panels side by side that share their vertical axis, with room for a legend."""
    width = 8.0 if count == 1 else 2.0 + 2.8 * count
    figure, axes = plt.subplots(
        1, count, figsize=(width, 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    return figure, axes[0]


def _layer_colours(table: pd.DataFrame) -> dict[int, tuple[float, float, float]]:
    layers = sorted(table["layer"].unique().tolist())
    return dict(zip(layers, sns.color_palette(LAYER_PALETTE, len(layers)), strict=True))


def _threshold_line(ax: Axes, threshold: float) -> None:
    ax.axhline(threshold, color="black", ls="--", lw=1, label=f"threshold {threshold:g}")
