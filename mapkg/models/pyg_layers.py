"""Attention layers of PyG, unchanged, as layers of a ``GraphNetwork``; hooks look into them.

Notation as in ``edge_attention``. What ``mapkg.hooks`` can see of each architecture (name after
``layers.*.``), and the rows that ``recorded_rows`` makes of it for the detector::

                 name                     recorded                           rows
    gat          conv:message             alpha_ji W h_j, [E, H, d]          [E, D]
    gat          conv:edge_update         alpha_ji, [E, H]                   [E, H]
    gatv2        conv:edge_update_inputs  x_i, x_j, edge_attr                vector score [E, D]
    gatv2        conv:message             alpha_ji W_l h_j, [E, H, d]        [E, D]
    gatv2        conv:edge_update         alpha_ji, [E, H]                   [E, H]
    transformer  conv:message_inputs      query_i, key_j, value_j, edge_attr vector score [E, D]
    transformer  conv:message             alpha_ji (V_j + W_e e), [E, H, d]  [E, D]
    gps          conv.conv:message_inputs x_j, edge_attr                     h_j + e_ji [E, D]
    gps          conv.conv:message        relu(h_j + e_ji), [E, D]           [E, D]
    gps          conv.attn                dense attention, padded, and None  [N, D]

A vector score is the logit of the softmax before the sum over the channels of a head:
Q_i * (K_j + W_e e_ji) / sqrt(d) for the transformer, a * LeakyReLU(W_r h_i + W_l h_j + W_e e_ji)
for gatv2. GATConv sums its channels before any hook of PyG can see them.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GATv2Conv, GINEConv, GPSConv, TransformerConv
from torch_geometric.nn.attention import PerformerAttention
from torch_geometric.utils import to_dense_batch

from mapkg.models.config import head_channels
from mapkg.models.edge_attention import EdgeIndex, Edges, Nodes

_CONVOLUTIONS = {"gat": GATConv, "gatv2": GATv2Conv, "transformer": TransformerConv}

RECORDED = {
    "gat": ("layers.*.conv:message",),
    "gatv2": ("layers.*.conv:edge_update_inputs", "layers.*.conv:message"),
    "transformer": ("layers.*.conv:message_inputs", "layers.*.conv:message"),
    "gps": ("layers.*.conv.conv:message_inputs", "layers.*.conv.attn"),
}
"""What to record of a network of ``standard_layer`` to look for massive activations.

Not attention weights, which are no channels of a hidden state, nor the messages of gps, of whose
channels a ReLU zeroes about half, but what the ReLU is applied to.
"""

ARCHITECTURES = tuple(RECORDED)
"""What ``standard_layer`` builds."""


class ConvolutionLayer(nn.Module):
    """x + drop(relu(norm(conv(x, edge_attr)))) with BatchNorm; edge features pass through."""

    def __init__(self, conv: nn.Module, hidden_channels: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm1d(hidden_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Nodes, edge_index: EdgeIndex, edge_attr: Edges) -> tuple[Nodes, Edges]:
        """New node features [N, D], and the edge features as they came [E, D]."""
        update = torch.relu(self.norm(self.conv(x, edge_index, edge_attr=edge_attr)))
        return x + self.dropout(update), edge_attr


class GPSLayer(nn.Module):
    """A GPSConv, with its own norms and residuals, of a GINEConv and attention of all nodes."""

    needs_batch = True

    def __init__(self, hidden_channels: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        first, second = (nn.Linear(hidden_channels, hidden_channels) for _ in range(2))
        local = GINEConv(nn.Sequential(first, nn.ReLU(), second))
        self.conv = GPSConv(hidden_channels, local, heads=heads, dropout=dropout)

    def forward(
        self, x: Nodes, edge_index: EdgeIndex, edge_attr: Edges, batch: Tensor | None = None
    ) -> tuple[Nodes, Edges]:
        """New node features [N, D], and the edge features as they came [E, D]."""
        return self.conv(x, edge_index, batch, edge_attr=edge_attr), edge_attr


def standard_layer(
    architecture: str, hidden_channels: int, heads: int, *, dropout: float = 0.0
) -> ConvolutionLayer | GPSLayer:
    """One layer of a PyG architecture, one of ``ARCHITECTURES``.

    No self-loops are added, so that each recorded row is an edge of the data.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture: expected one of {ARCHITECTURES}, got {architecture!r}")
    width = head_channels(hidden_channels, heads)
    if architecture == "gps":
        return GPSLayer(hidden_channels, heads, dropout=dropout)
    options = {} if architecture == "transformer" else {"add_self_loops": False}
    kind = _CONVOLUTIONS[architecture]
    conv = kind(hidden_channels, width, heads, edge_dim=hidden_channels, **options)
    return ConvolutionLayer(conv, hidden_channels, dropout=dropout)


def recorded_rows(
    module: nn.Module, output: Any, batch: Int[Tensor, " N"] | None = None
) -> Float[Tensor, "rows channels"]:
    """What was recorded of a module at one of ``RECORDED``, a row per edge.

    Dense attention has a row per node, padding left out by ``batch``, the graph of each node.
    Raises ``ValueError`` if padding reaches the other rows, and ``TypeError`` if there are none.
    """
    if isinstance(module, nn.MultiheadAttention | PerformerAttention):
        dense = output if isinstance(output, Tensor) else output[0]
        if batch is None:
            return dense.flatten(end_dim=1)
        _, is_node = to_dense_batch(batch, batch)
        if isinstance(module, PerformerAttention) and not is_node.all():
            raise ValueError(
                "PerformerAttention counts padding in its denominator, so that its outputs depend "
                "on the other graphs of the batch: expected graphs of one size, or one at a time"
            )
        return dense[is_node]
    if isinstance(output, dict):
        return _rows_of_arguments(module, output)
    if isinstance(output, Tensor):
        return output.flatten(start_dim=1)
    raise TypeError(f"expected a tensor or a dict of arguments, got {type(output).__name__}")


def _rows_of_arguments(conv: nn.Module, inputs: dict[str, Any]) -> Float[Tensor, "E D"]:
    """The vector score of each edge, head-major; of a GINEConv what its ReLU is applied to."""
    edge_attr = inputs.get("edge_attr")
    if isinstance(conv, GINEConv):
        return inputs["x_j"] + (edge_attr if conv.lin is None else conv.lin(edge_attr))
    if not isinstance(conv, TransformerConv | GATv2Conv):
        raise TypeError(f"expected a TransformerConv or GATv2Conv, got {type(conv).__name__}")
    edge: Tensor | float = 0.0
    if conv.lin_edge is not None and edge_attr is not None:
        edge = conv.lin_edge(edge_attr).unflatten(-1, (conv.heads, conv.out_channels))
    if isinstance(conv, TransformerConv):
        score = inputs["query_i"] * (inputs["key_j"] + edge) / math.sqrt(conv.out_channels)
    else:
        total = inputs["x_i"] + inputs["x_j"] + edge
        score = nn.functional.leaky_relu(total, conv.negative_slope) * conv.att
    return score.flatten(start_dim=1)
