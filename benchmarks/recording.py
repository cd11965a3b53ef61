"""What recording the scores costs, as ratios within one run.

The published code records one molecule at a time and keeps every tensor; here batches are
summarised as they come. Times are of the bundled test split and the shipped checkpoint.
"""

import pickle
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch_geometric.loader import DataLoader

from mapkg import hooks
from mapkg.evaluation import predict
from mapkg.models.network import SCORES
from studies import checkpoint
from studies.data import BUNDLED, load
from studies.observation import summarise

REPEATS = 3


@torch.no_grad()
def forward(model: torch.nn.Module, graphs: list, batch_size: int, keep: bool) -> int:
    """A pass over the graphs; returns the bytes of the tensors that were kept."""
    names = SCORES if keep else []
    with hooks.record(model, names) as kept:
        for batch in DataLoader(graphs, batch_size):
            predict(model, batch)
    return sum(tensor.nbytes for tensors in kept.values() for tensor in tensors)


def seconds(function: Callable[[], object]) -> float:
    """The least time of several runs."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    model, information = checkpoint.load(BUNDLED / "checkpoints" / "gt_moses_seed0")
    graphs, heads = load("moses").test, information["config"]["heads"]
    streamed = len(pickle.dumps(summarise(model, graphs, heads=heads)))
    rows = {
        "forward, batches of 128": (lambda: forward(model, graphs, 128, False), 0),
        "summarised, batches of 128": (lambda: summarise(model, graphs, heads=heads), streamed),
        "kept, batches of 128": (
            lambda: forward(model, graphs, 128, True),
            forward(model, graphs, 128, True),
        ),
        "kept, one at a time (as published)": (
            lambda: forward(model, graphs, 1, True),
            forward(model, graphs, 1, True),
        ),
    }
    table = pd.DataFrame(
        {
            name: {"seconds": seconds(function), "megabytes kept": size / 1e6}
            for name, (function, size) in rows.items()
        }
    ).T
    table["time / forward"] = table["seconds"] / table["seconds"].iloc[0]
    print(table.round(2).to_string())


if __name__ == "__main__":
    main()
