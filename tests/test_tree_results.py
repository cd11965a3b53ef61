"""What the page on trees says, against the tracked tables."""

import pytest
from conftest import REPOSITORY

from studies.neighbors_match import PUBLISHED, VARIANTS, read_trees, tree_table

RESULTS = REPOSITORY / "data" / "results"
LIPSCHITZ = ["LipschitzNorm, f = 1", "LipschitzNorm, f = 4"]
BOTH = "LipschitzNorm + LayerNorm, f = 1"
SCHEDULES = {  # passes, passes with PairNorm, batch size
    2: (5000, 5000, 64),
    3: (300, 80, 256),
    4: (200, 20, 256),
    5: (80, 4, 256),
}


@pytest.fixture(scope="module")
def study():
    return read_trees(RESULTS)


@pytest.fixture(scope="module")
def best(study):
    """Best running training accuracy in percent, a column per seed."""
    rows = study.runs.set_index(["depth", "panel", "variant", "seed"])
    return 100 * rows["best"].unstack("seed")


def test_every_network_is_there_with_its_schedule_and_origin(study):
    runs = study.runs
    assert len(runs) == 4 * len(VARIANTS) * 3 and set(runs["seed"]) == {0, 1, 2}
    assert runs["commit"].str.fullmatch("[0-9a-f]{40}").all()
    assert runs["versions"].str.contains("torch-geometric").all()
    for depth, (passes, apart, batch_size) in SCHEDULES.items():
        own = runs[runs["depth"] == depth]
        assert set(own.loc[own["norm"] != "pair", "passes"]) == {passes}
        assert set(own.loc[own["norm"] == "pair", "passes"]) == {apart}
        assert set(own["batch_size"]) == {batch_size}
    has_own_rate = (runs["depth"] > 2) & (runs["architecture"] == "ggnn")
    assert set(runs.loc[has_own_rate, "lr"]) == {0.001}
    assert set(runs.loc[~has_own_rate, "lr"]) == {0.004}


def test_at_depth_2_all_know_all_but_gat_with_f_4(best):
    known = (best.loc[2] == 100).all(axis="columns")
    assert known[~known].index.tolist() == [("GAT", "LipschitzNorm, f = 4")]


def test_at_depth_3_gat_and_gcn_with_layer_norm_are_where_the_published_are(best):
    assert PUBLISHED["gat"][1] == PUBLISHED["gcn"][1] == PUBLISHED["gin"][1] == 1
    assert (best.loc[3, "GAT", "LayerNorm"] > 99).all()
    assert (best.loc[3, "GCN", "LayerNorm"] > 96).all()
    assert (best.loc[3, "GIN", "LayerNorm"] < 98).all()
    assert (best.loc[3, "GGNN", "no norm"] < 97).all()


def test_beyond_no_training_ends_because_the_task_is_solved(study, best):
    deeper = study.runs.query("depth > 3")
    assert set(deeper["stop_reason"]) == {"passes"}
    assert best.loc[4:].to_numpy().max() < 66


def test_lipschitz_norm_learns_less_than_no_norm_with_every_seed(best):
    for depth in (3, 4, 5):
        none = best.loc[depth, "GAT", "no norm"]
        for variant in LIPSCHITZ:
            assert (best.loc[depth, "GAT", variant] < none - 3).all()
        both = best.loc[depth, "GAT", BOTH]
        assert both.median() <= best.loc[depth, "GAT", "LayerNorm"].median()
    assert (best.loc[3, "GAT", "no norm"] == 100).all()
    one, four = (best.loc[3, "GAT", variant] for variant in LIPSCHITZ)
    assert one.round().min() == 53 and one.round().max() == 70
    assert (four.round() == 27).all()
    assert (best.loc[3, "GAT", BOTH] > one).all()


def test_layer_norm_helps_three_of_four(best):
    def gain(depth, panel):
        return best.loc[depth, panel, "LayerNorm"] - best.loc[depth, panel, "no norm"]

    assert (gain(3, "GCN") > 0).all() and (gain(3, "GGNN") > 0).all()
    assert (gain(4, "GIN") > 0).all()
    assert (gain(3, "GAT") <= 0).all() and (gain(4, "GAT") < 0).all()
    assert (best.loc[3, "GAT", "PairNorm"] < 60).all()


def test_gat_alone_has_learnt_something_at_depth_5(best):
    others = best.loc[5].drop("GAT", level="panel")
    assert others.to_numpy().max() < 5
    assert (best.loc[5, "GAT", ["no norm", "LayerNorm"], :] > 10).to_numpy().all()
    assert max(PUBLISHED, key=lambda name: PUBLISHED[name][5 - 2]) == "ggnn"


def test_what_is_known_by_heart_at_depth_2_is_understood_at_depth_3(study):
    runs = study.runs
    at_two = 100 * runs.loc[runs["depth"] == 2, "test_accuracy"]
    assert at_two.min() == pytest.approx(20) and at_two.max() == pytest.approx(95)
    knows = runs[(runs["depth"] == 3) & (runs["train_accuracy"] > 0.95)]
    is_exception = (knows["panel"] == "GGNN") & (knows["variant"] == "no norm")
    assert (knows.loc[~is_exception, "test_accuracy"] > 0.83).all()
    assert is_exception.any() and (knows.loc[is_exception, "test_accuracy"] < 0.6).all()


def test_curves_of_depth_4(study):
    curves = study.curves.query("depth == 4")
    gat = curves[(curves["panel"] == "GAT") & (curves["passes"] == 200)]
    last = gat.groupby("variant")["train_accuracy"].median()
    assert last.idxmax() == "no norm"
    at_twenty = curves[curves["passes"] == 20].groupby(["panel", "variant"])["train_accuracy"]
    least, most = at_twenty.min(), at_twenty.max()
    for panel in ("GCN", "GIN"):
        assert least[panel, "PairNorm"] > most[panel].drop("PairNorm").max()


def test_the_table_has_all_of_it(study):
    table = tree_table(study.runs)
    assert table.columns.tolist() == [2, 3, 4, 5]
    assert not table.isna().to_numpy().any() and len(table) == len(VARIANTS) + len(PUBLISHED)
    assert set(study.curves["depth"]) == {2, 3, 4, 5}
