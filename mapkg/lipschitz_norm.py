"""LipschitzNorm divides the score of an edge, so that attention is Lipschitz in the features.

``lipschitz_normalise(model)`` adds it to every GATConv, TransformerConv and EdgeAttention.
"""

import math
import sys
import warnings
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.nn import DNAConv, FAConv, FeaStConv, GATConv, MessagePassing, TransformerConv
from torch_geometric.utils import is_torch_sparse_tensor, scatter, to_edge_index

from mapkg.models.edge_attention import EdgeAttention

MODES = ("paper", "published", "published-si")
"""What a Lipschitz normalization divides by, see ``LipschitzNorm``."""

EPS = 1e-12
"""Added to what a score is divided by."""


class LipschitzNorm(nn.Module):
    r"""What the linear score of GAT is divided by.

    With :math:`e_{ji} = a_l \cdot z_j + a_r \cdot z_i`, per target i and head, mode ``"paper"``:

    .. math:: c_i = f \, \lVert [a_l; a_r] \rVert
        \sqrt{\max_{j \in N(i)} \lVert z_j \rVert^2 + \lVert z_i \rVert^2}

    Where N(i) has i itself, the magnitude of :math:`e_{ji} / c_i` is at most 1 / f.

    Mode ``"published"``, edge by edge, for target i and head k of H:

    .. math:: c_{ji}^k = f \, \lVert [a_l; a_r] \rVert
        \sqrt{\max_{j' \in N(i')} \lVert z_{j'}^{k'} \rVert^2 + \lVert z_j^k \rVert^2},
        \qquad i' = \lfloor i / H \rfloor, \; k' = i \bmod H

    The norm of the attention vectors is over all heads there, in mode ``"published-si"`` per head.

    Args:
        mode: one of ``MODES``.
        scale: f, above 0; None means 1 for ``"paper"`` and 4 for the others.

    Source: LipschitzNorm paper, linear scores; published code ``normalizations/lipschitznorm.py``.
    """

    published_scale = 4.0  # its origin is not known

    def __init__(self, mode: str = "paper", *, scale: float | None = None) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
        default = 1.0 if mode == "paper" else self.published_scale
        self.mode, self.scale = mode, default if scale is None else scale
        if not self.scale > 0:
            raise ValueError(f"scale: expected a value above 0, got {scale!r}")

    def forward(
        self,
        z: Float[Tensor, "N H C"],
        att: Float[Tensor, "H channels"],
        edge_index: Int[Tensor, "2 E"],
    ) -> Float[Tensor, "E H"]:
        """The divisor of every edge and head.

        ``z`` are projected features of nodes, ``att`` both attention vectors of each head, joined,
        2C channels; ``edge_index`` has the self-loops.
        """
        source, target = edge_index
        z, att = _wide(z), _wide(att)
        norm = att.norm() if self.mode == "published" else att.norm(dim=-1)
        size = z.square().sum(dim=-1)  # [N, H]
        of_source = size.index_select(0, source)
        largest = scatter(of_source, target, dim_size=len(z), reduce="max")  # [N, H]
        if self.mode == "paper":
            inner = (largest + size).index_select(0, target)
        else:
            inner = largest.view(-1, 1).index_select(0, target) + of_source
        return self.scale * norm * _root(inner) + EPS

    def extra_repr(self) -> str:
        """Mode and scale, for ``print``."""
        return f"{self.mode!r}, scale={self.scale:g}"


class QuadraticLipschitzNorm(LipschitzNorm):
    r"""What the quadratic score :math:`q_i \cdot k_j` of a transformer is divided by.

    Mode ``"paper"``, per target i and head, with :math:`u = \lVert q_i \rVert`,
    :math:`v = \max_j \lVert k_j \rVert`, :math:`w = \max_j \lVert v_j \rVert` over its neighbors:

    .. math:: c_i = f \, \max(u v, \; u w, \; v w)

    The modes ``"published"`` and ``"published-si"`` are alike here: u is the Frobenius norm of the
    queries of all edges of the batch, one for each edge into a node, and the score has been
    divided by the root of the channels of a head before. A scale of None means 1 in all modes.

    Source: LipschitzNorm paper, quadratic scores; published code
    ``normalizations/quadratic_lipschitznorm.py``. differs: maxima of keys and values are over the
    neighbors of a target in all modes.
    """

    published_scale = 1.0

    def forward(
        self,
        query: Float[Tensor, "E H C"],
        key: Float[Tensor, "E H C"],
        value: Float[Tensor, "E H C"],
        target: Int[Tensor, " E"],
    ) -> Float[Tensor, "E H 1"]:
        """What the score q . k / sqrt(C) of every edge and head is multiplied by."""
        temperature = math.sqrt(query.size(-1)) if self.mode == "paper" else 1.0
        # [E, H] each; the gradient of square() takes a slow power.
        query, key, value = ((x * x).sum(dim=-1) for x in map(_wide, (query, key, value)))
        u = _root(query if self.mode == "paper" else query.sum(dim=0, keepdim=True))
        largest = (_root(scatter(x, target, reduce="max")) for x in (key, value))
        v, w = (of_target.index_select(0, target) for of_target in largest)
        divisor = self.scale * torch.stack([u * v, u * w, v * w]).amax(dim=0) + EPS
        return (temperature / divisor).unsqueeze(-1)


def lipschitz_normalise(
    model: nn.Module, mode: str = "paper", *, scale: float | None = None
) -> nn.Module:
    """Divide the scores of the attention layers in a model, in place.

    PyG's own hooks divide what its layers compute inside; weights, names and ``state_dict`` stay
    what they are, and a copy of the model is normalized too. ``torch.compile`` and ``torch.export``
    pass over these hooks: their first call raises.

    Args:
        model: with layers ``GATConv`` or ``TransformerConv`` of PyG without edge features, or
            ``EdgeAttention`` without an Explicit Bias Term, whose key is gated by the edge.
            A warning names the layers with other attention, which stay as they are.
        mode, scale: as for ``LipschitzNorm`` and ``QuadraticLipschitzNorm``.

    Raises ``ValueError`` if there is no such layer, or one that cannot be normalized or is already;
    ``TypeError`` if it is no model, or a part of it is compiled.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    chosen, others = {}, []
    for name, layer in model.named_modules():
        is_compiled = getattr(layer, "_compiled_call_impl", None) or hasattr(layer, "_orig_mod")
        if is_compiled or isinstance(layer, torch.jit.ScriptModule):
            raise TypeError(
                f"{name or type(model).__name__} is compiled, and compiled code passes over hooks: "
                "expected the module as it was before (._orig_mod of what torch.compile gave)"
            )
        kind = next((kind for kind in _KINDS if isinstance(layer, kind)), None)
        if kind is not None:
            chosen[name or "the layer"] = layer, _KINDS[kind]
        elif _attends(layer):
            others.append(f"{name} ({type(layer).__name__})")
    if not chosen:
        raise ValueError(
            "expected a model with layers GATConv, TransformerConv or EdgeAttention, got "
            f"{type(model).__name__} without any"
        )
    for name, (layer, _) in chosen.items():  # before the first is changed
        if reason := _refusal(layer):
            raise ValueError(f"{name}: {type(layer).__name__} {reason}")
    if others:
        message = f"attention that is not normalized and stays as it is: {', '.join(others)}"
        warnings.warn(message, stacklevel=2)
    for layer, normalized in chosen.values():
        layer.score_norm = normalized(layer, mode, scale)
    return model


def _refusal(layer: nn.Module) -> str | None:
    """Why the scores of a layer cannot be normalized."""
    if getattr(layer, "score_norm", None) is not None:
        return "has scores that are normalized already"
    if isinstance(layer, EdgeAttention):
        if type(layer) is not EdgeAttention:
            return "attends over pairs of nodes that are no edges"
        if layer.explicit_bias != "none":
            return f"has an Explicit Bias Term, {layer.explicit_bias!r}"
        return None if layer.attention != "uniform" else "attends to all alike, without its score"
    if layer.lin_edge is not None:
        return "has edge features in its score; expected edge_dim=None"
    if isinstance(layer, GATConv) and layer.lin is None:
        return "has two projections, for sources and targets; expected one for all nodes"
    return None


def _attends(layer: nn.Module) -> bool:
    """Whether a layer has an attention of its own; most such convolutions import ``softmax``."""
    home, name = type(layer).__module__, type(layer).__name__
    if isinstance(layer, MessagePassing):
        is_on = getattr(layer, "attention", True) and getattr(layer, "use_attention", True)
        has_softmax = hasattr(sys.modules.get(home), "softmax")
        return bool(is_on) and (has_softmax or isinstance(layer, DNAConv | FAConv | FeaStConv))
    of_pyg = home.startswith("torch_geometric.nn.attention.") and name.endswith("Attention")
    return of_pyg or isinstance(layer, nn.MultiheadAttention)


_PASS: ContextVar[dict[str, Any]] = ContextVar("pass")
"""What the hooks of one layer keep of the pass that this thread is in."""


class _Normalised(nn.Module):
    """Divides the scores of the layer whose submodule it is; as hooks are bound, so does a copy."""

    norm_type: type[LipschitzNorm] = QuadraticLipschitzNorm
    stage: str | None = None  # of PyG's message passing, whose arguments are divided

    def __init__(self, layer: nn.Module, mode: str, scale: float | None) -> None:
        super().__init__()
        self.norm = self.norm_type(mode, scale=scale)
        if self.stage is not None:  # else the layer calls it
            layer.register_forward_pre_hook(self._begin, with_kwargs=True)
            getattr(layer, f"register_{self.stage}_forward_pre_hook")(self._divide)
            layer.register_forward_hook(self._end)

    def __prepare_scriptable__(self) -> nn.Module:
        raise TypeError(
            "TorchScript leaves out the norm of attention scores; run the network as it is"
        )

    def _begin(self, _layer: nn.Module, _inputs: tuple, _named: dict[str, Any]) -> None:
        _PASS.set({})

    def _end(self, layer: nn.Module, _inputs: tuple, _output: Any) -> None:
        if not _PASS.get().get("divided"):
            raise RuntimeError(
                f"the scores of {type(layer).__name__} were not normalized: torch.compile and "
                "torch.export pass over the hooks of PyG's layers; run the network as it is"
            )


class _OfGAT(_Normalised):
    norm_type = LipschitzNorm
    stage = "edge_update"

    def _begin(self, layer: GATConv, inputs: tuple, named: dict[str, Any]) -> None:
        x = inputs[0] if inputs else named.get("x")
        if not isinstance(x, Tensor):
            raise ValueError("expected one x for all nodes, got a pair of sources and targets")
        if "watch" in (failed := _PASS.get({})):
            failed["watch"].remove()
        # For this pass alone: the projection may be another by the next.
        _PASS.set({"watch": layer.lin.register_forward_hook(_keep_projected)})

    def _divide(self, layer: GATConv, inputs: tuple) -> tuple:
        edge_index, size, arguments = inputs
        if not isinstance(edge_index, Tensor):
            raise ValueError(
                "GATConv with a normalized score: expected edge_index as a tensor of shape [2, E] "
                f"or a sparse one of torch, got {type(edge_index).__name__}"
            )
        if is_torch_sparse_tensor(edge_index):
            source, target = to_edge_index(edge_index)[0].flip(0)  # row i has the sources of i
        else:
            source, target = directed(layer, edge_index)
        state = _PASS.get()
        # Not kept, since it would keep the graph of this pass alive.
        z = state.pop("z").view(-1, layer.heads, layer.out_channels)
        att = torch.cat([layer.att_src, layer.att_dst], dim=-1).squeeze(0)
        divisor = self.norm(z, att, torch.stack([source, target]))
        state["divided"] = True
        if "alpha" in arguments:
            # PyG cannot read the source of a layer that is defined in a notebook, and shows scores
            # of nodes: those of edges are given as if each edge had a source of its own.
            left, right = arguments["alpha"]
            score = left.index_select(0, source) + right.index_select(0, target)
            edge_index = torch.stack([torch.arange(len(source)).to(target), target])
            alpha = ((score / divisor).to(left.dtype), torch.zeros_like(right))
            return edge_index, size, arguments | {"alpha": alpha}
        terms = {name: arguments[name] for name in ("alpha_j", "alpha_i")}
        divided = {name: (term / divisor).to(term.dtype) for name, term in terms.items()}
        return edge_index, size, arguments | divided


def _keep_projected(_linear: nn.Module, _inputs: tuple, z: Tensor) -> None:
    if "watch" in (state := _PASS.get({})):
        state.pop("watch").remove()
        state["z"] = z


class _OfTransformer(_Normalised):
    stage = "message"

    def _divide(self, _layer: TransformerConv, inputs: tuple) -> tuple:
        (arguments,) = inputs
        _PASS.get()["divided"] = True
        query, key, value = (arguments[name] for name in ("query_i", "key_j", "value_j"))
        factor = self.norm(query, key, value, arguments["index"])
        return (arguments | {"query_i": (query * factor).to(query.dtype)},)


class _OfEdgeAttention(_Normalised):
    def forward(
        self,
        layer: EdgeAttention,
        x: Float[Tensor, "N D"],
        query: Float[Tensor, "N D"],
        key: Float[Tensor, "N D"],
        edge_index: Int[Tensor, "2 E"],
        edge: Float[Tensor, "E D"] | None,
    ) -> Float[Tensor, "E D"]:
        """The normalized score, from queries that are scaled; the edge gates the key."""
        dtype, query, key = query.dtype, _wide(query), _wide(key)
        score = layer.bounded(layer.edge_score(query, key, edge_index, edge))
        query = query * math.sqrt(layer.head_channels)
        # The layer computes its values later; hooks on them are to see one pass.
        value = nn.functional.linear(x, layer.value.weight, layer.value.bias)
        query, key, value = (
            layer.split_heads(rows.index_select(0, ends))
            for rows, ends in zip((query, key, value), edge_index[[1, 0, 0]], strict=True)
        )
        key = key if edge is None else key * layer.split_heads(edge)
        factor = self.norm(query, key, value, edge_index[1])
        return (layer.split_heads(score) * factor).flatten(1).to(dtype)


_KINDS = {GATConv: _OfGAT, TransformerConv: _OfTransformer, EdgeAttention: _OfEdgeAttention}


def directed(layer: nn.Module, edge_index: Int[Tensor, "2 E"]) -> Int[Tensor, "2 E"]:
    """Sources in row 0 and targets in row 1, whichever way the layer's messages flow."""
    return edge_index if layer.flow == "source_to_target" else edge_index.flip(0)


def _wide(x: Tensor) -> Tensor:
    """Squares of half precision overflow above a norm of 256: norms are taken in single."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _root(square: Tensor) -> Tensor:
    """The square root, with gradient 0 in place of infinity at 0."""
    return square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()
