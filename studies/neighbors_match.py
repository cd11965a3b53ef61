"""Tree-NeighborsMatch by depth: how much of a tree fits through its root."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Int
from matplotlib.axes import Axes
from torch import Tensor

from studies import tables
from studies.data import Splits
from studies.depth import named
from studies.figures import over_seeds
from studies.published import known, titles
from studies.schedule import Schedule
from studies.tables import Result, Study, run_study
from studies.tasks import SAMPLINGS, TREES, TreeTask
from studies.train import fit
from studies.tree_networks import TreeNetwork

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


COLUMNS = ("batch_size", "lr", "block", "lr_factor", "lr_patience", "patience")
"""What a row says of the schedule."""


@dataclass(frozen=True, kw_only=True)
class TreeVariant:
    """Hyper-parameters of a ``TreeNetwork``, without its depth."""

    architecture: str
    norm: str = "none"
    scale: float | None = None

    def build(self, depth: int, seed: int) -> TreeNetwork:
        """The untrained network of a seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return TreeNetwork(depth=depth, **asdict(self))


VARIANTS = {
    **{
        f"{title}, {norm_title}": TreeVariant(architecture=architecture, norm=norm)
        for architecture, title in TITLES.items()
        for norm, norm_title in (("none", "no norm"), ("layer", "LayerNorm"), ("pair", "PairNorm"))
    },
    **{
        f"GAT, LipschitzNorm, f = {scale:g}": TreeVariant(
            architecture="gat", norm="lipschitz", scale=scale
        )
        for scale in (1.0, 4.0)
    },
    "GAT, LipschitzNorm + LayerNorm, f = 1": TreeVariant(
        architecture="gat", norm="lipschitz-layer", scale=1.0
    ),
}
"""The networks that are compared, by title."""


def tree_study(
    splits: Splits,
    variants: Sequence[TreeVariant] = tuple(VARIANTS.values()),
    *,
    seeds: Sequence[int] = (0, 1, 2),
    schedule: Schedule = TREES,
    sampling: str = "grouped",
    passes_apart: int | None = None,
    prefix: Path | str | None = None,
    progress: bool = True,
) -> Study:
    """Train every network with every seed on the trees of one depth.

    Args:
        splits: as ``load("trees-4")`` gives them.
        variants, seeds: networks, and seeds of weights and of the order of examples.
        schedule: of training.
        sampling: how batches are drawn, one of ``tasks.SAMPLINGS``.
        passes_apart: passes of networks with PairNorm, whose trees share nothing, so that they
            take many times as long; None means as many.
        prefix: of the tables, see ``tables.run_study``.
        progress: whether to show a progress bar on stderr.

    Returns:
        In ``runs`` a row per training with its settings, ``best`` (the highest running training
        accuracy, what the paper reports), and ``train_accuracy`` and ``test_accuracy`` in the end.
        In ``curves`` the running training accuracy of every block of passes.

    Raises:
        ValueError: if the splits are no trees.

    Source: Tree-NeighborsMatch; its use in the LipschitzNorm paper.
    """
    if not hasattr(splits.train, "pairs"):
        raise ValueError(
            f"splits: expected trees, as load('trees-4') gives them, got {splits.description.title}"
        )
    depth = (splits.train.pairs.size(1) + 1).bit_length() - 2

    task = TreeTask(splits, sampling)

    def train(variant: TreeVariant, own: Schedule, seed: int) -> Result:
        network = variant.build(depth, seed)
        training = fit(network, task, own, seed=seed, progress=False)
        history = training.history.rename(columns={"epoch": "passes"})
        values = {
            "best": history["train_accuracy"].max(),
            **task.accuracies(network),
            "passes_done": int(history["passes"].iloc[-1]),
            "stop_reason": training.stop_reason.replace("max epochs", "passes"),
        }
        return values, history[["passes", "train_accuracy"]]

    trainings = []
    for seed in seeds:
        for variant in variants:
            is_apart = variant.norm == "pair" and passes_apart is not None
            own = replace(schedule, epochs=passes_apart) if is_apart else schedule
            about = {"depth": depth, **asdict(variant), "seed": seed, "passes": own.epochs}
            about |= own.columns(
                "batch_size", "lr", "block", "lr_factor", "lr_patience", "patience"
            )
            about["sampling"] = sampling
            trainings.append((about, partial(train, variant, own, seed)))
    labels = ("depth", "architecture", "norm", "scale", "seed")
    return run_study(trainings, labels=labels, prefix=prefix, progress=progress)


def trees(
    splits: Splits,
    *,
    seeds: Sequence[int] = (0, 1, 2),  # of weights and of the order of examples
    architectures: Sequence[str] = ("gcn", "gin", "ggnn", "gat"),  # each with all its norms
    passes: int = 500,  # over the training examples
    passes_apart: int | None = None,  # of networks with PairNorm, which take longer
    batch_size: int = 1024,  # examples of a step
    lr: float = 0.001,  # learning rate at the start
    block: int = 10,  # passes after which progress is judged
    sampling: str = "grouped",  # or shuffled
    prefix: Path | str,
) -> None:
    """``tree_study`` of all variants of architectures by name."""
    for name in architectures:
        known("--architectures", name, TITLES)
    known("--sampling", sampling, dict.fromkeys(SAMPLINGS))
    chosen = [variant for variant in VARIANTS.values() if variant.architecture in architectures]
    schedule = replace(TREES, epochs=passes, batch_size=batch_size, lr=lr, block=block)
    settings = dict(seeds=seeds, schedule=schedule, sampling=sampling, passes_apart=passes_apart)
    tree_study(splits, chosen, prefix=prefix, **settings)


STUDIES = tuple(titles("trees"))
"""Tracked studies, by the prefix of their files. From depth 3 on GGNN has its own learning rate."""


def read_trees(folder: Path | str, table: str = "runs") -> pd.DataFrame:
    """``runs`` or ``curves`` of all tracked depths as one table."""
    return titled(tables.read(folder, "", STUDIES, table))


def titled(table: pd.DataFrame) -> pd.DataFrame:
    """A table of ``tree_study`` with ``network``, the architecture's title, and ``variant``."""
    return named(table.assign(network=table["architecture"].map(TITLES)))


def published_runs(depths: Sequence[int]) -> pd.DataFrame:
    """The published accuracies as rows of a table of runs."""
    rows = [
        dict(architecture=name, network=TITLES[name], variant="published", depth=depth, best=best)
        for name, values in PUBLISHED.items()
        for depth, best in enumerate(values, start=2)
    ]
    table = pd.DataFrame(rows)
    return table[table["depth"].isin(depths)]


def tree_table(runs: pd.DataFrame, value: str = "best") -> pd.DataFrame:
    """A value in percent by network and depth, over seeds; the published ones beside ``best``."""
    if value == "best":
        runs = pd.concat([runs, published_runs(runs["depth"].unique())], ignore_index=True)
    percent = runs.assign(percent=100 * runs[value])
    look = dict(rows=["network", "variant"], columns=["depth"], statistic="range", form=".0f")
    return tables.over_seeds(percent, "percent", **look)


ASKED_COLOR, OTHER_COLOR = "#E76F51", "#B8C4CC"


def tree_example(pairs: Int[Tensor, "nodes 2"], ax: Axes) -> Axes:
    """Draw one example in level order, the way from the leaf that is asked for in color."""
    nodes = len(pairs)
    depth = (nodes + 1).bit_length() - 2
    level = np.array([(place + 1).bit_length() - 1 for place in range(nodes)])
    x, y = (np.arange(nodes) - 2**level + 1.5) / 2**level, -level
    place = 2**depth - 2 + int(pairs[0, 0])
    asked = {0}
    while place:
        asked.add(place)
        place = (place - 1) // 2
    colors = [ASKED_COLOR if place in asked else OTHER_COLOR for place in range(nodes)]
    for child in range(1, nodes):
        parent = (child - 1) // 2
        look = dict(arrowstyle="->", color=colors[child], lw=1.6, shrinkA=11, shrinkB=11)
        ends = dict(xy=(x[parent], y[parent]), xytext=(x[child], y[child]))
        ax.annotate("", arrowprops=look, **ends)
    ax.scatter(x, y, s=420, c=colors, zorder=2)
    for place, (key, value) in enumerate(pairs.tolist()):
        text = "" if not key else f"{key}, {value}" if place else f"{key}, ?"
        ax.text(x[place], y[place], text, ha="center", va="center", fontsize=8)
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(-depth - 0.4, 0.4))
    return ax


def tree_accuracy(runs: pd.DataFrame) -> sns.FacetGrid:
    """Training accuracy by depth, means over seeds, beside the published ones and chance."""
    depths = sorted(runs["depth"].unique())
    grid = over_seeds(
        runs,
        **dict(x="depth", y="best", color="variant", panel="network", estimator="mean"),
        labels={"depth": "depth of the tree", "best": "accuracy"},
        size=(2.4, 2.8),
    )
    published = published_runs(depths).set_index("network")
    diamonds = dict(color="black", ls="--", lw=1.2, marker="D", ms=4, mfc="white")
    for name, ax in grid.axes_dict.items():
        (line,) = ax.plot("depth", "best", data=published.loc[name], zorder=3, **diamonds)
        chance = [0.5**depth for depth in depths]
        (dots,) = ax.plot(depths, chance, color="grey", ls=":", lw=1.2)
        ax.set(xticks=depths, ylim=(0, 1.05))
    first = grid.axes.flat[0]
    first.legend([line, dots], ["published", "chance"], loc="upper right", fontsize="small")
    return grid


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
    grid.set(ylim=(0, 1.05))
    return grid
