"""Graphs whose nodes are predicted: citation networks, real and synthetic, and regular graphs.

In a citation network a paper is a node, a citation an edge in both directions, features say which
words it has. A few papers have a known class; the others' are predicted. A split is the nodes that
count, on the whole graph, which every forward pass sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.datasets import Planetoid
from torch_geometric.io import read_planetoid_data
from torch_geometric.utils import from_networkx, to_dense_adj, to_undirected

from studies.data.sets import SPLITS, Description, Splits, read_url, root_with

PER_CLASS, VAL, TEST = 20, 500, 1000
"""Sizes of Planetoid's public split, training nodes of each class and of the other splits."""

_PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
_TITLES = {"cora": "Cora", "citeseer": "CiteSeer", "pubmed": "PubMed"}


@dataclass(frozen=True, eq=False)
class NodesOfGraph:
    """Some nodes of one graph, of which a forward pass needs all."""

    graph: Data
    nodes: Int[Tensor, " n"]  # ids of those that count

    def __len__(self) -> int:
        return len(self.nodes)


def planetoid_folder(name: str) -> str:
    """Folder of the raw files of a network under a data root, as PyG's class has it."""
    if name == "pubmed-missing":
        return "Planetoid-missing100/PubMed/raw"
    return f"Planetoid/{_TITLES[name]}/raw"


def load_planetoid(name: str, roots: Sequence[Path], *, download: bool) -> Splits | None:
    """A citation network from the first root that has it, or None if it cannot be had.

    In ``"pubmed-missing"``, which cannot be downloaded, all nodes outside the training set have
    features of zero.
    """
    plain, folder = name.removesuffix("-missing"), planetoid_folder(name)
    is_missing = name != plain
    files = [f"{folder}/ind.{plain}.{part}" for part in _PARTS]

    def fetch() -> dict[str, bytes]:
        return {file: read_url(f"{Planetoid.url}/{Path(file).name}") for file in files}

    root = root_with(roots, files, fetch if download and not is_missing else None)
    if root is None:
        return None
    graph = read_planetoid_data(str(root / folder), plain)
    if is_missing:  # the file has the features of the test nodes
        graph.x[~graph.train_mask] = 0
    return _splits(
        graph,
        name=name,
        title=f"{_TITLES[plain]}, features missing" if is_missing else _TITLES[plain],
        source="Planetoid (Yang, Cohen and Salakhutdinov, 2016), through PyG",
        licence="not stated; published for research",
        deviations=("Every feature outside the 60 training nodes is zero.",) * is_missing,
    )


def load_citation_like() -> Splits:
    """The synthetic network of ``citation_like``; nothing is read."""
    return _splits(
        citation_like(),
        **dict(name="citation", title="synthetic citation graph"),
        source="drawn by studies.data.networks.citation_like, a degree-corrected stochastic block "
        "model",
        licence="none needed: synthetic",
        deviations=("Synthetic: of the size and mixing of Cora, with no text behind it.",),
    )


def _splits(graph: Data, **about: object) -> Splits:
    description = Description(
        **dict(task="node classification", target="class of a paper"),
        **dict(num_node_types=None, num_edge_types=None, num_targets=int(graph.y.max()) + 1),
        **about,
    )
    nodes = (graph[f"{name}_mask"].nonzero().flatten() for name in SPLITS)
    return Splits(*(NodesOfGraph(graph, of_split) for of_split in nodes), description)


def citation_like(
    seed: int = 0,
    *,
    num_nodes: int = 2708,
    num_edges: int = 5278,
    num_classes: int = 7,
    num_words: int = 1433,
    homophily: float = 0.81,
) -> Data:
    """A synthetic network with Cora's size and mixing: a degree-corrected stochastic block model.

    Every node has an edge; the others are drawn with the nodes' propensities, which follow a power
    law. An edge, which counts once for its two directions, stays within a class with probability
    ``homophily``. Of the words of a node some are drawn from those of its class, the others from
    all; some words are common, most are rare. The split has the sizes of the public one.
    """
    generator = np.random.default_rng(seed)
    classes = generator.permutation(np.arange(num_nodes) % num_classes)
    edges = _draw_edges(generator, classes, num_edges, homophily)
    x = _draw_words(generator, classes, num_words)
    edge_index = to_undirected(torch.from_numpy(edges), num_nodes=num_nodes)
    data = Data(x=torch.from_numpy(x).float(), edge_index=edge_index, y=torch.from_numpy(classes))
    order = generator.permutation(num_nodes)
    train = np.concatenate([order[classes[order] == c][:PER_CLASS] for c in range(num_classes)])
    rest = order[~np.isin(order, train)]
    test = min(TEST, 2 * len(rest) // 3)
    val = min(VAL, len(rest) - test)
    for name, nodes in (("train", train), ("val", rest[:val]), ("test", rest[-test:])):
        mask = torch.zeros(num_nodes, dtype=torch.bool)
        mask[torch.from_numpy(nodes)] = True
        data[f"{name}_mask"] = mask
    return data


def _draw_edges(
    generator: np.random.Generator, classes: np.ndarray, number: int, homophily: float
) -> np.ndarray:
    """Distinct undirected edges without self-loops, [2, number], at least one for every node."""
    nodes = len(classes)
    propensity = generator.pareto(1.5, nodes) + 1
    propensity = np.minimum(propensity, np.quantile(propensity, 0.999))
    members = [np.flatnonzero(classes == c) for c in range(classes.max() + 1)]
    volume = np.array([propensity[m].sum() for m in members])

    def draw(among: np.ndarray, weights: np.ndarray) -> int:
        return int(generator.choice(among, p=weights / weights.sum()))

    def partner(node: int) -> int:
        own = classes[node]
        if generator.random() >= homophily:
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
