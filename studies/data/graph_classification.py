"""TOX21 and PROTEINS: two data sets of graph classification, and how they are split.

TOX21 of MoleculeNet asks in which of twelve assays a molecule is active. Atoms and bonds have the
ids of PyG's ``from_smiles``, not OGB's: carbon is 6 here and 5 there, sp3 is 4 here and 2 there.
Nothing is kekulized, so a bond may be aromatic, and not every molecule was tested in every assay.

PROTEINS of the TUDataset collection asks whether a protein is an enzyme. A node is an element of
its secondary structure, an edge joins neighbors along the chain or in space, and the type of an
edge is the unordered pair of its two structures.
"""

import gzip
from collections import defaultdict
from collections.abc import Hashable, Sequence
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from rdkit import Chem
from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles
from rdkit.rdBase import BlockLogs
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.datasets import MoleculeNet, TUDataset
from torch_geometric.utils import (
    coalesce,
    from_rdmol,
    is_undirected,
    remove_self_loops,
    unbatch,
    unbatch_edge_index,
)
from torch_geometric.utils.smiles import e_map, x_map

from studies.data import sets
from studies.data.sets import SPLITS, Description, Source, Splits

TASKS = (
    *("NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma"),
    *("SR-ARE", "SR-ATAD5", "SR-HSE", "SR-MMP", "SR-p53"),
)
"""The assays, in the order of the columns of ``y``."""

STRUCTURES = ("helix", "sheet", "turn")
"""Secondary structures by node label."""

PAIR_TYPES = dict(enumerate(map("-".join, combinations_with_replacement(STRUCTURES, 2))))
"""Edge types by id, the unordered pair of the secondary structures at an edge's ends."""

SEED = 0
"""Of the random splits."""

_PARTS = ("A", "graph_indicator", "graph_labels", "node_labels")


def random_split(number: int, labels: Sequence[Hashable] | None = None) -> dict[str, list[int]]:
    """Ascending indices by split, 80, 10 and 10 per cent; of each label alike, if there are."""
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


def read_tox21(path: Path | str, split: str = "scaffold") -> Splits:
    """The graphs with bonds of a CSV file with the twelve tasks (0, 1 or empty) and ``smiles``.

    ``split`` is ``"scaffold"``, with no Murcko scaffold in two splits, or ``"random"``. Molecules
    that RDKit cannot read or that have no bond are counted in the description.
    """
    path = Path(path)
    graphs = sets.cached_graphs([path], __file__, partial(_tox21_graphs, path))
    bonded = [graph for graph in graphs if graph.num_edges]
    if not bonded:
        raise ValueError(f"{path}: expected molecules with bonds, found none")
    if split == "scaffold":
        indices = scaffold_split([graph.scaffold for graph in bonded])
    else:
        indices = random_split(len(bonded))
    by_split = {name: [bonded[i] for i in chosen] for name, chosen in indices.items()}
    known = [graph.y[0].isfinite().tolist() for graph in by_split["train"]]
    unlabeled = [task for i, task in enumerate(TASKS) if not any(row[i] for row in known)]
    if unlabeled:
        raise ValueError(
            f"{path}, training part of the {split} split: labels all missing for the task "
            f"{', '.join(unlabeled)}; nothing can be learned of it, so use more molecules or "
            "another split"
        )
    unreadable = sum(graph.num_nodes == 0 for graph in graphs)
    names = [name.lower() for name in e_map["bond_type"]]
    types = torch.cat([graph.edge_type for graph in bonded]).unique().tolist()
    name, how = {
        "scaffold": (
            "tox21",
            "The scaffold split is computed here, of the molecules that are left, from Murcko "
            "scaffolds without chirality: it is not OGB's file of indices.",
        ),
        "random": (
            "tox21-random",
            f"The random split has the seed {SEED}; the published one has none.",
        ),
    }[split]
    description = Description(
        **dict(name=name, title=f"TOX21, {split} split", task="graph classification"),
        **dict(target="activity in twelve assays", num_targets=len(TASKS)),
        num_node_types=tuple(map(len, x_map.values())),
        num_edge_types=tuple(map(len, e_map.values())),
        edge_types={bond: names[bond] for bond in types},
        source="MoleculeNet (Wu et al., 2018), from the Tox21 Data Challenge 2014",
        licence="not stated by MoleculeNet; data of the Tox21 programme of the US government",
        deviations=(
            f"Dropped of {len(graphs):,} molecules: {unreadable} that RDKit cannot read and "
            f"{len(graphs) - len(bonded) - unreadable} without a bond.",
            how,
            "One TOX21 for all models: the published code has one with 74 and 12 features and a "
            "random split for GT, and OGB's for the others, without molecules of at most five "
            "atoms.",
        ),
    )
    return Splits(**by_split, description=description)


def _tox21_graphs(path: Path) -> list[Data]:
    rows = sets.read_rows(path, [*TASKS, "smiles"])
    labels = rows[list(TASKS)].apply(pd.to_numeric, errors="coerce").astype(float)
    for task in TASKS:
        is_right = labels[task].isin([0, 1]) | (rows[task] == "")
        sets.check_values(path, rows[task], is_right, "0, 1 or empty")
    table = rows.assign(y=list(labels.to_numpy()))
    return sets.graphs_of_rows(table, path, _tox21_graph)


def _tox21_graph(smiles: str, labels: np.ndarray) -> Data:
    """The graph of a molecule as PyG describes it; one that RDKit cannot read has no atoms."""
    with BlockLogs():  # from_smiles, PyG's own function, silences RDKit for good
        molecule = Chem.MolFromSmiles(smiles) or Chem.Mol()
    try:
        graph = from_rdmol(molecule)
    except ValueError as error:
        raise ValueError(f"{smiles!r} is not in PyG's vocabulary: {error}") from error
    graph.edge_type = graph.edge_attr[:, 0]
    graph.y = torch.tensor(labels, dtype=torch.float).view(1, -1)
    graph.smiles = smiles
    graph.scaffold = MurckoScaffoldSmiles(mol=molecule, includeChirality=False)
    return graph


def read_proteins(folder: Path | str) -> list[Data]:
    """The graphs of a folder with ``PROTEINS_A.txt`` and the other raw files, if they are whole."""
    pairs, of_node, classes, structures = (_numbers(Path(folder), part) for part in _PARTS)
    edge_index, of_node, structures = pairs.t() - 1, of_node.flatten() - 1, structures.flatten()
    right = {
        "node labels 0 (helix), 1 (sheet) and 2 (turn)": structures.unique().tolist() == [0, 1, 2],
        "graph labels 1 and 2": classes.unique().tolist() == [1, 2],
        "as many node labels as nodes": len(structures) == len(of_node),
        "as many graph labels as graphs, and nodes in the order of their graphs": torch.equal(
            of_node.unique_consecutive(), torch.arange(len(classes))
        ),
        "edges in both directions, between nodes of one graph": len(edge_index) == 2
        and 0 <= edge_index.min() <= edge_index.max() < len(of_node)
        and torch.equal(*of_node[edge_index])
        and is_undirected(coalesce(edge_index)),
    }
    sets.expect_all(folder, right)
    edge_index = coalesce(remove_self_loops(edge_index)[0])
    low, high = structures[edge_index].sort(dim=0).values
    types = low * (5 - low) // 2 + high  # the place of this pair in PAIR_TYPES
    fields = (
        unbatch(structures, of_node),
        unbatch_edge_index(edge_index, of_node, len(classes)),
        unbatch(types, of_node[edge_index[0]], batch_size=len(classes)),
        (classes - 1).float().split(1),
    )
    return [Data(*graph, edge_type=graph[2]) for graph in zip(*fields, strict=True)]


def _numbers(folder: Path, part: str) -> Int[Tensor, "lines columns"]:
    """The whole numbers of one raw file of PROTEINS."""
    path = folder / f"PROTEINS_{part}.txt"
    try:
        return torch.from_numpy(np.loadtxt(path, dtype=np.int64, delimiter=",", ndmin=2))
    except ValueError as error:
        raise ValueError(f"{path}: expected lines of whole numbers: {error}") from error


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
            **dict(name="proteins", title="TU PROTEINS", task="graph classification"),
            target="is the protein an enzyme (0) or not (1)",
            **dict(num_node_types=len(STRUCTURES), num_edge_types=len(PAIR_TYPES)),
            edge_types=PAIR_TYPES,
            source="PROTEINS of the TUDataset collection (Morris et al., 2020), from Borgwardt et "
            "al., 2005",
            licence="not stated; published for research",
            deviations=tuple(deviations),
        ),
    )


def _fetch_tox21() -> dict[str, bytes]:
    url = MoleculeNet.url.format(MoleculeNet.names["tox21"][1])
    return {_TOX21: gzip.decompress(sets.read_url(url))}


def _fetch_proteins() -> dict[str, bytes]:
    members = {file: f"PROTEINS/{Path(file).name}" for file in _PROTEINS}
    return sets.unzipped(sets.read_url(f"{TUDataset.url}/PROTEINS.zip"), members)


_TOX21 = "tox21/raw/tox21.csv"
_PROTEINS = [f"TUDataset/PROTEINS/raw/PROTEINS_{part}.txt" for part in _PARTS]
SOURCES = {
    "tox21": [Source([_TOX21], read_tox21, _fetch_tox21)],
    "tox21-random": [Source([_TOX21], partial(read_tox21, split="random"), _fetch_tox21)],
    "proteins": [
        Source(_PROTEINS, lambda *f: split_proteins(read_proteins(f[0].parent)), _fetch_proteins)
    ],
}
"""Where each data set is from, under the names that PyG gives files."""
