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

from typing import Any

__all__ = ["CONFIGS", "Config", "build", "load"]


def __getattr__(name: str) -> Any:
    """Import what the package offers when it is first asked for.

    A machine that trains from prepared tensors has no RDKit, which ``mapkg.data`` needs.
    """
    if name in ("CONFIGS", "Config"):
        from mapkg import configs

        return getattr(configs, name)
    if name == "build":
        from mapkg.models import build

        return build
    if name == "load":
        from mapkg.data import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
