"""Data sets by name: ``load("moses")`` gives graphs in three splits, with a description.

A data set is looked for under the root given as argument, else under ``MAPKG_DATA``, the
user's cache folder and the bundled data, in this order. Checksums are checked before a file
is read, and processed graphs are cached.
"""

import os
from functools import partial
from pathlib import Path

import platformdirs

from studies.data.bond_properties import edge_labels
from studies.data.description import Description, Splits
from studies.data.molecules import ATOM_TYPES, BOND_TYPES, molecule_graph, to_molecule
from studies.data.networks import (
    NodesOfGraph,
    load_citation_like,
    load_planetoid,
    planetoid_folder,
)
from studies.data.proteins import PROTEINS_FOLDER, load_proteins
from studies.data.smiles_tables import (
    DESCRIPTIONS,
    FILES,
    load_named,
    load_table,
    read_smiles,
    read_table,
)
from studies.data.tox21 import TOX21_FILE, load_tox21
from studies.data.trees import Trees, load_trees

__all__ = [
    "ATOM_TYPES",
    "BOND_TYPES",
    "BUNDLED",
    "DESCRIPTIONS",
    "Description",
    "NodesOfGraph",
    "Splits",
    "Trees",
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

_PLANETOID = ("cora", "citeseer", "pubmed", "pubmed-missing")

# What reads each data set: gives its splits, or None if it is not to be had.
_READERS = {
    **{name: partial(load_named, name) for name in FILES},
    "tox21": load_tox21,
    "tox21-random": partial(load_tox21, split="random"),
    "proteins": load_proteins,
    **{name: partial(load_planetoid, name) for name in _PLANETOID},
    "citation": load_citation_like,
    **{f"trees-{d}": lambda roots, download, d=d: load_trees(d) for d in range(2, 6)},
}

# The file or folder under a root of each data set that needs one.
_PLACES = {
    **FILES,
    "tox21": TOX21_FILE,
    "tox21-random": TOX21_FILE,
    "proteins": PROTEINS_FOLDER,
    **{name: planetoid_folder(name) for name in _PLANETOID},
}

_ADVICE = {
    **dict.fromkeys(
        ("moses", "moses-triple"),
        ". It comes with the repository as data/{place}: work in a clone, or point root or "
        "MAPKG_DATA at its data folder",
    ),
    "zinc-substitute": ". It is not fetched here: tracked results of ZINC were made with it, and "
    "new ones are better made with 'zinc'",
    "pubmed-missing": ". It is not fetched here: it is the raw files of PubMed with features of "
    "zero outside the training nodes",
}
_FROM_NETWORK = (
    ", and {tried}. Either put it there or set MAPKG_DATA to the folder that holds {place}; or, "
    "with a network, run: python -c \"import studies.data; studies.data.load('{name}')\"; or use "
    "the bundled data set 'moses'"
)


def load(name: str, root: Path | str | None = None, *, download: bool = True) -> Splits:
    """A data set by name.

    Args:
        name: ``"moses"``, ``"moses-triple"`` (both bundled), ``"zinc"`` (the benchmark's own),
            ``"zinc-substitute"`` (another training split, which tracked results were made with),
            ``"tox21"`` (scaffold split), ``"tox21-random"`` (random split), ``"proteins"``; the
            citation networks ``"citation"`` (synthetic, needs no file), ``"cora"``,
            ``"citeseer"``, ``"pubmed"`` and ``"pubmed-missing"``; Tree-NeighborsMatch of depth 2
            to 5, ``"trees-2"`` to ``"trees-5"`` (generated, need no file).
        root: the only folder to look in; None means ``MAPKG_DATA``, then the user's cache
            folder, then the bundled data.
        download: whether to fetch a data set that is not there and can be fetched.

    Returns:
        Lists of PyG ``Data`` in ``train``, ``val`` and ``test``, and a ``description``. Each
        graph has node type ids ``x`` and edge type ids ``edge_attr`` ([N] and [E], or one
        column for each kind of id), ``edge_index`` [2, E], the ids ``edge_type`` [E] that the
        description names, and targets ``y`` [1, targets], NaN where unknown; molecules have
        ``smiles``. The splits of citation networks are ``NodesOfGraph`` instead: nodes of one
        ``graph`` with features ``x`` [N, words]. Those of trees are ``Trees``, whose graphs have
        key and value of every node in ``x`` [N, 2].

    Raises:
        ValueError: if the name is unknown, or a file's checksum or content is wrong.
        FileNotFoundError: if the data set is nowhere; the message says what would help.
    """
    if name not in _READERS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(sorted(_READERS))}")
    named = os.environ.get("MAPKG_DATA")
    roots = [Path(named)] if named else []
    roots += [platformdirs.user_cache_path("mapkg"), BUNDLED]
    roots = [folder.expanduser() for folder in (roots if root is None else [Path(root)])]
    splits = _READERS[name](roots, download=download)
    if splits is None:
        place = _PLACES[name]
        looked = ", ".join(str(folder / place) for folder in roots)
        tried = "the download failed" if download else "download=False"
        advice = _ADVICE.get(name, _FROM_NETWORK).format(name=name, place=place, tried=tried)
        raise FileNotFoundError(f"data set {name!r} not found; looked for {looked}{advice}")
    return splits
