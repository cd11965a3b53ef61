"""TOX21: features, labels, what is dropped, scaffolds, splits, exact counts."""

import gzip
import shutil

import pandas as pd
import pytest
import torch
from conftest import NOT_BUNDLED
from rdkit import Chem, RDLogger
from torch_geometric.datasets import MoleculeNet
from torch_geometric.utils import from_smiles

from studies.data import load
from studies.data.splitting import SPLITS
from studies.data.tox21 import TASKS, TOX21_FILE, read_tox21

pytestmark = pytest.mark.usefixtures("cache")

SINGLE, DOUBLE, TRIPLE, AROMATIC = 1, 2, 3, 12

# Twenty molecules: by size of their scaffold's group 14 benzenes, 2 cyclohexanes, 2 without a
# ring, a pyridine and a naphthalene.
SMILES = [
    *("Cc1ccccc1", "C1CCCCC1", "CCO", "Oc1ccccc1", "Nc1ccccc1", "c1ccncc1", "CC(=O)O"),
    *("Clc1ccccc1", "Brc1ccccc1", "Fc1ccccc1", "CCc1ccccc1", "OC1CCCCC1", "Ic1ccccc1"),
    *("CCCc1ccccc1", "N#Cc1ccccc1", "c1ccc2ccccc2c1", "Cc1ccccc1C", "Oc1ccccc1O"),
    *("Nc1ccccc1O", "COc1ccccc1"),
]


@pytest.fixture(scope="module")
def raw():
    """The raw file, or a skip with the reason."""
    path = NOT_BUNDLED / TOX21_FILE
    if not path.is_file():
        pytest.skip(f"TOX21 is not bundled and not at {path}; MAPKG_DATA says where it is")
    return path


@pytest.fixture(scope="module")
def tox21(raw):
    return load("tox21", root=NOT_BUNDLED, download=False)


@pytest.fixture(scope="module")
def tox21_random(raw):
    return load("tox21-random", root=NOT_BUNDLED, download=False)


def csv(smiles, labels=None):
    """A table of molecules; the label of each in each task is 0 unless ``labels`` gives it."""
    rows = pd.DataFrame("0", index=range(len(smiles)), columns=list(TASKS))
    rows = rows.assign(mol_id="TOX", smiles=smiles)
    for (row, task), label in (labels or {}).items():
        rows.loc[row, task] = label
    return rows.to_csv(index=False).encode()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def graphs_of(tmp_path, fresh_cache):
    """Graphs of SMILES, beside benzenes enough to have a training split, in their order."""

    def graphs(smiles, labels=None):
        path = write(tmp_path / "table", csv([*smiles, *["c1ccccc1"] * 20 * len(smiles)], labels))
        found = {graph.smiles: graph for graph in all_graphs(read_tox21(path, "random"))}
        return [found[text] for text in smiles]

    return graphs


def all_graphs(splits):
    return [graph for split in SPLITS for graph in getattr(splits, split)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert sorted(a.keys()) == sorted(b.keys())
        for key in ("x", "edge_index", "edge_attr", "edge_type"):
            assert a[key].dtype == b[key].dtype
            assert torch.equal(a[key], b[key]), key
        assert torch.equal(a.y.nan_to_num(-1), b.y.nan_to_num(-1))
        assert (a.smiles, a.scaffold) == (b.smiles, b.scaffold)


# Graphs


def test_acetonitrile_is_the_graph_written_by_hand(graphs_of):
    (graph,) = graphs_of(["CC#N"])
    # Atomic number, chirality, degree with hydrogens, charge + 5, hydrogens, radical electrons,
    # hybridisation (4 is sp3, 2 is sp), aromatic, in a ring.
    assert graph.x.tolist() == [
        [6, 0, 4, 5, 3, 0, 4, 0, 0],
        [6, 0, 2, 5, 0, 0, 2, 0, 0],
        [7, 0, 1, 5, 0, 0, 2, 0, 0],
    ]
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert graph.edge_attr.tolist() == [[1, 0, 0], [1, 0, 0], [3, 0, 0], [3, 0, 0]]
    assert graph.edge_type.tolist() == [SINGLE, SINGLE, TRIPLE, TRIPLE]
    assert graph.y.tolist() == [[0.0] * 12]
    assert graph.smiles == "CC#N"


@pytest.fixture
def speaking():
    """RDKit's errors on stderr: PyG's ``from_smiles`` silences them for the whole process."""
    RDLogger.EnableLog("rdApp.error")
    yield
    RDLogger.EnableLog("rdApp.error")


def test_the_features_are_those_of_pyg(speaking, graphs_of):
    smiles = [*SMILES, "C[C@H](F)Cl", "F/C=C/F", "C[N+](C)(C)CC(=O)[O-]", "CC#N"]
    for graph, text in zip(graphs_of(smiles), smiles, strict=True):
        expected = from_smiles(text)
        for key in ("x", "edge_index", "edge_attr"):
            assert torch.equal(graph[key], expected[key]), (text, key)
        assert torch.equal(graph.edge_type, graph.edge_attr[:, 0])


def test_unreadable_molecules_make_no_noise_and_rdkit_still_speaks_afterwards(
    speaking, tmp_path, fresh_cache, capfd
):
    splits = read_tox21(write(tmp_path / "t.csv", csv([*SMILES, "C1CC"])))
    assert capfd.readouterr() == ("", "")
    assert len(all_graphs(splits)) == len(SMILES)
    assert Chem.MolFromSmiles("C1CC") is None
    assert "unclosed ring" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("smiles", "scaffold"),
    [
        ("Cc1ccccc1", "c1ccccc1"),
        ("CCc1ccccc1O", "c1ccccc1"),
        ("C1CCCCC1", "C1CCCCC1"),
        ("c1ccc(Cc2ccccc2)cc1", "c1ccc(Cc2ccccc2)cc1"),
        ("CC(=O)O", ""),
        # Handedness is no part of a scaffold.
        ("C[C@H]1CC[C@@H](c2ccccc2)CC1", "c1ccc(C2CCCCC2)cc1"),
    ],
)
def test_the_scaffold_is_the_rings_and_what_links_them(smiles, scaffold, graphs_of):
    (graph,) = graphs_of([smiles])
    assert graph.scaffold == scaffold


# Labels


def test_labels_are_zero_one_or_unknown(graphs_of):
    labels = {(0, "NR-AR"): "1", (0, "SR-p53"): "", (1, "NR-AhR"): "1.0", (1, "NR-AR"): ""}
    first, second = graphs_of(["CC", "CO"], labels)
    zero = [0.0] * 12
    assert first.y.shape == second.y.shape == (1, 12)
    assert torch.equal(first.y.nan_to_num(-1), torch.tensor([[1.0, *zero[:10], -1.0]]))
    assert torch.equal(second.y.nan_to_num(-1), torch.tensor([[-1.0, 0.0, 1.0, *zero[:9]]]))


ALONE = SMILES.index("c1ccncc1")  # no pyridine is in training
PART = "training part of the scaffold split: "
BAD_TABLES = {
    **{
        f"label {label}": (csv(["CC", "CO"], {(1, "SR-HSE"): label}), "line 3: the label of SR-HSE")
        for label in ("2", "-1", "0.5", "active", "nan", "inf")
    },
    "no task": (
        csv(["CC"]).replace(b"NR-ER-LBD,", b"other,"),
        "missing column NR-ER-LBD; expected",
    ),
    "no smiles": (csv(["CC"]).replace(b"smiles\n", b"other\n"), "missing column smiles; expected"),
    "atom": (
        csv(["CC", "[Mn+7]"]),
        r"line 3: '\[Mn\+7\]' has an atom or bond that is not in PyG's",
    ),
    "no bond": (csv(["O", "C1CC"]), "expected molecules with bonds, found none"),
    "no training molecule": (
        csv(["Cc1ccccc1", "CCc1ccccc1"]),
        PART + "labels all missing for the task NR-AR, .*, SR-p53;",
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


# Splits


def test_the_scaffold_split_is_the_one_worked_out_by_hand(tmp_path):
    # 16 of 20 may be in training: 14 benzenes, then one group of two: of the cyclohexanes
    # (from 1) and the molecules without a ring (from 2) the one that begins later. The
    # cyclohexanes fill validation; naphthalene and pyridine are left.
    splits = read_tox21(write(tmp_path / "t.csv", csv(SMILES)))
    assert [graph.smiles for graph in splits.val] == ["C1CCCCC1", "OC1CCCCC1"]
    assert [graph.smiles for graph in splits.test] == ["c1ccncc1", "c1ccc2ccccc2c1"]
    kept = {graph.smiles for graph in (*splits.val, *splits.test)}
    assert [graph.smiles for graph in splits.train] == [s for s in SMILES if s not in kept]


def test_what_is_dropped_takes_no_place_in_a_split(tmp_path):
    splits = read_tox21(write(tmp_path / "t.csv", csv(["O", "C1CC", *SMILES, "[Na+]"])))
    expected = read_tox21(write(tmp_path / "u.csv", csv(SMILES)))
    for split in SPLITS:
        assert_same(getattr(splits, split), getattr(expected, split))
    counted = "Dropped of 23 molecules: 1 that RDKit cannot read and 2 without a bond."
    assert counted in splits.description.deviations


def test_the_random_split_takes_no_notice_of_scaffolds(tmp_path):
    path = write(tmp_path / "t.csv", csv(SMILES))
    splits = read_tox21(path, "random")
    assert [len(getattr(splits, split)) for split in SPLITS] == [16, 2, 2]
    assert sorted(graph.smiles for graph in all_graphs(splits)) == sorted(SMILES)
    assert_same(read_tox21(path, "random").test, splits.test)
    assert splits.description.name == "tox21-random"


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown split 'time'.* expected scaffold or random"):
        read_tox21(tmp_path / "t.csv", "time")


# The data set


def test_tox21_has_its_exact_counts(tox21, tox21_random):
    for splits in (tox21, tox21_random):
        assert [len(getattr(splits, split)) for split in SPLITS] == [6_243, 780, 781]
        graphs = all_graphs(splits)
        assert sum(graph.num_nodes for graph in graphs) == 145_233
        types = torch.cat([graph.edge_type for graph in graphs]).bincount()
        found = {
            splits.description.edge_types[i]: types[i].item()
            for i in types.nonzero().view(-1).tolist()
        }
        assert found == {"single": 177_880, "double": 23_782, "triple": 628, "aromatic": 99_512}
        dropped = "Dropped of 7,831 molecules: 8 that RDKit cannot read and 19 without a bond."
        assert dropped in splits.description.deviations


def test_the_labels_are_those_of_the_file(tox21, raw):
    rows = pd.read_csv(raw).set_index("smiles")
    graphs = all_graphs(tox21)
    found = torch.cat([graph.y for graph in graphs])
    expected = torch.tensor(rows.loc[[graph.smiles for graph in graphs], list(TASKS)].to_numpy())
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num().float())
    assert [(found == value).sum().item() for value in (0, 1)] == [71_816, 5_843]


def test_no_scaffold_is_in_two_splits(tox21):
    scaffolds = [{graph.scaffold for graph in getattr(tox21, split)} for split in SPLITS]
    assert [len(found) for found in scaffolds] == [764, 780, 781]
    assert len(set.union(*scaffolds)) == 764 + 780 + 781


def test_the_random_split_has_scaffolds_in_several_splits(tox21_random):
    train, _, test = ({g.scaffold for g in getattr(tox21_random, split)} for split in SPLITS)
    assert len(train & test) > 100


def test_the_sizes_of_the_embeddings_hold_every_id(tox21):
    description = tox21.description
    assert description.num_node_types == (119, 9, 11, 12, 9, 5, 8, 2, 2)
    assert description.num_edge_types == (22, 6, 2)
    for key, sizes in (
        ("x", description.num_node_types),
        ("edge_attr", description.num_edge_types),
    ):
        ids = torch.cat([graph[key] for graph in all_graphs(tox21)])
        assert ids.min() >= 0
        assert (ids.max(dim=0).values < torch.tensor(sizes)).all()
    assert description.num_targets == len(description.target_names) == 12
    assert description.task == "graph classification"


def test_every_task_has_both_labels_in_every_split(tox21, tox21_random):
    for splits in (tox21, tox21_random):
        for split in SPLITS:
            y = torch.cat([graph.y for graph in getattr(splits, split)])
            assert (y == 0).any(dim=0).all()
            assert (y == 1).any(dim=0).all()


# Files


def serve(folder, monkeypatch, content):
    """A file where PyG looks for TOX21, in a folder instead of on the network."""
    write(folder / "tox21.csv.gz", content)
    monkeypatch.setattr(MoleculeNet, "url", f"{folder.as_uri()}/{{}}")


def test_tox21_is_fetched_and_kept(tox21, raw, cache, tmp_path, fresh_cache, monkeypatch):
    shutil.copytree(cache / "graphs", fresh_cache / "graphs")  # to spare the reading
    serve(tmp_path / "mirror", monkeypatch, gzip.compress(raw.read_bytes()))
    assert_same(load("tox21", root=tmp_path / "nothing").val, tox21.val)
    assert (fresh_cache / TOX21_FILE).read_bytes() == raw.read_bytes()
    shutil.rmtree(tmp_path / "mirror")
    assert len(load("tox21").val) == 780


def test_another_content_is_fetched_but_not_kept(tmp_path, fresh_cache, monkeypatch):
    serve(tmp_path / "mirror", monkeypatch, gzip.compress(csv(SMILES)))
    with pytest.raises(ValueError, match=r"tox21\.csv, as fetched: expected sha256 b1346d5b"):
        load("tox21")
    assert not fresh_cache.exists()
