"""Networks trained with something against massive activations: compact tables, and their sums."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter
from scipy import stats

from mapkg.measures import MASSIVE_RATIO
from studies import tables
from studies.figures import THRESHOLD_LOOK
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
"""Controls of the sink, trained on data whose node types say how many neighbors a node has, see
``bond_changes.count_neighbors``; from names of files to titles."""

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

Remedies = dict[str, pd.DataFrame]
"""Compact tables of trained networks.

- ``layers``: a row per seed, layer and state, ``base`` (untrained, as published) and ``best``
  (weights of the epoch with the least validation loss). Columns are ``SCORES``; the metrics of the
  test split, ``test_...``; ``best_epoch``; and of the gamma law ``ks_own``, ``ks_base`` and
  ``ks_two_sample``, see ``laws.compare_laws``.
- ``epochs``: a row per seed, layer and observed epoch, with ``SCORES``.
"""


def compact(run: Emergence, fits: pd.DataFrame | None = None) -> Remedies:
    """The compact tables of one network or several seeds.

    ``fits`` are their rows of ``laws.compare_laws``, some seconds of work for each network.
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
    return {"layers": layers.merge(gamma, on=keys, validate="one_to_one"), "epochs": epochs}


def compact_run(folder: Path | str) -> Remedies:
    """The compact tables of a finished run."""
    return compact(read_emergence(folder))


def _joined(runs: Sequence[Remedies]) -> Remedies:
    return {name: pd.concat([run[name] for run in runs], ignore_index=True) for name in runs[0]}


def read_remedies(
    folder: Path | str,
    data: str,
    arms: Mapping[str, str] = ARMS,
    models: Iterable[str] = MODELS,
) -> Remedies:
    """The tracked tables of several networks, with architecture (``label``) and title (``run``).

    ``data`` and the keys of ``arms`` are as in names of files, ``"zinc"`` and ``"sink"``.
    """
    runs = []
    for model in models:
        for arm, title in arms.items():
            name = f"{model.lower()}_{data}_{arm}"
            name = SAME.get(name, name)
            if name in OF_THE_GRID:
                found = _of_the_grid(Path(folder), OF_THE_GRID[name])
            else:
                kinds = ("layers", "epochs")
                found = {kind: tables.read(folder, "remedy", [name], kind) for kind in kinds}
            runs.append({kind: t.assign(label=model, run=title) for kind, t in found.items()})
    return _joined(runs)


def _of_the_grid(folder: Path, name: str) -> Remedies:
    laws = pd.read_csv(folder / "laws.csv.gz")
    return compact(read_emergence(folder, f"emergence_{name}_"), laws[laws["run"] == name])


def later_epochs(epochs: pd.DataFrame, *, keys: Sequence[str] = ()) -> pd.DataFrame:
    """What the scores are like over the second half of training.

    A row per ``label``, ``run`` and ``seed``, and ``keys``, for example ``("layer",)``. Columns
    are means over layers and epochs of ``SCORES``, geometric for those of ``LOGARITHMIC``;
    ``largest``, the geometric mean over epochs of the largest ratio of any layer; ``edges_with``,
    the mean over epochs of the share of edges with a massive activation in the layer that has most
    of them; and ``epochs_with``, the share of epochs in which any layer has one.
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
    """``later_epochs`` of each network with ``test_METRIC`` at its best epoch."""
    keys = ["label", "run", "seed"]
    best = remedies["layers"][remedies["layers"]["state"] == "best"]
    metrics = best.groupby(keys, sort=False)[[f"test_{metric}"]].first().reset_index()
    return metrics.merge(later_epochs(remedies["epochs"]), on=keys, validate="one_to_one")


def typical_scores(networks: pd.DataFrame) -> pd.DataFrame:
    """Geometric means over seeds of ``by_network``, a row per architecture and arm."""
    columns = [*LOGARITHMIC, "largest"]
    return np.exp(
        np.log(networks.set_index(["label", "run"])[columns]).groupby(level=[0, 1]).mean()
    )


def remedy_table(remedies: Remedies, metric: str) -> pd.DataFrame:
    """What remedies do and what they cost, as text, a row per architecture and arm.

    The metric at the best epoch, mean over seeds with its 95 % t interval; from the least to the
    greatest seed, over the second half of the epochs, see ``later_epochs``: the share of ``edges``
    with a massive activation in the layer that has most, in which share of the ``epochs`` there is
    one at all, the largest ``ratio`` of any layer, and of a layer the ``largest |s|`` and the
    typical ``median |s|`` of a row; and medians over seeds and layers at the best epoch of two
    Kolmogorov-Smirnov distances: of the ratios to their own gamma law, ``KS gamma``, and to those
    of the untrained network, ``KS base``.
    """
    networks = by_network(remedies, metric).groupby(["label", "run"], sort=False)
    layers = remedies["layers"]
    best = layers[layers["state"] == "best"].groupby(["label", "run"])
    rows = {}
    for key, of_arm in networks:
        at_best = best.get_group(key)
        three_digits = of_arm["max_abs"].map(lambda value: float(f"{value:.3g}"))
        rows[key] = {
            f"test {metric}": _mean_and_interval(of_arm[f"test_{metric}"]),
            "edges": _range(of_arm["edges_with"], "{:.1%}"),
            "epochs": _range(of_arm["epochs_with"], "{:.0%}"),
            "ratio": _range(of_arm["largest"], "{:,.0f}"),
            "largest |s|": _range(three_digits, "{:,.6g}"),  # 1,100 and not 1.1e+03
            "median |s|": _range(of_arm["row_median_q50"], "{:.2g}"),
            "KS gamma": f"{at_best['ks_own'].median():.3f}",
            "KS base": f"{at_best['ks_two_sample'].median():.2f}",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["network", "arm"])


def _mean_and_interval(values: pd.Series) -> str:
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def _range(values: pd.Series, form: str) -> str:
    ends = [form.format(end) for end in (values.min(), values.max())]
    return ends[0] if ends[0] == ends[1] else "-".join(ends)


def arms(
    late: pd.DataFrame, values: Mapping[str, str], *, logarithmic: Sequence[str] = ()
) -> sns.FacetGrid:
    """Values of networks with different remedies (``run``), a row of panels per architecture.

    A dot is a seed; a line is at the mean over seeds, the geometric one on a logarithmic axis.
    ``values`` are columns with the labels of their axes, ``logarithmic`` some of them.
    """
    long = late.melt(["label", "run", "seed"], list(values), var_name="quantity")
    look = dict(palette="colorblind", jitter=False, alpha=0.8, size=4.5, height=0.5)
    look["height"] = 0.6 + 0.2 * late["run"].nunique()
    look["aspect"] = 2.2 / look["height"]
    names = dict(x="value", y="run", hue="run", row="label", col="quantity")
    grid = sns.catplot(long, kind="strip", sharex="col", margin_titles=True, **names, **look)
    grid.set_titles(row_template="{row_name}", col_template="").set_axis_labels("", "")
    runs = list(late["run"].unique())
    for (label, value), ax in grid.axes_dict.items():
        for place, run in enumerate(runs):
            found = late.loc[(late["label"] == label) & (late["run"] == run), value]
            mean = np.exp(np.log(found).mean()) if value in logarithmic else found.mean()
            color = sns.color_palette("colorblind", len(runs))[place]
            ax.plot([mean] * 2, [place - 0.35, place + 0.35], lw=1.5, color=color)
        if value in ("max_ratio", "largest"):
            ax.axvline(MASSIVE_RATIO, **THRESHOLD_LOOK)
    for ax, (value, title) in zip(grid.axes[-1], values.items(), strict=True):
        ax.set_xlabel(title)
        if value in logarithmic:  # often less than a decade; of more than two, labels have no room
            ax.set_xscale("log")
            low, high = ax.get_xlim()
            ax.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 3)))
            powers = high > 10_000 * low  # of ten, beside which 10000 and 1e+06 would read badly
            ax.xaxis.set_major_formatter(LogFormatterSciNotation() if powers else "{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
    return grid
