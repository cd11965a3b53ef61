"""Read checkpoints of the published repositories: their parameter names, our modules.

What weights do not show are arguments: ``heads``, ``residual``, ``readout``, and ``project``, which
is False for a network whose published configuration has ``"O_linear": false``.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from mapkg.models.edge_attention import GraphTransformerLayer, NodeStreamLayer, ResidualBlock
from mapkg.models.network import GraphNetwork
from studies.extras import DiffusionKernel, FakeEdgeShare, FullGraphLayer, FullGraphNetwork

KINDS = {"gt": "mean", "graphit": "sum", "san": "sum"}
"""Layer kinds that can be read, and the readout of their published networks on molecules."""

StateDict = Mapping[str, Tensor]
Layer = GraphTransformerLayer | NodeStreamLayer

# Published name (h: node stream, e: edge stream) -> ours, without the parameter's own name.
_ATTENTION = {"Q": "query", "K": "key", "V": "value"}
_ATTENTION |= {"k_bias": "key_term", "e_bias": "edge_term", "v_bias": "value_term"}
_FAKE = {"Q_2": "fake_query", "K_2": "fake_key", "E_2": "fake_edge"}
_BLOCK = {"O_{}": "project", "FFN_{}_layer1": "expand", "FFN_{}_layer2": "contract"}
_BLOCK |= {f"{kind}_norm{n}_{{}}": f"{kind}_norm{n}" for kind in ("batch", "layer") for n in "12"}
_NETWORK = {"": "edge_factor", "embedding_h": "node_embedding", "embedding_e": "edge_embedding"}
_NETWORK |= {f"MLP_layer.FC_layers.{number}": f"head.{2 * number}" for number in range(3)}
# The gamma of the edge factor is a parameter of the published network itself.

_ATTENTION_NAMES = {"gt": ["attention"], "graphit": ["attention_h"]}
_ATTENTION_NAMES["san"] = ["attention", "attention_h"]  # in its two repositories
_LAYER = re.compile(r"layers\.(\d+)\.")
_TABLES = re.compile(r"(embedding_.)\.(?:atom|bond)_embedding_list\.(\d+)\.weight")


def load_layer(
    state_dict: StateDict, kind: str, heads: int, *, residual: bool = True, project: bool = True
) -> Layer:
    """A published layer in evaluation mode, in the weights' precision."""
    state_dict = _checked(state_dict, kind)
    attention = _attention_name(state_dict, kind)
    layer = _empty_layer(state_dict, kind, attention, heads, residual)
    _load(layer, state_dict, _layer_modules(kind, attention))
    return _finished(layer, project)


def load_network(
    state_dict: StateDict,
    kind: str,
    heads: int,
    *,
    readout: str | None = None,
    residual: bool = True,
    project: bool = True,
    gamma: float | None = None,
) -> GraphNetwork:
    """A published network in evaluation mode; full-graph SAN needs a ``gamma`` unless learned."""
    state_dict, sizes = _joined_tables(_checked(state_dict, kind))
    numbers = sorted({int(found[1]) for found in map(_LAYER.match, state_dict) if found})
    if not numbers or numbers != list(range(len(numbers))):
        raise ValueError(
            "expected layers numbered from 0 (layers.0.attention.Q.weight, ...), found "
            f"{numbers}; the names that are there: {_some(state_dict)}"
        )
    prefixes = [f"layers.{number}." for number in numbers]
    parts = [{k[len(p) :]: v for k, v in state_dict.items() if k.startswith(p)} for p in prefixes]
    attention = _attention_name(parts[0], kind)
    required = [f"{module}.weight" for module in _NETWORK if module]
    _require([*required, *(f"{prefix}{attention}.Q.weight" for prefix in prefixes)], state_dict)
    layers = [_empty_layer(part, kind, attention, heads, residual) for part in parts]
    width, embeddings = len(parts[0][f"{attention}.Q.weight"]), ("embedding_h", "embedding_e")
    tables = {name: state_dict[f"{name}.weight"] for name in embeddings}
    for name, table in tables.items():
        if (found := table.size(1)) != width:
            raise ValueError(
                f"{name}: expected {width} channels, as the layers have, got {found}; the "
                "published GT on TOX21 joins one embedding per feature, which is not built here"
            )
    is_full = isinstance(layers[0], FullGraphLayer)
    needs_gamma = is_full and kind == "san" and "gamma" not in state_dict
    if needs_gamma != (gamma is not None):
        expected = "a value, the weights have none" if needs_gamma else "None, it has no use"
        raise ValueError(f"gamma: expected {expected}, got {gamma!r}")
    edge_factor = FakeEdgeShare(gamma) if kind == "san" else DiffusionKernel()
    network_type = partial(FullGraphNetwork, edge_factor=edge_factor) if is_full else GraphNetwork
    nodes, edges = (sizes.get(name, len(table)) for name, table in tables.items())
    network = network_type(
        layers,
        **dict(num_node_types=nodes, num_edge_types=edges, hidden_channels=width),
        out_channels=len(state_dict["MLP_layer.FC_layers.2.weight"]),
        readout=readout or KINDS[kind],
    )
    of_layers = {
        f"{prefix}{theirs}": f"{prefix}{ours}"
        for prefix in prefixes
        for theirs, ours in _layer_modules(kind, attention).items()
    }
    _load(network, state_dict, _NETWORK | of_layers)
    return _finished(network, project)


def _finished(module: nn.Module, project: bool) -> nn.Module:
    for block in module.modules():
        if isinstance(block, ResidualBlock) and not project:
            block.project = nn.Identity()
    return module.eval()


def _checked(state_dict: StateDict, kind: str) -> StateDict:
    """Names and tensors, without the gamma of SAN that is stored in every layer, too."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {tuple(KINDS)}, got {kind!r}")
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "state_dict: expected a dict from names to tensors, as torch.load(path) gives it, got "
            f"{type(state_dict).__name__}"
        )
    if wrong := [name for name, value in state_dict.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"expected a dict from names to tensors; {wrong[0]!r} is none. The names that are "
            f"there: {_some(state_dict)}; pass the dict that holds the weights"
        )
    for prefix in ("module.", "_orig_mod."):
        if state_dict and all(name.startswith(prefix) for name in state_dict):
            raise ValueError(
                f"all names begin with {prefix!r}: {_some(state_dict)}; expected them without, as "
                f"{{name.removeprefix({prefix!r}): value for name, value in state_dict.items()}}"
            )
    if kind != "san":
        return state_dict
    full = any(name.endswith(".Q_2.weight") for name in state_dict)
    return {
        name: value
        for name, value in state_dict.items()
        if not name.endswith("attention_h.gamma") and (full or name != "gamma")
    }


def _some(names: Iterable[str]) -> str:
    names = list(map(str, names))
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)


def _joined_tables(state_dict: StateDict) -> tuple[StateDict, dict[str, tuple[int, ...]]]:
    """The tables of an encoder of Open Graph Benchmark as one table, and their sizes."""
    joined, tables = dict(state_dict), defaultdict(dict)
    for match in filter(None, map(_TABLES.fullmatch, state_dict)):
        tables[match[1]][int(match[2])] = joined.pop(match[0])
    parts = {name: [of[number] for number in sorted(of)] for name, of in tables.items()}
    joined |= {f"{name}.weight": torch.cat(of) for name, of in parts.items()}
    return joined, {name: tuple(map(len, of)) for name, of in parts.items()}


def _attention_name(state_dict: StateDict, kind: str) -> str:
    names = _ATTENTION_NAMES[kind]
    return next((name for name in names if f"{name}.Q.weight" in state_dict), names[0])


def _layer_modules(kind: str, attention: str) -> dict[str, str]:
    """From published names of a layer's modules to ours."""
    maps = _ATTENTION | ({"proj_e": "edge"} if kind == "gt" else {"E": "edge", **_FAKE})
    streams = {"h": "node", "e": "edge"} if kind == "gt" else {"h": "node"}
    return {f"{attention}.{theirs}": f"attention.{ours}" for theirs, ours in maps.items()} | {
        theirs.format(letter): f"{stream}_block.{ours}"
        for letter, stream in streams.items()
        for theirs, ours in _BLOCK.items()
    }


def _empty_layer(
    state_dict: StateDict, kind: str, attention: str, heads: int, residual: bool
) -> Layer:
    _require([f"{attention}.Q.weight"], state_dict)
    sparse = GraphTransformerLayer if kind == "gt" else NodeStreamLayer
    layer_type = FullGraphLayer if f"{attention}.Q_2.weight" in state_dict else sparse
    norms = ("batch_norm", "layer_norm")
    return layer_type(
        len(state_dict[f"{attention}.Q.weight"]),
        heads,
        **{norm: any(name.startswith(norm) for name in state_dict) for norm in norms},
        residual=residual,
        use_bias=f"{attention}.Q.bias" in state_dict,
        explicit_bias="published" if f"{attention}.k_bias" in state_dict else "none",
    )


def _load(module: nn.Module, state_dict: StateDict, modules: Mapping[str, str]) -> None:
    """Load published names into a module of ours, every name used exactly once."""
    theirs_of = {ours: theirs for theirs, ours in modules.items()}
    own, expected = module.state_dict(), {}
    for name in own:
        owner, _, parameter = name.rpartition(".")
        # A parameter that is no module's there, as those of the Explicit Bias Term, has its name.
        theirs = theirs_of.get(name) or f"{theirs_of[owner]}.{parameter}".removeprefix(".")
        expected[theirs] = name
    if unknown := [name for name in state_dict if name not in expected]:
        raise ValueError(
            f"unknown names in the published weights: {', '.join(unknown)}; expected "
            f"{', '.join(expected)}"
        )
    _require(expected, state_dict)
    weights = {ours: state_dict[theirs] for theirs, ours in expected.items()}
    for name in weights:
        if name.endswith("_term") and weights[name].numel() == own[name].numel():
            weights[name] = weights[name].reshape(own[name].shape)  # [H, d, 1] or [H, 1, d]
    module.to(next(iter(weights.values())).dtype)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"published weights of an unexpected shape: {error}") from None


def _require(names: Iterable[str], state_dict: StateDict) -> None:
    if missing := [name for name in names if name not in state_dict]:
        raise ValueError(f"missing in the published weights: {', '.join(missing)}")
