"""Curvature of edges against their activation ratios, in barbell graphs and in molecules."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.utils import to_dense_adj

from mapkg import hooks
from mapkg.all_measures import layer_ratio
from mapkg.evaluation import batches, calibrate_batch_norm, evaluate, predict
from mapkg.measures import activation_ratio
from mapkg.models.config import Config
from mapkg.models.network import build
from studies.data import Splits
from studies.published import CONFIGS, grid
from studies.statistics import equivalence
from studies.tables import Result, Study, run_study
from studies.train import fit, seed_all


def balanced_forman(graph: Data) -> Float[Tensor, " E"]:
    r"""Balanced Forman curvature of each directed edge of an undirected graph without loops.

    With degrees d, the number of triangles T at the edge, those neighbors of i that are part of a
    4-cycle at the edge without diagonals, :math:`\square^i`, and the largest number
    :math:`\gamma` of such 4-cycles through one of them:

    .. math::
        \mathrm{Ric}(i, j) = \frac 2 {d_i} + \frac 2 {d_j} - 2 + \frac{2 T}{\max(d_i, d_j)}
            + \frac T {\min(d_i, d_j)}
            + \frac{|\square^i| + |\square^j|}{\gamma \max(d_i, d_j)} ,

    and 0 where a degree is 1.

    Source: Topping et al. 2022, definition 1.
    """
    adjacency = to_dense_adj(graph.edge_index, max_num_nodes=graph.num_nodes)[0].clamp(max=1)
    degree = adjacency.sum(dim=1)
    curvatures = {}  # by its two nodes, since both directions have the same
    for j, i in graph.edge_index.sort(dim=0).values.unique(dim=1).t().tolist():
        ends = degree[[i, j]]
        low, high = ends.min().item(), ends.max().item()
        if low == 1:
            curvatures[j, i] = 0.0
            continue
        triangles = (adjacency[i] * adjacency[j]).sum().item()
        squares = [_squares(adjacency, *pair) for pair in ((i, j), (j, i))]
        value = (2 / ends).sum().item() - 2 + 2 * triangles / high + triangles / low
        if most := max(s.max().item() for s in squares):
            value += sum((s > 0).sum().item() for s in squares) / (most * high)
        curvatures[j, i] = value
    return torch.tensor([curvatures[min(e), max(e)] for e in graph.edge_index.t().tolist()])


def _squares(adjacency: Tensor, i: int, j: int) -> Float[Tensor, " N"]:
    """For each node the number of 4-cycles i, node, other, j without diagonals that it is in."""
    only_i = adjacency[i] * (1 - adjacency[j])
    only_j = adjacency[j] * (1 - adjacency[i])
    only_i[j] = only_j[i] = 0
    return only_i * (adjacency @ only_j)


BRIDGE = 4
"""The edge type of the bridge of a barbell, which no network sees."""


def barbells(count: int, seed: int) -> list[Data]:
    """Graphs of two cliques of five to ten nodes, joined by one edge.

    A node has type 0 or 1, read as -1 and 1; the target is the product of the sums of both
    cliques, divided by 8, so that it needs what only the bridge carries. ``edge_type`` is 1
    within a clique and ``BRIDGE`` at the bridge; networks are given ``edge_attr``, 1 everywhere.
    """
    rng = np.random.default_rng(seed)
    graphs = []
    for _ in range(count):
        sizes = rng.integers(5, 11, size=2)
        side = np.repeat([0, 1], sizes)
        adjacency = (side[:, None] == side) & ~np.eye(len(side), dtype=bool)
        adjacency[0, sizes[0]] = adjacency[sizes[0], 0] = True
        edges = torch.tensor(np.array(adjacency.nonzero()))
        x = torch.tensor(rng.integers(2, size=len(side)))
        sums = [(2 * x[side == s] - 1).sum() for s in (0, 1)]
        is_bridge = torch.tensor(side)[edges].diff(dim=0).flatten() != 0
        kind = 1 + (BRIDGE - 1) * is_bridge.long()
        data = dict(x=x, edge_index=edges, edge_attr=torch.ones_like(kind), edge_type=kind)
        graphs.append(Data(**data, y=(sums[0] * sums[1] / 8).reshape(1, 1)))
    return graphs


def edge_table(model: nn.Module, graphs: Sequence[Data], names: str) -> pd.DataFrame:
    """The largest row ratio and layer ratio of each edge and layer, beside its curvature.

    The median of the layer ratio is that of the graph.
    """
    of_edge = pd.DataFrame(
        {
            "graph": np.repeat(range(len(graphs)), [graph.num_edges for graph in graphs]),
            "type": torch.cat([graph.edge_type for graph in graphs]),
            "curvature": torch.cat([balanced_forman(graph) for graph in graphs]),
        }
    )
    parts, start = [], 0
    for batch, seen in hooks.scan(model, batches(graphs, 128), names, forward=predict):
        of_batch = of_edge[start : (start := start + batch.num_edges)]
        graph = batch.batch[batch.edge_index[0]]
        for layer, score in enumerate(seen.values()):
            ratios = {"row": activation_ratio(score), "layer ratio": layer_ratio(score, graph)}
            largest = {name: ratio.amax(dim=1).numpy() for name, ratio in ratios.items()}
            parts.append(of_batch.assign(layer=layer, **largest))
    return pd.concat(parts, ignore_index=True)


def ranks(table: pd.DataFrame) -> pd.DataFrame:
    """By layer, how a ratio goes with curvature: mean rank correlations within graphs.

    ``row_bridge`` and ``layer_bridge`` are the mean logarithm of the ratio at bridges less that
    in cliques, NaN for graphs without bridges.
    """
    rows = []
    for layer, part in table.groupby("layer"):
        row = {"layer": layer}
        for name, column in (("row", "row"), ("layer", "layer ratio")):
            within = [
                p["curvature"].rank().corr(p[column].rank()) for _, p in part.groupby("graph")
            ]
            means = np.log(part[column]).groupby(part["type"] == BRIDGE).mean()
            row |= {f"{name}_rank": np.nanmean(within), f"{name}_bridge": means.diff().iloc[-1]}
        rows.append(row)
    return pd.DataFrame(rows)


MARGINS = grid()["topology_moses"]["margins"]
"""Within which a rank correlation, or a difference of logarithms, counts as none."""


def topology(
    splits: Splits,
    *,
    seeds: Sequence[int] = (10, 11, 12, 13, 14, 15, 16, 17),  # of weights and order, at once
    epochs: int = 40,  # of networks on barbells; on molecules a fourth
    graphs: int = 256,  # barbells, of which a tenth validates and a tenth tests
    molecules: int = 1024,  # to train on; an eighth to measure
    hidden: int = 32,  # channels
    heads: int = 4,  # of attention
    layers: int = 3,  # of attention
    prefix: Path | str | None = None,
    progress: bool = True,
) -> Study:
    """Train networks on barbells and on molecules; ``curves`` has ``ranks`` before and after."""
    part = -(-graphs // 10)
    made = barbells(graphs, 0)
    about = replace(splits.description, name="barbells", title="barbell graphs", num_node_types=2)
    joined = Splits(made[2 * part :], made[part : 2 * part], made[:part], about)
    few = replace(
        splits,
        train=splits.train[:molecules],
        val=splits.val[: molecules // 16],
        test=splits.test[: molecules // 8],
    )
    sizes = dict(hidden_channels=hidden, heads=heads, num_layers=layers, batch_size=16)

    def train(data: Splits, config: Config) -> Result:
        run = fit(build, data, config, seeds=seeds, progress=False)
        tables = []
        for seed, state in product(seeds, ("untrained", "trained")):
            seed_all(seed)
            network = build(config)
            if state == "trained":
                network.load_state_dict(run.last_weights[seed])
            else:
                calibrate_batch_norm(network, data.train)
            table = ranks(edge_table(network.eval(), data.test, "layers.*.score"))
            tables.append(table.assign(seed=seed, state=state, error=evaluate(network, data.test)))
        return {"seeds": len(seeds)}, pd.concat(tables, ignore_index=True)

    trainings = []
    for data, passes in ((joined, epochs), (few, max(1, epochs // 4))):
        schedule = dict(lr=1e-3, lr_patience=passes, max_epochs=passes)
        types = dict(num_node_types=data.description.num_node_types)
        config = CONFIGS["GT-ZINC"].replace(**sizes, **schedule, **types)
        settings = {"dataset": data.description.title, **sizes, "epochs": passes}
        settings |= {"graphs": len(data.train), "of_seeds": " ".join(map(str, seeds))}
        trainings.append((settings, partial(train, data, config)))
    return run_study(trainings, labels=("dataset",), prefix=prefix, progress=progress)


def verdicts(curves: pd.DataFrame) -> pd.DataFrame:
    """For each data set, layer and state, the mean of each measure and whether it is none.

    ``low`` and ``high`` are the 90 % interval over networks that decides.
    """
    rows = {}
    for key, part in curves.groupby(["dataset", "state", "layer"], sort=False):
        for name in ("row_rank", "layer_rank", "row_bridge", "layer_bridge"):
            if part[name].notna().all():
                test = equivalence(part[name], MARGINS[name.split("_")[1]])
                rows[(*key, name)] = {k: test[k] for k in ("change", "low", "high", "equivalent")}
    names = ["dataset", "state", "layer", "measure"]
    return pd.DataFrame(rows).T.infer_objects().rename_axis(names)


def rank_figure(curves: pd.DataFrame) -> sns.FacetGrid:
    """Rank correlations of every network by layer, before and after training."""
    columns = {"row_rank": "row ratio", "layer_rank": "layer ratio"}
    keys = ["dataset", "state", "layer", "seed"]
    long = curves.rename(columns=columns).melt(keys, columns.values(), "measure")
    look = dict(kind="strip", x="layer", y="value", hue="state", col="dataset", row="measure")
    # The place of a dot beside others is drawn by chance otherwise, anew in each build.
    facets = sns.catplot(long, **look, dodge=True, jitter=False, height=2.1, aspect=1.4)
    for ax in facets.axes.flat:
        ax.axhspan(-MARGINS["rank"], MARGINS["rank"], color="0.9", lw=0, zorder=0)
    facets.set_titles("{col_name}, {row_name}")
    return facets.set_axis_labels("layer", "rank correlation\nwith curvature")
