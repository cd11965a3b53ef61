"""Train a network and watch massive activations emerge."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from mapkg.models.config import Config
from studies import checkpoint
from studies.data import Description, Splits
from studies.extras import build
from studies.observation import observe_states, summarise_scores
from studies.provenance import commit, versions
from studies.published import CONFIGS
from studies.results import Emergence
from studies.tables import write as write_table
from studies.train import Fit, fit, seed_all

_SIZES = ("num_node_types", "num_edge_types", "edge_channels")


def observation_epochs(max_epochs: int) -> list[int]:
    """Epochs at which a long run is looked at: each of the first 20, then every fifth."""
    return [epoch for epoch in range(max_epochs + 1) if epoch <= 20 or epoch % 5 == 0]


def emergence(
    config: Config,
    splits: Splits,
    *,
    seed: int = 0,
    name: str = "custom",
    folder: Path | str | None = None,
    device: str | torch.device = "cpu",
    observe_epochs: Iterable[int] | None = None,
    keep_every: int | None = None,
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
        keep_every: weights are kept in the folder each time this many epochs are done, and
            before the first, as the checkpoints ``epoch_000``, ...; None keeps none.
        progress: whether to show a progress bar on stderr.

    Raises:
        ValueError: if the test split is empty, or weights are to be kept without a folder.

    Source: massive-activations paper, base against trained.
    """
    if keep_every is not None and (folder is None or keep_every < 1):
        raise ValueError(
            "keep_every: expected 1 or more, with a folder to keep the weights in, got "
            f"{keep_every} and folder={folder}"
        )
    device = torch.device(device)
    observed = None if observe_epochs is None else {0, *observe_epochs}
    config = fit_to_data(config, splits.description)

    origin = {"name": name, "dataset": splits.description.title, "seed": seed}
    origin |= {"versions": versions(), "commit": commit()}

    def observe(model: nn.Module, epoch: int) -> list[dict[str, Any]]:
        if folder is not None and keep_every is not None and epoch % keep_every == 0:
            path = Path(folder) / f"epoch_{epoch:03d}"
            checkpoint.save(path, model.state_dict(), config, epoch=epoch, **origin)
        if observed is not None and epoch not in observed:
            return []
        return [
            {"epoch": epoch, "layer": layer, **summary.statistics()}
            for layer, summary in enumerate(summarise_scores(model, config, splits.test))
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
        path: a checkpoint that ``emergence`` wrote; those of single epochs have no history.
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
    tables["history"] = pd.DataFrame(information.get("history", []))
    named = {key: information[key] for key in ("seed", "epoch", "versions", "commit")}
    named |= {"config": information["name"], "dataset": splits.description.title}
    return {
        key: table.assign(**{name: value for name, value in named.items() if name not in table})
        for key, table in tables.items()
    }


def fit_to_data(config: Config, about: Description) -> Config:
    """The configuration, its open embedding sizes taken from the data set.

    Args:
        config: sizes that are None are open.
        about: what the data set needs.

    Raises:
        ValueError: if the data set does not fit: more types than the tables have, another
            number of targets, or a readout or loss for another task.
    """
    for needed in _SIZES:
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
    is_of_nodes = about.task == "node classification"
    if (config.readout is None) != is_of_nodes:
        raise ValueError(
            f"readout: the configuration has {config.readout!r}, but the task of {about.title} is "
            f"{about.task}, which needs {'None' if is_of_nodes else 'mean or sum'}"
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
    open_sizes = {size for size in _SIZES if size in stated and stated[size] is None}
    changed = {
        k: v
        for k, v in config.to_dict().items()
        if k not in open_sizes and (k not in stated or stated[k] != v)
    }
    return "; ".join(f"{key}={value}" for key, value in changed.items()) or "none"


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
        write_table(folder / f"{name}.csv.gz", table)
    print(f"wrote tables and checkpoints to {folder}", file=sys.stderr)
