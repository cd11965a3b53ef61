"""Attention networks with edge features, observable by name."""

from mapkg.models.edge_attention import EdgeAttention, GraphTransformerLayer
from mapkg.models.networks import GraphNetwork, build

__all__ = ["EdgeAttention", "GraphNetwork", "GraphTransformerLayer", "build"]
