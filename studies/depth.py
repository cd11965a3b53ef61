"""Deep attention networks: gradients through training, convergence and accuracy by depth."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from studies.data import Splits
from studies.deep import DeepNetwork, deep_network
from studies.provenance import commit, versions
from studies.study import Result, Study, read_tables, run_study
from studies.train_nodes import NodeFit, Schedule, fit_nodes

DEPTHS = (1, 2, 5, 10, 15, 20, 25, 30)
"""Numbers of layers of the depth study."""

TARGET_LOSS = 0.5
"""The training loss that has to be reached to have converged."""

CURVE_EVERY = 5
"""Epochs between two points of a tracked loss curve."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A network of the depth studies, but for its number of layers.

    Attributes:
        architecture, norm, scale, hidden_channels, heads, dropout, attention_dropout, residual: as
            for ``models.deep.deep_network``.
    """

    architecture: str = "gat"
    norm: str = "none"
    scale: float | None = None
    hidden_channels: int = 16
    heads: int = 4
    dropout: float | None = None
    attention_dropout: float = 0.3
    residual: bool = False

    def build(self, num_layers: int, splits: Splits, seed: int) -> DeepNetwork:
        """The untrained network of a seed for a data set.

        Args:
            num_layers: L.
            splits: of ``NodesOfGraph``; give the numbers of features and classes.
            seed: of the initial weights.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return deep_network(
                num_layers=num_layers,
                in_channels=splits.train.graph.num_features,
                out_channels=splits.description.num_targets,
                **asdict(self),
            )


def gradient_variants(**sizes: int) -> dict[str, Variant]:
    """The networks whose gradients are compared, from titles.

    Args:
        **sizes: ``hidden_channels`` and ``heads``.
    """
    settings: dict[str, dict[str, Any]] = {
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
    return {title: Variant(**values, **sizes) for title, values in settings.items()}


@dataclass(frozen=True)
class Evolution:
    """Trainings of several variants, a row per epoch.

    Attributes:
        history: of ``NodeFit``, with ``variant`` and ``seed``.
        gradients: of ``NodeFit``, with ``variant`` and ``seed``.
    """

    history: pd.DataFrame
    gradients: pd.DataFrame


def gradient_evolution(
    splits: Splits,
    variants: Mapping[str, Variant],
    *,
    num_layers: int = 25,
    seeds: Sequence[int] = (0, 1, 2),
    schedule: Schedule | None = None,
    progress: bool = True,
) -> Evolution:
    """Gradient norms of every layer through training.

    Args:
        splits: of ``NodesOfGraph``.
        variants: networks, by the name that tables give them.
        num_layers: L.
        seeds: of weights and dropout.
        schedule: of training; None means 60 epochs at a constant rate.
        progress: whether to show a progress bar on stderr.

    Source: LipschitzNorm paper, gradient evolution of a 25-layer GAT.
    """
    schedule = Schedule(epochs=60, lr_patience=None) if schedule is None else schedule
    history, gradients = [], []
    pairs = list(product(variants.items(), seeds))
    for (name, variant), seed in tqdm(pairs, "trainings", file=sys.stderr, disable=not progress):
        network = variant.build(num_layers, splits, seed)
        settings = dict(seed=seed, evaluate=False, record_gradients=True, progress=False)
        run = fit_nodes(network, splits, schedule, **settings)
        origin = {"variant": name, "seed": seed, "num_layers": num_layers}
        origin |= {"dataset": splits.description.title}
        history.append(run.history.assign(**origin))
        gradients.append(run.gradients.assign(**origin))
    return Evolution(*(pd.concat(parts, ignore_index=True) for parts in (history, gradients)))


def compact_gradients(evolution: Evolution) -> dict[str, pd.DataFrame]:
    """What is kept of gradients: the largest of every seed, and the layers of one seed.

    Args:
        evolution: of ``gradient_evolution``.

    Returns:
        ``heat``, the rows of the first seed for the weights; and ``largest``, a row per variant,
        seed, step and kind with the largest ``norm`` over layers and the ``train_loss``.
    """
    gradients = evolution.gradients
    first = gradients["seed"].iloc[0]
    heat = gradients[(gradients["seed"] == first) & (gradients["kind"] == "weights")]
    keys = ["variant", "seed", "num_layers", "dataset", "epoch", "kind"]
    largest = gradients.groupby(keys, sort=False)["norm"].agg(_largest).reset_index()
    losses = evolution.history[["variant", "seed", "epoch", "train_loss"]]
    largest = largest.merge(losses, on=["variant", "seed", "epoch"], validate="many_to_one")
    origin = {"versions": versions(), "commit": commit()}
    return {"heat": heat.assign(**origin), "largest": largest.assign(**origin)}


def _largest(norms: pd.Series) -> float:
    return float(norms.max(skipna=False))  # a NaN is no small gradient


def depth_study(
    splits: Splits,
    variants: Sequence[Variant],
    *,
    depths: Sequence[int] = DEPTHS,
    seeds: Sequence[int] = (0, 1, 2),
    schedule: Schedule | None = None,
    prefix: Path | str | None = None,
    progress: bool = True,
) -> Study:
    """Train every variant at every depth with every seed.

    Args:
        splits: of ``NodesOfGraph``.
        variants: networks.
        depths: numbers of layers.
        seeds: of weights and dropout.
        schedule: of training; None means the published one, 200 epochs.
        prefix: where tables are written after each training, ``PREFIX_runs.csv.gz`` and
            ``PREFIX_curves.csv.gz``; what is there already is not trained again. None keeps all in
            memory.
        progress: whether to show a progress bar on stderr.

    Returns:
        In ``runs`` a row per training, with the variant's settings, ``num_layers``, ``seed``;
        accuracies ``test_last`` (of the last epoch, the published protocol), ``test_best`` (of the
        epoch ``best_epoch`` with the best validation accuracy, the first of several) and
        ``val_best``; ``last_epoch``, before the last of the schedule if the rate has died or the
        loss is no longer finite; ``least_loss``; ``converged``, the first epoch whose training loss
        is below ``TARGET_LOSS``, NaN for never; ``finite``; and the origin. In ``curves`` training
        losses of every fifth epoch, and the first.

    Source: LipschitzNorm paper, convergence and accuracy against depth.
    """
    schedule = Schedule() if schedule is None else schedule

    def train(variant: Variant, depth: int, seed: int) -> Result:
        network = variant.build(depth, splits, seed)
        run = fit_nodes(network, splits, schedule, seed=seed, progress=False)
        kept = run.history["epoch"].isin([1, *range(0, schedule.epochs + 1, CURVE_EVERY)])
        return fit_summary(run), run.history.loc[kept, ["epoch", "train_loss"]]

    trainings = []
    for depth, seed, variant in product(depths, seeds, variants):
        about = {**asdict(variant), "num_layers": depth, "seed": seed}
        about |= {"dataset": splits.description.title, **asdict(schedule)}
        trainings.append((about, partial(train, variant, depth, seed)))
    labels = ("architecture", "norm", "scale", "num_layers", "seed")
    return run_study(trainings, labels=labels, prefix=prefix, progress=progress)


def fit_summary(run: NodeFit) -> dict[str, Any]:
    """What a row of ``depth_study`` says of a training: accuracies, losses, convergence.

    Args:
        run: evaluated after every epoch.
    """
    history = run.history
    best = history.loc[history["val_accuracy"].idxmax()]
    below = history.loc[history["train_loss"] < TARGET_LOSS, "epoch"]
    return {
        "test_last": history["test_accuracy"].iloc[-1],
        "test_best": best["test_accuracy"],
        "val_best": best["val_accuracy"],
        "best_epoch": int(best["epoch"]),
        "last_epoch": int(history["epoch"].iloc[-1]),
        "least_loss": history["train_loss"].min(),
        "converged": float(below.min()) if len(below) else float("nan"),
        "finite": run.stop_reason != "not finite",
    }


def gradient_table(largest: pd.DataFrame) -> pd.DataFrame:
    """The largest gradient of the whole training and the last loss, over seeds.

    Args:
        largest: of ``compact_gradients``, with ``heads``.

    Returns:
        A row per number of heads and variant. ``largest gradient`` is the median over seeds of
        the largest norm of any layer at any step, with the least and the greatest; ``last loss``,
        likewise; and ``overflowed``, how many seeds had a gradient that was not finite.
    """
    weights = largest[largest["kind"] == "weights"]
    rows = []
    for (heads, variant), group in weights.groupby(["heads", "variant"], sort=False):
        by_seed = group.groupby("seed")
        is_finite = by_seed["norm"].agg(lambda norms: np.isfinite(norms).all())
        peak, last = by_seed["norm"].max(), by_seed["train_loss"].last()
        row = {"heads": heads, "variant": variant}
        row |= {"largest gradient": _spread(peak[is_finite])}
        row |= {"last loss": _spread(last[is_finite])}
        row |= {"overflowed": f"{(~is_finite).sum()}/{len(is_finite)}"}
        rows.append(row)
    return pd.DataFrame(rows)


def _spread(values: pd.Series) -> str:
    if values.empty:
        return "-"
    middle, least, greatest = map(_short, (values.median(), values.min(), values.max()))
    return f"{middle} ({least}-{greatest})"


def _short(value: float) -> str:
    if value >= 1e4:
        return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.3g}"


TITLES = {
    "none": "no norm",
    "lipschitz": "LipschitzNorm",
    "lipschitz-layer": "LipschitzNorm + LayerNorm",
    "lipschitz-published": "Lipschitz, published",
    "lipschitz-published-si": "Lipschitz, published, per head",
    "layer": "LayerNorm",
    "layer-graph": "LayerNorm over the graph",
    "pair": "PairNorm",
    "pair-si": "PairNorm-SI",
}
"""Of norms, in tables and figures."""

STUDIES = {
    "depth_cora_gat": "GAT, Cora",
    "depth_cora_gt": "Graph Transformer, Cora",
    "depth_citeseer_gat": "GAT, CiteSeer",
    "depth_citeseer_gt": "Graph Transformer, CiteSeer",
}
CONSTANT_RATE = {"depth_cora_gat_constant": "GAT, Cora, constant rate"}
"""Tracked depth studies, from their files to their titles; that at a constant rate is a control."""


def read_depth(folder: Path | str, studies: Mapping[str, str] = STUDIES) -> Study:
    """Tracked depth studies as one, with ``panel``, the study's title, and ``variant``.

    Args:
        folder: where their tables are.
        studies: from the prefix of files to the title.

    Raises:
        FileNotFoundError: if a table is missing.
    """
    tables = {name: read_tables(folder, studies, name) for name in ("runs", "curves")}
    return Study(
        **{name: named(t.assign(panel=t["study"].map(studies))) for name, t in tables.items()}
    )


def named(table: pd.DataFrame) -> pd.DataFrame:
    """A depth study's table with ``variant``, the title of its norm and, if it is set, scale.

    Args:
        table: ``runs`` or ``curves`` of ``depth_study``.
    """
    scale = pd.to_numeric(table["scale"], errors="coerce")
    titles = table["norm"].map(TITLES)
    scaled = titles + ", f = " + scale.map("{:g}".format)
    return table.assign(variant=titles.where(scale.isna(), scaled))


def by_depth_table(
    runs: pd.DataFrame,
    value: str,
    *,
    form: str = "{:.2f}",
    never: str = "never",
    has_median: bool = True,
) -> pd.DataFrame:
    """A value by variant and number of layers, as the median over seeds with its range.

    Args:
        runs: of ``read_depth``, of one study.
        value: a column.
        form: of a number.
        never: what stands for a value that is not there.
        has_median: whether the median is there, or the range alone.
    """

    def cell(values: pd.Series) -> str:
        values = pd.to_numeric(values, errors="coerce").fillna(np.inf)
        middle, least, most = values.median(), values.min(), values.max()
        shown = [form.format(v) if np.isfinite(v) else never for v in (middle, least, most)]
        if shown[1] == shown[2]:
            return shown[0]
        ends = f"{shown[1]}-{shown[2]}"
        return f"{shown[0]} ({ends})" if has_median else ends

    wide = runs.groupby(["variant", "num_layers"], sort=False)[value].agg(cell).unstack()
    wide = wide.sort_index(axis="columns").reindex(runs["variant"].unique())
    return wide.rename_axis(columns="layers")
