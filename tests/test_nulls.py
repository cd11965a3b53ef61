"""The null against integrals by quadrature and simulated rows; p-values by hand."""

import math

import numpy as np
import pytest
from scipy import integrate, special

from mapkg.all_measures import row_measures
from mapkg.measures import activation_ratio
from mapkg.nulls import ProductNull, p_value, product_of_normals


def row_maxima(rows, channels, factors=3, seed=0):
    x = product_of_normals(rows, channels, factors=factors, seed=seed)
    return activation_ratio(x).amax(dim=1).numpy()


def assert_exceeds(exceedance, maxima):
    """Shares of the maxima above 30 of their quantiles are the probabilities, to 4.5 sigma."""
    ratios = np.quantile(maxima, np.linspace(0.005, 0.9995, 30))
    expected = exceedance(ratios)
    found = (maxima > ratios[:, None]).mean(axis=1)
    sigma = np.sqrt(expected * (1 - expected) / len(maxima))
    np.testing.assert_array_less(np.abs(found - expected), 4.5 * sigma + 1 / len(maxima))


@pytest.mark.parametrize(
    ("channels", "factors"), [(2, 3), (3, 3), (8, 1), (8, 3), (56, 3), (64, 2), (444, 3), (64, 4)]
)
def test_the_exact_null_is_what_simulated_rows_show(channels, factors):
    maxima = row_maxima(50_000 if channels < 400 else 20_000, channels, factors)
    assert_exceeds(ProductNull(channels, factors).exceedance, maxima)


@pytest.mark.parametrize(("channels", "ratio"), [(4, 1000.0), (64, 30.0)])
def test_the_null_of_two_factors_is_an_integral_over_their_density(channels, ratio):
    # The density of a product of two normals is 2 K_0(x) / pi: no convolution is needed.
    step = math.log(ratio) / 2000
    v = np.arange(-30, 6.5, step)
    density = 2 / np.pi * special.k0(np.exp(v)) * np.exp(v)
    survival = integrate.cumulative_trapezoid(density[::-1], dx=step, initial=0)[::-1]
    beyond = np.append(survival[2000:], np.zeros(2000))
    median, above = (channels + 1) // 2, channels // 2
    known = survival > 0
    weight = (density * (1 - survival) ** (median - 1) * survival**above)[known]
    any_above = -np.expm1(above * np.log1p(-beyond[known] / survival[known]))
    expected = weight @ any_above * step / special.beta(median, above + 1)
    found = ProductNull(channels, factors=2).exceedance(ratio)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_several_rows_exceed_when_any_of_them_does():
    null = ProductNull(8)
    ratio = np.array([[5.0, 50.0, 500.0], [5e3, 5e4, np.nan]])
    one = null.exceedance(ratio)
    assert one.shape == ratio.shape
    assert np.isnan(one[1, 2]) and np.isfinite(one).sum() == 5
    np.testing.assert_allclose(null.exceedance(ratio, 7), 1 - (1 - one) ** 7, rtol=1e-9, atol=1e-14)
    np.testing.assert_array_equal(null.exceedance([0.0, 0.5, 1.0, np.inf]), [1, 1, 1, 0])
    # Far out, where 1 - (1 - p)^n would round to zero.
    tiny = float(ProductNull(64).exceedance(1e4))
    assert 0 < tiny < 1e-20
    assert float(ProductNull(64).exceedance(1e4, 1000)) == pytest.approx(1000 * tiny, rel=1e-9)
    # The maxima of 100 rows at a time.
    maxima = row_maxima(100_000, 8).reshape(1000, 100).max(axis=1)
    assert_exceeds(lambda ratios: null.exceedance(ratios, 100), maxima)


@pytest.mark.parametrize("channels", [2, 444])
@pytest.mark.parametrize("rate", [0.5, 1e-6])
@pytest.mark.parametrize("rows", [1, 49_720])
def test_a_threshold_is_exceeded_at_its_rate(channels, rate, rows):
    null = ProductNull(channels)
    assert null.exceedance(null.threshold(rate, rows), rows) == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize(("factors", "value"), [(1, 1.1107), (2, 1.5708), (3, 1.9238)])
@pytest.mark.parametrize("channels", [16, 64])
def test_the_spread_of_a_product_its_bias_in_rows_and_the_law_of_its_mean(channels, factors, value):
    null = ProductNull(channels, factors)
    assert null.spread == pytest.approx(value, abs=1e-4)
    x = product_of_normals(50_000, channels, factors=factors)
    spread = row_measures(x)["spread"].numpy()
    bias, variance = null.spread - null.mean_spread, spread**2
    assert null.spread - spread.mean() == pytest.approx(bias, rel=0.25)
    assert abs(variance.mean() - null.spread**2) < 4 * variance.std() / math.sqrt(50_000)
    of_many = np.sqrt(variance.reshape(500, 100).mean(axis=1))
    for rate in (0.5, 0.1):
        level, p = null.chance("spread", of_many[0], 100, rate)
        assert (of_many > level).mean() == pytest.approx(rate, abs=0.08)
        assert p == pytest.approx((of_many > of_many[0]).mean(), abs=0.08)


def test_the_largest_over_the_second_largest_and_its_median_over_rows_are_exact():
    null = ProductNull(16)
    drawn = row_measures(product_of_normals(50_000, 16))
    drawn = drawn["max_over_second"].numpy()
    assert_exceeds(np.vectorize(null._isolation), drawn)
    medians = np.sort(drawn.reshape(1000, 50))[:, 24]
    for rate in (0.5, 0.05):
        level, p = null.chance("isolation", medians[0], 50, rate)
        assert (medians > level).mean() == pytest.approx(rate, abs=0.06)
        assert p == pytest.approx((medians > medians[0]).mean(), abs=0.06)
    for rows in (1, 2):  # the lower median of two is the smaller one
        p = null.chance("isolation", 3.0, rows)[1]
        assert p == pytest.approx(null._isolation(3.0) ** rows, rel=1e-9)
    # Of two magnitudes it is the ratio of all that there is, as for the row ratio.
    assert ProductNull(2, 1)._isolation(10.0) == pytest.approx(
        float(ProductNull(2, 1).exceedance(10.0)), rel=1e-5
    )


def test_the_layer_ratio_of_entries_whose_median_is_known():
    # One factor: the median of |z| is 0.6745, and |z| > 4.4172 in one case of 100,000.
    null, ratio, expected = ProductNull(10, 1), 4.4171734 / 0.6744898, 1 - 0.99999**11_000
    level, p = null.chance("layer", ratio, 1100, rate=expected)
    assert p == pytest.approx(expected, rel=1e-4)
    assert level == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize("rows", [1, 5])
def test_small_layers_are_large_and_wide_as_often_as_it_is_said(rows):
    drawn = product_of_normals(100_000 * rows, 8, seed=1).abs().view(100_000, -1)
    spread = drawn.log().view(100_000, rows, 8).var(dim=-1).mean(dim=1).sqrt()
    largest = drawn.amax(dim=1) / drawn.median(dim=1).values
    for measure, values, within in (("spread", spread, 0.15), ("layer", largest, 0.1)):
        for rate in (0.05, 0.01):
            value = values.quantile(1 - rate).item()
            level, p = ProductNull(8).chance(measure, value, rows, rate)
            assert p == pytest.approx(rate, rel=within)
            assert ProductNull(8).chance(measure, level, rows)[1] == pytest.approx(rate, rel=1e-6)
    far = spread.quantile(0.999).item()
    assert 5e-4 < ProductNull(8).chance("spread", far, rows)[1] < 2e-3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ProductNull(1), "expected 2 to 10000 channels.*got 1 and 3"),
        (lambda: ProductNull(10_001), "got 10001 and 3; for wider rows compare"),
        (lambda: ProductNull(64, 0), "at least 1 factor, got 64 and 0"),
        (lambda: product_of_normals(3, 64, factors=0), "factors: expected 1 or more, got 0"),
        (lambda: ProductNull(8).threshold(1.0), r"rate: expected one in \(0, 1\)"),
        (lambda: ProductNull(8).exceedance(3.0, 0), "rows: expected 1 or more, got 0"),
        (lambda: ProductNull(8).chance("layer", 3.0, 0), "rows: expected 1 or more, got 0"),
        (lambda: ProductNull(8).threshold(math.nan), r"rate: expected one in \(0, 1\)"),
        (lambda: ProductNull(8).chance("spread", 3.0, 9, 2.0), r"rate: expected one in \(0, 1\)"),
        (lambda: ProductNull(8).chance("sun", 0.1, 9), "isolation, got 'sun', of which products"),
        (lambda: p_value(np.ones(3), np.ones((3, 2))), r"expected null values of shape \[n"),
    ],
)
def test_what_the_null_does_not_know_is_an_error(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_widest_rows_are_still_resolved():
    assert_exceeds(ProductNull(10_000).exceedance, row_maxima(300, 10_000))
    # Where nearly all rows have the largest ratio above 5, the probability is 1 to rounding.
    assert ProductNull(10_000).exceedance(5.0) == pytest.approx(1, abs=1e-9)


def test_p_values_by_hand():
    null = [1.0, 2.0, 2.0, 5.0]
    assert p_value(6.0, null) == 1 / 5
    assert p_value(5.0, null) == 2 / 5  # a tie counts against
    assert p_value(2.0, null) == 4 / 5
    assert p_value(0.0, null) == p_value(9.0, []) == 1
    observed = np.array([3.0, np.nan, 10.0])
    several = np.array([[1.0, 1.0, 20.0], [4.0, 2.0, np.nan], [2.0, 3.0, 1.0]])
    np.testing.assert_allclose(p_value(observed, several), [2 / 4, np.nan, 2 / 3])
