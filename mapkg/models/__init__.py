"""Attention networks with edge features, observable by name."""

from importlib import import_module
from typing import Any

_HOMES = {
    "Config": "config",
    "EdgeAttention": "edge_attention",
    **dict.fromkeys(("GraphTransformerLayer", "NodeStreamLayer"), "edge_attention"),
    "EdgeGATLayer": "egat",
    **dict.fromkeys(("GraphNetwork", "build"), "network"),
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """The names above, imported when they are asked for: a configuration needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
