"""Every data set: exact counts, splits, and files that are damaged; graphs written by hand."""

import bz2
import gzip
import io
import lzma
import shutil
import zipfile
from collections import Counter

import pandas as pd
import pytest
import torch
from conftest import NOT_BUNDLED, all_graphs, not_bundled, ogb_files, write
from rdkit import Chem, RDLogger
from torch_geometric.datasets import MoleculeNet, Planetoid, TUDataset
from torch_geometric.utils import from_smiles

from mapkg.evaluation import predict
from mapkg.models import build
from studies.data import SPLITS, load, load_table, networks, read_smiles
from studies.data.graph_classification import (
    PAIR_TYPES,
    STRUCTURES,
    TASKS,
    read_proteins,
    read_tox21,
    scaffold_split,
)
from studies.emergence import fit_to_data
from studies.published import CONFIGS

pytestmark = pytest.mark.usefixtures("cache")

# Sizes of the splits, nodes, directed edges or how many there are of each type.
COUNTS = {
    "moses": ([10_000, 1_000, 1_000], 259_445, [401_944, 152_834, 1_854]),
    "zinc": ([10_000, 1_000, 1_000], 277_864, 597_970),
    "tox21": ([6_243, 780, 781], 145_233, [177_880, 23_782, 628, 99_512]),
    "tox21-random": ([6_243, 780, 781], 145_233, 301_802),
    "proteins": ([890, 111, 112], 43_471, 162_088),
    "cora": ([140, 500, 1000], 2708, 10556),
    "citeseer": ([120, 500, 1000], 3327, 9104),
    "pubmed": ([60, 500, 1000], 19717, 88648),
    "pubmed-missing": ([60, 500, 1000], 19717, 88648),
    "citation": ([140, 500, 1000], 2708, 2 * 5278),
}


def sizes(splits):
    return [len(getattr(splits, split)) for split in SPLITS]


@pytest.mark.parametrize("name", COUNTS)
def test_a_data_set_has_its_exact_counts_and_ids_below_the_sizes_of_their_embeddings(name):
    splits, (number, nodes, edges) = not_bundled(name), COUNTS[name]
    assert sizes(splits) == number
    about = splits.description
    if about.task == "node classification":
        graph = splits.train.graph
        assert (graph.num_nodes, graph.num_edges) == (nodes, edges)
        assert len(graph.y.unique()) == about.num_targets
        assert (
            graph.y[splits.train.nodes].bincount().tolist()
            == [networks.PER_CLASS] * about.num_targets
        )
        assert not graph.has_self_loops() and graph.is_undirected()
        return
    graphs = all_graphs(splits)
    assert sum(graph.num_nodes for graph in graphs) == nodes
    types = torch.cat([graph.edge_type for graph in graphs])
    found = [int((types == i).sum()) for i in about.edge_types]
    assert edges in (found, sum(found)) and sum(found) == len(types)
    for key, size in (("x", about.num_node_types), ("edge_attr", about.num_edge_types)):
        ids = torch.cat([graph[key] for graph in graphs])
        assert ids.min() >= 0 and (ids.amax(dim=0) < torch.tensor(size)).all()


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


@pytest.fixture
def speaking():
    """RDKit's errors on stderr: PyG's ``from_smiles`` silences them for the whole process."""
    RDLogger.EnableLog("rdApp.error")
    yield
    RDLogger.EnableLog("rdApp.error")


def test_labels_features_and_scaffolds_are_those_of_the_table_of_pyg_and_of_no_hand(
    speaking, graphs_of
):
    smiles = ["C[C@H]1CC[C@@H](c2ccccc2)CC1", "F/C=C/F", "C[N+](C)(C)CC(=O)[O-]"]
    labels = {(0, "NR-AR"): "1", (0, "SR-p53"): "", (1, "NR-AhR"): "1.0", (1, "NR-AR"): ""}
    graphs = graphs_of(smiles, labels)
    for graph, text in zip(graphs, smiles, strict=True):
        for key in ("x", "edge_index", "edge_attr"):
            assert torch.equal(graph[key], from_smiles(text)[key]), (text, key)
        assert torch.equal(graph.edge_type, graph.edge_attr[:, 0])
    assert [graph.scaffold for graph in graphs] == ["c1ccc(C2CCCCC2)cc1", "", ""]
    assert graphs[0].y.nan_to_num(-1).tolist() == [[1.0, *[0.0] * 10, -1.0]]
    assert graphs[1].y.nan_to_num(-1).tolist() == [[-1.0, 0.0, 1.0, *[0.0] * 9]]


def test_the_scaffold_split_is_by_hand_and_what_is_dropped_in_silence_takes_no_place_in_it(
    speaking, tmp_path, fresh_cache, capfd
):
    # 16 of 20 may be in training: 14 benzenes, then one group of two: of the cyclohexanes
    # (from 1) and the molecules without a ring (from 2) the one that begins later. The
    # cyclohexanes fill validation; naphthalene and pyridine are left.
    splits = read_tox21(write(tmp_path / "t.csv", csv(["O", "C1CC", *SMILES, "[Na+]"])))
    assert [graph.smiles for graph in splits.val] == ["C1CCCCC1", "OC1CCCCC1"]
    assert [graph.smiles for graph in splits.test] == ["c1ccncc1", "c1ccc2ccccc2c1"]
    assert len(splits.train) == 16
    counted = "Dropped of 23 molecules: 1 that RDKit cannot read and 2 without a bond."
    assert counted in splits.description.deviations
    assert capfd.readouterr() == ("", "")
    assert Chem.MolFromSmiles("C1CC") is None
    assert "unclosed ring" in capfd.readouterr().err


def test_tox21_has_the_labels_of_its_file_and_no_scaffold_in_two_splits():
    splits, rows = not_bundled("tox21"), pd.read_csv(NOT_BUNDLED / "tox21/raw/tox21.csv")
    graphs = all_graphs(splits)
    rows = rows.set_index("smiles").loc[[graph.smiles for graph in graphs], list(TASKS)]
    y, expected = torch.cat([graph.y for graph in graphs]), torch.tensor(rows.to_numpy()).float()
    assert torch.equal(y.nan_to_num(-1), expected.nan_to_num(-1))
    scaffolds = [{graph.scaffold for graph in getattr(splits, split)} for split in SPLITS]
    assert len(set.union(*scaffolds)) == sum(map(len, scaffolds)) == 764 + 780 + 781


# Four graphs: a path helix-sheet-turn, a triangle of helices, two unconnected turns, and a
# single sheet, which is last.
BY_HAND = {
    "A": "1, 2\n2, 1\n2, 3\n3, 2\n4, 5\n5, 4\n4, 6\n6, 4\n5, 6\n6, 5\n",
    "graph_indicator": "1\n1\n1\n2\n2\n2\n3\n3\n4\n",
    "graph_labels": "2\n1\n2\n1\n",
    "node_labels": "0\n1\n2\n0\n0\n0\n2\n2\n1\n",
}


def proteins_beside(path):
    """The graphs of a folder in which this file is there, and the others are whole."""
    for name, content in BY_HAND.items():
        if name not in path.name:
            write(path.with_name(f"PROTEINS_{name}.txt"), content)
    return read_proteins(path.parent)


def test_the_graphs_of_proteins_are_those_written_by_hand(tmp_path):
    path = tmp_path / "raw" / "PROTEINS_A.txt"
    graphs = proteins_beside(write(path, BY_HAND["A"]))
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
    again = proteins_beside(write(path, "\n".join(lines)))
    for one, other in zip(graphs, again, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one.to_dict())


def test_proteins_has_the_pairs_of_its_files_and_each_class_alike():
    splits, raw = not_bundled("proteins"), NOT_BUNDLED / "TUDataset/PROTEINS/raw"
    positive = [sum(graph.y.item() for graph in getattr(splits, split)) for split in SPLITS]
    assert positive == [360, 45, 45]  # 40.4 % of each, as of all
    labels = (raw / "PROTEINS_node_labels.txt").read_text().split()
    pairs = [line.split(",") for line in (raw / "PROTEINS_A.txt").read_text().splitlines()]
    ends = (sorted([labels[int(a) - 1], labels[int(b) - 1]]) for a, b in pairs)
    expected = Counter("-".join(STRUCTURES[int(end)] for end in pair) for pair in ends)
    types = torch.cat([graph.edge_type for graph in all_graphs(splits)])
    assert Counter(splits.description.edge_types[i] for i in types.tolist()) == expected


def test_a_network_of_proteins_is_the_graph_written_by_hand_with_the_labels_of_each_split(tmp_path):
    graphs = networks.read_ogb_proteins(ogb_files(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"random/train\.csv\.gz"):
        networks.read_ogb_proteins(tmp_path, "random")
    known = dict(train=[0, 3], val=[1], test=[2])
    labels = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0], [1, 0.0]])
    for name, nodes in known.items():
        graph, y = graphs[name], torch.full((5, 2), torch.nan)
        y[nodes] = labels[nodes]
        torch.testing.assert_close(graph.y, y, equal_nan=True)
        assert graph.x.tolist() == [2, 0, 2, 1, 2]  # the places of 9606, 3702 and 4932
        ends = [[0, 0, 1, 1, 2, 2, 2, 3], [1, 2, 0, 2, 0, 1, 3, 2]]
        assert graph.edge_index.tolist() == ends
        channels = ["coexpression", "neighborhood", "coexpression", "experimental"]
        channels += ["neighborhood", "experimental", "homology", "homology"]
        assert [networks.CHANNELS[i] for i in graph.edge_type.tolist()] == channels
        weights = torch.tensor([0.7, 0.5, 0.7, 0.2, 0.5, 0.2, 1, 1])
        assert torch.equal(graph.edge_attr.amax(dim=1), weights)
        assert torch.equal(graph.edge_attr[0], torch.tensor([0, 0, 0, 0, 0.7, 0, 0, 0.3]))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("raw/num-node-list", "5\n5", "expected one graph"),
        ("raw/num-node-list", "6", "as many species and rows of labels as nodes"),
        ("raw/node-label", "1,0\n0,1", "as many species and rows of labels as nodes"),
        ("raw/node-label", "1,0\n0,1\n1,1\n0,2\n1,0", "labels of 0, 1 or nothing"),
        ("raw/edge", "0,1\n2,1\n3,2", "as many edges and rows of weights"),
        ("raw/edge", "0,1\n2,1\n3,2\n0,5", "edges between two nodes"),
        ("raw/edge", "0,1\n2,1\n3,2\n0,1.5", "edges between two nodes"),
        ("raw/edge", "0,1\n2,1\n3,two\n0,2", r"edge\.csv\.gz: expected a table of numbers"),
        ("raw/node_species", "1,2\n1,2\n1,2\n1,2\n1,2", "one species of each node"),
        ("raw/edge-feat", "0\n0\n0\n0", "8 weights from 0 to 1"),
        ("raw/edge-feat", "\n".join(["0,0,0,0,0,0,0,1.2"] * 4), "8 weights from 0 to 1"),
        ("split/species/test", "0", "each node in one split at most"),
        ("split/species/test", "5", "each node in one split at most"),
        ("split/species/valid", "", r"valid\.csv\.gz: expected a table of numbers"),
    ],
)
def test_a_bad_network_of_proteins_is_refused(name, text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        networks.read_ogb_proteins(ogb_files(tmp_path, **{name: text}))


def test_the_network_of_string_has_the_sizes_of_its_source_and_proteins_that_are_alike_at_first():
    splits = not_bundled("string-ppi")
    for name, number in zip(SPLITS, (61, 20, 20), strict=True):
        (graph,) = getattr(splits, name)
        assert (graph.num_nodes, graph.num_edges) == (101, 2 * 3561)
        assert (~graph.y.isnan()).sum(dim=0).tolist() == [number] * 104
        assert graph.edge_attr.shape == (7122, 8) and graph.is_undirected()
    y = torch.stack([graph.y for graph in all_graphs(splits)]).nansum(dim=0)
    assert [y.sum(dim=0).min(), y.sum(dim=0).max()] == [20, 73]
    with pytest.raises(ValueError, match=r"out_channels: .* 112, but STRING, macaque has 104"):
        fit_to_data(CONFIGS["GT-PROTEINS"], splits.description)
    config = CONFIGS["GT-PROTEINS"].replace(out_channels=104)
    network = build(fit_to_data(config, splits.description)).eval()
    predicted = predict(network, splits.test[0])
    assert predicted.shape == (101, 104)
    torch.testing.assert_close(predicted, predicted[:1].expand_as(predicted), rtol=0, atol=1e-5)


# Files that are damaged, or of something else

HEAD = "split,smiles,y\n"
TABLE = f"{HEAD}train,C,1\n".encode()
UNREADABLE = "expected a CSV table, could not read it"


def zipped(*contents):
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for i, content in enumerate(contents):
            archive.writestr(f"{i}.csv", content)
    return buffer.getvalue()


TABLES = [
    ("t.csv", f"{HEAD}\n\n", "the table has no rows"),
    ("t.csv", "", UNREADABLE),
    ("t.csv", "split,smiles\ntrain,C\n", "split, smiles, y once, found y 0 times in split, smiles"),
    ("t.csv", "split,split,smiles,y,split\ntrain,val,N,2,test\n", "found split 3 times"),
    ("t.csv", f"{HEAD}train,C,1\ndev,C,1\n", "line 3: split must be one of train, val, t.*'dev'"),
    ("t.csv", f"{HEAD}train,C,1\ntrain,C,one\n", "line 3: y must be a finite number .* 'one'"),
    ("t.csv", f"{HEAD}train,C,1\ntrain,C\n", "line 3: y must be a finite number .* got ''"),
    # Beyond single precision, too.
    *(("t.csv", f"{HEAD}val,C,{y}\n", f"line 2: y must be .* '{y}'") for y in ("nan", "-1e39")),
    ("t.csv", f"{HEAD}train,NA,1\n", "line 2: unreadable SMILES 'NA'"),
    ("t.csv", f"{HEAD}\ntrain,C1C,1\n", "line 3: unreadable SMILES 'C1C'"),
    ("t.csv", f"{HEAD},,\ntrain,12,1\n", "line 3: unreadable SMILES '12'"),
    ("t.csv", f"{HEAD}train,C,1\ntrain,C,1,2\n", UNREADABLE),
    ("t.csv.gz", gzip.compress(TABLE, mtime=0)[:-12], UNREADABLE),
    ("t.csv.bz2", bz2.compress(TABLE)[:-12], UNREADABLE),
    ("t.csv.xz", lzma.compress(TABLE)[:-12], UNREADABLE),
    ("t.csv.zip", zipped(TABLE)[:-12], UNREADABLE),
    ("t.csv.zip", zipped(TABLE, TABLE), UNREADABLE),
    ("t.csv.gz", TABLE, UNREADABLE),
    ("t.csv.zst", b"\x28\xb5\x2f\xfd", UNREADABLE),  # its package is missing, or it is cut short
]
LISTS = [
    ("t.smi", "CCO\n\nNA\n", "line 3: unreadable SMILES 'NA'"),
    ("t.smi", "CO\n\n\n1.5\tname\n", "line 4: unreadable SMILES '1.5'"),
    ("t.smi", "\n \n", "expected a SMILES per line, found none"),
    ("t.smi", b"\xff\xfe\x00", "expected text with a SMILES per line"),
]
ALONE = SMILES.index("c1ccncc1")  # no pyridine is in training
NO_LABEL = {(row, "SR-p53"): "" for row in range(len(SMILES)) if row != ALONE}
PART = "training part of the scaffold split: labels all missing"
ASSAYS = [
    *(
        ("t.csv", csv(["CC", "CO"], {(1, "SR-HSE"): label}), "line 3: SR-HSE must be 0, 1 or empty")
        for label in ("2", "0.5", "active")
    ),
    ("t.csv", csv(["CC"]).replace(b"NR-ER-LBD,", b"NR-ER,"), "found NR-ER 2 times"),
    ("t.csv", csv(["CC", "[Mn+7]"]), r"line 3: '\[Mn\+7\]' is not in PyG's vocabulary"),
    ("t.csv", csv(["O", "C1CC"]), "expected molecules with bonds, found none"),
    ("t.csv", csv(["Cc1ccccc1", "CCc1ccccc1"]), f"{PART} .* NR-AR"),
    ("t.csv", csv(SMILES, NO_LABEL), f"{PART} for the task SR-p53;"),
]
NODES = "as many node labels as nodes"
CUT = "as many graph labels as graphs, and nodes in the order"
EDGES = "edges in both directions, between nodes of one graph"
PARTS = [
    ("node_labels", "0\n1\n0\n0\n0\n0\n1\n1\n1\n", r"node labels 0 \(helix\), 1 \(sheet\)"),
    ("graph_labels", "1\n2\n3\n1\n", "graph labels 1 and 2"),
    # Halves and other pieces of each file.
    ("node_labels", "0\n1\n2\n0\n", NODES),
    ("graph_indicator", "1\n1\n1\n2\n2\n", NODES),
    ("graph_labels", "2\n1\n", CUT),
    ("graph_indicator", "1\n1\n1\n2\n2\n2\n4\n4\n4\n", CUT),
    ("graph_indicator", "1\n2\n1\n2\n2\n2\n3\n3\n4\n", CUT),
    ("A", BY_HAND["A"][:25], EDGES),
    ("A", BY_HAND["A"] + "1, 4\n4, 1\n", EDGES),
    ("A", BY_HAND["A"] + "0, 9\n9, 0\n", EDGES),
    ("A", BY_HAND["A"].replace(", ", "\n"), EDGES),
    ("A", BY_HAND["A"] + "6, ", "PROTEINS_A.txt: expected lines of whole numbers"),
]
BAD = [
    *((load_table, *case) for case in TABLES),
    *((read_smiles, *case) for case in LISTS),
    *((read_tox21, *case) for case in ASSAYS),
    *((proteins_beside, f"PROTEINS_{part}.txt", *case) for part, *case in PARTS),
]


@pytest.mark.parametrize(("read", "name", "content", "message"), BAD)
def test_a_bad_file_is_refused_by_its_name_and_line(
    read, name, content, message, tmp_path, fresh_cache
):
    path = write(tmp_path / "raw" / name, content)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(str(path.parent if read is proteins_beside else path))
    assert read is not load_table or not fresh_cache.exists(), "a bad file was cached"


# Fetched files, from a folder in place of the network; damaged ones are in test_data


@pytest.mark.parametrize("name", ["tox21", "proteins", "cora"])
def test_a_data_set_is_fetched_and_kept(name, cache, tmp_path, monkeypatch):
    expected, mirror = sizes(not_bundled(name)), tmp_path / "mirror"
    content = gzip.compress((NOT_BUNDLED / "tox21/raw/tox21.csv").read_bytes())
    write(mirror / "tox21.csv.gz", content)
    with zipfile.ZipFile(mirror / "PROTEINS.zip", "w") as archive:
        for path in (NOT_BUNDLED / "TUDataset/PROTEINS/raw").iterdir():
            archive.write(path, f"PROTEINS/{path.name}")
    for path in (NOT_BUNDLED / "Planetoid/Cora/raw").iterdir():
        shutil.copyfile(path, mirror / path.name)
    monkeypatch.setattr(MoleculeNet, "url", f"{mirror.as_uri()}/{{}}")
    for cls in (TUDataset, Planetoid):
        monkeypatch.setattr(cls, "url", mirror.as_uri())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = tmp_path / "cache" / "mapkg"
    kept.mkdir(parents=True)
    (kept / "graphs").symlink_to(cache / "graphs")  # to spare the reading
    assert sizes(load(name, root=tmp_path / "nothing")) == expected
    shutil.rmtree(mirror)
    assert sizes(load(name, root=kept, download=False)) == expected


def test_missing_features_are_zero_outside_the_training_nodes():
    graph, missing = (not_bundled(name).train.graph for name in ("pubmed", "pubmed-missing"))
    assert int((graph.x != 0).sum()) == 988_031
    assert torch.equal(missing.x, graph.x * graph.train_mask[:, None])


def test_the_synthetic_network_has_the_mixing_of_cora_and_words_that_tell_of_the_class():
    graph = networks.citation_like(0)
    assert graph.x.shape == (2708, 1433) and set(graph.x.unique().tolist()) == {0, 1}
    within = graph.y[graph.edge_index[0]] == graph.y[graph.edge_index[1]]
    assert within.float().mean().item() == pytest.approx(0.81, abs=0.015)
    assert not graph.has_isolated_nodes() and 15 < graph.x.sum(1).mean() < 20
    degree = torch.bincount(graph.edge_index[0]).double()
    # As many edges at random would give a variance near the mean and no node above 20.
    assert degree.var() > 5 * degree.mean() and degree.max() > 40
    assert int(sum(graph[f"{name}_mask"] for name in SPLITS).max()) == 1
    profile = torch.stack([graph.x[graph.train_mask & (graph.y == c)].mean(0) for c in range(7)])
    profile = profile - profile.mean(0)
    summed = graph.x.clone().index_add_(0, graph.edge_index[1], graph.x[graph.edge_index[0]])
    alone, together = (
        ((x @ profile.t()).argmax(1) == graph.y)[graph.test_mask].float().mean().item()
        for x in (graph.x, summed)
    )
    assert 1 / 7 < alone < together < 0.9


def test_the_seed_fixes_a_draw():
    small = dict(num_nodes=300, num_edges=500, num_words=40)
    first, same, other = (networks.citation_like(seed, **small) for seed in (3, 3, 4))
    assert all(torch.equal(first[key], same[key]) for key in first.to_dict())
    assert not torch.equal(first.edge_index, other.edge_index)


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
    nodes, order = 2 ** (depth + 1) - 1, networks.level_order(depth).tolist()
    found = [tuple(edge) for edge in networks.tree_edges(depth).t().tolist()]
    assert sorted(found) == sorted(edges | {(node, node) for node in range(nodes)})
    assert sorted(order) == list(range(nodes)) and order[-(2**depth) :] == leaves
    for place in range(2**depth - 1):
        assert {(order[2 * place + i], order[place]) for i in (1, 2)} <= edges
    trees = networks.neighbors_match(depth, seed=3)
    inner = [node for node in range(1, nodes) if node not in leaves]
    for number in range(0, len(trees), 1 + len(trees) // 200):
        graph = trees[number]
        key, nothing = graph.x[0].tolist()
        pairs = dict(graph.x[leaves].tolist())
        assert nothing == 0 and not graph.x[inner].any()
        assert list(pairs) == sorted(pairs.values()) == list(range(1, 2**depth + 1))
        assert graph.y.item() == pairs[key]


def test_permutations_are_all_of_four_leaves_and_a_thousand_different_ones_of_eight():
    for depth, number in ((2, 24), (3, 1000)):
        trees, leaves = networks.neighbors_match(depth), by_recursion(depth)[1]
        rows = [(row[0, 0].item(), *row[leaves, 1].tolist()) for row in trees.pairs]
        assert len(rows) == len(set(rows)) == number * 2**depth
        assert len({row[1:] for row in rows}) == number


@pytest.mark.parametrize(("depth", "number"), [(2, 96), (3, 8000), (4, 16000), (5, 32000)])
def test_of_the_published_examples_four_fifths_of_each_class_are_for_training(depth, number):
    splits = load(f"trees-{depth}")
    assert sizes(splits) == [number * 4 // 5, 0, number - number * 4 // 5]
    if depth == 3:
        parts = (splits.train, splits.test)
        seen = [{row.tobytes() for row in part.pairs.numpy()} for part in parts]
        assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == number
        assert [{*Counter(part.y.tolist()).values()} for part in parts] == [{800}, {200}]
        assert torch.equal(networks.load_trees(3).train.pairs, splits.train.pairs)
        assert not torch.equal(networks.load_trees(3, seed=0).train.pairs, splits.train.pairs)
