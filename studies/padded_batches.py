"""Graphs as flat tensors on a device, and batches of fixed shape for many networks at once.

A ``DataLoader`` collates Python objects, which takes longer than a training step on a GPU. Here
a data set lies on the device as a few tensors, and a batch is assembled there by indexing. Its
shape is the same for every batch: rows that no graph needs are padding, which belongs to a graph
of its own and is masked. This is what a CUDA graph needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch_geometric.data import Data

EPOCH_STRIDE = 1_000_003
"""Distance of the random seeds of successive epochs, as in ``studies.train``."""

ROW_MULTIPLE = 64
"""Rows per network are a multiple of this, so that long sums can be cut evenly."""

# Nodes over which padding edges are spread, since sums at a single one would take turns.
_PADDING_TARGETS = 16


@dataclass(frozen=True)
class FlatGraphs:
    """The graphs of a split, one below another.

    Attributes:
        x: node type ids, shape [nodes] or [nodes, columns].
        edge_index: ends of each edge, counted from the first node of its graph, shape
            [2, edges].
        edge_attr: edge type ids, shape [edges] or [edges, columns], or float features.
        y: targets, shape [graphs, targets], NaN where unlabeled.
        node_ptr, edge_ptr: first row of each graph, and the number of rows, shape [graphs + 1].
    """

    x: Shaped[Tensor, "nodes ..."]
    edge_index: Int[Tensor, "2 edges"]
    edge_attr: Shaped[Tensor, "edges ..."]
    y: Float[Tensor, "graphs targets"]
    node_ptr: Int[Tensor, " ptr"]
    edge_ptr: Int[Tensor, " ptr"]

    def __len__(self) -> int:
        """Number of graphs."""
        return len(self.y)

    @classmethod
    def of(cls, graphs: Sequence[Data]) -> "FlatGraphs":
        """Flatten PyG graphs.

        Raises:
            ValueError: if there is none.
        """
        if len(graphs) == 0:
            raise ValueError("expected at least one graph, got an empty split")
        nodes = torch.tensor([0, *(graph.num_nodes for graph in graphs)])
        edges = torch.tensor([0, *(graph.num_edges for graph in graphs)])
        return cls(
            x=torch.cat([graph.x for graph in graphs]),
            edge_index=torch.cat([graph.edge_index for graph in graphs], dim=1),
            edge_attr=torch.cat([graph.edge_attr for graph in graphs]),
            y=torch.cat([graph.y for graph in graphs]),
            node_ptr=nodes.cumsum(0),
            edge_ptr=edges.cumsum(0),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> "FlatGraphs":
        """The same on a device; targets and float features in another precision if given."""
        moved = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in self.tensors().items()
        }
        return replace(self, **moved)

    def node_counts(self) -> Int[Tensor, " graphs"]:
        """Nodes of each graph."""
        return self.node_ptr.diff()

    def edge_counts(self) -> Int[Tensor, " graphs"]:
        """Edges of each graph."""
        return self.edge_ptr.diff()


def save_splits(path: Path, splits: dict[str, FlatGraphs]) -> None:
    """Write the splits of a data set as one safetensors file, integers as short as they fit."""

    def short(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.contiguous()
        least, greatest = tensor.min(), tensor.max()
        for dtype in (torch.int8, torch.int16, torch.int32):
            if torch.iinfo(dtype).min <= least and greatest <= torch.iinfo(dtype).max:
                return tensor.to(dtype).contiguous()
        return tensor.contiguous()

    safetensors.torch.save_file(
        {
            f"{split}/{name}": short(tensor)
            for split, graphs in splits.items()
            for name, tensor in graphs.tensors().items()
        },
        path,
    )


def read_splits(path: Path) -> dict[str, FlatGraphs]:
    """Read what ``save_splits`` wrote."""
    splits: dict[str, dict[str, Tensor]] = {}
    for key, tensor in safetensors.torch.load_file(path).items():
        split, name = key.split("/")
        splits.setdefault(split, {})[name] = tensor if tensor.is_floating_point() else tensor.long()
    return {split: FlatGraphs(**tensors) for split, tensors in splits.items()}


def epoch_order(
    graphs: int, seed: int, epoch: int
) -> tuple[Int[Tensor, " graphs"], torch.Generator]:
    """The order in which ``studies.train.fit`` takes the training graphs in an epoch.

    Args:
        graphs: number of training graphs.
        seed: of the run.
        epoch: counted from 1.

    Returns:
        The order, and the generator in the state in which that run draws its first dropout.

    Source: torch's ``DataLoader`` and ``RandomSampler`` after
    ``torch.manual_seed(seed + 1_000_003 * epoch)``.
    """
    generator = torch.Generator().manual_seed(seed + EPOCH_STRIDE * epoch)
    torch.empty((), dtype=torch.int64).random_(generator=generator)  # the workers' seed
    own = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    return torch.randperm(graphs, generator=torch.Generator().manual_seed(own)), generator


def in_batches(order: Int[Tensor, " graphs"], batch_size: int) -> Int[Tensor, "steps size"]:
    """An order cut into batches; the last one is filled with -1."""
    steps = -(-len(order) // batch_size)
    padded = order.new_full((steps * batch_size,), -1)
    padded[: len(order)] = order
    return padded.view(steps, batch_size)


def batch_sums(
    counts: Int[Tensor, " graphs"], batches: Int[Tensor, "*batches size"]
) -> Int[Tensor, "*batches"]:
    """Rows of each batch of graphs, from the rows of each graph; -1 stands for no graph."""
    padded = torch.cat([counts, counts.new_zeros(1)])
    return padded[batches].sum(dim=-1)


@dataclass(frozen=True)
class Shape:
    """Rows per network of a padded batch: nodes, edges and graphs, padding included."""

    nodes: int
    edges: int
    graphs: int

    @classmethod
    def holding(cls, nodes: int, edges: int, graphs: int) -> "Shape":
        """The least shape that holds batches of at most so many real rows."""
        nodes = -(-(nodes + _PADDING_TARGETS) // ROW_MULTIPLE) * ROW_MULTIPLE
        edges = -(-max(edges, 1) // ROW_MULTIPLE) * ROW_MULTIPLE
        if edges == nodes:  # a module tells nodes from edges by the number of rows
            edges += ROW_MULTIPLE
        return cls(nodes, edges, graphs)

    def holds(self, nodes: int, edges: int) -> bool:
        """Whether a batch of so many real rows fits."""
        return nodes + _PADDING_TARGETS <= self.nodes and edges <= self.edges


@dataclass(frozen=True)
class PaddedBatch:
    """Batches of S networks one below another, padded to one shape.

    Attributes:
        x, edge_index, edge_attr: as a network takes them, S * nodes and S * edges rows.
        graph: graph of each node, shape [S * nodes]; every network has one graph more than its
            batch holds, the padding.
        edge_graph: graph of each edge, counted within its network, shape [S, edges].
        y: targets, shape [S, graphs, targets].
        graph_mask: real graphs, shape [S, graphs].
        node_mask, edge_mask: real rows, shape [S, nodes, 1] and [S, edges, 1].
    """

    x: Shaped[Tensor, "rows ..."]
    edge_index: Int[Tensor, "2 cols"]
    edge_attr: Shaped[Tensor, "cols ..."]
    graph: Int[Tensor, " rows"]
    edge_graph: Int[Tensor, "S edges"]
    y: Float[Tensor, "S graphs targets"]
    graph_mask: Bool[Tensor, "S graphs"]
    node_mask: Bool[Tensor, "S nodes 1"]
    edge_mask: Bool[Tensor, "S edges 1"]

    @property
    def num_graphs(self) -> int:
        """Graphs of all networks, with one of padding each."""
        return self.y.size(0) * (self.y.size(1) + 1)


def assemble(data: FlatGraphs, ids: Int[Tensor, "S graphs"], shape: Shape) -> PaddedBatch:
    """The batches of graphs that S networks take, from tensors on the device alone.

    Args:
        data: the split.
        ids: graphs of each network's batch, -1 for none, shape [S, graphs].
        shape: what the batches are padded to; nothing checks here that they fit.
    """
    networks, real = len(ids), ids >= 0
    ids = ids.clamp(min=0)
    network = torch.arange(networks, device=ids.device).unsqueeze(1)
    rows, graph, first_node, node_mask = _rows(data.node_ptr, ids, real, shape.nodes)
    edges, edge_graph, _, edge_mask = _rows(data.edge_ptr, ids, real, shape.edges)

    slot = torch.arange(shape.edges, device=ids.device)
    padding = shape.nodes - 1 - slot % _PADDING_TARGETS
    ends = data.edge_index[:, edges] + first_node.gather(1, edge_graph.clamp(max=len(ids[0]) - 1))
    ends = torch.where(edge_mask, ends, padding) + network * shape.nodes
    return PaddedBatch(
        x=_masked(data.x[rows], node_mask),
        edge_index=ends.flatten(1),
        edge_attr=_masked(data.edge_attr[edges], edge_mask),
        graph=(graph + network * (shape.graphs + 1)).flatten(),
        edge_graph=edge_graph,
        y=data.y[ids],
        graph_mask=real,
        node_mask=node_mask.unsqueeze(-1),
        edge_mask=edge_mask.unsqueeze(-1),
    )


def _rows(
    ptr: Tensor, ids: Tensor, real: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which row of the data set is in which slot, its graph, the graphs' first slots, a mask."""
    counts = torch.where(real, ptr[ids + 1] - ptr[ids], 0)  # [S, graphs]
    ends = counts.cumsum(dim=1)
    slots = torch.arange(size, device=ids.device).expand(len(ids), -1).contiguous()
    graph = torch.searchsorted(ends, slots, right=True)  # [S, size], graphs for padding
    mask = slots < ends[:, -1:]
    first = ends - counts
    inside = graph.clamp(max=ids.size(1) - 1)
    rows = ptr[ids].gather(1, inside) + slots - first.gather(1, inside)
    return torch.where(mask, rows, 0), graph, first, mask


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """Values [S, rows, ...] with zeros where masked, rows of all networks one below another."""
    mask = mask.view(*mask.shape, *([1] * (values.dim() - 2)))
    return torch.where(mask, values, 0).flatten(0, 1)
