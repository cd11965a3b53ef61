"""Experiments: from a configuration to tidy tables, one function per question."""

import gzip
import sys
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch_geometric.data import Data

from mapkg import checkpoint
from mapkg.configs import CONFIGS, Config
from mapkg.data import ATOM_TYPES, BOND_TYPES, Description, Splits
from mapkg.models import build
from mapkg.observation import CLAMPED, looked_at, observe_states, summarise
from mapkg.train import Fit, fit, seed_all

TABLES = ("summary", "trajectory", "graph_maxima", "histogram", "history")
"""The tables of an emergence run."""


def count_types(splits: Splits) -> pd.DataFrame:
    """How often each atom type and bond type occurs in each split.

    Returns:
        Columns ``split``, ``kind`` (atom or bond), ``id``, ``type`` and ``count``. Bonds are
        counted once per direction.
    """
    rows = []
    for split in ("train", "val", "test"):
        graphs = getattr(splits, split)
        for kind, ids in (("atom", "x"), ("bond", "edge_attr")):
            names = dict(enumerate(ATOM_TYPES)) if kind == "atom" else BOND_TYPES
            counts = torch.cat([graph[ids] for graph in graphs]).bincount(minlength=max(names) + 1)
            rows += [
                {"split": split, "kind": kind, "id": i, "type": name, "count": int(counts[i])}
                for i, name in names.items()
            ]
    return pd.DataFrame(rows)


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
    config = _for_data(config, splits.description)
    heads = config.heads if config.architecture in CLAMPED else None
    names = looked_at(config.architecture)
    settings = dict(names=names, heads=heads, batch_size=config.batch_size, device=device)

    def observe(model: nn.Module, epoch: int) -> list[dict[str, Any]]:
        if observed is not None and epoch not in observed:
            return []
        summaries = summarise(model, splits.test, **settings)
        return [
            {"epoch": epoch, "layer": layer, **summary.statistics()}
            for layer, summary in enumerate(summaries.values())
        ]

    if len(splits.test) == 0:
        raise ValueError("the test split is empty; there is nothing to look at")
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
    tables = observe_states(weights, config, splits, device=device)
    tables["summary"] = tables["summary"].assign(best_epoch=run.best_epoch)
    tables |= {"trajectory": run.observations, "history": run.history}
    tables = {key: table.assign(**constant) for key, table in tables.items()}
    if folder is not None:
        _write(Path(folder), tables, weights, config, run, constant)
    return Emergence(**tables, fit=run)


def examine_checkpoint(
    path: Path | str, splits: Splits, *, device: str | torch.device = "cpu"
) -> dict[str, pd.DataFrame]:
    """The tables of a saved network beside those of its untrained self.

    The untrained network is built again from the seed in the checkpoint.

    Args:
        path: a checkpoint that ``emergence`` wrote.
        splits: the data to look at; its training split calibrates the untrained network.
        device: where to compute.

    Returns:
        The tables ``summary``, ``graph_maxima``, ``histogram`` (as ``observe_states``; the
        saved weights are the state ``best``) and ``history``, with the checkpoint's seed,
        epoch, versions and commit in each row.
    """
    model, information = checkpoint.load(path)
    config = Config.from_dict(information["config"])
    seed_all(information["seed"])
    base = build(config).state_dict()
    weights = {"base": base, "base_calibrated": base, "best": model.state_dict()}
    tables = observe_states(weights, config, splits, device=device)
    tables["history"] = pd.DataFrame(information["history"])
    named = {key: information[key] for key in ("seed", "epoch", "versions", "commit")}
    named |= {"config": information["name"], "dataset": splits.description.title}
    return {
        key: table.assign(**{name: value for name, value in named.items() if name not in table})
        for key, table in tables.items()
    }


def emergence_table(summary: pd.DataFrame, states: Sequence[str]) -> pd.DataFrame:
    """A summary as a table to read: a row per layer, columns by statistic and state.

    Args:
        summary: rows of one seed of the summary of ``Emergence``.
        states: which states, in order; ``base_calibrated`` is called calibrated.

    Returns:
        Texts of three digits, or whole numbers. An edge with an MA has a massive activation in
        at least one channel; the share of such edges is given. The typical median is the
        median over edges of the row's median magnitude.
    """
    columns = {
        "max_ratio": "largest ratio",
        "share_rows_with_massive": "edges with an MA",
        "max_abs": "largest |s|",
        "row_median_q50": "typical median |s|",
    }
    wide = summary.pivot(index="layer", columns="state", values=list(columns))
    wide = wide[[(statistic, state) for statistic in columns for state in states]]
    wide.columns = pd.MultiIndex.from_tuples(
        [(columns[statistic], state.removeprefix("base_")) for statistic, state in wide.columns]
    )
    return wide.map(lambda value: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}")


def range_over_seeds(summary: pd.DataFrame, statistic: str) -> pd.DataFrame:
    """Least and greatest value of a statistic over seeds, a row per layer, a column per state.

    Args:
        summary: the summary of ``Emergence``, of several seeds.
        statistic: one of its columns; values are rounded to whole numbers.
    """
    values = summary.groupby(["layer", "state"], sort=False)[statistic].agg(["min", "max"])
    texts = values.apply(lambda row: f"{row['min']:,.0f} to {row['max']:,.0f}", axis=1)
    return texts.unstack("state")


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


def permute_targets(splits: Splits, seed: int) -> Splits:
    """The same data with the targets of the training and validation graphs permuted.

    A null for the question whether massive activations need something to learn: graphs and
    targets are as before, each within its split, but have nothing to do with one another. The
    test split stays as it is.

    Args:
        splits: whole graphs.
        seed: of the permutations.
    """
    generator = torch.Generator().manual_seed(seed)

    def permuted(graphs: list[Data]) -> list[Data]:
        copies = [copy(graph) for graph in graphs]  # a copy shares tensors, not attributes
        order = torch.randperm(len(graphs), generator=generator).tolist()
        for graph, other in zip(copies, order, strict=True):
            graph.y = graphs[other].y
        return copies

    about = splits.description
    return Splits(
        train=permuted(splits.train),
        val=permuted(splits.val),
        test=splits.test,
        description=replace(about, title=f"{about.title}, targets permuted"),
    )


def _for_data(config: Config, about: Description) -> Config:
    """The configuration, its open embedding sizes taken from the data set.

    Raises:
        ValueError: if the data set does not fit: more types than the tables have, another
            number of targets, or a loss for another task.
    """
    for needed in ("num_node_types", "num_edge_types", "edge_channels"):
        has, needs = getattr(config, needed), getattr(about, needed)
        if has is None:
            config = config.replace(**{needed: needs})
        elif needs is not None and not _at_least(has, needs):
            raise ValueError(
                f"{needed}: the configuration has {has}, but the data set {about.title} has {needs}"
            )
    if config.out_channels != about.num_targets:
        raise ValueError(
            f"out_channels: the configuration has {config.out_channels}, but the data set "
            f"{about.title} has {about.num_targets} targets"
        )
    expected = "l1" if about.task == "graph regression" else "bce"
    if config.loss != expected:
        raise ValueError(
            f"loss: the configuration has {config.loss!r}, but the task of {about.title} is "
            f"{about.task}, which needs {expected!r}"
        )
    return config


def _at_least(has: int | tuple[int, ...], needs: int | tuple[int, ...]) -> bool:
    has, needs = (size if isinstance(size, tuple) else (size,) for size in (has, needs))
    return len(has) == len(needs) and all(h >= n for h, n in zip(has, needs, strict=True))


def _changes(config: Config, name: str) -> str:
    """How a configuration differs from the named one, so that both describe it fully.

    A size that the named one leaves to the data set is no difference.
    """
    stated = CONFIGS[name].to_dict() if name in CONFIGS else {}
    open_sizes = {key for key, value in stated.items() if value is None and key != "readout"}
    changed = {
        k: v
        for k, v in config.to_dict().items()
        if k not in open_sizes and (k not in stated or stated[k] != v)
    }
    return "; ".join(f"{key}={value}" for key, value in changed.items()) or "none"


def _write_table(path: Path, table: pd.DataFrame) -> None:
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
