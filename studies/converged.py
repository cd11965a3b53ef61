"""GT on ZINC trained to the end of its schedule: tables of the run, phases, measures, tests.

The *high-rate phase* of a seed ends with the epoch before its learning rate is first halved.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch
import seaborn as sns
import torch
from matplotlib.figure import Figure
from scipy import stats

from mapkg.evaluation import predictions
from mapkg.measures import MASSIVE_RATIO
from mapkg.models.config import Config
from studies.data import Splits
from studies.extras import build
from studies.figures import STATE_COLORS, THRESHOLD_LOOK, legend_once, panels
from studies.provenance import commit, versions

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

STATES = ("untrained", "high", "best", "last")
"""Epoch 0, the last recorded epoch of the high-rate phase, the one nearest to the least
validation loss, and the last recorded one."""

ANCHOR = {"test": (0.264, 0.008), "train": (0.048, 0.006), "epochs": 321.5, "seeds": 4}
"""Mean and standard deviation over seeds of the MAE, of Dwivedi and Bresson 2021, Table 1, with
sparse graphs, BatchNorm and no positional encoding. Their code counts epochs from 0."""

WINDOW = 50
"""Epochs at the end of a phase that ``windows`` looks at; every fifth of them was recorded."""

_BEYOND = {
    "spread": "spread_mean",
    "kurtosis": "kurtosis_q50",
    "second": "max_over_second_q50",
    "q90": "max_over_q90_q50",
}
_KEPT_EPOCHS, _KEPT_STEP = (0, 1, 2, 5, 10), 20
_STATISTICS = [
    *("rows", "max_ratio", "rows_with_massive", "max_abs", "row_median_q50"),
    *("max_layer_ratio", "sun_molecules", *_BEYOND.values()),
]
_LOSSES = ["train_loss", "val_loss", "test_loss", "lr"]


# From the files of a run to tables.


def read_run(folder: Path | str) -> pd.DataFrame:
    """Every recorded epoch of a run of ``benchmarks/stacked.py``, with its measures.

    Returns:
        A row per seed, recorded epoch and layer. ``halved`` is the first epoch of the seed at a
        lower rate, ``epochs`` its last one, ``state`` one of ``STATES`` or empty, and a column
        per name in ``MEASURES`` says whether the layer has it.
    """
    folder = Path(folder)
    about = json.loads((folder / "run.json").read_text())
    every = pd.read_csv(folder / "epochs.csv.gz")
    trained = every.dropna(subset="lr")
    lower = trained[trained["lr"] < 0.99 * about["config"]["lr"]]
    seed = every["seed"]
    every["halved"] = seed.map(lower.groupby("seed")["epoch"].min())
    every["epochs"] = seed.map(trained.groupby("seed")["epoch"].max())
    every["best_epoch"] = seed.map({int(s): v["best_epoch"] for s, v in about["by_seed"].items()})
    table = every.dropna(subset="layer").astype({"layer": int}).reset_index(drop=True)
    epoch, seeds = table["epoch"], table["seed"]
    distance = (epoch - table["best_epoch"]).abs()
    ends = {
        "last": epoch == epoch.groupby(seeds).transform("max"),
        "best": distance == distance.groupby(seeds).transform("min"),
        "high": epoch == epoch.where(epoch < table["halved"]).groupby(seeds).transform("max"),
        "untrained": epoch == 0,
    }
    table["state"] = ""
    for state, rows in ends.items():
        table.loc[rows, "state"] = state
    return with_measures(table)


def origin(folder: Path | str) -> dict[str, str]:
    """What each row of a tracked table says of the run it comes from."""
    about = json.loads((Path(folder) / "run.json").read_text())
    return {
        "config": about["config_name"],
        "dataset": "ZINC-12k",
        "versions": about["versions"],
        "commit": about["commit"],
        "machine": about["device"],
    }


def thinned(run: pd.DataFrame) -> pd.DataFrame:
    """Epochs 0, 1, 2, 5 and 10, every twentieth one, and those of ``STATES``."""
    epoch = run["epoch"]
    kept = epoch.isin(_KEPT_EPOCHS) | (epoch % _KEPT_STEP == 0) | (run["state"] != "")
    first = ["seed", "epoch", "layer", "state", "halved", "best_epoch", "epochs"]
    return run.loc[kept, [*first, *_STATISTICS, *_LOSSES]].reset_index(drop=True)


def windows(run: pd.DataFrame) -> pd.DataFrame:
    """In how many recorded epochs of the last ``WINDOW`` of a phase a layer has each measure.

    Returns:
        A row per seed, phase (``high``, or ``end`` of training) and layer, with ``recorded`` epochs
        and a count per name in ``MEASURES``. Only multiples of five count, since no others were
        recorded late.
    """
    parts = []
    for phase, end in (("high", run["halved"] - 1), ("end", run["epochs"])):
        epoch = run["epoch"]
        inside = (epoch > end - WINDOW) & (epoch <= end) & (epoch % 5 == 0) & (epoch > 0)
        groups = run[inside].groupby(["seed", "layer"])
        counts = groups[list(MEASURES)].sum().reset_index()
        counts.insert(1, "phase", phase)
        counts.insert(3, "recorded", groups.size().to_numpy())
        parts.append(counts)
    return pd.concat(parts, ignore_index=True)


def errors(folder: Path | str, splits: Splits, *, batch_size: int = 128) -> pd.DataFrame:
    """Errors of a run's stored weights in evaluation mode, on each split.

    Returns:
        A row per seed, state (``best`` or ``last``) and split. ``mae`` is the mean over molecules,
        and ``mae_of_batches``, the mean of the means of batches, as the anchor's code has it;
        ``recorded``, what the run itself wrote at that epoch: for ``train`` the running mean of
        the epoch, with BatchNorm in training mode and weights that still move;
        ``precision`` of the stored weights, ``evaluated_with`` and ``evaluated_at``, versions
        and commit of this call.
    """
    folder = Path(folder)
    about = json.loads((folder / "run.json").read_text())
    model = build(Config.from_dict(about["config"]))
    history = pd.read_csv(folder / "epochs.csv.gz").drop_duplicates(["seed", "epoch"])
    history = history.set_index(["seed", "epoch"])
    rows = []
    for state in ("best", "last"):
        tensors = {}
        for path in sorted(folder.glob(f"{state}_*.safetensors")):
            tensors |= safetensors.torch.load_file(path)
        for seed in about["seeds"]:
            prefix = f"{seed}/"
            model.load_state_dict(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
            row = {"seed": seed, "state": state}
            row["precision"] = about[f"{state}_weights_dtype"].removeprefix("torch.")
            row["epoch"] = about["by_seed"][str(seed)][f"{state}_epoch"]
            for split in ("train", "val", "test"):
                predicted, target = predictions(
                    model, getattr(splits, split), batch_size=batch_size
                )
                error = (predicted - target).abs().double()
                means = torch.stack([part.mean() for part in error.split(batch_size)])
                measured = {"mae": error.mean().item(), "mae_of_batches": means.mean().item()}
                measured["recorded"] = history[f"{split}_loss"][seed, row["epoch"]]
                rows.append(row | {"split": split} | measured)
    return pd.DataFrame(rows).assign(evaluated_with=versions(), evaluated_at=commit())


# What the tables say.


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
    for name, column in _BEYOND.items():
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


def compare_phases(table: pd.DataFrame, one: str = "high", other: str = "last") -> pd.DataFrame:
    """Layers that have each measure, in two states of the same seeds.

    Returns:
        A row per measure. ``before`` and ``after`` are mean layers a seed; the rest as ``paired``.
    """
    rows = {}
    for name, title in MEASURES.items():
        layers = table.groupby(["state", "seed"])[name].sum()
        before, after = layers[one], layers[other]
        means = {"before": before.mean(), "after": after.mean()}
        rows[title] = means | paired(after - before)
    return with_holm(pd.DataFrame(rows).T)


def seeds_that_change(table: pd.DataFrame, places: Sequence[tuple[str, int]]) -> pd.DataFrame:
    """Seeds that lose or gain a measure in a layer, from the high-rate phase to the end.

    Args:
        table: of ``read_converged``.
        places: names in ``MEASURES``, each with a layer.

    Returns:
        A row per place, with ``lost`` and ``gained`` seeds and the sign test of ``paired``.
    """
    rows = {}
    for name, layer in places:
        has = table[table["layer"] == layer].set_index(["state", "seed"])[name].astype(int)
        found = paired(has["last"] - has["high"])
        row = {"lost": found["fewer"], "gained": found["more"], "p": found["p"]}
        rows[f"{MEASURES[name]}, layer {layer}"] = row
    return with_holm(pd.DataFrame(rows).T)


def factors(table: pd.DataFrame, column: str, layers: Sequence[int]) -> pd.DataFrame:
    """By which factor a statistic changes from the high-rate phase to the end of training.

    Returns:
        A row per layer, with medians over seeds ``before`` and ``after``, and as ``paired`` the
        geometric mean of the factor and its interval.
    """
    rows = {}
    for layer in layers:
        values = table[table["layer"] == layer].set_index(["state", "seed"])[column]
        before, after = values["high"], values["last"]
        found = paired(np.log(after / before))
        found |= {name: np.exp(found[name]) for name in ("change", "low", "high")}
        rows[layer] = {"before": before.median(), "after": after.median()} | found
    return with_holm(pd.DataFrame(rows).T)


def paired(change: pd.Series, *, confidence: float = 0.95) -> dict[str, float]:
    """A paired change over seeds: its mean, Student's interval, and an exact sign test.

    Returns:
        ``change``, ``low``, ``high``, ``fewer`` and ``more`` (seeds), and ``p``, two-sided;
        seeds without a change have no say in the test.
    """
    fewer, more = int((change < 0).sum()), int((change > 0).sum())
    low, high = stats.t.interval(confidence, len(change) - 1, change.mean(), stats.sem(change))
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
    """Errors of both states beside the anchor's: a row per split and state.

    Returns:
        ``mae`` and ``deviation`` over seeds, ``seeds``, those of the anchor, the
        ``difference`` with its 95 % interval, and ``p``, by Welch's test.
    """
    rows = {}
    for split in ("train", "test"):
        theirs, spread = ANCHOR[split]
        for state in ("best", "last"):
            mae = measured[(measured["split"] == split) & (measured["state"] == state)][
                "mae_of_batches"
            ]
            ours = (mae.mean(), mae.std(), len(mae))
            parts = np.array([ours[1] ** 2 / len(mae), spread**2 / ANCHOR["seeds"]])
            freedom = parts.sum() ** 2 / (parts**2 / [len(mae) - 1, ANCHOR["seeds"] - 1]).sum()
            difference, error = ours[0] - theirs, np.sqrt(parts.sum())
            low, high = stats.t.interval(0.95, freedom, difference, error)
            p = 2 * stats.t.sf(abs(difference) / error, freedom)
            names = ("mae", "deviation", "seeds", "anchor", "anchor deviation")
            row = dict(zip(names, (*ours, theirs, spread), strict=True))
            row |= {"difference": difference, "low": low, "high": high, "p": p}
            rows[split, state] = row
    return pd.DataFrame(rows).T.astype({"seeds": int})


# Figures.

_COLORS = {"high": STATE_COLORS["base"], "last": STATE_COLORS["best"]}
_PHASES = {"high": "before the rate is halved", "last": "end of training"}


def draw_seeds_by_layer(counted: pd.DataFrame, seeds: int) -> Figure:
    """In how many seeds each layer has a measure, before and after the rate falls."""
    measures = counted.index.unique("measure")
    figure, axes = panels(len(measures), 4, (3.0, 2.0), sharey=True)
    layers = [name for name in counted.columns if isinstance(name, int)]
    marks = {"high": dict(marker="o", mfc="white", ms=8), "last": dict(marker="s", ms=4)}
    for ax, measure in zip(axes, measures, strict=True):
        states = {state: counted.loc[(measure, state), layers] for state in _PHASES}
        ax.vlines(layers, states["high"], states["last"], color="0.7", lw=1.5, zorder=1)
        for state, values in states.items():
            look = dict(color=_COLORS[state], ls="none", label=_PHASES[state], clip_on=False)
            ax.plot(layers, values, **look, **marks[state])
        ax.set_title(measure, fontsize="small")
        ax.set(ylim=(0, seeds), xticks=layers, yticks=range(0, seeds + 1, 4))
    figure.supxlabel("layer", fontsize="medium")
    figure.supylabel(f"seeds of {seeds}", fontsize="medium")
    legend_once(figure, loc="outside right center")
    return figure


def draw_schedule(
    table: pd.DataFrame, layers: Sequence[int], values: Mapping[str, str]
) -> sns.FacetGrid:
    """Columns of the table (with titles) through training, a line per seed, colored by phase."""
    table = table[table["layer"].isin(layers)]
    first_lower = table[table["epoch"] >= table["halved"]].groupby("seed")["epoch"].min()
    later = table["epoch"] >= table["seed"].map(first_lower)
    phases = {"high": "before the rate is halved", "last": "after the first halving"}
    turn = table[table["state"] == "high"]  # ends one part of the line and begins the other
    parts = {"high": table[~later], "last": pd.concat([turn, table[later]])}
    lines = pd.concat([part.assign(phase=phases[state]) for state, part in parts.items()])
    lines = lines.melt(["seed", "epoch", "layer", "phase"], list(values), "of")
    grid = sns.relplot(
        lines.replace({"of": values}),
        **dict(kind="line", x="epoch", y="value", hue="phase", style="phase", units="seed"),
        **dict(row="of", col="layer", estimator=None, height=2.1, aspect=1.25, lw=1, alpha=0.8),
        palette=dict(zip(phases.values(), _COLORS.values(), strict=True)),
        dashes=dict(zip(phases.values(), ((3, 1.5), ""), strict=True)),
        facet_kws=dict(sharey="row"),
    )
    grid.set_titles("")
    for (title, layer), ax in grid.axes_dict.items():
        ax.set(title=f"layer {layer}" if ax in grid.axes[0] else "", ylabel=title)
        ax.label_outer()
        if title == values.get("max_ratio"):
            ax.set_yscale("log")
            ax.axhline(MASSIVE_RATIO, **THRESHOLD_LOOK)
    grid.legend.set_title(None)
    return grid


def draw_anchor(last: pd.DataFrame) -> Figure:
    """Error and length of each seed's training beside the mean of ``ANCHOR``.

    ``last`` has the columns ``epoch``, ``train`` and ``test``, a row per seed.
    """
    figure, axes = panels(2, 2, (2.9, 2.3))
    for ax, split in zip(axes, ("test", "train"), strict=True):
        mean, deviation = ANCHOR[split]
        ax.plot(last["epoch"], last[split], "s", color=_COLORS["last"], label="a seed, here")
        look = dict(color="black", marker="D", ls="none", capsize=3)
        label = "published, mean and deviation"
        ax.errorbar(ANCHOR["epochs"], mean, yerr=deviation, label=label, **look)
        ax.set(xlabel="last epoch", ylabel=f"{split} MAE at the last epoch")
    legend_once(figure, loc="outside lower center", ncols=2)
    return figure
