"""Attacks on finished runs, and what they come to."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from scipy import stats
from torch import nn
from torch_geometric.data import Data

from mapkg.attack import SIGMAS, Ascent, TooFewEntries, attack, where_massive
from mapkg.measures import MASSIVE_RATIO
from mapkg.models.config import Config
from studies import tables
from studies.data import Splits
from studies.explicit_bias import ARMS, COUNTED
from studies.published import known, titles
from studies.results import read_network
from studies.statistics import with_interval

ASCENT = Ascent(lr=0.1, passes=40)
"""How noise is optimized here, with fewer passes than the published 1000, and longer steps."""

KINDS: Mapping[str, Mapping[str, Any]] = {
    "own": {},
    "shared": {"shared": True},
    "relative": {"relative": True},
    "published": {"centered": False, "ascent": Ascent(), "restarts": (0,)},
}
"""Noise of each node and edge its own, one vector for all nodes and one for all edges, sizes in
units of the embeddings' standard deviations, and the published way of finding the first: not
centered, one restart, the largest size alone. The others are centered."""

USUAL = ("own", "shared", "relative")
"""The kinds that every network is attacked with; the published one takes many passes."""

PLACES = {
    "massive edges": ("edges", False),
    "massive edges, control": ("edges", True),
    "massive channels": ("channels", False),
    "massive channels, control": ("channels", True),
    "largest channel": ("largest", False),
    "largest channel, control": ("largest", True),
}
"""Where the embeddings of edges are disturbed, from titles to ``by`` and ``control`` of
``attack.where_massive``; every mask is as large as its control."""


def _attacks(group: str) -> dict[str, tuple[str, str]]:
    arms = ARMS | COUNTED
    return {name: (title, arms[name.split("_")[-1]]) for name, title in titles(group).items()}


CONTRASTS = {
    "published term, biases": (ARMS["none"], ARMS["published"]),
    "intended term, biases": (ARMS["none"], ARMS["intended"]),
    "intended term": (ARMS["bias"], ARMS["intended"]),
    "sink": (ARMS["none"], ARMS["sink"]),
}
"""What is compared under noise, networks of the same seed."""


ATTACKED, MORE, TOLD, PLACED = map(_attacks, ("attacks", "further seeds", "counted", "places"))
"""Tracked attacks everywhere, on further seeds, on networks that are told numbers of neighbors, and
on ``PLACES``, too; from names of files to network and arm. GT's published term is the intended one.
On PROTEINS and TOX21 the two arms differ in the term alone."""


def attack_network(
    model: nn.Module,
    config: Config,
    graphs: Sequence[Data],
    *,
    sigmas: Iterable[float] = SIGMAS,
    restarts: Sequence[int] = (0, 1, 2),
    kinds: Iterable[str] = USUAL,
    places: Iterable[str] = (),
    threshold: float = MASSIVE_RATIO,
    ascent: Ascent = ASCENT,
    progress: bool = True,
) -> pd.DataFrame:
    """Attacks of several kinds on one network, and on places where it has massive activations.

    Attacks on places, and published ones, have the last of ``sigmas`` alone. There are no rows of a
    place where nothing, everything, or a single entry is massive.
    """
    sigmas, parts = tuple(sigmas), []
    common: dict[str, Any] = dict(loss=config.loss, restarts=restarts, ascent=ascent, centered=True)
    common |= dict(batch_size=config.batch_size, progress=progress)
    for kind, options in [(kind, known("kind", kind, KINDS)) for kind in kinds]:
        sizes = sigmas[-1:] if kind == "published" else sigmas
        parts.append(attack(model, graphs, sizes, **common | options).assign(kind=kind))
    for place, (by, control) in [(place, PLACES[place]) for place in places]:
        choice = where_massive(model, by, threshold=threshold, control=control)
        try:
            table = attack(model, graphs, sigmas[-1:], masks={"edge_embedding": choice}, **common)
        except TooFewEntries:
            continue
        parts.append(table.assign(kind=place))
    if not parts:
        raise ValueError(
            f"places: none of {', '.join(places)} is in these graphs; the network has no massive "
            "activation there, or nothing else; take more graphs or another threshold"
        )
    return pd.concat(parts, ignore_index=True)


def drawn(graphs: Sequence[Data], number: int, seed: int) -> list[Data]:
    """So many of the graphs, at random: the first ones of a sorted split are not like the rest."""
    order = torch.randperm(len(graphs), generator=torch.Generator().manual_seed(seed))
    return [graphs[i] for i in order[:number].tolist()]


def attack_run(
    folder: Path | str,
    splits: Splits,
    *,
    graphs: int = 64,  # validation graphs, drawn by the seed of the run
    kinds: Sequence[str] = USUAL,  # of noise; published takes many passes
    places: bool = False,  # also noise where massive activations are, and controls
    **settings: Any,
) -> pd.DataFrame:
    """Attacks on the best weights of a finished run, ``settings`` as of ``attack_network``."""
    model, config, origin = read_network(folder, splits)
    chosen, settings = drawn(splits.val, graphs, origin["seed"]), settings | {"kinds": kinds}
    table = attack_network(model, config, chosen, places=PLACES if places else (), **settings)
    return table.assign(graphs=len(chosen), **origin)


def read_attacks(folder: Path | str, runs: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    """The tracked tables of several networks, from names of files to ``label`` and ``run``."""
    rows = tables.read(folder, "attack", list(runs))
    label, run = (rows["run"].map({n: both[i] for n, both in runs.items()}) for i in (0, 1))
    return rows.assign(label=label, run=run)


def damage(attacks: pd.DataFrame) -> pd.DataFrame:
    """What attacks do to losses, geometric means over restarts; gain is ``gain_factor`` less 1."""
    keys = ["label", "run", "kind", "sigma", "seed", "noise"]
    logs = attacks.assign(loss=np.log(attacks["loss"])).groupby(keys, sort=False)["loss"]
    means = np.exp(logs.mean().unstack("noise", sort=False))
    for noise in ("random", "optimised"):
        means[f"{noise}_factor"] = means[noise] / means["none"]
    means["gain_factor"] = means["optimised"] / means["random"]
    return means.reset_index().rename_axis(columns=None)


def damage_table(
    damages: pd.DataFrame, values: Mapping[str, str], *, rows: Sequence[str], form: str = "{:.3g}"
) -> pd.DataFrame:
    """Geometric means of columns over seeds with 95 % t intervals of the logarithms, as text."""
    text = partial(with_interval, form=form, logarithmic=True)
    return damages.groupby(list(rows), sort=False)[list(values)].agg(text).rename(columns=values)


def losses_under_attack(damages: pd.DataFrame, *, runs: Sequence[str]) -> sns.FacetGrid:
    """Geometric means over seeds of the loss, a panel per network, a color per remedy."""
    names = {"optimised": "optimized noise", "random": "random noise", "none": "no noise"}
    keys = ["label", "run", "sigma", "seed"]
    grid = sns.relplot(
        damages.rename(columns=names).melt(keys, list(names.values()), "noise", "loss"),
        **dict(kind="line", x="sigma", y="loss", hue="run", style="noise", col="label", col_wrap=3),
        hue_order=[run for run in runs if run in set(damages["run"])],
        palette="colorblind",
        dashes=["", (4, 1.5), (1, 1)],
        estimator=stats.gmean,
        errorbar=("pi", 100),
        err_kws=dict(alpha=0.12),
        **dict(height=2.9, aspect=0.9),
    )
    grid.set(xscale="log", yscale="log").set_titles("{col_name}")
    return grid.set_axis_labels(r"$\sigma$", "loss")
