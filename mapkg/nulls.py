"""What chance gives: a null model of the measures, p-values, thresholds.

The null is a product of independent normals, as the score would be if its three projections
were independent. It depends on the number of channels: models of different width are compared
with their own chance level, not all with 1000.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from scipy import interpolate, optimize, special, stats
from torch import Tensor

MAX_CHANNELS = 10_000
"""Beyond this the median of a row varies less than the grid of the integral resolves."""

Values = float | Sequence | np.ndarray
"""One number or several."""

# Logarithms of magnitudes: e^-40 is as good as zero, e^14 beyond anything. The trapezium rule
# converges exponentially for the smooth integrands here, which vanish at both ends.
_STEP, _ZERO = 0.005, 8000  # the step, and the index of the magnitude 1
_GRID = _STEP * np.arange(-_ZERO, 2801)


def product_of_normals(
    rows: int, channels: int, *, factors: int = 3, seed: int = 0
) -> Float[Tensor, "rows channels"]:
    """Draw the null model of the score, products of so many independent standard normals.

    ValueError if there is no factor.
    """
    if factors < 1:
        raise ValueError(f"factors: expected 1 or more, got {factors}")
    generator = torch.Generator().manual_seed(seed)
    shape = (factors, rows, channels)
    return torch.randn(shape, generator=generator, dtype=torch.double).prod(dim=0)


@dataclass(frozen=True)
class ProductNull:
    """What chance gives if activations are products of independent normals.

    The largest ratio of a row, by one integral over the median: given the median m of D channels
    (the lower middle magnitude), the D // 2 greater magnitudes are independent and each exceeds
    t m with probability S(t m) / S(m), where S is the probability that a single magnitude exceeds
    its argument. Good to 1e-4 of the probability itself, down to 1e-100, at ratios up to 1e10.

    Rows are taken as independent. Edges that share a node are not: large ratios come in
    clusters then, and over many rows their probability is rather below what is given here.
    """

    channels: int
    factors: int = 3

    def __post_init__(self) -> None:
        if not (2 <= self.channels <= MAX_CHANNELS and self.factors >= 1):
            raise ValueError(
                f"expected 2 to {MAX_CHANNELS} channels and at least 1 factor, got "
                f"{self.channels} and {self.factors}; for wider rows compare with simulated ones"
            )

    def exceedance(self, ratio: Values, rows: int = 1) -> Float[np.ndarray, "..."]:
        """The probability that the largest ratio of independent rows is above each value."""
        if rows < 1:
            raise ValueError(f"rows: expected 1 or more, got {rows}")
        ratio = np.asarray(ratio, dtype=float)
        one_row = np.array([self._one_row(value) for value in ratio.flat]).reshape(ratio.shape)
        return np.asarray(-np.expm1(special.xlog1py(rows, -one_row)))

    @property
    def spread(self) -> float:
        """Root of the expected variance of ``ln |x|`` in a row, sqrt(k) pi / sqrt(8).

        Exact for k factors: ``ln |z|`` of a normal z has the variance pi^2 / 8.
        """
        return math.pi * math.sqrt(self.factors / 8)

    def _variance(self, rows: int) -> stats.distributions.rv_frozen:
        """The law of V / E(V), V the mean over rows of the variance of ``ln |x|`` (divisor D - 1).

        Pearson's type III with the exact variance and skewness, those of the k-statistic
        :math:`k_2`; the cumulants of ln |z| are polygamma functions at 1/2.
        """
        n, k = self.channels, self.factors
        second, third, fourth, sixth = (
            k * special.polygamma(order - 1, 0.5) / 2**order for order in (2, 3, 4, 6)
        )
        variance = fourth / n + 2 * second**2 / (n - 1)
        moment = sixth / n**2 + 12 * fourth * second / (n * (n - 1)) + 8 * second**3 / (n - 1) ** 2
        moment += 4 * (n - 2) * third**2 / (n * (n - 1) ** 2)
        skewness = moment / variance**1.5 / math.sqrt(rows)
        return stats.pearson3(skewness, loc=1, scale=math.sqrt(variance / rows) / second)

    @property
    def mean_spread(self) -> float:
        """The expected standard deviation of ``ln |x|`` in a row of D channels.

        E sqrt(V) = sqrt(E V) (1 - v / 8) to first order in v = Var(V) / E(V)^2: good to 1 % from 20
        channels on, to 0.3 % from 32.
        """
        return self.spread * (1 - float(self._variance(1).var()) / 8)

    def chance(
        self, measure: str, value: float, rows: int, rate: float = 0.05
    ) -> tuple[float, float]:
        """What chance exceeds at a rate, and the probability that it exceeds a value.

        Of independent rows: ``"row"``, the largest row ratio; ``"layer"``, the largest ratio to the
        median of all entries, which is taken as known beyond ``MAX_CHANNELS`` of them;
        ``"spread"``, the root of the mean variance of ``ln |x|`` in rows, by a law with its
        variance and skewness (good to a factor of two at 0.001, of very few rows); ``"isolation"``,
        the median over rows of largest over second largest. Sun's rule depends on the scale.
        """
        if rows < 1:
            raise ValueError(f"rows: expected 1 or more, got {rows}")
        _check_rate(rate)
        if measure == "row":
            return self.threshold(rate, rows), float(self.exceedance(value, rows))
        if measure == "spread":
            law = self._variance(rows)
            level = self.spread * math.sqrt(law.isf(rate))
            return level, float(law.sf((value / self.spread) ** 2))
        if measure == "layer" and (entries := rows * self.channels) <= MAX_CHANNELS:
            return ProductNull(entries, self.factors).chance("row", value, 1, rate)
        if measure == "layer":
            one = self._beyond_median
            of_one = -math.expm1(math.log1p(-rate) / entries)
            return _root(one, of_one), float(-np.expm1(special.xlog1py(entries, -one(value))))
        if measure == "isolation":
            # The lower median exceeds a value if more than half of the rows do.
            order = stats.beta(rows // 2 + 1, rows - rows // 2)
            return _root(self._isolation, order.ppf(rate)), float(order.cdf(self._isolation(value)))
        raise ValueError(
            f"measure: expected row, layer, spread or isolation, got {measure!r}, of which "
            "products of normals say nothing; compare with untrained models"
        )

    def _beyond_median(self, ratio: float) -> float:
        """The probability that a magnitude is above a multiple of its median."""
        grid, _, log_survival = _log_magnitude(self.factors)
        median = np.interp(math.log(2), -log_survival(grid), grid)
        return float(np.exp(log_survival(np.array(median + math.log(max(ratio, 1e-300))))))

    def _isolation(self, ratio: float) -> float:
        """The probability that the largest of a row is above a multiple of the second largest."""
        grid, density, log_survival = _log_magnitude(self.factors)
        beyond = np.exp(log_survival(grid - math.log(max(ratio, 1e-300))))
        others = special.xlog1py(self.channels - 1, -beyond)
        return float(min(self.channels * _STEP * density @ np.exp(others), 1.0))

    def threshold(self, rate: float, rows: int = 1) -> float:
        """The ratio that the largest of ``rows`` rows exceeds at a rate in (0, 1)."""
        _check_rate(rate)
        return _root(lambda ratio: self.exceedance(ratio, rows), rate)

    def _one_row(self, ratio: float) -> float:
        if not ratio >= 1:
            return 1.0 if ratio < 1 else math.nan
        grid, _, log_survival = _log_magnitude(self.factors)
        above = np.exp(log_survival(grid + math.log(ratio)) - log_survival(grid))
        any_above = -np.expm1(special.xlog1py(self.channels // 2, -above))
        return min(float(_median_weight(self.channels, self.factors) @ any_above), 1.0)


def _check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise ValueError(f"rate: expected one in (0, 1), got {rate}")


def _root(exceedance: Callable[[float], float], rate: float) -> float:
    """The value, at least 1, that is exceeded at a rate."""

    def excess(log_value: float) -> float:
        return math.log(max(exceedance(math.exp(log_value)), 1e-300) / rate)

    return math.exp(optimize.brentq(excess, 0.0, -_GRID[0], xtol=1e-12))


def p_value(observed: Values, null: Values) -> Float[np.ndarray, "..."]:
    """How unlikely values are, among values drawn from a null: one-sided, by rank.

    (1 + number of null values that are at least the observed one) / (1 + number of null
    values). The observed value counts among the draws, so that under the null the p-value is
    valid for any number of them. ``null`` has one more dimension in front; NaN is no draw, and an
    observed NaN stays NaN.
    """
    observed, null = np.asarray(observed, dtype=float), np.asarray(null, dtype=float)
    if null.shape[1:] != observed.shape or null.ndim == 0:
        shapes = f"[n, *{list(observed.shape)}], got {list(null.shape)}"
        raise ValueError(f"expected null values of shape {shapes}")
    drawn = (~np.isnan(null)).sum(axis=0)
    p = (1 + (null >= observed).sum(axis=0)) / (1 + drawn)
    return np.asarray(np.where(np.isnan(observed), np.nan, p))


@cache
def _log_magnitude(
    factors: int,
) -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """The logarithm of a product's magnitude: a grid, its density there, its log survival."""
    normal = math.sqrt(2 / math.pi) * np.exp(_GRID - np.exp(2 * _GRID) / 2)
    density, survival = normal, special.erfc(np.exp(_GRID) / math.sqrt(2))
    # The logarithm of a product is a sum: its law is a convolution. All terms are positive, so
    # even the far tail keeps its relative accuracy, which a fast Fourier transform would lose.
    factor = _STEP * normal[_GRID < 4.5]
    sides = (len(factor) - 1 - _ZERO, _ZERO)
    for _ in range(factors - 1):
        density = np.convolve(np.pad(density, sides), factor, "valid")
        survival = np.convolve(np.pad(survival, sides, constant_values=(1, 0)), factor, "valid")
    known = survival > 1e-290
    grid, density = _GRID[known], density[known]
    spline = interpolate.CubicSpline(grid, np.log(survival[known]))

    def log_survival(log_magnitude: np.ndarray) -> np.ndarray:
        inside = spline(log_magnitude.clip(grid[0], grid[-1])).clip(max=0)  # but for rounding
        return np.where(log_magnitude > grid[-1], -np.inf, inside)

    return grid, density, log_survival


@cache
def _median_weight(channels: int, factors: int) -> np.ndarray:
    """The probability of each step of the grid to hold the lower median of a row."""
    grid, density, log_survival = _log_magnitude(factors)
    place = (channels + 1) // 2  # among the magnitudes, from the least
    order = stats.beta(place, channels - place + 1)
    return _STEP * order.pdf(-np.expm1(log_survival(grid))) * density
