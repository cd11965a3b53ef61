"""What recording the scores costs, as ratios within one run.

The published code records one molecule at a time and keeps every tensor; here batches are
summarised as they come, by the row ratio or by all measures. Times are of the bundled test split
and the shipped checkpoint.
"""

import pickle
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch_geometric.loader import DataLoader

from mapkg import hooks
from mapkg.all_measures import AllMeasures
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


@torch.no_grad()
def measure(model: torch.nn.Module, graphs: list, heads: int) -> dict[str, AllMeasures]:
    """All measures of the scores of every layer, streamed."""
    measures = {name: AllMeasures(heads=heads) for name in hooks.resolve(model, SCORES)}

    def update(name: str, score: torch.Tensor, batch) -> None:
        graph = batch.batch[batch.edge_index[0]]
        measures[name].update(score.unsqueeze(0), graph.unsqueeze(0), batch.num_graphs)

    loader = DataLoader(graphs, 128)
    for _ in hooks.scan(model, loader, [*measures], forward=predict, reduce=update):
        pass
    return measures


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
    streamed, every = (
        len(pickle.dumps(look(model, graphs, heads=heads))) for look in (summarise, measure)
    )
    rows = {
        "forward, batches of 128": (lambda: forward(model, graphs, 128, False), 0),
        "all measures, batches of 128": (lambda: measure(model, graphs, heads), every),
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
