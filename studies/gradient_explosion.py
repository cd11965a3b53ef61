"""Why gradients of deep attention explode: local Lipschitz constants, and gradients in training."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from torch import Tensor, nn
from torch.func import jvp, vjp
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
from studies import tables
from studies.data import Splits
from studies.deep import FURTHER, DeepNetwork, Variant, gradient_norms
from studies.figures import whole_ticks
from studies.files import commit, versions
from studies.published import Schedule
from studies.tables import Result, Study, run_study
from studies.tasks import NodeTask


def constants_against_scale(
    scales: Sequence[float],
    *,
    dimensions: int = 4,
    nodes: int = 6,
    points: int = 30,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """The largest local constant that is found at inputs of each size, beside its bounds.

    Half of the points are standard normal, half the worst case of ``lipschitz.tied_keys``, all
    times the scale; queries of the linear score keep their size. ``lemma`` is the bound where the
    largest ``constant`` is attained.

    Source: LipschitzNorm paper, lemma and theorem.
    """
    if points < 2:
        raise ValueError(f"points: expected 2 or more, got {points}")
    rows = []
    for scale in tqdm(scales, "scales", disable=not progress):
        # The same directions for every scale.
        generator, inputs = torch.Generator().manual_seed(seed), []
        for number in range(points):
            draw = dict(generator=generator, dtype=torch.float64)
            query, x = (torch.randn(nodes, dimensions, **draw) for _ in range(2))
            # Two keys of one length are where the largest length has no derivative: near it.
            tied = tied_keys(query[0], nodes, 1.0, generator) + 1e-6 * x
            inputs.append((query, scale * (tied if number % 2 else x)))
        for kind, normalized in product(("linear", "quadratic"), (False, True)):
            bounds = [_bounds(kind, normalized, query, x) for query, x in inputs]
            row = {"scale": scale, "score": kind, "normalized": normalized}
            row |= max(bounds, key=itemgetter("constant"))
            bound = theorem_bound(ALPHA[kind], nodes, nodes) if normalized else float("nan")
            rows.append(row | {"theorem": bound})
    return pd.DataFrame(rows)


def _bounds(kind: str, normalized: bool, query: Tensor, x: Tensor) -> dict[str, float]:
    """The local constant at x, and the lemma there."""
    point = x
    if kind == "quadratic":  # its query ties points along the tied keys whatever its size
        point = torch.cat([query * x.norm() / query.norm(), x, x])

    def score(point: Tensor) -> Tensor:
        if kind == "linear":
            return linear_score(point, query, normalized=normalized)
        return quadratic_score(*point.split(len(x)), normalized=normalized)

    constant = local_constant(lambda p: attention(score(p), p[-len(x) :]), point)
    is_raw = kind == "linear" and not normalized
    steep = torch.linalg.matrix_norm(query, ord=2).item() if is_raw else slope(score, point)
    return {"constant": constant, "lemma": lemma_bound(score(point), x, steep)}


def constants(table: pd.DataFrame) -> sns.FacetGrid:
    """Constants of raw and normalized attention and their bounds against the size of the input."""
    long = table.melt(["scale", "score", "normalized"], ["constant", "lemma", "theorem"], "line")
    attention = long["normalized"].map({False: "raw", True: "normalized"})
    grid = sns.relplot(
        long.assign(attention=attention, score=long["score"] + " score"),
        **dict(kind="line", x="scale", y="value", hue="attention", style="line", col="score"),
        dashes={"constant": "", "lemma": (1, 1), "theorem": (4, 2)},
        palette={"raw": "#E76F51", "normalized": "#264653"},
        height=3.4,
    )
    grid.set_titles("{col_name}").set(xscale="log", yscale="log")
    return grid.set_axis_labels("size of the input", "largest local Lipschitz constant")


GRADIENTS: dict[str, dict[str, Any]] = {
    "no norm": {},
    "no norm, no dropout": {"dropout": 0.0, "attention_dropout": 0.0},
    "LipschitzNorm, f = 1": {"norm": "lipschitz", "scale": 1.0},
    "LipschitzNorm, f = 4": {"norm": "lipschitz", "scale": 4.0},
    "LipschitzNorm, published": {"norm": "lipschitz-published"},
    "published, per head": {"norm": "lipschitz-published-si"},
    "PairNorm": {"norm": "pair"},
    "PairNorm-SI": {"norm": "pair-si"},
    "LayerNorm": {"norm": "layer"},
}
"""The networks whose gradients are compared, by title."""

DROPOUTS = {
    "no norm, dropout of features": {"attention_dropout": 0.0},
    "no norm, dropout of attention": {"dropout": 0.0},
}
"""Those with one kind of dropout; those above have both or none."""


def gradient_evolution(
    splits: Splits,
    variants: Mapping[str, Variant],
    *,
    num_layers: int,
    seeds: Sequence[int],
    schedule: Schedule,
    progress: bool = True,
) -> pd.DataFrame:
    """``gradient_norms`` of networks in training, with the ``train_loss`` before the step.

    Source: LipschitzNorm paper, gradient evolution of a 25-layer GAT.
    """
    rows = []
    pairs = list(product(variants.items(), seeds))
    for (name, variant), seed in tqdm(pairs, "trainings", disable=not progress):
        network = variant.build(num_layers, splits, seed)
        about = {"variant": name, "seed": seed, "num_layers": num_layers}
        about |= {"dataset": splits.description.title}
        for step, loss in descend(network, splits, schedule, seed):
            about["train_loss"] = loss
            rows += [row | about for row in gradient_norms(network, step)]
    return pd.DataFrame(rows)


def gradients(
    splits: Splits,
    *,
    layers: int = 25,  # of every network
    seeds: Sequence[int] = (0, 1, 2, 3, 4),  # of weights and dropout, a training for each
    epochs: int = 60,  # of each training, at a constant rate
    hidden: int = 16,  # channels of a head
    heads: int = 4,  # of attention
    dropouts: bool = False,  # compare kinds of dropout, and not norms
) -> dict[str, pd.DataFrame]:
    """What is tracked: ``heat``, all layers of the first seed, and ``largest`` over layers."""
    sizes = dict(hidden_channels=hidden, heads=heads)
    compared = DROPOUTS if dropouts else GRADIENTS
    variants = {title: Variant(**values, **sizes) for title, values in compared.items()}
    schedule = Schedule(epochs=epochs, lr_patience=None)
    whole = gradient_evolution(splits, variants, num_layers=layers, seeds=seeds, schedule=schedule)
    is_heat = (whole["seed"] == seeds[0]) & (whole["kind"] == "weights")
    keys = ["variant", "seed", "num_layers", "dataset", "epoch", "kind"]
    largest = whole.groupby(keys, sort=False).agg(
        norm=("norm", lambda norms: norms.max(skipna=False)),  # a NaN is no small gradient
        train_loss=("train_loss", "first"),
    )
    parts = {"heat": whole[is_heat].drop(columns="train_loss"), "largest": largest.reset_index()}
    about = {"versions": versions(), "commit": commit(), "heads": heads, "hidden": hidden}
    return {name: table.assign(**about) for name, table in parts.items()}


ARMS: dict[str, dict[str, Any]] = {
    "no remedy": {},
    "clipping": {"clip": 1.0},
    "balanced": {"balanced": True},
    "residual": {"residual": True},
}
"""At the published dropouts nothing, gradients clipped to a norm of all of 1, and two rivals."""

PUBLISHED_DROPOUTS = (0.6, 0.3)
"""Of features and of attention weights."""

F32 = torch.finfo(torch.float32).max
EXPLODES, ORDINARY = 1e3, 1e2
"""A cell explodes if gradients pass the first in four fifths of the seeds, and is ordinary if none
passes the second. Predicted before the run, when three steps of seed 0 had been seen of the arms
and of (0.6, 0.6), and longer runs of (0, 0), (0.6, 0) and (0.6, 0.3): (a) attention dropout alone
is ordinary; (b) feature dropout of 0.6 alone explodes; (c) medians grow with feature dropout at
every rate of the other; (d) at (0.6, 0.6) gradients are in every seed ten times what the kinds give
apart, multiplied; (e) clipping does not prevent it, since Adam divides by the size of gradients;
(f) neither do the balanced start, whose weights are larger, and residual connections."""


def descend(
    network: DeepNetwork, splits: Splits, schedule: Schedule, seed: int, clip: float = math.inf
) -> Iterator[tuple[int, float]]:
    """Train as ``fit`` does at a constant rate; after each backward pass yields step and loss.

    Gradients are clipped after they can be read. A loss that is not finite is the last.
    """
    task = NodeTask(splits, evaluate=False)
    rates = dict(lr=schedule.lr, weight_decay=schedule.weight_decay)
    optimizer = torch.optim.Adam(network.parameters(), **rates)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(1, schedule.epochs + 1):
            loss = next(task.steps(network.train(), schedule, seed))[0]
            optimizer.zero_grad()
            loss.backward()
            yield step, loss.item()
            if not loss.isfinite():
                return
            nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()


def dose(
    splits: Splits,
    *,
    rates: Sequence[float] = (0.0, 0.2, 0.4, 0.6),  # of each kind of dropout, in [0, 1)
    layers: int = 25,  # of every network
    seeds: Sequence[int] = (0, 1, 2, 3, 4),  # of weights and dropout, a training for each
    epochs: int = 40,  # of each training, at a constant rate
    hidden: int = 16,  # channels of a head
    heads: int = 4,  # of attention
    norm: str = "none",  # one of studies.deep.NORMS, in every network
    no_rivals: bool = False,  # leave out remedies at the published dropouts
    further: bool = False,  # remedies that no paper has, and nothing else
    prefix: Path | str | None = None,
) -> Study:
    """Train GATs at all pairs of dropout rates, and with remedies; ``curves`` has the peaks.

    Source: ours.
    """
    arms = FURTHER if further else ARMS
    cases = [("no remedy", *both) for both in product(rates, rates) if not further]
    cases += [(arm, *PUBLISHED_DROPOUTS) for arm in [*arms][: 1 if no_rivals else None]]
    trainings = []
    for seed, (arm, *both) in product(seeds, cases):
        settings = dict(zip(("dropout", "attention_dropout"), both, strict=True)) | arms[arm]
        clip = settings.pop("clip", math.inf)
        variant = Variant(hidden_channels=hidden, heads=heads, norm=norm, **settings)
        about = {"arm": arm, **settings, "norm": norm, "hidden_channels": hidden, "heads": heads}
        about |= dict(num_layers=layers, seed=seed, epochs=epochs, dataset=splits.description.title)
        trainings.append((about, partial(_peaks, variant, splits, layers, seed, epochs, clip)))
    labels = ("arm", "dropout", "attention_dropout", "seed")
    return run_study(trainings, labels=labels, prefix=prefix)


def _peaks(
    variant: Variant, splits: Splits, num_layers: int, seed: int, epochs: int, clip: float
) -> Result:
    """The largest gradient of any layer so far, every tenth step and at the end."""
    network, rows = variant.build(num_layers, splits, seed), []
    for step, loss in descend(network, splits, Schedule(epochs=epochs), seed, clip):
        norms = [row["norm"] for row in gradient_norms(network) if row["kind"] == "weights"]
        norm = max(norms) if np.isfinite(norms).all() else math.inf
        rows.append({"epoch": step, "peak": norm, "loss": loss})
    curve = pd.DataFrame(rows)
    curve["peak"] = curve["peak"].cummax()
    row = {"peak": curve["peak"].iloc[-1], "last_loss": loss, "last_epoch": step}
    return row, curve[(curve["epoch"] % 10 == 0) | (curve["epoch"] == step)]


def amplification(
    splits: Splits,
    *,
    layers: int = 25,  # of every network
    seeds: Sequence[int] = (0, 1),  # of weights and dropout
    steps: Sequence[int] = (1, 8, 16),  # of training, where constants are measured
    hidden: int = 16,  # channels of a head
    heads: int = 4,  # of attention
) -> dict[str, pd.DataFrame]:
    """Local constants of all layers along training, with the published dropouts and without.

    A network that is trained with dropout is measured with masks, as a training step has them, and
    without. Source: ours; constants are those of the LipschitzNorm paper.
    """
    parts, rates = [], {"dropout": PUBLISHED_DROPOUTS, "no dropout": (0.0, 0.0)}
    for (name, both), seed in product(rates.items(), seeds):
        settings = dict(dropout=both[0], attention_dropout=both[1])
        variant = Variant(hidden_channels=hidden, heads=heads, **settings)
        network = variant.build(layers, splits, seed)
        for step, _ in descend(network, splits, Schedule(epochs=max(steps)), seed):
            for masks in sorted({any(both), False}, reverse=True) if step in steps else ():
                table = _constants_by_layer(copy.deepcopy(network).train(masks), splits)
                parts.append(table.assign(training=name, masks=masks, seed=seed, step=step))
    origin = dict(dataset=splits.description.title, versions=versions(), commit=commit())
    return {"constants": pd.concat(parts, ignore_index=True).assign(**origin)}


def _constants_by_layer(network: DeepNetwork, splits: Splits) -> pd.DataFrame:
    """The local constant of each layer, with dropout and activation, and gradients there."""
    graph, rows = splits.train.graph, []
    x = network.embed(graph.x)
    for number, layer in enumerate(network.layers):
        is_last = number + 1 == len(network.layers)

        def apply(x: Tensor, number: int = number, layer: nn.Module = layer, is_last=is_last):
            with torch.random.fork_rng():
                torch.manual_seed(number)  # the same masks at every call
                new = layer(network.dropout(x), graph.edge_index)
            return new if is_last else network.activation(new)

        row = {"constant": _power_iteration(apply, x.detach())}
        row["weight"] = torch.linalg.matrix_norm(layer.lin.weight.detach(), ord=2).item()
        rows.append(row | {"largest": x.norm(dim=1).max().item()})
        x = apply(x)
    network.zero_grad()
    nodes = splits.train.nodes
    nn.functional.cross_entropy(network.head(x)[nodes], graph.y[nodes]).backward()
    gradients = [row for row in gradient_norms(network) if row["kind"] == "weights"]
    return pd.DataFrame(rows).assign(**pd.DataFrame(gradients)[["layer", "norm"]])


def gradient_table(largest: pd.DataFrame) -> pd.DataFrame:
    """The largest gradient of whole trainings, the last loss, and how many seeds overflowed."""
    keys = ["heads", "variant"]
    by_seed = largest[largest["kind"] == "weights"].groupby([*keys, "seed"], sort=False)
    peaks = by_seed["norm"].agg(lambda norms: norms.max(skipna=False))
    shown = {"largest gradient": peaks, "last loss": by_seed["train_loss"].last()}
    values = pd.DataFrame(shown).where(np.isfinite(peaks)).reset_index()
    parts = [tables.over_seeds(values, name, rows=keys) for name in shown]
    counts = (~np.isfinite(peaks)).groupby(keys, sort=False).agg(["sum", "count"])
    overflowed = counts["sum"].astype(str) + "/" + counts["count"].astype(str)
    return pd.concat([*parts, overflowed.rename("overflowed")], axis="columns")


def _power_iteration(function: Callable[[Tensor], Tensor], x: Tensor, steps: int = 15) -> float:
    """The local constant from below, in single precision, where Lanczos iterations may not end."""
    _, pull = vjp(function, x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        change = jvp(function, (x,), (direction / direction.norm(),))[1]
        (direction,) = pull(change)
    return change.norm().item()


def dose_surface(runs: pd.DataFrame) -> Axes:
    """Medians of the largest gradient by both rates, and how many seeds explode or overflow."""
    plain = runs[(runs["arm"] == "no remedy") & (runs["attention_dropout"] != 0.3)]
    cells = plain.groupby(["dropout", "attention_dropout"])["peak"]
    median, count = cells.median().unstack(), cells.size().unstack()
    explode, overflow = (cells.agg(lambda p, a=a: (p > a).sum()).unstack() for a in (EXPLODES, F32))
    text = median.map("{:.0e}".format) + "\n" + explode.astype(str) + "/" + count.astype(str)
    text += overflow.map(lambda number: f", {number} overflow" if number else "")
    powers = np.log10(median.clip(upper=F32))
    look = dict(cmap="magma", annot=text, fmt="", annot_kws={"size": 8})
    ax = sns.heatmap(powers, **look, cbar_kws={"label": "largest gradient, power of ten"})
    ax.set(xlabel="dropout of attention weights", ylabel="dropout of features")
    return ax


def amplification_table(constants: pd.DataFrame) -> pd.DataFrame:
    """Powers of ten: products over layers of constants and of weights, and the first gradient."""
    powers = constants.assign(**np.log10(constants[["constant", "weight", "norm", "largest"]]))
    by_network = powers.groupby(["training", "masks", "step", "seed"], sort=False)
    columns = dict(constants=("constant", "sum"), weights=("weight", "sum"))
    return by_network.agg(**columns, largest=("largest", "max"), gradient=("norm", "first"))


def dose_table(runs: pd.DataFrame) -> pd.DataFrame:
    """The arms at the published dropouts: the largest gradient and the last loss, over seeds."""
    arms = runs[runs["attention_dropout"] == PUBLISHED_DROPOUTS[1]]
    shown = {"peak": "largest gradient", "last_loss": "last loss"}
    parts = [tables.over_seeds(arms, name, rows=["arm"]) for name in shown]
    return pd.concat(parts, axis="columns").rename(columns=shown)


def gradient_heat(gradients: pd.DataFrame) -> sns.FacetGrid:
    """Gradient norms of every layer after every step for the first seed, a panel per variant."""
    is_first = gradients["seed"] == gradients["seed"].iloc[0]
    rows = gradients[is_first & (gradients["kind"] == "weights")]
    positive = rows.loc[np.isfinite(rows["norm"]) & (rows["norm"] > 0), "norm"]
    look = dict(norm=LogNorm(positive.min(), positive.max()), cmap="magma")
    columns = min(3, rows["variant"].nunique())
    grid = sns.FacetGrid(rows, col="variant", col_wrap=columns, height=2.4, aspect=1.25)
    for variant, ax in grid.axes_dict.items():
        wide = rows[rows["variant"] == variant].pivot(index="layer", columns="epoch", values="norm")
        mesh = ax.pcolormesh(wide.columns, wide.index, wide, **look)
    whole_ticks(grid, "xy", 5)
    grid.set_titles("{col_name}").set_axis_labels("step", "layer")
    grid.figure.colorbar(mesh, ax=list(grid.axes.flat), label="norm of the gradient")
    return grid
