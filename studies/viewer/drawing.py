"""Drawings of molecules, also with bonds colored by a ratio, as HTML with nothing to load."""

import html
import io
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from xml.etree import ElementTree

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from rdkit import Chem
from rdkit.Chem.Draw import rdMolDraw2D

LEVELS = 64
# The light part of a perceptually uniform map: the dark lines of a bond are legible on all of
# it, and small ratios are nearly as pale as the paper.
COLORS = tuple(map(to_hex, matplotlib.colormaps["inferno_r"](np.linspace(0.02, 0.58, LEVELS))))
"""The colors of ratios, from small to large."""

NO_RATIO = "#c4c7cc"
"""The color of a bond without a ratio."""

LABEL = "largest activation ratio of the bond"

WIDTH, HEIGHT = 240, 180  # of a drawn molecule
BAR_START, BAR_WIDTH, BAR_TOP, BAR_HEIGHT = 30, 232, 20, 12
_BAND = "#FF00FF"  # tells the bands of bonds from RDKit's other shapes, which are black


@dataclass(frozen=True)
class Scale:
    """Colors for ratios from ``low`` to ``high``, in equal steps on a logarithmic axis."""

    low: float
    high: float

    @cached_property
    def bounds(self) -> list[float]:
        """The first ratio of each color but the first."""
        return np.geomspace(self.low, self.high, LEVELS + 1)[1:-1].tolist()

    def color(self, ratio: float) -> str:
        """The color of a ratio, as ``#rrggbb``; ``NO_RATIO`` if it is NaN."""
        if np.isnan(ratio):
            return NO_RATIO
        return COLORS[np.searchsorted(self.bounds, ratio, side="right")]

    def position(self, ratio: float) -> float:
        """Where a positive ratio is on the axis, from 0 at ``low`` to 1 at ``high``."""
        return float(np.clip(np.log(ratio / self.low) / np.log(self.high / self.low), 0, 1))


def figures(
    molecules: Sequence[Chem.Mol | None],
    ratios: Sequence[np.ndarray],
    captions: Sequence[str],
    scale: Scale,
    threshold: float,
) -> str:
    """A ``figure`` per molecule, in a grid, each bond's band a ``path[data-bond]``.

    ``ratios`` has a number per bond in RDKit's order, which is that of ``studies.data.directions``,
    NaN for none. Bonds at or above the threshold are outlined, bonds without a ratio are
    gray with a dashed outline. Molecules are drawn kekulized, without stereochemistry, dark on
    light also where the page is dark, so that a color looks the same everywhere.
    """
    drawn = [
        _figure(molecule, i, ratio, caption, scale, threshold)
        for i, (molecule, ratio, caption) in enumerate(
            zip(molecules, ratios, captions, strict=True)
        )
    ]
    return "\n".join(['<div class="mapkg-molecules">', *drawn, "</div>"])


def _figure(
    molecule: Chem.Mol | None,
    index: int,
    ratio: np.ndarray,
    caption: str,
    scale: Scale,
    threshold: float,
) -> str:
    bands, ink = _draw(molecule, index)
    if len(ratio) != len(bands):
        raise ValueError(
            f"molecule {index} ({caption}) has {len(bands)} bonds, got {len(ratio)} values; "
            "expected one per bond, the larger of its two edges"
        )
    outlined = ratio >= threshold
    paths = []
    # Outlined bonds last, so that no neighbour covers their outlines.
    for bond in np.argsort(outlined, kind="stable"):
        look = ' class="outlined"' if outlined[bond] else ""
        if np.isnan(ratio[bond]):
            look = ' class="none"'
        paths.append(
            f'<path data-bond="{bond}"{look} fill="{scale.color(ratio[bond])}" d="{bands[bond]}"/>'
        )
    name = html.escape(caption)
    count = f"{outlined.sum()} of {len(ratio)} bonds ≥ {number(threshold)}"
    return "\n".join(
        [
            f'<figure><svg role="img" aria-label="{name}" viewBox="0 0 {WIDTH} {HEIGHT}">'
            f"<title>{name}</title><desc>{count}</desc>",
            f'<g class="bands">{"".join(paths)}</g>',
            f"{ink}</svg>",
            f"<figcaption>{name}<small>{count}</small></figcaption></figure>",
        ]
    )


def _draw(molecule: Chem.Mol | None, index: int) -> tuple[list[str], str]:
    """The outlines of the bands of a molecule's bonds, and SVG of the lines and letters on them."""
    if molecule is None or molecule.GetNumAtoms() == 0:
        raise ValueError(
            f"molecule {index} cannot be drawn: expected a molecule with atoms, got "
            + ("None, RDKit's answer to text it cannot read" if molecule is None else "none")
        )
    canvas = rdMolDraw2D.MolDraw2DSVG(WIDTH, HEIGHT, -1, -1, True)  # letters as text, not paths
    options = canvas.drawOptions()
    options.useBWAtomPalette()
    options.clearBackground = False
    options.fixedBondLength = 28  # at most, so that small molecules are not drawn huge
    options.highlightBondWidthMultiplier = 16
    options.minFontSize = 9
    options.padding = 0.07
    options.prepareMolsBeforeDrawing = False
    try:
        molecule = Chem.Mol(molecule)
        Chem.SanitizeMol(molecule)
        molecule = rdMolDraw2D.PrepareMolForDrawing(
            molecule, kekulize=True, addChiralHs=False, wedgeBonds=False
        )
        bonds = range(molecule.GetNumBonds())
        canvas.DrawMolecule(
            molecule,
            highlightAtoms=[],
            highlightBonds=bonds,
            highlightBondColors=dict.fromkeys(bonds, matplotlib.colors.to_rgb(_BAND)),
        )
    except (ValueError, RuntimeError) as error:  # what RDKit raises
        raise ValueError(f"molecule {index} cannot be drawn, says RDKit: {error}") from error
    canvas.FinishDrawing()
    return _read_svg(canvas.GetDrawingText(), len(bonds))


def _read_svg(svg: str, bonds: int) -> tuple[list[str], str]:
    """What RDKit drew, without what it repeats for each line: a tenth of the text."""
    bands = [""] * bonds
    lines: defaultdict[str, str] = defaultdict(str)
    letters = ""
    for shape in ElementTree.fromstring(svg):
        style = dict(part.split(":") for part in shape.get("style", "").split(";") if ":" in part)
        outline = re.sub(r" ?([MLZ]) ?", r"\1", shape.get("d", "")).replace(",", " ")
        if style.get("fill") == _BAND:
            bond = re.search(r"bond-(\d+)", shape.get("class"))
            bands[int(bond[1])] += outline
        elif shape.tag.endswith("path"):
            look = "".join(
                f' {name}="{style[name]}"'
                for name in ("stroke-dasharray", "fill")
                if style.get(name, "none") != "none"
            )
            lines[look] += outline
        elif shape.tag.endswith("text"):
            size = style["font-size"].removesuffix("px")
            place = f'x="{shape.get("x")}" y="{shape.get("y")}"'
            letters += f'<text {place} font-size="{size}">{html.escape(shape.text)}</text>'
    ink = "".join(f'<path d="{path}"{look}/>' for look, path in lines.items())
    return bands, f'<g class="ink">{ink}{letters}</g>'


def color_bar(scale: Scale, threshold: float, has_gaps: bool) -> str:
    """A color bar with decades and the threshold, as SVG; ``has_gaps`` explains ``NO_RATIO``."""
    step, bottom = BAR_WIDTH / LEVELS, BAR_TOP + BAR_HEIGHT
    # Each step is drawn as far as the end, the next one on top: no gaps between them.
    steps = "".join(
        f'<path fill="{color}" d="M{BAR_START + i * step:g} {BAR_TOP}'
        f'H{BAR_START + BAR_WIDTH}v{BAR_HEIGHT}H{BAR_START + i * step:g}z"/>'
        for i, color in enumerate(COLORS)
    )
    ticks = ""
    decades = range(int(np.ceil(np.log10(scale.low))), int(np.floor(np.log10(scale.high))) + 1)
    for exponent in decades[:: len(decades) // 6 + 1]:  # as many as there is room for
        tick = 10.0**exponent
        sign = "≤ " if tick == scale.low else "≥ " if tick == scale.high else ""
        x = BAR_START + BAR_WIDTH * scale.position(tick)
        ticks += f'<path class="line" d="M{x:.1f} {bottom}v4"/>'
        ticks += f'<text x="{x:.1f}" y="{bottom + 16}">{sign}{number(tick)}</text>'
    place = scale.position(threshold)
    anchor = "start" if place < 0.25 else "end" if place > 0.75 else "middle"
    mark = BAR_START + BAR_WIDTH * place
    gap = (
        f'<path class="none" fill="{NO_RATIO}" d="M{BAR_START} {bottom + 43}h14v9h-14z"/>'
        f'<text class="start" x="{BAR_START + 20}" y="{bottom + 52}">no ratio</text>'
        if has_gaps
        else ""
    )
    middle = BAR_START + BAR_WIDTH / 2
    height = bottom + (58 if has_gaps else 38)
    return "\n".join(
        [
            f'<svg class="mapkg-bar" role="img" aria-label="color bar: {LABEL}" '
            f'viewBox="0 0 {BAR_WIDTH + 2 * BAR_START} {height}">',
            f'{steps}{ticks}<text x="{middle:g}" y="{bottom + 33}">{LABEL}</text>',
            f'<g class="threshold" transform="translate({mark:.1f})">'
            f'<path class="line" d="M0 {BAR_TOP - 4}V{bottom}"/>'
            f'<text y="{BAR_TOP - 8}" style="text-anchor:{anchor}">'
            f"outlined from {number(threshold)}</text></g>{gap}</svg>",
        ]
    )


def number(ratio: float) -> str:
    """A ratio as text: whole from 100 on, three significant digits below."""
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


def asset(name: str) -> str:
    """The text of a style sheet or script of this package."""
    return files("studies.viewer").joinpath(name).read_text(encoding="utf-8")


def draw_molecule(
    graph_molecule: Chem.Mol,
    ax: Axes,
    *,
    atom_notes: Sequence[str] | None = None,
    bond_notes: Sequence[str] | None = None,
) -> Axes:
    """Draw a molecule, kekulized, with a note at each atom and bond if given."""
    drawn = Chem.Mol(graph_molecule)
    Chem.Kekulize(drawn, clearAromaticFlags=True)
    noted = (("atomNote", atom_notes, drawn.GetAtoms()), ("bondNote", bond_notes, drawn.GetBonds()))
    for key, notes, parts in noted:
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
