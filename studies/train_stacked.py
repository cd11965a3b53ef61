"""Train many seeds of one network at once, by the schedule of its configuration; stop and go on.

Every seed is trained as ``studies.train.fit`` trains it alone: the same initial weights, order of
graphs, learning rate schedule and stop; on the CPU also the same dropout. On a GPU dropout is
another draw for a stacked run, from the seeds and the epoch, and reproducible only for the same
seeds together. Nothing here needs RDKit or a data set's own files, see ``padded_batches``.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from mapkg.models.config import Config
from studies.padded_batches import FlatGraphs
from studies.stacked import check_stackable
from studies.stacked_progress import Progress
from studies.stacked_steps import ENGINES


@dataclass
class StackedFit:
    """What stacked training gave.

    Attributes:
        history: one row per seed and epoch: train_loss, val_loss, test_loss (the mean over
            labels), lr (of that epoch), seconds (of the epoch, all seeds together).
        measures: one row per seed, epoch (0 is untrained) and layer, see ``score_measures``.
        best_epoch: by seed, the epoch with the least validation loss; 0 before the first.
        best_weights, last_weights: by seed, state dicts of that epoch and of the last one.
        stop_reason: by seed, ``"min lr"``, ``"max epochs"``, ``"time limit"`` (hours of the
            configuration), ``"not finite"`` or ``"not finished"`` (a later call goes on).
        engine: the one that steps ran on in the end.
        commit, versions: of the process that started the run.
    """

    history: pd.DataFrame
    measures: pd.DataFrame
    best_epoch: dict[int, int]
    best_weights: dict[int, dict[str, Tensor]]
    last_weights: dict[int, dict[str, Tensor]]
    stop_reason: dict[int, str]
    engine: str
    commit: str
    versions: str


def fit_stacked(
    build: Callable[[Config], nn.Module],
    splits: Mapping[str, FlatGraphs],
    config: Config,
    *,
    seeds: Sequence[int],
    folder: Path | str | None = None,
    device: str | torch.device = "cpu",
    engine: str = "eager",
    record_epochs: Callable[[int], bool] = lambda epoch: True,
    time_limit: float = float("inf"),
    save_seconds: float = 0.0,
    watch: Callable[["Progress"], None] | None = None,
) -> StackedFit:
    """Train one network per seed, all at once.

    Args:
        build: gives an untrained network after torch was seeded, as ``models.build``.
        splits: train, val and test.
        config: schedule and batch size.
        seeds: of initial weights, order and dropout; different ones.
        folder: where the run's state is written. If it holds the state of the same run,
            training goes on from there; more epochs may be asked for then.
        device: where to train.
        engine: one of ``stacked_steps.ENGINES``; falls back with a message if it must.
        record_epochs: the epochs at which the scores of the test split are measured.
        time_limit: seconds after which this call writes its state and returns.
        save_seconds: least time between two writes of the state; 0 writes after each epoch.
        watch: called before the first epoch of this call and after each one.

    Raises:
        FloatingPointError: if no seed has a finite loss any more.
        ValueError: if seeds are repeated or missing, the networks cannot be stacked or do not
            fit into the device's memory, or the folder holds the state of another run.
    """
    begin = time.perf_counter()
    _check(seeds, splits, engine)
    device = torch.device(device)
    seeds = [int(seed) for seed in seeds]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        networks = []
        for seed in seeds:
            torch.manual_seed(seed)
            networks.append(build(config))
        check_stackable(networks[0])
        run = Progress(networks, splits, config, seeds, device, engine, folder)
        del networks
        if watch is not None:
            watch(run)
        if run.epoch == 0 and record_epochs(0) and not run.tables["measures"]:
            run.record()
        saved = time.perf_counter()
        while run.running:
            if time.perf_counter() - begin >= time_limit:
                break
            run.train_epoch(record_epochs)
            if watch is not None:
                watch(run)
            if folder is not None and time.perf_counter() - saved >= save_seconds:
                run.save()
                saved = time.perf_counter()
        if folder is not None:
            run.save()
    return _result(run)


def _check(seeds: Sequence[int], splits: Mapping[str, FlatGraphs], engine: str) -> None:
    if len(seeds) == 0:
        raise ValueError("seeds: expected at least one, got none")
    if len(set(seeds)) < len(seeds):
        twice = sorted({seed for seed in seeds if list(seeds).count(seed) > 1})
        raise ValueError(f"seeds: expected different ones, got {twice} more than once")
    for split in ("train", "val", "test"):
        if split not in splits or len(splits[split]) == 0:
            raise ValueError(f"the {split} split is empty; training needs at least one graph")
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {ENGINES}, got {engine!r}")


def _result(run: Progress) -> StackedFit:
    """The fit of each seed, as far as it has come."""
    weights, (history, measures) = run.weights(), run.frames()
    return StackedFit(
        history=history,
        measures=measures,
        best_epoch={seed: one.best_epoch for seed, one in run.seeds.items()},
        best_weights=weights["best"],
        last_weights=weights["last"],
        stop_reason={seed: one.stop_reason or "not finished" for seed, one in run.seeds.items()},
        engine=run.engine,
        commit=run.commit,
        versions=run.versions,
    )
