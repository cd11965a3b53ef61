"""Data sets by name: ``load("moses")`` gives graphs in three splits, with a description.

A data set is looked for under the root given as argument, else under ``MAPKG_DATA``, the
user's cache folder and the bundled data, in this order. Checksums are checked before a file
is read, and processed graphs are cached.
"""

import os
from pathlib import Path

import platformdirs

from mapkg.data.description import Description, Graphs, NodeSplit, Splits
from mapkg.data.graph_cache import cached_graphs
from mapkg.data.molecules import (
    ATOM_TYPES,
    BOND_TYPES,
    SPLITS,
    molecule_graph,
    read_table,
    to_molecule,
)
from mapkg.data.zinc_benchmark import benchmark_splits
from mapkg.files import sha256

__all__ = [
    "ATOM_TYPES",
    "BOND_TYPES",
    "BUNDLED",
    "DESCRIPTIONS",
    "Description",
    "Graphs",
    "NodeSplit",
    "Splits",
    "load",
    "load_table",
    "molecule_graph",
    "read_table",
    "to_molecule",
]

BUNDLED = Path(__file__).parents[2] / "data"
"""The data that the repository carries.

:meta hide-value:
"""

_TABLES = {
    "moses": (
        "molecules/moses12k.csv.gz",
        "589e7f254db55d55b73731ccc83a1d3adef4ff1c1ecc4d57036db47fa39e822f",
    ),
    "zinc": (
        "zinc/zinc12k.csv.gz",
        "44ee1e02a573506d37c667523b5829d22e320a8f5bdacc9066921de6f72bd870",
    ),
}

_MOLECULES = dict(
    task="graph regression",
    target="penalised logP, standardised over ZINC-250k",
    num_node_types=len(ATOM_TYPES),
    num_edge_types=len(BOND_TYPES) + 1,
)

DESCRIPTIONS = {
    "moses": Description(
        name="moses",
        title="MOSES sample",
        source="12,000 molecules drawn from the MOSES benchmark set (ZINC Clean Leads), as "
        "carried by the PyPI package molsets 0.3.1; data/molecules/make_moses12k.py",
        licence="MIT (MOSES); molecules from the ZINC database, free to use",
        deviations=("Not a data set of the paper: the bundled stand-in for ZINC.",),
        **_MOLECULES,
    ),
    "zinc": Description(
        name="zinc",
        title="ZINC-12k, substituted training split",
        source="ZINC-250k SMILES, split of the JT-VAE repository, 12k indices of benchmarking-gnns",
        licence="ZINC database, free to use",
        deviations=(
            "Validation and test are the benchmark's own molecules. The training split is a "
            "substitute: 10,000 molecules drawn from the rest of the benchmark's validation "
            "file, because its training file was not available.",
        ),
        **_MOLECULES,
    ),
}
_ZINC_BENCHMARK = Description(
    name="zinc",
    title="ZINC-12k",
    source="torch_geometric.datasets.ZINC(subset=True)",
    licence="ZINC database, free to use",
    deviations=(
        "The benchmark carries no SMILES: they are written from the atom and bond ids, without "
        "stereochemistry.",
    ),
    **_MOLECULES,
)


def load(name: str, root: Path | str | None = None, *, download: bool = True) -> Splits:
    """A data set by name.

    Args:
        name: ``"moses"`` (bundled) or ``"zinc"``.
        root: the only folder to look in; None means ``MAPKG_DATA``, then the user's cache
            folder, then the bundled data.
        download: whether to fetch a data set that is not there and can be fetched.

    Returns:
        Lists of PyG ``Data`` in ``train``, ``val`` and ``test``, and a ``description``. Each
        graph has ``x`` [N] and ``edge_attr`` [E] type ids, ``edge_index`` [2, E], ``y``
        [1, 1] and ``smiles``.

    Raises:
        ValueError: if the name is unknown, or a file's checksum or content is wrong.
        FileNotFoundError: if the data set is nowhere; the message says what would help.
    """
    if name not in _TABLES:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(sorted(_TABLES))}")
    relative_path, digest = _TABLES[name]
    roots = _roots(root)
    for folder in roots:
        path = folder / relative_path
        if path.is_file():
            return _load_checked(path, digest, DESCRIPTIONS[name])
    if name == "zinc":
        splits = benchmark_splits(roots, download=download)
        if splits is not None:
            return Splits(*splits, description=_ZINC_BENCHMARK)
    raise FileNotFoundError(_absent(name, roots, download))


def load_table(path: Path | str, description: Description | None = None) -> Splits:
    """The graphs of any SMILES table with the columns ``split,smiles,y``.

    Args:
        path: a CSV file, compressed or not.
        description: what the table holds; a plain one is made when it is None.

    Raises:
        ValueError: if a row is bad; the message names the line.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no SMILES table at {path}: expected a CSV file")
    table = read_table(path)
    graphs = cached_graphs(path, table)
    by_split = {split: [] for split in SPLITS}
    for split, graph in zip(table["split"], graphs, strict=True):
        by_split[split].append(graph)
    if description is None:
        description = Description(
            name=path.name, title=path.name, source=str(path), licence="not stated", **_MOLECULES
        )
    return Splits(**by_split, description=description)


def _load_checked(path: Path, expected: str, description: Description) -> Splits:
    found = sha256(path)
    if found != expected:
        raise ValueError(
            f"{path}: expected sha256 {expected}, found {found}. The file is damaged or another "
            "one: restore it, or read a table of your own with mapkg.data.load_table(path)"
        )
    return load_table(path, description)


def _roots(root: Path | str | None) -> list[Path]:
    if root is not None:
        return [Path(root).expanduser()]
    named = os.environ.get("MAPKG_DATA")
    return [
        *([Path(named).expanduser()] if named else []),
        platformdirs.user_cache_path("mapkg"),
        BUNDLED,
    ]


def _absent(name: str, roots: list[Path], download: bool) -> str:
    relative_path, _ = _TABLES[name]
    places = ", ".join(str(folder / relative_path) for folder in roots)
    if name == "moses":
        return (
            f"data set 'moses' not found; looked for {places}. It comes with the repository as "
            f"data/{relative_path}: work in a clone, or point root or MAPKG_DATA at its data folder"
        )
    tried = "the download failed" if download else "download=False"
    return (
        f"data set 'zinc' not found; looked for {places}, and {tried}. Either put the SMILES "
        f"table there or set MAPKG_DATA to the folder that holds {relative_path}; or, with a "
        "network, run: python -c \"import mapkg.data; mapkg.data.load('zinc')\"; or use the "
        "bundled data set 'moses'"
    )
