"""Tables of emergence runs, the networks of these runs, and tables to read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from mapkg.models import GraphNetwork
from mapkg.models.config import Config
from studies import checkpoint, tables
from studies.data import ATOM_TYPES, BOND_TYPES, Splits
from studies.provenance import commit, versions
from studies.train import Fit

TABLES = ("summary", "trajectory", "graph_maxima", "histogram", "history")
"""The tables of an emergence run."""


@dataclass(frozen=True)
class Emergence:
    """The tables of an emergence run, each row with where it comes from.

    Attributes:
        summary: per state and layer, the statistics of ``ActivationSummary``. States: ``base``
            (untrained, BatchNorm statistics at 0 and 1, as published), ``base_calibrated``
            (untrained, statistics of the training data), ``best`` and ``last`` (weights of the
            epoch with the least validation loss, and of the last one).
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


def of_run(
    folder: Path,
    *,
    states: Sequence[str] = (),  # keep only these states in the two large tables, not all
) -> dict[str, pd.DataFrame]:
    """The tables of a finished run."""
    made = {name: getattr(read_emergence(folder), name) for name in TABLES}
    there = made["summary"]["state"].unique().tolist()
    if unknown := sorted({*states} - {*there}):
        raise ValueError(f"no state {', '.join(unknown)} in {folder}; there are {', '.join(there)}")
    for name in ("graph_maxima", "histogram") if states else ():
        made[name] = made[name][made[name]["state"].isin(states)]
    return made


def read_network(folder: Path | str, splits: Splits) -> tuple[GraphNetwork, Config, dict[str, Any]]:
    """The best network of a finished run, its configuration, and columns of a table about it."""
    model, information = checkpoint.load(Path(folder) / "best")
    title = splits.description.title
    if information["dataset"] != title:
        raise ValueError(
            f"{folder}: expected a network trained on {title}, got one trained on "
            f"{information['dataset']}"
        )
    config = Config.from_dict(information["config"])
    origin = {"seed": information["seed"], "config": information["name"]}
    origin |= {"explicit_bias": config.explicit_bias, "use_bias": config.use_bias}
    origin |= {"dataset": title, "epochs": len(information["history"])}
    return model.eval(), config, origin | {"versions": versions(), "commit": commit()}


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


def range_over_seeds(summary: pd.DataFrame, statistic: str) -> pd.DataFrame:
    """Least and greatest value of a statistic over seeds, a row per layer, a column per state."""
    look = dict(rows=["layer"], columns=["state"], statistic="range", form=",.0f")
    return tables.over_seeds(summary, statistic, **look)


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
