"""SMILES tables with the columns ``split,smiles,y``; MOSES and ZINC are two of them."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from torch_geometric.data import Data
from tqdm import tqdm

from studies.data import molecules
from studies.data.description import Description, Splits
from studies.data.graph_cache import cached_graphs
from studies.data.molecules import ATOM_TYPES, BOND_TYPES, molecule_graph
from studies.data.raw_files import check, read_rows, root_with
from studies.data.splitting import SPLITS
from studies.data.zinc_benchmark import benchmark_splits
from studies.files import sha256

COLUMNS = ("split", "smiles", "y")
MOSES_FILE = "molecules/moses12k.csv.gz"
MOSES_TRIPLE_FILE = "molecules/moses_triple12k.csv.gz"
ZINC_FILE = "zinc/zinc12k.csv.gz"

_BUNDLED = {
    "moses": (MOSES_FILE, "589e7f254db55d55b73731ccc83a1d3adef4ff1c1ecc4d57036db47fa39e822f"),
    "moses-triple": (
        MOSES_TRIPLE_FILE,
        "002a41935cd2e01a000def56b00d03f7f405a0e66e17efe00c8c32ea052fdb06",
    ),
}
_ZINC_SHA256 = "44ee1e02a573506d37c667523b5829d22e320a8f5bdacc9066921de6f72bd870"

_MOSES_LICENCE = "MIT (MOSES); molecules from the ZINC database, free to use"
_MOLECULES = dict(
    task="graph regression",
    target="penalised logP, standardised over ZINC-250k",
    num_node_types=len(ATOM_TYPES),
    num_edge_types=len(BOND_TYPES) + 1,
    edge_types=BOND_TYPES,
)

DESCRIPTIONS = {
    "moses": Description(
        name="moses",
        title="MOSES sample",
        source="12,000 molecules drawn from the MOSES benchmark set (ZINC Clean Leads), as "
        "carried by the PyPI package molsets 0.3.1; data/molecules/make_moses.py",
        licence=_MOSES_LICENCE,
        deviations=("Not a data set of the paper: the bundled stand-in for ZINC.",),
        **_MOLECULES,
    ),
    "moses-triple": Description(
        name="moses-triple",
        title="MOSES sample, triple bonds only",
        source="12,000 molecules with a triple bond, drawn from the MOSES benchmark set as those "
        "of 'moses'; a molecule may be in both",
        licence=_MOSES_LICENCE,
        deviations=("Not a data set of the paper: to see triple bonds some 15 times as often.",),
        **_MOLECULES,
    ),
    "zinc": Description(
        name="zinc",
        title="ZINC-12k, substituted training split",
        source="ZINC-250k SMILES, split of the JT-VAE repository, 12k indices of benchmarking-gnns",
        licence="ZINC database, free to use",
        deviations=(
            "Validation and test are the benchmark's own molecules. The training split is a "
            "substitute: 10,000 molecules drawn from the rest of the benchmark's validation "
            "file, because its training file was not available.",
        ),
        **_MOLECULES,
    ),
}
_ZINC_BENCHMARK = Description(
    name="zinc",
    title="ZINC-12k",
    source="torch_geometric.datasets.ZINC(subset=True)",
    licence="ZINC database, free to use",
    deviations=(
        "The benchmark carries no SMILES: they are written from the atom and bond ids, without "
        "stereochemistry.",
    ),
    **_MOLECULES,
)


def load_bundled(name: str, roots: Sequence[Path], *, download: bool) -> Splits | None:
    """A bundled sample, ``"moses"`` or ``"moses-triple"``, or None if no root has it.

    It cannot be downloaded.
    """
    file, digest = _BUNDLED[name]
    root = root_with(roots, [file])
    return None if root is None else _load_checked(root / file, digest, DESCRIPTIONS[name])


def load_zinc(roots: Sequence[Path], *, download: bool) -> Splits | None:
    """ZINC as a SMILES table if a root has it, else as PyG's benchmark files, else None.

    Args:
        roots: folders to look in.
        download: whether to fetch the benchmark if no root has either.
    """
    root = root_with(roots, [ZINC_FILE])
    if root is not None:
        return _load_checked(root / ZINC_FILE, _ZINC_SHA256, DESCRIPTIONS["zinc"])
    splits = benchmark_splits(roots, download=download)
    return None if splits is None else Splits(*splits, description=_ZINC_BENCHMARK)


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
    graphs = cached_graphs(
        [sha256(path)], molecules.__file__, lambda: table_graphs(table, str(path))
    )
    by_split = {split: [] for split in SPLITS}
    for split, graph in zip(table["split"], graphs, strict=True):
        by_split[split].append(graph)
    if description is None:
        description = Description(
            name=path.name, title=path.name, source=str(path), licence="not stated", **_MOLECULES
        )
    return Splits(**by_split, description=description)


def read_smiles(path: Path | str) -> list[Data]:
    """The graphs of a file with one SMILES per line, without targets.

    Args:
        path: a text file, compressed (``.gz``) or not; empty lines are passed over.

    Raises:
        ValueError: if a molecule cannot be read; the message names the line.
        FileNotFoundError: if there is no such file.
    """
    table = pd.read_csv(path, header=None, names=["smiles"], skip_blank_lines=True, sep="\t")
    return table_graphs(table.set_axis(table.index + 1).assign(y=None), str(path))


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
    table = read_rows(path, str(path), COLUMNS)
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


def _load_checked(path: Path, digest: str, description: Description) -> Splits:
    check(path.read_bytes(), digest, str(path), "studies.data.load_table(path)")
    return load_table(path, description)
