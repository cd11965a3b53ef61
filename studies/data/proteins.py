"""PROTEINS of the TUDataset collection: is a protein an enzyme?

One node per secondary-structure element, labelled helix, sheet or turn. Edges join neighbors
along the chain or in space; the type of an edge is the unordered pair of its two labels.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.datasets import TUDataset
from torch_geometric.io import read_tu_data

from studies.data.description import Description, Splits
from studies.data.graph_cache import cached_graphs
from studies.data.raw_files import read_url, root_with, unzipped
from studies.data.splitting import random_split

PROTEINS_FOLDER = "TUDataset/PROTEINS/raw"
"""Folder of the raw files under a data root."""

STRUCTURES = ("helix", "sheet", "turn")
"""Secondary structures by node label."""

_PAIRS = list(combinations_with_replacement(range(len(STRUCTURES)), 2))

PAIR_TYPES = {i: f"{STRUCTURES[a]}-{STRUCTURES[b]}" for i, (a, b) in enumerate(_PAIRS)}
"""Edge types by id, the unordered pair of the secondary structures at an edge's ends."""

SEED = 0
"""Of the split."""

_FILES = [
    f"PROTEINS_{part}.txt" for part in ("A", "graph_indicator", "graph_labels", "node_labels")
]


def load_proteins(roots: Sequence[Path], *, download: bool) -> Splits | None:
    """TU PROTEINS from the first root that has it, or None if it cannot be had."""
    files = [f"{PROTEINS_FOLDER}/{name}" for name in _FILES]
    root = root_with(roots, files, _fetch if download else None)
    if root is None:
        return None
    raw = [root / file for file in files]
    return split_proteins(
        cached_graphs(raw, __file__, lambda: read_proteins(root / PROTEINS_FOLDER))
    )


def read_proteins(folder: Path | str) -> list[Data]:
    """The graphs of raw files in the format of the TUDataset collection.

    Nothing is written beside them, unlike by PyG's class, whose reader this is.

    Args:
        folder: holds ``PROTEINS_A.txt`` and the other files.

    Returns:
        Graphs with the secondary structure ``x`` [N], ``edge_index`` [2, E], the type of pair
        ``edge_attr`` and ``edge_type`` [E] (the same tensor), and ``y`` [1, 1], 0 or 1.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if there are other than three node labels or two graph labels.
    """
    missing = [name for name in _FILES if not (Path(folder) / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: expected the raw files of PROTEINS, no {missing[0]}")
    data, slices, sizes = read_tu_data(str(folder), "PROTEINS")
    one_hot = data.x[:, sizes["num_node_attributes"] :]  # attributes are not used
    found = (one_hot.size(1), len(data.y.unique()))
    if found != (len(STRUCTURES), 2):
        raise ValueError(
            f"{folder}: expected 3 node labels (helix, sheet, turn) and 2 graph labels, found "
            f"{found[0]} and {found[1]}; these are not the files of PROTEINS"
        )
    labels = one_hot.argmax(dim=-1)
    nodes, edges = slices["x"].diff().tolist(), slices["edge_index"].diff().tolist()
    edges += [0] * (len(nodes) - len(edges))  # PyG counts up to the last graph with an edge
    graphs = []
    for x, edge_index, y in zip(
        labels.split(nodes), data.edge_index.split(edges, dim=1), data.y.tolist(), strict=True
    ):
        types = _pair_type(x, edge_index)
        y = torch.tensor([[y]], dtype=torch.float)
        graphs.append(Data(x=x, edge_index=edge_index, edge_attr=types, edge_type=types, y=y))
    return graphs


def _pair_type(x: Int[Tensor, " N"], edge_index: Int[Tensor, "2 E"]) -> Int[Tensor, " E"]:
    ids = torch.empty(len(STRUCTURES), len(STRUCTURES), dtype=torch.long)
    for i, (a, b) in enumerate(_PAIRS):
        ids[a, b] = ids[b, a] = i
    return ids[x[edge_index[0]], x[edge_index[1]]]


def split_proteins(graphs: Sequence[Data]) -> Splits:
    """The stratified split of the graphs that have an edge; the description counts the others."""
    kept = [graph for graph in graphs if graph.num_edges]
    deviations = [
        "Not the PROTEINS of the paper, which is ogbn-proteins: one graph per protein here, one "
        "node per protein there.",
        f"The split is stratified and random (seed {SEED}): the collection has none.",
    ]
    if len(kept) < len(graphs):
        deviations.append(
            f"{len(graphs) - len(kept)} of {len(graphs):,} graphs have no edge and are dropped."
        )
    indices = random_split(len(kept), seed=SEED, labels=[graph.y.item() for graph in kept])
    return Splits(
        **{split: [kept[i] for i in chosen] for split, chosen in indices.items()},
        description=Description(
            name="proteins",
            title="TU PROTEINS",
            task="graph classification",
            target="is the protein an enzyme (0) or not (1)",
            num_node_types=len(STRUCTURES),
            num_edge_types=len(PAIR_TYPES),
            edge_types=PAIR_TYPES,
            target_names=("not an enzyme",),
            source="PROTEINS of the TUDataset collection (Morris et al., 2020), from Borgwardt et "
            "al., 2005",
            licence="not stated; published for research",
            deviations=tuple(deviations),
        ),
    )


def _fetch() -> dict[str, bytes]:
    members = {f"{PROTEINS_FOLDER}/{name}": f"PROTEINS/{name}" for name in _FILES}
    return unzipped(read_url(f"{TUDataset.url}/PROTEINS.zip"), members)
