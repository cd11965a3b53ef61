"""Do massive activations attribute? Ratios beside established methods, and what removal does."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor, nn
from torch_geometric.data import Data
from tqdm import tqdm

from mapkg.interventions import intervene, summarise_interventions
from mapkg.measures import MASSIVE_RATIO
from mapkg.models.config import Config
from studies import checkpoint
from studies.data import Splits
from studies.edge_scores import METHODS, edge_importance, rank_correlation
from studies.faithfulness import FRACTIONS, ORDERS, compare, curve
from studies.first_layer import distinct_edges

CONTROL = "random"
"""The method that the others are compared with."""

REFERENCE_GRAPHS = 2000
"""Training graphs over whose edges the mean of a channel is taken."""

RANDOM_ORDERS = 5
"""How many random orders the control is the mean of."""


@dataclass(frozen=True)
class Explanations:
    """The tables of one network, or of several one below another.

    Attributes:
        correlation: per method, Spearman's rank correlation with the ratio over the bonds of a
            molecule: the ``mean`` over molecules with its 95 % interval, and of how many of the
            ``graphs`` it is ``defined``.
        curves: per mode, order, method and fraction of the bonds, ``change`` of the prediction
            and ``absolute_error``: means over molecules with 95 % intervals.
        areas: per mode, order and method, the area under the curve of the change, and its
            difference to the random order on the same molecule, as ``faithfulness.compare``.
    """

    correlation: pd.DataFrame
    curves: pd.DataFrame
    areas: pd.DataFrame


def explain_run(
    folder: Path | str,
    splits: Splits,
    *,
    graphs: int = 100,
    layers: Sequence[int] = (0,),
    thresholds: Sequence[float] = (MASSIVE_RATIO,),
    resamples: int = 2000,
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """Explanations of a finished run on test graphs, and interventions on its activations.

    Args:
        folder: what ``python -m studies train`` wrote.
        splits: the data it was trained on.
        graphs: how many test graphs are explained, the first ones; interventions are on all.
        layers: whose ratios are compared with other attributions.
        thresholds: of the interventions, which are on the scores of all layers together.
        resamples: bootstrap resamples of molecules.
        progress: whether to show progress bars on stderr.

    Returns:
        The tables of ``Explanations``, with the layer in each row, and ``interventions``, all
        with where they come from. Besides the methods there is ``frequency``, of
        ``type_frequency``.

    Raises:
        FileNotFoundError: if the run is not finished.
    """
    model, information = checkpoint.load(Path(folder) / "best")
    frequency = type_frequency(splits.train, splits.test[:graphs])
    found = [
        vars(
            explain(
                model,
                splits.test[:graphs],
                layer=layer,
                # What does not depend on the layer is computed once.
                methods=tuple(METHODS) if layer == layers[0] else ("ratio", CONTROL),
                others={"frequency": frequency} if layer == layers[0] else {},
                resamples=resamples,
                progress=progress,
            )
        )
        for layer in layers
    ]
    tables = {
        name: pd.concat(
            [of[name].assign(layer=layer) for layer, of in zip(layers, found, strict=True)],
            ignore_index=True,
        )
        for name in found[0]
    }
    tables["interventions"] = remove_massive(
        model,
        splits.test,
        splits.train[:REFERENCE_GRAPHS],
        thresholds=thresholds,
        loss=Config.from_dict(information["config"]).loss,
        resamples=resamples,
    )
    origin = {key: information[key] for key in ("seed", "dataset", "epoch", "versions", "commit")}
    origin["config"] = information["name"]
    return {name: table.assign(**origin) for name, table in tables.items()}


def explain(
    model: nn.Module,
    graphs: Sequence[Data],
    *,
    methods: Sequence[str] = tuple(METHODS),
    others: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
    layer: int = 0,
    modes: Sequence[str] = ("deletion",),
    fractions: Sequence[float] = FRACTIONS,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> Explanations:
    """Compare the ratio with established attributions of edges, on one trained network.

    Args:
        model: a network with one prediction per graph.
        graphs: molecules with targets.
        methods: names of ``edge_scores.METHODS``; the ratio and the control must be there.
        others: further importances by name, a tensor per graph with a number per edge, as
            ``type_frequency`` gives them.
        layer: whose ratio is meant.
        modes: of the curves. Insertion in one order passes through the graphs of deletion in the
            other order, backwards: it says nothing new where both orders are there.
        fractions: of the bonds.
        resamples: bootstrap resamples of molecules.
        seed: of random orders, of GNNExplainer and of the bootstrap.
        progress: whether to show progress bars on stderr.

    Raises:
        ValueError: if the ratio or the control is not among the methods.
    """
    for needed in ("ratio", CONTROL):
        if needed not in methods:
            raise ValueError(f"methods: expected {needed!r} among them, got {', '.join(methods)}")
    scores = {
        method: edge_importance(model, graphs, method, layer=layer, seed=seed, progress=progress)
        for method in methods
        if method != CONTROL
    } | dict(others)
    controls = [
        edge_importance(model, graphs, CONTROL, seed=seed + draw, progress=False)
        for draw in range(RANDOM_ORDERS)
    ]
    correlation = [
        {"method": method, **_mean_with_interval(found, resamples, seed), "graphs": len(graphs)}
        for method, values in {**scores, CONTROL: controls[0]}.items()
        if method != "ratio"
        for found in [rank_correlation(scores["ratio"], values, graphs)]
    ]
    curves, areas = [], []
    named = {**{method: [values] for method, values in scores.items()}, CONTROL: controls}
    combinations = [(mode, order) for mode in modes for order in ORDERS]
    for mode, order in tqdm(combinations, "curves", file=sys.stderr, disable=not progress):
        found = {
            method: pd.concat(
                [
                    curve(model, graphs, of_draw, mode=mode, order=order, fractions=fractions)
                    for of_draw in draws
                ]
            )
            for method, draws in named.items()
        }
        where = {"mode": mode, "order": order}
        areas.append(
            compare(found, control=CONTROL, resamples=resamples, seed=seed).assign(**where)
        )
        curves += [
            _mean_curve(of_method, resamples, seed).assign(method=method, **where)
            for method, of_method in found.items()
        ]
    return Explanations(
        correlation=pd.DataFrame(correlation),
        curves=pd.concat(curves, ignore_index=True),
        areas=pd.concat(areas, ignore_index=True),
    )


def type_frequency(train: Sequence[Data], graphs: Sequence[Data]) -> list[Float[Tensor, " edges"]]:
    """How many training edges have the types of each edge and of its two ends.

    What an edge's importance would be if it went by how common the edge is, without any network.

    Args:
        train: where edges are counted.
        graphs: whose edges are looked up; 0 for types that no training edge has.
    """
    known = distinct_edges(train)
    counts = {
        tuple(key): float(count)
        for *key, count in zip(
            *(part.tolist() for part in (known.source, known.target, known.edge, known.count)),
            strict=True,
        )
    }
    asked = distinct_edges(graphs)
    keys = zip(*(part.tolist() for part in (asked.source, asked.target, asked.edge)), strict=True)
    of_triples = torch.tensor([counts.get(key, 0.0) for key in keys])
    return list(of_triples[asked.index].split([graph.num_edges for graph in graphs]))


def remove_massive(
    model: nn.Module,
    graphs: Sequence[Data],
    reference: Sequence[Data],
    *,
    thresholds: Sequence[float],
    layers: Sequence[str] = ("layers.*.score",),
    loss: str = "l1",
    resamples: int = 2000,
) -> pd.DataFrame:
    """What becomes of the predictions without massive activations, over thresholds and layers.

    Args:
        model: a trained network.
        graphs: with targets.
        reference: whose channels' means replace massive activations.
        thresholds: ratios above which an activation is massive.
        layers: one name or pattern after another, for example of all layers and of one.
        loss: ``"l1"`` or ``"bce"``.
        resamples: bootstrap resamples of molecules.

    Returns:
        As ``interventions.summarise_interventions``, a row per layers, threshold, rule and what
        is changed.
    """
    tables = [
        intervene(model, graphs, reference=reference, layers=names, threshold=threshold, loss=loss)
        for names in layers
        for threshold in thresholds
    ]
    return summarise_interventions(pd.concat(tables, ignore_index=True), resamples=resamples)


def _mean_curve(curves: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Means over molecules at each fraction, several orders of one molecule averaged first."""
    rows = []
    for fraction, at in curves.groupby("fraction"):
        row = {"fraction": fraction}
        for value in ("change", "absolute_error"):
            found = _mean_with_interval(
                at.groupby("graph")[value].mean().to_numpy(), resamples, seed
            )
            row |= {
                value: found["mean"],
                f"{value}_low": found["low"],
                f"{value}_high": found["high"],
            }
        rows.append(row)
    return pd.DataFrame(rows)


def _mean_with_interval(
    values: Float[np.ndarray, " graphs"], resamples: int, seed: int
) -> dict[str, float]:
    """The mean of the finite values with a percentile bootstrap interval, NaN without two."""
    finite = values[np.isfinite(values)]
    row = {"mean": np.nan, "low": np.nan, "high": np.nan, "defined": len(finite)}
    if len(finite) < 2:
        return row
    interval = stats.bootstrap(
        (finite,),
        np.mean,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return row | {"mean": finite.mean(), "low": interval.low, "high": interval.high}


def read_explanations(folder: Path | str, runs: Mapping[str, str]) -> dict[str, pd.DataFrame]:
    """The tracked tables of several runs, with their titles in a column ``run``.

    For ``plots.by_label``, methods and what is changed are in a column ``label``, but in the
    curves, and the interval of a mean correlation in ``mean_low`` and ``mean_high``.

    Args:
        folder: where ``python -m studies explain`` wrote ``explain_NAME_TABLE.csv.gz``.
        runs: from names of files to titles.

    Raises:
        FileNotFoundError: if a table is missing.
    """
    tables = {}
    for table in ("correlation", "curves", "areas", "interventions"):
        parts = []
        for name, title in runs.items():
            path = Path(folder) / f"explain_{name}_{table}.csv.gz"
            if not path.is_file():
                raise FileNotFoundError(
                    f"no table at {path}; write it with python -m studies explain"
                )
            parts.append(pd.read_csv(path).assign(run=title))
        joined = pd.concat(parts, ignore_index=True)
        renamed = {"method": "label", "what": "label", "low": "mean_low", "high": "mean_high"}
        tables[table] = joined if table == "curves" else joined.rename(columns=renamed)
    return tables
