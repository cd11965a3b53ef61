"""Deletion and insertion curves: whether bonds called important are those that matter.

Bonds are removed from a graph in the order of an importance, and the network predicts the graph
that is left. If the importance is faithful, the prediction changes early when the most important
bonds go first, and late when the least important ones do; a random order lies between.

Atoms stay, so that a graph without bonds is a set of atoms. Such graphs are no molecules and
unlike any graph of the training set: a change of the prediction is not only what the bond was
worth, but also how strange the graph has become. That holds for every order alike.

The two modes show the same graphs: what is left when the least important bonds are removed is
what is there when the most important ones are added. So the insertion curve of an order is the
deletion curve of its reverse, read from its end.

Source: Samek et al. 2017 (curves of removed parts), Petsiuk et al. 2018 (deletion, insertion);
differs: the change of a real-valued prediction in place of the probability of a class.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor, nn
from torch_geometric.data import Data

from mapkg.evaluation import batches, predict
from mapkg.hooks import scan
from studies.edge_scores import bond_importance, bond_of_edge

MODES = ("deletion", "insertion")
"""Bonds removed from the whole graph, or put back into the graph without any."""

ORDERS = ("descending", "ascending")
"""The most important bonds first, or last."""

FRACTIONS = tuple(step / 10 for step in range(11))
"""Which share of the bonds is removed or put back."""


def curve(
    model: nn.Module,
    graphs: Sequence[Data],
    importance: Sequence[Float[Tensor, " _"]],
    *,
    mode: str = "deletion",
    order: str = "descending",
    fractions: Sequence[float | int] = FRACTIONS,
    target: int = 0,
    seed: int = 0,
    batch_size: int = 128,
) -> pd.DataFrame:
    """What a network predicts while bonds are removed, or put back, in an order.

    A bond goes whole, with both directions.

    Args:
        model: a network with a prediction per graph; in evaluation mode here.
        graphs: the graphs.
        importance: of each graph, a number per edge, as ``edge_importance`` gives it; a bond
            has the larger one of its directions.
        mode: ``"deletion"`` removes the first bonds of the order from the whole graph,
            ``"insertion"`` adds them to the graph without bonds.
        order: ``"descending"`` has the most important bonds first; ``"ascending"`` is its
            reverse.
        fractions: shares in [0, 1] of a graph's bonds, rounded to a whole number of them (a
            half to the even one).
        target: which of several targets.
        seed: of the order of equally important bonds.
        batch_size: graphs per forward pass; the result does not depend on it.

    Returns:
        A row per graph and fraction. Columns are
        ``graph``, its place among the graphs; ``fraction``;
        ``bonds``, how many the whole graph has; ``removed``, how many of them are not there;
        ``prediction``; ``change``, its distance from the prediction of the whole graph; and
        ``absolute_error``, its distance from the target, NaN where there is none.

    Raises:
        ValueError: if the mode or the order is unknown, there is no graph or fraction, a
            fraction is outside [0, 1], or an importance has another length or a NaN.
    """
    _check(graphs, importance, mode, order, fractions)
    rng = np.random.default_rng(seed)
    whole = [_with_edges(graph, torch.ones(graph.num_edges, dtype=torch.bool)) for graph in graphs]
    rows, changed = [], []
    for index, (graph, of_graph) in enumerate(zip(graphs, importance, strict=True)):
        bond = bond_of_edge(graph)
        place = _places(bond_importance(graph, of_graph), order, rng)
        for fraction in fractions:
            first = place < round(fraction * len(place))
            kept = first if mode == "insertion" else ~first
            changed.append(_with_edges(graph, kept[bond]))
            removed = int((~kept).sum())
            rows.append((index, float(fraction), len(place), removed, _target(graph, target)))
    predicted = _predictions(model, whole + changed, target, batch_size)
    prediction = predicted[len(graphs) :]
    table = pd.DataFrame(rows, columns=["graph", "fraction", "bonds", "removed", "y"])
    return table.drop(columns="y").assign(
        prediction=prediction,
        change=np.abs(prediction - predicted[table["graph"]]),
        absolute_error=np.abs(prediction - table["y"]),
    )


def area(curves: pd.DataFrame, value: str = "change") -> pd.Series:
    """The area under each graph's curve, by the trapezium rule over the fractions.

    Args:
        curves: as ``curve`` gives it. Several rows of a graph and fraction, as of several random
            orders one below another, are averaged first.
        value: the column that is integrated, ``"change"`` or ``"absolute_error"``.

    Returns:
        A number per graph, indexed by ``graph``; over the fractions 0 to 1 it is the mean value.

    Raises:
        ValueError: if there are fewer than two fractions, or not the same ones for each graph.
    """
    means = curves.groupby(["graph", "fraction"])[value].mean()
    table = means.unstack("fraction")
    if table.shape[1] < 2 or len(means) != table.size:
        raise ValueError(
            "expected two fractions or more, the same ones for each graph, got "
            f"{len(means)} different rows of {len(table)} graphs and {table.shape[1]} fractions"
        )
    return pd.Series(
        np.trapezoid(table, x=table.columns.to_numpy(float), axis=1), table.index, name="area"
    )


def compare(
    curves_by_method: Mapping[str, pd.DataFrame],
    *,
    control: str = "random",
    value: str = "change",
    resamples: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean areas of several orders, and how far each is from a control.

    Args:
        curves_by_method: from a name to curves of the same graphs, as ``curve`` gives them; one
            of them is the control.
        control: its name.
        value: the column whose area is taken.
        resamples: bootstrap resamples of graphs.
        seed: of the bootstrap.

    Returns:
        A row per method. Columns are
        ``method``, ``graphs`` (their number), ``area``, the mean over graphs,
        ``difference``, the mean of the area less the control's on the same graph, each with
        ``_low`` and ``_high`` ends of its 95 % interval (percentile bootstrap over graphs).

    Raises:
        ValueError: if the control is missing, the graphs are not the same or fewer than two.
    """
    if control not in curves_by_method:
        raise ValueError(
            f"expected curves of the control {control!r} among the methods, got "
            f"{', '.join(map(repr, curves_by_method))}"
        )
    areas = {method: area(curves, value) for method, curves in curves_by_method.items()}
    reference = areas[control]
    if len(reference) < 2:
        raise ValueError(f"expected curves of at least two graphs, got {len(reference)}")
    rows = []
    for method, of_graphs in areas.items():
        if not of_graphs.index.equals(reference.index):
            raise ValueError(f"{method!r} and {control!r}: expected curves of the same graphs")
        values = np.stack([of_graphs, of_graphs - reference])
        interval = stats.bootstrap(
            (values,),
            np.mean,
            axis=-1,
            n_resamples=resamples,
            method="percentile",
            batch=1000,
            rng=np.random.default_rng(seed),
        ).confidence_interval
        row = {"method": method, "graphs": len(reference)}
        for index, name in enumerate(("area", "difference")):
            row |= {
                name: values[index].mean(),
                f"{name}_low": interval.low[index],
                f"{name}_high": interval.high[index],
            }
        rows.append(row)
    return pd.DataFrame(rows)


def _check(
    graphs: Sequence[Data],
    importance: Sequence[Tensor],
    mode: str,
    order: str,
    fractions: Sequence[float | int],
) -> None:
    for name, given, known in (("mode", mode, MODES), ("order", order, ORDERS)):
        if given not in known:
            raise ValueError(f"{name}: expected one of {known}, got {given!r}")
    if len(graphs) == 0 or len(importance) != len(graphs):
        raise ValueError(
            "expected at least one graph and an importance for each, got "
            f"{len(graphs)} graphs and {len(importance)} importances"
        )
    if len(fractions) == 0 or not all(0 <= fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions: expected shares in [0, 1], got {tuple(fractions)}")
    for index, of_graph in enumerate(importance):
        if of_graph.isnan().any():
            raise ValueError(
                f"graph {index}: expected an importance that can be ordered, got NaN; leave the "
                "graph out, or put such edges last with torch.nan_to_num"
            )


def _places(
    importance: Float[Tensor, " bonds"], order: str, rng: np.random.Generator
) -> Int[Tensor, " bonds"]:
    """The place of each bond in the order, from 0; ties at random."""
    values = importance.numpy(force=True)
    by_importance = np.lexsort((rng.random(len(values)), -values))
    if order == "ascending":
        by_importance = by_importance[::-1]
    return torch.from_numpy(by_importance.argsort())


def _with_edges(graph: Data, kept: Bool[Tensor, " edges"]) -> Data:
    """The graph with some of its edges and all of its nodes; only what a model is given."""
    return Data(x=graph.x, edge_index=graph.edge_index[:, kept], edge_attr=graph.edge_attr[kept])


def _target(graph: Data, target: int) -> float:
    return float("nan") if graph.y is None else float(graph.y[0, target])


def _predictions(
    model: nn.Module, graphs: Sequence[Data], target: int, batch_size: int
) -> Float[np.ndarray, " graphs"]:
    passes = scan(model, batches(graphs, batch_size), "", forward=predict)
    return torch.cat([seen[""][:, target] for _, seen in passes]).double().numpy()
