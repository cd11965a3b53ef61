"""TOX21: which of twelve toxicity assays a molecule is active in, as MoleculeNet gives it.

Atoms and bonds have the columns of ids that PyG makes of a molecule (OGB's). Nothing is
kekulised, so a bond may be aromatic. Not every molecule was tested in every assay.
"""

import gzip
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
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
from studies.data.raw_files import read_rows, read_url, root_with
from studies.data.splitting import random_split, scaffold_split

TOX21_FILE = "tox21/raw/tox21.csv"
"""The raw file under a data root, where PyG's MoleculeNet has it."""

TASKS = (
    *("NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma"),
    *("SR-ARE", "SR-ATAD5", "SR-HSE", "SR-MMP", "SR-p53"),
)
"""The assays, in the order of the columns of ``y``."""

SEED = 0
"""Of the random split."""

_BOND_NAMES = [name.lower() for name in e_map["bond_type"]]


def load_tox21(roots: Sequence[Path], *, download: bool, split: str = "scaffold") -> Splits | None:
    """TOX21 from the first root that has it, or None if it cannot be had."""
    root = root_with(roots, [TOX21_FILE], _fetch if download else None)
    return None if root is None else read_tox21(root / TOX21_FILE, split)


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
    graphs = cached_graphs([path], __file__, lambda: _graphs(_read_labels(path), path))
    kept = [graph for graph in graphs if graph.num_edges]
    if not kept:
        raise ValueError(f"{path}: expected molecules with bonds, found none")
    if split == "scaffold":
        indices = scaffold_split([graph.scaffold for graph in kept])
    else:
        indices = random_split(len(kept), seed=SEED)
    by_split = {name: [kept[i] for i in chosen] for name, chosen in indices.items()}
    # The empty start is for a training split without molecules.
    y = torch.cat([torch.empty(0, len(TASKS)), *(graph.y for graph in by_split["train"])])
    has_label = y.isfinite().any(dim=0)
    unlabelled = [task for task, labelled in zip(TASKS, has_label, strict=True) if not labelled]
    if unlabelled:
        raise ValueError(
            f"{path}, training part of the {split} split: labels all missing for the task "
            f"{', '.join(unlabelled)}; nothing can be learnt of it, so use more molecules or "
            "another split"
        )
    return Splits(**by_split, description=_describe(split, kept, graphs))


def _read_labels(path: Path) -> pd.DataFrame:
    """The twelve tasks, 0, 1 or NaN, and ``smiles``; the index is the line number in the file."""
    rows = read_rows(path, [*TASKS, "smiles"])
    text = rows[list(TASKS)]
    labels = text.apply(pd.to_numeric, errors="coerce").astype(float)
    bad = (text != "") & ~labels.isin([0, 1])
    if bad.any(axis=None):
        line, task = bad.stack().idxmax()
        raise ValueError(
            f"{path}, line {line}: the label of {task} must be 0, 1 or empty, "
            f"got {text.loc[line, task]!r}"
        )
    return labels.assign(smiles=rows["smiles"])


def _graphs(table: pd.DataFrame, path: Path) -> list[Data]:
    """One graph for each row of a table; a molecule that RDKit cannot read has no atoms."""
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
                    f"{path}, line {line}: {smiles!r} has an atom or bond that is not in PyG's "
                    f"vocabulary: {error}"
                ) from error
            graph.edge_type = graph.edge_attr[:, 0]
            graph.y = y
            graph.smiles = smiles
            graph.scaffold = MurckoScaffoldSmiles(mol=molecule, includeChirality=False)
            graphs.append(graph)
    return graphs


def _describe(split: str, kept: list[Data], graphs: list[Data]) -> Description:
    bonds = torch.cat([graph.edge_type for graph in kept]).unique().tolist()
    unreadable = sum(graph.num_nodes == 0 for graph in graphs)
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
            f"Dropped of {len(graphs):,} molecules: {unreadable} that RDKit cannot read and "
            f"{len(graphs) - len(kept) - unreadable} without a bond.",
            how[split],
            "One TOX21 for all models: the published code has one with 74 and 12 features and a "
            "random split for GT, and OGB's for the others, without molecules of at most five "
            "atoms.",
        ),
    )


def _fetch() -> dict[str, bytes]:
    url = MoleculeNet.url.format(MoleculeNet.names["tox21"][1])
    return {TOX21_FILE: gzip.decompress(read_url(url))}
