"""Massive activations and gradient flow in attention-based graph neural networks.

The package computes, the notebooks argue:

- ``configs``: every hyper-parameter the papers and their code state.
- ``data``: ``load(name)`` gives graphs in three splits.
- ``models``: attention networks with edge features; ``models.official`` reads published weights.
- ``train``, ``evaluation``, ``metrics``, ``checkpoint``: fit, score, save, load;
  ``train_nodes``: the same for the nodes of one graph.
- ``train_stacked``: many seeds of one network at once; ``padded_batches``, ``score_measures``.
- ``hooks``: record or edit what any submodule of any torch model returns, or what a layer of
  PyG computes inside.
- ``detection``: activation ratio, threshold, summaries that stream, laws, nulls, and a report
  for any model.
- ``observation``: what the scores of a network look like over many graphs.
- ``attribution``: what massive activations sit on, and whether that explains predictions.
- ``attack``: noise on embeddings that ascends the loss.
- ``lipschitz``: how much attention amplifies a change of its input, and bounds of that.
- ``experiments``: from a configuration to tidy tables; ``plots``: from tables to figures.
- ``notebook``, ``commands``: notebooks with other parameters, and what the command line does.
"""

from importlib import import_module
from typing import Any

_HOMES = {"CONFIGS": "configs", "Config": "configs", "load": "data", "build": "models"}

__all__ = ["CONFIGS", "Config", "build", "load"]


def __getattr__(name: str) -> Any:
    """The names above, imported when they are asked for: ``mapkg.hooks`` needs no RDKit."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
