"""What the page on the Explicit Bias Term says, against the tracked tables."""

import pandas as pd
import pytest
from conftest import REPOSITORY

from mapkg.detection import MASSIVE_RATIO

RESULTS = REPOSITORY / "data" / "results"
NETWORKS = ("GT", "GraphiT", "SAN")


@pytest.fixture(scope="module")
def idle():
    tables = [
        pd.read_csv(RESULTS / f"idle_{name.lower()}_zinc.csv.gz").assign(label=name)
        for name in NETWORKS
    ]
    return pd.concat(tables, ignore_index=True)


def test_rows_say_where_they_come_from(idle):
    assert len(idle) == 3 * 3 * 10 * 2 and set(idle["seed"]) == {0, 1, 2}
    assert idle["commit"].str.fullmatch("[0-9a-f]{40}").all()
    assert idle["versions"].str.contains("torch-geometric").all()
    assert set(idle["explicit_bias"]) == {"none"}, "trained without a term"
    epochs = idle.groupby("label")["epochs"].unique()
    assert {label: list(values) for label, values in epochs.items()} == {
        "GT": [100],
        "GraphiT": [50],
        "SAN": [50],
    }


def test_a_term_that_does_nothing_removes_every_massive_activation(idle):
    largest = idle.groupby(["label", "seed", "term"])["max_ratio"].max().unstack("term")
    assert (largest[False] > MASSIVE_RATIO).sum() == 8 and len(largest) == 9
    assert (largest[True] < 500).all()
    change = idle.groupby("label")["largest_change"].max()
    assert change["GraphiT"] < 5e-6 and change["SAN"] < 5e-6
    assert (idle.query("label == 'GT'")["largest_change"] > 1).all()


def test_it_fills_the_median_and_leaves_the_largest_score(idle):
    parts = ["max_abs", "row_median_q50"]
    factors = idle[idle["term"]].set_index(["label", "seed", "layer"])[parts]
    factors /= idle[~idle["term"]].set_index(["label", "seed", "layer"])[parts]
    # in GT a layer that is not the first is given other edges
    undisturbed = factors.drop("GT", level="label")
    assert undisturbed["max_abs"].between(0.5, 1.5).all()
    assert (factors["row_median_q50"] > 2).all()
    first = factors["row_median_q50"].xs(0, level="layer")
    assert (first > 9).all()
    filled = idle[idle["term"]]["row_median_q50"]
    assert filled.between(0.1, 1).all()


def test_a_term_costs_a_tenth_of_the_time_or_less_and_the_published_one_saves_some():
    times = pd.read_csv(RESULTS / "remedy_times.csv.gz")
    median = times.groupby(["label", "arm"])["factor"].median()
    for label in NETWORKS:
        assert median[label, "none"] == 1
        for arm in ("bias", "intended", "sink"):
            assert 0.98 < median[label, arm] < 1.13
    assert median["GT", "intended"] < 1.06
    for label in ("GraphiT", "SAN"):
        assert median[label, "published"] < 0.9
