"""Data with changed edge types, the node that is not read, and the weights kept on the way."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NOT_BUNDLED
from scipy.stats import chi2_contingency, chisquare
from torch_geometric.data import Batch

from mapkg.evaluation import predict
from mapkg.hooks import record
from mapkg.models import build
from studies import checkpoint
from studies.__main__ import USAGE_ERROR, main
from studies.changed_types import (
    CHANGES,
    SHARES,
    count_neighbours,
    join_global_node,
    shuffle_types,
    split_types,
    type_target,
    uniform_types,
)
from studies.data import (
    ATOM_TYPES,
    BUNDLED,
    DESCRIPTIONS,
    Splits,
    load,
    load_table,
    molecule_graph,
)
from studies.emergence import emergence
from studies.published import CONFIGS
from studies.results import read_emergence
from studies.train import seed_all

SPLITS = ("train", "val", "test")
DRAWN = [name for name in CHANGES if not name.startswith(("global", "neighbour"))]
SIZES = {"hidden_channels": 32, "heads": 4, "num_layers": 2}
SMALL = CONFIGS["GT-ZINC"].replace(**SIZES, batch_size=16)
WITH_HUB = SMALL.replace(num_node_types=29, num_edge_types=6, unread_node_type=28)
IMPROBABLE = 1e-3
"""A p-value below this would be a surprise; the seeds of the tests are fixed."""


@pytest.fixture(scope="module")
def triple():
    """All bundled molecules with a triple bond."""
    return load("moses-triple")


@pytest.fixture(scope="module")
def splits(triple):
    """A few of them."""
    return replace(triple, train=triple.train[:400], val=triple.val[:50], test=triple.test[:50])


def of(*smiles, y=0.5):
    """Splits that all hold the same few molecules."""
    graphs = [molecule_graph(text, y) for text in smiles]
    return Splits(graphs, graphs, graphs, DESCRIPTIONS["moses"])


def pairs(before, after):
    """Each graph as it was and as it is."""
    for split in SPLITS:
        yield from zip(getattr(before, split), getattr(after, split), strict=True)


def types(graphs):
    return torch.cat([graph.edge_type for graph in graphs])


def frequencies(splits, name="train"):
    return types(getattr(splits, name)).bincount().tolist()


def kept(splits):
    """Copies of all tensors, to compare with later."""
    return [
        {key: value.clone() for key, value in graph.to_dict().items() if torch.is_tensor(value)}
        for split in SPLITS
        for graph in getattr(splits, split)
    ]


# The bundled molecules with a triple bond.


def test_the_second_bundled_sample_has_a_triple_bond_in_each_of_its_molecules(triple):
    assert [len(getattr(triple, split)) for split in SPLITS] == [10_000, 1_000, 1_000]
    assert frequencies(triple) == [0, 314_814, 119_114, 20_722]
    assert frequencies(triple, "val") == [0, 31_566, 11_932, 2_084]
    assert frequencies(triple, "test") == [0, 31_544, 11_794, 2_070]
    for split in SPLITS:
        assert all((graph.edge_type == 3).any() for graph in getattr(triple, split))
    assert triple.description is DESCRIPTIONS["moses-triple"]


def test_no_molecule_is_in_two_splits_of_it(triple):
    smiles = [{graph.smiles for graph in getattr(triple, split)} for split in SPLITS]
    assert len(set.union(*smiles)) == sum(map(len, smiles)) == 12_000


def test_a_changed_file_of_it_is_refused(tmp_path):
    place = tmp_path / "molecules" / "moses_triple12k.csv.gz"
    place.parent.mkdir()
    shutil.copy(BUNDLED / "molecules" / "moses12k.csv.gz", place)
    with pytest.raises(ValueError, match=r"moses_triple12k\.csv\.gz.*sha256"):
        load("moses-triple", root=tmp_path)


# What all changes have in common.


@pytest.mark.parametrize("name", CHANGES)
def test_the_data_that_were_given_are_not_changed(splits, name):
    before, about = kept(splits), splits.description
    changed = CHANGES[name](splits, 0)
    for graph, values in zip((g for g, _ in pairs(splits, changed)), before, strict=True):
        for key, value in values.items():
            assert torch.equal(graph[key], value), key
    for graph, other in pairs(splits, changed):
        assert other is not graph
        assert other.edge_type.data_ptr() != graph.edge_type.data_ptr()
        assert other.edge_attr is other.edge_type, "what the model is given is what is named"
        assert other.smiles == graph.smiles
    assert splits.description == about == DESCRIPTIONS["moses-triple"]


@pytest.mark.parametrize("name", CHANGES)
def test_the_description_says_what_was_changed_and_names_every_type(splits, name):
    changed = CHANGES[name](splits, 0)
    about, before = changed.description, splits.description
    assert about.title.startswith(f"{before.title}, ")
    assert about.deviations[: len(before.deviations)] == before.deviations
    assert about.deviations[-1] == f"Changed: {about.title.removeprefix(before.title + ', ')}."
    used = set(torch.cat([types(getattr(changed, split)) for split in SPLITS]).tolist())
    assert used == set(about.edge_types)
    assert about.num_edge_types == max(used) + 1


def test_titles_tell_the_changes_apart(splits):
    titles = {change(splits, 0).description.title for change in CHANGES.values()}
    assert len(titles) == len(CHANGES) == 8


@pytest.mark.parametrize("name", DRAWN)
def test_both_directions_of_a_bond_have_one_type_and_the_bonds_stay(splits, name):
    for graph, other in pairs(splits, CHANGES[name](splits, 0)):
        assert torch.equal(other.edge_index, graph.edge_index)
        assert torch.equal(other.x, graph.x)
        of_pair = {}
        for source, target, kind in zip(
            *other.edge_index.tolist(), other.edge_type.tolist(), strict=True
        ):
            of_pair.setdefault(frozenset((source, target)), []).append(kind)
        assert all(len(kinds) == 2 and len(set(kinds)) == 1 for kinds in of_pair.values())


@pytest.mark.parametrize("name", DRAWN)
def test_the_draw_depends_on_the_seed_alone(splits, name):
    torch.manual_seed(1)
    first = CHANGES[name](splits, 7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = (CHANGES[name](splits, seed) for seed in (7, 8))
    assert torch.equal(torch.get_rng_state(), state), "torch's global state was used"
    for split in SPLITS:
        assert torch.equal(types(getattr(first, split)), types(getattr(again, split)))
        assert not torch.equal(types(getattr(first, split)), types(getattr(other, split)))


@pytest.mark.parametrize(
    "change", [shuffle_types, uniform_types, split_types, join_global_node, count_neighbours]
)
def test_targets_stay_unless_they_are_made_to_depend_on_a_type(splits, change):
    for graph, other in pairs(splits, change(splits, 0)):
        assert torch.equal(other.y, graph.y)


@pytest.mark.parametrize("name", CHANGES)
def test_data_without_one_type_per_edge_are_refused(name, papers):
    about = replace(DESCRIPTIONS["moses"], title="TOX21", num_edge_types=(22, 6, 2))
    for data in (papers, Splits([], [], [], about)):
        with pytest.raises(ValueError, match=f"{data.description.title} has not; use a data set"):
            CHANGES[name](data, 0)


@pytest.mark.parametrize("name", DRAWN)
def test_edges_whose_directions_are_not_side_by_side_are_refused(name):
    graph = molecule_graph("CC=O", 0.0)
    graph.edge_index, graph.edge_type = (
        graph.edge_index[:, [0, 2, 1, 3]],
        torch.tensor([1, 2, 1, 3]),
    )
    data = Splits([graph], [graph], [graph], DESCRIPTIONS["moses"])
    with pytest.raises(ValueError, match="both directions of a bond next to each other"):
        CHANGES[name](data, 0)


# Types shuffled, and drawn uniformly.


def test_shuffling_keeps_the_frequencies_of_every_split_to_the_bond(splits):
    changed = shuffle_types(splits, 0)
    for split in SPLITS:
        assert frequencies(changed, split) == frequencies(splits, split)


@pytest.mark.parametrize("change", [shuffle_types, uniform_types])
def test_types_have_nothing_to_do_with_the_bonds_any_more(splits, change):
    before, after = (types(data.train)[::2] for data in (splits, change(splits, 0)))
    table = torch.zeros(3, 3, dtype=torch.long)
    table.index_put_((before - 1, after - 1), torch.tensor(1), accumulate=True)
    assert chi2_contingency(table.numpy()).pvalue > IMPROBABLE
    assert chi2_contingency(np.diag(table.sum(1)) + 1).pvalue < 1e-9, "the test sees dependence"


def test_uniform_types_are_equally_frequent(splits):
    bonds = torch.tensor(frequencies(uniform_types(splits, 0)))[1:] // 2
    assert bonds.sum() * 2 == sum(frequencies(splits))
    assert chisquare(bonds.numpy()).pvalue > IMPROBABLE
    assert chisquare(frequencies(splits)[1:]).pvalue < 1e-9


# Types divided.


def test_divided_types_are_equally_frequent_and_each_comes_from_one_type(triple):
    changed = split_types(triple, 0)
    names = changed.description.edge_types
    # 314814 / 20722 = 15.19 and 119114 / 20722 = 5.75, rounded.
    expected = [f"single {k}" for k in range(1, 16)]
    expected += [f"double {k}" for k in range(1, 7)] + ["triple 1"]
    assert names == dict(enumerate(expected, start=1))
    counts = np.array(frequencies(changed))
    assert counts[0] == 0
    np.testing.assert_allclose(counts[1:], 20_722, rtol=0.08)
    for parts, total in ((counts[1:16], 314_814), (counts[16:22], 119_114)):
        assert parts.sum() == total
        assert chisquare(parts // 2).pvalue > IMPROBABLE
    for split in SPLITS:
        old, new = types(getattr(triple, split)), types(getattr(changed, split))
        for i, name in names.items():
            (origin,) = old[new == i].unique().tolist()
            assert triple.description.edge_types[origin] == name.split()[0]


def test_a_type_without_an_edge_cannot_be_divided():
    with pytest.raises(ValueError, match=r"MOSES sample, .* no edge of the type double, triple"):
        split_types(of("CCO"), 0)


# A target that depends on one type.


def target_by_loop(graph, kinds, informative):
    """Not yet scaled, edge by edge."""
    total = 0.0
    for source, kind in zip(graph.edge_index[0].tolist(), kinds.tolist(), strict=True):
        if ATOM_TYPES[graph.x[source]].split()[0] != "C":
            total += (kind == informative) - SHARES[informative - 1]
    return total


@pytest.mark.parametrize("informative", [1, 2, 3])
def test_the_target_is_the_excess_of_informative_edges_from_heteroatoms(splits, informative):
    changed = type_target(splits, 0, informative=informative)
    by_loop = {
        split: np.array(
            [target_by_loop(g, g.edge_type, informative) for g in getattr(changed, split)]
        )
        for split in SPLITS
    }
    scale = by_loop["train"].std(ddof=1)
    for split in SPLITS:
        found = torch.cat([graph.y for graph in getattr(changed, split)])
        assert found.shape == (len(by_loop[split]), 1)
        np.testing.assert_allclose(found[:, 0], by_loop[split] / scale, rtol=1e-4, atol=1e-5)
    train = torch.cat([graph.y for graph in changed.train])
    assert train.std().item() == pytest.approx(1, rel=1e-5)
    assert abs(train.mean().item()) < 4 / len(train) ** 0.5


def test_the_two_other_types_can_change_places_without_a_change_of_the_target(splits):
    swapped = torch.tensor([0, 1, 3, 2])
    one, three = (type_target(splits, 0, informative=i) for i in (1, 3))
    for graph, other in zip(one.test, three.test, strict=True):
        kinds = graph.edge_type
        assert torch.equal(kinds, other.edge_type), "one draw, whatever the target depends on"
        assert target_by_loop(graph, swapped[kinds], 1) == target_by_loop(graph, kinds, 1)
    informative_moved = (
        target_by_loop(graph, swapped[graph.edge_type], 3)
        != target_by_loop(graph, graph.edge_type, 3)
        for graph in three.test
    )
    assert any(informative_moved), "the informative one cannot"


def test_types_are_drawn_with_the_stated_shares_whatever_the_bond(splits):
    old, new = (types(data.train)[::2] for data in (splits, type_target(splits, 0, informative=1)))
    for kind in (1, 2, 3):
        drawn = new[old == kind].bincount(minlength=4)[1:].numpy()
        assert chisquare(drawn, drawn.sum() * np.array(SHARES)).pvalue > IMPROBABLE


def test_the_informative_type_is_named_and_another_one_is_refused():
    about = type_target(of("CC#N", "CCO"), 0, informative=3).description
    names = {1: "type 1 (70%)", 2: "type 2 (25%)", 3: "type 3 (5%), informative"}
    assert about.edge_types == names
    assert about.target.startswith("edges of the informative type from heteroatoms")
    assert CHANGES["rare-informative"](of("CC#N", "CCO"), 0).description == about
    with pytest.raises(ValueError, match="expected the type 1, 2 or 3, got 4"):
        type_target(of("CCO"), 0, informative=4)


# A node that is joined to all atoms.


def test_the_neighbours_of_acetonitrile_by_hand():
    changed = count_neighbours(of("CC#N"))
    assert changed.test[0].x.tolist() == [28, 56, 2 + 28]  # of types 0, 0 and 2
    assert changed.description.num_node_types == 28 * 3
    assert changed.test[0].edge_type.tolist() == [1, 1, 3, 3]


def test_node_and_neighbours_can_both_be_read_off_a_new_type_and_bonds_stay(splits):
    changed = count_neighbours(splits)
    most = changed.description.num_node_types // 28 - 1
    assert most == 4
    for graph, other in pairs(splits, changed):
        assert torch.equal(other.x % 28, graph.x)
        degree = torch.zeros_like(graph.x).index_add(
            0, graph.edge_index[0], torch.ones_like(graph.edge_index[0])
        )
        assert torch.equal(other.x // 28, degree)
        assert torch.equal(other.edge_index, graph.edge_index)
        assert torch.equal(other.edge_type, graph.edge_type)


def test_the_global_node_of_acetonitrile_by_hand():
    graph = join_global_node(of("CC#N")).test[0]
    assert graph.x.tolist() == [0, 0, 2, 28]
    assert graph.edge_index.tolist() == [
        [0, 1, 1, 2, 0, 1, 2, 3, 3, 3],
        [1, 0, 2, 1, 3, 3, 3, 0, 1, 2],
    ]
    assert graph.edge_type.tolist() == [1, 1, 3, 3, 4, 4, 4, 5, 5, 5]
    assert graph.num_nodes == 4


@pytest.mark.parametrize("node_type, sizes", [(0, 28), (27, 28), (28, 29), (40, 41)])
def test_the_global_node_may_have_any_atom_type(node_type, sizes):
    changed = join_global_node(of("CC#N"), node_type=node_type)
    assert changed.test[0].x.tolist() == [0, 0, 2, node_type]
    assert changed.description.num_node_types == sizes
    with pytest.raises(ValueError, match="node_type: expected an id of 0 or more, got -1"):
        join_global_node(of("CC#N"), node_type=-1)


@pytest.mark.parametrize("edge_types", [(4, 5), (3, 3), (7, 4)])
def test_every_atom_is_joined_both_ways_and_nothing_else_changes(splits, edge_types):
    changed = join_global_node(splits, edge_types=edge_types)
    for graph, other in pairs(splits, changed):
        atoms, bonds = graph.num_nodes, graph.num_edges
        assert torch.equal(other.x[:atoms], graph.x)
        assert other.x[atoms:].tolist() == [len(ATOM_TYPES)]
        assert torch.equal(other.edge_index[:, :bonds], graph.edge_index)
        assert torch.equal(other.edge_type[:bonds], graph.edge_type)
        new = list(zip(*other.edge_index[:, bonds:].tolist(), strict=True))
        assert set(new) == {(i, atoms) for i in range(atoms)} | {(atoms, i) for i in range(atoms)}
        for (source, _), kind in zip(new, other.edge_type[bonds:].tolist(), strict=True):
            assert kind == edge_types[source == atoms]
    about = changed.description
    assert about.num_node_types == 29
    assert about.num_edge_types == max(3, *edge_types) + 1


def test_an_id_that_is_in_use_keeps_its_name_beside_the_new_ones():
    names = join_global_node(of("CC#N"), edge_types=(3, 3)).description.edge_types
    assert names == {1: "single", 2: "double", 3: "triple / atom to global / global to atom"}
    assert DESCRIPTIONS["moses"].edge_types[3] == "triple"
    names = join_global_node(of("CC#N")).description.edge_types
    assert (names[4], names[5]) == ("atom to global", "global to atom")


def test_id_zero_is_no_edge_and_is_refused():
    with pytest.raises(ValueError, match=r"expected ids of 1 or more, got \(0, 4\)"):
        join_global_node(of("CCO"), edge_types=(0, 4))


def test_the_edges_of_zinc_with_a_global_node_are_those_the_paper_prints(tmp_path):
    path = NOT_BUNDLED / "zinc" / "zinc12k.csv.gz"
    if not path.is_file():
        pytest.skip(f"ZINC is not bundled and not at {path}; MAPKG_DATA says where it is")
    rows = pd.read_csv(path, dtype=str)
    rows[rows["split"] == "test"].to_csv(tmp_path / "test.csv", index=False)
    few = load_table(tmp_path / "test.csv")
    found = frequencies(CHANGES["global-node"](few, 0), "test")
    assert found == [0, 37_050, 12_542, 128, 23_117, 23_117]
    again = frequencies(CHANGES["global-node-triple"](few, 0), "test")
    assert again == [0, 37_050, 12_542, 128 + 2 * 23_117]


# A node that the readout does not count.


def network(config=WITH_HUB, seed=0):
    """A network in evaluation mode, in double precision."""
    seed_all(seed)
    return build(config).double().eval()


def one_hot(graph):
    return (
        torch.nn.functional.one_hot(graph.x, 29).double(),
        graph.edge_index,
        torch.nn.functional.one_hot(graph.edge_type, 6).double(),
    )


@pytest.fixture(scope="module")
def joined():
    return join_global_node(of("CC#N", "c1ccccc1O", "CCO")).test


@pytest.mark.parametrize("readout", ["mean", "sum"])
@torch.no_grad()
def test_the_prediction_is_the_head_of_the_pooled_atoms(joined, readout):
    model = network(WITH_HUB.replace(readout=readout))
    reads_all = network(WITH_HUB.replace(readout=readout, unread_node_type=None))
    for graph in joined:
        with record(model, "layers.1.node_block") as seen:
            found = model(graph.x, graph.edge_index, graph.edge_type)
        (last,) = seen["layers.1.node_block"]
        assert len(last) == graph.num_nodes, "the node takes part in the layers"
        pooled = last[:-1].sum(0) / (graph.num_nodes - 1 if readout == "mean" else 1)
        torch.testing.assert_close(found, model.head(pooled).reshape(1, 1))
        all_pooled = last.mean(0) if readout == "mean" else last.sum(0)
        expected = reads_all(graph.x, graph.edge_index, graph.edge_type)
        torch.testing.assert_close(expected, model.head(all_pooled).reshape(1, 1))
        assert (found - expected).abs() > 1e-4


@torch.no_grad()
def test_one_hot_rows_give_the_prediction_of_the_ids(joined):
    model = network()
    for graph in joined:
        found = model(*one_hot(graph))
        torch.testing.assert_close(found, model(graph.x, graph.edge_index, graph.edge_type))
        column = graph.x.unsqueeze(1)
        torch.testing.assert_close(found, model(column, graph.edge_index, graph.edge_type))


@torch.no_grad()
def test_a_batch_predicts_as_each_of_its_graphs_alone(joined):
    model = network()
    batch = Batch.from_data_list(joined)
    alone = [model(graph.x, graph.edge_index, graph.edge_type) for graph in joined]
    torch.testing.assert_close(predict(model, batch), torch.cat(alone))


@torch.no_grad()
def test_where_no_node_has_the_unread_type_nothing_changes():
    graph = molecule_graph("c1ccccc1O")
    inputs = graph.x, graph.edge_index, graph.edge_type
    reads_all = network(WITH_HUB.replace(unread_node_type=None))
    assert torch.equal(network()(*inputs), reads_all(*inputs))


def test_a_prediction_for_each_node_has_no_readout_to_leave_a_node_out_of():
    with pytest.raises(ValueError, match="unread_node_type: expected None for a node-level task"):
        CONFIGS["GT-PROTEINS"].replace(unread_node_type=2)


# Weights that are kept on the way.


@pytest.fixture(scope="module")
def few(splits):
    return replace(splits, train=splits.train[:32], val=splits.val[:16], test=splits.test[:16])


def run(few, folder, epochs, **further):
    config = SMALL.replace(max_epochs=epochs)
    return emergence(config, few, seed=3, name="x", folder=folder, progress=False, **further)


def same_weights(one, other):
    one, other = (checkpoint.load(path)[0].state_dict() for path in (one, other))
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def long_run(few, tmp_path_factory):
    """Four epochs, the weights of every second one kept, the scores looked at at the end."""
    folder = tmp_path_factory.mktemp("long")
    found = run(few, folder, 4, keep_every=2, observe_epochs=[4])
    return found, folder


def epochs_in(folder):
    return sorted(path.stem for path in folder.glob("epoch_*.safetensors"))


def test_the_weights_of_every_second_epoch_are_kept_whatever_is_looked_at(long_run):
    found, folder = long_run
    assert epochs_in(folder) == ["epoch_000", "epoch_002", "epoch_004"]
    assert set(found.trajectory["epoch"]) == {0, 4}
    assert same_weights(folder / "epoch_000", folder / "base")
    assert same_weights(folder / "epoch_004", folder / "last")
    for one, other in pairwise(epochs_in(folder)):
        assert not same_weights(folder / one, folder / other)


def test_a_kept_epoch_says_what_it_is(long_run):
    _, folder = long_run
    _, found = checkpoint.load(folder / "epoch_002", SMALL.replace(max_epochs=4))
    assert (found["epoch"], found["seed"], found["name"]) == (2, 3, "x")
    assert found["dataset"] == "MOSES sample, triple bonds only"


def test_a_run_that_was_stopped_has_kept_what_the_whole_run_keeps(few, long_run, tmp_path):
    _, folder = long_run
    run(few, tmp_path, 2, keep_every=2)
    assert same_weights(tmp_path / "last", folder / "epoch_002")
    run(few, tmp_path, 4, keep_every=2)
    assert epochs_in(tmp_path) == epochs_in(folder)
    assert all(same_weights(tmp_path / name, folder / name) for name in epochs_in(folder))


def test_nothing_is_kept_unless_asked_for(few, tmp_path):
    run(few, tmp_path, 1)
    assert epochs_in(tmp_path) == []


# The command line.


def train(out, *further):
    return main(
        [
            *("train", "--config", "GT-ZINC", "--dataset", "moses-triple", "--limit", "12"),
            *("--threads", "1", "--epochs", "1", "--seed", "5", "--out", str(out)),
            *(part for name, value in SIZES.items() for part in ("--set", f"{name}={value}")),
            *further,
        ]
    )


HUB_SIZES = ("num_node_types=29", "num_edge_types=6", "unread_node_type=28")
HUB = [part for size in HUB_SIZES for part in ("--set", size)]


@pytest.fixture
def one_thread(same_number_of_threads):
    """The commands set the number of threads of the whole process."""


@pytest.mark.usefixtures("one_thread")
def test_a_run_with_a_change_says_so_in_every_row_and_keeps_its_weights(tmp_path, capsys):
    assert train(tmp_path, "--change", "global-node", "--keep-every", "1", *HUB) == 0
    title = "MOSES sample, triple bonds only, first 12, global node, edge types 4 and 5"
    assert set(read_emergence(tmp_path).summary["dataset"]) == {title}
    assert epochs_in(tmp_path) == ["epoch_000", "epoch_001"]
    config = json.loads((tmp_path / "epoch_001.json").read_text())["config"]
    sizes = config["num_node_types"], config["num_edge_types"], config["unread_node_type"]
    assert sizes == (29, 6, 28)

    assert train(tmp_path, *HUB) == USAGE_ERROR
    message = capsys.readouterr().err
    assert "holds the state of another run" in message
    assert "global node" in message


@pytest.mark.usefixtures("one_thread")
def test_the_seed_of_the_run_is_that_of_the_draw(tmp_path, triple):
    assert train(tmp_path, "--change", "uniform-types") == 0
    found = read_emergence(tmp_path).history[["train_loss", "val_loss"]].to_numpy()
    first = {split: getattr(triple, split)[:12] for split in SPLITS}
    config = CONFIGS["GT-ZINC"].replace(**SIZES, max_epochs=1)
    expected, other = (
        emergence(config, uniform_types(replace(triple, **first), seed), seed=5, progress=False)
        .history[["train_loss", "val_loss"]]
        .to_numpy()
        for seed in (5, 6)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.abs(found - other).min() > 1e-4


@pytest.mark.usefixtures("one_thread")
def test_a_table_that_is_too_small_for_the_new_types_is_refused(tmp_path, capsys):
    assert train(tmp_path / "out", "--change", "global-node") == USAGE_ERROR
    message = capsys.readouterr().err
    assert "num_node_types: the configuration has 28, but the data set" in message
    assert "has 29" in message
    assert not (tmp_path / "out").exists()


def test_an_unknown_change_is_refused_with_the_known_ones(tmp_path, capsys):
    assert train(tmp_path / "out", "--change", "rewired") == USAGE_ERROR
    message = capsys.readouterr().err
    assert message == f"error: --change rewired: expected one of {', '.join(CHANGES)}\n"
    assert not (tmp_path / "out").exists()


def test_weights_are_kept_of_a_whole_number_of_epochs(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "out", "--keep-every", "0")
    assert stopped.value.code == USAGE_ERROR
    assert "--keep-every: expected a whole number above 0, got '0'" in capsys.readouterr().err
