"""What the subcommands that train many small networks do, each with the options of its parser.

They import what they need when they are called, as those of ``commands``.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def gradients(parsed: argparse.Namespace) -> int:
    """Watch the gradients of deep networks on the nodes of one graph."""
    import torch

    from studies.data import load
    from studies.depth import compact_gradients, gradient_evolution, gradient_variants
    from studies.results import write_table
    from studies.schedule import Schedule

    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    gradients = gradient_evolution(
        load(parsed.dataset),
        gradient_variants(hidden_channels=parsed.hidden, heads=parsed.heads),
        num_layers=parsed.layers,
        seeds=parsed.seeds,
        schedule=Schedule(epochs=parsed.epochs, lr_patience=None),
    )
    for name, table in compact_gradients(gradients).items():
        path = Path(f"{parsed.output}_{name}.csv.gz")
        write_table(path, table.assign(heads=parsed.heads, hidden=parsed.hidden), digits=3)
        print(path)
    return 0


def depth(parsed: argparse.Namespace) -> int:
    """Train deep networks of every depth on the nodes of one graph."""
    import torch

    from studies.data import load
    from studies.depth import DEPTHS, Variant, depth_study

    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    settings = dict(architecture=parsed.architecture, hidden_channels=parsed.hidden)
    variants = []
    for text in parsed.norms:
        norm, _, scale = text.partition("=")
        try:
            number = float(scale) if scale else None
        except ValueError:
            raise ValueError(f"--norms {text}: expected NORM or NORM=SCALE") from None
        variants.append(Variant(norm=norm, scale=number, heads=parsed.heads, **settings))
    depth_study(
        load(parsed.dataset),
        variants,
        depths=parsed.layers or DEPTHS,
        seeds=parsed.seeds,
        schedule=_schedule(parsed),
        prefix=parsed.output,
    )
    return 0


def missing(parsed: argparse.Namespace) -> int:
    """Train networks of every depth on a graph whose features are hidden."""
    import torch

    from studies.data import load
    from studies.missing_features import LAYERS, MODELS, missing_study

    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    missing_study(
        load(parsed.dataset),
        _chosen("--models", parsed.models, MODELS),
        rates=parsed.rates,
        layers=parsed.layers or LAYERS,
        seeds=parsed.seeds,
        schedule=_schedule(parsed),
        prefix=parsed.output,
    )
    return 0


def smoothing(parsed: argparse.Namespace) -> int:
    """Measure smoothing in deep attention, and train the vanilla network of the theory."""
    import pandas as pd
    import torch

    from studies.backward_oversmoothing import OPTIMIZERS, Vanilla, full_training
    from studies.data import load
    from studies.deep_smoothing import deep_smoothing, regular_splits
    from studies.provenance import commit, versions
    from studies.results import write_table
    from studies.schedule import Schedule

    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    schedule = Schedule(epochs=parsed.epochs, lr_patience=None)
    cases = [(load(parsed.dataset), parsed.seeds)]
    cases += [(regular_splits(seed=seed), [seed]) for seed in parsed.seeds]
    tables = [
        deep_smoothing(splits, num_layers=num_layers, seeds=seeds, schedule=schedule)
        for splits, seeds in cases
        for num_layers in parsed.layers
    ]
    deep = pd.concat(tables, ignore_index=True)
    variants = {
        f"{name}, {activation}": Vanilla(
            activation=activation, gain=gain, hidden_channels=32, is_graph=name == "GNN"
        )
        for activation, gain in (("relu", None), ("tanh", 1.2))
        for name in ("GNN", "MLP")
    }
    settings = dict(depths=parsed.depths, seeds=parsed.seeds, steps=parsed.steps)
    tables = [
        full_training(variants, optimizer=name, **settings).assign(optimiser=name)
        for name in OPTIMIZERS
    ]
    training = pd.concat(tables, ignore_index=True)
    training = training.assign(versions=versions(), commit=commit())
    for name, table in (("deep", deep), ("training", training)):
        path = Path(f"{parsed.output}_{name}.csv.gz")
        write_table(path, table, digits=4)
        print(path)
    return 0


def trees(parsed: argparse.Namespace) -> int:
    """Train networks on Tree-NeighborsMatch."""
    import torch

    from studies.data import load
    from studies.neighbors_match import TITLES, VARIANTS, tree_study
    from studies.tasks import TREES

    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    architectures = _chosen("--architectures", parsed.architectures, TITLES)
    tree_study(
        load(parsed.dataset),
        [variant for variant in VARIANTS.values() if variant.architecture in architectures],
        seeds=parsed.seeds,
        schedule=replace(
            TREES,
            epochs=parsed.passes,
            batch_size=parsed.batch_size,
            lr=parsed.lr,
            block=parsed.block,
        ),
        sampling=parsed.sampling,
        passes_apart=parsed.passes_apart,
        prefix=parsed.output,
    )
    return 0


def _schedule(parsed: argparse.Namespace) -> Any:
    """The published schedule, or with ``--constant-rate`` one whose rate does not fall."""
    from studies.schedule import Schedule

    schedule = Schedule(epochs=parsed.epochs)
    return replace(schedule, lr_patience=None) if parsed.constant_rate else schedule


def _chosen(option: str, names: Sequence[str] | None, known: Mapping[str, T]) -> dict[str, T]:
    """What is known by these names, or all of it if there are none."""
    wrong = [name for name in names or () if name not in known]
    if wrong:
        raise ValueError(f"{option}: expected some of {', '.join(known)}, got {wrong[0]!r}")
    return {name: known[name] for name in names or known}
