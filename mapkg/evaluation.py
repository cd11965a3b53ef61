"""Forward passes over a data set: predictions, metrics, BatchNorm statistics."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from mapkg.hooks import scan
from mapkg.metrics import measure

Graphs = Sequence[Data]
"""What a model is run on."""


def evaluate(model: nn.Module, graphs: Graphs, *, loss: str = "l1", batch_size: int = 128) -> float:
    """The mean loss over all labelled targets, in evaluation mode.

    Args:
        model, graphs, loss, batch_size: as for ``score``.
    """
    return score(model, graphs, loss=loss, batch_size=batch_size)[{"l1": "mae"}.get(loss, loss)]


def score(
    model: nn.Module, graphs: Graphs, *, loss: str = "l1", batch_size: int = 128
) -> dict[str, float]:
    """The metrics of a model, in evaluation mode.

    Args:
        model, graphs, batch_size: as for ``predictions``.
        loss: what the model was trained on, ``"l1"`` or ``"bce"``.

    Returns:
        As ``metrics.measure``, so ``mae``, or ``bce``, ``roc_auc`` and ``accuracy``.
    """
    return measure(*predictions(model, graphs, batch_size=batch_size), loss)


def joined_score(pairs: Sequence[tuple[Tensor, Tensor]], loss: str) -> dict[str, float]:
    """The metrics of predictions and targets that came batch by batch.

    Args:
        pairs: of each batch, as ``predict`` and ``targets`` give them.
        loss: as for ``score``.
    """
    return measure(*_joined(pairs), loss)


def predictions(
    model: nn.Module, graphs: Graphs, *, batch_size: int = 128
) -> tuple[Float[Tensor, "rows targets"], Float[Tensor, "rows targets"]]:
    """Predictions and targets of all graphs in turn, in evaluation mode.

    Args:
        model: as for ``fit``.
        graphs: with targets ``y``, shape [1, targets] each, NaN where unlabelled.
        batch_size: graphs per forward pass; the result does not depend on it.
    """
    check_targets(graphs)
    passes = scan(model, batches(graphs, batch_size), "", forward=predict)
    return _joined([(seen[""], targets(batch)) for batch, seen in passes])


def _joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    predicted, target = zip(*pairs, strict=True)
    return torch.cat(predicted), torch.cat(target)


def calibrate_batch_norm(model: nn.Module, graphs: Graphs, *, batch_size: int = 128) -> nn.Module:
    """Set BatchNorm statistics to those of the data, without a change of weights.

    One norm after another, in the order in which they run: mean and variance of all rows that
    reach it through the norms that are set already. Dropout is off. This gives an untrained model
    the normalization that it would see in training, were all graphs one batch.

    Args:
        model: changed in place; every submodule keeps its mode.
        graphs: usually the training split.
        batch_size: graphs per forward pass; the result does not depend on it.

    Returns:
        The model.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    done: set[nn.Module] = set()
    while True:
        found: dict[str, Any] = {}

        def see(norm: nn.Module, inputs: tuple[Tensor], found: dict[str, Any] = found) -> None:
            if found.setdefault("norm", norm) is norm:
                rows = inputs[0].detach().double().transpose(0, 1).flatten(1)
                found["number"] = found.get("number", 0) + rows.size(1)
                found["sum"] = found.get("sum", 0) + rows.sum(dim=1)
                found["squares"] = found.get("squares", 0) + rows.square().sum(dim=1)

        handles = [norm.register_forward_pre_hook(see) for norm in norms if norm not in done]
        try:
            for _ in scan(model, batches(graphs, batch_size), (), forward=predict):
                pass
        finally:
            for handle in handles:
                handle.remove()
        if not found:
            return model
        norm, number, mean = found["norm"], found["number"], found["sum"] / found["number"]
        variance = (found["squares"] - number * mean.square()) / max(number - 1, 1)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance.clamp(min=0))
        done.add(norm)


def batches(
    graphs: Graphs, batch_size: int, device: str | torch.device = "cpu", *, shuffle: bool = False
) -> Iterator[Any]:
    """PyG batches of graphs.

    Args:
        graphs: what to pass through a model.
        batch_size: graphs of a batch.
        device: where the batches go.
        shuffle: whether in an order drawn from torch's generator.
    """
    for batch in DataLoader(graphs, batch_size, shuffle=shuffle):
        yield batch.to(device)


def predict(model: nn.Module, batch: Any) -> Tensor:
    """The model's predictions for a PyG batch, shape [graphs, targets]."""
    return model(batch.x, batch.edge_index, batch.edge_attr, batch.batch, batch.num_graphs)


def targets(batch: Any) -> Tensor:
    """The targets of a PyG batch, in the shape of its predictions."""
    return batch.y


def check_targets(graphs: Graphs) -> None:
    """Raise if a graph has no target."""
    for place, graph in enumerate(graphs):
        if graph.y is None:
            raise ValueError(f"graph {place} has no target y, of shape [1, targets]")
