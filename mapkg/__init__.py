"""Massive activations and gradient flow in attention-based graph neural networks.

Tools for any network of torch or PyG:

- ``hooks``: ``record`` or ``edit`` what any submodule returns, or what a layer of PyG computes
  inside; ``scan`` does so batch by batch.
- ``measures``, ``all_measures``, ``nulls``: what "massive" means by the row ratio and by four other
  measures, streamed, and what chance gives; ``report(model, loader)`` has one verdict per layer.
- ``attribution``, ``interventions``, ``attack``: what activations that are massive by the row ratio
  sit on, what happens without them, and noise on embeddings that ascends the loss.
- ``lipschitz_norm``, ``lipschitz``, ``oversmoothing``: LipschitzNorm for the attention layers of
  a network, how much attention amplifies a change of its input, and how alike nodes become.
- ``models``: attention networks with edge features, observable by name.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    **dict.fromkeys(("edit", "record", "scan"), "hooks"),
    **dict.fromkeys(("activation_ratio", "is_massive"), "measures"),
    "report": "reporting",
    "lipschitz_normalise": "lipschitz_norm",
    **dict.fromkeys(("Config", "EdgeAttention", "build"), "models"),
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """The names above, imported when they are asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
