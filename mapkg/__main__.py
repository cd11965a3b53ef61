"""The command line: ``python -m mapkg COMMAND``, with ``--help`` for the commands."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from mapkg.configs import CONFIGS, Config

USAGE_ERROR = 2
"""Exit status when what was asked for cannot be done, as argparse uses it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.function(parsed)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mapkg", description="Paper companion tools.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a notebook with other parameters, strictly")
    run.add_argument("notebook", type=Path)
    run.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a parameter of the notebook; may be repeated",
    )
    run.add_argument("-o", "--output", type=Path, help="where the executed notebook goes")
    run.add_argument("--list", action="store_true", help="list the parameters and stop")
    run.set_defaults(function=_run)

    train = commands.add_parser(
        "train", help="train a network, watch massive activations emerge, write tables"
    )
    _add_network(train)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--epochs", type=int, help="at most so many; default: the configuration's")
    train.add_argument("--out", type=Path, required=True, help="folder; a stopped run goes on")
    train.add_argument(
        "--permute-targets",
        action="store_true",
        help="a null: train on targets that have nothing to do with the graphs",
    )
    train.add_argument(
        "--change",
        metavar="NAME",
        help="train on data with changed edge types: a name of experiments.changed_types.CHANGES",
    )
    train.add_argument(
        "--keep-every", type=_positive, metavar="N", help="also keep the weights of each Nth epoch"
    )
    train.set_defaults(function=_train)

    collect = commands.add_parser("collect", help="join the tables of finished runs")
    collect.add_argument("folders", nargs="+", type=Path, help="what train wrote")
    collect.add_argument(
        "-o", "--output", required=True, help="path prefix, for example data/results/emergence_"
    )
    collect.add_argument(
        "--states",
        nargs="+",
        help="keep only these states in the two large tables (default: all)",
    )
    collect.set_defaults(function=_collect)

    untrained = commands.add_parser("untrained", help="look at networks without training")
    _add_network(untrained)
    untrained.add_argument("--networks", type=_positive, default=20)
    untrained.add_argument("--first-seed", type=int, default=1000)
    untrained.add_argument("-o", "--output", type=Path, required=True, help="a .csv.gz file")
    untrained.set_defaults(function=_untrained)

    attribute = commands.add_parser(
        "attribute", help="what massive activations of finished runs sit on, by type of edge"
    )
    attribute.add_argument("folders", nargs="+", type=Path, help="what train wrote")
    attribute.add_argument("--dataset", required=True, help="what the runs were trained on")
    attribute.add_argument("--change", metavar="NAME", help="the change they were trained with")
    attribute.add_argument(
        "--by",
        nargs="+",
        default=["type"],
        help="properties of edges, see mapkg.data.edge_labels (default: type)",
    )
    attribute.add_argument(
        "--smiles",
        type=Path,
        metavar="FILE",
        help="look at these molecules instead, one SMILES per line; gives shares only",
    )
    attribute.add_argument("--threads", type=_positive, help="CPU threads")
    attribute.add_argument(
        "-o", "--output", required=True, help="path prefix, for example data/results/bonds_gt_zinc"
    )
    attribute.set_defaults(function=_attribute)

    explain = commands.add_parser(
        "explain", help="compare ratios with other attributions, and remove massive activations"
    )
    explain.add_argument("folders", nargs="+", type=Path, help="what train wrote")
    explain.add_argument("--dataset", required=True, help="what the runs were trained on")
    explain.add_argument(
        "--graphs", type=_positive, default=100, help="test graphs to explain (default: 100)"
    )
    explain.add_argument("--threads", type=_positive, help="CPU threads")
    explain.add_argument(
        "-o", "--output", required=True, help="path prefix, for example data/results/explain_gt"
    )
    explain.set_defaults(function=_explain)

    laws = commands.add_parser("laws", help="fit laws to the ratios of collected runs")
    laws.add_argument("runs", nargs="+", help="names of collected runs, for example gt_zinc")
    laws.add_argument("--results", type=Path, required=True, help="folder of their tables")
    laws.add_argument("-o", "--output", type=Path, required=True, help="a .csv.gz file")
    laws.set_defaults(function=_laws)

    data = commands.add_parser("data", help="load a data set and say what it is")
    data.add_argument("dataset")
    data.set_defaults(function=_data)
    return parser


def _add_network(command: argparse.ArgumentParser) -> None:
    """The options of commands that build a network and look at a data set."""
    command.add_argument("--config", required=True, choices=CONFIGS, help="a configuration")
    command.add_argument("--dataset", required=True, help="a data set that mapkg.data.load knows")
    command.add_argument("--device", default="cpu", help="for example cpu or cuda (default: cpu)")
    command.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a value of the configuration; may be repeated",
    )
    command.add_argument(
        "--limit", type=_positive, help="only so many graphs of each split, to try out"
    )


def _run(parsed: argparse.Namespace) -> int:
    from mapkg import notebook

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


def _train(parsed: argparse.Namespace) -> int:
    from mapkg.experiments import emergence, observation_epochs, permute_targets

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


def _attribute(parsed: argparse.Namespace) -> int:
    import torch

    from mapkg import checkpoint
    from mapkg.data import load, read_smiles
    from mapkg.experiments.bond_types import bond_types, join, shares_elsewhere, write_bond_types

    change = _change(parsed.change)
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    splits = load(parsed.dataset)
    elsewhere = None if parsed.smiles is None else read_smiles(parsed.smiles)
    runs = []
    for folder in parsed.folders:
        print(folder, file=sys.stderr)
        if elsewhere is not None:
            named = dict(properties=parsed.by, title=parsed.smiles.name)
            runs.append(shares_elsewhere(folder, elsewhere, splits.description, **named))
            continue
        seed = checkpoint.load(folder / "best")[1]["seed"]
        changed = change(splits, seed)
        runs.append(bond_types(folder, changed, properties=parsed.by))
    for path in write_bond_types(join(runs), parsed.output):
        print(path)
    return 0


def _explain(parsed: argparse.Namespace) -> int:
    import pandas as pd
    import torch

    from mapkg.data import load
    from mapkg.experiments.explanations import explain_run
    from mapkg.experiments.results import write_table

    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    splits = load(parsed.dataset)
    runs = []
    for folder in parsed.folders:
        print(folder, file=sys.stderr)
        runs.append(explain_run(folder, splits, graphs=parsed.graphs))
    for name in runs[0]:
        path = Path(f"{parsed.output}_{name}.csv.gz")
        write_table(path, pd.concat([run[name] for run in runs], ignore_index=True))
        print(path)
    return 0


def _untrained(parsed: argparse.Namespace) -> int:
    from mapkg.experiments import untrained
    from mapkg.experiments.results import write_table

    config, splits, device = _network(parsed)
    seeds = range(parsed.first_seed, parsed.first_seed + parsed.networks)
    table = untrained(config, splits, seeds, name=parsed.config, device=device)
    write_table(parsed.output, table)
    print(parsed.output)
    return 0


def _laws(parsed: argparse.Namespace) -> int:
    from mapkg.experiments.grid import laws, read_runs
    from mapkg.experiments.results import write_table

    write_table(parsed.output, laws(read_runs(parsed.results, parsed.runs).histogram))
    print(parsed.output)
    return 0


def _network(parsed: argparse.Namespace) -> tuple[Config, Any, Any]:
    """Configuration, data and device, as the options of ``_add_network`` say."""
    import torch

    from mapkg.data import load

    config = CONFIGS[parsed.config].replace(**_overrides(parsed.set))
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
    from mapkg.experiments.changed_types import CHANGES

    if name is None:
        return lambda splits, seed: splits
    if name not in CHANGES:
        raise ValueError(f"--change {name}: expected one of {', '.join(CHANGES)}")
    return CHANGES[name]


def _collect(parsed: argparse.Namespace) -> int:
    from mapkg.experiments import collect

    for path in collect(parsed.folders, parsed.output, parsed.states):
        print(path)
    return 0


def _data(parsed: argparse.Namespace) -> int:
    from mapkg.data import NodeSplit, load

    splits = load(parsed.dataset)
    for name, value in vars(splits.description).items():
        for line in value if name == "deviations" else (value,):
            print(f"{name}: {line}")
    for name in ("train", "val", "test"):
        graphs = getattr(splits, name)
        if isinstance(graphs, NodeSplit):
            print(f"{name}: {len(graphs):,} seed nodes of one graph")
            continue
        nodes, edges = (sum(getattr(g, key) for g in graphs) for key in ("num_nodes", "num_edges"))
        print(f"{name}: {len(graphs):,} graphs, {nodes:,} nodes, {edges:,} directed edges")
    return 0


def _positive(text: str) -> int:
    if not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _device(name: str) -> Any:
    """The torch device of that name, if this machine has it."""
    import torch

    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: cannot be used here: {reason}") from None


def _overrides(assignments: Sequence[str]) -> dict[str, Any]:
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


if __name__ == "__main__":
    sys.exit(main())
