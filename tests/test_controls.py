"""Controls without training or without anything to learn, and the figures of emergence."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import REPOSITORY, few_molecules
from torch_geometric.data import Data

from mapkg.measures import ActivationSummary
from studies import emergence as study
from studies.data import BUNDLED, DESCRIPTIONS, Splits
from studies.published import CONFIGS
from studies.results import read_emergence

SMALL = CONFIGS["GT-ZINC"].replace(
    hidden_channels=8, heads=2, num_layers=2, batch_size=16, max_epochs=0
)


@pytest.fixture(scope="module")
def splits():
    return few_molecules(40, 20, 20)


def numbered(first, number):
    """Graphs that can be told apart; their targets are their number and its negative."""
    return [
        Data(x=torch.tensor([i]), y=torch.tensor([[i, -float(i)]]))
        for i in range(first, first + number)
    ]


def values(graphs):
    return [graph.y[0, 0].item() for graph in graphs]


@pytest.fixture
def whole():
    parts = dict(train=numbered(0, 50), val=numbered(100, 30), test=numbered(200, 10))
    return Splits(**parts, description=DESCRIPTIONS["moses"])


def test_training_and_validation_graphs_keep_their_targets_in_another_order(whole):
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
    assert permuted.description == replace(
        whole.description, title="MOSES sample, targets permuted"
    )


def test_the_permutation_depends_on_the_seed_alone(whole):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = values(study.with_permuted_targets(whole, 7).train)
    assert torch.equal(torch.get_rng_state(), state), "torch's global state was used"
    assert values(study.with_permuted_targets(whole, 7).train) == first
    assert values(study.with_permuted_targets(whole, 8).train) != first


def test_targets_of_nodes_cannot_be_permuted_and_the_error_says_what_can(papers):
    with pytest.raises(ValueError, match=r"expected whole graphs, .* nodes of one graph"):
        study.with_permuted_targets(papers, 0)


def test_networks_without_training_are_the_untrained_ones_of_a_run(splits):
    open_sizes = SMALL.replace(num_node_types=None, num_edge_types=None)
    table = study.without_training(open_sizes, splits, (5, 3), name="GT-ZINC", progress=False)
    run = study.emergence(SMALL, splits, seed=3, name="GT-ZINC", progress=False)
    rows = run.summary[run.summary["state"].isin(["base", "base_calibrated"])]
    shared = ["state", "layer", "seed", "config", "dataset", "versions", "commit"]
    shared += list(ActivationSummary(heads=2).statistics())
    found = table[table["seed"] == 3]
    pd.testing.assert_frame_equal(
        found[shared].reset_index(drop=True), rows[shared].reset_index(drop=True)
    )
    assert table["seed"].tolist() == [5] * 4 + [3] * 4


def test_only_the_first_training_graphs_calibrate(splits, monkeypatch):
    of_all = study.without_training(SMALL, splits, [3], progress=False)
    monkeypatch.setattr(study, "CALIBRATION_GRAPHS", 16)
    found = study.without_training(SMALL, splits, [3], progress=False)
    first = replace(splits, train=splits.train[:16])
    pd.testing.assert_frame_equal(found, study.without_training(SMALL, first, [3], progress=False))
    differs = found["max_ratio"] != of_all["max_ratio"]
    # No BatchNorm comes before the scores of the first layer.
    assert differs.tolist() == [False, False, False, True]


# Figures.


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


# The tracked tables.


def test_tracked_tables_are_those_of_the_workflow_and_agree_with_each_other():
    grid = yaml.safe_load((REPOSITORY / "workflow" / "grid.yaml").read_text())
    runs = {run: grid["defaults"] | changed for run, changed in grid["runs"].items()}
    for run, pair in runs.items():
        if "emergence" not in pair["studies"]:
            continue
        tables = read_emergence(BUNDLED / "results", f"emergence_{run}_")
        keys = ["seed", "state", "layer"]
        summary = tables.summary.set_index(keys).sort_index()
        assert set(summary["config"]) == {pair["config"]}, run
        assert set(summary["epochs"]) == {pair["epochs"]}
        assert set(summary.index.unique("seed")) == set(pair["seeds"])
        for change in pair["options"].replace("--set", "").split():
            assert summary["changes"].str.contains(change, regex=False).all()
        permuted = summary["dataset"].str.endswith("targets permuted")
        assert (permuted == ("--permute-targets" in pair["training"])).all()
        assert (BUNDLED / "results" / f"untrained_{run}.csv.gz").exists() == bool(pair["untrained"])
        assert summary["commit"].str.fullmatch("[0-9a-f]{40}").all()
        maxima = tables.graph_maxima.groupby(keys)["max_ratio"].max()
        kept = summary.loc[maxima.index]
        np.testing.assert_allclose(maxima, kept["max_ratio"], rtol=1e-5)
        counted = tables.histogram.groupby(keys)["count"].sum()
        usable = kept["rows"] - kept["zero_medians"] - kept["nonfinite_rows"]
        assert (counted.reindex(kept.index) == usable * kept["channels"]).all()
        start = tables.trajectory.query("epoch == 0").set_index(["seed", "layer"])["max_ratio"]
        base = summary.xs("base", level="state")["max_ratio"]
        np.testing.assert_allclose(start.sort_index(), base, rtol=1e-5)
