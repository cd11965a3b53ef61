"""Attention between all pairs of nodes: what GraphiT and SAN do beyond the sparse graph.

A graph's own edges are real and come first, in the order of the data; every other ordered pair of
different nodes of the same graph is a fake edge, which has its own projections. Every weight has a
factor, by which the two models differ.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.utils import to_dense_adj

from mapkg.models.edge_attention import EdgeAttention, EdgeIndex, Edges, Nodes, NodeStreamLayer


class Completion(NamedTuple):
    """Fake edges, their features (one row for all, or each its own), and a factor of each edge."""

    edge_index: Int[Tensor, "2 F"]
    edge_attr: Float[Tensor, "rows D"]
    factor: Float[Tensor, "edges 1"]


class FullGraphAttention(EdgeAttention):
    r"""Attention over real and fake edges, with a factor on each weight.

    .. math::
        s_{ji} &= \frac{K_j \odot Q_i}{\sqrt{d}} \odot E_{ji} \ \text{(real)}, \qquad
            \frac{K^{(2)}_j \odot Q^{(2)}_i}{\sqrt{d}} \odot E^{(2)}_{ji} \ \text{(fake)} \\
        a_{ji}^k &= f_{ji} \exp\bigl(\mathrm{clamp}(\textstyle\sum_c s_{ji}^{k,c}, -5, 5)\bigr)

    Real and fake edges share one denominator and the values V. All else is as in
    ``EdgeAttention``, but there is no Explicit Bias Term.

    Source: massive-activations paper, published code of GraphiT and SAN with
    ``full_graph=True``, which none of its runs uses.
    """

    explicit_biases = ("none",)  # the published one names parameters that are never made

    def __init__(self, hidden_channels: int, heads: int, **options: Any) -> None:
        super().__init__(hidden_channels, heads, **options)
        for name in ("query", "key", "edge"):
            if (own := getattr(self, name)) is not None:
                own = nn.Linear(hidden_channels, hidden_channels, bias=own.bias is not None)
            self.add_module(f"fake_{name}", own)

    def forward(
        self, x: Nodes, edge_index: EdgeIndex, edge_attr: Edges, completion: Completion
    ) -> tuple[Nodes, Float[Tensor, "edges D"]]:
        """Attend over real and fake edges; return what is attended to and the score, [E + F, D]."""
        scale, scores = math.sqrt(self.head_channels), []
        for prefix, ends, features in (
            ("", edge_index, edge_attr),
            ("fake_", completion.edge_index, completion.edge_attr),
        ):
            query, key, edge = (getattr(self, prefix + name) for name in ("query", "key", "edge"))
            gate = None if edge is None else edge(features)
            scores.append(self.edge_score(query(x) / scale, key(x), ends, gate))
        score = self.score(self.bounded(torch.cat(scores)))
        every_edge = torch.cat([edge_index, completion.edge_index], dim=1)
        return self.attend(x, every_edge, self.head_weight(score) * completion.factor), score


class FullGraphLayer(NodeStreamLayer):
    """A ``NodeStreamLayer`` that attends over all pairs; GraphiT's and SAN's full-graph layer."""

    attention_type = FullGraphAttention

    def forward(
        self, x: Nodes, edge_index: EdgeIndex, edge_attr: Edges, completion: Completion
    ) -> tuple[Nodes, Edges]:
        """New node features [N, D] and the features of the real edges [E, D] as they came."""
        attended, _ = self.attention(x, edge_index, edge_attr, completion)
        return self.node_block(x, attended), edge_attr


class DiffusionKernel(nn.Module):
    r"""GraphiT's factor: how much of a diffusion that starts at one node is at the other.

    .. math::
        f_{ji} = k_{ji}, \qquad k = (I - \gamma L)^p, \qquad L = I - D^{-1/2} A D^{-1/2}

    for real and fake edges alike. A counts parallel edges, and D sums its columns; a node without
    edges has degree 1 there.

    Source: massive-activations paper, published code of GraphiT; gamma 0.25 and p = 16 there.
    """

    def __init__(self, gamma: float = 0.25, power: int = 16) -> None:
        super().__init__()
        self.gamma, self.power = gamma, power

    def forward(
        self, edge_index: EdgeIndex, fake_index: Int[Tensor, "2 F"], batch: Int[Tensor, " N"]
    ) -> Float[Tensor, "edges 1"]:
        """The factor of each edge in double precision."""
        adjacency = to_dense_adj(edge_index, batch).double()  # [graphs, n, n]
        identity = torch.eye(adjacency.size(1)).to(adjacency)
        scale = adjacency.sum(dim=1).clamp(min=1).rsqrt()  # [graphs, n]
        laplacian = identity - scale.unsqueeze(2) * adjacency * scale.unsqueeze(1)
        kernel = torch.linalg.matrix_power(identity - self.gamma * laplacian, self.power)
        source, target = torch.cat([edge_index, fake_index], dim=1)
        graph, first = batch[source], _first_nodes(batch)[batch]
        return kernel[graph, source - first[source], target - first[target]].unsqueeze(-1)


class FakeEdgeShare(nn.Module):
    r"""SAN's factor: :math:`1/(1+\gamma)` for real edges, :math:`\gamma/(1+\gamma)` for fake ones.

    gamma is a fixed value; None learns one for all layers, from 0.1 on and clamped to [0, 1].

    Source: massive-activations paper, published code of SAN: fixed (1e-5) in its ``SAN`` folder,
    learned in ``gnn-lspe``.
    """

    def __init__(self, gamma: float | None = None) -> None:
        super().__init__()
        if gamma is not None and not 0 <= gamma <= 1:
            raise ValueError(f"gamma: expected a value in [0, 1] or None (learned), got {gamma!r}")
        self.gamma = nn.Parameter(torch.tensor([0.1])) if gamma is None else gamma

    def forward(
        self, edge_index: EdgeIndex, fake_index: Int[Tensor, "2 F"], batch: Int[Tensor, " N"]
    ) -> Float[Tensor, "edges 1"]:
        """The factor of each edge in double precision, real edges first."""
        gamma = torch.as_tensor(self.gamma, dtype=torch.double, device=batch.device).clamp(0, 1)
        real, fake = edge_index.size(1), fake_index.size(1)
        shares = (1 / (1 + gamma)).expand(real), (gamma / (1 + gamma)).expand(fake)
        return torch.cat(shares).unsqueeze(-1)


def complete(
    edge_index: Int[Tensor, "2 E"],
    batch: Int[Tensor, " N"],
    no_edge: Float[Tensor, "1 D"],
    edge_factor: DiffusionKernel | FakeEdgeShare,
) -> Completion:
    """The fake edges of a batch, of features ``no_edge`` all, and the factors of every edge."""
    fake_index = fake_edges(edge_index, batch)
    factor = edge_factor(edge_index, fake_index, batch)
    return Completion(fake_index, no_edge, factor.to(no_edge.dtype))


def fake_edges(edge_index: Int[Tensor, "2 E"], batch: Int[Tensor, " N"]) -> Int[Tensor, "2 F"]:
    """The ordered pairs of nodes of a graph that no edge joins, by graph, source and target."""
    adjacency = to_dense_adj(edge_index, batch)  # [graphs, n, n]
    place = torch.arange(adjacency.size(1), device=batch.device)
    exists = place < batch.bincount().unsqueeze(1)  # [graphs, n]
    missing = exists.unsqueeze(2) & exists.unsqueeze(1) & (adjacency == 0)
    missing &= place.unsqueeze(1) != place
    graph, source, target = missing.nonzero(as_tuple=True)
    return torch.stack([source, target]) + _first_nodes(batch)[graph]


def _first_nodes(batch: Int[Tensor, " N"]) -> Int[Tensor, " graphs"]:
    """The number of the first node of each graph; graphs are in ascending order."""
    sizes = batch.bincount()
    return sizes.cumsum(0) - sizes
