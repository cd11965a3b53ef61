"""A cache of processed graphs: keyed by content and code, checked before use."""

import hashlib
import warnings
from itertools import pairwise
from pathlib import Path

import pandas as pd
import platformdirs
import rdkit
import safetensors.torch
import torch
from torch_geometric.data import Data

from mapkg.data import molecules
from mapkg.files import sha256, write_atomically

FORMAT = 1
"""Version of the cache's own layout, part of every key."""


def cached_graphs(path: Path, table: pd.DataFrame) -> list[Data]:
    """The graphs of a SMILES table, from the cache if it holds them.

    The key covers the table's bytes, the code that reads molecules and the RDKit version. A
    damaged entry is built again. A cache folder that cannot be written costs time, not data.

    Args:
        path: the table's file.
        table: its checked content.
    """
    parts = [sha256(path), sha256(Path(molecules.__file__)), rdkit.__version__, str(FORMAT)]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    entry = platformdirs.user_cache_path("mapkg") / "graphs" / f"{key}.safetensors"
    graphs = _read(entry, table)
    if graphs is None:
        graphs = molecules.table_graphs(table, str(path))
        try:
            _write(entry, graphs)
        except OSError as error:
            warnings.warn(f"processed graphs were not cached at {entry}: {error}", stacklevel=2)
    return graphs


def _write(entry: Path, graphs: list[Data]) -> None:
    content = safetensors.torch.save(
        {
            "num_nodes": torch.tensor([graph.num_nodes for graph in graphs]),
            "num_edges": torch.tensor([graph.num_edges for graph in graphs]),
            "x": torch.cat([graph.x for graph in graphs]),
            "edge_index": torch.cat([graph.edge_index for graph in graphs], dim=1),
            "edge_attr": torch.cat([graph.edge_attr for graph in graphs]),
            "y": torch.cat([graph.y for graph in graphs]),
        }
    )
    write_atomically(entry, hashlib.sha256(content).digest() + content)


def _read(entry: Path, table: pd.DataFrame) -> list[Data] | None:
    """The cached graphs, or None if there are none or the entry is damaged."""
    try:
        raw = entry.read_bytes()
    except OSError:
        return None
    digest, content = raw[:32], raw[32:]
    if hashlib.sha256(content).digest() != digest:
        return None
    stored = safetensors.torch.load(content)
    nodes = [0, *stored["num_nodes"].cumsum(0).tolist()]
    edges = [0, *stored["num_edges"].cumsum(0).tolist()]
    return [
        Data(
            x=stored["x"][n0:n1],
            edge_index=stored["edge_index"][:, e0:e1],
            edge_attr=stored["edge_attr"][e0:e1],
            y=stored["y"][i : i + 1],
            smiles=smiles,
        )
        for i, ((n0, n1), (e0, e1), smiles) in enumerate(
            zip(pairwise(nodes), pairwise(edges), table["smiles"], strict=True)
        )
    ]
