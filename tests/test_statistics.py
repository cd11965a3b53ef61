"""Tests and intervals against values by hand and scipy."""

import re

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY
from scipy import stats

from studies import published
from studies import statistics as study

CHANGE = pd.Series([0.3, 0.5, 0.1, 0.4, 0.2])  # mean 0.3, standard error 0.0707


def test_a_paired_change_has_students_interval_and_a_sign_test_without_ties():
    found = study.paired(CHANGE)
    expected = stats.ttest_1samp(CHANGE, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected))
    assert (found["change"], found["fewer"], found["more"], found["p"]) == (
        *(pytest.approx(0.3), 0, 5),
        2 / 32,
    )
    assert study.paired(pd.Series([1.0, 2.0, -1.0, 0.0]))["p"] == 1.0
    assert study.paired(pd.Series([0.0, 0.0]))["p"] == 1.0
    assert np.isnan(study.t_interval(CHANGE[:1])[1:]).all()


def test_all_flips_of_signs_give_the_exact_p_value_of_a_mean():
    assert study.sign_flips(CHANGE) == 2 / 32
    # |+-1 +-2 +-4|: 7, 5, 3, 1, each twice; of 1 - 2 + 4 = 3 six are as large.
    assert study.sign_flips(np.array([1.0, -2.0, 4.0])) == 6 / 8
    drawn = np.random.default_rng(0).normal(0.5, 1, 10)
    exact = dict(permutation_type="samples", n_resamples=np.inf, alternative="two-sided")
    expected = stats.permutation_test((drawn,), np.mean, **exact).pvalue
    assert study.sign_flips(drawn) == pytest.approx(expected)


def test_equivalence_is_two_one_sided_tests_and_an_interval_within_the_margin():
    found = study.equivalence(CHANGE, 0.5)
    error = CHANGE.sem()
    assert found["p"] == pytest.approx(stats.t.sf(0.2 / error, 4))
    assert study.equivalence(-CHANGE, 0.5)["p"] == pytest.approx(found["p"])
    assert found["high"] == pytest.approx(0.3 + stats.t.isf(0.05, 4) * error)
    for margin in (found["high"] + 1e-6, found["high"] - 1e-6):
        assert study.equivalence(CHANGE, margin)["equivalent"] == (margin > found["high"])
    # An interval that includes zero is no equivalence.
    wide = study.equivalence(np.array([-3.0, 3.0, 0.5]), 0.5)
    assert not wide["equivalent"] and wide["low"] < 0 < wide["high"]


def test_holm_multiplies_by_what_is_left():
    tests = pd.DataFrame({"p": [0.04, 0.01, 0.5, 0.03]}, index=list("abcd"))
    np.testing.assert_allclose(study.with_holm(tests)["holm"], [0.09, 0.04, 0.5, 0.09])


def test_contrasts_are_of_the_same_seed_and_say_what_they_show():
    logs = {"a": [0, 1, 2, 3, 4], "alike": [0.01, 1, 2, 2.99, 4], "more": [2.1, 3, 4, 5, 5.9]}
    logs["wide"] = [1, 0, 4, 3, 3]
    rows = [("x", run, i, np.exp(v)) for run, each in logs.items() for i, v in enumerate(each)]
    table = pd.DataFrame(rows, columns=["label", "run", "seed", "value"])
    pairs = {run: (("x", "a"), ("x", run)) for run in list(logs)[1:]}
    found = study.contrasts(table.sample(frac=1, random_state=0), pairs, "value", 1.25)
    assert found["verdict"].tolist() == ["within the margin", "differs", "open"]
    change = np.array([2.1, 2, 2, 2, 1.9])
    low, high = np.exp(stats.ttest_1samp(change, 0).confidence_interval(0.95))
    row = found.loc["more"]
    assert row[["factor", "low", "high"]].tolist() == pytest.approx([np.exp(2), low, high])
    assert (row["seeds"], row["flips"]) == (5, 2 / 32)
    assert row["holm"] == pytest.approx(3 * stats.ttest_1samp(change, 0).pvalue)
    assert published.margin("error") == 1.1 and published.margin("ratio") == 1.25


def test_a_mean_is_written_with_its_interval_and_a_single_value_without():
    low, high = stats.ttest_1samp(CHANGE, 0).confidence_interval(0.95)
    assert study.with_interval(CHANGE, "{:.3f}") == f"0.300 [{low:.3f}, {high:.3f}]"
    text = study.with_interval(np.exp(CHANGE), "{:.2f}", logarithmic=True)
    assert text == f"{np.exp(0.3):.2f} [{np.exp(low):.2f}, {np.exp(high):.2f}]"
    assert study.with_interval(CHANGE[:1], "{:g}") == "0.3"


def test_a_bootstrap_by_levels_weighs_units_alike_and_is_scipys_where_there_is_one_level():
    table = pd.DataFrame({"network": [0, 0, 0, 1], "value": [1.0, 1.0, 4.0, 10.0]})
    assert study.hierarchical_bootstrap(table, "value", ["network"])[0] == (2 + 10) / 2
    drawn = np.random.default_rng(1).exponential(size=40)
    table = pd.DataFrame({"seed": range(40), "value": drawn})
    found = study.hierarchical_bootstrap(table, "value", ["seed"], resamples=4000)
    look = dict(method="percentile", n_resamples=4000, rng=np.random.default_rng(0))
    expected = stats.bootstrap((drawn,), np.mean, **look).confidence_interval
    np.testing.assert_allclose(found, [drawn.mean(), *expected], rtol=0.05)


def test_what_differs_between_networks_is_not_made_sure_by_more_molecules():
    rng = np.random.default_rng(0)
    network, kind, molecule = np.indices((6, 5, 20)).reshape(3, -1)
    value = rng.normal(size=6)[network] + 0.1 * rng.normal(size=(6, 5))[network, kind]
    table = pd.DataFrame({"network": network, "kind": kind, "molecule": molecule, "value": value})
    mean, low, high = study.hierarchical_bootstrap(
        table, "value", ["network", "kind", "molecule"], resamples=400
    )
    of_networks = table.groupby("network")["value"].mean()
    assert mean == pytest.approx(of_networks.mean())
    # The standard error of a bootstrap over six networks has the divisor 6.
    expected = 2 * 1.96 * of_networks.std(ddof=0) / np.sqrt(6)
    assert high - low == pytest.approx(expected, rel=0.2)


UNKNOWN = pd.DataFrame({"v": [1.0, 2.0], "k": [0.5, np.nan]})
ODD = pd.DataFrame(
    {"label": "a", "run": ["b", "b", "c", "c"], "seed": [0, 1, 0, 1], "v": [1, 2, 3, np.nan]}
)
TWICE = pd.DataFrame({"label": "a", "run": "b", "seed": [0, 0], "v": 1.0})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: study.equivalence(CHANGE[:1], 0.1), "two changes or more and a margin above 0"),
        (lambda: study.equivalence(CHANGE, 0.0), "got 5 and 0.0"),
        (lambda: study.sign_flips(np.array([])), "expected 1 to 20 paired changes, got 0"),
        (lambda: study.hierarchical_bootstrap(pd.DataFrame({"v": []}), "v", []), "got 0 rows"),
        (lambda: study.hierarchical_bootstrap(UNKNOWN, "v", ["k"]), "a v and a k each, got 2 rows"),
        (lambda: study.sign_flips(UNKNOWN["k"]), "expected numbers, got 1 of 2 that are NaN"),
        (lambda: study.paired(UNKNOWN["k"]), "expected numbers, got 1 of 2 that are NaN"),
        (lambda: study.equivalence(UNKNOWN["k"], 0.1), "expected numbers, got 1 of 2 that are NaN"),
        (
            lambda: study.contrasts(ODD, {"t": (("a", "b"), ("a", "c"))}, "v", 1.25),
            "expected numbers, got 1 of 2 that are NaN",
        ),
        (lambda: study.t_interval(np.array([1, np.inf])), "got 1 of 2 that are NaN or inf"),
        (
            lambda: study.contrasts(TWICE, {}, "v", 1.25),
            "one row for each label, run, seed, got sev",
        ),
    ],
)
def test_what_cannot_be_tested_is_an_error(call, words):
    with pytest.raises(ValueError, match=words):
        call()


NO_EFFECT = r"no difference|(do|does|did) not differ|no effect|(changes?|costs?|gains?) nothing"
NO_EFFECT += r"|(see|adds?|brings?) no (gain|harm)|no more (sensitive|fragile|robust)|stay where"
NO_EFFECT = rf"({NO_EFFECT}|as (large|small|good|low|high) as without|the same within)(?! but)"
"""Claims that two things are equal, which need a test of equivalence with a margin."""

PAGES = sorted(
    p for kind in ("notebooks/*.ipynb", "book/*.md", "book/*.yaml") for p in REPOSITORY.glob(kind)
)


@pytest.mark.parametrize("path", (REPOSITORY / "README.md", *PAGES), ids=lambda path: path.name)
def test_a_page_claims_no_equality_without_a_margin(path):
    texts = [path.read_text()]
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, 4).cells
        texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    for paragraph in "\n\n".join(texts).split("\n\n"):
        if "margin" not in paragraph:
            claim = re.search(NO_EFFECT, paragraph, re.IGNORECASE)
            assert not claim, f"{claim[0]!r}: test it by equivalence(), or say less"
