"""Sampled neighbourhoods: a part of one large graph around some seed nodes, layer by layer.

PyG's ``NeighborLoader`` would do, but it needs pyg-lib, which is not on PyPI, or torch-sparse,
which is there as C++ source only and which PyG announces to drop. What is needed of it is
short: incoming edges in compressed rows, and subsets drawn by Floyd's algorithm.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch_geometric.data import Data

ALL = -1
"""The fan-out that takes every incoming edge."""

EVALUATION_SEED = 0
"""Seed of the neighbourhoods that are drawn without shuffling."""


@dataclass(frozen=True, eq=False)
class InEdges:
    """The incoming edges of every node, grouped by target.

    Attributes:
        indptr: those of node i lie from ``indptr[i]`` to ``indptr[i + 1]``, [N + 1], int64.
        sources: source node of each, [M].
        edge_ids: row of each in the table of edge features, [M].
    """

    indptr: Int[Tensor, " offsets"]
    sources: Int[Tensor, " M"]
    edge_ids: Int[Tensor, " M"]

    @classmethod
    def of_undirected(cls, edges: Int[Tensor, "E 2"], num_nodes: int) -> "InEdges":
        """Both directions of every undirected edge; they share its row of features.

        Args:
            edges: the two ends of each, in [0, num_nodes); int32 saves memory.
            num_nodes: N.
        """
        # Directed edge 2e is edge e as it stands, 2e + 1 its inverse.
        sources, targets = edges.flatten(), edges.flip(1).flatten()
        order = targets.argsort(stable=True)
        indptr = torch.zeros(num_nodes + 1, dtype=torch.long)
        torch.cumsum(torch.bincount(targets, minlength=num_nodes), 0, out=indptr[1:])
        return cls(indptr, sources[order], (order // 2).to(edges.dtype))

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.indptr) - 1

    def draw(
        self, nodes: Int[Tensor, " n"], fan_out: int, generator: Generator | None = None
    ) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
        """Draw incoming edges of some nodes, uniformly and without replacement.

        Args:
            nodes: their targets.
            fan_out: how many for each; a node with fewer gives all it has. ``ALL`` for all.
            generator: source of randomness; torch's global one if None.

        Returns:
            For each drawn edge, the position of its target in ``nodes`` and its own position
            in ``sources`` and ``edge_ids``, ordered by target.
        """
        start = self.indptr[nodes]
        degree = self.indptr[nodes + 1] - start
        count = degree if fan_out == ALL else degree.clamp(max=fan_out)
        target = torch.arange(len(nodes)).repeat_interleave(count)
        rank = torch.arange(len(target)) - (count.cumsum(0) - count)[target]
        if fan_out != ALL:
            crowded = degree > fan_out
            rank[crowded[target]] = subsets(degree[crowded], fan_out, generator).flatten()
        return target, start[target] + rank


def subsets(
    sizes: Int[Tensor, " n"], k: int, generator: Generator | None = None
) -> Int[Tensor, "n k"]:
    """For each size s, k distinct numbers below s; every subset is equally likely.

    Needs k steps and k² / 2 comparisons a row, whatever the sizes.

    Args:
        sizes: s, each at least k.
        k: how many.
        generator: source of randomness; torch's global one if None.

    Source: Bentley and Floyd, A sample of brilliance, Commun. ACM 30 (1987); one row for each
    set, the sets side by side.
    """
    chosen = torch.empty(k, len(sizes), dtype=torch.long)
    uniform = torch.rand(k, len(sizes), dtype=torch.double, generator=generator)
    for i in range(k):
        last = sizes - k + i
        candidate = (uniform[i] * (last + 1)).long()
        is_taken = (chosen[:i] == candidate).any(0)
        chosen[i] = torch.where(is_taken, last, candidate)
    return chosen.t()


def check_fan_outs(fan_outs: Sequence[int], num_layers: int) -> None:
    """Refuse fan-outs that do not fit a network.

    Raises:
        ValueError: if there is not one for each layer, or one is not positive or ``ALL``.
    """
    if len(fan_outs) != num_layers:
        raise ValueError(
            f"expected one fan-out for each of the {num_layers} layers, got {len(fan_outs)}: "
            f"{tuple(fan_outs)}. With more the last hop is never used, with fewer the outermost "
            "nodes get messages that no edge was drawn for"
        )
    wrong = [fan_out for fan_out in fan_outs if fan_out < 1 and fan_out != ALL]
    if wrong:
        raise ValueError(f"a fan-out must be positive, or {ALL} for all edges; got {wrong[0]}")


def sample(
    edges: InEdges,
    seeds: Int[Tensor, " S"],
    fan_outs: Sequence[int],
    generator: Generator | None = None,
) -> tuple[Int[Tensor, " n"], Int[Tensor, "2 m"], Int[Tensor, " m"]]:
    """Draw the neighbourhood of seed nodes, hop by hop.

    Each hop draws incoming edges of the nodes that the hop before reached first, so every node
    is expanded once, and no edge is drawn twice. If all edges are taken, a message-passing
    network with a layer for each fan-out gives the seeds what it gives them on the whole
    graph: edges are missing only where their messages cannot arrive in time.

    Args:
        edges: of the large graph.
        seeds: distinct nodes.
        fan_outs: one for each layer of the network, in the order of the layers. The last is
            that of the seeds, which the last layer computes; the first that of the outermost.
        generator: source of randomness; torch's global one if None.

    Returns:
        The nodes' ids in the large graph [n], the seeds first; the drawn edges between them
        [2, m], as positions in these ids; and their rows of edge features [m].

    Raises:
        ValueError: if a seed occurs twice.

    Source: Hamilton et al., arXiv 1706.02216, algorithm 2. differs: all layers use the one
    drawn graph, as in PyG's NeighborLoader, instead of a drawing for each layer.
    """
    position = torch.full((edges.num_nodes,), -1)  # in the sample; -1 outside
    position[seeds] = torch.arange(len(seeds))
    if not torch.equal(position[seeds], torch.arange(len(seeds))):
        raise ValueError("expected distinct seeds, but one of them occurs twice")
    nodes, edge_index, edge_ids = [seeds], [], []
    num_nodes, frontier = len(seeds), seeds
    for fan_out in reversed(fan_outs):
        target, drawn = edges.draw(frontier, fan_out, generator)
        source = edges.sources[drawn].long()
        reached = source[position[source] < 0].unique()
        position[reached] = torch.arange(num_nodes, num_nodes + len(reached))
        edge_index.append(torch.stack([position[source], position[frontier[target]]]))
        edge_ids.append(edges.edge_ids[drawn])
        nodes.append(reached)
        num_nodes, frontier = num_nodes + len(reached), reached
    return torch.cat(nodes), torch.cat(edge_index, dim=1), torch.cat(edge_ids).long()


@dataclass(frozen=True, eq=False)
class SeedNodes:
    """A split of a node-level data set: seed nodes of one large graph.

    Attributes:
        seeds: the nodes to be scored, [S]; a slice ``split[:100]`` has fewer of them.
        edges: of the large graph.
        x: node type ids, [N].
        edge_attr: features of the edges, [E, C].
        y: targets of all nodes, [N, T], NaN where unlabelled.
        fan_outs: as for ``sample``.
    """

    seeds: Int[Tensor, " S"]
    edges: InEdges
    x: Int[Tensor, " N"]
    edge_attr: Float[Tensor, "E C"]
    y: Float[Tensor, "N T"]
    fan_outs: tuple[int, ...]

    def __post_init__(self) -> None:
        check_fan_outs(self.fan_outs, len(self.fan_outs))

    def __len__(self) -> int:
        """Number of seeds."""
        return len(self.seeds)

    def __getitem__(self, chosen: slice | int) -> "SeedNodes":
        """The split with fewer seeds; the graph around them stays whole."""
        if not isinstance(chosen, slice):
            raise TypeError(
                f"seed nodes have no items of their own: expected a slice like split[:100], got "
                f"{chosen!r}. Graphs come from split.loader(batch_size, shuffle)"
            )
        return replace(self, seeds=self.seeds[chosen])

    def loader(self, batch_size: int, shuffle: bool) -> "NeighbourLoader":
        """The seeds in batches, each with its sampled neighbourhood.

        Args:
            batch_size: number of seeds in a batch; the last may have fewer.
            shuffle: whether each pass draws a new order and new neighbourhoods, from torch's
                global random state; if not, every pass gives the same batches and leaves that
                state alone.

        Raises:
            ValueError: if the batch size is not positive.
        """
        return NeighbourLoader(self, batch_size, shuffle)


class NeighbourLoader:
    """Batches of seed nodes with their neighbourhoods, as ``SeedNodes.loader`` gives them.

    A batch is a ``Data`` of n nodes and m edges with ``x`` [n], ``edge_index`` [2, m],
    ``edge_attr`` [m, C], ``edge_type`` [m] (index of the edge's largest feature, the first of
    equals), ``n_id`` [n] (ids in the large graph) and ``batch_size``, the number of seeds,
    which come first. ``y`` [batch_size, T] holds the seeds' targets only, so that no other
    node can be scored.
    """

    def __init__(self, split: SeedNodes, batch_size: int, shuffle: bool) -> None:
        if batch_size < 1:
            raise ValueError(f"the batch size must be positive, got {batch_size}")
        self.split, self.batch_size, self.shuffle = split, batch_size, shuffle

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[Data]:
        seeds, random_seed = self.split.seeds, EVALUATION_SEED
        if self.shuffle:
            seeds = seeds[torch.randperm(len(seeds))]
            random_seed = int(torch.randint(2**62, ()))
        # A generator of its own: dropout between two batches must not change the second.
        generator = torch.Generator().manual_seed(random_seed)
        for first in range(0, len(seeds), self.batch_size):
            yield self._batch(seeds[first : first + self.batch_size], generator)

    def _batch(self, seeds: Int[Tensor, " S"], generator: Generator) -> Data:
        split = self.split
        n_id, edge_index, edge_ids = sample(split.edges, seeds, split.fan_outs, generator)
        edge_attr = split.edge_attr[edge_ids]
        return Data(
            x=split.x[n_id],
            edge_index=edge_index,
            edge_attr=edge_attr,
            edge_type=edge_attr.argmax(dim=1),
            y=split.y[seeds],
            n_id=n_id,
            batch_size=len(seeds),
        )
