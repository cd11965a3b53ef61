"""Train a network on graphs, on the nodes of a graph, or on trees; stop and go on."""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from mapkg.hooks import evaluating
from mapkg.models.config import Config
from studies.checkpoint import Fit, read_state, refuse_another_run, write_state
from studies.data import NodesOfGraph, Splits, Trees
from studies.files import alone, commit, versions
from studies.published import EPOCH_STRIDE, Schedule
from studies.tasks import GraphTask, NodeTask, Task, TreeTask
from studies.train_stacked import fit_stacked

Observer = Callable[[nn.Module, int], list[dict[str, Any]]]
"""Called with the model in evaluation mode and the number of finished epochs."""

STATE_FILE = "state.safetensors"

_GAIN = 1e-4  # by which the value that is watched must fall not to count for ``patience``


@dataclass
class _Progress:
    """The part of a run's state that is plain values."""

    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf
    since_gain: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    observations: list[dict[str, Any]] = field(default_factory=list)
    commit: str = field(default_factory=commit)
    versions: str = field(default_factory=versions)


def seed_all(seed: int) -> None:
    """Seed torch on every device, before a model is built."""
    torch.manual_seed(seed)


def fit(
    model: nn.Module | Callable[[Config], nn.Module],
    task: Task | Splits,
    schedule: Schedule | Config | None = None,
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    folder: Path | str | None = None,
    device: str | torch.device = "cpu",
    observe: Observer | None = None,
    progress: bool = True,
    **stacked: Any,
) -> Fit:
    """Train a model in place; stopped and resumed it gets the same weights as in one go.

    Args:
        model: for several ``seeds``, see ``fit_stacked``, what gives an untrained one of a Config.
        task: what to train on; or splits, those of graphs with a Config as ``schedule``.
        seed: of order and dropout. The initial weights are the model's own.
        seeds: networks to be trained by the schedule of the Config, all at once.
        folder: where the state is written after each row of the history, and gone on from.
        observe: called before the first epoch and after each row; its rows are kept. Not for
            ``seeds``.
        **stacked: settings of ``fit_stacked``, for ``seeds``.
    """
    if seeds is None and stacked:
        raise TypeError(f"{', '.join(stacked)}: known with seeds= only, got no seeds")
    task = task if isinstance(task, Task) else _task(task, schedule)
    for fault in task.faults(["test"] if seeds is not None else []):
        raise ValueError(fault)
    if isinstance(task, GraphTask) and not isinstance(schedule, Schedule):
        schedule = Schedule.of(task.config)
    schedule = Schedule() if schedule is None else schedule
    if seeds is not None:
        if not isinstance(task, GraphTask):
            raise ValueError(
                "seeds: expected lists of graphs and a Config; networks for NodesOfGraph and trees "
                "are trained one after the other, with seed=, which takes a CPU less time"
            )
        if seed or observe is not None or schedule != Schedule.of(task.config):
            raise ValueError(
                "seeds: expected no seed= or observe=, and the schedule of the Config, got others; "
                "change the Config, record_epochs= or watch="
            )
        settings = dict(seeds=seeds, folder=folder, device=device, progress=progress, **stacked)
        with alone(folder):
            return fit_stacked(model, task.splits, task.config, **settings)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a network, got {type(model).__name__}; what builds one needs seeds="
        )
    if schedule.epochs == 0 and not isinstance(task, GraphTask):
        raise ValueError("epochs: expected 1 or more, got 0")
    with alone(folder):
        run = _Run(model, task, schedule, seed, folder, torch.device(device))
        return run.fit(observe, progress)


def _task(splits: Splits, schedule: Schedule | Config | None) -> Task:
    kinds = ((NodesOfGraph, NodeTask), (Trees, TreeTask))
    kind = next((made for of, made in kinds if isinstance(splits.train, of)), GraphTask)
    if isinstance(schedule, Config) != (kind is GraphTask):
        wanted = "a Config, which names the loss of" if kind is GraphTask else "a Schedule for"
        raise ValueError(
            f"schedule: expected {wanted} {kind.__name__.removesuffix('Task').lower()}s, which "
            f"{splits.description.title} has, got {type(schedule).__name__}"
        )
    return kind(splits, schedule) if kind is GraphTask else kind(splits)


class _Run:
    """A model on its way through a schedule."""

    def __init__(self, model, task, schedule, seed, folder, device):
        self.model, self.schedule, self.seed = model.to(device), schedule, seed
        self.task, self.device = task.to(device), device
        self.path = None if folder is None else Path(folder) / STATE_FILE
        adam = dict(lr=schedule.lr, weight_decay=schedule.weight_decay, **task.adam)
        self.optimizer = torch.optim.Adam(model.parameters(), **adam)
        patience = math.inf if schedule.lr_patience is None else schedule.lr_patience
        plateau = dict(factor=schedule.lr_factor, patience=patience, eps=0, **task.plateau)
        self.scheduler = ReduceLROnPlateau(self.optimizer, **plateau)
        self.done, self.best, self.random = _Progress(), self._weights(), None
        data, settings = task.splits, task.settings(schedule, model)
        self.identity = {"config": settings, "seed": seed, "data": data.description.title}
        self.identity |= {"train": len(data.train), "val": len(data.val)}

    def fit(self, observe: Observer | None, progress: bool) -> Fit:
        if self.path is not None and self.path.is_file():
            self.done = self._resume()
            print(f"resumed after epoch {self.done.epoch} from {self.path}", file=sys.stderr)
        else:
            self._observe(observe)
        done, is_cuda = self.done, self.device.type == "cuda"
        shown = dict(total=self.schedule.epochs, initial=done.epoch, disable=not progress)
        with (
            torch.random.fork_rng([self.device] if is_cuda else []),
            tqdm(desc="epochs", **shown) as bar,
        ):
            torch.manual_seed(self.seed)
            if self.random is not None:
                torch.set_rng_state(self.random["cpu"])
                if is_cuda:
                    torch.cuda.set_rng_state(self.random["cuda"], self.device)
            while not (stop_reason := self._reason_to_stop()):
                start, before = time.perf_counter(), done.epoch
                row = self._block()
                self._observe(observe)
                row["seconds"] = time.perf_counter() - start
                done.seconds += row["seconds"]
                if self.path is not None:
                    self._save()
                bar.update(done.epoch - before)
                bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k != "epoch"})
        self.model.eval()
        tables = pd.DataFrame(done.history), pd.DataFrame(done.observations)
        weights = done.best_epoch, self.best, self._weights()
        return Fit(*tables, *weights, stop_reason, done.commit, done.versions)

    def _reason_to_stop(self) -> str:
        done, schedule, patience = self.done, self.schedule, self.schedule.patience
        reasons = {
            "not finite": done.history and not math.isfinite(done.history[-1]["train_loss"]),
            "solved": done.best_loss <= self.task.solved,
            "plateau": patience is not None and done.since_gain >= patience,
            "max epochs": done.epoch >= schedule.epochs,
            "min lr": self.optimizer.param_groups[0]["lr"] < schedule.min_lr,
            "time limit": done.seconds >= schedule.max_hours * 3600,
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def _block(self) -> dict[str, Any]:
        """Train for the epochs of a row of the history, and let it decide on rate and weights."""
        done, sums, count, lr = self.done, Counter(), 0, self.optimizer.param_groups[0]["lr"]
        last = min(done.epoch + self.schedule.block, self.schedule.epochs)
        for epoch in range(done.epoch + 1, last + 1):
            self.model.train()
            steps = self.task.steps(self.model, self.schedule, self.seed + EPOCH_STRIDE * epoch)
            for step, (loss, number, others) in enumerate(steps, start=1):
                value = loss.item()
                self._check_finite("training", value, epoch, f", step {step}")
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                count += number
                sums.update({"train_loss": value * number, **others})
        if count == 0:
            raise ValueError("every training target is NaN; training needs one label or more")
        row = {name: total / count for name, total in sums.items()}
        row = {"epoch": last, **row, **self.task.validate(self.model, self.schedule), "lr": lr}
        self._check_finite("validation", row.get("val_loss", 0.0), last)
        done.epoch = last
        done.history.append(row)
        if (score := self.task.score(row)) is not None:
            self.scheduler.step(score)
            done.since_gain = 0 if score < done.best_loss - _GAIN else done.since_gain + 1
            if score < done.best_loss:
                done.best_loss, done.best_epoch, self.best = score, last, self._weights()
        return row

    def _check_finite(self, which: str, loss: float, epoch: int, where: str = "") -> None:
        if math.isfinite(loss) or self.task.may_diverge:
            return
        done = self.done.epoch
        kept = f"epoch {done} is kept in {self.path}" if self.path and done else "none is kept"
        raise FloatingPointError(
            f"the {which} loss is {loss} at epoch {epoch}{where}; last good checkpoint: {kept}. "
            f"Lower the learning rate (lr={self.schedule.lr:g}) or look for bad values in the data"
        )

    @torch.no_grad()
    def _observe(self, observe: Observer | None) -> None:
        if observe is not None:
            with evaluating(self.model):
                self.done.observations += observe(self.model, self.done.epoch)

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _save(self) -> None:
        adam = self.optimizer.state_dict()
        moments = {f"{i}.{name}": v for i, of in adam["state"].items() for name, v in of.items()}
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        tensors = {"model": self.model.state_dict(), "best": self.best}
        tensors |= {"adam": moments, "random": random}
        values = {"identity": self.identity, "progress": vars(self.done)}
        values |= {"param_groups": adam["param_groups"], "scheduler": self.scheduler.state_dict()}
        write_state(self.path, tensors, values)

    def _resume(self) -> _Progress:
        tensors, values = read_state(self.path)
        stored, asked = ({**run["config"], **run} for run in (values["identity"], self.identity))
        epochs = values["progress"]["epoch"], self.schedule.epochs
        refuse_another_run(self.path, stored | {"config": None}, asked | {"config": None}, epochs)
        self.model.load_state_dict(tensors["model"])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors["adam"].items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})
        self.scheduler.load_state_dict(values["scheduler"])
        self.best, self.random = tensors["best"], tensors.get("random")
        return _Progress(**values["progress"])
