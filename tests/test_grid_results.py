"""The tracked tables of the grid: complete, traceable, consistent, and what the pages say."""

import re
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest

from mapkg.configs import CONFIGS
from mapkg.data import BUNDLED
from mapkg.detection import MASSIVE_RATIO
from mapkg.experiments import TABLES, read_emergence
from mapkg.experiments.grid import GRID, how_unlikely, laws, read_runs, read_untrained

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


def test_every_pair_of_the_grid_is_there():
    assert set(GRID) <= set(RUNS)


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
