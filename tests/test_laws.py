"""Fits from binned counts against scipy's fits of the values themselves."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY
from scipy import stats

from mapkg.measures import LOG_EPS, ActivationSummary, StreamingHistogram, activation_ratio
from mapkg.nulls import product_of_normals
from studies.laws import (
    LAWS,
    compare_laws,
    fit_law,
    histogram_from_table,
    ks_to_law,
    ks_two_sample,
)

SCIPY = {
    "gamma": stats.gamma,
    "lognormal": stats.lognorm,
    "weibull": stats.weibull_min,
    "gev": stats.genextreme,
    "normal": stats.norm,
}

# A law with shape, location and scale each, near what layers show, and a start for scipy.
TRUE = {
    "gamma": ((6.0, -1.7, 0.25), (6.0,)),
    "lognormal": ((0.25, -3.0, 2.6), (0.25,)),
    "weibull": ((2.2, -1.5, 1.6), (2.2,)),
    "gev": ((0.08, -0.3, 0.6), (0.08,)),
    "normal": ((-0.1, 0.8), ()),
}


def histogram_of(values, low=-8.0, high=17.0, bins=1000):
    histogram = StreamingHistogram(low, high, bins)
    histogram.update(torch.from_numpy(np.asarray(values, dtype=float)))
    return histogram


def drawn(law, size, seed=0):
    params, _ = TRUE[law]
    return SCIPY[law].rvs(*params, size=size, random_state=np.random.default_rng(seed))


def neg_log_ratios(x):
    """As published, but for the lower median: every value, flattened."""
    return -(activation_ratio(x) + LOG_EPS).log10().flatten().numpy()


def table_of(histograms):
    """A results table of (state, histogram) pairs."""
    parts = []
    for state, histogram in histograms:
        filled = histogram.counts.nonzero().flatten()
        parts.append(
            pd.DataFrame(
                {
                    "state": state,
                    "layer": 0,
                    "changes": None,
                    "bin": filled.numpy(),
                    "low": histogram.edges[filled].numpy(),
                    "count": histogram.counts[filled].numpy(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


# One fit.


@pytest.mark.parametrize("law", LAWS)
def test_a_binned_fit_is_scipys_fit_of_the_values(law):
    values = drawn(law, 40_000)
    fit = fit_law(histogram_of(values), law)
    with np.errstate(invalid="ignore"):  # scipy's lognormal fit tries locations above values
        params = SCIPY[law].fit(values, *TRUE[law][1])
    grid = np.linspace(values.min(), values.max(), 2001)
    # Shape and scale of nearly symmetric laws are hardly identified: functions are compared.
    np.testing.assert_allclose(fit.cdf(grid), SCIPY[law].cdf(grid, *params), atol=1e-3)
    assert fit.log_likelihood == pytest.approx(SCIPY[law].logpdf(values, *params).mean(), abs=1e-3)
    assert fit.aic == pytest.approx(
        2 * len(params) - 2 * len(values) * fit.log_likelihood, rel=1e-12
    )
    # No worse in density at the values than scipy's optimum, but for the width of the bins.
    own = SCIPY[law].logpdf(values, *fit.params).mean()
    assert own > SCIPY[law].logpdf(values, *params).mean() - 1e-4
    distance = stats.kstest(values, SCIPY[law](*params).cdf).statistic
    assert fit.ks.statistic - 1e-3 <= distance <= fit.ks.statistic + fit.ks.resolution + 1e-3
    assert fit.num_values == len(values)
    assert not fit.is_limit


@pytest.mark.parametrize("law", LAWS)
def test_the_law_that_made_the_values_is_found_again(law):
    fit = fit_law(histogram_of(drawn(law, 400_000)), law)
    grid = np.linspace(-4, 8, 2001)
    # 400,000 values: their own distribution function is known to 0.001 or so.
    np.testing.assert_allclose(fit.cdf(grid), SCIPY[law].cdf(grid, *TRUE[law][0]), atol=3e-3)
    step = grid[1] - grid[0]
    np.testing.assert_allclose(np.cumsum(fit.pdf(grid)) * step, fit.cdf(grid), atol=0.01)


@pytest.mark.parametrize("law", LAWS)
def test_the_law_that_made_the_values_has_the_least_aic(law):
    histogram = histogram_of(drawn(law, 400_000))
    aic = {name: fit_law(histogram, name).aic for name in LAWS}
    # A law that contains this one as its limit may tie, up to its further parameter.
    assert aic[law] <= min(aic.values()) + 2.1


@pytest.mark.parametrize("law", LAWS)
def test_a_fit_moves_and_stretches_with_the_values(law):
    values = drawn(law, 20_000)
    fit = fit_law(histogram_of(values, -8.0, 17.0, 1000), law)
    moved = fit_law(histogram_of(5 + 2 * values, -11.0, 39.0, 1000), law)
    grid = np.linspace(-4, 8, 101)
    np.testing.assert_allclose(moved.cdf(5 + 2 * grid), fit.cdf(grid), atol=1e-4)
    assert moved.log_likelihood == pytest.approx(fit.log_likelihood - np.log(2), abs=1e-5)
    assert moved.ks.statistic == pytest.approx(fit.ks.statistic, abs=1e-4)


def test_without_skewness_the_gamma_and_lognormal_fits_end_at_the_normal_law_and_say_so():
    values = drawn("normal", 50_000)
    left = histogram_of(-(drawn("gamma", 50_000)))
    normal = fit_law(histogram_of(values), "normal")
    assert not normal.is_limit
    for law in ("gamma", "lognormal"):
        fit = fit_law(left, law)
        assert fit.is_limit
        grid = np.linspace(-6, 6, 1001)
        np.testing.assert_allclose(fit.cdf(grid), fit_law(left, "normal").cdf(grid), atol=0.005)
    assert not fit_law(left, "weibull").is_limit  # its limit is skewed to the left
    gumbel = stats.gumbel_l.rvs(-1, 0.5, size=50_000, random_state=np.random.default_rng(0))
    fit = fit_law(histogram_of(gumbel), "weibull")
    np.testing.assert_allclose(
        fit.cdf(np.linspace(-6, 3, 101)),
        stats.gumbel_l.cdf(np.linspace(-6, 3, 101), -1, 0.5),
        atol=0.01,
    )


def test_a_fit_is_as_accurate_far_out_to_the_right_as_to_the_left():
    values = np.append(np.random.default_rng(0).normal(size=5000), 7.52)  # of probability 1e-14
    right, left = (fit_law(histogram_of(v, -10.0, 10.0, 400), "normal") for v in (values, -values))
    assert left.log_likelihood == pytest.approx(right.log_likelihood, abs=1e-9)
    (centre, spread), (mirrored, same) = right.params, left.params
    assert (mirrored, same) == pytest.approx((-centre, spread), abs=1e-5)


@pytest.mark.parametrize("law", ["gamma", "weibull"])
@pytest.mark.parametrize(("form", "is_limit"), [(0.0012, True), (0.008, True), (0.015, False)])
def test_a_law_is_its_limit_below_a_skewness_or_inverse_shape_of_a_hundredth(law, form, is_limit):
    # A gamma law of skewness g has the shape 4 / g^2, a Weibull law that of its inverse.
    shape = {"gamma": 4 / form**2, "weibull": 1 / form}[law]
    loc = {"gamma": -(shape**0.5), "weibull": -shape}[law] / 4  # well within the range
    scale = {"gamma": shape**-0.5, "weibull": shape}[law] / 4
    edges = np.linspace(-8, 17, 1001)
    counts = torch.from_numpy(1e12 * np.diff(SCIPY[law].cdf(edges, shape, loc, scale))).long()
    fit = fit_law(StreamingHistogram.from_counts(-8.0, 17.0, counts), law)
    assert fit.params[0] == pytest.approx(shape, rel=1e-3)
    assert fit.is_limit == is_limit


def test_values_far_out_in_both_tails_leave_a_finite_fit_that_allows_them():
    values = np.concatenate([drawn("gamma", 50_000), [-6.0, -5.5, 15.65, 15.65]])
    histogram = histogram_of(values)
    for law in LAWS:
        fit = fit_law(histogram, law)
        assert np.isfinite(fit.log_likelihood)
        # The bins of the outermost values are possible.
        assert np.isfinite(SCIPY[law].logpdf([-5.976, 15.65], *fit.params)).all(), law


def test_a_density_without_bound_has_a_fit_all_the_same():
    values = stats.gamma.rvs(0.4, -1.0, 1.5, size=50_000, random_state=np.random.default_rng(0))
    fit = fit_law(histogram_of(values))
    grid = np.linspace(-0.95, 8, 1001)
    np.testing.assert_allclose(fit.cdf(grid), stats.gamma.cdf(grid, 0.4, -1.0, 1.5), atol=0.01)


def test_values_outside_the_range_count_as_probability_beyond_it():
    values = drawn("gamma", 100_000)
    narrow = histogram_of(values, -0.8, 1.2, 80)
    assert narrow.num_below > 10_000 and narrow.num_above > 2000
    fit = fit_law(narrow)
    grid = np.linspace(-2, 4, 1001)
    np.testing.assert_allclose(fit.cdf(grid), stats.gamma.cdf(grid, *TRUE["gamma"][0]), atol=0.01)
    counts = np.array([narrow.num_below, *narrow.counts.tolist(), narrow.num_above])
    mass = np.diff(fit.cdf(np.array([-np.inf, *narrow.edges.tolist(), np.inf])))
    width = np.array([1.0, *[2.0 / 80] * 80, 1.0])
    expected = counts @ np.log(mass / width) / counts.sum()
    assert fit.log_likelihood == pytest.approx(expected, rel=1e-9)


def test_products_of_normals_are_nearly_gamma_distributed():
    summary = ActivationSummary()
    x = product_of_normals(20_000, 64)
    summary.update(x)
    fit = fit_law(summary.neg_log_ratio)
    assert fit.num_values == x.numel()
    assert summary.statistics()["rows_with_massive"] == 0
    assert 0.01 < fit.ks.statistic < 0.02
    assert fit.ks.statistic + fit.ks.resolution < 0.035
    values = neg_log_ratios(x[:2000])
    few = histogram_of(values)
    params = stats.gamma.fit(values)
    exact = stats.kstest(values, stats.gamma(*params).cdf).statistic
    assert exact < 0.03
    found = fit_law(few).ks
    assert found.statistic - 1e-3 <= exact <= found.statistic + found.resolution + 1e-3


def test_a_fit_that_cannot_be_is_an_error():
    with pytest.raises(ValueError, match="unknown law 'cauchy'; known: gamma, lognormal"):
        fit_law(histogram_of([0.0]), "cauchy")
    with pytest.raises(ValueError, match="the histogram is empty"):
        fit_law(StreamingHistogram(-1.0, 1.0, 10))
    with pytest.raises(ValueError, match=r"at least 4 filled bins, got 3 \(4 values\)"):
        fit_law(histogram_of([0.0, 0.1, 0.1, 0.2]))


# Distances.


def test_a_distance_to_a_law_by_hand():
    # Normal(0, 1) against a quarter of the values in each of four bins of width 1.
    histogram = histogram_of([-1.5, -0.5, 0.5, 1.5], -2.0, 2.0, 4)
    fit = fit_law(histogram, "normal")
    edges = np.arange(-2.0, 3.0)
    expected = np.abs(stats.norm.cdf(edges, *fit.params) - np.arange(5) / 4).max()
    assert fit.ks.statistic == pytest.approx(expected, abs=1e-12)
    assert ks_to_law(histogram, fit) == fit.ks


@pytest.mark.parametrize("bins", [1000, 100, 25])
def test_distances_of_binned_values_bracket_those_of_the_values(bins):
    base, trained = drawn("gamma", 20_000), drawn("lognormal", 10_000, seed=1)
    first, second = (histogram_of(values, bins=bins) for values in (base, trained))
    fit = fit_law(histogram_of(base))
    cases = {
        ks_to_law(second, fit): stats.kstest(trained, stats.gamma(*fit.params).cdf).statistic,
        ks_to_law(first, fit): stats.kstest(base, stats.gamma(*fit.params).cdf).statistic,
        ks_two_sample(first, second): stats.ks_2samp(base, trained).statistic,
    }
    for found, exact in cases.items():
        assert found.statistic <= exact + 1e-12
        assert exact <= found.statistic + found.resolution + 1e-12
        largest_bin = max(float(h.counts.max()) / int(h.counts.sum()) for h in (first, second))
        assert found.resolution <= largest_bin + 1e-12


def test_the_two_sample_distance_by_hand():
    first = histogram_of([0.5, 0.5, 1.5, 9.0], 0.0, 3.0, 3)  # shares 2/4, 1/4, 0, above 1/4
    second = histogram_of([2.5, 2.5, -1.0, 0.5], 0.0, 3.0, 3)  # below 1/4, 1/4, 0, 2/4
    found = ks_two_sample(first, second)
    # Below 0, 1, 2, 3: 0, 1/2, 3/4, 3/4 and 1/4, 1/2, 1/2, 1.
    assert found.statistic == 0.25
    assert found == ks_two_sample(second, first)
    assert ks_two_sample(first, first).statistic == 0
    with pytest.raises(ValueError, match="expected equal bins"):
        ks_two_sample(first, histogram_of([1.0], 0.0, 3.0, 4))
    with pytest.raises(ValueError, match="empty"):
        ks_two_sample(first, StreamingHistogram(0.0, 3.0, 3))


# Tables.


def test_a_histogram_comes_back_from_its_table():
    histogram = histogram_of(drawn("gamma", 1000))
    back = histogram_from_table(table_of([("base", histogram)]))
    assert torch.equal(back.counts, histogram.counts)
    assert (back.low, back.high, back.num_below, back.num_above) == (-8.0, 17.0, 0, 0)
    assert back.min <= histogram.min < back.min + 0.025
    assert back.max - 0.025 <= histogram.max <= back.max
    assert back.quantile(0.5) == histogram.quantile(0.5)


def test_rows_of_several_histograms_or_other_bins_are_an_error():
    table = table_of([("base", histogram_of([0.0, 1.0])), ("best", histogram_of([1.0]))])
    with pytest.raises(ValueError, match="bin 360 occurs again: select the rows of one layer"):
        histogram_from_table(table)
    table = table_of([("base", histogram_of([0.0, 1.0], 0.0, 17.0))])
    with pytest.raises(ValueError, match=r"expected 1000 bins over -8\.0 to 17\.0"):
        histogram_from_table(table)


def test_laws_are_compared_with_all_three_distances():
    base, trained = (histogram_of(drawn(law, 5000)) for law in ("gamma", "weibull"))
    alone = histogram_of(drawn("normal", 5000))
    table = table_of([("base", base), ("best", trained)])
    table = pd.concat([table, table_of([("best", alone)]).assign(layer=1)], ignore_index=True)
    found = compare_laws(table, ["gamma", "normal"])
    assert len(found) == 3 * 2
    found = found.set_index(["state", "layer", "law"])
    fits = {
        (name, law): fit_law(h, law)
        for name, h in (("base", base), ("best", trained))
        for law in ("gamma", "normal")
    }
    for (state, law), fit in fits.items():
        row = found.loc[state, 0, law]
        assert (row["log_likelihood"], row["aic"]) == (fit.log_likelihood, fit.aic)
        assert (row["loc"], row["scale"]) == fit.params[-2:]
        assert row["ks_own"] == fit.ks.statistic
        histogram = {"base": base, "best": trained}[state]
        against_base = ks_to_law(histogram, fits["base", law])
        assert (row["ks_base"], row["ks_base_resolution"]) == against_base
        assert row["ks_two_sample"] == ks_two_sample(histogram, base).statistic
        assert row["num_values"] == 5000
    assert found.loc["base", 0, "gamma"]["ks_own"] == found.loc["base", 0, "gamma"]["ks_base"]
    assert found.loc["best", 0, "gamma"]["ks_base"] > found.loc["best", 0, "gamma"]["ks_own"]
    assert np.isnan(found.loc["best", 0, "normal"]["shape"])
    assert found.loc["base", 0]["aic_rank"].to_dict() == {"gamma": 1, "normal": 2}
    # Layer 1 has no base.
    assert found.loc["best", 1][["ks_base", "ks_two_sample"]].isna().all(axis=None)
    assert found.loc["best", 1]["ks_own"].notna().all()


def test_a_table_without_states_is_an_error():
    table = table_of([("base", histogram_of([0.0]))]).drop(columns="state")
    with pytest.raises(ValueError, match="expected a column 'state', got layer, changes, bin"):
        compare_laws(table)


def test_the_tracked_histograms_of_a_trained_layer_are_farther_from_gamma_than_untrained_ones():
    table = pd.read_csv(REPOSITORY / "data/results/emergence_gt_zinc_histogram.csv.gz")
    table = table[(table["seed"] == 0) & (table["layer"] == 0)]
    found = compare_laws(table[table["state"].isin(["base", "best"])], ["gamma"])
    found = found.set_index("state")
    assert set(found["num_values"]) == {49_720 * 64}
    assert found.loc["best", "ks_own"] > 2 * found.loc["base", "ks_own"]
    assert found.loc["best", "ks_two_sample"] > 0.1


def test_the_fit_of_a_tracked_layer_is_no_worse_than_scipys_and_where_scipy_stays():
    table = pd.read_csv(REPOSITORY / "data/results/emergence_gt_zinc_histogram.csv.gz")
    table = table[(table["state"] == "best") & (table["seed"] == 0) & (table["layer"] == 0)]
    generator = np.random.default_rng(0)
    share = table["count"].to_numpy() / table["count"].sum()
    values = generator.choice(table["low"].to_numpy(), 20_000, p=share)
    values = values + 0.025 * generator.random(len(values))
    fit = fit_law(histogram_of(values))
    ours = stats.gamma.logpdf(values, *fit.params).mean()
    # Far from a gamma law, scipy's own start may end short of the maximum.
    assert ours > stats.gamma.logpdf(values, *stats.gamma.fit(values)).mean() - 1e-5
    shape, loc, scale = fit.params
    params = stats.gamma.fit(values, shape, loc=loc, scale=scale)
    assert ours == pytest.approx(stats.gamma.logpdf(values, *params).mean(), abs=1e-5)
    grid = np.linspace(values.min(), values.max(), 1001)
    np.testing.assert_allclose(fit.cdf(grid), stats.gamma.cdf(grid, *params), atol=1e-3)
