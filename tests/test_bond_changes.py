"""Data with changed edge types, and late means of networks trained on them."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import all_graphs
from scipy import stats

from studies.__main__ import main
from studies.bond_changes import (
    CHANGES,
    NODE_TYPES,
    ROLES,
    SHARES,
    cross_types,
    factors,
    late_means,
    types_through_training,
)
from studies.data import ATOM_TYPES, DESCRIPTIONS, Splits, directions, load, molecule_graph
from studies.edge_kinds import distinct_edges
from studies.emergence import emergence
from studies.published import CONFIGS
from studies.results import read_emergence

DRAWN = [name for name in CHANGES if not name.startswith(("global", "neighbour"))]
SIZES = {"hidden_channels": 16, "heads": 4, "num_layers": 1}


@pytest.fixture(scope="module")
def splits(cache):
    """Molecules with a triple bond, of each second one the edges in an order at random."""
    whole, generator = load("moses-triple"), torch.Generator().manual_seed(0)
    few = {"train": whole.train[:400], "val": whole.val[:50], "test": whole.test[:50]}
    return replace(whole, **{name: mixed(graphs, generator) for name, graphs in few.items()})


def mixed(graphs, generator):
    graphs = [graph.clone() for graph in graphs]
    for graph in graphs[::2]:
        order = torch.randperm(graph.num_edges, generator=generator)
        graph.edge_index, graph.edge_type = graph.edge_index[:, order], graph.edge_type[order]
        graph.edge_attr = graph.edge_type
    return graphs


def of(*smiles):
    """Splits that all hold the same few molecules."""
    graphs = [molecule_graph(text, 0.5) for text in smiles]
    return Splits(graphs, graphs, graphs, DESCRIPTIONS["moses"])


def types(graphs):
    return torch.cat([graph.edge_type for graph in graphs])


def of_bonds(graphs):
    """The type of each bond once."""
    return torch.cat([graph.edge_type[directions(graph)[0]] for graph in graphs])


def assert_targets(changed, worth):
    """Targets are sums over edges of what each is worth, over their deviation in training."""
    graphs = all_graphs(changed)
    by_loop = [
        sum(map(worth, graph.x[graph.edge_index[0]].tolist(), graph.edge_type.tolist()))
        for graph in graphs
    ]
    expected = np.array(by_loop) / np.std(by_loop[: len(changed.train)], ddof=1)
    found = torch.cat([graph.y for graph in graphs]).flatten()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def is_drawn_by(types, shares):
    """Whether types 1, 2, ... may have been drawn with these probabilities."""
    counts = types.bincount(minlength=len(shares) + 1)[1:].numpy()
    return stats.chisquare(counts, counts.sum() * np.array(shares)).pvalue > 1e-3


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_copies_its_data_says_what_it_did_and_draws_once_for_a_bond(splits, name):
    before = [{k: v.clone() for k, v in g if torch.is_tensor(v)} for g in all_graphs(splits)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    changed, again, other = (CHANGES[name](splits, seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state), "torch's global state was used"
    for graph, new, values in zip(all_graphs(splits), all_graphs(changed), before, strict=True):
        assert all(torch.equal(graph[key], value) for key, value in values.items())
        assert new.edge_attr is new.edge_type, "what the model is given is what is named"
        assert "informative" in name or torch.equal(new.y, graph.y)
        if name in DRAWN:
            assert torch.equal(new.edge_index, graph.edge_index) and torch.equal(new.x, graph.x)
        ends = new.edge_index.T.tolist()
        kinds = {(*pair, kind) for pair, kind in zip(ends, new.edge_type.tolist(), strict=True)}
        assert "global" in name or kinds == {(i, j, kind) for j, i, kind in kinds}
    assert torch.equal(types(all_graphs(changed)), types(all_graphs(again)))
    assert torch.equal(types(all_graphs(changed)), types(all_graphs(other))) == (name not in DRAWN)
    about, original = changed.description, splits.description
    what = about.title.removeprefix(f"{original.title}, ")
    assert about.deviations == (*original.deviations, f"Changed: {what}.")
    used = set(types(all_graphs(changed)).tolist())
    assert used == set(about.edge_types) and about.num_edge_types == max(used) + 1
    about = replace(DESCRIPTIONS["moses"], title="TOX21", num_edge_types=(22, 6, 2))
    with pytest.raises(ValueError, match="TOX21 has not; use a data set"):
        CHANGES[name](Splits([], [], [], about), 0)


def test_shuffled_types_are_as_frequent_as_before_and_uniform_ones_equally_frequent(splits):
    changed = (CHANGES[name](splits, 0) for name in ("shuffled-types", "uniform-types"))
    before, shuffled, uniform = (of_bonds(each.train) for each in (splits, *changed))
    assert torch.equal(shuffled.bincount(), before.bincount())
    assert uniform.min() == 1 and is_drawn_by(uniform, [1 / 3] * 3)
    # The type of a bond no longer says what it was.
    for kind in (1, 2):
        assert is_drawn_by(shuffled[before == kind], before.bincount()[1:].numpy() / len(before))


def test_divided_types_are_equally_frequent_and_each_comes_from_one_type(splits):
    changed = CHANGES["split-types"](splits, 0)
    old, new = of_bonds(all_graphs(splits)), of_bonds(all_graphs(changed))
    single, double, triple = of_bonds(splits.train).bincount()[1:].tolist()
    parts = round(single / triple), round(double / triple)
    names = [f"single {k + 1}" for k in range(parts[0])]
    names += [f"double {k + 1}" for k in range(parts[1])]
    assert changed.description.edge_types == dict(enumerate([*names, "triple 1"], start=1))
    assert torch.equal(old, 1 + (new > parts[0]).long() + (new > sum(parts)).long())
    assert is_drawn_by(new[old == 1], [1 / parts[0]] * parts[0])
    assert is_drawn_by(new[old == 2] - parts[0], [1 / parts[1]] * parts[1])
    with pytest.raises(ValueError, match=r"MOSES sample, .* no edge of the type double, triple"):
        CHANGES["split-types"](of("CCO"), 0)


@pytest.mark.parametrize(("name", "informative"), [("frequent", 1), ("rare", 3)])
def test_the_target_is_the_excess_of_informative_edges_from_heteroatoms(splits, name, informative):
    def worth(source, kind):
        is_carbon = ATOM_TYPES[source].split()[0] == "C"
        return 0.0 if is_carbon else (kind == informative) - SHARES[informative - 1]

    changed = CHANGES[f"{name}-informative"](splits, 0)
    assert_targets(changed, worth)
    old, new = of_bonds(splits.train), of_bonds(changed.train)
    assert all(is_drawn_by(new[old == kind], SHARES) for kind in (1, 2, 3))


def test_frequency_is_crossed_with_meaning_in_every_kind(splits):
    changed = cross_types(splits, 0)
    assert is_drawn_by(of_bonds(changed.train), [share for share, _ in ROLES.values()])
    kinds = distinct_edges(all_graphs(changed))
    assert len(kinds) == 4 * NODE_TYPES**2  # every type meets every pair of node types
    for _, of_type in kinds.groupby("edge"):
        assert of_type["count"].max() < 4 * of_type["count"].min()
    assert_targets(changed, lambda source, kind: (kind in (1, 3)) * (-1) ** source)
    assert abs(torch.cat([graph.y for graph in all_graphs(changed)]).mean()) < 0.1
    assert changed.description.num_node_types == NODE_TYPES
    assert not torch.equal(splits.train[0].x, changed.train[0].x), "the argument stays as it is"
    assert torch.equal(types(all_graphs(changed)), types(all_graphs(cross_types(splits, 0))))


def test_acetonitrile_with_a_global_node_and_with_its_neighbors_counted_by_hand():
    changed = CHANGES["global-node"](of("CC#N"), 0)
    graph = changed.test[0]
    assert graph.x.tolist() == [0, 0, 2, 28] and changed.description.num_node_types == 29
    assert graph.edge_index.tolist() == [
        [0, 1, 1, 2, 0, 1, 2, 3, 3, 3],
        [1, 0, 2, 1, 3, 3, 3, 0, 1, 2],
    ]
    assert graph.edge_type.tolist() == [1, 1, 3, 3, 4, 4, 4, 5, 5, 5]
    changed = CHANGES["global-node-triple"](of("CC#N"), 0)
    assert changed.test[0].edge_type.tolist() == [1, 1, 3, 3, 3, 3, 3, 3, 3, 3]
    assert changed.description.edge_types[3] == "triple / atom to global / global to atom"
    counted = CHANGES["neighbour-count"](of("CC#N"), 0)
    assert counted.test[0].x.tolist() == [28, 56, 2 + 28]  # of types 0, 0 and 2
    assert counted.description.num_node_types == 28 * 3
    assert counted.test[0].edge_type.tolist() == [1, 1, 3, 3]


@pytest.mark.usefixtures("same_number_of_threads")
def test_the_seed_of_a_run_of_the_command_line_is_that_of_the_draw(cache, tmp_path):
    sizes = (part for name, value in SIZES.items() for part in ("--set", f"{name}={value}"))
    command = ["train", "--config", "GT-ZINC", "--dataset", "moses-triple", "--limit", "12", *sizes]
    command += ["--epochs", "1", "--seed", "5", "--threads", "1", "--out", str(tmp_path / "run")]
    assert main([*command, "--change", "uniform-types"]) == 0
    found = read_emergence(tmp_path / "run").history["val_loss"].item()
    whole = load("moses-triple")
    few = Splits(whole.train[:12], whole.val[:12], whole.test[:12], whole.description)
    config = CONFIGS["GT-ZINC"].replace(**SIZES, max_epochs=1)
    for seed in (5, 6):
        run = emergence(config, CHANGES["uniform-types"](few, seed), seed=5, progress=False)
        is_same = run.history["val_loss"].item() == pytest.approx(found, rel=1e-5)
        assert is_same == (seed == 5)


def test_late_means_are_geometric_and_leave_early_epochs_and_other_states_out():
    rows = [
        dict(run="a", label="x", seed=seed, epoch=epoch, state=f"epoch_{epoch:03d}")
        | dict(max_ratio=ratio, gate_median=2.0, measured=0.5 * (ratio > 1000))
        for seed, ratios in enumerate([[7.0, 10.0, 4000.0], [1.0, 2.0, 8.0]])
        for epoch, ratio in zip((10, 15, 20), ratios, strict=True)
    ]
    table = pd.DataFrame(rows)
    best = table.iloc[[2]].assign(state="best", max_ratio=1e9)
    found = late_means(pd.concat([table, best]))
    np.testing.assert_allclose(found["max_ratio"], [200.0, 4.0])
    np.testing.assert_allclose(found["gate_median"], 2.0)
    columns = ["measured", "epochs", "epochs_with"]
    assert found[columns].to_numpy().tolist() == [[0.25, 2, 1], [0.0, 2, 0]]
    grid = types_through_training(table, {"max_ratio": "ratio"}, logarithmic=["max_ratio"])
    lines = [line.get_xydata() for line in grid.axes[0, 0].lines if len(line.get_xdata())]
    np.testing.assert_allclose(lines[0], [[10, 7], [15, 10], [20, 4000]])


def test_a_contrast_is_a_factor_with_the_t_interval_of_its_logarithm():
    ratios = {"a": [1.0, 2.0, 5.0], "b": [10.0, 10.0, 125.0, 3.0]}
    rows = [(run, "x", seed, r) for run, each in ratios.items() for seed, r in enumerate(each)]
    table = pd.DataFrame(rows, columns=["run", "label", "seed", "max_ratio"])
    found = factors(table, {"b over a": (("a", "x"), ("b", "x"))}).loc["b over a"]
    logs = np.log([10.0, 5.0, 25.0])  # a seed that one of them lacks is left out
    low, high = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    expected = [np.exp(logs.mean()), np.exp(low), np.exp(high), 5.0, 25.0]
    p = stats.ttest_1samp(logs, 0).pvalue
    assert found.tolist() == pytest.approx([*expected, p, p])
