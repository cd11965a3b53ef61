r"""Many networks of one configuration as one network over the disjoint union of their batches.

The S networks share nothing, and a graph network does not mix graphs that share no edge. So the
batches of all networks are laid one below another as one batch: rows 0 to R - 1 of every tensor
belong to the first network, the next R rows to the second, and so on. Message passing, readout
and every function of a row run **as they are**; only modules that own weights, or that mix rows,
are exchanged for a form that knows S weights:

- linear maps, LayerNorm and embeddings use the weights of the network a row belongs to;
- BatchNorm takes its statistics over the real rows of one network, padding left out;
- dropout can draw what each network would draw alone.

Unlike with ``torch.func.vmap`` over the whole network, indexing is that of one large batch, and
hooks see the modules as they are.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch_geometric.nn.aggr import SumAggregation

from mapkg.models.edge_attention import (
    EdgeAttention,
    GraphTransformerLayer,
    NodeStreamLayer,
    ResidualBlock,
)
from mapkg.models.egat import EdgeGATAttention, EdgeGATLayer
from mapkg.models.network import GraphNetwork, TypeEmbedding

TERMS = ("key_term", "edge_term", "value_term")
"""Parameters of ``EdgeAttention`` itself, the Explicit Bias Term of each head."""

_ROW_BY_ROW = (
    *(GraphNetwork, NodeStreamLayer, GraphTransformerLayer, EdgeGATLayer, ResidualBlock),
    *(EdgeAttention, EdgeGATAttention, SumAggregation),
    *(nn.ModuleList, nn.Sequential, nn.Identity, nn.ReLU),
)
"""Modules that own no weight but ``TERMS`` and treat every row, or every graph, by itself."""

_WEIGHT_GRADIENT_PRODUCTS = 128
"""Products a GPU should work on at once to fill its multiprocessors."""


@dataclass
class Rows:
    """Which rows of one kind, nodes or edges, are real; ``sizes`` is ``count`` on the host."""

    mask: Float[Tensor, "S R 1"]
    count: Float[Tensor, "S 1 1"]
    sizes: list[int] | None = None


@dataclass
class Layout:
    """How the rows of S networks lie; one object shared by all modules of a stacked network.

    Modules tell nodes from edges by R. From one CPU generator per network dropout draws what the
    network would draw alone; None draws from torch's own generator for all at once.
    """

    networks: int
    nodes: Rows | None = None
    edges: Rows | None = None
    generators: Sequence[torch.Generator] | None = None

    def of(self, rows: int) -> Rows:
        """The kind of rows of which each network has this many."""
        for kind in (self.nodes, self.edges):
            if kind.mask.size(1) == rows:
                return kind
        raise ValueError(
            f"expected {self.nodes.mask.size(1)} rows per network (nodes) or "
            f"{self.edges.mask.size(1)} (edges), got {rows}"
        )


class _Linear(torch.autograd.Function):
    """x W^T + b for stacked x [S, R, in], W [S, out, in] and b [S, out] or None.

    The gradient of W sums over R rows. For one network that is one small product with a long
    sum, which leaves a GPU idle, so the sum is cut into ``parts`` products.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, parts):
        ctx.save_for_backward(x, weight)
        ctx.parts, ctx.has_bias = parts, bias is not None
        y = torch.bmm(x, weight.transpose(1, 2))
        # Not in place: compiled by torch 2.11, an output changed in place has no gradient.
        return y if bias is None else y + bias.unsqueeze(1)

    @staticmethod
    def backward(ctx, gradient):
        # All gradients, whether needed or not: torch 2.11 compiles ctx.needs_input_grad wrongly.
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_x = torch.bmm(gradient, weight)
        parts = x.size(0) * ctx.parts, x.size(1) // ctx.parts
        of_weight = torch.bmm(gradient.reshape(*parts, -1).transpose(1, 2), x.reshape(*parts, -1))
        if ctx.parts > 1:
            of_weight = of_weight.unflatten(0, (x.size(0), ctx.parts)).sum(dim=1)
        of_bias = gradient.sum(dim=1) if ctx.has_bias else None
        return of_x, of_weight, of_bias, None


class _BatchNorm(torch.autograd.Function):
    """BatchNorm of stacked rows x [S, R, D] from what it is made of.

    ``centered`` is x minus its mean over real rows, 0 in padding rows, and ``inverse`` one over
    the standard deviation, [S, 1, D]. The gradient is with respect to x, on which both depend.
    Padding rows come out as the bias, so that they stay small however deep the network is.
    """

    @staticmethod
    def forward(ctx, x, centered, inverse, mask, count, weight, bias):
        ctx.save_for_backward(centered, inverse, mask, count, weight)
        return torch.addcmul(bias.unsqueeze(1), centered, inverse * weight.unsqueeze(1))

    @staticmethod
    def backward(ctx, gradient):
        centered, inverse, mask, count, weight = ctx.saved_tensors
        # Padding rows of the gradient are exact zeros: nothing real depends on them.
        of_bias = gradient.sum(dim=1, keepdim=True)
        along = (gradient * centered).sum(dim=1, keepdim=True) * inverse
        scale = inverse * weight.unsqueeze(1)
        of_x = torch.addcmul(-scale * of_bias / count, gradient, scale) * mask
        of_x = torch.addcmul(of_x, centered, -scale * inverse * along / count)
        return of_x, None, None, None, None, along.squeeze(1), of_bias.squeeze(1)


class StackedLinear(nn.Module):
    """S linear maps."""

    def __init__(self, weight: Float[Tensor, "S out in"], bias: Float[Tensor, "S out"] | None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """Map every row by the weights of its network."""
        rows = x.reshape(self.weight.size(0), -1, self.weight.size(2))
        y = _Linear.apply(rows, self.weight, self.bias, self._parts(rows))
        return y.reshape(*x.shape[:-1], self.weight.size(1))

    def _parts(self, rows: Tensor) -> int:
        parts = 1
        if rows.is_cuda:
            wanted = _WEIGHT_GRADIENT_PRODUCTS // rows.size(0)
            while 2 * parts <= wanted and rows.size(1) % (2 * parts) == 0:
                parts *= 2
        return parts


class StackedLayerNorm(nn.Module):
    """S LayerNorms of one width."""

    def __init__(self, weight: Float[Tensor, "S D"], bias: Float[Tensor, "S D"], eps: float):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(weight), nn.Parameter(bias), eps

    def forward(self, x: Float[Tensor, "rows D"]) -> Float[Tensor, "rows D"]:
        """Normalise every row, then scale it by the weights of its network."""
        networks, width = self.weight.shape
        y = nn.functional.layer_norm(x, (width,), eps=self.eps).view(networks, -1, width)
        return (y * self.weight.unsqueeze(1) + self.bias.unsqueeze(1)).view_as(x)


class StackedBatchNorm(nn.Module):
    """S BatchNorms over the real rows of each network; all networks see as many batches."""

    def __init__(
        self,
        weight: Float[Tensor, "S D"],
        bias: Float[Tensor, "S D"],
        running_mean: Float[Tensor, "S D"],
        running_var: Float[Tensor, "S D"],
        single: nn.BatchNorm1d,
        layout: Layout,
    ):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.register_buffer("running_mean", running_mean)
        self.register_buffer("running_var", running_var)
        self.eps, self.momentum, self.layout = single.eps, single.momentum, layout

    def forward(self, x: Float[Tensor, "rows D"]) -> Float[Tensor, "rows D"]:
        """Normalise by the batch in training, by the running statistics otherwise."""
        stacked = x.view(self.weight.size(0), -1, self.weight.size(1))
        if not self.training:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            return (stacked * scale.unsqueeze(1) + shift.unsqueeze(1)).view_as(x)
        rows = self.layout.of(stacked.size(1))
        with torch.no_grad():
            mean = (stacked * rows.mask).sum(dim=1, keepdim=True) / rows.count
            centered = (stacked - mean) * rows.mask
            variance = (centered * centered).sum(dim=1, keepdim=True) / rows.count
            unbiased = variance * (rows.count / (rows.count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.squeeze(1), self.momentum)
            self.running_var.lerp_(unbiased.squeeze(1), self.momentum)
            inverse = (variance + self.eps).rsqrt()
        y = _BatchNorm.apply(
            *(stacked, centered, inverse, rows.mask, rows.count, self.weight, self.bias)
        )
        return y.view_as(x)


class StackedTypeEmbedding(nn.Module):
    """S tables of type embeddings, for ids only."""

    def __init__(self, weight: Float[Tensor, "S types D"], single: TypeEmbedding):
        super().__init__()
        self.weight, self.sizes = nn.Parameter(weight), single.sizes
        first = torch.arange(len(weight), device=weight.device) * weight.size(1)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("offsets", single.offsets.to(weight.device), persistent=False)

    def forward(self, types: Shaped[Tensor, "rows ..."]) -> Float[Tensor, "rows D"]:
        """Embed ids of shape [rows] or [rows, columns] by the table of a row's network."""
        rows = len(types) // len(self.weight)
        ids = types.view(len(self.weight), rows, -1) + self.first.view(-1, 1, 1) + self.offsets
        table = self.weight.reshape(-1, self.weight.size(2))
        embedded = table.index_select(0, ids.flatten())
        if len(self.sizes) == 1:
            return embedded
        return embedded.unflatten(0, (len(types), len(self.sizes))).sum(dim=1)


class StackedDropout(nn.Module):
    """Dropout of S networks, drawn over real rows only where the layout has generators."""

    def __init__(self, p: float, layout: Layout):
        super().__init__()
        self.p, self.layout = p, layout

    def forward(self, x: Float[Tensor, "rows D"]) -> Float[Tensor, "rows D"]:
        """Zero entries with probability p and scale the others, in training only."""
        if not self.training or self.p == 0:
            return x
        if self.layout.generators is None:
            return nn.functional.dropout(x, self.p)
        stacked = x.view(self.layout.networks, -1, x.size(-1))
        noise = torch.zeros_like(stacked)
        sizes = self.layout.of(stacked.size(1)).sizes
        for part, size, generator in zip(noise, sizes, self.layout.generators, strict=True):
            drawn = torch.empty(size, x.size(-1), dtype=x.dtype)
            part[:size] = drawn.bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)
        return (stacked * noise).view_as(x)


class _RowsOfTerm(nn.Module):
    """The term of a row's network, [S * nodes, H, d], from all terms, [S, H, d]."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.layout = layout

    def forward(self, term: Tensor) -> Tensor:
        nodes = self.layout.nodes.mask.size(1)
        return term.unsqueeze(1).expand(-1, nodes, -1, -1).reshape(-1, *term.shape[1:])


def stack_networks(
    single: nn.Module, tensors: Mapping[str, Shaped[Tensor, "S ..."]]
) -> tuple[nn.Module, Layout]:
    """One network over the disjoint union of the batches of S networks, from ``stacked_state``.

    The layout has to name the real rows before each call. Raises if a module cannot be stacked.
    """
    check_stackable(single)
    network = copy.deepcopy(single)
    layout = Layout(len(next(iter(tensors.values()))))
    for name, module in list(single.named_modules()):
        prefix = f"{name}." if name else ""
        parent, _, child = name.rpartition(".")
        stacked = _stacked(module, prefix, tensors, layout)
        if stacked is not None:
            setattr(network.get_submodule(parent), child, stacked)
        for term in TERMS:
            if term in module._parameters:
                attention = network.get_submodule(name)
                attention._parameters[term] = nn.Parameter(tensors[prefix + term])
                parametrize.register_parametrization(
                    attention, term, _RowsOfTerm(layout), unsafe=True
                )
    return network.train(single.training), layout


def _stacked(
    module: nn.Module, prefix: str, tensors: Mapping[str, Tensor], layout: Layout
) -> nn.Module | None:
    def of(*names: str) -> list[Tensor | None]:
        return [tensors.get(prefix + name) for name in names]

    if type(module) is nn.Linear:
        return StackedLinear(*of("weight", "bias"))
    if type(module) is nn.LayerNorm:
        return StackedLayerNorm(*of("weight", "bias"), module.eps)
    if type(module) is nn.BatchNorm1d:
        names = ("weight", "bias", "running_mean", "running_var")
        return StackedBatchNorm(*of(*names), module, layout)
    if type(module) is TypeEmbedding:
        return StackedTypeEmbedding(*of("weight"), module)
    if type(module) is nn.Dropout:
        return StackedDropout(module.p, layout)
    return None


def check_stackable(network: nn.Module) -> None:
    """Raise if a network cannot be stacked; names the module and says why."""
    exchanged = (nn.Linear, nn.LayerNorm, nn.BatchNorm1d, TypeEmbedding, nn.Dropout)
    for name, module in network.named_modules():
        kind, reason = type(module), None
        if kind not in (*_ROW_BY_ROW, *exchanged):
            reason = "is not known to treat every row, or every graph, by itself"
        elif kind is nn.BatchNorm1d and not (
            module.affine and module.track_running_stats and module.momentum is not None
        ):
            reason = "is stacked with weights, running statistics and a momentum only"
        elif kind is nn.LayerNorm and (module.bias is None or len(module.normalized_shape) != 1):
            reason = "is stacked with weight and bias over the last dimension only"
        elif kind in _ROW_BY_ROW and set(module._parameters) - set(TERMS):
            reason = "owns a parameter"
        if reason is not None:
            raise ValueError(
                f"{name or 'the network'}: {kind.__name__} {reason}, so that its networks cannot "
                "be stacked; train them one by one with studies.train.fit"
            )


def stacked_state(networks: Sequence[nn.Module]) -> dict[str, Shaped[Tensor, "S ..."]]:
    """State dicts of networks of one architecture, stacked entry by entry."""
    states = [network.state_dict() for network in networks]
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def plain_name(name: str) -> str:
    """What a parameter of a stacked network is called in a single one."""
    return name.replace("parametrizations.", "").removesuffix(".original")
