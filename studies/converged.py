"""GT on ZINC trained to the end of its schedule: phases, measures, tests, beside what is published.

The *high-rate phase* of a seed ends with the epoch before its learning rate is first halved.
``benchmarks/stacked_tables.py`` makes the tables that are read here.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from mapkg.measures import MASSIVE_RATIO

MEASURES = {
    "row": "row ratio > 1000",
    "layer_wide": "layer ratio > 1000",
    "sun": "Sun's rule in a molecule",
    "spread": "spread beyond untrained",
    "kurtosis": "kurtosis beyond untrained",
    "second": "largest / second beyond untrained",
    "q90": "largest / 90 % quantile beyond untrained",
}
"""What a layer can have. Untrained means all seeds of that layer before training."""

BEYOND = {
    "spread": "spread_mean",
    "kurtosis": "kurtosis_q50",
    "second": "max_over_second_q50",
    "q90": "max_over_q90_q50",
}
"""The statistics of measures that compare with untrained networks."""

STATES = ("untrained", "high", "best", "last")
"""Epoch 0, the last recorded epoch of the high-rate phase, the one nearest to the least
validation loss, and the last recorded one."""

ANCHOR = {"test": (0.264, 0.008), "train": (0.048, 0.006), "epochs": 321.5, "seeds": 4}
"""Mean and standard deviation over seeds of the MAE, of Dwivedi and Bresson 2021, Table 1, with
sparse graphs, BatchNorm and no positional encoding. Their code counts epochs from 0."""


def read_converged(folder: Path | str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The tracked tables: recorded epochs with their measures, windows, and errors."""
    epochs, counts, measured = (
        pd.read_csv(Path(folder) / f"converged_gt_zinc_{name}.csv.gz")
        for name in ("epochs", "windows", "errors")
    )
    epochs["state"] = epochs["state"].fillna("")
    return with_measures(epochs), counts, measured


def with_measures(table: pd.DataFrame) -> pd.DataFrame:
    """Add a column per name in ``MEASURES``: whether the layer has it at that epoch."""
    has = {
        "row": table["max_ratio"] > MASSIVE_RATIO,
        "layer_wide": table["max_layer_ratio"] > MASSIVE_RATIO,
        "sun": table["sun_molecules"] > 0,
    }
    untrained = table[table["epoch"] == 0].groupby("layer")
    for name, column in BEYOND.items():
        has[name] = table[column] > table["layer"].map(untrained[column].max())
    return table.assign(**has)


def seeds_by_layer(table: pd.DataFrame, states: Sequence[str] = STATES) -> pd.DataFrame:
    """How many seeds have each measure: a row per measure and state, a column per layer.

    The column ``any`` counts seeds that have it in some layer, ``from`` and ``to`` are its
    exact 95 % interval as a share of seeds.
    """
    rows = {}
    for name, title in MEASURES.items():
        for state in states:
            wide = table[table["state"] == state].pivot(index="seed", columns="layer", values=name)
            some = int(wide.any(axis=1).sum())
            interval = stats.binomtest(some, len(wide)).proportion_ci(method="exact")
            ends = {"any": some, "from": interval.low, "to": interval.high}
            rows[title, state] = wide.sum().to_dict() | ends
    counted = pd.DataFrame(rows).T
    counted.index.names = ["measure", "state"]
    whole = [name for name in counted.columns if name not in ("from", "to")]
    return counted.astype(dict.fromkeys(whole, int))


def compare_phases(table: pd.DataFrame) -> pd.DataFrame:
    """``paired`` layers that have each measure, ``before`` the rate falls and ``after``, means."""
    rows = {}
    for name, title in MEASURES.items():
        layers = table.groupby(["state", "seed"])[name].sum()
        before, after = layers["high"], layers["last"]
        rows[title] = {"before": before.mean(), "after": after.mean()} | paired(after - before)
    return with_holm(pd.DataFrame(rows).T)


def seeds_that_change(table: pd.DataFrame, places: Sequence[tuple[str, int]]) -> pd.DataFrame:
    """Seeds that lose or gain a measure in a layer over the phases, with a sign test."""
    rows = {}
    for name, layer in places:
        has = table[table["layer"] == layer].set_index(["state", "seed"])[name].astype(int)
        found = paired(has["last"] - has["high"])
        row = {"lost": found["fewer"], "gained": found["more"], "p": found["p"]}
        rows[f"{MEASURES[name]}, layer {layer}"] = row
    return with_holm(pd.DataFrame(rows).T)


def factors(table: pd.DataFrame, column: str, layers: Sequence[int]) -> pd.DataFrame:
    """By which factor a statistic of layers changes: medians, and ``paired`` geometric means."""
    rows = {}
    for layer in layers:
        values = table[table["layer"] == layer].set_index(["state", "seed"])[column]
        before, after = values["high"], values["last"]
        found = paired(np.log(after / before))
        found |= {name: np.exp(found[name]) for name in ("change", "low", "high")}
        rows[layer] = {"before": before.median(), "after": after.median()} | found
    return with_holm(pd.DataFrame(rows).T)


def paired(change: pd.Series) -> dict[str, float]:
    """Mean of a paired change with Student's interval, and the exact sign test without ties."""
    fewer, more = int((change < 0).sum()), int((change > 0).sum())
    low, high = stats.t.interval(0.95, len(change) - 1, change.mean(), stats.sem(change))
    p = stats.binomtest(fewer, fewer + more).pvalue if fewer + more else 1.0
    found = {"change": change.mean(), "low": low, "high": high}
    return found | {"fewer": fewer, "more": more, "p": p}


def with_holm(tests: pd.DataFrame) -> pd.DataFrame:
    """Add ``holm``: the p-values of all rows, corrected by Holm's method."""
    order = tests["p"].sort_values(kind="stable")
    steps = order * np.arange(len(order), 0, -1)
    return tests.assign(holm=steps.cummax().clip(upper=1))


def steady(counts: pd.DataFrame) -> pd.DataFrame:
    """Seeds with each measure in at least half of a window's epochs, by phase and layer."""
    half = counts[list(MEASURES)].ge(counts["recorded"] / 2, axis=0)
    return half.groupby([counts["phase"], counts["layer"]]).sum().T.rename(index=MEASURES)


def beside_anchor(measured: pd.DataFrame) -> pd.DataFrame:
    """Errors of both states on a split beside the anchor's, with Welch's test and interval."""
    rows = {}
    for split in ("train", "test"):
        theirs, spread = ANCHOR[split]
        for state in ("best", "last"):
            of_state = (measured["split"] == split) & (measured["state"] == state)
            mae = measured.loc[of_state, "mae_of_batches"]
            parts = np.array([mae.var() / len(mae), spread**2 / ANCHOR["seeds"]])
            freedom = parts.sum() ** 2 / (parts**2 / [len(mae) - 1, ANCHOR["seeds"] - 1]).sum()
            difference, error = mae.mean() - theirs, np.sqrt(parts.sum())
            low, high = stats.t.interval(0.95, freedom, difference, error)
            row = {"mae": mae.mean(), "deviation": mae.std(), "seeds": len(mae)}
            row |= {"anchor": theirs, "anchor deviation": spread, "difference": difference}
            p = 2 * stats.t.sf(abs(difference) / error, freedom)
            rows[split, state] = row | {"low": low, "high": high, "p": p}
    return pd.DataFrame(rows).T.astype({"seeds": int})
