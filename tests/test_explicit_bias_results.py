"""What the page on the Explicit Bias Term says, against the tracked tables."""

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY

from mapkg.measures import MASSIVE_RATIO
from studies.remedies import (
    ARMS,
    COUNTED,
    OTHERS,
    by_network,
    later_epochs,
    read_remedies,
    remedy_table,
)

RESULTS = REPOSITORY / "data" / "results"
NETWORKS = ("GT", "GraphiT", "SAN")


@pytest.fixture(scope="module")
def idle():
    tables = [
        pd.read_csv(RESULTS / f"idle_{name.lower()}_zinc.csv.gz").assign(label=name)
        for name in NETWORKS
    ]
    return pd.concat(tables, ignore_index=True)


def test_rows_say_where_they_come_from(idle):
    assert len(idle) == 3 * 3 * 10 * 2 and set(idle["seed"]) == {0, 1, 2}
    assert idle["commit"].str.fullmatch("[0-9a-f]{40}").all()
    assert idle["versions"].str.contains("torch-geometric").all()
    assert set(idle["explicit_bias"]) == {"none"}, "trained without a term"
    epochs = idle.groupby("label")["epochs"].unique()
    assert {label: list(values) for label, values in epochs.items()} == {
        "GT": [100],
        "GraphiT": [50],
        "SAN": [50],
    }


def test_a_term_that_does_nothing_removes_every_massive_activation(idle):
    largest = idle.groupby(["label", "seed", "term"])["max_ratio"].max().unstack("term")
    assert (largest[False] > MASSIVE_RATIO).sum() == 8 and len(largest) == 9
    assert (largest[True] < 500).all()
    change = idle.groupby("label")["largest_change"].max()
    assert change["GraphiT"] < 5e-6 and change["SAN"] < 5e-6
    assert (idle.query("label == 'GT'")["largest_change"] > 1).all()


def test_it_fills_the_median_and_leaves_the_largest_score(idle):
    parts = ["max_abs", "row_median_q50"]
    factors = idle[idle["term"]].set_index(["label", "seed", "layer"])[parts]
    factors /= idle[~idle["term"]].set_index(["label", "seed", "layer"])[parts]
    # in GT a layer that is not the first is given other edges
    undisturbed = factors.drop("GT", level="label")
    assert undisturbed["max_abs"].between(0.5, 1.5).all()
    assert (factors["row_median_q50"] > 2).all()
    first = factors["row_median_q50"].xs(0, level="layer")
    assert (first > 9).all()
    filled = idle[idle["term"]]["row_median_q50"]
    assert filled.between(0.1, 1).all()


def test_a_term_costs_a_tenth_of_the_time_or_less_and_the_published_one_saves_some():
    times = pd.read_csv(RESULTS / "remedy_times.csv.gz")
    median = times.groupby(["label", "arm"])["factor"].median()
    for label in NETWORKS:
        assert median[label, "none"] == 1
        for arm in ("bias", "intended", "sink"):
            assert 0.98 < median[label, arm] < 1.13
    assert median["GT", "intended"] < 1.06
    for label in ("GraphiT", "SAN"):
        assert median[label, "published"] < 0.9


# Networks trained with the term.


@pytest.fixture(scope="module")
def trained():
    return read_remedies(RESULTS, "zinc", ARMS)


@pytest.fixture(scope="module")
def networks(trained):
    return by_network(trained, "mae").assign(
        arm=lambda t: t["run"].map({title: a for a, title in ARMS.items()})
    )


def means(networks, column):
    logs = networks.assign(**{column: np.log(networks[column])})
    return np.exp(logs.groupby(["label", "arm"])[column].mean())


def test_trained_networks_say_where_they_come_from(trained):
    for table in (trained.layers, trained.epochs):
        assert table.groupby(["label", "run"])["seed"].nunique().eq(3).all()
        assert set(table["epochs"]) == {20} and table["dataset"].str.startswith("ZINC-12k").all()
        assert table["commit"].str.fullmatch("[0-9a-f]{40}").all()
        changes = table.groupby(["label", "run"])["changes"].unique()
        assert changes.map(len).eq(1).all()
        assert "sink" in changes["SAN", "sink"][0]
    late = trained.epochs[trained.epochs["epoch"] > 10]["epoch"]
    assert sorted(late.unique()) == list(range(11, 21)), "ten epochs"


ALIKE = {"intended": "bias", "term": "none"}
"""The intended term with and without biases, and what differs from it in the term alone."""


def test_with_the_term_hardly_any_is_massive_and_scores_are_as_large(networks):
    with_biases = networks[networks["arm"].isin(["published", "intended"])]
    assert (with_biases["largest"] < MASSIVE_RATIO / 2).all()
    assert (with_biases["epochs_with"] == 0).all()
    alone = networks[networks["arm"] == "term"].set_index(["label", "seed"])["epochs_with"]
    assert alone[alone > 0].round(6).to_dict() == {("GT", 0): 0.3}, "one of three, three of ten"
    largest, median = means(networks, "max_abs"), means(networks, "row_median_q50")
    scores = pd.DataFrame(
        {
            (network, arm): (
                largest[network, arm] / largest[network, without],
                median[network, arm] / median[network, without],
            )
            for network in NETWORKS
            for arm, without in ALIKE.items()
        },
        index=["largest", "median"],
    ).T
    assert scores["largest"].round(2).between(0.94, 1.37).all()
    assert scores["largest"].max().round(2) == 1.36 and scores["largest"].min().round(2) == 0.94
    assert scores["largest"].idxmax()[0] == "SAN" and scores["largest"].idxmin()[0] == "GT"
    assert scores["median"].between(6, 19.5).all()
    assert scores.loc["GT", "median"].min() > 18 and scores["median"].min() < 6.5


def test_biases_alone_take_some_and_graphit_has_none_anyway(networks):
    epochs = networks.pivot(index=["label", "seed"], columns="arm", values="epochs_with")
    assert (epochs.loc["GraphiT"] == 0).all(axis=None)
    for network in ("GT", "SAN"):
        assert (epochs.loc[network, "none"] >= 0.5).all()
        assert (epochs.loc[network, "bias"] == 0).sum() == 1
    san = networks[networks["label"] == "SAN"].groupby("arm")["largest"]
    assert san.max()["bias"] < san.min()["none"]


def test_the_term_costs_accuracy_only_where_it_takes_attention(networks):
    error = networks.groupby(["label", "arm"])["test_mae"].mean()
    for network in NETWORKS:
        for arm, without in ALIKE.items():
            assert abs(error[network, arm] / error[network, without] - 1) < 0.05
    for network, intended, published in (("GraphiT", 0.44, 0.54), ("SAN", 0.46, 0.53)):
        assert error[network, "published"] / error[network, "none"] > 1.1
        assert error[network, "published"] / error[network, "bias"] > 1.1
        assert round(error[network, "intended"], 2) == intended, "what differences.md says"
        assert round(error[network, "published"], 2) == published
        by_seed = networks[networks["label"] == network].groupby("arm")["test_mae"]
        assert by_seed.min()["published"] > max(by_seed.max()["none"], by_seed.max()["bias"])


def assert_intervals_overlap(texts):
    ends = texts.str.extract(r"\[(.*), (.*)\]").astype(float).groupby("network")
    assert (ends[0].max() < ends[1].min()).all()


def test_on_proteins_the_term_takes_all_and_biases_do_not():
    arms = {arm: ARMS[arm] for arm in ("none", "bias", "intended")}
    proteins = read_remedies(RESULTS, "proteins", arms)
    assert set(proteins.epochs["epochs"]) == {60}
    late = proteins.epochs[proteins.epochs["epoch"] > 30]
    assert late.groupby(["label", "run", "seed"])["epoch"].nunique().eq(6).all()
    assert proteins.layers.groupby(["label", "run"])["seed"].nunique().eq(3).all()
    networks = by_network(proteins, "roc_auc")
    none, bias, term = (networks[networks["run"] == title] for title in arms.values())
    gt = [found[found["label"] == "GT"] for found in (none, bias)]
    assert (gt[1]["epochs_with"] == 1).all() and (gt[1]["edges_with"] > 2 / 3).all()
    assert gt[1]["largest"].min() > gt[0]["largest"].max()
    for others in (none, bias):
        share = others[others["label"] != "GT"].groupby("label")["epochs_with"]
        assert share.max().between(0.1, 0.6).all() and (share.min() == 0).all()
    assert (term["edges_with"] == 0).all() and len(term) == 9
    typical = networks.set_index(["run", "label"])[["max_abs", "row_median_q50"]]
    typical = np.exp(np.log(typical).groupby(["run", "label"]).mean())
    factor = typical.loc[ARMS["intended"]] / typical.loc[ARMS["bias"]]
    assert factor["max_abs"].between(0.7, 1.4).all() and factor["row_median_q50"].min() > 6
    assert factor["max_abs"].round(2).to_dict() == {"GT": 0.75, "GraphiT": 0.91, "SAN": 0.83}
    assert factor["row_median_q50"].round().to_dict() == {"GT": 23, "GraphiT": 11, "SAN": 8}
    assert_intervals_overlap(remedy_table(proteins, "roc_auc")["test roc_auc"])


def test_on_tox21_nothing_is_massive_and_the_term_fills_the_median():
    arms = {arm: ARMS[arm] for arm in ("none", "bias", "intended")}
    tox21 = read_remedies(RESULTS, "tox21", arms)
    assert tox21.epochs.groupby("label")["epochs"].agg(set).to_dict() == {
        "GT": {25},
        "GraphiT": {30},
        "SAN": {30},
    }
    assert tox21.layers.groupby(["label", "run"])["seed"].nunique().eq(3).all()
    late = tox21.epochs[tox21.epochs["epoch"] > tox21.epochs["epochs"] / 2]
    observed = late.groupby(["run", "seed", "label"])["epoch"].nunique().unstack()
    assert (observed["GT"] == 9).all() and (observed[["GraphiT", "SAN"]] == 7).all(axis=None)
    networks = by_network(tox21, "roc_auc")
    assert (networks["edges_with"] == 0).all() and len(networks) == 27
    sizes = ["max_abs", "row_median_q50", "largest"]
    typical = networks.set_index(["run", "label"])[sizes]
    typical = np.exp(np.log(typical).groupby(["run", "label"]).mean())
    factor = typical.loc[ARMS["intended"]] / typical.loc[ARMS["bias"]]
    assert factor["max_abs"].round(1).to_dict() == {"GT": 1.7, "GraphiT": 1.7, "SAN": 2.3}
    assert factor["row_median_q50"].round().to_dict() == {"GT": 7, "GraphiT": 12, "SAN": 12}
    assert factor["largest"].between(0.19, 0.42).all()
    assert factor["largest"].idxmin() == "GraphiT" and factor["largest"].idxmax() == "GT"
    area = networks.set_index(["run", "label"])["test_roc_auc"]
    bias, term = (area.loc[ARMS[arm]].groupby("label") for arm in ("bias", "intended"))
    assert (term.mean() < bias.mean()).all()
    assert (term.max() < bias.min()).to_dict() == {"GT": False, "GraphiT": True, "SAN": False}
    none = area.loc["none"].groupby("label")
    assert (term.max() < none.min()).to_dict() == {"GT": False, "GraphiT": True, "SAN": True}
    assert_intervals_overlap(remedy_table(tox21, "roc_auc")["test roc_auc"])


@pytest.fixture(scope="module")
def others():
    listed = {arm: ARMS[arm] for arm in ("none", "term", "sink")} | OTHERS
    found = read_remedies(RESULTS, "zinc", listed, ["SAN"])
    assert set(found.epochs["epochs"]) == {20}
    assert found.layers.groupby("run")["seed"].nunique().eq(3).all()
    return found


def test_other_remedies_leave_no_massive_activation_but_for_weight_decay(others):
    networks = by_network(others, "mae").set_index("run")
    decay = networks.loc[OTHERS["decay"]]
    rest = networks.loc[[OTHERS[arm] for arm in OTHERS if arm != "decay"]]
    assert (rest["epochs_with"] == 0).all() and len(rest) == 4 * 3
    assert (decay["epochs_with"] == 1).all() and (decay["edges_with"] > 0.74).all()
    sizes = ["max_abs", "row_median_q50", "largest"]
    typical = np.exp(np.log(networks[sizes]).groupby("run").mean())
    factor = typical / typical.loc["none"]
    norm, dropout, decayed = (factor.loc[OTHERS[arm]] for arm in ("layernorm", "dropout", "decay"))
    assert 0.28 < norm["max_abs"] < 0.36 and 3.5 < norm["row_median_q50"] < 4.5
    assert 0.9 < dropout["max_abs"] < 1.1 and 1.5 < dropout["row_median_q50"] < 1.75
    assert 0.45 < decayed["max_abs"] < 0.55 and round(1 / decayed["row_median_q50"]) == 36
    assert 850 < decayed["largest"] < 900
    assert decay["largest"].min() > networks.drop(OTHERS["decay"])["largest"].max() * 50
    arms = {arm: ARMS[arm] for arm in ("none", "bias", "intended")}
    elsewhere = [read_remedies(RESULTS, data, arms) for data in ("zinc", "proteins", "tox21")]
    for found, metric in zip(elsewhere, ("mae", "roc_auc", "roc_auc"), strict=True):
        assert by_network(found, metric)["largest"].max() < decay["largest"].min() / 5
    of_layers = later_epochs(others.epochs, keys=["layer"]).set_index(["run", "seed", "layer"])
    medians = of_layers["row_median_q50"].unstack("layer")
    without = np.exp(np.log(medians.loc["none"]).mean())
    small = (medians.loc[OTHERS["decay"]] < without / 10).sum(axis=1)
    assert (small.min(), small.max(), medians.shape[1]) == (6, 8, 10)
    none = networks.loc["none"]
    assert networks.loc[OTHERS["dropout"], "largest"].max() < none["largest"].min() / 2
    assert decay["max_abs"].max() < none["max_abs"].min()
    for arm in ("clip", "tanh"):
        bounded = networks.loc[OTHERS[arm]]
        assert (bounded["max_abs"] < 1 + 1e-6).all() and (bounded["max_abs"] > 0.999).all()
        assert bounded["largest"].max() < none["largest"].min() / 6


def test_of_the_other_remedies_layernorm_alone_lowers_the_error(others):
    texts = remedy_table(others, "mae").loc["SAN", "test mae"]
    ends = texts.str.extract(r"(.*) \[(.*), (.*)\]").astype(float)
    none = ends.loc["none"]
    for arm, title in OTHERS.items():
        mean, low, high = ends.loc[title]
        assert mean < none[0], "no higher"
        assert (high < none[1]) == (arm == "layernorm") and low < none[2]


def test_other_remedies_cost_up_to_a_fifth_of_the_time():
    times = pd.read_csv(RESULTS / "remedy_times.csv.gz").query("label == 'SAN'")
    median = times.groupby("arm")["factor"].median()
    assert median[["layernorm", "decay"]].between(0.99, 1.015).all()
    assert median[["clip", "tanh"]].between(1, 1.1).all()
    assert 1.15 < median["dropout"] < 1.2


def test_a_sink_leaves_massive_activations_and_lowers_the_error(networks, trained):
    sink = networks[networks["arm"] == "sink"].set_index("label")
    assert (sink.drop("GraphiT")["epochs_with"] > 0).all()
    largest = means(networks, "largest")
    error = networks.groupby(["label", "arm"])["test_mae"].mean()
    for network, least, most in (("GT", 0.9, 0.95), ("GraphiT", 0.82, 0.85), ("SAN", 0.78, 0.81)):
        assert least < error[network, "sink"] / error[network, "none"] < most
        assert largest[network, "sink"] > largest[network, "none"] / 2
    intervals = (
        remedy_table(trained, "mae")["test mae"].str.extract(r"\[(.*), (.*)\]").astype(float)
    )
    for network, overlap in (("GT", True), ("GraphiT", False), ("SAN", False)):
        none, sink = (intervals.loc[network, ARMS[arm]] for arm in ("none", "sink"))
        assert (sink[1] > none[0]) == overlap
        for arm, without in ALIKE.items():
            one, other = (intervals.loc[network, ARMS[name]] for name in (arm, without))
            assert one[1] > other[0] and other[1] > one[0]


def test_a_sink_tells_how_many_neighbours_a_node_has():
    for network in ("gt", "graphit", "san"):
        table = pd.read_csv(RESULTS / f"sink_{network}_zinc_sink.csv.gz")
        assert set(table["seed"]) == {0, 1, 2} and set(table["explicit_bias"]) == {"sink"}
        share = table.groupby("neighbours")["share"].mean()
        assert share[1] > 0.5 and share[4] < 0.25
        in_layers = table.groupby(["layer", "neighbours"])["share"].mean().unstack()
        assert (in_layers.diff(axis=1).iloc[:, 1:] < 0.05).all().all()
        # one competitor of weight w leaves w / (n + w) to itself
        for neighbours in (2, 3, 4):
            w = share[1] / (1 - share[1])
            assert share[neighbours] == pytest.approx(w / (neighbours + w), abs=0.1)


def test_a_network_that_is_told_the_number_of_neighbours_needs_no_sink():
    controls = {arm: ARMS[arm] for arm in ("none", "sink")} | COUNTED
    told = read_remedies(RESULTS, "zinc", controls, ["SAN"])
    assert told.epochs.groupby("run")["changes"].first()[COUNTED["count"]].count("140") == 1
    errors = by_network(told, "mae").groupby("run")["test_mae"]
    counted, both = (errors.get_group(COUNTED[arm]) for arm in ("count", "countsink"))
    assert counted.max() < errors.get_group(ARMS["sink"]).min()
    spread = max(counted.std(), both.std())
    assert abs(counted.mean() - both.mean()) < spread
    with_massive = by_network(told, "mae").groupby("run")["epochs_with"].max()
    assert with_massive[COUNTED["count"]] <= 0.2 and with_massive[ARMS["none"]] == 1
