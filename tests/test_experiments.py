"""Emergence on a tiny setting: what its tables hold, and that files and runs hold the same."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import few_molecules

from mapkg.evaluation import calibrate_batch_norm, evaluate
from mapkg.hooks import record
from mapkg.measures import ActivationSummary
from mapkg.models import build
from studies import checkpoint
from studies.emergence import emergence, examine_checkpoint, observation_epochs
from studies.observation import edge_maxima, summarise
from studies.provenance import commit, versions
from studies.published import CONFIGS
from studies.results import (
    TABLES,
    collect,
    count_types,
    emergence_table,
    range_over_seeds,
    read_emergence,
)
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


def network(seed=0, config=SMALL):
    seed_all(seed)
    return build(config)


def same_statistics(found, expected):
    """Whether two rows of statistics are equal, NaN included."""
    pd.testing.assert_frame_equal(
        found[STATISTICS].reset_index(drop=True),
        expected[STATISTICS].reset_index(drop=True),
        check_exact=True,
        check_dtype=False,
    )


# Summaries of a model.


def test_a_summary_is_that_of_the_scores_in_evaluation_mode(splits):
    model = calibrate_batch_norm(network(config=SMALL.replace(dropout=0.5)), splits.train)
    model.train()
    found = summarise(model, splits.test, heads=4, batch_size=1)
    model.eval()
    with torch.no_grad(), record(model, "layers.*.score") as seen:
        for graph in splits.test:
            model(graph.x, graph.edge_index, graph.edge_attr)
    for name, scores in seen.items():
        expected = ActivationSummary(heads=4)
        for score in scores:
            expected.update(score)
        assert found[name].statistics() == expected.statistics()
        assert found[name].graph_maxima == expected.graph_maxima
        assert found[name].num_rows == sum(graph.num_edges for graph in splits.test)


def test_summaries_can_be_asked_for_other_tensors_and_without_heads(splits):
    names = ["layers.1.edge_block", "edge_embedding"]
    found = summarise(network(), splits.test[:4], names=names)
    assert list(found) == ["edge_embedding", "layers.1.edge_block"]
    edges = sum(graph.num_edges for graph in splits.test[:4])
    for summary in found.values():
        assert summary.statistics()["rows"] == edges
        assert summary.statistics()["share_saturated"] is None


def test_edge_maxima_are_the_largest_ratios_of_each_edge(splits):
    model = network().eval()
    found = edge_maxima(model, splits.test[:3], batch_size=2)
    expected = []
    with torch.no_grad(), record(model, "layers.*.score") as seen:
        for graph in splits.test[:3]:
            model(graph.x, graph.edge_index, graph.edge_attr)
    for layer in range(2):
        for score in seen[f"layers.{layer}.attention.score"]:
            for row in score.abs().numpy():
                expected.append(row.max() / np.sort(row)[7])  # the lower middle one of 16
    np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=1e-4)


def test_types_are_counted_in_every_split(splits):
    counts = count_types(splits)
    for (split, kind), part in counts.groupby(["split", "kind"]):
        graphs = getattr(splits, split)
        ids = [
            i for graph in graphs for i in graph["x" if kind == "atom" else "edge_attr"].tolist()
        ]
        assert part["count"].sum() == len(ids)
        for number, count in zip(part["id"], part["count"], strict=True):
            assert count == ids.count(number)
    assert set(counts["split"]) == {"train", "val", "test"}
    assert set(counts["kind"]) == {"atom", "bond"}


@pytest.mark.parametrize(
    ("max_epochs", "expected"),
    [
        (0, [0]),
        (3, [0, 1, 2, 3]),
        (20, list(range(21))),
        (24, list(range(21))),
        (36, [*range(21), 25, 30, 35]),
    ],
)
def test_long_runs_are_observed_at_each_of_twenty_epochs_then_at_every_fifth(max_epochs, expected):
    assert observation_epochs(max_epochs) == expected


# The tables of a run.


def test_every_state_layer_epoch_and_graph_has_its_row(run):
    found, _ = run
    expected = [(state, layer) for state in STATES for layer in range(2)]
    assert list(zip(found.summary["state"], found.summary["layer"], strict=True)) == expected
    observed = [(epoch, layer) for epoch in range(4) for layer in range(2)]
    trajectory = found.trajectory
    assert list(zip(trajectory["epoch"], trajectory["layer"], strict=True)) == observed
    maxima = found.graph_maxima
    assert list(zip(maxima["state"], maxima["layer"], maxima["graph"], strict=True)) == [
        (*row, graph) for row in expected for graph in range(32)
    ]
    assert found.history["epoch"].tolist() == [1, 2, 3]


def test_the_untrained_states_are_those_of_the_seeded_network(run, splits):
    found, _ = run
    model = network().eval()
    for state in ("base", "base_calibrated"):
        if state == "base_calibrated":
            calibrate_batch_norm(model, splits.train, batch_size=32)
        summaries = summarise(model, splits.test, heads=4, batch_size=32)
        rows = found.summary[found.summary["state"] == state]
        expected = pd.DataFrame([summary.statistics() for summary in summaries.values()])
        same_statistics(rows, expected)
        assert (rows["test_mae"] == evaluate(model, splits.test, batch_size=32)).all()
        maxima = found.graph_maxima[found.graph_maxima["state"] == state]
        np.testing.assert_array_equal(
            maxima["max_ratio"], np.concatenate([s.graph_maxima for s in summaries.values()])
        )


def test_the_trajectory_begins_at_base_passes_best_and_ends_at_last(run):
    found, _ = run
    best_epoch = found.fit.best_epoch
    assert (found.summary["best_epoch"] == best_epoch).all()
    for state, epoch in (("base", 0), ("best", best_epoch), ("last", 3)):
        same_statistics(
            found.trajectory[found.trajectory["epoch"] == epoch],
            found.summary[found.summary["state"] == state],
        )


def test_the_best_state_has_the_least_validation_loss(run, splits):
    found, folder = run
    losses = found.history.set_index("epoch")["val_loss"]
    assert found.fit.best_epoch == losses.idxmin()
    model, information = checkpoint.load(folder / "best", SMALL)
    assert evaluate(model, splits.val, batch_size=32) == losses.min()
    assert information["epoch"] == found.fit.best_epoch
    rows = found.summary[found.summary["state"] == "best"]
    assert (rows["test_mae"] == evaluate(model, splits.test, batch_size=32)).all()


def test_the_histogram_counts_every_usable_activation(run):
    found, _ = run
    rows = found.summary.set_index(["state", "layer"])
    for key, part in found.histogram.groupby(["state", "layer"]):
        row = rows.loc[key]
        usable = row["rows"] - row["zero_medians"] - row["nonfinite_rows"]
        assert part["count"].sum() <= usable * 16
        assert part["count"].sum() > 0.99 * usable * 16
        assert (part["count"] > 0).all()
        np.testing.assert_allclose(part["low"], -8 + 0.025 * part["bin"], rtol=0, atol=1e-9)
    assert found.histogram.groupby(["state", "layer"]).ngroups == 8


def test_the_largest_ratio_of_the_summary_is_the_largest_over_graphs(run):
    found, _ = run
    largest = found.graph_maxima.groupby(["state", "layer"])["max_ratio"].max()
    summary = found.summary.set_index(["state", "layer"])["max_ratio"]
    pd.testing.assert_series_equal(largest.sort_index(), summary.sort_index(), rtol=1e-6)


def test_every_row_of_every_table_says_where_it_comes_from(run):
    found, _ = run
    expected = {
        "config": "GT-ZINC",
        "changes": "num_layers=2; hidden_channels=16; heads=4; batch_size=32; lr=0.05; "
        "max_epochs=3",
        "dataset": "MOSES sample",
        "seed": 0,
        "epochs": 3,
        "versions": versions(),
        "commit": commit(),
    }
    for table in TABLES:
        frame = getattr(found, table)
        assert len(frame) > 0
        for column, value in expected.items():
            assert (frame[column] == value).all(), (table, column)


def test_a_configuration_without_a_name_is_stated_in_full(splits):
    found = emergence(SMALL.replace(max_epochs=1), splits, progress=False)
    stated = dict(part.split("=", 1) for part in found.history["changes"][0].split("; "))
    assert stated == {k: str(v) for k, v in SMALL.replace(max_epochs=1).to_dict().items()}
    assert (found.history["config"] == "custom").all()


def test_only_the_epochs_that_are_asked_for_and_the_untrained_one_are_observed(splits, run):
    found = emergence(SMALL, splits, observe_epochs=[2, 7], progress=False)
    assert found.trajectory["epoch"].tolist() == [0, 0, 2, 2]
    full = run[0]
    same_statistics(found.trajectory, full.trajectory[full.trajectory["epoch"].isin([0, 2])])
    same_statistics(found.summary, full.summary)  # looking changes nothing


def test_another_seed_gives_other_weights_and_another_order(splits, run):
    other = emergence(SMALL, splits, seed=1, progress=False)
    base, expected = (
        frame[frame["state"] == "base"]["max_ratio"].tolist()
        for frame in (other.summary, run[0].summary)
    )
    assert base != expected
    assert (other.history["seed"] == 1).all()


# Files.


def test_the_files_hold_the_tables_to_six_digits(run):
    found, folder = run
    read = read_emergence(folder)
    assert read.fit is None
    for table in TABLES:
        pd.testing.assert_frame_equal(
            getattr(read, table), getattr(found, table), rtol=5e-6, atol=0, check_dtype=False
        )


def test_the_checkpoints_hold_the_weights_and_their_origin(run):
    found, folder = run
    weights = {
        "base": network().state_dict(),
        "best": found.fit.best_weights,
        "last": found.fit.last_weights,
    }
    epochs = {"base": 0, "best": found.fit.best_epoch, "last": 3}
    for state, expected in weights.items():
        model, information = checkpoint.load(folder / state, SMALL)
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name]), (state, name)
        stated = {key: information[key] for key in ("name", "dataset", "seed", "epoch")}
        assert stated == {
            "name": "GT-ZINC",
            "dataset": "MOSES sample",
            "seed": 0,
            "epoch": epochs[state],
        }
        assert information["stop_reason"] == "max epochs"
        assert information["commit"] == commit()
        assert information["versions"] == versions()
        assert pd.DataFrame(information["history"]).equals(found.fit.history)


def test_a_finished_run_that_is_started_again_gives_the_same_tables(run, splits):
    found, folder = run
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = emergence(SMALL, splits, seed=0, name="GT-ZINC", folder=folder, progress=False)
    for table in TABLES:
        pd.testing.assert_frame_equal(
            getattr(again, table), getattr(found, table), check_exact=True
        )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_runs_of_two_seeds_are_joined_in_order(run, splits, tmp_path):
    _, first = run
    emergence(SMALL, splits, seed=1, name="GT-ZINC", folder=tmp_path / "second", progress=False)
    paths = collect([first, tmp_path / "second"], tmp_path / "results" / "both_")
    assert [path.name for path in paths] == [f"both_{table}.csv.gz" for table in TABLES]
    joined = read_emergence(tmp_path / "results", "both_")
    parts = [read_emergence(folder) for folder in (first, tmp_path / "second")]
    for table in TABLES:
        expected = pd.concat([getattr(part, table) for part in parts], ignore_index=True)
        pd.testing.assert_frame_equal(getattr(joined, table), expected, check_exact=True)
        assert getattr(joined, table)["seed"].unique().tolist() == [0, 1]


def test_a_run_that_is_not_finished_cannot_be_joined(run, tmp_path):
    _, first = run
    with pytest.raises(FileNotFoundError, match=r"no table at .*summary\.csv\.gz; write it with"):
        collect([first, tmp_path], tmp_path / "both_")
    assert not list(tmp_path.iterdir())


def test_a_saved_network_is_examined_beside_its_untrained_self(run, splits):
    found, folder = run
    examined = examine_checkpoint(folder / "best", splits)
    expected = found.summary[found.summary["state"] != "last"]
    assert examined["summary"]["state"].tolist() == expected["state"].tolist()
    same_statistics(examined["summary"], expected)
    maxima = found.graph_maxima[found.graph_maxima["state"] != "last"]
    np.testing.assert_array_equal(examined["graph_maxima"]["max_ratio"], maxima["max_ratio"])
    for table in examined.values():
        assert (table["seed"] == 0).all()
        assert (table["commit"] == commit()).all()


def test_the_table_to_read_holds_the_numbers_of_the_summary_to_three_digits(run):
    found, _ = run
    wide = emergence_table(found.summary, ["best", "base_calibrated"])
    assert [state for _, state in wide.columns] == ["best", "calibrated"] * 4
    rows = found.summary.set_index(["state", "layer"])
    for layer in range(2):
        for state, shown in (("base_calibrated", "calibrated"), ("best", "best")):
            for statistic, title in (
                ("max_ratio", "largest ratio"),
                ("share_rows_with_massive", "edges with an MA"),
                ("max_abs", "largest |s|"),
                ("row_median_q50", "typical median |s|"),
            ):
                expected = rows.loc[(state, layer), statistic]
                assert float(wide.loc[layer, (title, shown)]) == pytest.approx(expected, rel=5e-3)


def test_ranges_over_seeds_are_written_per_layer_and_state():
    rows = [(s, t, y, 1000.0 * s + y) for s in (1, 3) for t in ("base", "best") for y in (0, 1)]
    summary = pd.DataFrame(rows, columns=["seed", "state", "layer", "max_ratio"])
    summary.loc[summary["state"] == "base", "max_ratio"] /= 1000
    ranges = range_over_seeds(summary, "max_ratio")
    assert ranges.columns.tolist() == ["base", "best"]
    assert ranges["best"].tolist() == ["1,000 to 3,000", "1,001 to 3,001"]
    assert ranges["base"].tolist() == ["1 to 3", "1 to 3"]


def test_an_empty_test_split_and_types_without_an_embedding_are_refused_before_training(splits):
    with pytest.raises(ValueError, match="test split is empty"):
        emergence(SMALL, replace(splits, test=[]), progress=False)
    with pytest.raises(ValueError, match=r"num_node_types: the configuration has 5, .* has 28"):
        emergence(SMALL.replace(num_node_types=5), splits, progress=False)
