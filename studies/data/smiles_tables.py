"""SMILES tables with the columns ``split,smiles,y``; MOSES and ZINC are two of them."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
from torch_geometric.data import Data
from tqdm import tqdm

from studies.data import molecules, zinc_benchmark
from studies.data.description import Description, Splits
from studies.data.graph_cache import cached_graphs
from studies.data.molecules import ATOM_TYPES, BOND_TYPES, molecule_graph
from studies.data.raw_files import read_rows, root_with
from studies.data.splitting import SPLITS

_MOLECULES = partial(
    Description,
    task="graph regression",
    target="penalised logP, standardised over ZINC-250k",
    num_node_types=len(ATOM_TYPES),
    num_edge_types=len(BOND_TYPES) + 1,
    edge_types=BOND_TYPES,
)
_MOSES_LICENCE = "MIT (MOSES); molecules from the ZINC database, free to use"
_ZINC_SOURCE = "ZINC-250k SMILES, split of the JT-VAE repository, 12k indices of benchmarking-gnns"

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
        deviations=("Not a data set of the paper: the bundled stand-in for ZINC.",),
    ),
    "moses-triple": _MOLECULES(
        name="moses-triple",
        title="MOSES sample, triple bonds only",
        source="12,000 molecules with a triple bond, drawn from the MOSES benchmark set as those "
        "of 'moses'; a molecule may be in both",
        licence=_MOSES_LICENCE,
        deviations=("Not a data set of the paper: to see triple bonds some 15 times as often.",),
    ),
    "zinc": _MOLECULES(
        name="zinc",
        title="ZINC-12k",
        source=_ZINC_SOURCE,
        licence="ZINC database, free to use",
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
    root = root_with(roots, [FILES[name]], None)
    if root is not None:
        return load_table(root / FILES[name], DESCRIPTIONS[name])
    if name != "zinc":
        return None
    splits = zinc_benchmark.load(roots, download=download)
    about = replace(DESCRIPTIONS["zinc"], deviations=zinc_benchmark.DEVIATIONS)
    return None if splits is None else Splits(**splits, description=about)


def load_table(path: Path | str, description: Description | None = None) -> Splits:
    """The graphs of any SMILES table with the columns ``split,smiles,y``.

    Args:
        path: a CSV file, compressed or not.
        description: what the table holds; a plain one is made when it is None.

    Raises:
        ValueError: if a row is bad; the message names the line.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no SMILES table at {path}: expected a CSV file")
    table = read_table(path)
    graphs = cached_graphs([path], molecules.__file__, lambda: _graphs(table, path))
    by_split = {split: [] for split in SPLITS}
    for split, graph in zip(table["split"], graphs, strict=True):
        by_split[split].append(graph)
    if description is None:
        description = _MOLECULES(
            name=path.name, title=path.name, source=str(path), licence="not stated"
        )
    return Splits(**by_split, description=description)


def read_smiles(path: Path | str) -> list[Data]:
    """The graphs of a file with one SMILES per line, without targets.

    Empty lines are passed over. Raises ValueError with the line of a molecule that cannot be read.
    """
    table = pd.read_csv(path, header=None, names=["smiles"], skip_blank_lines=True, sep="\t")
    return _graphs(table.set_axis(table.index + 1).assign(y=None), path)


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
    table = read_rows(Path(path), ("split", "smiles", "y"))
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


def _graphs(table: pd.DataFrame, path: Path | str) -> list[Data]:
    graphs = []
    rows = zip(table.index, table["smiles"], table["y"], strict=True)
    for line, smiles, y in tqdm(
        rows, "reading molecules", total=len(table), delay=1, file=sys.stderr
    ):
        try:
            graphs.append(molecule_graph(smiles, y))
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
    return graphs
