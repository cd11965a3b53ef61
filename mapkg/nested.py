"""Structures of tensors, as models take and return them."""

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData


def map_tensors(value: Any, function: Callable[[Tensor], Any], _seen: dict | None = None) -> Any:
    """The same structure with what a function makes of each tensor in its place.

    Goes into tuples, lists, dicts, PyG's data, dataclasses, and other objects that have a tensor
    as an attribute; what is none of these is handed on. The structure given is not changed.

    Args:
        value: a tensor or a structure.
        function: from a tensor to what replaces it.
    """
    seen = {} if _seen is None else _seen  # copies of objects, which may hold one another
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        items = [map_tensors(item, function, seen) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Data | HeteroData):
        return copy.copy(value).apply(function)
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, dict):
        kept = seen[id(value)] = copy.copy(value)
        for key, item in value.items():
            kept[key] = map_tensors(item, function, seen)
        return kept
    if isinstance(value, nn.Module | type):
        return value
    if is_dataclass(value):
        names = [field.name for field in fields(value)]
    else:
        names = list(getattr(value, "__dict__", ()))
        if not any(isinstance(getattr(value, name), Tensor) for name in names):
            return value
    kept = seen[id(value)] = copy.copy(value)
    for name in names:
        object.__setattr__(kept, name, map_tensors(getattr(value, name), function, seen))
    return kept
