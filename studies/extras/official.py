"""Read checkpoints of the published repositories: their parameter names, our modules::

    layer = load_layer(state_dict, kind="gt", heads=8)
    network = load_network(state_dict, kind="gt", heads=8)

Depth, width, normalisation, biases, the Explicit Bias Term and full-graph attention are
recognised from the names.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from mapkg.models.edge_attention import GraphTransformerLayer, NodeStreamLayer
from mapkg.models.network import GraphNetwork
from studies.extras import FullGraphNetwork
from studies.extras.full_graph import DiffusionKernel, FakeEdgeShare, FullGraphLayer

KINDS = {"gt": "mean", "graphit": "sum", "san": "sum"}
"""Layer kinds that can be read, and the readout of their published networks on molecules.

``"gt"`` is the GraphTransformer with an edge stream.
"""

StateDict = Mapping[str, Tensor]
Layer = GraphTransformerLayer | NodeStreamLayer

# Published name (h: node stream, e: edge stream) -> ours, without the parameter's own name.
_ATTENTION = {"Q": "query", "K": "key", "V": "value"}
_TERM = {"k_bias": "key_term", "e_bias": "edge_term", "v_bias": "value_term"}
_FAKE = {"Q_2": "fake_query", "K_2": "fake_key", "E_2": "fake_edge"}
_BLOCK = {
    "O_{}": "project",
    "FFN_{}_layer1": "expand",
    "FFN_{}_layer2": "contract",
    "batch_norm1_{}": "batch_norm1",
    "batch_norm2_{}": "batch_norm2",
    "layer_norm1_{}": "layer_norm1",
    "layer_norm2_{}": "layer_norm2",
}
_NETWORK_MODULES = {
    "": "edge_factor",  # its gamma is a parameter of the published network itself
    "embedding_h": "node_embedding",
    "embedding_e": "edge_embedding",
    "MLP_layer.FC_layers.0": "head.0",
    "MLP_layer.FC_layers.1": "head.2",
    "MLP_layer.FC_layers.2": "head.4",
}


def load_layer(state_dict: StateDict, kind: str, heads: int, *, residual: bool = True) -> Layer:
    """A published layer in evaluation mode, in the weights' precision; the names it must have are
    in the error. Heads and residual cannot be read from weights.
    """
    _check_kind(kind)
    state_dict = _without_unused_gamma(state_dict, kind)
    attention = _attention_name(state_dict, kind)
    layer = _empty_layer(state_dict, kind, attention, heads, residual)
    _load(layer, state_dict, _layer_modules(kind, attention))
    return layer.eval()


def load_network(
    state_dict: StateDict,
    kind: str,
    heads: int,
    *,
    readout: str | None = None,
    residual: bool = True,
    gamma: float | None = None,
) -> GraphNetwork:
    """A published network, as ``load_layer`` reads its layers.

    None for ``readout`` is the one of the published runs. ``gamma`` is needed for a full-graph
    ``"san"`` whose weights have no learned one.
    """
    _check_kind(kind)
    numbers = sorted({int(found[1]) for found in map(_LAYER.match, state_dict) if found})
    if not numbers or numbers != list(range(len(numbers))):
        raise ValueError(
            f"expected layers numbered from 0 (layers.0.attention.Q.weight, ...), found {numbers}"
        )
    state_dict = _without_unused_gamma(state_dict, kind)
    parts = [_inside(state_dict, f"layers.{number}.") for number in numbers]
    attention = _attention_name(parts[0], kind)
    required = [f"{module}.weight" for module in _NETWORK_MODULES if module]
    required += [f"layers.{number}.{attention}.Q.weight" for number in numbers]
    _require(required, state_dict)
    layers = [_empty_layer(part, kind, attention, heads, residual) for part in parts]
    is_full = isinstance(layers[0], FullGraphLayer)
    edge_factor = _edge_factor(state_dict, kind, is_full, gamma)
    network_type = partial(FullGraphNetwork, edge_factor=edge_factor) if is_full else GraphNetwork
    network = network_type(
        layers,
        num_node_types=state_dict["embedding_h.weight"].size(0),
        num_edge_types=state_dict["embedding_e.weight"].size(0),
        hidden_channels=state_dict["embedding_h.weight"].size(1),
        out_channels=state_dict["MLP_layer.FC_layers.2.weight"].size(0),
        readout=readout or KINDS[kind],
    )
    modules = _NETWORK_MODULES | {
        f"layers.{number}.{theirs}": f"layers.{number}.{ours}"
        for number in numbers
        for theirs, ours in _layer_modules(kind, attention).items()
    }
    _load(network, state_dict, modules)
    return network.eval()


_LAYER = re.compile(r"layers\.(\d+)\.")


def _inside(state_dict: StateDict, prefix: str) -> StateDict:
    return {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {tuple(KINDS)}, got {kind!r}")


def _without_unused_gamma(state_dict: StateDict, kind: str) -> StateDict:
    """SAN's learned gamma is stored in every layer too, and in sparse networks, which ignore it."""
    if kind != "san":
        return state_dict
    full = any(name.endswith(".Q_2.weight") for name in state_dict)
    return {
        name: value
        for name, value in state_dict.items()
        if not name.endswith("attention_h.gamma") and (full or name != "gamma")
    }


def _attention_name(state_dict: StateDict, kind: str) -> str:
    """The published name of a layer's attention; SAN's differs between its two repositories."""
    names = {"gt": ("attention",), "graphit": ("attention_h",), "san": ("attention", "attention_h")}
    found = [name for name in names[kind] if f"{name}.Q.weight" in state_dict]
    return (found or names[kind])[0]


def _layer_modules(kind: str, attention: str) -> dict[str, str]:
    """From published names of a layer's modules to ours."""
    is_gt = kind == "gt"
    maps = _ATTENTION | ({"proj_e": "edge"} if is_gt else {"E": "edge", **_FAKE})
    streams = {"h": "node", "e": "edge"} if is_gt else {"h": "node"}
    maps |= _TERM
    return {f"{attention}.{theirs}": f"attention.{ours}" for theirs, ours in maps.items()} | {
        theirs.format(letter): f"{stream}_block.{ours}"
        for letter, stream in streams.items()
        for theirs, ours in _BLOCK.items()
    }


def _empty_layer(
    state_dict: StateDict, kind: str, attention: str, heads: int, residual: bool
) -> Layer:
    _require([f"{attention}.Q.weight"], state_dict)
    layer_type: type[Layer] = GraphTransformerLayer
    if kind != "gt":
        is_full = f"{attention}.Q_2.weight" in state_dict
        layer_type = FullGraphLayer if is_full else NodeStreamLayer
    return layer_type(
        state_dict[f"{attention}.Q.weight"].size(0),
        heads,
        residual=residual,
        batch_norm=any(name.startswith("batch_norm") for name in state_dict),
        layer_norm=any(name.startswith("layer_norm") for name in state_dict),
        use_bias=f"{attention}.Q.bias" in state_dict,
        explicit_bias="published" if f"{attention}.k_bias" in state_dict else "none",
    )


def _edge_factor(
    state_dict: StateDict, kind: str, is_full: bool, gamma: float | None
) -> DiffusionKernel | FakeEdgeShare | None:
    needs_gamma = is_full and kind == "san" and "gamma" not in state_dict
    if needs_gamma != (gamma is not None):
        expected = "a value, the weights have none" if needs_gamma else "None, it has no use"
        raise ValueError(f"gamma: expected {expected}, got {gamma!r}")
    if not is_full:
        return None
    return FakeEdgeShare(gamma) if kind == "san" else DiffusionKernel()


def _load(module: torch.nn.Module, state_dict: StateDict, modules: Mapping[str, str]) -> None:
    """Load published names into a module of ours, every name used exactly once."""
    theirs_of = {ours: theirs for theirs, ours in modules.items()}
    ours_own = module.state_dict()
    expected = {}
    for name in ours_own:
        owner, _, parameter = name.rpartition(".")
        # A parameter that is no module's there, as those of the Explicit Bias Term, has its name.
        theirs = theirs_of.get(name) or f"{theirs_of[owner]}.{parameter}".removeprefix(".")
        expected[theirs] = name
    unknown = [name for name in state_dict if name not in expected]
    if unknown:
        raise ValueError(
            f"unknown names in the published weights: {', '.join(unknown)}; expected "
            f"{', '.join(expected)}"
        )
    _require(expected, state_dict)
    weights = {ours: state_dict[theirs] for theirs, ours in expected.items()}
    for name in weights:
        if name.endswith("_term") and weights[name].numel() == ours_own[name].numel():
            weights[name] = weights[name].reshape(ours_own[name].shape)  # [H, d, 1] or [H, 1, d]
    module.to(next(iter(weights.values())).dtype)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"published weights of an unexpected shape: {error}") from None


def _require(names: Iterable[str], state_dict: StateDict) -> None:
    missing = [name for name in names if name not in state_dict]
    if missing:
        raise ValueError(f"missing in the published weights: {', '.join(missing)}")
