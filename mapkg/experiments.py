"""Experiments: from a configuration to tidy tables, one function per question."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from mapkg import checkpoint, hooks
from mapkg.configs import CONFIGS, Config
from mapkg.data import Splits
from mapkg.detection import ActivationSummary
from mapkg.models import build
from mapkg.train import Fit, calibrate_batch_norm, evaluate, fit, predict, seed_all

SCORES = "layers.*.score"
"""The score of every layer, the tensor the massive-activations paper analyses."""

TABLES = ("summary", "trajectory", "graph_maxima", "histogram", "history")
"""The tables of an emergence run."""


@torch.no_grad()
def summarise(
    model: nn.Module,
    graphs: list[Data],
    *,
    names: str | Sequence[str] = SCORES,
    heads: int | None = None,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
) -> dict[str, ActivationSummary]:
    """Summaries of what submodules return for the edges of graphs, in evaluation mode.

    Args:
        model: as for ``train.fit``.
        graphs: the graphs to look at.
        names: submodules whose output has one row per edge, names or patterns.
        heads: number of attention heads if the outputs are scores, for the share of saturated
            sums; None leaves that out.
        batch_size: graphs per forward pass; the result does not depend on it.
        device: where the model is.

    Returns:
        A summary per submodule, in the model's order.
    """
    summaries = {name: ActivationSummary(heads=heads) for name in hooks.resolve(model, names)}
    was_training = model.training
    model.eval()
    for batch in DataLoader(graphs, batch_size):
        batch = batch.to(device)
        graph = batch.batch[batch.edge_index[0]]

        def update(name: str, x: torch.Tensor, graph=graph, size=batch.num_graphs) -> None:
            summaries[name].update(x, graph, size)

        with hooks.record(model, names, reduce=update):
            predict(model, batch)
    model.train(was_training)
    return summaries


def observation_epochs(max_epochs: int) -> list[int]:
    """Epochs at which a long run is looked at: each of the first 20, then every fifth."""
    return [epoch for epoch in range(max_epochs + 1) if epoch <= 20 or epoch % 5 == 0]


@dataclass(frozen=True)
class Emergence:
    """The tables of an emergence run, each row with where it comes from.

    Attributes:
        summary: per state and layer, the statistics of ``ActivationSummary``. States: ``base``
            (untrained, BatchNorm statistics at 0 and 1, as published), ``base_calibrated``
            (untrained, statistics of the training data), ``best`` and ``last`` (weights of the
            epoch with the least validation loss, and of the last one).
        trajectory: per observed epoch and layer, the same statistics; epoch 0 is ``base``.
        graph_maxima: per state, layer and test graph, its largest ratio.
        histogram: per state and layer, counts of -log10 ratio; empty bins are left out.
        history: per epoch, losses and learning rate.
        fit: what training gave, weights included; None if the tables were read from files.
    """

    summary: pd.DataFrame
    trajectory: pd.DataFrame
    graph_maxima: pd.DataFrame
    histogram: pd.DataFrame
    history: pd.DataFrame
    fit: Fit | None = None


def emergence(
    config: Config,
    splits: Splits,
    *,
    seed: int = 0,
    name: str = "custom",
    folder: Path | str | None = None,
    device: str | torch.device = "cpu",
    observe_epochs: Iterable[int] | None = None,
    progress: bool = True,
) -> Emergence:
    """Train a network and watch massive activations emerge on the test split.

    Args:
        config: model and schedule.
        splits: the data.
        seed: of initial weights, order and dropout.
        name: what the tables call the configuration.
        folder: where state, checkpoints (``base``, ``best``, ``last``) and tables are written;
            a run that was stopped goes on from there. None keeps all in memory.
        device: where to compute.
        observe_epochs: epochs after which the test split is looked at; None means every one.
        progress: whether to show a progress bar on stderr.

    Source: massive-activations paper, base against trained.
    """
    device = torch.device(device)
    observed = None if observe_epochs is None else {0, *observe_epochs}
    settings = dict(heads=config.heads, batch_size=config.batch_size, device=device)

    def observe(model: nn.Module, epoch: int) -> list[dict[str, Any]]:
        if observed is not None and epoch not in observed:
            return []
        summaries = summarise(model, splits.test, **settings)
        return [
            {"epoch": epoch, "layer": layer, **summary.statistics()}
            for layer, summary in enumerate(summaries.values())
        ]

    seed_all(seed)
    model = build(config).to(device)
    base_weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    run = fit(
        model,
        splits,
        config,
        seed=seed,
        folder=folder,
        device=device,
        observe=observe,
        progress=progress,
    )
    constant = {
        "config": name,
        "changes": _changes(config, name),
        "dataset": splits.description.title,
        "seed": seed,
        "epochs": len(run.history),
        "versions": run.versions,
        "commit": run.commit,
    }
    weights = {"base": base_weights, "base_calibrated": base_weights}
    weights |= {"best": run.best_weights, "last": run.last_weights}
    summary, maxima, histogram = [], [], []
    for state, values in weights.items():
        model.load_state_dict(values)
        if state == "base_calibrated":
            calibrate_batch_norm(model, splits.train, batch_size=config.batch_size, device=device)
        error = evaluate(model, splits.test, batch_size=config.batch_size, device=device)
        for layer, found in enumerate(summarise(model, splits.test, **settings).values()):
            row = {"state": state, "layer": layer}
            summary.append({**row, "test_mae": error, **found.statistics()})
            maxima.append(
                pd.DataFrame({"graph": range(len(found.graph_maxima))}).assign(
                    **row, max_ratio=found.graph_maxima
                )
            )
            counts = found.neg_log_ratio.counts
            filled = counts.nonzero().flatten()
            histogram.append(
                pd.DataFrame(
                    {
                        "bin": filled.tolist(),
                        "low": found.neg_log_ratio.edges[filled].tolist(),
                        "count": counts[filled].tolist(),
                    }
                ).assign(**row)
            )
    tables = {
        "summary": pd.DataFrame(summary).assign(best_epoch=run.best_epoch),
        "trajectory": run.observations,
        "graph_maxima": pd.concat(maxima, ignore_index=True),
        "histogram": pd.concat(histogram, ignore_index=True),
        "history": run.history,
    }
    tables = {key: table.assign(**constant) for key, table in tables.items()}
    if folder is not None:
        _write(Path(folder), tables, weights, config, run, constant)
    return Emergence(**tables, fit=run)


def read_emergence(folder: Path | str, prefix: str = "") -> Emergence:
    """Read the tables that ``emergence`` or ``collect`` wrote.

    Args:
        folder: where they are.
        prefix: what their file names begin with.

    Raises:
        FileNotFoundError: if a table is missing.
    """
    paths = {table: Path(folder) / f"{prefix}{table}.csv.gz" for table in TABLES}
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(
                f"no table at {path}; write it with python -m mapkg train and collect"
            )
    return Emergence(**{table: pd.read_csv(path) for table, path in paths.items()})


def collect(folders: Sequence[Path | str], output: Path | str) -> list[Path]:
    """Join the tables of several runs into one set, for ``data/results``.

    Args:
        folders: run folders, as ``emergence`` wrote them.
        output: path prefix of the joined tables, for example ``data/results/emergence_gt_zinc_``.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: if a run is not finished.
    """
    runs = [read_emergence(folder) for folder in folders]
    paths = []
    for table in TABLES:
        joined = pd.concat([getattr(run, table) for run in runs], ignore_index=True)
        path = Path(f"{output}{table}.csv.gz")
        _write_table(path, joined)
        paths.append(path)
    return paths


def _changes(config: Config, name: str) -> str:
    """How a configuration differs from the named one, so that both describe it fully."""
    stated = CONFIGS[name].to_dict() if name in CONFIGS else {}
    changed = {k: v for k, v in config.to_dict().items() if k not in stated or stated[k] != v}
    return "; ".join(f"{key}={value}" for key, value in changed.items())


def _write_table(path: Path, table: pd.DataFrame) -> None:
    import gzip

    text = table.to_csv(index=False, float_format="%.6g").encode()
    checkpoint.write_atomically(path, gzip.compress(text, mtime=0))


def _write(
    folder: Path,
    tables: dict[str, pd.DataFrame],
    weights: dict[str, dict[str, torch.Tensor]],
    config: Config,
    run: Fit,
    constant: dict[str, Any],
) -> None:
    epochs = {"base": 0, "best": run.best_epoch, "last": len(run.history)}
    for state, epoch in epochs.items():
        checkpoint.save(
            folder / state,
            weights[state],
            config,
            name=constant["config"],
            dataset=constant["dataset"],
            seed=constant["seed"],
            epoch=epoch,
            stop_reason=run.stop_reason,
            versions=run.versions,
            commit=run.commit,
            history=run.history.to_dict("records"),
        )
    for name, table in tables.items():
        _write_table(folder / f"{name}.csv.gz", table)
    print(f"wrote tables and checkpoints to {folder}", file=sys.stderr)
