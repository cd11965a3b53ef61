"""What the pages on depth say, against the tracked tables."""

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, planetoid

from studies.depth import CONSTANT_RATE, read_depth

RESULTS = REPOSITORY / "data" / "results"
LIPSCHITZ = [
    *("LipschitzNorm, f = 1", "LipschitzNorm, f = 4"),
    *("LipschitzNorm, published", "published, per head"),
]


@pytest.fixture(scope="module")
def largest():
    tables = [pd.read_csv(RESULTS / f"gradients_cora_{heads}_largest.csv.gz") for heads in (1, 4)]
    return pd.concat(tables).query("kind == 'weights'")


@pytest.fixture(scope="module")
def peaks(largest):
    """The largest norm of a whole training, by heads, variant and seed."""
    return largest.groupby(["heads", "variant", "seed"])["norm"].max()


def test_rows_say_where_they_come_from(largest):
    assert set(largest["num_layers"]) == {25} and set(largest["dataset"]) == {"Cora"}
    assert largest["commit"].str.fullmatch("[0-9a-f]{40}").all()
    assert largest["versions"].str.contains("torch-geometric").all()
    finite = largest[~((largest["variant"] == "LayerNorm") & (largest["heads"] == 1))]
    per_training = finite.groupby(["heads", "variant", "seed"])["epoch"].agg(["count", "max"])
    assert set(per_training["count"]) == set(per_training["max"]) == {60}
    assert len(per_training) == 17 * 5


def test_without_a_norm_gradients_of_four_heads_pass_1e10_with_every_seed(largest, peaks):
    assert (peaks[4, "no norm"] > 1e10).all() and len(peaks[4, "no norm"]) == 5
    last = largest.query("heads == 4 and variant == 'no norm' and epoch == 60")["train_loss"]
    assert (last > 1000).all()
    one = peaks[1, "no norm"]
    assert (one < 1e8).all() and one.max() / one.min() > 1e4
    assert (one > 1000).all()


def test_with_lipschitz_norm_none_passes_twenty_and_kinds_do_not_differ(peaks):
    for heads in (1, 4):
        of_kind = [peaks[heads, variant] for variant in LIPSCHITZ]
        assert all((norms < 20).all() for norms in of_kind)
        for one in of_kind:
            for other in of_kind:
                assert one.min() <= other.max()  # their ranges over seeds overlap


def test_without_dropout_they_stay_below_twenty_and_one_head_has_the_lowest_loss(largest, peaks):
    assert (peaks[1, "no norm, no dropout"] < 20).all()
    assert (peaks[4, "no norm, no dropout"] < 20).all()
    last = largest.query("heads == 1 and epoch == 60").groupby("variant")["train_loss"].median()
    assert last.idxmin() == "no norm, no dropout"


def test_other_norms(largest, peaks):
    assert (peaks[4, "PairNorm"] < 20).all() and (peaks[4, "PairNorm-SI"] < 20).all()
    assert (peaks[1, "PairNorm"] < 100).all()
    four = largest.query("heads == 4 and variant == 'LayerNorm'")
    first, last = (four.query(f"epoch == {epoch}")["norm"] for epoch in (1, 60))
    assert first.min() > 10 > 1 > last.max()
    one = largest.query("heads == 1 and variant == 'LayerNorm'")
    at_first = one.query("epoch == 1")["norm"]
    assert len(at_first) == 5 and not np.isfinite(at_first).any()
    assert 1 / np.sqrt(1e-5) == pytest.approx(316, abs=1)


def test_after_sixty_steps_normalised_losses_lie_between_1_1_and_2(largest):
    rows = largest[(largest["epoch"] == 60) & ~largest["variant"].str.startswith("no norm")]
    assert rows["train_loss"].between(1.1, 2.0).all()
    assert np.log(7) == pytest.approx(1.95, abs=0.005)


DEPTHS = [1, 2, 5, 10, 15, 20, 25, 30]
GAT, GT = ("GAT, Cora", "GAT, CiteSeer"), ("Graph Transformer, Cora", "Graph Transformer, CiteSeer")
LIP, PUBLISHED, PLAIN = "LipschitzNorm", "Lipschitz, published", "no norm"


@pytest.fixture(scope="module")
def runs():
    return read_depth(RESULTS).runs


@pytest.fixture(scope="module")
def control():
    return read_depth(RESULTS, CONSTANT_RATE).runs


def values(runs, panel, variant, layers, value="test_best"):
    chosen = runs[(runs["panel"] == panel) & (runs["variant"] == variant)]
    found = pd.to_numeric(chosen.loc[chosen["num_layers"] == layers, value], errors="coerce")
    assert len(found) == 3
    return found


def test_every_depth_norm_and_seed_is_there_with_its_origin(runs):
    assert runs["commit"].str.fullmatch("[0-9a-f]{40}").all()
    assert runs["versions"].str.contains("torch-geometric").all()
    assert set(runs["epochs"]) == {200} and set(runs["heads"]) == {4}
    assert set(runs["hidden_channels"]) == {16} and set(runs["min_lr"]) == {1e-6}
    per_panel = runs.groupby("panel")["variant"].nunique()
    assert per_panel.to_dict() == {GAT[0]: 5, GAT[1]: 4, GT[0]: 4, GT[1]: 4}
    counts = runs.groupby(["panel", "variant", "num_layers"])["seed"].agg(["count", "nunique"])
    assert set(counts["count"]) == set(counts["nunique"]) == {3}
    assert len(counts) == 17 * len(DEPTHS)


def test_no_network_of_fifteen_layers_or_more_fits_its_training_nodes(runs):
    deep = runs[(runs["num_layers"] >= 15) & runs["panel"].str.endswith("Cora")]
    assert pd.to_numeric(deep["converged"], errors="coerce").isna().all()
    shallow = runs[runs["panel"].str.endswith("Cora") & (runs["num_layers"] == 1)]
    assert pd.to_numeric(shallow["converged"]).notna().all()


def test_lipschitz_norm_trains_gats_of_15_and_20_layers_on_cora_and_none_does_not(runs):
    for layers, least in ((15, 0.55), (20, 0.50)):
        assert (values(runs, GAT[0], LIP, layers) > least).all()
        assert (values(runs, GAT[0], PUBLISHED, layers) > least).all()
        assert (values(runs, GAT[0], PLAIN, layers) < 0.40).all()
    for layers, most in ((15, 0.75), (20, 1.1)):
        assert (values(runs, GAT[0], LIP, layers, "least_loss") < most).all()
    assert (values(runs, GAT[0], PLAIN, 15, "least_loss") > 1.5).all()
    for variant in (LIP, PUBLISHED, PLAIN):
        assert (values(runs, GAT[0], variant, 30) < 0.34).all()
    assert values(runs, GAT[1], LIP, 15).between(0.32, 0.37).all()
    assert values(runs, GAT[1], PLAIN, 15).between(0.21, 0.28).all()


def test_no_depth_beyond_five_is_of_use(runs):
    for value in ("test_best", "test_last"):
        means = runs.groupby(["panel", "variant", "num_layers"])[value].mean()
        best = means.groupby(["panel"]).idxmax().map(lambda key: key[-1])
        assert set(best) <= {1, 2, 5}
        of_variant = means.groupby(["panel", "variant"]).idxmax().map(lambda key: key[-1])
        assert of_variant.max() <= 5


def test_up_to_five_layers_lipschitz_norm_and_none_cannot_be_told_apart(runs):
    for panel in (*GAT, *GT):
        for layers in (1, 2, 5):
            one, other = (values(runs, panel, v, layers) for v in (LIP, PLAIN))
            assert one.min() <= other.max() and other.min() <= one.max()


def test_for_the_graph_transformer_lipschitz_norm_changes_nothing(runs):
    for panel in GT:
        for layers in DEPTHS:
            one, other = (values(runs, panel, v, layers) for v in (LIP, PLAIN))
            assert one.min() <= other.max() and other.min() <= one.max()
        assert (values(runs, panel, LIP, 10) > 0.5).all()
        assert (values(runs, panel, LIP, 15) < 0.33).all()


def test_the_published_form_does_as_well_as_the_corrected_one(runs):
    for layers in DEPTHS:
        one, other = (values(runs, GAT[0], v, layers) for v in (LIP, PUBLISHED))
        assert one.min() <= other.max() and other.min() <= one.max()
    deep = [values(runs, GAT[0], v, 25).median() for v in (LIP, PUBLISHED)]
    assert deep[1] > deep[0] + 0.1


def test_layer_norm_is_fastest_at_one_layer_and_fails_at_ten(runs):
    for panel in (*GAT, *GT):
        fastest = [values(runs, panel, v, 1, "converged").max() for v in ("LayerNorm", LIP, PLAIN)]
        assert fastest[0] < min(fastest[1:])
        assert (values(runs, panel, "LayerNorm", 10) < 0.36).all()


def test_pair_norm_costs_accuracy_up_to_five_layers_and_learns_something_at_fifteen(runs):
    for panel in (*GAT, *GT):
        for layers in (1, 2, 5):
            plain = values(runs, panel, PLAIN, layers)
            assert values(runs, panel, "PairNorm", layers).max() < plain.min()
        paired = values(runs, panel, "PairNorm", 15, "least_loss").max()
        lower = values(runs, panel, PLAIN, 15, "least_loss") < paired
        assert lower.sum() == (panel == GT[0])


def test_a_rate_that_does_not_fall_is_enough_for_ten_layers_and_not_for_twenty(control):
    assert set(control["epochs"]) == {120} and control["commit"].str.len().eq(40).all()
    assert (control["lr_patience"] == "").all(), "the rate does not fall"
    assert len(control) == 4 * 2 * 3
    (panel,) = control["panel"].unique()
    ten, other = (values(control, panel, variant, 10) for variant in (LIP, PLAIN))
    assert ten.min() <= other.max() and other.min() <= ten.max()
    assert min(ten.min(), other.min()) > 0.73
    assert (values(control, panel, PLAIN, 20) < 0.33).all()
    assert (values(control, panel, LIP, 20) > 0.5).all()


@pytest.mark.parametrize(("name", "share"), [("cora", 0.32), ("citeseer", 0.235)])
def test_a_network_that_gives_all_nodes_one_class_is_right_for_few(name, share):
    test = planetoid(name).test
    shares = test.graph.y[test.nodes].bincount().double() / len(test.nodes)
    assert share - 0.01 < shares.max() < share
