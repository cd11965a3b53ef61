r"""The first layer, where all that a score can depend on is three type ids; parts of any score.

Before the first layer no message has been passed, so without positional encodings the score of
an edge is a function of the types of its source, its target and itself:

.. math:: s_{ji} = \frac{K(x_j) \odot Q(x_i)}{\sqrt d} \odot E(t_{ji}) .

A data set of molecules has about a hundred such triples. Their ratios are read off the weights,
no molecule needed; how often each occurs then gives every share of massive edges and every heat
map of the layer, exactly.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch_geometric.data import Data

from mapkg import hooks
from mapkg.evaluation import batches, predict
from mapkg.measures import MASSIVE_RATIO, activation_ratio, row_median


def edges(graphs: Sequence[Data]) -> pd.DataFrame:
    """The types of each edge's ends and of itself: columns ``source``, ``target``, ``edge``."""
    for graph in graphs:
        for key in ("x", "edge_attr"):
            ids = graph[key]
            if ids.is_floating_point() or ids.numel() != ids.size(0):
                raise ValueError(
                    f"{key}: expected one type id per row, got shape {list(ids.shape)} of "
                    f"{ids.dtype}; the first layer is a table of types only then"
                )
    ends = torch.cat([graph.x.flatten()[graph.edge_index] for graph in graphs], dim=1)
    types = torch.cat([graph.edge_attr.flatten() for graph in graphs])
    return pd.DataFrame({"source": ends[0], "target": ends[1], "edge": types})


def distinct_edges(graphs: Sequence[Data]) -> pd.DataFrame:
    """The triples of types, all that the first layer can tell apart, and their ``count``."""
    return edges(graphs).value_counts(sort=False).sort_index().reset_index()


def type_frequency(train: Sequence[Data], graphs: Sequence[Data]) -> list[Float[Tensor, " edges"]]:
    """How many training edges have the types of each edge and of its two ends: no network."""
    counts = edges(graphs).merge(distinct_edges(train), how="left")["count"].fillna(0)
    counts = torch.tensor(counts.to_numpy(np.float32))
    return list(counts.split([graph.num_edges for graph in graphs]))


def first_layer(model: nn.Module, triples: pd.DataFrame) -> dict[str, Float[Tensor, "triples D"]]:
    r"""What the first layer of GT, GraphiT or SAN makes of triples, from its weights alone.

    The ``score`` of each triple, its ``ratio``, the ``gate`` :math:`E` and the ``match``
    :math:`K Q / \sqrt d`, the score without the gate.
    """
    if getattr(model, "encoding", None) is not None or getattr(model, "edge_factor", None):
        raise ValueError(
            "expected a network without positional encodings and without full-graph attention: "
            "with them the first layer sees more than the types of an edge and its ends"
        )
    # The network is run on a graph that has one edge of each triple and nothing else.
    number = len(triples)
    edge_index = torch.arange(2 * number).view(2, number)
    x = torch.from_numpy(triples[["source", "target"]].to_numpy().T.flatten())
    graph = Data(x=x, edge_index=edge_index, edge_attr=torch.tensor(triples["edge"].to_numpy()))
    names = [f"layers.0.attention.{part}" for part in ("score", "edge", "key", "query")]
    try:
        ((_, seen),) = hooks.scan(model, [graph], names)
    except KeyError as error:
        raise ValueError(
            f"expected GT, GraphiT or SAN, whose first layer has {', '.join(names)}: {error}"
        ) from error
    score, gate, key, query = (seen[name] for name in names)
    scale = (score.size(1) / model.layers[0].attention.heads) ** 0.5
    match = key[:number] * query[number:] / scale
    return {"score": score, "ratio": activation_ratio(score), "gate": gate, "match": match}


def mean_by_type(
    values: Shaped[Tensor, "triples D"], triples: pd.DataFrame, ids: Iterable[int]
) -> Float[Tensor, "types D"]:
    """Means over the edges of each type; NaN for a type without an edge."""
    edge, count = (torch.tensor(triples[name].to_numpy()) for name in ("edge", "count"))
    total = edge.bincount(count.double(), minlength=max(ids) + 1)
    table = torch.zeros(len(total), values.size(1), dtype=torch.double)
    table.index_add_(0, edge, values.double() * count.unsqueeze(1))
    return (table / total.where(total > 0, torch.nan).unsqueeze(1))[[*ids]]


def separable_log_ratio(
    layer: Mapping[str, Tensor], triples: pd.DataFrame, ids: Iterable[int]
) -> Float[Tensor, "types D"]:
    r"""The mean log ratio, predicted from a type's gate and a profile common to all types.

    .. math::
        \overline{\log r}_{t,c} \approx \log|E_{t,c}| + p_c - m_t , \qquad
        p_c = \overline{\log|K Q / \sqrt d|_c} \text{ over all edges}

    with m_t the mean log median of a row. If atoms at the ends of a bond did not depend on its
    type, this would be exact.
    """
    match, gate = (layer[name].double().abs().log10() for name in ("match", "gate"))
    profile = mean_by_type(match, triples.assign(edge=0), [0])
    median = row_median(layer["score"].double()).log10().unsqueeze(1)
    return mean_by_type(gate - median, triples, ids) + profile


@torch.no_grad()
def first_layer_table(
    model: nn.Module,
    train: pd.DataFrame,  # the distinct edges of a split
    test: pd.DataFrame,
    names: Mapping[int, str],  # of edge types by id
    start: Float[Tensor, "types D"],  # the edge embedding before training
) -> pd.DataFrame:
    """What the first layer's weights say of each edge type, and what is measured.

    A row per edge type. Columns are ``gate_median`` and ``gate_max``, of ``|E|`` over channels;
    ``median`` and ``max_ratio``, geometric means over test edges of the row's median and largest
    ratio; ``moved``, how far the embedding is from its start, relative to it; ``triples`` of the
    test split, of which ``massive_triples`` are massive; ``measured``, the share of massive test
    edges; ``predicted``, the same from the weights and how often each triple occurs in the
    training split; ``common_pairs``, the same if atoms at the ends of a bond did not depend on
    its type; ``heat_error``, the largest difference of the measured and predicted heat map; and
    ``correlation`` over channels of measured mean log ratios and ``separable_log_ratio``.
    """
    pairs = train.groupby(["source", "target"])["count"].sum().reset_index()
    crossed = pairs.merge(pd.DataFrame({"edge": [*names]}), how="cross")
    splits = {"measured": test, "predicted": train, "common_pairs": crossed}
    layers = {name: first_layer(model, triples) for name, triples in splits.items()}
    massive = {name: layer["ratio"] > MASSIVE_RATIO for name, layer in layers.items()}
    heat = {name: mean_by_type(massive[name], splits[name], names) for name in splits}
    error = (heat["measured"] - heat["predicted"]).abs().amax(dim=1)
    on_test = layers["measured"]
    logs = [mean_by_type(on_test["ratio"].double().log10(), test, names)]
    logs += [separable_log_ratio(layers["predicted"], train, names)]
    typical = torch.stack([row_median(on_test["score"]), on_test["ratio"].amax(dim=1)], dim=1)
    typical = 10 ** mean_by_type(typical.double().log10(), test, names)
    gate = layers["common_pairs"]["gate"][: len(names)].abs()  # of one pair, all types
    moved = (model.edge_embedding.weight - start).norm(dim=1) / start.norm(dim=1)
    by_type = test.assign(massive=massive["measured"].any(dim=1).numpy()).groupby("edge")
    counts = by_type["count"].agg(["sum", "size"]).assign(massive=by_type["massive"].sum())
    counts = counts.reindex([*names], fill_value=0)
    table = {
        "label": [*names.values()],
        "edges": counts["sum"],
        "triples": counts["size"],
        "moved": moved[[*names]].double(),
        "gate_median": gate.median(dim=1).values.double(),
        "gate_max": gate.amax(dim=1).double(),
    }
    for name, triples in splits.items():
        share = mean_by_type(massive[name].any(dim=1, keepdim=True), triples, names)
        table[name] = share.flatten()
    table |= {
        "massive_triples": counts["massive"],
        "median": typical[:, 0],
        "max_ratio": typical[:, 1],
        "heat_error": error,
        "correlation": [float(pair.corrcoef()[0, 1]) for pair in torch.stack(logs, dim=1)],
    }
    return pd.DataFrame({name: np.asarray(values) for name, values in table.items()})


def log_ratios(
    model: nn.Module, train: Sequence[Data], test: Sequence[Data], names: Mapping[int, str]
) -> pd.DataFrame:
    """Mean log10 ratio of each type and channel, measured on ``test`` and predicted from ``train``.

    Edge types of ``names`` without an edge on either side are left out.
    """
    seen, known = distinct_edges(test), distinct_edges(train)
    ratio = first_layer(model, seen)["ratio"].double()
    measured = mean_by_type(ratio.log10(), seen, names)
    predicted = separable_log_ratio(first_layer(model, known), known, names)
    parts = {
        name: pd.DataFrame({"measured": measured[i], "predicted": predicted[i]})
        for i, name in enumerate(names.values())
    }
    return pd.concat(parts, names=["label", "channel"]).reset_index().dropna(ignore_index=True)


def heat_table(
    shares: Float[Tensor, "layers thresholds labels channels"],
    thresholds: Sequence[float],
    names: Sequence[str],
) -> pd.DataFrame:
    """Shares of massive edges as a table of percentages, zeros left out."""
    layer, threshold, label, channel = place = (shares > 0).nonzero(as_tuple=True)
    columns = {"threshold": np.array(thresholds)[threshold], "label": np.array(names)[label]}
    columns |= {"channel": channel, "percent": 100 * shares[place]}
    return pd.DataFrame({"layer": layer, **columns})


def predicted_heat(
    model: nn.Module, train: Sequence[Data], names: Mapping[int, str], *, threshold: float
) -> pd.DataFrame:
    """The heat map of the first layer as weights and training frequencies predict it."""
    triples = distinct_edges(train)
    shares = mean_by_type(first_layer(model, triples)["ratio"] > threshold, triples, names)
    return heat_table(shares[None, None], [float(threshold)], [*names.values()])


COLUMNS = ["match", "gate", "score", "median", "maximum", "max_ratio"]


def score_parts(
    model: nn.Module,
    graphs: Sequence[Data],
    labels: Sequence[Int[Tensor, " _"]],  # one per edge of each graph
    names: Sequence[str],  # of labels
) -> pd.DataFrame:
    r"""Means of the parts of a score, for each layer and label, in evaluation mode.

    A row per layer and label. Columns are ``edges``, of which ``usable`` have a ratio; ``match``,
    ``gate`` and ``score``, the means over edges and channels of :math:`|K Q / \sqrt d|`, of
    :math:`|E|` and of :math:`|s|`; and, over usable edges, the geometric means of the ``median``
    and of the ``maximum`` of a row's magnitudes, and of their quotient, ``max_ratio``.
    """
    attentions = hooks.resolve(model, "layers.*.attention")
    attentions = {name: each for name, each in attentions.items() if hasattr(each, "score")}
    parts = ("query", "key", "edge", "score")
    recorded = [f"{name}.{part}" for name in attentions for part in parts]
    label, start, rows = torch.cat(list(labels)), 0, []
    for batch, seen in hooks.scan(model, batches(graphs, 128), recorded, forward=predict):
        of_batch = label[start : start + batch.num_edges]
        start += batch.num_edges
        source, target = batch.edge_index
        for layer, (name, attention) in enumerate(attentions.items()):
            query, key, gate, score = (seen[f"{name}.{part}"].double() for part in parts)
            match = key[source] * query[target] / math.sqrt(attention.head_channels)
            means = [part.abs().mean(dim=1) for part in (match, gate, score)]
            ratio = activation_ratio(score).amax(dim=1)
            logs = torch.stack([row_median(score), score.abs().amax(dim=1), ratio]).log10()
            values = torch.stack([*means, *logs.where(ratio.isfinite(), torch.nan)], dim=1)
            table = pd.DataFrame(values.numpy(), columns=COLUMNS)
            rows.append(table.assign(layer=layer, label=of_batch.numpy()))
    groups = pd.concat(rows).groupby(["layer", "label"])
    means = groups.mean()
    means[COLUMNS[3:]] = 10 ** means[COLUMNS[3:]]
    counts = pd.DataFrame({"edges": groups.size(), "usable": groups["max_ratio"].count()})
    levels = range(len(attentions)), range(len(names))
    every = pd.MultiIndex.from_product(levels, names=["layer", "label"])
    counts = counts.reindex(every, fill_value=0)
    table = counts.join(means).reset_index()
    return table.assign(label=table["label"].map(dict(enumerate(names))))


def measured_and_predicted(logs: pd.DataFrame, *, measured: str, predicted: str) -> sns.FacetGrid:
    """Columns ``measured`` against ``predicted``, whose axes are called so, a panel per label."""
    look = dict(s=18, alpha=0.7, linewidth=0, height=3.0)
    grid = sns.relplot(logs, x="predicted", y="measured", col="label", **look)
    both = logs[["predicted", "measured"]]
    for label, ax in grid.axes_dict.items():
        points = both[logs["label"] == label]
        ax.axline((both.min().min(),) * 2, slope=1, color="black", lw=0.8, ls=":")
        ax.set_title(f"{label}, correlation {points.corr().iloc[0, 1]:.4f}")
    return grid.set_axis_labels(predicted, measured)
