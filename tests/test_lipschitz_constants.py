"""Constants against the size of the input: raw ones grow, normalised ones are flat."""

import pytest

from studies.lipschitz_constants import constants_against_scale


@pytest.fixture(scope="module")
def table():
    return constants_against_scale((0.1, 1.0, 10.0, 100.0), points=12, progress=False)


def of(table, score, normalised):
    rows = table[(table["score"] == score) & (table["normalised"] == normalised)]
    return rows.set_index("scale")


def test_raw_constants_grow_and_normalised_ones_stay(table):
    raw, normalised = (of(table, "linear", n)["constant"] for n in (False, True))
    assert raw.is_monotonic_increasing
    assert raw[0.1] < 1.3
    assert raw[100.0] > 50
    assert normalised.max() < 1.1
    assert normalised.max() / normalised.min() < 1.01
    raw, normalised = (of(table, "quadratic", n)["constant"] for n in (False, True))
    assert raw[100.0] > 1000
    assert normalised.max() < 2


def test_no_constant_exceeds_its_bounds(table):
    for name in ("lemma", "lemma_tight"):
        assert (table["constant"] <= table[name] * (1 + 1e-9)).all()
    assert (table["lemma_tight"] <= table["lemma"]).all()
    normalised = table[table["normalised"]]
    for name in ("theorem", "theorem_tight"):
        assert (normalised["constant"] <= normalised[name]).all()
    assert table.loc[~table["normalised"], "theorem"].isna().all()


def test_a_normalised_score_does_not_see_the_size(table):
    lemma = of(table, "linear", True)["lemma"]
    assert lemma.max() / lemma.min() < 1.2


def test_the_seed_fixes_the_points():
    runs = [
        constants_against_scale((1.0,), points=2, seed=seed, progress=False)["constant"].tolist()
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    with pytest.raises(ValueError, match="points: expected 2 or more, got 1"):
        constants_against_scale(points=1)
