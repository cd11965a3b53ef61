"""How a model is called on a batch when nobody says how, and structures of tensors."""

import copy
import inspect
from collections.abc import Callable, MutableMapping, MutableSequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData
from torch_geometric.data.data import BaseData

Forward = Callable[[nn.Module, Any], object]
"""Called as ``forward(model, batch)``; runs the model on a batch."""


def call(model: nn.Module, batch: Any) -> object:
    """Call a model by the names of its parameters, or with the whole batch.

    A model whose ``forward`` has only required parameters that a PyG batch carries gets these by
    name (``x, edge_index, edge_attr, batch, batch_size, ...``; of a heterogeneous one ``x_dict,
    edge_index_dict, ...``), along with optional ones that it carries; a model with one required
    parameter of another name, or ``batch``, gets the batch. TypeError if neither is clear.
    """
    advice, kind = "pass forward=lambda model, batch: model(...)", type(batch).__name__
    named = _named(model)
    required = [p.name for p in named if p.default is p.empty]
    values = {p.name: _carried(batch, p.name, p.default is p.empty) for p in named}
    carried = {name: value for name, value in values.items() if value is not None}
    # A single parameter called "batch" means the whole batch, not its vector of that name.
    whole = len(required) == 1 and (required == ["batch"] or required[0] not in carried)
    if whole or (required and set(required) <= set(carried)):
        try:
            return model(batch) if whole else model(**carried)
        except Exception as error:
            given = f"{', '.join(carried)}, which the batch carries"
            given = f"the whole batch, a {kind}" if whole else given
            error.add_note(f"{type(model).__name__} was called with {given}; otherwise, {advice}")
            raise
    if isinstance(batch, HeteroData):
        advice = "pass forward=lambda model, batch: model(batch.x_dict, batch.edge_index_dict), say"
    reason = f"it names no required argument, so what it wants of a {kind} is not known"
    if required:
        missing = ", ".join(name for name in required if name not in carried)
        reason = f"it needs {', '.join(required)}, of which a {kind} does not carry {missing}"
    raise TypeError(f"{type(model).__name__}.forward: {reason}: {advice}")


def call_on_copy(model: nn.Module, batch: Any) -> Any:
    """``call`` on a copy of the batch, since a model may write into what it is given."""
    return call(model, map_tensors(batch, torch.clone))


def map_tensors(value: Any, function: Callable[[Tensor], Any], _seen: dict | None = None) -> Any:
    """The same structure with what a function makes of each tensor in its place.

    Goes into sequences, mappings, PyG's data, dataclasses, and other objects that have a tensor,
    or a list, tuple or dict with one, as an attribute; what is none of these is handed on. The
    structure given is not changed.
    """
    seen = {} if _seen is None else _seen  # copies of objects, which may hold one another
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        items = [map_tensors(item, function, seen) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, BaseData):
        return copy.copy(value).apply(lambda x: x if isinstance(x, str) else function(x))
    if id(value) in seen or isinstance(value, nn.Module | type):
        return seen.get(id(value), value)
    if isinstance(value, MutableMapping | MutableSequence):
        kept = seen[id(value)] = copy.copy(value)
        pairs = value.items() if isinstance(value, MutableMapping) else enumerate(value)
        for key, item in pairs:
            kept[key] = map_tensors(item, function, seen)
        return kept
    slots = [name for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)]
    attributes = {name: getattr(value, name) for name in slots} | getattr(value, "__dict__", {})
    if is_dataclass(value):
        attributes = {field.name: getattr(value, field.name) for field in fields(value)}
    elif not any(map(_has_tensor, attributes.values())):
        return value
    kept = seen[id(value)] = copy.copy(value)
    for name, item in attributes.items():
        object.__setattr__(kept, name, map_tensors(item, function, seen))
    return kept


def _has_tensor(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value
    items = items if isinstance(value, dict | list | tuple) else [value]
    return any(isinstance(item, Tensor | BaseData) for item in items)


def _named(model: nn.Module) -> list[inspect.Parameter]:
    """Parameters by name; of DataParallel, AveragedModel, compiled models, what is inside."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    inner = getattr(model, "module", getattr(model, "_orig_mod", None))
    return _named(inner) if not named and isinstance(inner, nn.Module) else named


def _carried(batch: Any, name: str, required: bool) -> Any:
    """What a batch of PyG has under a name, or None."""
    if isinstance(batch, HeteroData):
        values = batch.collect(name[:-5], allow_empty=True) if name.endswith("_dict") else {}
        return values or None
    if not isinstance(batch, Data):
        return None
    if name == "batch_size":  # batches of graphs know it; a sampled one means its seed nodes
        return getattr(batch, name, None) if required or batch.batch is not None else None
    return getattr(batch, name) if name in batch else None
