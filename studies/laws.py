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
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy import optimize, stats

from mapkg.measures import MASSIVE_RATIO, NEG_LOG_RATIO_BINS, StreamingHistogram
from studies.figures import STATE_COLORS, THRESHOLD_LOOK, panels

_LEAST = 1e-3  # skewness or inverse shape; there a law is its limit
_BAD = 1e300  # loss of a law that excludes values; finite, because the optimizer subtracts

# Shape, location and scale are hardly identified where a law is near its limit: shape and scale
# can run to infinity together while the law stays the same. Center m, spread s and the logarithm
# t of a skewness do not move then, so the optimizer sees these.
LAWS: dict[str, tuple[stats.rv_continuous, Callable[..., tuple[float, ...]]]] = {
    "gamma": (
        stats.gamma,
        lambda m, s, t: (4 * np.exp(-2 * t), m - 2 * s * np.exp(-t), s * np.exp(t) / 2),
    ),
    "lognormal": (stats.lognorm, lambda m, s, t: (np.exp(t), m - s * np.exp(-t), s * np.exp(-t))),
    "weibull": (
        stats.weibull_min,
        lambda m, s, t: (np.exp(-t), m - s * np.exp(-t), s * np.exp(-t)),
    ),
    "gev": (stats.genextreme, lambda m, s, t: (t, m, s)),
    "normal": (stats.norm, lambda m, s: (m, s)),
}
"""The laws by name, with shape (not the normal law), location and scale. The Weibull law is bounded
below; the one bounded above is a generalized extreme value law with a positive shape."""


class Distance(NamedTuple):
    """A Kolmogorov-Smirnov distance between distribution functions known at edges of bins.

    Over all values it lies in [``statistic``, ``statistic + resolution``].
    """

    statistic: float
    resolution: float


class Fit(NamedTuple):
    """A law fitted to a histogram.

    ``params`` are scipy's, shape (none for the normal law), location and scale: nearly unidentified
    where the law is close to its limit, so compare distribution functions. ``log_likelihood`` is
    the mean per value of the logarithm of the density, averaged within bins; ``aic`` is Akaike's
    criterion, and ``ks`` the distance between the values and this law. Values of one row share a
    median, and rows share nodes, so that only order and size of these two mean anything.
    ``is_limit`` says whether the best law is the limit of its family, to within 0.005 of the
    distribution function: the normal law for a gamma or lognormal law (of values that are not
    skewed to the right), a Gumbel law of minima for a Weibull law.
    """

    law: str
    params: tuple[float, ...]
    log_likelihood: float
    aic: float
    ks: Distance
    num_values: int
    is_limit: bool

    @property
    def distribution(self) -> Any:
        """The fitted law, a frozen distribution of scipy."""
        return LAWS[self.law][0](*self.params)


def histogram_from_table(rows: pd.DataFrame) -> StreamingHistogram:
    """The histogram of -log10 ratio whose filled bins are the rows of a tracked table."""
    low, high, bins = NEG_LOG_RATIO_BINS
    index = rows["bin"].to_numpy()
    if rows["bin"].duplicated().any():
        raise ValueError("expected each bin once: select the rows of one layer of one network")
    if not np.allclose(rows["low"], low + index * (high - low) / bins, atol=1e-9):
        raise ValueError(f"expected {bins} bins over {low} to {high}; 'low' holds other edges")
    counts = torch.zeros(bins, dtype=torch.long)
    counts[torch.tensor(index)] = torch.tensor(rows["count"].to_numpy())
    return StreamingHistogram.from_counts(low, high, counts)


def fit_law(histogram: StreamingHistogram, law: str = "gamma") -> Fit:
    """The law of greatest likelihood for binned counts.

    That of single values has no bound where the density has none, as at the location of a gamma law
    with a shape below 1. Three filled bins are refused: three parameters fit whatever they hold.
    """
    if law not in LAWS:
        raise ValueError(f"unknown law {law!r}; known: {', '.join(LAWS)}")
    edges, counts = _filled(histogram)
    filled, total = counts > 0, counts.sum()
    if filled.sum() < 4:
        raise ValueError(f"expected at least 4 filled bins, got {filled.sum()}: no law to fit")
    mean = counts @ edges[:-1] / total
    deviation = np.sqrt(counts @ (edges[:-1] - mean) ** 2 / total)
    standard = (edges - mean) / deviation
    distribution, params_of = LAWS[law]
    skewed = law not in ("gev", "normal")

    def params(theta: np.ndarray) -> tuple[float, ...]:
        center, log_spread, *form = theta
        return params_of(center, np.exp(log_spread), *form)

    def loss(theta: np.ndarray) -> float:
        log_mass = _log_mass(distribution, params(theta), standard)[filled]
        value = -(counts[filled] @ log_mass) / total
        return value if np.isfinite(value) else _BAD

    forms = [[float(t)] for t in range(-6, 3)] if distribution.numargs else [[]]
    theta = _minimum(loss, [[0.0, 0.0, *form] for form in forms], skewed)
    if loss(theta) == _BAD:
        raise ValueError(f"no {law} law was found that allows all values: fit another law")
    *shape, place, scale = params(theta)
    found = (*map(float, shape), float(mean + deviation * place), float(deviation * scale))
    log_likelihood = float(-loss(theta) - np.log(edges[1] - edges[0]))
    return Fit(
        law=law,
        params=found,
        log_likelihood=log_likelihood,
        aic=2 * len(found) - 2 * int(total) * log_likelihood,
        ks=_distance(_empirical(counts), distribution.cdf(edges, *found)),
        num_values=int(total),
        is_limit=skewed and bool(theta[-1] < np.log(10 * _LEAST)),
    )


def ks_to_law(histogram: StreamingHistogram, fit: Fit) -> Distance:
    """Distance between values and a law that may have been fitted to other values."""
    edges, counts = _filled(histogram)
    return _distance(_empirical(counts), fit.distribution.cdf(edges))


def ks_two_sample(first: StreamingHistogram, second: StreamingHistogram) -> Distance:
    """Distance between two sets of values in equal bins, with no law between them."""
    bins = [(h.low, h.high, h.bins) for h in (first, second)]
    if bins[0] != bins[1]:
        raise ValueError(f"expected equal bins (low, high, number), got {bins[0]} and {bins[1]}")
    return _distance(*(_empirical(h.counts.numpy()) for h in (first, second)))


def compare_laws(
    table: pd.DataFrame, laws: Sequence[str] = tuple(LAWS), *, base: str = "base"
) -> pd.DataFrame:
    """Fits of several laws to each histogram of a table, with the three distances.

    ``table`` has the columns ``bin``, ``low`` and ``count``, and others whose values say which
    histogram a row belongs to; ``state`` is one of them, ``base`` that of the untrained network.

    A row per histogram and law: these other columns, ``shape``, ``loc``, ``scale`` and what else a
    ``Fit`` has, and ``aic_rank``, 1 for the least; ``ks_own``, the distance to the fit of the same
    values (as published); ``ks_base``, to the fit of the base state with the other columns equal;
    ``ks_two_sample``, from the values of that base state. The latter two are NaN without such a
    base. ``ks_own_resolution`` and so on say how exact these are.
    """
    keys = [column for column in table.columns if column not in ("bin", "low", "count")]
    place = keys.index("state")
    histograms = {
        # NaN, as an empty cell is read, is not equal to itself and finds no base.
        tuple(None if pd.isna(value) else value for value in group): histogram_from_table(rows)
        for group, rows in table.groupby(keys, dropna=False)
    }
    fits = {group: {law: fit_law(h, law) for law in laws} for group, h in histograms.items()}
    rows = []
    for group, histogram in histograms.items():
        of_base = (*group[:place], base, *group[place + 1 :])
        ranked = sorted(laws, key=lambda law: fits[group][law].aic)
        for law, fit in fits[group].items():
            *shape, loc, scale = fit.params
            row = dict(zip(keys, group, strict=True)) | {"law": law}
            row |= {"shape": shape[0] if shape else np.nan, "loc": loc, "scale": scale}
            names = ("is_limit", "num_values", "log_likelihood", "aic")
            row |= {name: getattr(fit, name) for name in names}
            row["aic_rank"] = ranked.index(law) + 1
            distances = {"own": fit.ks, "base": (np.nan,) * 2, "two_sample": (np.nan,) * 2}
            if of_base in histograms:
                distances["base"] = ks_to_law(histogram, fits[of_base][law])
                distances["two_sample"] = ks_two_sample(histogram, histograms[of_base])
            for name, distance in distances.items():
                row[f"ks_{name}"], row[f"ks_{name}_resolution"] = distance
            rows.append(row)
    return pd.DataFrame(rows)


TAIL = 0.01
"""Share of the largest ratios whose decay gives the tail index."""


def tails(histogram: pd.DataFrame) -> pd.DataFrame:
    """Does a layer have a heavier tail, or a bump of its own? A row per run, seed, layer, state.

    ``spread`` is that of ln r; ``tail`` the tail index, Hill's mean of ln r beyond the largest
    ``TAIL``. ``rise`` is by which factor bins of a tenth of a decade, in order from the fullest one
    up, grow again after they were least, if they hold 1e-5 of the values: 1 without a bump.
    """
    rows, keys = {}, ["run", "seed", "layer", "state"]
    width = (NEG_LOG_RATIO_BINS[1] - NEG_LOG_RATIO_BINS[0]) / NEG_LOG_RATIO_BINS[2]
    table = histogram.assign(decades=-histogram["low"] - width / 2).sort_values("decades")
    for group, part in table.groupby(keys, sort=False):
        n, decades = part["count"].to_numpy(), part["decades"].to_numpy()
        x, total = np.log(10) * decades, n.sum()
        spread = np.sqrt(n @ (x - n @ x / total) ** 2 / total)
        beyond = n[::-1].cumsum()[::-1] <= TAIL * total
        tail = n[beyond] @ (x[beyond] - x[beyond][0]) / n[beyond].sum()
        tail += np.log(10) * width / 2  # from the edge of its first bin, not the center
        coarse = pd.Series(n).groupby(np.floor(10 * decades).astype(int)).sum()
        coarse = coarse.reindex(range(coarse.idxmax(), coarse.index[-1] + 1), fill_value=0)
        growth = coarse / coarse.cummin().clip(lower=1)
        rows[group] = (spread, tail, growth[coarse >= 1e-5 * total].max())
    found = pd.DataFrame.from_dict(rows, orient="index", columns=["spread", "tail", "rise"])
    found.index = pd.MultiIndex.from_tuples(found.index, names=keys)
    return found.reset_index()


def distribution_grid(histogram: pd.DataFrame, laws: pd.DataFrame) -> Figure:
    """Figure B of the massive-activations paper: all layers of one network, and gamma laws.

    The panels of the untrained one, then those of the trained; rows are of one run and seed, and
    ``laws`` has their fits, as ``compare_laws`` gives them.
    """
    fits = laws[laws["law"] == "gamma"].set_index(["state", "layer"])
    layers = sorted(histogram["layer"].unique())
    places = [(state, layer) for state in ("base", "best") for layer in layers]
    look = dict(size=(1.9, 1.75), sharex=True, sharey=True)
    figure, axes = panels(len(places), min(5, len(layers)), **look)
    for ax, (state, layer) in zip(axes, places, strict=True):
        rows = histogram[(histogram["layer"] == layer) & (histogram["state"] == state)]
        counted = histogram_from_table(rows)  # with the empty bins, which the table leaves out
        edges, counts = _filled(counted)
        ax.stairs(counts, edges, fill=True, color=STATE_COLORS[state], alpha=0.8)
        fit = fits.loc[(state, layer)]
        y = np.linspace(edges[0], edges[-1], 500)
        law = stats.gamma(*fit[["shape", "loc", "scale"]])
        density = law.pdf(y) * fit["num_values"] * (edges[1] - edges[0])
        ax.plot(y, density, color="black", lw=1)
        ax.axvline(-np.log10(MASSIVE_RATIO), **THRESHOLD_LOOK)
        ax.set(yscale="log", ylim=(0.5, 10 * counts.max()), title=f"layer {layer}, {state}")
        note = f"KS {fit['ks_own']:.3f}\nlog-lik. {fit['log_likelihood']:.2f}"
        ax.text(0.97, 0.95, note, transform=ax.transAxes, ha="right", va="top", fontsize="small")
    figure.supxlabel("$-\\log_{10}$ activation ratio", fontsize="medium")
    figure.supylabel("activations", fontsize="medium")
    return figure


def _filled(histogram: StreamingHistogram) -> tuple[np.ndarray, np.ndarray]:
    """Edges and counts from the first filled bin to the last."""
    if outside := histogram.num_outside:
        raise ValueError(f"{outside} values lie outside the bins: count them in wider ones")
    edges, counts = histogram.edges.numpy(), histogram.counts.numpy()
    filled = np.flatnonzero(counts)
    if not len(filled):
        raise ValueError("the histogram is empty: no row had a median to divide by")
    return edges[filled[0] : filled[-1] + 2], counts[filled[0] : filled[-1] + 1]


def _empirical(counts: np.ndarray) -> np.ndarray:
    """The share of values below each edge."""
    return np.concatenate([[0], counts.cumsum()]) / counts.sum()


def _distance(first: np.ndarray, second: np.ndarray) -> Distance:
    at_edges = np.abs(first - second).max()
    # Both functions increase within a bin, so no difference exceeds that of opposite ends.
    at_most = max((first[1:] - second[:-1]).max(), (second[1:] - first[:-1]).max(), at_edges)
    return Distance(float(at_edges), float(at_most - at_edges))


def _log_mass(
    law: stats.rv_continuous, params: tuple[float, ...], edges: np.ndarray
) -> Float[np.ndarray, " bins"]:
    """Logarithm of the probability between neighboring edges, accurate in both tails."""
    with np.errstate(all="ignore"):
        below, above = law.cdf(edges, *params), law.sf(edges, *params)
        mass = np.where(below[1:] < above[1:], np.diff(below), -np.diff(above))
        log_mass, far = np.log(mass), ~(mass > 0)
        if far.any():  # the probability underflows: there, density times width
            width = np.diff(edges)[far]
            log_mass[far] = law.logpdf(edges[:-1][far] + width / 2, *params) + np.log(width)
        return log_mass


def _minimum(
    loss: Callable[[np.ndarray], float], starts: Sequence[Sequence[float]], skewed: bool
) -> Float[np.ndarray, " parameters"]:
    """The simplex method, from the best of several forms, restarted until it stands still.

    Values are standardized, so center 0 and spread 1 are a good start for every law. Laws that
    exclude values are steps that no gradient shows, and the simplex method needs none.
    """
    theta, least = np.array(min(starts, key=lambda start: loss(np.array(start)))), np.inf
    bounds = [(None, None)] * (len(theta) - 1) + [(np.log(_LEAST) if skewed else None, None)]
    while True:
        simplex = np.vstack([theta, theta + np.eye(len(theta))])
        options = dict(xatol=1e-6, fatol=1e-11, initial_simplex=simplex)
        found = optimize.minimize(loss, theta, method="Nelder-Mead", bounds=bounds, options=options)
        if least - found.fun < 1e-9:
            return found.x
        theta, least = found.x, found.fun
