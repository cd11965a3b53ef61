"""A small interactive viewer of molecules and their ratios, in a page without network."""

import html
import json
from collections.abc import Sequence
from decimal import ROUND_DOWN, Context, Decimal

import numpy as np
from rdkit import Chem
from torch import Tensor

from mapkg.measures import MASSIVE_RATIO
from studies.plots.bonds import (
    BAR_START,
    BAR_WIDTH,
    COLOURS,
    LABEL,
    NO_RATIO,
    asset,
    check_counts,
    check_ratios,
    colour_bar,
    figures,
    number,
    scale_for,
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
    thresholds: Sequence[float] = THRESHOLDS,
    threshold: float = MASSIVE_RATIO,
    layer: int = 0,
    heads: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    columns: int = 4,
    limits: tuple[float, float] | None = None,
    label: str = LABEL,
) -> str:
    """One molecule at a time, with choices of molecule, layer, head and threshold.

    A bond has the colour of its largest ratio in the layer, of all heads or the chosen one; the
    scale is the same for all choices. On paper and without scripts the page shows the gallery
    of all molecules instead, at the layer and threshold given here and with all heads. Several
    viewers may stand on a page.

    Args:
        molecules: as ``data.to_molecule`` returns them.
        ratios: per molecule an array [layers, heads, bonds], bonds as in ``gallery``: the
            largest ratio within the head of either edge of the bond, not negative, NaN for
            none. The page has them cut to three significant digits.
        thresholds: to choose from, ascending, with at most three significant digits, so that a
            ratio reaches one exactly if its first three digits do.
        threshold: the one chosen first.
        layer: the one chosen first, from 0.
        heads: a name per head; None numbers them from 0.
        captions: one text per molecule; None numbers them from 0.
        columns: molecules in a row of the gallery.
        limits: as in ``gallery``.
        label: what the ratio is, written at the colour bar.

    Returns:
        HTML for ``IPython.display.HTML``, with style and script in it and nothing to load.

    Raises:
        ValueError: if shapes or numbers do not agree, a value is negative or infinite, a
            threshold is not as described, or RDKit cannot draw a molecule; says which.
    """
    captions = check_counts(molecules, ratios, captions, columns)
    cut = [_three_digits(check_ratios(r, i, dimensions=3)) for i, r in enumerate(ratios)]
    layers, heads = _check_shapes(cut, layer, heads)
    _check_thresholds(thresholds, threshold)
    scale = scale_for(cut, threshold, limits)
    data = {
        "ratios": [_packed(ratio) for ratio in cut],
        "thresholds": list(thresholds),
        "bounds": scale.bounds,
        "colours": "".join(colour.removeprefix("#") for colour in COLOURS),
        "none": NO_RATIO,
        "limits": [scale.low, scale.high],
        "bar": [BAR_START, BAR_WIDTH],
    }
    of_layer = [np.fmax.reduce(ratio[layer]) for ratio in cut]
    has_gaps = any(np.isnan(ratio).any() for ratio in cut)
    return "\n".join(
        [
            '<div class="mapkg-bonds mapkg-viewer mathjax_ignore tex2jax_ignore" '
            f'style="--columns:{columns}">',
            f"<style>\n{asset('bonds.css')}{asset('viewer.css')}</style>",
            _choice_of_molecule(captions),
            figures(molecules, of_layer, captions, scale, threshold),
            '<div class="side">',
            _settings(layers, layer, heads, thresholds, threshold),
            '<p class="status" role="status" aria-live="polite" hidden></p>',
            f'<p class="fixed">Layer {layer}, all heads.</p>',
            colour_bar(scale, threshold, label, has_gaps),
            "</div>",
            # Numbers and colours alone: no text that could end the element.
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


def _check_shapes(
    ratios: Sequence[np.ndarray], layer: int, heads: Sequence[str] | None
) -> tuple[int, Sequence[str]]:
    layers, number_of_heads = ratios[0].shape[:2]
    for i, ratio in enumerate(ratios):
        if ratio.shape[:2] != (layers, number_of_heads):
            raise ValueError(
                f"molecule {i}: expected ratios of {layers} layers and {number_of_heads} heads "
                f"as of molecule 0, got shape {ratio.shape}"
            )
    if heads is None:
        heads = [f"head {i}" for i in range(number_of_heads)]
    if not 0 < number_of_heads == len(heads):
        raise ValueError(
            f"expected ratios of at least one head and a name for each, got {number_of_heads} "
            f"heads and {len(heads)} names"
        )
    if not 0 <= layer < layers:
        raise ValueError(f"expected a layer from 0 to {layers - 1}, got {layer}")
    return layers, heads


def _check_thresholds(thresholds: Sequence[float], threshold: float) -> None:
    values = np.array(thresholds, dtype=float)
    if not (
        len(values)
        and (values > 0).all()
        and (np.diff(values) > 0).all()
        and (_three_digits(values) == values).all()
    ):
        raise ValueError(
            "expected ascending thresholds above 0 with at most three significant digits, got "
            f"{tuple(thresholds)}"
        )
    if threshold not in thresholds:
        raise ValueError(f"expected a threshold among {tuple(thresholds)}, got {threshold}")


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


def _settings(
    layers: int, layer: int, heads: Sequence[str], thresholds: Sequence[float], threshold: float
) -> str:
    options = "".join(
        f'<option value="{i}">{html.escape(name)}</option>' for i, name in enumerate(heads)
    )
    sliders = {
        "Layer": (layers, layer, str(layer)),
        "Threshold": (len(thresholds), list(thresholds).index(threshold), number(threshold)),
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
