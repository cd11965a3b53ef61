"""What the page on backward oversmoothing says, against the tracked tables."""

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY

from studies.deep_smoothing import REMEDIES, remedy_table, smoothing_table

RESULTS = REPOSITORY / "data" / "results"
SMOOTH = ["no remedy", "LayerNorm", "LipschitzNorm"]


@pytest.fixture(scope="module")
def training():
    table = pd.read_csv(RESULTS / "smoothing_cora_training.csv.gz")
    return table.assign(share=table["loss"] / table["constant_loss"])


@pytest.fixture(scope="module")
def last(training):
    """The last step of every training."""
    rows = training[training["step"] == 1000]
    return rows.set_index(["optimiser", "variant", "num_layers", "seed"]).sort_index()


@pytest.fixture(scope="module")
def deep():
    return pd.read_csv(RESULTS / "smoothing_cora_deep.csv.gz")


@pytest.fixture(scope="module")
def networks(deep):
    """A row per network, by data set, depth, state and variant."""
    table = smoothing_table(deep)
    table["dataset"] = table["dataset"].str.split(",").str[0]
    return table.set_index(["dataset", "num_layers", "state", "variant"]).sort_index()


def test_rows_say_where_they_come_from(training, deep):
    for table in (training, deep):
        assert table["commit"].str.fullmatch("[0-9a-f]{40}").all()
        assert table["versions"].str.contains("torch-geometric").all()
        assert set(table["seed"]) == {0, 1, 2}
    keys = ["optimiser", "variant", "num_layers", "seed"]
    steps = training.groupby(keys)["step"].agg(["count", "max"])
    assert len(steps) == 2 * 4 * 6 * 3
    assert set(steps["count"]) == {101} and set(steps["max"]) == {1000}
    assert sorted(training["num_layers"].unique()) == [1, 2, 4, 8, 16, 32]
    titles = {"Cora, largest component", "20-regular, largest component"}
    assert set(deep["dataset"]) == titles and set(deep["num_layers"]) == {2, 16}
    assert set(deep["variant"]) == set(REMEDIES)
    assert len(deep) == 2 * 2 * 5 * 3 * (2 + 16)
    assert set(deep.loc[deep["state"] == "trained", "epochs"]) == {200}
    assert len(remedy_table(deep)) == 2 * 2 * 2 * 5


def test_from_eight_layers_on_graph_networks_are_constants_and_perceptrons_learn(training, last):
    median = last.groupby(level=["optimiser", "variant", "num_layers"])[["share", "gradient"]]
    median = median.median()
    for optimiser, variant in median.index.droplevel("num_layers").unique():
        shares = median.loc[(optimiser, variant), "share"]
        if variant.startswith("GNN"):
            assert shares.loc[8:].between(0.999, 1.001).all()
            assert (median.loc[(optimiser, variant), "gradient"].loc[8:] < 1e-3).all()
            assert (shares.loc[:2] < 0.9).all() and shares.loc[4] > 0.8
            if optimiser == "Adam":
                assert shares.loc[2] < 0.5
        else:
            assert shares.max() < 0.35 and (shares.loc[8:] < 0.03).all()
            is_descent = optimiser == "gradient descent"
            assert (
                (shares.idxmax(), shares.idxmin()) == (1, 32) if is_descent else shares.max() < 1e-4
            )
    # within some hundred steps, for good
    graph = training[training["variant"].str.startswith("GNN") & (training["num_layers"] >= 8)]
    assert (graph.query("step >= 300")["share"] < 1.02).all()


def values(networks, dataset, layers, state, variant, quantity):
    found = networks.loc[(dataset, layers, state, variant), quantity]
    assert len(found) == 3
    return found


def test_layer_and_lipschitz_norm_change_nothing_before_training_on_regular_graphs(networks):
    for variant in SMOOTH:
        features, errors = (
            values(networks, "20-regular", 16, "untrained", variant, quantity)
            for quantity in ("features", "errors")
        )
        assert features.between(1e-7, 1e-6).all() and errors.between(3e-4, 1.2e-3).all()
    for quantity, least in (("features", 0.98), ("errors", 0.995)):
        assert (values(networks, "20-regular", 16, "untrained", "PairNorm", quantity) > least).all()
    plain, residual = (
        networks.loc[("20-regular", 16, "untrained", variant)]
        for variant in ("no remedy", "residual")
    )
    for quantity in ("features", "errors"):
        assert residual[quantity].min() > 100 * plain[quantity].max()
    assert (residual["gradient"] > 100).all() and (residual["loss"] > 7 * np.log(4)).all()


def test_on_regular_graphs_those_that_smooth_end_as_constants(networks):
    for variant in SMOOTH:
        trained = networks.loc[("20-regular", 16, "trained", variant)]
        untrained = networks.loc[("20-regular", 16, "untrained", variant)]
        assert trained["loss"].to_numpy() == pytest.approx(np.log(4), abs=2e-3)
        assert (trained["gradient"] < 2e-4).all()
        assert trained["features"].max() < untrained["features"].min()
    pair = values(networks, "20-regular", 16, "trained", "PairNorm", "loss")
    shallow = values(networks, "20-regular", 2, "trained", "no remedy", "loss")
    assert (pair < 1).all() and 50 < pair.median() / shallow.median() < 200
    residual = networks.loc[("20-regular", 16, "trained", "residual")]
    assert (residual["errors"] > 0.95).all() and residual["loss"].between(1.3, 1.36).all()


def test_at_two_layers_a_bounded_score_costs_most(networks):
    trained = networks.loc[("20-regular", 2, "trained")]
    slow = trained.loc["LipschitzNorm"]
    others = trained.drop(index="LipschitzNorm")
    assert slow["loss"].min() > 4 * others["loss"].max()
    assert slow["loss"].min() > 30 * trained.loc["no remedy", "loss"].max()
    assert (slow["gradient"] > 0.5).all()


def test_on_cora_errors_stay_apart_and_all_but_one_network_fit(networks, deep):
    on_cora = deep[deep["dataset"].str.startswith("Cora")]
    assert on_cora["contraction"].to_numpy() == pytest.approx(0.996, abs=5e-4)
    assert on_cora["contraction"].iloc[0] ** 26 == pytest.approx(0.9, abs=0.02)
    assert (networks.loc[("Cora", 16, "untrained"), "errors"] > 0.7).all()
    trained = networks.loc[("Cora", 16, "trained")]
    failed = trained[trained["loss"] > 0.1]
    assert failed.index.tolist() == ["LayerNorm"] and (failed["features"] < 1e-5).all()
