"""What the pages on depth say, against the tracked tables."""

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY

RESULTS = REPOSITORY / "data" / "results"
LIPSCHITZ = [
    *("LipschitzNorm, f = 1", "LipschitzNorm, f = 4"),
    *("LipschitzNorm, published", "published, per head"),
]


@pytest.fixture(scope="module")
def largest():
    tables = [pd.read_csv(RESULTS / f"gradients_cora_{heads}_largest.csv.gz") for heads in (1, 4)]
    return pd.concat(tables).query("kind == 'weights'")


@pytest.fixture(scope="module")
def peaks(largest):
    """The largest norm of a whole training, by heads, variant and seed."""
    return largest.groupby(["heads", "variant", "seed"])["norm"].max()


def test_rows_say_where_they_come_from(largest):
    assert set(largest["num_layers"]) == {25} and set(largest["dataset"]) == {"Cora"}
    assert largest["commit"].str.fullmatch("[0-9a-f]{40}").all()
    assert largest["versions"].str.contains("torch-geometric").all()
    finite = largest[~((largest["variant"] == "LayerNorm") & (largest["heads"] == 1))]
    per_training = finite.groupby(["heads", "variant", "seed"])["epoch"].agg(["count", "max"])
    assert set(per_training["count"]) == set(per_training["max"]) == {60}
    assert len(per_training) == 17 * 5


def test_without_a_norm_gradients_of_four_heads_pass_1e10_with_every_seed(largest, peaks):
    assert (peaks[4, "no norm"] > 1e10).all() and len(peaks[4, "no norm"]) == 5
    last = largest.query("heads == 4 and variant == 'no norm' and epoch == 60")["train_loss"]
    assert (last > 1000).all()
    one = peaks[1, "no norm"]
    assert (one < 1e8).all() and one.max() / one.min() > 1e4
    assert (one > 1000).all()


def test_with_lipschitz_norm_none_passes_twenty_and_kinds_do_not_differ(peaks):
    for heads in (1, 4):
        of_kind = [peaks[heads, variant] for variant in LIPSCHITZ]
        assert all((norms < 20).all() for norms in of_kind)
        for one in of_kind:
            for other in of_kind:
                assert one.min() <= other.max()  # their ranges over seeds overlap


def test_without_dropout_they_stay_below_twenty_and_one_head_has_the_lowest_loss(largest, peaks):
    assert (peaks[1, "no norm, no dropout"] < 20).all()
    assert (peaks[4, "no norm, no dropout"] < 20).all()
    last = largest.query("heads == 1 and epoch == 60").groupby("variant")["train_loss"].median()
    assert last.idxmin() == "no norm, no dropout"


def test_other_norms(largest, peaks):
    assert (peaks[4, "PairNorm"] < 20).all() and (peaks[4, "PairNorm-SI"] < 20).all()
    assert (peaks[1, "PairNorm"] < 100).all()
    four = largest.query("heads == 4 and variant == 'LayerNorm'")
    first, last = (four.query(f"epoch == {epoch}")["norm"] for epoch in (1, 60))
    assert first.min() > 10 > 1 > last.max()
    one = largest.query("heads == 1 and variant == 'LayerNorm'")
    at_first = one.query("epoch == 1")["norm"]
    assert len(at_first) == 5 and not np.isfinite(at_first).any()
    assert 1 / np.sqrt(1e-5) == pytest.approx(316, abs=1)


def test_after_sixty_steps_normalised_losses_lie_between_1_1_and_2(largest):
    rows = largest[(largest["epoch"] == 60) & ~largest["variant"].str.startswith("no norm")]
    assert rows["train_loss"].between(1.1, 2.0).all()
    assert np.log(7) == pytest.approx(1.95, abs=0.005)
