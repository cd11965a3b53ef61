"""Networks trained to the end of their schedule: phases, measures, tests, beside what is published.

The *high-rate phase* of a seed ends with the epoch before its learning rate is first halved.
"""

import platform
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm

from mapkg.measures import MASSIVE_RATIO
from mapkg.models import build
from mapkg.models.config import Config
from studies.data import Splits
from studies.emergence import fit_to_data
from studies.figures import STATE_COLORS, THRESHOLD_LOOK, legend_once, panels
from studies.statistics import LEVEL, paired, with_holm
from studies.tables import write_all
from studies.train import fit
from studies.train_stacked import Progress

MEASURES = {
    "row": "row ratio > 1000",
    "layer_wide": "layer ratio > 1000",
    "sun": "Sun's rule in a molecule",
    "spread": "spread beyond untrained",
    "kurtosis": "kurtosis beyond untrained",
    "second": "largest / second beyond untrained",
    "q90": "largest / 90 % quantile beyond untrained",
}
"""What a layer can have; untrained means all seeds of that layer before training."""

BEYOND = {
    "spread": "spread_mean",
    "kurtosis": "kurtosis_q50",
    "second": "max_over_second_q50",
    "q90": "max_over_q90_q50",
}

WITH_THRESHOLD = ("row", "layer_wide", "sun")

STATES = ("untrained", "high", "last")
"""Recorded epochs that are compared, 0, the last one at the high rate, and the last one."""

ANCHOR = {"test": (0.264, 0.008), "train": (0.048, 0.006), "epochs": 321.5, "seeds": 4}
"""Mean and standard deviation over seeds of the MAE, of Dwivedi and Bresson 2021, Table 1, with
sparse graphs, BatchNorm and no positional encoding. Their code counts epochs from 0. The deviation
is of the population, since their notebook of statistics takes it with ``np.std``."""


WINDOW = 50
"""Epochs at the end of a phase that ``windows`` looks at; every fifth of them was recorded."""

KEPT_EPOCHS, KEPT_STEP = (0, 1, 2, 5, 10), 20
STATISTICS = [
    *("rows", "max_ratio", "rows_with_massive", "max_abs", "row_median_q50"),
    *("max_layer_ratio", "sun_molecules", *BEYOND.values()),
]
LOSSES = ["train_loss", "val_loss", "test_loss", "lr"]


def to_the_end(
    config: Config,
    splits: Splits,
    seeds: Sequence[int],
    *,
    prefix: Path | str,
    name: str = "custom",
    changes: str = "",
) -> None:
    """Train a network by its schedule to the end, seed by seed, with all measures on the way.

    Writes ``PREFIX_epochs`` and ``PREFIX_windows``, see ``thinned`` and ``windows``, once all seeds
    are done. A run that was stopped goes on from ``PREFIX_state``. ``changes`` say in what the
    configuration differs from that of the ``name``.
    """
    config, parts = fit_to_data(config, splits.description), []
    recorded = dict(
        record_epochs=lambda epoch: epoch <= 20 or epoch % 5 == 0,
        **dict(save_seconds=60.0, progress=False),  # each seed has a bar here
    )
    for seed in seeds:
        with tqdm(desc=f"{name}, seed {seed}", unit=" epochs") as bar:

            def watch(run: Progress, bar: tqdm = bar) -> None:
                bar.update(run.epoch - bar.n)

            folder = Path(f"{prefix}_state") / str(seed)
            made = fit(build, splits, config, seeds=[seed], folder=folder, watch=watch, **recorded)
        every = made.observations.merge(made.history, on=["seed", "epoch"], how="outer")
        origin = {"stopped": made.stop_reason[seed], "versions": made.versions}
        of_seed = with_phases(every, made.best_epoch, config.lr)
        parts.append(of_seed.assign(**origin, commit=made.commit))
    run = with_measures(pd.concat(parts, ignore_index=True))
    origin = dict(config=name, changes=changes, dataset=splits.description.title)
    origin["machine"] = platform.processor() or platform.machine()
    of_seeds = run.groupby("seed")[["stopped", "versions", "commit"]].first()
    tables = {"epochs": thinned(run), "windows": windows(run)}
    tables = {n: table.assign(**origin).join(of_seeds, on="seed") for n, table in tables.items()}
    for path in write_all(prefix, tables, {}):
        print(path)


def with_phases(every: pd.DataFrame, best_epoch: Mapping[int, int], lr: float) -> pd.DataFrame:
    """Rows of recorded epochs, of a run's table of losses and measures, with what they are.

    ``halved`` is the first epoch of the seed below the rate ``lr``, ``epochs`` its last one,
    ``state`` one of ``STATES``, ``best`` where another one is nearest to the least validation loss,
    or empty.
    """
    trained = every.dropna(subset="lr")
    lower = trained[trained["lr"] < 0.99 * lr]
    seed = every["seed"]
    halved = seed.map(lower.groupby("seed")["epoch"].min())
    epochs = seed.map(trained.groupby("seed")["epoch"].max())
    every = every.assign(halved=halved, epochs=epochs, best_epoch=seed.map(best_epoch))
    table = every.dropna(subset="layer").astype({"layer": int}).reset_index(drop=True)
    epoch, seeds = table["epoch"], table["seed"]
    distance = (epoch - table["best_epoch"]).abs()
    ends = {
        "best": distance == distance.groupby(seeds).transform("min"),  # gives way to others
        "last": epoch == epoch.groupby(seeds).transform("max"),
        "high": epoch == epoch.where(epoch < table["halved"]).groupby(seeds).transform("max"),
        "untrained": epoch == 0,
    }
    table["state"] = ""
    for state, rows in ends.items():
        table.loc[rows, "state"] = state
    return table


def thinned(run: pd.DataFrame) -> pd.DataFrame:
    """Epochs 0, 1, 2, 5 and 10, every twentieth one, and those with a state."""
    epoch = run["epoch"]
    kept = epoch.isin(KEPT_EPOCHS) | (epoch % KEPT_STEP == 0) | (run["state"] != "")
    first = ["seed", "epoch", "layer", "state", "halved", "best_epoch", "epochs"]
    return run.loc[kept, [*first, *STATISTICS, *LOSSES]].reset_index(drop=True)


def windows(run: pd.DataFrame) -> pd.DataFrame:
    """In how many ``recorded`` epochs of the last ``WINDOW`` of a phase a layer has each measure.

    Phases are ``high`` and the ``end`` of training. Only multiples of five count, since no others
    were recorded late.
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


def read_converged(folder: Path | str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The tables of GT on ZINC: recorded epochs with their measures, windows, and errors."""
    path = f"{folder}/converged_gt_zinc"
    counts, measured = (pd.read_csv(f"{path}_{name}.csv.gz") for name in ("windows", "errors"))
    return read_epochs(folder, "gt_zinc"), counts, measured


def read_epochs(folder: Path | str, run: str) -> pd.DataFrame:
    """Recorded epochs of a run, with their measures; most have an empty ``state``."""
    return with_measures(_read(folder, run, "epochs").fillna({"state": ""}))


def read_windows(folder: Path | str, run: str) -> pd.DataFrame:
    """The windows of a run, of measures with a threshold: others depend on what ran with a seed."""
    return _read(folder, run, "windows").drop(columns=[*BEYOND])


def _read(folder: Path | str, run: str, table: str) -> pd.DataFrame:
    """A table of a run, and of its further seeds if there are some."""
    first, further = (
        Path(folder) / f"converged_{run}{part}_{table}.csv.gz" for part in ("", "_further")
    )
    paths = [first, *([further] if further.exists() else [])]
    return pd.concat([pd.read_csv(path) for path in paths], ignore_index=True)


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


def _whole(table: pd.DataFrame) -> pd.DataFrame:
    """The table, if each of its seeds has all ``STATES``; ValueError if not."""
    for state in STATES:
        if lacking := {*table["seed"]} - {*table.loc[table["state"] == state, "seed"]}:
            raise ValueError(
                f"seeds {sorted(lacking)}: expected an epoch of the state {state!r}, got none; "
                "train them until the rate has fallen and training ends by it"
            )
    return table


def seeds_by_layer(table: pd.DataFrame) -> pd.DataFrame:
    """How many seeds have each measure in a layer, or any, the exact 95 % interval as a share."""
    table, rows = _whole(table), {}
    for (name, title), state in product(MEASURES.items(), STATES):
        wide = table[table["state"] == state].pivot(index="seed", columns="layer", values=name)
        some = int(wide.any(axis=1).sum())
        low, high = stats.binomtest(some, len(wide)).proportion_ci(method="exact")
        rows[title, state] = wide.sum().to_dict() | {"any": some, "from": low, "to": high}
    counted = pd.DataFrame(rows).T.rename_axis(index=["measure", "state"])
    return counted.astype(dict.fromkeys(counted.columns.drop(["from", "to"]), int))


def compare_phases(table: pd.DataFrame) -> pd.DataFrame:
    """``paired`` layers that have each measure, ``before`` the rate falls and ``after``, means."""
    rows = {}
    for name, title in MEASURES.items():
        layers = table.groupby(["state", "seed"])[name].sum()
        before, after = layers["high"], layers["last"]
        rows[title] = {"before": before.mean(), "after": after.mean()} | paired(after - before)
    return with_holm(pd.DataFrame(rows).T)


def beside_one_another(
    runs: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]], measures: Sequence[str]
) -> pd.DataFrame:
    """Seeds of each run, recorded epochs and windows, that have a measure in some layer.

    At the end of both phases, and ``mostly``: in half or more of a window's epochs.
    """
    rows = {}
    for title, (table, counts) in runs.items():
        counted, seeds = seeds_by_layer(table)["any"], table["seed"].nunique()
        rows[title] = {("", "seeds"): seeds}
        half = counts[[*measures]].ge(counts["recorded"] / 2, axis=0)
        mostly = half.groupby([counts["phase"], counts["seed"]]).any().groupby("phase").sum()
        for name in measures:
            measure, of_windows = MEASURES[name], mostly[name]
            rows[title] |= {
                (measure, "before"): counted[measure, "high"],
                (measure, "mostly before"): of_windows["high"],
                (measure, "at the end"): counted[measure, "last"],
                (measure, "mostly at the end"): of_windows["end"],
            }
    return pd.DataFrame(rows).T.astype(int)


def kept(table: pd.DataFrame) -> pd.DataFrame:
    """Networks, and layers of networks, that have a measure with a threshold before the rate falls.

    Of these ``kept`` and ``lost`` do or do not have it at the end, where ``gained`` are new.
    """
    rows = {}
    for name in WITH_THRESHOLD:
        has = _whole(table).set_index(["state", "seed", "layer"])[name].sort_index()
        of_network = has.groupby(["state", "seed"]).any()
        for title, values in {"networks": of_network, "layers of a network": has}.items():
            before, after = values["high"], values["last"]
            row = {"before": before, "kept": before & after}
            row |= {"lost": before & ~after, "gained": ~before & after}
            rows[MEASURES[name], title] = {column: each.sum() for column, each in row.items()}
    return pd.DataFrame(rows).T.rename_axis(index=["measure", "of"])


def seeds_that_change(table: pd.DataFrame, places: Sequence[tuple[str, int]]) -> pd.DataFrame:
    """Seeds that lose or gain a measure in a layer over the phases, with a sign test."""
    rows = {}
    for name, layer in places:
        has = table[table["layer"] == layer].set_index(["state", "seed"])[name].astype(int)
        rows[f"{MEASURES[name]}, layer {layer}"] = paired(has["last"] - has["high"])
    tests = pd.DataFrame(rows).T.rename(columns={"fewer": "lost", "more": "gained"})
    return with_holm(tests[["lost", "gained", "p"]])


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


def steady(counts: pd.DataFrame) -> pd.DataFrame:
    """Seeds with each measure in at least half of a window's epochs, by phase and layer."""
    half = counts[[name for name in MEASURES if name in counts]].ge(counts["recorded"] / 2, axis=0)
    return half.groupby([counts["phase"], counts["layer"]]).sum().T.rename(index=MEASURES)


def beside_anchor(measured: pd.DataFrame) -> pd.DataFrame:
    """Errors of both states on a split beside the anchor's, with Welch's test and interval.

    The anchor's deviation is that of a population, and the test takes that of a sample.
    """
    found, rows = measured.set_index(["split", "state"])["mae_of_batches"].sort_index(), {}
    for split, state in product(("train", "test"), ("best", "last")):
        (mean, deviation), mae = ANCHOR[split], found[split, state]
        # Numbers of this mean and deviation, of which the test knows nothing else.
        theirs = mean + deviation * np.resize([-1, 1], ANCHOR["seeds"])
        test = stats.ttest_ind(mae, theirs, equal_var=False)
        low, high = test.confidence_interval(LEVEL)
        row = {"mae": mae.mean(), "deviation": mae.std(), "seeds": len(mae), "anchor": mean}
        row |= {"anchor deviation": theirs.std(ddof=1), "difference": mae.mean() - mean}
        rows[split, state] = row | {"low": low, "high": high, "p": test.pvalue}
    return pd.DataFrame(rows).T.astype({"seeds": int})


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
    later = table["epoch"] >= table["halved"]
    phases = _PHASES | {"last": "after the first halving"}
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
    """Each seed's last ``epoch`` and its ``train`` and ``test`` error beside ``ANCHOR``."""
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
