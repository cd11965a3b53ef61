"""How a model is called on a batch, when nobody says how."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch_geometric.data import Data, HeteroData

Forward = Callable[[nn.Module, Any], object]
"""Called as ``forward(model, batch)``; runs the model on a batch."""


def call(model: nn.Module, batch: Any) -> object:
    """Call a model by the names of its parameters, or with the whole batch.

    A model whose ``forward`` has only required parameters that a PyG batch carries gets these by
    name (``x, edge_index, edge_attr, batch, batch_size, ...``), along with optional ones that it
    carries; a model with one required parameter of another name, or ``batch``, gets the batch.

    Raises:
        TypeError: if it is not clear how to call the model; says what to pass as ``forward``.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in named if p.default is p.empty]
    carried = _carried(batch, [p.name for p in named]) if isinstance(batch, Data) else {}
    # A single parameter called "batch" means the whole batch, not its vector of that name.
    if len(required) == 1 and (required == ["batch"] or required[0] not in carried):
        return model(batch)
    if required and set(required) <= set(carried):
        return model(**carried)
    kind = type(batch).__name__
    advice = "pass forward=lambda model, batch: model(...)"
    if isinstance(batch, HeteroData):
        reason = f"a {kind} keeps its features by type"
        advice = "pass forward=lambda model, batch: model(batch.x_dict, batch.edge_index_dict), say"
    elif not required:
        reason = f"it names no required argument, so what it wants of a {kind} is not known"
    else:
        missing = ", ".join(name for name in required if name not in carried)
        reason = (
            f"it needs {', '.join(required)}, of which a batch ({kind}) does not carry {missing}"
        )
    raise TypeError(f"{type(model).__name__}.forward: {reason}: {advice}")


def _carried(batch: Data, names: Iterable[str]) -> dict[str, Any]:
    stored = {name: batch[name] for name in names if name in batch}
    # Batches of graphs know their number without storing it.
    if "batch_size" in names and hasattr(batch, "batch_size"):
        stored["batch_size"] = batch.batch_size
    return stored
