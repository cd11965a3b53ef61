"""Write the tracked tables of a finished run of ``benchmarks/stacked.py``.

    python benchmarks/stacked_tables.py RUN data/results/converged_gt_zinc_

RUN is its output folder.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors.torch
import torch

from mapkg.evaluation import predictions
from mapkg.models.config import Config
from studies.converged import thinned, windows, with_measures, with_phases
from studies.data import Splits, load
from studies.extras import build
from studies.files import commit, versions
from studies.tables import write as write_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("output", help="what the names of the tables begin with")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    about, run = read_run(parsed.run)
    tables = {
        "epochs": thinned(run),
        "windows": windows(run),
        "errors": errors(parsed.run, load("zinc")),
    }
    origin = {"config": about["config_name"], "dataset": "ZINC-12k", "machine": about["device"]}
    origin |= {"versions": about["versions"], "commit": about["commit"]}
    for name, table in tables.items():
        path = Path(f"{parsed.output}{name}.csv.gz")
        write_table(path, table.assign(**origin))
        print(f"{path}: {len(table)} rows, {path.stat().st_size} bytes")


def read_run(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """What a run is, and a row per seed, recorded epoch and layer, with its measures."""
    about = json.loads((folder / "run.json").read_text())
    every = pd.read_csv(folder / "epochs.csv.gz")
    best = {int(seed): found["best_epoch"] for seed, found in about["by_seed"].items()}
    return about, with_measures(with_phases(every, best, about["config"]["lr"]))


def errors(folder: Path, splits: Splits, batch_size: int = 128) -> pd.DataFrame:
    """Errors of a run's stored weights in evaluation mode, a row per seed, state and split.

    ``mae`` is the mean over molecules, ``mae_of_batches`` the mean of the means of batches, as the
    anchor's code has it, and ``recorded`` what the run itself wrote at that epoch: for ``train``
    the running mean of the epoch, with BatchNorm in training mode and weights that still move.
    """
    about = json.loads((folder / "run.json").read_text())
    model = build(Config.from_dict(about["config"]))
    history = pd.read_csv(folder / "epochs.csv.gz").drop_duplicates(["seed", "epoch"])
    history = history.set_index(["seed", "epoch"])
    rows = []
    for state in ("best", "last"):
        tensors = {}
        for path in sorted(folder.glob(f"{state}_*.safetensors")):
            tensors |= safetensors.torch.load_file(path)
        for seed in about["seeds"]:
            own = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{seed}/")}
            model.load_state_dict(own)
            row = {"seed": seed, "state": state}
            row["precision"] = about[f"{state}_weights_dtype"].removeprefix("torch.")
            row["epoch"] = about["by_seed"][str(seed)][f"{state}_epoch"]
            for split in ("train", "val", "test"):
                graphs = getattr(splits, split)
                predicted, target = predictions(model, graphs, batch_size=batch_size)
                error = (predicted - target).abs().double()
                means = torch.stack([part.mean() for part in error.split(batch_size)])
                measured = {"mae": error.mean().item(), "mae_of_batches": means.mean().item()}
                measured["recorded"] = history[f"{split}_loss"][seed, row["epoch"]]
                rows.append(row | {"split": split} | measured)
    return pd.DataFrame(rows).assign(evaluated_with=versions(), evaluated_at=commit())


if __name__ == "__main__":
    main()
