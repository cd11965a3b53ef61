"""TOX21 and PROTEINS: two data sets of graph classification, and how they are split.

TOX21 asks which of twelve toxicity assays a molecule is active in, as MoleculeNet gives it. Atoms
and bonds have the columns of ids that PyG makes of a molecule. They are not OGB's: carbon is 6 here
and 5 there, sp3 is 4 here and 2 there. Nothing is kekulized, so a bond may be aromatic, and not
every molecule was tested in every assay.

PROTEINS of the TUDataset collection asks whether a protein is an enzyme. A node is an element of
its secondary structure, an edge joins neighbors along the chain or in space, and the type of an
edge is the unordered pair of its two structures.
"""

import gzip
import sys
from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations_with_replacement
from pathlib import Path

import pandas as pd
import torch
from rdkit import Chem
from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles
from rdkit.rdBase import BlockLogs
from sklearn.model_selection import train_test_split
from torch_geometric.data import Data
from torch_geometric.datasets import MoleculeNet, TUDataset
from torch_geometric.io import read_tu_data
from torch_geometric.utils import from_rdmol
from torch_geometric.utils.smiles import e_map, x_map
from tqdm import tqdm

from studies.data.description import SPLITS, Description, Splits
from studies.data.raw_files import cached_graphs, read_rows, read_url, root_with, unzipped

TOX21_FILE = "tox21/raw/tox21.csv"
"""The raw file under a data root, where PyG's MoleculeNet has it."""

TASKS = (
    *("NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma"),
    *("SR-ARE", "SR-ATAD5", "SR-HSE", "SR-MMP", "SR-p53"),
)
"""The assays, in the order of the columns of ``y``."""

PROTEINS_FOLDER = "TUDataset/PROTEINS/raw"
"""Folder of the raw files under a data root."""

STRUCTURES = ("helix", "sheet", "turn")
"""Secondary structures by node label."""

_PAIRS = list(combinations_with_replacement(range(len(STRUCTURES)), 2))
PAIR_TYPES = {i: f"{STRUCTURES[a]}-{STRUCTURES[b]}" for i, (a, b) in enumerate(_PAIRS)}
"""Edge types by id, the unordered pair of the secondary structures at an edge's ends."""

SEED = 0
"""Of the random splits."""

_PARTS = ("A", "graph_indicator", "graph_labels", "node_labels")
_PROTEINS_FILES = [f"{PROTEINS_FOLDER}/PROTEINS_{part}.txt" for part in _PARTS]


def random_split(number: int, labels: Sequence[Hashable] | None = None) -> dict[str, list[int]]:
    """Ascending indices by split, 80, 10 and 10 per cent; with labels, each has each class alike.

    Raises scikit-learn's ValueError if there are too few, or too few of a class.
    """
    train, rest = train_test_split(range(number), test_size=0.2, random_state=SEED, stratify=labels)
    rest_labels = None if labels is None else [labels[i] for i in rest]
    val, test = train_test_split(rest, test_size=0.5, random_state=SEED, stratify=rest_labels)
    return {"train": sorted(train), "val": sorted(val), "test": sorted(test)}


def scaffold_split(scaffolds: Sequence[Hashable]) -> dict[str, list[int]]:
    """The split in which no scaffold is in two splits; frequent scaffolds are for training.

    Groups of one scaffold are taken from the largest to the smallest (of equals, the one that
    appears last comes first). A group goes to training if training then holds at most 80 per
    cent; else to validation if both then hold at most 90 per cent; else to testing.

    Source: MoleculeNet (Wu et al., 2018) and its code in DeepChem.
    """
    groups = defaultdict(list)
    for i, scaffold in enumerate(scaffolds):
        groups[scaffold].append(i)
    split = {name: [] for name in SPLITS}
    for group in sorted(groups.values(), key=lambda group: (len(group), group[0]), reverse=True):
        in_train = len(split["train"]) + len(group)
        # Whole numbers: 0.8 + 0.1 is not 0.9.
        if 10 * in_train <= 8 * len(scaffolds):
            split["train"] += group
        elif 10 * (in_train + len(split["val"])) <= 9 * len(scaffolds):
            split["val"] += group
        else:
            split["test"] += group
    return {name: sorted(indices) for name, indices in split.items()}


def load_tox21(roots: Sequence[Path], *, download: bool, split: str = "scaffold") -> Splits | None:
    """TOX21 from the first root that has it, or None if it cannot be had."""

    def fetch() -> dict[str, bytes]:
        url = MoleculeNet.url.format(MoleculeNet.names["tox21"][1])
        return {TOX21_FILE: gzip.decompress(read_url(url))}

    root = root_with(roots, [TOX21_FILE], fetch if download else None)
    return None if root is None else read_tox21(root / TOX21_FILE, split)


def read_tox21(path: Path | str, split: str = "scaffold") -> Splits:
    """The graphs of a CSV file with the twelve tasks (0, 1 or empty) and ``smiles``.

    ``split`` is ``"scaffold"``, with no Murcko scaffold in two splits, or ``"random"``. Graphs have
    atom ids ``x`` [N, 9], bond ids ``edge_attr`` [E, 3], their first column ``edge_type`` [E],
    labels ``y`` [1, 12] that are 0, 1 or NaN, ``smiles`` and ``scaffold``. Molecules that RDKit
    cannot read or that have no bond are dropped and counted.
    """
    path = Path(path)
    graphs = cached_graphs([path], __file__, lambda: _tox21_graphs(_read_labels(path), path))
    bonded = [graph for graph in graphs if graph.num_edges]
    if not bonded:
        raise ValueError(f"{path}: expected molecules with bonds, found none")
    if split == "scaffold":
        indices = scaffold_split([graph.scaffold for graph in bonded])
    else:
        indices = random_split(len(bonded))
    by_split = {name: [bonded[i] for i in chosen] for name, chosen in indices.items()}
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
    unreadable = sum(graph.num_nodes == 0 for graph in graphs)
    names = [name.lower() for name in e_map["bond_type"]]
    types = torch.cat([graph.edge_type for graph in bonded]).unique().tolist()
    how = {
        "scaffold": "The scaffold split is computed here, of the molecules that are left, from "
        "Murcko scaffolds without chirality: it is not OGB's file of indices.",
        "random": f"The random split has the seed {SEED}; the published one has none.",
    }
    description = Description(
        name={"scaffold": "tox21", "random": "tox21-random"}[split],
        title=f"TOX21, {split} split",
        task="graph classification",
        target="activity in twelve assays",
        num_node_types=tuple(map(len, x_map.values())),
        num_edge_types=tuple(map(len, e_map.values())),
        num_targets=len(TASKS),
        edge_types={bond: names[bond] for bond in types},
        source="MoleculeNet (Wu et al., 2018), from the Tox21 Data Challenge 2014",
        licence="not stated by MoleculeNet; data of the Tox21 programme of the US government",
        deviations=(
            f"Dropped of {len(graphs):,} molecules: {unreadable} that RDKit cannot read and "
            f"{len(graphs) - len(bonded) - unreadable} without a bond.",
            how[split],
            "One TOX21 for all models: the published code has one with 74 and 12 features and a "
            "random split for GT, and OGB's for the others, without molecules of at most five "
            "atoms.",
        ),
    )
    return Splits(**by_split, description=description)


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


def _tox21_graphs(table: pd.DataFrame, path: Path) -> list[Data]:
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


def load_proteins(roots: Sequence[Path], *, download: bool) -> Splits | None:
    """TU PROTEINS from the first root that has it, or None if it cannot be had."""

    def fetch() -> dict[str, bytes]:
        members = {file: f"PROTEINS/{Path(file).name}" for file in _PROTEINS_FILES}
        return unzipped(read_url(f"{TUDataset.url}/PROTEINS.zip"), members)

    root = root_with(roots, _PROTEINS_FILES, fetch if download else None)
    if root is None:
        return None
    raw = [root / file for file in _PROTEINS_FILES]
    graphs = cached_graphs(raw, __file__, lambda: read_proteins(root / PROTEINS_FOLDER))
    return split_proteins(graphs)


def read_proteins(folder: Path | str) -> list[Data]:
    """The graphs of a folder with ``PROTEINS_A.txt`` and the other raw files, read by PyG.

    ``x`` is the secondary structure [N], ``edge_attr`` and ``edge_type`` the type of pair [E], and
    ``y`` [1, 1] is 0 or 1. Unlike by PyG's class, nothing is written beside the files.
    """
    for name in (Path(file).name for file in _PROTEINS_FILES):
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(f"{folder}: expected the raw files of PROTEINS, no {name}")
    data, slices, sizes = read_tu_data(str(folder), "PROTEINS")
    one_hot = data.x[:, sizes["num_node_attributes"] :]  # attributes are not used
    found = (one_hot.size(1), len(data.y.unique()))
    if found != (len(STRUCTURES), 2):
        raise ValueError(
            f"{folder}: expected 3 node labels (helix, sheet, turn) and 2 graph labels, found "
            f"{found[0]} and {found[1]}; these are not the files of PROTEINS"
        )
    labels = one_hot.argmax(dim=-1)
    type_of_pair = torch.empty(len(STRUCTURES), len(STRUCTURES), dtype=torch.long)
    for i, (a, b) in enumerate(_PAIRS):
        type_of_pair[a, b] = type_of_pair[b, a] = i
    nodes, edges = slices["x"].diff().tolist(), slices["edge_index"].diff().tolist()
    edges += [0] * (len(nodes) - len(edges))  # PyG counts up to the last graph with an edge
    graphs = []
    for x, edge_index, y in zip(
        labels.split(nodes), data.edge_index.split(edges, dim=1), data.y.tolist(), strict=True
    ):
        types = type_of_pair[x[edge_index[0]], x[edge_index[1]]]
        y = torch.tensor([[y]], dtype=torch.float)
        graphs.append(Data(x=x, edge_index=edge_index, edge_attr=types, edge_type=types, y=y))
    return graphs


def split_proteins(graphs: Sequence[Data]) -> Splits:
    """The stratified split of the graphs that have an edge; the description counts the others."""
    bonded = [graph for graph in graphs if graph.num_edges]
    deviations = [
        "Not the PROTEINS of the paper, which is ogbn-proteins: one graph per protein here, one "
        "node per protein there.",
        f"The split is stratified and random (seed {SEED}): the collection has none.",
    ]
    if len(bonded) < len(graphs):
        deviations.append(
            f"{len(graphs) - len(bonded)} of {len(graphs):,} graphs have no edge and are dropped."
        )
    indices = random_split(len(bonded), [graph.y.item() for graph in bonded])
    return Splits(
        **{split: [bonded[i] for i in chosen] for split, chosen in indices.items()},
        description=Description(
            name="proteins",
            title="TU PROTEINS",
            task="graph classification",
            target="is the protein an enzyme (0) or not (1)",
            num_node_types=len(STRUCTURES),
            num_edge_types=len(PAIR_TYPES),
            edge_types=PAIR_TYPES,
            source="PROTEINS of the TUDataset collection (Morris et al., 2020), from Borgwardt et "
            "al., 2005",
            licence="not stated; published for research",
            deviations=tuple(deviations),
        ),
    )
