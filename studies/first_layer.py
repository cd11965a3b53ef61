r"""The first layer, where all that a score can depend on is three type ids; parts of any score.

Before the first layer no message has been passed, so without positional encodings the score of
an edge is a function of the types of its source, its target and itself:

.. math:: s_{ji} = \frac{K(x_j) \odot Q(x_i)}{\sqrt d} \odot E(t_{ji}) .

A data set of molecules has about a hundred such triples. Their ratios are read off the weights,
no molecule needed; how often each occurs then gives every share of massive edges and every heat
map of the layer, exactly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch_geometric.data import Data

from mapkg import hooks
from mapkg.evaluation import batches, predict
from mapkg.measures import MASSIVE_RATIO, activation_ratio, row_median

FIRST = "layers.0.attention"
"""The attention of the first layer of GT, GraphiT and SAN."""


@dataclass(frozen=True)
class Triples:
    """The distinct edges of a data set, as the first layer can tell them apart.

    Attributes:
        source, target: node type ids, shape [triples].
        edge: edge type ids, shape [triples].
        count: how often each occurs, shape [triples].
        index: which triple each edge of the graphs is, in their order, shape [E].
    """

    source: Int[Tensor, " triples"]
    target: Int[Tensor, " triples"]
    edge: Int[Tensor, " triples"]
    count: Int[Tensor, " triples"]
    index: Int[Tensor, " E"]


@dataclass(frozen=True)
class FirstLayer:
    """What the first layer makes of each triple.

    Attributes:
        score: s, shape [triples, D].
        gate: E, the projected edge features, shape [triples, D].
        match: K Q / sqrt(d), the score without the gate, shape [triples, D].
    """

    score: Float[Tensor, "triples D"]
    gate: Float[Tensor, "triples D"]
    match: Float[Tensor, "triples D"]

    @property
    def ratio(self) -> Float[Tensor, "triples D"]:
        """The activation ratio of each triple."""
        return activation_ratio(self.score)


def distinct_edges(graphs: Sequence[Data]) -> Triples:
    """The triples (source type, target type, edge type) that occur in graphs."""
    for graph in graphs:
        for key in ("x", "edge_attr"):
            ids = graph[key]
            if ids.is_floating_point() or ids.numel() != ids.size(0):
                raise ValueError(
                    f"{key}: expected one type id per row, got shape {list(ids.shape)} of "
                    f"{ids.dtype}; the first layer is a table of types only then"
                )
    types = [graph.x.flatten() for graph in graphs]
    first = torch.tensor([0, *map(len, types)]).cumsum(0)[:-1]  # node of each graph
    ends = [graph.edge_index for graph in graphs]
    place = first.repeat_interleave(torch.tensor([e.size(1) for e in ends]))
    node = torch.cat(types)[torch.cat(ends, dim=1) + place]
    rows = torch.stack([*node.unbind(), torch.cat([graph.edge_attr.flatten() for graph in graphs])])
    # One number for each triple, in the order of triples: to sort rows takes many times as long.
    least = rows.amin(dim=1, keepdim=True)
    size = rows.amax(dim=1) - least.flatten() + 1
    source, target, edge = rows - least
    number = (source * size[1] + target) * size[2] + edge
    found, index, count = number.unique(return_inverse=True, return_counts=True)
    parts = found // (size[1] * size[2]), found // size[2] % size[1], found % size[2]
    triples = torch.stack(parts) + least
    return Triples(*triples.unbind(), count=count, index=index)


def first_layer(model: nn.Module, triples: Triples) -> FirstLayer:
    """What the first layer of GT, GraphiT or SAN makes of triples, from its weights alone.

    The network is run on a graph that has one edge of each triple and nothing else.
    """
    if getattr(model, "encoding", None) is not None or getattr(model, "edge_factor", None):
        raise ValueError(
            "expected a network without positional encodings and without full-graph attention: "
            "with them the first layer sees more than the types of an edge and its ends"
        )
    number = len(triples.count)
    edge_index = torch.stack([torch.arange(number), torch.arange(number) + number])
    names = [f"{FIRST}.{part}" for part in ("score", "edge", "key", "query")]
    x = torch.cat([triples.source, triples.target])
    graph = Data(x=x, edge_index=edge_index, edge_attr=triples.edge)
    try:
        ((_, seen),) = hooks.scan(model, [graph], names)
    except KeyError as error:
        raise ValueError(
            f"expected GT, GraphiT or SAN, whose first layer has {', '.join(names)}: {error}"
        ) from error
    score, gate, key, query = (seen[name] for name in names)
    heads = model.get_submodule(FIRST).heads
    match = key[:number] * query[number:] / (score.size(1) / heads) ** 0.5
    return FirstLayer(score=score, gate=gate, match=match)


def mean_by_type(
    values: Float[Tensor, "triples D"],
    edge: Int[Tensor, " triples"],
    weight: Num[Tensor, " triples"],
    num_types: int,
) -> Float[Tensor, "types D"]:
    """Weighted means over the triples of each edge type; NaN for a type without an edge."""
    weight = weight.double()
    total = torch.zeros(num_types, dtype=torch.double).index_add_(0, edge, weight)
    table = torch.zeros(num_types, values.size(1), dtype=torch.double)
    table.index_add_(0, edge, values * weight.unsqueeze(1))
    return table / total.where(total > 0, torch.nan).unsqueeze(1)


def shares_above(
    layer: FirstLayer, triples: Triples, threshold: float, num_types: int
) -> Float[Tensor, "types D"]:
    """Heat map: the share of edges of each type with each channel above the threshold."""
    return mean_by_type((layer.ratio > threshold).double(), triples.edge, triples.count, num_types)


def mean_log_ratio(layer: FirstLayer, triples: Triples, num_types: int) -> Float[Tensor, "types D"]:
    """Mean of log10 of the ratio, for each edge type and channel."""
    return mean_by_type(layer.ratio.double().log10(), triples.edge, triples.count, num_types)


def separable_log_ratio(
    layer: FirstLayer, triples: Triples, num_types: int
) -> Float[Tensor, "types D"]:
    r"""The mean log ratio, predicted from a type's gate and a profile common to all types.

    .. math::
        \overline{\log r}_{t,c} \approx \log|E_{t,c}| + p_c - m_t , \qquad
        p_c = \overline{\log|K Q / \sqrt d|_c} \text{ over all edges}

    with m_t the mean log median of a row. If atoms at the ends of a bond did not depend on its
    type, this would be exact.
    """
    weight = triples.count.double()
    profile = (layer.match.double().abs().log10() * weight.unsqueeze(1)).sum(0) / weight.sum()
    median = row_median(layer.score.double()).log10().unsqueeze(1)
    by_type = layer.gate.double().abs().log10() - median
    return mean_by_type(by_type, triples.edge, weight, num_types) + profile


@torch.no_grad()
def first_layer_table(
    model: nn.Module, train: Triples, test: Triples, names: Mapping[int, str], start: Tensor
) -> pd.DataFrame:
    """What the first layer's weights say of each edge type, and what is measured.

    ``names`` are those of edge types by id, ``start`` the edge embedding before training.

    A row per edge type. Columns are ``gate_median`` and ``gate_max``, of ``|E|`` over channels;
    ``median`` and ``max_ratio``, geometric means over test edges of the row's median and largest
    ratio; ``moved``, how far the embedding is from its start, relative to it; ``triples`` of the
    test split, of which ``massive_triples`` are massive; ``measured``, the share of massive test
    edges; ``predicted``, the same from the weights and how often each triple occurs in the
    training split; ``common_pairs``, the same if atoms at the ends of a bond did not depend on
    its type; ``heat_error``, the largest difference of the measured and predicted heat map; and
    ``correlation`` over channels of measured mean log ratios and ``separable_log_ratio``.
    """
    size = max(*names, int(test.edge.max()), int(train.edge.max())) + 1
    on_test, on_train = first_layer(model, test), first_layer(model, train)
    crossed = _crossed(train, names)
    common = first_layer(model, crossed)
    heat = [
        shares_above(layer, triples, MASSIVE_RATIO, size)
        for layer, triples in ((on_test, test), (on_train, train))
    ]
    measured_logs = mean_log_ratio(on_test, test, size)
    predicted_logs = separable_log_ratio(on_train, train, size)
    moved = (model.edge_embedding.weight.detach() - start).norm(dim=1) / start.norm(dim=1)
    largest, median = on_test.ratio.amax(dim=1), row_median(on_test.score)
    rows = []
    for edge_type, name in names.items():
        mine = test.edge == edge_type
        gate = common.gate[crossed.edge == edge_type][0].abs()
        pair = torch.stack([measured_logs[edge_type], predicted_logs[edge_type]])
        rows.append(
            {
                "label": name,
                "edges": int(test.count[mine].sum()),
                "triples": int(mine.sum()),
                "moved": float(moved[edge_type]),
                "gate_median": float(gate.median()),
                "gate_max": float(gate.max()),
                "measured": _share(on_test, test, edge_type),
                "predicted": _share(on_train, train, edge_type),
                "common_pairs": _share(common, crossed, edge_type),
                "massive_triples": int((largest[mine] > MASSIVE_RATIO).sum()),
                "median": _geometric_mean(median, mine, test.count),
                "max_ratio": _geometric_mean(largest, mine, test.count),
                "heat_error": float((heat[0][edge_type] - heat[1][edge_type]).abs().max()),
                "correlation": float(torch.corrcoef(pair)[0, 1]),
            }
        )
    return pd.DataFrame(rows)


def _crossed(train: Triples, names: Mapping[int, str]) -> Triples:
    """Every pair of atom types with every edge type, and how often the pair occurs."""
    pairs = torch.stack([train.source, train.target], dim=1)
    pairs, index = pairs.unique(dim=0, return_inverse=True)
    count = torch.zeros(len(pairs), dtype=torch.long).index_add_(0, index, train.count)
    edge = torch.tensor(sorted(names)).repeat_interleave(len(pairs))
    source, target = pairs.repeat(len(names), 1).unbind(dim=1)
    nothing = torch.empty(0, dtype=torch.long)
    return Triples(source, target, edge, count=count.repeat(len(names)), index=nothing)


def _share(layer: FirstLayer, triples: Triples, edge_type: int) -> float:
    mine = triples.edge == edge_type
    count = triples.count[mine].double()
    massive = (layer.ratio.amax(dim=1) > MASSIVE_RATIO)[mine]
    return float((massive * count).sum() / count.sum())


def _geometric_mean(values: Tensor, mine: Tensor, count: Tensor) -> float:
    logs = values.double().log10()[mine]
    return float(10 ** ((logs * count[mine]).sum() / count[mine].sum()))


def log_ratios(
    model: nn.Module, train: Sequence[Data], test: Sequence[Data], names: Mapping[int, str]
) -> pd.DataFrame:
    """Mean log10 ratio of each type and channel, measured on ``test`` and predicted from ``train``.

    Edge types of ``names`` without an edge on either side are left out.
    """
    values = {}
    for key, graphs, function in (
        ("measured", test, mean_log_ratio),
        ("predicted", train, separable_log_ratio),
    ):
        triples = distinct_edges(graphs)
        values[key] = function(first_layer(model, triples), triples, max(names) + 1)
    parts = [
        pd.DataFrame({key: table[edge_type].numpy() for key, table in values.items()}).assign(
            label=name, channel=range(values["measured"].size(1))
        )
        for edge_type, name in names.items()
    ]
    return pd.concat(parts, ignore_index=True).dropna(ignore_index=True)


def predicted_heat(
    model: nn.Module, train: Sequence[Data], names: Mapping[int, str], *, threshold: float
) -> pd.DataFrame:
    """The heat map of the first layer as weights and training frequencies predict it."""
    triples = distinct_edges(train)
    shares = shares_above(first_layer(model, triples), triples, threshold, max(names) + 1)
    edge_type, channel = (shares > 0).nonzero(as_tuple=True)
    table = pd.DataFrame({"label": edge_type, "channel": channel})
    table["label"] = table["label"].map(names)
    table["percent"] = 100 * shares[edge_type, channel].numpy()
    return table.assign(layer=0, threshold=float(threshold)).dropna(ignore_index=True)


def score_parts(
    model: nn.Module,
    graphs: Sequence[Data],
    labels: Sequence[Int[Tensor, " _"]],
    names: Sequence[str],
    *,
    batch_size: int = 128,
) -> pd.DataFrame:
    r"""Means of the parts of a score, for each layer and label, in evaluation mode.

    ``labels`` has a tensor per graph, a label per edge; ``names`` are those of the labels.

    A row per layer and label. Columns are ``edges``, of which ``usable`` have a ratio; ``match``
    and ``gate``, the means over edges and channels of :math:`|K Q / \sqrt d|` and of :math:`|E|`;
    ``score``, that of :math:`|s|`; and, over usable edges, ``median`` and ``maximum``, the
    geometric means of the median and of the largest magnitude of a row, and ``max_ratio``, that
    of the largest ratio: their quotient. NaN for a label without an edge.
    """
    found = hooks.resolve(model, "layers.*.attention")
    attentions = {name: module for name, module in found.items() if hasattr(module, "score")}
    recorded = [
        f"{name}.{part}" for name in attentions for part in ("query", "key", "edge", "score")
    ]
    label, start = torch.cat(list(labels)), 0
    sums = {name: torch.zeros(len(names), 7, dtype=torch.double) for name in attentions}
    for batch, seen in hooks.scan(model, batches(graphs, batch_size), recorded, forward=predict):
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
    parts = []
    for layer, total in enumerate(sums.values()):
        usable, means, logs = total[:, :1], total[:, 1:4], total[:, 4:]
        table = pd.DataFrame({"layer": layer, "label": list(names), "edges": edges.long()})
        table["usable"] = usable.long().numpy()
        table[["match", "gate", "score"]] = (means / edges.unsqueeze(1)).numpy()
        table[["median", "maximum", "max_ratio"]] = (10 ** (logs / usable)).numpy()
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


def measured_and_predicted(logs: pd.DataFrame, *, measured: str, predicted: str) -> sns.FacetGrid:
    """Columns ``measured`` against ``predicted``, whose axes are called so, a panel per label."""
    look = dict(s=18, alpha=0.7, linewidth=0, height=3.0)
    grid = sns.relplot(logs, x="predicted", y="measured", col="label", **look)
    ends = [
        logs[["predicted", "measured"]].min().min(),
        logs[["predicted", "measured"]].max().max(),
    ]
    for label, ax in grid.axes_dict.items():
        points = logs[logs["label"] == label]
        correlation = np.corrcoef(points["predicted"], points["measured"])[0, 1]
        ax.plot(ends, ends, color="black", lw=0.8, ls=":")
        ax.set_title(f"{label}, correlation {correlation:.4f}")
    return grid.set_axis_labels(predicted, measured)
