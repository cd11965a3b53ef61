"""The grid of models and data sets: read its tracked tables, sum them up, fit laws to them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from mapkg.measures import MASSIVE_RATIO
from mapkg.nulls import ProductNull, p_value
from studies import tables
from studies.laws import compare_laws
from studies.published import titles
from studies.results import TABLES, Emergence

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


def read_runs(folder: Path | str, names: Iterable[str]) -> Emergence:
    """The tables of several runs as one set, with a column ``run`` that tells them apart."""
    names = list(names)
    return Emergence(**{table: tables.read(folder, "emergence", names, table) for table in TABLES})


def read_untrained(folder: Path | str, names: Iterable[str]) -> pd.DataFrame:
    """The tables of untrained networks of several runs, with a column ``run``."""
    return tables.read(folder, "untrained", list(names))


def how_unlikely(summary: pd.DataFrame, untrained: pd.DataFrame) -> pd.DataFrame:
    """The largest ratio of each trained layer, beside what chance and no training give.

    Returns:
        A row per run, seed and layer. ``max_ratio``; ``untrained_max``, the largest ratio of
        that layer in any untrained network with calibrated BatchNorm; ``p_untrained``, the
        p-value by rank among these networks, never below 1 / (1 + networks);
        ``chance_threshold``, the ratio that products of three independent normals of this
        width exceed anywhere in as many rows with probability 0.05; ``p_chance``, their
        probability to exceed the largest ratio.
    """
    rows = summary[summary["state"] == "best"].reset_index(drop=True)
    null = untrained[untrained["state"] == "base_calibrated"].groupby(["run", "layer"])["max_ratio"]
    found = rows[["run", "seed", "layer", "max_ratio"]].copy()
    thresholds = {
        (channels, number): ProductNull(channels).threshold(0.05, number)
        for channels, number in set(zip(rows["channels"], rows["rows"], strict=True))
    }
    for i, row in rows.iterrows():
        of_layer, ratio = null.get_group((row["run"], row["layer"])), row["max_ratio"]
        chance = ProductNull(row["channels"]).exceedance(ratio, row["rows"])
        found.loc[i, "untrained_max"] = of_layer.max()
        found.loc[i, "p_untrained"] = float(p_value(ratio, of_layer.to_numpy()))
        found.loc[i, "chance_threshold"] = thresholds[row["channels"], row["rows"]]
        found.loc[i, "p_chance"] = float(chance)
    return found


def by_measure(runs: Emergence) -> pd.DataFrame:
    """Which trained layers are massive, by three measures, a row per run, seed and layer.

    ``row ratio`` is some activation above 1000 medians of its row. ``Sun's rule`` is |s| > 100 and
    above 1000 medians of the layer (Sun et al. 2024), for which the typical row median stands: the
    tables have no other. ``spread`` is that of ln r over all entries, beyond the spread of this
    layer in every untrained network of the run.
    """
    keys = ["run", "seed", "layer"]
    x = np.log(10) * runs.histogram["low"]  # bins are equally wide, so their edge will do
    weight = runs.histogram["count"]
    parts = runs.histogram[[*keys, "state"]].assign(n=weight, x=weight * x, xx=weight * x * x)
    sums = parts.groupby([*keys, "state"]).sum()
    spread = np.sqrt(sums["xx"] / sums["n"] - (sums["x"] / sums["n"]) ** 2).unstack()
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
