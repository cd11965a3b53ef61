"""Emergence: tables of a tiny run, controls without training, figures."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch_geometric.data import Data

from mapkg.evaluation import evaluate
from mapkg.measures import ActivationSummary
from studies import checkpoint
from studies import emergence as study
from studies.data import DESCRIPTIONS, Splits
from studies.emergence import emergence, examine_checkpoint, observation_epochs
from studies.files import commit, versions
from studies.published import CONFIGS
from studies.results import TABLES, emergence_table, read_emergence

SMALL = CONFIGS["GT-ZINC"].replace(
    hidden_channels=16, heads=4, num_layers=2, batch_size=32, max_epochs=3, lr=0.05
)
UNTRAINED = SMALL.replace(hidden_channels=8, heads=2, batch_size=16, max_epochs=0)
STATISTICS = list(ActivationSummary(heads=4).statistics())


@pytest.fixture(scope="module")
def run(splits, tmp_path_factory):
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
        model, information = checkpoint.load(folder / state)
        assert (information["epoch"], information["seed"]) == (epoch, 0)
        assert information["config"] == SMALL.to_dict()
        assert (rows["test_mae"] == evaluate(model, splits.test, batch_size=32)).all()
        if state == "best":
            assert evaluate(model, splits.val, batch_size=32) == losses.min()
            for name, value in model.state_dict().items():
                assert torch.equal(value, found.fit.best_weights[name])


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


def test_looking_at_few_epochs_and_starting_again_beside_damaged_files_change_nothing(run, splits):
    found, folder = run
    few = emergence(SMALL, splits, observe_epochs=[2, 7], progress=False)
    same(few.trajectory, found.trajectory[found.trajectory["epoch"].isin([0, 2])])
    same(few.summary, found.summary)
    stated = dict(part.split("=", 1) for part in few.history["changes"][0].split("; "))
    assert stated == {k: str(v) for k, v in SMALL.to_dict().items()}, "in full without a name"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("best.safetensors", "last.json", "summary.csv.gz"):
        (folder / name).write_bytes(before[name][:-9])
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


def test_training_and_validation_graphs_keep_their_targets_in_another_order():
    def values(graphs):
        return [graph.y[0, 0].item() for graph in graphs]

    # Graphs that can be told apart; their targets are their number and its negative.
    numbers = dict(train=range(50), val=range(100, 130), test=range(200, 210))
    parts = {
        name: [Data(x=torch.tensor([i]), y=torch.tensor([[i, -float(i)]])) for i in part]
        for name, part in numbers.items()
    }
    whole = Splits(**parts, description=DESCRIPTIONS["moses"])
    state = torch.get_rng_state()
    permuted = study.with_permuted_targets(whole, 0)
    for split in ("train", "val"):
        graphs, before = getattr(permuted, split), getattr(whole, split)
        assert sorted(values(graphs)) == values(before), "every target once, of no other split"
        moved = np.array(values(graphs)) != np.array(values(before))
        assert moved.mean() > 0.8, "of a random permutation one stays on average"
        assert all(graph.x is other.x for graph, other in zip(graphs, before, strict=True))
        assert all(graph.y[0, 1] == -graph.y[0, 0] for graph in graphs), "columns move together"
    assert permuted.test is whole.test
    assert values(whole.train) == list(range(50)), "the data that were given are as before"
    assert permuted.description.title == "MOSES sample, targets permuted"
    again, other = (values(study.with_permuted_targets(whole, seed).train) for seed in (0, 8))
    assert again == values(permuted.train) != other
    assert torch.equal(torch.get_rng_state(), state), "torch's global state was used"


def test_data_that_cannot_be_used_are_refused(splits, papers):
    with pytest.raises(ValueError, match=r"expected whole graphs, .* nodes of one graph"):
        study.with_permuted_targets(papers, 0)
    with pytest.raises(ValueError, match=r"two graphs or more in each split.* has 64 and 1 for"):
        study.with_permuted_targets(replace(splits, val=splits.val[:1]), 0)
    with pytest.raises(ValueError, match="test split is empty"):
        emergence(SMALL, replace(splits, test=[]), progress=False)


def test_networks_without_training_are_the_untrained_ones_of_a_run(splits):
    open_sizes = UNTRAINED.replace(num_node_types=None, num_edge_types=None)
    table = study.without_training(open_sizes, splits, (5, 3), name="GT-ZINC", progress=False)
    run = emergence(UNTRAINED, splits, seed=3, name="GT-ZINC", progress=False)
    rows = run.summary[run.summary["state"].isin(["base", "base_calibrated"])]
    shared = ["state", "layer", "seed", "config", "dataset", "versions", "commit"]
    shared += list(ActivationSummary(heads=2).statistics())
    found = table[table["seed"] == 3]
    pd.testing.assert_frame_equal(
        found[shared].reset_index(drop=True), rows[shared].reset_index(drop=True)
    )
    assert table["seed"].tolist() == [5] * 4 + [3] * 4


def test_only_the_first_training_graphs_calibrate(splits, monkeypatch):
    of_all = study.without_training(UNTRAINED, splits, [3], progress=False)
    monkeypatch.setattr(study, "CALIBRATION_GRAPHS", 16)
    first = replace(splits, train=splits.train[:16])
    pair = [study.without_training(UNTRAINED, s, [3], progress=False) for s in (splits, first)]
    pd.testing.assert_frame_equal(*pair)
    found = pair[0]
    differs = found["max_ratio"] != of_all["max_ratio"]
    # No BatchNorm comes before the scores of the first layer.
    assert differs.tolist() == [False, False, False, True]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def lines(ax):
    return {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in ax.lines}


def bands(ax):
    """The least and greatest values of each band, by label of its line or rectangle."""
    drawn = [label for label in lines(ax) if not label.startswith("threshold")]
    found = {}
    for label, band in zip(drawn, ax.collections, strict=False):
        y = band.get_paths()[0].vertices[:, 1]
        found[label] = (y.min(), y.max())
    boxes = {patch.get_label(): patch.get_bbox() for patch in ax.patches}
    return found | {label: (box.y0, box.y1) for label, box in boxes.items()}


def test_graphs_by_rank_are_lines_over_seeds_and_untrained_networks_a_band():
    rows = [
        ("a", seed, state, layer, scale * (10 * layer + value) + seed)
        for seed in (0, 1, 2)
        for state, scale in (("base", 1.0), ("base_calibrated", 2.0), ("best", 100.0))
        for layer in (0, 1)
        for value in (3.0, 1.0, 2.0, np.nan)
    ]
    table = pd.DataFrame(rows, columns=["run", "seed", "state", "layer", "max_ratio"])
    (ax,) = study.by_rank(table, {"a": "GT"}, threshold=500.0).axes
    assert ax.get_title() == "GT" and ax.get_yscale() == "log"
    assert lines(ax)["layer 0"] == [[1, 101], [2, 201], [3, 301]]
    assert lines(ax)["layer 1"] == [[1, 1101], [2, 1201], [3, 1301]]
    assert lines(ax)["threshold 500"][0][1] == 500
    assert bands(ax) == {
        "layer 0": (100, 302),
        "layer 1": (1100, 1302),
        "untrained, as published": (1, 15),
        "untrained, BatchNorm calibrated": (2, 28),
    }
    by_seed = study.by_rank(table).axes
    assert [ax.get_title() for ax in by_seed] == ["seed 0", "seed 1", "seed 2"]
    assert lines(by_seed[2])["layer 1"] == [[1, 1102], [2, 1202], [3, 1302]]


@pytest.fixture
def trajectory():
    """Two runs, of which the second is longer, and three seeds: ratio 1 + seed + 10 epochs."""
    rows = [
        (run, seed, epoch, layer, 1.0 + seed + 10 * epoch + layer / 2)
        for run, epochs in (("b", 2), ("a", 3))
        for seed in (0, 1, 2)
        for epoch in range(epochs)
        for layer in (0, 1)
    ]
    return pd.DataFrame(rows, columns=["run", "seed", "epoch", "layer", "max_ratio"])


def test_by_epoch_a_line_is_the_median_over_seeds_of_the_largest_ratio(trajectory):
    b, a = study.by_epoch(trajectory, panel="run").axes
    assert (b.get_title(), a.get_title()) == ("b", "a")
    assert lines(b)["layer 0"] == [[0, 2], [1, 12]] and bands(b)["layer 0"] == (1, 13)
    assert lines(a)["layer 1"] == [[0, 2.5], [1, 12.5], [2, 22.5]]
    (ax,) = study.by_epoch(trajectory, color="run").axes
    assert lines(ax)["b"] == [[0, 2.5], [1, 12.5]], "the largest of the two layers"
    by_seed = study.by_epoch(trajectory[trajectory["run"] == "a"], panel="seed").axes
    assert [ax.get_title() for ax in by_seed] == ["seed 0", "seed 1", "seed 2"]
    assert lines(by_seed[2])["layer 0"] == [[0, 3], [1, 13], [2, 23]]


def test_permuted_targets_are_beside_those_of_the_data_for_as_long_as_both_ran(trajectory):
    (ax,) = study.against_permuted(trajectory, {"b": "a"}, {"a": "GT"}).axes
    assert ax.get_title() == "GT"
    drawn = lines(ax)
    assert drawn["targets of the data"] == drawn["targets permuted"] == [[0, 2.5], [1, 12.5]]


def test_trained_layers_are_among_untrained_ones_and_chance():
    rows = [("a", s, state, 0, v) for s, state, v in ((0, "best", 9.0), (1, "base", 7.0))]
    columns = ["run", "seed", "state", "layer", "max_ratio"]
    summary = pd.DataFrame(rows, columns=columns)
    null = [("a", s, f"base{c}", 0, 2.0 + s) for s in (5, 6) for c in ("", "_calibrated")]
    null = pd.DataFrame(null, columns=columns)
    (ax,) = study.against_untrained(summary, null, {"a": 8.0}, {"a": "GT"}).axes
    drawn = lines(ax)
    assert drawn["untrained, 2 networks"] == [[0, 7], [0, 8]]
    assert drawn["trained, best validation epoch"] == [[0, 9]]
    assert drawn["product of normals, 5 % family-wise"][0][1] == 8


def test_by_layer_a_line_is_the_mean_over_seeds_with_every_seed_as_a_dot():
    rows = [(s, "best", y, 1.0 + 2 * s + y, 0.5) for s in (0, 1) for y in (0, 1)]
    columns = ["seed", "state", "layer", "max_abs", "share_saturated"]
    table = pd.DataFrame(rows, columns=columns)
    size, share = study.by_layer(table, ["max_abs", "share_saturated"]).axes
    assert size.lines[-1].get_ydata().tolist() == [2, 3]
    assert sorted(size.collections[-1].get_offsets()[:, 1]) == [1, 2, 3, 4]
    assert (size.get_yscale(), share.get_yscale()) == ("log", "linear")
