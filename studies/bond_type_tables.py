"""Read the tracked tables of what massive activations sit on, and set them as tables to read."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch_geometric.data import Data

from mapkg.attribution import THRESHOLDS
from studies.data import Splits
from studies.first_layer import (
    distinct_edges,
    first_layer,
    mean_log_ratio,
    separable_log_ratio,
    shares_above,
)

RUNS = {
    f"{model.lower()}_{data}": f"{model}, {title}"
    for data, title in (("zinc", "ZINC"), ("tox21", "TOX21"), ("proteins", "PROTEINS (TU)"))
    for model in ("GT", "GraphiT", "SAN")
}
"""Runs of the emergence grid that are looked at, from what files call them to titles."""

ON_ZINC = {name: title for name, title in RUNS.items() if name.endswith("_zinc")}
"""Those on ZINC, whose first layer can be read off the weights as a table of types."""

EXPERIMENTS = {
    "original": "as they are",
    "shuffled": "types shuffled",
    "uniform": "types drawn uniformly",
    "frequent": "frequent type informative",
    "rare": "rare type informative",
    "triple": "many triple bonds",
    "equal": "equally frequent types",
    "global": "global node, new types",
    "global_triple": "global node, id of triple",
}
"""Retrained networks on data with changed types, from what files call them to titles."""


def read_bonds(folder: Path | str, table: str, runs: Mapping[str, str]) -> pd.DataFrame:
    """A table of several runs, with their titles in a column ``run``.

    Args:
        folder: where ``python -m studies attribute`` wrote ``bonds_NAME_TABLE.csv.gz``.
        table: ``"shares"``, ``"heat"``, ``"parts"``, ``"first_layer"`` or ``"losses"``.
        runs: from names of files to titles, for example ``RUNS``.

    Raises:
        FileNotFoundError: if a table is missing.
    """
    parts = []
    for name, title in runs.items():
        path = Path(folder) / f"bonds_{name}_{table}.csv.gz"
        if not path.is_file():
            raise FileNotFoundError(
                f"no table at {path}; write it with python -m studies attribute"
            )
        parts.append(pd.read_csv(path).assign(run=title))
    return pd.concat(parts, ignore_index=True)


def edge_counts(shares: pd.DataFrame) -> dict[str, int]:
    """How many edges have each label, in the order of the labels.

    Args:
        shares: rows of one property and data set.

    Raises:
        ValueError: if there is no row.
    """
    if shares.empty:
        raise ValueError(
            "expected rows of a table of shares, got none; there are tables of the thresholds "
            + ", ".join(f"{threshold:g}" for threshold in THRESHOLDS)
        )
    return shares.groupby("label", sort=False)["edges"].first().to_dict()


def type_shares(data: Mapping[str, Splits]) -> pd.DataFrame:
    """Which share of the training edges has each type, a row per data set.

    Args:
        data: from titles to splits, with few types.
    """
    rows = {}
    for title, splits in data.items():
        ids = torch.cat([graph.edge_type for graph in splits.train])
        shares = ids.bincount(minlength=max(splits.description.edge_types) + 1) / len(ids)
        rows[title] = {
            f"type {i}": f"{float(shares[i]):.2%}" for i in splits.description.edge_types
        }
    return pd.DataFrame(rows).T.fillna("")


def share_table(
    shares: pd.DataFrame, value: str = "share", *, columns: Sequence[str] = ("run", "seed")
) -> pd.DataFrame:
    """A value with its interval as text, labels down and runs across.

    Args:
        shares: one row per label and combination of ``columns``.
        value: a column with its ends ``_low`` and ``_high``, for example ``"enrichment"``.
        columns: what the columns of the table are told apart by.
    """
    texts = shares.apply(
        lambda row: (
            "none"
            if np.isnan(row[value])
            else f"{row[value]:.3f} [{row[f'{value}_low']:.3f}, {row[f'{value}_high']:.3f}]"
        ),
        axis=1,
    )
    wide = shares.assign(text=texts).pivot(index="label", columns=list(columns), values="text")
    order = shares[list(columns)].drop_duplicates()
    wide = wide.reindex(index=shares["label"].unique())
    return wide[[tuple(row) if len(row) > 1 else row[0] for row in order.to_numpy()]]


def range_table(
    table: pd.DataFrame,
    values: Mapping[str, str],
    *,
    rows: Sequence[str] = ("run", "label"),
    digits: int = 3,
) -> pd.DataFrame:
    """Least and greatest value over seeds.

    Args:
        table: columns ``rows`` and ``values``, a row per seed.
        values: columns to show, with their headings.
        rows: what the rows of the result are told apart by.
        digits: significant digits.
    """

    def text(group: pd.Series) -> str:
        low, high = group.min(), group.max()
        ends = [f"{end:,.0f}" if abs(end) >= 1000 else f"{end:.{digits}g}" for end in (low, high)]
        return ends[0] if ends[0] == ends[1] else " to ".join(ends)

    return table.groupby(list(rows), sort=False)[list(values)].agg(text).rename(columns=values)


def log_ratios(
    model: nn.Module, train: Sequence[Data], test: Sequence[Data], names: Mapping[int, str]
) -> pd.DataFrame:
    """Mean log10 ratio of each type and channel of the first layer, measured and predicted.

    Args:
        model: GT, GraphiT or SAN.
        train: what the prediction is made from, with the weights.
        test: what is measured.
        names: of the edge types, by id; those without an edge on either side are left out.

    Returns:
        Columns ``label``, ``channel``, ``measured`` and ``predicted``.
    """
    size = max(names) + 1
    values = {}
    for key, graphs, function in (
        ("measured", test, mean_log_ratio),
        ("predicted", train, separable_log_ratio),
    ):
        triples = distinct_edges(graphs)
        values[key] = function(first_layer(model, triples), triples.edge, triples.count, size)
    tables = [
        pd.DataFrame({key: table[edge_type].numpy() for key, table in values.items()}).assign(
            label=name, channel=range(values["measured"].size(1))
        )
        for edge_type, name in names.items()
    ]
    return pd.concat(tables, ignore_index=True).dropna(ignore_index=True)


def predicted_heat(
    model: nn.Module, train: Sequence[Data], names: Mapping[int, str], *, threshold: float
) -> pd.DataFrame:
    """The heat map of the first layer as its weights and training frequencies predict it.

    Args:
        model: GT, GraphiT or SAN.
        train: how often each edge occurs, by its types and those of its ends.
        names: of the edge types, by id.
        threshold: ratio above which a channel counts.

    Returns:
        Columns ``layer``, ``threshold``, ``label``, ``channel`` and ``percent``, as the table
        ``heat`` of ``bond_types``, zeros left out.
    """
    triples = distinct_edges(train)
    found = shares_above(
        first_layer(model, triples), triples.edge, triples.count, threshold, max(names) + 1
    )
    rows = [
        {"label": name, "channel": channel, "percent": 100 * float(share)}
        for edge_type, name in names.items()
        for channel, share in enumerate(found[edge_type])
        if share > 0
    ]
    table = pd.DataFrame(rows, columns=["label", "channel", "percent"])
    return table.assign(layer=0, threshold=float(threshold))


def late_means(first_layer: pd.DataFrame, *, since: int = 15) -> pd.DataFrame:
    """What the first layer is like over the later epochs of training.

    Which types are above a threshold changes from epoch to epoch, so that one epoch says
    little.

    Args:
        first_layer: as ``bond_types`` gives it, with the states ``epoch_...`` of runs that kept
            weights along the way, and a column ``run``.
        since: the first epoch that counts.

    Returns:
        A row per ``run``, ``label`` and ``seed``. Columns are geometric means over these epochs of
        ``max_ratio`` and ``gate_median``, and the arithmetic mean of ``measured``, the share of
        edges with a massive activation; ``epochs``, how many they are, and ``epochs_with``, in
        how many an edge has one.

    Raises:
        ValueError: if no epoch is late enough.
    """
    late = first_layer[first_layer["state"].str.startswith("epoch_")]
    late = late[late["epoch"] >= since]
    if late.empty:
        raise ValueError(
            f"expected states epoch_... of epoch {since} or later; train with --keep-every"
        )
    logs = late.assign(
        **{name: np.log(late[name]) for name in ("max_ratio", "gate_median")},
        epochs_with=late["measured"] > 0,
        epochs=1,
    )
    found = logs.groupby(["run", "label", "seed"], sort=False).agg(
        max_ratio=("max_ratio", "mean"),
        gate_median=("gate_median", "mean"),
        measured=("measured", "mean"),
        epochs=("epochs", "sum"),
        epochs_with=("epochs_with", "sum"),
    )
    logarithmic = ["max_ratio", "gate_median"]
    found[logarithmic] = np.exp(found[logarithmic])
    return found.reset_index()
