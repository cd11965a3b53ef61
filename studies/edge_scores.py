"""How much each edge matters to a prediction: established methods, beside the largest ratio.

Each method gives one number per directed edge, the larger the more important; for the ratio,
the more massive. They do not ask the same question, and none asks what ``faithfulness``
measures, the prediction without the bond:

- *ratio*: the largest activation ratio of the edge in one layer. Knows neither the layers after
  it nor the prediction; what is read is the claim of the massive-activations paper.
- *gradient x input* and *integrated gradients* (Captum) on the one-hot row of the edge's type,
  summed over its columns. They see every way the type has into the network: the score of each
  layer and the edge stream of GT. Their baseline, a row of zeros, is an edge whose embedding is
  zero: without a bias its score in the first layer is zero, it still counts in the softmax and
  still brings its source's value. So they weigh what the type says, not that there is a bond.
- *edge mask*: Captum's integrated gradients on a factor on the messages of each edge, the same
  in all layers, from 0 to 1, through PyG's ``CaptumExplainer``. A masked edge keeps its place
  in the denominator of the attention, so its neighbours' weights do not grow; and GT's edge
  stream, which is no message, goes on as if nothing were masked.
- *GNNExplainer* (PyG): a mask on messages as before, learned so that the prediction stays as it
  is while few edges are kept. It asks which edges suffice. It starts from a random mask, and its
  penalty for undecided edges drives those that matter little to the side they started on: one
  seed is a noisy estimate, and the mean over several a better one.
- *AttentionExplainer* (PyG): the attention weight of the edge, its mean over layers and heads.
  Knows neither the values nor the prediction; the only edge that enters a node has the weight
  1, so the bond of an atom with one neighbour is always among the most important. Differs from
  PyG's default, the largest weight, which in a deep network is 1 for most bonds.
- *random*: uniform numbers, the control.

Source: Sundararajan et al. 2017 (integrated gradients), Shrikumar et al. 2016 (gradient x
input), Ying et al. 2019 (GNNExplainer).
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from captum.attr import InputXGradient, IntegratedGradients
from jaxtyping import Float, Int, Shaped
from scipy import stats
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.explain import (
    AttentionExplainer,
    CaptumExplainer,
    Explainer,
    ExplainerAlgorithm,
    GNNExplainer,
)
from torch_geometric.utils import scatter
from tqdm import tqdm

from mapkg import hooks
from mapkg.evaluation import batches, predict
from mapkg.measures import activation_ratio
from mapkg.models.network import SCORES, TypeEmbedding

STEPS = 50
"""Points of the path of integrated gradients (Gauss-Legendre), Captum's default."""

EPOCHS = 100
"""Steps in which GNNExplainer learns its mask, PyG's default."""


def edge_importance(
    model: nn.Module,
    graphs: Sequence[Data],
    method: str,
    *,
    layer: int = 0,
    target: int = 0,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> list[Float[Tensor, " _"]]:
    """How important each directed edge is to a prediction for its graph, in evaluation mode.

    A tensor per graph, a magnitude per edge, NaN where a ratio is undefined. ``method`` is one of
    ``METHODS``, ``layer`` says whose ratio is meant, ``target`` which of several predictions is
    explained. ``seed`` is that of ``"random"`` and ``"GNNExplainer"``, whose draws go on from
    graph to graph. The result does not depend on the batch size, and the model stays as it is.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if getattr(model, "edge_factor", None) is not None:
        raise ValueError(
            "expected attention over the edges of the data only, got full-graph attention, whose "
            "other pairs of nodes have no place in the result"
        )
    # On a copy: PyG's explainers leave attributes behind, and gradients in weights.
    network = OneTarget(deepcopy(model), target).eval().requires_grad_(False)
    size = 1 if method == "GNNExplainer" else batch_size
    parts = []
    with (
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),
        tqdm(total=len(graphs), desc=method, file=sys.stderr, delay=1, disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        for batch in batches(graphs, size):
            # An explainer takes means over edges, which there must be.
            found = METHODS[method](network, batch, layer) if batch.num_edges else torch.empty(0)
            parts.append(found.detach().abs())
            bar.update(batch.num_graphs)
    return list(torch.cat(parts).split([graph.num_edges for graph in graphs]))


def bond_of_edge(graph: Data) -> Int[Tensor, " edges"]:
    """Which bond each directed edge is of, numbered in the order of their first edges.

    Edges between the same two nodes, whatever their direction, are one bond.
    """
    ends = graph.edge_index.sort(dim=0).values
    pairs, pair = ends.unique(dim=1, return_inverse=True)
    place = torch.arange(graph.num_edges)
    first = scatter(place, pair, dim_size=pairs.size(1), reduce="min")
    return first.argsort().argsort()[pair]


def bond_importance(graph: Data, importance: Shaped[Tensor, " edges"]) -> Shaped[Tensor, " bonds"]:
    """The larger importance of a bond's two directions, in the order of ``bond_of_edge``."""
    bond = bond_of_edge(graph)
    number = int(bond.max()) + 1 if len(bond) else 0
    largest = importance.new_full((number,), -torch.inf)
    return largest.scatter_reduce(0, bond, importance, "amax")


def rank_correlation(
    a: Sequence[Float[Tensor, " _"]],
    b: Sequence[Float[Tensor, " _"]],
    graphs: Sequence[Data],
) -> Float[np.ndarray, " graphs"]:
    """Spearman's rank correlation of two importances of edges over the bonds of each graph.

    NaN where a side is the same for all bonds or has a NaN, and with fewer than two bonds.
    """
    correlation = np.full(len(graphs), np.nan)
    for index, (graph, *sides) in enumerate(zip(graphs, a, b, strict=True)):
        ranked = [bond_importance(graph, side) for side in sides]
        if all(len(side) and side.isfinite().all() and side.max() > side.min() for side in ranked):
            correlation[index] = stats.spearmanr(*ranked).statistic
    return correlation


class OneTarget(nn.Module):
    """A network with one of its targets, called as PyG's explainers call a model."""

    def __init__(self, model: nn.Module, target: int) -> None:
        super().__init__()
        self.model = model
        self.target = target

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, batch_size: int
    ) -> Float[Tensor, " graphs"]:
        """The predictions of that target."""
        return self.model(x, edge_index, edge_attr, batch, batch_size)[:, self.target]


def _ratio(network: OneTarget, batch: Any, layer: int) -> Float[Tensor, " E"]:
    names = list(hooks.resolve(network.model, SCORES))
    if layer not in range(len(names)):
        raise ValueError(f"layer: expected 0 to {len(names) - 1}, got {layer}")
    ((_, seen),) = hooks.scan(network.model, [batch], names[layer], forward=predict)
    return activation_ratio(seen[names[layer]]).amax(dim=-1)


def _of_types(
    network: OneTarget, batch: Any, method: Callable[..., Any], **settings: Any
) -> Float[Tensor, " E"]:
    """A Captum method on the one-hot rows of edge types, summed over the columns."""

    def prediction(rows: Tensor) -> Tensor:
        found = network(batch.x, batch.edge_index, rows[0], batch.batch, batch.num_graphs)
        return found + 0 * rows.sum()  # a network that ignores types has a gradient, of zero

    # Captum takes the first dimension for that of its samples: the batch is one sample. The
    # gradient of the sum of predictions is each graph's own, since graphs share no edge.
    rows = _one_hot(network.model, batch.edge_attr).unsqueeze(0).requires_grad_()
    return method(prediction).attribute(rows, **settings)[0].sum(dim=1).to(rows.dtype)


def _one_hot(model: nn.Module, types: Tensor) -> Float[Tensor, "E types"]:
    embedding = getattr(model, "edge_embedding", None)
    if not isinstance(embedding, TypeEmbedding) or types.is_floating_point():
        raise ValueError(
            "expected edges with type ids and a network with an embedding for them, got "
            f"edge_attr of {types.dtype}, shape {list(types.shape)}; use a method that masks "
            "messages, as 'edge mask'"
        )
    columns = types.reshape(len(types), -1).unbind(dim=1)
    rows = [
        nn.functional.one_hot(ids, number)
        for ids, number in zip(columns, embedding.sizes, strict=True)
    ]
    return torch.cat(rows, dim=1).to(embedding.weight)


def _explained(
    network: OneTarget, batch: Any, algorithm: ExplainerAlgorithm
) -> Float[Tensor, " E"]:
    """The edge mask that an algorithm of PyG finds."""
    explainer = Explainer(
        network,
        algorithm,
        explanation_type="model",
        model_config=dict(mode="regression", task_level="graph", return_type="raw"),
        edge_mask_type="object",
    )
    explanation = explainer(
        batch.x.reshape(len(batch.x), -1),  # GNNExplainer unpacks two dimensions
        batch.edge_index,
        edge_attr=batch.edge_attr,  # CaptumExplainer passes these by position
        batch=batch.batch,
        batch_size=batch.num_graphs,
    )
    return explanation.edge_mask


METHODS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "ratio": _ratio,
        "gradient x input": lambda network, batch, _: _of_types(network, batch, InputXGradient),
        "integrated gradients": lambda network, batch, _: _of_types(
            network, batch, IntegratedGradients, n_steps=STEPS, internal_batch_size=1
        ),
        "edge mask": lambda network, batch, _: _explained(
            network, batch, CaptumExplainer(IntegratedGradients, n_steps=STEPS)
        ),
        "GNNExplainer": lambda network, batch, _: _explained(
            network, batch, GNNExplainer(epochs=EPOCHS)
        ),
        "AttentionExplainer": lambda network, batch, _: _explained(
            network, batch, AttentionExplainer(reduce="mean")
        ),
        "random": lambda network, batch, _: torch.rand(batch.num_edges),
    }
)
"""The methods by name; each gives a number per edge of a batch."""
