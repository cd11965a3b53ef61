"""Tree-NeighborsMatch by depth: how much of a tree fits through its root."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Int
from matplotlib.axes import Axes
from torch import Tensor

from studies import tables
from studies.data import Splits
from studies.depth import named, norm_and_scale
from studies.figures import over_seeds
from studies.published import known, titles
from studies.schedule import Schedule
from studies.tables import Result, Study, run_study
from studies.tasks import TREES, TreeTask
from studies.train import fit
from studies.tree_networks import LIPSCHITZ_NORMS, NORMS, TreeNetwork

PUBLISHED = {
    "ggnn": (1.0, 1.0, 1.0, 0.60, 0.38, 0.21, 0.16),
    "gat": (1.0, 1.0, 1.0, 0.41, 0.21, 0.15, 0.11),
    "gin": (1.0, 1.0, 0.77, 0.29, 0.20),
    "gcn": (1.0, 1.0, 0.70, 0.19, 0.14, 0.09, 0.08),
}
"""Training accuracies for depths from 2 on that the README of the published code gives; those of
GIN end at depth 6. GCN, GIN and GAT have LayerNorm there, GGNN has none."""

TITLES = {"gcn": "GCN", "gin": "GIN", "ggnn": "GGNN", "gat": "GAT"}
"""How figures and tables call architectures."""

COMPARED = ("none", "layer", "pair", "lipschitz=1", "lipschitz=4", "lipschitz-layer=1")
"""Norms that are compared, with the scale f of those that divide scores, which GAT alone has."""

COLUMNS = ("batch_size", "lr", "block", "lr_factor", "lr_patience", "patience")
"""What a row says of the schedule."""

STUDIES = tuple(titles("trees"))
"""Tracked studies, by the prefix of their files. From depth 3 on GGNN has its own learning rate."""


def variants(
    architectures: Collection[str] = tuple(TITLES), norms: Sequence[str] = COMPARED
) -> list[dict[str, Any]]:
    """Settings of networks by name; GAT alone has scores to divide."""
    for name in architectures:
        known("--architectures", name, TITLES)
    return [
        {"architecture": name, **settings}
        for name in architectures
        for settings in (norm_and_scale(norm, NORMS) for norm in norms)
        if name == "gat" or settings["norm"] not in LIPSCHITZ_NORMS
    ]


def untrained(depth: int, seed: int, **settings: Any) -> TreeNetwork:
    """The network of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TreeNetwork(depth=depth, **settings)


def trees(
    splits: Splits,
    *,
    seeds: Sequence[int] = (0, 1, 2),  # of weights and of the order of examples
    architectures: Sequence[str] = ("gcn", "gin", "ggnn", "gat"),  # each with all the norms
    norms: Sequence[str] = COMPARED,  # those with lipschitz are of GAT alone, and have a scale
    passes: int = 500,  # over the training examples
    passes_apart: int | None = None,  # of networks with PairNorm, which take longer
    batch_size: int = 1024,  # examples of a step
    lr: float = 0.001,  # learning rate at the start
    block: int = 10,  # passes after which progress is judged
    sampling: str = "grouped",  # of batches: grouped by permutation, or shuffled as published
    prefix: Path | str | None = None,
    progress: bool = True,
) -> Study:
    """Train networks on trees of one depth; ``best`` is the highest running accuracy, as published.

    Source: Tree-NeighborsMatch; its use in the LipschitzNorm paper.
    """
    task, trainings = TreeTask(splits, sampling), []
    depth = (splits.train.pairs.size(1) + 1).bit_length() - 2

    def train(settings: dict[str, Any], schedule: Schedule, seed: int) -> Result:
        network = untrained(depth, seed, **settings)
        training = fit(network, task, schedule, seed=seed, progress=False)
        history = training.history.rename(columns={"epoch": "passes"})
        row = {"best": history["train_accuracy"].max(), **task.accuracies(network)}
        row |= {"passes_done": int(history["passes"].iloc[-1])}
        row |= {"stop_reason": training.stop_reason.replace("max epochs", "passes")}
        return row, history[["passes", "train_accuracy"]]

    for seed, settings in product(seeds, variants(architectures, norms)):
        is_apart = settings["norm"] == "pair" and passes_apart is not None
        own = dict(epochs=passes_apart if is_apart else passes, block=block)
        schedule = replace(TREES, batch_size=batch_size, lr=lr, **own)
        about = {"depth": depth, **settings, "seed": seed, "passes": schedule.epochs}
        about |= {**schedule.columns(*COLUMNS), "sampling": sampling}
        trainings.append((about, partial(train, settings, schedule, seed)))
    labels = ("depth", "architecture", "norm", "scale", "seed")
    return run_study(trainings, labels=labels, prefix=prefix, progress=progress)


def read_trees(folder: Path | str, table: str = "runs") -> pd.DataFrame:
    """``runs`` or ``curves`` of all tracked depths as one table."""
    return titled(tables.read(folder, "", STUDIES, table))


def titled(table: pd.DataFrame) -> pd.DataFrame:
    """A table of ``trees`` with ``network``, the architecture's title, and ``variant``."""
    return named(table.assign(network=table["architecture"].map(TITLES)))


def published_runs(depths: Collection[int]) -> pd.DataFrame:
    """The published accuracies as rows of a table of runs."""
    return pd.DataFrame(
        dict(architecture=name, network=TITLES[name], variant="published", depth=depth, best=best)
        for name, values in PUBLISHED.items()
        for depth, best in enumerate(values, start=2)
        if depth in depths
    )


def tree_table(runs: pd.DataFrame, value: str = "best") -> pd.DataFrame:
    """A value in percent by network and depth, over seeds; the published ones beside ``best``."""
    if value == "best":
        runs = pd.concat([runs, published_runs(set(runs["depth"]))], ignore_index=True)
    percent = runs.assign(percent=100 * runs[value])
    look = dict(rows=["network", "variant"], columns=["depth"], statistic="range", form=".0f")
    return tables.over_seeds(percent, "percent", **look)


ASKED_COLOR, OTHER_COLOR = "#E76F51", "#B8C4CC"


def tree_example(pairs: Int[Tensor, "nodes 2"], ax: Axes) -> Axes:
    """Draw one example in level order, the way from the leaf that is asked for in color."""
    depth = (len(pairs) + 1).bit_length() - 2
    tree = nx.balanced_tree(2, depth, create_using=nx.DiGraph).reverse()
    level = [(place + 1).bit_length() - 1 for place in tree]
    places = {n: ((n - 2**k + 1.5) / 2**k, -k) for n, k in enumerate(level)}
    asked = nx.shortest_path(tree, 2**depth - 2 + int(pairs[0, 0]), 0)
    labels = {n: f"{key}, {value}" for n, (key, value) in enumerate(pairs.tolist()) if key}
    labels[0] = f"{pairs[0, 0]}, ?"
    colors = {n: ASKED_COLOR if n in asked else OTHER_COLOR for n in tree}
    edges = [colors[child] for child, _ in tree.edges]
    look = dict(node_color=[colors[n] for n in tree], edge_color=edges, width=1.6)
    nx.draw(tree, places, ax=ax, labels=labels, node_size=420, font_size=8, **look)
    return ax


def tree_accuracy(runs: pd.DataFrame) -> sns.FacetGrid:
    """Training accuracy by depth, means over seeds, beside the published ones and chance."""
    depths = set(runs["depth"])
    chance = runs.assign(variant="chance", best=0.5 ** runs["depth"])
    grid = over_seeds(
        pd.concat([runs, published_runs(depths), chance], ignore_index=True),
        **dict(x="depth", y="best", color="variant", panel="network", estimator="mean"),
        labels={"depth": "depth of the tree", "best": "accuracy"},
        size=(2.4, 2.8),
    )
    return grid.set(xticks=sorted(depths), ylim=(0, 1.05))


def tree_curves(curves: pd.DataFrame, **look: Any) -> sns.FacetGrid:
    """Training accuracy by passes; a line ends where the first seed's training ends."""
    keys = ["network", "variant"]
    last = curves.groupby([*keys, "seed"])["passes"].transform("max")
    last = last.groupby([curves[key] for key in keys]).transform("min")
    grid = over_seeds(
        curves[curves["passes"] <= last],
        **dict(x="passes", y="train_accuracy", color="variant", panel="network", marker=None),
        labels={"passes": "passes over the examples", "train_accuracy": "training accuracy"},
        **look,
    )
    return grid.set(ylim=(0, 1.05))
