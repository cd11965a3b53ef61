"""Why a ratio is large: the score's two factors and the row's median, by type of edge."""

import math
from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch_geometric.data import Data

from mapkg import hooks
from mapkg.evaluation import batches, predict
from mapkg.measures import activation_ratio, row_median

ATTENTION = "layers.*.attention"
"""The attention of every layer of GT, GraphiT and SAN."""


def score_parts(
    model: nn.Module,
    graphs: Sequence[Data],
    labels: Sequence[Int[Tensor, " _"]],
    names: Sequence[str],
    *,
    batch_size: int = 128,
) -> pd.DataFrame:
    r"""Means of the parts of a score, for each layer and label, in evaluation mode.

    Args:
        model: GT, GraphiT or SAN.
        graphs: the graphs to look at.
        labels: one tensor per graph, a label per edge.
        names: of the labels.
        batch_size: graphs per forward pass.

    Returns:
        A row per layer and label. Columns are
        ``edges``, of which ``usable`` have a ratio; ``match`` and
        ``gate``, the means over edges and channels of :math:`|K Q / \sqrt d|` and of
        :math:`|E|`; ``score``, that of :math:`|s|`; and, over usable edges, ``median`` and
        ``maximum``, the geometric means of the median and of the largest magnitude of a row,
        and ``max_ratio``, that of the largest ratio: their quotient. NaN for a label without
        an edge.

    Raises:
        KeyError: if the model has no such attention.
    """
    found = hooks.resolve(model, ATTENTION)
    attentions = {name: module for name, module in found.items() if hasattr(module, "score")}
    recorded = [
        f"{name}.{part}" for name in attentions for part in ("query", "key", "edge", "score")
    ]
    label, start = torch.cat(list(labels)), 0
    sums = {name: torch.zeros(len(names), 7, dtype=torch.double) for name in attentions}
    loader = batches(graphs, batch_size)
    for batch, seen in hooks.scan(model, loader, recorded, forward=predict):
        of_batch = label[start : start + batch.num_edges]
        start += batch.num_edges
        source, target = batch.edge_index
        for name, attention in attentions.items():
            query, key, gate, score = (
                seen[f"{name}.{part}"].double() for part in ("query", "key", "edge", "score")
            )
            match = key[source] * query[target] / math.sqrt(attention.head_channels)
            ratio = activation_ratio(score).amax(dim=-1)
            usable = ratio.isfinite()
            logs = torch.stack([row_median(score), score.abs().amax(dim=-1), ratio], dim=1).log10()
            columns = [
                usable.double().unsqueeze(1),
                *(x.abs().mean(1, True) for x in (match, gate, score)),
            ]
            rows = torch.cat([*columns, logs.where(usable.unsqueeze(1), 0.0)], dim=1)
            sums[name].index_add_(0, of_batch, rows)
    edges = label.bincount(minlength=len(names)).double()
    tables = []
    for layer, total in enumerate(sums.values()):
        usable, means, logs = total[:, :1], total[:, 1:4], total[:, 4:]
        table = pd.DataFrame({"layer": layer, "label": list(names), "edges": edges.long()})
        table["usable"] = usable.long().numpy()
        table[["match", "gate", "score"]] = (means / edges.unsqueeze(1)).numpy()
        table[["median", "maximum", "max_ratio"]] = (10 ** (logs / usable)).numpy()
        tables.append(table)
    return pd.concat(tables, ignore_index=True)
