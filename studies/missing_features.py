"""Node classification when the features of all nodes but the training ones are hidden."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from studies import tables
from studies.data import Splits
from studies.depth import Variant, fit_summary
from studies.published import known, titles
from studies.schedule import Schedule
from studies.tables import Result, Study, run_study
from studies.tasks import COLUMNS, hide_features
from studies.train import fit

MODELS = {
    "GCN": Variant(architecture="gcn"),
    "GGNN": Variant(architecture="ggnn"),
    "GAT": Variant(architecture="gat"),
    "GAT-Pn": Variant(architecture="gat", norm="pair"),
    "GAT-Lip": Variant(architecture="gat", norm="lipschitz"),
}
"""The networks of the table, by their names in it."""

LAYERS = (2, 3, 4, 6, 8, 10, 12, 15)
"""Numbers of layers to choose from. The published grid is not known; its choices go up to 15."""

_TABLE = """
GCN      82.5 1.2  2  58.8 3.5  2  69.5 2.1  2  31.3 2.7  2  77.9 1.4  2  44.9 4.4  2
GGNN     81.8 2.0  2  68.2 2.5  6  68.5 1.9  3  40.5 1.4  5  78.4 2.1  4  56.6 1.9  4
GAT      82.3 2.3  2  65.3 2.1  4  69.3 1.6  2  42.8 1.6  4  77.4 0.5  6  63.1 0.7  4
GAT-Pn   78.8 0.6  4  73.8 1.2 12  67.2 0.8  4  51.7 1.1 10  77.6 1.6  8  70.4 1.1 12
GAT-Lip  83.1 0.5  5  75.3 0.9 11  69.1 1.5  3  50.9 1.9  9  78.9 1.3  5  73.3 1.4 15
"""
_COLUMNS = list(product(("Cora", "CiteSeer", "PubMed"), (0.0, 1.0)))


def published_table() -> pd.DataFrame:
    """The table of the paper's talk: accuracy in percent, its deviation, and the layers.

    How many repetitions are behind a deviation is not known, nor whether layers were chosen on
    validation or on test nodes.

    Source: LipschitzNorm paper, slides of its talk.
    """
    rows = []
    for line in _TABLE.strip().splitlines():
        model, *values = line.split()
        for number, (dataset, rate) in enumerate(_COLUMNS):
            accuracy, deviation, layers = values[3 * number : 3 * number + 3]
            row = {"model": model, "dataset": dataset, "rate": rate, "accuracy": float(accuracy)}
            rows.append(row | {"deviation": float(deviation), "num_layers": int(layers)})
    return pd.DataFrame(rows)


def missing_study(
    splits: Splits,
    models: Mapping[str, Variant] | None = None,
    *,
    rates: Sequence[float] = (0.0, 1.0),
    layers: Sequence[int] = LAYERS,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    schedule: Schedule | None = None,
    prefix: Path | str | None = None,
    progress: bool = True,
) -> Study:
    """Train every network with every number of layers on a graph with hidden features.

    Features are hidden at a share of the nodes outside the training set, drawn once for each seed
    and rate, the same for all networks.

    Args:
        splits: of ``NodesOfGraph``.
        models: networks by name; None means ``MODELS``.
        rates: shares of nodes outside the training set whose features are zero, in [0, 1].
        layers, seeds: numbers of layers; seeds of weights, dropout and of what is hidden.
        schedule: of training; None means the published one, 200 epochs.
        prefix: of the tables, see ``tables.run_study``.
        progress: whether to show a progress bar on stderr.

    Returns:
        In ``runs`` a row per training with its settings and ``depth.fit_summary``; in ``curves``
        the last row of its history.

    Source: LipschitzNorm paper, missing features, after the PairNorm paper.
    """
    schedule = Schedule() if schedule is None else schedule
    models = MODELS if models is None else models
    hidden = {
        (rate, seed): hide_features(splits, rate, seed) for rate, seed in product(rates, seeds)
    }

    def train(variant: Variant, depth: int, rate: float, seed: int) -> Result:
        data = hidden[rate, seed]
        network = variant.build(depth, data, seed)
        training = fit(network, data, schedule, seed=seed, progress=False)
        return fit_summary(training), training.history.drop(columns="seconds").tail(1)

    trainings = []
    for seed, depth, rate, (name, variant) in product(seeds, layers, rates, models.items()):
        about = {"model": name, **asdict(variant), "num_layers": depth, "rate": rate, "seed": seed}
        about |= {"dataset": splits.description.title, **schedule.columns(*COLUMNS)}
        trainings.append((about, partial(train, variant, depth, rate, seed)))
    labels = ("model", "num_layers", "rate", "seed")
    return run_study(trainings, labels=labels, prefix=prefix, progress=progress)


def missing(
    splits: Splits,
    *,
    rates: Sequence[float] = (0.0, 1.0),  # shares of nodes whose features are hidden, in [0, 1]
    models: Sequence[str] = ("GCN", "GGNN", "GAT", "GAT-Pn", "GAT-Lip"),  # names in the table
    layers: Sequence[int] = LAYERS,  # numbers of layers
    seeds: Sequence[int] = (0, 1, 2, 3, 4),  # of weights, dropout and of what is hidden
    constant_rate: bool = False,  # a learning rate that does not fall
    epochs: int = 200,  # of each training
    prefix: Path | str,
) -> None:
    """``missing_study`` of models by name."""
    chosen = {name: known("--models", name, MODELS) for name in models}
    schedule = Schedule(epochs=epochs, lr_patience=None if constant_rate else Schedule.lr_patience)
    settings = dict(rates=rates, layers=layers, seeds=seeds, schedule=schedule)
    missing_study(splits, chosen, prefix=prefix, **settings)


STUDIES = tuple(titles("missing"))
"""Tracked studies, by the prefix of their files."""

CONSTANT = tuple(titles("constant missing"))
"""Those at a rate that does not fall, of some networks and layers."""


def read_missing(folder: Path | str, studies: Sequence[str] = STUDIES) -> pd.DataFrame:
    """The runs of tracked studies as one table, data sets by the names of the published one."""
    runs = tables.read(folder, "", studies, "runs")
    return runs.assign(dataset=runs["dataset"].str.removesuffix(", features missing"))


CHOICES = {"validation": ("val_best", "test_best"), "test": ("test_last", "test_last")}
"""What the number of layers is chosen by, and what is reported. ``validation``, the mean of the
best validation accuracy, with the test accuracy of these epochs; ``test``, the mean test accuracy
of the last epoch, which is also what is reported and so is too high."""


def best_layers(runs: pd.DataFrame, choice: str = "validation") -> pd.DataFrame:
    """For every network, data set and rate the best number of layers and its accuracy in percent.

    Args:
        runs: of ``missing_study``, of any data sets.
        choice: one of ``CHOICES``.
    """
    criterion, reported = CHOICES[choice]
    rows = []
    for keys, group in runs.groupby(["dataset", "rate", "model"], sort=False):
        layers = int(group.groupby("num_layers")[criterion].mean().idxmax())
        values = 100 * group.loc[group["num_layers"] == layers, reported]
        row = dict(zip(("dataset", "rate", "model"), keys, strict=True))
        row |= {"num_layers": layers, "accuracy": values.mean()}
        rows.append(row | {"deviation": values.std(ddof=1), "seeds": len(values)})
    return pd.DataFrame(rows)


def beside_published(best: pd.DataFrame) -> pd.DataFrame:
    """Accuracies of ``best_layers`` and published ones as text, mean, deviation and layers."""
    keys = ["dataset", "rate", "model"]
    both = best.merge(published_table(), on=keys, how="left", suffixes=("", "_published"))

    def text(end: str) -> list[str]:
        columns = [f"{name}{end}" for name in ("accuracy", "deviation", "num_layers")]
        return [
            "-" if np.isnan(mean) else f"{mean:.1f} {deviation:.1f} ({layers:.0f})"
            for mean, deviation, layers in both[columns].itertuples(index=False)
        ]

    difference = (both["accuracy"] - both["accuracy_published"]).round(1)
    return both[keys].assign(ours=text(""), published=text("_published"), difference=difference)
