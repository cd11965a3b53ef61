"""TOX21: which of twelve toxicity assays a molecule is active in, as MoleculeNet gives it.

Atoms and bonds have the columns of ids that PyG makes of a molecule (OGB's). Nothing is
kekulised, so a bond may be aromatic. Not every molecule was tested in every assay.
"""

import hashlib
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pandas as pd
import platformdirs
import torch
from rdkit import Chem
from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles
from rdkit.rdBase import BlockLogs
from torch_geometric.data import Data
from torch_geometric.datasets import MoleculeNet
from torch_geometric.utils import from_rdmol
from torch_geometric.utils.smiles import e_map, x_map
from tqdm import tqdm

from studies.data.description import Description, Splits
from studies.data.graph_cache import cached_graphs
from studies.data.raw_files import check, decompressed, fetch, read_rows
from studies.data.splitting import random_split, scaffold_split
from studies.files import write_atomically

TOX21_FILE = "tox21/raw/tox21.csv"
"""The raw file under a data root, where PyG's MoleculeNet has it; it may end in ``.gz`` too."""

TASKS = (
    *("NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma"),
    *("SR-ARE", "SR-ATAD5", "SR-HSE", "SR-MMP", "SR-p53"),
)
"""The assays, in the order of the columns of ``y``."""

SEED = 0
"""Of the random split."""

_SHA256 = "b1346d5bc675c97c555b372e5845dc7de3b5d04734c290189a4accd77dbd1b43"
_OWN = "studies.data.tox21.read_tox21(path)"

_BOND_NAMES = [name.lower() for name in e_map["bond_type"]]


def load_tox21(roots: Sequence[Path], *, download: bool, split: str = "scaffold") -> Splits | None:
    """TOX21 from the first root that has it, or None if it cannot be had.

    Args:
        roots: folders that may hold ``tox21/raw/tox21.csv`` or ``tox21.csv.gz``.
        download: whether to fetch it to the user's cache folder if none does.
        split: ``"scaffold"`` or ``"random"``.

    Raises:
        ValueError: if the content of the file is not the published one.
    """
    candidates = (root / f"{TOX21_FILE}{ending}" for root in roots for ending in ("", ".gz"))
    path = next((path for path in candidates if path.is_file()), None)
    if path is None and download:
        path = _fetch()
    if path is None:
        return None
    check(_content(path), _SHA256, str(path), _OWN)
    return read_tox21(path, split)


def read_tox21(path: Path | str, split: str = "scaffold") -> Splits:
    """The graphs of any table with the columns of TOX21, in three splits.

    Args:
        path: a CSV file with the twelve tasks (0, 1 or empty) and ``smiles``.
        split: ``"scaffold"``, in which no Murcko scaffold is in two splits, or ``"random"``.

    Returns:
        Graphs with atom ids ``x`` [N, 9], ``edge_index`` [2, E], bond ids ``edge_attr`` [E, 3],
        its first column ``edge_type`` [E], labels ``y`` [1, 12] that are 0, 1 or NaN, ``smiles``
        and ``scaffold``. Molecules that RDKit cannot read and molecules without a bond are
        dropped; the description counts them.

    Raises:
        ValueError: if a column is missing or empty, a label is not 0 or 1, no molecule can be
            used, or a task has no label in the training split.
    """
    if split not in ("scaffold", "random"):
        raise ValueError(f"unknown split {split!r} of TOX21; expected scaffold or random")
    path = Path(path)
    content = _content(path)
    table = read_labels(content, str(path))
    graphs = cached_graphs(
        [hashlib.sha256(content).hexdigest()], __file__, lambda: table_graphs(table, str(path))
    )
    kept, dropped = usable(graphs)
    if not kept:
        raise ValueError(f"{path}: expected molecules with bonds, found none ({dropped})")
    if split == "scaffold":
        indices = scaffold_split([graph.scaffold for graph in kept])
    else:
        indices = random_split(len(kept), seed=SEED)
    by_split = {name: [kept[i] for i in chosen] for name, chosen in indices.items()}
    _check_labelled(by_split["train"], f"{path}, training part of the {split} split")
    return Splits(**by_split, description=_describe(split, kept, dropped))


def read_labels(content: bytes, source: str) -> pd.DataFrame:
    """Read and check a table of SMILES and labels.

    Args:
        content: a CSV file.
        source: what to call it in errors.

    Returns:
        The twelve tasks, 0, 1 or NaN, and ``smiles``. The index is the line number in the file.

    Raises:
        ValueError: if a column is missing, a label is not 0, 1 or empty, or a task has no
            label at all.
    """
    rows = read_rows(BytesIO(content), source, [*TASKS, "smiles"])
    text = rows[list(TASKS)]
    labels = text.apply(pd.to_numeric, errors="coerce").astype(float)
    bad = (text != "") & ~labels.isin([0, 1])
    if bad.any(axis=None):
        line, task = bad.stack().idxmax()
        raise ValueError(
            f"{source}, line {line}: the label of {task} must be 0, 1 or empty, "
            f"got {text.loc[line, task]!r}"
        )
    unlabelled = labels.columns[labels.isna().all()]
    if len(unlabelled):
        raise ValueError(f"{source}: labels all missing for the task {', '.join(unlabelled)}")
    return labels.assign(smiles=rows["smiles"])


def table_graphs(table: pd.DataFrame, source: str) -> list[Data]:
    """One graph for each row of a table; a molecule that RDKit cannot read has no atoms.

    Args:
        table: as ``read_labels`` returns it.
        source: what to call the table in errors, for example its path.

    Raises:
        ValueError: if an atom or bond has no id; the message names the line.
    """
    graphs = []
    labels = torch.tensor(table[list(TASKS)].to_numpy(), dtype=torch.float)
    rows = zip(table.index, table["smiles"], labels.unsqueeze(1), strict=True)
    # A context, as from_smiles, PyG's own function, silences RDKit for good.
    with BlockLogs():
        for line, smiles, y in tqdm(
            rows, "reading molecules", total=len(table), delay=1, file=sys.stderr
        ):
            molecule = Chem.MolFromSmiles(smiles) or Chem.Mol()
            try:
                graph = from_rdmol(molecule)
            except ValueError as error:
                raise ValueError(
                    f"{source}, line {line}: {smiles!r} has an atom or bond that is not in PyG's "
                    f"vocabulary: {error}"
                ) from error
            graph.edge_type = graph.edge_attr[:, 0]
            graph.y = y
            graph.smiles = smiles
            graph.scaffold = MurckoScaffoldSmiles(mol=molecule, includeChirality=False)
            graphs.append(graph)
    return graphs


def usable(graphs: Sequence[Data]) -> tuple[list[Data], dict[str, int]]:
    """The graphs with an edge, and how many of the others there are of each kind.

    Args:
        graphs: as ``table_graphs`` returns them.

    Returns:
        The graphs that attention has something to do on, and the counts ``unreadable``
        (no atoms) and ``without_bond``.
    """
    kept = [graph for graph in graphs if graph.num_edges]
    unreadable = sum(graph.num_nodes == 0 for graph in graphs)
    without_bond = len(graphs) - len(kept) - unreadable
    return kept, {"unreadable": unreadable, "without_bond": without_bond}


def _check_labelled(train: list[Data], source: str) -> None:
    # The empty start is for a training split without molecules.
    labels = torch.cat([torch.empty(0, len(TASKS)), *(graph.y for graph in train)])
    labelled = labels.isfinite().any(dim=0)
    unlabelled = [task for task, has_label in zip(TASKS, labelled, strict=True) if not has_label]
    if unlabelled:
        raise ValueError(
            f"{source}: labels all missing for the task {', '.join(unlabelled)}; nothing can be "
            "learnt of it, so use more molecules or another split"
        )


def _describe(split: str, kept: list[Data], dropped: dict[str, int]) -> Description:
    bonds = torch.cat([graph.edge_type for graph in kept]).unique().tolist()
    total = len(kept) + sum(dropped.values())
    how = {
        "scaffold": "The scaffold split is computed here, of the molecules that are left, from "
        "Murcko scaffolds without chirality: it is not OGB's file of indices.",
        "random": f"The random split has the seed {SEED}; the published one has none.",
    }
    return Description(
        name={"scaffold": "tox21", "random": "tox21-random"}[split],
        title=f"TOX21, {split} split",
        task="graph classification",
        target="activity in twelve assays",
        num_node_types=tuple(map(len, x_map.values())),
        num_edge_types=tuple(map(len, e_map.values())),
        num_targets=len(TASKS),
        target_names=TASKS,
        edge_types={bond: _BOND_NAMES[bond] for bond in bonds},
        source="MoleculeNet (Wu et al., 2018), from the Tox21 Data Challenge 2014",
        licence="not stated by MoleculeNet; data of the Tox21 programme of the US government",
        deviations=(
            f"Dropped of {total:,} molecules: {dropped['unreadable']} that RDKit cannot read and "
            f"{dropped['without_bond']} without a bond.",
            how[split],
            "One TOX21 for all models: the published code has one with 74 and 12 features and a "
            "random split for GT, and OGB's for the others, without molecules of at most five "
            "atoms.",
        ),
    )


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    return decompressed(content, str(path)) if path.suffix == ".gz" else content


def _fetch() -> Path | None:
    """Downloads the raw file to the user's cache folder; its path, or None without a network."""
    url = MoleculeNet.url.format(MoleculeNet.names["tox21"][1])
    fetched = fetch(url)
    if fetched is None:
        return None
    content = decompressed(fetched, url)
    check(content, _SHA256, url, _OWN)
    path = platformdirs.user_cache_path("mapkg") / TOX21_FILE
    write_atomically(path, content)
    return path
