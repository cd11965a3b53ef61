"""A training step of GT on molecules against the same network on DGL's message passing.

The published code computes its attention with DGL: per-edge functions, then two sums at the
targets. Here that is written anew from the equations, with the weights of our network, so that
both give the same loss and gradients, which is checked first. DGL is an optional install, beside
the locked packages: ``pip install --no-deps dgl==1.1.3``.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch
from tqdm import tqdm

from mapkg.models import EdgeAttention, build
from studies.data import load
from studies.emergence import fit_to_data
from studies.published import CONFIGS

try:
    import dgl
except ImportError as error:
    raise SystemExit("DGL is missing: .venv/bin/pip install --no-deps dgl==1.1.3") from error


class DGLAttention(EdgeAttention):
    """The equations of ``EdgeAttention`` on a DGL graph, which stands in ``graph``."""

    graph: "dgl.DGLGraph"

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> tuple[Tensor, Tensor]:
        graph, scale = self.graph.local_var(), math.sqrt(self.head_channels)
        for name in ("query", "key", "value"):
            graph.ndata[name] = self.split_heads(getattr(self, name)(x))
        graph.edata["edge"] = self.split_heads(self.edge(edge_attr))
        graph.apply_edges(lambda edges: {"score": edges.src["key"] * edges.dst["query"] / scale})
        graph.apply_edges(lambda edges: {"score": edges.data["score"] * edges.data["edge"]})
        score = graph.edata["score"].flatten(1)
        graph.apply_edges(
            lambda edges: {"weight": edges.data["score"].sum(-1, keepdim=True).clamp(-5, 5).exp()}
        )
        message, total = dgl.function.u_mul_e("value", "weight", "m"), dgl.function.copy_e
        graph.update_all(message, dgl.function.sum("m", "attended"))
        graph.update_all(total("weight", "m"), dgl.function.sum("m", "total"))
        attended = graph.ndata["attended"] / (graph.ndata["total"] + 1e-6)
        return attended.flatten(1), score


def on_dgl(network: nn.Module, batch: Batch) -> nn.Module:
    """A copy of the network with the attention of every layer on DGL."""
    network = copy.deepcopy(network)
    source, target = batch.edge_index
    for layer in network.layers:
        layer.attention.__class__ = DGLAttention
        layer.attention.graph = dgl.graph((source, target), num_nodes=batch.num_nodes)
    return network


def stepper(network: nn.Module, batch: Batch, *, bf16: bool = False) -> Callable[[], Tensor]:
    """A training step with Adam, as a function that returns the loss."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            prediction = network(batch.x, batch.edge_index, batch.edge_attr, batch.batch)
        loss = (prediction.float().flatten() - batch.y.flatten()).abs().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="steps of each, in turn")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()

    splits = load("moses")
    batch = Batch.from_data_list([splits.train[i] for i in range(128)])
    torch.manual_seed(0)
    ours = build(fit_to_data(CONFIGS["GT-ZINC"], splits.description))
    theirs = on_dgl(ours, batch)
    networks = {"DGL": theirs, "ours": ours, "ours, bf16": copy.deepcopy(ours)}
    for name in ("ours", "ours, bf16"):
        networks[f"{name}, layers compiled"] = compiled = copy.deepcopy(ours)
        for layer in compiled.layers:  # one compilation serves all, and batches of any size
            layer.compile(dynamic=True)
    steps = {name: stepper(n, batch, bf16="bf16" in name) for name, n in networks.items()}
    torch.testing.assert_close(steps["ours"](), steps["DGL"]())
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)

    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in tqdm(range(arguments.rounds + 3), desc=f"{threads} threads"):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if turn >= 3:
                    seconds[name].append(time.perf_counter() - start)
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        rows += [
            {"threads": threads, "step": name, "ms": 1e3 * value, "ratio": value / middle["DGL"]}
            for name, value in middle.items()
        ]
    print(pd.DataFrame(rows).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
