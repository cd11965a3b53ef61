"""Molecules: SMILES tables and graphs with atom and bond type ids.

A table has the columns ``split,smiles,y``. A graph has one node per heavy atom and two
directed edges per bond, no self-loops; molecules are kekulised, so bonds are single, double
or triple. The 28 atom types are those of the ZINC benchmark: element, explicit hydrogens
after kekulising, and charge.
"""

import gzip
import math
import sys
import zlib
from functools import cache
from pathlib import Path

import networkx
import pandas as pd
import torch
from rdkit import Chem, RDConfig
from rdkit.Chem import Crippen
from torch_geometric.data import Data
from tqdm import tqdm

SPLITS = ("train", "val", "test")
COLUMNS = ("split", "smiles", "y")

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

# Standardisation of the three terms of penalised logP over ZINC-250k, as in the benchmark.
_TERM_MEAN = (2.4570953396190123, -3.0525811293166134, -0.0485696876403053)
_TERM_STD = (1.434324401111988, 0.8335207024513095, 0.2860212110245455)


def read_table(path: Path | str) -> pd.DataFrame:
    """Read and check a SMILES table.

    Args:
        path: a CSV file, compressed or not, with the columns ``split,smiles,y``.

    Returns:
        The table, ``split`` in train/val/test and ``y`` float. Its index is the line number
        in the file (the header is line 1).

    Raises:
        ValueError: if a column is missing, the table is empty, a split name is unknown, or a
            target is not a finite number; the message names the line.
    """
    path = Path(path)
    try:
        # Blank lines are dropped below, so that the others keep their line numbers.
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False)
    except pd.errors.EmptyDataError:
        table = pd.DataFrame(columns=list(COLUMNS))
    except (
        *(UnicodeDecodeError, pd.errors.ParserError),
        *(gzip.BadGzipFile, zlib.error, EOFError),  # damaged or cut gzip
    ) as error:
        raise ValueError(f"{path}: expected a CSV table, could not read it: {error}") from error
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise ValueError(
            f"{path}: missing column {', '.join(missing)}; expected {', '.join(COLUMNS)}, "
            f"found {', '.join(map(str, table.columns))}"
        )
    table.index = pd.RangeIndex(2, len(table) + 2, name="line")
    table = table[(table != "").any(axis="columns")]
    if table.empty:
        raise ValueError(f"{path}: the table has no rows; expected at least one molecule")
    unknown = table.loc[~table["split"].isin(SPLITS), "split"]
    if not unknown.empty:
        raise ValueError(
            f"{path}, line {unknown.index[0]}: unknown split {unknown.iloc[0]!r}; "
            f"expected one of {', '.join(SPLITS)}"
        )
    target = pd.to_numeric(table["y"], errors="coerce")
    bad = table.loc[~target.map(math.isfinite), "y"]
    if not bad.empty:
        raise ValueError(
            f"{path}, line {bad.index[0]}: the target y must be a finite number, "
            f"got {bad.iloc[0]!r}"
        )
    return table.assign(y=target.astype(float))  # not int where all are whole numbers


def table_graphs(table: pd.DataFrame, source: str) -> list[Data]:
    """The graphs of a table, in its order.

    Args:
        table: as ``read_table`` returns it.
        source: what to call the table in errors, for example its path.

    Raises:
        ValueError: if a molecule cannot be read; the message names the line.
    """
    graphs = []
    rows = zip(table.index, table["smiles"], table["y"], strict=True)
    for line, smiles, y in tqdm(
        rows, "reading molecules", total=len(table), delay=1, file=sys.stderr
    ):
        try:
            graphs.append(molecule_graph(smiles, y))
        except ValueError as error:
            raise ValueError(f"{source}, line {line}: {error}") from error
    return graphs


def molecule_graph(smiles: str, y: float | None = None) -> Data:
    """The graph of a molecule.

    Args:
        smiles: the molecule, kept as ``data.smiles``; atoms are in its order.
        y: target.

    Returns:
        ``x`` atom type ids [N], ``edge_index`` [2, E] with both directions of a bond next to
        each other, ``edge_attr`` bond type ids [E], and ``y`` [1, 1] if it was given.

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
    data = Data(
        x=torch.tensor(atoms, dtype=torch.long),
        edge_index=torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).t().contiguous(),
        edge_attr=torch.tensor(bonds, dtype=torch.long),
        smiles=smiles,
    )
    if y is not None:
        data.y = torch.tensor([[y]], dtype=torch.float)
    return data


def to_molecule(data: Data) -> Chem.Mol:
    """The RDKit molecule that a graph's type ids describe, for drawing.

    Atoms keep their node index, so that what was computed per node or edge can be put on the
    picture. Stereochemistry is not in the graph and is not restored.

    Args:
        data: a graph with atom type ids ``x`` and bond type ids ``edge_attr``.

    Raises:
        ValueError: if the ids do not describe a molecule.
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
    """Penalised logP, the ZINC benchmark's target.

    The sum of three standardised terms: Crippen logP, minus the synthetic accessibility score
    of RDKit's Contrib folder, and minus the number of atoms by which the largest ring exceeds
    six. Mean and standard deviation are those of ZINC-250k.

    Args:
        smiles: a readable SMILES string.

    Raises:
        ValueError: if RDKit cannot read it.
    """
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        raise ValueError(f"unreadable SMILES {smiles!r}: RDKit finds no molecule in it")
    # The benchmark takes the rings of networkx's cycle basis, which in bridged molecules are
    # larger than the smallest rings that RDKit reports.
    bonds = networkx.Graph(Chem.GetAdjacencyMatrix(molecule))
    largest_ring = max(map(len, networkx.cycle_basis(bonds)), default=0)
    terms = (
        Crippen.MolLogP(molecule),
        -_synthetic_accessibility().calculateScore(molecule),
        -max(0, largest_ring - 6),
    )
    return sum(
        (term - mean) / std for term, mean, std in zip(terms, _TERM_MEAN, _TERM_STD, strict=True)
    )


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
