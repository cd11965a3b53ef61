"""Molecules as graphs, SMILES tables, where data sets are looked for, and the graph cache."""

import gzip
import hashlib
import pickle
import shutil
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import NOT_BUNDLED
from rdkit import Chem
from torch_geometric.data import Data
from torch_geometric.datasets import ZINC

from studies.data import (
    ATOM_TYPES,
    BOND_TYPES,
    BUNDLED,
    DESCRIPTIONS,
    load,
    load_table,
    molecule_graph,
    read_table,
    to_molecule,
)
from studies.data.graph_cache import cached_graphs
from studies.data.molecules import logp_terms, penalised_logp

pytestmark = pytest.mark.usefixtures("cache")

SPLITS = ("train", "val", "test")

C, O, N, F = range(4)  # noqa: E741, chemistry has its own letters
"""Ids of the most frequent atom types, by the order of the benchmark."""

TABLE = """split,smiles,y
train,CCO,0.5
val,N#Cc1ccccc1,-1.25
train,C[NH3+],2
test,c1ccccc1,0
"""


@pytest.fixture(scope="module")
def moses(cache):
    """The bundled data set."""
    return load("moses")


@pytest.fixture(scope="module")
def zinc(cache):
    """The benchmark, or a skip with the reason."""
    path = NOT_BUNDLED / "zinc" / "zinc12k_official.csv.gz"
    if not path.is_file():
        pytest.skip(f"ZINC is not bundled and not at {path}; MAPKG_DATA says where it is")
    return load("zinc", NOT_BUNDLED)


@pytest.fixture
def table(tmp_path):
    """A table of four molecules."""
    return write(tmp_path / "table.csv", TABLE)


def write(path, content):
    """A file with a content, and the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def edges(graph):
    """Directed edges with their bond type, in no order."""
    triples = zip(*graph.edge_index.tolist(), graph.edge_attr.tolist(), strict=True)
    return sorted(triples)


def both_directions(bonds):
    """What ``edges`` gives for hand-written bonds, each written once."""
    return sorted([*bonds, *((target, source, order) for source, target, order in bonds)])


def without_stereo(molecule):
    """Canonical SMILES without stereochemistry."""
    molecule = Chem.Mol(molecule)
    Chem.RemoveStereochemistry(molecule)
    return Chem.MolToSmiles(molecule)


def counts(graphs):
    """Graphs, atoms, directed edges, and directed edges per bond type id from 0."""
    bonds = torch.cat([graph.edge_attr for graph in graphs]).bincount(minlength=4).tolist()
    return len(graphs), sum(graph.num_nodes for graph in graphs), sum(bonds), bonds


def assert_same(found, expected):
    """Graphs are equal to the bit, in every field and in their order."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert sorted(a.keys()) == sorted(b.keys())
        for key in a.keys():  # noqa: SIM118, not a dict
            if key == "smiles":
                assert a.smiles == b.smiles
            else:
                assert a[key].dtype == b[key].dtype
                assert torch.equal(a[key], b[key]), key


# Vocabulary


def test_atom_types_are_those_of_the_benchmark_in_its_order():
    # Elements, explicit hydrogens and charge, copied from the description of the ZINC file.
    benchmark = (
        "C, O, N, F, C H1, S, Cl, O -, N H1 +, Br, N H3 +, N H2 +, N +, N -, S -, I, P, O H1 +, "
        "N H1 -, O +, S +, P H1, P H2, C H2 -, P +, S H1 +, C H1 -, P H1 +"
    )
    assert ", ".join(ATOM_TYPES) == benchmark
    assert len(set(ATOM_TYPES)) == 28
    assert BOND_TYPES == {1: "single", 2: "double", 3: "triple"}


# One molecule for each of the 28 types: SMILES, and the ids of its atoms in its order.
ONE_OF_EACH = {
    "CC(C)=O": [0, 0, 0, 1],
    "CN(C)C": [0, 2, 0, 0],
    "CF": [0, 3],
    "C[C@H](F)Cl": [0, 4, 3, 6],  # a stereocentre carries its hydrogen
    "CSC": [0, 5, 0],
    "CC(=O)[O-]": [0, 0, 1, 7],
    "C[NH+](C)C": [0, 8, 0, 0],
    "c1cc[nH+]cc1": [0, 0, 0, 8, 0, 0],
    "CBr": [0, 9],
    "C[NH3+]": [0, 10],
    "C[NH2+]C": [0, 11, 0],
    "C[N+](=O)[O-]": [0, 12, 1, 7],
    "C[N-]S(C)(=O)=O": [0, 13, 5, 0, 1, 1],
    "CC[S-]": [0, 0, 14],
    "CI": [0, 15],
    "CP(C)C": [0, 16, 0, 0],
    "C[OH+]C": [0, 17, 0],
    "C[NH-]": [0, 18],
    "c1cc[o+]cc1": [0, 0, 0, 19, 0, 0],
    "C[S+](C)C": [0, 20, 0, 0],
    "C[PH](=O)O": [0, 21, 1, 1],
    "C[PH2]=O": [0, 22, 1],
    "[CH2-]C": [23, 0],
    "C[P+](C)(C)C": [0, 24, 0, 0, 0],
    "C[SH+]C": [0, 25, 0],
    "C[CH-]C": [0, 26, 0],
    "C[PH+](C)C": [0, 27, 0, 0],
}


@pytest.mark.parametrize("smiles", ONE_OF_EACH)
def test_every_atom_type_is_recognised_and_drawn_back(smiles):
    graph = molecule_graph(smiles)
    assert graph.x.tolist() == ONE_OF_EACH[smiles]
    assert without_stereo(to_molecule(graph)) == without_stereo(Chem.MolFromSmiles(smiles))


def test_the_molecules_above_cover_the_vocabulary():
    assert {i for ids in ONE_OF_EACH.values() for i in ids} == set(range(28))


# Graphs written by hand


def test_ethanol_is_the_graph_written_by_hand():
    graph = molecule_graph("CCO", -0.25)
    assert graph.x.tolist() == [C, C, O]
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert graph.edge_attr.tolist() == [1, 1, 1, 1]
    assert graph.edge_type is graph.edge_attr
    assert graph.y.tolist() == [[-0.25]]
    assert graph.smiles == "CCO"
    dtypes = [graph[key].dtype for key in ("x", "edge_index", "edge_attr", "y")]
    assert dtypes == [torch.long, torch.long, torch.long, torch.float]


def test_benzonitrile_is_the_graph_written_by_hand():
    graph = molecule_graph("N#Cc1ccccc1")
    assert graph.x.tolist() == [N, C, C, C, C, C, C, C]
    bonds = [(0, 1, 3), (1, 2, 1), (2, 3, 2), (3, 4, 1), (4, 5, 2), (5, 6, 1), (6, 7, 2), (2, 7, 1)]
    # A ring has two Kekulé structures; both describe the molecule.
    other = [(0, 1, 3), (1, 2, 1), (2, 3, 1), (3, 4, 2), (4, 5, 1), (5, 6, 2), (6, 7, 1), (2, 7, 2)]
    assert edges(graph) in (both_directions(bonds), both_directions(other))
    assert "y" not in graph


def test_n_methylpyridinium_has_a_charged_nitrogen_without_hydrogen():
    graph = molecule_graph("C[n+]1ccccc1")
    assert [ATOM_TYPES[i] for i in graph.x] == ["C", "N +", "C", "C", "C", "C", "C"]
    at_nitrogen = sorted(order for source, _, order in edges(graph) if source == 1)
    assert at_nitrogen == [1, 1, 2]


def test_the_hydrogen_of_pyrrole_is_no_longer_explicit_after_kekulising():
    graph = molecule_graph("c1cc[nH]c1")
    assert graph.x.tolist() == [C, C, C, N, C]
    at_nitrogen = [order for source, _, order in edges(graph) if source == 3]
    assert at_nitrogen == [1, 1]


def test_the_two_directions_of_a_bond_stand_next_to_each_other():
    graph = molecule_graph("CC(C)(C#N)c1ccncc1")
    source, target = graph.edge_index
    assert torch.equal(source[::2], target[1::2])
    assert torch.equal(target[::2], source[1::2])
    assert torch.equal(graph.edge_attr[::2], graph.edge_attr[1::2])


def test_a_molecule_of_one_atom_has_no_edge():
    graph = molecule_graph("C", 1.0)
    assert graph.x.tolist() == [C]
    assert graph.edge_index.shape == (2, 0)
    assert graph.edge_index.dtype == graph.edge_attr.dtype == torch.long
    assert graph.edge_attr.shape == (0,)


def test_unconnected_parts_stay_unconnected():
    assert edges(molecule_graph("CO.CF")) == [(0, 1, 1), (1, 0, 1), (2, 3, 1), (3, 2, 1)]


# Molecules that cannot be a graph


@pytest.mark.parametrize("smiles", ["C1CC", "C(C)(C)(C)(C)C", "c1cccc1", "no molecule", ""])
def test_unreadable_smiles_are_refused(smiles):
    with pytest.raises(ValueError, match="unreadable SMILES") as caught:
        molecule_graph(smiles)
    assert repr(smiles) in str(caught.value)


@pytest.mark.parametrize(
    ("smiles", "atom", "name"),
    [
        ("CC[Si](C)C", 2, "Si"),
        ("CC(=[NH])C", 2, "N H1"),
        ("[NH4+]", 0, "N H4 +"),
        ("C[O+2]", 1, "O +2"),
        ("C[C-2]", 1, "C -2"),
        ("*C", 0, "*"),
    ],
)
def test_an_atom_outside_the_vocabulary_is_named_with_the_vocabulary(smiles, atom, name):
    with pytest.raises(ValueError, match="28 known types") as caught:
        molecule_graph(smiles)
    message = str(caught.value)
    assert f"atom {atom} of {smiles!r} has the type {name!r}" in message
    assert message.endswith(", ".join(ATOM_TYPES))


@pytest.mark.parametrize(
    ("smiles", "bond", "name"),
    [("CN->S", 1, "DATIVE"), ("C$C", 0, "QUADRUPLE"), ("CC~C", 1, "UNSPECIFIED")],
)
def test_a_bond_outside_the_vocabulary_is_named(smiles, bond, name):
    with pytest.raises(ValueError, match="expected single, double or triple") as caught:
        molecule_graph(smiles)
    assert f"bond {bond} of {smiles!r} has the type {name}" in str(caught.value)


# Graphs back to molecules


def test_bundled_molecules_survive_the_way_to_a_graph_and_back(moses):
    for graph in moses.test[:200]:
        molecule = to_molecule(graph)
        assert without_stereo(molecule) == without_stereo(Chem.MolFromSmiles(graph.smiles))


def test_zinc_molecules_with_their_charges_survive_the_way_to_a_graph_and_back(zinc):
    charged = [graph for graph in zinc.test if (graph.x > ATOM_TYPES.index("Cl")).any()]
    assert len(charged) > 200
    for graph in charged[:200]:
        molecule = to_molecule(graph)
        assert without_stereo(molecule) == without_stereo(Chem.MolFromSmiles(graph.smiles))


def test_an_atom_of_the_molecule_keeps_its_index():
    molecule = to_molecule(molecule_graph("FC(Cl)C#N"))
    assert [atom.GetSymbol() for atom in molecule.GetAtoms()] == ["F", "C", "Cl", "C", "N"]
    assert molecule.GetBondBetweenAtoms(3, 4).GetBondType() == Chem.BondType.TRIPLE
    assert molecule.GetBondBetweenAtoms(1, 3).GetBondType() == Chem.BondType.SINGLE
    assert molecule.GetBondBetweenAtoms(0, 2) is None


def graph_of(x, bonds):
    """A graph from type ids and bonds (source, target, order)."""
    triples = torch.tensor(both_directions(bonds), dtype=torch.long).reshape(-1, 3)
    return Data(x=torch.tensor(x), edge_index=triples[:, :2].t(), edge_attr=triples[:, 2])


@pytest.mark.parametrize(
    ("x", "bonds", "message"),
    [
        ([C, F], [(0, 1, 2)], "type ids of the graph are not a molecule"),  # two bonds at F
        ([C, 28], [(0, 1, 1)], "atom type id 28: expected 0 to 27"),
        ([C, -1], [(0, 1, 1)], "atom type id -1: expected 0 to 27"),
        ([C, C], [(0, 1, 4)], "bond type id 4: expected one of 1, 2, 3"),
        ([C, C], [(0, 1, 0)], "bond type id 0: expected one of 1, 2, 3"),
    ],
)
def test_ids_that_describe_no_molecule_are_refused(x, bonds, message):
    with pytest.raises(ValueError, match=message):
        to_molecule(graph_of(x, bonds))


# The target


@pytest.mark.parametrize(
    ("smiles", "logp", "accessibility", "excess"),
    [
        ("CCO", -0.0014, 1.9802570386, 0),
        ("c1ccccc1", 1.6866, 1.0, 0),
        ("C1CCCCCC1", 2.7307, 1.0, 1),
        ("C1CCCCCCC1", 3.1208, 1.0, 2),
        # Adamantane: its smallest rings have six atoms, networkx's cycle basis one of eight.
        ("C1C2CC3CC1CC(C2)C3", 2.8326, 3.0585639408, 2),
    ],
)
def test_the_terms_of_the_target_by_hand(smiles, logp, accessibility, excess):
    assert logp_terms(smiles) == pytest.approx((logp, accessibility, excess), abs=1e-8)
    expected = 0.6976317947894198 * logp - 1.198167599821654 * accessibility
    expected += 2.1118299908846003 - 3.4751391457451137 * excess
    assert penalised_logp(smiles) == pytest.approx(expected, abs=1e-8)


def test_the_target_is_the_benchmark_own():
    path = NOT_BUNDLED / "zinc" / "official_y_checked.csv"
    if not path.is_file():
        pytest.skip(f"the targets that the benchmark has are not at {path}")
    table = pd.read_csv(path)
    molecules = pd.read_csv(path.with_name("zinc12k_official.csv.gz")).groupby("split")["smiles"]
    for split, rows in table.groupby("split"):
        smiles = molecules.get_group(split).to_numpy()[rows["row"]]
        found = [penalised_logp(text) for text in smiles]
        # float32 has some seven digits.
        assert found == pytest.approx(rows["y_official_float32"].tolist(), rel=1e-7, abs=2e-7)
    assert len(table) == 148


def test_the_target_of_bundled_molecules_is_the_one_of_their_table(moses):
    """It has rounded constants and the rings of networkx's own root, as data/README.md says."""
    sample = moses.train[::100] + moses.val[::20] + moses.test[::20]
    for graph in sample:
        logp, accessibility, excess = logp_terms(graph.smiles, root=None)
        expected = (logp - 2.4570953396190123) / 1.434324401111988
        expected += (-accessibility + 3.0525811293166134) / 0.8335207024513095
        expected += (-excess + 0.0485696876403053) / 0.2860212110245455
        assert graph.y.item() == pytest.approx(expected, abs=1e-6), graph.smiles


def test_the_target_of_an_unreadable_molecule_is_an_error():
    with pytest.raises(ValueError, match="unreadable SMILES 'C1CC'"):
        penalised_logp("C1CC")


# The data sets


def test_moses_has_its_exact_counts(moses):
    assert counts(moses.train) == (10_000, 216_190, 463_906, [0, 335_112, 127_244, 1_550])
    assert counts(moses.val) == (1_000, 21_737, 46_622, [0, 33_570, 12_898, 154])
    assert counts(moses.test) == (1_000, 21_518, 46_104, [0, 33_262, 12_692, 150])


def test_zinc_has_its_exact_counts(zinc):
    assert counts(zinc.train) == (10_000, 231_664, 498_558, [0, 370_120, 127_096, 1_342])
    assert counts(zinc.test) == (1_000, 23_117, 49_720, [0, 37_050, 12_542, 128])
    assert (zinc.train[0].num_nodes, zinc.train[0].num_edges, len(zinc.val)) == (29, 64, 1_000)
    y = torch.cat([graph.y for graph in zinc.train])
    assert (y.mean().item(), y.std().item()) == pytest.approx((0.0153, 2.0109), abs=1e-4)


def test_every_graph_is_well_formed(moses):
    assert (moses.description.num_node_types, moses.description.num_edge_types) == (28, 4)
    assert moses.description.edge_types == {1: "single", 2: "double", 3: "triple"}
    for graph in moses.val + moses.test:
        source, target = graph.edge_index
        bonds = graph.edge_attr
        assert graph.x.shape == (graph.num_nodes,) and graph.y.shape == (1, 1)
        assert 0 <= graph.x.min() <= graph.x.max() < 28
        assert 1 <= bonds.min() <= bonds.max() <= 3
        assert torch.equal(graph.edge_type, bonds)
        assert 0 <= graph.edge_index.min() <= graph.edge_index.max() < graph.num_nodes
        assert not (source == target).any()
        forward = (source * graph.num_nodes + target) * 4 + bonds
        backward = (target * graph.num_nodes + source) * 4 + bonds
        assert torch.equal(forward.sort().values, backward.sort().values)
        assert len(forward.unique()) == len(forward)


def test_rows_go_to_their_split_in_the_order_of_the_table(moses):
    rows = pd.read_csv(BUNDLED / "molecules" / "moses12k.csv.gz")
    for split in SPLITS:
        expected = rows[rows["split"] == split]
        graphs = getattr(moses, split)
        assert [graph.smiles for graph in graphs] == expected["smiles"].tolist()
        y = torch.cat([graph.y for graph in graphs]).flatten()
        assert torch.equal(y, torch.tensor(expected["y"].to_numpy(), dtype=torch.float))


def test_no_bundled_molecule_is_in_two_splits(moses):
    molecules = [graph.smiles for split in SPLITS for graph in getattr(moses, split)]
    assert len(set(molecules)) == len(molecules) == 12_000


def test_the_substitute_has_the_title_that_tracked_tables_were_made_with():
    description = DESCRIPTIONS["zinc-substitute"]
    assert description.title == "ZINC-12k, substituted training split"
    assert any("training split is a substitute" in text for text in description.deviations)
    assert any("stand-in for ZINC" in text for text in DESCRIPTIONS["moses"].deviations)


# SMILES tables


def test_a_table_of_ones_own_is_read(table):
    splits = load_table(table)
    assert [[graph.smiles for graph in getattr(splits, split)] for split in SPLITS] == [
        ["CCO", "C[NH3+]"],
        ["N#Cc1ccccc1"],
        ["c1ccccc1"],
    ]
    assert [graph.y.item() for graph in splits.train] == [0.5, 2.0]
    assert splits.description.source == str(table)
    assert splits.description.name == "table.csv"


def test_further_columns_their_order_and_compression_do_not_matter(table, tmp_path):
    rows = pd.read_csv(table, dtype=str)
    other = tmp_path / "other.csv.gz"
    rows.assign(id=range(len(rows)))[["id", "y", "smiles", "split"]].to_csv(other, index=False)
    assert other.read_bytes().startswith(b"\x1f\x8b")
    for split in SPLITS:
        assert_same(getattr(load_table(other), split), getattr(load_table(table), split))


def test_the_index_of_a_table_is_the_line_in_the_file(tmp_path):
    path = write(tmp_path / "t.csv", "split,smiles,y\n\ntrain,C,1\n\n\nval,N,2\ntest,O,3\n\n")
    table = read_table(path)
    assert table["smiles"].to_dict() == {3: "C", 6: "N", 7: "O"}
    assert table["y"].to_dict() == {3: 1.0, 6: 2.0, 7: 3.0}
    assert table["y"].dtype == float  # though the numbers are whole


BAD_TABLES = {
    "empty file": ("", "the table has no rows"),
    "blank lines only": ("split,smiles,y\n\n\n", "the table has no rows"),
    "no column y": (
        "split,smiles\ntrain,C\n",
        "missing column y; expected split, smiles, y, found",
    ),
    "other separator": ("split;smiles;y\ntrain;C;1\n", "missing column split, smiles, y"),
    "split": ("split,smiles,y\ntrain,C,1\ndev,C,1\n", "line 3: unknown split 'dev'; .* train, val"),
    "word": ("split,smiles,y\ntrain,C,1\ntrain,C,one\n", "line 3: the target y .* got 'one'"),
    "empty target": ("split,smiles,y\ntrain,C,\n", "line 2: the target y must be a finite number"),
    "cut line": ("split,smiles,y\ntrain,C,1\ntrain,C\n", "line 3: the target y must be a finite"),
    "inf": ("split,smiles,y\ntrain,C,1\nval,C,-inf\n", "line 3: the target y .* got '-inf'"),
    "smiles": ("split,smiles,y\ntrain,C,1\ntrain,C1C,1\n", "line 3: unreadable SMILES 'C1C'"),
    "text that pandas takes for a missing value": (
        "split,smiles,y\ntrain,NA,1\n",
        "line 2: unreadable SMILES 'NA'",
    ),
    "no smiles": ("split,smiles,y\ntrain,,1\n", "line 2: unreadable SMILES ''"),
    "smiles after a blank line": ("split,smiles,y\n\ntrain,C1C,1\n", "line 3: unreadable SMILES"),
    "atom": ("split,smiles,y\ntrain,[Si],1\n", "line 2: atom 0 of .* has the type 'Si'"),
    "bond": ("split,smiles,y\ntrain,CN->S,1\n", "line 2: bond 1 of 'CN->S' has the type DATIVE"),
    "too many fields": ("split,smiles,y\ntrain,C,1\ntrain,C,1,2\n", "expected a CSV table"),
    "not text": (b"\x89PNG\r\n\x1a\n\xff\xfe\x00\x80", "expected a CSV table, could not read it"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_refused_with_its_file_and_line(case, tmp_path, fresh_cache):
    content, message = BAD_TABLES[case]
    path = write(tmp_path / "bad.csv", content)
    with pytest.raises(ValueError, match=message) as caught:
        load_table(path)
    assert str(caught.value).startswith(str(path))
    assert not fresh_cache.exists(), "a bad table was cached"


@pytest.mark.parametrize(
    "content",
    [TABLE.encode(), gzip.compress(TABLE.encode())[:-12], gzip.compress(b"")[:-9] + b"\xff" * 40],
    ids=["not compressed", "cut", "damaged"],
)
def test_a_bad_compressed_table_is_refused(content, tmp_path):
    path = write(tmp_path / "bad.csv.gz", content)
    with pytest.raises(ValueError, match="expected a CSV table, could not read it"):
        load_table(path)


def test_a_table_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no SMILES table at .*absent\.csv"):
        load_table(tmp_path / "absent.csv")


# Where data sets are looked for


def test_an_unknown_data_set_is_refused_with_the_known_names():
    with pytest.raises(
        ValueError, match="unknown data set 'qm9'; known: citation, citeseer, cora, moses, "
    ):
        load("qm9")


def test_a_changed_byte_is_refused_with_both_checksums(tmp_path):
    path = tmp_path / "molecules" / "moses12k.csv.gz"
    content = bytearray((BUNDLED / "molecules" / "moses12k.csv.gz").read_bytes())
    expected = hashlib.sha256(content).hexdigest()
    content[len(content) // 2] ^= 1
    write(path, bytes(content))
    with pytest.raises(ValueError, match="sha256") as caught:
        load("moses", root=tmp_path)
    found = hashlib.sha256(content).hexdigest()
    assert f"{path}: expected sha256 {expected}, found {found}" in str(caught.value)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders for the argument, MAPKG_DATA and the cache, each with a damaged moses.

    A damaged file is refused by its path, so the error says which place was taken.
    """
    monkeypatch.setenv("MAPKG_DATA", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders = {
        "argument": tmp_path / "argument",
        "named": tmp_path / "named",
        "cache": tmp_path / "cache" / "mapkg",
    }
    for folder in folders.values():
        write(folder / "molecules" / "moses12k.csv.gz", b"damaged")
    return folders


def place_taken(**arguments):
    """The file that ``load`` takes, when it is a damaged one."""
    with pytest.raises(ValueError, match="sha256") as caught:
        load("moses", **arguments)
    return str(caught.value).partition(": ")[0]


def test_places_are_looked_at_in_turn(places, tmp_path, monkeypatch, moses, cache):
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in (places["argument"], "~/argument"):
        assert place_taken(root=root).startswith(str(places["argument"]))
    shutil.rmtree(places["argument"])
    with pytest.raises(FileNotFoundError) as caught:  # it is the only place looked at
        load("moses", root=places["argument"])
    assert str(places["argument"]) in str(caught.value)
    assert str(places["named"]) not in str(caught.value)

    for named in (str(places["named"]), "~/named"):
        monkeypatch.setenv("MAPKG_DATA", named)
        assert place_taken().startswith(str(places["named"]))
    shutil.rmtree(places["named"])
    assert place_taken().startswith(str(places["cache"]))
    monkeypatch.setenv("MAPKG_DATA", "")  # is no place
    assert place_taken().startswith(str(places["cache"]))
    shutil.rmtree(places["cache"])
    # The graphs that are already read: which file is taken is all that is of interest.
    shutil.copytree(cache / "graphs", places["cache"] / "graphs")
    assert_same(load("moses").test, moses.test)


ABSENT = {
    "zinc": ("zinc/zinc12k_official.csv.gz", "python -c \"import studies.data; .*load\\('zinc'\\)"),
    "zinc-substitute": ("zinc/zinc12k.csv.gz", "tracked results of ZINC were made with it"),
    "moses": ("molecules/moses12k.csv.gz", "comes with the repository as data/molecules/moses12k"),
    "tox21": ("tox21/raw/tox21.csv", "MAPKG_DATA .*load\\('tox21'\\)"),
    "proteins": ("TUDataset/PROTEINS/raw", "download=False.*load\\('proteins'\\)"),
    "cora": ("Planetoid/Cora/raw", "load\\('cora'\\)"),
    "pubmed-missing": ("Planetoid-missing100/PubMed/raw", "not fetched here"),
}


@pytest.mark.parametrize("name", ABSENT)
def test_an_absent_data_set_is_an_error_that_says_what_would_help(name, tmp_path, capsys):
    place, advice = ABSENT[name]
    with pytest.raises(FileNotFoundError, match=advice) as caught:
        load(name, root=tmp_path, download=False)
    assert f"data set {name!r} not found; looked for {tmp_path / place}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == "", "a download was tried"


# The cache of graphs


def only_entry(folder):
    """The one file of a graph cache; nothing temporary lies beside it."""
    (entry,) = (folder / "graphs").iterdir()
    assert entry.suffix == ".pt"
    return entry


def all_graphs(splits):
    return [graph for split in SPLITS for graph in getattr(splits, split)]


def test_a_second_load_gives_the_first_exactly(table, fresh_cache):
    first = load_table(table)
    entry = only_entry(fresh_cache)
    written = entry.stat().st_mtime_ns
    second = load_table(table)
    assert_same(all_graphs(second), all_graphs(first))
    assert only_entry(fresh_cache).stat().st_mtime_ns == written, "built again"


def test_a_cached_graph_has_every_field_whatever_its_kind_and_size(fresh_cache, table):
    def build():
        assert not (fresh_cache / "graphs").exists(), "built again"
        return [
            Data(
                x=torch.arange(3 * nodes).reshape(nodes, 3),
                edge_index=torch.arange(2 * edges).reshape(2, edges),
                edge_attr=torch.rand(edges, 2),
                y=torch.tensor([[nodes, torch.nan]]),
                text=text,
            )
            for nodes, edges, text in [
                (2, 3, "two\nlines"),
                (0, 0, ""),
                (1, 4, "Kekulé"),
                (5, 0, ""),
            ]
        ]

    first = cached_graphs([table], __file__, build)
    second = cached_graphs([table], __file__, build)
    assert len(second) == len(first) == 4
    for a, b in zip(first, second, strict=True):
        assert sorted(a.keys()) == sorted(b.keys()) == ["edge_attr", "edge_index", "text", "x", "y"]
        assert a.text == b.text
        for key in ("x", "edge_index", "edge_attr"):
            assert a[key].dtype == b[key].dtype
            assert torch.equal(a[key], b[key])
        assert torch.equal(a.y.nan_to_num(-1), b.y.nan_to_num(-1))


def test_other_content_and_other_code_are_other_entries(tmp_path, table, fresh_cache):
    def graphs(value):
        return lambda: [Data(x=torch.tensor([value]))]

    code = write(tmp_path / "code.py", "first")
    assert cached_graphs([table], code, graphs(1))[0].x.item() == 1
    assert cached_graphs([table, code], code, graphs(2))[0].x.item() == 2
    write(code, "second")
    assert cached_graphs([table], code, graphs(3))[0].x.item() == 3
    write(table, TABLE.replace("CCO", "CCN"))
    assert cached_graphs([table], code, graphs(4))[0].x.item() == 4
    copy = Path(shutil.copy(table, table.with_name("copy.csv")))
    assert cached_graphs([copy], code, None)[0].x.item() == 4, "a copy shares its entry"


DAMAGES = {
    "a byte in the middle": lambda raw: flipped(raw, len(raw) // 2),
    "cut by a byte": lambda raw: raw[:-1],
    "cut inside the checksum": lambda raw: raw[:10],
    "empty": lambda raw: b"",
}


def flipped(raw, index):
    return raw[:index] + bytes([raw[index] ^ 1]) + raw[index + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_built_again(damage, table, fresh_cache):
    first = all_graphs(load_table(table))
    entry = only_entry(fresh_cache)
    whole = entry.read_bytes()
    entry.write_bytes(DAMAGES[damage](whole))
    assert_same(all_graphs(load_table(table)), first)
    assert only_entry(fresh_cache).read_bytes() == whole


def test_a_cache_folder_that_cannot_be_written_only_warns(table, tmp_path, monkeypatch):
    expected = all_graphs(load_table(table))
    # A file where the folder should be: unlike a read-only folder it stops root too.
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file", "")))
    with pytest.warns(UserWarning, match="processed graphs were not cached at .*file") as caught:
        splits = load_table(table)
    assert len(caught) == 1
    assert_same(all_graphs(splits), expected)


# The benchmark as PyG fetches it

BENCHMARK = {
    "train": {"CCO": -0.5, "C[C@H](F)C#N": 1.25, "c1ccccc1C(=O)[O-]": 0.75, "C[NH3+]": 2.0},
    "val": {"C[n+]1ccccc1": -3.5, "O=S(=O)(N)c1ccsc1": 0.125},
    "test": {"N#Cc1ccc(Br)cc1": 0.0, "CC(C)=C": -1.0, "C[N+](=O)[O-]": 0.5},
}
CHOSEN = {"train": [3, 0, 2], "val": [0, 1], "test": [2, 1]}
"""Molecules of each file that the 12k subset takes, in its order."""


def benchmark_molecule(smiles, y):
    """A molecule as the benchmark's pickles hold it; ids are written by our own reader."""
    graph = molecule_graph(smiles)
    bond_type = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.long)
    bond_type[graph.edge_index[0], graph.edge_index[1]] = graph.edge_attr
    return {
        "num_atom": graph.num_nodes,
        "atom_type": graph.x,
        "bond_type": bond_type,
        "logP_SA_cycle_normalized": torch.tensor([y]),
    }


@pytest.fixture
def benchmark(tmp_path, fresh_cache):
    """A data root with the raw files of PyG's ZINC."""
    for split, molecules in BENCHMARK.items():
        content = [benchmark_molecule(smiles, y) for smiles, y in molecules.items()]
        write(tmp_path / "ZINC" / "raw" / f"{split}.pickle", pickle.dumps(content))
        indices = ",".join(map(str, CHOSEN[split]))
        write(tmp_path / "ZINC" / "raw" / f"{split}.index", f"{indices}\n")
    return tmp_path


def check_benchmark(splits):
    for split in SPLITS:
        molecules = list(BENCHMARK[split].items())
        expected = [molecule_graph(*molecules[i]) for i in CHOSEN[split]]
        found = getattr(splits, split)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.y, b.y)
            assert edges(a) == edges(b)
            assert a.edge_index.dtype == a.edge_attr.dtype == torch.long
            assert torch.equal(a.edge_type, a.edge_attr)
            parsed = Chem.MolFromSmiles(b.smiles)
            assert a.smiles == without_stereo(parsed)


def test_the_benchmark_files_give_the_graphs_of_their_molecules(benchmark):
    splits = load("zinc", root=benchmark, download=False)
    check_benchmark(splits)
    assert splits.description.title == "ZINC-12k"
    assert "carry no SMILES" in splits.description.deviations[0]
    check_benchmark(load("zinc", root=benchmark, download=False))  # from what was kept


def test_the_benchmark_is_fetched_and_kept(benchmark, tmp_path, fresh_cache, monkeypatch):
    """As PyG's class does, from a folder in place of the network."""
    shutil.make_archive(tmp_path / "molecules", "zip", benchmark / "ZINC", "raw")
    with zipfile.ZipFile(tmp_path / "molecules.zip", "a") as archive:
        for path in (benchmark / "ZINC" / "raw").glob("*.pickle"):
            archive.write(path, f"molecules/{path.name}")
    monkeypatch.setattr(ZINC, "url", (tmp_path / "molecules.zip").as_uri())
    monkeypatch.setattr(ZINC, "split_url", (benchmark / "ZINC" / "raw").as_uri() + "/{}.index")
    check_benchmark(load("zinc", root=tmp_path / "nothing"))
    assert len(list((fresh_cache / "ZINC" / "raw").iterdir())) == 6


def test_the_table_is_preferred_to_the_benchmark_files(benchmark):
    write(benchmark / "zinc" / "zinc12k_official.csv.gz", b"damaged")
    with pytest.raises(ValueError, match=r"zinc12k_official.csv.gz: expected sha256"):
        load("zinc", root=benchmark, download=False)


class Touch:
    """Unpickled without care, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Storage:
    """Goes through the function that unpickles a tensor's storage."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


@pytest.mark.parametrize("is_in_storage", [False, True])
def test_a_pickle_with_code_is_refused_and_does_not_run(is_in_storage, benchmark, tmp_path):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Touch(marker)))
    assert marker.is_file()
    marker.unlink()
    torch.save(Touch(marker), tmp_path / "content.pt")
    evil = Storage((tmp_path / "content.pt").read_bytes()) if is_in_storage else Touch(marker)
    content = [benchmark_molecule(*item) for item in BENCHMARK["val"].items()]
    content[0]["num_atom"] = evil
    write(benchmark / "ZINC" / "raw" / "val.pickle", pickle.dumps(content))
    with pytest.raises(ValueError, match=r"val\.pickle: not the benchmark's file, or damaged"):
        load("zinc", root=benchmark, download=False)
    assert not marker.exists()


WRONG_MOLECULE = benchmark_molecule("CCO", 0.0) | {"atom_type": torch.tensor([0, 0, 28])}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("val.pickle", b"", "val.pickle: not the benchmark's file, or damaged"),
        ("val.pickle", b"no pickle at all", "val.pickle: not the benchmark's file, or damaged"),
        ("val.pickle", pickle.dumps([WRONG_MOLECULE] * 2), "atom type id 28"),
        ("test.index", "2,3", "test.pickle: not the benchmark's file, or damaged"),
    ],
)
def test_a_bad_benchmark_file_is_refused(benchmark, name, content, message):
    write(benchmark / "ZINC" / "raw" / name, content)
    with pytest.raises(ValueError, match=message):
        load("zinc", root=benchmark, download=False)
    (benchmark / "ZINC" / "raw" / name).unlink()
    with pytest.raises(FileNotFoundError, match="data set 'zinc' not found"):
        load("zinc", root=benchmark, download=False)
