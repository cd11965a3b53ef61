"""ogbn-proteins: OGB's raw files become three splits of seed nodes, checked and cached."""

import gzip
import shutil

import numpy as np
import pytest
import torch
from conftest import NOT_BUNDLED
from ogbn_files import TEST, TRAIN, VALID, place, write, write_ogbn_proteins

from studies.extras import ogbn_proteins
from studies.extras.neighbours import ALL
from studies.extras.ogbn_proteins import CHANNELS, SPECIES, load_ogbn_proteins

RAW_FILES = (
    *("raw/num-node-list", "raw/num-edge-list", "raw/edge", "raw/edge-feat"),
    *("raw/node_species", "raw/node-label"),
    *("split/species/train", "split/species/valid", "split/species/test"),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own in place of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mapkg" / "ogbn_proteins"


@pytest.fixture
def written(tmp_path):
    """What the test's raw files say, as arrays, and their data root."""
    return write_ogbn_proteins(tmp_path / "data")


def read(root, name):
    return gzip.decompress(place(root, name).read_bytes()).decode()


def load(root, fan_outs=(5, 10, 15)):
    return load_ogbn_proteins([root], fan_outs=fan_outs)


def only_entry(cache):
    """The one file of the cache; nothing temporary lies beside it."""
    (entry,) = cache.iterdir()
    return entry


def same(splits, others):
    """Whether two loads hold the same values."""
    pairs = [(getattr(splits, name), getattr(others, name)) for name in ("train", "val", "test")]
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for one, other in pairs
        for name in ("seeds", "x", "y", "edge_attr")
    ) and all(
        torch.equal(getattr(splits.train.edges, name), getattr(others.train.edges, name))
        for name in ("indptr", "sources", "edge_ids")
    )


# ------------------------------------------------------------------------------
# What is read


def test_the_splits_hold_the_nodes_of_their_files_in_order(written):
    splits = load(written["root"])
    assert splits.train.seeds.tolist() == TRAIN
    assert splits.val.seeds.tolist() == VALID
    assert splits.test.seeds.tolist() == TEST


def test_the_graph_is_that_of_the_files_with_every_edge_in_both_directions(written):
    splits = load(written["root"], (ALL,) * 3)
    expected = {}
    for (source, target), weights in zip(
        written["edges"].tolist(), written["edge_attr"].astype(np.float32), strict=True
    ):
        expected[source, target] = expected[target, source] = weights.tolist()
    for split in (splits.train, splits.val):
        (batch,) = split.loader(len(split), shuffle=False)
        ends = [tuple(edge) for edge in batch.n_id[batch.edge_index].t().tolist()]
        assert dict(zip(ends, batch.edge_attr.tolist(), strict=True)) == expected
        assert len(ends) == len(expected) == 240
        assert batch.edge_type.tolist() == [int(np.argmax(expected[edge])) for edge in ends]


def test_a_node_has_the_rank_of_its_species_and_its_own_labels(written):
    splits = load(written["root"])
    for split in (splits.train, splits.val, splits.test):
        for batch in split.loader(5, shuffle=True):
            species = np.array(sorted(SPECIES))[batch.x.numpy()]
            assert species.tolist() == written["species"][batch.n_id.numpy()].tolist()
            assert batch.y.dtype == torch.float32
            seeds = batch.n_id[: batch.batch_size].numpy()
            assert batch.y.tolist() == written["y"][seeds].tolist()


def test_a_seed_without_edges_has_a_batch(written):
    splits = load(written["root"])
    assert splits.test.seeds[1] == 29
    batches = list(splits.test.loader(1, shuffle=False))
    assert batches[1].n_id.tolist() == [29]
    assert batches[1].edge_attr.shape == (0, 8) and batches[1].edge_type.shape == (0,)


def test_a_label_that_is_left_out_is_nan(written):
    rows = read(written["root"], "raw/node-label").splitlines()
    rows[4] = "," + rows[4].split(",", 1)[1]
    write(written["root"], "raw/node-label", "\n".join(rows))
    y = load(written["root"]).train.y
    assert y[4, 0].isnan() and y.isnan().sum() == 1


def test_weights_survive_as_the_floats_nearest_to_the_text(written):
    edge_attr = load(written["root"]).train.edge_attr
    assert edge_attr.dtype == torch.float32
    assert torch.equal(edge_attr, torch.from_numpy(written["edge_attr"]).float())


@pytest.mark.parametrize("rows", [1, 7, 120])
def test_tables_read_in_parts_are_those_read_at_once(rows, written, cache, monkeypatch):
    at_once = load(written["root"])
    shutil.rmtree(cache)
    monkeypatch.setattr(ogbn_proteins, "_CHUNK", rows)
    assert same(load(written["root"]), at_once)


def test_the_species_file_may_have_its_name_from_the_archive(written):
    expected = load(written["root"]).train.x
    path = place(written["root"], "raw/node_species")
    path.rename(path.with_name("species.csv.gz"))
    assert torch.equal(load(written["root"]).train.x, expected)


def test_the_description_fits_the_data(written):
    splits = load(written["root"])
    description = splits.description
    assert description.task == "node classification"
    assert description.num_node_types == 8 and description.num_edge_types is None
    assert description.edge_channels == splits.train.edge_attr.shape[1] == 8
    assert description.num_targets == splits.train.y.shape[1] == 112
    assert description.edge_types == dict(enumerate(CHANNELS))
    assert description.edge_types[0] == "homology" and description.edge_types[7] == "textmining"


# ------------------------------------------------------------------------------
# Where it is looked for


def test_no_folder_is_no_data_set(tmp_path):
    assert load_ogbn_proteins([tmp_path, tmp_path / "nowhere"]) is None


def test_the_first_root_that_has_it_counts(written, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(written["root"], other)
    write(other, "split/species/test", "8\n9\n")
    assert load_ogbn_proteins([tmp_path, other, written["root"]]).test.seeds.tolist() == [8, 9]


@pytest.mark.parametrize("name", RAW_FILES)
def test_a_missing_file_is_named(name, written):
    path = place(written["root"], name)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"missing: {path}. Unpack OGB's archive"):
        load(written["root"])


# ------------------------------------------------------------------------------
# Files that do not fit

BAD = {
    "too few edges": ("raw/edge", "0,1\n1,2\n", r"expected 120 rows \(one for each edge"),
    "too many species": ("raw/node_species", "9606\n" * 31, "expected 30 rows .*, found 31"),
    "too few weights": ("raw/edge-feat", "1,0,0,0,0,0,0,0\n" * 119, "120 rows .*, found 119"),
    "too few labels": ("raw/node-label", "1,0\n" * 30, "table of 112 columns .*found 2 columns"),
    "another edge count": ("raw/num-edge-list", "119\n", r"edge\.csv.* expected 119 rows"),
    "another node count": ("raw/num-node-list", "29\n", r"species\.csv.* expected 29 rows"),
    "two graphs": ("raw/num-node-list", "10\n20\n", r"one graph, got \[10, 20\]"),
    "no node": ("raw/num-node-list", "0\n", r"one positive number.*, got \[0\]"),
    "an unknown species": (
        *("raw/node_species", "9606\n" * 12 + "9607\n" + "9606\n" * 17),
        "row 13: expected a taxonomy id of 3702, 4932, .*, got 9607",
    ),
    "a huge species": ("raw/node_species", "999999999\n" * 30, "row 1: .* got 999999999"),
    "an end that is no node": (
        *("raw/edge", "0,1\n" * 119 + "2,30\n"),
        "row 120: expected a node id from 0 to 29, got 30",
    ),
    "a negative end": ("raw/edge", "0,-1\n" * 120, "row 1: expected a node id .*, got -1"),
    "a wide number": ("raw/edge", f"0,{2**33}\n" * 120, "could not read it"),
    "one end": ("raw/edge", "0\n" * 120, "expected a table of 2 columns .*found 1 col"),
    "a word": ("raw/edge", "0,one\n" * 120, "could not read it: .*one"),
    "nothing": ("raw/edge", "", "could not read it: No columns"),
    "a weight above one": (
        *("raw/edge-feat", "1,0,0,0,0,0,0,0\n" * 119 + "0,0,0,1.5,0,0,0,0\n"),
        r"row 120: expected a weight in \[0, 1\], got 1.5",
    ),
    "a weight left out": ("raw/edge-feat", "1,,0,0,0,0,0,0\n" * 120, "row 1: .* got nan"),
    "a label of two": (
        *("raw/node-label", (",".join(["0"] * 111) + ",2\n") * 30),
        "row 1: expected a label of 0, 1 or nothing, got 2",
    ),
    "a seed that is no node": ("split/species/test", "5\n30\n", "row 2: expected a node id"),
    "a seed twice": ("split/species/valid", "1\n3\n1\n", "row 3: .* node 1 occurs before"),
    "a seed in two splits": ("split/species/test", "5\n2\n", "row 2: .* node 2 occurs before"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_by_name(case, written, cache):
    name, text, message = BAD[case]
    write(written["root"], name, text)
    with pytest.raises(ValueError, match=message) as caught:
        load(written["root"])
    if not name.startswith("raw/num-"):  # a wrong count shows at the file that it counts
        assert str(place(written["root"], name)) in str(caught.value)
    assert not cache.exists(), "bad files were cached"


@pytest.mark.parametrize("damage", ["no gzip", "cut", "changed"])
def test_a_damaged_archive_is_refused_by_name(damage, written):
    path = place(written["root"], "raw/edge")
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "no gzip": b"0,1\n",
            "cut": whole[:middle],
            "changed": whole[:middle] + bytes(8) + whole[middle + 8 :],
        }[damage]
    )
    with pytest.raises(ValueError, match=f"{path}: .*could not read it"):
        load(written["root"])


def test_the_published_fan_outs_do_not_fit_three_layers(written):
    with pytest.raises(ValueError, match=r"each of the 3 layers, got 4: \(5, 10, 15, 1\)"):
        load(written["root"], (5, 10, 15, 1))
    assert load_ogbn_proteins([written["root"]], num_layers=2, fan_outs=(5, 10)) is not None


# ------------------------------------------------------------------------------
# The cache


def test_a_second_load_gives_the_first_from_the_cache(written, cache):
    first = load(written["root"])
    entry = only_entry(cache)
    before = entry.stat().st_mtime_ns
    assert same(load(written["root"]), first)
    assert only_entry(cache) == entry
    assert entry.stat().st_mtime_ns == before, "built again"


def test_a_second_load_does_not_parse_the_tables(written, cache, monkeypatch):
    first = load(written["root"])
    monkeypatch.setattr(ogbn_proteins, "_arrays", None)  # to call it would be an error
    assert same(load(written["root"]), first)


@pytest.mark.parametrize("part", ["header", "middle", "end", "cut", "empty"])
def test_a_damaged_entry_is_built_again(part, written, cache):
    first = load(written["root"])
    entry = only_entry(cache)
    whole = entry.read_bytes()
    at = {"header": 20, "middle": len(whole) // 2, "end": len(whole) - 1}.get(part)
    if at is None:
        damaged = whole[:-100] if part == "cut" else b""
    else:
        damaged = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    entry.write_bytes(damaged)
    assert same(load(written["root"]), first)
    assert only_entry(cache).read_bytes() == whole


@pytest.mark.parametrize("name", RAW_FILES)
def test_a_change_in_any_file_has_another_entry(name, written, cache):
    load(written["root"])
    path = place(written["root"], name)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), mtime=1))
    load(written["root"])
    assert len(list(cache.iterdir())) == 2


def test_a_cache_folder_that_cannot_be_written_only_warns(written, tmp_path, cache):
    expected = load(written["root"])
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="processed arrays were not cached at"):
        found = load(written["root"])
    assert same(found, expected)


# ------------------------------------------------------------------------------
# The data set itself


def test_the_real_data_set_has_its_published_counts():
    if not (NOT_BUNDLED / "ogbn_proteins").is_dir():
        pytest.skip(
            f"ogbn-proteins is not bundled and not at {NOT_BUNDLED}; MAPKG_DATA says where it is"
        )
    splits = load(NOT_BUNDLED)
    assert [len(splits.train), len(splits.val), len(splits.test)] == [86_619, 21_236, 24_679]
    assert splits.train.edges.num_nodes == 132_534
    assert len(splits.train.edges.sources) == 2 * 39_561_252
