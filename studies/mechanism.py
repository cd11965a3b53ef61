"""Why massive activations emerge: factors of the score, its gate, the optimizer, the targets.

A tiny GT whose score is a product of k linear maps of the nodes and the edge; for every k all
three are in it. Two lines of theory. At the start a factor is close to normal, so ln|s| of a
product of k has the standard deviation sqrt(k) pi / sqrt(8) within a row. In training a factor's
gradient is the product of the others: channels that are large grow faster, the more so the larger
k, unless an optimizer divides each weight's gradient by its own size.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from torch import Tensor, nn

from mapkg.evaluation import calibrate_batch_norm
from mapkg.models.config import Config
from mapkg.models.edge_attention import EdgeAttention
from mapkg.models.network import build
from studies.data import SPLITS, Splits
from studies.emergence import with_permuted_targets
from studies.published import CONFIGS, known
from studies.steps import Stack, adam
from studies.tables import Result, Study, run_study
from studies.train import fit

EPS = 1e-12

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "E": lambda edge: edge,
    "1 + E": lambda edge: 1 + edge,
    "normalized E": lambda edge: edge / (edge.square().mean(dim=-1, keepdim=True) + EPS).sqrt(),
}
"""The factor that the edge gives to the score, by name."""


def _sgd(weights, gradient, first, second, steps, lr, active) -> None:
    weights.sub_((lr * active).to(weights).unsqueeze(1) * gradient)


def _adamw(weights, gradient, first, second, steps, lr, active) -> None:
    weights.mul_(1 - 0.1 * (lr * active).to(weights).unsqueeze(1))
    adam(weights, gradient, first, second, steps, lr, active)


OPTIMIZERS = {
    "SGD": (_sgd, 0.3, 0.0),
    "Adam": (adam, 3e-3, 0.0),
    "AdamW": (_adamw, 3e-3, 0.0),
    "Adam with L2": (adam, 3e-3, 1e-4),
}
"""Each with its learning rate, which does not fall, and the L2 that is added to the gradient. The
weight decay of AdamW is 0.1."""


class ProductAttention(EdgeAttention):
    """The attention of GT with a score of k factors: K + Q + E, (K + E) Q, K Q E, or K Q E E'."""

    is_row_by_row = True  # see ``studies.stacked``

    def __init__(self, hidden_channels: int, heads: int, factors: int, gate: str) -> None:
        super().__init__(hidden_channels, heads)
        self.factors, self.gate = factors, GATES[gate]
        if factors == 4:
            self.edge = nn.Linear(hidden_channels, 2 * hidden_channels, bias=False)

    def edge_score(self, query, key, edge_index, edge):
        """The product, or for one factor the sum."""
        key, query = key.index_select(0, edge_index[0]), query.index_select(0, edge_index[1])
        if self.factors == 1:
            return (key + edge) / sqrt(self.head_channels) + query
        if self.factors == 2:
            return (key + edge) * query
        for factor in edge.chunk(self.factors - 2, dim=-1):
            query = query * self.gate(factor)
        return key * query


REFERENCE = dict(factors=3, gate="E", optimizer="Adam", targets="true")

ARMS: dict[str, dict[str, Any]] = {
    "reference": {},
    "k = 1": dict(factors=1),
    "k = 2": dict(factors=2),
    "k = 4": dict(factors=4),
    "gate 1 + E": dict(gate="1 + E"),
    "gate normalized": dict(gate="normalized E"),
    "SGD": dict(optimizer="SGD"),
    "AdamW": dict(optimizer="AdamW"),
    "Adam with L2": dict(optimizer="Adam with L2"),
    "permuted targets": dict(targets="permuted"),
    "constant targets": dict(targets="constant"),
}
"""The reference and what each arm changes of it."""

KEPT = (
    *("max_ratio", "row_max_ratio_q50", "row_median_q50", "max_abs", "max_layer_ratio"),
    *("sun_molecules", "spread_mean", "max_over_second_q50"),
)
"""Measures that are tracked."""

LEAST = pd.Series({"row": 0.7, "spread": 0.2, "largest": 0.7})
"""A measure grows if its logarithm does in every seed, and by so much in the median, 0.7 being a
factor of two. It grows more or less than in the reference by the same rule, seed by seed."""

PREDICTED = pd.DataFrame(
    [
        ("reference", 1.92, "grows", "grows", "grows", "each factor multiplies the others' steps"),
        ("k = 1", 1.11, "stays", "stays", "grows less", "in a sum no term multiplies another's"),
        ("k = 2", 1.57, "grows less", "grows less", "grows less", "one factor less to multiply"),
        ("k = 4", 2.22, "grows more", "grows more", "grows more", "one factor more to multiply"),
        ("gate 1 + E", 1.77, "grows less", "grows less", "grows", "between two factors and three"),
        ("gate normalized", 1.92, "grows", "grows", "grows less", "row and spread know no scale"),
        ("SGD", 1.92, "stays", "stays", "stays", "without normalizer rare weights hardly move"),
        ("AdamW", 1.92, "grows", "grows", "grows less", "all weights shrink by one factor"),
        ("Adam with L2", 1.92, "grows more", "grows more", "grows less", "idle weights go to zero"),
        ("permuted targets", 1.92, "grows", "grows", "grows", "there is as much to memorize"),
        ("constant targets", 1.92, "stays", "stays", "stays", "nothing to learn but one bias"),
    ],
    columns=["arm", "start", *LEAST.index, "why"],
)
"""Written before any run of these seeds, the spread of an untrained network, and what training
does to each measure. Of the reference networks of other seeds had been seen, to choose how long to
train; of SGD the losses of three learning rates, 0.03, 0.1 and 0.3; of other arms nothing."""


def untrained(config: Config, factors: int, gate: str, splits: Splits) -> nn.Module:
    """A GT with such scores; BatchNorm has the statistics of the training molecules."""
    network = build(config)
    for layer in network.layers:
        layer.attention = ProductAttention(config.hidden_channels, config.heads, factors, gate)
    return calibrate_batch_norm(network, splits.train)


def with_targets(splits: Splits, targets: str) -> Splits:
    """The same molecules with their ``true`` targets, ``permuted`` ones, or a ``constant``, 0."""
    if targets != "constant":
        return with_permuted_targets(splits, 0) if targets == "permuted" else splits
    graphs = {name: [copy.copy(graph) for graph in getattr(splits, name)] for name in SPLITS}
    for graph in chain(*graphs.values()):
        graph.y = torch.zeros_like(graph.y)
    return replace(splits, **graphs)


def mechanism(
    splits: Splits,
    *,
    arms: Sequence[str] | None = None,  # names of studies.mechanism.ARMS; without it all
    seeds: Sequence[int] = (0, 1, 2, 3, 4, 5, 6, 7),  # of weights and order, trained at once
    epochs: int = 6,  # of each training
    graphs: int = 1024,  # to train on; a quarter of them to measure
    batch_size: int = 8,  # graphs of a step
    hidden: int = 32,  # channels
    heads: int = 4,  # of attention
    layers: int = 2,  # of attention
    prefix: Path | str | None = None,
    progress: bool = True,
) -> Study:
    """Train the networks of all arms; ``curves`` has each layer's measures before and after."""
    sizes = dict(hidden_channels=hidden, heads=heads, num_layers=layers, batch_size=batch_size)
    counts = {"train": graphs, "val": graphs // 16, "test": graphs // 4}
    few = replace(splits, **{name: getattr(splits, name)[:n] for name, n in counts.items()})

    def train(config: Config, settings: Mapping[str, Any]) -> Result:
        data, update = with_targets(few, settings["targets"]), OPTIMIZERS[settings["optimizer"]][0]

        def stack(*given: Any) -> Stack:
            made = Stack(*given)
            made.update = update
            return made

        def make(config: Config) -> nn.Module:
            return untrained(config, settings["factors"], settings["gate"], data)

        seen = {0: "untrained", epochs: "trained"}
        how = dict(stack=stack, record_epochs=seen.__contains__, progress=False)
        run = fit(make, data, config, seeds=seeds, **how)
        table = run.observations[["seed", "epoch", "layer", *KEPT]]
        losses = run.history[["seed", "epoch", "train_loss", "val_loss"]]
        table = table.merge(losses, on=["seed", "epoch"], how="left")
        return {"seeds": len(seeds)}, table.assign(state=table.pop("epoch").map(seen))

    trainings = []
    for arm in arms or ARMS:
        settings = REFERENCE | known("--arms", arm, ARMS)
        _, lr, decay = OPTIMIZERS[settings["optimizer"]]
        schedule = dict(lr=lr, lr_patience=epochs, weight_decay=decay, max_epochs=epochs)
        config = CONFIGS["GT-ZINC"].replace(**sizes, **schedule)
        about = {"arm": arm, **settings, "dataset": splits.description.title}
        about |= {**sizes, "graphs": graphs, "epochs": epochs, "lr": lr, "weight_decay": decay}
        about["of_seeds"] = " ".join(map(str, seeds))
        trainings.append((about, partial(train, config, settings)))
    return run_study(trainings, labels=("arm",), prefix=prefix, progress=progress)


def changes(curves: pd.DataFrame) -> pd.DataFrame:
    """What training does to each measure of each network, a difference of natural logarithms.

    Of the layers the largest value, for the spread, itself a deviation of logarithms, the mean.
    """
    columns = ["row", "spread", "largest"]
    table = curves.assign(row=np.log(curves["max_ratio"]), largest=np.log(curves["max_abs"]))
    table = table.rename(columns={"spread_mean": "spread"})
    by_network = table.groupby(["arm", "seed", "state"], sort=False)[columns]
    values = by_network.agg({"row": "max", "spread": "mean", "largest": "max"}).unstack()
    return values.xs("trained", axis=1, level=1) - values.xs("untrained", axis=1, level=1)


def verdicts(curves: pd.DataFrame) -> pd.DataFrame:
    """What was predicted of each arm and measure, and ``yes``, or what was found instead.

    "grows" and "stays" say nothing of the reference, "grows more" and "grows less" do.
    """
    change, rows = changes(curves), {}
    for arm, said in PREDICTED.set_index("arm")[LEAST.index].iterrows():
        of_arm = change.loc[arm]
        further = of_arm - change.loc["reference"]
        grows = (of_arm > 0).all() & (of_arm.median() >= LEAST)
        differs = ((further > 0).all() | (further < 0).all()) & (further.median().abs() >= LEAST)
        beside = further.median().gt(0).map({True: " more", False: " less"}).where(differs, "")
        found = ("grows" + beside).where(grows, "stays")
        held = [now.startswith(then) for now, then in zip(found, said, strict=True)]
        rows[arm] = said + ": " + found.mask(held, "yes")
    return pd.DataFrame(rows).T


def change_by_arm(curves: pd.DataFrame) -> sns.FacetGrid:
    """``changes``, a point per network, a panel per measure."""
    long = changes(curves).reset_index().melt(["arm", "seed"], var_name="measure")
    look = dict(kind="strip", x="value", y="arm", col="measure", jitter=False, alpha=0.6)
    grid = sns.catplot(long, **look, height=3.6, aspect=0.85, sharex=False)
    grid.refline(x=0, color="black", lw=0.8, ls=":")
    return grid.set_titles("{col_name}").set_axis_labels("change of the logarithm", "")
