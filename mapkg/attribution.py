"""What massive activations sit on: counts by type of edge, and how sure they are.

An edge is *massive* in a layer if an activation in any channel is, by the row ratio. Intervals are
bootstrapped over graphs, since the edges of one are no independent draws.

Source: massive-activations paper, its bond-type heat map, which gives shares alone.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse, stats
from torch import Tensor, nn
from torch_geometric.data import Data

from mapkg import hooks
from mapkg.evaluation import batches
from mapkg.measures import MASSIVE_RATIO, activation_ratio, is_massive
from mapkg.rows import default_names, edge_rows

THRESHOLDS = (MASSIVE_RATIO, 3000.0, 4000.0)
"""The usual threshold of a massive activation, and those of the published heat maps."""

CONFIDENCE = 0.95
"""Level of all intervals."""


def attribute(
    graphs: Sequence[Data],
    labels: Sequence[Int[Tensor, " _"]],
    names: Sequence[str],
    massive: Bool[np.ndarray | Tensor, "columns E"],
    *,
    resamples: int = 1000,
    permutations: int = 1000,
) -> pd.DataFrame:
    """Shares and enrichment of massive edges, by label, with intervals and tests.

    The enrichment of a label is its share of massive edges over its share of all edges.

    Args:
        graphs: E edges in all.
        labels: of each graph, for each edge its bond type, atom pair, ..., by the place in
            ``names``.
        names: of the labels.
        massive: which edges are massive, a row for each layer, threshold, ...
        resamples: bootstrap resamples of graphs.
        permutations: of labels among the bonds of each graph.

    Returns:
        A row per row of ``massive`` (``column``, its index) and label, with ``edges``, ``graphs``
        with such an edge, ``massive_edges``, ``share`` and ``enrichment`` with the ``_low`` and
        ``_high`` ends of 95 % intervals, ``share_bound`` and ``p_value``. NaN is what cannot be
        computed, shares of a label without an edge, enrichment where no edge is massive, intervals
        of a single graph.
        The interval of a share of zero is empty: ``share_bound`` is the exact one-sided 95 % bound
        of the share of *graphs* whose edges of this label include a massive one. The p-value is
        two-sided, for the number of massive edges of the label if labels had been dealt out at
        random within each graph, to each bond those of both directions of another.

    Raises ``ValueError`` if labels do not fit the edges, there is no edge, ``massive`` has another
    number of them, or several edges from one node to another have different labels.
    """
    label, massive = _joined(graphs, labels, len(names)).numpy(), np.asarray(massive)
    if len(label) == 0:
        raise ValueError("expected graphs with edges; there is no edge in any of them")
    if massive.ndim != 2 or massive.shape[1] != len(label):
        raise ValueError(
            f"massive: expected {len(label)} edges in each of its rows, got {massive.shape}"
        )
    for name, value in {"resamples": resamples, "permutations": permutations}.items():
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    sizes = [graph.num_edges for graph in graphs if graph.num_edges]  # others are not drawn
    graph = np.repeat(np.arange(len(sizes)), sizes)
    drawable, columns, kinds = len(sizes), len(massive), len(names)
    of_cell = _sums(graph * kinds + label, drawable * kinds)
    total = (of_cell @ np.ones(len(label))).reshape(drawable, kinds)
    counts = (of_cell @ massive.T.astype(float)).reshape(drawable, kinds, columns)
    counts = counts.transpose(0, 2, 1)  # [graphs, columns, labels]

    share, enrichment = _shares(total.sum(axis=0), counts.sum(axis=0))
    rng, uniform = np.random.default_rng(0), np.full(drawable, 1 / drawable)
    drawn = []
    for start in range(0, resamples, 100):  # so many at a time, for memory's sake
        size = min(100, resamples - start)
        times = rng.multinomial(drawable, uniform, size=size).astype(float)
        resampled = (times @ counts.reshape(drawable, -1)).reshape(-1, columns, kinds)
        drawn.append(_shares(times @ total, resampled))
    known = 1.0 if drawable > 1 else np.nan
    ends = [_interval(known * np.concatenate(part)) for part in zip(*drawn, strict=True)]
    edge_index = np.concatenate([np.asarray(g.edge_index) for g in graphs], axis=1)
    joined = np.vstack([graph, np.sort(edge_index, axis=0)])
    bond = np.unique(joined, axis=1, return_inverse=True)[1]
    slot = 2 * bond + (edge_index[0] > edge_index[1])  # a bond has one for each of its directions
    # Without a massive edge every deal gives what is observed.
    p_values, some = np.ones((columns, kinds)), massive.any(axis=1)
    dealt = _deals(label, graph, slot, massive[some], kinds, permutations, rng)
    center = dealt.mean(axis=0)
    # The tolerance is for the rounding of the mean.
    as_far = np.abs(dealt - center) >= np.abs(counts.sum(axis=0)[some] - center) - 1e-9
    p_values[some] = (1 + as_far.sum(axis=0)) / (1 + permutations)

    number, hits = (total > 0).sum(axis=0), (counts > 0).sum(axis=0)
    # The exact (Clopper-Pearson) bound; NaN where there is no graph.
    bound = stats.beta.ppf(CONFIDENCE, hits + 1, number - hits)
    bound[(hits == number) & (number > 0)] = 1
    table = {
        "column": np.arange(columns)[:, None],
        "label": np.array(names, dtype=object),
        "edges": total.sum(axis=0).astype(int),
        "graphs": number,
        "massive_edges": counts.sum(axis=0).astype(int),
        **{"share": share, "share_low": ends[0][0], "share_high": ends[0][1]},
        "share_bound": bound,
        **{"enrichment": enrichment, "enrichment_low": ends[1][0], "enrichment_high": ends[1][1]},
        "p_value": p_values,
    }
    return pd.DataFrame({k: np.broadcast_to(v, share.shape).ravel() for k, v in table.items()})


def heat_map(
    model: nn.Module,
    graphs: Sequence[Data],
    labels: Sequence[Int[Tensor, " _"]],
    num_labels: int,
    *,
    thresholds: Iterable[float] = THRESHOLDS,
    names: str | Sequence[str] | None = None,
) -> Float[Tensor, "layers thresholds labels channels"]:
    """Which share of the edges of each label is massive in each channel, in evaluation mode.

    ``labels`` are as for ``attribute``. ``names`` are submodules, or stages of them, with a row per
    edge; None means those of ``rows.default_names``. NaN for a label without an edge. Raises
    ``ValueError`` if labels do not fit the edges, or the layers differ in width.

    Source: massive-activations paper, its heat map. differs: the labels of its two axes are
    swapped there, and the median averages the two middle magnitudes.
    """
    thresholds = tuple(thresholds)
    label = _joined(graphs, labels, num_labels)
    per_label = label.bincount(minlength=num_labels).double()
    names = default_names(model) if names is None else names
    modules, start = hooks.resolve(model, names), 0
    counts: dict[str, Tensor] = {}
    for batch, seen in hooks.scan(model, batches(graphs, 128), [*modules]):
        of_batch = label[start : start + batch.num_edges]
        start += batch.num_edges
        for name, output in seen.items():
            ratio = activation_ratio(edge_rows(name, modules[name], output, batch))
            size = len(thresholds), num_labels, ratio.size(1)
            table = counts.setdefault(name, torch.zeros(size, dtype=torch.double))
            for row, threshold in zip(table, thresholds, strict=True):
                row.index_add_(0, of_batch, is_massive(ratio, threshold).double().cpu())
    widths = {name: table.size(-1) for name, table in counts.items()}
    if len({*widths.values()}) > 1:
        raise ValueError(f"expected layers of one width, got {widths}: name those of one in names=")
    by_layer = torch.stack(list(counts.values()))
    return by_layer / per_label.where(per_label > 0, torch.nan).unsqueeze(1)


def _joined(
    graphs: Sequence[Data], labels: Sequence[Int[Tensor, " _"]], number: int
) -> Int[Tensor, " E"]:
    """The labels of all edges; raises unless each graph has one per edge, below ``number``."""
    for index, (graph, of_graph) in enumerate(zip(graphs, labels, strict=True)):
        is_known = (of_graph >= 0) & (of_graph < number)
        if len(of_graph) != graph.num_edges or not is_known.all():
            raise ValueError(
                f"labels: expected one for each of the {graph.num_edges} edges of graph {index}, "
                f"from 0 to {number - 1}, got {len(of_graph)}, among them "
                f"{sorted(set(of_graph.tolist()))[-3:]}"
            )
    return torch.cat([torch.empty(0, dtype=torch.long), *labels])


def _sums(group: Int[np.ndarray, " members"], groups: int) -> sparse.csr_matrix:
    """The matrix [groups, members] that adds up what the members of each group have."""
    places = (group, np.arange(len(group)))
    return sparse.csr_matrix((np.ones(len(group)), places), shape=(groups, len(group)))


def _shares(
    edges: Float[np.ndarray, "*draws labels"], massive: Float[np.ndarray, "*draws columns labels"]
) -> tuple[np.ndarray, np.ndarray]:
    """Share of massive edges, and enrichment, shape [*draws, columns, labels]; 0 / 0 is NaN."""
    edges = edges[..., None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = massive / edges
        return share, share / (massive.sum(-1, keepdims=True) / edges.sum(-1, keepdims=True))


def _interval(values: Float[np.ndarray, "draws ..."]) -> Float[np.ndarray, "2 ..."]:
    """Both ends over the draws that have a value; NaN where fewer than half of them have."""
    enough = np.isfinite(values).mean(axis=0) >= 0.5
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    quantiles = np.nanquantile(np.where(enough, values, 0.0), tails, axis=0)
    return np.where(enough, quantiles, np.nan)


def _deals(
    label: Int[np.ndarray, " E"],
    graph: Int[np.ndarray, " E"],
    slot: Int[np.ndarray, " E"],
    massive: Bool[np.ndarray, "columns E"],
    kinds: int,
    permutations: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "permutations columns labels"]:
    """Massive edges of each label, labels dealt out within graphs."""
    first = np.unique(slot // 2, return_index=True)[1]  # edge of each bond
    bonds, graph = len(first), graph[first]
    of_slot = label[first].repeat(2)  # where there is one direction, both have its label
    of_slot[slot] = label
    if not np.array_equal(of_slot[slot], label):
        raise ValueError(
            "expected all edges from one node to another to have the same label; the permutation "
            "test deals out one label for each direction of a bond"
        )
    of_slot = of_slot.reshape(bonds, 2)
    per_slot = _sums(slot, 2 * bonds) @ massive.T.astype(float)  # massive edges
    order_of_graphs = np.argsort(graph, kind="stable")
    dealt, drawn = np.empty_like(of_slot), np.empty((permutations, len(massive), kinds))
    for index in range(permutations):
        # Sorted by graph, then at random: a permutation of the bonds within each graph.
        dealt[order_of_graphs] = of_slot[np.lexsort((rng.random(bonds), graph))]
        drawn[index] = (_sums(dealt.ravel(), kinds) @ per_slot).T
    return drawn
