"""Molecules as graphs with atom and bond type ids, and their penalised logP.

A graph has one node per heavy atom and two directed edges per bond, no self-loops; molecules
are kekulised, so bonds are single, double or triple. The 28 atom types are those of the ZINC
benchmark: element, explicit hydrogens after kekulising, and charge.
"""

from functools import cache
from pathlib import Path

import networkx
import torch
from rdkit import Chem, RDConfig
from rdkit.Chem import Crippen
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
_BOND_ORDER = {
    Chem.BondType.SINGLE: 1,
    Chem.BondType.DOUBLE: 2,
    Chem.BondType.TRIPLE: 3,
}


def molecule_graph(smiles: str, y: float | None = None) -> Data:
    """The graph of a molecule.

    Returns:
        ``x`` atom type ids [N] in the order of the SMILES, ``edge_index`` [2, E] with both
        directions of a bond next to each other, ``edge_attr`` and ``edge_type`` bond type ids [E]
        (the same tensor), ``smiles``, and ``y`` [1, 1] if it was given.

    Raises:
        ValueError: if RDKit cannot read the SMILES, or an atom or bond is not in the
            vocabulary.
    """
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or molecule.GetNumAtoms() == 0:
        raise ValueError(f"unreadable SMILES {smiles!r}: RDKit finds no molecule in it")
    Chem.Kekulize(molecule, clearAromaticFlags=True)
    atoms = []
    for atom in molecule.GetAtoms():
        name = _atom_name(atom)
        if name not in _ATOM_ID:
            raise ValueError(
                f"atom {atom.GetIdx()} of {smiles!r} has the type {name!r}, which is not one of "
                f"the {len(ATOM_TYPES)} known types: {', '.join(ATOM_TYPES)}"
            )
        atoms.append(_ATOM_ID[name])
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


def to_molecule(data: Data) -> Chem.Mol:
    """The RDKit molecule that a graph's type ids describe, for drawing.

    Atoms keep their node index, so that what was computed per node or edge can be put on the
    picture. Stereochemistry is not in the graph and is not restored. Raises ValueError if the
    ids do not describe a molecule.
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
    edges = zip(data.edge_index.t().tolist(), data.edge_attr.flatten().tolist(), strict=True)
    for (source, target), order in edges:
        if order not in orders:
            raise ValueError(f"bond type id {order}: expected one of {', '.join(map(str, orders))}")
        if source < target:
            molecule.AddBond(source, target, orders[order])
    try:
        Chem.SanitizeMol(molecule)
    except ValueError as error:  # RDKit's own errors are ValueErrors
        raise ValueError(f"the type ids of the graph are not a molecule: {error}") from error
    return molecule.GetMol()


def penalised_logp(smiles: str) -> float:
    """Penalised logP, the target of the ZINC benchmark, in the benchmark's own numbers.

    Crippen logP, minus the synthetic accessibility score of RDKit's Contrib folder, minus the
    number of atoms by which the largest ring exceeds six, each of them standardised. Raises
    ValueError if RDKit cannot read the SMILES.
    """
    logp, accessibility, excess = logp_terms(smiles)
    return (
        0.6976317947894198 * logp
        - 1.198167599821654 * accessibility
        - 3.4751391457451137 * excess
        + 2.1118299908846003
    )


def logp_terms(smiles: str, root: int | None = 0) -> tuple[float, float, int]:
    """Crippen logP, synthetic accessibility, and the largest ring's excess over six atoms.

    The rings are those of networkx's cycle basis from a root, the first atom in the benchmark.
    In bridged molecules they are larger than the smallest rings, which RDKit reports, and depend
    on the root. None is networkx's default, with which the bundled targets were computed.
    """
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        raise ValueError(f"unreadable SMILES {smiles!r}: RDKit finds no molecule in it")
    bonds = networkx.Graph(Chem.GetAdjacencyMatrix(molecule))
    largest_ring = max(map(len, networkx.cycle_basis(bonds, root)), default=0)
    accessibility = _synthetic_accessibility().calculateScore(molecule)
    return Crippen.MolLogP(molecule), accessibility, max(0, largest_ring - 6)


@cache
def _synthetic_accessibility():
    """RDKit's Contrib SA score, a script beside the library rather than a module of it."""
    import importlib.util

    path = Path(RDConfig.RDContribDir) / "SA_Score" / "sascorer.py"
    spec = importlib.util.spec_from_file_location("sascorer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _atom_name(atom: Chem.Atom) -> str:
    hydrogens, charge = atom.GetNumExplicitHs(), atom.GetFormalCharge()
    sign = "+" if charge > 0 else "-"
    parts = [atom.GetSymbol()]
    if hydrogens:
        parts.append(f"H{hydrogens}")
    if charge:
        parts.append(sign if abs(charge) == 1 else f"{sign}{abs(charge)}")
    return " ".join(parts)
