"""The tracked results: complete, traceable, and what the code still gives."""

import re
from importlib.metadata import version

import pandas as pd
import pytest
from conftest import REPOSITORY
from PIL import Image

from mapkg.measures import MASSIVE_RATIO
from studies import checkpoint
from studies.checkpoint import sha256
from studies.data import BUNDLED, load
from studies.emergence import examine_checkpoint
from studies.published import CONFIGS
from studies.results import TABLES, read_emergence

RESULTS = BUNDLED / "results"
PREFIX = "emergence_gt_zinc_"
SHIPPED = BUNDLED / "checkpoints" / "gt_moses_seed0"


@pytest.fixture(scope="module")
def zinc():
    return read_emergence(RESULTS, PREFIX)


@pytest.fixture(scope="module")
def examined():
    return examine_checkpoint(SHIPPED, load("moses"))


def test_every_row_says_where_it_comes_from(zinc):
    for name in TABLES:
        table = getattr(zinc, name)
        assert not table[["config", "changes", "dataset", "seed", "epochs"]].isna().any().any()
        for number in table["commit"].unique():
            assert re.fullmatch("[0-9a-f]{40}", number), "results come from committed code"
        for versions in table["versions"].unique():
            assert f"torch {version('torch').split('+')[0]}" in versions


def test_zinc_was_run_with_the_published_configuration_for_three_seeds_of_100_epochs(zinc):
    rows = zinc.history.groupby("seed")["epoch"].agg(["count", "max"])
    assert rows.index.tolist() == [0, 1, 2]
    assert (rows >= 100).all().all()
    assert set(zinc.summary["config"]) == {"GT-ZINC"}
    assert set(zinc.summary["changes"]) == {"max_epochs=100"}
    assert zinc.summary["dataset"].str.contains("substituted training split").all()


def test_the_tables_are_complete_and_agree_with_each_other(zinc):
    layers, heads = CONFIGS["GT-ZINC"].num_layers, CONFIGS["GT-ZINC"].heads
    states = {"base", "base_calibrated", "best", "last"}
    keys = ["seed", "state", "layer"]
    assert len(zinc.summary) == 3 * len(states) * layers
    assert set(zinc.summary["state"]) == states
    assert set(zinc.summary["rows"]) == {49_720}  # directed edges of the ZINC test split
    assert heads * 8 == zinc.summary["channels"].iloc[0]
    maxima = zinc.graph_maxima.groupby(keys)["max_ratio"].agg(["max", "size"])
    summary = zinc.summary.set_index(keys)
    assert set(maxima["size"]) == {1000}
    pd.testing.assert_series_equal(
        maxima["max"], summary["max_ratio"].sort_index(), check_names=False, rtol=1e-5
    )
    counted = zinc.histogram.groupby(keys)["count"].sum()
    usable = summary["rows"] - summary["zero_medians"] - summary["nonfinite_rows"]
    pd.testing.assert_series_equal(
        counted, (usable * summary["channels"]).sort_index(), check_names=False
    )
    massive = summary["max_ratio"] > MASSIVE_RATIO
    assert (massive == (summary["rows_with_massive"] > 0)).all()


def test_the_untrained_networks_of_the_trajectory_and_the_summary_are_the_same(zinc):
    start = zinc.trajectory[zinc.trajectory["epoch"] == 0].set_index(["seed", "layer"])
    base = zinc.summary[zinc.summary["state"] == "base"].set_index(["seed", "layer"])
    pd.testing.assert_series_equal(start["max_ratio"], base["max_ratio"])


def test_massive_activations_appear_with_each_seed_and_in_no_untrained_network(zinc):
    peaks = zinc.trajectory.groupby("seed")["max_ratio"].max()
    assert (peaks > MASSIVE_RATIO).all()
    untrained = zinc.summary[zinc.summary["state"].isin(["base", "base_calibrated"])]
    assert (untrained["rows_with_massive"] == 0).all()


def test_they_come_first_in_the_last_two_layers_and_later_in_the_first_if_at_all(zinc):
    above = zinc.trajectory[zinc.trajectory["max_ratio"] > MASSIVE_RATIO]
    first = above.groupby(["seed", "layer"])["epoch"].min().unstack()
    assert (first.idxmin(axis="columns") >= 8).all()
    assert (first[[8, 9]].min(axis="columns") <= 15).all(), "within the first epochs"
    assert (first[0].dropna() >= 30).all(), "the first layer follows much later"
    assert first[0].isna().sum() == 1, "and not with every seed"
    end = above[(above["epoch"] == above["epoch"].max()) & (above["layer"] >= 8)]
    assert end["seed"].nunique() == 1, "they fade there with two of three seeds"


def test_at_the_end_two_networks_carry_them_on_many_edges_and_the_third_on_hardly_any(zinc):
    for state in ("best", "last"):
        rows = zinc.summary[zinc.summary["state"] == state]
        share = rows.groupby("seed")["share_rows_with_massive"].max().sort_values().to_numpy()
        assert share[0] < 0.001
        assert (share[1:] > 0.1).all()


def test_in_the_first_layer_scores_are_small_and_in_the_last_both_scores_and_medians_large(zinc):
    best = zinc.summary[zinc.summary["state"] == "best"]
    first, last = best[best["layer"] == 0], best[best["layer"] >= 7]
    assert (first["max_abs"] < 10).all()
    carrying = first[first["rows_with_massive"] > 0]
    assert (carrying["row_median_q50"] < 0.01).all()
    assert last["max_abs"].min() > 500 * first["max_abs"].max()
    # A row of magnitude m and ratio r has the median m / r, and no ratio exceeds max_ratio.
    assert (last["max_abs"] / last["max_ratio"] > 10).all()
    assert (last["share_rows_with_massive"] < 0.05).all()


@pytest.mark.slow
def test_the_shipped_checkpoint_is_small_and_carries_massive_activations(examined):
    model, information = checkpoint.load(SHIPPED, CONFIGS["GT-ZINC"].replace(max_epochs=100))
    assert sum(p.numel() for p in model.parameters()) == 588_353
    assert (information["dataset"], information["seed"]) == ("MOSES sample", 0)
    assert re.fullmatch("[0-9a-f]{40}", information["commit"])
    massive = examined["summary"].groupby("state")["rows_with_massive"].sum()
    assert massive["best"] > 0
    assert massive["base"] == massive["base_calibrated"] == 0
    history = examined["history"].set_index("epoch")
    assert information["epoch"] == history["val_loss"].idxmin()


def test_what_the_page_says_of_the_shipped_network_holds():
    summary = read_emergence(RESULTS, "emergence_gt_moses_").summary.set_index(["state", "layer"])
    first_base, first = summary.loc[("base", 0)], summary.loc[("best", 0)]
    assert first["share_rows_with_massive"] > 0.9, "nearly every edge"
    grew = first["max_abs"] / first_base["max_abs"]
    fell = first_base["row_median_q50"] / first["row_median_q50"]
    assert 3 < grew < fell, "the median fell by a larger factor than the largest score grew"
    last = summary.loc["best"].loc[7:9]
    assert (last["max_abs"] > 1000).all(), "scores in the thousands"
    assert (last["rows_with_massive"] == 0).all()
    assert (last["max_abs"] / last["max_ratio"] > 10).all(), "in rows whose medians are large"


@pytest.mark.slow
def test_the_tracked_tables_of_the_bundled_run_are_those_of_the_shipped_checkpoint(examined):
    tracked = read_emergence(RESULTS, "emergence_gt_moses_").summary
    tracked = tracked[tracked["state"] != "last"].reset_index(drop=True)
    # Sums run in another order on another number of threads.
    for name in ("test_mae", "max_ratio", "max_abs", "row_median_q50"):
        found = examined["summary"][name]
        pd.testing.assert_series_equal(found, tracked[name], rtol=2e-3)


def test_the_picture_of_the_readme_was_drawn_from_the_tracked_results():
    picture = REPOSITORY / "book" / "emergence.png"
    with Image.open(picture) as image:
        stored = image.text["Source-SHA256"]
    assert stored == sha256(RESULTS / f"{PREFIX}graph_maxima.csv.gz"), "run book/figures.py"


def test_tracked_data_and_results_stay_small():
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 15e6
