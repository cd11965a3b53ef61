"""Many seeds of one network trained at once: how fast, how exact, and to the end.

    python benchmarks/stacked.py --prepare DATA  # needs RDKit and the data
    python benchmarks/stacked.py --device cuda --data DATA --out OUT --state STATE
    python benchmarks/stacked.py --device cpu --data DATA --compare
    python benchmarks/stacked.py --device cuda --self-test

The second command times a step of one network, trained the plain way, and of all networks stacked;
checks that both give the same; and trains by the published schedule to its end or to the time
limit. Results are written as they come. The same command again goes on where it was stopped.
A copy of the repository and a folder of prepared tensors are all it needs beside torch, PyG,
pandas, jaxtyping, safetensors, filelock and PyYAML.
"""

import argparse
import gzip
import json
import platform
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch_geometric.data import Batch, Data

sys.path.insert(0, str(Path(__file__).parents[1]))  # a copy of the repository is enough

from captured import ENGINES, CapturedStack

from mapkg.models import build
from mapkg.models.config import Config
from studies import steps
from studies.checkpoint import Fit
from studies.files import write_atomically
from studies.published import CONFIGS
from studies.stacked import FlatGraphs, epoch_batches
from studies.train_stacked import Progress, fit_stacked

DATA_FILE, ABOUT_FILE = "splits.safetensors", "run.json"
MIB = 2**20
LARGEST_FILE, LARGEST_SUM = 14 * MIB, 60 * MIB  # what a machine may hand back
SIZES = ((16, 2), (32, 4), (64, 10))
"""Hidden channels and layers that are compared, the last as published."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prepare", type=Path, help="folder to write the tensors of ZINC to")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, help="folder of prepared tensors")
    parser.add_argument("--out", type=Path, help="folder of results")
    parser.add_argument("--state", type=Path, help="folder of the state to go on from")
    on_zinc = [name for name in CONFIGS if name.endswith("-ZINC")]
    parser.add_argument("--config", default="GT-ZINC", choices=on_zinc)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds, in all")
    parser.add_argument("--engine", default="compile+graph")
    parser.add_argument("--max-epochs", type=int)
    parser.add_argument("--record-every", type=int, default=1, help="epochs; the first 20 always")
    parser.add_argument("--commit", help="of the code, where git is not at hand")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--compare", action="store_true", help="only time, for several sizes")
    parser.add_argument("--batch-size", type=int, default=128, help="molecules, of --compare")
    parser.add_argument("--always", action="store_true", help="stack what is large, too")
    parser.add_argument("--self-test", action="store_true", help="everything, tiny, some seconds")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    if parsed.always:
        steps.LARGE = float("inf")
    if parsed.prepare:
        prepare(parsed.prepare)
    elif parsed.self_test:
        self_test(parsed.device, parsed.engine)
    elif parsed.compare:
        compare(read_splits(parsed.data / DATA_FILE), parsed.device, parsed.batch_size)
    else:
        train(parsed)


def prepare(folder: Path) -> None:
    """Turn the benchmark's molecules into tensors."""
    from studies.data import SPLITS, load

    molecules = load("zinc")
    splits = {name: FlatGraphs.of(getattr(molecules, name)) for name in SPLITS}
    folder.mkdir(parents=True, exist_ok=True)
    save_splits(folder / DATA_FILE, splits)
    print(f"wrote {folder / DATA_FILE}: {', '.join(f'{n} {len(g)}' for n, g in splits.items())}")


def save_splits(path: Path, splits: dict[str, FlatGraphs]) -> None:
    """Write the splits of a data set as one safetensors file, integers as short as they fit."""

    def short(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor.contiguous()
        least, greatest = tensor.min(), tensor.max()
        for dtype in (torch.int8, torch.int16, torch.int32):
            if torch.iinfo(dtype).min <= least and greatest <= torch.iinfo(dtype).max:
                return tensor.to(dtype).contiguous()
        return tensor.contiguous()

    safetensors.torch.save_file(
        {
            f"{split}/{name}": short(tensor)
            for split, graphs in splits.items()
            for name, tensor in vars(graphs).items()
        },
        path,
    )


def read_splits(path: Path) -> dict[str, FlatGraphs]:
    """Read what ``save_splits`` wrote."""
    splits: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in safetensors.torch.load_file(path).items():
        split, name = key.split("/")
        splits.setdefault(split, {})[name] = tensor if tensor.is_floating_point() else tensor.long()
    return {split: FlatGraphs(**tensors) for split, tensors in splits.items()}


# Speed and exactness.


def plain_steps(
    config: Config, data: FlatGraphs, seed: int, device: str, steps: int, again: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Train one network the plain way.

    Returns:
        Losses of the first steps, its weights before and after them, flat, and the median
        seconds of a step.
    """
    torch.manual_seed(seed)
    network = build(config).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.lr, fused=True)
    order = epoch_batches(len(data), [seed], 1, config.batch_size)[0][0, :steps]
    batches = [Batch.from_data_list(graphs_of(data, ids)).to(device) for ids in order]

    def step(batch: Batch) -> torch.Tensor:
        optimizer.zero_grad()
        sizes = batch.batch, batch.num_graphs
        loss = (network(batch.x, batch.edge_index, batch.edge_attr, *sizes) - batch.y).abs().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def flat() -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in network.parameters()]).cpu()

    network.train()
    before = flat()
    losses = torch.stack([step(batch) for batch in batches]).cpu()
    after = flat()
    return losses, before, after, median_seconds(lambda: step(batches[0]), again, device)


def graphs_of(data: FlatGraphs, ids: torch.Tensor) -> list[Data]:
    """Graphs of a split as PyG has them."""
    graphs = []
    for i in ids[ids >= 0].tolist():
        nodes, edges = (slice(ptr[i], ptr[i + 1]) for ptr in (data.node_ptr, data.edge_ptr))
        edge_index = data.edge_index[:, edges]
        graphs.append(Data(x=data.x[nodes], edge_index=edge_index, edge_attr=data.edge_attr[edges]))
        graphs[-1].y = data.y[i : i + 1]
    return graphs


def median_seconds(step: Any, times: int, device: str) -> float:
    """Median time of a call, the device idle before and after."""
    seconds = []
    for _ in range(times):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2] if seconds else float("nan")


def synchronize(device: str) -> None:
    """Wait until the device is idle."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def stacked_steps(
    run: Progress, steps: int, again: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Losses [steps, S] of the first steps of all networks, their weights after them, [S, P],
    and the median seconds of a step; leaves no trace."""
    stack = run.stack
    kept = [tensor.clone() for tensor in stack.changed()]
    stack.order.copy_(run.orders(1)[0])
    stack.lr.fill_(run.config.lr)
    stack.begin("train")
    losses = []
    for _ in range(steps):
        stack.sums["train"].zero_()
        stack.calls["train"]()
        losses.append((stack.sums["train"][0] / stack.sums["train"][1]).cpu())
    state = stack.state()
    names = [name for name, _ in run.single.named_parameters()]
    after = torch.cat([state[name].flatten(1) for name in names], dim=1).cpu()

    def step() -> None:
        stack.cursor.zero_()
        stack.calls["train"]()

    seconds = median_seconds(step, again, str(run.device))
    for tensor, value in zip(stack.changed(), kept, strict=True):
        tensor.copy_(value)
    return torch.stack(losses), after, seconds


def measure(run: Progress, device: str, again: int) -> dict[str, float]:
    """Time of a plain and of a stacked step, and how far three steps of both differ.

    Weights behind which a BatchNorm takes their effect away have gradients of rounding errors
    alone, to which Adam gives the size of others: some per cent of an update are noise.
    """
    steps = min(3, run.stack.order.size(1))
    losses, weights, of_all = stacked_steps(run, steps, again)
    of_losses, of_updates, of_one = [], [], []
    for place, seed in enumerate(list(run.seeds)[:2]):
        expected, before, after, seconds = plain_steps(
            run.config, run.host["train"], seed, device, steps, again
        )
        of_losses.append((losses[:, place] / expected - 1).abs().max().item())
        of_updates.append(((weights[place] - after).norm() / (after - before).norm()).item())
        of_one.append(seconds)
    found = {
        "plain_step_seconds": min(of_one),
        "stacked_step_seconds": of_all,
        "stacked_over_plain": of_all / min(of_one),
        "over_one_by_one": of_all / (min(of_one) * len(run.seeds)),
        "relative_difference_of_losses": max(of_losses),
        "relative_difference_of_updates": max(of_updates),
    }
    print(json.dumps(found), flush=True)
    if not (max(of_losses) < 1e-3 and max(of_updates) < 0.3):
        raise RuntimeError("stacked and plain training differ, see the line above")
    return found


def compare(splits: dict[str, FlatGraphs], device: str, batch_size: int) -> None:
    """Time of 16 networks stacked over one by one, for several sizes."""
    for channels, layers in SIZES:
        sizes = dict(hidden_channels=channels, num_layers=layers, batch_size=batch_size)
        config = CONFIGS["GT-ZINC"].replace(**sizes, max_epochs=1)
        networks = []
        for seed in range(16):
            torch.manual_seed(seed)
            networks.append(build(config))
        stack = partial(CapturedStack, engine="eager")
        run = Progress(networks, splits, config, range(16), torch.device(device), stack, None)
        ratio = measure(run, device, 5)["over_one_by_one"]
        print(f"hidden {channels}, {layers} layers: {ratio:.2f} of one by one")


# Training.


class Results:
    """What is written while training goes on."""

    def __init__(self, parsed: argparse.Namespace, config: Config):
        self.parsed, self.config, self.begin = parsed, config, time.perf_counter()
        self.run: Progress | None = None
        self.rows, self.written, self.said = {"history": 0, "measures": 0}, 0.0, 0.0
        cuda = parsed.device.startswith("cuda")
        self.about: dict[str, Any] = {
            "config_name": parsed.config,
            "config": config.to_dict(),
            "seeds": list(range(parsed.seeds)),
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
            "cuda": torch.version.cuda,
            "precision": "float32",
        }
        parsed.out.mkdir(parents=True, exist_ok=True)
        if parsed.state and (kept := parsed.state / ABOUT_FILE).is_file():
            self.about = json.loads(kept.read_bytes()) | self.about  # timings of the first call

    def see(self, run: Progress) -> bool:
        """Measure at the start; then a line every ten seconds and tables every thirty.

        Returns whether time is up.
        """
        if self.run is None:
            self.start(run)
            return False
        now = time.perf_counter()
        if now - self.said >= 10 or run.epoch < 3:
            self.said = now
            last = run.tables["history"]
            last = last[last[:, 1] == run.epoch]
            lrs = [run.seeds[seed].lr for seed in run.running] or [0.0]
            print(
                f"epoch {run.epoch}: {last[0, 6]:.2f} s/epoch, train {last[:, 2].mean():.4f}, "
                f"val {last[:, 3].mean():.4f}, test {last[:, 4].mean():.4f}, "
                f"lr {min(lrs):.1e} to {max(lrs):.1e}, {len(run.running)} seeds run, "
                f"{now - self.begin:.0f} s",
                flush=True,
            )
        if now - self.written >= 30:
            self.write()
        return now - self.begin >= self.parsed.time_limit

    def start(self, run: Progress) -> None:
        """Say what is ready, time it and check it."""
        self.run = run
        print(
            f"ready after {time.perf_counter() - self.begin:.0f} s: {len(run.seeds)} seeds, "
            f"engine {run.stack.engine}, rows {run.shape}, epoch {run.epoch}",
            flush=True,
        )
        if run.epoch == 0:
            again = 30 if run.device.type == "cuda" else 3
            self.about |= measure(run, self.parsed.device, again)

    def write(self) -> None:
        """Append new rows to the table, and write what the run is."""
        self.written, run = time.perf_counter(), self.run
        history, measures = run.frames()
        first = not any(self.rows.values())
        text = (
            measures[self.rows["measures"] :]
            .merge(history[self.rows["history"] :], on=["seed", "epoch"], how="outer")
            .to_csv(index=False, header=first, float_format="%.6g")
        )
        self.rows = {"history": len(history), "measures": len(measures)}
        with (self.parsed.out / "epochs.csv.gz").open("wb" if first else "ab") as file:
            file.write(gzip.compress(text.encode()))  # members of a gzip file may follow each other
        self.about |= {
            "engine": run.stack.engine,
            "epoch": run.epoch,
            "seconds": run.seconds,
            "running": run.running,
            "commit": self.parsed.commit or run.commit,
            "versions": run.versions,
            "shape": run.shape,
            "by_seed": {
                seed: {"best_epoch": one.best_epoch, "best_val": one.best_loss}
                | {"last_epoch": one.last_epoch, "stop_reason": one.stop_reason}
                for seed, one in run.seeds.items()
            },
        }
        self.write_about()

    def write_about(self) -> None:
        """Write what is known of the run."""
        content = json.dumps(self.about, indent=1).encode()
        for folder in filter(None, (self.parsed.out, self.parsed.state)):
            write_atomically(folder / ABOUT_FILE, content)

    def write_weights(self, fit: Fit) -> None:
        """Write best and last weights; last ones in half precision if there is no room."""
        for old in self.parsed.out.glob("*.safetensors"):
            old.unlink()
        room = LARGEST_SUM - sum(path.stat().st_size for path in self.parsed.out.iterdir())
        for name, weights in (("best", fit.best_weights), ("last", fit.last_weights)):
            whole = sum(t.nbytes for state in weights.values() for t in state.values())
            dtype = torch.float32 if whole < room else torch.float16
            files: list[dict[str, torch.Tensor]] = [{}]
            for seed, state in weights.items():
                named = {f"{seed}/{key}": shortened(tensor, dtype) for key, tensor in state.items()}
                size = sum(tensor.nbytes for tensor in named.values())
                if size > room:
                    print(f"no room for the {name} weights of seed {seed}", flush=True)
                    continue
                room -= size + 120 * len(named)  # and its share of the header
                if sum(t.nbytes for t in files[-1].values()) + size > LARGEST_FILE:
                    files.append({})
                files[-1] |= named
            for number, tensors in enumerate(files):
                path = self.parsed.out / f"{name}_{number}.safetensors"
                write_atomically(path, safetensors.torch.save(tensors))
            self.about[f"{name}_weights_dtype"] = str(dtype)
        self.write_about()


def shortened(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A floating tensor in a shorter type, unless a value is too large for it."""
    short = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return short if short.isfinite().all() else tensor


def train(parsed: argparse.Namespace) -> None:
    """Time, check, and train to the end or the time limit."""
    config = CONFIGS[parsed.config]
    if parsed.max_epochs is not None:
        config = config.replace(max_epochs=parsed.max_epochs)
    results = Results(parsed, config)
    splits = read_splits(parsed.data / DATA_FILE)
    print(f"{results.about['device']}, torch {torch.__version__}, {parsed.engine}", flush=True)

    fit = fit_stacked(
        build,
        splits,
        config,
        seeds=range(parsed.seeds),
        folder=parsed.state,
        device=parsed.device,
        stack=partial(CapturedStack, engine=parsed.engine),
        record_epochs=lambda epoch: epoch <= 20 or epoch % parsed.record_every == 0,
        save_seconds=30.0,
        watch=results.see,
        progress=False,
    )
    results.write()
    results.write_weights(fit)
    best = fit.history.loc[fit.history.groupby("seed")["val_loss"].idxmin()]
    last = fit.history.groupby("seed").last()
    print(f"stopped: {fit.stop_reason}")
    print(f"epochs: {last['epoch'].tolist()}")
    for name, rows in (("best", best), ("last", last)):
        print(
            f"{name}: test {rows['test_loss'].mean():.4f} +- {rows['test_loss'].std():.4f}, "
            f"train {rows['train_loss'].mean():.4f}, val {rows['val_loss'].mean():.4f}"
        )


def self_test(device: str, last_engine: str) -> None:
    """Every engine on random graphs: equal to one another and to plain steps, and resumable."""
    splits = {
        name: random_graphs(number, seed)
        for seed, (name, number) in enumerate({"train": 300, "val": 60, "test": 60}.items())
    }
    config = CONFIGS["GT-ZINC"].replace(
        hidden_channels=16, heads=4, num_layers=3, batch_size=32, max_epochs=4, lr_patience=0
    )
    found = {}
    for engine in ENGINES[: ENGINES.index(last_engine) + 1]:
        start, ran = time.perf_counter(), []

        def watch(run: Progress, ran: list[str] = ran) -> None:
            ran.append(run.stack.engine)
            if run.epoch == 0:
                measure(run, device, 10)

        stack = partial(CapturedStack, engine=engine)
        settings = dict(seeds=range(4), device=device, stack=stack, progress=False)
        fit = fit_stacked(build, splits, config, watch=watch, **settings)
        found[engine] = fit.history["train_loss"], fit.observations["spread_mean"]
        others = {"from eager": found["eager"]}
        if engine != "compile+graph":
            with tempfile.TemporaryDirectory() as folder:
                for epochs in (2, 4):
                    shorter = config.replace(max_epochs=epochs)
                    resumed = fit_stacked(build, splits, shorter, folder=folder, **settings)
            others["from a resumed run"] = (
                resumed.history["train_loss"],
                resumed.observations["spread_mean"],
            )
        for name, (losses, spreads) in others.items():
            of_losses = (found[engine][0] / losses - 1).abs().max()
            of_spreads = (found[engine][1] / spreads - 1).abs().max()
            print(f"  relative differences {name}: {of_losses:.1e} {of_spreads:.1e}")
            if not max(of_losses, of_spreads) < 1e-2:
                raise RuntimeError(f"{engine}: another result")
        print(f"{engine} ran as {ran[-1]}: {time.perf_counter() - start:.1f} s", flush=True)


def random_graphs(number: int, seed: int) -> FlatGraphs:
    """Rings with chords and random types, whose target is a sum over types."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, size: int = 1) -> torch.Tensor:
        return torch.randint(high, (size,), generator=generator)

    graphs = []
    for _ in range(number):
        nodes = 8 + int(draw(20))
        ends = torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])
        ends = torch.cat([ends, torch.stack([draw(nodes, 3), draw(nodes, 3)])], dim=1)
        graph = Data(x=draw(28, nodes), edge_index=torch.cat([ends, ends.flip(0)], dim=1))
        graph.edge_attr = (1 + draw(3, ends.size(1))).repeat(2)
        graph.y = (graph.x.float().mean() / 10 + graph.edge_attr.float().mean()).view(1, 1)
        graphs.append(graph)
    return FlatGraphs.of(graphs)


if __name__ == "__main__":
    main()
