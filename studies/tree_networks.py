"""Networks for Tree-NeighborsMatch: layers of PyG, and the same computed without scatter.

All examples of a depth share one tree, so that neighbors can be read off by slicing: in level
order the children of place p are at 2p + 1 and 2p + 2. What no later layer sends to the root is
not computed at all. And since nothing goes down the tree, all keys that are asked of one
permutation share what is below the root.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GatedGraphConv, GCNConv, GINConv, PairNorm

from mapkg.lipschitz_norm import EPS, lipschitz_normalise

HEADS = 4
"""Of GAT."""

LIPSCHITZ_NORMS = ("lipschitz", "lipschitz-layer")
"""Norms of scores, for GAT alone; the second has LayerNorm after every layer as well."""

NORMS = ("none", "layer", "pair", *LIPSCHITZ_NORMS)
"""Nothing, a norm of features after every layer, or one of the scores inside it."""


def _gin(channels: int) -> GINConv:
    steps: list[nn.Module] = []
    for _ in range(2):
        steps += [nn.Linear(channels, channels), nn.BatchNorm1d(channels), nn.ReLU()]
    return GINConv(nn.Sequential(*steps))


LAYERS = {
    "gcn": lambda channels: GCNConv(channels, channels),
    "gin": _gin,
    "ggnn": lambda channels: GatedGraphConv(channels, num_layers=1),
    "gat": lambda channels: GATConv(channels, channels // HEADS, heads=HEADS),
}


class TreeNetwork(nn.Module):
    """Embed -> L x [layer -> ReLU? -> + x? -> norm?] -> root -> Linear, with L = depth + 1.

    GCN, GIN and GAT add each layer to what came before it, GGNN does not; GCN and GIN end each
    layer with a ReLU. Seed torch before the call to fix the initial weights.

    Args:
        architecture: one of ``LAYERS``.
        depth: edges from the root to a leaf, 1 or more.
        norm: one of ``NORMS``. GIN has BatchNorm inside its layers whatever the norm.
        scale: f of LipschitzNorm; None means 1.
        channels: D, a multiple of 4 for GAT's heads.

    Source: Tree-NeighborsMatch, published code ``models/graph_model.py``, whose networks but GGNN
    have LayerNorm by default.
    """

    def __init__(
        self,
        architecture: str,
        depth: int,
        *,
        norm: str = "none",
        scale: float | None = None,
        channels: int = 32,
    ) -> None:
        super().__init__()
        self.architecture, self.depth, self.norm = architecture, depth, norm
        classes, self.num_nodes = 2**depth + 1, 2 ** (depth + 1) - 1
        self.key = nn.Embedding(classes, channels)
        self.value = nn.Embedding(classes, channels)
        self.layers = nn.ModuleList(LAYERS[architecture](channels) for _ in range(depth + 1))
        name = norm.removeprefix("lipschitz-")
        make = {"layer": lambda: nn.LayerNorm(channels), "pair": PairNorm}.get(name, nn.Identity)
        self.norms = nn.ModuleList(make() for _ in self.layers)
        self.head = nn.Linear(channels, classes, bias=False)
        if norm in LIPSCHITZ_NORMS:
            lipschitz_normalise(self, scale=scale)

    def forward(
        self, x: Int[Tensor, "N 2"], edge_index: Int[Tensor, "2 E"], batch: Int[Tensor, " N"]
    ) -> Float[Tensor, "B classes"]:
        """Scores of the classes of every tree, by the layers of PyG, nodes in pre-order."""
        h = self.key(x[:, 0]) + self.value(x[:, 1])
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = self._combine(h, layer(h, edge_index))
            h = norm(h, batch) if self.norm == "pair" else norm(h)
        return self.head(h[:: self.num_nodes])

    def dense(self, pairs: Int[Tensor, "B nodes 2"]) -> Float[Tensor, "B classes"]:
        """The same scores without scatter, from keys and values in **level order**."""
        h = self._embed(pairs)
        for number in range(len(self.layers)):
            h = self._layer(number, h, self._reaching(number))
        return self.head(h[:, 0])

    @property
    def can_share(self) -> bool:
        """Whether nodes below the root do not see its key, since no norm is over nodes."""
        return self.norm != "pair" and self.architecture != "gin"

    def shared(
        self, pairs: Int[Tensor, "P nodes 2"], keys: Int[Tensor, " B"], tree: Int[Tensor, " B"]
    ) -> Float[Tensor, "B classes"]:
        """The same scores for many keys of few trees; what is below their roots is computed once.

        Args:
            pairs: key and value of every node in **level order**; those of the root do not count.
            keys: of the root, from 1.
            tree: the row of ``pairs`` of every example.
        """
        h, root = self._embed(pairs), self.key(keys.long()) + self.value.weight[0]
        for number in range(len(self.layers)):
            family = torch.cat([root[:, None], h[tree, 1:3]], dim=1)
            root = self._layer(number, family, 1)[:, 0]
            if number < self.depth:
                h = self._layer(number, h, self._reaching(number))
        return self.head(root)

    def _embed(self, pairs: Tensor) -> Tensor:
        pairs = pairs.long()
        return self.key(pairs[..., 0]) + self.value(pairs[..., 1])

    def _reaching(self, number: int) -> int:
        """How many nodes after a layer still send to the root, or are seen by a norm."""
        return 2 ** (self.depth - (number if self.can_share else 0) + 1) - 1

    def _layer(self, number: int, h: Tensor, kept: int) -> Tensor:
        """A layer with its norm for the first nodes of every tree."""
        layer, norm = self.layers[number], self.norms[number]
        degree = torch.ones(h.size(1)).to(h)  # 3 where a node hears itself and two children
        degree[: 2**self.depth - 1] = 3
        new = self._combine(h[:, :kept], _DENSE[self.architecture](layer, h, kept, degree))
        if self.norm != "pair":
            return norm(new)
        centered = new - new.mean(dim=1, keepdim=True)
        size = centered.square().sum(-1).mean(dim=1)
        return norm.scale * centered / (norm.eps + size).sqrt()[:, None, None]

    def _combine(self, h: Tensor, new: Tensor) -> Tensor:
        new = new.relu() if self.architecture in ("gcn", "gin") else new
        return new if self.architecture == "ggnn" else h + new


def _family(part: Tensor, inner: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first nodes of every tree, their left and their right children."""
    return part[:, :inner], part[:, 1 : 2 * inner : 2], part[:, 2 : 2 * inner + 1 : 2]


def _sum(h: Tensor, kept: int) -> Tensor:
    """What the first nodes receive as a sum; leaves hear themselves alone."""
    inner = min(kept, h.size(1) // 2)
    own, left, right = _family(h, inner)
    return torch.cat([own + left + right, h[:, inner:kept]], dim=1)


def _gcn(layer: GCNConv, h: Tensor, kept: int, degree: Tensor) -> Tensor:
    root = degree.rsqrt()[:, None]
    return root[:kept] * _sum(root * layer.lin(h), kept) + layer.bias


def _gin_dense(layer: GINConv, h: Tensor, kept: int, _degree: Tensor) -> Tensor:
    total = _sum(h, kept) + (1 + layer.eps) * h[:, :kept]
    return layer.nn(total.flatten(0, 1)).view_as(total)


def _ggnn(layer: GatedGraphConv, h: Tensor, kept: int, _degree: Tensor) -> Tensor:
    message, own = _sum(h, kept) @ layer.weight[0], h[:, :kept]
    return layer.rnn(message.flatten(0, 1), own.flatten(0, 1)).view_as(own)


def _gat(layer: GATConv, h: Tensor, kept: int, _degree: Tensor) -> Tensor:
    inner = min(kept, h.size(1) // 2)
    # Calling layer.lin would begin a PyG pass for the hooks of LipschitzNorm.
    z = nn.functional.linear(h, layer.lin.weight).unflatten(-1, (layer.heads, layer.out_channels))
    by_node = _family((z * layer.att_src).sum(-1), inner)
    score = torch.stack(by_node) + (z * layer.att_dst).sum(-1)[:, :inner]  # [3, B, inner, H]
    if hasattr(layer, "score_norm"):
        norm = layer.score_norm.norm
        att = torch.cat([layer.att_src, layer.att_dst], dim=-1).squeeze(0).norm(dim=-1)
        square = z.square().sum(-1)
        inside = torch.stack(_family(square, inner)).amax(dim=0) + square[:, :inner]
        root = inside.clamp(min=torch.finfo(inside.dtype).tiny).sqrt()
        score = score / (norm.scale * att * root + EPS)
    weight = nn.functional.leaky_relu(score, layer.negative_slope).softmax(dim=0).unsqueeze(-1)
    received = (weight * torch.stack(_family(z, inner))).sum(dim=0)
    return torch.cat([received, z[:, inner:kept]], dim=1).flatten(-2) + layer.bias


_DENSE = {"gcn": _gcn, "gin": _gin_dense, "ggnn": _ggnn, "gat": _gat}
