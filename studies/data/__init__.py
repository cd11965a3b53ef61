"""Data sets by name: ``load("moses")`` gives graphs in three splits, with a description.

A data set is looked for under the root given as argument, else under ``MAPKG_DATA``, the
user's cache folder and the bundled data, in this order. Checksums are checked before a file
is read, and processed graphs are cached.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import platformdirs

from studies.data.description import SPLITS, Description, Splits
from studies.data.graph_classification import (
    PROTEINS_FOLDER,
    TOX21_FILE,
    load_proteins,
    load_tox21,
)
from studies.data.molecules import (
    ATOM_TYPES,
    BOND_TYPES,
    bond_of_edge,
    directions,
    molecule_graph,
    to_molecule,
)
from studies.data.networks import (
    NodesOfGraph,
    load_citation_like,
    load_planetoid,
    planetoid_folder,
)
from studies.data.smiles_tables import DESCRIPTIONS, FILES, load_named, load_table, read_smiles
from studies.data.trees import Trees, load_trees

__all__ = [
    "ATOM_TYPES",
    "BOND_TYPES",
    "BUNDLED",
    "DESCRIPTIONS",
    "KINDS",
    "SPLITS",
    "Description",
    "NodesOfGraph",
    "Splits",
    "Trees",
    "bond_of_edge",
    "directions",
    "expect_kind",
    "load",
    "load_table",
    "molecule_graph",
    "read_smiles",
    "to_molecule",
]

BUNDLED = Path(__file__).parents[2] / "data"
"""The data that the repository carries."""

_PLANETOID = ("cora", "citeseer", "pubmed", "pubmed-missing")

# What reads each data set that has files, and where they are under a root; it gives the splits, or
# None if they are not to be had.
_FROM_FILES = {
    **{name: (partial(load_named, name), place) for name, place in FILES.items()},
    "tox21": (load_tox21, TOX21_FILE),
    "tox21-random": (partial(load_tox21, split="random"), TOX21_FILE),
    "proteins": (load_proteins, PROTEINS_FOLDER),
    **{name: (partial(load_planetoid, name), planetoid_folder(name)) for name in _PLANETOID},
}
_DRAWN = {
    "citation": load_citation_like,
    **{f"trees-{depth}": partial(load_trees, depth) for depth in range(2, 6)},
}

KINDS = {
    "molecules": (*FILES, "tox21", "tox21-random"),
    "graphs": ("proteins",),
    "nodes": ("citation", *_PLANETOID),
    "trees": tuple(name for name in _DRAWN if name.startswith("trees")),
}
"""What data sets hold, with the names of the sets; ``"graphs"`` are other graphs than molecules,
``"nodes"`` those of one graph, ``"trees"`` those of Tree-NeighborsMatch."""

_BUNDLED_ADVICE = (
    ". It comes with the repository as data/{place}: work in a clone, or point root or MAPKG_DATA "
    "at its data folder"
)
_ADVICE = {
    "moses": _BUNDLED_ADVICE,
    "moses-triple": _BUNDLED_ADVICE,
    "zinc-substitute": ". It is not fetched here: tracked results of ZINC were made with it, and "
    "new ones are better made with 'zinc'",
    "pubmed-missing": ". It is not fetched here: it is the raw files of PubMed with features of "
    "zero outside the training nodes",
}
_FROM_NETWORK = (
    ", and {tried}. Either put it there or set MAPKG_DATA to the folder that holds {place}; or, "
    "with a network, run: python -m studies data {name}; or use the bundled data set 'moses'"
)


def expect_kind(name: str, kinds: Sequence[str], what: str) -> None:
    """Raise if a data set is of another kind, before it is read; ``load`` knows its name or not."""
    held = [kind for kind, names in KINDS.items() if name in names]
    if held and held[0] not in kinds:
        names = ", ".join(name for kind in kinds for name in KINDS[kind])
        raise ValueError(
            f"{what}: expected a data set of {' or '.join(kinds)} ({names}), got {name!r}, one of "
            f"{held[0]}"
        )


def load(name: str, root: Path | str | None = None, *, download: bool = True) -> Splits:
    """A data set by name.

    Args:
        name: ``"moses"``, ``"moses-triple"`` (both bundled), ``"zinc"`` (the benchmark's own),
            ``"zinc-substitute"`` (another training split, which tracked results were made with),
            ``"tox21"`` (scaffold split), ``"tox21-random"``, ``"proteins"``; the citation networks
            ``"citation"`` (synthetic), ``"cora"``, ``"citeseer"``, ``"pubmed"`` and
            ``"pubmed-missing"``; Tree-NeighborsMatch, ``"trees-2"`` to ``"trees-5"`` by depth.
        root: the only folder to look in; None means ``MAPKG_DATA``, then the user's cache
            folder, then the bundled data.
        download: whether to fetch a data set that is not there and can be fetched.

    Returns:
        Lists of PyG ``Data`` in ``train``, ``val`` and ``test``, and a ``description``. Each
        graph has node type ids ``x`` and edge type ids ``edge_attr`` ([N] and [E], or one
        column for each kind of id), ``edge_index`` [2, E], the ids ``edge_type`` [E] that the
        description names, and targets ``y`` [1, targets], NaN where unknown; molecules have
        ``smiles``. The splits of citation networks are ``NodesOfGraph`` instead, those of trees
        are ``Trees``.

    Raises:
        ValueError: if the name is unknown, or a file's checksum or content is wrong.
        FileNotFoundError: if the data set is nowhere; the message says what would help.
    """
    if name in _DRAWN:
        return _DRAWN[name]()
    if name not in _FROM_FILES:
        known = ", ".join(sorted({**_DRAWN, **_FROM_FILES}))
        raise ValueError(f"unknown data set {name!r}; known: {known}")
    named = os.environ.get("MAPKG_DATA")
    if root is None and named and not Path(named).expanduser().is_dir():
        raise FileNotFoundError(f"MAPKG_DATA is {named}, which is no folder; correct or unset it")
    roots = [Path(named)] if named else []
    roots += [platformdirs.user_cache_path("mapkg"), BUNDLED]
    roots = [folder.expanduser() for folder in (roots if root is None else [Path(root)])]
    read, place = _FROM_FILES[name]
    splits = read(roots, download=download)
    if splits is None:
        looked = ", ".join(str(folder / place) for folder in roots)
        tried = "the download failed" if download else "download=False"
        advice = _ADVICE.get(name, _FROM_NETWORK).format(name=name, place=place, tried=tried)
        raise FileNotFoundError(f"data set {name!r} not found; looked for {looked}{advice}")
    return splits
