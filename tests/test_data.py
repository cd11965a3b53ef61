"""Molecules as graphs, SMILES tables, and data sets looked for, fetched and cached."""

import bz2
import gzip
import hashlib
import io
import lzma
import pickle
import re
import shutil
import threading
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import NOT_BUNDLED
from rdkit import Chem
from torch_geometric.data import Data
from torch_geometric.datasets import ZINC

from mapkg.models import build
from studies.bond_changes import shuffle_types
from studies.data import (
    ATOM_TYPES,
    BUNDLED,
    SPLITS,
    directions,
    kekule_forms,
    load,
    load_table,
    molecule_graph,
    read_smiles,
    to_molecule,
)
from studies.data.molecules import (
    is_kekulized_otherwise,
    logp_terms,
    penalized_logp,
    warn_of_types,
)
from studies.data.sets import SHA256, cached_graphs, read_url, root_with, user_cache
from studies.emergence import fit_to_data
from studies.explanations import bond_importance
from studies.files import versions, warn_of_another_rdkit
from studies.observation import bond_ratios
from studies.published import CONFIGS

pytestmark = pytest.mark.usefixtures("cache")

MOSES = "molecules/moses12k.csv.gz"

TABLE = """split,smiles,y
train,CCO,0.5
val,N#Cc1ccccc1,-1.25
train,C[NH3+],2
test,c1ccccc1,0
"""


@pytest.fixture(scope="module")
def moses(cache):
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
    return write(tmp_path / "table.csv", TABLE)


def write(path, content):
    """A file with a content, and the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def edges(graph):
    """Directed edges with their bond type, in no order."""
    return sorted(zip(*graph.edge_index.tolist(), graph.edge_attr.tolist(), strict=True))


def both_directions(bonds):
    """What ``edges`` gives for hand-written bonds, each written once."""
    return sorted([*bonds, *((target, source, order) for source, target, order in bonds)])


def without_stereo(molecule):
    """Canonical SMILES without stereochemistry."""
    return Chem.MolToSmiles(molecule, isomericSmiles=False)


def all_graphs(splits):
    return [graph for split in SPLITS for graph in getattr(splits, split)]


def assert_same(found, expected):
    """Graphs are equal to the bit, in every field and in their order."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert sorted(a.keys()) == sorted(b.keys())
        for key in a.keys():  # noqa: SIM118, not a dict
            if isinstance(a[key], str):
                assert a[key] == b[key]
            else:
                assert a[key].dtype == b[key].dtype
                assert torch.equal(a[key].nan_to_num(-1), b[key].nan_to_num(-1)), key


# Molecules

# One molecule for each of the 28 types: SMILES, and the ids of its atoms in its order.
ONE_OF_EACH = {
    "CC(C)=O": [0, 0, 0, 1],
    "CN(C)C": [0, 2, 0, 0],
    "CF": [0, 3],
    "C[C@H](F)Cl": [0, 4, 3, 6],  # a stereocenter carries its hydrogen
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
    assert {i for ids in ONE_OF_EACH.values() for i in ids} == set(range(28))


def test_ethanol_and_benzonitrile_are_the_graphs_written_by_hand():
    graph = molecule_graph("CCO", -0.25)
    assert graph.x.tolist() == [0, 0, 1]
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert graph.edge_attr.tolist() == graph.edge_type.tolist() == [1, 1, 1, 1]
    assert graph.y.tolist() == [[-0.25]]
    assert graph.smiles == "CCO"
    dtypes = [graph[key].dtype for key in ("x", "edge_index", "edge_attr", "y")]
    assert dtypes == [torch.long, torch.long, torch.long, torch.float]
    graph = molecule_graph("N#Cc1ccccc1")
    assert graph.x.tolist() == [2, 0, 0, 0, 0, 0, 0, 0] and "y" not in graph
    ring = [(2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (2, 7)]
    forms = [[(*ends, 1 + (i + j) % 2) for i, ends in enumerate(ring)] for j in (0, 1)]
    assert edges(graph) in [both_directions([(0, 1, 3), (1, 2, 1), *form]) for form in forms]


def test_molecules_of_one_atom_and_of_two_parts():
    graph = molecule_graph("C", 1.0)
    assert graph.edge_index.shape == (2, 0) and graph.edge_attr.shape == (0,)
    assert graph.edge_index.dtype == graph.edge_attr.dtype == torch.long
    assert edges(molecule_graph("CO.CF")) == [(0, 1, 1), (1, 0, 1), (2, 3, 1), (3, 2, 1)]


@pytest.mark.parametrize(
    ("smiles", "types"),
    [
        # No explicit hydrogen is left where a ring is kekulized.
        ("c1cc[nH]c1", "C,C,C,N,C"),
        ("C[n+]1ccccc1", "C,N +,C,C,C,C,C"),
        # Explicit hydrogens that make no known type are left out.
        ("[CH3][CH2][OH]", "C,C,O"),
        ("[CH4]", "C"),
        ("C[NH]C", "C,N,C"),
        ("C[SH]", "C,S"),
        # A stereo mark that carries a hydrogen makes another type, one that has none does not.
        ("CC(F)Cl", "C,C,F,Cl"),
        ("C[C@@H](F)Cl", "C,C H1,F,Cl"),
        ("C[C@H](O)N", "C,C H1,O,N"),
        ("C1C[C@H]1N", "C,C,C,N"),  # no stereocenter
        ("C[C@](F)(Cl)Br", "C,C,F,Cl,Br"),
        ("F/C=C/F", "F,C,C,F"),
    ],
)
def test_hydrogens_make_types_as_in_the_benchmark(smiles, types):
    graph = molecule_graph(smiles)
    assert ",".join(ATOM_TYPES[i] for i in graph.x) == types
    plain = molecule_graph(Chem.MolToSmiles(Chem.MolFromSmiles(smiles), canonical=False))
    assert edges(graph) == edges(plain)


@pytest.mark.parametrize(
    ("smiles", "message"),
    [
        *(
            (bad, "unreadable SMILES")
            for bad in ("C1CC", "c1cccc1", "C(C)(C)(C)(C)C", "NA", "", None, 5)
        ),
        ("C[Si](C)(C)C", "atom 1 of .* has the type 'Si', which is not one of the 28 known types"),
        ("[NH4+]", r"atom 0 of .* has the type 'N H4 \+'"),
        ("[Mg+2]", r"the type 'Mg \+2'"),
        ("*C", r"atom 0 of .* has the type '\*'"),
        *((bad, "atom 1 of .* is a radical") for bad in ("C[CH2]", "C[CH]C", "C[N]C", "C[O]")),
        ("CN->S", "bond 1 of .* has the type DATIVE; expected single, double or triple"),
        ("CC~C", "bond 1 of .* has the type UNSPECIFIED"),
    ],
)
def test_what_cannot_be_a_graph_is_refused_by_name(smiles, message):
    with pytest.raises(ValueError, match=message) as caught:
        molecule_graph(smiles)
    assert repr(smiles) in str(caught.value)


@pytest.mark.parametrize(
    ("x", "bonds", "message"),
    [
        ([0, 3], [(0, 1, 2)], "type ids of the graph are not a molecule"),  # two bonds at F
        ([0, 28], [(0, 1, 1)], "atom type id 28: expected 0 to 27"),
        ([0, -1], [(0, 1, 1)], "atom type id -1: expected 0 to 27"),
        ([0, 0], [(0, 1, 0)], "bond type id 0: expected one of 1, 2, 3"),
    ],
)
def test_ids_that_describe_no_molecule_are_refused(x, bonds, message):
    triples = torch.tensor(both_directions(bonds), dtype=torch.long).reshape(-1, 3)
    with pytest.raises(ValueError, match=message):
        to_molecule(Data(x=torch.tensor(x), edge_index=triples[:, :2].t(), edge_attr=triples[:, 2]))


# Edges in any order


def in_order(graph, order):
    """The same graph with its edges in another order."""
    graph = graph.clone()
    graph.edge_index = graph.edge_index[:, order]
    graph.edge_attr = graph.edge_type = graph.edge_attr[order]
    return graph


ORDERS = {
    "as written": lambda graph: torch.arange(graph.num_edges),
    "sorted": lambda graph: (graph.edge_index[0] * graph.num_nodes + graph.edge_index[1]).argsort(),
    "shuffled": lambda graph: torch.randperm(graph.num_edges, generator=torch.manual_seed(0)),
    "halves": lambda graph: torch.arange(graph.num_edges).view(-1, 2).t().flatten(),
}


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_told_of_bonds_is_the_same_in_any_order_of_edges(order, moses):
    plain = molecule_graph("CC(C)(C#N)c1ccncc1")
    graph = in_order(plain, ORDERS[order](plain))
    place = {}
    for edge, ends in enumerate(graph.edge_index.t().tolist()):
        place.setdefault(frozenset(ends), []).append(edge)
    assert directions(graph).t().tolist() == list(place.values())
    molecule = to_molecule(graph)
    pairs = [{b.GetBeginAtomIdx(), b.GetEndAtomIdx()} for b in molecule.GetBonds()]
    assert pairs == list(map(set, place)), "bonds of a drawing are in the same order"
    assert Chem.MolToSmiles(molecule) == Chem.MolToSmiles(to_molecule(plain))

    def by_ends(values, graph):
        ends = graph.edge_index.t().sort(dim=1).values[directions(graph)[0]].tolist()
        return {tuple(pair): value for pair, value in zip(ends, values, strict=True)}

    torch.manual_seed(0)
    config = CONFIGS["GT-ZINC"].replace(hidden_channels=8, heads=2, num_layers=2)
    model = build(fit_to_data(config, moses.description)).eval()
    seen = []
    for each in (plain, graph):
        (ratios,) = bond_ratios(model, [each], heads=2)
        columns = ratios.flatten(0, 1).t().double()
        edges = torch.stack([*each.edge_index, torch.arange(each.num_edges)])
        product = (edges[0] + 1) * (edges[1] + 1) + edges[0] / 100  # one of two is larger
        largest = bond_importance(each, product)
        changed = shuffle_types(replace(moses, train=[each], val=[], test=[]), 0).train[0]
        types = changed.edge_type
        assert torch.equal(*types[directions(each)]), "both directions are changed alike"
        seen.append((by_ends(columns, each), by_ends(largest.tolist(), each), types.bincount()))
    (ratios, largest, types), (of_plain, plain_largest, plain_types) = seen[1], seen[0]
    for pair, value in of_plain.items():
        torch.testing.assert_close(ratios[pair], value, rtol=1e-3, atol=1e-6)
    assert largest == plain_largest and torch.equal(types, plain_types)


@pytest.mark.parametrize("edge_index", [[[0], [1]], [[0, 0], [1, 1]], [[0, 1, 0], [1, 0, 1]]])
def test_a_bond_without_exactly_two_directions_is_refused(edge_index):
    with pytest.raises(ValueError, match="two edges, one in each direction"):
        directions(Data(x=torch.zeros(2), edge_index=torch.tensor(edge_index)))


# Which bonds of a ring are double


@pytest.mark.parametrize(
    ("smiles", "number"),
    [
        # The two of toluene are mirror images, as are two of naphthalene's three, two pairs of
        # anthracene's four and one pair of phenanthrene's five.
        *(("CCO", 1), ("Cc1ccccc1", 1), ("Cc1ccccc1C", 2), ("Cc1cccc(F)c1", 2)),
        *(("c1ccc2ccccc2c1", 2), ("c1ccc2cc3ccccc3cc2c1", 2), ("c1ccc2c(c1)ccc1ccccc12", 4)),
    ],
)
def test_kekule_forms_are_counted_without_those_alike_by_symmetry(smiles, number):
    molecule = Chem.MolFromSmiles(smiles)
    assert kekule_forms(molecule) == number
    assert molecule.GetNumAtoms() == Chem.MolFromSmiles(smiles).GetNumAtoms()


def turned(graph):
    """The same molecule with single and double bonds of its rings of six exchanged."""
    graph, molecule = graph.clone(), to_molecule(graph)
    for edge, (j, i) in enumerate(graph.edge_index.t().tolist()):
        if molecule.GetBondBetweenAtoms(j, i).GetIsAromatic():
            graph.edge_attr[edge] = 3 - graph.edge_attr[edge]
    return graph


def test_other_double_bonds_than_rdkit_chooses_are_noticed_unless_they_are_alike(moses):
    assert not any(map(is_kekulized_otherwise, moses.test[:50]))
    for smiles, expected in [("Cc1ccccc1C", True), ("Cc1cccc(F)c1", True), ("Cc1ccccc1", False)]:
        graph = turned(molecule_graph(smiles))
        for order in ORDERS.values():
            assert is_kekulized_otherwise(in_order(graph, order(graph))) == expected


def test_another_release_of_rdkit_is_told_of_and_the_same_or_none_is_not(tmp_path):
    now = versions()
    with pytest.warns(UserWarning, match=r"RDKit 2025\.9\.6 kekulized, but RDKit 20\d\d.* is at"):
        warn_of_another_rdkit(re.sub(r"rdkit [\d.]+", "rdkit 2025.9.6", now), tmp_path)
    for same in (now, "", "rdkit not installed"):
        warn_of_another_rdkit(same, tmp_path)


# The target


@pytest.mark.parametrize(
    ("smiles", "logp", "accessibility", "excess"),
    [
        ("CCO", -0.0014, 1.9802570386, 0),
        ("C1CCCCCC1", 2.7307, 1.0, 1),
        # Adamantane: its smallest rings have six atoms, networkx's cycle basis one of eight.
        ("C1C2CC3CC1CC(C2)C3", 2.8326, 3.0585639408, 2),
    ],
)
def test_the_terms_of_the_target_by_hand(smiles, logp, accessibility, excess):
    found = logp_terms(Chem.MolFromSmiles(smiles))
    assert found == pytest.approx((logp, accessibility, excess), abs=1e-8)
    expected = 0.6976317947894198 * logp - 1.198167599821654 * accessibility
    expected += 2.1118299908846003 - 3.4751391457451137 * excess
    assert penalized_logp(smiles, as_written=True) == pytest.approx(expected, abs=1e-8)


# Peri-fused (pyrene), bridged, a cage, spiro with a bridge.
@pytest.mark.parametrize(
    "smiles",
    ["c1cc2ccc3cccc4ccc(c1)c2c34", "C1C2CC3CC1CC(C2)C3", "C1CC2CCC1C2", "C1CC2(C1)CC1CCC2C1"],
)
def test_a_molecule_has_one_target_however_its_smiles_is_written(smiles):
    molecule = Chem.MolFromSmiles(smiles)
    written = Chem.MolToRandomSmilesVect(molecule, 20, randomSeed=1)
    assert len({round(penalized_logp(text), 9) for text in written}) == 1
    marked = "Cc1c(Br)ccc(NC(=O)COC(=O)[C@H]2[C@@H]3C[C@@H]4OC(=O)[C@@H]2[C@@H]4C3)c1C"
    plain = without_stereo(Chem.MolFromSmiles(marked))
    assert penalized_logp(marked) == penalized_logp(plain), "stereo marks change no order"
    if smiles.startswith("c1cc2ccc3"):
        assert len({round(penalized_logp(text, as_written=True), 3) for text in written}) > 1


def test_the_target_is_the_benchmark_own():
    path = NOT_BUNDLED / "zinc" / "official_y_checked.csv"
    if not path.is_file():
        pytest.skip(f"the targets that the benchmark has are not at {path}")
    table = pd.read_csv(path)
    molecules = pd.read_csv(path.with_name("zinc12k_official.csv.gz")).groupby("split")["smiles"]
    for split, rows in table.groupby("split"):
        smiles = molecules.get_group(split).to_numpy()[rows["row"]]
        found = [penalized_logp(text, as_written=True) for text in smiles]
        # float32 has some seven digits.
        assert found == pytest.approx(rows["y_official_float32"].tolist(), rel=1e-7, abs=2e-7)
    assert len(table) == 148


def test_the_target_of_bundled_molecules_is_the_one_of_their_table(moses):
    """It has rounded constants and the rings of networkx's own root, as data/README.md says."""
    for graph in moses.train[::200] + moses.test[::40]:
        logp, accessibility, excess = logp_terms(Chem.MolFromSmiles(graph.smiles), root=None)
        expected = (logp - 2.4570953396190123) / 1.434324401111988
        expected += (-accessibility + 3.0525811293166134) / 0.8335207024513095
        expected += (-excess + 0.0485696876403053) / 0.2860212110245455
        assert graph.y.item() == pytest.approx(expected, abs=1e-6), graph.smiles


def test_the_targets_that_depend_on_the_order_of_atoms_are_counted(moses, zinc):
    for splits, number in ((moses, 32), (zinc, 69)):
        assert any(f"of {number} of 12,000" in text for text in splits.description.deviations)
    smiles = "CC(C)N1C2COCC1CN(C(=O)c1cccc(C#N)c1)C2"  # of moses-triple
    molecule = Chem.MolFromSmiles(smiles)
    written = Chem.MolToRandomSmilesVect(molecule, 40, randomSeed=1)
    assert {logp_terms(Chem.MolFromSmiles(text))[2] for text in written} == {0, 2}


# The data sets


def counts(graphs):
    """Graphs, atoms, directed edges, and directed edges per bond type id from 0."""
    bonds = torch.cat([graph.edge_attr for graph in graphs]).bincount(minlength=4).tolist()
    return len(graphs), sum(graph.num_nodes for graph in graphs), sum(bonds), bonds


def test_moses_and_zinc_have_their_exact_counts(moses, zinc):
    assert counts(moses.train) == (10_000, 216_190, 463_906, [0, 335_112, 127_244, 1_550])
    assert counts(moses.val) == (1_000, 21_737, 46_622, [0, 33_570, 12_898, 154])
    assert counts(moses.test) == (1_000, 21_518, 46_104, [0, 33_262, 12_692, 150])
    assert counts(zinc.train) == (10_000, 231_664, 498_558, [0, 370_120, 127_096, 1_342])
    assert counts(zinc.test) == (1_000, 23_117, 49_720, [0, 37_050, 12_542, 128])
    y = torch.cat([graph.y for graph in zinc.train])
    assert (y.mean().item(), y.std().item()) == pytest.approx((0.0153, 2.0109), abs=1e-4)


def test_rows_go_to_their_split_in_the_order_of_the_table(moses):
    rows = pd.read_csv(BUNDLED / MOSES)
    assert rows["smiles"].is_unique
    for split in SPLITS:
        expected, graphs = rows[rows["split"] == split], getattr(moses, split)
        assert [graph.smiles for graph in graphs] == expected["smiles"].tolist()
        y = torch.cat([graph.y for graph in graphs]).flatten()
        assert torch.equal(y, torch.tensor(expected["y"].to_numpy(), dtype=torch.float))


# SMILES tables


def test_further_columns_their_order_blank_lines_and_compression_do_not_matter(table, tmp_path):
    plain = load_table(table)
    assert [graph.y.item() for graph in plain.train] == [0.5, 2.0]
    assert plain.description.source == str(table)
    rows = pd.read_csv(table, dtype=str)
    rows = rows.assign(id=range(len(rows)))[["id", "y", "smiles", "split"]]
    for name in ("other.csv.gz", "other.csv.xz", "other.csv.zip"):
        rows.to_csv(tmp_path / name, index=False)
        assert_same(all_graphs(load_table(tmp_path / name)), all_graphs(plain))
    marked = write(tmp_path / "marked.csv", "\ufeff" + TABLE.replace("\n", "\r\n\r\n"))
    assert_same(all_graphs(load_table(marked)), all_graphs(plain))


HEAD = "split,smiles,y\n"
UNREADABLE = "expected a CSV table, could not read it"


def zipped(*contents):
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for i, content in enumerate(contents):
            archive.writestr(f"{i}.csv", content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message", "suffix"),
    [
        (f"{HEAD}\n\n", "the table has no rows", ""),
        ("", UNREADABLE, ""),
        ("split,smiles\ntrain,C\n", "split, smiles, y once, found y 0 times in split, smiles", ""),
        ("split,smiles,y,y\ntrain,C,1,2\n", "once, found y 2 times in split, smiles, y, y", ""),
        ("smiles,split,smiles,y\nC,train,N,2\n", "found smiles 2 times", ""),
        ("split,split,smiles,y,split\ntrain,val,N,2,test\n", "found split 3 times", ""),
        (
            f"{HEAD}train,C,1\ndev,C,1\n",
            "line 3: split must be one of train, val, test, .*'dev'",
            "",
        ),
        (f"{HEAD}train,C,1\ntrain,C,one\n", "line 3: y must be a finite number .* 'one'", ""),
        (f"{HEAD}train,C,1\ntrain,C\n", "line 3: y must be a finite number .* got ''", ""),
        *(
            (f"{HEAD}train,C,1\nval,C,{y}\n", f"line 3: y must be .* got '{y}'", "")
            for y in ("-inf", "nan", "1e39", "-1e300")  # beyond single precision, too
        ),
        (f"{HEAD}train,NA,1\n", "line 2: unreadable SMILES 'NA'", ""),
        (f"{HEAD}\ntrain,C1C,1\n", "line 3: unreadable SMILES 'C1C'", ""),
        (f"{HEAD},,\ntrain,12,1\n", "line 3: unreadable SMILES '12'", ""),
        (f"{HEAD}train,C,1\ntrain,C,1,2\n", UNREADABLE, ""),
        (b"\x89PNG\r\n\x1a\n\xff\xfe\x00\x80", UNREADABLE, ""),
        (gzip.compress(TABLE.encode())[:-12], UNREADABLE, ".gz"),
        (bz2.compress(TABLE.encode())[:-12], UNREADABLE, ".bz2"),
        (lzma.compress(TABLE.encode())[:-12], UNREADABLE, ".xz"),
        (zipped(TABLE)[:-12], UNREADABLE, ".zip"),
        (zipped(TABLE, TABLE), UNREADABLE, ".zip"),
        (TABLE, UNREADABLE, ".gz"),
        (gzip.compress(TABLE.encode()), UNREADABLE, ".xz"),
        (b"\x28\xb5\x2f\xfd", UNREADABLE, ".zst"),  # its package is missing, or it is cut short
    ],
)
def test_a_bad_table_is_refused_with_its_file_and_line(
    content, message, suffix, tmp_path, fresh_cache
):
    path = write(tmp_path / f"bad.csv{suffix}", content)
    with pytest.raises(ValueError, match=message) as caught:
        load_table(path)
    assert str(caught.value).startswith(str(path))
    assert not fresh_cache.exists(), "a bad table was cached"


def test_a_file_of_smiles_may_have_names_blank_lines_and_a_mark_of_its_encoding(tmp_path):
    path = write(tmp_path / "t.smi", "\ufeffCCO\tethanol\n\nCN methyl amine\n  \nCF\t\n")
    assert [graph.smiles for graph in read_smiles(path)] == ["CCO", "CN", "CF"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("CCO\n\nNA\n", "line 3: unreadable SMILES 'NA'"),
        ("C\n12\n", "line 2: unreadable SMILES '12'"),
        ("CO\n\n\n1.5\tname\n", "line 4: unreadable SMILES '1.5'"),
        ("\r\n\r\nnan\r\n", "line 3: unreadable SMILES 'nan'"),
        ("\n \n", "expected a SMILES per line, found none"),
        (b"\xff\xfe\x00", "expected text with a SMILES per line"),
    ],
)
def test_a_bad_line_of_smiles_is_named(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_smiles(write(tmp_path / "t.smi", content))


def test_atom_types_that_training_lacks_are_told_with_the_number_of_molecules():
    plain, marked = map(molecule_graph, ("CC(F)Cl", "C[C@H](F)Cl"))
    charged, none = map(molecule_graph, ("C[NH3+]", "CCF"))
    with pytest.warns(UserWarning, match="2 of 4 molecules have atom types .* C H1, N H3 +"):
        warn_of_types([marked, plain, none, charged], [plain], "MOSES")
    with pytest.warns(UserWarning, match="1 of 3 molecules have a stereocenter without a mark"):
        warn_of_types([marked, plain, none], [marked], "ZINC")
    warn_of_types([marked, none], [marked], "ZINC")  # nothing to tell


# Where data sets are looked for


def test_places_are_looked_at_in_turn(tmp_path, monkeypatch):
    """A damaged file is refused by its path, so the error says which place was taken."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MAPKG_DATA", "~/named")
    places = [tmp_path / "argument", tmp_path / "named", tmp_path / "cache" / "mapkg"]
    for folder in places:
        write(folder / MOSES, b"damaged")
    digests = [SHA256[MOSES], hashlib.sha256(b"damaged").hexdigest()]
    for place, arguments in zip(places, ({"root": "~/argument"}, {}, {}), strict=True):
        words = "{}/{}: expected sha256 {}, found {}".format(place, MOSES, *digests)
        with pytest.raises(ValueError, match=words):
            load("moses", **arguments)
        shutil.rmtree(place / "molecules")
    with pytest.raises(FileNotFoundError, match=f"looked for {places[0]}/[^,]* It comes with"):
        load("moses", root=places[0])


@pytest.mark.filterwarnings("ignore:no home folder is known")
@pytest.mark.parametrize("named", ["~/nowhere", "/nowhere/data", "nowhere"])
@pytest.mark.parametrize("home", [True, False])
def test_a_misspelt_folder_of_data_is_no_reason_to_look_elsewhere(
    named, home, monkeypatch, request
):
    if not home:
        request.getfixturevalue("homeless")
    monkeypatch.setenv("MAPKG_DATA", named)
    with pytest.raises(FileNotFoundError, match=f"MAPKG_DATA is {named}, which is no folder"):
        load("moses")


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """A container without a HOME and without an entry for the user in the password file."""

    def no_entry(_):
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:no home folder is known")
def test_without_a_home_the_cache_is_a_temporary_folder_with_a_warning(
    homeless, table, tmp_path, monkeypatch
):
    with pytest.warns(UserWarning, match=f"no home folder is known, .* {tmp_path}/temporary/mapkg"):
        first = all_graphs(load_table(table))
    assert only_entry(tmp_path / "temporary" / "mapkg").is_file()
    assert_same(all_graphs(load_table(table)), first)
    assert not (tmp_path / "~").exists()
    for name, place in (("HOME", "home/.cache"), ("XDG_CACHE_HOME", "own")):
        monkeypatch.setenv(name, str(tmp_path / place.removesuffix("/.cache")))
        assert user_cache() == tmp_path / place / "mapkg"


ABSENT = {
    "zinc": ("zinc/zinc12k_official.csv.gz", "python -m studies data zinc"),
    "zinc-substitute": ("zinc/zinc12k.csv.gz", "tracked results of ZINC were made with it"),
    "moses": (MOSES, "comes with the repository as data/molecules/moses12k"),
    "tox21": ("tox21/raw/tox21.csv", "MAPKG_DATA .*studies data tox21"),
    "proteins": ("TUDataset/PROTEINS/raw", "download=False.*studies data proteins"),
    "cora": ("Planetoid/Cora/raw", "studies data cora"),
    "pubmed-missing": ("Planetoid-missing100/PubMed/raw", "not fetched here"),
}


@pytest.mark.parametrize("name", ABSENT)
def test_an_absent_data_set_is_an_error_that_says_what_would_help(name, tmp_path):
    place, advice = ABSENT[name]
    with pytest.raises(FileNotFoundError, match=advice) as caught:
        load(name, root=tmp_path, download=False)
    assert f"data set {name!r} not found; looked for {tmp_path / place}" in str(caught.value)
    with pytest.raises(ValueError, match="unknown data set 'qm9'; known: citation, citeseer, cora"):
        load("qm9")


# Fetched files


def test_the_first_root_that_has_all_files_is_taken(tmp_path):
    roots = [tmp_path / name for name in ("empty", "half", "whole", "later")]
    for root, names in zip(roots, ["", "a", "ab", "ab"], strict=True):
        for name in names:
            write(root / "raw" / name, "")
    assert root_with(roots, ["raw/a", "raw/b"], None) == tmp_path / "whole"
    assert root_with(roots, ["raw/a"], None) == tmp_path / "half"
    assert root_with(roots, ["raw"], None) is None, "a folder is no file"


def test_files_that_are_fetched_are_kept_together_or_not_at_all(tmp_path, fresh_cache):
    with pytest.raises(ValueError, match=f"{MOSES}, as fetched: expected sha256 {SHA256[MOSES]}"):
        root_with([tmp_path], ["new", MOSES], lambda: {"new": b"1", MOSES: b"2"})
    assert root_with([tmp_path], ["new", "other"], lambda: {"new": b"1"}["other"]) is None
    assert not fresh_cache.exists()
    assert root_with([tmp_path], ["a/new"], lambda: {"a/new": b"1"}) == fresh_cache
    assert (fresh_cache / "a" / "new").read_bytes() == b"1"


def test_a_damaged_file_in_the_cache_is_fetched_again_and_elsewhere_an_error(tmp_path, fresh_cache):
    whole = (BUNDLED / MOSES).read_bytes()
    write(fresh_cache / MOSES, whole[:-1])
    assert root_with([fresh_cache], [MOSES], lambda: {MOSES: whole}) == fresh_cache
    assert (fresh_cache / MOSES).read_bytes() == whole
    write(tmp_path / MOSES, whole[:-1])
    with pytest.raises(ValueError, match=f"{tmp_path}/{MOSES}: expected sha256"):
        root_with([tmp_path, fresh_cache], [MOSES], lambda: {MOSES: whole})


@contextmanager
def server(content, stated):
    """Serves a content that it says has a length."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(stated))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/file"
        http.shutdown()


def test_a_url_is_read_to_its_stated_end_in_time_or_not_at_all(fresh_cache, capsys, monkeypatch):
    content = bytes(range(256)) * 1000
    with server(content, len(content)) as url:
        assert read_url(url) == content
        monkeypatch.setattr("studies.data.sets.SECONDS", -1)
        with pytest.raises(TimeoutError, match="not complete after -1 seconds"):
            read_url(url)
        monkeypatch.undo()
    with server(content, len(content) + 1) as url:
        with pytest.raises(IncompleteRead):
            read_url(url)
        assert root_with([], ["file"], lambda: {"file": read_url(url)}) is None
    assert capsys.readouterr().err.startswith("could not fetch file: IncompleteRead")


# The cache of graphs


def only_entry(folder):
    """The one file of a graph cache; nothing temporary lies beside it."""
    (entry,) = (folder / "graphs").iterdir()
    assert entry.suffix == ".pt"
    return entry


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
            for nodes, edges, text in [(2, 3, "two\nlines"), (0, 0, ""), (1, 4, "é"), (5, 0, "")]
        ]

    first, second = (cached_graphs([table], __file__, build) for _ in range(2))
    assert_same(second, first)


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
    assert cached_graphs([copy], code, graphs(5))[0].x.item() == 4, "a copy shares its entry"


DAMAGES = {
    "a byte in the middle": lambda raw: raw[:500] + bytes([raw[500] ^ 1]) + raw[501:],
    "cut by a byte": lambda raw: raw[:-1],
    "cut inside the checksum": lambda raw: raw[:10],
    "whole, but no archive": lambda raw: hashlib.sha256(b"x").digest() + b"x",
}


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
    with pytest.warns(UserWarning, match="processed graphs were not cached at .*file"):
        assert_same(all_graphs(load_table(table)), expected)


# The benchmark as PyG fetches it

BENCHMARK = {
    "train": {"CCO": -0.5, "C[C@H](F)C#N": 1.25, "c1ccccc1C(=O)[O-]": 0.75, "C[NH3+]": 2.0},
    "val": {"C[n+]1ccccc1": -3.5, "O=S(=O)(N)c1ccsc1": 0.125},
    "test": {"N#Cc1ccc(Br)cc1": 0.0, "Cc1ccccc1C": -1.0, "C[N+](=O)[O-]": 0.5},
}
CHOSEN = {"train": [3, 0, 2], "val": [0, 1], "test": [2, 1]}
"""Molecules of each file that the 12k subset takes, in its order."""


def as_pickled(graph, y):
    """A molecule as the benchmark's pickles hold it; ids are written by our own reader."""
    bond_type = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.long)
    bond_type[graph.edge_index[0], graph.edge_index[1]] = graph.edge_attr
    return {
        "num_atom": graph.num_nodes,
        "atom_type": graph.x,
        "bond_type": bond_type,
        "logP_SA_cycle_normalized": torch.tensor([y]),
    }


@pytest.fixture
def benchmark(tmp_path, fresh_cache, monkeypatch):
    """The folder of a small stand-in for the raw files of PyG's ZINC, under a data root."""
    sizes = {}
    for split, molecules in BENCHMARK.items():
        content = [as_pickled(molecule_graph(smiles), y) for smiles, y in molecules.items()]
        write(tmp_path / "ZINC" / "raw" / f"{split}.pickle", pickle.dumps(content))
        indices = ",".join(map(str, CHOSEN[split]))
        write(tmp_path / "ZINC" / "raw" / f"{split}.index", f"{indices}\n")
        sizes[split] = counts([molecule_graph(list(molecules)[i]) for i in CHOSEN[split]])[:3]
    monkeypatch.setattr("studies.data.molecules.ZINC_SIZES", sizes)
    return tmp_path / "ZINC" / "raw"


def read_benchmark(folder):
    return load("zinc", root=folder.parents[1], download=False)


def check_benchmark(splits):
    for split in SPLITS:
        molecules = list(BENCHMARK[split].items())
        expected = [molecule_graph(*molecules[i]) for i in CHOSEN[split]]
        for a, b in zip(getattr(splits, split), expected, strict=True):
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.y, b.y)
            assert edges(a) == edges(b)
            assert torch.equal(a.edge_type, a.edge_attr)
            assert a.smiles == without_stereo(Chem.MolFromSmiles(b.smiles))


def test_the_benchmark_files_give_the_graphs_of_their_molecules(benchmark):
    splits = read_benchmark(benchmark)
    check_benchmark(splits)
    assert any("carry no SMILES" in text for text in splits.description.deviations)
    check_benchmark(read_benchmark(benchmark))  # from what was kept
    content = [as_pickled(molecule_graph(smiles), 9.0) for smiles in BENCHMARK["val"]]
    write(benchmark / "val.pickle", pickle.dumps(content))
    assert [graph.y.item() for graph in read_benchmark(benchmark).val] == [9, 9], "of new raw files"
    write(benchmark.parents[1] / "zinc" / "zinc12k_official.csv.gz", b"damaged")
    with pytest.raises(ValueError, match=r"zinc12k_official.csv.gz: expected sha256"):
        read_benchmark(benchmark)  # the table is preferred


def test_double_bonds_of_another_time_in_the_benchmark_files_are_told(benchmark):
    content = [as_pickled(turned(molecule_graph(s)), y) for s, y in BENCHMARK["test"].items()]
    write(benchmark / "test.pickle", pickle.dumps(content))
    for _ in ("read", "kept"):
        with pytest.warns(UserWarning, match=r"ZINC/raw: in 1 of 2 test molecules other bonds"):
            splits = read_benchmark(benchmark)
        assert "in 1 of 2 test molecules" in splits.description.deviations[-1]


@pytest.mark.parametrize("damage", [None, "cut", "false"])
def test_the_benchmark_is_fetched_and_kept_if_it_is_whole(
    damage, benchmark, tmp_path, fresh_cache, monkeypatch
):
    """As PyG's class does, from a folder in place of the network."""
    with zipfile.ZipFile(tmp_path / "molecules.zip", "w") as archive:
        for path in benchmark.glob("*.pickle"):
            content = pickle.dumps([1]) if damage == "false" else path.read_bytes()
            archive.writestr(f"molecules/{path.name}", content)
    if damage == "cut":
        write(tmp_path / "molecules.zip", (tmp_path / "molecules.zip").read_bytes()[:-30])
    monkeypatch.setattr(ZINC, "url", (tmp_path / "molecules.zip").as_uri())
    monkeypatch.setattr(ZINC, "split_url", benchmark.as_uri() + "/{}.index")
    if damage is None:
        check_benchmark(load("zinc", root=tmp_path / "nothing"))
        assert len(list((fresh_cache / "ZINC" / "raw").iterdir())) == 6
    else:
        with pytest.raises((ValueError, FileNotFoundError), match=r"as fetched|download failed"):
            load("zinc", root=tmp_path / "nothing")
        assert not fresh_cache.exists()


class Reduced:
    """Pickled as a call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("is_in_storage", [False, True])
def test_a_pickle_with_code_is_refused_and_does_not_run(is_in_storage, benchmark, tmp_path):
    marker = tmp_path / "marker"
    evil = Reduced(Path.touch, marker)
    pickle.loads(pickle.dumps(evil))
    assert marker.is_file()
    marker.unlink()
    if is_in_storage:  # goes through the function that unpickles a tensor's storage
        torch.save(evil, buffer := io.BytesIO())
        evil = Reduced(torch.storage._load_from_bytes, buffer.getvalue())
    content = [as_pickled(molecule_graph(smiles), y) for smiles, y in BENCHMARK["val"].items()]
    content[0]["num_atom"] = evil
    write(benchmark / "val.pickle", pickle.dumps(content))
    with pytest.raises(ValueError, match=r"val\.pickle: not the benchmark's file, or damaged"):
        read_benchmark(benchmark)
    assert not marker.exists()


ETHANOL = as_pickled(molecule_graph("CCO"), 0.0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("val.pickle", b"no pickle at all", "val.pickle: not the benchmark's file, or damaged"),
        ("val.pickle", [ETHANOL | {"atom_type": torch.tensor([0, 0, 28])}] * 2, "atom type id 28"),
        ("val.pickle", [ETHANOL | {"bond_type": torch.ones(3, 2)}] * 2, "not the benchmark's file"),
        ("val.pickle", [ETHANOL | {"logP_SA_cycle_normalized": torch.ones(2)}] * 2, "or damaged"),
        ("val.pickle", [ETHANOL] * 2, r"expected \(2, 16, 32\) .* and edges, found \(2, 6, 8\)"),
        ("test.index", "2,3", "test.pickle: not the benchmark's file, or damaged"),
        ("train.index", "3,0", r"expected \(3, .* molecules, atoms and edges, found \(2, "),
    ],
)
def test_a_bad_benchmark_file_is_refused(benchmark, name, content, message):
    write(benchmark / name, pickle.dumps(content) if isinstance(content, list) else content)
    with pytest.raises(ValueError, match=message):
        read_benchmark(benchmark)
