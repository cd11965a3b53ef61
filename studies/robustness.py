"""Attacks on finished runs, and what they come to."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from scipy import stats
from torch import nn
from torch_geometric.data import Data

from mapkg.attack import SIGMAS, Ascent, TooFewEntries, attack, where_massive
from mapkg.measures import MASSIVE_RATIO
from mapkg.models.config import Config
from studies import tables
from studies.data import Splits
from studies.published import titles
from studies.remedies import ARMS, COUNTED
from studies.results import read_network

ASCENT = Ascent(lr=0.1, passes=40)
"""How noise is optimised here, with fewer passes than the published 1000, and longer steps."""

KINDS: Mapping[str, Mapping[str, Any]] = {
    "own": {},
    "shared": {"shared": True},
    "relative": {"relative": True},
    "published": {"centred": False, "ascent": Ascent(), "restarts": (0,)},
}
"""Kinds of noise, of each node and edge its own, one vector for all nodes and one for all edges,
sizes relative to the embeddings' standard deviations, and the published way of finding the first,
one restart and not centred, for the largest size alone. The others are centred."""

USUAL = ("own", "shared", "relative")
"""The kinds that every network is attacked with; the published one takes many passes."""

PLACES = {
    f"{name}{'' if massive else ', control'}": (by, not massive)
    for name, by in (
        ("massive edges", "edges"),
        ("massive channels", "channels"),
        ("largest channel", "largest"),
    )
    for massive in (True, False)
}
"""Where the embeddings of edges are disturbed, from titles to ``by`` and ``control`` of
``attack.where_massive``; every mask is as large as its control."""


def _attacks(group: str) -> dict[str, tuple[str, str]]:
    arms = ARMS | COUNTED
    return {name: (title, arms[name.split("_")[-1]]) for name, title in titles(group).items()}


ATTACKED = _attacks("attacks")
"""Tracked attacks everywhere, from names of files to network and arm. GT's published term is the
intended one. On PROTEINS and TOX21 the two arms differ in the term alone."""

MORE = _attacks("further seeds")
"""Tracked attacks on further seeds of GT on TOX21, with noise of each node's and edge's own."""

TOLD = _attacks("counted")
"""Tracked attacks that tell a sink from what it lets a node know, its number of neighbours."""

PLACED = _attacks("places")
"""Tracked attacks on ``PLACES``, too."""


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

    ``config`` names the loss and the batch size. Attacks on places, and published ones, have the
    last of ``sigmas`` alone; ``restarts`` are seeds of the noise.

    The rows of ``attack.attack`` with a column ``kind``, one of ``kinds`` or ``places``; none of a
    place that these graphs do not have, where nothing, or everything, is massive, or a single
    entry, which has no standard deviation.
    """
    sigmas, kinds, places = tuple(sigmas), tuple(kinds), tuple(places)
    for what, named, known in (("kinds", kinds, KINDS), ("places", places, PLACES)):
        if unknown := sorted({*named} - {*known}):
            raise ValueError(f"{what}: expected some of {', '.join(known)}; got {unknown}")
    common: dict[str, Any] = dict(loss=config.loss, restarts=restarts, ascent=ascent, centred=True)
    common |= dict(batch_size=config.batch_size, progress=progress)
    found = []
    for kind in kinds:
        sizes = sigmas[-1:] if kind == "published" else sigmas
        table = attack(model, graphs, sizes, **common | KINDS[kind])
        found.append(table.assign(kind=kind))
    for place in places:
        by, control = PLACES[place]
        choice = where_massive(model, by, threshold=threshold, control=control, equal=True)
        try:
            table = attack(model, graphs, sigmas[-1:], masks={"edge_embedding": choice}, **common)
        except TooFewEntries:
            continue
        found.append(table.assign(kind=place))
    if not found:
        raise ValueError(
            f"places: none of {', '.join(places)} is in these graphs; the network has no massive "
            "activation there, or nothing else; take more graphs or another threshold"
        )
    return pd.concat(found, ignore_index=True)


def attack_run(
    folder: Path | str,
    splits: Splits,
    *,
    graphs: int = 64,  # validation graphs, the first ones
    kinds: Sequence[str] = USUAL,  # of noise; published takes many passes
    places: bool = False,  # also noise where massive activations are, and controls
    **settings: Any,
) -> pd.DataFrame:
    """Attacks on the best weights of a finished run, ``settings`` as of ``attack_network``.

    All networks on one data set are attacked on the same molecules.
    """
    model, config, origin = read_network(folder, splits)
    chosen, settings = list(splits.val[:graphs]), settings | {"kinds": kinds}
    table = attack_network(model, config, chosen, places=PLACES if places else (), **settings)
    return table.assign(graphs=len(chosen), **origin)


def read_attacks(folder: Path | str, runs: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    """The tracked tables of several networks, from names of files to ``label`` and ``run``."""
    rows = tables.read(folder, "attack", list(runs)).rename(columns={"run": "file"})
    rows["label"] = rows["file"].map({name: label for name, (label, _) in runs.items()})
    rows["run"] = rows.pop("file").map({name: arm for name, (_, arm) in runs.items()})
    return rows


def damage(attacks: pd.DataFrame) -> pd.DataFrame:
    """What attacks do to the loss of each network, means over restarts.

    A row per ``label``, ``run``, ``kind``, ``sigma`` and training ``seed``. Columns are the losses
    ``none``, ``random`` and ``optimised``, geometric means over restarts, and how many times the
    first the others are, ``random_factor`` and ``optimised_factor``, and ``gain_factor``, how many
    times the random one the optimised one is (the published gain and 1).
    """
    keys = ["label", "run", "kind", "sigma", "seed"]
    logs = attacks.assign(loss=np.log(attacks["loss"]))
    means = np.exp(
        logs.groupby([*keys, "noise"], sort=False)["loss"].mean().unstack("noise", sort=False)
    )
    for noise in ("random", "optimised"):
        means[f"{noise}_factor"] = means[noise] / means["none"]
    means["gain_factor"] = means["optimised"] / means["random"]
    return means.reset_index().rename_axis(columns=None)


def damage_table(
    damages: pd.DataFrame, values: Mapping[str, str], *, rows: Sequence[str], form: str = "{:.3g}"
) -> pd.DataFrame:
    """Geometric means over training seeds with 95 % t intervals of the logarithms, as text.

    What a single seed has is given without an interval. ``values`` are columns with headings.
    """

    def text(values: pd.Series) -> str:
        if len(values) == 1:
            return form.format(values.iloc[0])
        logs = np.log(values)
        mean, error = logs.mean(), stats.sem(logs)
        low, high = stats.t.interval(0.95, len(logs) - 1, mean, error) if error else (mean, mean)
        return f"{form} [{form}, {form}]".format(*np.exp([mean, low, high]))

    return damages.groupby(list(rows), sort=False)[list(values)].agg(text).rename(columns=values)


def losses_under_attack(
    damage: pd.DataFrame, *, runs: Sequence[str] = (), columns: int = 3
) -> sns.FacetGrid:
    """The loss under noise of each size, a panel per network, a color per remedy.

    A line is the geometric mean over seeds, in a band from the least to the greatest. The remedies
    of ``runs`` come first.
    """
    present = damage["run"].unique()
    order = [*dict.fromkeys(run for run in (*runs, *present) if run in present)]
    names = {"optimised": "optimised noise", "random": "random noise", "none": "no noise"}
    keys = ["label", "run", "sigma", "seed"]
    long = damage.rename(columns=names).melt(keys, list(names.values()), "noise", "loss")
    grid = sns.relplot(
        long,
        kind="line",
        x="sigma",
        y="loss",
        hue="run",
        hue_order=order,
        palette="colorblind",
        style="noise",
        dashes=["", (4, 1.5), (1, 1)],
        estimator=lambda losses: np.exp(np.log(losses).mean()),
        errorbar=("pi", 100),
        err_kws=dict(alpha=0.12),
        col="label",
        col_wrap=columns,
        height=2.9,
        aspect=0.9,
    )
    grid.set(xscale="log", yscale="log").set_titles("{col_name}")
    return grid.set_axis_labels(r"$\sigma$", "loss")
