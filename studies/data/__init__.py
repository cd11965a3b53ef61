"""Data sets by name: ``load("moses")`` gives graphs in three splits, with a description.

A data set is looked for under the root given as argument, else under ``MAPKG_DATA``, the
user's cache folder and the bundled data, in this order.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from studies.data import graph_classification, molecules, networks
from studies.data.molecules import (
    ATOM_TYPES,
    BOND_TYPES,
    DESCRIPTIONS,
    bond_of_edge,
    directions,
    kekule_forms,
    load_table,
    molecule_graph,
    read_smiles,
    to_molecule,
)
from studies.data.networks import NodesOfGraph, Trees, load_citation_like, load_trees
from studies.data.sets import SPLITS, Description, Splits, root_with, user_cache

__all__ = ["BUNDLED", "KINDS", "SPLITS", "Description", "Splits", "expect_kind", "load"]
__all__ += ["ATOM_TYPES", "BOND_TYPES", "DESCRIPTIONS", "bond_of_edge", "directions"]
__all__ += ["kekule_forms", "load_table", "molecule_graph", "read_smiles", "to_molecule"]
__all__ += ["NodesOfGraph", "Trees"]

BUNDLED = Path(__file__).parents[2] / "data"
"""The data that the repository carries."""

_SOURCES = molecules.SOURCES | graph_classification.SOURCES
_SOURCES |= networks.SOURCES | networks.PROTEINS
_DRAWN = {
    "citation": load_citation_like,
    **{f"trees-{depth}": partial(load_trees, depth) for depth in range(2, 6)},
}

KINDS = {
    "molecules": (*molecules.SOURCES, "tox21", "tox21-random"),
    "graphs": ("proteins", *networks.PROTEINS),
    "nodes": ("citation", *networks.SOURCES),
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
    "string-ppi": ". It is not fetched here: it is a network of STRING in the layout of "
    "ogbn-proteins, whose files studies.data.networks.read_ogb_proteins reads",
    "pubmed-missing": ". It is not fetched here: it is the raw files of PubMed with features of "
    "zero outside the training nodes",
}
_FROM_NETWORK = (
    ", and {tried}. Either put it there or set MAPKG_DATA to the folder that holds {place}; or, "
    "with a network, run: python -m studies data {name}; or use the bundled data set 'moses'"
)


def expect_kind(name: str, kinds: Sequence[str], what: str) -> None:
    """Raise if a data set is unknown or of another kind, before it is read."""
    held = [kind for kind, names in KINDS.items() if name in names]
    if not held:
        raise _unknown(name)
    if held[0] not in kinds:
        names = ", ".join(name for kind in kinds for name in KINDS[kind])
        raise ValueError(
            f"{what}: expected a data set of {' or '.join(kinds)} ({names}), got {name!r}, one of "
            f"{held[0]}"
        )


def _unknown(name: str) -> ValueError:
    known = ", ".join(sorted({**_DRAWN, **_SOURCES}))
    return ValueError(f"unknown data set {name!r}; known: {known}")


def load(name: str, root: Path | str | None = None, *, download: bool = True) -> Splits:
    """A data set by name, one of ``KINDS``, fetched if it is nowhere and ``download``.

    ``root`` is the only folder to look in. Graphs have node type ids ``x`` and edge type ids
    ``edge_attr`` ([N] and [E], or a column for each kind of id), the ids ``edge_type`` [E] that
    the description names, and targets ``y`` [1, targets], of nodes [N, targets], NaN where
    unknown; edges of ``string-ppi`` have float weights, molecules ``smiles``. The splits of
    citation networks are ``NodesOfGraph``, those of trees ``Trees``.
    """
    if name in _DRAWN:
        return _DRAWN[name]()
    if name not in _SOURCES:
        raise _unknown(name)
    roots = [user_cache(), BUNDLED] if root is None else [Path(os.path.expanduser(root))]
    if root is None and (named := os.environ.get("MAPKG_DATA")):
        roots.insert(0, Path(os.path.expanduser(named)))
        if not roots[0].is_dir():
            raise FileNotFoundError(
                f"MAPKG_DATA is {named}, which is no folder; correct or unset it"
            )
    for source in _SOURCES[name]:
        if found := root_with(roots, source.files, source.fetch if download else None):
            return source.read(*(found / file for file in source.files))
    files = _SOURCES[name][0].files
    place = files[0] if len(files) == 1 else Path(files[0]).parent
    looked = ", ".join(str(folder / place) for folder in roots)
    tried = "the download failed" if download else "download=False"
    advice = _ADVICE.get(name, _FROM_NETWORK).format(name=name, place=place, tried=tried)
    raise FileNotFoundError(f"data set {name!r} not found; looked for {looked}{advice}")
