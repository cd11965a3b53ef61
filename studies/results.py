"""Tables of emergence runs and of their grid: read, summed up; the networks of these runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from mapkg.measures import MASSIVE_RATIO
from mapkg.models import GraphNetwork
from mapkg.models.config import Config
from mapkg.nulls import ProductNull, p_value
from studies import checkpoint, tables
from studies.checkpoint import Fit
from studies.data import ATOM_TYPES, BOND_TYPES, Splits
from studies.files import commit, sha256, versions
from studies.laws import compare_laws
from studies.published import titles

TABLES = ("summary", "trajectory", "graph_maxima", "histogram", "history")
"""The tables of an emergence run."""


@dataclass(frozen=True)
class Emergence:
    """The tables of an emergence run, each row with where it comes from.

    Attributes:
        summary: per state and layer, the statistics of ``ActivationSummary``. States: ``base``
            (untrained, BatchNorm statistics at 0 and 1, as published), ``base_calibrated``
            (untrained, statistics of the training data, see ``observe_states``), ``best`` and
            ``last`` (weights of the epoch with the least validation loss, and of the last one).
        trajectory: per observed epoch and layer, the same statistics; epoch 0 is ``base``.
        graph_maxima: per state, layer and test graph, its largest ratio.
        histogram: per state and layer, counts of -log10 ratio; empty bins are left out.
        history: per epoch, losses and learning rate.
        fit: what training gave, weights included; None if the tables were read from files.
    """

    summary: pd.DataFrame
    trajectory: pd.DataFrame
    graph_maxima: pd.DataFrame
    histogram: pd.DataFrame
    history: pd.DataFrame
    fit: Fit | None = None


def read_emergence(folder: Path | str, prefix: str = "") -> Emergence:
    """Read the tables that ``emergence`` wrote to a folder, or ``of_run`` with a prefix."""
    writes = "python -m studies train, or study emergence,"
    paths = {table: Path(folder) / f"{prefix}{table}.csv.gz" for table in TABLES}
    return Emergence(**{name: tables.read_one(path, writes) for name, path in paths.items()})


def read_runs(folder: Path | str, names: Iterable[str]) -> Emergence:
    """The tables of several runs as one set, with a column ``run`` that tells them apart."""
    names = list(names)
    return Emergence(**{table: tables.read(folder, "emergence", names, table) for table in TABLES})


def of_run(
    folder: Path,
    *,
    states: Sequence[str] = (),  # keep only these states in the two large tables, not all
) -> dict[str, pd.DataFrame]:
    """The tables of a finished run."""
    made = {name: getattr(read_emergence(folder), name) for name in TABLES}
    made["graph_maxima"] = made["graph_maxima"].drop(columns="graph")  # a row's place says it
    there = made["summary"]["state"].unique().tolist()
    if unknown := sorted({*states} - {*there}):
        raise ValueError(f"no state {', '.join(unknown)} in {folder}; there are {', '.join(there)}")
    for name in ("graph_maxima", "histogram") if states else ():
        made[name] = made[name][made[name]["state"].isin(states)]
    return made


def read_network(folder: Path | str, splits: Splits) -> tuple[GraphNetwork, Config, dict[str, Any]]:
    """The best network of a finished run, its configuration, and columns of a table about it."""
    title = splits.description.title
    model, information = checkpoint.load(Path(folder) / "best", dataset=title)
    config = Config.from_dict(information["config"])
    origin = {"seed": information["seed"], "config": information["name"]}
    origin |= {"explicit_bias": config.explicit_bias, "use_bias": config.use_bias}
    origin |= {"dataset": title, "epochs": len(information["history"])}
    return model, config, origin | {"versions": versions(), "commit": commit()}


def refuse_twice(folders: Iterable[Path]) -> None:
    """Raise if a run is given twice, be it as a link or as a copy: its rows would count twice."""
    given: dict[Any, Path] = {}
    for folder in folders:
        weights = folder / "best.safetensors"
        run = sha256(weights) if weights.is_file() else folder.resolve()
        if run in given:
            raise ValueError(
                f"{folder}: expected different runs, got that of {given[run]} again; leave one out"
            )
        given[run] = folder


def emergence_table(summary: pd.DataFrame, states: Sequence[str]) -> pd.DataFrame:
    """The summary of one seed as text: a row per layer, columns by statistic and state.

    An edge with an MA has a massive activation in at least one channel; the share of such edges is
    given. The typical median is the median over edges of the row's median magnitude.
    """
    titles = {
        "max_ratio": "largest ratio",
        "share_rows_with_massive": "edges with an MA",
        "max_abs": "largest |s|",
        "row_median_q50": "typical median |s|",
    }
    wide = summary.pivot(index="layer", columns="state", values=list(titles))
    wide = wide[[(statistic, state) for statistic in titles for state in states]]
    wide = wide.rename(columns=titles | {state: state.removeprefix("base_") for state in states})
    return wide.map(lambda value: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}")


def count_types(splits: Splits) -> pd.DataFrame:
    """How often each type of atom and, once per direction, of bond occurs in each split."""
    kinds = {"atom": ("x", dict(enumerate(ATOM_TYPES))), "bond": ("edge_attr", BOND_TYPES)}
    rows = []
    for split, (kind, (ids, names)) in product(("train", "val", "test"), kinds.items()):
        found = torch.cat([graph[ids] for graph in getattr(splits, split)])
        counts = found.bincount(minlength=max(names) + 1).tolist()
        rows += [(split, kind, i, name, counts[i]) for i, name in names.items()]
    return pd.DataFrame(rows, columns=["split", "kind", "id", "type", "count"])


def contrasts(
    table: pd.DataFrame,
    pairs: Mapping[str, tuple[tuple[str, str], tuple[str, str]]],
    *,
    value: str = "max_ratio",
) -> pd.DataFrame:
    """By which factor a value differs between two kinds of rows, with intervals over seeds.

    ``table`` has a row per ``run``, ``label`` and ``seed``. ``pairs`` are two pairs of run and
    label by title; the factor is that of the second over the first in networks of the same seed.
    A row per title: ``factor``, the geometric mean over seeds, ``low`` and ``high``, Student's t
    interval of 95 % for the logarithms, and ``least`` and ``greatest`` of a seed.
    """
    logs = np.log(table.set_index(["run", "label", "seed"])[value]).sort_index()
    rows = {}
    for title, (one, other) in pairs.items():
        difference = (logs[other] - logs[one]).dropna()
        mean, error = difference.mean(), stats.sem(difference)
        low, high = stats.t.interval(0.95, len(difference) - 1, mean, error)
        found = (mean, low, high, difference.min(), difference.max())
        names = ("factor", "low", "high", "least", "greatest")
        rows[title] = {name: np.exp(v) for name, v in zip(names, found, strict=True)}
    return pd.DataFrame(rows).T


# The grid.

MODELS = ("GT", "GraphiT", "SAN")
"""The paper's networks, rows of its figure."""

DATA_SETS = {"zinc": "ZINC", "tox21": "TOX21", "proteins": "PROTEINS (TU)"}
"""Columns of the figure, from what result files call them to what figures do."""

GRID = dict(sorted(titles("grid").items(), key=lambda pair: MODELS.index(pair[1].split(",")[0])))
"""All pairs, from names of result files to titles of figures, those of a model together."""

VARIANTS = titles("variants")
"""Networks on ZINC that differ in their attention, from result files to titles of figures."""

PERMUTED = {name: name.removesuffix("_permuted") for name in titles("permuted")}
"""Runs on permuted targets, from their result files to the pair they are a control of."""


def how_unlikely(summary: pd.DataFrame, untrained: pd.DataFrame) -> pd.DataFrame:
    """The largest ratio of each trained layer, beside what chance and no training give.

    Returns:
        A row per run, seed and layer. ``max_ratio``; ``untrained_max``, the largest ratio of
        that layer in any untrained network with calibrated BatchNorm; ``p_untrained``, the
        p-value by rank among these networks, never below 1 / (1 + networks);
        ``chance_threshold``, the ratio that products of three independent normals of this
        width exceed anywhere in as many rows with probability 0.05; ``p_chance``, their
        probability to exceed the largest ratio. Both take all rows for different ones, and so are
        too high where only few types of edges differ, as in a first layer.
    """
    rows = summary[summary["state"] == "best"].reset_index(drop=True)
    null = untrained[untrained["state"] == "base_calibrated"].groupby(["run", "layer"])["max_ratio"]

    @cache
    def threshold(channels: int, number: int) -> float:
        return ProductNull(channels).threshold(0.05, number)

    def among_others(row: pd.Series) -> dict[str, float]:
        of_layer, ratio = null.get_group((row["run"], row["layer"])), row["max_ratio"]
        return {
            "untrained_max": of_layer.max(),
            "p_untrained": float(p_value(ratio, of_layer.to_numpy())),
            "chance_threshold": threshold(row["channels"], row["rows"]),
            "p_chance": float(ProductNull(row["channels"]).exceedance(ratio, row["rows"])),
        }

    found = rows.apply(among_others, axis=1, result_type="expand")
    return rows[["run", "seed", "layer", "max_ratio"]].join(found)


def by_measure(runs: Emergence) -> pd.DataFrame:
    """Which trained layers are massive, by three measures, a row per run, seed and layer.

    ``row ratio`` is some activation above 1000 medians of its row. ``Sun's rule`` is |s| > 100 and
    above 1000 medians of the layer (Sun et al. 2024), for which the typical row median stands: the
    tables have no other. ``spread`` is that of ln r over all entries, beyond the spread of this
    layer in every untrained network of the run.
    """
    keys, spread = ["run", "seed", "layer"], spreads(runs.histogram)
    untrained = spread.filter(like="base").max(axis=1).groupby(["run", "layer"]).max()
    best = runs.summary[runs.summary["state"] == "best"].set_index(keys)
    of_layer = [untrained[run, layer] for run, _, layer in best.index]
    largest, median = best["max_abs"], best["row_median_q50"]
    passes = {
        "row ratio": best["max_ratio"] > MASSIVE_RATIO,
        "Sun's rule": (largest > 100) & (largest > MASSIVE_RATIO * median),
        "spread": spread["best"].reindex(best.index) > of_layer,
    }
    return pd.DataFrame(passes).reset_index()


def spreads(histogram: pd.DataFrame) -> pd.DataFrame:
    """The standard deviation of ln r over all entries, by run, seed and layer, and by state."""
    x = np.log(10) * histogram["low"]  # bins are equally wide, so their edge will do
    keys, n = ["run", "seed", "layer", "state"], histogram["count"]
    sums = histogram[keys].assign(n=n, x=n * x, xx=n * x * x).groupby(keys).sum()
    return np.sqrt(sums["xx"] / sums["n"] - (sums["x"] / sums["n"]) ** 2).unstack()


def grid_table(summary: pd.DataFrame, *, threshold: float = MASSIVE_RATIO) -> pd.DataFrame:
    """What the grid found, a row of texts per run: least and greatest value over its seeds.

    Metrics of the ``test split`` are those at the best validation epoch. ``layers, every seed``
    have a ratio above the threshold with every seed; ``edges, at most`` is the largest share of
    edges with one in any layer.
    """
    rows = {}
    for run, table in summary.groupby("run", sort=False):
        best, base = (table[table["state"] == state] for state in ("best", "base"))
        scores = best.reindex(columns=["test_mae", "test_roc_auc", "test_bce"])
        scores = scores.dropna(axis="columns", how="all").rename(columns=lambda name: name[5:])
        share = (best["max_ratio"] > threshold).groupby(best["layer"]).mean()
        by_seed = best.groupby("seed")
        rows[run] = {
            "seeds": best["seed"].nunique(),
            "epochs": _span(best["epochs"], ".0f"),
            "test split": ", ".join(f"{name} {_span(scores[name], '.3f')}" for name in scores),
            "untrained": _span(base.groupby("seed")["max_ratio"].max(), ",.0f"),
            "trained": _span(by_seed["max_ratio"].max(), ",.0f"),
            "layers, every seed": _list(share.index[share == 1]),
            "layers, some seed": _list(share.index[(share > 0) & (share < 1)]),
            "edges, at most": _span(by_seed["share_rows_with_massive"].max(), ".2%"),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def length_table(trajectory: pd.DataFrame, *, threshold: float = MASSIVE_RATIO) -> pd.DataFrame:
    """The largest ratio of any layer through training, a row per run and seed.

    ``massive from`` is the first epoch that was looked at with a ratio above the threshold.
    """
    keys = ["run", "seed"]
    ratios = trajectory.groupby([*keys, "epoch"], sort=False)["max_ratio"].max().reset_index()
    by_seed = ratios.groupby(keys, sort=False)["max_ratio"]
    highest = ratios.loc[by_seed.idxmax()].set_index(keys)
    massive = ratios[ratios["max_ratio"] > threshold].groupby(keys)["epoch"].min()
    table = pd.DataFrame(
        {
            "untrained": by_seed.first(),
            "highest": highest["max_ratio"],
            "in epoch": highest["epoch"],
            "last epoch": by_seed.last(),
        }
    )
    table = table.round().astype(int).loc[highest.index]
    table["massive from"] = massive.reindex(table.index).map("{:.0f}".format, na_action="ignore")
    return table.fillna("never")


def law_table(laws: pd.DataFrame, by: Sequence[str] = ("run", "state")) -> pd.DataFrame:
    """Which law fits best, a row per value of ``by``.

    Returns:
        ``fits``, the number of networks and layers in a row; a column per law, the median of
        its distance to the values (``ks_own``), and in brackets in how many fits it has the
        least AIC; and the medians of ``ks_base`` and ``ks_two_sample`` of the gamma law.
    """
    keys = list(by)
    groups = laws.groupby([*keys, "law"], sort=False)
    wins = (laws["aic_rank"] == 1).groupby([laws[key] for key in (*keys, "law")], sort=False).sum()
    texts = groups["ks_own"].median().map("{:.3f}".format) + " (" + wins.astype(str) + ")"
    gamma = laws[laws["law"] == "gamma"].groupby(keys)
    texts = texts.unstack()[laws["law"].unique()].sort_index()
    texts.insert(0, "fits", gamma.size())
    return texts.join(gamma[["ks_base", "ks_two_sample"]].median().round(3))


def laws(histogram: pd.DataFrame) -> pd.DataFrame:
    """``compare_laws`` of untrained and trained ratios of ``read_runs``, with their origin."""
    keys = ["run", "seed", "layer", "state"]
    origin = ["config", "changes", "dataset", "epochs", "versions", "commit"]
    chosen = histogram[histogram["state"].isin(["base", "best"])]
    fitted = compare_laws(chosen[[*keys, "bin", "low", "count"]], base="base")
    return fitted.merge(chosen[[*keys, *origin]].drop_duplicates(), on=keys, validate="many_to_one")


def laws_of_runs(
    runs: Sequence[str],  # names of runs whose tables study emergence wrote, for example gt_zinc
    *,
    results: Path,  # the folder of these tables
) -> pd.DataFrame:
    """``laws`` of collected runs."""
    return laws(read_runs(results, runs).histogram)


def _span(values: pd.Series, form: str) -> str:
    least, greatest = f"{values.min():{form}}", f"{values.max():{form}}"
    return least if least == greatest else f"{least} to {greatest}"


def _list(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers)) or "none"
