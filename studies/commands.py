"""What the commands of ``python -m studies`` do; their options are the parameters."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pandas as pd
import torch
from pydantic import TypeAdapter, ValidationError

from mapkg.models.config import Config
from studies import checkpoint, tables
from studies.bond_changes import CHANGES
from studies.converged import to_the_end
from studies.data import SPLITS, NodesOfGraph, Splits, load
from studies.emergence import (
    emergence,
    fit_to_data,
    observation_epochs,
    with_permuted_targets,
    without_training,
)
from studies.files import check_output
from studies.published import CONFIGS, known
from studies.results import refuse_twice
from studies.untrained import measured

DIGITS: Mapping[str, Mapping[str, int]] = {
    "emergence": {"graph_maxima": 4},
    "nulls": {"networks": 4},
    "remedy": {"epochs": 4},
    "gradients": {"heat": 3, "largest": 3},
    "smoothing": {"deep": 4, "training": 4},
}
"""Digits of tables that would be too large for the repository with six."""

LARGEST = 10**6
"""The largest number that a value of a network may be."""


def train(
    *,
    config: str,  # a network of studies/published.toml, for example GT-ZINC
    dataset: str,  # a data set, for example moses
    out: Path,  # the folder of the run; one that was stopped goes on
    seed: int = 0,  # of initial weights, order of the data and dropout
    epochs: int | None = None,  # at most so many; without it as many as the network states
    set: Sequence[str] = (),  # values of the network to change, for example heads=4 lr=0.001
    change: str | None = None,  # change the data first, for example shuffled-types
    permute_targets: bool = False,  # a null: permute the targets among the graphs of a split
    keep_every: int | None = None,  # also keep the weights of each Nth epoch
    limit: int | None = None,  # only so many graphs of each split, to try out
    device: str = "cpu",  # for example cuda
    threads: int | None = None,  # CPU threads; without it as many as torch takes
) -> None:
    """Train a network and write what emerges."""
    changed = _change(change)  # what cannot be is refused before data are read
    check_output(out / "summary.csv.gz")
    settings, splits, where = _network(config, dataset, set, limit, device)
    torch.set_num_threads(threads or torch.get_num_threads())
    if epochs is not None:
        settings = settings.replace(max_epochs=epochs)
    splits = changed(splits, seed)
    if permute_targets:
        splits = with_permuted_targets(splits, seed)
    settings = fit_to_data(settings, splits.description)  # or nothing is written
    observed = observation_epochs(settings.max_epochs)
    further = dict(folder=out, device=where, observe_epochs=observed, keep_every=keep_every)
    emergence(settings, splits, seed=seed, name=config, **further)


def untrained(
    *,
    config: str,  # a network of studies/published.toml, for example GT-ZINC
    dataset: str,  # a data set, for example moses
    networks: int = 20,  # how many, with seeds one after the other
    first_seed: int = 1000,  # of initial weights; other ones than those of trained networks
    set: Sequence[str] = (),  # values of the network to change, for example heads=4
    limit: int | None = None,  # only so many graphs of each split, to try out
    device: str = "cpu",  # for example cuda
) -> pd.DataFrame:
    """``emergence.without_training`` of a configuration and a data set by name."""
    settings, splits, where = _network(config, dataset, set, limit, device)
    seeds = range(first_seed, first_seed + networks)
    return without_training(settings, splits, seeds, name=config, device=where)


def nulls(
    *,
    config: str,  # a network of studies/published.toml, for example GT-ZINC
    dataset: str,  # a data set, for example moses
    networks: int = 200,  # how many, with seeds one after the other
    first_seed: int = 1000,  # of initial weights; other ones than those of trained networks
    graphs: int = 128,  # the first of the test split, which are looked at
    set: Sequence[str] = (),  # values of the network to change, for example heads=4
) -> dict[str, pd.DataFrame]:
    """``untrained.measured`` of a configuration and a data set by name."""
    settings, splits, _ = _network(config, dataset, set, None, "cpu")
    seeds = range(first_seed, first_seed + networks)
    return {"networks": measured(settings, splits, seeds, graphs=graphs, name=config)}


def converged(
    *,
    config: str,  # a network of studies/published.toml, for example SAN-TU
    dataset: str,  # a data set, for example proteins
    seeds: Sequence[int] = (0, 1, 2),  # of initial weights, order of the data and dropout
    set: Sequence[str] = (),  # values of the network to change, for example hidden_channels=96
    limit: int | None = None,  # only so many graphs of each split, to try out
    prefix: Path | str,
) -> None:
    """``converged.to_the_end`` of a configuration and a data set by name."""
    settings, splits, _ = _network(config, dataset, set, limit, "cpu")
    to_the_end(settings, splits, seeds, prefix=prefix, name=config, changes=" ".join(set))


def data(
    dataset: str,  # for example moses
) -> None:
    """Load a data set and say what it is."""
    splits = load(dataset)
    for name, value in vars(splits.description).items():
        for line in value if name == "deviations" else (value,):
            print(f"{name}: {line}")
    for name in SPLITS:
        graphs = getattr(splits, name)
        if isinstance(graphs, NodesOfGraph):
            print(f"{name}: {len(graphs):,} nodes of one graph")
            continue
        nodes, edges = (sum(getattr(g, key) for g in graphs) for key in ("num_nodes", "num_edges"))
        print(f"{name}: {len(graphs):,} graphs, {nodes:,} nodes, {edges:,} directed edges")


def make(
    study: str,
    function: Callable[..., Any],
    *,
    output: str,
    folders: Sequence[Path] = (),
    change: str | None = None,
    permute_targets: bool = False,
    limit: int | None = None,
    threads: int | None = None,
    **settings: Any,
) -> None:
    """Make a study's tables, of all runs joined, as ``OUTPUT_TABLE.csv.gz`` or ``OUTPUT.csv.gz``.

    ``function`` takes the ``folder`` of a run, ``splits`` or both; with ``prefix`` it writes them.
    """
    changed, takes = _change(change), function.__annotations__  # what cannot be is refused first
    refuse_twice(folders)
    prefix = Path(output.removesuffix(".csv.gz"))
    if not prefix.name or output.endswith("/"):
        raise ValueError(
            f"--output {output}: expected what names of tables begin with, not a folder"
        )
    for path in (Path(f"{prefix}.csv.gz"), *prefix.parent.glob(f"{prefix.name}_*.csv.gz")):
        check_output(path)
    data: tuple[Splits, ...] = ()
    if "splits" in takes:
        seeds = [checkpoint.load(folder / "best")[1]["seed"] for folder in folders]
        data = (_limited(load(settings.pop("dataset")), limit),)
    elif "limit" in takes:  # it loads its data by itself
        settings["limit"] = limit
    torch.set_num_threads(threads or torch.get_num_threads())
    if "prefix" in takes:
        function(*data, prefix=output, **settings)
        return
    parts = [] if folders else [function(*data, **settings)]
    for number, folder in enumerate(folders):
        print(folder, file=sys.stderr)
        of_run = [changed(splits, seeds[number]) for splits in data]
        if permute_targets:
            of_run = [with_permuted_targets(splits, seeds[number]) for splits in of_run]
        parts.append(function(folder, *of_run, **settings))
    parts = [{"": part} if isinstance(part, pd.DataFrame) else part for part in parts]
    joined = {name: pd.concat([p[name] for p in parts], ignore_index=True) for name in parts[0]}
    for path in tables.write_all(prefix, joined, DIGITS.get(study, {})):
        print(path)


def _network(
    config: str, dataset: str, set: Sequence[str], limit: int | None, device: str
) -> tuple[Config, Splits, torch.device]:
    """Configuration, data and device of these names."""
    settings = known("--config", config, CONFIGS).replace(**overrides(set))
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device}: cannot be used here: {reason}") from None
    return settings, _limited(load(dataset), limit), torch.device(device)


def _limited(splits: Splits, limit: int | None) -> Splits:
    if limit is None:
        return splits
    limited = {name: getattr(splits, name)[:limit] for name in SPLITS}
    title = f"{splits.description.title}, first {limit}"
    return replace(splits, description=replace(splits.description, title=title), **limited)


def _change(name: str | None) -> Callable[[Splits, int], Splits]:
    return (lambda splits, seed: splits) if name is None else known("--change", name, CHANGES)


def overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Values of ``NAME=VALUE``, converted to the type of the configuration's field."""
    types, values = get_type_hints(Config), {}
    for name in ("dataset", "source"):  # say of the published run what it was, and change nothing
        del types[name]
    for assignment in assignments:
        name, sign, text = assignment.partition("=")
        if not sign or name not in types:
            names = ", ".join(types)
            raise ValueError(f"--set {assignment}: expected NAME=VALUE with NAME one of {names}")
        if name in values:
            raise ValueError(f"--set {assignment}: {name} is set twice")
        kinds = get_args(types[name]) or (types[name],)  # int | None has two
        try:
            is_none = NoneType in kinds and text.lower() == "none"
            value = None if is_none else TypeAdapter(kinds[0]).validate_strings(text)
        except ValidationError:
            raise ValueError(f"--set {assignment}: expected a {kinds[0].__name__}") from None
        if isinstance(value, int | float) and not abs(value) <= LARGEST:
            raise ValueError(f"--set {assignment}: expected a number up to {LARGEST}")
        values[name] = value
    return values
