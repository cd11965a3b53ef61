"""What ratios chance gives: null models of the largest ratio, p-values, thresholds.

The null is a product of independent normals, as the score would be if its three projections
were independent. The largest ratio of a row then has an exact distribution, which depends on
the number of channels: models of different width are compared with their own chance level,
not all with 1000.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import interpolate, optimize, special, stats
from torch import Tensor

from mapkg.measures import MASSIVE_RATIO

MAX_CHANNELS = 10_000
"""Beyond this the median of a row varies less than the grid of the integral resolves."""

Values = float | int | Sequence | np.ndarray
"""One number or several, as nested sequences or an array."""

# Logarithms of magnitudes: e^-40 is as good as zero, e^14 beyond anything. The trapezium rule
# converges exponentially for the smooth integrands here, which vanish at both ends.
_STEP, _ZERO = 0.005, 8000  # the step, and the index of the magnitude 1
_GRID = _STEP * np.arange(-_ZERO, 2801)


def product_of_normals(
    rows: int, channels: int, *, factors: int = 3, seed: int = 0
) -> Float[Tensor, "rows channels"]:
    """Draw the null model of the score, products of so many independent standard normals.

    Returns:
        Activations, shape [rows, channels], double precision.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (factors, rows, channels)
    return torch.randn(shape, generator=generator, dtype=torch.double).prod(dim=0)


@dataclass(frozen=True)
class ProductNull:
    """The distribution of the largest ratio if activations are products of independent normals.

    Exact, by one integral over the median, and so not limited by a number of draws: given the
    median m of D channels (the lower middle magnitude), the D // 2 greater magnitudes are
    independent and each exceeds t * m with probability S(t m) / S(m), where S is the
    probability that a single magnitude exceeds its argument. Good to 1e-4 of the probability
    itself, however small, down to 1e-100.

    Rows are taken as independent. Edges that share a node are not: large ratios come in
    clusters then, and over many rows their probability is rather below what is given here.

    Args:
        channels: D, from 2 to ``MAX_CHANNELS``.
        factors: how many normals are multiplied.
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
        """The probability that the largest ratio of independent rows is above a value.

        Args:
            ratio: one or several, any shape, which is that of the result; NaN stays NaN.
            rows: number of rows.
        """
        ratio = np.asarray(ratio, dtype=float)
        one_row = np.array([self._one_row(value) for value in ratio.flat]).reshape(ratio.shape)
        return np.asarray(-np.expm1(special.xlog1py(rows, -one_row)))

    def threshold(self, rate: float, rows: int = 1) -> float:
        """The ratio that chance exceeds at a given rate, to compare with ``MASSIVE_RATIO``.

        Args:
            rate: the probability that the largest ratio of ``rows`` rows is above the
                threshold, in (0, 1): a false positive rate per row with one row, family-wise
                with several.
            rows: number of rows.
        """
        if not 0 < rate < 1:
            raise ValueError(f"expected a rate in (0, 1), got {rate}")

        def excess(log_ratio: float) -> float:
            return math.log(max(self.exceedance(math.exp(log_ratio), rows), 1e-300) / rate)

        return math.exp(optimize.brentq(excess, 0.0, -_GRID[0], xtol=1e-12))

    def _one_row(self, ratio: float) -> float:
        if not ratio >= 1:
            return 1.0 if ratio < 1 else math.nan
        grid, _, log_survival = _log_magnitude(self.factors)
        above = np.exp(log_survival(grid + math.log(ratio)) - log_survival(grid))
        any_above = -np.expm1(special.xlog1py(self.channels // 2, -above))
        return min(float(_median_weight(self.channels, self.factors) @ any_above), 1.0)


def chance_level(channels: Sequence[int], *, rows: int, rate: float = 0.05) -> pd.DataFrame:
    """How large ratios of products of three normals are, by the width of the model.

    Args:
        channels: widths to compare.
        rows: rows (edges) over which a largest ratio is taken.
        rate: false positive rate of the thresholds.

    Returns:
        A row per width. ``channels``; ``median`` and ``q99``, quantiles of the largest ratio
        of a row; ``row_threshold``, exceeded by the share ``rate`` of rows;
        ``family_threshold``, exceeded anywhere in ``rows`` rows with probability ``rate``;
        ``p_massive_row`` and ``p_massive``, the probabilities that one of the activations of a
        row, or of ``rows`` rows, is massive.
    """
    nulls = [ProductNull(width) for width in channels]
    return pd.DataFrame(
        {
            "channels": null.channels,
            "median": null.threshold(0.5),
            "q99": null.threshold(0.01),
            "row_threshold": null.threshold(rate),
            "family_threshold": null.threshold(rate, rows),
            "p_massive_row": float(null.exceedance(MASSIVE_RATIO)),
            "p_massive": float(null.exceedance(MASSIVE_RATIO, rows)),
        }
        for null in nulls
    )


def p_value(observed: Values, null: Values) -> Float[np.ndarray, "..."]:
    """How unlikely values are, among values drawn from a null: one-sided, by rank.

    (1 + number of null values that are at least the observed one) / (1 + number of null
    values). The observed value counts among the draws, so that under the null the p-value is
    valid for any number of them; it is never below 1 / (1 + n), and ties count against it.

    Args:
        observed: for example the largest ratio of each layer; any shape.
        null: the same of n draws, for example untrained networks, with one more
            dimension in front. NaN is no draw, and leaves fewer of them.

    Returns:
        P-values, of the shape of ``observed``; NaN where that is NaN.
    """
    observed, null = np.asarray(observed, dtype=float), np.asarray(null, dtype=float)
    if null.shape[1:] != observed.shape or null.ndim == 0:
        raise ValueError(
            f"expected null values of shape [n, *{list(observed.shape)}], got {list(null.shape)}"
        )
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
