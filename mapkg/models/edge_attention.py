"""Edge-gated multi-head attention: the layer whose score becomes massive by the row ratio.

Notation of the paper beside ours: N nodes, E directed edges j -> i (row 0 of ``edge_index``
is the source j, row 1 the target i), D hidden channels, H heads of d = D / H channels,
heads concatenated head-major (flat channel = head * d + channel in the head).
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import scatter

from mapkg.models.config import head_channels

Nodes = Float[Tensor, "N D"]
Edges = Float[Tensor, "E D"]
EdgeIndex = Int[Tensor, "2 E"]

SCORE_CLAMP = 5.0
"""The summed score of a head is clamped to +-5 before exp, the published numerical guard."""

DENOMINATOR_EPS = 1e-6
"""Added to the sum of weights at a node, so that a node without incoming edges gets 0."""

ATTENTIONS = ("full", "uniform", "no_edge")
EXPLICIT_BIASES = ("none", "published", "intended", "sink")
SCORE_BOUNDS = ("none", "clip", "tanh")


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {known}, got {value!r}")


class EdgeAttention(MessagePassing):
    r"""Attention with a vector score per head, gated by the edge.

    .. math::
        s_{ji} &= \frac{K_j \odot Q_i}{\sqrt{d}} \odot E_{ji} \in \mathbb{R}^{H \times d} \\
        a_{ji}^k &= \exp\bigl(\mathrm{clamp}(\textstyle\sum_c s_{ji}^{k,c}, -5, 5)\bigr) \\
        \alpha_{ji}^k &= a_{ji}^k \big/ \bigl(\textstyle\sum_{j'} a_{j'i}^k + 10^{-6}\bigr) \\
        o_i^k &= \textstyle\sum_j \alpha_{ji}^k V_j^k

    Hooks see the identity submodules ``score`` ([E, D], the tensor the paper analyses),
    ``attention_weight`` ([E, H], alpha) and ``attended`` ([N, D], o); with an Explicit Bias Term
    also ``coefficient`` ([N, H], beta). Parallel edges count one by one.

    An Explicit Bias Term (EBT) has learned vectors k', e' and v' in R^d for each head, standard
    normal at the start. ``"intended"``, as the paper's GraphTransformer computes it:

    .. math::
        \beta_i^k &= \frac{Q_i^k \cdot k'^k}{\sqrt{d}} \\
        s_{ji}^k &= \frac{K_j^k \odot Q_i^k}{\sqrt{d}} \odot E_{ji}^k + \beta_i^k e'^k \\
        o_i^k &= \textstyle\sum_j \alpha_{ji}^k (V_j^k + v'^k)

    Unless the clamp cuts it, the term cancels in the quotient: what is left is v', and the term in
    the score that is recorded. ``"overwritten"``, as the paper's GraphiT and SAN compute it: the
    same, but every weight is :math:`a_{ji}^k = \exp(\mathrm{clamp}(\beta_i^k, -5, 5))`, so that a
    node averages its neighbors and the score is never used.
    ``"sink"``, after Sun et al. 2024: one more key and value in the softmax of each node (no e'),

    .. math::
        a_i^k &= \exp\bigl(\min(\beta_i^k, 5)\bigr) \\
        o_i^k &= \frac{\textstyle\sum_j a_{ji}^k V_j^k + a_i^k v'^k}
            {\textstyle\sum_j a_{ji}^k + a_i^k + 10^{-6}} ,

    without the lower clamp, so that a sink of beta = -inf is none at all.

    Args:
        hidden_channels: D.
        heads: H; must divide D.
        bias: whether the query, key, value and edge projections have a bias.
        attention: ``"full"``, the equations above; ``"uniform"``, every a is 1 (the published
            ``edge_feat=False``, where every a is e^5); ``"no_edge"``, there is no factor E.
        explicit_bias: ``"none"``, ``"intended"``, ``"overwritten"`` or ``"sink"``.
        score_bound: of each entry of the score, ``"none"``, ``"clip"`` to [-1, 1] or ``"tanh"``.
        score_dropout: probability with which an entry of the score is 0 in training.

    Raises ``ValueError`` if heads do not divide channels, or a name is unknown.

    Source: massive-activations paper, the attention of its GraphTransformer, GraphiT and SAN
    (published code: multiplicative edge gate, no edge term in the value).
    """

    explicit_biases = ("none", "intended", "overwritten", "sink")

    def __init__(
        self,
        hidden_channels: int,
        heads: int,
        *,
        bias: bool = False,
        attention: str = "full",
        explicit_bias: str = "none",
        score_bound: str = "none",
        score_dropout: float = 0.0,
    ) -> None:
        super().__init__(aggr="add", node_dim=0)
        _check("attention", attention, ATTENTIONS)
        _check("explicit_bias", explicit_bias, self.explicit_biases)
        _check("score_bound", score_bound, SCORE_BOUNDS)
        self.heads, self.head_channels = heads, head_channels(hidden_channels, heads)
        self.attention, self.explicit_bias = attention, explicit_bias
        self.query = nn.Linear(hidden_channels, hidden_channels, bias=bias)
        self.key = nn.Linear(hidden_channels, hidden_channels, bias=bias)
        self.value = nn.Linear(hidden_channels, hidden_channels, bias=bias)
        has_edge = attention != "no_edge"
        self.edge = nn.Linear(hidden_channels, hidden_channels, bias=bias) if has_edge else None
        if explicit_bias != "none":
            terms = ("key_term", "value_term") + (("edge_term",) if explicit_bias != "sink" else ())
            for name in terms:
                self.register_parameter(name, nn.Parameter(torch.randn(heads, self.head_channels)))
            self.coefficient = nn.Identity()
        self.score_bound = score_bound
        self.score_dropout = nn.Dropout(score_dropout)
        self.score_norm = None  # see ``lipschitz_normalise``
        self.score, self.attention_weight, self.attended = (nn.Identity() for _ in range(3))

    def forward(self, x: Nodes, edge_index: EdgeIndex, edge_attr: Edges) -> tuple[Nodes, Edges]:
        """Attend over the incoming edges; return the attended values and the score."""
        query = self.query(x) / math.sqrt(self.head_channels)  # [N, D]
        edge = None if self.edge is None else self.edge(edge_attr)
        key = self.key(x)
        if self.explicit_bias != "none":  # [N, H]
            beta = self.coefficient(self.split_heads(query).mul(self.key_term).sum(dim=-1))
        if self.score_norm is None:
            score = self.edge_score(query, key, edge_index, edge)
            if self.explicit_bias in ("intended", "overwritten"):
                term = beta.unsqueeze(-1) * self.edge_term  # [N, H, d]
                score = score + term.flatten(1).index_select(0, edge_index[1])
            score = self.bounded(score)
        else:  # there is no term then
            score = self.score_norm(self, x, query, key, edge_index, edge)
        score = self.score(score)
        if self.explicit_bias == "overwritten":
            weight = beta.clamp(-SCORE_CLAMP, SCORE_CLAMP).exp().index_select(0, edge_index[1])
        else:
            weight = self.head_weight(score)
        sink = beta.clamp(max=SCORE_CLAMP).exp() if self.explicit_bias == "sink" else None
        return self.attend(x, edge_index, weight, sink), score

    def edge_score(
        self, query: Nodes, key: Nodes, edge_index: EdgeIndex, edge: Tensor | None
    ) -> Edges:
        """The vector score s of each edge, from scaled queries; None leaves the edge out."""
        # index_select, not key[source]: its backward is several times faster.
        score = key.index_select(0, edge_index[0]) * query.index_select(0, edge_index[1])
        return score if edge is None else score * edge

    def bounded(self, score: Edges) -> Edges:
        """The score with its bound, and with its dropout in training."""
        if self.score_bound != "none":
            score = score.tanh() if self.score_bound == "tanh" else score.clamp(-1, 1)
        return self.score_dropout(score)

    def head_weight(self, score: Edges) -> Float[Tensor, "E H"]:
        """The weight a of each edge and head."""
        weight = self.split_heads(score).sum(dim=-1)  # [E, H]
        weight = weight.clamp(-SCORE_CLAMP, SCORE_CLAMP).exp()
        return torch.ones_like(weight) if self.attention == "uniform" else weight

    def attend(
        self, x: Nodes, edge_index: EdgeIndex, weight: Tensor, sink: Tensor | None = None
    ) -> Nodes:
        """Divide the weights by their sum at each target and bring the sources' values there."""
        num_nodes, target = x.size(0), edge_index[1]
        total = scatter(weight, target, dim_size=num_nodes)  # [N, H]
        total = (total if sink is None else total + sink) + DENOMINATOR_EPS
        alpha = self.attention_weight(weight / total.index_select(0, target))  # [E, H]

        value = self.split_heads(self.value(x))  # [N, H, d]
        if self.explicit_bias in ("intended", "overwritten"):
            value = value + self.value_term
        attended = self.propagate(edge_index, value=value, alpha=alpha, size=(num_nodes,) * 2)
        if sink is not None:
            attended = attended + (sink / total).unsqueeze(-1) * self.value_term
        return self.attended(attended.flatten(start_dim=1))

    def message(self, value_j: Tensor, alpha: Tensor) -> Tensor:
        """The weighted value that edge j -> i brings, shape [E, H, d]."""
        return alpha.unsqueeze(-1) * value_j

    def split_heads(self, x: Float[Tensor, "rows D"]) -> Float[Tensor, "rows H d"]:
        """The channels of each head, head-major."""
        return x.unflatten(-1, (self.heads, self.head_channels))


class ResidualBlock(nn.Module):
    r"""What follows attention in one stream (nodes or edges): projection and feed-forward.

    .. math::
        u = \mathrm{norm}_1(x + O\,\mathrm{drop}(o)), \qquad
        x' = \mathrm{norm}_2(u + W_2\,\mathrm{drop}(\mathrm{relu}(W_1 u)))

    with W_1: D -> 2D and W_2: 2D -> D, all three maps with a bias. A norm is LayerNorm, then
    BatchNorm, each if asked for.

    Source: massive-activations paper, published code of its GraphTransformer layer.
    """

    def __init__(
        self,
        channels: int,
        *,
        dropout: float = 0.0,
        residual: bool = True,
        batch_norm: bool = True,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(channels, channels)
        self.expand = nn.Linear(channels, 2 * channels)
        self.contract = nn.Linear(2 * channels, channels)
        for place in ("1", "2"):
            norm = nn.LayerNorm(channels) if layer_norm else nn.Identity()
            self.add_module(f"layer_norm{place}", norm)
            norm = nn.BatchNorm1d(channels) if batch_norm else nn.Identity()
            self.add_module(f"batch_norm{place}", norm)

    def forward(
        self, x: Float[Tensor, "rows D"], attended: Float[Tensor, "rows D"]
    ) -> Float[Tensor, "rows D"]:
        """The new features of a stream from its old ones and what attention brought."""
        update = self.project(self.dropout(attended))
        x = self.batch_norm1(self.layer_norm1(x + update if self.residual else update))
        update = self.contract(self.dropout(torch.relu(self.expand(x))))
        return self.batch_norm2(self.layer_norm2(x + update if self.residual else update))


class NodeStreamLayer(nn.Module):
    """A layer with a node stream only: every layer of a network is given the same edge features.

    On the sparse graph without positional encodings, as in the paper, this is both GraphiT and SAN.

    Args:
        hidden_channels, heads, use_bias: D, H and ``bias`` of ``EdgeAttention``.
        explicit_bias: ``"none"``, ``"published"`` (``published_term``), ``"intended"``, ``"sink"``.
        dropout, residual, batch_norm, layer_norm: as for ``ResidualBlock``.
        **attention: further arguments of ``EdgeAttention``.

    Source: massive-activations paper, GraphiT and SAN; published code
    ``gnn-lspe/layers/graphit_gt_layer.py`` and ``SAN/layers/graph_transformer_layer.py``.
    """

    attention_type = EdgeAttention
    streams: tuple[str, ...] = ("node",)  # what has a ``ResidualBlock``, ``node_block`` here
    published_term = "overwritten"  # by a call of the published code that overwrites the weights

    def __init__(
        self,
        hidden_channels: int,
        heads: int,
        *,
        use_bias: bool = False,
        explicit_bias: str = "none",
        dropout: float = 0.0,
        residual: bool = True,
        batch_norm: bool = True,
        layer_norm: bool = False,
        **attention: Any,
    ) -> None:
        super().__init__()
        _check("explicit_bias", explicit_bias, EXPLICIT_BIASES)
        term = self.published_term if explicit_bias == "published" else explicit_bias
        attention |= dict(bias=use_bias, explicit_bias=term)
        self.attention = self.attention_type(hidden_channels, heads, **attention)
        block = dict(
            dropout=dropout, residual=residual, batch_norm=batch_norm, layer_norm=layer_norm
        )
        for stream in self.streams:
            self.add_module(f"{stream}_block", ResidualBlock(hidden_channels, **block))

    def forward(self, x: Nodes, edge_index: EdgeIndex, edge_attr: Edges) -> tuple[Nodes, Edges]:
        """New node features [N, D] and the edge features [E, D] as they came."""
        attended, _ = self.attention(x, edge_index, edge_attr)
        return self.node_block(x, attended), edge_attr


class GraphTransformerLayer(NodeStreamLayer):
    """A layer with two streams, nodes from the attended values and edges from the score itself.

    Source: massive-activations paper, GraphTransformer; published code
    ``graphtransformer/layers/graph_transformer_edge_layer.py``.
    """

    streams = ("node", "edge")
    published_term = "intended"

    def forward(self, x: Nodes, edge_index: EdgeIndex, edge_attr: Edges) -> tuple[Nodes, Edges]:
        """New node features [N, D] and edge features [E, D]."""
        attended, score = self.attention(x, edge_index, edge_attr)
        return self.node_block(x, attended), self.edge_block(edge_attr, score)
