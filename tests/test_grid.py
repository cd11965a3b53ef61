"""The grid's tables against small ones written by hand, and against scipy and nested loops."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import integrate, stats

from mapkg.measures import NEG_LOG_RATIO_BINS, StreamingHistogram
from mapkg.nulls import ProductNull
from studies.grid import (
    DATA_SETS,
    GRID,
    MODELS,
    grid_table,
    how_unlikely,
    law_table,
    laws,
    length_table,
    read_runs,
    read_untrained,
)
from studies.laws import LAWS
from studies.results import TABLES, Emergence
from studies.tables import write as write_table

ORIGIN = {
    "config": "GT-ZINC",
    "changes": "none",
    "dataset": "ZINC",
    "epochs": 100,
    "versions": "torch 2.13.0",
    "commit": "0" * 40,
}


# ------------------------------------------------------------------------------
# Reading


def tables(number):
    """Five tables of two rows that hold a number."""
    return Emergence(**{name: pd.DataFrame({"seed": [0, 1], name: number}) for name in TABLES})


def store(folder, run):
    for name in TABLES:
        write_table(folder / f"emergence_{run}_{name}.csv.gz", getattr(tables(len(run)), name))


def test_the_grid_names_every_pair_a_row_of_the_figure_after_the_other():
    pairs = list(GRID.items())
    assert pairs[0] == ("gt_zinc", "GT, ZINC")
    assert pairs[-1] == ("san_proteins", "SAN, PROTEINS (TU)")
    assert len(pairs) == len(MODELS) * len(DATA_SETS)
    for model, first in zip(MODELS, range(0, len(pairs), len(DATA_SETS)), strict=True):
        for name, title in pairs[first : first + len(DATA_SETS)]:
            assert name.startswith(f"{model.lower()}_")
            assert title.startswith(f"{model}, ")


def test_the_tables_of_several_runs_are_one_set_with_the_name_of_the_run(tmp_path):
    for run in ("gt_zinc", "san", "other"):
        store(tmp_path, run)
    found = read_runs(tmp_path, ["san", "gt_zinc"])
    for name in TABLES:
        expected = pd.DataFrame(
            {"seed": [0, 1, 0, 1], name: [3, 3, 7, 7], "run": ["san", "san", "gt_zinc", "gt_zinc"]}
        )
        pd.testing.assert_frame_equal(getattr(found, name), expected)
    assert found.fit is None


def test_names_may_be_given_as_a_mapping_to_titles(tmp_path):
    store(tmp_path, "san_zinc")
    assert set(read_runs(tmp_path, {"san_zinc": "SAN, ZINC"}).summary["run"]) == {"san_zinc"}


def test_a_run_without_its_tables_is_an_error_that_names_the_file(tmp_path):
    store(tmp_path, "san")
    (tmp_path / "emergence_san_history.csv.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no table at .*emergence_san_history\.csv\.gz"):
        read_runs(tmp_path, ["san"])


def test_untrained_networks_are_read_with_the_name_of_the_run(tmp_path):
    for run, ratio in (("gt_zinc", 2.5), ("san_zinc", 1e6)):
        table = pd.DataFrame({"state": ["base", "base_calibrated"], "max_ratio": ratio})
        write_table(tmp_path / f"untrained_{run}.csv.gz", table)
    found = read_untrained(tmp_path, ["san_zinc", "gt_zinc"])
    assert found["run"].tolist() == ["san_zinc", "san_zinc", "gt_zinc", "gt_zinc"]
    assert found["max_ratio"].tolist() == [1e6, 1e6, 2.5, 2.5]
    assert found.index.tolist() == [0, 1, 2, 3]
    with pytest.raises(FileNotFoundError, match="untrained_gat_zinc"):
        read_untrained(tmp_path, ["gat_zinc"])


# ------------------------------------------------------------------------------
# How unlikely


def trained_rows(*rows, state="best", channels=8, number=1000):
    columns = ["run", "seed", "layer", "max_ratio"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(state=state, channels=channels, rows=number)


def null_rows(run, layer, ratios, state="base_calibrated"):
    return pd.DataFrame(
        {"run": run, "layer": layer, "state": state, "seed": range(len(ratios))}
        | {"max_ratio": ratios}
    )


def test_a_layer_is_ranked_among_untrained_networks_of_the_same_run_and_layer():
    summary = pd.concat(
        [
            trained_rows(("a", 0, 0, 50.0), ("a", 0, 1, 50.0), ("b", 3, 0, 50.0)),
            trained_rows(("a", 0, 0, 1e9), state="base"),  # not what was asked for
        ]
    )
    untrained = pd.concat(
        [
            null_rows("a", 0, [10.0, 49.0, 50.0, 60.0]),  # two of four reach 50
            null_rows("a", 1, [10.0, 20.0, 30.0]),  # none of three
            null_rows("b", 0, [51.0] * 9),  # all nine
            null_rows("a", 1, [1e9] * 5, state="base"),  # BatchNorm not calibrated: no null
        ]
    )
    found = how_unlikely(summary, untrained)
    assert found[["run", "seed", "layer"]].values.tolist() == [
        ["a", 0, 0],
        ["a", 0, 1],
        ["b", 3, 0],
    ]
    assert found["max_ratio"].tolist() == [50.0] * 3
    assert found["untrained_max"].tolist() == [60.0, 30.0, 51.0]
    assert found["p_untrained"].tolist() == [3 / 5, 1 / 4, 1.0]
    assert found.index.tolist() == [0, 1, 2]


def test_another_state_can_be_asked_for():
    summary = pd.concat(
        [trained_rows(("a", 0, 0, 50.0)), trained_rows(("a", 0, 0, 70.0), state="last")]
    )
    untrained = null_rows("a", 0, [60.0])
    assert how_unlikely(summary, untrained)["p_untrained"].tolist() == [1.0]
    found = how_unlikely(summary, untrained, trained="last")
    assert found[["max_ratio", "p_untrained"]].values.tolist() == [[70.0, 0.5]]


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
    summary = trained_rows(("a", 0, 0, 500.0), channels=2, number=3)
    found = how_unlikely(summary, null_rows("a", 0, [1.0])).iloc[0]
    one_row = exceedance_of_two_channels(500.0)
    assert found["p_chance"] == pytest.approx(1 - (1 - one_row) ** 3, rel=1e-5)
    at_threshold = exceedance_of_two_channels(found["chance_threshold"])
    assert 1 - (1 - at_threshold) ** 3 == pytest.approx(0.05, rel=1e-5)


def test_widths_and_numbers_of_rows_are_not_confused():
    summary = pd.concat(
        [
            trained_rows(("a", 0, 0, 90.0), channels=64, number=50_000),
            trained_rows(("b", 0, 0, 300.0), channels=16, number=100),
            trained_rows(("c", 0, 0, 300.0), channels=16, number=50_000),
        ]
    )
    untrained = pd.concat([null_rows(run, 0, [1.0]) for run in "abc"])
    found = how_unlikely(summary, untrained)
    for row, (channels, number) in enumerate([(64, 50_000), (16, 100), (16, 50_000)]):
        null = ProductNull(channels)
        expected = null.exceedance(summary["max_ratio"].iloc[row], number)
        assert found["p_chance"][row] == pytest.approx(expected)
        assert null.exceedance(found["chance_threshold"][row], number) == pytest.approx(0.05)
    assert found["chance_threshold"].nunique() == 3


def test_a_layer_without_a_usable_row_has_no_p_value():
    found = how_unlikely(trained_rows(("a", 0, 0, np.nan)), null_rows("a", 0, [1.0, 2.0]))
    assert found[["p_untrained", "p_chance"]].isna().all(axis=None)
    assert found["untrained_max"].tolist() == [2.0]


# ------------------------------------------------------------------------------
# The table of the grid


@pytest.fixture
def summary():
    """Two runs of two seeds and three layers; every number is chosen."""
    ratio = {
        ("reg", 0): (10.0, 2000.0, 900.0),
        ("reg", 1): (20.0, 1500.4, 1001.0),
        ("cls", 0): (5.0, 6.0, 7.0),
        ("cls", 1): (5.0, 6.0, 7.0),
    }
    rows = []
    for (run, seed), ratios in ratio.items():
        for layer, value in enumerate(ratios):
            common = {"run": run, "seed": seed, "layer": layer, "epochs": 100 + 20 * seed}
            metric = "test_mae" if run == "reg" else "test_roc_auc"
            share = 0.01 * (layer + seed) if run == "reg" else 0.0
            rows += [
                {**common, "state": "base", "max_ratio": 100 * value, metric: 9.0}
                | {"share_rows_with_massive": 1.0},
                {**common, "state": "best", "max_ratio": value, metric: 0.5 + 0.25 * seed}
                | {"share_rows_with_massive": share}
                | ({"test_bce": 0.25, "test_accuracy": 0.9} if run == "cls" else {}),
                {**common, "state": "last", "max_ratio": 1e9, metric: 9.0}
                | {"share_rows_with_massive": 1.0},
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
    assert found.loc["cls"].to_dict() == {
        "seeds": 2,
        "epochs": "100 to 120",
        "test split": "roc_auc 0.500 to 0.750, bce 0.250",
        "untrained": "700",
        "trained": "7",
        "layers, every seed": "none",
        "layers, some seed": "none",
        "edges, at most": "0.00%",
    }


def test_the_table_of_regressions_alone_or_of_classifications_alone_has_its_metric(summary):
    texts = {"reg": "mae 0.500 to 0.750", "cls": "roc_auc 0.500 to 0.750, bce 0.250"}
    for run, text in texts.items():
        alone = summary[summary["run"] == run].dropna(axis="columns", how="all")
        assert grid_table(alone)["test split"].tolist() == [text]


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
    names = ["run", "seed", "epoch", "layer", "max_ratio"]
    table = length_table(pd.DataFrame(rows, columns=names))
    assert table.columns.tolist() == [
        *("untrained", "highest", "in epoch", "last epoch", "massive from")
    ]
    assert table.loc["b"].loc[7].tolist() == [90, 1501, 2, 300, "2"], "at the threshold it is not"
    assert table.loc["b"].loc[3].tolist() == [60, 2500, 2, 2500, "1"]
    assert table.loc["a"].loc[0].tolist() == [50, 80, 1, 70, "never"]
    assert table.index.get_level_values("run").unique().tolist() == ["b", "a"], "in their order"
    lower = length_table(pd.DataFrame(rows, columns=names), threshold=70.0)
    assert lower["massive from"].tolist() == ["0", "1", "1"]


def test_a_ratio_at_the_threshold_is_not_massive(summary):
    found = grid_table(summary, threshold=6.0).loc["cls"]
    assert found["layers, every seed"] == "2"
    assert grid_table(summary, threshold=5.9).loc["cls", "layers, every seed"] == "1, 2"


# ------------------------------------------------------------------------------
# Laws


def histogram(values, **columns):
    counted = StreamingHistogram(*NEG_LOG_RATIO_BINS)
    counted.update(torch.from_numpy(values))
    filled = counted.counts.nonzero().flatten()
    return pd.DataFrame(
        {"bin": filled.tolist(), "low": counted.edges[filled].tolist()}
        | {"count": counted.counts[filled].tolist()}
    ).assign(**columns)


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
def tables_of_samples(samples):
    keys = ["run", "seed", "layer", "state"]
    return pd.concat(
        [
            histogram(values, **ORIGIN | dict(zip(keys, key, strict=True)) | {"config": key[0]})
            for key, values in samples.items()
        ],
        ignore_index=True,
    )


@pytest.fixture(scope="module")
def fitted(tables_of_samples):
    return laws(tables_of_samples)


def test_every_run_state_and_law_has_a_row_with_its_origin(fitted, samples):
    expected = {(*key, law) for key in samples if key[3] != "last" for law in LAWS}
    found = fitted[["run", "seed", "layer", "state", "law"]].itertuples(index=False, name=None)
    assert sorted(found) == sorted(expected)
    for column, value in ORIGIN.items():
        assert (fitted[column] == (fitted["run"] if column == "config" else value)).all(), column
    assert (fitted["num_values"] == 20_000).all()


def test_the_laws_are_fitted_to_the_values_of_their_row(fitted, samples, tables_of_samples):
    for key, part in tables_of_samples.groupby(["run", "seed", "layer", "state"]):
        if key[3] == "last":
            continue
        rows = fitted[(fitted["run"] == key[0]) & (fitted["state"] == key[3])].set_index("law")
        mean, deviation = samples[key].mean(), samples[key].std()
        assert rows.loc["normal", "loc"] == pytest.approx(mean, abs=0.005)
        assert rows.loc["normal", "scale"] == pytest.approx(deviation, rel=0.005)
        assert len(part) > 50
    best = fitted[(fitted["run"] == "a") & (fitted["law"] == "gamma")].set_index("state")
    assert best["scale"].to_dict() == pytest.approx({"base": 0.3, "best": 0.6}, rel=0.1)


def test_the_two_sample_distance_is_that_of_scipy_to_the_base_of_the_same_run(fitted, samples):
    rows = fitted[fitted["law"] == "gamma"].set_index(["run", "state"])
    for run, seed in (("a", 0), ("b", 1)):
        first, second = (samples[run, seed, 0, state] for state in ("base", "best"))
        expected = stats.ks_2samp(first, second).statistic
        row = rows.loc[run, "best"]
        least = row["ks_two_sample"]
        assert least - 1e-12 <= expected <= least + row["ks_two_sample_resolution"] + 1e-12
        assert rows.loc[(run, "base"), "ks_two_sample"] == 0


def test_other_states_are_compared_with_the_first_of_those_asked_for(tables_of_samples, samples):
    of_a = tables_of_samples[tables_of_samples["run"] == "a"]
    found = laws(of_a, ["last", "best"])
    assert set(found["state"]) == {"last", "best"}
    row = found[(found["state"] == "best") & (found["law"] == "normal")].iloc[0]
    expected = stats.ks_2samp(samples["a", 0, 0, "last"], samples["a", 0, 0, "best"]).statistic
    assert row["ks_two_sample"] == pytest.approx(expected, abs=row["ks_two_sample_resolution"])
    assert (found.loc[found["state"] == "last", "ks_two_sample"] == 0).all()


def test_an_origin_that_is_not_one_per_run_is_refused(tables_of_samples):
    mixed = tables_of_samples.copy()
    mixed.loc[mixed.index[0], "commit"] = "f" * 40
    with pytest.raises(pd.errors.MergeError, match="not a many-to-one merge"):
        laws(mixed)


def test_the_law_table_is_the_one_made_by_hand():
    rows = []
    # Distance and AIC of each law in three layers: gamma is the nearest by AIC in two of them.
    chosen = {
        "gamma": ([0.010, 0.020, 0.060], [1.0, 1.0, 5.0]),
        "normal": ([0.100, 0.300, 0.200], [2.0, 2.0, 2.0]),
    }
    for layer in range(3):
        aic = {law: values[1][layer] for law, values in chosen.items()}
        for law, (distance, _) in chosen.items():
            rows.append(
                {"run": "a", "seed": 0, "layer": layer, "state": "best", "law": law}
                | {"ks_own": distance[layer], "aic_rank": sorted(aic, key=aic.get).index(law) + 1}
                | {"ks_base": 0.4 + layer if law == "gamma" else 99.0}
                | {"ks_two_sample": 0.12345 if law == "gamma" else 99.0}
            )
    found = law_table(pd.DataFrame(rows))
    assert found.index.tolist() == [("a", "best")]
    assert found.loc[("a", "best")].to_dict() == {
        "fits": 3,
        "gamma": "0.020 (2)",
        "normal": "0.200 (1)",
        "ks_base": 1.4,
        "ks_two_sample": 0.123,
    }


def test_the_law_table_counts_layers_and_seeds_of_each_run_and_state_apart(fitted):
    again = pd.concat([fitted, fitted[fitted["run"] == "a"].assign(seed=1)], ignore_index=True)
    found = law_table(again)
    assert set(found.index) == {(run, state) for run in "ab" for state in ("base", "best")}
    for (run, state), row in found.iterrows():
        fits = 2 if run == "a" else 1
        part = fitted[(fitted["run"] == run) & (fitted["state"] == state)].set_index("law")
        best = part["aic"].idxmin()
        for law in LAWS:
            won = fits if law == best else 0
            assert row[law] == f"{part.loc[law, 'ks_own']:.3f} ({won})"
        assert row["fits"] == fits
        assert row["ks_base"] == round(part.loc["gamma", "ks_base"], 3)
        assert row["ks_two_sample"] == round(part.loc["gamma", "ks_two_sample"], 3)
    assert found.loc[("a", "base"), "ks_two_sample"] == 0


def test_the_law_table_may_have_a_row_per_layer_or_per_run(fitted):
    layers = pd.concat([fitted, fitted.assign(layer=1, ks_own=0.5)], ignore_index=True)
    by_layer = law_table(layers, ["run", "state", "layer"])
    pd.testing.assert_frame_equal(by_layer.xs(0, level="layer"), law_table(fitted))
    assert (by_layer.xs(1, level="layer")["gamma"].str[:5] == "0.500").all()
    by_run = law_table(fitted, ["run"])
    assert by_run.index.tolist() == ["a", "b"]
    for run, row in by_run.iterrows():
        of_law = fitted[fitted["run"] == run].groupby("law")
        for law, part in of_law:
            won = (part["aic_rank"] == 1).sum()
            assert row[law] == f"{part['ks_own'].median():.3f} ({won})"
