"""Tables of emergence runs and of their grid: read, summed up; the networks of these runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
from studies.tables import span

OF_TRAINING = ("config", "dataset", "seed", "epochs", "commit")
"""Columns that are the same in all tables of a training."""

TABLES = ("summary", "trajectory", "graph_maxima", "histogram", "history")
ORIGIN = ("config", "changes", "dataset", "epochs", "versions", "commit")
"""Columns of these tables that say where a row is from, beside its seed."""


@dataclass(frozen=True)
class Emergence:
    """The tables of an emergence run, by layer, and by test graph or bin of -log10 ratio.

    States are ``base`` (untrained, BatchNorm statistics at 0 and 1, as published),
    ``base_calibrated`` (untrained, statistics of the training data), ``best`` (epoch of the least
    validation loss) and ``last``. ``fit`` is None if the tables were read from files.
    """

    summary: pd.DataFrame
    trajectory: pd.DataFrame
    graph_maxima: pd.DataFrame
    histogram: pd.DataFrame
    history: pd.DataFrame
    fit: Fit | None = None


def read_emergence(folder: Path | str, prefix: str = "") -> Emergence:
    """Read the tables that ``emergence`` wrote to a folder, or ``of_run`` with a prefix.

    ValueError if a table lacks columns, or they are of several trainings, as where one was stopped
    while it wrote them.
    """
    writes = "python -m studies train, or study emergence,"
    paths = {table: Path(folder) / f"{prefix}{table}.csv.gz" for table in TABLES}
    found = {name: tables.read_one(path, writes) for name, path in paths.items()}
    trainings = {}
    for name, table in found.items():
        if lacking := {*OF_TRAINING} - {*table}:
            raise ValueError(
                f"{paths[name]}: no table of train, it lacks {', '.join(sorted(lacking))}"
            )
        trainings[name] = {*table[[*OF_TRAINING]].drop_duplicates().itertuples(index=False)}
    if other := [name for name, of in trainings.items() if of and of != trainings["summary"]]:
        raise ValueError(
            f"{folder}: expected tables of the same training, but {other[0]} is of another than "
            "summary; repeat the command that trained it, which goes on and writes all"
        )
    return Emergence(**found)


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
    """The summary of one seed as text: a row per layer, columns by statistic and state."""
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


MODELS = ("GT", "GraphiT", "SAN")
GRID = dict(sorted(titles("grid").items(), key=lambda pair: MODELS.index(pair[1].split(",")[0])))
VARIANTS = titles("variants")
PERMUTED = {name: name.removesuffix("_permuted") for name in titles("permuted")}
FURTHER = titles("further")
"""Runs by the names of their files, with titles; of permuted targets the pair they control, of
further seeds the pair that has the others."""


def how_unlikely(summary: pd.DataFrame, untrained: pd.DataFrame) -> pd.DataFrame:
    """The largest ratio of each trained layer among untrained ones with calibrated BatchNorm.

    Beside it the one that products of three independent normals exceed in as many rows with
    probability 0.05; too high where only few types of edges differ, as in a first layer.
    """
    rows = summary[summary["state"] == "best"].reset_index(drop=True)
    null = untrained[untrained["state"] == "base_calibrated"].groupby(["run", "layer"])["max_ratio"]
    sizes = {*zip(rows["channels"], rows["rows"], strict=True)}
    thresholds = {size: ProductNull(size[0]).threshold(0.05, size[1]) for size in sizes}

    def among_others(row: pd.Series) -> dict[str, float]:
        of_layer, ratio = null.get_group((row["run"], row["layer"])), row["max_ratio"]
        return {
            "untrained_max": of_layer.max(),
            "p_untrained": float(p_value(ratio, of_layer.to_numpy())),
            "chance_threshold": thresholds[row["channels"], row["rows"]],
            "p_chance": float(ProductNull(row["channels"]).exceedance(ratio, row["rows"])),
        }

    found = rows.apply(among_others, axis=1, result_type="expand")
    return rows[["run", "seed", "layer", "max_ratio"]].join(found)


def with_spread(runs: Emergence) -> pd.DataFrame:
    """``summary`` of several runs, in the states of ``histogram``, with ``spreads``."""
    spread = spreads(runs.histogram).stack().rename("spread").reset_index()
    return runs.summary.merge(spread, validate="one_to_one")


def by_measure(layers: pd.DataFrame) -> pd.DataFrame:
    """Which trained layers are massive, by three measures, a row per run, seed and layer.

    ``layers`` are those of ``with_spread``, untrained and trained. Sun's rule with the typical row
    median in place of the layer's, which no table has; ``spread`` is beyond that of this layer in
    every untrained network of the run.
    """
    layers = layers.set_index(["run", "seed", "layer"])
    best = layers[layers["state"] == "best"]
    base = layers[layers["state"].str.startswith("base")]
    untrained = base.groupby(["run", "layer"])["spread"].max()
    least = (MASSIVE_RATIO * best["row_median_q50"]).clip(lower=100)
    passes = {
        "row ratio": best["max_ratio"] > MASSIVE_RATIO,
        "Sun's rule": best["max_abs"] > least,
        "spread": best["spread"] > untrained.reindex(best.index.droplevel("seed")).to_numpy(),
    }
    return pd.DataFrame(passes).reset_index()


def spreads(histogram: pd.DataFrame) -> pd.DataFrame:
    """The standard deviation of ln r over all entries, by run, seed and layer, and by state."""
    x = np.log(10) * histogram["low"]  # bins are equally wide, so their edge will do
    keys, n = ["run", "seed", "layer", "state"], histogram["count"]
    sums = histogram[keys].assign(n=n, x=n * x, xx=n * x * x).groupby(keys).sum()
    return np.sqrt(sums["xx"] / sums["n"] - (sums["x"] / sums["n"]) ** 2).unstack()


def networks_with(passes: pd.DataFrame) -> pd.DataFrame:
    """How many networks of each ``run`` pass by each other column, a row of texts per run.

    In brackets stands the exact 95 % interval of their share.
    """

    def text(passed: pd.Series) -> str:
        ends = stats.binomtest(int(passed.sum()), len(passed)).proportion_ci(method="exact")
        return f"{passed.sum()} of {len(passed)} [{ends.low:.2f}, {ends.high:.2f}]"

    return passes.groupby("run", sort=False).agg(text)


def grid_table(summary: pd.DataFrame, *, threshold: float = MASSIVE_RATIO) -> pd.DataFrame:
    """What the grid found, a row of texts per run: least and greatest value over its seeds."""
    rows = {}
    for run, table in summary.groupby("run", sort=False):
        best, base = (table[table["state"] == state] for state in ("best", "base"))
        scores = best.reindex(columns=["test_mae", "test_roc_auc", "test_bce"])
        scores = scores.dropna(axis="columns", how="all").rename(columns=lambda name: name[5:])
        share = (best["max_ratio"] > threshold).groupby(best["layer"]).mean()
        by_seed, layers = best.groupby("seed"), share.index.astype(str)
        rows[run] = {
            "seeds": best["seed"].nunique(),
            "epochs": span(best["epochs"], ".0f"),
            "test split": ", ".join(f"{name} {span(scores[name], '.3f')}" for name in scores),
            "untrained": span(base.groupby("seed")["max_ratio"].max(), ",.0f"),
            "trained": span(by_seed["max_ratio"].max(), ",.0f"),
            "layers, every seed": ", ".join(layers[share == 1]) or "none",
            "layers, some seed": ", ".join(layers[(share > 0) & (share < 1)]) or "none",
            "edges, at most": span(by_seed["share_rows_with_massive"].max(), ".2%"),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def length_table(trajectory: pd.DataFrame, *, threshold: float = MASSIVE_RATIO) -> pd.DataFrame:
    """The largest ratio of any layer through training, a row per run and seed."""
    keys = ["run", "seed"]
    ratios = trajectory.groupby([*keys, "epoch"], sort=False)["max_ratio"].max().reset_index()
    by_seed = ratios.groupby(keys, sort=False)["max_ratio"]
    highest = ratios.loc[by_seed.idxmax()].set_index(keys)
    massive = ratios[ratios["max_ratio"] > threshold].groupby(keys)["epoch"].min()
    columns = {"untrained": by_seed.first(), "highest": highest["max_ratio"]}
    columns |= {"in epoch": highest["epoch"], "last epoch": by_seed.last()}
    table = pd.DataFrame(columns).round().astype(int).loc[highest.index]
    table["massive from"] = massive.reindex(table.index).map("{:.0f}".format, na_action="ignore")
    return table.fillna("never")


def law_table(laws: pd.DataFrame, by: Sequence[str] = ("run", "state")) -> pd.DataFrame:
    """Number of fits; each law's median distance to the values, how often its AIC is least."""
    groups = laws.assign(wins=laws["aic_rank"] == 1).groupby([*by, "law"], sort=False)
    wins = " (" + groups["wins"].sum().astype(str) + ")"
    texts = groups["ks_own"].median().map("{:.3f}".format) + wins
    gamma = laws[laws["law"] == "gamma"].groupby([*by])
    texts = texts.unstack()[laws["law"].unique()].sort_index()
    texts.insert(0, "fits", gamma.size())
    return texts.join(gamma[["ks_base", "ks_two_sample"]].median().round(3))


def laws(
    runs: Sequence[str],  # names of runs whose tables study emergence wrote, for example gt_zinc
    *,
    results: Path,  # the folder of these tables
) -> pd.DataFrame:
    """``compare_laws`` of untrained and trained ratios of collected runs, with their origin."""
    keys = ["run", "seed", "layer", "state"]
    histogram = read_runs(results, runs).histogram
    chosen = histogram[histogram["state"].isin(["base", "best"])]
    fitted = compare_laws(chosen[[*keys, "bin", "low", "count"]], base="base")
    return fitted.merge(chosen[[*keys, *ORIGIN]].drop_duplicates(), on=keys, validate="many_to_one")
