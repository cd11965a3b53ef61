"""Deep networks for the nodes of one graph, any number of layers, a normalization by name.

The skeleton is that of the LipschitzNorm paper's code: a linear map, L times dropout, a layer of
PyG and an activation (but for the last), and a linear map to the classes.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GatedGraphConv, GCNConv, PairNorm, TransformerConv

from mapkg.lipschitz_norm import lipschitz_normalise

FEATURE_NORMS = {
    "none": lambda _channels, _scale: nn.Identity(),
    "layer": lambda channels, _scale: nn.LayerNorm(channels),
    "pair": lambda _channels, scale: PairNorm(scale),
    "pair-si": lambda _channels, scale: PairNorm(scale, scale_individually=True),
}
LIPSCHITZ_NORMS = {
    "lipschitz": "paper",
    "lipschitz-published": "published",
    "lipschitz-published-si": "published-si",
}
"""Normalizations of scores, by name, with the mode of ``LipschitzNorm``."""

NORMS = (*FEATURE_NORMS, *LIPSCHITZ_NORMS)
"""What ``norm`` of ``DeepNetwork`` may be. The published code takes any other name for none."""

LAYERS = {
    "gat": lambda size, hidden, heads, dropout: GATConv(size, hidden, heads, dropout=dropout),
    "gt": lambda size, hidden, heads, dropout: TransformerConv(
        size, hidden, heads, dropout=dropout
    ),
    "gcn": lambda size, hidden, heads, _dropout: GCNConv(size, hidden * heads),
    # A narrower input is filled with zeros.
    "ggnn": lambda _size, hidden, heads, _dropout: GatedGraphConv(hidden * heads, num_layers=1),
}
"""GAT has self-loops; the Graph Transformer has a root weight and no loops."""

ACTIVATIONS = {"gcn": nn.functional.relu, "ggnn": lambda x: x}
"""Of architectures that have another one than ELU."""


class DeepNetwork(nn.Module):
    """Linear -> L x [dropout -> layer -> LayerNorm? -> activation -> PairNorm? -> + x?] -> Linear.

    Seed torch before the call to fix the initial weights.

    Args:
        architecture: one of ``LAYERS``.
        num_layers: L, 1 or more.
        in_channels, out_channels: features of a node, and classes.
        hidden_channels: of each head.
        heads: their outputs are concatenated. GCN and GGNN have no heads, and channels for as many.
        norm: one of ``NORMS``: nothing, a norm of the nodes' features after every layer, or a
            normalization of the scores inside it.
        scale: f of LipschitzNorm or s of PairNorm; None means their defaults.
        dropout: of features; None means the published one, 0.6 for GAT and else 0.5.
        attention_dropout: of attention weights, if there are any.
        residual: whether each layer but the first, which changes the width, is added to what came
            before it.

    Raises:
        ValueError: if a name is unknown, a size is below 1, or scores are to be normalized that a
            layer does not have.

    Source: LipschitzNorm paper, published code ``models/deepgat.py`` and ``models/deepgt.py``.
    differs: LayerNorm has weights of its own in every layer, takes any number of heads, and is
    there for GAT, too; that code has no GCN and GGNN, and no residual connections.
    """

    def __init__(
        self,
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
    ) -> None:
        super().__init__()
        if architecture not in LAYERS:
            raise ValueError(f"architecture: expected one of {tuple(LAYERS)}, got {architecture!r}")
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
        sizes = {"num_layers": num_layers, "heads": heads, "hidden_channels": hidden_channels}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        if norm in LIPSCHITZ_NORMS and architecture not in ("gat", "gt"):
            raise ValueError(
                f"norm: {norm!r} divides attention scores, which {architecture!r} does not have; "
                "expected architecture 'gat' or 'gt'"
            )
        width = hidden_channels * heads
        layers = [
            LAYERS[architecture](size, hidden_channels, heads, attention_dropout)
            for size in [hidden_channels, *[width] * (num_layers - 1)]
        ]
        make_norm = FEATURE_NORMS.get(norm, FEATURE_NORMS["none"])
        size = 1.0 if scale is None else scale
        self.embed = nn.Linear(in_channels, hidden_channels)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(make_norm(width, size) for _ in layers)
        self.head = nn.Linear(width, out_channels)
        if dropout is None:
            dropout = 0.6 if architecture == "gat" else 0.5
        self.dropout = nn.Dropout(dropout)
        self.activation = ACTIVATIONS.get(architecture, nn.functional.elu)
        self.is_norm_first = norm == "layer"
        self.residual = residual
        if norm in LIPSCHITZ_NORMS:
            lipschitz_normalise(self, LIPSCHITZ_NORMS[norm], scale=scale)

    def forward(
        self, x: Float[Tensor, "N words"], edge_index: Int[Tensor, "2 E"]
    ) -> Float[Tensor, "N classes"]:
        """Scores of the classes of every node."""
        x = self.embed(x)
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True), 1):
            new = layer(self.dropout(x), edge_index)
            if self.is_norm_first:
                new = norm(new)
            if number < len(self.layers):
                new = self.activation(new)
            if not self.is_norm_first:
                new = norm(new)
            x = x + new if self.residual and x.shape == new.shape else new
        return self.head(x)


PARAMETERS = {
    "weights": ("lin", "weight", "rnn"),
    "attention": ("att", "lin_query", "lin_key"),
}
"""What the names of a layer's parameters begin with, by kind; all matrices, and those of scores."""


def gradient_norms(network: DeepNetwork) -> dict[str, list[float]]:
    """Frobenius norm of the gradients that the last backward pass left, by kind and layer.

    Empty for attention where a layer has none; NaN or infinite where gradients are.
    """
    norms: dict[str, list[float]] = {kind: [] for kind in PARAMETERS}
    for layer in network.layers:
        for kind, beginnings in PARAMETERS.items():
            gradients = [
                parameter.grad.double().norm()
                for name, parameter in layer.named_parameters()
                if name.startswith(beginnings) and parameter.dim() > 1
            ]
            if gradients:
                norms[kind].append(torch.stack(gradients).norm().item())
    return norms
