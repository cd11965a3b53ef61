"""What the massive activations of finished runs sit on: tables by kind of edge, and figures."""

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch_geometric.data import Data
from tqdm import tqdm

from mapkg.attribution import THRESHOLDS, attribute, heat_map
from mapkg.evaluation import each_loss, losses, pooled_mean, predictions
from mapkg.models.config import Config
from studies import checkpoint
from studies.data import BOND_TYPES, Splits, read_smiles
from studies.data.molecules import warn_of_types
from studies.edge_kinds import Labels, distinct_edges, edge_labels, first_layer_table, score_parts
from studies.extras import build
from studies.observation import edge_maxima
from studies.published import titles
from studies.train import seed_all

RUNS = titles("grid")
"""Runs of the emergence grid that are looked at, from names of files to titles."""

ON_ZINC = {name: title for name, title in RUNS.items() if name.endswith("_zinc")}
"""Those on ZINC, whose first layer can be read off the weights as a table of types."""


def bond_types(
    folder: Path | str,
    splits: Splits,
    *,
    by: Sequence[str] = ("type",),  # properties of edges: type, atom pair, ring, conjugation, role
    resamples: int = 1000,  # of bootstraps, and permutations of tests
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """The tables of a finished run, see ``tables_of``, on the test split it was trained for."""
    checkpoint.load(Path(folder) / "best", dataset=splits.description.title)
    kept = sorted(path.stem for path in Path(folder).glob("epoch_*.safetensors"))
    shown = tqdm(["base", "best", *kept], "states", disable=not progress)
    states = ((name, *checkpoint.load(Path(folder) / name)) for name in shown)
    return tables_of(states, splits, by, resamples)


def examine_bond_types(
    path: Path | str, splits: Splits, *, properties: Sequence[str] = ("type",), resamples: int = 200
) -> dict[str, pd.DataFrame]:
    """The same tables of a saved network and of its untrained self, rebuilt from its seed."""
    model, information = checkpoint.load(path)
    seed_all(information["seed"])
    base = build(Config.from_dict(information["config"])).eval()
    states = [("base", base, {**information, "epoch": 0}), ("best", model, information)]
    return tables_of(states, splits, properties, resamples)


def shares_elsewhere(
    folder: Path | str,
    splits: Splits,
    *,
    smiles: Path,  # a file of molecules, a SMILES per line
    by: Sequence[str] = ("type",),  # properties of edges: type, atom pair, ring, conjugation, role
    resamples: int = 200,  # of bootstraps, and permutations of tests
) -> dict[str, pd.DataFrame]:
    """The table ``shares`` of a run's best state on other molecules than it was trained on."""
    model, information = checkpoint.load(Path(folder) / "best", dataset=splits.description.title)
    graphs = read_smiles(smiles)
    warn_of_types(graphs, splits.train, splits.description.title)
    labeled = {name: edge_labels(graphs, name, splits.description) for name in by}
    shares = _shares(model, graphs, labeled, resamples)
    return {"shares": shares.assign(**_origin(information, "best"), looked_at=smiles.name)}


def tables_of(
    states: Iterable[tuple[str, nn.Module, Mapping[str, Any]]],
    splits: Splits,
    properties: Sequence[str],
    resamples: int,
) -> dict[str, pd.DataFrame]:
    """Tables of states (name, network, what its checkpoint says), the untrained one first."""
    about = splits.description
    labeled = {by: edge_labels(splits.test, by, about) for by in properties}
    first = {properties[0]: labeled[properties[0]]}
    labels, names = first[properties[0]]
    has_types = isinstance(about.num_edge_types, int) and isinstance(about.num_node_types, int)
    if has_types:
        triples = distinct_edges(splits.train), distinct_edges(splits.test)
    parts = {name: [] for name in ("shares", "heat", "parts", "first_layer", "losses")}
    for state, model, information in states:
        made = {}
        if has_types:
            start = model.edge_embedding.weight.detach() if state == "base" else start
            made["first_layer"] = first_layer_table(model, *triples, about.edge_types, start)
        if state in ("base", "best"):
            looked = labeled if state == "best" else first
            made["shares"] = _shares(model, splits.test, looked, resamples)
            made["parts"] = score_parts(model, splits.test, labels, names)
            kind = Config.from_dict(information["config"]).loss
            made["losses"] = _losses(model, splits, kind, resamples)
        if state == "best":
            shares = heat_map(model, splits.test, labels, len(names))
            made["heat"] = _heat_table(shares, names)
        for name, table in made.items():
            parts[name].append(table.assign(**_origin(information, state)))
    empty = pd.DataFrame(columns=["label", *_origin(information, state)])
    return {name: pd.concat(p, ignore_index=True) if p else empty for name, p in parts.items()}


def _origin(information: Mapping[str, Any], state: str) -> dict[str, Any]:
    origin = {key: information[key] for key in ("seed", "dataset", "epoch", "versions", "commit")}
    return {"config": information["name"], "state": state, **origin}


def _shares(
    model: nn.Module, graphs: Sequence[Data], labeled: Mapping[str, Labels], resamples: int
) -> pd.DataFrame:
    maxima = edge_maxima(model, graphs).numpy()
    massive = np.concatenate([maxima > threshold for threshold in THRESHOLDS])
    levels = {"threshold": THRESHOLDS, "layer": range(len(maxima))}
    columns = pd.MultiIndex.from_product(levels.values(), names=levels).to_frame(index=False)
    parts = []
    for by, (labels, names) in labeled.items():
        drawn = dict(resamples=resamples, permutations=resamples)
        table = attribute(graphs, labels, names, massive, **drawn)
        named = columns.loc[table.pop("column")].reset_index(drop=True)
        parts.append(pd.concat([named, table], axis=1).assign(by=by))
    return pd.concat(parts, ignore_index=True)


def _losses(model: nn.Module, splits: Splits, kind: str, resamples: int) -> pd.DataFrame:
    predicted, target = predictions(model, splits.test)
    each = each_loss(predicted, target, kind)
    of_graphs = each.split([len(graph.y) for graph in splits.test])
    sums = np.array([of_graph.nansum() for of_graph in of_graphs])
    numbers = np.array([of_graph.isfinite().sum() for of_graph in of_graphs])
    loss, low, high = pooled_mean(sums, numbers, resamples=resamples)
    y = torch.cat([graph.y for graph in splits.train])  # the best logit is a million to one at most
    constant = y.nanmean(dim=0).logit(eps=1e-6) if kind == "bce" else y.quantile(0.5, dim=0)
    constant = losses(constant.expand_as(target), target, kind).mean().item()
    row = {"kind": kind, "loss": loss, "loss_low": low, "loss_high": high, "constant": constant}
    return pd.DataFrame([row])


def edge_counts(shares: pd.DataFrame) -> dict[str, int]:
    """Number of edges of each label, in the order of ``shares``, a table of one property."""
    return shares.groupby("label", sort=False)["edges"].first().to_dict()


def share_table(
    shares: pd.DataFrame, value: str = "share", *, columns: Sequence[str] = ("run", "seed")
) -> pd.DataFrame:
    """A value as text with its interval, ``VALUE_low`` to ``VALUE_high``; labels down."""
    form, three = "{:.3f} [{:.3f}, {:.3f}]", shares[[value, f"{value}_low", f"{value}_high"]]
    texts = ["none" if np.isnan(row[0]) else form.format(*row) for row in three.to_numpy()]
    return shares.assign(text=texts).pivot(index="label", columns=list(columns), values="text")


def _heat_table(
    shares: Float[Tensor, "layers thresholds labels channels"], names: Sequence[str]
) -> pd.DataFrame:
    """Shares of massive edges as a table of percentages, zeros left out."""
    layer, threshold, label, channel = place = (shares > 0).nonzero(as_tuple=True)
    columns = {"threshold": np.array(THRESHOLDS)[threshold], "label": np.array(names)[label]}
    columns |= {"channel": channel, "percent": 100 * shares[place]}
    return pd.DataFrame({"layer": layer, **columns})


def heat_maps(
    heat: pd.DataFrame,
    edges: Mapping[str, int],
    *,
    heads: int,
    channels: int,
    layer: int = 0,
    threshold: float = 1000.0,
) -> Figure:
    """Percentage of massive edges in each channel, a panel for each type that ``edges`` counts.

    Source: massive-activations paper, its bond-type heat map; its axes' labels are swapped.
    """
    chosen = heat.query("layer == @layer and threshold == @threshold")
    wide = chosen.pivot(index="label", columns="channel", values="percent")
    wide = wide.reindex(index=[*edges], columns=range(heads * channels)).fillna(0)
    size = (3.1 * len(edges) + 0.6, 3.4)
    figure, axes = plt.subplots(1, len(edges), figsize=size, layout="constrained", squeeze=False)
    look = dict(cmap="rocket_r", vmin=0, vmax=max([1.0, *chosen["percent"]]), aspect="auto")
    for ax, (label, number) in zip(axes.flat, edges.items(), strict=True):
        values = wide.loc[label].to_numpy(float)
        image = ax.imshow(values.reshape(heads, channels), **look)
        ax.set(xlabel="channel of the head", xticks=range(channels), yticks=range(heads))
        ax.set_title(f"{label}: {number / sum(edges.values()):.2%} of edges")
        if not values.any():
            note = "nothing above the threshold" if number else "no such edge"
            ax.text(0.5, 0.5, note, transform=ax.transAxes, ha="center", va="center")
    axes[0, 0].set_ylabel("head")
    figure.colorbar(image, ax=axes, label="% of edges of the type", pad=0.01)
    figure.suptitle(f"layer {layer}, ratio above {threshold:g}")
    return figure


def published_heat() -> pd.DataFrame:
    """The published heat map as ``heat_maps`` takes it, empty without its numbers.

    GraphiT on ZINC, layer 0, ratio above 4000: read off the colors of the authors' figure
    (LorenzoBini4/GNN-MAs, commit 3d3f1007, plot/heatmap.ipynb), one of 256 each, so that a cell
    is between ``low`` and ``high``.
    """
    path = Path(os.environ.get("MAPKG_DATA", "")) / "published/graphit_zinc_layer0_heat_4000.csv"
    columns = ["layer", "threshold", "label", "channel", "percent", "low", "high"]
    if not path.is_file():
        return pd.DataFrame(columns=columns)
    cells = pd.read_csv(path).query("colour_index > 0")
    cells = cells.rename(columns=lambda name: name.split("percent_")[-1])
    channel = 8 * cells["attention_head"] + cells["feature_dimension"]
    place = dict(layer=0, threshold=4000.0, label=cells["edge_type"].map(BOND_TYPES))
    return cells.rename(columns={"mid": "percent"}).assign(channel=channel, **place)[columns]


def sums_of_kinds(counts: Mapping[str, int]) -> pd.Series:
    """All percentages that edges of these kinds can add up to if a kind is massive or not."""
    some = (kinds for n in range(len(counts) + 1) for kinds in combinations(counts, n))
    sums = {" + ".join(kinds) or "none": sum(counts[kind] for kind in kinds) for kinds in some}
    return 100 * pd.Series(sums).sort_values() / sum(counts.values())


def by_label(
    rows: pd.DataFrame,
    *,
    value: str = "share",
    panel: str = "run",
    columns: int = 3,
    line: float | None = None,
    axis: str = "share of edges with an MA",
) -> sns.FacetGrid:
    """A dot for each seed and label, with its interval if there is one, a panel for each run."""
    three = [name for name in (value, f"{value}_low", f"{value}_high") if name in rows]
    long = rows.melt([panel, "label", "seed"], three)
    seeds = sorted(rows["seed"].unique())
    labels = rows.groupby(panel, sort=False)["label"].unique().map(tuple)
    height = 1.2 + 0.25 * labels.map(len).max()
    look = dict(col_wrap=min(columns, len(labels)), height=height, aspect=3.3 / height)
    look |= dict(sharey=labels.nunique() == 1)
    grid = sns.FacetGrid(long, col=panel, **look)
    dots = dict(hue="seed", hue_order=seeds, palette="colorblind", markersize=4, linestyle="none")
    # The median of a value and the ends of its interval is the value.
    dots |= dict(estimator="median", errorbar=("pi", 100), err_kws=dict(linewidth=1.2))
    dots |= dict(dodge=0.4 if len(seeds) > 1 else False, orient="h")
    grid.map_dataframe(sns.pointplot, "value", "label", **dots)
    grid.set_titles("{col_name}").set_axis_labels(axis, "")
    if value == "share":
        grid.set(xlim=(-0.03, 1.03))
    if line is not None:
        grid.refline(x=line, color="black", lw=0.8, ls=":")
    if len(seeds) > 1:
        grid.add_legend(title="seed")
    return grid


def measured_and_predicted(logs: pd.DataFrame, *, measured: str, predicted: str) -> sns.FacetGrid:
    """Columns ``measured`` against ``predicted``, a panel per label with its typical residual."""
    look = dict(s=18, alpha=0.7, linewidth=0, height=3.0)
    grid = sns.relplot(logs, x="predicted", y="measured", col="label", **look)
    both = logs[["predicted", "measured"]]
    for label, ax in grid.axes_dict.items():
        residual = both[logs["label"] == label].diff(axis=1)["measured"]
        ax.axline((both.min().min(),) * 2, slope=1, color="black", lw=0.8, ls=":")
        ax.set_title(f"{label}, residual {residual.pow(2).mean() ** 0.5:.3f}")
    return grid.set_axis_labels(predicted, measured)
