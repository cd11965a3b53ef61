"""Citation networks: Cora, CiteSeer and PubMed as Planetoid has them, and a synthetic stand-in.

A paper is a node, a citation an edge in both directions, features say which words it has. A few
papers have a known class; the others' are predicted. A split is the nodes that count, on the
whole graph, which every forward pass sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.datasets import Planetoid
from torch_geometric.io import read_planetoid_data
from torch_geometric.utils import to_undirected

from studies.data.description import Description, Splits
from studies.data.raw_files import read_url, root_with

PER_CLASS, VAL, TEST = 20, 500, 1000
"""Sizes of Planetoid's public split, training nodes of each class and of the other splits."""

_PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
_TITLES = {"cora": "Cora", "citeseer": "CiteSeer", "pubmed": "PubMed"}


@dataclass(frozen=True, eq=False)
class NodesOfGraph:
    """Some nodes of one graph, of which a forward pass needs all.

    Attributes:
        graph: the whole graph.
        nodes: ids of those that count, shape [n].
    """

    graph: Data
    nodes: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.nodes)


def planetoid_folder(name: str) -> str:
    """Folder of the raw files of a network under a data root, as PyG's class has it."""
    if name == "pubmed-missing":
        return "Planetoid-missing100/PubMed/raw"
    return f"Planetoid/{_TITLES[name]}/raw"


def load_planetoid(name: str, roots: Sequence[Path], *, download: bool) -> Splits | None:
    """A citation network from the first root that has it, or None if it cannot be had.

    The files are pickles: the checksum of each is checked before it is read. In
    ``"pubmed-missing"`` all nodes outside the training set have features of zero; it cannot be
    downloaded.
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
    deviations = ("Every feature outside the 60 training nodes is zero.",) if is_missing else ()
    return _splits(
        graph,
        name=name,
        title=f"{_TITLES[plain]}, features missing" if is_missing else _TITLES[plain],
        source="Planetoid (Yang, Cohen and Salakhutdinov, 2016), through PyG",
        licence="not stated; published for research",
        deviations=deviations,
    )


def citation_like(
    seed: int = 0,
    *,
    num_nodes: int = 2708,
    num_edges: int = 5278,
    num_classes: int = 7,
    num_words: int = 1433,
    homophily: float = 0.81,
    words_per_node: float = 18.0,
    topical: float = 0.12,
) -> Data:
    """A synthetic network with Cora's size and mixing: a degree-corrected stochastic block model.

    Every node has an edge; the others are drawn with the nodes' propensities, which follow a power
    law. An edge stays within a class with probability ``homophily``. Of the words of a node a share
    ``topical`` is drawn from those of its class, the others from all; some words are common, most
    are rare.

    The split has the sizes of the public one. An edge counts once for its two directions.
    """
    for name, value in (("homophily", homophily), ("topical", topical)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")
    if not num_nodes <= num_edges <= num_nodes**2 / 8:
        raise ValueError(
            f"num_edges: expected from {num_nodes} (every node has one) to {num_nodes**2 // 8} (a "
            f"sparse graph) for {num_nodes} nodes, got {num_edges}"
        )
    least = 2 * num_classes * (PER_CLASS + 1)
    if num_classes < 2 or num_nodes < least:
        raise ValueError(
            f"expected two classes or more and at least {least} nodes for {num_classes} of them, "
            f"got {num_nodes}"
        )
    generator = np.random.default_rng(seed)
    classes = generator.permutation(np.arange(num_nodes) % num_classes)
    edges = _draw_edges(generator, classes, num_edges, homophily)
    x = _draw_words(generator, classes, num_words, words_per_node, topical)
    edge_index = to_undirected(torch.from_numpy(edges), num_nodes=num_nodes)
    y = torch.from_numpy(classes)
    data = Data(x=torch.from_numpy(x).float(), edge_index=edge_index, y=y)
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


def load_citation_like(roots: Sequence[Path], *, download: bool) -> Splits:
    """The synthetic network of ``citation_like``; nothing is read."""
    return _splits(
        citation_like(),
        name="citation",
        title="synthetic citation graph",
        source="drawn by studies.data.networks.citation_like, a degree-corrected stochastic block "
        "model",
        licence="none needed: synthetic",
        deviations=("Synthetic: of the size and mixing of Cora, with no text behind it.",),
    )


def _splits(graph: Data, **about: object) -> Splits:
    masks = {name: graph[f"{name}_mask"] for name in ("train", "val", "test")}
    return Splits(
        **{name: NodesOfGraph(graph, mask.nonzero().flatten()) for name, mask in masks.items()},
        description=Description(
            task="node classification",
            target="class of a paper",
            num_node_types=None,
            num_edge_types=None,
            num_targets=int(graph.y.max()) + 1,
            **about,
        ),
    )


def _draw_edges(
    generator: np.random.Generator, classes: np.ndarray, number: int, homophily: float
) -> np.ndarray:
    """Distinct undirected edges without self-loops, [2, number], at least one for every node."""
    nodes = len(classes)
    propensity = generator.pareto(1.5, nodes) + 1
    propensity = np.minimum(propensity, np.quantile(propensity, 0.999))
    members = [np.flatnonzero(classes == c) for c in range(classes.max() + 1)]
    shares = [propensity[m] / propensity[m].sum() for m in members]
    volume = np.array([propensity[m].sum() for m in members])

    def partner(node: int) -> int:
        own = classes[node]
        if generator.random() >= homophily:
            weights = np.delete(volume, own)
            others = np.delete(np.arange(len(members)), own)
            own = generator.choice(others, p=weights / weights.sum())
        return int(generator.choice(members[own], p=shares[own]))

    edges: set[tuple[int, int]] = set()
    linked = np.zeros(nodes, dtype=bool)
    lonely = iter(generator.permutation(nodes).tolist())
    of_all = propensity / propensity.sum()
    node = next(lonely, None)
    while len(edges) < number:
        while node is not None and linked[node]:  # those without an edge come first
            node = next(lonely, None)
        one = int(generator.choice(nodes, p=of_all)) if node is None else node
        other = partner(one)
        if one != other:
            edges.add((min(one, other), max(one, other)))
            linked[[one, other]] = True
    return np.array(sorted(edges)).T


def _draw_words(
    generator: np.random.Generator,
    classes: np.ndarray,
    words: int,
    per_node: float,
    topical: float,
) -> np.ndarray:
    """Which words a node has, [nodes, words]."""
    common = 1 / np.arange(1, words + 1) ** 0.8  # few are common, most are rare
    common = generator.permutation(common / common.sum())
    topics = []
    for _ in range(classes.max() + 1):
        chosen = generator.choice(words, size=max(1, words // 20), replace=False)
        topic = np.zeros(words)
        topic[chosen] = generator.dirichlet(np.ones(len(chosen)))
        topics.append(topic)
    x = np.zeros((len(classes), words), dtype=bool)
    counts = np.maximum(1, generator.poisson(per_node, len(classes)))
    for node, (own, count) in enumerate(zip(classes, counts, strict=True)):
        from_topic = generator.binomial(count, topical)
        x[node, generator.choice(words, from_topic, p=topics[own])] = True
        x[node, generator.choice(words, count - from_topic, p=common)] = True
    return x
