"""Train a network and watch its row ratios become massive, beside controls without training."""

import sys
from collections.abc import Iterable, Mapping, Sequence, Sized
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn
from torch_geometric.data import Data
from tqdm import tqdm

from mapkg.evaluation import calibrate_batch_norm
from mapkg.measures import MASSIVE_RATIO
from mapkg.models.config import Config
from studies import checkpoint, figures
from studies.data import Description, NodesOfGraph, Splits
from studies.extras import build
from studies.figures import STATE_COLORS, STATES, THRESHOLD_LOOK
from studies.files import alone, commit, versions
from studies.observation import observe_states, summarise_scores
from studies.published import CONFIGS
from studies.results import Emergence
from studies.tables import write as write_table
from studies.train import fit, seed_all

CALIBRATION_GRAPHS = 1000
"""How many training graphs set the BatchNorm statistics of an untrained network."""

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
    """Train a network and look at the scores of the test split after each epoch.

    ``name`` is what the tables call the configuration. ``folder`` gets state, tables and the
    checkpoints ``base``, ``best`` and ``last``, and a run that was stopped goes on from there; None
    keeps all in memory. ``observe_epochs`` are those that are looked at, all if None. Weights are
    kept in the folder after each ``keep_every`` epochs, as the checkpoints ``epoch_000``, ...

    Source: massive-activations paper, base against trained.
    """
    if len(splits.test) == 0:
        raise ValueError("the test split is empty; there is nothing to look at")
    device = torch.device(device)
    observed = None if observe_epochs is None else {0, *observe_epochs}
    config = fit_to_data(config, splits.description)
    dataset = splits.description.title
    origin = {"name": name, "dataset": dataset, "seed": seed}

    def observe(model: nn.Module, epoch: int) -> list[dict[str, Any]]:
        if folder is not None and keep_every is not None and epoch % keep_every == 0:
            path = Path(folder) / f"epoch_{epoch:03d}"
            now = dict(versions=versions(), commit=commit(), epoch=epoch)
            checkpoint.save(path, model.state_dict(), config, **origin, **now)
        if observed is not None and epoch not in observed:
            return []
        return [
            {"epoch": epoch, "layer": layer, **summary.statistics()}
            for layer, summary in enumerate(summarise_scores(model, config, splits.test))
        ]

    seed_all(seed)
    model = build(config).to(device)
    base = {key: value.detach().clone() for key, value in model.state_dict().items()}
    where = dict(seed=seed, folder=folder, device=device)
    run = fit(model, splits, config, **where, observe=observe, progress=progress)
    weights = {"base": base, "base_calibrated": base}
    weights |= {"best": run.best_weights, "last": run.last_weights}
    tables = observe_states(weights, config, splits, device=device)
    tables["summary"] = tables["summary"].assign(best_epoch=run.best_epoch)
    tables |= {"trajectory": run.observations, "history": run.history}
    constant = {
        **{"config": name, "changes": _changes(config, name), "dataset": dataset, "seed": seed},
        **{"epochs": len(run.history), "versions": run.versions, "commit": run.commit},
    }
    tables = {key: table.assign(**constant) for key, table in tables.items()}
    if folder is not None:
        then = dict(versions=run.versions, commit=run.commit, stop_reason=run.stop_reason)
        then["history"] = run.history.to_dict("records")
        epochs = {"base": 0, "best": run.best_epoch, "last": len(run.history)}
        with alone(folder):
            for state, epoch in epochs.items():
                path = Path(folder) / state
                checkpoint.save(path, weights[state], config, **origin, epoch=epoch, **then)
            for key, table in tables.items():
                write_table(Path(folder) / f"{key}.csv.gz", table)
        print(f"wrote tables and checkpoints to {folder}", file=sys.stderr)
    return Emergence(**tables, fit=run)


def examine_checkpoint(path: Path | str, splits: Splits) -> dict[str, pd.DataFrame]:
    """The tables of a saved network (state ``best``) beside those of its untrained self.

    ``path`` is of a checkpoint that ``emergence`` wrote; the untrained network is built again from
    its seed. The tables are ``summary``, ``graph_maxima``, ``histogram`` and ``history``, with the
    checkpoint's origin in each row.
    """
    model, information = checkpoint.load(path)
    config = Config.from_dict(information["config"])
    seed_all(information["seed"])
    base = build(config).state_dict()
    weights = {"base": base, "base_calibrated": base, "best": model.state_dict()}
    tables = observe_states(weights, config, splits)
    tables["history"] = pd.DataFrame(information.get("history", []))
    named = {key: information[key] for key in ("seed", "epoch", "versions", "commit")}
    named |= {"config": information["name"], "dataset": splits.description.title}
    return {key: table.assign(**(named | dict(table))) for key, table in tables.items()}


def fit_to_data(config: Config, about: Description) -> Config:
    """The configuration, its open embedding sizes taken from the data set; raises if misfit."""

    def refuse(name: str, needs: Any, of: str) -> None:
        has = getattr(config, name)
        raise ValueError(f"{name}: the configuration has {has!r}, but {about.title} {of} {needs}")

    for size in _SIZES:
        has, needs = getattr(config, size), getattr(about, size)
        if has is None:
            config = config.replace(**{size: needs})
        elif needs is not None and not _at_least(has, needs):
            refuse(size, needs, "has")
    if config.out_channels != about.num_targets:
        refuse("out_channels", f"{about.num_targets} targets", "has")
    of_nodes, of_task = about.task == "node classification", f"is for {about.task}, which needs"
    if (config.readout is None) != of_nodes:
        refuse("readout", "None" if of_nodes else "mean or sum", of_task)
    loss = "l1" if about.task == "graph regression" else "bce"
    if config.loss != loss:
        refuse("loss", repr(loss), of_task)
    return config


def _at_least(has: int | tuple[int, ...], needs: int | tuple[int, ...]) -> bool:
    has, needs = (size if isinstance(size, tuple) else (size,) for size in (has, needs))
    return len(has) == len(needs) and all(h >= n for h, n in zip(has, needs, strict=True))


def _changes(config: Config, name: str) -> str:
    """How a configuration differs from the named one; an open size there is no difference."""
    stated = CONFIGS[name].to_dict() if name in CONFIGS else {}
    open_sizes = {size for size in _SIZES if size in stated and stated[size] is None}
    changed = [
        f"{key}={value}"
        for key, value in config.to_dict().items()
        if key not in open_sizes and (key not in stated or stated[key] != value)
    ]
    return "; ".join(changed) or "none"


# Controls.


def with_permuted_targets(splits: Splits, seed: int) -> Splits:
    """The same data with the targets of the training and validation graphs permuted.

    A null for the question whether massive activations need something to learn: graphs and
    targets are as before, each within its split, but have nothing to do with one another.
    """
    if isinstance(splits.train, NodesOfGraph):
        raise ValueError(
            "expected whole graphs, whose targets can change places, but "
            f"{splits.description.title} has nodes of one graph; use a data set of graphs"
        )
    if min(len(splits.train), len(splits.val)) < 2:
        raise ValueError(
            f"expected two graphs or more in each split, whose targets can change places, but "
            f"{splits.description.title} has {len(splits.train)} and {len(splits.val)} for "
            "training and validation"
        )
    generator = torch.Generator().manual_seed(seed)

    def permuted(graphs: list[Data]) -> list[Data]:
        copies = [copy(graph) for graph in graphs]  # a copy shares tensors, not attributes
        order = torch.randperm(len(graphs), generator=generator).tolist()
        for graph, other in zip(copies, order, strict=True):
            graph.y = graphs[other].y
        return copies

    title = f"{splits.description.title}, targets permuted"
    parts = dict(train=permuted(splits.train), val=permuted(splits.val))
    return replace(splits, **parts, description=replace(splits.description, title=title))


def without_training(
    config: Config,
    splits: Splits,
    seeds: Sequence[int],
    *,
    name: str = "custom",
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """The ratios of untrained networks on the test split: the null of the trained ones.

    A row per seed (take others than those of the trained networks), state (``base`` and
    ``base_calibrated``, as in ``Emergence``) and layer, with the statistics of
    ``ActivationSummary``.
    """
    config = fit_to_data(config, splits.description)
    rows = []
    for seed in tqdm(seeds, "untrained networks", disable=not progress):
        seed_all(seed)
        model = build(config).to(device).eval()
        for state in ("base", "base_calibrated"):
            if state == "base_calibrated":
                graphs = splits.train[:CALIBRATION_GRAPHS]
                calibrate_batch_norm(model, graphs, batch_size=config.batch_size)
            rows += [
                {"state": state, "layer": layer, "seed": seed, **summary.statistics()}
                for layer, summary in enumerate(summarise_scores(model, config, splits.test))
            ]
    origin = {"config": name, "dataset": splits.description.title}
    return pd.DataFrame(rows).assign(**origin, versions=versions(), commit=commit())


# Figures.


def by_rank(
    graph_maxima: pd.DataFrame,
    titles: Mapping[str, str] | None = None,
    *,
    threshold: float = MASSIVE_RATIO,
) -> Figure:
    """Figure A of the massive-activations paper: each graph's largest ratio, in rank order.

    A panel per run with a title, or per seed. Graphs are sorted per layer and seed. A layer of the
    trained network is a line at the median over seeds, in a band from the least to the greatest.
    The untrained network is a band over all its layers, graphs and seeds, with BatchNorm
    statistics at 0 and 1 (as published) and calibrated on training data.
    """
    by = "seed" if titles is None else "run"
    titles = titles or {seed: f"seed {seed}" for seed in sorted(graph_maxima["seed"].unique())}
    figure, axes = _panels(titles)
    colors = figures.layer_colors(graph_maxima["layer"])
    for ax, panel in zip(axes, titles, strict=True):
        table = graph_maxima[graph_maxima[by] == panel].dropna(subset="max_ratio")
        for state in ("base", "base_calibrated"):
            values = table.loc[table["state"] == state, "max_ratio"]
            if len(values):
                look = dict(color=STATE_COLORS[state], alpha=0.25, lw=0, label=STATES[state])
                ax.axhspan(values.min(), values.max(), **look)
        best = table[table["state"] == "best"]
        rank = best.groupby(["layer", "seed"])["max_ratio"].rank(method="first")
        best = best.assign(rank=rank).pivot(index=["layer", "rank"], columns="seed")["max_ratio"]
        for layer, by_seed in best.groupby("layer"):
            look = dict(color=colors[layer], label=f"layer {layer}")
            figures.band(ax, by_seed.droplevel("layer"), **look)
    _finish(figure, titles.values(), threshold, "test graphs, by rank")
    return figure


def by_epoch(
    trajectory: pd.DataFrame,
    *,
    color: str = "layer",
    panel: str | None = None,
    colors: Mapping[str, Any] | None = None,
    threshold: float = MASSIVE_RATIO,
) -> Figure:
    """The largest ratio of what a line stands for after each epoch.

    ``color`` and ``panel`` are columns that tell lines and panels apart. A line is the median over
    seeds, in a band from the least to the greatest.
    """
    table = trajectory.assign(panel=trajectory[panel] if panel else "")
    largest = table.groupby([color, "panel", "epoch", "seed"])["max_ratio"].max().unstack()
    titles, names = table["panel"].unique(), table[color].unique()
    if colors is None:
        colors = (
            figures.layer_colors(names)
            if color == "layer"
            else dict(zip(names, sns.color_palette(n_colors=len(names)), strict=True))
        )
    figure, axes = _panels(titles)
    for ax, title in zip(axes, titles, strict=True):
        for name in names:
            label = f"layer {name}" if color == "layer" else name
            if (name, title) in largest.index.droplevel("epoch"):
                figures.band(ax, largest.loc[name, title], color=colors[name], label=label)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    titles = [f"seed {seed}" for seed in titles] if panel == "seed" else titles
    _finish(figure, titles, threshold, "epoch")
    return figure


def against_permuted(
    trajectory: pd.DataFrame,
    controls: Mapping[str, str],
    titles: Mapping[str, str],
    *,
    threshold: float = MASSIVE_RATIO,
) -> Figure:
    """``by_epoch`` for runs on permuted targets beside those on the targets of the data.

    ``controls`` leads from the former to the latter, ``titles`` from these to the title of a panel.
    Each pair is drawn up to the last epoch that both have.
    """
    parts = []
    for permuted, run in controls.items():
        names = {run: "targets of the data", permuted: "targets permuted"}
        pair = trajectory[trajectory["run"].isin(names)]
        pair = pair[pair["epoch"] <= pair.groupby("run")["epoch"].max().min()]
        parts.append(pair.assign(targets=pair["run"].map(names), run=titles[run]))
    colors = dict(zip(names.values(), (STATE_COLORS["best"], STATE_COLORS["base"]), strict=True))
    places = dict(color="targets", panel="run", colors=colors)
    return by_epoch(pd.concat(parts), **places, threshold=threshold)


def against_untrained(
    summary: pd.DataFrame,
    untrained: pd.DataFrame,
    chance: Mapping[str, float],
    titles: Mapping[str, str],
    *,
    threshold: float = MASSIVE_RATIO,
) -> Figure:
    """The largest ratio of each layer of trained networks, among untrained ones and chance.

    ``summary`` and ``untrained`` are of ``results.read_runs``, or of untrained networks; ``chance``
    is the ratio by run that products of normals exceed with probability 0.05.
    """
    number = untrained.groupby("run")["seed"].nunique().max()
    parts = {
        "base_calibrated": (untrained, "_", 9, f"untrained, {number} networks"),
        "best": (summary, "o", 4, STATES["best"]),
    }
    figure, axes = _panels(titles)
    for ax, run in zip(axes, titles, strict=True):
        for state, (table, marker, size, label) in parts.items():
            rows = table[(table["run"] == run) & (table["state"] == state)]
            look = dict(ls="", marker=marker, ms=size, alpha=0.6, color=STATE_COLORS[state])
            ax.plot(rows["layer"], rows["max_ratio"], label=label, **look)
        label = "product of normals, 5 % family-wise"
        ax.axhline(chance[run], color=STATE_COLORS["last"], lw=1, label=label)
        ax.set_xticks(sorted(rows["layer"].unique()))
    _finish(figure, titles.values(), threshold, "layer")
    return figure


def by_layer(summary: pd.DataFrame, statistics: Sequence[str]) -> Figure:
    """Statistics by layer and state, a panel each: the mean over seeds, each seed as a dot."""
    states = ("base", "base_calibrated", "best")
    figure, axes = figures.panels(len(statistics), len(statistics), (2.8, 2.6))
    for ax, y in zip(axes, statistics, strict=True):
        for state in states:
            rows = summary[summary["state"] == state]
            mean = rows.groupby("layer")[y].mean()
            ax.plot(mean.index, mean, color=STATE_COLORS[state], label=STATES[state])
            ax.scatter(rows["layer"], rows[y], s=12, alpha=0.5, color=STATE_COLORS[state], lw=0)
        yscale = "linear" if y.startswith("share") else "log"
        ax.set(xlabel="layer", title=figures.LABELS[y], xticks=mean.index, yscale=yscale)
    figures.legend_once(figure, loc="outside lower center", ncols=len(states))
    return figure


def _panels(titles: Sized) -> tuple[Figure, list[Axes]]:
    size = (2.7, 2.2) if len(titles) > 1 else (6.0, 3.2)
    return figures.panels(len(titles), 3, size, sharey=True)


def _finish(figure: Figure, titles: Iterable[str], threshold: float, xlabel: str) -> None:
    """Titles, the threshold, a logarithmic axis of ratios and a legend."""
    for ax, title in zip(figure.axes, titles, strict=True):
        ax.axhline(threshold, **THRESHOLD_LOOK, label=f"threshold {threshold:g}")
        ax.set(yscale="log", title=title)
    figure.supxlabel(xlabel, fontsize="medium")
    figure.supylabel("largest activation ratio", fontsize="medium")
    figures.legend_once(figure, loc="outside right center")
