"""Look at the scores of a network over many graphs: summaries that stream, tables of states."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch_geometric.data import Data

from mapkg import hooks
from mapkg.evaluation import Graphs, batches, calibrate_batch_norm, measure, predict, targets
from mapkg.measures import ActivationSummary, activation_ratio
from mapkg.models import pyg_layers as standard
from mapkg.models.config import Config
from mapkg.models.network import CLAMPED, SCORES, looked_at
from mapkg.rows import default_names, edge_rows
from studies.data import Splits, directions
from studies.extras import build


def _choice(config: Config) -> dict[str, Any]:
    """What of a configuration's network is looked at, with how many heads and graphs at a time."""
    heads = config.heads if config.architecture in CLAMPED else None
    names = looked_at(config.architecture)
    return {"names": names, "heads": heads, "batch_size": config.batch_size}


def summarise_scores(model: nn.Module, config: Config, graphs: Graphs) -> list[ActivationSummary]:
    """A summary per layer of what a configuration's network is looked at for."""
    return list(summarise(model, graphs, **_choice(config)).values())


def summarise(
    model: nn.Module,
    graphs: Graphs,
    *,
    names: str | Sequence[str] = SCORES,
    heads: int | None = None,
    batch_size: int = 128,
    predicted: list[tuple[Tensor, Tensor]] | None = None,
) -> dict[str, ActivationSummary]:
    """Summaries of what submodules return for the edges of graphs, in evaluation mode.

    With ``heads`` the share of saturated sums is among them; ``predicted`` gets predictions and
    targets of each batch.
    """
    modules = hooks.resolve(model, names)
    summaries = {name: ActivationSummary(heads=heads) for name in modules}

    def update(name: str, output: Any, batch: Any) -> None:
        rows = standard.recorded_rows(modules[name], output, batch.batch)
        graph = batch.batch
        if not isinstance(modules[name], nn.MultiheadAttention):  # which has a row per node
            # On a full graph the rows of the data's edges come first; the others are left out.
            rows, graph = rows[: batch.num_edges], graph[batch.edge_index[0]]
        summaries[name].update(rows, graph, batch.num_graphs)

    def forward(model: nn.Module, batch: Any) -> None:
        prediction = predict(model, batch)
        if predicted is not None:
            predicted.append((prediction, targets(batch)))

    loader = batches(graphs, batch_size)
    for _ in hooks.scan(model, loader, names, forward=forward, reduce=update):
        pass
    return summaries


def edge_maxima(
    model: nn.Module, graphs: Sequence[Data], *, names: str | Sequence[str] | None = None
) -> Float[Tensor, "layers E"]:
    """The largest activation ratio of every edge in every layer, NaN where a row has none.

    ``names`` are of what is looked at, as for ``mapkg.report``.
    """
    modules = hooks.resolve(model, names := names or default_names(model))
    maxima = [
        torch.stack(
            [activation_ratio(edge_rows(n, modules[n], x, batch)).amax(-1) for n, x in seen.items()]
        )
        for batch, seen in hooks.scan(model, batches(graphs, 128), names)
    ]
    return torch.cat(maxima, dim=1)


def bond_ratios(
    model: nn.Module,
    graphs: Sequence[Data],
    *,
    heads: int,
    names: str | Sequence[str] | None = None,
) -> list[Float[Tensor, "layers heads bonds"]]:
    """The largest ratio of either direction of every bond, over the median of all heads.

    Bonds are in the order of ``directions``, as those of ``to_molecule``; ``names`` as for
    ``edge_maxima``.
    """
    modules, found = hooks.resolve(model, names := names or default_names(model)), []
    for batch, seen in hooks.scan(model, batches(graphs, 1), names):
        by_layer = []
        for name, output in seen.items():
            ratio = activation_ratio(edge_rows(name, modules[name], output, batch))
            by_layer.append(ratio.unflatten(-1, (heads, -1)).amax(dim=-1).t())  # [heads, E]
        found.append(torch.stack(by_layer)[..., directions(batch)].amax(dim=2))
    return found


def observe_states(
    weights: Mapping[str, Mapping[str, Tensor]],
    config: Config,
    splits: Splits,
    *,
    device: str | torch.device = "cpu",
) -> dict[str, pd.DataFrame]:
    """Tables of ``Emergence``, without origin, of one network's test scores with several weights.

    The state ``base_calibrated`` first gets BatchNorm statistics of the training split, the mean
    over batches of the size used in training; tracked tables are made so.
    """
    model = build(config).to(device)
    tables: dict[str, list[pd.DataFrame]] = {"summary": [], "graph_maxima": [], "histogram": []}
    for state, values in weights.items():
        model.load_state_dict(values)
        if state == "base_calibrated":
            calibrate_batch_norm(model, splits.train, batch_size=config.batch_size)
        pairs: list[tuple[Tensor, Tensor]] = []  # one pass for predictions and scores
        summaries = summarise(model, splits.test, **_choice(config), predicted=pairs)
        metrics = measure(*map(torch.cat, zip(*pairs, strict=True)), config.loss)
        for layer, summary in enumerate(summaries.values()):
            maxima, histogram = summary.graph_maxima, summary.neg_log_ratio
            filled = histogram.counts.nonzero().flatten()
            bins = {"low": histogram.edges[filled].tolist()}
            bins["count"] = histogram.counts[filled].tolist()
            metrics_of = {f"test_{metric}": [value] for metric, value in metrics.items()}
            columns = {
                "summary": {**metrics_of, **summary.statistics()},
                "graph_maxima": {"graph": range(len(maxima)), "max_ratio": maxima},
                "histogram": {"bin": filled.tolist(), **bins},
            }
            for table, values_of in columns.items():
                tables[table].append(pd.DataFrame({"state": state, "layer": layer, **values_of}))
    return {table: pd.concat(parts, ignore_index=True) for table, parts in tables.items()}
