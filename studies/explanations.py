"""Do massive activations attribute? Ratios beside established methods, and what removal does.

Bonds are removed from a graph in the order of an importance, and the network predicts the graph
that is left. If the importance is faithful, the prediction changes early when the most important
bonds go first (*descending*), and late when the least important ones do (*ascending*); a random
order lies between. Atoms stay. Such graphs are no molecules and unlike any graph of the training
set: a change is not only what the bond was worth, but also how strange the graph has become. That
holds for every order alike. Insertion curves pass through the same graphs backwards.

Source: Samek et al. 2017 (curves of removed parts), Petsiuk et al. 2018 (deletion, insertion);
differs: the change of a real-valued prediction in place of the probability of a class.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor, nn
from torch_geometric.data import Data
from tqdm import tqdm

from mapkg.evaluation import batches, predict
from mapkg.hooks import scan
from mapkg.interventions import intervene, summarise_interventions
from mapkg.measures import MASSIVE_RATIO
from mapkg.models.config import Config
from studies import checkpoint, tables
from studies.data import Splits
from studies.edge_scores import (
    METHODS,
    bond_importance,
    bond_of_edge,
    edge_importance,
    rank_correlation,
)
from studies.first_layer import distinct_edges

CONTROL = "random"
"""The method that the others are compared with."""

REFERENCE_GRAPHS = 2000
"""Training graphs over whose edges the mean of a channel is taken."""

RANDOM_ORDERS = 5
"""How many random orders the control is the mean of."""

ORDERS = ("descending", "ascending")
"""The most important bonds first, or last."""

FRACTIONS = tuple(step / 10 for step in range(11))
"""Which share of the bonds is removed."""


def explain_run(
    folder: Path | str,
    splits: Splits,
    *,
    graphs: int = 100,  # test graphs, the first ones
    resamples: int = 2000,  # of bootstraps
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """The tables of ``explain`` of a finished run on its first test graphs, and ``interventions``.

    Interventions are on the scores of all layers on all test graphs, see ``remove_massive``.
    Besides the methods there is ``frequency``, of ``type_frequency``.
    """
    model, information = checkpoint.load(Path(folder) / "best")
    explained = splits.test[:graphs]
    others = {"frequency": type_frequency(splits.train, explained)}
    found = explain(model, explained, others=others, resamples=resamples, progress=progress)
    found = {name: table.assign(layer=0) for name, table in found.items()}
    found["interventions"] = remove_massive(
        model,
        splits.test,
        splits.train[:REFERENCE_GRAPHS],
        loss=Config.from_dict(information["config"]).loss,
        resamples=resamples,
    )
    origin = {key: information[key] for key in ("seed", "dataset", "epoch", "versions", "commit")}
    origin["config"] = information["name"]
    return {name: table.assign(**origin) for name, table in found.items()}


def explain(
    model: nn.Module,
    graphs: Sequence[Data],
    *,
    methods: Sequence[str] = tuple(METHODS),
    others: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
    layer: int = 0,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """Compare the ratio with established attributions of edges, on one trained network.

    ``methods`` must have the ratio and the control; ``others`` are further importances by name, a
    tensor per graph with a number per edge. ``layer`` says whose ratio is meant.

    - ``correlation``: per method, Spearman's rank correlation with the ratio over the bonds of a
      molecule: the ``mean`` over molecules with its 95 % interval, and of how many of the
      ``graphs`` it is ``defined``;
    - ``curves``: per order, method and fraction of the bonds, ``change`` of the prediction and
      ``absolute_error``: means over molecules with 95 % intervals;
    - ``areas``: per order and method, the columns of ``compare``.
    """
    for needed in ("ratio", CONTROL):
        if needed not in methods:
            raise ValueError(f"methods: expected {needed!r} among them, got {', '.join(methods)}")
    scores = {
        method: edge_importance(model, graphs, method, layer=layer, seed=seed, progress=progress)
        for method in methods
        if method != CONTROL
    } | dict(others)
    controls = [
        edge_importance(model, graphs, CONTROL, seed=seed + draw, progress=False)
        for draw in range(RANDOM_ORDERS)
    ]
    correlation = []
    for method, values in {**scores, CONTROL: controls[0]}.items():
        if method != "ratio":
            found = rank_correlation(scores["ratio"], values, graphs)
            row = {"method": method, **_mean_with_interval(found, resamples, seed)}
            correlation.append(row | {"graphs": len(graphs)})
    curves, areas = [], []
    named = {**{method: [values] for method, values in scores.items()}, CONTROL: controls}
    for order in tqdm(ORDERS, "curves", file=sys.stderr, disable=not progress):
        found = {
            method: pd.concat([curve(model, graphs, draw, order=order) for draw in draws])
            for method, draws in named.items()
        }
        where = {"mode": "deletion", "order": order}
        areas.append(compare(found, resamples=resamples, seed=seed).assign(**where))
        curves += [
            _mean_curve(of_method, resamples, seed).assign(method=method, **where)
            for method, of_method in found.items()
        ]
    return {
        "correlation": pd.DataFrame(correlation),
        "curves": pd.concat(curves, ignore_index=True),
        "areas": pd.concat(areas, ignore_index=True),
    }


def curve(
    model: nn.Module,
    graphs: Sequence[Data],
    importance: Sequence[Float[Tensor, " _"]],
    *,
    order: str = "descending",
    fractions: Sequence[float | int] = FRACTIONS,
    seed: int = 0,
    batch_size: int = 128,
) -> pd.DataFrame:
    """What a network predicts while bonds, each with both directions, are removed in an order.

    ``importance`` has a number per edge of each graph; a bond has the larger one of its
    directions. Fractions of a graph's bonds are rounded to a whole number (a half to the even
    one); equally important bonds go in an order drawn from ``seed``.

    A row per ``graph`` and ``fraction``. Columns are ``bonds`` of the whole graph; how many are
    ``removed``; ``prediction``; ``change``, its distance from that of the whole graph; and
    ``absolute_error``, its distance from the target, NaN where there is none.
    """
    rng = np.random.default_rng(seed)
    rows, changed = [], []
    for index, (graph, of_graph) in enumerate(zip(graphs, importance, strict=True)):
        if of_graph.isnan().any():
            raise ValueError(
                f"graph {index}: expected an importance that can be ordered, got NaN; leave the "
                "graph out, or put such edges last with torch.nan_to_num"
            )
        bond = bond_of_edge(graph)
        values = bond_importance(graph, of_graph).numpy(force=True)
        by_importance = np.lexsort((rng.random(len(values)), -values))
        if order == "ascending":
            by_importance = by_importance[::-1]
        place = torch.from_numpy(by_importance.argsort())
        target = np.nan if graph.y is None else float(graph.y[0, 0])
        for fraction in fractions:
            removed = round(fraction * len(place))
            kept = (place >= removed)[bond]
            changed.append(_input(graph, kept))
            rows.append((index, float(fraction), len(place), removed, target))
    whole = [_input(graph, torch.ones(graph.num_edges, dtype=torch.bool)) for graph in graphs]
    passes = scan(model, batches(whole + changed, batch_size), "", forward=predict)
    predicted = torch.cat([seen[""][:, 0] for _, seen in passes]).double().numpy()
    prediction = predicted[len(graphs) :]
    table = pd.DataFrame(rows, columns=["graph", "fraction", "bonds", "removed", "y"])
    return table.drop(columns="y").assign(
        prediction=prediction,
        change=np.abs(prediction - predicted[table["graph"]]),
        absolute_error=np.abs(prediction - table["y"]),
    )


def _input(graph: Data, kept: Tensor) -> Data:
    """What a model is given of a graph, with some of its edges and all of its nodes."""
    return Data(x=graph.x, edge_index=graph.edge_index[:, kept], edge_attr=graph.edge_attr[kept])


def area(curves: pd.DataFrame, value: str = "change") -> pd.Series:
    """The area under each graph's curve, by the trapezium rule over the fractions.

    Several curves of a graph, as of several random orders, are averaged first.
    """
    table = curves.groupby(["graph", "fraction"])[value].mean().unstack("fraction")
    values = np.trapezoid(table, x=table.columns.to_numpy(float), axis=1)
    return pd.Series(values, table.index, name="area")


def compare(
    curves_by_method: Mapping[str, pd.DataFrame], *, resamples: int = 9999, seed: int = 0
) -> pd.DataFrame:
    """Mean areas of several orders, and how far each is from ``CONTROL`` on the same graphs.

    A row per ``method`` with the number of ``graphs``, and ``area`` and ``difference`` with
    ``_low`` and ``_high`` ends of 95 % intervals (percentile bootstrap over graphs).
    """
    areas = {method: area(curves) for method, curves in curves_by_method.items()}
    rows = []
    for method, of_graphs in areas.items():
        row = {"method": method, "graphs": len(of_graphs)}
        for name, values in (("area", of_graphs), ("difference", of_graphs - areas[CONTROL])):
            found = _mean_with_interval(values.to_numpy(), resamples, seed)
            row |= {name: found["mean"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
        rows.append(row)
    return pd.DataFrame(rows)


def type_frequency(train: Sequence[Data], graphs: Sequence[Data]) -> list[Float[Tensor, " edges"]]:
    """How many training edges have the types of each edge and of its two ends.

    What an edge's importance would be if it went by how common the edge is, without any network.
    """
    known, asked = distinct_edges(train), distinct_edges(graphs)
    keys = (
        list(zip(t.source.tolist(), t.target.tolist(), t.edge.tolist(), strict=True))
        for t in (known, asked)
    )
    counts = dict(zip(next(keys), known.count.tolist(), strict=True))
    of_triples = torch.tensor([float(counts.get(key, 0)) for key in next(keys)])
    return list(of_triples[asked.index].split([graph.num_edges for graph in graphs]))


def remove_massive(
    model: nn.Module,
    graphs: Sequence[Data],
    reference: Sequence[Data],
    *,
    threshold: float = MASSIVE_RATIO,
    loss: str = "l1",
    resamples: int = 2000,
) -> pd.DataFrame:
    """What becomes of predictions when massive scores are replaced in all layers.

    The channels' means over ``reference`` are one of the replacements; the columns are those of
    ``mapkg.interventions.summarise_interventions``.
    """
    settings = dict(layers="layers.*.score", threshold=threshold, loss=loss)
    table = intervene(model, graphs, reference=reference, **settings)
    return summarise_interventions(table, resamples=resamples)


def _mean_curve(curves: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Means over molecules at each fraction, several orders of one molecule averaged first."""
    rows = []
    for fraction, at in curves.groupby("fraction"):
        row = {"fraction": fraction}
        for value in ("change", "absolute_error"):
            of_graphs = at.groupby("graph")[value].mean().to_numpy()
            found = _mean_with_interval(of_graphs, resamples, seed)
            row |= {value: found["mean"]}
            row |= {f"{value}_{end}": found[end] for end in ("low", "high")}
        rows.append(row)
    return pd.DataFrame(rows)


def _mean_with_interval(
    values: Float[np.ndarray, " graphs"], resamples: int, seed: int
) -> dict[str, float]:
    """The mean of the finite values with a percentile bootstrap interval, NaN without two."""
    finite = values[np.isfinite(values)]
    row = {"mean": np.nan, "low": np.nan, "high": np.nan, "defined": len(finite)}
    if len(finite) < 2:
        return row
    interval = stats.bootstrap(
        (finite,),
        np.mean,
        n_resamples=resamples,
        method="percentile",
        batch=1000,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return row | {"mean": finite.mean(), "low": interval.low, "high": interval.high}


def read_explanations(folder: Path | str, runs: Mapping[str, str]) -> dict[str, pd.DataFrame]:
    """The tracked tables of several runs, from names of files to titles (``run``).

    For ``bond_types.by_label``, methods and what is changed are in a column ``label``, but in the
    curves, and the interval of a mean correlation in ``mean_low`` and ``mean_high``.
    """
    renamed = {"method": "label", "what": "label", "low": "mean_low", "high": "mean_high"}
    found = {
        name: tables.read(folder, "explain", runs, name)
        for name in ("correlation", "curves", "areas", "interventions")
    }
    return {
        name: table if name == "curves" else table.rename(columns=renamed)
        for name, table in found.items()
    }


def faithfulness(curves: pd.DataFrame, *, value: str = "change") -> sns.FacetGrid:
    """Means over molecules after each share of removed bonds, a line per method.

    Panels are runs and orders. The ratio is drawn thick and random orders dashed, both with
    their intervals.
    """
    methods = curves["method"].unique()
    colors = dict(zip(methods, sns.color_palette("colorblind", len(methods)), strict=True))
    colors[CONTROL] = "black"

    def draw(data: pd.DataFrame, **_: object) -> None:
        for method, line in data.groupby("method", sort=False):
            look = dict(color=colors[method], lw=2.6 if method == "ratio" else 1.3, label=method)
            look["ls"] = "--" if method == CONTROL else "-"
            plt.plot(line["fraction"], line[value], **look)
            if method in ("ratio", CONTROL):
                ends = line[f"{value}_low"], line[f"{value}_high"]
                plt.fill_between(line["fraction"], *ends, color=colors[method], alpha=0.15)

    aspect = 1.2 if curves["run"].nunique() > 1 else 2.0
    look = dict(row="order", col="run", height=2.5, aspect=aspect)
    grid = sns.FacetGrid(curves, **look).map_dataframe(draw)
    axis = {"change": "|change of prediction|", "absolute_error": "absolute error"}[value]
    grid.set_titles("{col_name}, {row_name}").set_axis_labels("share of bonds removed", axis)
    return grid.add_legend()
