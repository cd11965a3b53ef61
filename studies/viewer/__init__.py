"""A small interactive viewer of molecules and their ratios, in a page without network."""

import html
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, Context, Decimal
from functools import cached_property
from importlib.resources import files
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from rdkit import Chem
from rdkit.Chem import Draw
from rdkit.Chem.Draw import rdMolDraw2D
from torch import Tensor

from mapkg.measures import MASSIVE_RATIO

THRESHOLDS = (
    *(step * 10.0**power for power in (1, 2, 3) for step in (1, 1.5, 2, 3, 4, 5, 7)),
    10_000.0,
)
"""Thresholds about evenly apart on a logarithmic axis, those of the papers among them."""

LEVELS = 64
# The light part of a perceptually uniform map, where the dark lines of a bond are legible.
COLORS = tuple(map(to_hex, matplotlib.colormaps["inferno_r"](np.linspace(0.02, 0.58, LEVELS))))
"""The colors of ratios, from small to large."""

NO_RATIO = "#c4c7cc"
"""The color of a bond without a ratio."""

WIDTH, HEIGHT = 240, 180  # of a drawn molecule
BAR_START, BAR_WIDTH, BAR_TOP, BAR_HEIGHT = 30, 232, 20, 12
_BAND = "#FF00FF"  # tells the bands of bonds from RDKit's other shapes, which are black


@dataclass(frozen=True)
class Scale:
    """Colors for ratios in equal steps on a logarithmic axis."""

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


def viewer(
    molecules: Sequence[Chem.Mol | None],
    ratios: Sequence[np.ndarray | Tensor],
    *,
    captions: Sequence[str],
) -> str:
    """One molecule at a time, with choices of molecule, layer, head and threshold, as HTML.

    On paper and without scripts all molecules are shown instead, in layer 0 with all heads.
    ``ratios`` are those of ``bond_ratios``, NaN for none. The page has them cut to three digits, as
    ``THRESHOLDS`` have, so that a ratio reaches a threshold exactly if its first three digits do.
    """
    if not 0 < len(molecules) == len(ratios) == len(captions):
        raise ValueError(
            "expected at least one molecule, and ratios and a caption for each; got "
            f"{len(molecules)} molecules, {len(ratios)} ratios and {len(captions)} captions"
        )
    cut = [_three_digits(np.asarray(ratio, dtype=float)) for ratio in ratios]
    layers, heads, _ = cut[0].shape
    every = np.concatenate([ratio.ravel() for ratio in cut])
    scale = Scale(1.0, float(np.fmax.reduce(every, initial=MASSIVE_RATIO)))
    data = {
        "ratios": [_packed(ratio) for ratio in cut],
        "thresholds": THRESHOLDS,
        "bounds": scale.bounds,
        "colors": "".join(color.removeprefix("#") for color in COLORS),
        "none": NO_RATIO,
        "limits": [scale.low, scale.high],
        "bar": [BAR_START, BAR_WIDTH],
    }
    of_layer = [np.fmax.reduce(ratio[0]) for ratio in cut]
    # The script's data are numbers and colors alone: no text that could end the element.
    return f"""\
<div class="mapkg-bonds mapkg-viewer mathjax_ignore tex2jax_ignore" style="--columns:4">
<style>
{_asset("bonds.css")}{_asset("viewer.css")}</style>
{_choice_of_molecule(captions)}
{figures(molecules, of_layer, captions, scale, MASSIVE_RATIO)}
<div class="side">
{_settings(layers, heads)}
<p class="status" role="status" aria-live="polite" hidden></p>
<p class="fixed">Layer 0, all heads.</p>
{_color_bar(scale, MASSIVE_RATIO, bool(np.isnan(every).any()))}
</div>
<script type="application/json">{json.dumps(data, separators=(",", ":"))}</script>
<script>
{_asset("viewer.js")}</script>
</div>"""


def _asset(name: str) -> str:
    return files("studies.viewer").joinpath(name).read_text(encoding="utf-8")


def _three_digits(ratios: np.ndarray) -> np.ndarray:
    """Ratios cut, not rounded, to three significant digits: none gets over a threshold."""
    cut = Context(prec=3, rounding=ROUND_DOWN)
    digits = [float(cut.create_decimal(repr(ratio))) for ratio in ratios.ravel().tolist()]
    return np.array(digits).reshape(ratios.shape)


def _packed(ratios: np.ndarray) -> list | str:
    """[layers, heads] texts with three characters per bond, ``---`` for no ratio.

    To base 36 they are a number n for (100 + n mod 900) times ten to the (n // 900 - 12).
    """
    if ratios.ndim > 1:
        return [_packed(part) for part in ratios]
    text = ""
    for exact in map(Decimal, map(repr, ratios.clip(1e-10, 9.99e40).tolist())):
        if exact.is_nan():
            text += "---"
        else:
            exponent = exact.adjusted() - 2
            n = 900 * (exponent + 12) + int(exact.scaleb(-exponent)) - 100
            text += np.base_repr(n, 36).zfill(3)
    return text


def _choice_of_molecule(captions: Sequence[str]) -> str:
    options = "".join(f"<option>{html.escape(caption)}</option>" for caption in captions)
    return f"""\
<div class="choice" hidden>
<button type="button" name="previous" aria-label="previous molecule">◀</button>
<select name="molecule" aria-label="molecule" autocomplete="off">{options}</select>
<button type="button" name="next" aria-label="next molecule">▶</button>
<span class="place" aria-live="polite"></span>
</div>"""


def _settings(layers: int, heads: int) -> str:
    options = "".join(f'<option value="{i}">head {i}</option>' for i in range(heads))
    start = THRESHOLDS.index(MASSIVE_RATIO)
    return f"""\
<div class="settings" hidden>
{_slider("Layer", "0", 0, layers)}
<label><span>Head</span><select name="head" aria-label="Head" autocomplete="off">\
<option value="">all heads</option>{options}</select></label>
{_slider("Threshold", _number(MASSIVE_RATIO), start, len(THRESHOLDS))}
</div>"""


def _slider(name: str, text: str, value: int, steps: int) -> str:
    return (
        f"<label><span>{name} <b>{text}</b></span>"
        f'<input type="range" name="{name.lower()}" aria-label="{name}" min="0" max="{steps - 1}" '
        f'value="{value}" autocomplete="off"></label>'
    )


# Drawings.


def figures(
    molecules: Sequence[Chem.Mol | None],
    ratios: Sequence[np.ndarray],
    captions: Sequence[str],
    scale: Scale,
    threshold: float,
) -> str:
    """A ``figure`` per molecule, each bond's band a ``path[data-bond]`` of a ratio, NaN for none.

    Bonds at or above the threshold are outlined, bonds without a ratio gray with a dashed outline.
    Molecules are drawn kekulized, without stereochemistry, on light also where the page is dark.
    """
    shown = []
    drawn = zip(molecules, ratios, captions, strict=True)
    for index, (molecule, ratio, caption) in enumerate(drawn):
        bands, ink = _draw(molecule, index)
        if len(ratio) != len(bands):
            raise ValueError(
                f"molecule {index} ({caption}) has {len(bands)} bonds, got {len(ratio)} values; "
                "expected one per bond, the larger of its two edges"
            )
        outlined = ratio >= threshold
        looks = np.select([np.isnan(ratio), outlined], [' class="none"', ' class="outlined"'], "")
        # Outlined bonds last, so that no neighbor covers their outlines.
        paths = "".join(
            f'<path data-bond="{i}"{looks[i]} fill="{scale.color(ratio[i])}" d="{bands[i]}"/>'
            for i in np.argsort(outlined, kind="stable")
        )
        name = html.escape(caption)
        count = f"{outlined.sum()} of {len(ratio)} bonds ≥ {_number(threshold)}"
        shown.append(f"""\
<figure><svg role="img" aria-label="{name}" viewBox="0 0 {WIDTH} {HEIGHT}">\
<title>{name}</title><desc>{count}</desc>
<g class="bands">{paths}</g>
{ink}</svg>
<figcaption>{name}<small>{count}</small></figcaption></figure>""")
    return '<div class="mapkg-molecules">\n' + "\n".join(shown) + "\n</div>"


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
    options.fixedBondLength = 28  # at most, so that small molecules are not drawn huge
    options.clearBackground = options.prepareMolsBeforeDrawing = False
    options.highlightBondWidthMultiplier, options.minFontSize, options.padding = 16, 9, 0.07
    try:
        molecule = Chem.Mol(molecule)
        Chem.SanitizeMol(molecule)
        look = dict(kekulize=True, addChiralHs=False, wedgeBonds=False)
        molecule = rdMolDraw2D.PrepareMolForDrawing(molecule, **look)
        bonds = range(molecule.GetNumBonds())
        colors = dict.fromkeys(bonds, matplotlib.colors.to_rgb(_BAND))
        lit = dict(highlightAtoms=[], highlightBonds=bonds, highlightBondColors=colors)
        canvas.DrawMolecule(molecule, **lit)
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
            drawn = {name: style.get(name, "none") for name in ("stroke-dasharray", "fill")}
            look = "".join(f' {name}="{v}"' for name, v in drawn.items() if v != "none")
            lines[look] += outline
        elif shape.tag.endswith("text"):
            size = style["font-size"].removesuffix("px")
            place = f'x="{shape.get("x")}" y="{shape.get("y")}"'
            letters += f'<text {place} font-size="{size}">{html.escape(shape.text)}</text>'
    ink = "".join(f'<path d="{path}"{look}/>' for look, path in lines.items())
    return bands, f'<g class="ink">{ink}{letters}</g>'


def _color_bar(scale: Scale, threshold: float, has_gaps: bool) -> str:
    """A color bar with decades and the threshold, as SVG; ``has_gaps`` explains ``NO_RATIO``."""
    label = "largest activation ratio of the bond"
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
        ticks += f'<text x="{x:.1f}" y="{bottom + 16}">{sign}{_number(tick)}</text>'
    place = scale.position(threshold)
    anchor = "start" if place < 0.25 else "end" if place > 0.75 else "middle"
    gap = (
        f'<path class="none" fill="{NO_RATIO}" d="M{BAR_START} {bottom + 43}h14v9h-14z"/>'
        f'<text class="start" x="{BAR_START + 20}" y="{bottom + 52}">no ratio</text>'
    )
    return f"""\
<svg class="mapkg-bar" role="img" aria-label="color bar: {label}" \
viewBox="0 0 {BAR_WIDTH + 2 * BAR_START} {bottom + (58 if has_gaps else 38)}">
{steps}{ticks}<text x="{BAR_START + BAR_WIDTH / 2:g}" y="{bottom + 33}">{label}</text>
<g class="threshold" transform="translate({BAR_START + BAR_WIDTH * place:.1f})">\
<path class="line" d="M0 {BAR_TOP - 4}V{bottom}"/>\
<text y="{BAR_TOP - 8}" style="text-anchor:{anchor}">outlined from {_number(threshold)}</text>\
</g>{gap if has_gaps else ""}</svg>"""


def _number(ratio: float) -> str:
    """A ratio as text: whole from 100 on, three significant digits below."""
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


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
    options = rdMolDraw2D.MolDrawOptions()
    options.annotationFontScale = 0.7
    if atom_notes is not None:
        options.useBWAtomPalette()
    image = Draw.MolToImage(drawn, (900, 600), options=options)
    inked = np.argwhere(np.asarray(image).min(axis=2) < 255)
    (top, left), (bottom, right) = inked.min(axis=0) - 8, inked.max(axis=0) + 9
    ax.imshow(image.crop((left, top, right, bottom)))
    ax.set_axis_off()
    return ax
