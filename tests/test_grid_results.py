"""The tracked tables of the grid: complete, traceable, consistent, and what the pages say."""

import math
import re
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import REPOSITORY

from mapkg.measures import MASSIVE_RATIO
from mapkg.models import build
from studies.data import BUNDLED
from studies.grid import (
    GRID,
    PERMUTED,
    VARIANTS,
    how_unlikely,
    laws,
    length_table,
    read_runs,
    read_untrained,
)
from studies.published import CONFIGS
from studies.results import TABLES, read_emergence

RESULTS = BUNDLED / "results"
RUNS = sorted(
    path.name.removeprefix("emergence_").removesuffix("_summary.csv.gz")
    for path in RESULTS.glob("emergence_*_summary.csv.gz")
)
each_run = pytest.mark.parametrize("run", [run for run in RUNS if run != "gt_moses"])
ORIGIN = ["config", "changes", "dataset", "seed", "epochs", "versions", "commit"]
TEST_GRAPHS = {"ZINC-12k": 1000, "TOX21, scaffold split": 781, "TU PROTEINS": 112}
STATES = {"base", "base_calibrated", "best", "last"}


@pytest.fixture(scope="module")
def tables():
    return {run: read_emergence(RESULTS, f"emergence_{run}_") for run in RUNS}


def test_every_run_of_the_workflow_is_there_and_on_a_page():
    grid = yaml.safe_load((REPOSITORY / "workflow" / "grid.yaml").read_text())
    assert set(grid["pairs"]) == set(RUNS) - {"gt_moses"}
    assert set(grid["pairs"]) == {*GRID, *VARIANTS, *PERMUTED}


@each_run
def test_every_run_is_that_of_the_workflow(tables, run):
    grid = yaml.safe_load((REPOSITORY / "workflow" / "grid.yaml").read_text())
    pair = grid["defaults"] | grid["pairs"][run]
    summary = tables[run].summary
    assert set(summary["config"]) == {pair["config"]}
    assert set(summary["epochs"]) == {pair["epochs"]}
    assert set(summary["seed"]) == set(pair["seeds"])
    for change in pair["options"].replace("--set", "").split():
        assert summary["changes"].str.contains(change, regex=False).all()
    permuted = summary["dataset"].str.endswith("targets permuted")
    assert (permuted == ("--permute-targets" in pair["training"])).all()
    assert (RESULTS / f"untrained_{run}.csv.gz").exists() == bool(pair["untrained"])


@each_run
def test_every_run_was_stopped_by_its_epochs_not_by_its_learning_rate(tables, run):
    history = tables[run].history
    name = history["config"].iloc[0]
    last = history[history["epoch"] == history["epochs"]]
    assert last["seed"].tolist() == [0, 1, 2]
    assert (last["lr"] > CONFIGS[name].min_lr).all()


@each_run
def test_every_row_says_where_it_comes_from(tables, run):
    for name in TABLES:
        table = getattr(tables[run], name)
        assert not table[ORIGIN].isna().any().any(), name
        for commit in table["commit"].unique():
            assert re.fullmatch("[0-9a-f]{40}", commit), "results come from committed code"
        for versions in table["versions"].unique():
            assert f"torch {version('torch').split('+')[0]}" in versions


@each_run
def test_every_pair_has_three_seeds_of_equally_many_epochs(tables, run):
    epochs = tables[run].history.groupby("seed")["epoch"].max()
    assert epochs.index.tolist() == [0, 1, 2]
    assert epochs.nunique() == 1
    assert (tables[run].summary["epochs"] == epochs[0]).all()


@each_run
def test_what_was_run_is_a_stated_configuration_and_its_changes_are_named(tables, run):
    summary = tables[run].summary
    (name,), (changes,) = summary["config"].unique(), summary["changes"].unique()
    changed = dict(change.split("=") for change in changes.split("; "))
    allowed = {"max_epochs", "attention"}
    if name == "GT-TOX21":
        allowed |= {"hidden_channels"}  # stated with the grid, for time's sake
    assert set(changed) <= allowed
    assert int(changed["max_epochs"]) == summary["epochs"].iloc[0]
    width = int(changed.get("hidden_channels", CONFIGS[name].hidden_channels))
    assert set(summary["channels"]) == {width}
    assert set(summary["layer"]) == set(range(CONFIGS[name].num_layers))


@each_run
def test_the_tables_agree_with_each_other(tables, run):
    keys = ["seed", "state", "layer"]
    summary = tables[run].summary.set_index(keys).sort_index()
    assert set(summary.index.unique("state")) == STATES
    (dataset,) = summary["dataset"].unique()
    of_set = next(name for name in TEST_GRAPHS if dataset.startswith(name))
    maxima = tables[run].graph_maxima.groupby(keys)["max_ratio"].agg(["max", "size"])
    assert {"base", "best"} <= set(maxima.index.unique("state"))
    assert set(maxima["size"]) == {TEST_GRAPHS[of_set]}
    kept = summary.loc[maxima.index]
    np.testing.assert_allclose(maxima["max"], kept["max_ratio"], rtol=1e-5)
    counted = tables[run].histogram.groupby(keys)["count"].sum()
    usable = kept["rows"] - kept["zero_medians"] - kept["nonfinite_rows"]
    assert (counted.reindex(kept.index) == usable * kept["channels"]).all()
    assert ((summary["max_ratio"] > MASSIVE_RATIO) == (summary["rows_with_massive"] > 0)).all()
    assert (summary["nonfinite_rows"] == 0).all()
    start = tables[run].trajectory.query("epoch == 0").set_index(["seed", "layer"])["max_ratio"]
    np.testing.assert_allclose(
        start.sort_index(), summary.xs("base", level="state")["max_ratio"].sort_index()
    )


def test_the_untrained_networks_are_twenty_of_other_seeds(tables):
    untrained = read_untrained(RESULTS, GRID)
    for run, table in untrained.groupby("run"):
        assert table["seed"].nunique() == 20
        assert not set(table["seed"]) & {0, 1, 2}
        trained = tables[run].summary
        assert set(table["layer"]) == set(trained["layer"])
        assert set(table["channels"]) == set(trained["channels"])
        assert set(table["rows"]) == set(trained["rows"])
        assert set(table["dataset"]) == set(trained["dataset"])
        assert table["commit"].str.fullmatch("[0-9a-f]{40}").all()


def test_the_tracked_laws_are_those_of_the_tracked_histograms():
    tracked = pd.read_csv(RESULTS / "laws.csv.gz")
    assert set(GRID) <= set(tracked["run"])
    one = read_runs(RESULTS, ["gt_proteins"]).histogram.query("seed == 1")
    keys = ["run", "seed", "layer", "state", "law"]
    found = laws(one).set_index(keys).sort_index()
    stored = tracked.set_index(keys).sort_index().loc[found.index]
    for column in ("ks_own", "ks_base", "ks_two_sample", "log_likelihood"):
        np.testing.assert_allclose(found[column], stored[column], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found["aic_rank"], stored["aic_rank"])


def test_no_untrained_network_of_the_grid_has_a_massive_activation(tables):
    for run in GRID:
        summary = tables[run].summary
        untrained = summary[summary["state"].isin(["base", "base_calibrated"])]
        assert (untrained["rows_with_massive"] == 0).all(), run
    assert (read_untrained(RESULTS, GRID)["rows_with_massive"] == 0).all()


def test_a_layer_with_massive_activations_exceeds_every_untrained_network(tables):
    grid = read_runs(RESULTS, GRID)
    unlikely = how_unlikely(grid.summary, read_untrained(RESULTS, GRID))
    massive = unlikely[unlikely["max_ratio"] > MASSIVE_RATIO]
    assert len(massive) > 0
    assert (massive["max_ratio"] > massive["untrained_max"]).all()
    assert np.allclose(massive["p_untrained"], 1 / 21)
    assert (massive["p_chance"] < 1e-3).all()


TRAIN_GRAPHS = {"zinc": 10_000, "tox21": 6_243, "proteins": 890}


@pytest.fixture(scope="module")
def trajectories():
    return read_runs(RESULTS, GRID).trajectory


def first_massive(trajectory):
    """By run and seed, the first epoch with a massive activation; NaN if there is none."""
    start = length_table(trajectory)["massive from"].replace("never", np.nan)
    return start.astype(float)


@pytest.fixture(scope="module")
def best():
    summary = read_runs(RESULTS, GRID).summary
    return summary[summary["state"] == "best"]


def massive_seeds(best, run, layer):
    rows = best[(best["run"] == run) & (best["layer"] == layer)]
    return int((rows["rows_with_massive"] > 0).sum())


def test_what_the_grid_page_says_of_zinc_holds(best):
    first = {run: massive_seeds(best, run, 0) for run in ("gt_zinc", "graphit_zinc", "san_zinc")}
    assert first == {"gt_zinc": 2, "graphit_zinc": 2, "san_zinc": 3}
    san = best[(best["run"] == "san_zinc") & (best["layer"] == 0)]
    assert (san["share_rows_with_massive"] > 0.5).all(), "on more than half of the edges"
    for run, seeds in (("gt_zinc", 2), ("san_zinc", 2)):
        assert massive_seeds(best, run, 9) == seeds
        last = best[(best["run"] == run) & (best["layer"] == 9)]
        assert (last["share_rows_with_massive"] < 0.05).all(), "on few edges"
    assert massive_seeds(best, "san_zinc", 1) == 1
    others = best[best["run"].str.endswith("_zinc") & ~best["layer"].isin([0, 1, 9])]
    assert (others["rows_with_massive"] == 0).all()


def test_what_the_grid_page_says_of_proteins_holds(best):
    gt = best[(best["run"] == "gt_proteins") & (best["layer"] == 0)]
    shares = gt["share_rows_with_massive"].sort_values().tolist()
    assert shares[:2] == pytest.approx([0.5, 0.5], abs=0.03)
    assert shares[2] > 0.99
    graphit = [massive_seeds(best, "graphit_proteins", layer) for layer in range(3)]
    assert graphit == [0, 0, 1]
    share = best.loc[best["run"] == "graphit_proteins", "share_rows_with_massive"]
    assert share.max() < 0.01, "a few"
    assert [massive_seeds(best, "san_proteins", layer) for layer in range(3)] == [0, 0, 0]


def test_in_a_massive_first_layer_no_score_is_large_and_medians_are_thousandths(best):
    carrying = best[(best["layer"] == 0) & (best["rows_with_massive"] > 0)]
    assert carrying["max_abs"].between(4, 33).all()
    assert (carrying["row_median_q50"] < 0.01).all()


def test_what_the_page_of_distributions_says_of_laws_holds():
    fitted = pd.read_csv(RESULTS / "laws.csv.gz")
    ks = fitted.groupby(["run", "state", "law"])["ks_own"].median()
    for run in GRID:
        close = [ks[run, "base", law] for law in ("gamma", "lognormal", "gev")]
        assert max(close) < 0.03
        assert max(close) < ks[run, "base", "normal"] / 2
        if run.endswith(("_zinc", "_tox21")):
            of_run = ks[run, "best"].sort_values()
            assert set(of_run.index[-2:]) == {"weibull", "normal"}, "worst or nearly so"
    wins = (
        fitted[fitted["aic_rank"] == 1]
        .groupby(["run", "state"])["law"]
        .agg(lambda laws: laws.mode()[0])
    )
    assert wins["graphit_proteins", "best"] == wins["san_proteins", "best"] == "weibull"
    for run in ("gt_zinc", "gt_tox21", "gt_proteins"):
        assert ks[run, "best", "gamma"] < ks[run, "base", "gamma"]
        moved = fitted[(fitted["run"] == run) & (fitted["law"] == "gamma")]
        moved = moved.groupby("state")[["ks_own", "ks_base", "ks_two_sample"]].median()
        assert moved.loc["best", "ks_base"] > moved.loc["base", "ks_base"]
        assert moved.loc["best", "ks_two_sample"] > 2 * moved.loc["best", "ks_own"]


def test_what_the_page_of_distributions_says_of_nulls_holds():
    untrained = read_untrained(RESULTS, GRID)
    unlikely = how_unlikely(read_runs(RESULTS, GRID).summary, untrained)
    beyond = unlikely["max_ratio"] > unlikely["untrained_max"]
    massive = unlikely["max_ratio"] > MASSIVE_RATIO
    assert beyond.sum() > 3 * massive.sum(), "many more"
    assert beyond.mean() > 0.5, "most trained layers"
    assert beyond[unlikely["run"].str.endswith("_proteins")].all()
    of_tox21 = unlikely["run"].str.endswith("_tox21")
    assert 0.4 < beyond[of_tox21].mean() < 0.5, "nearly half"
    assert not massive[of_tox21].any()
    assert untrained["max_ratio"].max() < 300
    summary = read_runs(RESULTS, GRID).summary
    assert summary.loc[summary["state"].str.startswith("base"), "max_ratio"].max() < 300
    assert unlikely["chance_threshold"].between(235, 315).all()


def test_what_the_grid_page_says_of_tox21_holds(best, trajectories):
    of_tox21 = best["run"].str.endswith("_tox21")
    assert (best.loc[of_tox21, "rows_with_massive"] == 0).all()
    last = pd.concat(
        tables[tables["epoch"] == tables["epochs"]]
        for run, tables in trajectories.groupby("run")
        if run.endswith("_tox21")
    )
    assert (last["max_ratio"] < 1000).all()
    assert 500 < best.loc[of_tox21, "max_ratio"].max() < 510
    steps = {
        run: math.ceil(TRAIN_GRAPHS[run.split("_")[1]] / CONFIGS[rows["config"].iloc[0]].batch_size)
        * rows["epochs"].iloc[0]
        for run, rows in best.groupby("run")
    }
    of_set = {name: [n for run, n in steps.items() if run.endswith(name)] for name in TRAIN_GRAPHS}
    assert min(of_set["tox21"]) == 750
    assert max(of_set["tox21"]) < 1_500
    assert (min(of_set["zinc"]), max(of_set["zinc"])) == (7_900, 15_650)
    first = first_massive(trajectories)
    assert first["gt_tox21"].isna().all()
    assert first["san_tox21"].isna().all()
    massive = trajectories.query("run == 'graphit_tox21' and max_ratio > 1000")
    assert massive[["seed", "epoch"]].drop_duplicates().values.tolist() == [[0, 5]], "one epoch"
    assert (math.ceil(10_000 / 128) * first["gt_zinc"] < 900).all(), "within 900 steps"
    largest = trajectories.groupby(["run", "epoch", "seed"])["max_ratio"].max()
    largest = largest.groupby(["run", "epoch"]).median()
    assert largest["gt_tox21"].idxmax() == largest["gt_tox21"].index[-1], "still rises"
    for run in ("graphit_tox21", "san_tox21"):
        assert largest[run].idxmax() <= 10, "a peak in the first epochs"
        assert largest[run].iloc[-1] < largest[run].max() / 1.4


def test_what_the_page_of_distributions_says_of_the_length_of_training_holds(trajectories):
    massive = trajectories[trajectories["max_ratio"] > MASSIVE_RATIO]
    start = massive.groupby(["run", "seed"])["epoch"].min()
    earliest = massive.set_index(["run", "seed"])
    for run in ("gt_zinc", "san_zinc"):
        assert (start[run] < 12).all(), "within a dozen epochs"
        for seed in (0, 1, 2):
            rows = earliest.loc[run, seed]
            assert set(rows.loc[rows["epoch"] == start[run, seed], "layer"]) <= {7, 8, 9}
        first_layer = massive.query("run == @run and layer == 0").groupby("seed")["epoch"].min()
        assert first_layer.between(18, 55).all()
    assert start["graphit_zinc"].between(35, 45).all()
    graphit = massive.query("run == 'graphit_zinc'").groupby(["seed", "layer"]).size()
    assert (graphit.xs(0, level="layer") >= 2).all()
    end = trajectories[trajectories["epoch"] == trajectories["epochs"]]
    end = end.groupby(["run", "seed"])["max_ratio"].max()
    assert start["san_proteins"].index.tolist() == [0, 1], "with two seeds"
    highest = massive.query("run == 'san_proteins'")["max_ratio"].max()
    assert highest < 1_100, "by a little"
    assert (end["san_proteins"].loc[[0, 1]] < 400).all(), "and ends far below"


def test_massive_activations_come_on_permuted_targets(trajectories):
    permuted = read_runs(RESULTS, PERMUTED)
    start = first_massive(permuted.trajectory)
    assert (start["gt_zinc_permuted"] <= 8).all()
    assert start["gt_proteins_permuted"].notna().all()
    assert start["graphit_proteins_permuted"].notna().sum() == 2
    assert first_massive(trajectories)["graphit_proteins"].notna().sum() == 1
    losses = permuted.history.query("run == 'gt_zinc_permuted'").groupby("seed")["train_loss"]
    assert (losses.last() > 0.97 * losses.first()).all(), "hardly moves"
    learnt = permuted.history.query("run != 'gt_zinc_permuted'").groupby(["run", "seed"])
    assert (learnt["train_loss"].last() < 0.98 * learnt["train_loss"].first()).all()


@pytest.fixture(scope="module")
def variants():
    return read_runs(RESULTS, VARIANTS)


def test_what_the_grid_page_says_of_variants_holds(variants):
    largest = variants.trajectory.groupby(["run", "seed", "epoch"])["max_ratio"].max()
    assert (first_massive(variants.trajectory)["gt_zinc"] <= 11).all()
    with_a_score = ["gt_zinc_uniform", "gt_zinc_no_edge", "egat_zinc", "gatv2_zinc"]
    for run in (*with_a_score, "transformer_zinc"):
        assert largest[run].max() < 600, "none comes near"
    null = read_untrained(RESULTS, VARIANTS)
    unlikely = how_unlikely(variants.summary, null)
    beyond = (unlikely["max_ratio"] > unlikely["untrained_max"]).groupby(unlikely["run"]).mean()
    assert beyond["gt_zinc_no_edge"] > 0.5, "in more than half of the layers"
    assert largest["gt_zinc_no_edge"].max() < 200
    for run in ("gt_zinc_uniform", "egat_zinc", "gatv2_zinc", "transformer_zinc"):
        assert beyond[run] <= 0.1
    best = variants.summary.query("state == 'best' and layer == 0")
    error = best.groupby("run")["test_mae"].median()
    assert error[["gatv2_zinc", "transformer_zinc"]].max() < error["gt_zinc_no_edge"]
    assert error["gt_zinc_no_edge"] < error["gt_zinc_uniform"]
    untrained = null.groupby("run")["max_ratio"].max()
    assert untrained["egat_zinc"] > 1.5 * untrained["gt_zinc"], "higher from the start"
    assert 1e5 < untrained["gat_zinc"] < 1.5e5
    assert 1e6 < largest["gat_zinc"].max() < 2e6
    assert largest["gps_zinc"].groupby("seed").max().min() > 8
    assert max(largest["gps_zinc"].max(), untrained["gps_zinc"]) < 12, "about ten"
    graphit = read_runs(RESULTS, ["graphit_zinc"]).trajectory
    assert (graphit.loc[graphit["epoch"] <= 20, "max_ratio"] < MASSIVE_RATIO).all()


def test_uniform_attention_gives_the_projections_of_the_score_no_gradient():
    torch.manual_seed(0)
    changes = dict(hidden_channels=16, heads=2, num_layers=2, num_node_types=28)
    model = build(CONFIGS["GT-ZINC"].replace(attention="uniform", **changes)).double()
    model.eval()  # in training mode, BatchNorm makes the mean over one graph a constant
    x, edge_index = torch.randint(28, (12,)), torch.randint(12, (2, 40))
    model(x, edge_index, torch.randint(4, (40,))).square().sum().backward()
    for layer in model.layers:
        for linear in (layer.attention.query, layer.attention.key, layer.attention.edge):
            assert linear.weight.grad is None or not linear.weight.grad.any()
        assert layer.attention.value.weight.grad.abs().max() > 1e-6
