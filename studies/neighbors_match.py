"""Tree-NeighborsMatch by depth: how much of a tree fits through its root.

All examples of a depth share one tree, so that networks of PyG's layers can be computed without
scatter, too: in level order the children of place p are at 2p + 1 and 2p + 2. What no later layer
sends to the root is not computed at all. And since nothing goes down the tree, all keys that are
asked of one permutation share what is below the root.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GatedGraphConv, GCNConv, GINConv, PairNorm

from mapkg.lipschitz_norm import EPS, lipschitz_normalise
from studies import tables
from studies.data import Splits
from studies.depth import named, norm_and_scale
from studies.figures import over_seeds
from studies.published import Schedule, known, titles
from studies.tables import Result, Study, run_study
from studies.tasks import TREES, TreeTask
from studies.train import fit

LIPSCHITZ_NORMS = ("lipschitz", "lipschitz-layer")
"""Norms of scores, for GAT alone; the second has LayerNorm after every layer as well."""

NORMS = ("none", "layer", "pair", *LIPSCHITZ_NORMS)
"""Nothing, a norm of features after every layer, or one of the scores inside it."""


def _gin(channels: int) -> GINConv:
    one, two = ([nn.Linear(channels, channels), nn.BatchNorm1d(channels)] for _ in range(2))
    return GINConv(nn.Sequential(*one, nn.ReLU(), *two, nn.ReLU()))


LAYERS = {
    "gcn": lambda channels: GCNConv(channels, channels),
    "gin": _gin,
    "ggnn": lambda channels: GatedGraphConv(channels, num_layers=1),
    "gat": lambda channels: GATConv(channels, channels // 4, heads=4),
}
"""Architectures, by what figures and tables call them in capitals."""


class TreeNetwork(nn.Module):
    """Embed -> L x [layer -> ReLU? -> + x? -> norm?] -> root -> Linear, with L = depth + 1.

    GCN, GIN and GAT add each layer to what came before it, GGNN does not; GCN and GIN end each
    layer with a ReLU. GIN has BatchNorm inside its layers whatever the norm. ``scale`` is f of
    LipschitzNorm, 1 for None. Seed torch before the call to fix the initial weights.

    Source: Tree-NeighborsMatch, published code ``models/graph_model.py``, whose networks but GGNN
    have LayerNorm by default.
    """

    def __init__(
        self,
        architecture: str,
        depth: int,
        *,
        norm: str = "none",
        scale: float | None = None,
        channels: int = 32,
    ) -> None:
        super().__init__()
        self.architecture, self.depth, self.norm = architecture, depth, norm
        classes, self.num_nodes = 2**depth + 1, 2 ** (depth + 1) - 1
        self.key = nn.Embedding(classes, channels)
        self.value = nn.Embedding(classes, channels)
        self.layers = nn.ModuleList(LAYERS[architecture](channels) for _ in range(depth + 1))
        name = norm.removeprefix("lipschitz-")
        make = {"layer": lambda: nn.LayerNorm(channels), "pair": PairNorm}.get(name, nn.Identity)
        self.norms = nn.ModuleList(make() for _ in self.layers)
        self.head = nn.Linear(channels, classes, bias=False)
        if norm in LIPSCHITZ_NORMS:
            lipschitz_normalise(self, scale=scale)

    def forward(
        self, x: Int[Tensor, "N 2"], edge_index: Int[Tensor, "2 E"], batch: Int[Tensor, " N"]
    ) -> Float[Tensor, "B classes"]:
        """Scores of the classes of every tree, by the layers of PyG, nodes in pre-order."""
        h = self._embed(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = self._combine(h, layer(h, edge_index))
            h = norm(h, batch) if self.norm == "pair" else norm(h)
        return self.head(h[:: self.num_nodes])

    def dense(self, pairs: Int[Tensor, "B nodes 2"]) -> Float[Tensor, "B classes"]:
        """The same scores without scatter, from keys and values in **level order**."""
        h = self._embed(pairs)
        for number in range(len(self.layers)):
            h = self._layer(number, h, self._reaching(number))
        return self.head(h[:, 0])

    @property
    def can_share(self) -> bool:
        """Whether nodes below the root do not see its key, since no norm is over nodes."""
        return self.norm != "pair" and self.architecture != "gin"

    def shared(
        self, pairs: Int[Tensor, "P nodes 2"], keys: Int[Tensor, " B"], tree: Int[Tensor, " B"]
    ) -> Float[Tensor, "B classes"]:
        """The same scores for many keys of few trees; what is below their roots is computed once.

        ``pairs`` are in **level order**, those of the root do not count; ``keys`` are of the root;
        ``tree`` is the row of ``pairs`` of every example.
        """
        h, root = self._embed(pairs), self.key(keys.long()) + self.value.weight[0]
        for number in range(len(self.layers)):
            family = torch.cat([root[:, None], h[tree, 1:3]], dim=1)
            root = self._layer(number, family, 1)[:, 0]
            if number < self.depth:
                h = self._layer(number, h, self._reaching(number))
        return self.head(root)

    def _embed(self, pairs: Tensor) -> Tensor:
        return self.key(pairs[..., 0].long()) + self.value(pairs[..., 1].long())

    def _reaching(self, number: int) -> int:
        """How many nodes after a layer still send to the root, or are seen by a norm."""
        return 2 ** (self.depth - (number if self.can_share else 0) + 1) - 1

    def _layer(self, number: int, h: Tensor, kept: int) -> Tensor:
        """A layer with its norm for the first nodes of every tree."""
        layer, norm = self.layers[number], self.norms[number]
        degree = torch.ones(h.size(1)).to(h)  # 3 where a node hears itself and two children
        degree[: 2**self.depth - 1] = 3
        new = self._combine(h[:, :kept], _DENSE[self.architecture](layer, h, kept, degree))
        if self.norm != "pair":
            return norm(new)
        centered = new - new.mean(dim=1, keepdim=True)
        size = centered.square().sum(-1).mean(dim=1)
        return norm.scale * centered / (norm.eps + size).sqrt()[:, None, None]

    def _combine(self, h: Tensor, new: Tensor) -> Tensor:
        new = new.relu() if self.architecture in ("gcn", "gin") else new
        return new if self.architecture == "ggnn" else h + new


def _family(part: Tensor, inner: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first nodes of every tree, their left and their right children."""
    return part[:, :inner], part[:, 1 : 2 * inner : 2], part[:, 2 : 2 * inner + 1 : 2]


def _sum(h: Tensor, kept: int) -> Tensor:
    """What the first nodes receive as a sum; leaves hear themselves alone."""
    inner = min(kept, h.size(1) // 2)
    own, left, right = _family(h, inner)
    return torch.cat([own + left + right, h[:, inner:kept]], dim=1)


def _gcn(layer: GCNConv, h: Tensor, kept: int, degree: Tensor) -> Tensor:
    root = degree.rsqrt()[:, None]
    return root[:kept] * _sum(root * layer.lin(h), kept) + layer.bias


def _gin_dense(layer: GINConv, h: Tensor, kept: int, _degree: Tensor) -> Tensor:
    total = _sum(h, kept) + (1 + layer.eps) * h[:, :kept]
    return layer.nn(total.flatten(0, 1)).view_as(total)


def _ggnn(layer: GatedGraphConv, h: Tensor, kept: int, _degree: Tensor) -> Tensor:
    message, own = _sum(h, kept) @ layer.weight[0], h[:, :kept]
    return layer.rnn(message.flatten(0, 1), own.flatten(0, 1)).view_as(own)


def _gat(layer: GATConv, h: Tensor, kept: int, _degree: Tensor) -> Tensor:
    inner = min(kept, h.size(1) // 2)
    # Calling layer.lin would begin a PyG pass for the hooks of LipschitzNorm.
    z = nn.functional.linear(h, layer.lin.weight).unflatten(-1, (layer.heads, layer.out_channels))
    by_node = _family((z * layer.att_src).sum(-1), inner)
    score = torch.stack(by_node) + (z * layer.att_dst).sum(-1)[:, :inner]  # [3, B, inner, H]
    if hasattr(layer, "score_norm"):
        norm = layer.score_norm.norm
        att = torch.cat([layer.att_src, layer.att_dst], dim=-1).squeeze(0).norm(dim=-1)
        square = z.square().sum(-1)
        inside = torch.stack(_family(square, inner)).amax(dim=0) + square[:, :inner]
        root = inside.clamp(min=torch.finfo(inside.dtype).tiny).sqrt()
        score = score / (norm.scale * att * root + EPS)
    weight = nn.functional.leaky_relu(score, layer.negative_slope).softmax(dim=0).unsqueeze(-1)
    received = (weight * torch.stack(_family(z, inner))).sum(dim=0)
    return torch.cat([received, z[:, inner:kept]], dim=1).flatten(-2) + layer.bias


_DENSE = {"gcn": _gcn, "gin": _gin_dense, "ggnn": _ggnn, "gat": _gat}


PUBLISHED = {
    "ggnn": (1.0, 1.0, 1.0, 0.60, 0.38, 0.21, 0.16),
    "gat": (1.0, 1.0, 1.0, 0.41, 0.21, 0.15, 0.11),
    "gin": (1.0, 1.0, 0.77, 0.29, 0.20),
    "gcn": (1.0, 1.0, 0.70, 0.19, 0.14, 0.09, 0.08),
}
"""Training accuracies for depths from 2 on that the README of the published code gives; those of
GIN end at depth 6. GCN, GIN and GAT have LayerNorm there, GGNN has none."""

PUBLISHED_PASSES = 50_000
"""After so many at the latest the published trainings end."""

COMPARED = ("none", "layer", "pair", "lipschitz=1", "lipschitz=4", "lipschitz-layer=1")
"""Norms that are compared, with the scale f of those that divide scores, which GAT alone has."""


def variants(
    architectures: Collection[str] = tuple(LAYERS), norms: Sequence[str] = COMPARED
) -> list[dict[str, Any]]:
    """Settings of networks by name; GAT alone has scores to divide."""
    for name in architectures:
        known("--architectures", name, LAYERS)
    pairs = product(architectures, [norm_and_scale(norm, NORMS) for norm in norms])
    return [
        {"architecture": name, **settings}
        for name, settings in pairs
        if name == "gat" or settings["norm"] not in LIPSCHITZ_NORMS
    ]


def untrained(depth: int, seed: int, **settings: Any) -> TreeNetwork:
    """The network of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TreeNetwork(depth=depth, **settings)


def trees(
    splits: Splits,
    *,
    seeds: Sequence[int] = (0, 1, 2),  # of weights and of the order of examples
    architectures: Sequence[str] = ("gcn", "gin", "ggnn", "gat"),  # each with all the norms
    norms: Sequence[str] = COMPARED,  # those with lipschitz are of GAT alone, and have a scale
    passes: int = 500,  # over the training examples
    passes_apart: int | None = None,  # of networks with PairNorm, which take longer
    batch_size: int = 1024,  # examples of a step
    lr: float = 0.001,  # learning rate at the start
    block: int = 10,  # passes after which progress is judged
    sampling: str = "grouped",  # of batches: grouped by permutation, or shuffled as published
    prefix: Path | str | None = None,
    progress: bool = True,
) -> Study:
    """Train networks on trees of one depth; ``best`` is the highest running accuracy, as published.

    Source: Tree-NeighborsMatch; its use in the LipschitzNorm paper.
    """
    task, trainings = TreeTask(splits, sampling), []
    depth = (splits.train.pairs.size(1) + 1).bit_length() - 2

    def train(settings: dict[str, Any], schedule: Schedule, seed: int) -> Result:
        network = untrained(depth, seed, **settings)
        training = fit(network, task, schedule, seed=seed, progress=False)
        history = training.history.rename(columns={"epoch": "passes"})
        row = {"best": history["train_accuracy"].max(), **task.accuracies(network)}
        row |= {"passes_done": int(history["passes"].iloc[-1])}
        row |= {"stop_reason": training.stop_reason.replace("max epochs", "passes")}
        return row, history[["passes", "train_accuracy"]]

    for seed, settings in product(seeds, variants(architectures, norms)):
        is_apart = settings["norm"] == "pair" and passes_apart is not None
        own = dict(epochs=passes_apart if is_apart else passes, block=block)
        schedule = replace(TREES, batch_size=batch_size, lr=lr, **own)
        about = {"depth": depth, **settings, "seed": seed, "passes": schedule.epochs}
        about |= schedule.columns("batch_size", "lr", "block", "lr_factor", "lr_patience")
        about |= {"patience": schedule.patience, "sampling": sampling}
        trainings.append((about, partial(train, settings, schedule, seed)))
    labels = ("depth", "architecture", "norm", "scale", "seed")
    return run_study(trainings, labels=labels, prefix=prefix, progress=progress)


@torch.no_grad()
def probe(network: TreeNetwork) -> dict[str, float]:
    """Whether what a parent of two leaves sends after the first layer tells left from right.

    For all pairs of its leaves' values: ``left`` and ``right``, the accuracy of a linear map (ridge
    regression) on the pair that it was not fitted to; ``swap``, how far exchanging two values moves
    what is sent, over the distance of any two pairs, medians.
    """
    leaves = 2**network.depth
    values = torch.cartesian_prod(*[torch.arange(leaves)] * 2)
    pairs = torch.zeros(leaves**2, 2 * leaves - 1, 2, dtype=torch.long)
    pairs[:, -leaves:, 0] = 1 + torch.arange(leaves)
    pairs[:, -leaves : 2 - leaves or None, 1] = 1 + values
    sent = network._layer(0, network._embed(pairs), network._reaching(0))[:, leaves // 2 - 1]
    sent = (sent - sent.mean(dim=0)).double()
    kernel = 1 + sent @ sent.t() / sent.var(dim=0).sum()
    hat = kernel @ torch.linalg.inv(kernel + 1e-3 * torch.eye(len(kernel)))
    found = {}
    for side, value in zip(("left", "right"), values.t(), strict=True):
        wanted = nn.functional.one_hot(value).double()
        without = hat @ wanted - hat.diag()[:, None] * wanted  # each row up to a positive factor
        found[side] = (without.argmax(dim=1) == value).double().mean().item()
    table = sent.view(leaves, leaves, -1)
    swaps = (table - table.transpose(0, 1)).norm(dim=-1)[~torch.eye(leaves, dtype=torch.bool)]
    return found | {"swap": (swaps.median() / nn.functional.pdist(sent).median()).item()}


def probes(
    splits: Splits, norms: Sequence[str], *, seeds: Sequence[int], passes: int, batch_size: int
) -> pd.DataFrame:
    """``probe`` of GATs before and after training at a rate of 0.004, and what they learned."""
    rows, task = [], TreeTask(splits, "grouped")
    depth = (splits.train.pairs.size(1) + 1).bit_length() - 2
    schedule = replace(TREES, batch_size=batch_size, lr=0.004, epochs=passes)
    for settings, seed in product(variants(["gat"], norms), seeds):
        network = untrained(depth, seed, **settings)
        before = probe(network)
        history = fit(network, task, schedule, seed=seed, progress=False).history
        about = {**settings, "seed": seed, "accuracy": history["train_accuracy"].max()}
        rows += [
            {**about, "state": state, **found}
            for state, found in (("untrained", before), ("trained", probe(network)))
        ]
    return titled(pd.DataFrame(rows))


def read_trees(folder: Path | str, table: str = "runs", group: str = "trees") -> pd.DataFrame:
    """``runs`` or ``curves`` of all tracked depths, or of another group of titles, as one table."""
    return titled(tables.read(folder, "", tuple(titles(group)), table))


def titled(table: pd.DataFrame) -> pd.DataFrame:
    """A table of ``trees`` with ``network``, the architecture's title, and ``variant``."""
    return named(table.assign(network=table["architecture"].str.upper()))


def published_runs(depths: Collection[int]) -> pd.DataFrame:
    """The published accuracies as rows of a table of runs."""
    return pd.DataFrame(
        dict(network=name.upper(), variant="published", depth=depth, best=best)
        for name, values in PUBLISHED.items()
        for depth, best in enumerate(values, start=2)
        if depth in depths
    )


def tree_table(runs: pd.DataFrame, value: str = "best") -> pd.DataFrame:
    """A value in percent by network and depth, over seeds; the published ones beside ``best``."""
    if value == "best":
        runs = pd.concat([runs, published_runs(set(runs["depth"]))], ignore_index=True)
    percent = runs.assign(percent=100 * runs[value])
    look = dict(rows=["network", "variant"], columns=["depth"], statistic="range", form=".0f")
    return tables.over_seeds(percent, "percent", **look)


ASKED_COLOR, OTHER_COLOR = "#E76F51", "#B8C4CC"


def tree_example(pairs: Int[Tensor, "nodes 2"], ax: Axes) -> Axes:
    """Draw one example in level order, the way from the leaf that is asked for in color."""
    depth = (len(pairs) + 1).bit_length() - 2
    tree = nx.balanced_tree(2, depth, create_using=nx.DiGraph).reverse()
    level = [(place + 1).bit_length() - 1 for place in tree]
    places = {n: ((n - 2**k + 1.5) / 2**k, -k) for n, k in enumerate(level)}
    asked = nx.shortest_path(tree, 2**depth - 2 + int(pairs[0, 0]), 0)
    labels = {n: f"{key}, {value}" for n, (key, value) in enumerate(pairs.tolist()) if key}
    labels[0] = f"{pairs[0, 0]}, ?"
    colors = {n: ASKED_COLOR if n in asked else OTHER_COLOR for n in tree}
    edges = [colors[child] for child, _ in tree.edges]
    look = dict(node_color=[colors[n] for n in tree], edge_color=edges, width=1.6)
    nx.draw(tree, places, ax=ax, labels=labels, node_size=420, font_size=8, **look)
    return ax


def tree_curves(curves: pd.DataFrame, *, panel: str = "network", **look: Any) -> sns.FacetGrid:
    """Training accuracy by passes, to those of the published runs; a line ends with any seed."""
    keys = [panel, "variant"]
    last = curves.groupby([*keys, "seed"])["passes"].transform("max")
    last = last.groupby([curves[key] for key in keys]).transform("min")
    grid = over_seeds(
        curves[curves["passes"] <= last],
        **dict(x="passes", y="train_accuracy", color="variant", panel=panel, marker=None),
        labels={"passes": "passes over the examples", "train_accuracy": "training accuracy"},
        **dict(log="x", **look),
    )
    grid.refline(x=PUBLISHED_PASSES, color="black", lw=0.8, ls=":")
    return grid.set(ylim=(0, 1.05), xlim=(None, 1.4 * PUBLISHED_PASSES))
