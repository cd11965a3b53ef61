"""Data with changed edge types, small networks retrained on them, and their late means."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NOT_BUNDLED, few_molecules
from scipy import stats
from scipy.stats import chi2_contingency, chisquare

from studies.__main__ import USAGE_ERROR, main
from studies.bond_changes import (
    CHANGES,
    SHARES,
    count_neighbors,
    join_global_node,
    late_means,
    retrain,
    shuffle_types,
    split_types,
    type_shares,
    type_target,
    types_through_training,
    uniform_types,
)
from studies.data import ATOM_TYPES, DESCRIPTIONS, Splits, load, load_table, molecule_graph
from studies.emergence import emergence
from studies.published import CONFIGS
from studies.results import contrasts, read_emergence

SPLITS = ("train", "val", "test")
DRAWN = [name for name in CHANGES if not name.startswith(("global", "neighbour"))]
SIZES = {"hidden_channels": 16, "heads": 4, "num_layers": 1}
IMPROBABLE = 1e-3
"""A p-value below this would be a surprise; the seeds of the tests are fixed."""

each_change = pytest.mark.parametrize("name", CHANGES)
each_drawn = pytest.mark.parametrize("name", DRAWN)


@pytest.fixture(scope="module")
def triple(cache):
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


def test_the_second_bundled_sample_has_a_triple_bond_in_each_of_its_molecules(triple):
    assert frequencies(triple) == [0, 314_814, 119_114, 20_722]
    assert frequencies(triple, "val") == [0, 31_566, 11_932, 2_084]
    assert frequencies(triple, "test") == [0, 31_544, 11_794, 2_070]
    for split in SPLITS:
        assert all((graph.edge_type == 3).any() for graph in getattr(triple, split))


# What all changes have in common.


@each_change
def test_a_change_leaves_its_data_as_they_are_and_says_what_it_did(splits, name):
    before = [
        {key: value.clone() for key, value in graph.to_dict().items() if torch.is_tensor(value)}
        for split in SPLITS
        for graph in getattr(splits, split)
    ]
    changed = CHANGES[name](splits, 0)
    for (graph, other), values in zip(pairs(splits, changed), before, strict=True):
        assert all(torch.equal(graph[key], value) for key, value in values.items())
        assert other.edge_attr is other.edge_type, "what the model is given is what is named"
        assert "informative" in name or torch.equal(other.y, graph.y)
    about, original = changed.description, splits.description
    assert original == DESCRIPTIONS["moses-triple"]
    assert about.title.startswith(f"{original.title}, ")
    assert about.deviations[-1] == f"Changed: {about.title.removeprefix(original.title + ', ')}."
    used = set(torch.cat([types(getattr(changed, split)) for split in SPLITS]).tolist())
    assert used == set(about.edge_types)
    assert about.num_edge_types == max(used) + 1
    titles = {change(splits, 0).description.title for change in CHANGES.values()}
    assert len(titles) == len(CHANGES) == 8


@each_drawn
def test_both_directions_of_a_bond_have_one_type_and_the_bonds_stay(splits, name):
    for graph, other in pairs(splits, CHANGES[name](splits, 0)):
        assert torch.equal(other.edge_index, graph.edge_index)
        assert torch.equal(other.x, graph.x)
        of_pair = {}
        for *ends, kind in zip(*other.edge_index.tolist(), other.edge_type.tolist(), strict=True):
            of_pair.setdefault(frozenset(ends), []).append(kind)
        assert all(len(kinds) == 2 and len(set(kinds)) == 1 for kinds in of_pair.values())


@each_drawn
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


@each_change
def test_data_that_are_not_molecules_are_refused(name):
    about = replace(DESCRIPTIONS["moses"], title="TOX21", num_edge_types=(22, 6, 2))
    with pytest.raises(ValueError, match="TOX21 has not; use a data set"):
        CHANGES[name](Splits([], [], [], about), 0)
    if name in DRAWN:
        graph = molecule_graph("CC=O", 0.0)
        graph.edge_index = graph.edge_index[:, [0, 2, 1, 3]]
        graph.edge_type = torch.tensor([1, 2, 1, 3])
        data = Splits([graph], [graph], [graph], DESCRIPTIONS["moses"])
        with pytest.raises(ValueError, match="both directions of a bond next to each other"):
            CHANGES[name](data, 0)


# Each change.


@pytest.mark.parametrize("change", [shuffle_types, uniform_types])
def test_types_have_nothing_to_do_with_the_bonds_any_more(splits, change):
    changed = change(splits, 0)
    before, after = (types(data.train)[::2] for data in (splits, changed))
    table = torch.zeros(3, 3, dtype=torch.long)
    table.index_put_((before - 1, after - 1), torch.tensor(1), accumulate=True)
    assert chi2_contingency(table.numpy()).pvalue > IMPROBABLE
    assert chi2_contingency(np.diag(table.sum(1)) + 1).pvalue < 1e-9, "the test sees dependence"
    if change is shuffle_types:
        for split in SPLITS:
            assert frequencies(changed, split) == frequencies(splits, split)
    else:
        assert chisquare(np.array(frequencies(changed))[1:] // 2).pvalue > IMPROBABLE


def test_divided_types_are_equally_frequent_and_each_comes_from_one_type(triple):
    changed = split_types(triple, 0)
    names = changed.description.edge_types
    # 314814 / 20722 = 15.19 and 119114 / 20722 = 5.75, rounded.
    expected = [f"single {k}" for k in range(1, 16)]
    expected += [f"double {k}" for k in range(1, 7)] + ["triple 1"]
    assert names == dict(enumerate(expected, start=1))
    counts = np.array(frequencies(changed))
    np.testing.assert_allclose(counts[1:], 20_722, rtol=0.08)
    for parts, total in ((counts[1:16], 314_814), (counts[16:22], 119_114)):
        assert parts.sum() == total
        assert chisquare(parts // 2).pvalue > IMPROBABLE
    for split in SPLITS:
        old, new = types(getattr(triple, split)), types(getattr(changed, split))
        for i, name in names.items():
            (origin,) = old[new == i].unique().tolist()
            assert triple.description.edge_types[origin] == name.split()[0]
    with pytest.raises(ValueError, match=r"MOSES sample, .* no edge of the type double, triple"):
        split_types(of("CCO"), 0)


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
        split: [target_by_loop(g, g.edge_type, informative) for g in getattr(changed, split)]
        for split in SPLITS
    }
    scale = np.std(by_loop["train"], ddof=1)
    for split in SPLITS:
        found = torch.cat([graph.y for graph in getattr(changed, split)])
        expected = np.array(by_loop[split])[:, None] / scale
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    old, new = types(splits.train)[::2], types(changed.train)[::2]
    for kind in (1, 2, 3):
        drawn = new[old == kind].bincount(minlength=4)[1:].numpy()
        assert chisquare(drawn, drawn.sum() * np.array(SHARES)).pvalue > IMPROBABLE
    names = {1: "type 1 (70%)", 2: "type 2 (25%)", 3: "type 3 (5%)"}
    names[informative] += ", informative"
    assert changed.description.edge_types == names


def test_acetonitrile_with_a_global_node_and_with_its_neighbors_counted_by_hand():
    changed = join_global_node(of("CC#N"))
    graph = changed.test[0]
    assert graph.x.tolist() == [0, 0, 2, 28]
    assert graph.edge_index.tolist() == [
        [0, 1, 1, 2, 0, 1, 2, 3, 3, 3],
        [1, 0, 2, 1, 3, 3, 3, 0, 1, 2],
    ]
    assert graph.edge_type.tolist() == [1, 1, 3, 3, 4, 4, 4, 5, 5, 5]
    assert changed.description.num_node_types == 29
    changed = join_global_node(of("CC#N"), edge_types=(3, 3))
    assert changed.test[0].edge_type.tolist() == [1, 1, 3, 3, 3, 3, 3, 3, 3, 3]
    names = {1: "single", 2: "double", 3: "triple / atom to global / global to atom"}
    assert changed.description.edge_types == names
    counted = count_neighbors(of("CC#N"))
    assert counted.test[0].x.tolist() == [28, 56, 2 + 28]  # of types 0, 0 and 2
    assert counted.description.num_node_types == 28 * 3
    assert counted.test[0].edge_type.tolist() == [1, 1, 3, 3]


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


# Networks.


def train(out, *further):
    sizes = (part for name, value in SIZES.items() for part in ("--set", f"{name}={value}"))
    data = ("--config", "GT-ZINC", "--dataset", "moses-triple", "--limit", "12", "--threads", "1")
    return main(
        ["train", *data, "--epochs", "1", "--seed", "5", "--out", str(out), *sizes, *further]
    )


@pytest.mark.usefixtures("same_number_of_threads")
def test_the_seed_of_a_run_of_the_command_line_is_that_of_the_draw(tmp_path, triple):
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
    assert np.abs(found - other).min() > 1e-5


def test_an_unknown_change_is_refused_with_the_known_ones(tmp_path, capsys):
    assert train(tmp_path / "out", "--change", "rewired") == USAGE_ERROR
    message = capsys.readouterr().err
    assert message == f"error: --change rewired: expected one of {', '.join(CHANGES)}\n"
    assert not (tmp_path / "out").exists()


def test_retraining_gives_every_change_seed_and_state(cache):
    splits = few_molecules(48, 16, 24)
    tiny = CONFIGS["SAN-ZINC"].replace(**SIZES, batch_size=16, max_epochs=1)
    changes = {"as it is": lambda splits, seed: splits, "shuffled": shuffle_types}
    changes["global"] = join_global_node
    found = retrain(tiny, splits, changes, [0, 1], progress=False)
    sizes = found.groupby(["run", "seed", "state"])["label"].size().unstack("run")
    assert (sizes == [3, 5, 3]).all(axis=None) and len(sizes) == 4
    base = found.query("state == 'base'").set_index(["run", "seed", "label"])
    # The same seed starts from the same weights, whatever the data.
    pd.testing.assert_series_equal(
        base.loc["as it is"]["gate_median"], base.loc["shuffled"]["gate_median"]
    )
    assert (base["moved"] == 0).all() and found["val_loss"].gt(0).all()
    best = found.query("state == 'best'")
    assert (best.groupby(["run", "seed"])["moved"].max() > 0).all()
    table = type_shares({"a": splits, "b": join_global_node(splits)})
    assert table.loc["a", "type 1"] == f"{float((types(splits.train) == 1).float().mean()):.2%}"
    assert table.loc["a", "type 4"] == ""
    assert table.loc["b", "type 4"] == table.loc["b", "type 5"]


def test_late_means_are_geometric_and_leave_early_epochs_and_other_states_out():
    rows = [
        dict(run="a", label="x", seed=seed, epoch=epoch, state=f"epoch_{epoch:03d}")
        | dict(max_ratio=ratio, gate_median=2.0, measured=0.5 * (ratio > 1000))
        for seed, ratios in enumerate([[7.0, 10.0, 4000.0], [1.0, 2.0, 8.0]])
        for epoch, ratio in zip((10, 15, 20), ratios, strict=True)
    ]
    table = pd.DataFrame(rows)
    best = table.iloc[[2]].assign(state="best", max_ratio=1e9)
    found = late_means(pd.concat([table, best])).set_index("seed")
    np.testing.assert_allclose(found["max_ratio"], [200.0, 4.0])
    np.testing.assert_allclose(found["gate_median"], 2.0)
    assert found["measured"].tolist() == [0.25, 0.0]
    assert found["epochs"].tolist() == [2, 2]
    assert found["epochs_with"].tolist() == [1, 0]
    grid = types_through_training(table, {"max_ratio": "ratio"}, logarithmic=["max_ratio"])
    (line, other) = (line for line in grid.axes[0, 0].lines if len(line.get_xdata()))
    np.testing.assert_allclose(line.get_xydata(), [[10, 7], [15, 10], [20, 4000]])
    np.testing.assert_allclose(other.get_ydata(), [1, 2, 8])


def test_a_contrast_is_a_factor_with_the_t_interval_of_its_logarithm():
    rows = [
        {"run": run, "label": "x", "seed": seed, "max_ratio": ratio}
        for run, ratios in (("a", [1.0, 2.0, 5.0]), ("b", [10.0, 10.0, 125.0, 3.0]))
        for seed, ratio in enumerate(ratios)
    ]
    pairs = {"b over a": (("a", "x"), ("b", "x"))}
    found = contrasts(pd.DataFrame(rows), pairs).loc["b over a"]
    logs = np.log([10.0, 5.0, 25.0])  # a seed that one of them lacks is left out
    assert found["factor"] == pytest.approx(np.exp(logs.mean()))
    low, high = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert [found["low"], found["high"]] == pytest.approx([np.exp(low), np.exp(high)])
    assert [found["least"], found["greatest"]] == pytest.approx([5.0, 25.0])
    with pytest.raises(ValueError, match="b over a: expected two common seeds or more, got 1"):
        contrasts(pd.DataFrame([rows[0], rows[3]]), pairs)
