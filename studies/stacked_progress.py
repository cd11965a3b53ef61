"""The state of a stacked run (``train_stacked``): schedules, tables, what it resumes from."""

import gc
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mapkg.models.config import Config
from mapkg.score_measures import COLUMNS
from studies.checkpoint import differences, read_state, write_state
from studies.padded_batches import Shape, batch_sums, epoch_order, in_batches
from studies.provenance import commit, versions
from studies.stacked import stacked_state
from studies.stacked_steps import Stack

STATE_FILE = "stacked.safetensors"
"""What ``fit_stacked`` resumes from, in the folder it is given."""

HISTORY = ("seed", "epoch", "train_loss", "val_loss", "test_loss", "lr", "seconds")
MEASURES = ("seed", "epoch", "layer", *COLUMNS)
CLAMPED = ("gt", "graphit", "san")
"""Architectures that sum the score of a head and clamp the sum."""

_SCANNED_EPOCHS = 350  # whose largest batch is known before the first step
_COUNTER = "num_batches_tracked"
_MAY_GO_ON = ("", "max epochs", "time limit")
_OPTIMIZER = ("first", "second", "steps")
# A stack is made anew without its finished seeds when this share of it or less still runs: to
# capture or compile takes as long as some epochs of seeds that are not needed.
_SHRINK = {"eager": 1.0, "graph": 0.75, "compile+graph": 0.5}


@dataclass
class _Seed:
    """Plain values of one seed."""

    seed: int
    lr: float
    best_loss: float = float("inf")
    best_epoch: int = 0
    last_epoch: int = 0
    stop_reason: str = ""
    plateau: dict[str, Any] = field(default_factory=dict)

    def learn_from(self, val_loss: float, config: Config) -> None:
        """Let torch's own scheduler decide on the learning rate."""
        dummy = torch.optim.SGD([torch.zeros(1)], lr=self.lr)
        plateau = ReduceLROnPlateau(dummy, factor=config.lr_factor, patience=config.lr_patience)
        plateau.load_state_dict(self.plateau)
        plateau.step(val_loss)
        self.plateau, self.lr = plateau.state_dict(), dummy.param_groups[0]["lr"]


class Progress:
    """The state of a stacked run; what ``watch`` of ``fit_stacked`` sees.

    Attributes:
        epoch: finished epochs.
        running: the seeds that are trained on.
        tables: blocks of rows ``history`` and ``measures``, float64, columns as ``HISTORY`` and
            ``MEASURES``.
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
        self.seeds = {seed: _Seed(seed, config.lr) for seed in seeds}
        for one in self.seeds.values():
            dummy = torch.optim.SGD([torch.zeros(1)], lr=config.lr)
            one.plateau = ReduceLROnPlateau(
                dummy, factor=config.lr_factor, patience=config.lr_patience
            ).state_dict()
        self.commit, self.versions = commit(), versions()
        self.finished: dict[str, dict[int, dict[str, Tensor]]] = {"best": {}, "last": {}}
        self.best: dict[str, Tensor] = {}
        self.stacked = list(seeds)
        start, optimizer = stacked_state(networks), {}
        if self.path is not None and self.path.is_file():
            start, optimizer = self._resume()
            print(f"resumed after epoch {self.epoch} from {self.path}", file=sys.stderr)
        self.stack: Stack | None = None
        self._ahead: tuple[Any, Any] | None = None
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

    def _largest(self, split: str, batches: Tensor) -> tuple[int, int]:
        graphs = self.host[split]
        counts = graphs.node_counts().cpu(), graphs.edge_counts().cpu()
        return tuple(int(batch_sums(count, batches).max()) for count in counts)

    def _shape(self) -> Shape:
        """Rows that hold every batch there will be, as far as it is looked ahead."""
        last = min(self.config.max_epochs, self.epoch + _SCANNED_EPOCHS)
        largest = [self._largest(split, self._fixed(split)) for split in ("val", "test")]
        for epoch in range(self.epoch + 1, last + 1):
            largest.append(self._largest("train", self._orders(epoch)[0]))
        nodes, edges = (max(rows) for rows in zip(*largest, strict=True))
        return Shape.holding(nodes, edges, self.config.batch_size)

    def _stack(self, start: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Make the stack of ``self.stacked`` from its state, and its steps."""
        fits = True
        try:
            self.stack = self._new_stack(start, self.engine)
            for name, tensor in optimizer.items():
                getattr(self.stack, name).copy_(tensor)
            fixed = {split: self._fixed(split) for split in ("val", "test")}
            self.stack.prepare(self._orders(self.epoch + 1)[0], fixed)
        except torch.cuda.OutOfMemoryError:
            fits = False  # what the error holds is free only after it
        if not fits:
            raise ValueError(self._too_many())
        self.engine = self.stack.engine
        self.best = self.best or self.stack.state()

    def _new_stack(self, start: Mapping[str, Tensor], engine: str) -> Stack:
        clamped = self.config.architecture in CLAMPED
        about = self.single, start, self.data, self.config, self.shape
        return Stack(*about, engine=engine, clamped=clamped)

    def _too_many(self) -> str:
        """Say how many seeds fit, from what a single one takes."""
        self._drop_stack()
        free, used = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        one = self._new_stack(stacked_state([self.single]), "eager")
        one.prepare(self._orders(1)[0][:1], {"val": self._fixed("val")})
        one.step("train")
        each = (torch.cuda.max_memory_allocated() - used) / 2**30
        free /= 2**30
        return (
            f"{len(self.stacked)} seeds do not fit into the memory of {self.device}: a seed takes "
            f"about {each:.2f} GiB of the {free:.1f} GiB that are free, so that about "
            f"{max(1, int(0.8 * free / each))} fit; pass fewer seeds at a time"
        )

    # Epochs.

    def record(self) -> None:
        """Measure the scores of the test split at the epoch at hand."""
        self.stack.evaluate("test", record=True)
        self._keep_measures()

    def _keep_measures(self) -> None:
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
        asked = epoch, list(self.stacked)
        ahead, self._ahead = self._ahead, None
        order, generators = ahead[1] if ahead and ahead[0] == asked else self._orders(epoch)
        if not self.shape.holds(*self._largest("train", order)):
            self._grow(order)
        lrs = torch.tensor([self.seeds[seed].lr for seed in self.stacked], dtype=torch.double)
        self.stack.lr.copy_(lrs)
        if self.device.type == "cuda":  # dropout is drawn on the device
            torch.cuda.manual_seed(zlib.crc32(repr((self.stacked, epoch)).encode()))
        recorded = record_epochs(epoch)
        self.stack.train(order, generators)
        self.stack.evaluate("val")
        self.stack.evaluate("test", record=recorded)
        if epoch < self.config.max_epochs:  # while the device works
            self._ahead = (epoch + 1, list(self.stacked)), self._orders(epoch + 1)
        sums = torch.stack(list(self.stack.sums.values())).cpu()  # [splits, 2, S]
        self.epoch = epoch
        if recorded:
            self._keep_measures()
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

    def _reason_to_stop(self, one: _Seed) -> str:
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

    def _grow(self, order: Tensor) -> None:
        """Make room for a batch larger than any that was looked at before."""
        nodes, edges = self._largest("train", order)
        self.shape = Shape.holding(
            max(nodes, self.shape.nodes), max(edges, self.shape.edges), self.shape.graphs
        )
        self._restack(range(len(self.stacked)))

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
        if (stored := values["identity"]) != (asked := self._identity()):
            raise ValueError(
                f"{self.path} holds the state of another run: {differences(stored, asked)}. "
                "Choose another folder, or remove the file to start afresh"
            )
        self.seeds = {one["seed"]: _Seed(**one) for one in values["seeds"]}
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

    def weights(self) -> dict[str, dict[int, dict[str, Tensor]]]:
        """State dicts ``best`` and ``last`` of each seed, on the CPU."""
        kept = {name: dict(by_seed) for name, by_seed in self.finished.items()}
        if self.running:
            for name, state in (("best", self.best), ("last", self.stack.state())):
                for seed in self.running:
                    place = self.stacked.index(seed)
                    kept[name][seed] = {k: v[place].cpu().clone() for k, v in state.items()}
        return {
            "best": {
                s: self._single(kept["best"][s], one.best_epoch) for s, one in self.seeds.items()
            },
            "last": {
                s: self._single(kept["last"][s], one.last_epoch) for s, one in self.seeds.items()
            },
        }

    def _single(self, state: dict[str, Tensor], epochs: int) -> dict[str, Tensor]:
        """The state dict of one network after so many epochs."""
        steps = -(-len(self.host["train"]) // self.config.batch_size)
        return {
            name: torch.tensor(epochs * steps) if name.endswith(_COUNTER) else state[name]
            for name in self.single.state_dict()
        }
