"""EGAT, the paper's comparison: additive attention that carries a vector along each edge.

Notation as in ``edge_attention``.
"""

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import softmax

from mapkg.models.config import head_channels
from mapkg.models.edge_attention import EdgeIndex, Edges, Nodes


class EdgeGATAttention(MessagePassing):
    r"""Attention scored from source, edge and target together.

    .. math::
        f'_{ji} &= \mathrm{LeakyReLU}_{0.01}\bigl(W_e [h_j \,\|\, f_{ji} \,\|\, h_i]\bigr)
            \in \mathbb{R}^{H \times d} \\
        \ell_{ji}^k &= \textstyle\sum_{m=1}^{H} (F f'^{\,k}_{ji} + b)_m,
            \qquad F \in \mathbb{R}^{H \times d} \\
        \alpha_{ji}^k &= \exp \ell_{ji}^k \big/ \textstyle\sum_{j'} \exp \ell_{j'i}^k \\
        h'_i{}^k &= \textstyle\sum_j \alpha_{ji}^k (W_n h_j)^k

    As published, the heads share the one scoring vector :math:`\sum_m F_m`, and b cancels in the
    softmax. Nodes without incoming edges get 0.

    Hooks see the identity submodules ``score`` ([E, D], f', which the published code logs as the
    edge activation), ``attention_weight`` ([E, H], alpha) and ``attended`` ([N, D], h').

    Args:
        hidden_channels: D.
        heads: H; must divide D.
        use_bias: whether W_e and F have a bias; W_n always has one.

    Source: massive-activations paper, published code ``graphtransformer/egat``. differs: its
    variant for PROTEINS sends h_j instead of W_n h_j, which leaves W_n without effect; here W_n
    is used everywhere.
    """

    def __init__(self, hidden_channels: int, heads: int, *, use_bias: bool = False) -> None:
        super().__init__(aggr="add", node_dim=0)
        self.heads = heads
        self.value = nn.Linear(hidden_channels, hidden_channels)
        self.edge = nn.Linear(3 * hidden_channels, hidden_channels, bias=use_bias)
        self.logit = nn.Linear(head_channels(hidden_channels, heads), heads, bias=use_bias)
        for linear in (self.value, self.edge, self.logit):
            nn.init.xavier_normal_(linear.weight, gain=nn.init.calculate_gain("relu"))
        self.score, self.attention_weight, self.attended = (nn.Identity() for _ in range(3))

    def forward(self, x: Nodes, edge_index: EdgeIndex, edge_attr: Edges) -> tuple[Nodes, Edges]:
        """Attend over the incoming edges; return the attended values and f'."""
        num_nodes, source, target = x.size(0), edge_index[0], edge_index[1]
        ends = x.index_select(0, source), x.index_select(0, target)
        joined = torch.cat([ends[0], edge_attr, ends[1]], dim=-1)  # [E, 3D]
        score = self.score(nn.functional.leaky_relu(self.edge(joined), 0.01))  # [E, D]
        logit = self.logit(score.unflatten(-1, (self.heads, -1))).sum(dim=-1)  # [E, H]
        alpha = self.attention_weight(softmax(logit, target, num_nodes=num_nodes))  # [E, H]
        value = self.value(x).unflatten(-1, (self.heads, -1))  # [N, H, d]
        attended = self.propagate(edge_index, value=value, alpha=alpha, size=(num_nodes,) * 2)
        return self.attended(attended.flatten(start_dim=1)), score

    def message(self, value_j: Tensor, alpha: Tensor) -> Tensor:
        """The weighted value that edge j -> i brings, shape [E, H, d]."""
        return alpha.unsqueeze(-1) * value_j


class EdgeGATLayer(nn.Module):
    """The attention alone, as published; f' are the next layer's edge features."""

    def __init__(self, hidden_channels: int, heads: int, *, use_bias: bool = False) -> None:
        super().__init__()
        self.attention = EdgeGATAttention(hidden_channels, heads, use_bias=use_bias)

    def forward(self, x: Nodes, edge_index: EdgeIndex, edge_attr: Edges) -> tuple[Nodes, Edges]:
        """New node features [N, D] and edge features [E, D]."""
        return self.attention(x, edge_index, edge_attr)
