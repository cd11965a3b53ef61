"""Networks trained with something against massive activations: compact tables, and their sums."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from studies.grid import MODELS
from studies.laws import compare_laws
from studies.results import Emergence, read_emergence

ARMS = {
    "none": "none",
    "bias": "biases",
    "published": "published + biases",
    "intended": "intended + biases",
    "term": "intended",
    "sink": "sink",
}
"""The readings of the Explicit Bias Term that are trained, from names of files to titles."""

OTHERS = {
    "layernorm": "LayerNorm for BatchNorm",
    "decay": "weight decay 0.0001",
    "clip": "score clipped",
    "tanh": "tanh of the score",
    "dropout": "dropout on the score",
}
"""Other remedies that are trained, from names of files to titles."""

COUNTED = {"count": "neighbours counted", "countsink": "sink, neighbours counted"}
"""Controls of the sink, trained on data whose node types say how many neighbours a node has, see
``changed_types.count_neighbours``; from names of files to titles."""

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "bias": {"use_bias": True},
    "published": {"use_bias": True, "explicit_bias": "published"},
    "intended": {"use_bias": True, "explicit_bias": "intended"},
    "term": {"explicit_bias": "intended"},
    "sink": {"explicit_bias": "sink"},
    "layernorm": {"layer_norm": True, "batch_norm": False},
    "decay": {"weight_decay": 0.0001},
    "clip": {"score_bound": "clip"},
    "tanh": {"score_bound": "tanh"},
    "dropout": {"score_dropout": 0.1},
    "count": {"num_node_types": 140},
    "countsink": {"num_node_types": 140, "explicit_bias": "sink"},
}
"""How the configuration of an arm differs from the published one without a term."""

SAME = {"gt_zinc_intended": "gt_zinc_published"}
"""Runs that are others under another name, since GT's published term is the intended one."""

OF_THE_GRID = {
    f"{model.lower()}_{data}_none": f"{model.lower()}_{data}"
    for model in MODELS
    for data in ("tox21", "proteins")
}
"""Networks without any remedy that the grid of emergence has, trained at the same length."""

SCORES = ("max_ratio", "share_rows_with_massive", "max_abs", "row_median_q50", "share_saturated")
"""What is kept of the score of a layer, see ``ActivationSummary.statistics``."""

LOGARITHMIC = ("max_ratio", "max_abs", "row_median_q50")
"""Those of them whose means are geometric."""

_ORIGIN = ("config", "changes", "dataset", "epochs", "versions", "commit")


@dataclass(frozen=True)
class Remedies:
    """Compact tables of trained networks.

    Attributes:
        layers: a row per seed, layer and state, ``base`` (untrained, as published) and ``best``
            (weights of the epoch with the least validation loss). Columns are ``SCORES``; the
            metrics of the test split, ``test_...``; ``best_epoch``; and of the gamma law
            ``ks_own``, ``ks_base`` and ``ks_two_sample``, see ``laws.compare_laws``.
        epochs: a row per seed, layer and observed epoch, with ``SCORES``.
    """

    layers: pd.DataFrame
    epochs: pd.DataFrame


def compact(run: Emergence, fits: pd.DataFrame | None = None) -> Remedies:
    """What is kept of trained networks.

    Args:
        run: of one network or several seeds.
        fits: rows of ``laws.compare_laws`` for these networks, if they are there already;
            they take some seconds for each network.
    """
    keys = ["seed", "layer", "state"]
    states = ("base", "best")
    if fits is None:
        chosen = run.histogram[run.histogram["state"].isin(states)]
        bins = chosen[[*keys, "bin", "low", "count"]].assign(run="")
        fits = compare_laws(bins, base=states[0])
    gamma = fits[fits["law"] == "gamma"][[*keys, "ks_own", "ks_base", "ks_two_sample"]]
    summary = run.summary[run.summary["state"].isin(states)]
    metrics = [name for name in summary if name.startswith("test_")]
    layers = summary[[*keys, *SCORES, *metrics, "best_epoch", *_ORIGIN]]
    epochs = run.trajectory[["seed", "layer", "epoch", *SCORES, *_ORIGIN]]
    return Remedies(layers.merge(gamma, on=keys, validate="one_to_one"), epochs)


def join_compact(folders: Sequence[Path | str]) -> Remedies:
    """The compact tables of finished runs, joined.

    Args:
        folders: what ``emergence`` wrote.

    Raises:
        FileNotFoundError: if a run is not finished.
    """
    runs = [compact(read_emergence(folder)) for folder in folders]
    return Remedies(
        pd.concat([run.layers for run in runs], ignore_index=True),
        pd.concat([run.epochs for run in runs], ignore_index=True),
    )


def read_remedies(
    folder: Path | str,
    data: str,
    arms: Mapping[str, str] = ARMS,
    models: Iterable[str] = MODELS,
) -> Remedies:
    """The tracked tables of several networks, with their architecture and arm.

    Args:
        folder: where ``python -m studies remedy`` wrote ``remedy_NAME_TABLE.csv.gz``, and, for
            ``OF_THE_GRID``, ``collect`` and ``laws`` their tables.
        data: data set as in the names of files: ``"zinc"``, ``"tox21"`` or ``"proteins"``.
        arms: from names of files to titles.
        models: names of architectures.

    Returns:
        Tables with the further columns ``label``, the architecture, and ``run``, the title.

    Raises:
        FileNotFoundError: if a table is missing.
    """
    folder = Path(folder)
    found = []
    for model in models:
        for arm, title in arms.items():
            name = f"{model.lower()}_{data}_{arm}"
            name = SAME.get(name, name)
            if name in OF_THE_GRID:
                tables = _of_the_grid(folder, OF_THE_GRID[name])
            else:
                tables = Remedies(*(_read(folder, name, table) for table in ("layers", "epochs")))
            found.append([t.assign(label=model, run=title) for t in (tables.layers, tables.epochs)])
    return Remedies(*(pd.concat(parts, ignore_index=True) for parts in zip(*found, strict=True)))


def _read(folder: Path, name: str, table: str) -> pd.DataFrame:
    path = folder / f"remedy_{name}_{table}.csv.gz"
    if not path.is_file():
        raise FileNotFoundError(f"no table at {path}; write it with python -m studies remedy")
    return pd.read_csv(path)


def _of_the_grid(folder: Path, name: str) -> Remedies:
    laws = pd.read_csv(folder / "laws.csv.gz")
    run = read_emergence(folder, f"emergence_{name}_")
    return compact(run, laws[laws["run"] == name])


def later_epochs(epochs: pd.DataFrame, *, keys: Sequence[str] = ()) -> pd.DataFrame:
    """What the scores are like over the second half of training.

    The largest ratio of a layer changes a lot from epoch to epoch, so that one epoch says
    little.

    Args:
        epochs: of ``read_remedies``.
        keys: further columns to tell rows apart by; ``("layer",)`` for each layer by itself.

    Returns:
        A row per ``label``, ``run`` and ``seed``, and ``keys``. Columns are means over layers and
        epochs of ``SCORES``, geometric for those of ``LOGARITHMIC``; ``largest``, the geometric
        mean over epochs of the largest ratio of any layer; ``edges_with``, the mean over epochs of
        the share of edges with a massive activation in the layer that has most of them; and
        ``epochs_with``, the share of epochs in which any layer has one.
    """
    half = epochs.groupby(["label", "run", "seed"])["epoch"].transform("max") / 2
    late = epochs[epochs["epoch"] > half]
    by = ["label", "run", "seed", *keys]
    logs = late.assign(**{name: np.log(late[name]) for name in LOGARITHMIC})
    found = logs.groupby(by, sort=False)[list(SCORES)].mean()
    any_layer = logs.groupby([*by, "epoch"], sort=False).agg(
        largest=("max_ratio", "max"), edges_with=("share_rows_with_massive", "max")
    )
    any_layer["epochs_with"] = any_layer["edges_with"] > 0
    found = found.join(any_layer.groupby(by, sort=False).mean())
    logarithmic = [*LOGARITHMIC, "largest"]
    found[logarithmic] = np.exp(found[logarithmic])
    return found.reset_index()


def by_network(remedies: Remedies, metric: str) -> pd.DataFrame:
    """What each network shows over its later epochs, with its metric at its best epoch.

    Args:
        remedies: of ``read_remedies``.
        metric: of the test split, for example ``"mae"``.

    Returns:
        The rows of ``later_epochs`` with a column ``test_...``.
    """
    keys = ["label", "run", "seed"]
    best = remedies.layers[remedies.layers["state"] == "best"]
    metrics = best.groupby(keys, sort=False)[[f"test_{metric}"]].first().reset_index()
    return metrics.merge(later_epochs(remedies.epochs), on=keys, validate="one_to_one")


def remedy_table(remedies: Remedies, metric: str) -> pd.DataFrame:
    """What remedies do and what they cost, as text.

    Args:
        remedies: of ``read_remedies``.
        metric: of the test split, for example ``"mae"``.

    Returns:
        A row per architecture and arm. The metric at the best epoch, mean over seeds with its
        95 % t interval; from the least to the greatest seed, over the second half of the epochs,
        see ``later_epochs``: the share of ``edges`` with a massive activation in the layer that has
        most, in which share of the ``epochs`` there is one at all, the largest ``ratio`` of any
        layer, and of a layer the ``largest |s|`` and the typical ``median |s|`` of a row; and
        medians over seeds and layers at the best epoch of two Kolmogorov-Smirnov distances: of the
        ratios to their own gamma law, ``KS gamma``, and to those of the untrained network,
        ``KS base``.
    """
    networks = by_network(remedies, metric).groupby(["label", "run"], sort=False)
    best = remedies.layers[remedies.layers["state"] == "best"].groupby(["label", "run"])
    rows = {}
    for key, of_arm in networks:
        at_best = best.get_group(key)
        rows[key] = {
            f"test {metric}": _interval(of_arm[f"test_{metric}"]),
            "edges": _range(of_arm["edges_with"], "{:.1%}"),
            "epochs": _range(of_arm["epochs_with"], "{:.0%}"),
            "ratio": _range(of_arm["largest"], "{:,.0f}"),
            "largest |s|": _range(of_arm["max_abs"].map(_three_digits), "{:,.6g}"),
            "median |s|": _range(of_arm["row_median_q50"], "{:.2g}"),
            "KS gamma": f"{at_best['ks_own'].median():.3f}",
            "KS base": f"{at_best['ks_two_sample'].median():.2f}",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["network", "arm"])


def _interval(values: pd.Series, confidence: float = 0.95) -> str:
    low, high = stats.t.interval(confidence, len(values) - 1, values.mean(), stats.sem(values))
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")  # 1100 for 1099, which as text would be 1.1e+03


def _range(values: pd.Series, form: str) -> str:
    ends: list[Any] = [form.format(end) for end in (values.min(), values.max())]
    return ends[0] if ends[0] == ends[1] else "-".join(ends)
