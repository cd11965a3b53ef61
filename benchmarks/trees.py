"""A training step on trees, three ways, as ratios within one run.

    python benchmarks/trees.py --depth 5

By PyG's layers, level by level without scatter, and with what keys of one permutation share
computed once (not with PairNorm or in GIN, whose norms see other nodes). One thread; the batch is
the published one of 1,024 examples, all keys of one permutation after another. A ratio is the
median over rounds of times that were taken one after the other.
"""

import argparse
import sys
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, nn
from torch_geometric.loader import DataLoader
from tqdm import tqdm

from studies.data.networks import level_order, neighbors_match
from studies.neighbors_match import untrained, variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    trees = neighbors_match(parsed.depth)[: parsed.batch_size]
    pairs = trees.pairs[:, level_order(parsed.depth)]
    keys, tree = pairs[:, 0, 0], torch.arange(len(pairs)) // 2**parsed.depth
    first = pairs[:: 2**parsed.depth]
    batch = next(iter(DataLoader(trees, batch_size=len(trees))))
    ways: dict[tuple[str, str], Callable[[], Tensor]] = {}
    for settings in variants():
        name = " ".join(str(value) for value in settings.values() if value is not None)
        network = untrained(parsed.depth, 0, **settings)
        ways[name, "PyG"] = lambda n=network: n(batch.x, batch.edge_index, batch.batch)
        ways[name, "dense"] = lambda n=network: n.dense(pairs)
        if network.can_share:
            ways[name, "shared"] = lambda n=network: n.shared(first, keys, tree)
    rows = []
    for number in tqdm(range(-1, parsed.rounds), "rounds", file=sys.stderr):
        for (name, way), forward in ways.items():
            start = time.perf_counter()
            nn.functional.cross_entropy(forward(), trees.y).backward()
            seconds = time.perf_counter() - start
            if number >= 0:  # the first round warms up
                rows.append({"network": name, "way": way, "round": number, "seconds": seconds})
    seconds = pd.DataFrame(rows).set_index(["network", "round", "way"])["seconds"].unstack()
    factors = seconds[["dense", "shared"]].rdiv(seconds["PyG"], axis=0)
    table = factors.groupby("network", sort=False).median()
    table.insert(0, "PyG, ms", 1000 * seconds["PyG"].groupby("network", sort=False).median())
    print(f"trees of depth {parsed.depth}, {len(trees)} examples: times faster than PyG's layers")
    print(table.round(1).to_string(na_rep="-"))


if __name__ == "__main__":
    main()
