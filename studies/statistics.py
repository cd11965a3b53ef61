"""Tests and intervals over seeds, kinds and molecules, in one place.

A *change* is a paired difference, of the same seed with and without something; of factors it is
the difference of logarithms. Seeds, not edges, are the observations: the edges of one kind
(source type, bond, target type) are one observation where a layer sees nothing else.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95
"""Of all intervals."""


def t_interval(values: pd.Series | np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """Mean and both ends of Student's interval; the ends are NaN of a single value."""
    _expect_numbers(values)
    mean, count = float(np.mean(values)), len(values)
    half = stats.sem(values) * stats.t.isf((1 - level) / 2, count - 1) if count > 1 else np.nan
    return mean, mean - half, mean + half


def _expect_numbers(values: pd.Series | np.ndarray) -> None:
    if missing := int((~np.isfinite(values)).sum()):
        raise ValueError(f"expected numbers, got {missing} of {len(values)} that are NaN or inf")


def paired(change: pd.Series) -> dict[str, float]:
    """Mean of a change with Student's interval, and the exact sign test without ties."""
    fewer, more = int((change < 0).sum()), int((change > 0).sum())
    p = stats.binomtest(fewer, fewer + more).pvalue if fewer + more else 1.0
    found = dict(zip(("change", "low", "high"), t_interval(change), strict=True))
    return found | {"fewer": fewer, "more": more, "p": p}


def sign_flips(change: pd.Series | np.ndarray) -> float:
    """Two-sided exact p-value of a mean change, its signs flipped in all 2^n ways (n up to 20)."""
    if not 1 <= len(change) <= 20:
        raise ValueError(f"expected 1 to 20 paired changes, got {len(change)}")
    _expect_numbers(change)
    signs = 1 - 2 * (np.arange(2 ** len(change))[:, None] >> np.arange(len(change)) & 1)
    means = np.abs(signs @ np.asarray(change, dtype=float))
    return float((means >= means[0] * (1 - 1e-12)).mean())


def equivalence(change: pd.Series | np.ndarray, margin: float) -> dict[str, float | bool]:
    """Two one-sided t tests of a mean change against a margin that was stated before the run.

    ``equivalent`` if p < 0.05, which is the same as an interval of 90 % (``low`` to ``high``)
    within plus and minus the margin. For factors pass logarithms and the logarithm of the margin.
    Only this makes "no difference" a finding: an interval that includes 0 does not.
    """
    if len(change) < 2 or not margin > 0:
        raise ValueError(
            f"expected two changes or more and a margin above 0, got {len(change)} and {margin}"
        )
    found = dict(zip(("change", "low", "high"), t_interval(change, 0.9), strict=True))
    below = stats.ttest_1samp(change, margin, alternative="less").pvalue
    above = stats.ttest_1samp(change, -margin, alternative="greater").pvalue
    p = float(max(below, above))
    return found | {"margin": margin, "p": p, "equivalent": p < 0.05}


def with_holm(tests: pd.DataFrame) -> pd.DataFrame:
    """Add ``holm``: the p-values of all rows, the contrasts of a page, corrected by Holm."""
    order = tests["p"].sort_values(kind="stable")
    steps = order * np.arange(len(order), 0, -1)
    return tests.assign(holm=steps.cummax().clip(upper=1))


def contrasts(
    table: pd.DataFrame, pairs: Mapping[str, tuple], value: str, margin: float
) -> pd.DataFrame:
    """By which factor a value differs between networks of the same seed, and what that shows.

    ``pairs`` are two pairs of label and run by title, the second over the first. ``p`` is of
    Student's paired test, ``holm`` corrects it for all pairs, ``flips`` is exact, and ``alike`` is
    of the equivalence within the margin, a factor. What neither shows is ``open``.
    """
    keys, rows = ["label", "run", "seed"], {}
    if table.duplicated(keys).any():
        raise ValueError(f"expected one row for each {', '.join(keys)}, got several of one")
    logs = np.log(table.set_index(keys)[value]).sort_index()
    for title, (one, other) in pairs.items():
        change = np.subtract(*logs[other].align(logs[one], join="inner"))  # of the same seeds
        ends = zip(("factor", "low", "high"), np.exp(t_interval(change)), strict=True)
        rows[title] = dict(ends) | {"seeds": len(change), "flips": sign_flips(change)}
        rows[title]["alike"] = equivalence(change, np.log(margin))["p"]
        rows[title]["p"] = stats.ttest_1samp(change, 0).pvalue
    tests = with_holm(pd.DataFrame(rows).T.astype({"seeds": int}))
    found = [tests["alike"] < 0.05, tests["holm"] < 0.05]
    return tests.assign(verdict=np.select(found, ["within the margin", "differs"], "open"))


def with_interval(values: pd.Series, form: str, *, logarithmic: bool = False) -> str:
    """Mean and Student's interval as text, of logarithms the geometric mean; a value if alone."""
    ends = t_interval(np.log(values) if logarithmic else values)[: 1 if len(values) == 1 else 3]
    first, *interval = (form.format(np.exp(end) if logarithmic else end) for end in ends)
    return f"{first} [{', '.join(interval)}]" if interval else first


def hierarchical_bootstrap(
    table: pd.DataFrame, value: str, levels: Sequence[str], *, resamples: int = 1000
) -> tuple[float, float, float]:
    """A mean of means with its percentile interval, drawn level by level.

    ``levels`` are columns from the outermost inward, ``("network", "kind", "molecule")``: networks
    are drawn, in each its kinds, in each the molecules, in each the rows. Each unit weighs as much
    as its neighbors, whatever it holds. The interval of a level with one unit says nothing of it.
    """
    if table.empty or table[[value, *levels]].isna().any(axis=None):
        wanted = " and a ".join((value, *levels))
        raise ValueError(f"expected rows with a {wanted} each, got {len(table)} rows, some without")
    rng = np.random.default_rng(0)

    def tree(rows: pd.DataFrame, names: Sequence[str]) -> list | np.ndarray:
        if not names:
            return rows[value].to_numpy(dtype=float)
        return [tree(part, names[1:]) for _, part in rows.groupby(names[0], sort=False)]

    def mean(units: list | np.ndarray, draw: bool) -> float:
        if len(units) == 1:  # there is nothing to draw
            return float(units[0]) if isinstance(units, np.ndarray) else mean(units[0], draw)
        chosen = rng.integers(len(units), size=len(units)) if draw else range(len(units))
        if isinstance(units, np.ndarray):
            return float(units[chosen].mean())
        return sum(mean(units[i], draw) for i in chosen) / len(units)

    whole = tree(table, levels)
    drawn = [mean(whole, draw=True) for _ in range(resamples)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean(whole, draw=False), float(low), float(high)
