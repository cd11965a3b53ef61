"""Batches of fixed shape for many networks at once, from graphs as flat tensors on a device.

A ``DataLoader`` collates Python objects, which takes longer than a training step on a GPU. Here
a data set lies on the device as a few tensors, and a batch is assembled there by indexing. Rows
that no graph needs are padding, which belongs to a graph of its own and is masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch_geometric.data import Data

_EPOCH_STRIDE = 1_000_003  # as in studies.train
_ROW_MULTIPLE = 64  # of rows per network, so that long sums can be cut evenly
_PADDING_TARGETS = 16  # nodes over which padding edges are spread: sums at one would take turns


@dataclass(frozen=True)
class FlatGraphs:
    """The graphs of a split, one below another; ends of edges count from the graph's first node.

    ``node_ptr`` and ``edge_ptr`` are the first row of each graph, and the number of rows.
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
        """Flatten PyG graphs."""
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

    def rows(self, batches: Int[Tensor, "*batches size"]) -> list[Int[Tensor, "*batches"]]:
        """Nodes and edges of each batch of graphs; -1 stands for no graph."""
        counts = (ptr.cpu().diff() for ptr in (self.node_ptr, self.edge_ptr))
        return [torch.cat([count, count.new_zeros(1)])[batches].sum(dim=-1) for count in counts]


def epoch_order(
    graphs: int, seed: int, epoch: int
) -> tuple[Int[Tensor, " graphs"], torch.Generator]:
    """The order in which ``train.fit`` takes graphs in an epoch, and its generator for dropout.

    Source: torch's ``DataLoader`` and ``RandomSampler`` after ``torch.manual_seed``.
    """
    generator = torch.Generator().manual_seed(seed + _EPOCH_STRIDE * epoch)
    torch.empty((), dtype=torch.int64).random_(generator=generator)  # the workers' seed
    own = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    return torch.randperm(graphs, generator=torch.Generator().manual_seed(own)), generator


def in_batches(order: Int[Tensor, " graphs"], batch_size: int) -> Int[Tensor, "steps size"]:
    """An order cut into batches; the last one is filled with -1."""
    steps = -(-len(order) // batch_size)
    padded = order.new_full((steps * batch_size,), -1)
    padded[: len(order)] = order
    return padded.view(steps, batch_size)


@dataclass(frozen=True)
class Shape:
    """Rows per network of a padded batch: nodes, edges and graphs, padding included."""

    nodes: int
    edges: int
    graphs: int

    @classmethod
    def holding(cls, nodes: int, edges: int, graphs: int) -> "Shape":
        """The least shape that holds batches of at most so many real rows."""
        nodes = -(-(nodes + _PADDING_TARGETS) // _ROW_MULTIPLE) * _ROW_MULTIPLE
        edges = -(-max(edges, 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE
        if edges == nodes:  # a module tells nodes from edges by the number of rows
            edges += _ROW_MULTIPLE
        return cls(nodes, edges, graphs)


@dataclass(frozen=True)
class PaddedBatch:
    """Batches of S networks one below another, padded to one shape.

    Every network has one graph more than its batch holds, the padding. ``edge_graph`` is the graph
    of each edge, counted within its network; masks are of what is real.
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
    """The batches of graphs with these ids, -1 for none, from tensors on the device alone."""
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
