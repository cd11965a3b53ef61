"""Train many seeds of one network at once, by the schedule of its configuration; stop and go on.

Every seed is trained as ``studies.train.fit`` trains it alone: the same initial weights, order of
graphs, learning rate schedule and stop; on the CPU also the same dropout. On a GPU dropout is
another draw for a stacked run, from the seeds and the epoch, and reproducible only for the same
seeds together. Nothing here needs RDKit or a data set's own files, see ``padded_batches``.
"""

import gc
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from mapkg.models.config import Config
from studies.checkpoint import read_state, refuse_another_run, write_state
from studies.padded_batches import FlatGraphs, Shape, epoch_order, in_batches
from studies.provenance import commit, versions
from studies.schedule import Fit, SeedProgress
from studies.score_measures import COLUMNS
from studies.stacked import check_stackable, stacked_state
from studies.stacked_steps import ENGINES, Stack

STATE_FILE = "stacked.safetensors"
"""What ``fit_stacked`` resumes from, in the folder it is given."""

HISTORY = ("seed", "epoch", "train_loss", "val_loss", "test_loss", "lr", "seconds")
MEASURES = ("seed", "epoch", "layer", *COLUMNS)

_COUNTER = "num_batches_tracked"
_MAY_GO_ON = ("", "max epochs", "time limit")
_OPTIMIZER = ("first", "second", "steps")
# A stack is made anew without its finished seeds when this share of it or less still runs: to
# capture or compile takes as long as some epochs of seeds that are not needed.
_SHRINK = {"eager": 1.0, "graph": 0.75, "compile+graph": 0.5}


def fit_stacked(
    build: Callable[[Config], nn.Module],
    splits: Mapping[str, FlatGraphs] | Any,
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
) -> Fit:
    """Train one network per seed, all at once.

    Args:
        build: gives an untrained network after torch was seeded, as ``models.build``.
        splits: train, val and test, of graphs or flat.
        config: schedule and batch size.
        seeds: of initial weights, order and dropout; different ones.
        folder, device: as for ``train.fit``.
        engine: one of ``stacked_steps.ENGINES``; falls back with a message if it must.
        record_epochs: the epochs at which the scores of the test split are measured.
        time_limit: seconds after which this call writes its state and returns.
        save_seconds: least time between two writes of the state; 0 writes after each epoch.
        watch: called before the first epoch of this call and after each one.
    """
    begin = time.perf_counter()
    if not isinstance(splits, Mapping):
        splits = {name: getattr(splits, name) for name in ("train", "val", "test")}
    for split, graphs in splits.items():
        if len(graphs) == 0:
            raise ValueError(f"the {split} split is empty; training needs at least one graph")
    if len(seeds) == 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected at least one, and different ones, got {list(seeds)}")
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {ENGINES}, got {engine!r}")
    splits = {n: g if isinstance(g, FlatGraphs) else FlatGraphs.of(g) for n, g in splits.items()}
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
            run.stack.evaluate("test", record=True)
            run.keep_measures()
        saved = time.perf_counter()
        while run.running and time.perf_counter() - begin < time_limit:
            run.train_epoch(record_epochs)
            if watch is not None:
                watch(run)
            if folder is not None and time.perf_counter() - saved >= save_seconds:
                run.save()
                saved = time.perf_counter()
        if folder is not None:
            run.save()
    return run.fit()


class Progress:
    """The state of a stacked run; what ``watch`` of ``fit_stacked`` sees.

    ``tables`` are blocks of float64 rows, columns as ``HISTORY`` and ``MEASURES``.
    """

    def __init__(self, networks, splits, config, seeds, device, engine, folder):
        self.config, self.device, self.engine = config, device, engine
        self.path = None if folder is None else Path(folder) / STATE_FILE
        self.single = networks[0]
        self.host = dict(splits)
        dtype = next(self.single.parameters()).dtype
        self.data = {name: graphs.to(device, dtype) for name, graphs in splits.items()}
        self.epoch, self.seconds = 0, 0.0
        self.tables: dict[str, list[Tensor]] = {"history": [], "measures": []}
        self.seeds = {seed: SeedProgress(seed, config.lr) for seed in seeds}
        self.commit, self.versions = commit(), versions()
        self.finished: dict[str, dict[int, dict[str, Tensor]]] = {"best": {}, "last": {}}
        self.best: dict[str, Tensor] = {}
        self.stacked = list(seeds)
        start, optimizer = stacked_state(networks), {}
        if self.path is not None and self.path.is_file():
            start, optimizer = self._resume()
            print(f"resumed after epoch {self.epoch} from {self.path}", file=sys.stderr)
        self.stack: Stack | None = None
        self.shape = self._shape()
        if self.running:
            self._stack(start, optimizer)

    @property
    def running(self) -> list[int]:
        """Seeds that have not stopped."""
        return [seed for seed, one in self.seeds.items() if not one.stop_reason]

    # Batches.

    def _orders(self, epoch: int) -> tuple[Tensor, list[torch.Generator]]:
        """Batches of the stacked seeds in an epoch, [S, steps, graphs], and their generators."""
        drawn = [epoch_order(len(self.host["train"]), seed, epoch) for seed in self.stacked]
        batches = [in_batches(order, self.config.batch_size) for order, _ in drawn]
        return torch.stack(batches), [generator for _, generator in drawn]

    def _fixed(self, split: str) -> Tensor:
        return in_batches(torch.arange(len(self.host[split])), self.config.batch_size)

    def _shape(self) -> Shape:
        """Rows that hold every batch there will be."""
        host, last = self.host, self.config.max_epochs if self.running else 0
        rows = [host[split].rows(self._fixed(split)) for split in ("val", "test")]
        for epoch in range(self.epoch + 1, last + 1):
            rows.append(host["train"].rows(self._orders(epoch)[0]))
        nodes, edges = (max(int(r[kind].max()) for r in rows) for kind in (0, 1))
        return Shape.holding(nodes, edges, self.config.batch_size)

    def _stack(self, start: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Make the stack of ``self.stacked`` from its state, and its steps."""
        fits, about = True, (self.single, start, self.data, self.config, self.shape)
        try:
            self.stack = Stack(*about, engine=self.engine)
            for name, tensor in optimizer.items():
                getattr(self.stack, name).copy_(tensor)
            fixed = {split: self._fixed(split) for split in ("val", "test")}
            self.stack.prepare(self._orders(self.epoch + 1)[0], fixed)
        except torch.cuda.OutOfMemoryError:
            fits = False  # what the error holds is free only after it
        if not fits:
            raise ValueError(
                f"{len(self.stacked)} seeds do not fit into the memory of {self.device}; pass "
                "fewer seeds at a time"
            )
        self.engine = self.stack.engine
        self.best = self.best or self.stack.state()

    # Epochs.

    def keep_measures(self) -> None:
        """Keep what was measured of the scores of the test split in the epoch at hand."""
        table = self.stack.measures.table()
        rows = [
            torch.cat([torch.tensor([seed, self.epoch, layer]), table[index, layer]])
            for index, seed in enumerate(self.stacked)
            if not self.seeds[seed].stop_reason
            for layer in range(table.size(1))
        ]
        self.tables["measures"].append(torch.stack(rows))

    def train_epoch(self, record_epochs: Callable[[int], bool]) -> None:
        """Train all running seeds for one epoch, evaluate, and let each schedule decide."""
        start = time.perf_counter()
        epoch = self.epoch + 1
        order, generators = self._orders(epoch)
        lrs = torch.tensor([self.seeds[seed].lr for seed in self.stacked], dtype=torch.double)
        self.stack.lr.copy_(lrs)
        if self.device.type == "cuda":  # dropout is drawn on the device
            torch.cuda.manual_seed(zlib.crc32(repr((self.stacked, epoch)).encode()))
        recorded = record_epochs(epoch)
        self.stack.train(order, generators)
        self.stack.evaluate("val")
        self.stack.evaluate("test", record=recorded)
        sums = torch.stack(list(self.stack.sums.values())).cpu()  # [splits, 2, S]
        self.epoch = epoch
        if recorded:
            self.keep_measures()
        seconds = time.perf_counter() - start
        self.seconds += seconds
        if (sums[0, 1] == 0).any():
            raise ValueError(
                "every training target is NaN (unlabeled); training needs at least one label"
            )
        means = sums[:, 0] / sums[:, 1]
        rows, improved, stopped = [], [], []
        for index, (seed, lr) in enumerate(zip(self.stacked, lrs.tolist(), strict=True)):
            one = self.seeds[seed]
            if one.stop_reason:
                continue  # runs on until the stack is made anew, for nothing
            train, val, test = means[:, index].tolist()
            rows.append([seed, epoch, train, val, test, lr, seconds])
            one.last_epoch = epoch
            if not means[:2, index].isfinite().all():
                print(f"seed {seed}: a loss is not finite in epoch {epoch}", file=sys.stderr)
                one.stop_reason = "not finite"
            else:
                one.learn_from(val, self.config)
                if val < one.best_loss:
                    one.best_loss, one.best_epoch = val, epoch
                    improved.append(index)
                one.stop_reason = self._reason_to_stop(one)
            if one.stop_reason:
                stopped.append(index)
        self.tables["history"].append(torch.tensor(rows, dtype=torch.double))
        self._keep_best(improved)
        self._finish(stopped)

    def _reason_to_stop(self, one: SeedProgress) -> str:
        if self.epoch >= self.config.max_epochs:
            return "max epochs"
        if one.lr < self.config.min_lr:
            return "min lr"
        return "time limit" if self.seconds >= self.config.max_hours * 3600 else ""

    def _keep_best(self, improved: list[int]) -> None:
        if improved:
            index = torch.tensor(improved, device=self.device)
            for name, tensor in self.stack.state().items():
                self.best[name][index] = tensor[index]

    def _finish(self, stopped: list[int]) -> None:
        """Keep the weights of seeds that stopped, and make the stack anew once it is worth it."""
        if stopped:
            last = self.stack.state()
            for index in stopped:
                for name, state in (("best", self.best), ("last", last)):
                    self.finished[name][self.stacked[index]] = {
                        key: tensor[index].cpu() for key, tensor in state.items()
                    }
        reasons = {one.stop_reason for one in self.seeds.values()}
        if reasons == {"not finite"}:
            raise FloatingPointError(
                f"no seed has a finite loss after epoch {self.epoch}. Lower the learning rate "
                f"(lr={self.config.lr:g}) or look for bad values in the data"
            )
        running = [i for i, seed in enumerate(self.stacked) if not self.seeds[seed].stop_reason]
        enough = _SHRINK[self.engine] * len(self.stacked)
        if len(running) < len(self.stacked) and 0 < len(running) <= enough:
            if self.engine == "compile+graph":
                self.engine = "graph"  # to compile again takes longer than what is left
            self._restack(running)

    def _restack(self, kept: Sequence[int]) -> None:
        state, optimizer = self._of(kept)
        index = torch.tensor(list(kept), device=self.device)
        self.best = {name: tensor[index] for name, tensor in self.best.items()}
        self.stacked = [self.stacked[i] for i in kept]
        self._drop_stack()
        self._stack(state, optimizer)

    def _drop_stack(self) -> None:
        """Give the memory of the stack and of its CUDA graphs back."""
        self.stack = None
        gc.collect()  # a captured step and the stack hold each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _of(self, kept: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """State of the networks and of the optimizer for some places of the stack."""
        index = torch.tensor(list(kept), device=self.device)
        state = {name: tensor[index] for name, tensor in self.stack.state().items()}
        return state, {name: getattr(self.stack, name)[index] for name in _OPTIMIZER}

    # What is kept.

    def save(self) -> None:
        """Write the state, whole or not at all."""
        if self.stack is None:  # nothing was left to do
            return
        tensors: dict[str, dict[str, Tensor]] = {"tables": self._joined()}
        for name, by_seed in self.finished.items():
            tensors |= {f"{name}-{seed}": state for seed, state in by_seed.items()}
        alive = [seed for seed in self.stacked if self.seeds[seed].stop_reason in _MAY_GO_ON]
        if alive:
            places = [self.stacked.index(seed) for seed in alive]
            tensors["state"], tensors["optimizer"] = self._of(places)
            index = torch.tensor(places, device=self.device)
            tensors["best"] = {name: tensor[index] for name, tensor in self.best.items()}
        values = {
            "identity": self._identity(),
            "stacked": alive,
            "seeds": [asdict(one) for one in self.seeds.values()],
            **{name: getattr(self, name) for name in ("epoch", "seconds", "commit", "versions")},
        }
        write_state(self.path, tensors, values)

    def _resume(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        tensors, values = read_state(self.path)
        refuse_another_run(self.path, values["identity"], self._identity())
        self.seeds = {one["seed"]: SeedProgress(**one) for one in values["seeds"]}
        for name in ("epoch", "seconds", "commit", "versions"):
            setattr(self, name, values[name])
        self.tables = {name: [r] if len(r) else [] for name, r in tensors["tables"].items()}
        for name, by_seed in self.finished.items():
            for seed in self.seeds:
                if f"{name}-{seed}" in tensors:
                    by_seed[seed] = tensors[f"{name}-{seed}"]
        self.stacked = values["stacked"]
        for seed in self.stacked:  # a stop by the length of a run that is longer now
            self.seeds[seed].stop_reason = self._reason_to_stop(self.seeds[seed])
            if not self.seeds[seed].stop_reason:
                for by_seed in self.finished.values():
                    by_seed.pop(seed, None)
        self.best = {
            name: tensor.to(self.device) for name, tensor in tensors.get("best", {}).items()
        }
        return tensors.get("state", {}), tensors.get("optimizer", {})

    def _identity(self) -> dict[str, Any]:
        """What must agree for a run to be the same run; its length may differ."""
        settings = self.config.to_dict()
        for length in ("max_epochs", "max_hours"):
            del settings[length]
        sizes = {
            f"{split} rows": [len(graphs), len(graphs.x), graphs.edge_index.size(1)]
            for split, graphs in self.host.items()
        }
        return {**settings, "seeds": list(self.seeds), **sizes}

    def _joined(self) -> dict[str, Tensor]:
        widths = {"history": len(HISTORY), "measures": len(MEASURES)}
        for name, blocks in self.tables.items():
            self.tables[name] = [torch.cat([*blocks, torch.zeros(0, widths[name]).double()])]
        return {name: blocks[0] for name, blocks in self.tables.items()}

    def frames(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """History and measures up to now, columns as ``HISTORY`` and ``MEASURES``."""
        tables = self._joined()
        history = pd.DataFrame(tables["history"].numpy(), columns=list(HISTORY))
        measures = pd.DataFrame(tables["measures"].numpy(), columns=list(MEASURES))
        whole = {"seed": "int64", "epoch": "int64"}
        return history.astype(whole), measures.astype({**whole, "layer": "int64"})

    def fit(self) -> Fit:
        """What each seed has come to, with state dicts on the CPU."""
        kept = {name: dict(by_seed) for name, by_seed in self.finished.items()}
        if self.running:
            for name, state in (("best", self.best), ("last", self.stack.state())):
                for seed in self.running:
                    place = self.stacked.index(seed)
                    kept[name][seed] = {k: v[place].cpu().clone() for k, v in state.items()}
        seeds = self.seeds.items()
        history, measures = self.frames()
        return Fit(
            history=history,
            observations=measures,
            best_epoch={s: one.best_epoch for s, one in seeds},
            best_weights={s: self._single(kept["best"][s], one.best_epoch) for s, one in seeds},
            last_weights={s: self._single(kept["last"][s], one.last_epoch) for s, one in seeds},
            stop_reason={s: one.stop_reason or "not finished" for s, one in seeds},
            commit=self.commit,
            versions=self.versions,
            engine=self.engine,
        )

    def _single(self, state: dict[str, Tensor], epochs: int) -> dict[str, Tensor]:
        """The state dict of one network after so many epochs."""
        steps = -(-len(self.host["train"]) // self.config.batch_size)
        return {
            name: torch.tensor(epochs * steps) if name.endswith(_COUNTER) else state[name]
            for name in self.single.state_dict()
        }
