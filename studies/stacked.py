"""Many networks of one configuration as one network over the disjoint union of their batches.

Rows 0 to R - 1 of every tensor belong to the first of S networks, the next R rows to the second,
and so on. Only modules that own weights, or that mix rows, are exchanged for a form that knows S
weights; all others run as they are, and hooks see them. Rows that no graph needs are padding, which
belongs to a graph of its own and is masked. ``studies.steps`` has what cannot be stacked so.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch_geometric.data import Data
from torch_geometric.data.collate import collate
from torch_geometric.nn.aggr import SumAggregation

from mapkg.models.edge_attention import (
    EdgeAttention,
    GraphTransformerLayer,
    NodeStreamLayer,
    ResidualBlock,
)
from mapkg.models.egat import EdgeGATAttention, EdgeGATLayer
from mapkg.models.network import GraphNetwork, TypeEmbedding
from studies.published import EPOCH_STRIDE

TERMS = ("key_term", "edge_term", "value_term")
"""Parameters of ``EdgeAttention`` itself, the Explicit Bias Term of each head."""

_ROW_BY_ROW = (
    *(GraphNetwork, NodeStreamLayer, GraphTransformerLayer, EdgeGATLayer, ResidualBlock),
    *(EdgeAttention, EdgeGATAttention, SumAggregation),
    *(nn.ModuleList, nn.Sequential, nn.Identity, nn.ReLU),
)
"""Modules that own no weight but ``TERMS`` and treat every row, or every graph, by itself."""

_ROW_MULTIPLE = 64  # of rows per network, for matrix products of even sizes
_PADDING_TARGETS = 16  # nodes over which padding edges are spread: sums at one would take turns


@dataclass(frozen=True)
class FlatGraphs:
    """The graphs of a split, one below another; ends of edges count from the graph's first node."""

    x: Shaped[Tensor, "nodes ..."]
    edge_index: Int[Tensor, "2 edges"]
    edge_attr: Shaped[Tensor, "edges ..."]
    y: Float[Tensor, "_ targets"]  # of each graph, or of each node
    node_ptr: Int[Tensor, " ptr"]  # first row of each graph, and the number of rows
    edge_ptr: Int[Tensor, " ptr"]

    def __len__(self) -> int:
        return len(self.node_ptr) - 1

    @classmethod
    def of(cls, graphs: Sequence[Data]) -> "FlatGraphs":
        """Flatten PyG graphs."""
        data, ptr, _ = collate(Data, list(graphs), increment=False, add_batch=False)
        if missing := [name for name in ("x", "edge_attr", "y") if data.get(name) is None]:
            raise ValueError(
                f"{', '.join(missing)}: expected in every graph where several networks are trained "
                "at once, got none; without types of nodes or edges give all the id 0"
            )
        if data.edge_index.numel() == 0:  # one of no graph, for padding to stand on
            data.edge_index = data.edge_index.new_zeros(2, 1)
            data.edge_attr = data.edge_attr.new_zeros(1, *data.edge_attr.shape[1:])
        tensors = data.x, data.edge_index, data.edge_attr, data.y
        return cls(*tensors, node_ptr=ptr["x"], edge_ptr=ptr["edge_index"])

    def to(self, device: torch.device, dtype: torch.dtype) -> "FlatGraphs":
        """The same on a device; targets and float features in another precision."""
        items = vars(self).items()
        return FlatGraphs(
            **{n: t.to(device, dtype if t.is_floating_point() else None) for n, t in items}
        )

    def rows(self, batches: Int[Tensor, "*batches size"]) -> list[Int[Tensor, "*batches"]]:
        """Nodes and edges of each batch of graphs; -1 stands for no graph."""
        counts = (ptr.cpu().diff() for ptr in (self.node_ptr, self.edge_ptr))
        return [torch.cat([count, count.new_zeros(1)])[batches].sum(dim=-1) for count in counts]


def in_batches(order: Int[Tensor, " graphs"], batch_size: int) -> Int[Tensor, "steps size"]:
    """An order cut into batches; the last one is filled with -1."""
    missing = -len(order) % batch_size
    return nn.functional.pad(order, (0, missing), value=-1).view(-1, batch_size)


def epoch_batches(
    graphs: int, seeds: Iterable[int], epoch: int, batch_size: int
) -> tuple[Int[Tensor, "S steps size"], list[torch.Generator]]:
    """The batches that ``train.fit`` draws in an epoch for each seed, and generators for dropout.

    Source: torch's ``DataLoader`` and ``RandomSampler`` after ``torch.manual_seed``.
    """
    batches, generators = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed + EPOCH_STRIDE * epoch)
        torch.empty((), dtype=torch.int64).random_(generator=generator)  # the workers' seed
        own = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
        order = torch.randperm(graphs, generator=torch.Generator().manual_seed(own))
        batches.append(in_batches(order, batch_size))
        generators.append(generator)
    return torch.stack(batches), generators


def padded(nodes: int, edges: int) -> tuple[int, int]:
    """Rows per network, of nodes and of edges, that hold batches of at most so many real ones."""
    nodes = -(-(nodes + _PADDING_TARGETS) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    edges = -(-max(edges, 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    # A module tells nodes from edges by the number of rows.
    return nodes, edges + _ROW_MULTIPLE * (edges == nodes)


def assemble(
    data: FlatGraphs, ids: Int[Tensor, "S graphs"], nodes: int, edges: int, of_nodes: bool = False
) -> Data:
    """The batches of graphs with these ids, -1 for none, one network below another.

    Each network has one more graph, the padding; ``edge_graph`` [S, edges] counts within a network.
    Targets ``y`` [S, rows, targets] are those of graphs, or ``of_nodes``.
    """
    real = ids >= 0
    ids = ids.clamp(min=0)
    (networks, graphs), device = ids.shape, ids.device
    network = torch.arange(networks, device=device).unsqueeze(1)
    rows, graph, first_node, node_mask = _rows(data.node_ptr, ids, real, nodes)
    columns, edge_graph, _, edge_mask = _rows(data.edge_ptr, ids, real, edges)
    padding = nodes - 1 - torch.arange(edges, device=device) % _PADDING_TARGETS
    ends = data.edge_index[:, columns] + first_node.gather(1, edge_graph.clamp(max=graphs - 1))
    ends = torch.where(edge_mask, ends, padding) + network * nodes
    return Data(
        x=_masked(data.x[rows], node_mask),
        edge_index=ends.flatten(1),
        edge_attr=_masked(data.edge_attr[columns], edge_mask),
        batch=(graph + network * (graphs + 1)).flatten(),
        batch_size=networks * (graphs + 1),
        edge_graph=edge_graph,
        y=data.y[rows if of_nodes else ids],
        has_target=node_mask if of_nodes else real,
        of_nodes=of_nodes,
        graph_mask=real,
        node_mask=node_mask.unsqueeze(-1),
        edge_mask=edge_mask.unsqueeze(-1),
    )


def _rows(ptr: Tensor, ids: Tensor, real: Tensor, size: int) -> tuple[Tensor, ...]:
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


@dataclass
class Layout:
    """How the rows of S networks lie; one object shared by all modules of a stacked network."""

    networks: int
    masks: Sequence[Float[Tensor, "S _ 1"]] = ()  # of real nodes and of real edges
    generators: Sequence[torch.Generator] | None = None  # of dropout; without, torch's for all
    turn: Sequence[int] = ()  # the networks whose rows there are, where not all are passed at once
    graphs: Bool[Tensor, "_ graphs"] | None = None  # which of their graphs are real
    of_nodes: bool = False  # what is predicted is that of nodes, not of graphs

    def mask(self, rows: int) -> Float[Tensor, "S R 1"]:
        """The mask of the kind of rows of which each network has this many."""
        return next(mask for mask in self.masks if mask.size(1) == rows)


class _Stacked(nn.Module):
    """S modules of one kind as one, their parameters and statistics with a first dimension S."""

    def __init__(self, single: nn.Module, tensors: Mapping[str, Tensor], layout: Layout):
        super().__init__()
        self.layout, self.training = layout, single.training
        for name in ("eps", "momentum", "p", "sizes", "offsets"):
            setattr(self, name, getattr(single, name, None))
        for name, parameter in single._parameters.items():
            own = None if parameter is None else nn.Parameter(tensors[name])
            self.register_parameter(name, own)
        for name in {"running_mean", "running_var"} & tensors.keys():
            self.register_buffer(name, tensors[name])

    def by_network(self, x: Tensor) -> Float[Tensor, "S R D"]:
        """The rows of each network."""
        return x.reshape(self.layout.networks, -1, x.size(-1))


class _StackedLinear(_Stacked):
    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        y = torch.bmm(self.by_network(x), self.weight.transpose(1, 2))
        y = y if self.bias is None else y + self.bias.unsqueeze(1)
        return y.reshape(*x.shape[:-1], y.size(-1))


class _StackedLayerNorm(_Stacked):
    def forward(self, x: Float[Tensor, "rows D"]) -> Float[Tensor, "rows D"]:
        y = self.by_network(nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps))
        return (y * self.weight.unsqueeze(1) + self.bias.unsqueeze(1)).view_as(x)


class _StackedBatchNorm(_Stacked):
    """Over the real rows of each network; padding comes out as the bias, so that it stays small."""

    def forward(self, x: Float[Tensor, "rows D"]) -> Float[Tensor, "rows D"]:
        stacked = self.by_network(x)
        if not self.training:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            return (stacked * scale.unsqueeze(1) + shift.unsqueeze(1)).view_as(x)
        mask = self.layout.mask(stacked.size(1))
        rows = mask.sum(dim=1, keepdim=True)
        count = rows.clamp(min=1)
        mean = (stacked * mask).sum(dim=1, keepdim=True) / count
        centered = (stacked - mean) * mask
        variance = centered.square().sum(dim=1, keepdim=True) / count
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp(min=1))
            share = self.momentum * rows.clamp(max=1).squeeze(1)  # without rows they stay
            self.running_mean.lerp_(mean.squeeze(1), share)
            self.running_var.lerp_(unbiased.squeeze(1), share)
        scale = (variance + self.eps).rsqrt() * self.weight.unsqueeze(1)
        return torch.addcmul(self.bias.unsqueeze(1), centered, scale).view_as(x)


class _StackedTypeEmbedding(_Stacked):
    """For ids only."""

    def forward(self, types: Shaped[Tensor, "rows ..."]) -> Float[Tensor, "rows D"]:
        networks, sizes = self.weight.shape[:2]
        first = sizes * torch.arange(networks, device=types.device)
        ids = types.view(networks, len(types) // networks, -1) + first.view(-1, 1, 1)
        ids = ids + self.offsets.to(types.device)
        embedded = self.weight.flatten(0, 1).index_select(0, ids.flatten())
        if len(self.sizes) == 1:
            return embedded
        return embedded.unflatten(0, (len(types), len(self.sizes))).sum(dim=1)


class _StackedDropout(_Stacked):
    """Drawn over real rows only where the layout has generators."""

    def forward(self, x: Float[Tensor, "rows D"]) -> Float[Tensor, "rows D"]:
        if not self.training or self.p == 0:
            return x
        if self.layout.generators is None:
            return nn.functional.dropout(x, self.p)
        stacked = self.by_network(x)
        noise = torch.zeros_like(stacked)
        sizes = self.layout.mask(stacked.size(1)).sum(dim=(1, 2)).long().tolist()
        for part, size, generator in zip(noise, sizes, self.layout.generators, strict=True):
            drawn = torch.empty(size, x.size(-1), dtype=x.dtype)
            part[:size] = drawn.bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)
        return (stacked * noise).view_as(x)


_EXCHANGED = {
    nn.Linear: _StackedLinear,
    nn.LayerNorm: _StackedLayerNorm,
    nn.BatchNorm1d: _StackedBatchNorm,
    TypeEmbedding: _StackedTypeEmbedding,
    nn.Dropout: _StackedDropout,
}


class _RowsOfTerm(nn.Module):
    """The term of a row's network, [S * nodes, H, d], from all terms, [S, H, d]."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.layout = layout

    def forward(self, term: Tensor) -> Tensor:
        nodes = self.layout.masks[0].size(1)
        return term.unsqueeze(1).expand(-1, nodes, -1, -1).reshape(-1, *term.shape[1:])


def stack_networks(
    single: nn.Module, tensors: Mapping[str, Shaped[Tensor, "S ..."]], layout: Layout
) -> nn.Module:
    """One network over the disjoint union of the batches of S networks of a layout."""
    network = copy.deepcopy(single)
    for name, module in list(single.named_modules()):
        own = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.rpartition(".")[0] == name}
        parent, _, child = name.rpartition(".")
        if type(module) in _EXCHANGED:
            stacked = _EXCHANGED[type(module)](module, own, layout)
            setattr(network.get_submodule(parent), child, stacked)
        for term in (term for term in TERMS if term in own):
            attention, rows = network.get_submodule(name), _RowsOfTerm(layout)
            attention._parameters[term] = nn.Parameter(own[term])
            parametrize.register_parametrization(attention, term, rows, unsafe=True)
    return network


def why_not_stackable(network: nn.Module) -> str:
    """What of a network cannot be stacked, and why; empty if all can."""
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            return f"{name}: it is frozen"
    for kind in (network.named_modules, network.named_parameters):
        if shared := dict(kind(remove_duplicate=False)).keys() - dict(kind()).keys():
            return f"{min(shared)}: it stands in the network twice"
    for name, module in network.named_modules():
        kind = type(module)
        own = kind in _ROW_BY_ROW or getattr(kind, "is_row_by_row", False)
        kept = module._buffers.keys() - module._non_persistent_buffers_set
        own &= set(module._parameters) <= set(TERMS) and not kept
        stackable = own or kind in _EXCHANGED
        if kind in (nn.BatchNorm1d, nn.LayerNorm):
            needed = ("weight", "bias", "momentum", "running_mean")
            stackable = all(getattr(module, each, 0) is not None for each in needed)
            stackable &= kind is nn.LayerNorm or name.startswith("layers.")  # graphs have no mask
        if not stackable:
            return (
                f"{name or 'the network'}: {kind.__name__} is not known to treat every row, or "
                "every graph, by itself, or has unusual weights, statistics or rows"
            )
    return ""


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    is_cuda = device.type == "cuda"
    return torch.cuda.mem_get_info(device)[0] if is_cuda else psutil.virtual_memory().available


def check_memory(
    gradient: Callable[[], Any], weights: int, networks: int, is_apart: bool, device: torch.device
) -> None:
    """Raise if networks need more than is free, by the gradient of one and its weights in bytes.

    Those that are apart have their backward passes one after the other.
    """
    kept: dict[int, int] = {}  # for the backward pass, the weights too

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gradient()
    # Beside them moments, best, last and saved weights, and gradients, one by one and joined. The
    # backward pass takes some more: a peak of 1.27 of the sum was measured for GT-ZINC on a CPU.
    of_batch, free = sum(kept.values()), free_memory(device)
    once, each = (of_batch, 8 * weights) if is_apart else (0, of_batch + 7 * weights)
    once, each = once * 4 // 3, each * 4 // 3
    if networks > (fit := max(0, free - once) // each):
        raise ValueError(
            f"seeds: {networks} networks need about {each / 1e6:.2f} MB each and "
            f"{once / 1e6:.2f} MB beside, and {free / 1e6:.2f} MB are free, so that {fit} fit; "
            "train fewer at once, or take a smaller batch_size"
        )


def check_rows(found: int, expected: int, of_nodes: bool) -> None:
    """Raise if a network does not predict for what it is trained on, graphs or nodes."""
    if found != expected:
        what = "node, since readout is None" if of_nodes else "graph, since there is a readout"
        raise ValueError(f"expected {expected} predictions, one for each {what}, got {found}")


def losses(
    network: nn.Module, batch: Data, loss: str
) -> tuple[Float[Tensor, "S rows targets"], Int[Tensor, " S"]]:
    """Losses, 0 where a batch has no label, and the number of labels of each network."""
    about = batch.edge_index, batch.edge_attr, batch.batch, batch.batch_size
    predicted = network(batch.x, *about).unflatten(0, (len(batch.y), -1))
    rows = batch.y.size(1)
    check_rows(predicted.size(1), rows + (not batch.of_nodes), batch.of_nodes)
    predicted = predicted[:, :rows]  # but for the graph that is padding
    labeled = batch.has_target.unsqueeze(-1).expand_as(batch.y)
    if loss == "bce":
        labeled = labeled & ~batch.y.isnan()
    y = torch.where(labeled, batch.y, 0)
    f = nn.functional
    each = f.binary_cross_entropy_with_logits if loss == "bce" else f.l1_loss
    values = each(predicted, y, reduction="none")
    return torch.where(labeled, values, 0), labeled.sum(dim=(1, 2))
