"""What layers of PyG compute on trees whose nodes hear themselves and two children.

Each layer is taken apart in three steps, so that neighbours can be read off by slicing: what nodes
send, what a family of three gathers, and how a node ends the layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GatedGraphConv, GCNConv, GINConv, MessagePassing

HEADS = 4
"""Of GAT."""

FAMILY = 3
"""How many a node that is no leaf hears, itself and two children."""

Parts = tuple[Tensor, ...]
"""What nodes send to their parents and themselves, nodes in dimension 1 or 0."""


@dataclass(frozen=True)
class TreeLayer:
    """A layer of PyG, and its computation in three steps.

    Attributes:
        layer: makes it.
        is_activated, is_residual: of the published networks.
        send: what nodes of the given in-degrees send, its first part being what a leaf receives.
        gather: what a node receives from itself and its children.
        finish: the layer's output, from what was received and what the node was; for layers with
            BatchNorm also from how many nodes each row stands for.
    """

    layer: Callable[[int], MessagePassing]
    is_activated: bool
    is_residual: bool
    send: Callable[[MessagePassing, Tensor, Tensor], Parts]
    gather: Callable[[MessagePassing, Parts, Parts, Parts], Tensor]
    finish: Callable[..., Tensor]


def _plain(_layer: MessagePassing, h: Tensor, _degree: Tensor) -> Parts:
    return (h,)


def _sum(_layer: MessagePassing, own: Parts, left: Parts, right: Parts) -> Tensor:
    return own[0] + left[0] + right[0]


def _send_gcn(layer: GCNConv, h: Tensor, degree: Tensor) -> Parts:
    return (layer.lin(h) * degree.rsqrt().unsqueeze(-1),)


def _gather_gcn(layer: GCNConv, own: Parts, left: Parts, right: Parts) -> Tensor:
    return _sum(layer, own, left, right) / math.sqrt(FAMILY)


def _finish_gcn(layer: GCNConv, received: Tensor, _h: Tensor) -> Tensor:
    return received + layer.bias


def _gin(channels: int) -> GINConv:
    steps = [
        step
        for _ in range(2)
        for step in (nn.Linear(channels, channels), nn.BatchNorm1d(channels), nn.ReLU())
    ]
    return GINConv(nn.Sequential(*steps))


def _finish_gin(
    layer: GINConv, received: Tensor, h: Tensor, counts: Tensor | None = None
) -> Tensor:
    """The layer's output; with counts, of rows [R, D] each of which stands for so many nodes."""
    total = received + (1 + layer.eps) * h
    if counts is None:
        return layer.nn(total.flatten(0, -2)).view_as(total)
    for step in layer.nn:
        is_norm = isinstance(step, nn.BatchNorm1d)
        total = _counted_batch_norm(step, total, counts) if is_norm else step(total)
    return total


def _counted_batch_norm(norm: nn.BatchNorm1d, rows: Tensor, counts: Tensor) -> Tensor:
    """What BatchNorm gives if every row is there as often as its count says."""
    if not norm.training:
        return norm(rows)
    number = counts.sum()
    mean = counts @ rows / number
    centred = rows - mean
    variance = counts @ (centred * centred) / number
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * number / (number - 1), norm.momentum)
    return centred * (variance + norm.eps).rsqrt() * norm.weight + norm.bias


def _finish_ggnn(layer: GatedGraphConv, received: Tensor, h: Tensor) -> Tensor:
    message = received @ layer.weight[0]
    return layer.rnn(message.flatten(0, -2), h.flatten(0, -2)).view_as(h)


def _send_gat(layer: GATConv, h: Tensor, _degree: Tensor) -> Parts:
    """Values z [..., H, C], scores as source and as target [..., H], and squared norms of z."""
    projection = layer.lin.weight  # calling layer.lin would begin a PyG pass for hooks
    by_head = projection.view(layer.heads, layer.out_channels, -1)
    scores = [
        nn.functional.linear(h, torch.einsum("hcd,hc->hd", by_head, att.squeeze(0)))
        for att in (layer.att_src, layer.att_dst)
    ]
    z = nn.functional.linear(h, projection).unflatten(-1, (layer.heads, layer.out_channels))
    return (z, *scores, z.square().sum(-1)) if hasattr(layer, "score_norm") else (z, *scores)


def _gather_gat(layer: GATConv, own: Parts, left: Parts, right: Parts) -> Tensor:
    family = (own, left, right)
    score = torch.stack([part[1] for part in family]) + own[2]  # [3, ..., H]
    if hasattr(layer, "score_norm"):
        norm = layer.score_norm.norm
        att = torch.cat([layer.att_src, layer.att_dst], dim=-1).squeeze(0).norm(dim=-1)
        inside = torch.stack([part[3] for part in family]).amax(dim=0) + own[3]
        root = inside.clamp(min=torch.finfo(inside.dtype).tiny).sqrt()
        score = score / (norm.scale * att * root + norm.eps)
    weights = nn.functional.leaky_relu(score, layer.negative_slope).softmax(dim=0).unsqueeze(-1)
    return weights[0] * own[0] + weights[1] * left[0] + weights[2] * right[0]


def _finish_gat(layer: GATConv, received: Tensor, _h: Tensor) -> Tensor:
    return received.flatten(-2) + layer.bias


TREE_LAYERS = {
    "gcn": TreeLayer(
        lambda channels: GCNConv(channels, channels),
        is_activated=True,
        is_residual=True,
        send=_send_gcn,
        gather=_gather_gcn,
        finish=_finish_gcn,
    ),
    "gin": TreeLayer(
        _gin, is_activated=True, is_residual=True, send=_plain, gather=_sum, finish=_finish_gin
    ),
    "ggnn": TreeLayer(
        lambda channels: GatedGraphConv(channels, num_layers=1),
        is_activated=False,
        is_residual=False,
        send=_plain,
        gather=_sum,
        finish=_finish_ggnn,
    ),
    "gat": TreeLayer(
        lambda channels: GATConv(channels, channels // HEADS, heads=HEADS),
        is_activated=False,
        is_residual=True,
        send=_send_gat,
        gather=_gather_gat,
        finish=_finish_gat,
    ),
}
"""The layers of trees by the name of their architecture."""
