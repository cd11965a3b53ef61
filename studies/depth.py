"""Deep attention networks: loss and accuracy by depth, also where features are hidden."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns

from studies import tables
from studies.data import Splits
from studies.deep import LAYERS, REMEDY_NAMES, RIVALS, Variant
from studies.figures import layer_colors, over_seeds, whole_ticks
from studies.published import Schedule, known, titles
from studies.tables import Result, Study, run_study
from studies.tasks import COLUMNS, hide_features
from studies.train import fit

TITLES = {
    "none": "no norm",
    "lipschitz": "LipschitzNorm",
    "lipschitz-layer": "LipschitzNorm + LayerNorm",
    "lipschitz-published": "Lipschitz, published",
    "lipschitz-published-si": "Lipschitz, published, per head",
    "layer": "LayerNorm",
    "pair": "PairNorm",
    "pair-si": "PairNorm-SI",
    "residual": "residual",
    "balanced": "balanced start",
}
"""Of norms and their rivals, in tables and figures."""


def depth(
    splits: Splits,
    *,
    architecture: str,  # gat, gt, gcn or ggnn
    norms: Sequence[str],  # names of studies.deep.REMEDY_NAMES; lipschitz=4 sets the scale, too
    layers: Sequence[int] = (1, 2, 5, 10, 15, 20, 25, 30),  # numbers of layers
    seeds: Sequence[int] = (0, 1, 2),  # of weights and dropout, a training for each
    constant_rate: bool = False,  # a learning rate that does not fall
    epochs: int = 200,  # of each training
    lr: float = 0.005,  # learning rate at the start
    weight_decay: float = 0.0005,  # of Adam
    hidden: int = 16,  # channels of a head
    heads: int = 4,  # of attention
    dropout: float | None = None,  # of features, if not 0.6 for GAT and else 0.5
    attention_dropout: float = 0.3,  # of attention weights
    prefix: Path | str | None = None,
    progress: bool = True,
) -> Study:
    """Train networks of every norm and depth: ``runs``, and ``curves`` of their training losses.

    Source: LipschitzNorm paper, convergence and accuracy against depth.
    """
    known("--architecture", architecture, LAYERS)
    rates = dict(dropout=dropout, attention_dropout=attention_dropout)
    sizes = dict(architecture=architecture, hidden_channels=hidden, heads=heads, **rates)
    variants = [Variant(**norm_and_scale(norm, REMEDY_NAMES), **sizes) for norm in norms]
    schedule = Schedule(epochs=epochs, lr=lr, weight_decay=weight_decay)
    schedule = replace(schedule, lr_patience=None) if constant_rate else schedule
    trainings = []
    for num_layers, seed, variant in product(layers, seeds, variants):
        about = {**asdict(variant), "num_layers": num_layers, "seed": seed}
        about |= {"dataset": splits.description.title, **schedule.columns(*COLUMNS)}
        training = partial(_train, variant, splits, num_layers, seed, schedule, 5)
        trainings.append((about, training))
    labels = ("architecture", "norm", "scale", *RIVALS, "num_layers", "seed")
    return run_study(trainings, labels=labels, prefix=prefix, progress=progress)


def norm_and_scale(text: str, among: Collection[str]) -> dict[str, Any]:
    """What NORM or NORM=SCALE, or the name of a rival, stands for."""
    norm, is_scaled, scale = text.partition("=")
    known("--norms", norm, dict.fromkeys(among))
    if norm in RIVALS:
        return dict(RIVALS[norm])
    try:
        return {"norm": norm, "scale": float(scale) if is_scaled else None}
    except ValueError:
        raise ValueError(f"--norms {text}: expected NORM or NORM=SCALE") from None


def _train(
    variant: Variant, splits: Splits, num_layers: int, seed: int, schedule: Schedule, every: int
) -> Result:
    """What a row says of a training, and its curve: every so many epochs, or the last one for 0.

    ``test_last`` is the published protocol. Training ends before the last epoch if the learning
    rate has died or the loss is no longer finite.
    """
    network = variant.build(num_layers, splits, seed)
    training = fit(network, splits, schedule, seed=seed, progress=False)
    history = training.history
    best, last = history.loc[history["val_accuracy"].idxmax()], history.iloc[-1]
    row = {
        "test_last": last["test_accuracy"],
        "test_best": best["test_accuracy"],
        "val_best": best["val_accuracy"],
        "best_epoch": int(best["epoch"]),
        "last_epoch": int(last["epoch"]),
        "least_loss": history["train_loss"].min(),
        "converged": float(history.loc[history["train_loss"] < 0.5, "epoch"].min()),
        "finite": training.stop_reason != "not finite",
    }
    if not every:
        return row, history.drop(columns="seconds").tail(1)
    is_shown = (history["epoch"] == 1) | (history["epoch"] % every == 0)
    return row, history.loc[is_shown, ["epoch", "train_loss"]]


def read_depth(folder: Path | str, table: str = "runs", group: str = "depth") -> pd.DataFrame:
    """``runs`` or ``curves`` of a group of the grid as one table, with their titles as ``run``."""
    return named(tables.read(folder, "", titles(group), table))


def named(table: pd.DataFrame) -> pd.DataFrame:
    """The table with ``variant``, the title of the norm and, if it is set, the scale."""
    norm, scale = table["norm"].map(TITLES), table["scale"].astype(float)
    for rival in RIVALS.keys() & {*table}:
        norm = norm.mask(table[rival].eq(True), TITLES[rival])
    scaled = norm + ", f = " + scale.map("{:g}".format)
    return table.assign(variant=norm.where(scale.isna(), scaled))


def loss_by_depth(curves: pd.DataFrame, *, columns: int = 4) -> sns.FacetGrid:
    """Training losses, a panel per variant, a color per number of layers; cut above 10."""
    grid = over_seeds(
        curves,
        **dict(x="epoch", y="train_loss", color="num_layers", panel="variant", log="y"),
        **dict(columns=columns, size=(2.6, 2.3), marker=None),
        labels={"train_loss": "training loss"},
        palette=layer_colors(curves["num_layers"]),
    )
    grid.legend.set_title("layers")
    grid.tick_params(axis="y", which="minor", labelleft=False)  # they reach into other panels
    return grid.set(ylim=(None, min(grid.axes.flat[0].get_ylim()[1], 10)))


def by_depth(
    runs: pd.DataFrame, values: Mapping[str, str], *, panel: str = "run", **look: Any
) -> sns.FacetGrid:
    """Accuracies by number of layers, means over seeds, a panel per group and value."""
    parts = [
        runs.assign(accuracy=runs[value], panel=runs[panel] + (f"\n{title}" if title else ""))
        for value, title in values.items()
    ]
    labels = {"num_layers": "layers", "accuracy": "test accuracy"}
    settings = dict(x="num_layers", y="accuracy", color="variant", panel="panel", labels=labels)
    look |= dict(estimator="mean", style="variant")  # legible without color
    grid = over_seeds(pd.concat(parts), **settings, **look)
    whole_ticks(grid)
    return grid


MODELS = {
    "GCN": Variant(architecture="gcn"),
    "GGNN": Variant(architecture="ggnn"),
    "GAT": Variant(architecture="gat"),
    "GAT-Pn": Variant(architecture="gat", norm="pair"),
    "GAT-Lip": Variant(architecture="gat", norm="lipschitz"),
    "GAT, residual": Variant(residual=True),
    "GAT, balanced": Variant(balanced=True),
    "GAT, LayerNorm": Variant(norm="layer"),
    "GAT, no dropout": Variant(dropout=0.0, attention_dropout=0.0),
    "GAT, DropEdge": Variant(drop_edge=0.5),
    "GAT, jumping knowledge": Variant(jumping=True),
    "GCNII": Variant(architecture="gcnii"),
}
"""The networks of the table of missing features, by their names in it, and their rivals."""

CHOICES = {"validation": ("val_best", "test_best"), "test": ("test_last", "test_last")}
"""What the number of layers is chosen by, and what is reported. ``validation``, the mean of the
best validation accuracy, with the test accuracy of these epochs; ``test``, the mean test accuracy
of the last epoch, which is also what is reported and so is too high."""

_TABLE = """
GCN      82.5 1.2  2  58.8 3.5  2  69.5 2.1  2  31.3 2.7  2  77.9 1.4  2  44.9 4.4  2
GGNN     81.8 2.0  2  68.2 2.5  6  68.5 1.9  3  40.5 1.4  5  78.4 2.1  4  56.6 1.9  4
GAT      82.3 2.3  2  65.3 2.1  4  69.3 1.6  2  42.8 1.6  4  77.4 0.5  6  63.1 0.7  4
GAT-Pn   78.8 0.6  4  73.8 1.2 12  67.2 0.8  4  51.7 1.1 10  77.6 1.6  8  70.4 1.1 12
GAT-Lip  83.1 0.5  5  75.3 0.9 11  69.1 1.5  3  50.9 1.9  9  78.9 1.3  5  73.3 1.4 15
"""


def missing(
    splits: Splits,
    *,
    rates: Sequence[float] = (0.0, 1.0),  # shares of nodes whose features are hidden, in [0, 1]
    models: Sequence[str] = ("GCN", "GGNN", "GAT", "GAT-Pn", "GAT-Lip"),  # names in the table
    layers: Sequence[int] = (2, 3, 4, 6, 8, 10, 12, 15),  # numbers of layers
    seeds: Sequence[int] = (0, 1, 2, 3, 4),  # of weights, dropout and of what is hidden
    constant_rate: bool = False,  # a learning rate that does not fall
    epochs: int = 200,  # of each training
    lr: float = 0.005,  # learning rate at the start
    hidden: int = 16,  # channels of a head
    heads: int = 4,  # of attention
    prefix: Path | str | None = None,
    progress: bool = True,
) -> Study:
    """Train networks on a graph with features hidden outside the training set, the same for all.

    Source: LipschitzNorm paper, missing features, after the PairNorm paper.
    """
    sizes = dict(hidden_channels=hidden, heads=heads)
    chosen = {name: replace(known("--models", name, MODELS), **sizes) for name in models}
    schedule = Schedule(epochs=epochs, lr=lr)
    schedule = replace(schedule, lr_patience=None) if constant_rate else schedule
    data = {both: hide_features(splits, *both) for both in product(rates, seeds)}
    trainings = []
    for seed, depth, rate, (name, variant) in product(seeds, layers, rates, chosen.items()):
        about = {"model": name, **asdict(variant), "num_layers": depth, "rate": rate, "seed": seed}
        about |= {"dataset": splits.description.title, **schedule.columns(*COLUMNS)}
        training = partial(_train, variant, data[rate, seed], depth, seed, schedule, 0)
        trainings.append((about, training))
    labels = ("model", "num_layers", "rate", "seed")
    return run_study(trainings, labels=labels, prefix=prefix, progress=progress)


def read_missing(folder: Path | str, group: str = "missing") -> pd.DataFrame:
    """The runs of a group of the grid as one table, data sets by the names of the published one."""
    runs = tables.read(folder, "", tuple(titles(group)), "runs")
    return runs.assign(dataset=runs["dataset"].str.removesuffix(", features missing"))


def published_table() -> pd.DataFrame:
    """Accuracy in percent, its deviation, and layers, chosen we do not know how.

    Source: LipschitzNorm paper, slides of its talk.
    """
    models, *values = zip(*map(str.split, _TABLE.strip().splitlines()), strict=True)
    columns, keys = ["accuracy", "deviation", "num_layers"], ["model", "dataset", "rate"]
    cases = pd.MultiIndex.from_product([models, ("Cora", "CiteSeer", "PubMed"), (0.0, 1.0)])
    numbers = np.array(values, dtype=float).T.reshape(-1, 3)
    table = pd.DataFrame(numbers, cases.rename(keys), columns).reset_index()
    return table.astype({"num_layers": int})


def best_layers(runs: pd.DataFrame, choice: str = "validation") -> pd.DataFrame:
    """Best number of layers and its accuracy in percent, by network, data set and rate."""
    (criterion, reported), keys = CHOICES[choice], ["dataset", "rate", "model"]
    by_layers = runs.assign(percent=100 * runs[reported]).groupby([*keys, "num_layers"], sort=False)
    percent = dict(accuracy=("percent", "mean"), deviation=("percent", "std"))
    means = by_layers.agg(by=(criterion, "mean"), **percent, seeds=("percent", "size"))
    best = means.loc[means.groupby(keys, sort=False)["by"].idxmax()]
    return best.drop(columns="by").reset_index()


def beside_published(best: pd.DataFrame) -> pd.DataFrame:
    """Accuracies of ``best_layers`` and published ones as text, mean, deviation and layers."""
    keys = ["dataset", "rate", "model"]
    both = best.merge(published_table(), on=keys, how="left", suffixes=("", "_published"))

    def text(end: str) -> pd.Series:
        forms = dict(accuracy="{:.1f}", deviation=" {:.1f}", num_layers=" ({:.0f})")
        parts = [both[n + end].map(form.format, na_action="ignore") for n, form in forms.items()]
        return sum(parts[1:], parts[0]).astype(object).fillna("-")

    difference = (both["accuracy"] - both["accuracy_published"]).round(1)
    return both[keys].assign(ours=text(""), published=text("_published"), difference=difference)
