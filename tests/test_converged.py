"""GT on ZINC to the end of its schedule: what the page says, against the tracked tables."""

import json

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from conftest import REPOSITORY, few_molecules
from scipy import stats

from mapkg.models import build
from studies import converged as study
from studies import plots
from studies.published import CONFIGS

RESULTS = REPOSITORY / "data" / "results"
SEEDS = list(range(16))
RUN_COMMIT = "29911558b1e095892012346b21fd1c68db9d14f3"


@pytest.fixture(scope="module")
def tables():
    return study.read_converged(RESULTS)


@pytest.fixture(scope="module")
def table(tables):
    return tables[0]


@pytest.fixture(scope="module")
def errors(tables):
    return tables[2]


@pytest.fixture(scope="module")
def counted(table):
    return study.seeds_by_layer(table)


def seeds_with(counted, measure, state):
    return counted.loc[(study.MEASURES[measure], state), list(range(10))].tolist()


# The tables.


def test_every_row_says_where_it_comes_from(tables):
    for part in tables:
        assert set(part["config"]) == {"GT-ZINC"} and set(part["dataset"]) == {"ZINC-12k"}
        assert set(part["commit"]) == {RUN_COMMIT}
        assert set(part["machine"]) == {"NVIDIA H100 80GB HBM3"}
        assert part["versions"].str.startswith("python 3.12.3; torch 2.11.0;").all()
    assert tables[2]["evaluated_at"].str.fullmatch("[0-9a-f]{40}").all()
    assert tables[2]["evaluated_with"].str.contains("torch 2.13").all()


def test_the_tables_are_complete_and_small(tables):
    table, windows, errors = tables
    assert not table.groupby(["seed", "epoch"]).size().ne(10).any()
    states = table[table["state"] != ""].groupby(["state", "seed"]).size().unstack()
    assert sorted(states.index) == sorted(study.STATES)
    assert states.columns.tolist() == SEEDS and states.eq(10).all(axis=None)
    assert set(table["rows"]) == {49_720}  # directed edges of the ZINC test split
    for _, seed in table.groupby("seed"):
        last = seed["epochs"].iloc[0]
        assert {0, 1, 2, 5, 10, *range(20, last + 1, 20)} <= set(seed["epoch"])
    assert len(windows) == 16 * 2 * 10 and set(windows["recorded"]) == {9, 10}
    assert len(errors) == 16 * 2 * 3
    files = RESULTS.glob("converged_gt_zinc_*.csv.gz")
    assert sum(path.stat().st_size for path in files) < 200_000


def test_states_are_where_they_should_be(table):
    rates = table.drop_duplicates(["seed", "state"]).set_index(["state", "seed"])
    assert (rates.loc["high", "lr"] == 7e-4).all(), "before the first halving"
    assert (rates.loc["last", "lr"] < 2e-6).all(), "the next halving ends training"
    assert (rates.loc["high", "epoch"] < rates.loc["high", "halved"]).all()
    assert (rates.loc["high", "epoch"] >= rates.loc["high", "halved"] - 5).all()
    for state, column in (("best", "best_epoch"), ("last", "epochs")):
        assert (rates.loc[state, "epoch"] - rates.loc[state, column]).abs().max() < 5


# What the page says of massive activations.


def test_by_the_row_ratio_they_move_from_the_last_layer_to_the_first(table, counted):
    assert seeds_with(counted, "row", "untrained") == [0] * 10
    assert seeds_with(counted, "row", "high") == [5, 1, 0, 0, 0, 0, 0, 0, 0, 7]
    assert seeds_with(counted, "row", "last") == [12, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    row = counted.loc[study.MEASURES["row"]]
    assert row.loc[["high", "last"], "any"].tolist() == [10, 12]
    assert row.loc["last", ["from", "to"]].round(2).tolist() == [0.48, 0.93]
    change = study.compare_phases(table).loc[study.MEASURES["row"]]
    assert change["change"] == 0 and -1 < change["low"] < change["high"] < 1


def test_by_suns_rule_they_stay_in_the_last_three_layers_and_leave_layer_5(counted):
    before, after = (seeds_with(counted, "sun", state) for state in ("high", "last"))
    assert before[7:] == after[7:] == [16, 16, 16]
    assert (before[5], after[5]) == (14, 3)
    assert before[:2] == after[:2] == [0, 0]


def test_the_spread_of_the_first_layer_is_beyond_all_untrained_networks(counted):
    for state in ("high", "last"):
        assert seeds_with(counted, "spread", state)[0] == 16


def test_five_measures_find_fewer_layers_at_the_end(table):
    tests = study.compare_phases(table)
    fewer = tests[(tests["holm"] < 0.05) & (tests["change"] < 0)]
    names = ("layer_wide", "sun", "spread", "second", "q90")
    assert fewer.index.tolist() == [study.MEASURES[name] for name in names]
    assert not (tests["low"] > 0).any()


def test_the_ratio_of_layer_0_grows_because_its_median_shrinks(table):
    ratio, size, median = (
        study.factors(table, column, [0, 5, 8, 9])
        for column in ("max_ratio", "max_abs", "row_median_q50")
    )
    assert ratio.loc[0, "change"] == pytest.approx(2.44, abs=0.01) and ratio.loc[0, "more"] == 16
    assert 1 / 1.25 < size.loc[0, "low"] < 1 < size.loc[0, "high"] < 1.25, "the margin"
    assert median.loc[0, "change"] == pytest.approx(0.5, abs=0.01)
    assert size.loc[[5, 8, 9], "change"].between(0.25, 0.31).all()
    assert (median.loc[[5, 8, 9], "low"] > 1).all()


def test_half_of_a_window_gives_the_same_picture_as_one_epoch(tables):
    steady = study.steady(tables[1]).loc[study.MEASURES["row"]]
    assert steady["high"][[0, 9]].tolist() == [4, 7]
    assert steady["end"][[0, 9]].tolist() == [12, 1]


def test_more_seeds_gain_than_lose_where_the_page_says_so(table):
    found = study.seeds_that_change(table, [("row", 0), ("row", 9), ("sun", 5)])
    assert found[["lost", "gained"]].to_numpy().tolist() == [[0, 7], [6, 0], [11, 0]]
    assert (found["holm"] < 0.05).all()


# What it says of the published error.


def test_the_published_error_is_not_reached(errors):
    anchor = study.beside_anchor(errors)
    last, best = anchor.loc[("test", "last")], anchor.loc[("test", "best")]
    assert last[["mae", "deviation"]].round(3).tolist() == [0.281, 0.013]
    assert last[["difference", "low", "high"]].round(3).tolist() == [0.017, 0.005, 0.029]
    assert best["mae"].round(3) == 0.286 and best["low"] > 0
    assert anchor.loc[("train", "last"), "mae"].round(3) == 0.075
    assert anchor.loc["train", "low"].min() > 0


def test_what_was_tried_moves_little_and_longer_runs_end_lower(table, errors):
    last = errors[errors["state"] == "last"].set_index(["split", "seed"])
    test, train = last.loc["test"], last.loc["train"]
    assert (test["mae"].mean() - test["mae_of_batches"].mean()) == pytest.approx(6e-4, abs=5e-5)
    assert (test["mae"] - test["recorded"]).abs().max() < 2e-4
    assert train["recorded"].mean() == pytest.approx(0.103, abs=5e-4)
    epochs = test["epoch"]
    assert (epochs.min(), epochs.max(), epochs.mean().round()) == (238, 367, 279)
    halved = table.groupby("seed")["halved"].first()
    error = test["mae_of_batches"]
    for other, rho in ((epochs, -0.44), (halved, -0.60), (train["mae_of_batches"], 0.83)):
        assert stats.spearmanr(other, error).statistic == pytest.approx(rho, abs=0.005)
    line = stats.linregress(epochs, error)
    assert line.intercept + line.slope * 322.5 == pytest.approx(0.273, abs=5e-4)


# Tables and tests from a few numbers.


def rows_of(**columns):
    base = dict(max_ratio=1.0, max_layer_ratio=1.0, sun_molecules=0, max_over_second_q50=1.0)
    base |= dict(max_over_q90_q50=1.0, kurtosis_q50=1.0, spread_mean=1.0, layer=0)
    return pd.DataFrame({**base, **columns})


def test_a_measure_is_beyond_untrained_if_above_all_seeds_of_its_layer():
    table = rows_of(seed=[0, 1, 0, 1], epoch=[0, 0, 5, 5], spread_mean=[2.0, 3.0, 3.0, 3.1])
    assert study.with_measures(table)["spread"].tolist() == [False, False, False, True]


def test_the_sign_test_leaves_out_ties_and_holm_multiplies_by_what_is_left():
    found = study.paired(pd.Series([1.0, 2.0, 1.0, 0.0]))
    assert (found["fewer"], found["more"], found["p"]) == (0, 3, 0.25)
    tests = pd.DataFrame({"p": [0.04, 0.01, 0.5]}, index=list("abc"))
    np.testing.assert_allclose(study.with_holm(tests)["holm"], [0.08, 0.03, 0.5])


def write_run(folder, config):
    """Two seeds of 20 epochs, the rate halved after 10 and 12, recorded at every fifth."""
    history = pd.DataFrame(
        {"seed": seed, "epoch": epoch, "lr": config.lr / (1 + (epoch > 10 + 2 * seed))}
        for seed in (0, 1)
        for epoch in range(1, 21)
    ).assign(train_loss=1.0, val_loss=1.0, test_loss=1.0)
    recorded = rows_of(epoch=range(0, 21, 5), rows=9, rows_with_massive=0, max_abs=1.0)
    recorded = recorded.assign(row_median_q50=1.0)
    recorded["max_ratio"] = [1, 2000, 1, 2000, 2000]
    measures = pd.concat([recorded.assign(seed=seed) for seed in (0, 1)])
    every = measures.merge(history, on=["seed", "epoch"], how="outer")
    every.to_csv(folder / "epochs.csv.gz", index=False)
    about = {"config": config.to_dict(), "config_name": "GT-ZINC", "seeds": [0, 1]}
    about |= {"by_seed": {s: {"best_epoch": 14, "last_epoch": 20} for s in (0, 1)}}
    about |= {f"{state}_weights_dtype": "torch.float32" for state in ("best", "last")}
    (folder / "run.json").write_text(json.dumps(about))


def test_states_windows_and_thinning_follow_the_rate(tmp_path):
    write_run(tmp_path, CONFIGS["GT-ZINC"])
    run = study.read_run(tmp_path)
    one = run[run["seed"] == 1].set_index("epoch")
    assert one["halved"].unique() == [13] and one["epochs"].unique() == [20]
    states = {0: "untrained", 5: "", 10: "high", 15: "best", 20: "last"}
    assert one["state"].to_dict() == states
    counts = study.windows(run).set_index(["phase", "seed"])
    assert counts.loc[("high", 1), ["recorded", "row"]].tolist() == [2, 1]
    assert counts.loc[("end", 1), ["recorded", "row"]].tolist() == [4, 3]
    assert len(study.thinned(run[run["epoch"] != 5])) == 8
    assert study.steady(study.windows(run)).loc[study.MEASURES["row"]].tolist() == [2, 2]


def test_errors_are_those_of_the_stored_weights(tmp_path):
    splits = few_molecules(9, 5, 3)
    config = CONFIGS["GT-ZINC"].replace(hidden_channels=8, heads=2, num_layers=1)
    write_run(tmp_path, config)
    networks = []
    for state in ("best", "last"):
        torch.manual_seed(0)
        networks = [build(config).eval() for _ in (0, 1)]
        tensors = {f"{s}/{k}": v for s, n in enumerate(networks) for k, v in n.state_dict().items()}
        safetensors.torch.save_file(tensors, tmp_path / f"{state}_0.safetensors")
    found = study.errors(tmp_path, splits, batch_size=2)
    assert len(found) == 2 * 2 * 3
    row = found.query("seed == 1 and state == 'last' and split == 'val'").iloc[0]
    with torch.no_grad():
        each = [
            abs(networks[1](g.x, g.edge_index, g.edge_attr).item() - g.y.item()) for g in splits.val
        ]
    assert row["mae"] == pytest.approx(np.mean(each), rel=1e-4)
    batches = [np.mean(each[:2]), np.mean(each[2:4]), each[4]]
    assert row["mae_of_batches"] == pytest.approx(np.mean(batches), rel=1e-4)
    assert row["recorded"] == 1.0


def test_figures_show_what_the_tables_say(table, counted):
    figure = plots.seeds_before_and_after(counted, 16)
    first = figure.axes[0]
    drawn = {line.get_label(): line.get_ydata().tolist() for line in first.lines}
    assert first.get_title() == study.MEASURES["row"]
    assert drawn == {
        "before the rate is halved": seeds_with(counted, "row", "high"),
        "end of training": seeds_with(counted, "row", "last"),
    }
    figure = plots.through_schedule(table, (0, 9), {"max_ratio": "ratio"})
    assert [ax.get_title() for ax in figure.axes] == ["layer 0", "layer 9"]
    assert len(figure.axes[0].lines) == 2 * 16 + 1
    last = pd.DataFrame({"epoch": [3, 4], "train": [0.1, 0.2], "test": [0.3, 0.4]})
    test, train = plots.beside_anchor(last, study.ANCHOR).axes
    for ax, split in ((test, "test"), (train, "train")):
        seeds, published = ax.lines[:2]
        assert seeds.get_xydata().tolist() == last[["epoch", split]].to_numpy().tolist()
        assert published.get_xydata().tolist() == [[321.5, study.ANCHOR[split][0]]]
