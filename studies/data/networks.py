"""Citation networks: Cora, CiteSeer and PubMed as Planetoid has them, and a synthetic stand-in.

A paper is a node, a citation an edge in both directions, features say which words it has. A few
papers have a known class; the others' are predicted. A split is the nodes that count, on the
whole graph, which every forward pass sees.
"""

import pickletools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import platformdirs
import torch
from jaxtyping import Int
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.datasets import Planetoid
from torch_geometric.io import read_planetoid_data
from torch_geometric.utils import to_undirected

from studies.data.description import Description, Splits
from studies.data.raw_files import check, fetch, root_with
from studies.files import write_atomically

PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
"""Endings of the raw files of a network, ``ind.NAME.PART``."""

PER_CLASS, VAL, TEST = 20, 500, 1000
"""Sizes of Planetoid's public split, training nodes of each class and of the other splits."""

_SHA256 = {
    "cora": {
        "x": "23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab",
        "tx": "b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a",
        "allx": "9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543",
        "y": "94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1",
        "ty": "41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad",
        "ally": "2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71",
        "graph": "58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d",
        "test.index": "297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875",
    },
    "citeseer": {
        "x": "d20de19150741e555de0ed037195630fc194114ebc7fd72ced62810148aa22f6",
        "tx": "539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21",
        "allx": "2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668",
        "y": "8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924",
        "ty": "55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce",
        "ally": "f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95",
        "graph": "d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7",
        "test.index": "2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4",
    },
    "pubmed": {
        "x": "fbe9cb5c47200d1b7769a26e579be3b7130b556831f9d850e77c4c74f2599b33",
        "tx": "4eb5f5d0f30f26497eb0ac6ac9719d09c67e284f1ed0385c93f3ef27a671da3d",
        "y": "e6c807633307a07ed659249006536a147c7999c797f11a2560752990181b41b3",
        "ty": "ee2e0d4819d9fbcc403689c3bf2e49face401b605932f093bc58ab6461130fdd",
        "ally": "0c37bbe3b5014ec365e9d393cf4791925e5ed94fb194305d74f064a8d7b50f0e",
        "graph": "5b89f0036ca22909471f1e6558eb42fa06e0c730a577bde5b058b40638f81dc9",
        "test.index": "b101d421688bbaecbd82e8a18f1e282378d6830f3a37666f28ebc47f844341b5",
    },
}
_MISSING_ALLX = "349f59d8356c405a4d3fa0e5a4debd39ed4bafd9f9c9d8c6f2e32b730b380717"

_TITLES = {"cora": "Cora", "citeseer": "CiteSeer", "pubmed": "PubMed"}
_OWN = "studies.data.networks.read_planetoid(folder, name)"
_NAMING = ("GLOBAL", "INST")
"""Operations of a pickle that name what is to be called."""

_HARMLESS = {
    "collections defaultdict",
    "__builtin__ list",
    "builtins list",
    "copy_reg _reconstructor",
    "numpy dtype",
    "numpy ndarray",
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray _reconstruct",
    "scipy.sparse.csr csr_matrix",
    "scipy.sparse._csr csr_matrix",
    "_codecs encode",
}


@dataclass(frozen=True, eq=False)
class NodesOfGraph:
    """Some nodes of one graph, of which a forward pass needs all; a ``NodeSplit``.

    Attributes:
        graph: the whole graph.
        nodes: ids of those that count, shape [n].
    """

    graph: Data
    nodes: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.nodes)

    def loader(self, batch_size: int, shuffle: bool) -> Iterator[Data]:
        """The whole graph for each batch of nodes, these first and the others behind them."""
        nodes = self.nodes[torch.randperm(len(self))] if shuffle else self.nodes
        for seeds in nodes.split(batch_size):
            is_seed = torch.zeros(self.graph.num_nodes, dtype=torch.bool)
            is_seed[seeds] = True
            order = torch.cat([seeds, (~is_seed).nonzero().flatten()])
            place = order.argsort()
            batch = Data(x=self.graph.x[order], edge_index=place[self.graph.edge_index])
            batch.y = self.graph.y[seeds]
            batch.batch_size = len(seeds)
            yield batch


def planetoid_folder(name: str) -> str:
    """Folder of the raw files of a network under a data root, as PyG's class has it."""
    if name == "pubmed-missing":
        return "Planetoid-missing100/PubMed/raw"
    return f"Planetoid/{_TITLES[name]}/raw"


def load_planetoid(name: str, roots: Sequence[Path], *, download: bool) -> Splits | None:
    """A citation network from the first root that has it, or None if it cannot be had.

    The files are pickles: each is checked before it is read. The checksum of one, the features of
    ``"pubmed"`` without labels, is not known to us; it is read only if nothing but arrays is in it.

    Args:
        name: ``"cora"``, ``"citeseer"``, ``"pubmed"``, or ``"pubmed-missing"``, where all nodes
            outside the training set have features of zero.
        roots: folders that may hold ``Planetoid``.
        download: whether to fetch it to the user's cache folder if none does.

    Raises:
        ValueError: if a file is not the published one.
    """
    plain = name.removesuffix("-missing")
    files = [f"{planetoid_folder(name)}/ind.{plain}.{part}" for part in PARTS]
    root = root_with(roots, files)
    if root is None and download and name == plain:
        root = _fetch(plain, files)
    if root is None:
        return None
    for part, file in zip(PARTS, files, strict=True):
        _check_part(name, part, (root / file).read_bytes(), str(root / file))
    graph = read_planetoid(root / planetoid_folder(name), plain)
    is_missing = name != plain
    if is_missing:  # the file has the features of the test nodes
        graph.x[~graph.train_mask] = 0
    deviations = ("Every feature outside the 60 training nodes is zero.",) if is_missing else ()
    title = f"{_TITLES[plain]}, features missing" if is_missing else _TITLES[plain]
    return _splits(
        graph,
        name=name,
        title=title,
        source="Planetoid (Yang, Cohen and Salakhutdinov, 2016), through PyG",
        licence="not stated; published for research",
        deviations=deviations,
    )


def read_planetoid(folder: Path | str, name: str) -> Data:
    """The graph of raw files in Planetoid's format; PyG's reader, which writes nothing.

    The files are pickles: read none that you do not trust.

    Args:
        folder: holds ``ind.NAME.x`` and the other ``PARTS``.
        name: in the names of the files.

    Returns:
        Features ``x`` [N, words], ``edge_index`` [2, E] in both directions without self-loops,
        classes ``y`` [N], and the masks of the public split.

    Raises:
        FileNotFoundError: if a file is missing.
    """
    for part in PARTS:
        if not (Path(folder) / f"ind.{name}.{part}").is_file():
            raise FileNotFoundError(
                f"{folder}: expected the raw files of a Planetoid network, no ind.{name}.{part}"
            )
    return read_planetoid_data(str(folder), name)


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

    Args:
        seed: of the draw.
        num_nodes, num_edges: sizes; an edge counts once for its two directions.
        num_classes: equally likely.
        num_words: binary features.
        homophily: in [0, 1].
        words_per_node: their mean.
        topical: in [0, 1].

    Returns:
        As ``read_planetoid``, with a split of the public one's sizes, drawn with the seed.

    Raises:
        ValueError: if a size or a probability is impossible.
    """
    for name, value in (("homophily", homophily), ("topical", topical)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")
    if num_edges < num_nodes or num_edges > num_nodes**2 / 8:
        raise ValueError(
            f"num_edges: expected from {num_nodes} (every node has one) to {num_nodes**2 // 8} (a "
            f"sparse graph) for {num_nodes} nodes, got {num_edges}"
        )
    least = 2 * num_classes * (PER_CLASS + 1)
    if num_classes < 2 or num_nodes < max(least, PER_CLASS * num_classes + 2):
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


def load_citation_like(roots: Sequence[Path], *, download: bool, seed: int = 0) -> Splits:
    """The synthetic network of ``citation_like``; nothing is read."""
    return _splits(
        citation_like(seed),
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


def _check_part(name: str, part: str, content: bytes, source: str) -> None:
    known = dict(_SHA256[name.removesuffix("-missing")])
    if name == "pubmed-missing":
        known["allx"] = _MISSING_ALLX
    if part in known:
        check(content, known[part], source, _OWN)
        return
    operations = list(pickletools.genops(content))
    used = {argument for operation, argument, _ in operations if operation.name in _NAMING}
    is_stacked = any(operation.name == "STACK_GLOBAL" for operation, _, _ in operations)
    if is_stacked or used - _HARMLESS:
        raise ValueError(
            f"{source}: expected a pickle of arrays alone, found "
            f"{', '.join(sorted(used - _HARMLESS)) or 'names that are put together'}; its checksum "
            "is not known, so it is not read"
        )


def _fetch(name: str, files: Sequence[str]) -> Path | None:
    """Downloads the raw files to the user's cache folder; the root, or None without a network."""
    contents = {}
    for part, file in zip(PARTS, files, strict=True):
        url = f"{Planetoid.url}/ind.{name}.{part}"
        content = fetch(url)
        if content is None:
            return None
        _check_part(name, part, content, url)
        contents[file] = content
    root = platformdirs.user_cache_path("mapkg")
    for file, content in contents.items():
        write_atomically(root / file, content)
    print(f"put the raw files of {_TITLES[name]} into {root}", file=sys.stderr)
    return root


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


NETWORKS = {
    **{
        name: partial(load_planetoid, name)
        for name in ("cora", "citeseer", "pubmed", "pubmed-missing")
    },
    "citation": load_citation_like,
}
"""How each is loaded, by the name that ``load`` knows."""
