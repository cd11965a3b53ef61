"""Read checkpoints of the published repositories: their parameter names, our modules::

    layer = load_layer(state_dict, kind="gt", heads=8)
    network = load_network(state_dict, kind="gt", heads=8)

Depth, width, normalisation and biases are recognised from the names.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mapkg.models.edge_attention import GraphTransformerLayer
from mapkg.models.networks import GraphNetwork

KINDS = ("gt",)
"""Layer kinds that can be read; ``"gt"`` is the GraphTransformer with an edge stream."""

StateDict = Mapping[str, Tensor]

# Published name (h: node stream, e: edge stream) -> ours, without the parameter's own name.
_ATTENTION = {"Q": "query", "K": "key", "V": "value", "proj_e": "edge"}
_BLOCK = {
    "O_{}": "project",
    "FFN_{}_layer1": "expand",
    "FFN_{}_layer2": "contract",
    "batch_norm1_{}": "batch_norm1",
    "batch_norm2_{}": "batch_norm2",
    "layer_norm1_{}": "layer_norm1",
    "layer_norm2_{}": "layer_norm2",
}
_MODULES = {f"attention.{theirs}": f"attention.{ours}" for theirs, ours in _ATTENTION.items()} | {
    theirs.format(letter): f"{stream}_block.{ours}"
    for letter, stream in (("h", "node"), ("e", "edge"))
    for theirs, ours in _BLOCK.items()
}
_NETWORK_MODULES = {
    "embedding_h": "node_embedding",
    "embedding_e": "edge_embedding",
    "MLP_layer.FC_layers.0": "head.0",
    "MLP_layer.FC_layers.1": "head.2",
    "MLP_layer.FC_layers.2": "head.4",
}


def load_layer(
    state_dict: StateDict, kind: str, heads: int, *, residual: bool = True
) -> GraphTransformerLayer:
    """A layer with the weights of a published one.

    Args:
        state_dict: parameters and buffers under their published names.
        kind: ``"gt"``.
        heads: number of attention heads; it cannot be read from the weights.
        residual: whether the published layer adds its input; it cannot be read either.

    Returns:
        The layer, in evaluation mode, in the weights' precision.

    Raises:
        ValueError: if the kind or a name is unknown, or a name is missing; the message lists
            the names.
    """
    _check_kind(kind)
    layer = _empty_layer(state_dict, heads, residual)
    _load(layer, state_dict, _MODULES)
    return layer.eval()


def load_network(
    state_dict: StateDict,
    kind: str,
    heads: int,
    *,
    readout: str = "mean",
    residual: bool = True,
) -> GraphNetwork:
    """A network with the weights of a published one.

    Args:
        state_dict: parameters and buffers under their published names.
        kind: ``"gt"``.
        heads: number of attention heads.
        readout: ``"mean"`` or ``"sum"``; it cannot be read from the weights.
        residual: whether the published layers add their input.

    Returns:
        The network, in evaluation mode, in the weights' precision.

    Raises:
        ValueError: if the kind or a name is unknown, or a name is missing; the message lists
            the names.
    """
    _check_kind(kind)
    numbers = sorted({int(found[1]) for found in map(_LAYER.match, state_dict) if found})
    if not numbers or numbers != list(range(len(numbers))):
        raise ValueError(
            f"expected layers numbered from 0 (layers.0.attention.Q.weight, ...), found {numbers}"
        )
    parts = [
        {
            name.removeprefix(f"layers.{number}."): value
            for name, value in state_dict.items()
            if name.startswith(f"layers.{number}.")
        }
        for number in numbers
    ]
    required = [f"{module}.weight" for module in _NETWORK_MODULES]
    required += [f"layers.{number}.attention.Q.weight" for number in numbers]
    _require(required, state_dict)
    width = state_dict["embedding_h.weight"].size(1)
    network = GraphNetwork(
        [_empty_layer(part, heads, residual) for part in parts],
        num_node_types=state_dict["embedding_h.weight"].size(0),
        num_edge_types=state_dict["embedding_e.weight"].size(0),
        hidden_channels=width,
        out_channels=state_dict["MLP_layer.FC_layers.2.weight"].size(0),
        readout=readout,
    )
    modules = _NETWORK_MODULES | {
        f"layers.{number}.{theirs}": f"layers.{number}.{ours}"
        for number in numbers
        for theirs, ours in _MODULES.items()
    }
    _load(network, state_dict, modules)
    return network.eval()


_LAYER = re.compile(r"layers\.(\d+)\.")


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")


def _empty_layer(state_dict: StateDict, heads: int, residual: bool) -> GraphTransformerLayer:
    _require(["attention.Q.weight"], state_dict)
    return GraphTransformerLayer(
        state_dict["attention.Q.weight"].size(0),
        heads,
        residual=residual,
        batch_norm=any(name.startswith("batch_norm") for name in state_dict),
        layer_norm=any(name.startswith("layer_norm") for name in state_dict),
        use_bias="attention.Q.bias" in state_dict,
    )


def _load(module: torch.nn.Module, state_dict: StateDict, modules: Mapping[str, str]) -> None:
    """Load published names into a module of ours, every name used exactly once."""
    theirs_of = {ours: theirs for theirs, ours in modules.items()}
    expected = {
        f"{theirs_of[owner]}.{parameter}": f"{owner}.{parameter}"
        for owner, _, parameter in (name.rpartition(".") for name in module.state_dict())
    }
    unknown = [name for name in state_dict if name not in expected]
    if unknown:
        raise ValueError(
            f"unknown names in the published weights: {', '.join(unknown)}; expected "
            f"{', '.join(expected)}"
        )
    _require(expected, state_dict)
    weights = {ours: state_dict[theirs] for theirs, ours in expected.items()}
    module.to(next(iter(weights.values())).dtype)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"published weights of an unexpected shape: {error}") from None


def _require(names: Iterable[str], state_dict: StateDict) -> None:
    missing = [name for name in names if name not in state_dict]
    if missing:
        raise ValueError(f"missing in the published weights: {', '.join(missing)}")
