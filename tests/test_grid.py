"""The grid's tables against small ones written by hand, and against scipy and nested loops."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import integrate, stats

from mapkg.measures import NEG_LOG_RATIO_BINS, StreamingHistogram
from studies.laws import LAWS
from studies.results import (
    DATA_SETS,
    GRID,
    MODELS,
    TABLES,
    Emergence,
    by_measure,
    grid_table,
    how_unlikely,
    law_table,
    laws,
    length_table,
    read_runs,
)
from studies.tables import write

KEYS = ["run", "seed", "layer", "state"]
ORIGIN = {"config": "GT-ZINC", "changes": "none", "dataset": "ZINC", "epochs": 100}
ORIGIN |= {"versions": "torch 2.13.0", "commit": "0" * 40}


def test_the_grid_names_every_pair_a_row_of_the_figure_after_the_other():
    titles = [f"{model}, {data}" for model in MODELS for data in DATA_SETS.values()]
    assert list(GRID.values()) == titles


def test_the_tables_of_several_runs_are_one_set_with_the_name_of_the_run(tmp_path):
    for run in ("gt_zinc", "san", "other"):
        for name in TABLES:
            table = pd.DataFrame({"seed": [0, 1], name: len(run)})
            write(tmp_path / f"emergence_{run}_{name}.csv.gz", table)
    found = read_runs(tmp_path, {"san": "SAN, ZINC", "gt_zinc": "GT, ZINC"})
    for name in TABLES:
        columns = {"seed": [0, 1, 0, 1], name: [3, 3, 7, 7]}
        expected = pd.DataFrame(columns | {"run": ["san", "san", "gt_zinc", "gt_zinc"]})
        pd.testing.assert_frame_equal(getattr(found, name), expected)
    (tmp_path / "emergence_san_history.csv.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no table at .*emergence_san_history\.csv\.gz"):
        read_runs(tmp_path, ["san"])


def test_three_measures_of_one_layer_need_not_agree():
    ratios = {"base": [0.0, 0.2], "best": [0.0, 0.3]}  # -log10 of a ratio, as often each
    rows = [
        {"run": run, "seed": seed, "layer": 0, "state": state, "low": low * wide, "count": 5}
        for run, wide in (("a", 1.0), ("b", 1.0), ("c", 0.5))
        for seed in (0, 1)
        for state, lows in ratios.items()
        for low in lows
    ]
    histogram = pd.DataFrame(rows)
    histogram.loc[histogram.eval("run == 'b' and seed == 1 and state == 'base'"), "low"] *= 2
    values = {"a": (1001, 99, 0.001), "b": (999, 101, 0.1), "c": (999, 101, 0.102)}
    columns = ["max_ratio", "max_abs", "row_median_q50"]
    summary = [
        {
            "run": run,
            "seed": seed,
            "layer": 0,
            "state": "best",
            **dict(zip(columns, v, strict=True)),
        }
        for run, v in values.items()
        for seed in (0, 1)
    ]
    empty = pd.DataFrame()
    found = by_measure(Emergence(pd.DataFrame(summary), empty, empty, histogram, empty))
    assert found.set_index(["run", "seed"]).drop(columns="layer").to_numpy().tolist() == [
        *[[True, False, True]] * 2,
        *[[False, True, False]] * 2,  # the other seed's untrained network is as wide
        *[[False, False, True]] * 2,
    ]


def trained_rows(*rows, state="best", channels=8, number=1000):
    table = pd.DataFrame(rows, columns=["run", "seed", "layer", "max_ratio"])
    return table.assign(state=state, channels=channels, rows=number)


def null_rows(run, layer, ratios, state="base_calibrated"):
    return pd.DataFrame({"run": run, "layer": layer, "state": state, "max_ratio": ratios})


def test_a_layer_is_ranked_among_untrained_networks_of_the_same_run_and_layer():
    rows = ("a", 0, 0, 50.0), ("a", 0, 1, 50.0), ("b", 3, 0, 50.0), ("c", 0, 0, np.nan)
    other_state = trained_rows(("a", 0, 0, 1e9), state="base")
    untrained = [
        null_rows("a", 0, [10.0, 49.0, 50.0, 60.0]),  # two of four reach 50
        null_rows("a", 1, [10.0, 20.0, 30.0]),  # none of three
        null_rows("b", 0, [51.0] * 9),  # all nine
        null_rows("a", 1, [1e9] * 5, state="base"),  # BatchNorm not calibrated: no null
        null_rows("c", 0, [1.0, 2.0]),
    ]
    found = how_unlikely(pd.concat([trained_rows(*rows), other_state]), pd.concat(untrained))
    assert found[["run", "seed", "layer"]].values.tolist() == [[*row[:3]] for row in rows]
    assert found["untrained_max"].tolist() == [60.0, 30.0, 51.0, 2.0]
    assert found["p_untrained"].tolist()[:3] == [3 / 5, 1 / 4, 1.0]
    assert found.loc[3, ["p_untrained", "p_chance"]].isna().all(), "a layer without a usable row"


def exceedance_of_two_channels(ratio):
    """The chance that of two products of three normals one is ``ratio`` times the other.

    The lower middle one of two magnitudes is the smaller, so the largest ratio of a row is the
    larger over the smaller. The logarithm of a ratio of products is a sum of three independent
    logarithms of ratios of normals, and such a ratio is a Cauchy variable: its characteristic
    function is 1 / cosh(pi t / 2).
    """

    def integrand(t):
        return np.sin(t * np.log(ratio)) / t / np.cosh(np.pi * t / 2) ** 3

    inside, _ = integrate.quad(integrand, 0, 40, limit=500)
    return 1 - 2 / np.pi * inside


def test_chance_is_that_of_products_of_normals_of_the_same_width_in_as_many_rows():
    sizes = {"a": (2, 3), "b": (16, 3), "c": (2, 5000)}  # channels and rows
    parts = [trained_rows((r, 0, 0, 500.0), channels=c, number=n) for r, (c, n) in sizes.items()]
    null = pd.concat([null_rows(run, 0, [1.0]) for run in sizes])
    found = how_unlikely(pd.concat(parts), null).set_index("run")
    one_row = exceedance_of_two_channels(500.0)
    for run, number in (("a", 3), ("c", 5000)):
        row = found.loc[run]
        assert row["p_chance"] == pytest.approx(1 - (1 - one_row) ** number, rel=1e-5)
        at_threshold = exceedance_of_two_channels(row["chance_threshold"])
        assert 1 - (1 - at_threshold) ** number == pytest.approx(0.05, rel=1e-4)
    assert found.loc["b", "p_chance"] != found.loc["a", "p_chance"]


@pytest.fixture
def summary():
    """Two runs of two seeds and three layers; every number is chosen."""
    ratio = {("reg", 0): (10.0, 2000.0, 900.0), ("reg", 1): (20.0, 1500.4, 1001.0)}
    ratio |= {("cls", 0): (5.0, 6.0, 7.0), ("cls", 1): (5.0, 6.0, 7.0)}
    rows = []
    for (run, seed), ratios in ratio.items():
        metric = "test_mae" if run == "reg" else "test_roc_auc"
        for layer, value in enumerate(ratios):
            common = {"run": run, "seed": seed, "layer": layer, "epochs": 100 + 20 * seed}
            other = common | {metric: 9.0, "share_rows_with_massive": 1.0}
            best = {metric: 0.5 + 0.25 * seed, "share_rows_with_massive": 0.01 * (layer + seed)}
            best |= {"test_bce": 0.25, "share_rows_with_massive": 0.0} if run == "cls" else {}
            rows += [
                {**other, "state": "base", "max_ratio": 100 * value},
                {**common, "state": "best", "max_ratio": value, **best},
                {**other, "state": "last", "max_ratio": 1e9},
            ]
    return pd.DataFrame(rows)


def test_the_grid_table_is_the_one_made_by_hand(summary):
    found = grid_table(summary)
    assert found.index.tolist() == ["reg", "cls"]
    assert found.loc["reg"].to_dict() == {
        "seeds": 2,
        "epochs": "100 to 120",
        "test split": "mae 0.500 to 0.750",
        "untrained": "150,040 to 200,000",
        "trained": "1,500 to 2,000",
        "layers, every seed": "1",
        "layers, some seed": "2",
        "edges, at most": "2.00% to 3.00%",
    }
    assert found.loc["cls"].iloc[2:].tolist() == [
        *("roc_auc 0.500 to 0.750, bce 0.250", "700", "7", "none", "none", "0.00%")
    ]
    assert grid_table(summary, threshold=6.0).loc["cls", "layers, every seed"] == "2"
    alone = summary[summary["run"] == "reg"].dropna(axis="columns", how="all")
    assert grid_table(alone)["test split"].tolist() == ["mae 0.500 to 0.750"]


def test_the_table_of_lengths_is_the_one_made_by_hand():
    ratios = {  # of the larger of two layers; the other has 1 less
        ("b", 7): {0: 90.4, 1: 1000.0, 2: 1500.6, 5: 300.2},
        ("a", 0): {0: 50.0, 1: 80.0, 2: 70.0},
        ("b", 3): {0: 60.0, 1: 1001.0, 2: 2500.0},
    }
    rows = [
        (run, seed, epoch, layer, ratio - (layer != epoch % 2))
        for (run, seed), by_epoch in ratios.items()
        for epoch, ratio in by_epoch.items()
        for layer in (0, 1)
    ]
    trajectory = pd.DataFrame(rows, columns=["run", "seed", "epoch", "layer", "max_ratio"])
    table = length_table(trajectory)
    assert table.loc["b"].loc[7].tolist() == [90, 1501, 2, 300, "2"], "at the threshold it is not"
    assert table.loc["b"].loc[3].tolist() == [60, 2500, 2, 2500, "1"]
    assert table.loc["a"].loc[0].tolist() == [50, 80, 1, 70, "never"]
    assert table.index.get_level_values("run").unique().tolist() == ["b", "a"], "in their order"
    lower = length_table(trajectory, threshold=70.0)
    assert lower["massive from"].tolist() == ["0", "1", "1"]


def histogram(values):
    counted = StreamingHistogram(*NEG_LOG_RATIO_BINS)
    counted.update(torch.from_numpy(values))
    filled = counted.counts.nonzero().flatten()
    columns = {"bin": filled, "low": counted.edges[filled], "count": counted.counts[filled]}
    return pd.DataFrame({name: values.tolist() for name, values in columns.items()})


@pytest.fixture(scope="module")
def samples():
    """Values of -log10 ratio, by run, seed, layer and state."""
    draw = np.random.default_rng(0)
    return {
        ("a", 0, 0, "base"): draw.gamma(3.0, 0.3, 20_000) - 1,
        ("a", 0, 0, "best"): draw.gamma(3.0, 0.6, 20_000) - 1,
        ("a", 0, 0, "last"): draw.normal(0.0, 1.0, 20_000),
        ("b", 1, 0, "base"): draw.normal(0.5, 0.4, 20_000),
        ("b", 1, 0, "best"): draw.weibull(1.5, 20_000) - 1,
    }


@pytest.fixture(scope="module")
def fitted(samples):
    parts = [
        histogram(values).assign(**dict(zip(KEYS, key, strict=True)), **ORIGIN)
        for key, values in samples.items()
    ]
    return laws(pd.concat(parts, ignore_index=True))


def test_laws_are_fitted_to_the_values_of_their_row_and_know_their_origin(fitted, samples):
    expected = {(*key, law) for key in samples if key[3] != "last" for law in LAWS}
    assert {*fitted[[*KEYS, "law"]].itertuples(index=False, name=None)} == expected
    assert len(fitted) == len(expected)
    for column, value in ORIGIN.items():
        assert (fitted[column] == value).all(), column
    rows = fitted.set_index([*KEYS, "law"]).sort_index()
    for *key, law in expected:
        if law == "normal":
            mean, deviation = samples[*key].mean(), samples[*key].std()
            assert rows.loc[(*key, law), "loc"] == pytest.approx(mean, abs=0.005)
            assert rows.loc[(*key, law), "scale"] == pytest.approx(deviation, rel=0.005)
        if law == "gamma":  # the distance to the base of the same run
            row, base = rows.loc[(*key, law)], (*key[:3], "base")
            distance = stats.ks_2samp(samples[base], samples[*key]).statistic
            least = row["ks_two_sample"]
            assert least - 1e-12 <= distance <= least + row["ks_two_sample_resolution"] + 1e-12


def test_the_law_table_is_the_one_made_by_hand():
    values = {  # distance and AIC of three layers
        "gamma": ([0.01, 0.02, 0.3], [-5.0, -9.0, 4.0]),
        "normal": ([0.1, 0.2, 0.4], [-4.0, -8.0, 3.0]),
    }
    rows = []
    for layer in range(3):
        ranked = sorted(values, key=lambda law, layer=layer: values[law][1][layer])
        for law, (distance, _) in values.items():
            of_gamma = {"ks_base": 0.4 + layer, "ks_two_sample": 0.12345}
            rows.append(
                {"run": "a", "seed": 0, "layer": layer, "state": "best", "law": law}
                | {"ks_own": distance[layer], "aic_rank": ranked.index(law) + 1}
                | (of_gamma if law == "gamma" else dict.fromkeys(of_gamma, 99.0))
            )
    rows += [row | {"run": "b", "layer": 9, "ks_own": 0.5} for row in rows[:2]]
    found = law_table(pd.DataFrame(rows))
    expected = {"fits": 3, "gamma": "0.020 (2)", "normal": "0.200 (1)"}
    assert found.loc[("a", "best")].to_dict() == expected | {"ks_base": 1.4, "ks_two_sample": 0.123}
    assert found.loc[("b", "best"), ["fits", "gamma"]].tolist() == [1, "0.500 (1)"]
    by_layer = law_table(pd.DataFrame(rows), ["run", "layer"])
    assert by_layer["gamma"].tolist() == ["0.010 (1)", "0.020 (1)", "0.300 (0)", "0.500 (1)"]
