"""Compact tables of networks with a remedy, and what they are summed up to."""

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, few_molecules

from studies.__main__ import main
from studies.emergence import emergence
from studies.laws import compare_laws
from studies.published import CONFIGS
from studies.remedies import (
    arms,
    compact_run,
    later_epochs,
    read_remedies,
    remedy_table,
)

RESULTS = REPOSITORY / "data/results"
SMALL = dict(hidden_channels=16, heads=4, num_layers=2, max_epochs=2)


@pytest.fixture(scope="module")
def runs(cache, tmp_path_factory):
    """Two finished runs of seconds: their folders and tables."""
    folder = tmp_path_factory.mktemp("runs")
    splits = few_molecules(16, 8, 8)
    config = CONFIGS["SAN-ZINC"].replace(explicit_bias="sink", **SMALL)
    settings = dict(name="SAN-ZINC", progress=False)
    return {
        folder / str(seed): emergence(
            config, splits, seed=seed, folder=folder / str(seed), **settings
        )
        for seed in (0, 1)
    }


def test_a_compact_table_has_the_scores_and_the_gamma_law_of_each_layer(runs):
    folder, run = next(iter(runs.items()))
    found = compact_run(folder)["layers"].set_index(["state", "layer"]).sort_index()
    assert len(found) == 4
    expected = run.summary.set_index(["state", "layer"]).sort_index()
    for state in ("base", "best"):
        for column in ("max_ratio", "max_abs", "row_median_q50", "test_mae"):
            values = found.loc[state, column], expected.loc[state, column]
            assert values[0].to_numpy() == pytest.approx(values[1].to_numpy(), rel=1e-5)
    keys = ["layer", "state"]
    bins = run.histogram[run.histogram["state"].isin(["base", "best"])]
    laws = compare_laws(bins[[*keys, "bin", "low", "count"]].assign(run="", seed=0), base="base")
    gamma = laws[laws["law"] == "gamma"].set_index(["state", "layer"]).sort_index()
    for column in ("ks_own", "ks_two_sample"):
        assert found[column].to_numpy() == pytest.approx(gamma[column].to_numpy(), abs=1e-4)


def test_the_command_joins_runs(runs, tmp_path):
    prefix = tmp_path / "remedy_san"
    assert main(["study", "remedy", *map(str, runs), "-o", str(prefix)]) == 0
    layers = pd.read_csv(f"{prefix}_layers.csv.gz")
    assert layers["seed"].unique().tolist() == [0, 1]
    epochs = pd.read_csv(f"{prefix}_epochs.csv.gz")
    assert epochs.groupby(["seed", "layer"])["epoch"].agg(list).map(len).eq(3).all()
    for table in (layers, epochs):
        assert {"config", "changes", "dataset", "epochs", "versions", "commit"} <= {*table}


def test_a_run_that_is_not_finished_is_refused(tmp_path, capsys):
    assert main(["study", "remedy", str(tmp_path / "none"), "-o", str(tmp_path / "x")]) == 2
    assert "no table at" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def epochs_of(seed, ratios, run="sink", label="SAN"):
    """Two layers; the first has the given ratios after epochs 0, 1, ..., the second 10."""
    rows = []
    for epoch, ratio in enumerate(ratios):
        for layer, r in ((0, ratio), (1, 10.0)):
            row = dict(label=label, run=run, seed=seed, layer=layer, epoch=epoch, max_ratio=r)
            row |= dict(max_abs=r / 10, row_median_q50=0.1, share_saturated=0.0)
            rows.append(row | {"share_rows_with_massive": 0.5 * (r > 1000)})
    return pd.DataFrame(rows)


def test_later_epochs_are_the_second_half_with_geometric_means():
    table = pd.concat([epochs_of(0, [1, 1, 1, 4000, 1000]), epochs_of(1, [9e9, 9, 9, 90, 90])])
    found = later_epochs(table).set_index("seed")
    # Epochs 3 and 4: in layer 0 ratios of 4000 and 1000, in layer 1 of 10.
    assert found["max_ratio"].to_numpy() == pytest.approx([(2000 * 10) ** 0.5, 30.0])
    assert found["largest"].to_numpy() == pytest.approx([2000.0, 90.0])
    assert found["share_rows_with_massive"].to_numpy() == pytest.approx([0.125, 0.0])
    assert found["edges_with"].to_numpy() == pytest.approx([0.25, 0.0])
    assert found["epochs_with"].to_numpy() == pytest.approx([0.5, 0.0])
    of_layer = later_epochs(table, keys=("layer",)).set_index(["seed", "layer"])
    assert of_layer.loc[(0, 0), "max_ratio"] == pytest.approx(2000.0)
    assert of_layer.loc[(0, 1), "max_ratio"] == pytest.approx(10.0)


def test_the_table_has_the_metric_with_its_interval_over_seeds():
    epochs = pd.concat([epochs_of(seed, [1, 1, 2000 * (seed > 0) + 1]) for seed in range(3)])
    rows = [
        dict(label="SAN", run="sink", seed=seed, layer=layer, state="best", test_mae=mae)
        | dict(ks_own=0.01 * (seed + 1), ks_two_sample=0.5)
        for seed, mae in enumerate((0.4, 0.5, 0.6))
        for layer in (0, 1)
    ]
    found = remedy_table(dict(layers=pd.DataFrame(rows), epochs=epochs), "mae").loc[("SAN", "sink")]
    half = 4.302653 * 0.1 / np.sqrt(3)  # of Student's t with two degrees of freedom
    assert found["test mae"] == f"0.500 [{0.5 - half:.3f}, {0.5 + half:.3f}]"
    assert found["edges"] == "0.0%-50.0%"
    assert found["ratio"] == "10-2,001"
    assert found["epochs"] == "0%-100%"
    assert found["KS gamma"] == "0.020"
    assert found["largest |s|"] == "0.316-14.1"
    large = dict(layers=pd.DataFrame(rows), epochs=epochs.assign(max_abs=1099.4))
    assert remedy_table(large, "mae").loc[("SAN", "sink"), "largest |s|"] == "1,100"


def test_networks_without_a_remedy_are_those_of_the_grid():
    found = read_remedies(RESULTS, "tox21", {"none": "none"}, ["GT"])
    assert set(found["layers"]["seed"]) == {0, 1, 2}
    assert set(found["layers"]["label"]) == {"GT"}
    summary = pd.read_csv(RESULTS / "emergence_gt_tox21_summary.csv.gz").query("state == 'best'")
    best = found["layers"].query("state == 'best'")
    assert best["max_ratio"].tolist() == summary["max_ratio"].tolist()
    laws = pd.read_csv(RESULTS / "laws.csv.gz").query("run == 'gt_tox21' and law == 'gamma'")
    laws = laws.set_index(["state", "seed", "layer"])["ks_own"].sort_index()
    assert found["layers"].set_index(["state", "seed", "layer"])["ks_own"].sort_index().equals(laws)


def test_a_table_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"remedy_gt_zinc_none_layers"):
        read_remedies(tmp_path, "zinc")


def test_the_figure_has_a_dot_for_each_seed_and_a_line_at_the_geometric_mean():
    late = pd.DataFrame(
        {"label": "GT", "run": ["a", "a", "b"], "seed": [0, 1, 0], "largest": [10.0, 1000.0, 5.0]}
    )
    (ax,) = arms(late, {"largest": "largest ratio"}, logarithmic=["largest"]).axes.flat
    dots = np.concatenate([points.get_offsets().data[:, 0] for points in ax.collections])
    assert sorted(dots) == [5, 10, 1000] and ax.get_xscale() == "log"
    assert [line.get_xdata()[0] for line in ax.lines] == pytest.approx([100, 5, 1000])
