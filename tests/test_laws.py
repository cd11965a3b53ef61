"""Fits from binned counts against the laws that made the counts, scipy's fits and hand values."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY
from scipy import stats

from mapkg.measures import StreamingHistogram
from studies.laws import (
    LAWS,
    compare_laws,
    distribution_grid,
    fit_law,
    histogram_from_table,
    ks_to_law,
    ks_two_sample,
)

EDGES = np.linspace(-8, 17, 1001)
WIDTH = 0.025
TRUE = {  # shape, location and scale, near what layers show
    "gamma": (6.0, -1.7, 0.25),
    "lognormal": (0.25, -3.0, 2.6),
    "weibull": (2.2, -1.5, 1.6),
    "gev": (0.08, -0.3, 0.6),
    "normal": (-0.1, 0.8),
}


def expected_of(law, *params, size=1e12):
    """The histogram of so many values that are exactly distributed as a law."""
    counts = torch.from_numpy(size * np.diff(LAWS[law][0].cdf(EDGES, *params))).long()
    return StreamingHistogram.from_counts(-8.0, 17.0, counts)


def histogram_of(values, low=-8.0, high=17.0, bins=1000):
    histogram = StreamingHistogram(low, high, bins)
    histogram.update(torch.from_numpy(np.asarray(values, dtype=float)))
    return histogram


def drawn(law, size, seed=0):
    return LAWS[law][0].rvs(*TRUE[law], size=size, random_state=np.random.default_rng(seed))


def table_of(**histograms):
    """A results table, with a row for each filled bin of each state."""
    parts = []
    for state, h in histograms.items():
        index = h.counts.nonzero().flatten()
        bins = {"bin": index.numpy(), "low": h.edges[index].numpy(), "count": h.counts[index]}
        parts.append(pd.DataFrame({"state": state, "layer": 0, "changes": None, **bins}))
    return pd.concat(parts, ignore_index=True)


# The last has a density without bound.
@pytest.mark.parametrize(("law", "true"), [*TRUE.items(), ("gamma", (0.4, -1.0, 1.5))])
def test_the_law_that_made_the_counts_is_found_again(law, true):
    histogram = expected_of(law, *true)
    fit = fit_law(histogram, law)
    assert fit.params == pytest.approx(true, rel=1e-3)
    counts = histogram.counts.numpy()
    mass = np.diff(LAWS[law][0].cdf(EDGES, *true))[counts > 0]
    likelihood = counts[counts > 0] @ np.log(mass / WIDTH) / counts.sum()
    assert fit.log_likelihood == pytest.approx(likelihood, abs=1e-7)
    assert fit.aic == pytest.approx(2 * len(true) - 2 * counts.sum() * fit.log_likelihood)
    assert fit.num_values == counts.sum()
    assert fit.ks.statistic < 1e-5 and not fit.is_limit


@pytest.mark.parametrize("law", LAWS)
def test_a_binned_fit_is_scipys_fit_of_the_values(law):
    values = drawn(law, 3000)
    fit = fit_law(histogram_of(values), law)
    with np.errstate(invalid="ignore"):  # scipy's lognormal fit tries locations above values
        exact = LAWS[law][0](*LAWS[law][0].fit(values, *TRUE[law][:-2]))
    np.testing.assert_allclose(fit.distribution.cdf(EDGES), exact.cdf(EDGES), atol=1e-3)
    assert fit.log_likelihood == pytest.approx(exact.logpdf(values).mean(), abs=1e-3)


@pytest.mark.parametrize("law", ["gamma", "lognormal", "weibull"])
@pytest.mark.parametrize(("form", "is_limit"), [(0.0012, True), (0.008, True), (0.015, False)])
def test_a_law_is_its_limit_below_a_skewness_or_inverse_shape_of_a_hundredth(law, form, is_limit):
    shape = {"gamma": 4 / form**2, "weibull": 1 / form, "lognormal": form}[law]
    scale = {"gamma": form / 2, "weibull": 1 / form, "lognormal": 1 / form}[law] / 4
    loc = {"gamma": -2 / form, "weibull": -1 / form, "lognormal": -1 / form}[law] / 4
    fit = fit_law(expected_of(law, shape, loc, scale), law)
    assert fit.params[0] == pytest.approx(shape, rel=1e-3)
    assert fit.is_limit == is_limit


def test_without_skewness_gamma_and_lognormal_fits_end_at_the_normal_law_and_say_so():
    left = histogram_of(-drawn("gamma", 20_000))
    normal = fit_law(left, "normal").distribution
    for law in ("gamma", "lognormal"):
        fit = fit_law(left, law)
        assert fit.is_limit
        np.testing.assert_allclose(fit.distribution.cdf(EDGES), normal.cdf(EDGES), atol=0.005)
    assert not fit_law(left, "weibull").is_limit  # its limit is skewed to the left


def test_both_tails_are_accurate_where_probabilities_are_tiny_or_underflow():
    values = np.append(np.random.default_rng(0).normal(size=2000), 7.52)  # of probability 1e-14
    right, left = (fit_law(histogram_of(v, -10.0, 10.0, 400), "normal") for v in (values, -values))
    assert left.log_likelihood == pytest.approx(right.log_likelihood, abs=1e-9)
    counts = expected_of("normal", 0.0125, 0.1, size=1e5).counts.clone()
    near = counts.numpy().copy()
    counts[925] = 1  # at 15.1375, more than a hundred standard deviations away
    fit = fit_law(StreamingHistogram.from_counts(-8.0, 17.0, counts), "normal")
    mass = np.diff(fit.distribution.cdf(EDGES))[near > 0]
    likelihood = near[near > 0] @ np.log(mass / WIDTH) + fit.distribution.logpdf(15.1375)
    assert fit.log_likelihood == pytest.approx(likelihood / counts.sum().item(), rel=1e-7)
    values = np.concatenate([drawn("gamma", 5000), [-6.0, -5.5, 15.65, 15.65]])
    for law in LAWS:
        fit = fit_law(histogram_of(values), law)
        assert np.isfinite(fit.distribution.logpdf([-5.976, 15.65])).all(), law


def test_what_cannot_be_fitted_or_compared_is_refused():
    two, wide = histogram_of([0.0, 1.0]), histogram_of([0.0, 1.0], 0.0)
    for words, function, *given in (
        ("unknown law 'cauchy'; known: gamma, lognormal", fit_law, two, "cauchy"),
        ("the histogram is empty", fit_law, histogram_of([])),
        ("at least 4 filled bins, got 3", fit_law, histogram_of([0.0, 0.1, 0.1, 0.2])),
        ("1 values lie outside the bins", fit_law, histogram_of([0, 0.1, 0.2, 0.3, 99])),
        ("expected equal bins", ks_two_sample, two, wide),
        ("each bin once: select the rows", histogram_from_table, table_of(base=two, best=two)),
        (r"expected 1000 bins over -8\.0 to 17\.0", histogram_from_table, table_of(base=wide)),
    ):
        with pytest.raises(ValueError, match=words):
            function(*given)


def test_the_two_sample_distance_by_hand():
    first = histogram_of([0.5, 0.5, 1.5, 2.5], 0.0, 3.0, 3)  # below 1, 2, 3: 1/2, 3/4, 1
    second = histogram_of([2.5, 2.5, 1.5, 0.5], 0.0, 3.0, 3)  # 1/4, 1/2, 1
    # Opposite ends of a bin differ most in the first and in the last: 1/2.
    assert ks_two_sample(first, second) == ks_two_sample(second, first) == (0.25, 0.25)
    assert ks_two_sample(first, first).statistic == 0


@pytest.mark.parametrize("bins", [1000, 25])
def test_distances_of_binned_values_bracket_those_of_the_values(bins):
    base, trained = drawn("gamma", 5000), drawn("lognormal", 2500, seed=1)
    first, second = (histogram_of(values, bins=bins) for values in (base, trained))
    fit, own = fit_law(histogram_of(base)), fit_law(first)
    cases = {
        own.ks: stats.kstest(base, own.distribution.cdf).statistic,
        ks_to_law(second, fit): stats.kstest(trained, fit.distribution.cdf).statistic,
        ks_two_sample(first, second): stats.ks_2samp(base, trained).statistic,
    }
    for found, exact in cases.items():
        assert found.statistic - 1e-12 <= exact <= found.statistic + found.resolution + 1e-12


def test_laws_are_compared_with_all_three_distances():
    states = {"base": histogram_of(drawn("gamma", 3000)), "best": histogram_of(drawn("gev", 3000))}
    alone = table_of(best=histogram_of(drawn("normal", 3000))).assign(layer=1)
    table = pd.concat([table_of(**states), alone], ignore_index=True)
    found = compare_laws(table, ["gamma", "normal"]).set_index(["layer", "state", "law"])
    assert len(found) == 3 * 2
    for (_, state, law), row in found.loc[[0]].iterrows():
        fit, of_base = fit_law(states[state], law), fit_law(states["base"], law)
        assert (row["log_likelihood"], row["aic"]) == (fit.log_likelihood, fit.aic)
        assert (row["loc"], row["scale"]) == fit.params[-2:]
        assert (row["ks_own"], row["ks_own_resolution"]) == fit.ks
        against = (row["ks_base"], row["ks_base_resolution"])
        assert against == ks_to_law(states[state], of_base)
        assert row["ks_two_sample"] == ks_two_sample(states[state], states["base"]).statistic
        assert np.isnan(row["shape"]) == (law == "normal")
    assert found.loc[0, "base"]["aic_rank"].to_dict() == {"gamma": 1, "normal": 2}
    # Layer 1 has no base.
    assert found.loc[1][["ks_base", "ks_two_sample"]].isna().all(axis=None)
    assert found.loc[1]["ks_own"].notna().all()


def test_tracked_laws_and_their_figure_are_those_of_tracked_histograms():
    table = pd.read_csv(REPOSITORY / "data/results/emergence_gt_proteins_histogram.csv.gz")
    table = table.query("seed == 1 and layer == 0 and state in ['base', 'best']")
    found = compare_laws(table[["state", "bin", "low", "count"]]).set_index(["state", "law"])
    tracked = pd.read_csv(REPOSITORY / "data/results/laws.csv.gz")
    tracked = tracked.query("run == 'gt_proteins' and seed == 1 and layer == 0")
    tracked = tracked.set_index(["state", "law"]).loc[found.index]
    for column in ("ks_own", "ks_base", "ks_two_sample", "log_likelihood", "aic_rank"):
        np.testing.assert_allclose(found[column], tracked[column], rtol=1e-4, atol=1e-6)
    figure = distribution_grid(table, found.reset_index().assign(layer=0))
    assert [ax.get_title() for ax in figure.axes] == ["layer 0, base", "layer 0, best"]
    for ax, (state, rows) in zip(figure.axes, table.groupby("state"), strict=True):
        values, edges, _ = ax.patches[0].get_data()
        assert values.sum() == rows["count"].sum()
        assert edges[0] == pytest.approx(rows["low"].min())
        assert ax.texts[0].get_text().startswith(f"KS {found.loc[(state, 'gamma'), 'ks_own']:.3f}")
        y, density = ax.lines[0].get_data()
        expected = fit_law(histogram_from_table(rows)).distribution.pdf(y)
        np.testing.assert_allclose(density, expected * rows["count"].sum() * WIDTH)
    plt.close(figure)
