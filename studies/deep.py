"""Deep networks for the nodes of one graph, any number of layers, a normalisation by name.

The skeleton is that of the LipschitzNorm paper's code: a linear map, L times dropout, a layer of
PyG and an activation (but for the last), and a linear map to the classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.nn import (
    GATConv,
    GatedGraphConv,
    GCNConv,
    MessagePassing,
    TransformerConv,
)

from mapkg.lipschitz_norm import lipschitz_normalise
from studies.feature_norms import FEATURE_NORMS, feature_norm

LIPSCHITZ_NORMS = {
    "lipschitz": "paper",
    "lipschitz-published": "published",
    "lipschitz-published-si": "published-si",
}
"""Normalisations of scores, by the name of ``deep_network`` and the mode of ``LipschitzNorm``."""

NORMS = (*FEATURE_NORMS, *LIPSCHITZ_NORMS)
"""What ``norm`` of ``deep_network`` may be. The published code takes any other name for none."""


@dataclass(frozen=True)
class _Architecture:
    layer: Callable[..., MessagePassing]
    dropout: float
    activation: Callable[[Tensor], Tensor] = nn.functional.elu


def _gat(channels: int, hidden: int, heads: int, dropout: float) -> GATConv:
    return GATConv(channels, hidden, heads=heads, dropout=dropout)


def _transformer(channels: int, hidden: int, heads: int, dropout: float) -> TransformerConv:
    return TransformerConv(channels, hidden, heads=heads, dropout=dropout)


def _gcn(channels: int, hidden: int, heads: int, _dropout: float) -> GCNConv:
    return GCNConv(channels, hidden * heads)


def _ggnn(_channels: int, hidden: int, heads: int, _dropout: float) -> GatedGraphConv:
    return GatedGraphConv(hidden * heads, num_layers=1)  # a narrower input is filled with zeros


_NORMS_BEFORE_ACTIVATION = ("layer", "layer-graph")
_ARCHITECTURES = {
    "gat": _Architecture(_gat, 0.6),
    "gt": _Architecture(_transformer, 0.5),
    "gcn": _Architecture(_gcn, 0.5, nn.functional.relu),
    "ggnn": _Architecture(_ggnn, 0.5, lambda x: x),
}

ARCHITECTURES = tuple(_ARCHITECTURES)
"""``gat``, ``GATConv`` with self-loops and ELU; ``gt``, ``TransformerConv`` with a root weight, no
loops, and ELU; ``gcn``, ``GCNConv`` with ReLU; ``ggnn``, ``GatedGraphConv`` with one step."""


class DeepNetwork(nn.Module):
    """Linear -> L x [dropout -> layer -> norm? -> activation -> norm? -> + x?] -> Linear.

    See ``deep_network``.

    Attributes:
        layers: the layers of PyG, to hook or to read gradients from.
    """

    def __init__(
        self,
        layers: list[MessagePassing],
        norms: list[nn.Module],
        *,
        in_channels: int,
        hidden_channels: int,
        width: int,
        out_channels: int,
        dropout: float,
        activation: Callable[[Tensor], Tensor],
        is_norm_first: bool,
        residual: bool,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_channels, hidden_channels)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(norms)
        self.head = nn.Linear(width, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation
        self.is_norm_first = is_norm_first
        self.residual = residual

    def forward(
        self,
        x: Float[Tensor, "N words"],
        edge_index: Int[Tensor, "2 E"],
        batch: Int[Tensor, " N"] | None = None,
    ) -> Float[Tensor, "N classes"]:
        """Scores of the classes of every node.

        Args:
            x: features, shape [N, words].
            edge_index: source and target of each edge, shape [2, E].
            batch: graph of each node, for norms of whole graphs; None means one graph.
        """
        x = self.embed(x)
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True), 1):
            new = layer(self.dropout(x), edge_index)
            if self.is_norm_first:
                new = norm(new, batch)
            if number < len(self.layers):
                new = self.activation(new)
            if not self.is_norm_first:
                new = norm(new, batch)
            x = x + new if self.residual and x.shape == new.shape else new
        return self.head(x)


def deep_network(
    architecture: str,
    num_layers: int,
    *,
    in_channels: int,
    out_channels: int,
    hidden_channels: int = 64,
    heads: int = 8,
    norm: str = "none",
    scale: float | None = None,
    dropout: float | None = None,
    attention_dropout: float = 0.3,
    residual: bool = False,
) -> DeepNetwork:
    """A deep GAT, Graph Transformer, GCN or GGNN.

    Seed torch before the call to fix the initial weights.

    Args:
        architecture: one of ``ARCHITECTURES``.
        num_layers: L, 1 or more.
        in_channels: features of a node.
        out_channels: classes.
        hidden_channels: of each head.
        heads: 1 or more; their outputs are concatenated. GCN and GGNN have no heads, and channels
            for as many.
        norm: one of ``NORMS``: nothing, a norm of the nodes' features after every layer, or a
            normalisation of the scores inside it.
        scale: f of LipschitzNorm or s of PairNorm; None means their defaults.
        dropout: of features; None means the published one, 0.6 for ``"gat"`` and 0.5 for ``"gt"``,
            or 0.5.
        attention_dropout: of attention weights, if there are any.
        residual: whether each layer but the first, which changes the width, is added to what came
            before it.

    Raises:
        ValueError: if a name is unknown, a size is below 1, or scores are to be normalised that a
            layer does not have.

    Source: LipschitzNorm paper, published code ``models/deepgat.py`` and ``models/deepgt.py``.
    differs: LayerNorm has weights of its own in every layer, takes any number of heads, and is
    there for GAT, too; that code has no GCN and GGNN, and no residual connections.
    """
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"architecture: expected one of {ARCHITECTURES}, got {architecture!r}")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    for name, value in (
        ("num_layers", num_layers),
        ("heads", heads),
        ("hidden_channels", hidden_channels),
    ):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    if norm in LIPSCHITZ_NORMS and architecture not in ("gat", "gt"):
        raise ValueError(
            f"norm: {norm!r} divides attention scores, which {architecture!r} does not have; "
            "expected architecture 'gat' or 'gt'"
        )
    kind, width = _ARCHITECTURES[architecture], hidden_channels * heads
    channels = [hidden_channels, *[width] * (num_layers - 1)]
    layers = [kind.layer(size, hidden_channels, heads, attention_dropout) for size in channels]
    of_features = "none" if norm in LIPSCHITZ_NORMS else norm
    settings = {} if scale is None else {"scale": scale}
    network = DeepNetwork(
        layers,
        [feature_norm(of_features, width, **settings) for _ in layers],
        in_channels=in_channels,
        hidden_channels=hidden_channels,
        width=width,
        out_channels=out_channels,
        dropout=kind.dropout if dropout is None else dropout,
        activation=kind.activation,
        is_norm_first=norm in _NORMS_BEFORE_ACTIVATION,
        residual=residual,
    )
    if norm in LIPSCHITZ_NORMS:
        lipschitz_normalise(network, LIPSCHITZ_NORMS[norm], scale=scale)
    return network


def gradient_norms(network: DeepNetwork) -> dict[str, list[float]]:
    """Norms of the gradients that the last backward pass left, layer by layer.

    Args:
        network: after ``loss.backward()``.

    Returns:
        ``weights``, the Frobenius norm over all matrices of a layer (W of GAT and GCN; query, key,
        value and root of the Graph Transformer; W and the gates of GGNN), and ``attention``, over
        what only scores depend on (both attention vectors of GAT; query and key of the Graph
        Transformer; empty for the others). NaN or infinite where gradients are.

    Raises:
        ValueError: if there was no backward pass.
    """
    found: dict[str, list[float]] = {"weights": [], "attention": []}
    for layer in network.layers:
        parts = {
            "weights": [
                p
                for name, p in layer.named_parameters()
                if name.startswith(("lin", "weight", "rnn"))
            ],
            "attention": [
                p
                for name, p in layer.named_parameters()
                if name.startswith(("att", "lin_query", "lin_key"))
            ],
        }
        for name, parameters in parts.items():
            gradients = [p.grad for p in parameters if p.grad is not None and p.dim() > 1]
            if not gradients and name == "attention" and not parameters:
                continue  # a layer without attention
            if not gradients:
                raise ValueError("expected gradients; call loss.backward() before")
            norms = torch.stack([gradient.double().norm() for gradient in gradients])
            found[name].append(norms.norm().item())
    return found
