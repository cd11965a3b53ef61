"""Edge-gated multi-head attention: the layer whose score grows massive activations.

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

SCORE_CLAMP = 5.0
"""The summed score of a head is clamped to +-5 before exp, the published numerical guard."""

DENOMINATOR_EPS = 1e-6
"""Added to the sum of weights at a node, so that a node without incoming edges gets 0."""

ATTENTIONS = ("full", "uniform", "no_edge")
"""The attention of the papers, and two that lack one of its parts."""


class EdgeAttention(MessagePassing):
    r"""Attention with a vector score per head, gated by the edge.

    .. math::
        s_{ji} &= \frac{K_j \odot Q_i}{\sqrt{d}} \odot E_{ji} \in \mathbb{R}^{H \times d} \\
        a_{ji}^k &= \exp\bigl(\mathrm{clamp}(\textstyle\sum_c s_{ji}^{k,c}, -5, 5)\bigr) \\
        \alpha_{ji}^k &= a_{ji}^k \big/ \bigl(\textstyle\sum_{j'} a_{j'i}^k + 10^{-6}\bigr) \\
        o_i^k &= \textstyle\sum_j \alpha_{ji}^k V_j^k

    Three identity submodules make the intermediate tensors visible to hooks by name:
    ``score`` ([E, D], the tensor the paper analyses: before sum, clamp and exp),
    ``attention_weight`` ([E, H], alpha) and ``attended`` ([N, D], o before the output
    projection). Parallel edges count one by one.

    Args:
        hidden_channels: D.
        heads: H; must divide D.
        bias: whether the query, key, value and edge projections have a bias.
        attention: ``"full"``, the equations above; ``"uniform"``, every a is 1, so that a
            node averages its neighbours and the score, though it can be seen, is never used
            (the published ``edge_feat=False``, where every a is e^5); ``"no_edge"``, the
            factor E is left out and there is no ``edge`` projection.

    Raises:
        ValueError: if ``heads`` does not divide ``hidden_channels``, or the attention is
            unknown.

    Source: massive-activations paper, the attention of its GraphTransformer, GraphiT and SAN
    (published code: multiplicative edge gate, no edge term in the value).
    """

    def __init__(
        self, hidden_channels: int, heads: int, *, bias: bool = False, attention: str = "full"
    ) -> None:
        super().__init__(aggr="add", node_dim=0)
        if attention not in ATTENTIONS:
            raise ValueError(f"attention: expected one of {ATTENTIONS}, got {attention!r}")
        if hidden_channels % heads:
            raise ValueError(
                f"heads must divide hidden_channels, got {heads} heads for {hidden_channels}"
            )
        self.heads = heads
        self.head_channels = hidden_channels // heads
        self.attention = attention
        self.query = nn.Linear(hidden_channels, hidden_channels, bias=bias)
        self.key = nn.Linear(hidden_channels, hidden_channels, bias=bias)
        self.value = nn.Linear(hidden_channels, hidden_channels, bias=bias)
        self.edge = (
            nn.Linear(hidden_channels, hidden_channels, bias=bias)
            if attention != "no_edge"
            else None
        )
        self.score = nn.Identity()
        self.attention_weight = nn.Identity()
        self.attended = nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "N D"],
        edge_index: Int[Tensor, "2 E"],
        edge_attr: Float[Tensor, "E D"],
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "E D"]]:
        """Attend over the incoming edges of each node.

        Args:
            x: node features, shape [N, D].
            edge_index: source and target of each edge, shape [2, E].
            edge_attr: edge features, shape [E, D].

        Returns:
            The attended values, shape [N, D], and the score, shape [E, D].
        """
        score = self.score(
            self.edge_score(x, edge_index, edge_attr, self.query, self.key, self.edge)
        )
        return self.attend(x, edge_index, self.head_weight(score)), score

    def edge_score(
        self,
        x: Float[Tensor, "N D"],
        edge_index: Int[Tensor, "2 E"],
        edge_attr: Float[Tensor, "rows D"],
        query: nn.Linear,
        key: nn.Linear,
        edge: nn.Linear | None,
    ) -> Float[Tensor, "E D"]:
        """The vector score s of each edge with these projections; None leaves the edge out."""
        scaled_query = query(x) / math.sqrt(self.head_channels)  # [N, D]
        # index_select, not key[source]: its backward is several times faster.
        score = key(x).index_select(0, edge_index[0])
        score = score * scaled_query.index_select(0, edge_index[1])
        return score if edge is None else score * edge(edge_attr)

    def head_weight(self, score: Float[Tensor, "E D"]) -> Float[Tensor, "E H"]:
        """The weight a of each edge and head."""
        weight = self.split_heads(score).sum(dim=-1)  # [E, H]
        weight = weight.clamp(-SCORE_CLAMP, SCORE_CLAMP).exp()
        return torch.ones_like(weight) if self.attention == "uniform" else weight

    def attend(
        self,
        x: Float[Tensor, "N D"],
        edge_index: Int[Tensor, "2 E"],
        weight: Float[Tensor, "E H"],
    ) -> Float[Tensor, "N D"]:
        """Divide the weights by their sum at each target and bring the sources' values there."""
        num_nodes, target = x.size(0), edge_index[1]
        total = scatter(weight, target, dim=0, dim_size=num_nodes, reduce="sum")  # [N, H]
        alpha = weight / (total.index_select(0, target) + DENOMINATOR_EPS)
        alpha = self.attention_weight(alpha)  # [E, H]

        value = self.split_heads(self.value(x))  # [N, H, d]
        attended = self.propagate(edge_index, value=value, alpha=alpha, size=(num_nodes,) * 2)
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
        self.layer_norm1 = nn.LayerNorm(channels) if layer_norm else nn.Identity()
        self.batch_norm1 = nn.BatchNorm1d(channels) if batch_norm else nn.Identity()
        self.layer_norm2 = nn.LayerNorm(channels) if layer_norm else nn.Identity()
        self.batch_norm2 = nn.BatchNorm1d(channels) if batch_norm else nn.Identity()

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

    Without positional encodings and on the sparse graph, the regime of the paper, this is
    both GraphiT and SAN: they differ in mechanisms that are switched off there, see
    ``full_graph``.

    Args:
        hidden_channels: D.
        heads: H; must divide D.
        use_bias: whether the query, key, value and edge projections have a bias.
        attention: as for ``EdgeAttention``.
        **block: ``dropout``, ``residual``, ``batch_norm``, ``layer_norm``, as for
            ``ResidualBlock``.

    Source: massive-activations paper, GraphiT and SAN; published code
    ``gnn-lspe/layers/graphit_gt_layer.py`` and ``SAN/layers/graph_transformer_layer.py``.
    """

    attention_type = EdgeAttention

    def __init__(
        self,
        hidden_channels: int,
        heads: int,
        *,
        use_bias: bool = False,
        attention: str = "full",
        **block: Any,
    ) -> None:
        super().__init__()
        self.attention = self.attention_type(
            hidden_channels, heads, bias=use_bias, attention=attention
        )
        self.node_block = ResidualBlock(hidden_channels, **block)

    def forward(
        self,
        x: Float[Tensor, "N D"],
        edge_index: Int[Tensor, "2 E"],
        edge_attr: Float[Tensor, "E D"],
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "E D"]]:
        """New node features [N, D] and the edge features [E, D] as they came."""
        attended, _ = self.attention(x, edge_index, edge_attr)
        return self.node_block(x, attended), edge_attr


class GraphTransformerLayer(NodeStreamLayer):
    """A GraphTransformer layer with two streams, nodes and edges.

    The node stream continues from the attended values, the edge stream from the score itself.
    Arguments as for ``NodeStreamLayer``; both streams have a ``ResidualBlock``.

    Source: massive-activations paper, GraphTransformer; published code
    ``graphtransformer/layers/graph_transformer_edge_layer.py``.
    """

    def __init__(
        self,
        hidden_channels: int,
        heads: int,
        *,
        use_bias: bool = False,
        attention: str = "full",
        **block: Any,
    ) -> None:
        super().__init__(hidden_channels, heads, use_bias=use_bias, attention=attention, **block)
        self.edge_block = ResidualBlock(hidden_channels, **block)

    def forward(
        self,
        x: Float[Tensor, "N D"],
        edge_index: Int[Tensor, "2 E"],
        edge_attr: Float[Tensor, "E D"],
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "E D"]]:
        """New node features [N, D] and edge features [E, D]."""
        attended, score = self.attention(x, edge_index, edge_attr)
        return self.node_block(x, attended), self.edge_block(edge_attr, score)
