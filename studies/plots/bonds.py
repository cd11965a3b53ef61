"""Molecules whose bonds are coloured by a ratio, as HTML with nothing to load."""

import html
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from rdkit import Chem
from rdkit.Chem.Draw import rdMolDraw2D
from torch import Tensor

from mapkg.measures import MASSIVE_RATIO

LEVELS = 64
# The light part of a perceptually uniform map: the dark lines of a bond are legible on all of
# it, and small ratios are nearly as pale as the paper.
COLOURS = tuple(map(to_hex, matplotlib.colormaps["inferno_r"](np.linspace(0.02, 0.58, LEVELS))))
"""The colours of ratios, from small to large."""

NO_RATIO = "#c4c7cc"
"""The colour of a bond without a ratio."""

LABEL = "largest activation ratio of the bond"

WIDTH, HEIGHT = 240, 180  # of a drawn molecule
BAR_START, BAR_WIDTH, BAR_TOP, BAR_HEIGHT = 30, 232, 20, 12
_BAND = "#FF00FF"  # tells the bands of bonds from RDKit's other shapes, which are black


@dataclass(frozen=True)
class Scale:
    """Colours for ratios, in ``LEVELS`` steps of equal size on a logarithmic axis.

    Attributes:
        low: ratios up to here have the first colour.
        high: ratios from here on have the last colour.

    Raises:
        ValueError: if not 0 < low < high, both finite.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < np.inf:
            raise ValueError(
                f"expected limits of the colours 0 < low < high, got {self.low} and {self.high}"
            )

    @cached_property
    def bounds(self) -> list[float]:
        """The first ratio of each colour but the first."""
        return np.geomspace(self.low, self.high, LEVELS + 1)[1:-1].tolist()

    def colour(self, ratio: float) -> str:
        """The colour of a ratio, as ``#rrggbb``; ``NO_RATIO`` if it is NaN."""
        if np.isnan(ratio):
            return NO_RATIO
        return COLOURS[np.searchsorted(self.bounds, ratio, side="right")]

    def position(self, ratio: float) -> float:
        """Where a positive ratio is on the axis, from 0 at ``low`` to 1 at ``high``."""
        return float(np.clip(np.log(ratio / self.low) / np.log(self.high / self.low), 0, 1))


def gallery(
    molecules: Sequence[Chem.Mol | None],
    values: Sequence[np.ndarray | Tensor],
    *,
    threshold: float = MASSIVE_RATIO,
    captions: Sequence[str] | None = None,
    columns: int = 4,
    limits: tuple[float, float] | None = None,
    label: str = LABEL,
) -> str:
    """Molecules beside each other, their bonds coloured by a ratio on one logarithmic scale.

    Bonds at or above the threshold are outlined, bonds without a ratio are grey with a dashed
    outline. Molecules are drawn kekulised, without stereochemistry, dark on light also where
    the page is dark, so that a colour looks the same everywhere.

    Args:
        molecules: as ``data.to_molecule`` returns them.
        values: per molecule one ratio per bond, in RDKit's order of bonds, not negative; NaN
            for none. In a graph of ``data``, bond i is the edges 2i and 2i + 1.
        threshold: where bonds are outlined, above 0.
        captions: one text per molecule; None numbers them from 0.
        columns: molecules in a row, fewer where the page is narrow.
        limits: the ratios of the first and the last colour. None takes 1, the median of a row,
            or a threshold below it, and the largest value, the threshold or a decade on.
        label: what the ratio is, written at the colour bar.

    Returns:
        HTML for ``IPython.display.HTML``.

    Raises:
        ValueError: if the numbers of molecules, values, bonds or captions do not agree, a
            value is negative or infinite, or RDKit cannot draw a molecule; says which.
    """
    captions = check_counts(molecules, values, captions, columns)
    ratios = [check_ratios(value, i, dimensions=1) for i, value in enumerate(values)]
    scale = scale_for(ratios, threshold, limits)
    return "\n".join(
        [
            f'<div class="mapkg-bonds mathjax_ignore tex2jax_ignore" style="--columns:{columns}">',
            f"<style>\n{asset('bonds.css')}</style>",
            figures(molecules, ratios, captions, scale, threshold),
            colour_bar(scale, threshold, label, any(np.isnan(ratio).any() for ratio in ratios)),
            "</div>",
        ]
    )


def check_counts(
    molecules: Sequence[Chem.Mol | None],
    values: Sequence[np.ndarray | Tensor],
    captions: Sequence[str] | None,
    columns: int,
) -> Sequence[str]:
    """The captions, "molecule i" if there are none, if all are as many as the molecules."""
    if columns < 1:
        raise ValueError(f"expected at least one column, got {columns}")
    if captions is None:
        captions = [f"molecule {i}" for i in range(len(molecules))]
    if not 0 < len(molecules) == len(values) == len(captions):
        raise ValueError(
            "expected at least one molecule, and values and a caption for each; got "
            f"{len(molecules)} molecules, {len(values)} values and {len(captions)} captions"
        )
    return captions


def check_ratios(values: np.ndarray | Tensor, index: int, *, dimensions: int) -> np.ndarray:
    """The ratios of a molecule as an array, if they can be ratios."""
    ratios = np.asarray(values, dtype=float)
    if ratios.ndim != dimensions:
        shape = "[bonds]" if dimensions == 1 else "[layers, heads, bonds]"
        raise ValueError(f"molecule {index}: expected ratios {shape}, got shape {ratios.shape}")
    if (ratios < 0).any() or np.isinf(ratios).any():
        raise ValueError(
            f"molecule {index}: expected finite ratios from 0 on, or NaN for none, got values "
            f"from {np.nanmin(ratios)} to {np.nanmax(ratios)}"
        )
    return ratios


def scale_for(
    ratios: Sequence[np.ndarray], threshold: float, limits: tuple[float, float] | None
) -> Scale:
    """The scale of all ratios, see ``gallery``."""
    if not 0 < threshold < np.inf:
        raise ValueError(f"expected a threshold above 0, got {threshold}")
    if limits is None:
        low = min(1.0, threshold)
        all_ratios = np.concatenate([ratio.ravel() for ratio in ratios])
        limits = (low, float(np.fmax.reduce(all_ratios, initial=max(10 * low, threshold))))
    return Scale(*limits)


def figures(
    molecules: Sequence[Chem.Mol | None],
    ratios: Sequence[np.ndarray],
    captions: Sequence[str],
    scale: Scale,
    threshold: float,
) -> str:
    """A ``figure`` per molecule, see ``gallery``. Each bond's band is a ``path[data-bond]``."""
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
            f'<path data-bond="{bond}"{look} fill="{scale.colour(ratio[bond])}" d="{bands[bond]}"/>'
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


def colour_bar(scale: Scale, threshold: float, label: str, has_gaps: bool) -> str:
    """A colour bar with decades and the threshold, as SVG.

    Args:
        scale: of the colours.
        threshold: where the mark is.
        label: what the ratio is.
        has_gaps: whether to explain the colour of bonds without a ratio.
    """
    step, bottom = BAR_WIDTH / LEVELS, BAR_TOP + BAR_HEIGHT
    # Each step is drawn as far as the end, the next one on top: no gaps between them.
    steps = "".join(
        f'<path fill="{colour}" d="M{BAR_START + i * step:g} {BAR_TOP}'
        f'H{BAR_START + BAR_WIDTH}v{BAR_HEIGHT}H{BAR_START + i * step:g}z"/>'
        for i, colour in enumerate(COLOURS)
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
    name, middle = html.escape(label), BAR_START + BAR_WIDTH / 2
    height = bottom + (58 if has_gaps else 38)
    return "\n".join(
        [
            f'<svg class="mapkg-bar" role="img" aria-label="colour bar: {name}" '
            f'viewBox="0 0 {BAR_WIDTH + 2 * BAR_START} {height}">',
            f'{steps}{ticks}<text x="{middle:g}" y="{bottom + 33}">{name}</text>',
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
    """The text of a style sheet or script of this folder."""
    return files("studies.plots").joinpath("assets", name).read_text(encoding="utf-8")
