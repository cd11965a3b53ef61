"""Which probability law the ratios follow: fits and distances from binned counts.

The quantity is y = -log10(r + 2.2e-16) of all activation ratios r of a layer. Ratios of
millions of activations are not kept but counted in bins, and each law is fitted to the counts:
the log-likelihood of a bin is the logarithm of the probability that the law gives it. With
bins far narrower than the law this is the fit of the values themselves.

Source: massive-activations paper, its figure of distributions. differs: it fits the values
themselves (at most 50,000 rows), a gamma law only, and divides by the mean of the two middle
magnitudes of an even row; with the lower one, as here, one value in D is exactly 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import optimize, stats

from mapkg.measures import NEG_LOG_RATIO_BINS, StreamingHistogram

_LEAST = 1e-3  # of the skewness or inverse shape: there a law is its limit
_BAD = 1e300  # of a law that excludes values; finite, because the optimiser subtracts
_HISTOGRAM_COLUMNS = ["bin", "low", "count"]


class _Law(NamedTuple):
    distribution: stats.rv_continuous
    params: Callable[..., tuple[float, ...]]  # centre, spread, form -> scipy's parameters
    form: tuple[float, float] | None  # range of the third quantity
    has_limit: bool  # whether another law stands at the lower end of that range


# Shape, location and scale are hardly identified where a law is near its limit: shape and scale
# can run to infinity together while the law stays the same. Centre, spread and the logarithm of
# a skewness do not move then, so the optimiser sees these.
_LAWS = {
    "gamma": _Law(
        stats.gamma,
        lambda m, s, t: (4 * np.exp(-2 * t), m - 2 * s * np.exp(-t), s * np.exp(t) / 2),
        (np.log(_LEAST), np.log(20)),
        True,
    ),
    "lognormal": _Law(
        stats.lognorm,
        lambda m, s, t: (np.exp(t), m - s * np.exp(-t), s * np.exp(-t)),
        (np.log(_LEAST), np.log(5)),
        True,
    ),
    "weibull": _Law(
        stats.weibull_min,
        lambda m, s, t: (np.exp(-t), m - s * np.exp(-t), s * np.exp(-t)),
        (np.log(_LEAST), np.log(10)),
        True,
    ),
    "gev": _Law(stats.genextreme, lambda m, s, t: (t, m, s), (-2.0, 2.0), False),
    "normal": _Law(stats.norm, lambda m, s: (m, s), None, False),
}

LAWS = tuple(_LAWS)
"""The laws by name, gamma, lognormal, Weibull and generalised extreme value, all with shape,
location and scale, and normal.

The Weibull law is scipy's ``weibull_min``, bounded below; the one bounded above,
``weibull_max``, is a generalised extreme value law with a positive shape.
"""


class Distance(NamedTuple):
    """A Kolmogorov-Smirnov distance between distribution functions known at edges of bins.

    Attributes:
        statistic: the greatest difference at the edges.
        resolution: the distance over all values lies in [statistic, statistic + resolution].
    """

    statistic: float
    resolution: float


@dataclass(frozen=True)
class Fit:
    """A law fitted to a histogram.

    Attributes:
        law: one of ``LAWS``.
        params: scipy's, shape (none for the normal law), location and scale. They are nearly
            unidentified when the law is close to its limit: compare ``cdf``, not these.
        log_likelihood: mean per value of the logarithm of the density, averaged within bins.
            Values outside the range enter with the logarithm of their probability.
        aic: Akaike's criterion, 2 * parameters - 2 * log-likelihood of all values. The values
            of one row share a median, and rows share nodes, so they are far from independent:
            neither differences of this nor p-values of ``ks`` have a meaning, only their order
            and size.
        ks: the distance between the values and this law.
        num_values: how many values were counted.
        is_limit: whether the best law is the limit of its family, to within 0.005 of the
            distribution function: the normal law as the shape of a gamma law grows (of a
            lognormal law: vanishes), a Gumbel law of minima as that of a Weibull law grows.
            Gamma and lognormal laws of values that are not skewed to the right end there.
    """

    law: str
    params: tuple[float, ...]
    log_likelihood: float
    aic: float
    ks: Distance
    num_values: int
    is_limit: bool

    def cdf(self, y: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """The fitted distribution function."""
        return _LAWS[self.law].distribution.cdf(y, *self.params)

    def pdf(self, y: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """The fitted density."""
        return _LAWS[self.law].distribution.pdf(y, *self.params)


def histogram_from_table(rows: pd.DataFrame) -> StreamingHistogram:
    """The histogram of -log10 ratio that rows of a results table hold.

    Args:
        rows: the columns ``bin``, ``low`` (lower edge) and ``count`` of one layer of one
            network, with a row per bin that is not empty. Counts outside the range of the bins
            are not in the tables.

    Raises:
        ValueError: if a bin occurs twice, or bins are not those of ``ActivationSummary``.
    """
    low, high, bins = NEG_LOG_RATIO_BINS
    index = rows["bin"].to_numpy()
    twice = rows["bin"].duplicated()
    if twice.any():
        raise ValueError(
            f"expected each bin once, but bin {rows.loc[twice, 'bin'].iloc[0]} occurs again: "
            "select the rows of one layer of one network, as table.groupby(...) does"
        )
    if not np.allclose(rows["low"], low + index * (high - low) / bins, atol=1e-9):
        raise ValueError(f"expected {bins} bins over {low} to {high}; 'low' holds other edges")
    counts = torch.zeros(bins, dtype=torch.long)
    counts[torch.tensor(index)] = torch.tensor(rows["count"].to_numpy())
    return StreamingHistogram.from_counts(low, high, counts)


def fit_law(histogram: StreamingHistogram, law: str = "gamma") -> Fit:
    """The law of greatest likelihood for binned counts.

    The density of a gamma or Weibull law with a shape below 1 is infinite at its location, so
    the likelihood of single values has no maximum: it grows without bound as the location
    nears the least value (with a lognormal law, too), and ``scipy.stats.gamma.fit`` returns
    the local maximum it started near. The probability of a bin is at most 1, so here the
    likelihood is bounded.

    Distribution functions agree to 1e-3 with scipy's fit of the values, to 5e-5 on the tracked
    layers, if scipy starts near. From its own start it may end short of the maximum where no
    gamma law is near the values: in layer 0 of the tracked trained network it does.

    Args:
        histogram: of the values.
        law: one of ``LAWS``.

    Raises:
        ValueError: if the law is unknown, or fewer than four bins are filled: a law of three
            parameters fits three bins whatever they hold.
    """
    if law not in _LAWS:
        raise ValueError(f"unknown law {law!r}; known: {', '.join(LAWS)}")
    edges, counts = _filled(histogram)
    total = counts.sum()
    if (counts > 0).sum() < 4:
        raise ValueError(
            f"expected at least 4 filled bins, got {(counts > 0).sum()} ({total} values): "
            "there is no law to fit"
        )
    finite = edges.clip(histogram.low, histogram.high)
    centres = (finite[:-1] + finite[1:]) / 2
    mean = counts @ centres / total
    deviation = np.sqrt(counts @ (centres - mean) ** 2 / total)
    standard = (edges - mean) / deviation
    filled = counts > 0

    def loss(theta: np.ndarray) -> float:
        log_mass = _log_mass(law, _params(law, theta), standard)[filled]
        value = -(counts[filled] @ log_mass) / total
        return value if np.isfinite(value) else _BAD

    theta = _minimum(loss, _LAWS[law].form)
    if loss(theta) == _BAD:
        raise ValueError(f"no {law} law was found that allows all values: fit another law")
    *shape, place, scale = _params(law, theta)
    params = (*map(float, shape), float(mean + deviation * place), float(deviation * scale))
    width = (histogram.high - histogram.low) / histogram.bins
    inside = int(histogram.counts.sum()) / total
    log_likelihood = -loss(theta) - inside * np.log(width)
    return Fit(
        law=law,
        params=params,
        log_likelihood=float(log_likelihood),
        aic=float(2 * len(theta) - 2 * total * log_likelihood),
        ks=_ks(edges, counts, law, params),
        num_values=int(total),
        is_limit=_LAWS[law].has_limit and bool(theta[-1] < np.log(10 * _LEAST)),
    )


def ks_to_law(histogram: StreamingHistogram, fit: Fit) -> Distance:
    """Distance between values and a law, which may have been fitted to other values.

    With a law fitted to the same values this is the published statistic, ``fit.ks``; with one
    fitted to the untrained model it says how far training has moved the ratios.
    """
    return _ks(*_filled(histogram), fit.law, fit.params)


def ks_two_sample(first: StreamingHistogram, second: StreamingHistogram) -> Distance:
    """Distance between two sets of values, with no law between them.

    Raises:
        ValueError: if the histograms do not have the same bins, or one is empty.
    """
    bins = [(h.low, h.high, h.bins) for h in (first, second)]
    if bins[0] != bins[1]:
        raise ValueError(f"expected equal bins (low, high, number), got {bins[0]} and {bins[1]}")
    return _distance(_empirical(_all_counts(first)), _empirical(_all_counts(second)))


def compare_laws(
    table: pd.DataFrame, laws: Sequence[str] = LAWS, *, base: str = "base"
) -> pd.DataFrame:
    """Fits of several laws to each histogram of a table, with the three distances.

    Args:
        table: the columns of ``histogram_from_table`` and any others, whose values say which
            histogram a row belongs to, as in the tracked results; ``state`` is one of them.
        laws: which to fit.
        base: the state with which the others are compared; the untrained network.

    Returns:
        A row per histogram and law. The other columns; ``law``, ``shape``, ``loc``, ``scale``,
        ``is_limit``, ``num_values``, ``log_likelihood``, ``aic``, and ``aic_rank``, 1 for the
        least; ``ks_own``, the distance to the fit of the same values (as published);
        ``ks_base``, to the fit of the base state with the other columns equal;
        ``ks_two_sample``, from the values of that base state. The latter two are NaN without
        such a base. ``ks_own_resolution`` and so on say how exact these are.
    """
    keys = [column for column in table.columns if column not in _HISTOGRAM_COLUMNS]
    if "state" not in keys:
        raise ValueError(f"expected a column 'state', got {', '.join(map(str, table.columns))}")
    histograms = {
        # NaN, as an empty cell is read, is not equal to itself and finds no base.
        tuple(None if pd.isna(value) else value for value in group): histogram_from_table(rows)
        for group, rows in table.groupby(keys, dropna=False)
    }
    fits = {group: {law: fit_law(h, law) for law in laws} for group, h in histograms.items()}
    place = keys.index("state")
    rows = []
    for group, histogram in histograms.items():
        of_base = (*group[:place], base, *group[place + 1 :])
        ranked = sorted(laws, key=lambda law: fits[group][law].aic)
        for law in laws:
            fit = fits[group][law]
            distances = {"ks_own": fit.ks}
            if of_base in histograms:
                distances["ks_base"] = ks_to_law(histogram, fits[of_base][law])
                distances["ks_two_sample"] = ks_two_sample(histogram, histograms[of_base])
            rows.append(
                dict(zip(keys, group, strict=True))
                | _row(fit)
                | {"aic_rank": ranked.index(law) + 1}
                | _columns(distances)
            )
    return pd.DataFrame(rows)


def _row(fit: Fit) -> dict[str, Any]:
    *shape, loc, scale = fit.params
    return {
        "law": fit.law,
        "shape": shape[0] if shape else np.nan,
        "loc": loc,
        "scale": scale,
        "is_limit": fit.is_limit,
        "num_values": fit.num_values,
        "log_likelihood": fit.log_likelihood,
        "aic": fit.aic,
    }


def _columns(distances: dict[str, Distance]) -> dict[str, float]:
    unknown = Distance(np.nan, np.nan)
    found = {}
    for name in ("ks_own", "ks_base", "ks_two_sample"):
        found[name], found[f"{name}_resolution"] = distances.get(name, unknown)
    return found


def _all_counts(histogram: StreamingHistogram) -> np.ndarray:
    counts = np.array([histogram.num_below, *histogram.counts.tolist(), histogram.num_above])
    if not counts.any():
        raise ValueError("the histogram is empty: no row had a median to divide by")
    return counts


def _filled(histogram: StreamingHistogram) -> tuple[np.ndarray, np.ndarray]:
    """Edges and counts from the first filled bin to the last; outer edges may be infinite."""
    counts = _all_counts(histogram)
    edges = np.array([-np.inf, *histogram.edges.tolist(), np.inf])
    filled = np.flatnonzero(counts)
    return edges[filled[0] : filled[-1] + 2], counts[filled[0] : filled[-1] + 1]


def _empirical(counts: np.ndarray) -> np.ndarray:
    """The share of values below each edge."""
    return np.concatenate([[0], counts.cumsum()]) / counts.sum()


def _distance(first: np.ndarray, second: np.ndarray) -> Distance:
    at_edges = np.abs(first - second).max()
    # Both functions increase within a bin, so no difference exceeds that of opposite ends.
    at_most = max((first[1:] - second[:-1]).max(), (second[1:] - first[:-1]).max(), at_edges)
    return Distance(float(at_edges), float(at_most - at_edges))


def _ks(edges: np.ndarray, counts: np.ndarray, law: str, params: tuple[float, ...]) -> Distance:
    return _distance(_empirical(counts), _LAWS[law].distribution.cdf(edges, *params))


def _params(law: str, theta: np.ndarray) -> tuple[float, ...]:
    centre, log_spread, *form = theta
    return _LAWS[law].params(centre, np.exp(log_spread), *form)


def _log_mass(law: str, params: tuple[float, ...], edges: np.ndarray) -> np.ndarray:
    """Logarithm of the probability between neighbouring edges, accurate in both tails."""
    distribution = _LAWS[law].distribution
    with np.errstate(all="ignore"):
        below = distribution.cdf(edges, *params)
        mass = np.diff(below)
        upper = np.flatnonzero(~(below[:-1] < 0.5))
        if len(upper):
            above = distribution.sf(edges[upper[0] :], *params)
            mass[upper] = -np.diff(above)[upper - upper[0]]
        log_mass = np.log(mass)
        # Far out the probability underflows: there, density times width.
        far = ~(mass > 1e-290)
        if far.any():
            low, high = edges[:-1][far], edges[1:][far]
            low, high = np.where(np.isinf(low), high, low), np.where(np.isinf(high), low, high)
            width = np.where(high > low, high - low, 1.0)
            log_mass[far] = distribution.logpdf((low + high) / 2, *params) + np.log(width)
        return log_mass


def _minimum(
    loss: Callable[[np.ndarray], float], form: tuple[float, float] | None
) -> Float[np.ndarray, " parameters"]:
    """The simplex method, from the best of several forms, restarted until it stands still.

    Values are standardised, so centre 0 and spread 1 are a good start for every law. Laws that
    exclude values are steps that no gradient shows, and the simplex method needs none.
    """
    starts = [[0.0, 0.0]] if form is None else [[0.0, 0.0, t] for t in np.linspace(*form, 13)]
    theta = np.array(min(starts, key=lambda start: loss(np.array(start))))
    bounds = [(None, None)] * 2 + ([] if form is None else [form])
    least = np.inf
    while True:
        found = optimize.minimize(
            loss,
            theta,
            method="Nelder-Mead",
            bounds=bounds,
            options=dict(
                xatol=1e-6,
                fatol=1e-11,
                initial_simplex=np.vstack([theta, theta + 0.2 * np.eye(len(theta))]),
            ),
        )
        if least - found.fun < 1e-9:
            return found.x
        theta, least = found.x, found.fun
