"""Do massive activations attribute? Ratios beside established methods, and what removal does.

Each method gives one number per directed edge, the larger the more important:

- *ratio*: the largest activation ratio of the edge in one layer, the claim of the paper.
- *gradient x input* and *integrated gradients* (Captum) on the one-hot row of the edge's type,
  summed over its columns, from a baseline of zeros: an edge of no type that still counts in the
  softmax and brings its source's value.
- *edge mask*: Captum's integrated gradients on a factor on the messages of each edge, the same in
  all layers. Neither the attention's denominator nor GT's edge stream is masked.
- *GNNExplainer* (PyG): a mask on messages, learned so that the prediction stays as it is while
  few edges are kept. One seed is a noisy estimate.
- *AttentionExplainer* (PyG): the mean attention weight over layers and heads.
- *random*: uniform numbers, the control.

Deletion curves ask what none of them does, the prediction without the bond. If an importance is
faithful, the prediction changes early when the most important bonds go first (*descending*) and
late when they go last (*ascending*). Atoms stay: such graphs are no molecules, and a change is
also how strange the graph has become.

Source: Sundararajan et al. 2017 (integrated gradients), Shrikumar et al. 2016 (gradient x
input), Ying et al. 2019 (GNNExplainer), Samek et al. 2017 and Petsiuk et al. 2018 (curves);
differs: the change of a real-valued prediction in place of the probability of a class.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from warnings import warn

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from captum.attr import InputXGradient, IntegratedGradients
from jaxtyping import Float, Shaped
from scipy import stats
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.explain import AttentionExplainer, CaptumExplainer, Explainer, GNNExplainer
from torch_geometric.explain.algorithm.utils import clear_masks
from torch_geometric.utils import scatter
from tqdm import tqdm

from mapkg import hooks
from mapkg.evaluation import batches, predict
from mapkg.interventions import intervene, summarise_interventions
from mapkg.measures import activation_ratio
from mapkg.models.config import Config
from mapkg.models.network import TypeEmbedding
from mapkg.rows import default_names, edge_rows, with_loops_of_layers
from studies import checkpoint, tables
from studies.data import Splits, bond_of_edge
from studies.edge_kinds import type_frequency
from studies.published import known

CONTROL = "random"
"""The method that the others are compared with, the mean of five draws."""

FRACTIONS = tuple(step / 10 for step in range(11))


def edge_importance(
    model: nn.Module,
    graphs: Sequence[Data],
    method: str,
    *,
    layer: int = 0,
    names: str | Sequence[str] | None = None,
    target: int = 0,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> list[Float[Tensor, " _"]]:
    """Magnitudes of the importance of each directed edge to a prediction, a tensor per graph.

    The ratio, NaN where undefined, is that of the ``layer``-th of ``names``, by default those of
    ``report``. Where layers replace self-loops, a loop of the graph stands for that of its node.
    """
    method_of = known("method", method, METHODS)
    if getattr(model, "edge_factor", None) is not None:
        raise ValueError("expected attention over the data's edges, got full-graph attention")
    if method == "ratio":
        resolved = list(hooks.resolve(model, default_names(model) if names is None else names))
        if layer not in range(len(resolved)):
            raise ValueError(
                f"layer: expected 0 to {len(resolved) - 1}, for {', '.join(resolved)}; got {layer}"
            )
        method_of = partial(_ratio, name=resolved[layer])
    # On a copy: PyG's explainers leave attributes behind, and gradients in weights.
    network = deepcopy(model).eval().requires_grad_(False)
    if masked := sum(getattr(m, "_edge_mask", None) is not None for m in network.modules()):
        warn(f"an explainer left its edge mask in {masked} layers, ignored here", stacklevel=2)
        clear_masks(network)
    for module in network.modules():  # an empty place would cut the next mask off from its gradient
        if "_edge_mask" in module._parameters:
            del module._parameters["_edge_mask"]
            module._edge_mask = None
    size, parts = 1 if method == "GNNExplainer" else batch_size, []
    look = dict(total=-(-len(graphs) // size), delay=1, disable=not progress)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for batch in tqdm(batches(graphs, size), method, **look):
            whole, place = with_loops_of_layers(network, batch)
            # An explainer takes means over edges, which there must be.
            made = torch.empty(0)
            if batch.num_edges:
                made = method_of(OneTarget(network, target, whole))[place]
            parts.append(made.detach().abs())
    return list(torch.cat(parts).split([graph.num_edges for graph in graphs]))


class OneTarget(nn.Module):
    """One target of a network on a batch, called as PyG's explainers call a model."""

    def __init__(self, model: nn.Module, target: int, batch: Any) -> None:
        super().__init__()
        self.model, self.target, self.batch = model, target, batch

    def forward(self, *_: Tensor, **changes: Tensor) -> Float[Tensor, " graphs"]:
        """The predictions of that target, with other features of edges."""
        predicted = predict(self.model, copy(self.batch).update(changes))
        if len(predicted) != self.batch.num_graphs:
            raise ValueError(
                f"expected a prediction for each of {self.batch.num_graphs} graphs, got shape "
                f"{list(predicted.shape)}; pool the nodes of a graph in the model's forward"
            )
        return predicted.reshape(len(predicted), -1)[:, self.target]


def _ratio(network: OneTarget, name: str) -> Float[Tensor, " E"]:
    (module,) = hooks.resolve(network.model, name).values()
    ((_, seen),) = hooks.scan(network.model, [network.batch], name)
    return activation_ratio(edge_rows(name, module, seen[name], network.batch)).amax(dim=-1)


def _of_types(network: OneTarget, method: type, **settings: Any) -> Float[Tensor, " E"]:
    """A Captum method on the one-hot rows of edge types, summed over the columns."""
    embedding = getattr(network.model, "edge_embedding", None)
    types = network.batch.edge_attr
    if not isinstance(embedding, TypeEmbedding) or types is None or types.is_floating_point():
        got = None if types is None else f"{types.dtype}, {list(types.shape)}"
        raise ValueError(
            "expected edges with type ids and a network whose edge_embedding is a TypeEmbedding, "
            f"got edge_attr {got}; use a method that masks messages, as 'edge mask'"
        )
    columns = zip(types.reshape(len(types), -1).unbind(dim=1), embedding.sizes, strict=True)
    one_hot = torch.cat([nn.functional.one_hot(ids, size) for ids, size in columns], dim=1)

    def prediction(rows: Tensor) -> Tensor:
        # A network that ignores types has a gradient, too: of zero.
        return network(edge_attr=rows[0]) + 0 * rows.sum()

    # Captum takes the first dimension for that of its samples: the batch is one sample. The
    # gradient of the sum of predictions is each graph's own, since graphs share no edge.
    rows = one_hot.to(embedding.weight).unsqueeze(0).requires_grad_()
    return method(prediction).attribute(rows, **settings)[0].sum(dim=1).to(rows.dtype)


def _explained(network: OneTarget, algorithm: type, *settings: Any, **options: Any) -> Tensor:
    """The edge mask that an algorithm of PyG finds."""
    about = dict(mode="regression", task_level="graph", return_type="raw")
    about = dict(explanation_type="model", model_config=about, edge_mask_type="object")
    x = network.batch.x.reshape(network.batch.num_nodes, -1)  # GNNExplainer unpacks two axes
    explainer = Explainer(network, algorithm(*settings, **options), **about)
    return explainer(x, network.batch.edge_index).edge_mask


METHODS: dict[str, Callable[..., Tensor]] = {
    "ratio": _ratio,
    "gradient x input": partial(_of_types, method=InputXGradient),
    "integrated gradients": partial(_of_types, method=IntegratedGradients, internal_batch_size=1),
    "edge mask": lambda network: _explained(network, CaptumExplainer, IntegratedGradients),
    "GNNExplainer": partial(_explained, algorithm=GNNExplainer),
    "AttentionExplainer": partial(_explained, algorithm=AttentionExplainer, reduce="mean"),
    "random": lambda network: torch.rand(network.batch.num_edges),
}
"""The methods by name, functions of a ``OneTarget``; the ratio wants the name of its layer, too."""


def bond_importance(graph: Data, importance: Shaped[Tensor, " edges"]) -> Shaped[Tensor, " bonds"]:
    """The larger importance of a bond's two directions, in the order of ``bond_of_edge``."""
    return scatter(importance, bond_of_edge(graph), reduce="max")


def rank_correlation(
    a: Sequence[Float[Tensor, " _"]], b: Sequence[Float[Tensor, " _"]], graphs: Sequence[Data]
) -> Float[np.ndarray, " graphs"]:
    """Spearman's correlation over the bonds of each graph; NaN where a side does not order them."""
    correlation = np.full(len(graphs), np.nan)
    for index, (graph, *sides) in enumerate(zip(graphs, a, b, strict=True)):
        ranked = [bond_importance(graph, side) for side in sides]
        if all(len(side) and side.isfinite().all() and side.max() > side.min() for side in ranked):
            correlation[index] = stats.spearmanr(*ranked).statistic
    return correlation


def curve(
    model: nn.Module,
    graphs: Sequence[Data],
    importance: Sequence[Float[Tensor, " _"]],
    *,
    order: str = "descending",
    fractions: Sequence[float | int] = FRACTIONS,
) -> pd.DataFrame:
    """Predictions while fractions of bonds, halves to the even number, are removed in an order.

    Equally important bonds go in an order drawn at random. A row per ``graph`` and ``fraction``:
    ``bonds`` of the whole graph, how many are ``removed``, ``prediction``, its ``change`` from that
    of the whole graph, and ``absolute_error``.
    """
    rng, rows, left = np.random.default_rng(0), [], []
    for index, (graph, of_graph) in enumerate(zip(graphs, importance, strict=True)):
        if of_graph.isnan().any():
            raise ValueError(f"graph {index}: expected an importance without NaN; leave it out")
        values = bond_importance(graph, of_graph).numpy(force=True)
        by_importance = np.lexsort((rng.random(len(values)), -values))
        by_importance = by_importance[:: -1 if order == "ascending" else 1]
        place = torch.from_numpy(by_importance.argsort())[bond_of_edge(graph)]
        target = np.nan if graph.y is None else float(graph.y[0, 0])
        for fraction in fractions:
            removed = round(fraction * len(values))
            left.append(graph.edge_subgraph(place >= removed))
            rows.append((index, float(fraction), len(values), removed, target))
    passes = hooks.scan(model, batches([*graphs, *left], 128), "")
    predicted = torch.cat([seen[""][:, 0] for _, seen in passes]).double().numpy()
    whole, prediction = np.split(predicted, [len(graphs)])
    table = pd.DataFrame(rows, columns=["graph", "fraction", "bonds", "removed", "y"])
    change = np.abs(prediction - whole[table["graph"]])
    error = np.abs(prediction - table.pop("y"))
    return table.assign(prediction=prediction, change=change, absolute_error=error)


def compare(curves_by_method: Mapping[str, pd.DataFrame], *, resamples: int) -> pd.DataFrame:
    """Mean areas under the curves of changes and differences to ``CONTROL``, over graphs.

    Several curves of a graph, as of random orders, are averaged first.
    """
    areas = {}
    for method, curves in curves_by_method.items():
        table = curves.groupby(["graph", "fraction"])["change"].mean().unstack()
        areas[method] = np.trapezoid(table, x=table.columns.to_numpy(float), axis=1)
    return pd.DataFrame(
        {"method": method, "graphs": len(of_graphs)}
        | _mean("area", of_graphs, resamples)
        | _mean("difference", of_graphs - areas[CONTROL], resamples)
        for method, of_graphs in areas.items()
    )


def _mean(name: str, values: Any, resamples: int) -> dict[str, float]:
    """The mean of the finite values with a percentile bootstrap interval, NaN without two."""
    finite, ends = np.asarray(values)[np.isfinite(values)], [np.nan] * 3
    if len(finite) > 1:
        look = dict(n_resamples=resamples, method="percentile", batch=1000)
        drawn = stats.bootstrap((finite,), np.mean, rng=np.random.default_rng(0), **look)
        ends = [finite.mean(), *drawn.confidence_interval]
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def explain(
    model: nn.Module,
    graphs: Sequence[Data],
    *,
    methods: Sequence[str] = tuple(METHODS),
    others: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
    layer: int = 0,
    resamples: int = 2000,
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """Compare the ratio with other attributions of edges, ``others`` among them, on one network.

    ``methods`` must have the ratio and the control. ``correlation`` has means over molecules of
    ``rank_correlation`` with the ratio, and of how many of the ``graphs`` it is ``defined``;
    ``curves`` means of ``curve`` per order, method and fraction; ``areas`` is of ``compare``.
    """
    named = {
        method: [edge_importance(model, graphs, method, layer=layer, progress=progress)]
        for method in methods
        if method != CONTROL
    } | {method: [values] for method, values in others.items()}
    named[CONTROL] = [edge_importance(model, graphs, CONTROL, seed=draw) for draw in range(5)]
    correlation, curves, areas = [], [], []
    for method in [method for method in named if method != "ratio"]:
        of_graphs = rank_correlation(named["ratio"][0], named[method][0], graphs)
        about = {"defined": np.isfinite(of_graphs).sum(), "graphs": len(graphs)}
        correlation.append({"method": method} | _mean("mean", of_graphs, resamples) | about)
    for order in tqdm(("descending", "ascending"), "curves", disable=not progress):
        drawn = {
            method: pd.concat([curve(model, graphs, draw, order=order) for draw in draws])
            for method, draws in named.items()
        }
        where = {"mode": "deletion", "order": order}
        areas.append(compare(drawn, resamples=resamples).assign(**where))
        for method, of_method in drawn.items():
            of_graphs = of_method.groupby(["fraction", "graph"]).mean()
            for fraction, at in of_graphs.groupby("fraction"):
                means = (_mean(n, at[n], resamples) for n in ("change", "absolute_error"))
                about = {"method": method, **where}
                curves.append({"fraction": fraction} | next(means) | next(means) | about)
    named_ends = {"mean_low": "low", "mean_high": "high"}
    made = {"correlation": pd.DataFrame(correlation).rename(columns=named_ends)}
    return made | {"curves": pd.DataFrame(curves), "areas": pd.concat(areas, ignore_index=True)}


def explain_run(
    folder: Path | str,
    splits: Splits,
    *,
    graphs: int = 100,  # test graphs, the first ones
    resamples: int = 2000,  # of bootstraps
) -> dict[str, pd.DataFrame]:
    """The tables of ``explain`` of a run, with ``type_frequency``, and ``interventions``."""
    model, information = checkpoint.load(Path(folder) / "best", dataset=splits.description.title)
    explained = splits.test[:graphs]
    others = {"frequency": type_frequency(splits.train, explained)}
    made = explain(model, explained, others=others, resamples=resamples)
    made = {name: table.assign(layer=0) for name, table in made.items()}
    loss = Config.from_dict(information["config"]).loss
    replaced = intervene(model, splits.test, reference=splits.train[:2000], loss=loss)
    made["interventions"] = summarise_interventions(replaced, resamples=resamples)
    origin = {key: information[key] for key in ("seed", "dataset", "epoch", "versions", "commit")}
    return {n: table.assign(**origin, config=information["name"]) for n, table in made.items()}


def read_explanations(folder: Path | str, runs: Mapping[str, str]) -> dict[str, pd.DataFrame]:
    """The tracked tables of several runs, as ``bond_types.by_label`` takes them, but the curves."""
    renamed = {"method": "label", "what": "label", "low": "mean_low", "high": "mean_high"}
    names = ("correlation", "areas", "interventions")
    made = {name: tables.read(folder, "explain", runs, name) for name in (*names, "curves")}
    return made | {name: made[name].rename(columns=renamed) for name in names}


def faithfulness(curves: pd.DataFrame) -> sns.FacetGrid:
    """Means after each share of removed bonds; the ratio and random orders with intervals."""
    # The median of a value and the ends of its interval is the value.
    both = curves[curves["method"].isin(["ratio", CONTROL])]
    ends = [both.assign(change=both[f"change_{end}"]) for end in ("low", "high")]
    methods = curves["method"].unique()
    colors = dict(zip(methods, sns.color_palette("colorblind", len(methods)), strict=True))
    look = dict(palette=colors | {CONTROL: "black"}, height=2.5, row="order", col="run")
    look["sizes"] = {method: 2.6 if method == "ratio" else 1.3 for method in methods}
    look["dashes"] = {method: (4, 2) if method == CONTROL else "" for method in methods}
    look |= dict.fromkeys(("hue", "size", "style"), "method")
    look |= dict(estimator="median", errorbar=("pi", 100))
    grid = sns.relplot(pd.concat([curves, *ends]), kind="line", x="fraction", y="change", **look)
    grid.set_axis_labels("share of bonds removed", "|change of prediction|")
    return grid.set_titles("{col_name}, {row_name}")
