"""Forward passes over a data set: predictions, metrics, BatchNorm statistics."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
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
    passes = scan(model, batches(graphs, batch_size), "", forward=predict)
    return _joined([(seen[""], targets(batch)) for batch, seen in passes])


def _joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    predicted, target = zip(*pairs, strict=True)
    return torch.cat(predicted), torch.cat(target)


def calibrate_batch_norm(
    model: nn.Module, graphs: Graphs, *, batch_size: int | None = None
) -> nn.Module:
    """Set BatchNorm statistics to those of the data, without a change of weights or of modes.

    Args:
        model: changed in place; dropout is off.
        graphs: usually the training split.
        batch_size: None takes all graphs as one batch, for the statistics of the data. A number
            gives the mean over such batches, in which every layer normalizes as in training; it
            depends on the number.

    Returns:
        The model.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average

    def forward(model: nn.Module, batch: Any) -> None:
        for norm in norms:
            norm.train()
        predict(model, batch)

    try:
        for _ in scan(model, batches(graphs, batch_size or len(graphs)), (), forward=forward):
            pass
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model


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
