"""How a model is called on a batch, when nobody says how."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch_geometric.data import Data, HeteroData

Forward = Callable[[nn.Module, Any], object]
"""Called as ``forward(model, batch)``; runs the model on a batch."""


def call(model: nn.Module, batch: Any) -> object:
    """Call a model by the names of its parameters, or with the whole batch.

    A model whose ``forward`` has only required parameters that a PyG batch carries gets these by
    name (``x, edge_index, edge_attr, batch, batch_size, ...``; of a heterogeneous one ``x_dict,
    edge_index_dict, ...``), along with optional ones that it carries; a model with one required
    parameter of another name, or ``batch``, gets the batch.

    Raises:
        TypeError: if it is not clear how to call the model; says what to pass as ``forward``.
    """
    advice = "pass forward=lambda model, batch: model(...)"
    kind, inner = type(batch).__name__, model
    named = _named(inner)
    while not named and isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module  # of DataParallel, AveragedModel and others that wrap one
        named = _named(inner)
    required = [p.name for p in named if p.default is p.empty]
    carried = {p.name: _carried(batch, p.name) for p in named}
    carried = {name: value for name, value in carried.items() if value is not None}
    # A single parameter called "batch" means the whole batch, not its vector of that name.
    if len(required) == 1 and (required == ["batch"] or required[0] not in carried):
        return model(batch)
    if required and set(required) <= set(carried):
        try:
            return model(**carried)
        except Exception as error:
            error.add_note(
                f"{type(model).__name__} was called with {', '.join(carried)}, which the batch "
                f"carries; to call it otherwise, {advice}"
            )
            raise
    if isinstance(batch, HeteroData):
        advice = "pass forward=lambda model, batch: model(batch.x_dict, batch.edge_index_dict), say"
    if not required:
        reason = f"it names no required argument, so what it wants of a {kind} is not known"
    elif isinstance(batch, HeteroData):
        reason = f"it needs {', '.join(required)}, and a {kind} keeps its features by type"
    else:
        missing = ", ".join(name for name in required if name not in carried)
        reason = (
            f"it needs {', '.join(required)}, of which a batch ({kind}) does not carry {missing}"
        )
    raise TypeError(f"{type(model).__name__}.forward: {reason}: {advice}")


def _named(model: nn.Module) -> list[inspect.Parameter]:
    parameters = inspect.signature(model.forward).parameters.values()
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _carried(batch: Any, name: str) -> Any:
    """What a batch of PyG has under a name, or None."""
    if isinstance(batch, HeteroData):
        return batch.collect(name[:-5]) if name.endswith("_dict") else None
    if not isinstance(batch, Data):
        return None
    # Batches of graphs know their number without storing it.
    return getattr(batch, name, None) if name == "batch_size" or name in batch else None
