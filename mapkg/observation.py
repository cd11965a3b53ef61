"""Look at the scores of a network over many graphs: summaries that stream, tables of states."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from mapkg import hooks
from mapkg.configs import Config
from mapkg.data import Graphs, Splits
from mapkg.detection import ActivationSummary, activation_ratio
from mapkg.evaluation import batches, calibrate_batch_norm, predict, score
from mapkg.models import build

SCORES = "layers.*.score"
"""The score of every layer, the tensor the massive-activations paper analyses."""

CLAMPED = ("gt", "graphit", "san")
"""Architectures that sum the score of a head and clamp the sum."""


@torch.no_grad()
def summarise(
    model: nn.Module,
    graphs: Graphs,
    *,
    names: str | Sequence[str] = SCORES,
    heads: int | None = None,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
) -> dict[str, ActivationSummary]:
    """Summaries of what submodules return for the edges of graphs, in evaluation mode.

    Args:
        model: as for ``train.fit``.
        graphs: the graphs to look at; or seed nodes, whose batches count as one graph each.
        names: submodules whose output has one row per edge, [E, channels] or [E, heads,
            channels of a head], names or patterns.
        heads: number of attention heads if the outputs are scores, for the share of saturated
            sums; None leaves that out.
        batch_size: graphs per forward pass; the result does not depend on it.
        device: where the model is.

    Returns:
        A summary per submodule, in the model's order.

    Raises:
        ValueError: if an output has not one row per edge; names the submodule.
    """
    summaries = {name: ActivationSummary(heads=heads) for name in hooks.resolve(model, names)}
    was_training = model.training
    model.eval()
    for batch in batches(graphs, batch_size, device):
        is_sampled = batch.batch is None
        graph = None if is_sampled else batch.batch[batch.edge_index[0]]
        size = (batch.num_edges, 1 if is_sampled else batch.num_graphs)

        def update(name: str, x: torch.Tensor, graph=graph, size=size) -> None:
            num_edges, num_graphs = size
            summaries[name].update(_by_edge(name, x, num_edges), graph, num_graphs)

        with hooks.record(model, names, reduce=update):
            predict(model, batch)
    model.train(was_training)
    return summaries


def row_maxima(
    model: nn.Module,
    graphs: Graphs,
    *,
    names: str | Sequence[str] = SCORES,
    batch_size: int = 128,
) -> torch.Tensor:
    """The largest activation ratio of every edge in every layer, in evaluation mode.

    Args:
        model: as for ``train.fit``.
        graphs: the graphs to look at.
        names: submodules whose output has one row per edge, names or patterns.
        batch_size: graphs per forward pass.

    Returns:
        Shape [layers * edges]; NaN where a row has no ratio.
    """
    maxima: list[torch.Tensor] = []
    was_training = model.training
    model.eval()
    with (
        torch.no_grad(),
        hooks.record(
            model, names, reduce=lambda _, x: maxima.append(activation_ratio(x).amax(dim=-1))
        ),
    ):
        for batch in batches(graphs, batch_size):
            predict(model, batch)
    model.train(was_training)
    return torch.cat(maxima)


def _by_edge(name: str, x: Any, num_edges: int) -> torch.Tensor:
    """An output as [E, channels]."""
    if not (isinstance(x, torch.Tensor) and x.dim() in (2, 3) and x.size(0) == num_edges):
        shape = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(
            f"{name}: expected a row per edge, [{num_edges}, channels] or [{num_edges}, heads, "
            f"channels], got {shape}; name a submodule that works on edges, or use "
            "detection.report, which takes any rows"
        )
    return x.flatten(start_dim=1)


@torch.no_grad()
def observe_states(
    weights: Mapping[str, Mapping[str, torch.Tensor]],
    config: Config,
    splits: Splits,
    *,
    device: str | torch.device = "cpu",
) -> dict[str, pd.DataFrame]:
    """What the scores of one network look like on the test split, with several weights.

    Args:
        weights: from state to state dict; the state ``base_calibrated`` has its BatchNorm
            statistics set to those of the training split first.
        config: what the weights belong to.
        splits: the data.
        device: where to compute.

    Returns:
        The tables ``summary``, ``graph_maxima`` and ``histogram`` of ``Emergence``, without
        the columns that say where they come from.
    """
    settings = dict(batch_size=config.batch_size, device=device)
    model = build(config).to(device)
    tables: dict[str, list[pd.DataFrame]] = {"summary": [], "graph_maxima": [], "histogram": []}
    for state, values in weights.items():
        model.load_state_dict(values)
        if state == "base_calibrated":
            calibrate_batch_norm(model, splits.train, **settings)
        metrics = score(model, splits.test, loss=config.loss, **settings)
        found = summarise(
            model,
            splits.test,
            heads=config.heads if config.architecture in CLAMPED else None,
            **settings,
        )
        for layer, summary in enumerate(found.values()):
            row = {"state": state, "layer": layer}
            counts, edges = summary.neg_log_ratio.counts, summary.neg_log_ratio.edges
            filled = counts.nonzero().flatten()
            columns = {
                "summary": {
                    **{f"test_{metric}": [value] for metric, value in metrics.items()},
                    **summary.statistics(),
                },
                "graph_maxima": {
                    "graph": range(len(summary.graph_maxima)),
                    "max_ratio": summary.graph_maxima,
                },
                "histogram": {
                    "bin": filled.tolist(),
                    "low": edges[filled].tolist(),
                    "count": counts[filled].tolist(),
                },
            }
            for table, values_of in columns.items():
                frame = pd.DataFrame(values_of)
                tables[table].append(pd.DataFrame(row, index=frame.index).join(frame))
    return {table: pd.concat(parts, ignore_index=True) for table, parts in tables.items()}
