"""Molecules as graphs with atom and bond type ids, and their penalized logP.

A graph has one node per heavy atom and two directed edges per bond, no self-loops; molecules
are kekulized, so bonds are single, double or triple. The 28 atom types are those of the ZINC
benchmark: element, explicit hydrogens after kekulizing, and charge.

Hydrogens are explicit as the SMILES is written, which is how the benchmark has them: a stereo mark
as in ``[C@H]`` makes the type ``C H1``, and the same molecule without its mark has ``C``. Only
where that gives no known type, and the atom has no charge, are they left out: ``[CH3]`` is ``C``.
"""

import importlib.util
from functools import cache
from pathlib import Path

import networkx
import torch
from jaxtyping import Int
from rdkit import Chem, RDConfig
from rdkit.Chem import Crippen
from torch import Tensor
from torch_geometric.data import Data

ATOM_TYPES = (
    *("C", "O", "N", "F", "C H1", "S", "Cl", "O -", "N H1 +", "Br", "N H3 +", "N H2 +", "N +"),
    *("N -", "S -", "I", "P", "O H1 +", "N H1 -", "O +", "S +", "P H1", "P H2", "C H2 -"),
    *("P +", "S H1 +", "C H1 -", "P H1 +"),
)
"""Atom types by id, in the benchmark's order, as element, explicit hydrogens and charge."""

BOND_TYPES = {1: "single", 2: "double", 3: "triple"}
"""Bond types by id. Id 0 means "no bond" and never occurs on an edge."""

_ATOM_ID = {name: i for i, name in enumerate(ATOM_TYPES)}
_BOND_ORDER = {Chem.BondType.SINGLE: 1, Chem.BondType.DOUBLE: 2, Chem.BondType.TRIPLE: 3}


def molecule_graph(smiles: str, y: float | None = None) -> Data:
    """The graph of a molecule, with the target ``y`` [1, 1] if it is given.

    ``x`` are atom type ids [N] in the order of the SMILES; the two directions of a bond are next
    to each other in ``edge_index`` [2, E]; ``edge_attr`` and ``edge_type`` are bond type ids [E].
    Raises ValueError if RDKit cannot read the SMILES, or for an atom or bond without a type.
    """
    molecule = _read(smiles)
    Chem.Kekulize(molecule, clearAromaticFlags=True)
    atoms = [_atom_id(atom, smiles) for atom in molecule.GetAtoms()]
    pairs, bonds = [], []
    for bond in molecule.GetBonds():
        if bond.GetBondType() not in _BOND_ORDER:
            raise ValueError(
                f"bond {bond.GetIdx()} of {smiles!r} has the type {bond.GetBondType()}; "
                "expected single, double or triple"
            )
        begin, end = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        pairs += [(begin, end), (end, begin)]
        bonds += [_BOND_ORDER[bond.GetBondType()]] * 2
    bond_types = torch.tensor(bonds, dtype=torch.long)
    data = Data(
        x=torch.tensor(atoms, dtype=torch.long),
        edge_index=torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).t().contiguous(),
        edge_attr=bond_types,
        edge_type=bond_types,
        smiles=smiles,
    )
    if y is not None:
        data.y = torch.tensor([[y]], dtype=torch.float)
    return data


def _read(smiles: str) -> Chem.Mol:
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or molecule.GetNumAtoms() == 0:
        raise ValueError(f"unreadable SMILES {smiles!r}: RDKit finds no molecule in it")
    return molecule


def _atom_id(atom: Chem.Atom, smiles: str) -> int:
    place = f"atom {atom.GetIdx()} of {smiles!r}"
    if atom.GetNumRadicalElectrons():
        raise ValueError(f"{place} is a radical, for which there is no type")
    hydrogens, charge = atom.GetNumExplicitHs(), atom.GetFormalCharge()
    parts = [atom.GetSymbol()]
    if hydrogens:
        parts.append(f"H{hydrogens}")
    if charge:
        sign = "+" if charge > 0 else "-"
        parts.append(sign if abs(charge) == 1 else f"{sign}{abs(charge)}")
    name = " ".join(parts)
    if name not in _ATOM_ID and not charge and parts[0] in _ATOM_ID:
        name = parts[0]
    if name not in _ATOM_ID:
        raise ValueError(
            f"{place} has the type {name!r}, which is not one of the {len(ATOM_TYPES)} known "
            f"types: {', '.join(ATOM_TYPES)}"
        )
    return _ATOM_ID[name]


def bond_of_edge(graph: Data) -> Int[Tensor, " E"]:
    """Which bond each directed edge is of, for edges in any order.

    Edges between the same two nodes, whatever their direction, are one bond; bonds are numbered in
    the order of their first edges.
    """
    low, high = graph.edge_index.sort(dim=0).values
    pairs, pair = (low * graph.num_nodes + high).unique(return_inverse=True)
    place = torch.arange(len(pair), device=pair.device)
    first = place.new_zeros(len(pairs)).scatter_reduce(0, pair, place, "amin", include_self=False)
    return first.argsort().argsort()[pair]


def directions(graph: Data) -> Int[Tensor, "2 bonds"]:
    """The two edges of each bond, for edges in any order; bonds as ``bond_of_edge`` numbers them.

    Row 0 has each bond once. Raises ValueError if a bond has not exactly its two directions.
    """
    bond = bond_of_edge(graph)
    edges = bond.argsort(stable=True)
    ends = graph.edge_index[:, edges]
    if (bond.bincount() != 2).any() or not torch.equal(ends[:, ::2], ends[:, 1::2].flip(0)):
        raise ValueError("expected each bond as two edges, one in each direction")
    return edges.view(-1, 2).t()


def to_molecule(data: Data) -> Chem.Mol:
    """The RDKit molecule that a graph's type ids describe, without stereochemistry.

    Atoms keep their node index, and bonds are in the order of ``directions``, so that what was
    computed per node or edge can be put on a drawing. Raises ValueError if it is no molecule.
    """
    molecule = Chem.RWMol()
    for type_id in data.x.flatten().tolist():
        if type_id not in range(len(ATOM_TYPES)):
            raise ValueError(
                f"atom type id {type_id}: expected 0 to {len(ATOM_TYPES) - 1}, "
                "the ids of the known atom types"
            )
        element, *modifiers = ATOM_TYPES[type_id].split()
        atom = Chem.Atom(element)
        for modifier in modifiers:
            if modifier.startswith("H"):
                atom.SetNumExplicitHs(int(modifier[1:]))
            else:
                atom.SetFormalCharge(1 if modifier == "+" else -1)
        molecule.AddAtom(atom)
    orders = {order: bond_type for bond_type, order in _BOND_ORDER.items()}
    there, back = directions(data)
    types = data.edge_attr.flatten()
    if not torch.equal(types[there], types[back]):
        raise ValueError("the two directions of a bond have different types")
    ends = data.edge_index[:, there].t().tolist()
    for (source, target), order in zip(ends, types[there].tolist(), strict=True):
        if order not in orders:
            raise ValueError(f"bond type id {order}: expected one of {', '.join(map(str, orders))}")
        molecule.AddBond(min(source, target), max(source, target), orders[order])
    try:
        Chem.SanitizeMol(molecule)
    except ValueError as error:  # RDKit's own errors are ValueErrors
        raise ValueError(f"the type ids of the graph are not a molecule: {error}") from error
    return molecule.GetMol()


def penalized_logp(smiles: str, *, as_written: bool = False) -> float:
    """Penalized logP, the target of the ZINC benchmark, in the benchmark's own numbers.

    Crippen logP, minus the synthetic accessibility score of RDKit's Contrib folder, minus the
    number of atoms by which the largest ring exceeds six, each of them standardized. The ring is
    the largest of networkx's cycle basis, which in bridged and peri-fused molecules depends on the
    order of atoms. That is RDKit's canonical order without stereo marks, so that a molecule has one
    target, unless ``as_written``, as the benchmark computed its own.
    """
    molecule = _read(smiles)
    if not as_written:
        molecule = _read(Chem.MolToSmiles(molecule, isomericSmiles=False))
    logp, accessibility, excess = logp_terms(molecule)
    return (
        0.6976317947894198 * logp
        - 1.198167599821654 * accessibility
        - 3.4751391457451137 * excess
        + 2.1118299908846003
    )


def logp_terms(molecule: Chem.Mol, root: int | None = 0) -> tuple[float, float, int]:
    """Crippen logP, synthetic accessibility, and the largest ring's excess over six atoms.

    The cycle basis grows from an atom, the first in the benchmark; None is networkx's own choice,
    with which the bundled targets were computed.
    """
    bonds = networkx.Graph(Chem.GetAdjacencyMatrix(molecule))
    largest_ring = max(map(len, networkx.cycle_basis(bonds, root)), default=0)
    accessibility = _synthetic_accessibility().calculateScore(molecule)
    return Crippen.MolLogP(molecule), accessibility, max(0, largest_ring - 6)


@cache
def _synthetic_accessibility():
    """RDKit's Contrib SA score, a script beside the library rather than a module of it."""
    path = Path(RDConfig.RDContribDir) / "SA_Score" / "sascorer.py"
    spec = importlib.util.spec_from_file_location("sascorer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
