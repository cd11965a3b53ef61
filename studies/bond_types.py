"""What the massive activations of finished runs sit on: tables by type of edge."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch_geometric.data import Data
from tqdm import tqdm

from mapkg.attribution import THRESHOLDS, Edges, attribute, heat_map
from mapkg.evaluation import predictions
from mapkg.metrics import best_constant, each_loss, losses, pooled_mean
from mapkg.models import build
from mapkg.models.config import Config
from studies import checkpoint
from studies.changed_types import Change
from studies.data import Description, Splits
from studies.data.bond_properties import edge_labels
from studies.emergence import fit_to_data
from studies.first_layer import Triples, distinct_edges, first_layer_table
from studies.observation import edge_maxima
from studies.results import write_table
from studies.score_parts import score_parts
from studies.train import fit, seed_all

STATES = ("base", "best")
"""The states of a run that are looked at, untrained and with the least validation loss."""


@dataclass(frozen=True)
class BondTypes:
    """The tables of what massive activations sit on, each row with where it comes from.

    Attributes:
        shares: per state, layer, threshold, property of the edge (``by``) and label, the
            columns of ``attribution.by_type.attribute``.
        heat: per layer, threshold, label and channel of the best state, the percentage of edges;
            zeros are left out, and so is a layer without a massive activation.
        parts: per state, layer and label, the columns of ``attribution.parts.score_parts``.
        first_layer: per kept epoch and label, what the first layer's weights say and what is
            measured, the columns of ``attribution.first_layer.first_layer_table``; empty where
            edges have more than one type id.
        losses: per state, the mean loss on the test split (``loss``) with its bootstrap interval
            over graphs, which loss it is (``kind``), and ``constant``, the loss of the best
            constant prediction of the training split.
    """

    shares: pd.DataFrame
    heat: pd.DataFrame
    parts: pd.DataFrame
    first_layer: pd.DataFrame
    losses: pd.DataFrame


def bond_types(
    folder: Path | str,
    splits: Splits,
    *,
    properties: Sequence[str] = ("type",),
    resamples: int = 1000,
    progress: bool = True,
) -> BondTypes:
    """Look at what the massive activations of a finished run sit on, on the test split.

    Args:
        folder: what ``python -m studies train`` wrote.
        splits: the data it was trained on, with the same change and seed.
        properties: of the edges, see ``data.bond_properties.edge_labels``; of the untrained
            network only the first one is looked at.
        resamples: of the bootstrap, and permutations of the test.
        progress: whether to show a progress bar on stderr.

    Raises:
        FileNotFoundError: if the run is not finished.
        ValueError: if it was trained on other data; says on which.
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
    return _look(states, splits, properties, resamples)


def examine_bond_types(
    path: Path | str,
    splits: Splits,
    *,
    properties: Sequence[str] = ("type",),
    resamples: int = 200,
) -> BondTypes:
    """The same tables of a saved network beside its untrained self, built from its seed.

    Args:
        path: a checkpoint that ``emergence`` wrote; the state ``best``.
        splits: the data to look at, its test split.
        properties, resamples: as for ``bond_types``.
    """
    model, information = checkpoint.load(path)
    seed_all(information["seed"])
    base = build(Config.from_dict(information["config"])).eval()
    states = [("base", base, {**information, "epoch": 0}), ("best", model, information)]
    return _look(states, splits, properties, resamples)


def retrain(
    config: Config,
    splits: Splits,
    changes: Mapping[str, Change],
    seeds: Sequence[int],
    *,
    progress: bool = True,
) -> pd.DataFrame:
    """Train a network on data with changed types, and read its first layer.

    Args:
        config: GT, GraphiT or SAN; sizes of embedding tables grow with the data's.
        splits: the data before a change.
        changes: from titles to changes; a change is given the seed, too.
        seeds: of initial weights and order.
        progress: whether to show a progress bar on stderr.

    Returns:
        A row per change (``run``), seed, state (``base`` and ``best``) and edge type, with the
        columns of ``first_layer_table`` and the validation loss, ``val_loss``, of the best
        epoch.
    """
    tables = []
    pairs = [(title, seed) for title in changes for seed in seeds]
    for title, seed in tqdm(pairs, "networks", file=sys.stderr, disable=not progress):
        changed = changes[title](splits, seed)
        about = changed.description
        sized = config.replace(
            num_node_types=about.num_node_types, num_edge_types=about.num_edge_types
        )
        sized = fit_to_data(sized, about)
        triples = distinct_edges(changed.train), distinct_edges(changed.test)
        seed_all(seed)
        model = build(sized)
        base = {name: value.clone() for name, value in model.state_dict().items()}
        start = base["edge_embedding.weight"]
        run = fit(model, changed, sized, seed=seed, progress=False)
        for state, weights in zip(STATES, (base, run.best_weights), strict=True):
            model.load_state_dict(weights)
            table = first_layer_table(model, *triples, about.edge_types, start)
            named = {"run": title, "seed": seed, "state": state}
            tables.append(table.assign(**named, val_loss=run.history["val_loss"].min()))
    return pd.concat(tables, ignore_index=True)


def shares_elsewhere(
    folder: Path | str,
    graphs: Sequence[Data],
    description: Description,
    *,
    title: str,
    properties: Sequence[str] = ("type",),
    resamples: int = 200,
) -> BondTypes:
    """What the massive activations of a finished run sit on, on molecules of another origin.

    Args:
        folder: what ``python -m studies train`` wrote.
        graphs: the molecules; targets are not needed.
        description: names their edge types.
        title: what the table calls them, in ``looked_at``.
        properties: of the edges, see ``data.bond_properties.edge_labels``.
        resamples: of the bootstrap, and permutations of the test.

    Returns:
        ``shares`` of the state ``best``; the other tables are empty.
    """
    model, information = checkpoint.load(Path(folder) / "best")
    labelled = {by: edge_labels(graphs, by, description) for by in properties}
    shares = _shares(model, graphs, labelled, resamples)
    shares = shares.assign(**_origin(information, "best"), looked_at=title)
    return replace(_EMPTY, shares=shares)


_EMPTY = BondTypes(**{table.name: pd.DataFrame() for table in fields(BondTypes)})


def _look(
    states: Iterable[tuple[str, nn.Module, Mapping[str, Any]]],
    splits: Splits,
    properties: Sequence[str],
    resamples: int,
) -> BondTypes:
    """The tables of several states of one network; the first state is the untrained one."""
    labelled = {by: edge_labels(splits.test, by, splits.description) for by in properties}
    first = dict(list(labelled.items())[:1])
    (labels, names), triples = first[properties[0]], _triples(splits)
    tables: dict[str, list[pd.DataFrame]] = {table.name: [] for table in fields(BondTypes)}
    start = None
    for state, model, information in states:
        parts: dict[str, pd.DataFrame] = {}
        if triples is not None:
            start = model.edge_embedding.weight.detach() if start is None else start
            parts["first_layer"] = first_layer_table(
                model, *triples, splits.description.edge_types, start
            )
        if state in STATES:
            looked = labelled if state == "best" else first
            parts["shares"] = _shares(model, splits.test, looked, resamples)
            parts["parts"] = score_parts(model, splits.test, labels, names)
            kind = Config.from_dict(information["config"]).loss
            parts["losses"] = _losses(model, splits, kind, resamples)
        if state == "best":
            parts["heat"] = _heat(model, splits, labels, names)
        for table, frame in parts.items():
            tables[table].append(frame.assign(**_origin(information, state)))
    return BondTypes(
        **{
            name: pd.concat(frames, ignore_index=True)
            if frames
            else pd.DataFrame(columns=["label", *_origin(information, state)])
            for name, frames in tables.items()
        }
    )


def join(runs: Sequence[BondTypes]) -> BondTypes:
    """The tables of several runs as one set."""
    return BondTypes(
        **{
            table.name: pd.concat([getattr(run, table.name) for run in runs], ignore_index=True)
            for table in fields(BondTypes)
        }
    )


def write_bond_types(tables: BondTypes, prefix: Path | str) -> list[Path]:
    """Write the tables, each as ``PREFIX_TABLE.csv.gz``; those without columns are left out.

    Args:
        tables: of one run or several.
        prefix: path of the files without what names the table.

    Returns:
        The files written.
    """
    paths = []
    for table in fields(tables):
        frame = getattr(tables, table.name)
        if len(frame.columns):
            paths.append(Path(f"{prefix}_{table.name}.csv.gz"))
            write_table(paths[-1], frame)
    return paths


def _origin(information: Mapping[str, Any], state: str) -> dict[str, Any]:
    origin = {key: information[key] for key in ("seed", "dataset", "epoch", "versions", "commit")}
    return {"config": information["name"], "state": state, **origin}


def _triples(splits: Splits) -> tuple[Triples, Triples] | None:
    """Distinct edges of training and test split, where an edge has one type id and no more."""
    about = splits.description
    if not (isinstance(about.num_edge_types, int) and isinstance(about.num_node_types, int)):
        return None
    return distinct_edges(splits.train), distinct_edges(splits.test)


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
    tables = []
    for by, (labels, names) in labelled.items():
        edges = Edges.of(graphs, labels, names)
        table = attribute(edges, massive, resamples=resamples, permutations=resamples)
        named = columns.loc[table.pop("column")].reset_index(drop=True)
        tables.append(pd.concat([named, table], axis=1).assign(by=by))
    return pd.concat(tables, ignore_index=True)


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
