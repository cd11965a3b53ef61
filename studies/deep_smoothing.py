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
from studies import tables
from studies.backward_oversmoothing import OPTIMIZERS, Vanilla, full_training
from studies.data import Description, NodesOfGraph, Splits
from studies.data.networks import regular_task
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


CLASSES = 4
"""Of the nodes of ``regular_splits``."""


def regular_splits(num_nodes: int = 200, degree: int = 20, *, seed: int = 0) -> Splits:
    """The regular graph of the theory as a classification of its nodes, in double precision.

    All nodes are there to train on. Their classes, ``CLASSES`` of equal size, are the quantiles of
    the target of ``data.regular.regular_task``.
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

    Returns:
        The rows of ``oversmoothing.smoothing_by_layer`` with ``variant``, ``num_layers``, ``seed``,
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
    parts = []
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
            parts.append(table.assign(**about, **origin))
    return pd.concat(parts, ignore_index=True)


def smoothing(
    splits: Splits,
    *,
    layers: Sequence[int] = (2, 16),  # of attention networks
    epochs: int = 200,  # of attention networks
    depths: Sequence[int] = (1, 2, 4, 8, 16, 32),  # layers of vanilla networks on regular graphs
    steps: int = 1000,  # of vanilla networks
    seeds: Sequence[int] = (0, 1, 2),  # of both, a training for each
) -> dict[str, pd.DataFrame]:
    """``deep`` attention on a graph and on regular ones, and ``training`` of vanilla networks."""
    schedule = Schedule(epochs=epochs, lr_patience=None)
    cases = [(splits, seeds), *((regular_splits(seed=seed), [seed]) for seed in seeds)]
    deep = [
        deep_smoothing(case, num_layers=num_layers, seeds=of_case, schedule=schedule)
        for case, of_case in cases
        for num_layers in layers
    ]
    variants = {
        f"{name}, {activation}": Vanilla(
            activation=activation, gain=gain, hidden_channels=32, is_graph=name == "GNN"
        )
        for activation, gain in (("relu", None), ("tanh", 1.2))
        for name in ("GNN", "MLP")
    }
    sizes = dict(depths=depths, seeds=seeds, steps=steps)
    trained = [
        full_training(variants, optimizer=name, **sizes).assign(optimiser=name)
        for name in OPTIMIZERS
    ]
    training = pd.concat(trained, ignore_index=True)
    training = training.assign(versions=versions(), commit=commit())
    return {"deep": pd.concat(deep, ignore_index=True), "training": training}


def smoothing_table(smoothness: pd.DataFrame) -> pd.DataFrame:
    """Which remedy keeps features apart, which errors, and which network learns; a row per network.

    ``features`` is the relative spread in the last layer, ``errors`` the least one of errors in
    any layer, ``rank one`` their least distance from rank one, ``gradient`` the norm of the
    gradient of all layers' weights, and ``loss`` the training loss.
    """
    keys = ["dataset", "num_layers", "state", "variant", "seed"]
    by_network = smoothness.sort_values("layer", kind="stable").groupby(keys, sort=False)
    table = by_network.agg(
        features=("features", "last"),
        errors=("errors", "min"),
        rank=("errors_rank_one", "min"),
        gradient=("gradient", lambda norms: norms.pow(2).sum() ** 0.5),
        loss=("loss", "first"),
    )
    return table.rename(columns={"rank": "rank one"}).reset_index()


def remedy_table(smoothness: pd.DataFrame) -> pd.DataFrame:
    """``smoothing_table`` over seeds of one data set, from the least to the greatest."""
    networks = smoothing_table(smoothness)
    forms = {
        "features": ".2g",
        "errors": ".2g",
        "rank one": ".2g",
        "gradient": ".3g",
        "loss": ".3g",
    }
    look = dict(rows=["num_layers", "state", "variant"], statistic="range")
    parts = [tables.over_seeds(networks, name, form=form, **look) for name, form in forms.items()]
    return pd.concat(parts, axis="columns")
