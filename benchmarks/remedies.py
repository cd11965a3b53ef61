"""A training step with each remedy, as ratios to a step without, within one run.

    python benchmarks/remedies.py -o data/results/remedy_times.csv.gz

Networks have their published sizes, the batch is one of bundled molecules, one thread. All steps
of a round are timed one after the other, so that what slows the machine slows all; a row is a
round, ``factor`` its time over that of the same architecture without a remedy.
"""

import argparse
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from mapkg.evaluation import batches, predict, targets
from mapkg.models.network import build
from studies.commands import overrides
from studies.data import load
from studies.emergence import fit_to_data
from studies.explicit_bias import ARMS, OTHERS, SAME
from studies.files import commit, versions
from studies.published import CONFIGS, grid
from studies.results import MODELS
from studies.tables import write as write_table

STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("-o", "--output", type=Path, help="a .csv.gz file")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    splits = load("moses")
    (batch,) = batches(splits.train[:128], 128)
    networks = {}
    for model in MODELS:
        for arm in (*ARMS, *OTHERS) if model == "SAN" else ARMS:
            name = f"{model.lower()}_zinc_{arm}"
            options = grid()[SAME.get(name, name)]["options"].replace("--set", "")
            config = CONFIGS[f"{model}-ZINC"].replace(**overrides(options.split()))
            network = build(fit_to_data(config, splits.description))
            optimiser = torch.optim.Adam(network.parameters(), weight_decay=config.weight_decay)
            networks[model, arm] = network, optimiser
    rows = []
    for number in tqdm(range(-1, parsed.rounds), "rounds", file=sys.stderr):
        for (model, arm), (network, optimiser) in networks.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                step(network, optimiser, batch)
            seconds = (time.perf_counter() - start) / STEPS
            if number >= 0:  # the first round warms up
                rows.append({"label": model, "arm": arm, "round": number, "seconds": seconds})
    table = pd.DataFrame(rows)
    none = table[table["arm"] == "none"].set_index(["label", "round"])["seconds"]
    table["factor"] = (
        table["seconds"] / none.loc[list(zip(table["label"], table["round"], strict=True))].array
    )
    if parsed.output is not None:
        write_table(parsed.output, table.assign(versions=versions(), commit=commit()))
    quantiles = table.groupby(["label", "arm"], sort=False)["factor"].quantile([0.05, 0.5, 0.95])
    print(quantiles.unstack().round(3).to_string())


def step(network: nn.Module, optimiser: torch.optim.Optimizer, batch) -> None:
    """One step of training."""
    optimiser.zero_grad()
    (predict(network, batch) - targets(batch)).abs().mean().backward()
    optimiser.step()


if __name__ == "__main__":
    main()
