"""PROTEINS of the TUDataset collection: is a protein an enzyme?

One node per secondary-structure element, labelled helix, sheet or turn. Edges join neighbours
along the chain or in space; the type of an edge is the unordered pair of its two labels.
"""

import io
import zipfile
from collections.abc import Sequence
from itertools import combinations_with_replacement
from pathlib import Path

import platformdirs
import torch
from jaxtyping import Int
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.datasets import TUDataset
from torch_geometric.io import read_tu_data

from studies.data.description import Description, Splits
from studies.data.graph_cache import cached_graphs
from studies.data.raw_files import check, fetch, root_with
from studies.data.splitting import random_split
from studies.files import write_atomically

PROTEINS_FOLDER = "TUDataset/PROTEINS/raw"
"""Folder of the raw files under a data root."""

STRUCTURES = ("helix", "sheet", "turn")
"""Secondary structures by node label."""

_PAIRS = list(combinations_with_replacement(range(len(STRUCTURES)), 2))

PAIR_TYPES = {i: f"{STRUCTURES[a]}-{STRUCTURES[b]}" for i, (a, b) in enumerate(_PAIRS)}
"""Edge types by id, the unordered pair of the secondary structures at an edge's ends."""

SEED = 0
"""Of the split."""

_SHA256 = {
    "PROTEINS_A.txt": "4c4b33e272fc95cac6d27ed6d5d12b9a852c8610e91fff59f8f0dbdd5a20df67",
    "PROTEINS_graph_indicator.txt": (
        "8d4ff1e852a5c28561e9bffb44cf9490bc552b13a3b6156dd12dc7f44e9afc4a"
    ),
    "PROTEINS_graph_labels.txt": "c0ef9810c440775252872318d0c8adc385588e14bc4c47a2c34aa96ee3c7cdcd",
    "PROTEINS_node_labels.txt": "f758e8ad3d6e3c026b50833d75f6f90735b94eb3345e4243707f495ca8afea8d",
}
_OWN = "studies.data.proteins.read_proteins(folder)"


def load_proteins(roots: Sequence[Path], *, download: bool) -> Splits | None:
    """TU PROTEINS from the first root that has it, or None if it cannot be had.

    Args:
        roots: folders that may hold ``TUDataset/PROTEINS/raw``.
        download: whether to fetch it to the user's cache folder if none does.

    Raises:
        ValueError: if a file is not the published one.
    """
    root = root_with(roots, [f"{PROTEINS_FOLDER}/{name}" for name in _SHA256])
    if root is None and download:
        root = _fetch()
    if root is None:
        return None
    folder = root / PROTEINS_FOLDER
    for name, digest in _SHA256.items():
        check((folder / name).read_bytes(), digest, str(folder / name), _OWN)
    graphs = cached_graphs(list(_SHA256.values()), __file__, lambda: read_proteins(folder))
    return split_proteins(graphs)


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
    missing = [name for name in _SHA256 if not (Path(folder) / name).is_file()]
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
        types = pair_type(x, edge_index)
        y = torch.tensor([[y]], dtype=torch.float)
        graphs.append(Data(x=x, edge_index=edge_index, edge_attr=types, edge_type=types, y=y))
    return graphs


def pair_type(
    x: Int[Tensor, " nodes"], edge_index: Int[Tensor, "2 edges"]
) -> Int[Tensor, " edges"]:
    """The type of each edge: which two secondary structures it joins, in either order.

    Args:
        x: secondary structure of each node, 0 to 2, shape [N].
        edge_index: edges, shape [2, E].

    Returns:
        Ids of ``PAIR_TYPES``, shape [E].
    """
    ids = torch.empty(len(STRUCTURES), len(STRUCTURES), dtype=torch.long)
    for i, (a, b) in enumerate(_PAIRS):
        ids[a, b] = ids[b, a] = i
    return ids[x[edge_index[0]], x[edge_index[1]]]


def split_proteins(graphs: Sequence[Data]) -> Splits:
    """The stratified split of the graphs that have an edge; the description counts the others.

    Args:
        graphs: as ``read_proteins`` returns them.
    """
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


def _fetch() -> Path | None:
    """Downloads the raw files to the user's cache folder; the root, or None without a network."""
    url = f"{TUDataset.url}/PROTEINS.zip"
    content = fetch(url)
    if content is None:
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = {name: archive.read(f"PROTEINS/{name}") for name in _SHA256}
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{url}: expected a zip file of PROTEINS: {error}") from error
    for name, file in files.items():
        check(file, _SHA256[name], f"{url}, {name}", _OWN)
    root = platformdirs.user_cache_path("mapkg")
    for name, file in files.items():
        write_atomically(root / PROTEINS_FOLDER / name, file)
    return root
