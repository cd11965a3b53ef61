"""Norms of node features, the rivals of LipschitzNorm in deep networks."""

from torch import Tensor, nn
from torch_geometric.nn import LayerNorm, PairNorm


def feature_norm(name: str, channels: int, *, scale: float = 1.0) -> nn.Module:
    """A norm of node features, called as ``norm(x, batch)``.

    Args:
        name: ``"none"``; ``"layer"``, LayerNorm of each node; ``"layer-graph"``, LayerNorm over
            all nodes and channels of a graph; ``"pair"`` or ``"pair-si"``, PairNorm, which scales
            all nodes of a graph alike or each by itself.
        channels: D.
        scale: s of PairNorm.

    Raises:
        ValueError: if the name is unknown.

    Source: PairNorm paper; PyG.
    """
    if name not in FEATURE_NORMS:
        raise ValueError(f"norm: expected one of {FEATURE_NORMS}, got {name!r}")
    if name == "none":
        return _NoNorm()
    if name in ("layer", "layer-graph"):
        return LayerNorm(channels, mode="node" if name == "layer" else "graph")
    return PairNorm(scale, scale_individually=name == "pair-si")


FEATURE_NORMS = ("none", "layer", "layer-graph", "pair", "pair-si")
"""The norms of ``feature_norm``."""


class _NoNorm(nn.Module):
    def forward(self, x: Tensor, batch: Tensor | None = None) -> Tensor:
        return x
