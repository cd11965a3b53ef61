"""Seeds of networks for nodes and for trees at once, over one by one, as ratios within one run.

    python benchmarks/stacked_nodes.py cora --seeds 5

A step's gradients of several networks without dropout by ``torch.func.vmap``, over those of one
network after the other as they are trained; the largest difference of both is printed beside. One
thread; a ratio is the median over rounds of processor times that were taken in turn.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from studies.data import load
from studies.deep import Variant
from studies.neighbors_match import untrained
from studies.tasks import Examples

# Architecture, channels of a head, heads, layers.
NODES = [("gat", 4, 2, 10), ("gat", 16, 4, 10), ("gat", 16, 4, 30), ("gt", 16, 4, 10)]
TREES = [2, 3, 4]  # depths
Loss = Callable[[nn.Module], Tensor]


class Of(nn.Module):
    """A loss as the forward pass of a module, which ``functional_call`` can run."""

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self) -> Tensor:
        return self.loss(self.network)


def compare(networks: Sequence[nn.Module], alone: Loss, stacked: Loss, rounds: int) -> str:
    """The ratio of times and the difference of gradients."""
    single = Of(networks[0], stacked)
    weights, _ = stack_module_state([Of(network, stacked) for network in networks])
    step = vmap(grad(lambda own: functional_call(single, own, ())))

    def at_once() -> list[Tensor]:
        return [*step(weights).values()]

    def one_by_one() -> list[Tensor]:
        each = [torch.autograd.grad(alone(n), [*n.parameters()]) for n in networks]
        return [torch.stack(parts) for parts in zip(*each, strict=True)]

    seconds: dict[Callable, list[float]] = {at_once: [], one_by_one: []}
    for _ in range(rounds + 1):
        for way, taken in seconds.items():
            start = time.process_time()
            way()
            taken.append(time.process_time() - start)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)][1:]  # the first warms up
    pairs = zip(at_once(), one_by_one(), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    return f"{statistics.median(ratios):.2f} of one by one, gradients differ by {difference:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", nargs="?", default="cora")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    splits, seeds = load(parsed.dataset), range(parsed.seeds)
    graph, nodes, lines = splits.train.graph, splits.train.nodes, []

    def of_nodes(network: nn.Module) -> Tensor:
        return cross_entropy(network(graph.x, graph.edge_index)[nodes], graph.y[nodes])

    for architecture, hidden, heads, layers in tqdm(NODES, "nodes", file=sys.stderr):
        about = dict(architecture=architecture, hidden_channels=hidden, heads=heads)
        variant = Variant(**about, dropout=0.0, attention_dropout=0.0)
        networks = [variant.build(layers, splits, seed) for seed in seeds]
        found = compare(networks, of_nodes, of_nodes, parsed.rounds)
        lines.append(f"{architecture}, {hidden} x {heads} channels, {layers} layers: {found}")
    for depth in tqdm(TREES, "trees", file=sys.stderr):
        train = Examples(load(f"trees-{depth}").train)
        chosen = next(train.batches(1024, "grouped"))

        def shared(network: nn.Module, of=train, chosen=chosen) -> Tensor:
            return cross_entropy(of.scores(network, chosen), of.y[chosen])

        def dense(network: nn.Module, of=train, chosen=chosen) -> Tensor:
            return cross_entropy(network.dense(of.pairs[chosen]), of.y[chosen])

        networks = [untrained(depth, seed, architecture="gat") for seed in seeds]
        found = compare(networks, shared, dense, parsed.rounds)
        lines.append(f"gat on trees of depth {depth}: {found}")
    print(f"{parsed.seeds} networks at once, {parsed.dataset}:", *lines, sep="\n")


if __name__ == "__main__":
    main()
