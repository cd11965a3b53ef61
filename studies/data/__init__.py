"""Data sets by name: ``load("moses")`` gives graphs in three splits, with a description.

A data set is looked for under the root given as argument, else under ``MAPKG_DATA``, the
user's cache folder and the bundled data, in this order. Checksums are checked before a file
is read, and processed graphs are cached.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import platformdirs

from studies.data.bond_properties import edge_labels
from studies.data.description import Description, Splits
from studies.data.molecules import ATOM_TYPES, BOND_TYPES, molecule_graph, to_molecule
from studies.data.networks import NETWORKS, NodesOfGraph, planetoid_folder
from studies.data.proteins import PROTEINS_FOLDER, load_proteins
from studies.data.smiles_tables import (
    DESCRIPTIONS,
    MOSES_FILE,
    MOSES_TRIPLE_FILE,
    ZINC_FILE,
    load_bundled,
    load_table,
    load_zinc,
    read_smiles,
    read_table,
)
from studies.data.tox21 import TOX21_FILE, load_tox21
from studies.data.trees import TREES, Trees
from studies.extras.neighbours import check_fan_outs
from studies.extras.ogbn_proteins import FOLDER as OGBN_PROTEINS_FOLDER
from studies.extras.ogbn_proteins import load_ogbn_proteins

__all__ = [
    "ATOM_TYPES",
    "BOND_TYPES",
    "BUNDLED",
    "DESCRIPTIONS",
    "Description",
    "NodesOfGraph",
    "Splits",
    "Trees",
    "check_fan_outs",
    "edge_labels",
    "load",
    "load_table",
    "molecule_graph",
    "read_smiles",
    "read_table",
    "to_molecule",
]

BUNDLED = Path(__file__).parents[2] / "data"
"""The data that the repository carries.

:meta hide-value:
"""


_FROM_REPOSITORY = (
    ". It comes with the repository as data/{place}: work in a clone, or point root or MAPKG_DATA "
    "at its data folder"
)
_FROM_NETWORK = (
    ", and {tried}. Either put it there or set MAPKG_DATA to the folder that holds {place}; or, "
    "with a network, run: python -c \"import studies.data; studies.data.load('{name}')\"; or use "
    "the bundled data set 'moses'"
)


@dataclass(frozen=True)
class _Known:
    """A data set that ``load`` knows.

    Attributes:
        read: gives it, or None if it is not to be had.
        place: its file or folder under a root.
        advice: how the error goes on if it is in none of the places.
    """

    read: Callable[..., Splits | None]
    place: str
    advice: str = _FROM_NETWORK


_KNOWN = {
    "moses": _Known(partial(load_bundled, "moses"), MOSES_FILE, _FROM_REPOSITORY),
    "moses-triple": _Known(
        partial(load_bundled, "moses-triple"), MOSES_TRIPLE_FILE, _FROM_REPOSITORY
    ),
    "zinc": _Known(load_zinc, ZINC_FILE),
    "tox21": _Known(load_tox21, TOX21_FILE),
    "tox21-random": _Known(partial(load_tox21, split="random"), TOX21_FILE),
    "proteins": _Known(load_proteins, PROTEINS_FOLDER),
    "ogbn-proteins": _Known(
        lambda roots, *, download: load_ogbn_proteins(roots),
        OGBN_PROTEINS_FOLDER,
        ". It is not fetched here: unpack proteins.zip of Open Graph Benchmark as {place} in the "
        "folder that MAPKG_DATA names",
    ),
    "citation": _Known(NETWORKS["citation"], "nothing"),
    **{name: _Known(read, "nothing") for name, read in TREES.items()},
    **{
        name: _Known(NETWORKS[name], planetoid_folder(name))
        for name in ("cora", "citeseer", "pubmed")
    },
    "pubmed-missing": _Known(
        NETWORKS["pubmed-missing"],
        planetoid_folder("pubmed-missing"),
        ". It is not fetched here: it is the raw files of PubMed with features of zero outside the "
        "training nodes",
    ),
}


def load(name: str, root: Path | str | None = None, *, download: bool = True) -> Splits:
    """A data set by name.

    Args:
        name: ``"moses"``, ``"moses-triple"`` (both bundled), ``"zinc"``, ``"tox21"``
            (scaffold split), ``"tox21-random"`` (random split), ``"proteins"`` (whole graphs),
            ``"ogbn-proteins"`` (nodes of one large graph); and the citation networks
            ``"citation"`` (synthetic, needs no file), ``"cora"``, ``"citeseer"``, ``"pubmed"`` and
            ``"pubmed-missing"``; and Tree-NeighborsMatch of depth 2 to 8, ``"trees-2"`` to
            ``"trees-8"`` (generated, need no file).
        root: the only folder to look in; None means ``MAPKG_DATA``, then the user's cache
            folder, then the bundled data.
        download: whether to fetch a data set that is not there and can be fetched.

    Returns:
        Lists of PyG ``Data`` in ``train``, ``val`` and ``test``, and a ``description``. Each
        graph has node type ids ``x`` and edge type ids ``edge_attr`` ([N] and [E], or one
        column for each kind of id), ``edge_index`` [2, E], the ids ``edge_type`` [E] that the
        description names, and targets ``y`` [1, targets], NaN where unknown; molecules have
        ``smiles``. The splits of ``"ogbn-proteins"`` are ``NodeSplit`` instead, those of citation
        networks ``NodesOfGraph``: nodes of one ``graph`` with features ``x`` [N, words]. Those of
        trees are ``Trees``, whose graphs have key and value of every node in ``x`` [N, 2].

    Raises:
        ValueError: if the name is unknown, or a file's checksum or content is wrong.
        FileNotFoundError: if the data set is nowhere; the message says what would help.
    """
    if name not in _KNOWN:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(sorted(_KNOWN))}")
    roots = _roots(root)
    splits = _KNOWN[name].read(roots, download=download)
    if splits is None:
        raise FileNotFoundError(_absent(name, roots, download))
    return splits


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
    known = _KNOWN[name]
    looked = ", ".join(str(folder / known.place) for folder in roots)
    tried = "the download failed" if download else "download=False"
    advice = known.advice.format(name=name, place=known.place, tried=tried)
    return f"data set {name!r} not found; looked for {looked}{advice}"
