"""What the massive activations of finished runs sit on: tables by type of edge, and figures."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch_geometric.data import Data
from tqdm import tqdm

from mapkg.attribution import THRESHOLDS, Edges, attribute, heat_map
from mapkg.evaluation import best_constant, each_loss, losses, pooled_mean, predictions
from mapkg.models.config import Config
from studies import checkpoint
from studies.data import Splits, read_smiles
from studies.data.bond_properties import edge_labels
from studies.extras import build
from studies.first_layer import distinct_edges, first_layer_table, score_parts
from studies.observation import edge_maxima
from studies.runs import titles
from studies.train import seed_all

RUNS = titles("grid")
"""Runs of the emergence grid that are looked at, from names of files to titles."""

ON_ZINC = {name: title for name, title in RUNS.items() if name.endswith("_zinc")}
"""Those on ZINC, whose first layer can be read off the weights as a table of types."""

STATES = ("base", "best")
"""The states of a run that are looked at, untrained and with the least validation loss."""

TABLES = ("shares", "heat", "parts", "first_layer", "losses")
"""What ``bond_types`` gives:

- ``shares``: per state, layer, threshold, property of the edge (``by``) and label, the columns of
  ``mapkg.attribution.attribute``;
- ``heat``: per layer, threshold, label and channel of the best state, the percentage of massive
  edges, zeros left out;
- ``parts``: per state, layer and label, the columns of ``first_layer.score_parts``;
- ``first_layer``: per kept epoch and label, the columns of ``first_layer.first_layer_table``;
  empty where edges have more than one type id;
- ``losses``: per state, the mean test loss with its bootstrap interval over graphs, its ``kind``,
  and ``constant``, the loss of the best constant prediction.
"""


def bond_types(
    folder: Path | str,
    splits: Splits,
    *,
    by: Sequence[str] = ("type",),  # properties of edges: type, atom pair, ring, conjugation, role
    resamples: int = 1000,  # of bootstraps, and permutations of tests
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """Make ``TABLES`` of a finished run on the test split of the data it was trained on.

    Properties of edges are those of ``bond_properties.edge_labels``; the untrained network is
    looked at by the first one only.
    """
    folder = Path(folder)
    names = [*STATES, *sorted(path.stem for path in folder.glob("epoch_*.safetensors"))]
    trained_on = checkpoint.load(folder / "best")[1]["dataset"]
    if trained_on != splits.description.title:
        raise ValueError(
            f"{folder} was trained on {trained_on!r}, got {splits.description.title!r}; load the "
            "same data and make the same change"
        )
    states = (
        (name, *checkpoint.load(folder / name))
        for name in tqdm(names, "states", file=sys.stderr, disable=not progress)
    )
    return _tables(states, splits, by, resamples)


def examine_bond_types(
    path: Path | str,
    splits: Splits,
    *,
    properties: Sequence[str] = ("type",),
    resamples: int = 200,
) -> dict[str, pd.DataFrame]:
    """Make ``TABLES`` of a saved network and its untrained self, rebuilt from its seed."""
    model, information = checkpoint.load(path)
    seed_all(information["seed"])
    base = build(Config.from_dict(information["config"])).eval()
    states = [("base", base, {**information, "epoch": 0}), ("best", model, information)]
    return _tables(states, splits, properties, resamples)


def shares_elsewhere(
    folder: Path | str,
    splits: Splits,
    *,
    smiles: Path,  # a file of molecules, a SMILES per line
    by: Sequence[str] = ("type",),  # properties of edges: type, atom pair, ring, conjugation, role
    resamples: int = 200,  # of bootstraps, and permutations of tests
) -> dict[str, pd.DataFrame]:
    """Make the table ``shares`` of a run's best state on other molecules than it was trained on."""
    model, information = checkpoint.load(Path(folder) / "best")
    graphs = read_smiles(smiles)
    labelled = {name: edge_labels(graphs, name, splits.description) for name in by}
    shares = _shares(model, graphs, labelled, resamples)
    return {"shares": shares.assign(**_origin(information, "best"), looked_at=smiles.name)}


def _tables(
    states: Iterable[tuple[str, nn.Module, Mapping[str, Any]]],
    splits: Splits,
    properties: Sequence[str],
    resamples: int,
) -> dict[str, pd.DataFrame]:
    """The tables of several states of one network; the first state is the untrained one."""
    about = splits.description
    labelled = {by: edge_labels(splits.test, by, about) for by in properties}
    first = {properties[0]: labelled[properties[0]]}
    labels, names = first[properties[0]]
    has_types = isinstance(about.num_edge_types, int) and isinstance(about.num_node_types, int)
    if has_types:
        triples = distinct_edges(splits.train), distinct_edges(splits.test)
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    start = None
    for state, model, information in states:
        found = {}
        if has_types:
            start = model.edge_embedding.weight.detach() if start is None else start
            found["first_layer"] = first_layer_table(model, *triples, about.edge_types, start)
        if state in STATES:
            looked = labelled if state == "best" else first
            found["shares"] = _shares(model, splits.test, looked, resamples)
            found["parts"] = score_parts(model, splits.test, labels, names)
            kind = Config.from_dict(information["config"]).loss
            found["losses"] = _losses(model, splits, kind, resamples)
        if state == "best":
            found["heat"] = _heat(model, splits, labels, names)
        for name, table in found.items():
            parts[name].append(table.assign(**_origin(information, state)))
    empty = pd.DataFrame(columns=["label", *_origin(information, state)])
    return {name: pd.concat(p, ignore_index=True) if p else empty for name, p in parts.items()}


def _origin(information: Mapping[str, Any], state: str) -> dict[str, Any]:
    origin = {key: information[key] for key in ("seed", "dataset", "epoch", "versions", "commit")}
    return {"config": information["name"], "state": state, **origin}


def _shares(
    model: nn.Module,
    graphs: Sequence[Data],
    labelled: dict[str, tuple[list[Int[Tensor, " _"]], tuple[str, ...]]],
    resamples: int,
) -> pd.DataFrame:
    maxima = edge_maxima(model, graphs).numpy()
    massive = np.concatenate([maxima > threshold for threshold in THRESHOLDS])
    columns = pd.MultiIndex.from_product(
        [THRESHOLDS, range(len(maxima))], names=["threshold", "layer"]
    ).to_frame(index=False)
    parts = []
    for by, (labels, names) in labelled.items():
        edges = Edges.of(graphs, labels, names)
        table = attribute(edges, massive, resamples=resamples, permutations=resamples)
        named = columns.loc[table.pop("column")].reset_index(drop=True)
        parts.append(pd.concat([named, table], axis=1).assign(by=by))
    return pd.concat(parts, ignore_index=True)


def _losses(model: nn.Module, splits: Splits, kind: str, resamples: int) -> pd.DataFrame:
    predicted, target = predictions(model, splits.test)
    found = each_loss(predicted, target, kind)
    pairs = found.nansum(dim=1).numpy(), found.isfinite().sum(dim=1).numpy()
    loss, low, high = pooled_mean(*pairs, resamples=resamples)
    trained_on = torch.cat([graph.y for graph in splits.train])
    constant = best_constant(trained_on, kind).expand_as(target)
    row = {"kind": kind, "loss": loss, "loss_low": low, "loss_high": high}
    return pd.DataFrame([row | {"constant": losses(constant, target, kind).mean().item()}])


def _heat(
    model: nn.Module, splits: Splits, labels: list[Tensor], names: Sequence[str]
) -> pd.DataFrame:
    shares = heat_map(model, splits.test, labels, len(names))
    layer, threshold, label, channel = (shares > 0).nonzero(as_tuple=True)
    return pd.DataFrame(
        {
            "layer": layer,
            "threshold": np.asarray(THRESHOLDS)[threshold],
            "label": np.asarray(names)[label],
            "channel": channel,
            "percent": 100 * shares[layer, threshold, label, channel],
        }
    )


# Tables to read.


def edge_counts(shares: pd.DataFrame) -> dict[str, int]:
    """Number of edges of each label, in the order of ``shares``, a table of one property."""
    if shares.empty:
        raise ValueError(
            "expected rows of a table of shares, got none; there are tables of the thresholds "
            + ", ".join(f"{threshold:g}" for threshold in THRESHOLDS)
        )
    return shares.groupby("label", sort=False)["edges"].first().to_dict()


def share_table(
    shares: pd.DataFrame, value: str = "share", *, columns: Sequence[str] = ("run", "seed")
) -> pd.DataFrame:
    """A value as text with its interval, ``VALUE_low`` to ``VALUE_high``; labels down."""
    texts = shares.apply(
        lambda row: (
            "none"
            if np.isnan(row[value])
            else f"{row[value]:.3f} [{row[f'{value}_low']:.3f}, {row[f'{value}_high']:.3f}]"
        ),
        axis=1,
    )
    wide = shares.assign(text=texts).pivot(index="label", columns=list(columns), values="text")
    order = shares[list(columns)].drop_duplicates()
    wide = wide.reindex(index=shares["label"].unique())
    return wide[[tuple(row) if len(row) > 1 else row[0] for row in order.to_numpy()]]


def range_table(
    table: pd.DataFrame,
    values: Mapping[str, str],
    *,
    rows: Sequence[str] = ("run", "label"),
    digits: int = 3,
) -> pd.DataFrame:
    """Least and greatest of each value over seeds, as text; ``values`` gives the headings."""

    def text(group: pd.Series) -> str:
        low, high = group.min(), group.max()
        ends = [f"{end:,.0f}" if abs(end) >= 1000 else f"{end:.{digits}g}" for end in (low, high)]
        return ends[0] if ends[0] == ends[1] else " to ".join(ends)

    return table.groupby(list(rows), sort=False)[list(values)].agg(text).rename(columns=values)


# Figures.


def heat_maps(
    heat: pd.DataFrame,
    edges: Mapping[str, int],
    *,
    heads: int,
    channels: int,
    layer: int = 0,
    threshold: float = 1000.0,
) -> Figure:
    """Percentage of edges that are massive in each channel, a panel for each type of edge.

    ``edges`` counts the edges of each type, in the order of the panels; ``heads`` are the rows of
    a panel and ``channels`` (of a head) its columns.

    Source: massive-activations paper, its bond-type heat map. differs: the labels of its two
    axes are swapped.
    """
    chosen = heat.query("layer == @layer and threshold == @threshold")
    vmax = max(chosen["percent"].max(), 1.0) if len(chosen) else 1.0
    figure, axes = plt.subplots(
        1, len(edges), figsize=(3.1 * len(edges) + 0.6, 3.4), layout="constrained", squeeze=False
    )
    for ax, (label, number) in zip(axes.flat, edges.items(), strict=True):
        values = np.zeros(heads * channels)
        rows = chosen[chosen["label"] == label]
        values[rows["channel"].to_numpy(int)] = rows["percent"].to_numpy(float)
        values = values.reshape(heads, channels)
        image = ax.imshow(values, cmap="rocket_r", vmin=0, vmax=vmax, aspect="auto")
        ax.set(xlabel="channel of the head", ylabel="head" if ax is axes.flat[0] else None)
        ax.set(xticks=range(channels), yticks=range(heads))
        ax.set_title(f"{label}: {number / sum(edges.values()):.2%} of edges")
        if not values.any():
            note = "no such edge" if number == 0 else "nothing above the threshold"
            ax.text(0.5, 0.5, note, transform=ax.transAxes, ha="center", va="center")
    figure.colorbar(image, ax=axes, label="% of edges of the type", pad=0.01)
    figure.suptitle(f"layer {layer}, ratio above {threshold:g}")
    return figure


def by_label(
    rows: pd.DataFrame,
    *,
    value: str = "share",
    panel: str = "run",
    columns: int = 3,
    log: bool = False,
    line: float | None = None,
    axis: str = "share of edges with an MA",
) -> sns.FacetGrid:
    """A dot for each seed and label, a panel for each run.

    If there are columns ``VALUE_low`` and ``VALUE_high``, a dot has an interval. ``line`` is where
    a dotted line is drawn across, ``axis`` the label of the value's axis.
    """
    columns = min(columns, rows[panel].nunique())
    most = rows.groupby(panel)["label"].nunique().max()
    width = 3.0 if columns > 2 else max(3.6, 0.35 * most)
    letters = rows.groupby(panel)["label"].agg(lambda labels: sum(map(len, labels.unique())))
    crowded = letters.max() > 9 * width
    height = 3.2 if crowded else 2.5
    look = dict(height=height, aspect=width / height, col_wrap=columns, sharex=False)
    grid = sns.FacetGrid(rows, col=panel, **look)
    seeds = sorted(rows["seed"].unique())
    grid.map_dataframe(_dots, value=value, seeds=seeds, turn=crowded)
    grid.set_titles("{col_name}").set_axis_labels("", axis)
    if log:
        grid.set(yscale="log")
    if value == "share":
        grid.set(ylim=(-0.03, 1.03))
    if line is not None:
        grid.refline(y=line, color="black", lw=0.8, ls=":")
    if len(seeds) > 1:
        grid.add_legend(title="seed")
    grid.tight_layout()
    return grid


def _dots(data: pd.DataFrame, *, value: str, seeds: Sequence[Any], turn: bool, **_: object) -> None:
    """A dot for each seed at each label of one panel, with its interval if there is one."""
    ax, labels = plt.gca(), list(data["label"].unique())
    colors = sns.color_palette("colorblind", len(seeds))
    offsets = np.linspace(-0.22, 0.22, len(seeds)) if len(seeds) > 1 else [0.0]
    for seed, color, offset in zip(seeds, colors, offsets, strict=True):
        points = data[data["seed"] == seed].set_index("label").reindex(labels)
        middle, place = points[value].to_numpy(float), np.arange(len(labels)) + offset
        ends = None
        if f"{value}_low" in points:
            ends = np.abs(points[[f"{value}_low", f"{value}_high"]].to_numpy(float).T - middle)
        ax.errorbar(place, middle, ends, fmt="o", ms=4.5, color=color, lw=1.2, label=str(seed))
    turned = {"rotation": 90} if len(labels) > 9 else {"rotation": 30, "ha": "right"}
    ax.set_xticks(range(len(labels)), labels, fontsize="small", **turned if turn else {})
    ax.set_xlim(-0.5, len(labels) - 0.5)
