"""Emergence on a tiny setting: what its tables hold, and that files and runs hold the same."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import few_molecules

from mapkg.evaluation import calibrate_batch_norm, evaluate
from mapkg.measures import ActivationSummary
from mapkg.models import build
from studies import checkpoint
from studies.emergence import emergence, examine_checkpoint, observation_epochs
from studies.files import commit, versions
from studies.observation import summarise
from studies.published import CONFIGS
from studies.results import TABLES, emergence_table, read_emergence
from studies.train import seed_all

SMALL = CONFIGS["GT-ZINC"].replace(
    hidden_channels=16, heads=4, num_layers=2, batch_size=32, max_epochs=3, lr=0.05
)
STATES = ["base", "base_calibrated", "best", "last"]
STATISTICS = list(ActivationSummary(heads=4).statistics())


@pytest.fixture(scope="module")
def splits():
    return few_molecules(64, 32, 32)


@pytest.fixture(scope="module")
def run(splits, tmp_path_factory):
    """A finished run: its tables and its folder."""
    folder = tmp_path_factory.mktemp("run")
    found = emergence(SMALL, splits, seed=0, name="GT-ZINC", folder=folder, progress=False)
    return found, folder


def same(found, expected, columns=STATISTICS):
    """Whether rows of statistics are equal, NaN included."""
    tables = (table[columns].reset_index(drop=True) for table in (found, expected))
    pd.testing.assert_frame_equal(*tables, check_exact=True, check_dtype=False)


@pytest.mark.parametrize(
    ("max_epochs", "expected"),
    [(0, [0]), (20, list(range(21))), (24, list(range(21))), (36, [*range(21), 25, 30, 35])],
)
def test_long_runs_are_observed_at_each_of_twenty_epochs_then_at_every_fifth(max_epochs, expected):
    assert observation_epochs(max_epochs) == expected


def test_the_untrained_states_are_those_of_the_seeded_network(run, splits):
    found, _ = run
    seed_all(0)
    model = build(SMALL).eval()
    for state in ("base", "base_calibrated"):
        if state == "base_calibrated":
            calibrate_batch_norm(model, splits.train, batch_size=32)
        summaries = summarise(model, splits.test, heads=4, batch_size=32).values()
        rows = found.summary[found.summary["state"] == state]
        same(rows, pd.DataFrame([summary.statistics() for summary in summaries]))
        assert (rows["test_mae"] == evaluate(model, splits.test, batch_size=32)).all()
        maxima = found.graph_maxima[found.graph_maxima["state"] == state]["max_ratio"]
        expected = np.concatenate([summary.graph_maxima for summary in summaries])
        np.testing.assert_array_equal(maxima, expected)


def test_the_trajectory_begins_at_base_passes_the_least_validation_loss_and_ends_at_last(
    run, splits
):
    found, folder = run
    losses = found.history.set_index("epoch")["val_loss"]
    best = found.fit.best_epoch
    assert best == losses.idxmin() and (found.summary["best_epoch"] == best).all()
    for state, epoch in (("base", 0), ("best", best), ("last", 3)):
        rows = found.summary[found.summary["state"] == state]
        same(found.trajectory[found.trajectory["epoch"] == epoch], rows)
        model, information = checkpoint.load(folder / state, SMALL)
        assert (information["epoch"], information["seed"]) == (epoch, 0)
        assert (rows["test_mae"] == evaluate(model, splits.test, batch_size=32)).all()
        if state == "best":
            assert evaluate(model, splits.val, batch_size=32) == losses.min()
            for name, value in model.state_dict().items():
                assert torch.equal(value, found.fit.best_weights[name])


def test_the_histogram_and_the_maxima_of_graphs_agree_with_the_summary(run):
    found, _ = run
    rows = found.summary.set_index(["state", "layer"])
    assert rows.index.tolist() == [(state, layer) for state in STATES for layer in range(2)]
    largest = found.graph_maxima.groupby(["state", "layer"])["max_ratio"].max()
    pd.testing.assert_series_equal(largest.sort_index(), rows["max_ratio"].sort_index(), rtol=1e-6)
    counts = found.histogram.groupby(["state", "layer"])["count"].sum()
    usable = 16 * (rows["rows"] - rows["zero_medians"] - rows["nonfinite_rows"])
    assert ((counts <= usable) & (counts > 0.99 * usable)).all()
    low = -8 + 0.025 * found.histogram["bin"]
    np.testing.assert_allclose(found.histogram["low"], low, rtol=0, atol=1e-9)


def test_every_row_of_every_table_and_file_says_where_it_comes_from(run):
    found, folder = run
    changes = "num_layers=2; hidden_channels=16; heads=4; batch_size=32; lr=0.05; max_epochs=3"
    expected = {"config": "GT-ZINC", "changes": changes, "dataset": "MOSES sample", "seed": 0}
    expected |= {"epochs": 3, "versions": versions(), "commit": commit()}
    read = read_emergence(folder)
    for name in TABLES:
        table = getattr(found, name)
        for column, value in expected.items():
            assert (table[column] == value).all(), (name, column)
        look = dict(rtol=5e-6, atol=0, check_dtype=False)
        pd.testing.assert_frame_equal(getattr(read, name), table, **look)


def test_looking_at_few_epochs_and_starting_again_change_nothing(run, splits):
    found, folder = run
    few = emergence(SMALL, splits, observe_epochs=[2, 7], progress=False)
    same(few.trajectory, found.trajectory[found.trajectory["epoch"].isin([0, 2])])
    same(few.summary, found.summary)
    stated = dict(part.split("=", 1) for part in few.history["changes"][0].split("; "))
    assert stated == {k: str(v) for k, v in SMALL.to_dict().items()}, "in full without a name"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = emergence(SMALL, splits, seed=0, name="GT-ZINC", folder=folder, progress=False)
    for name in TABLES:
        same(getattr(again, name), getattr(found, name), slice(None))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_saved_network_is_examined_beside_its_untrained_self(run, splits):
    found, folder = run
    examined = examine_checkpoint(folder / "best", splits)
    expected = found.summary[found.summary["state"] != "last"]
    same(examined["summary"], expected, ["state", *STATISTICS])
    maxima = found.graph_maxima[found.graph_maxima["state"] != "last"]
    np.testing.assert_array_equal(examined["graph_maxima"]["max_ratio"], maxima["max_ratio"])
    assert all((table["seed"] == 0).all() for table in examined.values())


def test_the_table_to_read_holds_the_numbers_of_the_summary_to_three_digits(run):
    summary = run[0].summary
    wide = emergence_table(summary, ["best", "base_calibrated"])
    assert [state for _, state in wide.columns] == ["best", "calibrated"] * 4
    rows = summary[summary["state"] == "base_calibrated"].set_index("layer")
    for title, statistic in (("largest ratio", "max_ratio"), ("largest |s|", "max_abs")):
        shown = wide[title, "calibrated"].str.replace(",", "").astype(float)
        assert shown.tolist() == pytest.approx(rows[statistic].tolist(), rel=5e-3)


def test_an_empty_test_split_and_types_without_an_embedding_are_refused_before_training(splits):
    with pytest.raises(ValueError, match="test split is empty"):
        emergence(SMALL, replace(splits, test=[]), progress=False)
    with pytest.raises(ValueError, match=r"num_node_types: the configuration has 5, .* has 28"):
        emergence(SMALL.replace(num_node_types=5), splits, progress=False)
