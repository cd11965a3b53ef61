"""Train networks, by the schedule of their configuration; stop and go on."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from mapkg.evaluation import Graphs, batches, evaluate, predict, targets
from mapkg.hooks import evaluating
from mapkg.metrics import losses
from mapkg.models.config import Config
from studies.checkpoint import differences, read_state, write_state
from studies.data import Splits
from studies.provenance import commit, versions

Observer = Callable[[nn.Module, int], list[dict[str, Any]]]
"""Called with the model in evaluation mode and the number of finished epochs."""

STATE_FILE = "state.safetensors"
"""What ``fit`` resumes from, in the folder it is given."""

_EPOCH_STRIDE = 1_000_003  # a prime: keeps the seeds of all runs' epochs apart


@dataclass
class Fit:
    """What training gave.

    Attributes:
        history: one row per epoch: epoch, train_loss, val_loss, lr (of that epoch), seconds.
        observations: the rows that the observer returned, one DataFrame.
        best_epoch: the epoch with the least validation loss; 0 before the first epoch.
        best_weights, last_weights: state dicts of that epoch and of the last one.
        stop_reason: ``"min lr"``, ``"max epochs"`` or ``"time limit"``.
        commit, versions: of the process that started the run.
    """

    history: pd.DataFrame
    observations: pd.DataFrame
    best_epoch: int
    best_weights: dict[str, Tensor]
    last_weights: dict[str, Tensor]
    stop_reason: str
    commit: str
    versions: str


@dataclass
class _Progress:
    """The part of a run's state that is plain values."""

    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = float("inf")
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    observations: list[dict[str, Any]] = field(default_factory=list)
    commit: str = field(default_factory=commit)
    versions: str = field(default_factory=versions)


def seed_all(seed: int) -> None:
    """Seed torch on every device, before a model is built."""
    torch.manual_seed(seed)


def fit(
    model: nn.Module,
    splits: Splits,
    config: Config,
    *,
    seed: int,
    folder: Path | str | None = None,
    device: str | torch.device = "cpu",
    observe: Observer | None = None,
    progress: bool = True,
) -> Fit:
    """Train a model by the schedule of its configuration.

    Adam on the mean loss over labelled targets; the learning rate is multiplied by
    ``lr_factor`` when the validation loss has not fallen for ``lr_patience`` epochs; training
    stops when it is below ``min_lr``, after ``max_epochs``, or after ``max_hours``. An epoch's
    order of molecules and its dropout depend on the seed and the epoch alone, so a run that was
    stopped and resumed gives the same weights as one that was not.

    Args:
        model: called as ``model(x, edge_index, edge_attr, batch, batch_size)``; trained in
            place, and left with its last weights.
        splits: the data; train and val are used.
        config: schedule and batch size.
        seed: of order and dropout. The initial weights are the model's own.
        folder: where the run's state is written after each epoch. If it holds the state of
            the same run, training goes on from there; more epochs may be asked for then.
        device: where to train.
        observe: called before the first epoch and after each one, in evaluation mode without
            gradients; the rows it returns are kept with the run's state.
        progress: whether to show a progress bar on stderr.

    Raises:
        FloatingPointError: if the training or validation loss is not finite; names epoch and
            step. The state of the last finished epoch stays in the folder.
        ValueError: if the folder holds the state of another run, or a split is empty or has
            no label.

    Source: massive-activations paper, training script of its code.
    """
    for name in ("train", "val"):
        if len(getattr(splits, name)) == 0:
            raise ValueError(f"the {name} split is empty; training needs at least one graph")
    device = torch.device(device)
    model.to(device)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    scheduler = ReduceLROnPlateau(optimizer, factor=config.lr_factor, patience=config.lr_patience)
    identity = _identity(config, splits, seed)
    path = None if folder is None else Path(folder) / STATE_FILE
    done = _Progress()
    best_weights = _copy(model)
    if path is not None and path.is_file():
        done, best_weights = _resume(path, identity, model, optimizer, scheduler)
        print(f"resumed after epoch {done.epoch} from {path}", file=sys.stderr)
    elif observe is not None:
        done.observations += _observed(model, observe, 0)

    stop_reason = "max epochs"
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        tqdm(
            total=config.max_epochs,
            initial=done.epoch,
            desc="epochs",
            file=sys.stderr,
            disable=not progress,
        ) as bar,
    ):
        while done.epoch < config.max_epochs:
            if optimizer.param_groups[0]["lr"] < config.min_lr:
                stop_reason = "min lr"
                break
            if done.seconds >= config.max_hours * 3600:
                stop_reason = "time limit"
                break
            start = time.perf_counter()
            epoch = done.epoch + 1
            lr = optimizer.param_groups[0]["lr"]
            train_loss = _train_epoch(model, splits.train, config, optimizer, seed, epoch, path)
            val_loss = evaluate(model, splits.val, loss=config.loss, batch_size=config.batch_size)
            _check_finite("validation", val_loss, f"epoch {epoch}", epoch, config, path)
            scheduler.step(val_loss)
            if val_loss < done.best_loss:
                done.best_loss, done.best_epoch = val_loss, epoch
                best_weights = _copy(model)
            if observe is not None:
                done.observations += _observed(model, observe, epoch)
            seconds = time.perf_counter() - start
            done.epoch, done.seconds = epoch, done.seconds + seconds
            done.history.append(
                {
                    "epoch": epoch,
                    "train_loss": train_loss,
                    "val_loss": val_loss,
                    "lr": lr,
                    "seconds": seconds,
                }
            )
            if path is not None:
                _save_state(path, identity, done, model, best_weights, optimizer, scheduler)
            bar.update()
            bar.set_postfix(train=f"{train_loss:.4f}", val=f"{val_loss:.4f}", lr=f"{lr:.1e}")
    model.eval()
    return Fit(
        history=pd.DataFrame(done.history),
        observations=pd.DataFrame(done.observations),
        best_epoch=done.best_epoch,
        best_weights=best_weights,
        last_weights=_copy(model),
        stop_reason=stop_reason,
        commit=done.commit,
        versions=done.versions,
    )


def _train_epoch(
    model: nn.Module,
    graphs: Graphs,
    config: Config,
    optimizer: torch.optim.Optimizer,
    seed: int,
    epoch: int,
    path: Path | None,
) -> float:
    torch.manual_seed(seed + _EPOCH_STRIDE * epoch)
    model.train()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    shuffled = batches(graphs, config.batch_size, device, shuffle=True)
    for step, batch in enumerate(shuffled, start=1):
        values = losses(predict(model, batch), targets(batch), config.loss)
        if values.numel() == 0:
            continue  # a batch without a label teaches nothing
        loss = values.mean()
        value = loss.item()
        _check_finite("training", value, f"epoch {epoch}, step {step}", epoch, config, path)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, count = total + value * values.numel(), count + values.numel()
    if count == 0:
        raise ValueError(
            "every training target is NaN (unlabelled); training needs at least one label"
        )
    return total / count


def _check_finite(
    which: str, loss: float, where: str, epoch: int, config: Config, path: Path | None
) -> None:
    if math.isfinite(loss):
        return
    kept = f"epoch {epoch - 1} is kept in {path}" if path and epoch > 1 else "none is kept"
    raise FloatingPointError(
        f"the {which} loss is {loss} at {where}; last good checkpoint: {kept}. Lower the "
        f"learning rate (lr={config.lr:g}) or look for bad values in the data"
    )


@torch.no_grad()
def _observed(model: nn.Module, observe: Observer, epoch: int) -> list[dict[str, Any]]:
    with evaluating(model):
        rows = observe(model, epoch)
    return rows


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _identity(config: Config, splits: Splits, seed: int) -> dict[str, Any]:
    """What must agree for a run to be the same run; its length may differ."""
    settings = config.to_dict()
    for length in ("max_epochs", "max_hours"):
        del settings[length]
    sizes = {"train": len(splits.train), "val": len(splits.val)}
    return {"config": settings, "seed": seed, "data": splits.description.title, **sizes}


def _save_state(path, identity, done, model, best_weights, optimizer, scheduler) -> None:
    adam = optimizer.state_dict()
    write_state(
        path,
        tensors={
            "model": model.state_dict(),
            "best": best_weights,
            "adam": {
                f"{index}.{name}": value
                for index, state in adam["state"].items()
                for name, value in state.items()
            },
        },
        values={
            "identity": identity,
            "progress": vars(done),
            "param_groups": adam["param_groups"],
            "scheduler": scheduler.state_dict(),
        },
    )


def _resume(path, identity, model, optimizer, scheduler) -> tuple[_Progress, dict[str, Tensor]]:
    tensors, values = read_state(path)
    stored = values["identity"]
    if stored != identity:
        stored, asked = (
            {**run["config"], "config.seed": run["config"]["seed"], **run, "config": None}
            for run in (stored, identity)
        )
        raise ValueError(
            f"{path} holds the state of another run: {differences(stored, asked)}. "
            "Choose another folder, or remove the file to start afresh"
        )
    model.load_state_dict(tensors["model"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors["adam"].items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})
    scheduler.load_state_dict(values["scheduler"])
    return _Progress(**values["progress"]), tensors["best"]
