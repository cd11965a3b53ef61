"""Attention networks with edge features, observable by name."""

from mapkg.models.config import Config
from mapkg.models.edge_attention import EdgeAttention, GraphTransformerLayer, NodeStreamLayer
from mapkg.models.egat import EdgeGATLayer
from mapkg.models.network import GraphNetwork, build

__all__ = [
    "Config",
    "EdgeAttention",
    "EdgeGATLayer",
    "GraphNetwork",
    "GraphTransformerLayer",
    "NodeStreamLayer",
    "build",
]
