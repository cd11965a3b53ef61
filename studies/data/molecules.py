"""Molecules as graphs with atom and bond type ids, their penalized logP, and tables of them.

A graph has one node per heavy atom and two directed edges per bond, no self-loops; molecules are
kekulized. The 28 atom types are those of the ZINC benchmark: element, explicit hydrogens after
kekulizing, and charge. Hydrogens are explicit as the SMILES is written: a stereo mark as in
``[C@H]`` makes the type ``C H1``, and the same molecule without its mark has ``C``. Only where that
gives no known type, and the atom has no charge, are they left out: ``[CH3]`` is ``C``.
"""

import collections
import io
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import networkx
import pandas as pd
import rdkit
import torch
from jaxtyping import Int
from rdkit import Chem
from rdkit.Chem import Crippen
from rdkit.Contrib.SA_Score import sascorer
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.datasets import ZINC

from studies.data import sets
from studies.data.sets import SPLITS, Description, Source, Splits

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


def molecule_graph(smiles: str, y: float | None = None) -> Data:
    """The graph of a molecule, atoms as its SMILES has them, with a target ``y`` [1, 1] if given.

    The two directions of a bond are next to each other; ``edge_attr`` and ``edge_type`` are equal.
    """
    molecule = _read(smiles)
    Chem.Kekulize(molecule, clearAromaticFlags=True)
    atoms = [_atom_id(atom, smiles) for atom in molecule.GetAtoms()]
    pairs, bonds = [], []
    for bond in molecule.GetBonds():
        if (type_id := int(bond.GetBondType())) not in BOND_TYPES:
            raise ValueError(
                f"bond {bond.GetIdx()} of {smiles!r} has the type {bond.GetBondType()}; "
                "expected single, double or triple"
            )
        begin, end = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        pairs += [(begin, end), (end, begin)]
        bonds += [type_id] * 2
    edge_index = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).t().contiguous()
    types = torch.tensor(bonds, dtype=torch.long)
    data = Data(torch.tensor(atoms), edge_index, types, edge_type=types, smiles=smiles)
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
    """Which bond each directed edge is of, bonds numbered in the order of their first edges."""
    number: dict[frozenset[int], int] = {}
    ends = map(frozenset, graph.edge_index.t().tolist())
    bonds = [number.setdefault(pair, len(number)) for pair in ends]
    return torch.tensor(bonds, dtype=torch.long, device=graph.edge_index.device)


def directions(graph: Data) -> Int[Tensor, "2 bonds"]:
    """The two edges of each bond, for edges in any order; bonds as ``bond_of_edge`` has them."""
    bond = bond_of_edge(graph)
    edges = bond.argsort(stable=True)
    ends = graph.edge_index[:, edges]
    if (bond.bincount() != 2).any() or not torch.equal(ends[:, ::2], ends[:, 1::2].flip(0)):
        raise ValueError("expected each bond as two edges, one in each direction")
    return edges.view(-1, 2).t()


def to_molecule(data: Data) -> Chem.Mol:
    """The RDKit molecule of a graph's type ids, its atoms in the order of nodes.

    Bonds are in the order of ``directions``; there is no stereochemistry.
    """
    molecule = Chem.RWMol()
    for type_id in data.x.flatten().tolist():
        if not 0 <= type_id < len(ATOM_TYPES):
            last = len(ATOM_TYPES) - 1
            raise ValueError(f"atom type id {type_id}: expected 0 to {last}, the known atom types")
        molecule.AddAtom(_ATOMS[type_id])
    there, back = directions(data)
    types = data.edge_attr.flatten()
    if not torch.equal(types[there], types[back]):
        raise ValueError("the two directions of a bond have different types")
    ends = data.edge_index[:, there].sort(dim=0).values.t().tolist()
    for (low, high), bond in zip(ends, types[there].tolist(), strict=True):
        if bond not in BOND_TYPES:
            raise ValueError(f"bond type id {bond}: expected one of 1, 2, 3")
        molecule.AddBond(low, high, Chem.BondType.values[bond])
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
        bond.SetBondType(Chem.BondType.values[type_id])
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
    """Penalized logP in the ZINC benchmark's own numbers: its ``logp_terms``, each standardized.

    The largest ring depends on the order of atoms in bridged and peri-fused molecules. That is
    RDKit's canonical order without stereo marks, so that a molecule has one target, unless
    ``as_written``, as the benchmark computed its own.
    """
    molecule = _read(smiles)
    if not as_written:
        molecule = _read(Chem.MolToSmiles(molecule, isomericSmiles=False))
    logp, accessibility, excess = logp_terms(molecule)
    penalty = 1.198167599821654 * accessibility + 3.4751391457451137 * excess
    return 0.6976317947894198 * logp - penalty + 2.1118299908846003


def logp_terms(molecule: Chem.Mol, root: int | None = 0) -> tuple[float, float, int]:
    """Crippen logP, synthetic accessibility, and the largest ring's excess over six atoms.

    Rings are a cycle basis, grown from the first atom in the benchmark; in the bundled targets from
    networkx's own choice, None.
    """
    bonds = networkx.Graph(Chem.GetAdjacencyMatrix(molecule))
    largest_ring = max(map(len, networkx.cycle_basis(bonds, root)), default=0)
    return Crippen.MolLogP(molecule), sascorer.calculateScore(molecule), max(0, largest_ring - 6)


# Tables of molecules.

_describe = partial(
    Description,
    **dict(task="graph regression", target="penalized logP, standardized over ZINC-250k"),
    **dict(num_node_types=len(ATOM_TYPES), num_edge_types=len(BOND_TYPES) + 1),
    edge_types=BOND_TYPES,
)
_MOSES = dict(licence="MIT (MOSES); molecules from the ZINC database, free to use")
_ZINC = dict(
    source="ZINC-250k SMILES, split of the JT-VAE repository, 12k indices of benchmarking-gnns",
    licence="ZINC database, free to use",
)

# Counted with 20 random orders of the atoms of each molecule.
_ORDER = (
    "The targets of {} of 12,000 molecules, whose rings are bridged or peri-fused, depend on the "
    "order of the atoms in the SMILES; they are kept as they were computed."
)

DESCRIPTIONS = {
    "moses": _describe(
        **dict(name="moses", title="MOSES sample", **_MOSES),
        source="12,000 molecules drawn from the MOSES benchmark set (ZINC Clean Leads), as "
        "carried by the PyPI package molsets 0.3.1; data/molecules/make_moses.py",
        deviations=(
            "Not a data set of the paper: the bundled stand-in for ZINC.",
            _ORDER.format(32),
        ),
    ),
    "moses-triple": _describe(
        **dict(name="moses-triple", title="MOSES sample, triple bonds only", **_MOSES),
        source="12,000 molecules with a triple bond, drawn from the MOSES benchmark set as those "
        "of 'moses'; a molecule may be in both",
        deviations=(
            "Not a data set of the paper: to see triple bonds some 15 times as often.",
            _ORDER.format(16),
        ),
    ),
    "zinc": _describe(**_ZINC, name="zinc", title="ZINC-12k", deviations=(_ORDER.format(69),)),
    "zinc-substitute": _describe(
        **dict(name="zinc-substitute", title="ZINC-12k, substituted training split", **_ZINC),
        deviations=(
            "Validation and test are the benchmark's own molecules. The training split is a "
            "substitute: 10,000 molecules drawn from the rest of the benchmark's validation "
            "file, because its training file was not available.",
            "Targets have other constants than the benchmark's, off by 0.009 on average.",
        ),
    ),
}


def load_table(path: Path | str, description: Description | None = None) -> Splits:
    """The graphs of any SMILES table with the columns ``split,smiles,y``, a CSV file."""
    path = Path(path)
    table = sets.read_rows(path, ("split", "smiles", "y"))
    y = pd.to_numeric(table["y"], errors="coerce").astype(float)
    in_range = y.abs() <= torch.finfo(torch.float).max  # False for NaN as well
    sets.check_values(path, table["y"], in_range, "a finite number in single precision")
    known = table["split"].isin(SPLITS)
    sets.check_values(path, table["split"], known, f"one of {', '.join(SPLITS)}")
    read = partial(sets.graphs_of_rows, table.assign(y=y), path, molecule_graph)
    graphs = sets.cached_graphs([path], __file__, read)
    by_split = {split: [] for split in SPLITS}
    for split, graph in zip(table["split"], graphs, strict=True):
        by_split[split].append(graph)
    plain = _describe(name=path.name, title=path.name, source=str(path), licence="not stated")
    return Splits(**by_split, description=description or plain)


def read_smiles(path: Path | str) -> list[Data]:
    """The graphs of a file with a SMILES at the beginning of each line that is not blank."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text with a SMILES per line: {error}") from error
    smiles = {i: line.split()[0] for i, line in enumerate(lines, start=1) if line.strip()}
    if not smiles:
        raise ValueError(f"{path}: expected a SMILES per line, found none")
    table = pd.DataFrame({"smiles": smiles, "y": None})
    return sets.graphs_of_rows(table, path, molecule_graph)


def warn_of_types(graphs: Sequence[Data], training: Sequence[Data], title: str) -> None:
    """Warn of molecules whose atom types are not as in ``training``, data of that title."""
    seen = torch.cat([graph.x for graph in training]).unique()
    new = [graph.x[~torch.isin(graph.x, seen)].tolist() for graph in graphs]
    if concerned := sum(map(bool, new)):
        names = ", ".join(ATOM_TYPES[i] for i in sorted({i for ids in new for i in ids}))
        warnings.warn(
            f"{concerned} of {len(graphs)} molecules have atom types that no training molecule of "
            f"{title} has: {names}; their embeddings were never trained",
            stacklevel=2,
        )
    if _ATOM_ID["C H1"] in seen:
        read = map(Chem.MolFromSmiles, (graph.smiles for graph in graphs))
        centers = (Chem.FindMolChiralCenters(molecule, includeUnassigned=True) for molecule in read)
        if concerned := sum(any(mark == "?" for _, mark in found) for found in centers):
            warnings.warn(
                f"{concerned} of {len(graphs)} molecules have a stereocenter without a mark; its "
                f"atom would have another type with one, as in {title}",
                stacklevel=2,
            )


# The benchmark as PyG fetches it, for those who have no table of its SMILES.

_RAW = [f"ZINC/raw/{split}.{kind}" for split in SPLITS for kind in ("pickle", "index")]
ZINC_SIZES = {
    "train": (10_000, 231_664, 498_558),
    "val": (1_000, 23_083, 49_692),
    "test": (1_000, 23_117, 49_720),
}
"""Molecules, atoms and directed edges, since the files have no published checksum."""

_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): lambda b: torch.load(io.BytesIO(b), weights_only=True),
}


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles lists and dicts of tensors and nothing else, so that no code can run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}: expected tensors only")
        return _ALLOWED[module, name]


def read_benchmark(*raw: Path) -> Splits:
    """The benchmark from PyG's raw files, which carry no SMILES."""

    def build() -> list[Data]:
        parts = zip(SPLITS, raw[::2], raw[1::2], strict=True)
        read = [(s, pickled, pickled.read_bytes(), i.read_bytes()) for s, pickled, i in parts]
        return [graph for part in read for graph in _benchmark_graphs(*part)]

    graphs = iter(sets.cached_graphs(raw, __file__, build))
    splits = {split: list(islice(graphs, size[0])) for split, size in ZINC_SIZES.items()}
    otherwise = sum(map(is_kekulized_otherwise, splits["test"]))
    choice = (
        f"in {otherwise} of {len(splits['test']):,} test molecules other bonds of the rings are "
        f"double than RDKit {rdkit.__version__} chooses"
    )
    if otherwise:
        warnings.warn(
            f"{raw[0].parent}: {choice}; a network that is trained on these graphs has not "
            "seen such bonds as molecules read from SMILES have",
            stacklevel=2,
        )
    written = "they are written from the atom and bond ids, without stereochemistry"
    deviation = f"Read from PyG's files, which carry no SMILES: {written}; {choice}."
    about = DESCRIPTIONS["zinc"]
    return Splits(**splits, description=replace(about, deviations=(*about.deviations, deviation)))


def _benchmark_graphs(split: str, name: Path | str, pickled: bytes, chosen: bytes) -> list[Data]:
    try:
        known = _TensorUnpickler(io.BytesIO(pickled)).load()
        graphs = [benchmark_graph(known[int(i)]) for i in chosen.decode().strip().split(",")]
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{name}: not the benchmark's file, or damaged: {error}") from error
    found = (len(graphs), sum(g.num_nodes for g in graphs), sum(g.num_edges for g in graphs))
    if found != ZINC_SIZES[split]:
        raise ValueError(
            f"{name}: not the benchmark's file; expected {ZINC_SIZES[split]} molecules, atoms and "
            f"edges, found {found}"
        )
    return graphs


def benchmark_graph(molecule: dict[str, Any]) -> Data:
    """The graph of a molecule as the benchmark's pickles hold it, edges sorted by their ends."""
    bonds = torch.as_tensor(molecule["bond_type"]).long()  # [N, N], 0 where no bond
    edge_index = bonds.nonzero().t().contiguous()
    types = bonds[edge_index[0], edge_index[1]]
    x = torch.as_tensor(molecule["atom_type"]).long().flatten()
    y = torch.as_tensor(molecule["logP_SA_cycle_normalized"]).float().reshape(1, 1)
    data = Data(x, edge_index, types, y, edge_type=types)
    data.smiles = Chem.MolToSmiles(to_molecule(data))
    return data


def _fetch() -> dict[str, bytes]:
    pickled, indices = _RAW[::2], _RAW[1::2]
    members = {raw: f"molecules/{Path(raw).name}" for raw in pickled}
    contents = sets.unzipped(sets.read_url(ZINC.url), members)
    for split, raw, index in zip(SPLITS, pickled, indices, strict=True):
        contents[index] = sets.read_url(ZINC.split_url.format(split))
        _benchmark_graphs(split, f"{raw}, as fetched", contents[raw], contents[index])
    return contents


def _table(name: str, file: str) -> Source:
    return Source([file], partial(load_table, description=DESCRIPTIONS[name]))


SOURCES = {
    "moses": [_table("moses", "molecules/moses12k.csv.gz")],
    "moses-triple": [_table("moses-triple", "molecules/moses_triple12k.csv.gz")],
    "zinc": [_table("zinc", "zinc/zinc12k_official.csv.gz"), Source(_RAW, read_benchmark, _fetch)],
    "zinc-substitute": [_table("zinc-substitute", "zinc/zinc12k.csv.gz")],
}
"""Where each data set is from, what is preferred first."""
