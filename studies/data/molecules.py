"""Molecules as graphs with atom and bond type ids, and their penalized logP.

A graph has one node per heavy atom and two directed edges per bond, no self-loops; molecules
are kekulized, so bonds are single, double or triple. The 28 atom types are those of the ZINC
benchmark: element, explicit hydrogens after kekulizing, and charge.

Hydrogens are explicit as the SMILES is written, which is how the benchmark has them: a stereo mark
as in ``[C@H]`` makes the type ``C H1``, and the same molecule without its mark has ``C``. Only
where that gives no known type, and the atom has no charge, are they left out: ``[CH3]`` is ``C``.
"""

import networkx
import torch
from jaxtyping import Int
from rdkit import Chem
from rdkit.Chem import Crippen
from rdkit.Contrib.SA_Score import sascorer
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
_ATOMS = [Chem.AtomFromSmiles(f"[{name.replace(' ', '')}]") for name in ATOM_TYPES]
for _atom in _ATOMS:
    _atom.SetNoImplicit(False)  # hydrogens beside the explicit ones follow from the valence
_BONDS = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE}
_BOND_ID = {bond: i for i, bond in _BONDS.items()}


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
        if bond.GetBondType() not in _BOND_ID:
            raise ValueError(
                f"bond {bond.GetIdx()} of {smiles!r} has the type {bond.GetBondType()}; "
                "expected single, double or triple"
            )
        begin, end = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        pairs += [(begin, end), (end, begin)]
        bonds += [_BOND_ID[bond.GetBondType()]] * 2
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
    molecule = Chem.MolFromSmiles(smiles) if isinstance(smiles, str) else None
    if molecule is None or molecule.GetNumAtoms() == 0:
        raise ValueError(f"unreadable SMILES {smiles!r}: RDKit finds no molecule in it")
    return molecule


def _atom_id(atom: Chem.Atom, smiles: str) -> int:
    place = f"atom {atom.GetIdx()} of {smiles!r}"
    if atom.GetNumRadicalElectrons():
        raise ValueError(f"{place} is a radical, for which there is no type")
    element, hydrogens, charge = atom.GetSymbol(), atom.GetNumExplicitHs(), atom.GetFormalCharge()
    name = element + f" H{hydrogens}" * bool(hydrogens)
    if charge:
        name += f" {charge:+d}".removesuffix("1")
    elif name not in _ATOM_ID and element in _ATOM_ID:
        name = element
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
        molecule.AddAtom(_ATOMS[type_id])
    there, back = directions(data)
    types = data.edge_attr.flatten()
    if not torch.equal(types[there], types[back]):
        raise ValueError("the two directions of a bond have different types")
    ends = data.edge_index[:, there].sort(dim=0).values.t().tolist()
    for (low, high), bond in zip(ends, types[there].tolist(), strict=True):
        if bond not in _BONDS:
            raise ValueError(f"bond type id {bond}: expected one of {', '.join(map(str, _BONDS))}")
        molecule.AddBond(low, high, _BONDS[bond])
    try:
        Chem.SanitizeMol(molecule)
    except ValueError as error:  # RDKit's own errors are ValueErrors
        raise ValueError(f"the type ids of the graph are not a molecule: {error}") from error
    return molecule.GetMol()


def is_kekulized_otherwise(graph: Data) -> bool:
    """Whether the RDKit at work would make other bonds of the rings double, symmetry apart."""
    molecule = to_molecule(graph)
    Chem.Kekulize(molecule, clearAromaticFlags=True)
    chosen = Chem.MolToSmiles(molecule)
    types = graph.edge_attr.flatten()[directions(graph)[0]].tolist()
    for bond, type_id in zip(molecule.GetBonds(), types, strict=True):
        bond.SetBondType(_BONDS[type_id])
    return Chem.MolToSmiles(molecule) != chosen


def kekule_forms(molecule: Chem.Mol) -> int:
    """How many ways there are to place the double bonds; those alike by symmetry count once."""
    forms = set()
    for form in Chem.ResonanceMolSupplier(molecule, Chem.KEKULE_ALL):
        for part in (*form.GetAtoms(), *form.GetBonds()):
            part.SetIsAromatic(False)
        forms.add(Chem.MolToSmiles(form))
    return len(forms)


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
    return Crippen.MolLogP(molecule), sascorer.calculateScore(molecule), max(0, largest_ring - 6)
