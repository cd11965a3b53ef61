r"""The first layer, where all that a score can depend on is three type ids.

Before the first layer no message has been passed, so without positional encodings the score of
an edge is a function of the types of its source, its target and itself:

.. math:: s_{ji} = \frac{K(x_j) \odot Q(x_i)}{\sqrt d} \odot E(t_{ji}) .

A data set of molecules has about a hundred such triples. Their ratios are read off the weights,
no molecule needed; how often each occurs then gives every share of massive edges and every heat
map of the layer, exactly. ``first_layer_table`` sets what is measured beside predictions that ask
for less and less of the data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch_geometric.data import Data

from mapkg import hooks
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

    def __len__(self) -> int:
        """Number of distinct triples."""
        return len(self.count)


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
    """The triples (source type, target type, edge type) that occur in graphs.

    Args:
        graphs: with one type id per node and edge.

    Raises:
        ValueError: if nodes or edges have features instead, or there is no edge.
    """
    for graph in graphs:
        for key in ("x", "edge_attr"):
            ids = graph[key]
            if ids.is_floating_point() or ids.numel() != ids.size(0):
                raise ValueError(
                    f"{key}: expected one type id per row, got shape {list(ids.shape)} of "
                    f"{ids.dtype}; the first layer is a table of types only then"
                )
    if sum(graph.num_edges for graph in graphs) == 0:
        raise ValueError("expected graphs with edges; there is no edge in any of them")
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
    """What a network's first layer makes of triples, from its weights alone.

    The network is run on a graph that has one edge of each triple and nothing else.

    Args:
        model: GT, GraphiT or SAN, without positional encodings.
        triples: the types.

    Raises:
        ValueError: if the network has no such layer, or its first layer sees more than types.
    """
    if getattr(model, "encoding", None) is not None or getattr(model, "edge_factor", None):
        raise ValueError(
            "expected a network without positional encodings and without full-graph attention: "
            "with them the first layer sees more than the types of an edge and its ends"
        )
    number = len(triples)
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


def shares_above(
    layer: FirstLayer,
    edge: Int[Tensor, " triples"],
    weight: Num[Tensor, " triples"],
    threshold: float,
    num_types: int,
) -> Float[Tensor, "types D"]:
    """Heat map: which share of the edges of each type has each channel above the threshold.

    Args:
        layer: of ``first_layer``.
        edge: edge type of each triple.
        weight: how often each triple occurs; only ratios within a type matter.
        threshold: ratio above which an activation is massive.
        num_types: number of edge types.

    Returns:
        Shares in [0, 1]; NaN for a type without an edge.
    """
    return _mean_by_type((layer.ratio > threshold).double(), edge, weight, num_types)


def mean_log_ratio(
    layer: FirstLayer,
    edge: Int[Tensor, " triples"],
    weight: Num[Tensor, " triples"],
    num_types: int,
) -> Float[Tensor, "types D"]:
    """Mean of log10 of the ratio, for each edge type and channel; NaN for an absent type.

    Args:
        layer, edge, weight, num_types: as for ``shares_above``.
    """
    return _mean_by_type(layer.ratio.double().log10(), edge, weight, num_types)


def separable_log_ratio(
    layer: FirstLayer,
    edge: Int[Tensor, " triples"],
    weight: Num[Tensor, " triples"],
    num_types: int,
) -> Float[Tensor, "types D"]:
    r"""The mean log ratio, predicted from a type's gate and a profile common to all types.

    .. math::
        \overline{\log r}_{t,c} \approx \log|E_{t,c}| + p_c - m_t , \qquad
        p_c = \overline{\log|K Q / \sqrt d|_c} \text{ over all edges}

    with m_t the mean log median of a row. If atoms at the ends of a bond did not depend on its
    type, this would be exact.

    Args:
        layer, edge, weight, num_types: as for ``shares_above``; take them from other graphs
            than those the prediction is compared with.
    """
    weight = weight.double()
    profile = (layer.match.double().abs().log10() * weight.unsqueeze(1)).sum(0) / weight.sum()
    median = row_median(layer.score.double()).log10().unsqueeze(1)
    by_type = layer.gate.double().abs().log10() - median
    return _mean_by_type(by_type, edge, weight, num_types) + profile


@torch.no_grad()
def first_layer_table(
    model: nn.Module,
    train: Triples,
    test: Triples,
    names: Mapping[int, str],
    start: Tensor,
) -> pd.DataFrame:
    """What the first layer's weights say of each edge type, and what is measured.

    Args:
        model: GT, GraphiT or SAN.
        train, test: the distinct edges of the two splits.
        names: of the edge types, by id.
        start: the edge embedding before training.

    Returns:
        A row per edge type. Columns are
        ``gate_median`` and ``gate_max``, of ``|E|`` over channels; ``median``
        and ``max_ratio``, geometric means over test edges of the row's median and largest
        ratio; ``moved``, how far the embedding is from its start, relative to it; ``triples``
        that occur in the test split, of which ``massive_triples`` are massive; ``measured``,
        the share of massive test edges; ``predicted``, the same from the weights and how often
        each triple occurs in the training split; ``common_pairs``, the same if atoms at the
        ends of a bond did not depend on its type; ``heat_error``, the largest difference
        between measured and predicted heat map, as a share; and ``correlation``, between
        measured mean log ratios and those of ``separable_log_ratio``, over channels.
    """
    size = max(*names, int(test.edge.max()), int(train.edge.max())) + 1
    seen, known = first_layer(model, test), first_layer(model, train)
    crossed, weight = _cross(train, names)
    common = first_layer(model, crossed)
    measured_heat = shares_above(seen, test.edge, test.count, MASSIVE_RATIO, size)
    predicted_heat = shares_above(known, train.edge, train.count, MASSIVE_RATIO, size)
    measured_logs = mean_log_ratio(seen, test.edge, test.count, size)
    predicted_logs = separable_log_ratio(known, train.edge, train.count, size)
    moved = (model.edge_embedding.weight.detach() - start).norm(dim=1) / start.norm(dim=1)
    rows = []
    for edge_type, name in names.items():
        mine = test.edge == edge_type
        row: dict[str, Any] = {"label": name, "edges": int(test.count[mine].sum())}
        row |= {"triples": int(mine.sum()), "moved": float(moved[edge_type])}
        gate = common.gate[crossed.edge == edge_type][0].abs()
        row |= {"gate_median": float(gate.median()), "gate_max": float(gate.max())}
        share = {}
        for key, layer, of in (("measured", seen, test), ("predicted", known, train)):
            share[key] = _share(layer.ratio, of.edge == edge_type, of.count)
        share["common_pairs"] = _share(common.ratio, crossed.edge == edge_type, weight)
        row |= share
        largest = seen.ratio.amax(dim=1)
        row["massive_triples"] = int((largest[mine] > MASSIVE_RATIO).sum())
        row["median"] = _geometric_mean(row_median(seen.score), mine, test.count)
        row["max_ratio"] = _geometric_mean(largest, mine, test.count)
        difference = (measured_heat[edge_type] - predicted_heat[edge_type]).abs().max()
        row["heat_error"] = float(difference)
        pair = torch.stack([measured_logs[edge_type], predicted_logs[edge_type]])
        row["correlation"] = float(torch.corrcoef(pair)[0, 1])
        rows.append(row)
    return pd.DataFrame(rows)


def _mean_by_type(
    values: Float[Tensor, "triples D"],
    edge: Int[Tensor, " triples"],
    weight: Num[Tensor, " triples"],
    num_types: int,
) -> Float[Tensor, "types D"]:
    weight = weight.double()
    total = torch.zeros(num_types, dtype=torch.double).index_add_(0, edge, weight)
    table = torch.zeros(num_types, values.size(1), dtype=torch.double)
    table.index_add_(0, edge, values * weight.unsqueeze(1))
    return table / total.where(total > 0, torch.nan).unsqueeze(1)


def _cross(train: Triples, names: Mapping[int, str]) -> tuple[Triples, Tensor]:
    """Every pair of atom types with every edge type, and how often the pair occurs."""
    pairs = torch.stack([train.source, train.target], dim=1)
    pairs, index = pairs.unique(dim=0, return_inverse=True)
    weight = torch.zeros(len(pairs), dtype=torch.double)
    weight.index_add_(0, index, train.count.double())
    edge = torch.tensor(sorted(names)).repeat_interleave(len(pairs))
    source, target = pairs.repeat(len(names), 1).unbind(dim=1)
    nothing = torch.empty(0, dtype=torch.long)
    crossed = Triples(source, target, edge, count=torch.ones_like(edge), index=nothing)
    return crossed, weight.repeat(len(names))


def _share(ratio: Tensor, mine: Tensor, count: Tensor) -> float:
    massive = (ratio.amax(dim=1) > MASSIVE_RATIO)[mine]
    return float((massive * count[mine]).sum() / count[mine].sum())


def _geometric_mean(values: Tensor, mine: Tensor, count: Tensor) -> float:
    logs = values.double().log10()[mine]
    return float(10 ** ((logs * count[mine]).sum() / count[mine].sum()))
