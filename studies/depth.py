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
import seaborn as sns
import torch
from matplotlib.colors import LogNorm
from matplotlib.ticker import NullFormatter
from tqdm import tqdm

from studies import tables
from studies.data import Splits
from studies.deep import NORMS, DeepNetwork
from studies.figures import layer_colors, over_seeds, whole_ticks
from studies.provenance import commit, versions
from studies.published import known, titles
from studies.schedule import Fit, Schedule
from studies.tables import Result, Study, run_study
from studies.tasks import COLUMNS, NodeTask, observe_gradients
from studies.train import fit

DEPTHS = (1, 2, 5, 10, 15, 20, 25, 30)
"""Numbers of layers of the depth study."""

TARGET_LOSS = 0.5
"""The training loss below which a network has converged."""

CURVE_EVERY = 5
"""Epochs between two points of a tracked loss curve."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Hyper-parameters of a ``DeepNetwork``, without the number of layers."""

    architecture: str = "gat"
    norm: str = "none"
    scale: float | None = None
    hidden_channels: int = 16
    heads: int = 4
    dropout: float | None = None
    attention_dropout: float = 0.3
    residual: bool = False

    def build(self, num_layers: int, splits: Splits, seed: int) -> DeepNetwork:
        """The untrained network of a seed for the features and classes of a data set."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return DeepNetwork(
                num_layers=num_layers,
                in_channels=splits.train.graph.num_features,
                out_channels=splits.description.num_targets,
                **asdict(self),
            )


def gradient_variants(**sizes: int) -> dict[str, Variant]:
    """The networks whose gradients are compared, by title, with these widths and heads."""
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


def gradient_evolution(
    splits: Splits,
    variants: Mapping[str, Variant],
    *,
    num_layers: int = 25,
    seeds: Sequence[int] = (0, 1, 2),
    schedule: Schedule | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Gradient norms of every layer through training, by default 60 epochs at a constant rate.

    Returns:
        A row per ``variant``, ``seed``, ``epoch``, ``layer`` and ``kind`` of parameters, with the
        ``norm`` of the gradient and the ``train_loss`` before the step.

    Source: LipschitzNorm paper, gradient evolution of a 25-layer GAT.
    """
    schedule = Schedule(epochs=60, lr_patience=None) if schedule is None else schedule
    parts = []
    pairs = list(product(variants.items(), seeds))
    for (name, variant), seed in tqdm(pairs, "trainings", file=sys.stderr, disable=not progress):
        network = variant.build(num_layers, splits, seed)
        settings = dict(seed=seed, observe=observe_gradients, progress=False)
        training = fit(network, NodeTask(splits, evaluate=False), schedule, **settings)
        losses = training.history[["epoch", "train_loss"]]
        about = {"variant": name, "seed": seed, "num_layers": num_layers}
        about |= {"dataset": splits.description.title}
        parts.append(training.observations.merge(losses, on="epoch").assign(**about))
    return pd.concat(parts, ignore_index=True)


def compact_gradients(gradients: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What is tracked: ``heat``, all layers of the first seed, and ``largest`` over layers."""
    is_first = gradients["seed"] == gradients["seed"].iloc[0]
    heat = gradients[is_first & (gradients["kind"] == "weights")].drop(columns="train_loss")
    keys = ["variant", "seed", "num_layers", "dataset", "epoch", "kind"]
    largest = gradients.groupby(keys, sort=False).agg(
        norm=("norm", lambda norms: norms.max(skipna=False)),  # a NaN is no small gradient
        train_loss=("train_loss", "first"),
    )
    origin = {"versions": versions(), "commit": commit()}
    return {"heat": heat.assign(**origin), "largest": largest.reset_index().assign(**origin)}


def gradients(
    splits: Splits,
    *,
    layers: int = 25,  # of every network
    seeds: Sequence[int] = (0, 1, 2, 3, 4),  # of weights and dropout, a training for each
    epochs: int = 60,  # of each training, at a constant rate
    hidden: int = 16,  # channels of a head
    heads: int = 4,  # of attention
) -> dict[str, pd.DataFrame]:
    """``compact_gradients`` of all ``gradient_variants``."""
    variants = gradient_variants(hidden_channels=hidden, heads=heads)
    schedule = Schedule(epochs=epochs, lr_patience=None)
    whole = gradient_evolution(splits, variants, num_layers=layers, seeds=seeds, schedule=schedule)
    sizes = dict(heads=heads, hidden=hidden)
    return {name: table.assign(**sizes) for name, table in compact_gradients(whole).items()}


def gradient_table(largest: pd.DataFrame) -> pd.DataFrame:
    """The largest gradient of whole trainings, the last loss, and how many seeds overflowed."""
    keys = ["heads", "variant"]
    by_seed = largest[largest["kind"] == "weights"].groupby([*keys, "seed"], sort=False)
    values = by_seed.agg(
        **{
            "largest gradient": ("norm", lambda norms: norms.max(skipna=False)),
            "last loss": ("train_loss", "last"),
        }
    ).reset_index()
    shown = list(values.columns[3:])
    is_finite = np.isfinite(values[shown[0]])
    values[shown] = values[shown].where(is_finite)
    parts = [tables.over_seeds(values, name, rows=keys) for name in shown]
    counts = (~is_finite).groupby([values[key] for key in keys], sort=False).agg(["sum", "count"])
    overflowed = counts["sum"].astype(str) + "/" + counts["count"].astype(str)
    return pd.concat([*parts, overflowed.rename("overflowed")], axis="columns")


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
    """Train every variant at every depth with every seed, by default with the published schedule.

    Args:
        splits: of ``NodesOfGraph``.
        variants, depths, seeds: networks, numbers of layers, and seeds of weights and dropout.
        schedule: of training; None means the published one, 200 epochs.
        prefix: of the tables, see ``tables.run_study``.
        progress: whether to show a progress bar on stderr.

    Returns:
        In ``runs`` a row per training with its settings and ``fit_summary``; in ``curves`` training
        losses of the first and every fifth epoch.

    Source: LipschitzNorm paper, convergence and accuracy against depth.
    """
    schedule = Schedule() if schedule is None else schedule

    def train(variant: Variant, depth: int, seed: int) -> Result:
        network = variant.build(depth, splits, seed)
        training = fit(network, splits, schedule, seed=seed, progress=False)
        history = training.history
        is_shown = history["epoch"].isin([1, *range(0, schedule.epochs + 1, CURVE_EVERY)])
        return fit_summary(training), history.loc[is_shown, ["epoch", "train_loss"]]

    trainings = []
    for depth, seed, variant in product(depths, seeds, variants):
        about = {**asdict(variant), "num_layers": depth, "seed": seed}
        about |= {"dataset": splits.description.title, **schedule.columns(*COLUMNS)}
        trainings.append((about, partial(train, variant, depth, seed)))
    labels = ("architecture", "norm", "scale", "num_layers", "seed")
    return run_study(trainings, labels=labels, prefix=prefix, progress=progress)


def depth(
    splits: Splits,
    *,
    architecture: str,  # gat or gt
    norms: Sequence[str],  # names of studies.deep.NORMS; lipschitz=4 sets the scale, too
    layers: Sequence[int] = DEPTHS,  # numbers of layers
    seeds: Sequence[int] = (0, 1, 2),  # of weights and dropout, a training for each
    constant_rate: bool = False,  # a learning rate that does not fall
    epochs: int = 200,  # of each training
    hidden: int = 16,  # channels of a head
    heads: int = 4,  # of attention
    prefix: Path | str,
) -> None:
    """``depth_study`` of one architecture and norms by name."""
    known("--architecture", architecture, dict.fromkeys(("gat", "gt")))
    variants = []
    for text in norms:
        norm, is_scaled, scale = text.partition("=")
        known("--norms", norm, dict.fromkeys(NORMS))
        try:
            number = float(scale) if is_scaled else None
        except ValueError:
            raise ValueError(f"--norms {text}: expected NORM or NORM=SCALE") from None
        sizes = dict(hidden_channels=hidden, heads=heads)
        variants.append(Variant(architecture=architecture, norm=norm, scale=number, **sizes))
    schedule = Schedule(epochs=epochs, lr_patience=None if constant_rate else Schedule.lr_patience)
    depth_study(splits, variants, depths=layers, seeds=seeds, schedule=schedule, prefix=prefix)


def fit_summary(training: Fit) -> dict[str, Any]:
    """What a row says of a training: accuracies, losses, convergence.

    ``test_last`` is of the last epoch, the published protocol; ``test_best`` of the first
    ``best_epoch`` with the best validation accuracy ``val_best``; ``converged`` is the first epoch
    with a training loss below ``TARGET_LOSS``, NaN for never. Training ends before the last epoch
    if the learning rate has died or the loss is no longer finite.
    """
    history = training.history
    best = history.loc[history["val_accuracy"].idxmax()]
    return {
        "test_last": history["test_accuracy"].iloc[-1],
        "test_best": best["test_accuracy"],
        "val_best": best["val_accuracy"],
        "best_epoch": int(best["epoch"]),
        "last_epoch": int(history["epoch"].iloc[-1]),
        "least_loss": history["train_loss"].min(),
        "converged": float(history.loc[history["train_loss"] < TARGET_LOSS, "epoch"].min()),
        "finite": training.stop_reason != "not finite",
    }


TITLES = {
    "none": "no norm",
    "lipschitz": "LipschitzNorm",
    "lipschitz-layer": "LipschitzNorm + LayerNorm",
    "lipschitz-published": "Lipschitz, published",
    "lipschitz-published-si": "Lipschitz, published, per head",
    "layer": "LayerNorm",
    "pair": "PairNorm",
    "pair-si": "PairNorm-SI",
}
"""Of norms, in tables and figures."""

STUDIES = titles("depth")
CONSTANT_RATE = titles("constant depth")
"""Tracked depth studies, from their files to their titles; that at a constant rate is a control."""


def read_depth(
    folder: Path | str, table: str = "runs", studies: Mapping[str, str] = STUDIES
) -> pd.DataFrame:
    """``runs`` or ``curves`` of tracked studies as one table, with the title of each as ``run``."""
    return named(tables.read(folder, "", studies, table))


def named(table: pd.DataFrame) -> pd.DataFrame:
    """The table with ``variant``, the title of the norm and, if it is set, the scale."""
    titles = table["norm"].map(TITLES)
    scale = table["scale"].astype(float)
    return table.assign(
        variant=titles.where(scale.isna(), titles + ", f = " + scale.map("{:g}".format))
    )


def gradient_heat(gradients: pd.DataFrame, *, columns: int = 3) -> sns.FacetGrid:
    """Gradient norms of every layer after every step for the first seed, a panel per variant."""
    is_first = gradients["seed"] == gradients["seed"].iloc[0]
    rows = gradients[is_first & (gradients["kind"] == "weights")]
    positive = rows.loc[np.isfinite(rows["norm"]) & (rows["norm"] > 0), "norm"]
    look = dict(norm=LogNorm(positive.min(), positive.max()), cmap="magma")
    columns = min(columns, rows["variant"].nunique())
    grid = sns.FacetGrid(rows, col="variant", col_wrap=columns, height=2.4, aspect=1.25)
    for variant, ax in grid.axes_dict.items():
        wide = rows[rows["variant"] == variant].pivot(index="layer", columns="epoch", values="norm")
        mesh = ax.pcolormesh(wide.columns, wide.index, wide, **look)
    whole_ticks(grid, "xy", 5)
    grid.set_titles("{col_name}").set_axis_labels("step", "layer")
    grid.figure.colorbar(mesh, ax=list(grid.axes.flat), label="norm of the gradient")
    return grid


def largest_gradients(gradients: pd.DataFrame, **look: Any) -> sns.FacetGrid:
    """The largest gradient norm of any layer by step; a line ends where one is not finite."""
    keys = ["variant", "epoch", *([look["panel"]] if "panel" in look else [])]
    rows = gradients[gradients["kind"] == "weights"]
    rows = rows.groupby([*keys, "seed"], sort=False)["norm"].max(skipna=False).reset_index()
    is_finite = np.isfinite(rows["norm"]).groupby([rows[key] for key in keys]).transform("all")
    labels = {"epoch": "step", "norm": "largest gradient norm of any layer"}
    settings = dict(x="epoch", y="norm", color="variant", log="y", labels=labels, marker=None)
    grid = over_seeds(rows[is_finite], **settings, **look)
    whole_ticks(grid)
    return grid


def loss_by_depth(curves: pd.DataFrame, *, columns: int = 4, top: float = 10.0) -> sns.FacetGrid:
    """Training losses, a panel per variant, a color per number of layers; cut above ``top``."""
    grid = over_seeds(
        curves,
        **dict(x="epoch", y="train_loss", color="num_layers", panel="variant", log="y"),
        columns=columns,
        labels={"train_loss": "training loss"},
        palette=layer_colors(curves["num_layers"]),
        marker=None,
        size=(2.6, 2.3),
    )
    grid.legend.set_title("layers")
    grid.set(ylim=(None, min(grid.axes.flat[0].get_ylim()[1], top)))
    for ax in grid.axes.flat:
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    return grid


def by_depth(
    runs: pd.DataFrame, values: Mapping[str, str], *, panel: str = "run", **look: Any
) -> sns.FacetGrid:
    """Accuracies by number of layers, means over seeds, a panel per group and value.

    Args:
        runs: columns ``num_layers``, ``seed``, ``variant``, that of the panel and the values.
        values: from columns to what titles of panels say of them; nothing if it is empty.
        panel: the column that tells panels apart.
        **look: of ``figures.over_seeds``.
    """
    parts = [
        runs.assign(accuracy=runs[value], panel=runs[panel] + (f"\n{title}" if title else ""))
        for value, title in values.items()
    ]
    labels = {"num_layers": "layers", "accuracy": "test accuracy"}
    settings = dict(x="num_layers", y="accuracy", color="variant", panel="panel", labels=labels)
    grid = over_seeds(pd.concat(parts), **settings, estimator="mean", **look)
    whole_ticks(grid)
    return grid
