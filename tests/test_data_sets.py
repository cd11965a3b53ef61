"""TOX21, PROTEINS, citation networks and trees: exact counts, labels, splits, damaged files."""

import gzip
import shutil
import zipfile
from collections import Counter
from itertools import permutations
from math import factorial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NOT_BUNDLED, not_bundled as planetoid
from rdkit import Chem, RDLogger
from studies.data.networks import level_order, load_trees, neighbors_match, tree_edges
from torch_geometric.datasets import MoleculeNet, Planetoid, TUDataset
from torch_geometric.loader import DataLoader
from torch_geometric.utils import from_smiles

from studies.data import SPLITS, load
from studies.data.graph_classification import (
    PAIR_TYPES,
    STRUCTURES,
    TASKS,
    random_split,
    read_proteins,
    read_tox21,
    scaffold_split,
)
from studies.data.networks import PER_CLASS, citation_like

TOX21_FILE = "tox21/raw/tox21.csv"
PROTEINS_FOLDER = "TUDataset/PROTEINS/raw"
planetoid_folder = lambda n: "Planetoid/Cora/raw"
pytestmark = pytest.mark.usefixtures("cache")


def not_bundled(name, place):
    """A data set that the repository does not carry, or a skip with the reason."""
    if not (NOT_BUNDLED / place).exists():
        pytest.skip(f"{name} is not bundled and not at {NOT_BUNDLED}; MAPKG_DATA says where it is")
    return load(name, root=NOT_BUNDLED, download=False)


@pytest.fixture(scope="module")
def tox21(cache):
    return not_bundled("tox21", TOX21_FILE)


@pytest.fixture(scope="module")
def proteins(cache):
    return not_bundled("proteins", PROTEINS_FOLDER)


def all_graphs(splits):
    return [graph for split in SPLITS for graph in getattr(splits, split)]


def sizes(splits):
    return [len(getattr(splits, split)) for split in SPLITS]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Splits


@pytest.mark.parametrize(
    ("scaffolds", "train", "val", "test"),
    [
        # Both groups fill training to 80 %; of single ones, the last takes the next place.
        ("aaaaabbbcd", [0, 1, 2, 3, 4, 5, 6, 7], [9], [8]),
        # b would overfill training and goes to validation; the smaller c still fits.
        ("bbcaaaaaaa", [2, 3, 4, 5, 6, 7, 8, 9], [0, 1], []),
        # Of two groups of the same size the one that begins later is taken first.
        ("aaaaabbccd", [0, 1, 2, 3, 4, 7, 8, 9], [5, 6], []),
        # A group above 80 % fits validation, one above 90 % neither.
        ("aaaaaaaaab", [9], [0, 1, 2, 3, 4, 5, 6, 7, 8], []),
        ("aaaaaaaaaa", [], [], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_scaffold_groups_go_where_the_rule_written_by_hand_puts_them(scaffolds, train, val, test):
    assert scaffold_split(scaffolds) == {"train": train, "val": val, "test": test}


def test_a_random_split_has_each_class_in_its_proportion_and_each_index_once():
    labels = [1.0] * 40 + [0.0] * 160
    split = random_split(200, labels)
    assert sorted(i for indices in split.values() for i in indices) == list(range(200))
    counted = [Counter(labels[i] for i in split[name]) for name in SPLITS]
    assert counted == [{1.0: 32, 0.0: 128}, {1.0: 4, 0.0: 16}, {1.0: 4, 0.0: 16}]


# TOX21

# Twenty molecules: by size of their scaffold's group 14 benzenes, 2 cyclohexanes, 2 without a
# ring, a pyridine and a naphthalene.
SMILES = [
    *("Cc1ccccc1", "C1CCCCC1", "CCO", "Oc1ccccc1", "Nc1ccccc1", "c1ccncc1", "CC(=O)O"),
    *("Clc1ccccc1", "Brc1ccccc1", "Fc1ccccc1", "CCc1ccccc1", "OC1CCCCC1", "Ic1ccccc1"),
    *("CCCc1ccccc1", "N#Cc1ccccc1", "c1ccc2ccccc2c1", "Cc1ccccc1C", "Oc1ccccc1O"),
    *("Nc1ccccc1O", "COc1ccccc1"),
]


def csv(smiles, labels=None):
    """A table of molecules; the label of each in each task is 0 unless ``labels`` gives it."""
    rows = pd.DataFrame("0", index=range(len(smiles)), columns=list(TASKS))
    rows = rows.assign(mol_id="TOX", smiles=smiles)
    for (row, task), label in (labels or {}).items():
        rows.loc[row, task] = label
    return rows.to_csv(index=False).encode()


@pytest.fixture
def graphs_of(tmp_path, fresh_cache):
    """Graphs of SMILES, beside benzenes enough to have a training split, in their order."""

    def graphs(smiles, labels=None):
        path = write(tmp_path / "table", csv([*smiles, *["c1ccccc1"] * 20 * len(smiles)], labels))
        found = {graph.smiles: graph for graph in all_graphs(read_tox21(path, "random"))}
        return [found[text] for text in smiles]

    return graphs


def test_acetonitrile_is_the_graph_written_by_hand(graphs_of):
    (graph,) = graphs_of(["CC#N"])
    # Atomic number, chirality, degree with hydrogens, charge + 5, hydrogens, radical electrons,
    # hybridization (4 is sp3, 2 is sp), aromatic, in a ring.
    assert graph.x.tolist() == [
        [6, 0, 4, 5, 3, 0, 4, 0, 0],
        [6, 0, 2, 5, 0, 0, 2, 0, 0],
        [7, 0, 1, 5, 0, 0, 2, 0, 0],
    ]
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert graph.edge_attr.tolist() == [[1, 0, 0], [1, 0, 0], [3, 0, 0], [3, 0, 0]]
    assert graph.edge_type.tolist() == [1, 1, 3, 3]


@pytest.fixture
def speaking():
    """RDKit's errors on stderr: PyG's ``from_smiles`` silences them for the whole process."""
    RDLogger.EnableLog("rdApp.error")
    yield
    RDLogger.EnableLog("rdApp.error")


def test_the_features_are_those_of_pyg_and_a_scaffold_has_no_handedness(speaking, graphs_of):
    smiles = ["C[C@H]1CC[C@@H](c2ccccc2)CC1", "F/C=C/F", "C[N+](C)(C)CC(=O)[O-]"]
    graphs = graphs_of(smiles)
    for graph, text in zip(graphs, smiles, strict=True):
        for key in ("x", "edge_index", "edge_attr"):
            assert torch.equal(graph[key], from_smiles(text)[key]), (text, key)
    assert [graph.scaffold for graph in graphs] == ["c1ccc(C2CCCCC2)cc1", "", ""]


def test_unreadable_molecules_make_no_noise_and_rdkit_still_speaks_afterwards(
    speaking, tmp_path, fresh_cache, capfd
):
    splits = read_tox21(write(tmp_path / "t.csv", csv([*SMILES, "C1CC"])))
    assert capfd.readouterr() == ("", "")
    assert len(all_graphs(splits)) == len(SMILES)
    assert Chem.MolFromSmiles("C1CC") is None
    assert "unclosed ring" in capfd.readouterr().err


def test_labels_are_zero_one_or_unknown(graphs_of):
    labels = {(0, "NR-AR"): "1", (0, "SR-p53"): "", (1, "NR-AhR"): "1.0", (1, "NR-AR"): ""}
    first, second = graphs_of(["CC", "CO"], labels)
    assert first.y.nan_to_num(-1).tolist() == [[1.0, *[0.0] * 10, -1.0]]
    assert second.y.nan_to_num(-1).tolist() == [[-1.0, 0.0, 1.0, *[0.0] * 9]]


ALONE = SMILES.index("c1ccncc1")  # no pyridine is in training
PART = "training part of the scaffold split: "
BAD_TABLES = {
    **{
        f"label {label}": (csv(["CC", "CO"], {(1, "SR-HSE"): label}), "line 3: SR-HSE must be 0, 1")
        for label in ("2", "0.5", "active")
    },
    "a task twice": (csv(["CC"]).replace(b"NR-ER-LBD,", b"NR-ER,"), "found NR-ER 2 times"),
    "atom": (csv(["CC", "[Mn+7]"]), r"line 3: '\[Mn\+7\]' is not in PyG's vocabulary"),
    "no bond": (csv(["O", "C1CC"]), "expected molecules with bonds, found none"),
    "no training molecule": (
        csv(["Cc1ccccc1", "CCc1ccccc1"]),
        PART + "labels all missing .* NR-AR",
    ),
    "no label in training": (
        csv(SMILES, {(row, "SR-p53"): "" for row in range(len(SMILES)) if row != ALONE}),
        PART + "labels all missing for the task SR-p53;",
    ),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_refused_with_its_file_and_line(case, tmp_path, fresh_cache):
    content, message = BAD_TABLES[case]
    path = write(tmp_path / "t.csv", content)
    with pytest.raises(ValueError, match=message) as caught:
        read_tox21(path)
    assert str(caught.value).startswith(str(path))


def test_the_scaffold_split_is_by_hand_and_what_is_dropped_takes_no_place_in_it(tmp_path):
    # 16 of 20 may be in training: 14 benzenes, then one group of two: of the cyclohexanes
    # (from 1) and the molecules without a ring (from 2) the one that begins later. The
    # cyclohexanes fill validation; naphthalene and pyridine are left.
    splits = read_tox21(write(tmp_path / "t.csv", csv(["O", "C1CC", *SMILES, "[Na+]"])))
    assert [graph.smiles for graph in splits.val] == ["C1CCCCC1", "OC1CCCCC1"]
    assert [graph.smiles for graph in splits.test] == ["c1ccncc1", "c1ccc2ccccc2c1"]
    assert len(splits.train) == 16
    counted = "Dropped of 23 molecules: 1 that RDKit cannot read and 2 without a bond."
    assert counted in splits.description.deviations


def test_tox21_has_its_exact_counts_and_the_labels_of_its_file(tox21):
    random = load("tox21-random", root=NOT_BUNDLED, download=False)
    rows = pd.read_csv(NOT_BUNDLED / TOX21_FILE).set_index("smiles")
    for splits in (tox21, random):
        assert sizes(splits) == [6_243, 780, 781]
        graphs = all_graphs(splits)
        assert sum(graph.num_nodes for graph in graphs) == 145_233
        types = Counter(torch.cat([graph.edge_type for graph in graphs]).tolist())
        found = {splits.description.edge_types[i]: number for i, number in types.items()}
        assert found == {"single": 177_880, "double": 23_782, "triple": 628, "aromatic": 99_512}
        y = torch.cat([graph.y for graph in graphs])
        expected = rows.loc[[graph.smiles for graph in graphs], list(TASKS)].to_numpy()
        assert torch.equal(y.nan_to_num(-1), torch.tensor(expected).nan_to_num(-1).float())
        for split in SPLITS:
            y = torch.cat([graph.y for graph in getattr(splits, split)])
            assert (y == 0).any(dim=0).all() and (y == 1).any(dim=0).all()
    scaffolds = [{graph.scaffold for graph in getattr(tox21, split)} for split in SPLITS]
    assert len(set.union(*scaffolds)) == sum(map(len, scaffolds)) == 764 + 780 + 781


@pytest.mark.parametrize("kind", ["tox21", "proteins"])
def test_every_id_is_below_the_size_of_its_embedding(kind, request):
    splits = request.getfixturevalue(kind)
    about = splits.description
    for key, size in (("x", about.num_node_types), ("edge_attr", about.num_edge_types)):
        ids = torch.cat([graph[key] for graph in all_graphs(splits)])
        assert ids.min() >= 0 and (ids.amax(dim=0) < torch.tensor(size)).all()


# PROTEINS

# Four graphs: a path helix-sheet-turn, a triangle of helices, two unconnected turns, and a
# single sheet, which is last.
BY_HAND = {
    "A": "1, 2\n2, 1\n2, 3\n3, 2\n4, 5\n5, 4\n4, 6\n6, 4\n5, 6\n6, 5\n",
    "graph_indicator": "1\n1\n1\n2\n2\n2\n3\n3\n4\n",
    "graph_labels": "2\n1\n2\n1\n",
    "node_labels": "0\n1\n2\n0\n0\n0\n2\n2\n1\n",
}


def write_raw(folder, files):
    for name, content in files.items():
        write(folder / f"PROTEINS_{name}.txt", content)
    return folder


def test_the_graphs_are_those_written_by_hand(tmp_path):
    graphs = read_proteins(write_raw(tmp_path / "raw", BY_HAND))
    assert [graph.x.tolist() for graph in graphs] == [[0, 1, 2], [0, 0, 0], [2, 2], [1]]
    assert [graph.y.tolist() for graph in graphs] == [[[1.0]], [[0.0]], [[1.0]], [[0.0]]]
    assert [graph.edge_index.tolist() for graph in graphs] == [
        [[0, 1, 1, 2], [1, 0, 2, 1]],
        [[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]],
        *([[], []], [[], []]),
    ]
    assert [graph.edge_attr.tolist() for graph in graphs] == [[1, 1, 4, 4], [0] * 6, [], []]
    pairs = ["helix-helix", "helix-sheet", "helix-turn", "sheet-sheet", "sheet-turn", "turn-turn"]
    assert list(PAIR_TYPES.values()) == pairs
    # Lines in another order, a self-loop and a line twice make no difference.
    lines = [*reversed(BY_HAND["A"].splitlines()), "7, 7", "1, 2", ""]
    again = read_proteins(write_raw(tmp_path / "raw", {"A": "\n".join(lines)}))
    for one, other in zip(graphs, again, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one.to_dict())


NODES, CUT = (
    "as many node labels as nodes",
    "as many graph labels as graphs, and nodes in the order",
)
EDGES = "edges in both directions, between nodes of one graph"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("node_labels", "0\n1\n0\n0\n0\n0\n1\n1\n1\n", r"node labels 0 \(helix\), 1 \(sheet\)"),
        ("node_labels", "0\n1\n2\n3\n0\n0\n2\n2\n1\n", r"and 2 \(turn\)"),
        ("graph_labels", "1\n2\n3\n1\n", "graph labels 1 and 2"),
        ("graph_labels", None, "PROTEINS_graph_labels.txt not found"),
        # Halves and other pieces of each file.
        ("node_labels", "0\n1\n2\n0\n", NODES),
        ("graph_indicator", "1\n1\n1\n2\n2\n", NODES),
        ("graph_labels", "2\n1\n", CUT),
        ("graph_indicator", "1\n1\n1\n2\n2\n2\n4\n4\n4\n", CUT),
        ("graph_indicator", "1\n2\n1\n2\n2\n2\n3\n3\n4\n", CUT),
        ("A", BY_HAND["A"][:25], EDGES),
        ("A", BY_HAND["A"][25:], EDGES),
        ("A", BY_HAND["A"] + "1, 4\n4, 1\n", EDGES),
        ("A", BY_HAND["A"] + "9, 10\n10, 9\n", EDGES),
        ("A", BY_HAND["A"] + "0, 9\n9, 0\n", EDGES),
        ("A", BY_HAND["A"].replace(", ", "\n"), EDGES),
        ("A", BY_HAND["A"] + "6, ", "PROTEINS_A.txt: expected lines of whole numbers"),
    ],
)
def test_proteins_of_other_labels_or_cut_short_are_refused(file, content, message, tmp_path):
    files = {name: text for name, text in {**BY_HAND, file: content}.items() if text}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_proteins(write_raw(tmp_path / "raw", files))
    assert str(tmp_path / "raw") in str(caught.value)


def test_proteins_has_its_exact_counts_and_its_raw_folder_is_left_alone(proteins, tmp_path):
    graphs = all_graphs(proteins)
    assert sizes(proteins) == [890, 111, 112]
    positive = [sum(graph.y.item() for graph in getattr(proteins, split)) for split in SPLITS]
    assert positive == [360, 45, 45]  # 40.4 % of each, as of all
    assert torch.cat([graph.x for graph in graphs]).bincount().tolist() == [21_151, 20_931, 1_389]
    raw = NOT_BUNDLED / PROTEINS_FOLDER
    labels = (raw / "PROTEINS_node_labels.txt").read_text().split()
    pairs = [line.split(",") for line in (raw / "PROTEINS_A.txt").read_text().splitlines()]
    ends = (sorted([labels[int(a) - 1], labels[int(b) - 1]]) for a, b in pairs)
    expected = Counter("-".join(STRUCTURES[int(end)] for end in pair) for pair in ends)
    types = torch.cat([graph.edge_type for graph in graphs])
    assert Counter(proteins.description.edge_types[i] for i in types.tolist()) == expected
    assert expected.total() == 162_088
    shutil.copytree(raw, tmp_path / PROTEINS_FOLDER, copy_function=shutil.copyfile)
    load("proteins", root=tmp_path)
    assert [path.name for path in (tmp_path / "TUDataset" / "PROTEINS").iterdir()] == ["raw"]


# Fetched files, from a folder in place of the network; damaged ones are in test_data


def serve(name, folder, monkeypatch):
    """Puts what PyG would fetch into a folder."""
    if name == "tox21":
        content = (NOT_BUNDLED / TOX21_FILE).read_bytes()
        write(folder / "tox21.csv.gz", gzip.compress(content))
        monkeypatch.setattr(MoleculeNet, "url", f"{folder.as_uri()}/{{}}")
    elif name == "proteins":
        with zipfile.ZipFile(folder / "PROTEINS.zip", "w") as archive:
            for path in (NOT_BUNDLED / PROTEINS_FOLDER).iterdir():
                archive.write(path, f"PROTEINS/{path.name}")
        monkeypatch.setattr(TUDataset, "url", folder.as_uri())
    else:
        raw = NOT_BUNDLED / planetoid_folder("cora")
        shutil.copytree(raw, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
        monkeypatch.setattr(Planetoid, "url", folder.as_uri())


@pytest.mark.parametrize(
    ("name", "place"),
    [("tox21", TOX21_FILE), ("proteins", PROTEINS_FOLDER), ("cora", planetoid_folder("cora"))],
)
def test_a_data_set_is_fetched_and_kept(name, place, cache, tmp_path, monkeypatch):
    expected = sizes(not_bundled(name, place))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = tmp_path / "cache" / "mapkg"
    (tmp_path / "mirror").mkdir()
    serve(name, tmp_path / "mirror", monkeypatch)
    kept.mkdir(parents=True)
    (kept / "graphs").symlink_to(cache / "graphs")  # to spare the reading
    assert sizes(load(name, root=tmp_path / "nothing")) == expected
    shutil.rmtree(tmp_path / "mirror")
    assert sizes(load(name, root=kept, download=False)) == expected


# Citation networks

COUNTS = {
    "cora": (2708, 10556, 1433, 7, 140),
    "citeseer": (3327, 9104, 3703, 6, 120),
    "pubmed": (19717, 88648, 500, 3, 60),
    "pubmed-missing": (19717, 88648, 500, 3, 60),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_planetoid_network_has_its_published_counts(name):
    splits = planetoid(name)
    graph = splits.train.graph
    nodes, edges, words, classes, train = COUNTS[name]
    assert (graph.num_nodes, graph.num_edges, graph.num_features) == (nodes, edges, words)
    assert splits.description.num_targets == len(graph.y.unique()) == classes
    assert sizes(splits) == [train, 500, 1000]
    assert torch.bincount(graph.y[splits.train.nodes]).tolist() == [PER_CLASS] * classes
    assert not graph.has_self_loops() and graph.is_undirected()


def test_missing_features_are_zero_outside_the_training_nodes():
    graph, missing = (planetoid(name).train.graph for name in ("pubmed", "pubmed-missing"))
    assert int((graph.x != 0).sum()) == 988_031
    assert torch.equal(missing.x, graph.x * graph.train_mask[:, None])


@pytest.fixture(scope="module")
def synthetic():
    return citation_like(0)


def test_the_synthetic_network_has_the_size_mixing_and_split_of_cora(synthetic):
    assert (synthetic.num_nodes, synthetic.num_edges) == (2708, 2 * 5278)
    assert synthetic.x.shape == (2708, 1433) and set(synthetic.x.unique().tolist()) == {0, 1}
    source, target = synthetic.edge_index
    within = (synthetic.y[source] == synthetic.y[target]).float().mean().item()
    assert within == pytest.approx(0.81, abs=0.015)
    assert synthetic.is_undirected()
    assert not synthetic.has_self_loops() and not synthetic.has_isolated_nodes()
    assert 15 < synthetic.x.sum(1).mean() < 20
    degree = torch.bincount(source).double()
    # As many edges at random would give a variance near the mean and no node above 20.
    assert degree.var() > 5 * degree.mean() and degree.max() > 40
    masks = [synthetic[f"{name}_mask"] for name in SPLITS]
    assert [int(mask.sum()) for mask in masks] == [140, 500, 1000] and int(sum(masks).max()) == 1
    assert torch.bincount(synthetic.y[masks[0]]).tolist() == [PER_CLASS] * 7


def test_words_tell_something_of_the_class_and_neighbors_more(synthetic):
    train = synthetic.train_mask
    profile = torch.stack([synthetic.x[train & (synthetic.y == c)].mean(0) for c in range(7)])
    profile = profile - profile.mean(0)
    source, target = synthetic.edge_index
    summed = synthetic.x.clone().index_add_(0, target, synthetic.x[source])
    alone, together = (
        ((x @ profile.t()).argmax(1) == synthetic.y)[synthetic.test_mask].float().mean().item()
        for x in (synthetic.x, summed)
    )
    assert 1 / 7 < alone < together < 0.9


def test_the_seed_fixes_a_draw_and_homophily_is_what_is_asked_for():
    small = dict(num_nodes=300, num_edges=500, num_words=40)
    first, same, other = (citation_like(seed, **small) for seed in (3, 3, 4))
    assert all(torch.equal(first[key], same[key]) for key in first.to_dict())
    assert not torch.equal(first.edge_index, other.edge_index)
    for homophily in (0.0, 0.5, 1.0):
        graph = citation_like(0, num_nodes=600, num_edges=2000, homophily=homophily)
        source, target = graph.edge_index
        within = (graph.y[source] == graph.y[target]).float().mean().item()
        assert within == pytest.approx(homophily, abs=0.04)


# Trees


def by_recursion(depth):
    """Edges from child to parent and the leaves from left to right, as the paper draws them."""
    edges, leaves = set(), []

    def grow(node, last, height):
        if height == 0:
            leaves.append(node)
            return
        left, right = node + 1, node + 1 + (last - node) // 2
        edges.update({(left, node), (right, node)})
        grow(left, right - 1, height - 1)
        grow(right, last, height - 1)

    grow(0, 2 ** (depth + 1) - 2, depth)
    return edges, leaves


@pytest.mark.parametrize("depth", range(1, 6))
def test_trees_are_those_built_by_recursion_and_the_label_is_the_value_that_is_asked(depth):
    edges, leaves = by_recursion(depth)
    nodes, order = 2 ** (depth + 1) - 1, level_order(depth)
    found = [tuple(edge) for edge in tree_edges(depth).t().tolist()]
    assert len(found) == len(set(found))
    assert set(found) == edges | {(node, node) for node in range(nodes)}
    assert sorted(order.tolist()) == list(range(nodes))
    assert order[-(2**depth) :].tolist() == leaves
    for place in range(2**depth - 1):
        assert {(int(order[2 * place + i]), int(order[place])) for i in (1, 2)} <= edges
    trees = neighbors_match(depth, seed=3)
    chosen = np.random.default_rng(depth).choice(len(trees), min(200, len(trees)), replace=False)
    inner = [node for node in range(1, nodes) if node not in leaves]
    for number in chosen.tolist():
        graph = trees[number]
        key, nothing = graph.x[0].tolist()
        pairs = dict(graph.x[leaves].tolist())
        assert nothing == 0 and not graph.x[inner].any()
        assert list(pairs) == sorted(pairs.values()) == list(range(1, 2**depth + 1))
        assert graph.y.item() == pairs[key]


@pytest.mark.parametrize(
    ("depth", "number", "train"),
    [(2, 96, 76), (3, 8000, 6400), (4, 16000, 12800), (5, 32000, 25600)],
)
def test_there_are_as_many_examples_as_published(depth, number, train):
    assert sizes(load(f"trees-{depth}")) == [train, 0, number - train]


def test_permutations_are_all_of_four_leaves_and_a_thousand_different_ones_of_eight():
    leaves = by_recursion(2)[1]
    found = {(int(g.x[0, 0]), tuple(g.x[leaves, 1].tolist())) for g in neighbors_match(2)}
    assert found == {(key, order) for key in range(1, 5) for order in permutations(range(1, 5))}
    leaves, trees = by_recursion(3)[1], neighbors_match(3)
    of_first_key = trees.pairs[trees.pairs[:, 0, 0] == 1]
    assert len(of_first_key) == 1000 < factorial(8)
    assert len({tuple(row) for row in of_first_key[:, leaves, 1].tolist()}) == 1000


def test_the_parts_share_no_example_have_the_same_classes_and_the_seed_decides():
    splits = load("trees-3")
    seen = [{row.tobytes() for row in part.pairs.numpy()} for part in (splits.train, splits.test)]
    assert len(seen[0]) == 6400 and len(seen[1]) == 1600 and not seen[0] & seen[1]
    assert set(Counter(splits.train.y.tolist()).values()) == {800}
    assert set(Counter(splits.test.y.tolist()).values()) == {200}
    assert torch.equal(load_trees(3).train.pairs, splits.train.pairs)
    assert not torch.equal(load_trees(3, seed=0).train.pairs, splits.train.pairs)


def test_trees_are_a_sequence_of_graphs_that_pyg_batches():
    trees = load("trees-2").train
    assert torch.equal(trees[-1].x, trees[len(trees) - 1].x)
    assert len(list(trees)) == 76 and len(trees[:5]) == 5 and len(trees[trees.y == 1]) == 19
    batch = next(iter(DataLoader(trees, batch_size=10)))
    assert batch.x.shape == (70, 2) and batch.y.shape == (10,)
    assert batch.edge_index.shape == (2, 10 * (6 + 7))
