"""A small interactive viewer of molecules and their ratios, in a page without network."""

import html
import json
from collections.abc import Sequence
from decimal import ROUND_DOWN, Context, Decimal

import numpy as np
from rdkit import Chem
from torch import Tensor

from mapkg.measures import MASSIVE_RATIO
from studies.viewer.drawing import (
    BAR_START,
    BAR_WIDTH,
    COLORS,
    NO_RATIO,
    Scale,
    asset,
    color_bar,
    figures,
    number,
)

THRESHOLDS = (
    *(step * 10.0**power for power in (1, 2, 3) for step in (1, 1.5, 2, 3, 4, 5, 7)),
    10_000.0,
)
"""Thresholds about evenly apart on a logarithmic axis, those of the papers among them."""


def viewer(
    molecules: Sequence[Chem.Mol | None],
    ratios: Sequence[np.ndarray | Tensor],
    *,
    captions: Sequence[str],
) -> str:
    """One molecule at a time, with choices of molecule, layer, head and threshold, as HTML.

    A bond has the color of its largest ratio in the layer, of all heads or the chosen one; the
    scale is the same for all choices. On paper and without scripts the page shows all molecules
    instead, in layer 0 with all heads. Several viewers may stand on a page.

    ``ratios`` has an array [layers, heads, bonds] per molecule: the largest ratio within the head
    of either edge of the bond, NaN for none. The page has them cut to three significant digits, as
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
    return "\n".join(
        [
            '<div class="mapkg-bonds mapkg-viewer mathjax_ignore tex2jax_ignore" '
            'style="--columns:4">',
            f"<style>\n{asset('bonds.css')}{asset('viewer.css')}</style>",
            _choice_of_molecule(captions),
            figures(molecules, of_layer, captions, scale, MASSIVE_RATIO),
            '<div class="side">',
            _settings(layers, heads),
            '<p class="status" role="status" aria-live="polite" hidden></p>',
            '<p class="fixed">Layer 0, all heads.</p>',
            color_bar(scale, MASSIVE_RATIO, bool(np.isnan(every).any())),
            "</div>",
            # Numbers and colors alone: no text that could end the element.
            f'<script type="application/json">{json.dumps(data, separators=(",", ":"))}</script>',
            f"<script>\n{asset('viewer.js')}</script>",
            "</div>",
        ]
    )


def _three_digits(ratios: np.ndarray) -> np.ndarray:
    """Ratios cut, not rounded, to three significant digits: none gets over a threshold."""
    cut = Context(prec=3, rounding=ROUND_DOWN)
    digits = [float(cut.create_decimal(repr(ratio))) for ratio in ratios.ravel().tolist()]
    return np.array(digits).reshape(ratios.shape)


def _choice_of_molecule(captions: Sequence[str]) -> str:
    options = "".join(f"<option>{html.escape(caption)}</option>" for caption in captions)
    return "\n".join(
        [
            '<div class="choice" hidden>',
            '<button type="button" name="previous" aria-label="previous molecule">◀</button>',
            f'<select name="molecule" aria-label="molecule" autocomplete="off">{options}</select>',
            '<button type="button" name="next" aria-label="next molecule">▶</button>',
            '<span class="place"></span>',
            "</div>",
        ]
    )


def _settings(layers: int, heads: int) -> str:
    options = "".join(f'<option value="{i}">head {i}</option>' for i in range(heads))
    sliders = {
        "Layer": (layers, 0, "0"),
        "Threshold": (len(THRESHOLDS), THRESHOLDS.index(MASSIVE_RATIO), number(MASSIVE_RATIO)),
    }
    layer_slider, threshold_slider = (
        f"<label><span>{name} <b>{text}</b></span>"
        f'<input type="range" name="{name.lower()}" aria-label="{name}" min="0" max="{steps - 1}" '
        f'value="{value}" autocomplete="off"></label>'
        for name, (steps, value, text) in sliders.items()
    )
    return "\n".join(
        [
            '<div class="settings" hidden>',
            layer_slider,
            '<label><span>Head</span><select name="head" aria-label="Head" autocomplete="off">'
            f'<option value="">all heads</option>{options}</select></label>',
            threshold_slider,
            "</div>",
        ]
    )


def _packed(ratios: np.ndarray) -> list | str:
    """[layers, heads] texts with three characters per bond, half of what numbers would take.

    They are a number n to base 36 for (100 + n mod 900) times ten to the (n // 900 - 12), which
    reaches from 1e-10 to beyond what single precision holds; ``---`` is no ratio.
    """
    if ratios.ndim > 1:
        return [_packed(part) for part in ratios]
    codes = []
    for ratio in ratios.clip(1e-10, 9.99e40).tolist():
        exact = Decimal(repr(ratio))
        if exact.is_nan():
            codes.append("---")
            continue
        exponent = exact.adjusted() - 2
        n = 900 * (exponent + 12) + int(exact.scaleb(-exponent)) - 100
        codes.append(np.base_repr(n, 36).zfill(3))
    return "".join(codes)
