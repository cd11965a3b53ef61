"""Read the tracked tables of what massive activations sit on, and set them as tables to read."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch_geometric.data import Data

from mapkg.attribution.first_layer import (
    distinct_edges,
    first_layer,
    mean_log_ratio,
    separable_log_ratio,
)
from mapkg.data import Splits

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
        folder: where ``python -m mapkg attribute`` wrote ``bonds_NAME_TABLE.csv.gz``.
        table: ``"shares"``, ``"heat"``, ``"parts"``, ``"first_layer"`` or ``"losses"``.
        runs: from names of files to titles, for example ``RUNS``.

    Raises:
        FileNotFoundError: if a table is missing.
    """
    parts = []
    for name, title in runs.items():
        path = Path(folder) / f"bonds_{name}_{table}.csv.gz"
        if not path.is_file():
            raise FileNotFoundError(f"no table at {path}; write it with python -m mapkg attribute")
        parts.append(pd.read_csv(path).assign(run=title))
    return pd.concat(parts, ignore_index=True)


def edge_counts(shares: pd.DataFrame) -> dict[str, int]:
    """How many edges have each label, in the order of the labels.

    Args:
        shares: rows of one property and data set.
    """
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
        value: ``"share"`` or ``"enrichment"``.
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
