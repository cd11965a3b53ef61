"""Local Lipschitz constants of raw and normalized attention, against the size of its input."""

import sys
from collections.abc import Callable, Sequence

import pandas as pd
import seaborn as sns
import torch
from torch import Tensor
from tqdm import tqdm

from mapkg.lipschitz import (
    ALPHA,
    attention,
    lemma_bound,
    linear_score,
    local_constant,
    quadratic_score,
    slope,
    theorem_bound,
    tied_keys,
)

SCALES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Sizes of the input."""

_NUDGE = 1e-6


def constants_against_scale(
    scales: Sequence[float] = SCALES,
    *,
    dimensions: int = 4,
    nodes: int = 6,
    points: int = 30,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """The largest local constant that is found at inputs of each size, beside its bounds.

    Half of the points are standard normal, half the worst case of ``lipschitz.tied_keys``, all
    times the scale; queries of the linear score are standard normal and keep their size, those of
    the quadratic score are scaled as keys and values are.

    Args:
        scales: factors of the input.
        dimensions: d.
        nodes: m = n.
        points: how many inputs of each scale, 2 or more.
        seed: of the inputs.
        progress: whether to show a progress bar on stderr.

    Returns:
        A row per ``scale``, ``score`` and ``normalised``, with the largest ``constant`` over
        points, ``lemma`` and ``lemma_tight``, its bounds where it is attained, and ``theorem`` and
        ``theorem_tight``, NaN without normalization.

    Raises:
        ValueError: if there are fewer than two points.

    Source: LipschitzNorm paper, lemma and theorem.
    """
    if points < 2:
        raise ValueError(f"points: expected 2 or more, got {points}")
    rows = []
    for scale in tqdm(scales, "scales", file=sys.stderr, disable=not progress):
        inputs = _inputs(scale, dimensions, nodes, points, seed)
        for kind in ("linear", "quadratic"):
            for normalised in (False, True):
                bounds = [_bounds(kind, normalised, query, x) for query, x in inputs]
                row = {"scale": scale, "score": kind, "normalised": normalised}
                row |= max(bounds, key=lambda bound: bound["constant"])
                for name, tight in (("theorem", False), ("theorem_tight", True)):
                    bound = theorem_bound(ALPHA[kind], nodes, nodes, tight=tight)
                    row[name] = bound if normalised else float("nan")
                rows.append(row)
    return pd.DataFrame(rows)


def _inputs(
    scale: float, dimensions: int, nodes: int, points: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Queries and inputs [nodes, dimensions]; the same directions for every scale."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for number in range(points):
        query, x = (
            torch.randn(nodes, dimensions, generator=generator, dtype=torch.float64)
            for _ in range(2)
        )
        # Two keys of one length are where the largest length has no derivative: a little off it.
        tied = tied_keys(query[0], nodes, 1.0, generator) + _NUDGE * x
        inputs.append((query, scale * (tied if number % 2 else x)))
    return inputs


def _bounds(kind: str, normalised: bool, query: Tensor, x: Tensor) -> dict[str, float]:
    score: Callable[[Tensor], Tensor]
    if kind == "linear":

        def score(point: Tensor) -> Tensor:
            return linear_score(point, query, normalised=normalised)

        constant = local_constant(lambda point: attention(score(point), point), x)
        point = x
        steep = slope(score, x) if normalised else torch.linalg.matrix_norm(query, ord=2).item()
    else:
        # The query that ties points along the tied keys whatever its size.
        parts: tuple[Tensor, ...] = (query * x.norm() / query.norm(), x, x)
        sizes = [len(part) for part in parts]

        def attend(*inputs: Tensor) -> Tensor:
            return attention(quadratic_score(*inputs, normalised=normalised), inputs[2])

        def score(point: Tensor) -> Tensor:
            return quadratic_score(*point.split(sizes), normalised=normalised)

        constant = local_constant(attend, *parts)
        point = torch.cat(parts)
        steep = slope(score, point)
    lemma, tight = (
        lemma_bound(scores=score(point), value=x, score_slope=steep, tight=is_tight)
        for is_tight in (False, True)
    )
    return {"constant": constant, "lemma": lemma, "lemma_tight": tight}


def constants(table: pd.DataFrame) -> sns.FacetGrid:
    """Constants of raw and normalized attention and their bounds against the size of the input."""
    long = table.melt(["scale", "score", "normalised"], ["constant", "lemma", "theorem"], "line")
    attention = long["normalised"].map({False: "raw", True: "normalized"})
    grid = sns.relplot(
        long.assign(attention=attention, score=long["score"] + " score"),
        kind="line",
        x="scale",
        y="value",
        hue="attention",
        style="line",
        col="score",
        dashes={"constant": "", "lemma": (1, 1), "theorem": (4, 2)},
        palette={"raw": "#E76F51", "normalized": "#264653"},
        height=3.4,
    )
    grid.set_titles("{col_name}").set(xscale="log", yscale="log")
    grid.set_axis_labels("size of the input", "largest local Lipschitz constant")
    return grid
