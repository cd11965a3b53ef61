"""What can be said of a bond besides its type: its atoms, its ring, its conjugation."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from rdkit import Chem
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils.smiles import x_map

from studies.data.molecules import ATOM_TYPES, to_molecule
from studies.data.sets import Description

OTHER = "other"
"""What pairs of elements that are too rare for a name of their own are called."""

RINGS = ("in no ring", "in a ring of 5", "in a ring of 6", "in a ring of another size")
"""By the smallest ring that a bond is part of."""

GLOBAL = ("atom to global", "global to atom")
"""Edges to and from a node that is joined to all atoms."""

CONJUGATION = ("not conjugated", "conjugated")
"""As RDKit finds it; aromatic bonds and those next to a double bond are."""

_OF_COLUMNS = tuple(map(len, x_map.values()))  # atoms as PyG's from_smiles describes them

Labels = tuple[list[Int[Tensor, " E"]], tuple[str, ...]]
"""A label per edge of each graph, and what the labels 0, 1, ... are called."""


def edge_labels(
    graphs: Sequence[Data], by: str, description: Description, *, rare: float = 0.01
) -> Labels:
    """Which kind of edge each directed edge of the graphs of one data set is.

    ``by`` is ``"type"``, the edge types that the description names; ``"role"``, the same, but edges
    of a global node are apart from bonds that share their type; ``"atom pair"``, the two elements
    in either order, the most frequent first, and ``OTHER`` for those with a share below ``rare``;
    ``"ring"``, the smallest ring the bond is part of; or ``"conjugation"``. The last two need
    ``smiles``. A name may have no edge.
    """
    if by not in PROPERTIES:
        raise ValueError(f"by: expected one of {', '.join(PROPERTIES)}, got {by!r}")
    if by == "atom pair":
        return _by_atom_pair(graphs, description, rare)
    return PROPERTIES[by](graphs, description)


def _by_type(graphs: Sequence[Data], description: Description) -> Labels:
    ids = sorted(description.edge_types)
    largest = [int(graph.edge_type.max()) for graph in graphs if graph.num_edges]
    label = torch.full((max([0, *ids, *largest]) + 1,), -1)
    label[ids] = torch.arange(len(ids))
    labels = [label[graph.edge_type] for graph in graphs]
    for graph, found in zip(graphs, labels, strict=True):
        if (found < 0).any():
            raise ValueError(
                f"an edge has the type {int(graph.edge_type[found < 0][0])}, but "
                f"{description.title} names only {', '.join(map(str, ids))}; pass the description "
                "of the splits that the graphs are from"
            )
    return labels, tuple(description.edge_types[i] for i in ids)


def _by_role(graphs: Sequence[Data], description: Description) -> Labels:
    of_types, types = _by_type(graphs, description)
    if description.num_node_types != len(ATOM_TYPES) + 1:  # no global node
        return of_types, types
    bonds = [name.split(" / ")[0] for name in types]  # of a shared id the bond comes first
    names = tuple(dict.fromkeys((*bonds, *GLOBAL)))
    of_bond = torch.tensor([names.index(bond) for bond in bonds])
    labels = []
    for graph, of_type in zip(graphs, of_types, strict=True):
        from_global, to_global = graph.x.flatten()[graph.edge_index] == len(ATOM_TYPES)
        label = of_bond[of_type]
        label[to_global], label[from_global] = map(names.index, GLOBAL)
        labels.append(label)
    return labels, names


def _by_atom_pair(graphs: Sequence[Data], description: Description, rare: float) -> Labels:
    pairs = []
    for graph in graphs:
        symbols = _elements(graph, description)
        # Carbon first, else in the order of the alphabet.
        both = [[symbols[j], symbols[i]] for j, i in graph.edge_index.t().tolist()]
        pairs.append(["–".join(sorted(pair, key=lambda s: (s != "C", s))) for pair in both])
    counts = Counter(pair for of_graph in pairs for pair in of_graph)
    frequent = sorted(
        (pair for pair, count in counts.items() if count >= rare * counts.total()),
        key=lambda pair: (-counts[pair], pair),
    )
    names = tuple(frequent) if len(frequent) == len(counts) else (*frequent, OTHER)
    label = {pair: i for i, pair in enumerate(frequent)}
    labels = [[label.get(pair, len(frequent)) for pair in of_graph] for of_graph in pairs]
    return [torch.tensor(of_graph, dtype=torch.long) for of_graph in labels], names


def _by_ring(graphs: Sequence[Data], description: Description) -> Labels:
    def ring(bond: Chem.Bond) -> int:
        size = bond.GetOwningMol().GetRingInfo().MinBondRingSize(bond.GetIdx())
        return {0: 0, 5: 1, 6: 2}.get(size, 3)

    return _of_bonds(graphs, description, ring), RINGS


def _by_conjugation(graphs: Sequence[Data], description: Description) -> Labels:
    return _of_bonds(graphs, description, Chem.Bond.GetIsConjugated), CONJUGATION


PROPERTIES = {
    "type": _by_type,
    "role": _by_role,
    "atom pair": _by_atom_pair,
    "ring": _by_ring,
    "conjugation": _by_conjugation,
}
"""What edges can be told apart by."""


def _of_bonds(
    graphs: Sequence[Data], description: Description, label: Callable[[Chem.Bond], int]
) -> list[Int[Tensor, " E"]]:
    labels = []
    for graph in graphs:
        molecule = _molecule(graph, description)
        bonds = (molecule.GetBondBetweenAtoms(j, i) for j, i in graph.edge_index.t().tolist())
        labels.append(torch.tensor([int(label(bond)) for bond in bonds], dtype=torch.long))
    return labels


def _elements(graph: Data, description: Description) -> list[str]:
    """The element of each node."""
    if description.num_node_types == _OF_COLUMNS:
        table = Chem.GetPeriodicTable()
        return [table.GetElementSymbol(number) for number in graph.x[:, 0].tolist()]
    if description.num_node_types == len(ATOM_TYPES):
        return [ATOM_TYPES[i].split()[0] for i in graph.x.flatten().tolist()]
    raise ValueError(
        f"expected nodes that are atoms, of {len(ATOM_TYPES)} types or with PyG's columns, but "
        f"{description.title} has node types of the sizes {description.num_node_types}; only "
        "'type' tells its edges apart"
    )


def _molecule(graph: Data, description: Description) -> Chem.Mol:
    """The molecule of a graph, atoms in the order of the nodes."""
    symbols = _elements(graph, description)
    if "smiles" not in graph:
        raise ValueError(
            f"a graph of {description.title} has no SMILES, of which rings and conjugation are "
            "read; set graph.smiles, its atoms in the order of the nodes"
        )
    molecule = Chem.MolFromSmiles(graph.smiles)
    if molecule is not None and symbols == [atom.GetSymbol() for atom in molecule.GetAtoms()]:
        bonds = {(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in molecule.GetBonds()}
        both = bonds | {(end, begin) for begin, end in bonds}
        if set(map(tuple, graph.edge_index.t().tolist())) == both:
            return molecule
    # The SMILES of PyG's ZINC are written from the ids, with the atoms in an order of their own.
    if description.num_node_types == len(ATOM_TYPES):
        molecule = to_molecule(graph)
        if Chem.MolToSmiles(molecule) == graph.smiles:
            return molecule
    raise ValueError(
        f"the nodes and edges of a graph are not the atoms and bonds of its SMILES "
        f"{graph.smiles!r} in their order; set graph.smiles to that of the molecule"
    )
