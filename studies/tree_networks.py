"""Networks for Tree-NeighborsMatch: layers of PyG, and the same computed without scatter.

All examples of a depth share one tree, so that neighbours can be read off by slicing: in level
order the children of place p are at 2p + 1 and 2p + 2. What no later layer sends to the root is
not computed at all. And since nothing goes down the tree, all keys that are asked of one
permutation share what is below the root.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.nn import PairNorm

from mapkg.lipschitz_norm import lipschitz_normalise
from studies.tree_layers import FAMILY, HEADS, TREE_LAYERS, Parts

LIPSCHITZ_NORMS = ("lipschitz", "lipschitz-layer")
"""Norms of scores, for GAT alone; the second has LayerNorm after every layer as well."""

NORMS = ("none", "layer", "pair", *LIPSCHITZ_NORMS)
"""What ``norm`` of ``tree_network`` may be. Nothing, a norm of features after every layer, or one
of the scores inside it."""

ARCHITECTURES = tuple(TREE_LAYERS)
"""For PyG's ``GCNConv``, ``GINConv``, ``GatedGraphConv`` with one step, and ``GATConv``."""


class TreeNetwork(nn.Module):
    """Embed -> L x [layer -> ReLU? -> + x? -> norm?] -> root -> Linear, see ``tree_network``.

    Attributes:
        layers: the layers of PyG.
        norms: of the features, one after each layer.
    """

    def __init__(self, architecture: str, depth: int, norm: str, channels: int) -> None:
        super().__init__()
        self.architecture, self.depth, self.norm = architecture, depth, norm
        classes, kind = 2**depth + 1, TREE_LAYERS[architecture]
        self.key = nn.Embedding(classes, channels)
        self.value = nn.Embedding(classes, channels)
        self.layers = nn.ModuleList(kind.layer(channels) for _ in range(depth + 1))
        name = norm.removeprefix("lipschitz-")
        make = {"layer": lambda: nn.LayerNorm(channels), "pair": PairNorm}.get(name, nn.Identity)
        self.norms = nn.ModuleList(make() for _ in self.layers)
        self.head = nn.Linear(channels, classes, bias=False)
        self.num_nodes = 2 ** (depth + 1) - 1
        degree = torch.ones(self.num_nodes, dtype=torch.float64)  # of each place in level order
        degree[: 2**depth - 1] = FAMILY
        self.register_buffer("degree", degree, persistent=False)

    def forward(
        self,
        x: Int[Tensor, "N 2"],
        edge_index: Int[Tensor, "2 E"],
        batch: Int[Tensor, " N"] | None = None,
    ) -> Float[Tensor, "B classes"]:
        """Scores of the classes of every tree, by the layers of PyG.

        Args:
            x: key and value of every node, trees one after another in pre-order, shape [N, 2].
            edge_index: child to parent and self-loops, shape [2, E].
            batch: tree of each node; None means what the order says.

        Raises:
            ValueError: if the nodes do not make whole trees of the network's depth.
        """
        if len(x) % self.num_nodes:
            raise ValueError(
                f"expected trees of {self.num_nodes} nodes (depth {self.depth}), got {len(x)} nodes"
            )
        if batch is None:
            batch = torch.arange(len(x), device=x.device) // self.num_nodes
        kind = TREE_LAYERS[self.architecture]
        h = self.key(x[:, 0]) + self.value(x[:, 1])
        for layer, norm in zip(self.layers, self.norms, strict=True):
            new = layer(h, edge_index)
            new = new.relu() if kind.is_activated else new
            h = h + new if kind.is_residual else new
            h = norm(h, batch) if self.norm == "pair" else norm(h)
        return self.head(h[:: self.num_nodes])

    def dense(self, pairs: Int[Tensor, "B nodes 2"]) -> Float[Tensor, "B classes"]:
        """The same scores, computed level by level without scatter.

        Args:
            pairs: key and value of every node in **level order**, shape [B, nodes, 2].

        Raises:
            ValueError: if the trees are not of the network's depth.
        """
        h = self._embedded(pairs)
        for number in range(len(self.layers)):
            h = self._level(number, h, self._send(number, h))
        return self.head(h[:, 0])

    @property
    def can_share(self) -> bool:
        """Whether nodes below the root do not see its key.

        With PairNorm they do, through the mean over the nodes of a tree.
        """
        return self.norm != "pair"

    def shared(
        self,
        pairs: Int[Tensor, "P nodes 2"],
        keys: Int[Tensor, " B"],
        tree: Int[Tensor, " B"],
    ) -> Float[Tensor, "B classes"]:
        """The same scores for many keys of few trees; what they share is computed once.

        Args:
            pairs: key and value of every node in **level order**, shape [P, nodes, 2]; that of
                the root does not count.
            keys: of the root, from 1, shape [B].
            tree: the row of ``pairs`` of every example, shape [B].

        Raises:
            ValueError: if the trees are not of the network's depth, or nodes see the root's key.
        """
        if not self.can_share:
            raise ValueError("expected a network without PairNorm over each tree; use dense")
        h = self._embedded(pairs)
        if self._has_batch_norm:
            return self._shared_statistics(h, keys, tree)
        root = self.key.weight[1:] + self.value.weight[0]  # one for each key
        for number in range(len(self.layers)):
            sent = self._send(number, h)
            if number == self.depth - 1:  # now the root's children know of the leaves
                root = root[keys.long() - 1]
            rows = tree if number >= self.depth - 1 else torch.zeros(len(root), dtype=torch.long)
            received = self._root_receives(number, root, sent, rows)
            root = self._finish(number, received, root)
            h = self._level(number, h, sent)
        return self.head(root)

    def _shared_statistics(self, h: Tensor, keys: Tensor, tree: Tensor) -> Tensor:
        """``shared`` where BatchNorm sees all nodes: each counts for as many examples as it has."""
        root = self.key(keys.long()) + self.value.weight[0]
        counts = tree.bincount(minlength=len(h)).to(h)
        counts = counts[:, None].repeat(1, self.num_nodes)
        counts[:, 0] = 0  # roots are rows of their own
        counts = torch.cat([counts.flatten(), counts.new_ones(len(root))])
        for number in range(len(self.layers)):
            sent = self._send(number, h)
            received = [self._level_receives(number, h, sent, self.num_nodes).flatten(0, 1)]
            received.append(self._root_receives(number, root, sent, tree))
            rows = torch.cat([h.flatten(0, 1), root])
            rows = self._finish(number, torch.cat(received), rows, counts)
            h, root = rows[: -len(root)].view_as(h), rows[-len(root) :]
        return self.head(root)

    @property
    def _has_batch_norm(self) -> bool:
        return self.architecture == "gin"

    def _root_receives(self, number: int, root: Tensor, sent: Parts, tree: Tensor) -> Tensor:
        """What roots [B, D] receive from themselves and their children in trees [B]."""
        kind, layer = TREE_LAYERS[self.architecture], self.layers[number]
        own = kind.send(layer, root, self.degree[:1].to(root))
        left, right = (tuple(part[tree, place] for part in sent) for place in (1, 2))
        return kind.gather(layer, own, left, right)

    def _embedded(self, pairs: Tensor) -> Tensor:
        if pairs.size(1) != self.num_nodes:
            raise ValueError(
                f"expected trees of {self.num_nodes} nodes (depth {self.depth}), got "
                f"{pairs.size(1)} nodes"
            )
        pairs = pairs.long()
        return self.key(pairs[..., 0]) + self.value(pairs[..., 1])

    def _send(self, number: int, h: Tensor) -> Parts:
        degree = self.degree[: h.size(1)].to(h)
        return TREE_LAYERS[self.architecture].send(self.layers[number], h, degree)

    def _level(self, number: int, h: Tensor, sent: Parts) -> Tensor:
        """A layer for all nodes, or for those whose messages still reach the root."""
        sees_all = self._has_batch_norm or self.norm == "pair"
        levels = self.depth - (0 if sees_all else number)
        kept = 2 ** (levels + 1) - 1
        return self._finish(number, self._level_receives(number, h, sent, kept), h[:, :kept])

    def _level_receives(self, number: int, h: Tensor, sent: Parts, kept: int) -> Tensor:
        """What the first nodes of every tree receive, inner ones and leaves."""
        inner = min(kept, h.size(1) // 2)
        family = (
            tuple(part[:, start : start + step * inner : step] for part in sent)
            for start, step in ((0, 1), (1, 2), (2, 2))
        )
        received = TREE_LAYERS[self.architecture].gather(self.layers[number], *family)
        return torch.cat([received, sent[0][:, inner:kept]], dim=1)

    def _finish(
        self, number: int, received: Tensor, h: Tensor, counts: Tensor | None = None
    ) -> Tensor:
        kind, norm = TREE_LAYERS[self.architecture], self.norms[number]
        counted = () if counts is None else (counts,)
        new = kind.finish(self.layers[number], received, h, *counted)
        new = new.relu() if kind.is_activated else new
        new = h + new if kind.is_residual else new
        return _pair_norm(norm, new) if self.norm == "pair" else norm(new)


def tree_network(
    architecture: str,
    depth: int,
    *,
    norm: str = "none",
    scale: float | None = None,
    channels: int = 32,
) -> TreeNetwork:
    """A network with one layer more than the tree is deep.

    GCN, GIN and GAT add each layer to what came before it, GGNN does not; GCN and GIN end each
    layer with a ReLU. Seed torch before the call to fix the initial weights.

    Args:
        architecture: one of ``ARCHITECTURES``.
        depth: edges from the root to a leaf, 1 or more.
        norm: one of ``NORMS``. GIN has BatchNorm inside its layers whatever the norm.
        scale: f of LipschitzNorm; None means 1.
        channels: D, a multiple of 4 for GAT's heads.

    Raises:
        ValueError: if a name is unknown, a size impossible, or scores are to be normalised that a
            layer does not have.

    Source: Tree-NeighborsMatch, published code ``models/graph_model.py``, whose networks but GGNN
    have LayerNorm by default.
    """
    if architecture not in TREE_LAYERS:
        raise ValueError(f"architecture: expected one of {ARCHITECTURES}, got {architecture!r}")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {NORMS}, got {norm!r}")
    if depth < 1:
        raise ValueError(f"depth: expected 1 or more, got {depth}")
    if channels < 1 or channels % HEADS:
        raise ValueError(f"channels: expected a multiple of {HEADS}, got {channels}")
    is_lipschitz = norm in LIPSCHITZ_NORMS
    if is_lipschitz and architecture != "gat":
        raise ValueError(
            f"norm: LipschitzNorm divides attention scores, which {architecture!r} does not have; "
            "expected architecture 'gat'"
        )
    if scale is not None and not is_lipschitz:
        raise ValueError(f"scale: expected None but with LipschitzNorm, got {scale}")
    network = TreeNetwork(architecture, depth, norm, channels)
    if is_lipschitz:
        lipschitz_normalise(network, scale=scale)
    return network


def _pair_norm(norm: PairNorm, h: Tensor) -> Tensor:
    centred = h - h.mean(dim=1, keepdim=True)
    size = centred.square().sum(-1).mean(dim=1)
    return norm.scale * centred / (norm.eps + size).sqrt()[:, None, None]
