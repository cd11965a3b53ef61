"""Tree-NeighborsMatch by depth: how much of a tree fits through its root."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from studies.data import Splits
from studies.depth import by_depth_table, named
from studies.schedule import Schedule
from studies.study import Result, Study, read_tables, run_study
from studies.tasks import TREES, TreeTask
from studies.train import fit
from studies.tree_networks import TreeNetwork, tree_network

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


@dataclass(frozen=True, kw_only=True)
class TreeVariant:
    """A network for trees but for its depth.

    Attributes:
        architecture, norm, scale: as for ``models.trees.tree_network``.
    """

    architecture: str
    norm: str = "none"
    scale: float | None = None

    def build(self, depth: int, seed: int) -> TreeNetwork:
        """The untrained network of a seed.

        Args:
            depth: of the tree.
            seed: of the initial weights.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return tree_network(self.architecture, depth, norm=self.norm, scale=self.scale)


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
        variants: networks.
        seeds: of weights and of the order of examples.
        schedule: of training.
        sampling: how batches are drawn, one of ``tasks.SAMPLINGS``.
        passes_apart: passes of networks with PairNorm, whose trees share nothing, so that they
            take many times as long; None means as many.
        prefix: as for ``studies.run_study``.
        progress: whether to show a progress bar on stderr.

    Returns:
        In ``runs`` a row per training, with ``depth``, the variant's settings, ``seed``, the
        schedule, ``passes_done``, ``stop_reason``, ``best`` (the highest running training accuracy,
        what the paper reports), and ``train_accuracy`` and ``test_accuracy`` in the end. In
        ``curves`` the running training accuracy of every block of passes.

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
        run = fit(network, task, own, seed=seed, progress=False)
        history = run.history.rename(columns={"epoch": "passes"})
        values = {
            "best": history["train_accuracy"].max(),
            **task.accuracies(network),
            "passes_done": int(history["passes"].iloc[-1]),
            "stop_reason": run.stop_reason.replace("max epochs", "passes"),
        }
        return values, history[["passes", "train_accuracy"]]

    trainings = []
    for seed in seeds:
        for variant in variants:
            shares = variant.build(depth, seed).can_share
            own = (
                schedule
                if shares or passes_apart is None
                else replace(schedule, epochs=passes_apart)
            )
            about = {"depth": depth, **asdict(variant), "seed": seed, "passes": own.epochs}
            about |= own.columns(
                "batch_size", "lr", "block", "lr_factor", "lr_patience", "patience"
            )
            about["sampling"] = sampling
            trainings.append((about, partial(train, variant, own, seed)))
    labels = ("depth", "architecture", "norm", "scale", "seed")
    return run_study(trainings, labels=labels, prefix=prefix, progress=progress)


STUDIES = ("trees_2", *(f"trees_{depth}{end}" for depth in (3, 4, 5) for end in ("", "_ggnn")))
"""Tracked studies, by the prefix of their files. From depth 3 on GGNN has its own learning rate."""


def read_trees(folder: Path | str, studies: Sequence[str] = STUDIES) -> Study:
    """Tracked studies of trees as one, with ``panel``, the architecture's title, and ``variant``.

    Args:
        folder: where their tables are.
        studies: prefixes of their files.

    Raises:
        FileNotFoundError: if a table is missing.
    """
    return Study(
        **{name: titled(read_tables(folder, studies, name)) for name in ("runs", "curves")}
    )


def titled(table: pd.DataFrame) -> pd.DataFrame:
    """A table of ``tree_study`` with ``panel``, the architecture's title, and ``variant``.

    Args:
        table: ``runs`` or ``curves``.
    """
    return named(table.assign(panel=table["architecture"].map(TITLES)))


def tree_table(runs: pd.DataFrame, value: str = "best") -> pd.DataFrame:
    """A value in percent by network and depth, from the least to the greatest of the seeds.

    Args:
        runs: of ``read_trees``.
        value: ``"best"``, beside which the published ones stand, ``"train_accuracy"`` or
            ``"test_accuracy"``.

    Returns:
        A row per architecture and norm, a column per depth.
    """
    parts = {}
    for panel, rows in runs.groupby("panel", sort=False):
        percent = rows.assign(num_layers=rows["depth"], shown=100 * rows[value])
        parts[panel] = by_depth_table(percent, "shown", form="{:.0f}", has_median=False)
        if value == "best":
            published = PUBLISHED[rows["architecture"].iloc[0]]
            shown = [f"{100 * published[depth - 2]:.0f}" for depth in parts[panel].columns]
            parts[panel].loc["published"] = shown
    table = pd.concat(parts, names=["network", "norm"])
    return table.rename_axis(columns="depth")
