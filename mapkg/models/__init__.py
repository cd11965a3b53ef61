"""Attention networks with edge features, observable by name."""

from mapkg.models.edge_attention import EdgeAttention, GraphTransformerLayer, NodeStreamLayer
from mapkg.models.edge_gat import EdgeGATLayer
from mapkg.models.networks import GraphNetwork, build

__all__ = [
    "EdgeAttention",
    "EdgeGATLayer",
    "GraphNetwork",
    "GraphTransformerLayer",
    "NodeStreamLayer",
    "build",
]
