"""SMILES tables with the columns ``split,smiles,y``, as MOSES and ZINC, and the ZINC benchmark."""

import collections
import io
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import rdkit
import torch
from rdkit import Chem
from torch_geometric.data import Data
from torch_geometric.datasets import ZINC

from studies.data import molecules, sets
from studies.data.molecules import (
    ATOM_TYPES,
    BOND_TYPES,
    is_kekulized_otherwise,
    molecule_graph,
    to_molecule,
)
from studies.data.sets import SPLITS, Description, Splits

_MOLECULES = partial(
    Description,
    task="graph regression",
    target="penalised logP, standardised over ZINC-250k",
    num_node_types=len(ATOM_TYPES),
    num_edge_types=len(BOND_TYPES) + 1,
    edge_types=BOND_TYPES,
)
_MARKED = ATOM_TYPES.index("C H1")
_MOSES_LICENCE = "MIT (MOSES); molecules from the ZINC database, free to use"
_ZINC_SOURCE = "ZINC-250k SMILES, split of the JT-VAE repository, 12k indices of benchmarking-gnns"

# Counted with 20 random orders of the atoms of each molecule.
_ORDER = (
    "The targets of {} of 12,000 molecules, whose rings are bridged or peri-fused, depend on the "
    "order of the atoms in the SMILES; they are kept as they were computed."
)

FILES = {
    "moses": "molecules/moses12k.csv.gz",
    "moses-triple": "molecules/moses_triple12k.csv.gz",
    "zinc": "zinc/zinc12k_official.csv.gz",
    "zinc-substitute": "zinc/zinc12k.csv.gz",
}
"""The table of each data set, under a data root."""

DESCRIPTIONS = {
    "moses": _MOLECULES(
        name="moses",
        title="MOSES sample",
        source="12,000 molecules drawn from the MOSES benchmark set (ZINC Clean Leads), as "
        "carried by the PyPI package molsets 0.3.1; data/molecules/make_moses.py",
        licence=_MOSES_LICENCE,
        deviations=(
            "Not a data set of the paper: the bundled stand-in for ZINC.",
            _ORDER.format(32),
        ),
    ),
    "moses-triple": _MOLECULES(
        name="moses-triple",
        title="MOSES sample, triple bonds only",
        source="12,000 molecules with a triple bond, drawn from the MOSES benchmark set as those "
        "of 'moses'; a molecule may be in both",
        licence=_MOSES_LICENCE,
        deviations=(
            "Not a data set of the paper: to see triple bonds some 15 times as often.",
            _ORDER.format(16),
        ),
    ),
    "zinc": _MOLECULES(
        name="zinc",
        title="ZINC-12k",
        source=_ZINC_SOURCE,
        licence="ZINC database, free to use",
        deviations=(_ORDER.format(69),),
    ),
    "zinc-substitute": _MOLECULES(
        name="zinc-substitute",
        title="ZINC-12k, substituted training split",
        source=_ZINC_SOURCE,
        licence="ZINC database, free to use",
        deviations=(
            "Validation and test are the benchmark's own molecules. The training split is a "
            "substitute: 10,000 molecules drawn from the rest of the benchmark's validation "
            "file, because its training file was not available.",
            "Targets have other constants than the benchmark's, off by 0.009 on average.",
        ),
    ),
}


def load_named(name: str, roots: Sequence[Path], *, download: bool) -> Splits | None:
    """A published table, or None if no root has it; only ``"zinc"`` can be downloaded."""
    root = sets.root_with(roots, [FILES[name]], None)
    if root is not None:
        return load_table(root / FILES[name], DESCRIPTIONS[name])
    return load_benchmark(roots, download=download) if name == "zinc" else None


def load_table(path: Path | str, description: Description | None = None) -> Splits:
    """The graphs of any SMILES table with the columns ``split,smiles,y``, a CSV file.

    Without a description a plain one is made. Raises ValueError with the line of a bad row.
    """
    path = Path(path)
    table = sets.read_rows(path, ("split", "smiles", "y"))
    y = pd.to_numeric(table["y"], errors="coerce").astype(float)
    in_range = y.abs() <= torch.finfo(torch.float).max  # False for NaN as well
    sets.check_values(path, table["y"], in_range, "a finite number in single precision")
    known = table["split"].isin(SPLITS)
    sets.check_values(path, table["split"], known, f"one of {', '.join(SPLITS)}")
    read = partial(sets.graphs_of_rows, table.assign(y=y), path, molecule_graph)
    graphs = sets.cached_graphs([path], molecules.__file__, read)
    by_split = {split: [] for split in SPLITS}
    for split, graph in zip(table["split"], graphs, strict=True):
        by_split[split].append(graph)
    if description is None:
        description = _MOLECULES(
            name=path.name, title=path.name, source=str(path), licence="not stated"
        )
    return Splits(**by_split, description=description)


def read_smiles(path: Path | str) -> list[Data]:
    """The graphs of a file with one SMILES per line, what follows a blank or tab left out.

    Blank lines are passed over. Raises ValueError with the line of a molecule that cannot be read.
    """
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
    """Warn of molecules whose atom types are not as in the data that a network was trained on.

    Stereo marks and explicit hydrogens make types: ``[C@H]`` is ``C H1``, the same atom without its
    mark is ``C``. ``title`` is that of the training data.
    """
    seen = torch.cat([graph.x for graph in training]).unique()
    new = [graph.x[~torch.isin(graph.x, seen)].tolist() for graph in graphs]
    if concerned := sum(map(bool, new)):
        names = ", ".join(ATOM_TYPES[i] for i in sorted({i for ids in new for i in ids}))
        warnings.warn(
            f"{concerned} of {len(graphs)} molecules have atom types that no training molecule of "
            f"{title} has: {names}; their embeddings were never trained",
            stacklevel=2,
        )
    if _MARKED in seen:
        read = map(Chem.MolFromSmiles, (graph.smiles for graph in graphs))
        centers = (Chem.FindMolChiralCenters(molecule, includeUnassigned=True) for molecule in read)
        if concerned := sum(any(mark == "?" for _, mark in found) for found in centers):
            warnings.warn(
                f"{concerned} of {len(graphs)} molecules have a stereocenter without a mark; its "
                f"atom would have another type with one, as in {title}",
                stacklevel=2,
            )


# The benchmark as PyG fetches it, for those who have no table of its SMILES.

_RAW = {s: (f"ZINC/raw/{s}.pickle", f"ZINC/raw/{s}.index") for s in SPLITS}
ZINC_SIZES = {
    "train": (10_000, 231_664, 498_558),
    "val": (1_000, 23_083, 49_692),
    "test": (1_000, 23_117, 49_720),
}
"""Molecules, atoms and directed edges, since the files have no published checksum."""

_ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): lambda content: torch.load(
        io.BytesIO(content), weights_only=True
    ),
}


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles lists and dicts of tensors and nothing else, so that no code can run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"refused to load {module}.{name}: the benchmark's files hold tensors only"
            )
        return _ALLOWED[module, name]


def load_benchmark(roots: Sequence[Path], *, download: bool) -> Splits | None:
    """The benchmark from PyG's raw files, or None if ``ZINC/raw`` cannot be had."""
    files = [file for both in _RAW.values() for file in both]
    root = sets.root_with(roots, files, _fetch if download else None)
    if root is None:
        return None
    splits = {}
    for split, both in _RAW.items():
        raw = [root / file for file in both]
        splits[split] = sets.cached_graphs(
            raw,
            __file__,
            lambda s=split, r=raw: _benchmark_graphs(s, r[0], *map(Path.read_bytes, r)),
        )
    otherwise = sum(map(is_kekulized_otherwise, splits["test"]))
    choice = (
        f"in {otherwise} of {len(splits['test']):,} test molecules other bonds of the rings are "
        f"double than RDKit {rdkit.__version__} chooses"
    )
    if otherwise:
        warnings.warn(
            f"{root / 'ZINC/raw'}: {choice}; a network that is trained on these graphs has not "
            "seen such bonds as molecules read from SMILES have",
            stacklevel=2,
        )
    about = replace(
        DESCRIPTIONS["zinc"],
        deviations=(
            *DESCRIPTIONS["zinc"].deviations,
            "Read from PyG's files, which carry no SMILES: they are written from the atom and "
            f"bond ids, without stereochemistry; {choice}.",
        ),
    )
    return Splits(**splits, description=about)


def _benchmark_graphs(split: str, name: Path | str, molecules: bytes, chosen: bytes) -> list[Data]:
    try:
        known = _TensorUnpickler(io.BytesIO(molecules)).load()
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
    data = Data(
        x=torch.as_tensor(molecule["atom_type"]).long().flatten(),
        edge_index=edge_index,
        edge_attr=types,
        edge_type=types,
        y=torch.as_tensor(molecule["logP_SA_cycle_normalized"]).float().reshape(1, 1),
    )
    data.smiles = Chem.MolToSmiles(to_molecule(data))
    return data


def _fetch() -> dict[str, bytes]:
    archive = {raw: f"molecules/{split}.pickle" for split, (raw, _) in _RAW.items()}
    contents = sets.unzipped(sets.read_url(ZINC.url), archive)
    for split, (raw, index) in _RAW.items():
        contents[index] = sets.read_url(ZINC.split_url.format(split))
        _benchmark_graphs(split, f"{raw}, as fetched", contents[raw], contents[index])
    return contents
