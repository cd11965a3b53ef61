"""TU PROTEINS: pairs of secondary structures, the raw format, exact counts, the split."""

import shutil
import zipfile
from collections import Counter

import pytest
import torch
from conftest import NOT_BUNDLED
from torch_geometric.data import Data
from torch_geometric.datasets import TUDataset

from studies.data import load
from studies.data.proteins import (
    PAIR_TYPES,
    PROTEINS_FOLDER,
    STRUCTURES,
    read_proteins,
    split_proteins,
)
from studies.data.splitting import SPLITS

pytestmark = pytest.mark.usefixtures("cache")

HELIX, SHEET, TURN = range(3)

# Four graphs: a path helix-sheet-turn, a triangle of helices, two unconnected turns, and a
# single sheet, which is last.
BY_HAND = {
    "A": "1, 2\n2, 1\n2, 3\n3, 2\n4, 5\n5, 4\n4, 6\n6, 4\n5, 6\n6, 5\n",
    "graph_indicator": "1\n1\n1\n2\n2\n2\n3\n3\n4\n",
    "graph_labels": "2\n1\n2\n1\n",
    "node_labels": "0\n1\n2\n0\n0\n0\n2\n2\n1\n",
}


@pytest.fixture(scope="module")
def raw():
    """The folder of the raw files, or a skip with the reason."""
    folder = NOT_BUNDLED / PROTEINS_FOLDER
    if not folder.is_dir():
        pytest.skip(f"PROTEINS is not bundled and not at {folder}; MAPKG_DATA says where it is")
    return folder


@pytest.fixture(scope="module")
def proteins(raw):
    return load("proteins", root=NOT_BUNDLED, download=False)


@pytest.fixture
def by_hand(tmp_path):
    """A folder with the raw files of the four graphs."""
    return write_raw(tmp_path / "raw", BY_HAND)


def write_raw(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / f"PROTEINS_{name}.txt").write_text(content)
    return folder


def all_graphs(splits):
    return [graph for split in SPLITS for graph in getattr(splits, split)]


# The raw format


def test_the_graphs_are_those_written_by_hand(by_hand):
    graphs = read_proteins(by_hand)
    assert [graph.x.tolist() for graph in graphs] == [[0, 1, 2], [0, 0, 0], [2, 2], [1]]
    assert [graph.y.tolist() for graph in graphs] == [[[1.0]], [[0.0]], [[1.0]], [[0.0]]]
    assert [graph.edge_index.tolist() for graph in graphs] == [
        [[0, 1, 1, 2], [1, 0, 2, 1]],
        [[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]],
        [[], []],
        [[], []],
    ]
    assert [graph.edge_attr.tolist() for graph in graphs] == [[1, 1, 4, 4], [0] * 6, [], []]
    assert (PAIR_TYPES[0], PAIR_TYPES[1], PAIR_TYPES[4]) == (
        *("helix-helix", "helix-sheet", "sheet-turn"),
    )
    for graph in graphs:
        assert graph.edge_type is graph.edge_attr
        assert graph.x.dtype == graph.edge_index.dtype == graph.edge_attr.dtype == torch.long
        assert graph.y.dtype == torch.float


def test_node_attributes_beside_the_labels_are_not_taken_for_labels(by_hand):
    expected = read_proteins(by_hand)
    (by_hand / "PROTEINS_node_attributes.txt").write_text("9.5, -1\n" * 9)
    for found, graph in zip(read_proteins(by_hand), expected, strict=True):
        assert torch.equal(found.x, graph.x)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("node_labels", "0\n1\n0\n0\n0\n0\n1\n1\n1\n", "3 node labels .* found 2 and 2"),
        ("node_labels", "0\n1\n2\n3\n0\n0\n2\n2\n1\n", "3 node labels .* found 4 and 2"),
        ("graph_labels", "1\n2\n3\n1\n", "2 graph labels, found 3 and 3"),
        ("graph_labels", "1\n1\n1\n1\n", "2 graph labels, found 3 and 1"),
    ],
)
def test_files_with_other_labels_are_refused(file, content, message, tmp_path):
    folder = write_raw(tmp_path / "raw", {**BY_HAND, file: content})
    with pytest.raises(ValueError, match=message) as caught:
        read_proteins(folder)
    assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize("file", BY_HAND)
def test_a_missing_file_is_named(file, by_hand):
    (by_hand / f"PROTEINS_{file}.txt").unlink()
    with pytest.raises(FileNotFoundError, match=f"no PROTEINS_{file}.txt"):
        read_proteins(by_hand)


def test_graphs_without_an_edge_are_dropped_and_counted():
    def graph(nodes, edges, y):
        edge_index = torch.tensor(edges, dtype=torch.long).reshape(-1, 2).t()
        return Data(x=torch.zeros(nodes).long(), edge_index=edge_index, y=torch.tensor([[y]]))

    graphs = [graph(2, [(0, 1), (1, 0)], float(i % 2)) for i in range(20)]
    empty = [graph(3, [], 0.0), graph(1, [], 1.0)]
    splits = split_proteins([*empty, *graphs])
    assert [len(getattr(splits, split)) for split in SPLITS] == [16, 2, 2]
    assert all(found.num_edges == 2 for found in all_graphs(splits))
    assert "2 of 22 graphs have no edge and are dropped." in splits.description.deviations
    assert not any("dropped" in text for text in split_proteins(graphs).description.deviations)


# The data set


def test_proteins_has_its_exact_counts(proteins):
    graphs = all_graphs(proteins)
    assert len(graphs) == 1_113
    assert sum(graph.num_nodes for graph in graphs) == 43_471
    assert sum(graph.num_edges for graph in graphs) == 162_088
    assert Counter(graph.y.item() for graph in graphs) == {0.0: 663, 1.0: 450}
    assert torch.cat([graph.x for graph in graphs]).bincount().tolist() == [21_151, 20_931, 1_389]


def test_the_edges_of_each_type_are_those_counted_in_the_raw_files(proteins, raw):
    labels = (raw / "PROTEINS_node_labels.txt").read_text().split()
    pairs = [line.split(",") for line in (raw / "PROTEINS_A.txt").read_text().splitlines()]
    ends = (sorted([labels[int(a) - 1], labels[int(b) - 1]]) for a, b in pairs)
    expected = Counter("-".join(STRUCTURES[int(end)] for end in pair) for pair in ends)
    types = torch.cat([graph.edge_type for graph in all_graphs(proteins)])
    found = Counter(proteins.description.edge_types[i] for i in types.tolist())
    assert found == expected
    assert found == {
        "helix-helix": 54_478,
        "helix-sheet": 49_062,
        "helix-turn": 3_250,
        "sheet-sheet": 49_690,
        "sheet-turn": 3_312,
        "turn-turn": 2_296,
    }


def test_the_graphs_are_those_of_pyg(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "PROTEINS" / "raw", copy_function=shutil.copyfile)
    (tmp_path / "PROTEINS").chmod(0o755)  # the original may be read-only
    for found, graph in zip(read_proteins(raw), TUDataset(str(tmp_path), "PROTEINS"), strict=True):
        assert torch.equal(torch.nn.functional.one_hot(found.x, 3).float(), graph.x)
        assert torch.equal(found.edge_index, graph.edge_index)
        assert found.y.item() == graph.y.item()


def test_the_split_is_stratified(proteins):
    assert [len(getattr(proteins, split)) for split in SPLITS] == [890, 111, 112]
    positive = [sum(graph.y.item() for graph in getattr(proteins, split)) for split in SPLITS]
    assert positive == [360, 45, 45]  # 40.4 % of each, as of all


def test_the_sizes_of_the_embeddings_are_those_of_the_ids(proteins):
    graphs = all_graphs(proteins)
    description = proteins.description
    assert description.num_node_types == 1 + max(graph.x.max().item() for graph in graphs) == 3
    assert description.num_edge_types == 1 + max(g.edge_attr.max().item() for g in graphs) == 6
    assert description.num_targets == len(description.target_names) == 1
    assert any("ogbn-proteins" in text for text in description.deviations)


def test_the_raw_folder_is_left_alone(raw, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(raw, root / PROTEINS_FOLDER, copy_function=shutil.copyfile)
    load("proteins", root=root)
    assert [path.name for path in (root / "TUDataset" / "PROTEINS").iterdir()] == ["raw"]


# Damaged, fetched


def test_files_that_are_not_the_published_ones_are_refused(tmp_path):
    write_raw(tmp_path / PROTEINS_FOLDER, BY_HAND)
    with pytest.raises(ValueError, match=r"PROTEINS_A\.txt: expected sha256 4c4b33e2.*, found"):
        load("proteins", root=tmp_path)


def serve(folder, monkeypatch, members):
    """A zip file where PyG looks for PROTEINS, in a folder instead of on the network."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "PROTEINS.zip", "w") as archive:
        for name, content in members.items():
            archive.writestr(f"PROTEINS/{name}", content)
    monkeypatch.setattr(TUDataset, "url", folder.as_uri())


def test_proteins_are_fetched_and_kept(raw, tmp_path, fresh_cache, monkeypatch):
    members = {path.name: path.read_bytes() for path in raw.iterdir()}
    serve(tmp_path / "mirror", monkeypatch, {**members, "README.txt": "not needed"})
    splits = load("proteins", root=tmp_path / "nothing")
    assert [len(getattr(splits, split)) for split in SPLITS] == [890, 111, 112]
    kept = {path.name: path.read_bytes() for path in (fresh_cache / PROTEINS_FOLDER).iterdir()}
    assert kept == members
    shutil.rmtree(tmp_path / "mirror")
    assert len(load("proteins").train) == 890


def test_another_content_is_fetched_but_not_kept(tmp_path, fresh_cache, monkeypatch):
    members = {f"PROTEINS_{name}.txt": content for name, content in BY_HAND.items()}
    serve(tmp_path / "mirror", monkeypatch, members)
    with pytest.raises(ValueError, match=r"PROTEINS_A\.txt, as fetched: expected sha256"):
        load("proteins")
    assert not fresh_cache.exists()


@pytest.mark.parametrize("content", ["other", "cut", "page", "nothing"])
def test_what_cannot_be_fetched_whole_is_not_kept(
    content, tmp_path, fresh_cache, monkeypatch, capsys
):
    serve(tmp_path / "mirror", monkeypatch, {"MUTAG_A.txt": "1, 2"})
    path = tmp_path / "mirror" / "PROTEINS.zip"
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif content == "page":
        path.write_bytes(b"<html>not found</html>")
    elif content == "nothing":
        path.unlink()
    with pytest.raises(FileNotFoundError, match="the download failed"):
        load("proteins")
    assert f"could not fetch {PROTEINS_FOLDER}/PROTEINS_A.txt: " in capsys.readouterr().err
    assert not fresh_cache.exists()
