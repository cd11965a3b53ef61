"""What the subcommands of ``python -m studies`` do, each with the options its parser gives it.

They import what they need when they are called, so that ``--help`` and a misspelt option are
answered at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from mapkg.models.config import Config
from studies.published import CONFIGS


def run(parsed: argparse.Namespace) -> int:
    """Run a notebook strictly, or list its parameters."""
    from studies import notebook

    if parsed.list:
        print(notebook.describe(notebook.parameters(parsed.notebook)))
        return 0
    values = notebook.parse(parsed.notebook, map(tuple, parsed.parameter))
    if parsed.output is None:
        raise ValueError("nowhere to write to; name the executed notebook with -o OUT.ipynb")
    try:
        print(notebook.run(parsed.notebook, parsed.output, values))
    except notebook.NotebookFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def train(parsed: argparse.Namespace) -> int:
    """Train a network and write what emerges."""
    from studies.controls import permute_targets
    from studies.emergence import emergence, observation_epochs

    _change(parsed.change)  # a misspelt name is refused before data are read
    config, splits, device = _network(parsed)
    if parsed.epochs is not None:
        config = config.replace(max_epochs=parsed.epochs)
    splits = _change(parsed.change)(splits, parsed.seed)
    if parsed.permute_targets:
        splits = permute_targets(splits, parsed.seed)
    emergence(
        config,
        splits,
        seed=parsed.seed,
        name=parsed.config,
        folder=parsed.out,
        device=device,
        observe_epochs=observation_epochs(config.max_epochs),
        keep_every=parsed.keep_every,
    )
    return 0


def attribute(parsed: argparse.Namespace) -> int:
    """Count massive activations of finished runs by type of edge."""
    from studies.bond_types import bond_types, shares_elsewhere, write_bond_types
    from studies.data import read_smiles

    if parsed.smiles is not None and parsed.change is not None:
        raise ValueError(
            f"--smiles, --change {parsed.change}: expected one of them; the molecules of a file "
            "are not changed, so give --smiles alone, for networks trained on unchanged data"
        )
    elsewhere = None if parsed.smiles is None else read_smiles(parsed.smiles)

    def attributed(folder: Path, splits: Any) -> Any:
        if elsewhere is None:
            return bond_types(folder, splits, properties=parsed.by)
        named = dict(properties=parsed.by, title=parsed.smiles.name)
        return shares_elsewhere(folder, elsewhere, splits.description, **named)

    runs = _of_each_run(parsed, attributed)
    for path in write_bond_types(runs, parsed.output):
        print(path)
    return 0


def explain(parsed: argparse.Namespace) -> int:
    """Compare ratios with other attributions, and remove massive activations."""
    import pandas as pd

    from studies.explanations import explain_run
    from studies.results import write_table

    runs = _of_each_run(parsed, explain_run, graphs=parsed.graphs)
    for name in runs[0]:
        path = Path(f"{parsed.output}_{name}.csv.gz")
        write_table(path, pd.concat([run[name] for run in runs], ignore_index=True))
        print(path)
    return 0


def remedy(parsed: argparse.Namespace) -> int:
    """Write the compact tables of finished runs."""
    from studies.remedies import join_compact
    from studies.results import write_table

    for name, table in join_compact(parsed.folders).items():
        path = Path(f"{parsed.output}_{name}.csv.gz")
        write_table(path, table, digits=4 if name == "epochs" else 6)  # for the repository's size
        print(path)
    return 0


def idle(parsed: argparse.Namespace) -> int:
    """Give finished runs a term that nothing but the record feels."""
    from studies.explicit_bias import idle_term_of_run

    return _join(_of_each_run(parsed, idle_term_of_run), parsed.output)


def sink(parsed: argparse.Namespace) -> int:
    """See how much attention finished runs give to their sink."""
    from studies.explicit_bias import weight_on_sink_of_run

    return _join(_of_each_run(parsed, weight_on_sink_of_run), parsed.output)


def attack(parsed: argparse.Namespace) -> int:
    """Disturb the embeddings of finished runs."""
    from studies.robustness import USUAL, attack_run

    settings = dict(graphs=parsed.graphs, places=parsed.places, kinds=parsed.kinds or USUAL)
    return _join(_of_each_run(parsed, attack_run, **settings), parsed.output)


def untrained(parsed: argparse.Namespace) -> int:
    """Look at networks without training."""
    from studies.controls import untrained
    from studies.results import write_table

    config, splits, device = _network(parsed)
    seeds = range(parsed.first_seed, parsed.first_seed + parsed.networks)
    table = untrained(config, splits, seeds, name=parsed.config, device=device)
    write_table(parsed.output, table)
    print(parsed.output)
    return 0


def laws(parsed: argparse.Namespace) -> int:
    """Fit laws to the ratios of collected runs."""
    from studies.grid import laws, read_runs
    from studies.results import write_table

    write_table(parsed.output, laws(read_runs(parsed.results, parsed.runs).histogram))
    print(parsed.output)
    return 0


def _of_each_run(
    parsed: argparse.Namespace, function: Callable[..., Any], **settings: Any
) -> list[Any]:
    """What a function of a finished run and its data gives, for each folder.

    The data are changed as in training where the command has ``--change``.
    """
    import torch

    from studies import checkpoint
    from studies.data import load

    name = getattr(parsed, "change", None)
    change = _change(name)  # a misspelt name is refused before data are read
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    splits = load(parsed.dataset)
    found = []
    for folder in parsed.folders:
        print(folder, file=sys.stderr)
        seed = None if name is None else checkpoint.load(folder / "best")[1]["seed"]
        found.append(function(folder, change(splits, seed), **settings))
    return found


def _join(tables: Sequence[Any], path: Path) -> int:
    import pandas as pd

    from studies.results import write_table

    write_table(path, pd.concat(tables, ignore_index=True))
    print(path)
    return 0


def _network(parsed: argparse.Namespace) -> tuple[Config, Any, Any]:
    """Configuration, data and device, as the options of ``_add_network`` say."""
    import torch

    from studies.data import load

    config = CONFIGS[parsed.config].replace(**overrides(parsed.set))
    device = _device(parsed.device)
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    splits = load(parsed.dataset)
    if parsed.limit is not None:
        limited = {name: getattr(splits, name)[: parsed.limit] for name in ("train", "val", "test")}
        title = f"{splits.description.title}, first {parsed.limit}"
        splits = replace(splits, description=replace(splits.description, title=title), **limited)
    return config, splits, device


def _change(name: str | None) -> Any:
    """The change of data of that name, called with splits and a seed; None changes nothing."""
    from studies.bond_changes import CHANGES

    if name is None:
        return lambda splits, seed: splits
    if name not in CHANGES:
        raise ValueError(f"--change {name}: expected one of {', '.join(CHANGES)}")
    return CHANGES[name]


def collect(parsed: argparse.Namespace) -> int:
    """Join the tables of finished runs."""
    from studies.results import collect

    for path in collect(parsed.folders, parsed.output, parsed.states):
        print(path)
    return 0


def data(parsed: argparse.Namespace) -> int:
    """Load a data set and say what it is."""
    from studies.data import NodesOfGraph, load

    splits = load(parsed.dataset)
    for name, value in vars(splits.description).items():
        for line in value if name == "deviations" else (value,):
            print(f"{name}: {line}")
    for name in ("train", "val", "test"):
        graphs = getattr(splits, name)
        if isinstance(graphs, NodesOfGraph):
            print(f"{name}: {len(graphs):,} nodes of one graph")
            continue
        nodes, edges = (sum(getattr(g, key) for g in graphs) for key in ("num_nodes", "num_edges"))
        print(f"{name}: {len(graphs):,} graphs, {nodes:,} nodes, {edges:,} directed edges")
    return 0


def _device(name: str) -> Any:
    """The torch device of that name, if this machine has it."""
    import torch

    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: cannot be used here: {reason}") from None


def overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """Values of ``NAME=VALUE``, converted to the type of the configuration's field."""
    types = get_type_hints(Config)
    values = {}
    for assignment in assignments:
        name, found, text = assignment.partition("=")
        if not found or name not in types:
            raise ValueError(
                f"--set {assignment}: expected NAME=VALUE with NAME one of {', '.join(types)}"
            )
        kinds = get_args(types[name]) or (types[name],)  # int | None has two
        try:
            values[name] = None if text == "None" and NoneType in kinds else _parse(text, kinds[0])
        except ValueError:
            raise ValueError(f"--set {assignment}: expected a {kinds[0].__name__}") from None
    return values


def _parse(text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return kind(text)
