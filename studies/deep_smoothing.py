"""Forward and backward smoothing in deep attention, and which remedy acts on which."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import pandas as pd
import torch
from torch import nn
from torch_geometric.data import Data
from torch_geometric.transforms import LargestConnectedComponents
from tqdm import tqdm

from mapkg.oversmoothing import smoothing_by_layer, uniform_attention_limits
from studies.data import Description, NodesOfGraph, Splits
from studies.data.regular import regular_task
from studies.deep import gradient_norms
from studies.depth import Variant
from studies.provenance import commit, versions
from studies.schedule import Schedule
from studies.tasks import NodeTask
from studies.train import fit

_PLAIN = Variant(dropout=0.0, attention_dropout=0.0)
REMEDIES = {
    "no remedy": _PLAIN,
    "PairNorm": replace(_PLAIN, norm="pair"),
    "LayerNorm": replace(_PLAIN, norm="layer"),
    "LipschitzNorm": replace(_PLAIN, norm="lipschitz"),
    "residual": replace(_PLAIN, residual=True),
}
"""Deep GATs without dropout, which the theory of smoothing does not have."""


KEYS = ["dataset", "num_layers", "state", "variant", "seed"]
"""What tells networks apart in tables of ``deep_smoothing``."""

CLASSES = 4
"""Of the nodes of ``regular_splits``."""


def regular_splits(num_nodes: int = 200, degree: int = 20, *, seed: int = 0) -> Splits:
    """The regular graph of the theory as a classification of its nodes, in double precision.

    Args:
        num_nodes, degree, seed: as for ``data.regular.regular_task``.

    Returns:
        All nodes are there to train on. Their classes, ``CLASSES`` of equal size, are the quantiles
        of that task's target.
    """
    task = regular_task(num_nodes, degree, seed=seed)
    target = task.y.flatten()
    bounds = torch.quantile(target, torch.arange(1, CLASSES).to(target) / CLASSES)
    edges = (task.operator - torch.diag(task.operator.diag())).nonzero().t().contiguous()
    graph = Data(x=task.x, edge_index=edges, y=torch.bucketize(target, bounds))
    nodes = torch.arange(num_nodes)
    about = Description(
        name="regular",
        title=f"{degree}-regular",
        task="node classification",
        target="quantile of a projection of averaged features",
        num_node_types=None,
        num_edge_types=None,
        num_targets=CLASSES,
        source="drawn at random",
        licence="none needed",
    )
    none = NodesOfGraph(graph, nodes[:0])
    return Splits(NodesOfGraph(graph, nodes), none, none, about)


def largest_component(splits: Splits) -> Splits:
    """The largest connected part of a graph, with what is in it of each split.

    Features of different parts never meet, so smoothing is a matter of each part by itself.

    Args:
        splits: of ``NodesOfGraph``, on one graph.
    """
    graph = splits.train.graph.clone()
    graph.kept = torch.arange(graph.num_nodes)
    part = LargestConnectedComponents(connection="strong")(graph)
    place = torch.full((graph.num_nodes,), -1)
    place[part.kept] = torch.arange(part.num_nodes)
    parts = {}
    for name in ("train", "val", "test"):
        nodes = place[getattr(splits, name).nodes]
        parts[name] = NodesOfGraph(part, nodes[nodes >= 0])
    about = replace(splits.description, title=f"{splits.description.title}, largest component")
    return Splits(**parts, description=about)


def deep_smoothing(
    splits: Splits,
    variants: Mapping[str, Variant] = REMEDIES,
    *,
    num_layers: int = 16,
    seeds: Sequence[int] = (0, 1, 2),
    schedule: Schedule | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Smoothness of features and errors in every layer of deep networks, before and after training.

    Measured in evaluation mode, without dropout, with the loss over the training nodes. Where
    features are alike, attention weighs neighbours alike, and errors are drawn to the degrees, the
    direction of ``errors``; where they are not, no direction is known, and ``errors_rank_one``
    takes the best.

    Args:
        splits: of ``NodesOfGraph``; its largest component is taken.
        variants: networks by name.
        num_layers: L.
        seeds: of weights and dropout.
        schedule: of training; None means 100 epochs at a constant rate.
        progress: whether to show a progress bar on stderr.

    Returns:
        The rows of ``smoothing.smoothing_by_layer`` with ``variant``, ``num_layers``, ``seed``,
        ``state`` (``untrained`` or ``trained``), ``gradient`` (of a layer's weights), ``loss``, the
        data set, the ``contraction`` of uniform attention on it, and the origin.

    Source: ours; it joins the LipschitzNorm and the backward-oversmoothing paper.
    """
    schedule = Schedule(epochs=100, lr_patience=None) if schedule is None else schedule
    splits = largest_component(splits)
    graph, train = splits.train.graph, splits.train.nodes
    limits = uniform_attention_limits(graph.edge_index, graph.num_nodes)
    origin = {"dataset": splits.description.title, "versions": versions(), "commit": commit()}
    origin |= {"num_layers": num_layers, "contraction": limits.contraction}
    tables = []
    pairs = list(product(variants.items(), seeds))
    for (name, variant), seed in tqdm(pairs, "networks", file=sys.stderr, disable=not progress):
        network = variant.build(num_layers, splits, seed).to(graph.x.dtype)
        for state in ("untrained", "trained"):
            if state == "trained":
                task = NodeTask(splits, evaluate=False)
                fit(network, task, schedule, seed=seed, progress=False)
            network.eval()

            def loss(network: nn.Module = network) -> torch.Tensor:
                scores = network(graph.x, graph.edge_index)[train]
                return nn.functional.cross_entropy(scores, graph.y[train])

            table = smoothing_by_layer(network, loss, "layers.*", errors_direction=limits.errors)
            network.zero_grad()
            value = loss()
            value.backward()
            table["gradient"] = gradient_norms(network)["weights"]
            about = {"variant": name, "seed": seed, "state": state, "loss": value.item()}
            about |= {"epochs": schedule.epochs * (state == "trained")}
            tables.append(table.assign(**about, **origin))
    return pd.concat(tables, ignore_index=True)


def smoothing_table(found: pd.DataFrame) -> pd.DataFrame:
    """Which remedy keeps features apart, which errors, and which network learns.

    Args:
        found: of ``deep_smoothing``.

    Returns:
        A row per data set, ``num_layers``, ``state``, ``variant`` and ``seed``. ``features`` is the
        relative spread in the last layer, ``errors`` the least one of errors in any layer,
        ``errors_rank_one`` their least distance from rank one, ``gradient`` the norm of the
        gradient of all layers' weights, and ``loss`` the training loss.
    """
    rows = []
    for keys, layers in found.groupby(KEYS, sort=False):
        row = dict(zip(KEYS, keys, strict=True))
        row["features"] = layers.loc[layers["layer"].idxmax(), "features"]
        row |= {kind: layers[kind].min() for kind in ("errors", "errors_rank_one")}
        row["gradient"] = layers["gradient"].pow(2).sum() ** 0.5
        rows.append(row | {"loss": layers["loss"].iloc[0]})
    return pd.DataFrame(rows)


def remedy_table(found: pd.DataFrame) -> pd.DataFrame:
    """``smoothing_table`` over seeds, as text: from the least to the greatest.

    Args:
        found: of ``deep_smoothing``.

    Returns:
        A row per data set, ``num_layers``, ``state`` and ``variant``, with ``features``,
        ``errors``, ``rank one``, ``gradient`` and ``loss``.
    """
    by_seed = smoothing_table(found).groupby([key for key in KEYS if key != "seed"], sort=False)
    quantities = ["features", "errors", "errors_rank_one", "gradient", "loss"]
    table = by_seed[quantities].agg(_range).reset_index()
    return table.rename(columns={"errors_rank_one": "rank one"})


def _range(values: pd.Series) -> str:
    low, high = _short(values.min()), _short(values.max())
    return low if low == high else f"{low}..{high}"


def _short(value: float) -> str:
    if 0 < value < 0.01:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
