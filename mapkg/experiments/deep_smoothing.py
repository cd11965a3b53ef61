"""Forward and backward smoothing in deep attention, and which remedy acts on which."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import pandas as pd
import torch
from torch import nn
from torch_geometric.transforms import LargestConnectedComponents
from tqdm import tqdm

from mapkg.data import NodesOfGraph, Splits
from mapkg.experiments.depth import Variant
from mapkg.models.deep import gradient_norms
from mapkg.provenance import commit, versions
from mapkg.smoothing import smoothing_by_layer
from mapkg.train_nodes import Schedule, fit_nodes

_PLAIN = Variant(dropout=0.0, attention_dropout=0.0)
REMEDIES = {
    "no remedy": _PLAIN,
    "PairNorm": replace(_PLAIN, norm="pair"),
    "LayerNorm": replace(_PLAIN, norm="layer"),
    "LipschitzNorm": replace(_PLAIN, norm="lipschitz"),
    "residual": replace(_PLAIN, residual=True),
}
"""Deep GATs without dropout, which the theory of smoothing does not have."""


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

    Measured in evaluation mode, without dropout, with the loss over the training nodes. Attention
    weighs neighbours by their features, so that no direction is known to which errors are drawn:
    ``errors_rank_one`` takes the best.

    Args:
        splits: of ``NodesOfGraph``; its largest component is taken.
        variants: networks by name.
        num_layers: L.
        seeds: of weights and dropout.
        schedule: of training; None means 100 epochs at a constant rate.
        progress: whether to show a progress bar on stderr.

    Returns:
        The rows of ``smoothing.smoothing_by_layer`` with ``variant``, ``seed``, ``state``
        (``untrained`` or ``trained``), ``gradient`` (of a layer's weights), ``loss``, the data set
        and the origin.

    Source: ours; it joins the LipschitzNorm and the backward-oversmoothing paper.
    """
    schedule = Schedule(epochs=100, lr_patience=None) if schedule is None else schedule
    splits = largest_component(splits)
    graph, train = splits.train.graph, splits.train.nodes
    origin = {"dataset": splits.description.title, "versions": versions(), "commit": commit()}
    tables = []
    pairs = list(product(variants.items(), seeds))
    for (name, variant), seed in tqdm(pairs, "networks", file=sys.stderr, disable=not progress):
        network = variant.build(num_layers, splits, seed)
        for state in ("untrained", "trained"):
            if state == "trained":
                fit_nodes(network, splits, schedule, seed=seed, evaluate=False, progress=False)
            network.eval()

            def loss(network: nn.Module = network) -> torch.Tensor:
                scores = network(graph.x, graph.edge_index)[train]
                return nn.functional.cross_entropy(scores, graph.y[train])

            table = smoothing_by_layer(network, loss, "layers.*")
            network.zero_grad()
            value = loss()
            value.backward()
            table["gradient"] = gradient_norms(network)["weights"]
            about = {"variant": name, "seed": seed, "state": state, "loss": value.item()}
            about |= {"epochs": schedule.epochs * (state == "trained")}
            tables.append(table.assign(**about, **origin))
    return pd.concat(tables, ignore_index=True)


def smoothing_table(found: pd.DataFrame) -> pd.DataFrame:
    """Which remedy keeps features apart, which errors, and which gradients alive.

    Args:
        found: of ``deep_smoothing``.

    Returns:
        A row per ``state``, ``variant`` and ``seed``. ``features`` is the relative spread in the
        last layer, ``errors`` the least distance of errors from rank one in any layer, ``gradient``
        the gradient of the first layer over that of the last, and ``loss`` the training loss.
    """
    rows = []
    for keys, group in found.groupby(["state", "variant", "seed"], sort=False):
        layers = group.sort_values("layer")
        first, last = layers.iloc[0], layers.iloc[-1]
        row = dict(zip(("state", "variant", "seed"), keys, strict=True))
        row |= {"features": last["features"], "errors": layers["errors_rank_one"].min()}
        rows.append(row | {"gradient": first["gradient"] / last["gradient"], "loss": last["loss"]})
    return pd.DataFrame(rows)
