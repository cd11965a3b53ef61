"""Train many seeds of one network at once, each as ``studies.train.fit`` trains it alone.

On the CPU dropout is the same, too; a GPU draws it for all seeds at once.
"""

import math
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mapkg.all_measures import COLUMNS
from mapkg.models.config import Config
from studies import stacked
from studies.checkpoint import Fit, SeedProgress, read_state, refuse_another_run, write_state
from studies.files import commit, versions
from studies.stacked import FlatGraphs, why_not_stackable
from studies.steps import Stack

if TYPE_CHECKING:  # it imports RDKit, which flat graphs do without
    from studies.data import Splits

STATE_FILE = "stacked.safetensors"
_TABLES = {
    "history": ["seed", "epoch", "train_loss", "val_loss", "test_loss", "lr", "seconds"],
    "measures": ["seed", "epoch", "layer", *COLUMNS],
}

_KEPT = ("epoch", "seconds", "commit", "versions", "in_stack")
_OPTIMIZER = ("first", "second", "steps")


def fit_stacked(
    build: Callable[[Config], nn.Module],
    splits: "Splits | Mapping[str, FlatGraphs]",
    config: Config,
    *,
    seeds: Sequence[int],
    folder: Path | str | None = None,
    device: str | torch.device = "cpu",
    stack: Callable[..., Stack] = Stack,
    record_epochs: Callable[[int], bool] = lambda epoch: True,
    save_seconds: float = 0.0,
    watch: Callable[["Progress"], bool] = lambda run: False,
    progress: bool = True,
) -> Fit:
    """Train one network per seed, all at once.

    One by one, with the same weights, what cannot be stacked or, on a CPU, is large. ``build``
    gives an untrained network after torch was seeded, with ``layers`` and called as a
    ``GraphNetwork``, which predicts for nodes where ``config.readout`` is None; ``stack`` one with
    steps of another kind. A weight without a gradient in a batch has one of zero there, where a
    network alone leaves it out, and a batch of a single row has a BatchNorm, which torch refuses.
    The scores of the test split are measured at ``record_epochs``, the state is written after
    ``save_seconds`` or more. ``watch`` is called before the first epoch and after each one, and
    stops the run for now if it returns true.
    """
    if isinstance(build, nn.Module):
        made = type(build).__name__
        raise TypeError(f"build: expected what makes a network of a Config, got one, {made}")
    if not isinstance(splits, Mapping):
        splits = {name: getattr(splits, name) for name in ("train", "val", "test")}
    for name, graphs in splits.items():
        if len(graphs) == 0:
            raise ValueError(f"the {name} split is empty; training needs at least one graph")
    splits = {n: g if isinstance(g, FlatGraphs) else FlatGraphs.of(g) for n, g in splits.items()}
    for name, graphs in splits.items():
        rows = len(graphs.x) if config.readout is None else len(graphs)
        if len(graphs.y) != rows:
            of = "graph" if config.readout else "node, since readout is None"
            raise ValueError(
                f"{name}: expected {rows} rows of targets y, one for each {of}, got {len(graphs.y)}"
            )
    found = [*seeds] if isinstance(seeds, Iterable) else []
    whole = [*map(int, found)]
    if not found or whole != found or len(set(whole)) < len(whole):
        wanted = "seeds: expected different whole numbers, one or more, such as range(3)"
        raise ValueError(f"{wanted}, got {found or seeds!r}")
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        networks = []
        for seed in whole:
            torch.manual_seed(seed)
            networks.append(build(config))
        run = Progress(networks, splits, config, whole, device, stack, folder)
        if run.epoch == 0 and record_epochs(0) and not len(run.tables["measures"]):
            run.stack.evaluate("record")
            run.keep_measures()
        saved, shown = time.perf_counter(), dict(total=config.max_epochs, initial=run.epoch)
        with tqdm(desc="epochs", **shown, disable=not progress) as bar:
            while not watch(run) and run.running:
                run.train_epoch(record_epochs)
                bar.update()
                if time.perf_counter() - saved >= save_seconds:
                    run.save()
                    saved = time.perf_counter()
        run.save()
    return run.fit()


def _checksum(graphs: FlatGraphs) -> int:
    """A number that other graphs, features or targets would hardly have."""
    checksum = 0
    for tensor in vars(graphs).values():
        checksum = zlib.crc32(tensor.detach().cpu().contiguous().numpy(), checksum)
    return checksum


class Progress:
    """The state of a stacked run, which ``watch`` sees; ``tables`` are float64."""

    def __init__(self, networks, splits, config, seeds, device, stack, folder):
        self.config, self.device, self.single, self.host = config, device, networks[0], splits
        self.make, self.path = stack, None if folder is None else Path(folder) / STATE_FILE
        self.epoch, self.seconds, self.commit, self.versions = 0, 0.0, commit(), versions()
        self.tables = {n: torch.zeros(0, len(c)).double() for n, c in _TABLES.items()}
        self.seeds = {seed: SeedProgress(seed, config.lr) for seed in seeds}
        self.in_stack = list(self.seeds)  # those whose networks take part in a step
        if why := why_not_stackable(networks[0]):
            print(f"{why}, so that networks are trained one by one", file=sys.stderr)
        states = [network.state_dict() for network in networks]
        state = {"state": {n: torch.stack([one[n] for one in states]) for n in states[0]}}
        self.data = {f"checksum of {name}": _checksum(graphs) for name, graphs in splits.items()}
        if self.path is not None and self.path.is_file():
            state = self._resume()
            print(f"resumed after epoch {self.epoch} from {self.path}", file=sys.stderr)
        for one in self.seeds.values():  # some may have nothing to do, or a longer run than before
            if one.stop_reason in ("", "max epochs", "time limit"):
                one.stop_reason = self._reason_to_stop(one)
        splits = {**splits, "record": splits["test"]}
        fixed = {n: torch.arange(len(g)) for n, g in splits.items() if n != "train"}
        fixed = {n: stacked.in_batches(ids, config.batch_size) for n, ids in fixed.items()}
        rows = [splits[split].rows(ids) for split, ids in fixed.items()]
        for epoch in range(self.epoch + 1, config.max_epochs + 1):
            rows.append(splits["train"].rows(self.orders(epoch)[0]))
        self.shape = stacked.padded(*(max(int(r[kind].max()) for r in rows) for kind in (0, 1)))
        dtype = next(self.single.parameters()).dtype
        data = {name: graphs.to(device, dtype) for name, graphs in splits.items()}
        self._check_memory({name: of[:1] for name, of in state["state"].items()}, data)
        self._build(state, data, fixed)
        kept = {name: state.get(name, state["state"]) for name in ("best", "last")}
        self.weights = {
            name: {key: of[key].to(device, copy=True) for key in self.stack.state()}
            for name, of in kept.items()
        }

    def _build(self, state, data, fixed) -> None:
        self.stack = self.make(self.single, state["state"], data, self.config, self.shape)
        for name, tensor in state.get("optimizer", {}).items():
            getattr(self.stack, name).copy_(tensor)
        self.stack.prepare(self.orders(self.epoch + 1)[0], fixed)

    def _check_memory(self, state, data) -> None:
        one, order = Stack(self.single, state, data, self.config, self.shape), self.orders(0)[0]
        largest = int(self.host["train"].rows(order[0])[1].argmax())
        one.order = order[:1, largest : largest + 1].to(self.device)
        about = one.gradient, one.weights.nbytes, len(self.in_stack), one.is_apart, self.device
        stacked.check_memory(*about)

    def _drop_finished(self) -> None:
        """Make the stack anew without seeds that have stopped, if that is worth it."""
        running, old = self.running, self.stack
        if len(running) == len(self.in_stack) or len(running) > old.worth * len(self.in_stack):
            return
        places, data, fixed = [*map(self.in_stack.index, running)], old.data, old.fixed
        state = {"state": old.state(), "optimizer": {n: getattr(old, n) for n in _OPTIMIZER}}
        state = {g: {n: t[places] for n, t in named.items()} for g, named in state.items()}
        old.calls.clear()  # what was captured goes before there is more
        self.in_stack, self.stack, old = running, None, None
        self._build(state, data, fixed)

    @property
    def running(self) -> list[int]:
        """Seeds that have not stopped."""
        return [seed for seed, one in self.seeds.items() if not one.stop_reason]

    def orders(self, epoch: int) -> tuple[Tensor, list[torch.Generator]]:
        """Batches of the stacked seeds in an epoch, [S, steps, graphs], and their generators."""
        graphs, batch_size = len(self.host["train"]), self.config.batch_size
        return stacked.epoch_batches(graphs, self.in_stack, epoch, batch_size)

    def keep_measures(self) -> None:
        """Keep what was measured of the scores of the test split in the epoch at hand."""
        tables = self.stack.tables()
        rows = [
            torch.cat([torch.tensor([seed, self.epoch, layer]), values])
            for seed, *layers in zip(self.in_stack, *tables, strict=True)
            for layer, values in enumerate(layers)
            if not self.seeds[seed].stop_reason
        ]
        self.tables["measures"] = torch.cat([self.tables["measures"], torch.stack(rows)])

    def train_epoch(self, record_epochs: Callable[[int], bool]) -> None:
        """Train the seeds that run for an epoch, evaluate, and let the schedule of each decide."""
        start = time.perf_counter()
        self._drop_finished()
        epoch, stack, ones = self.epoch + 1, self.stack, [self.seeds[s] for s in self.in_stack]
        lrs = [one.lr for one in ones]
        stack.lr.copy_(torch.tensor(lrs, dtype=torch.double))
        if self.device.type == "cuda":  # dropout is drawn on the device
            torch.cuda.manual_seed(zlib.crc32(repr((list(self.seeds), epoch)).encode()))
        stack.train(*self.orders(epoch))
        fixed = ("val", "record" if record_epochs(epoch) else "test")
        for name in fixed:
            stack.evaluate(name)
        sums = torch.stack([stack.sums[name] for name in ("train", *fixed)]).cpu()
        self.epoch = epoch
        if "record" in fixed:
            self.keep_measures()
        seconds = time.perf_counter() - start
        self.seconds += seconds
        for name, of_split in zip(("training", "validation"), sums, strict=False):
            if (of_split[1] == 0).any():
                raise ValueError(f"every {name} target is NaN; training needs one label or more")
        rows, at = [], {"best": [], "last": []}
        for index, (one, lr) in enumerate(zip(ones, lrs, strict=True)):
            if one.stop_reason:
                continue  # runs on until a smaller stack is worth its making
            train, val, test = (sums[:, 0, index] / sums[:, 1, index]).tolist()
            rows.append([one.seed, epoch, train, val, test, lr, seconds])
            one.last_epoch = epoch
            one.stop_reason = "not finite"
            if math.isfinite(train + val):
                one.learn_from(val, self.config)
                one.stop_reason = self._reason_to_stop(one)
                if val < one.best_loss:
                    one.best_loss, one.best_epoch = val, epoch
                    at["best"].append(one.seed)
            if one.stop_reason:
                at["last"].append(one.seed)
        history = self.tables["history"]
        self.tables["history"] = torch.cat([history, history.new_tensor(rows)])
        self._keep(**at)
        if {one.stop_reason for one in self.seeds.values()} == {"not finite"}:
            raise FloatingPointError(
                f"no seed has a finite loss after epoch {self.epoch}. Lower the learning rate "
                f"(lr={self.config.lr:g}) or look for bad values in the data"
            )

    def _reason_to_stop(self, one: SeedProgress) -> str:
        if self.epoch >= self.config.max_epochs:
            return "max epochs"
        if one.lr < self.config.min_lr:
            return "min lr"
        return "time limit" if self.seconds >= self.config.max_hours * 3600 else ""

    def _keep(self, **seeds: list[int]) -> None:
        state = self.stack.state()
        for name, chosen in seeds.items():
            to, of = ([*map(all_.index, chosen)] for all_ in ([*self.seeds], self.in_stack))
            for key, tensor in state.items():
                self.weights[name][key][to] = tensor[of]

    def save(self) -> None:
        """Write the state, if there is a place for it."""
        if self.path is None:
            return
        optimizer = {name: getattr(self.stack, name) for name in _OPTIMIZER}
        tensors = {"tables": self.tables, "state": self.stack.state(), "optimizer": optimizer}
        seeds = [asdict(one) for one in self.seeds.values()]
        kept = {name: getattr(self, name) for name in _KEPT}
        values = {"identity": self._identity(), "seeds": seeds, **kept}
        write_state(self.path, tensors | self.weights, values)

    def _resume(self) -> dict[str, dict[str, Tensor]]:
        tensors, values = read_state(self.path)
        epochs = values["epoch"], self.config.max_epochs
        refuse_another_run(self.path, values["identity"], self._identity(), epochs)
        self.seeds = {one["seed"]: SeedProgress(**one) for one in values["seeds"]}
        vars(self).update({name: values[name] for name in _KEPT if name in values})
        self.tables = tensors["tables"]
        return tensors

    def _identity(self) -> dict[str, Any]:
        sizes = {f"{n} rows": [*map(len, (g, g.x, g.edge_attr))] for n, g in self.host.items()}
        settings = {**self.config.to_dict(), "seeds": list(self.seeds), **sizes, **self.data}
        return {n: v for n, v in settings.items() if n not in ("max_epochs", "max_hours")}

    def frames(self) -> list[pd.DataFrame]:
        """History and measures up to now."""
        found = [pd.DataFrame(self.tables[n].numpy(), columns=c) for n, c in _TABLES.items()]
        whole = ("seed", "epoch", "layer")
        return [t.astype({name: int for name in whole if name in t}) for t in found]

    def fit(self) -> Fit:
        """What each seed has come to."""
        self._keep(last=self.running)
        steps = -(-len(self.host["train"]) // self.config.batch_size)

        def weights(name: str) -> dict[int, dict[str, Tensor]]:
            return {
                one.seed: {
                    key: self.weights[name][key][place].cpu().clone()
                    if key in self.weights[name]
                    else torch.tensor(vars(one)[f"{name}_epoch"] * steps)  # batches of BatchNorm
                    for key in self.single.state_dict()
                }
                for place, one in enumerate(self.seeds.values())
            }

        best_epoch = {one.seed: one.best_epoch for one in self.seeds.values()}
        reasons = {one.seed: one.stop_reason or "not finished" for one in self.seeds.values()}
        found = best_epoch, weights("best"), weights("last"), reasons
        return Fit(*self.frames(), *found, self.commit, self.versions)
