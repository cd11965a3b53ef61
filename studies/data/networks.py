"""Graphs whose nodes are predicted: citation networks, proteins, trees, regular graphs.

In a citation network a paper is a node, a citation an edge in both directions, features say which
words it has. A split is the nodes that count, on the whole graph.

In Tree-NeighborsMatch (Alon and Yahav, 2021) the root of a binary tree has a key k, leaf t the pair
(t, pi(t)) with a permutation pi, and the root's class is pi(k): all of a permutation has to pass.

In a network of proteins an edge has eight weights, one for each kind of evidence, and a protein has
many labels. A split is the whole graph with the labels of its own proteins.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import factorial
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.datasets import Planetoid
from torch_geometric.io import read_planetoid_data
from torch_geometric.utils import from_networkx, index_to_mask, to_dense_adj, to_undirected

from studies.data.sets import SPLITS, Description, Source, Splits, expect_all, read_url

PER_CLASS, VAL, TEST = 20, 500, 1000
"""Sizes of Planetoid's public split, training nodes of each class and of the other splits."""

HOMOPHILY = 0.81
"""The probability that an edge of the synthetic network stays within a class, as in Cora."""

_PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
_TITLES = {"cora": "Cora", "citeseer": "CiteSeer", "pubmed": "PubMed"}


@dataclass(frozen=True, eq=False)
class NodesOfGraph:
    """Some nodes of one graph, of which a forward pass needs all."""

    graph: Data
    nodes: Int[Tensor, " n"]  # ids of those that count

    def __len__(self) -> int:
        return len(self.nodes)


def _splits(graph: Data, **about: object) -> Splits:
    description = Description(
        **dict(task="node classification", target="class of a paper"),
        **dict(num_node_types=None, num_edge_types=None, num_targets=int(graph.y.max()) + 1),
        **about,
    )
    nodes = (graph[f"{name}_mask"].nonzero().flatten() for name in SPLITS)
    return Splits(*(NodesOfGraph(graph, of_split) for of_split in nodes), description)


def _planetoid(name: str) -> Source:
    plain = name.removesuffix("-missing")
    is_missing, title = plain != name, _TITLES[plain]
    folder = f"Planetoid{'-missing100' * is_missing}/{title}/raw"
    files = [f"{folder}/ind.{plain}.{part}" for part in _PARTS]

    def fetch() -> dict[str, bytes]:
        return {file: read_url(f"{Planetoid.url}/{Path(file).name}") for file in files}

    def read(*raw: Path) -> Splits:
        graph = read_planetoid_data(str(raw[0].parent), plain)
        if is_missing:  # the file has the features of the test nodes
            graph.x[~graph.train_mask] = 0
        return _splits(
            graph,
            **dict(name=name, title=title + ", features missing" * is_missing),
            source="Planetoid (Yang, Cohen and Salakhutdinov, 2016), through PyG",
            licence="not stated; published for research",
            deviations=("Every feature outside the 60 training nodes is zero.",) * is_missing,
        )

    return Source(files, read, None if is_missing else fetch)


CHANNELS = (
    *("homology", "neighborhood", "fusion", "cooccurrence"),
    *("coexpression", "experimental", "database", "text mining"),
)
"""Kinds of evidence of STRING, in the order in which ogbn-proteins has their weights."""

_RAW = ("num-node-list", "num-edge-list", "edge", "edge-feat", "node_species", "node-label")
_OGB_SPLITS = dict(train="train", val="valid", test="test")


def read_ogb_proteins(folder: Path | str, split: str = "species") -> dict[str, Data]:
    """The graph of ``raw`` and ``split`` as OGB unpacks ogbn-proteins, once for each split.

    Nodes have the place of their species among all as type id, both directions of an edge its
    weights [8], the larger ones if it is listed twice, and as ``edge_type`` the first channel with
    the largest one. Targets ``y`` [N, tasks] are NaN outside the split. ogbn-proteins itself would
    need some 12 GB, judged by half a million edges, and sampling to train on, which is not here.
    """
    folder, tables = Path(folder), {}
    files = {name: folder / "raw" / f"{name}.csv.gz" for name in _RAW}
    files |= {n: folder / "split" / split / f"{of}.csv.gz" for n, of in _OGB_SPLITS.items()}
    for name, path in files.items():
        try:
            tables[name] = torch.tensor(pd.read_csv(path, header=None).to_numpy())
        except (FileNotFoundError, MemoryError):
            raise
        except Exception as error:  # of the table, or of its compression
            raise ValueError(f"{path}: expected a table of numbers: {error}") from error
    number, edges, ends, weights, species, y = (tables[name] for name in _RAW)
    nodes = torch.cat([tables[name].flatten() for name in SPLITS])
    right = {
        "one graph": number.numel() == edges.numel() == 1,
        "as many species and rows of labels as nodes": len(species) == len(y) == number.sum(),
        "one species of each node": species.size(1) == 1 and not species.is_floating_point(),
        "as many edges and rows of weights": len(ends) == len(weights) == edges.sum(),
        f"{len(CHANNELS)} weights from 0 to 1": weights.size(1) == len(CHANNELS)
        and bool(((weights >= 0) & (weights <= 1)).all()),
        "labels of 0, 1 or nothing": bool(((y == 0) | (y == 1) | y.isnan()).all()),
        "edges between two nodes": ends.size(1) == 2 and _are_ids(ends, len(y)),
        "each node in one split at most": len(nodes.unique()) == len(nodes)
        and _are_ids(nodes, len(y)),
    }
    expect_all(folder, right)
    edge_index, weights = to_undirected(ends.t(), weights.float(), num_nodes=len(y), reduce="max")
    graph = Data(species.flatten().unique(return_inverse=True)[1], edge_index, weights)
    graph.edge_type = weights.argmax(dim=1)
    is_in = {name: index_to_mask(tables[name].flatten(), len(y)).unsqueeze(1) for name in SPLITS}
    return {n: Data(y=y.float().where(mask, torch.nan), **dict(graph)) for n, mask in is_in.items()}


def _are_ids(values: Tensor, number: int) -> bool:
    whole = not values.is_floating_point()
    return whole and bool(0 <= values.min() <= values.max() < number)


def _string(*raw: Path) -> Splits:
    graphs = read_ogb_proteins(raw[0].parents[1], "random")
    x, y = graphs["train"].x, graphs["train"].y
    about = Description(
        **dict(name="string-ppi", title="STRING, macaque", task="node classification"),
        **dict(target=f"{y.size(1)} terms of the Gene Ontology, present or not"),
        **dict(num_node_types=int(x.max()) + 1, num_edge_types=None, num_targets=y.size(1)),
        **dict(edge_channels=len(CHANNELS), edge_types=dict(enumerate(CHANNELS))),
        source="an export of STRING, 101 proteins of Macaca fascicularis, in the layout of "
        "ogbn-proteins",
        licence="CC BY 4.0",
        deviations=(
            "Not ogbn-proteins, which has 132,534 proteins of eight species and 112 terms.",
            "One species: all nodes have the same type. Published networks take values from nodes "
            "alone, so that what tells one protein from another is rounding and a small constant "
            "in a denominator, which BatchNorm magnifies in training.",
            "The split is random and ours. Every step sees the whole graph, where the published "
            "code draws neighborhoods.",
        ),
    )
    return Splits(**{name: [graph] for name, graph in graphs.items()}, description=about)


_STRING = "string_ppi/macaque101_ogb_layout"
SOURCES = {name: [_planetoid(name)] for name in ("cora", "citeseer", "pubmed", "pubmed-missing")}
PROTEINS = {
    "string-ppi": [
        Source(
            [f"{_STRING}/raw/{name}.csv.gz" for name in _RAW]
            + [f"{_STRING}/split/random/{name}.csv.gz" for name in _OGB_SPLITS.values()],
            _string,
        )
    ]
}
"""Where each network is from, under the names that PyG and OGB give files."""


def load_citation_like() -> Splits:
    """The synthetic network of ``citation_like``."""
    return _splits(
        citation_like(),
        **dict(name="citation", title="synthetic citation graph"),
        source="drawn by studies.data.networks.citation_like, a degree-corrected stochastic block "
        "model",
        licence="none needed: synthetic",
        deviations=("Synthetic: of the size and mixing of Cora, with no text behind it.",),
    )


def citation_like(
    seed: int = 0,
    *,
    num_nodes: int = 2708,
    num_edges: int = 5278,
    num_classes: int = 7,
    num_words: int = 1433,
) -> Data:
    """A synthetic network with Cora's size and mixing: a degree-corrected stochastic block model.

    Every node has an edge; the others are drawn with the nodes' propensities, which follow a power
    law. Of the words of a node some are drawn from those of its class, the others from all.
    """
    generator = np.random.default_rng(seed)
    classes = generator.permutation(np.arange(num_nodes) % num_classes)
    edges = _draw_edges(generator, classes, num_edges)
    x = _draw_words(generator, classes, num_words)
    edge_index = to_undirected(torch.from_numpy(edges), num_nodes=num_nodes)
    data = Data(x=torch.from_numpy(x).float(), edge_index=edge_index, y=torch.from_numpy(classes))
    order = generator.permutation(num_nodes)
    train = np.concatenate([order[classes[order] == c][:PER_CLASS] for c in range(num_classes)])
    rest = order[~np.isin(order, train)]
    test = min(TEST, 2 * len(rest) // 3)
    val = min(VAL, len(rest) - test)
    for name, nodes in (("train", train), ("val", rest[:val]), ("test", rest[-test:])):
        data[f"{name}_mask"] = index_to_mask(torch.from_numpy(nodes), num_nodes)
    return data


def _draw_edges(generator: np.random.Generator, classes: np.ndarray, number: int) -> np.ndarray:
    """Distinct undirected edges, [2, number], drawn by propensity, at least one for every node."""
    nodes = len(classes)
    propensity = generator.pareto(1.5, nodes) + 1
    propensity = np.minimum(propensity, np.quantile(propensity, 0.999))
    members = [np.flatnonzero(classes == c) for c in range(classes.max() + 1)]
    volume = np.array([propensity[m].sum() for m in members])

    def draw(among: np.ndarray, weights: np.ndarray) -> int:
        return int(generator.choice(among, p=weights / weights.sum()))

    def partner(node: int) -> int:
        own = classes[node]
        if generator.random() >= HOMOPHILY:
            own = draw(np.delete(np.arange(len(members)), own), np.delete(volume, own))
        return draw(members[own], propensity[members[own]])

    edges: set[tuple[int, int]] = set()
    lonely = dict.fromkeys(generator.permutation(nodes).tolist())
    while len(edges) < number:  # those without an edge come first
        one = next(iter(lonely)) if lonely else draw(np.arange(nodes), propensity)
        other = partner(one)
        if one != other:
            edges.add((min(one, other), max(one, other)))
            for end in (one, other):
                lonely.pop(end, None)
    return np.array(sorted(edges)).T


def _draw_words(generator: np.random.Generator, classes: np.ndarray, words: int) -> np.ndarray:
    """Which words a node has, [nodes, words]: some 18, of which 12 per cent are of its class."""
    common = 1 / np.arange(1, words + 1) ** 0.8  # few are common, most are rare
    common = generator.permutation(common / common.sum())
    topics = []
    for _ in range(classes.max() + 1):
        chosen = generator.choice(words, size=max(1, words // 20), replace=False)
        topic = np.zeros(words)
        topic[chosen] = generator.dirichlet(np.ones(len(chosen)))
        topics.append(topic)
    x = np.zeros((len(classes), words), dtype=bool)
    counts = np.maximum(1, generator.poisson(18.0, len(classes)))
    for node, (own, count) in enumerate(zip(classes, counts, strict=True)):
        from_topic = generator.binomial(count, 0.12)
        x[node, generator.choice(words, from_topic, p=topics[own])] = True
        x[node, generator.choice(words, count - from_topic, p=common)] = True
    return x


@dataclass(frozen=True, eq=False)
class RegularTask:
    """Regression on the nodes of one graph, in double precision."""

    operator: Float[Tensor, "N N"]  # P, symmetric and doubly stochastic
    x: Float[Tensor, "N D"]  # standard normal plus 0.5
    y: Float[Tensor, "N 1"]  # 0.3 plus tanh of a standardized projection of P x

    @property
    def constant_loss(self) -> float:
        """The least loss of a constant prediction, half the variance of the target."""
        return 0.5 * self.y.var(correction=0).item()


def regular_task(
    num_nodes: int = 200, degree: int = 20, *, channels: int = 16, seed: int = 0
) -> RegularTask:
    """A connected random regular graph with features and a target that one layer can learn.

    P = (A + I) / (degree + 1).

    Source: ours, after the backward-oversmoothing paper, whose settings are not known to us.
    """
    graph = nx.random_regular_graph(degree, num_nodes, seed=seed)
    if not nx.is_connected(graph):
        raise ValueError(f"the graph of seed {seed} is not connected; take another seed")
    adjacency = to_dense_adj(from_networkx(graph).edge_index, max_num_nodes=num_nodes)[0].double()
    operator = (adjacency + torch.eye(num_nodes, dtype=torch.float64)) / (degree + 1)
    return task_on(operator, channels=channels, seed=seed)


def task_on(operator: Float[Tensor, "N N"], *, channels: int = 16, seed: int = 0) -> RegularTask:
    """Features and a target for a symmetric, doubly stochastic P."""
    generator, num_nodes = torch.Generator().manual_seed(seed), len(operator)
    x = torch.randn(num_nodes, channels, generator=generator, dtype=torch.float64) + 0.5
    weights = torch.randn(channels, 1, generator=generator, dtype=torch.float64)
    seen = operator @ x @ weights
    y = 0.3 + ((seen - seen.mean()) / seen.std(correction=0)).tanh()
    return RegularTask(operator, x, y)


# Tree-NeighborsMatch

PUBLISHED_SEED = 11  # of Tree-NeighborsMatch


@dataclass(frozen=True, eq=False)
class Trees(Sequence[Data]):
    """Examples on one tree: a sequence of graphs, and the same as tensors."""

    pairs: Int[Tensor, "B nodes 2"]  # key and value of every node in pre-order
    y: Int[Tensor, " B"]  # class of the root, a value from 1 to the number of leaves
    edge_index: Int[Tensor, "2 E"]  # child to parent, then a self-loop of each node

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int | slice | Tensor) -> "Data | Trees":
        """A graph with ``x`` [nodes, 2], ``edge_index`` and ``y`` [1]; or ``Trees`` of places."""
        if isinstance(index, slice | Tensor):
            return Trees(self.pairs[index], self.y[index], self.edge_index)
        x, y = self.pairs[index].long(), self.y[index].long().view(1)  # IndexError ends a loop
        return Data(x=x, edge_index=self.edge_index, y=y, num_nodes=len(x))


def tree_edges(depth: int) -> Int[Tensor, "2 E"]:
    """Edges of a complete binary tree from child to parent, nodes in pre-order, and self-loops.

    Source: Tree-NeighborsMatch, published code ``tasks/tree_dataset.py``.
    """
    nodes = level_order(depth)
    child = torch.arange(1, len(nodes))
    edges = torch.stack([nodes[child], nodes[(child - 1) // 2]])
    loops = torch.arange(len(nodes)).repeat(2, 1)
    return torch.cat([edges[:, edges[0].argsort()], loops], dim=1)


def level_order(depth: int) -> Int[Tensor, " nodes"]:
    """Pre-order numbers of the nodes level by level; the children of place p are 2p + 1, 2p + 2."""
    pre_order = nx.dfs_preorder_nodes(nx.balanced_tree(2, depth), 0)
    return torch.tensor([*pre_order]).argsort()


def neighbors_match(depth: int, seed: int = PUBLISHED_SEED) -> Trees:
    """All examples of a depth: every key with every permutation drawn.

    Up to depth 3, 1,000 different permutations of the leaves' values, or all if there are fewer;
    from depth 4 on, as many independent draws, but no more than give 32,000 examples.

    Source: Tree-NeighborsMatch, published code ``tasks/dictionary_lookup.py``.
    """
    nodes, leaves = level_order(depth), 2**depth
    number = min(1000, 32_000 // leaves)
    if leaves <= 8:
        every = list(permutations(range(1, leaves + 1)))
        drawn = torch.tensor(random.Random(seed).sample(every, min(number, factorial(leaves))))
    else:
        generator = np.random.default_rng(seed)
        rows = [generator.permutation(leaves) + 1 for _ in range(number)]
        drawn = torch.from_numpy(np.stack(rows))
    pairs = torch.zeros(len(drawn), leaves, len(nodes), 2, dtype=torch.int16)
    keys = torch.arange(1, leaves + 1)
    pairs[:, :, nodes[-leaves:], 0] = keys.short()
    pairs[:, :, nodes[-leaves:], 1] = drawn[:, None].short()
    pairs[:, :, 0, 0] = keys.short()
    y = drawn.flatten()  # key k asks for the value of leaf k
    return Trees(pairs.flatten(0, 1), y, tree_edges(depth))


def load_trees(depth: int, seed: int = PUBLISHED_SEED) -> Splits:
    """The examples of a depth, four fifths of each class to train on, the rest in ``test``."""
    trees = neighbors_match(depth, seed)
    train, test = train_test_split(
        np.arange(len(trees)), train_size=0.8, stratify=trees.y.numpy(), random_state=seed
    )
    size = 2**depth + 1
    about = Description(
        **dict(name=f"trees-{depth}", title=f"trees of depth {depth}", task="graph classification"),
        **dict(target="value of the leaf whose key the root has", num_targets=size),
        **dict(num_node_types=(size, size), num_edge_types=None),
        source="drawn by studies.data.networks.neighbors_match (Alon and Yahav, 2021)",
        licence="none needed: synthetic",
    )
    train, test = (trees[torch.from_numpy(np.sort(part))] for part in (train, test))
    return Splits(train, trees[:0], test, about)
