"""Molecules as graphs, SMILES tables, and data sets looked for, fetched and cached."""

import hashlib
import io
import pickle
import re
import shutil
import threading
import zipfile
from contextlib import contextmanager
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import NOT_BUNDLED, all_graphs, write
from rdkit import Chem
from torch_geometric.data import Data
from torch_geometric.datasets import ZINC

from mapkg.models import build
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
from studies.explanations import bond_importance, curve
from studies.files import versions, warn_of_another_rdkit
from studies.observation import bond_ratios
from studies.published import CONFIGS

pytestmark = pytest.mark.usefixtures("cache")

MOSES = "molecules/moses12k.csv.gz"
TABLE = "split,smiles,y\ntrain,CCO,0.5\nval,N#Cc1ccccc1,-1.25\ntrain,C[NH3+],2\ntest,c1ccccc1,0\n"


@pytest.fixture(scope="module")
def moses(cache):
    return load("moses")


@pytest.fixture
def table(tmp_path):
    return write(tmp_path / "table.csv", TABLE)


def edges(graph):
    """Directed edges with their bond type, in no order."""
    return sorted(zip(*graph.edge_index.tolist(), graph.edge_attr.tolist(), strict=True))


def both_directions(bonds):
    """What ``edges`` gives for hand-written bonds, each written once."""
    return sorted([*bonds, *((target, source, order) for source, target, order in bonds)])


def without_stereo(molecule):
    return Chem.MolToSmiles(molecule, isomericSmiles=False)


def assert_same(found, expected):
    """Graphs are equal to the bit, in every field and in their order."""
    for a, b in zip(found, expected, strict=True):
        assert sorted(a.keys()) == sorted(b.keys())
        for key in a.keys():  # noqa: SIM118, not a dict
            if isinstance(a[key], str):
                assert a[key] == b[key]
            else:
                assert a[key].dtype == b[key].dtype
                assert torch.equal(a[key].nan_to_num(-1), b[key].nan_to_num(-1)), key


NAMES = [name.replace(" ", "_") for name in ATOM_TYPES]

# SMILES with the types of their atoms: each of the 28 once; explicit hydrogens that are left by
# kekulizing, that make no known type, and those of stereo marks; marks that carry no hydrogen.
WORDS = """
CC(C)=O C,C,C,O             CN(C)C C,N,C,C              C[C@H](F)Cl C,C_H1,F,Cl
CSC C,S,C                   CC(=O)[O-] C,C,O,O_-        C[NH+](C)C C,N_H1_+,C,C
CBr C,Br                    C[NH3+] C,N_H3_+            C[NH2+]C C,N_H2_+,C
C[N+](=O)[O-] C,N_+,O,O_-   CC[S-] C,C,S_-              C[N-]S(C)(=O)=O C,N_-,S,C,O,O
CI C,I                      CP(C)C C,P,C,C              C[OH+]C C,O_H1_+,C
C[NH-] C,N_H1_-             C[S+](C)C C,S_+,C,C         c1cc[o+]cc1 C,C,C,O_+,C,C
C[PH](=O)O C,P_H1,O,O       C[PH2]=O C,P_H2,O           [CH2-]C C_H2_-,C
C[P+](C)(C)C C,P_+,C,C,C    C[SH+]C C,S_H1_+,C          C[CH-]C C,C_H1_-,C
C[PH+](C)C C,P_H1_+,C,C     c1cc[nH]c1 C,C,C,N,C        C[n+]1ccccc1 C,N_+,C,C,C,C,C
[CH4] C                     C[NH]C C,N,C                C[SH] C,S
CC(F)Cl C,C,F,Cl            C[C@@H](F)Cl C,C_H1,F,Cl    C1C[C@H]1N C,C,C,N
F/C=C/F F,C,C,F             [CH3][CH2][OH] C,C,O        C[C@](F)(Cl)Br C,C,F,Cl,Br
c1cc[nH+]cc1 C,C,C,N_H1_+,C,C
"""
TYPES = dict(re.findall(r"(\S+) (\S+)", WORDS))


@pytest.mark.parametrize("smiles", TYPES)
def test_atom_types_are_those_of_the_benchmark_and_are_drawn_back(smiles):
    graph = molecule_graph(smiles)
    assert ",".join(NAMES[i] for i in graph.x) == TYPES[smiles]
    assert without_stereo(to_molecule(graph)) == without_stereo(Chem.MolFromSmiles(smiles))
    plain = molecule_graph(Chem.MolToSmiles(Chem.MolFromSmiles(smiles), canonical=False))
    assert edges(graph) == edges(plain)
    assert {each for types in TYPES.values() for each in types.split(",")} == {*NAMES}


def test_small_molecules_are_the_graphs_written_by_hand():
    graph = molecule_graph("CCO", -0.25)
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert graph.edge_attr.tolist() == graph.edge_type.tolist() == [1, 1, 1, 1]
    assert (graph.y.tolist(), graph.y.dtype, graph.smiles) == ([[-0.25]], torch.float, "CCO")
    graph = molecule_graph("N#Cc1ccccc1")
    ring = [(2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (2, 7)]
    forms = [[(*ends, 1 + (i + j) % 2) for i, ends in enumerate(ring)] for j in (0, 1)]
    assert edges(graph) in [both_directions([(0, 1, 3), (1, 2, 1), *form]) for form in forms]
    assert edges(molecule_graph("CO.CF")) == both_directions([(0, 1, 1), (2, 3, 1)])
    alone = molecule_graph("C")
    assert alone.edge_index.shape == (2, 0) and "y" not in alone


def as_graph(x, *bonds):
    triples = torch.tensor(bonds, dtype=torch.long)
    return Data(x=torch.tensor(x), edge_index=triples[:, :2].t(), edge_attr=triples[:, 2])


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        *((molecule_graph, bad, "unreadable SMILES") for bad in ("C1CC", "NA", "", None, 5)),
        (molecule_graph, "C[Si](C)(C)C", "atom 1 of .* 'Si', which is not one of the 28 known"),
        (molecule_graph, "[NH4+]", r"atom 0 of .* has the type 'N H4 \+'"),
        (molecule_graph, "[Mg+2]", r"the type 'Mg \+2'"),
        (molecule_graph, "C[CH2]", "atom 1 of .* is a radical"),
        (molecule_graph, "CN->S", "bond 1 of .* the type DATIVE; expected single, double or trip"),
        # Two bonds at F, then ids out of range.
        (to_molecule, as_graph([0, 3], (0, 1, 2), (1, 0, 2)), "type ids of the graph are not a mo"),
        (to_molecule, as_graph([0, 28], (0, 1, 1), (1, 0, 1)), "type id 28: expected 0 to 27"),
        (to_molecule, as_graph([0, -1], (0, 1, 1), (1, 0, 1)), "type id -1: expected 0 to 27"),
        (to_molecule, as_graph([0, 0], (0, 1, 0), (1, 0, 0)), "bond type id 0: expected one of 1"),
        (to_molecule, as_graph([0, 0], (0, 1, 1), (1, 0, 2)), "directions of a bond have differe"),
        (directions, as_graph([0, 0], (0, 1, 1)), "two edges, one in each direction"),
        (directions, as_graph([0, 0], (0, 1, 1), (0, 1, 1)), "two edges, one in each direction"),
    ],
)
def test_what_is_no_molecule_is_refused_by_name(make, given, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(given)
    assert make is not molecule_graph or repr(given) in str(caught.value)


def in_order(graph, order):
    graph = graph.clone()
    graph.edge_index = graph.edge_index[:, order]
    graph.edge_attr = graph.edge_type = graph.edge_attr[order]
    return graph


ORDERS = {
    "sorted": lambda graph: (graph.edge_index[0] * graph.num_nodes + graph.edge_index[1]).argsort(),
    "shuffled": lambda graph: torch.randperm(graph.num_edges, generator=torch.manual_seed(0)),
    "halves": lambda graph: torch.arange(graph.num_edges).view(-1, 2).t().flatten(),
}


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_told_of_bonds_is_the_same_in_any_order_of_edges(order):
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
    model, seen, curves = build(CONFIGS["GT-ZINC"].replace(num_layers=2)).eval(), [], []
    for each in (plain, graph):
        (ratios,) = bond_ratios(model, [each], heads=8)
        of_edges = each.edge_index[0] + 0.1 * each.edge_index[1]
        largest = bond_importance(each, of_edges)
        curves.append(torch.tensor(curve(model, [each], [of_edges])["prediction"]))
        low, high = each.edge_index[:, directions(each)[0]].sort(dim=0).values
        told = torch.cat([ratios.flatten(0, 1).t().double(), largest[:, None]], dim=1)
        seen.append(told[(low * each.num_nodes + high).argsort()])
    for pair in (seen, curves):
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-6)


def test_kekule_forms_are_counted_without_those_alike_by_symmetry():
    # Of toluene one of two, of naphthalene two of three, of anthracene two of four.
    smiles = ("CCO", "Cc1ccccc1", "Cc1ccccc1C", "c1ccc2ccccc2c1", "c1ccc2cc3ccccc3cc2c1")
    assert [kekule_forms(Chem.MolFromSmiles(text)) for text in smiles] == [1, 1, 2, 2, 2]


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
    with pytest.warns(UserWarning, match=r"RDKit 2025\.9\.6 kekulized, but RDKit 20\d\d.* is at"):
        warn_of_another_rdkit(re.sub(r"rdkit [\d.]+", "rdkit 2025.9.6", versions()), tmp_path)
    for same in (versions(), "", "rdkit not installed"):
        warn_of_another_rdkit(same, tmp_path)


# Peri-fused (pyrene), bridged, a cage, spiro with a bridge; the last has marks.
@pytest.mark.parametrize(
    "smiles",
    [
        *("c1cc2ccc3cccc4ccc(c1)c2c34", "C1C2CC3CC1CC(C2)C3", "C1CC2CCC1C2", "C1CC2(C1)CC1CCC2C1"),
        "Cc1c(Br)ccc(NC(=O)COC(=O)[C@H]2[C@@H]3C[C@@H]4OC(=O)[C@@H]2[C@@H]4C3)c1C",
    ],
)
def test_a_molecule_has_one_target_however_its_smiles_is_written(smiles):
    molecule = Chem.MolFromSmiles(smiles)
    written = [*Chem.MolToRandomSmilesVect(molecule, 20, randomSeed=1), without_stereo(molecule)]
    assert len({round(penalized_logp(text), 9) for text in written}) == 1
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


def test_three_held_out_targets_of_the_substitute_are_grossly_wrong():
    tables = []
    for name in ("zinc12k.csv.gz", "zinc12k_official.csv.gz"):
        if not (path := NOT_BUNDLED / "zinc" / name).is_file():
            pytest.skip(f"targets to compare are not at {path}")
        rows = pd.read_csv(path).query("split != 'train'")
        tables.append(rows.assign(row=rows.groupby("split").cumcount()).reset_index(drop=True))
    old, official = tables
    assert old["smiles"].equals(official["smiles"])
    error = (old["y"] - official["y"]).abs()
    wrong = official[error > 0.13]
    places = [*zip(wrong["split"], wrong["row"], strict=True)]
    assert places == [("val", 214), ("test", 924), ("test", 976)] and error[wrong.index].min() > 3
    computed = [penalized_logp(smiles, as_written=True) for smiles in wrong["smiles"]]
    assert computed == pytest.approx(wrong["y"].tolist(), abs=2e-7)


def test_the_target_of_bundled_molecules_is_the_one_of_their_table(moses):
    """It has rounded constants and the rings of networkx's own root, as data/README.md says."""
    for graph in moses.train[::200] + moses.test[::40]:
        logp, accessibility, excess = logp_terms(Chem.MolFromSmiles(graph.smiles), root=None)
        expected = (logp - 2.4570953396190123) / 1.434324401111988
        expected += (-accessibility + 3.0525811293166134) / 0.8335207024513095
        expected += (-excess + 0.0485696876403053) / 0.2860212110245455
        assert graph.y.item() == pytest.approx(expected, abs=1e-6), graph.smiles


def test_rows_go_to_their_split_in_the_order_of_the_table(moses):
    rows = pd.read_csv(BUNDLED / MOSES)
    for split in SPLITS:
        expected, graphs = rows[rows["split"] == split], getattr(moses, split)
        assert [graph.smiles for graph in graphs] == expected["smiles"].tolist()
        y = torch.cat([graph.y for graph in graphs]).flatten()
        assert torch.equal(y, torch.tensor(expected["y"].to_numpy(), dtype=torch.float))


def test_further_columns_their_order_blank_lines_and_compression_do_not_matter(table, tmp_path):
    plain = load_table(table)
    assert [graph.y.item() for graph in plain.train] == [0.5, 2.0]
    assert plain.description.source == str(table)
    rows = pd.read_csv(table, dtype=str)
    rows = rows.assign(id=range(len(rows)))[["id", "y", "smiles", "split"]]
    write(tmp_path / "marked.csv", "\ufeff" + TABLE.replace("\n", "\r\n\r\n"))
    for name in ("other.csv.gz", "other.csv.xz", "other.csv.zip", "marked.csv"):
        if name != "marked.csv":
            rows.to_csv(tmp_path / name, index=False)
        assert_same(all_graphs(load_table(tmp_path / name)), all_graphs(plain))


def test_a_file_of_smiles_may_have_names_blank_lines_and_a_mark_of_its_encoding(tmp_path):
    path = write(tmp_path / "t.smi", "\ufeffCCO\tethanol\n\nCN methyl amine\n  \nCF\t\n")
    assert [graph.smiles for graph in read_smiles(path)] == ["CCO", "CN", "CF"]


def test_atom_types_that_training_lacks_are_told_with_the_number_of_molecules():
    plain, marked = map(molecule_graph, ("CC(F)Cl", "C[C@H](F)Cl"))
    charged, none = map(molecule_graph, ("C[NH3+]", "CCF"))
    with pytest.warns(UserWarning, match="2 of 4 molecules have atom types .* C H1, N H3 +"):
        warn_of_types([marked, plain, none, charged], [plain], "MOSES")
    with pytest.warns(UserWarning, match="1 of 3 molecules have a stereocenter without a mark"):
        warn_of_types([marked, plain, none], [marked], "ZINC")
    warn_of_types([marked, none], [marked], "ZINC")  # nothing to tell


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
    for named in ("~/nowhere", "/nowhere/data", "nowhere"):
        monkeypatch.setenv("MAPKG_DATA", named)
        with pytest.raises(FileNotFoundError, match=f"MAPKG_DATA is {named}, which is no folder"):
            load("moses")


def test_without_a_home_the_cache_is_a_temporary_folder_with_a_warning(
    table, tmp_path, monkeypatch
):
    def no_entry(_):
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=f"no home folder is known, .* {tmp_path}/temporary/mapkg"):
        load_table(table)
    assert only_entry(tmp_path / "temporary" / "mapkg").is_file()
    assert not (tmp_path / "~").exists()
    for name, place in (("HOME", "home/.cache"), ("XDG_CACHE_HOME", "own")):
        monkeypatch.setenv(name, str(tmp_path / place.removesuffix("/.cache")))
        assert user_cache() == tmp_path / place / "mapkg"


@pytest.mark.parametrize(
    ("name", "place", "advice"),
    [
        ("zinc", "zinc/zinc12k_official.csv.gz", "python -m studies data zinc"),
        ("zinc-substitute", "zinc/zinc12k.csv.gz", "tracked results of ZINC were made with it"),
        ("moses", MOSES, "comes with the repository as data/molecules/moses12k"),
        ("proteins", "TUDataset/PROTEINS/raw", "MAPKG_DATA .*studies data proteins"),
        ("pubmed-missing", "Planetoid-missing100/PubMed/raw", "not fetched here"),
        ("string-ppi", "string_ppi/macaque101_ogb_layout/raw", "read_ogb_proteins"),
    ],
)
def test_an_absent_data_set_is_an_error_that_says_what_would_help(name, place, advice, tmp_path):
    words = f"data set '{name}' not found; looked for {tmp_path / place}.*{advice}"
    with pytest.raises(FileNotFoundError, match=words):
        load(name, root=tmp_path, download=False)


def test_the_first_root_that_has_all_files_is_taken(tmp_path):
    roots = [tmp_path / name for name in ("half", "whole", "later")]
    for root, names in zip(roots, ["a", "ab", "ab"], strict=True):
        for name in names:
            write(root / "raw" / name, "")
    assert root_with(roots, ["raw/a", "raw/b"], None) == tmp_path / "whole"
    assert root_with(roots, ["raw"], None) is None, "a folder is no file"


def test_files_are_fetched_together_or_not_at_all_and_damaged_ones_in_the_cache_again(
    tmp_path, fresh_cache
):
    whole = (BUNDLED / MOSES).read_bytes()
    with pytest.raises(ValueError, match=f"{MOSES}, as fetched: expected sha256 {SHA256[MOSES]}"):
        root_with([tmp_path], ["new", MOSES], lambda: {"new": b"1", MOSES: b"2"})
    assert root_with([tmp_path], ["new", "other"], lambda: {"new": b"1"}["other"]) is None
    assert not fresh_cache.exists()
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


def only_entry(folder):
    """The one file of a graph cache; nothing temporary lies beside it."""
    (entry,) = (folder / "graphs").iterdir()
    assert entry.suffix == ".pt"
    return entry


def never():
    raise AssertionError("built again")


DAMAGES = {
    "a byte in the middle": lambda raw: raw[:500] + bytes([raw[500] ^ 1]) + raw[501:],
    "cut inside the checksum": lambda raw: raw[:10],
    "whole, but no archive": lambda raw: hashlib.sha256(b"x").digest() + b"x",
}


def test_a_cached_graph_has_every_field_and_a_damaged_entry_is_built_again(fresh_cache, table):
    graphs = [
        Data(
            **dict(x=torch.rand(nodes, 3), edge_index=torch.arange(2 * edges).reshape(2, edges)),
            **dict(edge_attr=torch.rand(edges, 2), y=torch.tensor([[nodes, torch.nan]]), text=text),
        )
        for nodes, edges, text in [(2, 3, "two\nlines"), (0, 0, ""), (1, 4, "é"), (5, 0, "")]
    ]
    for damage in (lambda raw: raw, *DAMAGES.values()):
        assert_same(cached_graphs([table], __file__, lambda: graphs), graphs)
        assert_same(cached_graphs([table], __file__, never), graphs)
        entry = only_entry(fresh_cache)
        entry.write_bytes(damage(entry.read_bytes()))


def test_other_content_and_other_code_are_other_entries(tmp_path, table, fresh_cache):
    code = write(tmp_path / "code.py", "first")
    for number, path in enumerate((None, code, table)):
        if path:
            path.write_text(f"{path.read_text()}#")
        graphs = [Data(x=torch.tensor([number]))]
        assert_same(cached_graphs([table], code, lambda graphs=graphs: graphs), graphs)
    assert_same(cached_graphs([table, code], code, lambda: graphs[:1] * 2), graphs * 2)
    copy = Path(shutil.copy(table, table.with_name("copy.csv")))
    assert_same(cached_graphs([copy], code, never), graphs)


def test_a_cache_folder_that_cannot_be_written_only_warns(table, tmp_path, monkeypatch):
    # A file where the folder should be: unlike a read-only folder it stops root too.
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file", "")))
    with pytest.warns(UserWarning, match="processed graphs were not cached at .*file"):
        assert len(all_graphs(load_table(table))) == 4


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
    named = dict(atom_type=graph.x, bond_type=bond_type, num_atom=graph.num_nodes)
    return {**named, "logP_SA_cycle_normalized": torch.tensor([y])}


@pytest.fixture
def benchmark(tmp_path, fresh_cache, monkeypatch):
    """The folder of a small stand-in for the raw files of PyG's ZINC, under a data root."""
    folder, sizes = tmp_path / "ZINC" / "raw", {}
    for split, molecules in BENCHMARK.items():
        content = [as_pickled(molecule_graph(smiles), y) for smiles, y in molecules.items()]
        write(folder / f"{split}.pickle", pickle.dumps(content))
        write(folder / f"{split}.index", f"{','.join(map(str, CHOSEN[split]))}\n")
        graphs = [molecule_graph(list(molecules)[i]) for i in CHOSEN[split]]
        numbers = ([g.num_nodes for g in graphs], [g.num_edges for g in graphs])
        sizes[split] = (len(graphs), *map(sum, numbers))
    monkeypatch.setattr("studies.data.molecules.ZINC_SIZES", sizes)
    return folder


def read_benchmark(folder):
    return load("zinc", root=folder.parents[1], download=False)


def check_benchmark(splits):
    for split in SPLITS:
        molecules = list(BENCHMARK[split].items())
        expected = [molecule_graph(*molecules[i]) for i in CHOSEN[split]]
        for a, b in zip(getattr(splits, split), expected, strict=True):
            assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and edges(a) == edges(b)
            assert torch.equal(a.edge_type, a.edge_attr)
            assert a.smiles == without_stereo(Chem.MolFromSmiles(b.smiles))


def test_the_benchmark_files_give_the_graphs_of_their_molecules(benchmark):
    splits = read_benchmark(benchmark)
    check_benchmark(splits)
    assert any("carry no SMILES" in text for text in splits.description.deviations)
    check_benchmark(read_benchmark(benchmark))  # from what was kept
    content = [as_pickled(turned(molecule_graph(s)), y) for s, y in BENCHMARK["test"].items()]
    write(benchmark / "test.pickle", pickle.dumps(content))
    with pytest.warns(UserWarning, match=r"ZINC/raw: in 1 of 2 test molecules other bonds"):
        splits = read_benchmark(benchmark)
    assert "in 1 of 2 test molecules" in splits.description.deviations[-1]
    write(benchmark.parents[1] / "zinc" / "zinc12k_official.csv.gz", b"damaged")
    with pytest.raises(ValueError, match=r"zinc12k_official.csv.gz: expected sha256"):
        read_benchmark(benchmark)  # the table is preferred


@pytest.mark.parametrize("damage", [None, "cut", "false"])
def test_the_benchmark_is_fetched_and_kept_if_it_is_whole(
    damage, benchmark, tmp_path, fresh_cache, monkeypatch
):
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
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_a_pickle_with_code_is_refused_and_does_not_run(benchmark, tmp_path):
    evil = Reduced(Path.touch, tmp_path / "marker")
    torch.save(evil, buffer := io.BytesIO())  # for the function that unpickles tensors' storage
    for each in (evil, Reduced(torch.storage._load_from_bytes, buffer.getvalue())):
        write(benchmark / "val.pickle", pickle.dumps([ETHANOL | {"num_atom": each}] * 2))
        with pytest.raises(ValueError, match=r"val\.pickle: not the benchmark's file, or damaged"):
            read_benchmark(benchmark)
    assert not (tmp_path / "marker").exists()


ETHANOL = as_pickled(molecule_graph("CCO"), 0.0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("val.pickle", b"no pickle at all", "val.pickle: not the benchmark's file, or damaged"),
        ("val.pickle", [ETHANOL | {"atom_type": torch.tensor([0, 0, 28])}] * 2, "atom type id 28"),
        ("val.pickle", [ETHANOL] * 2, r"expected \(2, 16, 32\) .* and edges, found \(2, 6, 8\)"),
        ("test.index", "2,3", "test.pickle: not the benchmark's file, or damaged"),
        ("train.index", "3,0", r"expected \(3, .* molecules, atoms and edges, found \(2, "),
    ],
)
def test_a_bad_benchmark_file_is_refused(benchmark, name, content, message):
    write(benchmark / name, pickle.dumps(content) if isinstance(content, list) else content)
    with pytest.raises(ValueError, match=message):
        read_benchmark(benchmark)
