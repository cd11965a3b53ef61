"""ogbn-proteins: associations between the proteins of eight species, read from OGB's raw files.

OGB's own reader (ogb 1.3.6) cannot be used: it keeps its result as a pickle that torch.load
now refuses, asks questions on stdin, looks for updates on the network when it is imported, and
needs several times the memory. Its raw files are plain tables, so pandas reads them:

- ``raw/num-node-list.csv.gz``, ``raw/num-edge-list.csv.gz``: one number each, N and E;
- ``raw/edge.csv.gz``: E rows, the two ends of an undirected edge;
- ``raw/edge-feat.csv.gz``: E rows of 8 weights in [0, 1];
- ``raw/node_species.csv.gz`` (``raw/species.csv.gz`` before OGB's reader first runs): N rows,
  a taxonomy id;
- ``raw/node-label.csv.gz``: N rows of 112 zeros and ones;
- ``split/species/{train,valid,test}.csv.gz``: node ids.

At the full size (132,534 nodes, 39,561,252 undirected edges) the arrays take 2.0 GB; the first
load needs about 4.6 GB and a few minutes to build them (scaled up from a tenth of the edges).
They are then cached; a cached load maps them from the file, so processes share the memory.
"""

import gzip
import hashlib
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import platformdirs
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from studies.data.description import Description, Splits
from studies.extras import neighbours
from studies.extras.neighbours import InEdges, SeedNodes, check_fan_outs
from studies.files import sha256

FOLDER = "ogbn_proteins"
"""OGB's folder of the data set, under a data root; its archive unpacks as ``proteins``."""

FORMAT = 1
"""Version of the cache's own layout, part of every key."""

SPECIES = {
    3702: "Arabidopsis thaliana",
    4932: "Saccharomyces cerevisiae",
    6239: "Caenorhabditis elegans",
    7227: "Drosophila melanogaster",
    7955: "Danio rerio",
    9606: "Homo sapiens",
    10090: "Mus musculus",
    511145: "Escherichia coli",
}
"""Names by NCBI taxonomy id. A node's type id is the rank of its species in this order."""

CHANNELS = (
    *("homology", "neighborhood", "fusion", "cooccurrence"),
    *("coexpression", "experimental", "database", "textmining"),
)
"""Kinds of evidence of the STRING database, in the order of the edge weights.

Source: ``mapping/README.md`` of the data set.
"""

NUM_TASKS = 112

FAN_OUTS = (5, 10, 15)
"""In-neighbours drawn for each of three layers; the last is that of the seeds."""

_SPLITS = {"train": "train", "val": "valid", "test": "test"}
_CHUNK = 1_000_000  # rows parsed at once, so that text and floats of all rows never coexist

DESCRIPTION = Description(
    name="ogbn-proteins",
    title="ogbn-proteins",
    task="node classification",
    target="112 protein functions (Gene Ontology annotations), present or not",
    num_node_types=len(SPECIES),
    num_edge_types=None,
    edge_channels=len(CHANNELS),
    num_targets=NUM_TASKS,
    edge_types=dict(enumerate(CHANNELS)),
    source="Open Graph Benchmark, ogbn-proteins version 1 (STRING v11 and Gene Ontology), "
    "split by species",
    licence="CC0",
    deviations=(
        "One fan-out for each layer: 5, 10 and 15 in-neighbours for layers 1, 2 and 3. The "
        "published code gives four fan-outs (5, 10, 15, 1) to three layers.",
        "Only the seed nodes are scored. In the published code the fourth fan-out adds a sampled "
        "neighbour of every seed, of any split, to the training loss and to the metric.",
        "All layers see one drawn neighbourhood, a graph with edges in which every node keeps its "
        "row; the published code draws anew for each layer and passes bipartite blocks, whose "
        "differing numbers of rows rule out residual connections.",
        "Validation and test neighbourhoods come from a fixed seed, so that two evaluations "
        "agree; the published ones are drawn anew each time.",
        "edge_type, used for attribution only, is the evidence channel with the largest weight, "
        "the first of equals. The published code has no edge types here.",
        "Sizes are those of the files. The paper's supplement describes another graph (54,879 "
        "nodes, 89,724 edges, amino acids).",
    ),
)


def load_ogbn_proteins(
    roots: list[Path], *, num_layers: int = 3, fan_outs: tuple[int, ...] = FAN_OUTS
) -> Splits | None:
    """ogbn-proteins, or None if it is nowhere.

    Args:
        roots: data roots, the first with a folder ``ogbn_proteins`` counts.
        num_layers: of the network that will read it.
        fan_outs: in-neighbours drawn for each layer, in the order of the layers; -1 for all.

    Returns:
        Three ``SeedNodes`` on one graph with both directions of every edge, and a description.

    Raises:
        ValueError: if there is not one fan-out for each layer, or a file is damaged or does
            not fit the others; the message names it.
        FileNotFoundError: if the folder is there and a file in it is missing.
    """
    check_fan_outs(fan_outs, num_layers)
    for root in roots:
        if (root / FOLDER).is_dir():
            break
    else:
        return None
    stored = _cached_arrays(_files(root / FOLDER))
    edges = InEdges(stored["indptr"], stored["sources"], stored["edge_ids"])
    splits = {
        split: SeedNodes(
            seeds=stored[split],
            edges=edges,
            x=stored["x"],
            edge_attr=stored["edge_attr"],
            y=stored["y"],
            fan_outs=fan_outs,
        )
        for split in _SPLITS
    }
    return Splits(**splits, description=DESCRIPTION)


def _files(folder: Path) -> dict[str, Path]:
    """The raw files by what they hold.

    Raises:
        FileNotFoundError: if one is missing.
    """
    raw, split_folder = folder / "raw", folder / "split" / "species"
    files = {
        "num_nodes": raw / "num-node-list.csv.gz",
        "num_edges": raw / "num-edge-list.csv.gz",
        "edges": raw / "edge.csv.gz",
        "edge_attr": raw / "edge-feat.csv.gz",
        "species": raw / "node_species.csv.gz",
        "y": raw / "node-label.csv.gz",
        **{split: split_folder / f"{name}.csv.gz" for split, name in _SPLITS.items()},
    }
    if not files["species"].is_file() and (raw / "species.csv.gz").is_file():
        files["species"] = raw / "species.csv.gz"
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"ogbn-proteins is incomplete, missing: {', '.join(missing)}. Unpack OGB's archive "
            f"proteins.zip again, as {folder}"
        )
    return files


def _cached_arrays(files: dict[str, Path]) -> dict[str, Tensor]:
    """The arrays of the raw files, from the cache if it holds them.

    The key covers the files' bytes and the code that reads them. A damaged entry is built
    again. A cache folder that cannot be written costs time, not data.
    """
    read_by = [Path(__file__), Path(neighbours.__file__)]
    parts = [sha256(path) for path in (*files.values(), *read_by)]
    key = hashlib.sha256("\n".join([*parts, str(FORMAT)]).encode()).hexdigest()[:32]
    entry = platformdirs.user_cache_path("mapkg") / "ogbn_proteins" / f"{key}.safetensors"
    arrays = _read(entry)
    if arrays is None:
        arrays = _arrays(files)
        try:
            _write(entry, arrays)
        except OSError as error:
            warnings.warn(f"processed arrays were not cached at {entry}: {error}", stacklevel=2)
    return arrays


def _digest(arrays: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {list(arrays[name].shape)}".encode())
        digest.update(arrays[name].flatten().numpy())
    return digest.hexdigest()


def _write(entry: Path, arrays: dict[str, Tensor]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the entry and moved there whole, not through a copy of it in memory.
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f".{entry.name}.") as folder:
        temporary = Path(folder) / entry.name
        safetensors.torch.save_file(arrays, temporary, metadata={"sha256": _digest(arrays)})
        os.replace(temporary, entry)


def _read(entry: Path) -> dict[str, Tensor] | None:
    """The cached arrays, or None if there are none or the entry is damaged."""
    try:
        with safe_open(entry, framework="pt") as stored:
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            digest = (stored.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return arrays if digest == _digest(arrays) else None


def _arrays(files: dict[str, Path]) -> dict[str, Tensor]:
    """Everything that the splits need, checked, from the raw files."""
    num_nodes = _count(files["num_nodes"])
    num_edges = _count(files["num_edges"])
    each_edge, each_node = f"one for each edge, {num_edges}", f"one for each node, {num_nodes}"
    edges = _table(files["edges"], num_edges, 2, np.int32, each_edge)
    _check_ids(files["edges"], edges, num_nodes)
    in_edges = InEdges.of_undirected(torch.from_numpy(edges), num_nodes)
    del edges
    species = _table(files["species"], num_nodes, 1, np.int64, each_node)[:, 0]
    y = _table(files["y"], num_nodes, NUM_TASKS, np.float32, each_node)
    _check(files["y"], y, (y == 0) | (y == 1) | np.isnan(y), "a label of 0, 1 or nothing")
    edge_attr = _table(files["edge_attr"], num_edges, len(CHANNELS), np.float32, each_edge)
    _check(files["edge_attr"], edge_attr, (edge_attr >= 0) & (edge_attr <= 1), "a weight in [0, 1]")
    return {
        "indptr": in_edges.indptr,
        "sources": in_edges.sources,
        "edge_ids": in_edges.edge_ids,
        "edge_attr": torch.from_numpy(edge_attr),
        "x": torch.from_numpy(_species_ids(files["species"], species)),
        "y": torch.from_numpy(y),
        **_split_seeds(files, num_nodes),
    }


def _count(path: Path) -> int:
    """The single number in a file that lists one size for each graph."""
    sizes = np.concatenate(list(_chunks(path, 1, np.int64)))
    if sizes.size != 1 or sizes[0, 0] < 1:
        raise ValueError(
            f"{path}: expected one positive number, as ogbn-proteins is one graph, "
            f"got {sizes.flatten().tolist()[:5]}"
        )
    return int(sizes[0, 0])


def _species_ids(path: Path, species: np.ndarray) -> np.ndarray:
    """Type ids 0 to 7 of taxonomy ids."""
    known = np.array(list(SPECIES))  # ascending
    ids = np.searchsorted(known, species).clip(max=len(known) - 1)
    _check(path, species, known[ids] == species, f"a taxonomy id of {', '.join(map(str, known))}")
    return ids


def _split_seeds(files: dict[str, Path], num_nodes: int) -> dict[str, Tensor]:
    """Node ids of the splits, in the order of their files."""
    seeds = {}
    for split in _SPLITS:
        seeds[split] = np.concatenate(list(_chunks(files[split], 1, np.int64)))
        _check_ids(files[split], seeds[split], num_nodes)
    nodes = pd.concat({split: pd.Series(ids[:, 0]) for split, ids in seeds.items()})
    repeated = nodes[nodes.duplicated()]
    if not repeated.empty:
        (split, row), node = repeated.index[0], repeated.iloc[0]
        raise ValueError(
            f"{files[split]}, row {row + 1}: expected every node once, in one split; node {node} "
            "occurs before"
        )
    return {split: torch.from_numpy(ids[:, 0]) for split, ids in seeds.items()}


def _check_ids(path: Path, ids: np.ndarray, num_nodes: int) -> None:
    _check(path, ids, (ids >= 0) & (ids < num_nodes), f"a node id from 0 to {num_nodes - 1}")


def _check(path: Path, table: np.ndarray, is_good: np.ndarray, expected: str) -> None:
    if not is_good.all():
        where = tuple(np.argwhere(~is_good)[0])
        raise ValueError(f"{path}, row {where[0] + 1}: expected {expected}, got {table[where]}")


def _table(path: Path, rows: int, columns: int, dtype: type, why: str) -> np.ndarray:
    """A table whose number of rows is known, [rows, columns]."""
    table = np.empty((rows, columns), dtype)
    found = 0
    for chunk in _chunks(path, columns, dtype):
        table[found : found + len(chunk)] = chunk[: max(0, rows - found)]
        found += len(chunk)
    if found != rows:
        raise ValueError(f"{path}: expected {rows} rows ({why}), found {found}")
    return table


def _chunks(path: Path, columns: int, dtype: type) -> Iterator[np.ndarray]:
    """The rows of a compressed table of numbers without a header, some at a time.

    Raises:
        ValueError: if it cannot be read, holds anything but such numbers, or has another number
            of columns.
    """
    try:
        with pd.read_csv(path, header=None, dtype=dtype, chunksize=_CHUNK) as chunks:
            for chunk in chunks:
                if chunk.shape[1] != columns:
                    raise ValueError(f"found {chunk.shape[1]} columns")
                yield chunk.to_numpy()
    except (ValueError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{path}: expected a table of {columns} columns of numbers, could not read it: {error}"
        ) from error
