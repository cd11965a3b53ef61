"""The grid of models and data sets: read its tracked tables, sum them up, fit laws to them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from mapkg.measures import MASSIVE_RATIO
from mapkg.nulls import ProductNull, p_value
from studies.laws import compare_laws
from studies.results import TABLES, Emergence, read_emergence
from studies.runs import titles

MODELS = ("GT", "GraphiT", "SAN")
"""The paper's networks, rows of its figure."""

DATA_SETS = {"zinc": "ZINC", "tox21": "TOX21", "proteins": "PROTEINS (TU)"}
"""Columns of the figure, from what result files call them to what figures do."""

GRID = {
    name: title
    for model in MODELS
    for name, title in titles("grid").items()
    if title.startswith(f"{model}, ")
}
"""All pairs, from names of result files to titles of figures, those of a model together."""

VARIANTS = titles("variants")
"""Networks on ZINC that differ in their attention, from result files to titles of figures."""

PERMUTED = {name: name.removesuffix("_permuted") for name in titles("permuted")}
"""Runs on permuted targets, from their result files to the pair they are a control of."""

METRICS = ("mae", "roc_auc", "bce")
"""What a table of the grid says of predictions, where there is such a number."""


def read_runs(folder: Path | str, names: Iterable[str]) -> Emergence:
    """The tables of several pairs as one set, with a column ``run`` that tells them apart.

    Args:
        folder: where ``python -m studies study emergence`` wrote them.
        names: for example ``GRID``; ``emergence_NAME_`` is what the files' names begin with.

    Raises:
        FileNotFoundError: if a table is missing.
    """
    runs = {name: read_emergence(folder, f"emergence_{name}_") for name in names}
    return Emergence(
        **{
            table: pd.concat(
                [getattr(run, table).assign(run=name) for name, run in runs.items()],
                ignore_index=True,
            )
            for table in TABLES
        }
    )


def read_untrained(folder: Path | str, names: Iterable[str]) -> pd.DataFrame:
    """The tables of untrained networks of several pairs, with a column ``run``.

    Args:
        folder: where ``python -m studies study untrained`` wrote ``untrained_NAME.csv.gz``.
        names: of the pairs.
    """
    return pd.concat(
        [pd.read_csv(Path(folder) / f"untrained_{name}.csv.gz").assign(run=name) for name in names],
        ignore_index=True,
    )


def how_unlikely(
    summary: pd.DataFrame, untrained: pd.DataFrame, *, trained: str = "best"
) -> pd.DataFrame:
    """The largest ratio of each trained layer, beside what chance and no training give.

    Args:
        summary: of ``read_runs``.
        untrained: of ``read_untrained``.
        trained: which state.

    Returns:
        A row per run, seed and layer. ``max_ratio``; ``untrained_max``, the largest ratio of
        that layer in any untrained network with calibrated BatchNorm; ``p_untrained``, the
        p-value by rank among these networks, never below 1 / (1 + networks);
        ``chance_threshold``, the ratio that products of three independent normals of this
        width exceed anywhere in as many rows with probability 0.05; ``p_chance``, their
        probability to exceed the largest ratio.

    Raises:
        ValueError: if a run has no untrained networks.
    """
    rows = summary[summary["state"] == trained].copy()
    null = untrained[untrained["state"] == "base_calibrated"]
    missing = sorted(set(rows["run"]) - set(null["run"]))
    if missing:
        raise ValueError(
            f"no untrained networks of {', '.join(missing)}: write their tables with "
            "python -m studies study untrained"
        )
    null = null.groupby(["run", "layer"])["max_ratio"].agg(list)
    of_layer = [np.array(null[key]) for key in zip(rows["run"], rows["layer"], strict=True)]
    rows["untrained_max"] = [values.max() for values in of_layer]
    rows["p_untrained"] = [
        float(p_value(observed, values))
        for observed, values in zip(rows["max_ratio"], of_layer, strict=True)
    ]
    sizes = rows[["channels", "rows"]].drop_duplicates()
    thresholds = {
        size: ProductNull(int(size[0])).threshold(0.05, int(size[1]))
        for size in sizes.itertuples(index=False, name=None)
    }
    keys = list(zip(rows["channels"], rows["rows"], strict=True))
    rows["chance_threshold"] = [thresholds[key] for key in keys]
    rows["p_chance"] = [
        float(ProductNull(int(channels)).exceedance(ratio, int(number)))
        for (channels, number), ratio in zip(keys, rows["max_ratio"], strict=True)
    ]
    columns = ["run", "seed", "layer", "max_ratio", "untrained_max", "p_untrained"]
    return rows[[*columns, "chance_threshold", "p_chance"]].reset_index(drop=True)


def grid_table(summary: pd.DataFrame, *, threshold: float = MASSIVE_RATIO) -> pd.DataFrame:
    """What the grid found, a row per pair: the least and the greatest value over its seeds.

    Args:
        summary: of ``read_runs``.
        threshold: ratio above which an activation is massive.

    Returns:
        Texts. Number of ``seeds``; ``epochs``; those of ``METRICS`` that the ``test split``
        has, at the best validation epoch; the largest ratio of any layer, ``untrained`` (as
        published) and ``trained``; ``layers`` that have a massive activation with every seed,
        and those with some seed only; and ``edges, at most``, the largest share of edges with
        one in any layer.
    """
    rows = {}
    for run, table in summary.groupby("run", sort=False):
        best, base = (table[table["state"] == state] for state in ("best", "base"))
        metrics = [name for name in METRICS if best.get(f"test_{name}", pd.Series()).notna().any()]
        massive = best.assign(massive=best["max_ratio"] > threshold)
        share = massive.groupby("layer")["massive"].mean()
        by_seed = best.groupby("seed")
        rows[run] = {
            "seeds": best["seed"].nunique(),
            "epochs": _span(best["epochs"], "{:.0f}"),
            "test split": ", ".join(
                f"{name} {_span(best[f'test_{name}'], '{:.3f}')}" for name in metrics
            ),
            "untrained": _span(base.groupby("seed")["max_ratio"].max(), "{:,.0f}"),
            "trained": _span(by_seed["max_ratio"].max(), "{:,.0f}"),
            "layers, every seed": _list(share.index[share == 1]),
            "layers, some seed": _list(share.index[(share > 0) & (share < 1)]),
            "edges, at most": _span(by_seed["share_rows_with_massive"].max(), "{:.2%}"),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def length_table(trajectory: pd.DataFrame, *, threshold: float = MASSIVE_RATIO) -> pd.DataFrame:
    """How the largest ratio of any layer depends on the length of training.

    Args:
        trajectory: of ``read_runs``.
        threshold: ratio above which an activation is massive.

    Returns:
        A row per run and seed. In whole numbers the ratio ``untrained``, the ``highest`` of
        all epochs that were looked at, that epoch, and the ratio at the ``last epoch``; and a
        text, ``massive from``, the first epoch with a massive activation, or "never".
    """
    keys = ["run", "seed"]
    ratios = trajectory.groupby([*keys, "epoch"], sort=False)["max_ratio"].max()
    ratios = ratios.rename("ratio").reset_index()
    by_seed = ratios.groupby(keys, sort=False)["ratio"]
    highest = ratios.loc[by_seed.idxmax()].set_index(keys)
    massive = ratios[ratios["ratio"] > threshold].groupby(keys)["epoch"].min()
    table = pd.DataFrame(
        {
            "untrained": by_seed.first(),
            "highest": highest["ratio"],
            "in epoch": highest["epoch"],
            "last epoch": by_seed.last(),
        }
    ).round()
    table = table.astype(int).loc[highest.index]
    table["massive from"] = massive.reindex(table.index).map("{:.0f}".format, na_action="ignore")
    return table.fillna("never")


def law_table(laws: pd.DataFrame, by: Sequence[str] = ("run", "state")) -> pd.DataFrame:
    """Which law fits best.

    Args:
        laws: as ``laws`` returns it.
        by: columns whose values make a row; with ``layer`` among them a row is one layer.

    Returns:
        ``fits``, the number of networks and layers in a row; a column per law, the median of
        its distance to the values (``ks_own``), and in brackets in how many fits it has the
        least AIC; and the medians of ``ks_base`` and ``ks_two_sample`` of the gamma law.
    """
    keys = list(by)
    ks = laws.groupby([*keys, "law"], sort=False)["ks_own"].median().unstack()
    wins = (laws["aic_rank"] == 1).groupby([laws[key] for key in (*keys, "law")], sort=False)
    wins = wins.sum().unstack()
    fits = laws.groupby(keys)[["run", "seed", "layer", "state"]]
    fits = fits.apply(lambda rows: len(rows.drop_duplicates()))
    texts = pd.DataFrame(
        {
            law: [f"{ks.loc[row, law]:.3f} ({wins.loc[row, law]})" for row in ks.index]
            for law in ks.columns
        },
        index=ks.index,
    )
    gamma = laws[laws["law"] == "gamma"].groupby(keys)[["ks_base", "ks_two_sample"]].median()
    texts.insert(0, "fits", fits)
    return texts.join(gamma.round(3))


def laws(tables: pd.DataFrame, states: Sequence[str] = ("base", "best")) -> pd.DataFrame:
    """Laws fitted to the distribution of ratios of every run, seed, state and layer.

    Args:
        tables: the histogram of ``read_runs``.
        states: which states; the first is what the others are compared with.

    Returns:
        As ``laws.compare_laws``, with the columns that say where a row comes from.
    """
    origin = ["config", "changes", "dataset", "epochs", "versions", "commit"]
    keys = ["run", "seed", "layer", "state"]
    chosen = tables[tables["state"].isin(states)]
    fitted = compare_laws(chosen[[*keys, "bin", "low", "count"]], base=states[0])
    return fitted.merge(chosen[[*keys, *origin]].drop_duplicates(), on=keys, validate="many_to_one")


def laws_of_runs(
    runs: Sequence[str],  # names of runs whose tables study emergence wrote, for example gt_zinc
    *,
    results: Path,  # the folder of these tables
) -> pd.DataFrame:
    """``laws`` of collected runs."""
    return laws(read_runs(results, runs).histogram)


def _span(values: pd.Series, form: str) -> str:
    least, greatest = (form.format(value) for value in (values.min(), values.max()))
    return least if least == greatest else f"{least} to {greatest}"


def _list(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers)) or "none"
