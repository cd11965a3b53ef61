"""Molecules, and how often their types occur."""

import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from rdkit import Chem
from rdkit.Chem.Draw import rdMolDraw2D


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
