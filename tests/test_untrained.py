"""Trained networks among untrained ones, and shapes of tails, by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import few_molecules

from mapkg.all_measures import row_measures
from mapkg.measures import NEG_LOG_RATIO_BINS
from studies import untrained as study
from studies.emergence import emergence
from studies.laws import tails
from studies.published import CONFIGS

CONFIG = CONFIGS["GT-ZINC"].replace(hidden_channels=16, heads=4, num_layers=2, max_epochs=1)


def test_measures_of_a_network_are_its_maxima_over_layers(monkeypatch):
    scores, of_layer = [], study._of_layer
    monkeypatch.setattr(study, "_of_layer", lambda x: scores.append(x) or of_layer(x))
    table = study.measured(CONFIG, few_molecules(8, 4, 6), [3, 4], graphs=5, progress=False)
    assert table[["seed", "graphs"]].values.tolist() == [[3, 5], [4, 5]]
    ratios = [row_measures(score)["ratio"].max().item() for score in scores]
    assert table["row"].tolist() == pytest.approx([max(ratios[:2]), max(ratios[2:])])
    one = of_layer(torch.tensor([[1.0, -2.0, 300.0], [4.0, 2.0, 2.0]]))
    assert (one["row"], one["layer"], one["largest"]) == (150, 150, 300)
    assert (one["sun"], one["isolation"]) == (pytest.approx(0.15), 2)  # the lower of 150 and 2


def test_a_finished_run_has_the_measures_of_untrained_ones_and_those_of_its_tables(tmp_path):
    splits = few_molecules(8, 4, 6)
    run = emergence(CONFIG, splits, seed=3, folder=tmp_path, progress=False)
    made = study.measured_run(tmp_path, splits, graphs=6)
    layers, (network,) = made["layers"], made["network"].to_dict("records")
    assert layers["state"].value_counts().to_dict() == dict(base=2, base_calibrated=2, best=2)
    best = layers[layers["state"] == "best"]
    assert network["row"] == pytest.approx(best["max_ratio"].max(), rel=1e-5)
    assert network["largest"] == pytest.approx(best["max_abs"].max(), rel=1e-5)
    assert network["spread"] == pytest.approx(best["spread"].max(), rel=0.02)
    rows = run.histogram.query("state == 'best' and layer == 1")
    values = np.repeat(np.log(10) * rows["low"], rows["count"])
    assert best["spread"].iloc[1] == pytest.approx(values.std(ddof=0), rel=1e-4)


def test_further_networks_have_the_measures_of_the_others():
    rows = [("a", 3, 0, "base", 9e9, 1e-9, 9.0), ("a", 3, 0, "best", 200.0, 0.1, 2.0)]
    rows += [("a", 3, 1, "best", 50.0, 0.5, 3.0)]
    columns = ["run", "seed", "layer", "state", "max_abs", "row_median_q50", "spread"]
    network = pd.DataFrame({"run": ["a"], "seed": [3], "row": [70.0], "isolation": [1.2]})
    (found,) = study.of_further(pd.DataFrame(rows, columns=columns), network).to_dict("records")
    expected = {"row": 70, "layer": 2000, "sun": 2, "spread": 3, "isolation": 1.2, "largest": 200}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_places_count_untrained_networks_of_the_same_run():
    trained = pd.DataFrame({"run": ["a"], "seed": [0], "row": [2000.0], "sun": [0.5]})
    null = pd.DataFrame({"run": [*"aaab"], "row": [1.0, 2000.0, 3000.0, 9e9], "sun": [0.1] * 4})
    places = study.among(trained, null)
    assert places["above"].tolist() == [pytest.approx(0.5), 1.0]
    assert places["p"].tolist() == [3 / 4, 1 / 4]
    table = study.areas(places, trained, null[:3])
    assert table.loc["row ratio", ["area", "trained", "untrained"]].tolist() == [0.5, 1, 2 / 3]
    assert table.loc["Sun's rule", ["beyond", "trained"]].tolist() == [1, 0]
    without = trained.assign(row=np.nan)  # a measure that a run has not
    (row,) = study.area_table({"x": study.among(without, null)}).to_dict("records")
    assert row["networks"] == row["Sun's rule"] == 1 and np.isnan(row["row ratio"])


def test_tails_of_a_pareto_law_and_of_one_with_a_bump():
    low, high, bins = NEG_LOG_RATIO_BINS
    ratios = np.random.default_rng(0).pareto(4, 400_000) + 1  # ln r is exponential, mean 1 / 4
    more = np.concatenate([ratios, np.full(4000, 1e3)])
    for values, rises in ((ratios, False), (more, True)):
        counts = np.histogram(-np.log10(values), bins, (low, high))[0]
        filled = counts.nonzero()[0]
        edges = low + filled * (high - low) / bins
        table = pd.DataFrame({"bin": filled, "low": edges, "count": counts[filled]})
        (row,) = tails(table.assign(seed=0, run="a", layer=0, state="best")).to_dict("records")
        assert (row["rise"] > 2) == rises
        if not rises:
            assert row["tail"] == pytest.approx(1 / 4, rel=0.05)
            assert row["spread"] == pytest.approx(1 / 4, rel=0.02)
