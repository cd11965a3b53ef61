"""Trained networks among two hundred untrained ones, by every measure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch_geometric.data import Data
from tqdm import tqdm

from mapkg import hooks
from mapkg.all_measures import SUN_MAGNITUDE, row_measures
from mapkg.evaluation import batches, calibrate_batch_norm
from mapkg.measures import LOG_EPS, MASSIVE_RATIO
from mapkg.models.config import Config
from mapkg.models.network import looked_at
from mapkg.models.pyg_layers import recorded_rows
from mapkg.nulls import p_value
from studies.data import Splits
from studies.emergence import fit_to_data
from studies.extras import build
from studies.figures import legend_once, panels
from studies.files import commit, versions
from studies.results import ORIGIN, Emergence, read_emergence, read_network, with_spread
from studies.statistics import hierarchical_bootstrap
from studies.train import seed_all

MEASURES = {
    "row": "row ratio",
    "layer": "layer ratio",
    "sun": "Sun's rule",
    "spread": "spread",
    "isolation": "isolation",
    "largest": "largest |s|",
}
"""Measures of a network, each its maximum over layers. For the layer's median stands the typical
median of a row. Sun's rule is met where the lesser of |s| / 100 and layer ratio / 1000 is above 1.
Isolation is the median over rows of largest over second largest. ``row_spread``, beside the spread
of ln r over all entries, is the mean of the spreads of rows."""

BARS = {"row": MASSIVE_RATIO, "layer": MASSIVE_RATIO, "sun": 1.0}
"""Above which a network is massive, of the measures that have such a bar."""


def measured(
    config: Config,
    splits: Splits,
    seeds: Sequence[int],
    *,
    graphs: int = 128,
    name: str = "custom",
    progress: bool = True,
) -> pd.DataFrame:
    """``MEASURES`` of untrained networks on the first test graphs, a row per seed.

    BatchNorm has the statistics of as many training graphs.
    """
    config, rows = fit_to_data(config, splits.description), []
    for seed in tqdm(seeds, name, disable=not progress):
        seed_all(seed)
        model = calibrate_batch_norm(build(config).eval(), splits.train[:graphs])
        rows.append({"seed": seed, **_of_network(model, config, splits.test[:graphs])})
    origin = {"config": name, "dataset": splits.description.title, "graphs": graphs}
    return pd.DataFrame(rows).assign(**origin, versions=versions(), commit=commit())


def measured_run(
    folder: Path | str,
    splits: Splits,
    *,
    graphs: int = 128,  # the first of the test split, which are looked at once more
) -> dict[str, pd.DataFrame]:
    """A finished run by every measure: its ``layers``, and its best weights as a ``network``.

    A row of ``layers`` is a layer untrained, with BatchNorm calibrated, or at its best epoch: its
    statistics on the test split, and its spread of ln r over all entries. A row of ``network`` is
    what ``measured`` gives of an untrained one.
    """
    run = read_emergence(folder)
    alone = {name: getattr(run, name).assign(run="") for name in ("summary", "histogram")}
    layers = with_spread(replace(run, **alone))
    layers = layers[layers["state"].isin(("base", "base_calibrated", "best"))]
    metrics = [name for name in layers if name.startswith("test_")]
    columns = ["seed", "layer", "state", "max_ratio", "max_abs", "row_median_q50", "spread"]
    layers = layers[[*columns, *metrics, "best_epoch", *ORIGIN]]
    model, config, origin = read_network(folder, splits)
    network = pd.DataFrame([_of_network(model, config, splits.test[:graphs])])
    return {"layers": layers, "network": network.assign(graphs=graphs, **origin)}


def _of_network(model: nn.Module, config: Config, graphs: Sequence[Data]) -> pd.Series:
    """``MEASURES`` of a network on graphs that are passed through it at once."""
    modules = hooks.resolve(model, names := looked_at(config.architecture))
    ((batch, seen),) = hooks.scan(model, batches(graphs, len(graphs)), names)
    rows = [recorded_rows(modules[name], seen[name], batch.batch) for name in seen]
    return pd.DataFrame([_of_layer(score) for score in rows]).max()


def _of_layer(score: Tensor) -> dict[str, float]:
    rows = row_measures(score)
    largest, median = rows["largest"].max().item(), rows["median"].median().item()
    ratio = score.abs() / rows["median"].unsqueeze(-1)
    return {
        "row": rows["ratio"].max().item(),
        "layer": largest / median,
        "sun": min(largest / SUN_MAGNITUDE, largest / median / MASSIVE_RATIO),
        "spread": ratio.add(LOG_EPS).log().std().item(),
        "row_spread": rows["spread"].mean().item(),
        "isolation": rows["max_over_second"].median().item(),
        "largest": largest,
    }


def of_trained(runs: Emergence, graphs: int = 128) -> pd.DataFrame:
    """``MEASURES`` but isolation of trained networks, from their tables, a row per run and seed.

    The row ratio is of the first test graphs, as that of ``measured``; of |s|, and so of the layer
    ratio and Sun's rule, the tables hold the largest of the whole test split alone.
    """
    keys, maxima = ["run", "seed", "layer"], runs.graph_maxima
    maxima = maxima[maxima["state"] == "best"].groupby(keys).head(graphs)
    layers = with_spread(runs).query("state == 'best'").set_index(keys)
    row = maxima.groupby(keys)["max_ratio"].max()
    return by_network(layers.reset_index(), row=row, spread=layers["spread"])


def of_further(layers: pd.DataFrame, networks: pd.DataFrame) -> pd.DataFrame:
    """The same, and isolation, of the tables that ``measured_run`` made.

    They also hold |s| of the first graphs alone, but ``of_trained`` has that of the whole split.
    """
    best = layers[layers["state"] == "best"]
    spread = best.set_index(["run", "seed", "layer"])["spread"]
    return by_network(best, spread=spread).merge(networks[["run", "seed", "row", "isolation"]])


def by_network(layers: pd.DataFrame, **more: pd.Series) -> pd.DataFrame:
    """Maxima over layers of ``more``, and of what follows from |s| and the typical median."""
    layers = layers.set_index(["run", "seed", "layer"])
    largest, layer = layers["max_abs"], layers["max_abs"] / layers["row_median_q50"]
    sun = np.minimum(largest / SUN_MAGNITUDE, layer / MASSIVE_RATIO)
    table = pd.DataFrame({"largest": largest, "layer": layer, "sun": sun, **more})
    return table.groupby(["run", "seed"]).max().reset_index()


def among(trained: pd.DataFrame, null: pd.DataFrame) -> pd.DataFrame:
    """Each trained network's place among the untrained ones of its run, by every measure of both.

    ``p`` is the p-value by rank, combined over layers since each measure is a maximum over layers.
    ``above`` is the share of untrained networks below; its mean is the area under the ROC curve.
    """
    rows = []
    for (run, seed), network in trained.groupby(["run", "seed"]):
        others = null[null["run"] == run]
        for name in [name for name in MEASURES if name in trained and name in others]:
            value, chance = network[name].item(), others[name].to_numpy()
            if np.isnan(value):
                continue
            above = (chance < value).mean() + (chance == value).mean() / 2
            p = float(p_value(value, chance))
            rows.append((run, seed, MEASURES[name], value, above, p))
    return pd.DataFrame(rows, columns=["run", "seed", "measure", "value", "above", "p"])


def of_converged(table: pd.DataFrame) -> pd.DataFrame:
    """``MEASURES`` of GT on ZINC at the end of its schedule; ``spread`` is the mean of rows."""
    last = table[table["state"] == "last"].assign(run="gt_zinc")
    names = dict(row="max_ratio", spread="spread_mean", isolation="max_over_second_q50")
    by_layer = last.set_index(["run", "seed", "layer"])
    return by_network(last, **{name: by_layer[column] for name, column in names.items()})


def areas(places: pd.DataFrame, trained: pd.DataFrame, null: pd.DataFrame) -> pd.DataFrame:
    """Areas under the ROC curves, with intervals over pairs and seeds, and what passes ``BARS``.

    ``beyond`` counts trained networks above all untrained ones of their run.
    """
    rows = {}
    for name, title in MEASURES.items():
        if len(part := places[places["measure"] == title]):
            ends = hierarchical_bootstrap(part, "above", ["run", "seed"])
            row = dict(zip(("area", "low", "high"), ends, strict=True))
            row |= {"networks": len(part), "beyond": int((part["above"] == 1).sum())}
            if name in BARS:
                passed = {"trained": trained[name], "untrained": null[name]}
                row |= {key: (value > BARS[name]).mean() for key, value in passed.items()}
            rows[title] = row
    return pd.DataFrame(rows).T


def area_table(places: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The areas alone, a row for each title and a column per measure, and numbers of networks."""
    rows = {}
    for title, place in places.items():
        networks = place[["run", "seed"]].drop_duplicates()
        rows[title] = {"networks": len(networks)} | {
            measure: part.groupby("run")["above"].mean().mean()
            for measure, part in place.groupby("measure")
        }
    return pd.DataFrame(rows).T.reindex(columns=["networks", *MEASURES.values()])


def draw_roc(places: Mapping[str, pd.DataFrame]) -> Figure:
    """ROC curves of every measure, a panel for each title.

    Across is the share of untrained networks that are taken for trained ones, up the share of
    trained ones that are found by the same bar; the bar is a run's own.
    """
    figure, axes = panels(len(places), 3, (2.9, 2.5), sharey=True)
    for ax, (title, place) in zip(axes, places.items(), strict=True):
        for measure, of_measure in place.groupby("measure", sort=False):
            p = np.sort(of_measure["p"])
            across, up = [p.min() / 2, *p, 1], [0, *np.arange(1, len(p) + 1) / len(p), 1]
            look = dict(where="post", color=f"C{list(MEASURES.values()).index(measure)}")
            ax.step(across, up, **look, label=measure)
        coin = np.geomspace(place["p"].min() / 2, 1)
        ax.plot(coin, coin, "k:", lw=1)
        ax.set_title(title, fontsize="small")
        ax.set(xscale="log", ylim=(-0.02, 1.02))
    figure.supxlabel("untrained networks above the bar, share", fontsize="medium")
    figure.supylabel("trained networks above it, share", fontsize="medium")
    legend_once(figure, loc="outside right center")
    return figure
