"""The controls: targets that have nothing to do with the graphs, and networks without training."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import few_molecules
from torch_geometric.data import Data

from mapkg.evaluation import calibrate_batch_norm
from mapkg.measures import ActivationSummary
from mapkg.models import build
from studies import controls
from studies.controls import permute_targets, untrained
from studies.data import DESCRIPTIONS, Splits
from studies.emergence import emergence
from studies.observation import summarise
from studies.provenance import commit, versions
from studies.published import CONFIGS
from studies.train import seed_all

SMALL = CONFIGS["GT-ZINC"].replace(
    hidden_channels=8, heads=2, num_layers=2, batch_size=16, max_epochs=2
)
SEEDS = (5, 3)


@pytest.fixture(scope="module")
def splits():
    return few_molecules(40, 20, 20)


@pytest.fixture(scope="module")
def table(splits):
    return untrained(SMALL, splits, SEEDS, name="GT-ZINC", progress=False)


def numbered(first, number):
    """Graphs that can be told apart, whose target is their number."""
    return [
        Data(x=torch.tensor([i]), y=torch.tensor([[float(i)]]), smiles=str(i))
        for i in range(first, first + number)
    ]


def values(graphs):
    return [graph.y.item() for graph in graphs]


# Targets permuted.


@pytest.fixture
def whole():
    return Splits(
        train=numbered(0, 50),
        val=numbered(100, 30),
        test=numbered(200, 10),
        description=DESCRIPTIONS["moses"],
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_each_split_keeps_its_targets_in_another_order(whole, split):
    graphs, found = getattr(whole, split), getattr(permute_targets(whole, 0), split)
    assert sorted(values(found)) == values(graphs), "every target once, none of another split"
    stayed = sum(one == other for one, other in zip(values(found), values(graphs), strict=True))
    assert stayed <= 5, "of a random permutation one stays on average"


def test_the_graphs_themselves_stay_in_their_order(whole):
    found = permute_targets(whole, 0)
    for split in ("train", "val"):
        for graph, before in zip(getattr(found, split), getattr(whole, split), strict=True):
            assert graph.x is before.x
            assert graph.smiles == before.smiles
            assert graph is not before


def test_the_data_that_were_given_are_not_changed(whole):
    permute_targets(whole, 0)
    assert values(whole.train) == list(range(50))
    assert values(whole.val) == list(range(100, 130))


def test_the_test_split_keeps_its_targets(whole):
    assert permute_targets(whole, 0).test is whole.test
    assert values(whole.test) == list(range(200, 210))


def test_the_permutation_depends_on_the_seed_alone(whole):
    torch.manual_seed(1)
    first = values(permute_targets(whole, 7).train)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert values(permute_targets(whole, 7).train) == first
    assert torch.equal(torch.get_rng_state(), state), "torch's global state was used"
    assert values(permute_targets(whole, 8).train) != first


def test_targets_of_several_columns_move_together():
    graphs = [Data(x=torch.tensor([i]), y=torch.tensor([[i, -float(i)]])) for i in range(20)]
    about = replace(DESCRIPTIONS["moses"], num_targets=2)
    found = permute_targets(Splits(graphs, graphs, graphs, about), 0)
    for graph in found.train:
        assert graph.y[0, 0] == -graph.y[0, 1]


def test_the_title_says_that_targets_are_permuted_and_the_rest_of_the_description_stays(whole):
    found = permute_targets(whole, 0).description
    assert found.title == "MOSES sample, targets permuted"
    assert replace(found, title="MOSES sample") == whole.description


def test_training_on_permuted_targets_is_another_run_from_the_same_start(splits):
    found = [
        emergence(SMALL, data, seed=1, progress=False)
        for data in (splits, permute_targets(splits, 1))
    ]
    plain, permuted = (run.summary.set_index(["state", "layer"]) for run in found)
    assert plain.loc["base", "max_ratio"].equals(permuted.loc["base", "max_ratio"])
    assert plain.loc["base", "test_mae"].equals(permuted.loc["base", "test_mae"])
    assert (plain.loc["last", "max_ratio"] != permuted.loc["last", "max_ratio"]).all()
    assert set(permuted["dataset"]) == {"MOSES sample, targets permuted"}


def test_nodes_cannot_be_permuted_and_the_error_says_what_can(papers):
    with pytest.raises(ValueError, match=r"expected whole graphs, .* nodes of one graph"):
        permute_targets(papers, 0)


# Networks without training.


def test_every_seed_state_and_layer_has_its_row(table):
    expected = [
        [seed, state, layer]
        for seed in SEEDS
        for state in ("base", "base_calibrated")
        for layer in range(2)
    ]
    assert table[["seed", "state", "layer"]].values.tolist() == expected


def test_the_statistics_are_those_of_the_seeded_network(table, splits):
    for seed in SEEDS:
        seed_all(seed)
        model = build(SMALL)
        for state in ("base", "base_calibrated"):
            if state == "base_calibrated":
                calibrate_batch_norm(model, splits.train, batch_size=16)
            found = summarise(model, splits.test, heads=2, batch_size=16)
            expected = pd.DataFrame([summary.statistics() for summary in found.values()])
            rows = table[(table["seed"] == seed) & (table["state"] == state)]
            pd.testing.assert_frame_equal(
                rows[expected.columns].reset_index(drop=True), expected, check_exact=True
            )


def test_they_are_the_untrained_networks_of_a_run_with_that_seed(table, splits):
    run = emergence(SMALL.replace(max_epochs=0), splits, seed=3, progress=False)
    rows = run.summary[run.summary["state"].isin(["base", "base_calibrated"])]
    found = table[table["seed"] == 3]
    shared = ["state", "layer", *ActivationSummary(heads=2).statistics()]
    pd.testing.assert_frame_equal(
        found[shared].reset_index(drop=True), rows[shared].reset_index(drop=True)
    )


def test_every_row_says_where_it_comes_from(table):
    expected = {
        "config": "GT-ZINC",
        "dataset": "MOSES sample",
        "versions": versions(),
        "commit": commit(),
    }
    for column, value in expected.items():
        assert (table[column] == value).all(), column


def test_only_the_first_training_graphs_calibrate(splits, table, monkeypatch):
    monkeypatch.setattr(controls, "CALIBRATION_GRAPHS", 16)
    first = replace(splits, train=splits.train[:16])
    found = untrained(SMALL, splits, [3], name="GT-ZINC", progress=False)
    pd.testing.assert_frame_equal(
        found, untrained(SMALL, first, [3], name="GT-ZINC", progress=False)
    )
    of_all = table[table["seed"] == 3].set_index(["state", "layer"])["max_ratio"]
    of_few = found.set_index(["state", "layer"])["max_ratio"]
    assert of_few["base"].equals(of_all["base"])
    # No BatchNorm comes before the scores of the first layer.
    assert of_few["base_calibrated", 0] == of_all["base_calibrated", 0]
    assert of_few["base_calibrated", 1] != of_all["base_calibrated", 1]


def test_sizes_that_are_open_are_taken_from_the_data(splits):
    open_sizes = SMALL.replace(num_node_types=None, num_edge_types=None)
    found = untrained(open_sizes, splits, [3], progress=False)
    expected = untrained(SMALL, splits, [3], progress=False)
    pd.testing.assert_frame_equal(found, expected)
    assert (found["config"] == "custom").all()


def test_a_configuration_that_does_not_fit_the_data_is_refused(splits):
    with pytest.raises(ValueError, match="num_node_types: the configuration has 5"):
        untrained(SMALL.replace(num_node_types=5), splits, [0], progress=False)


def test_a_layer_without_scores_of_heads_has_no_share_of_saturated_sums(splits):
    gatv2 = CONFIGS["GATv2-ZINC"].replace(hidden_channels=8, heads=2, num_layers=1, batch_size=16)
    assert untrained(gatv2, splits, [0], progress=False)["share_saturated"].isna().all()
    gt = untrained(SMALL, splits, [0], progress=False)
    assert gt["share_saturated"].between(0, 1).all()
