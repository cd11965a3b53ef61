"""The command line: ``python -m studies COMMAND``, with ``--help`` for the commands."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from studies import commands, study_commands
from studies.published import CONFIGS

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
    parser = argparse.ArgumentParser(prog="python -m studies", description="Paper companion tools.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    run = subparsers.add_parser("run", help="run a notebook with other parameters, strictly")
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
    run.set_defaults(function=commands.run)

    train = subparsers.add_parser(
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
        help="train on data with changed types: a name of studies.bond_changes.CHANGES",
    )
    train.add_argument(
        "--keep-every", type=_positive, metavar="N", help="also keep the weights of each Nth epoch"
    )
    train.set_defaults(function=commands.train)

    collect = subparsers.add_parser("collect", help="join the tables of finished runs")
    collect.add_argument("folders", nargs="+", type=Path, help="what train wrote")
    collect.add_argument(
        "-o", "--output", required=True, help="path prefix, for example data/results/emergence_"
    )
    collect.add_argument(
        "--states",
        nargs="+",
        help="keep only these states in the two large tables (default: all)",
    )
    collect.set_defaults(function=commands.collect)

    untrained = subparsers.add_parser("untrained", help="look at networks without training")
    _add_network(untrained)
    untrained.add_argument("--networks", type=_positive, default=20)
    untrained.add_argument("--first-seed", type=int, default=1000)
    untrained.add_argument("-o", "--output", type=Path, required=True, help="a .csv.gz file")
    untrained.set_defaults(function=commands.untrained)

    attribute = subparsers.add_parser(
        "attribute", help="what massive activations of finished runs sit on, by type of edge"
    )
    _add_runs(attribute)
    attribute.add_argument("--change", metavar="NAME", help="the change they were trained with")
    attribute.add_argument(
        "--by",
        nargs="+",
        default=["type"],
        help="properties of edges, see studies.data.edge_labels (default: type)",
    )
    attribute.add_argument(
        "--smiles",
        type=Path,
        metavar="FILE",
        help="look at these molecules instead, one SMILES per line; gives shares only",
    )
    attribute.add_argument(
        "-o", "--output", required=True, help="path prefix, for example data/results/bonds_gt_zinc"
    )
    attribute.set_defaults(function=commands.attribute)

    explain = subparsers.add_parser(
        "explain", help="compare ratios with other attributions, and remove massive activations"
    )
    _add_runs(explain)
    explain.add_argument(
        "--graphs", type=_positive, default=100, help="test graphs to explain (default: 100)"
    )
    explain.add_argument(
        "-o", "--output", required=True, help="path prefix, for example data/results/explain_gt"
    )
    explain.set_defaults(function=commands.explain)

    remedy = subparsers.add_parser("remedy", help="the compact tables of finished runs")
    remedy.add_argument("folders", nargs="+", type=Path, help="what train wrote")
    remedy.add_argument(
        "-o", "--output", required=True, help="path prefix, for example data/results/remedy_gt"
    )
    remedy.set_defaults(function=commands.remedy)

    idle = subparsers.add_parser(
        "idle", help="give finished runs an Explicit Bias Term that nothing but the record feels"
    )
    _add_runs(idle)
    idle.add_argument("-o", "--output", type=Path, required=True, help="a .csv.gz file")
    idle.set_defaults(function=commands.idle)

    sink = subparsers.add_parser(
        "sink", help="see how much attention finished runs with a sink give to it"
    )
    _add_runs(sink)
    sink.add_argument("-o", "--output", type=Path, required=True, help="a .csv.gz file")
    sink.set_defaults(function=commands.sink)

    attack = subparsers.add_parser("attack", help="disturb the embeddings of finished runs")
    _add_runs(attack)
    attack.add_argument("--change", metavar="NAME", help="the change they were trained with")
    attack.add_argument(
        "--graphs", type=_positive, default=64, help="validation graphs to attack (default: 64)"
    )
    attack.add_argument(
        "--places",
        action="store_true",
        help="also noise on edges that have massive activations alone, and controls",
    )
    attack.add_argument(
        "--kinds",
        nargs="+",
        metavar="KIND",
        help="of noise, see studies.robustness.KINDS (default: own shared relative)",
    )
    attack.add_argument("-o", "--output", type=Path, required=True, help="a .csv.gz file")
    attack.set_defaults(function=commands.attack)

    gradients = subparsers.add_parser(
        "gradients", help="watch the gradients of deep networks on the nodes of one graph"
    )
    _add_study(gradients, "a citation network, for example cora")
    gradients.add_argument("--layers", type=_positive, default=25, metavar="L")
    gradients.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    gradients.add_argument("--epochs", type=_positive, default=60)
    gradients.add_argument("--hidden", type=_positive, default=16, help="channels of a head")
    gradients.add_argument("--heads", type=_positive, default=4)
    gradients.set_defaults(function=study_commands.gradients)

    depth = subparsers.add_parser(
        "depth", help="train deep networks of every depth on the nodes of one graph"
    )
    _add_study(depth, "a citation network, for example cora")
    depth.add_argument("--architecture", required=True, help="gat or gt")
    depth.add_argument(
        "--norms",
        nargs="+",
        required=True,
        metavar="NORM",
        help="of studies.deep.NORMS; NORM=SCALE sets its scale, for example lipschitz=4",
    )
    depth.add_argument("--layers", nargs="+", type=_positive, metavar="L")
    depth.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    depth.add_argument(
        "--constant-rate",
        action="store_true",
        help="leave the learning rate as it is, instead of letting it fall",
    )
    depth.add_argument("--epochs", type=_positive, default=200)
    depth.add_argument("--hidden", type=_positive, default=16, help="channels of a head")
    depth.add_argument("--heads", type=_positive, default=4)
    depth.set_defaults(function=study_commands.depth)

    missing = subparsers.add_parser(
        "missing", help="train networks on the nodes of one graph whose features are hidden"
    )
    _add_study(missing, "a citation network, for example cora")
    missing.add_argument(
        "--rates", nargs="+", type=float, default=[0.0, 1.0], help="shares of nodes, in [0, 1]"
    )
    missing.add_argument("--layers", nargs="+", type=_positive, metavar="L")
    missing.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    missing.add_argument("--epochs", type=_positive, default=200)
    missing.add_argument("--models", nargs="+", help="names in the table; default all")
    missing.add_argument(
        "--constant-rate", action="store_true", help="a learning rate that does not fall"
    )
    missing.set_defaults(function=study_commands.missing)

    smoothing = subparsers.add_parser(
        "smoothing", help="features and errors of deep networks, and how they train"
    )
    _add_study(smoothing, "a citation network for attention, for example cora")
    smoothing.add_argument(
        "--layers", nargs="+", type=_positive, default=[2, 16], help="of attention networks"
    )
    smoothing.add_argument("--epochs", type=_positive, default=200, help="of attention networks")
    smoothing.add_argument(
        "--depths",
        nargs="+",
        type=_positive,
        default=[1, 2, 4, 8, 16, 32],
        help="of vanilla networks on regular graphs",
    )
    smoothing.add_argument("--steps", type=_positive, default=1000, help="of vanilla networks")
    smoothing.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    smoothing.set_defaults(function=study_commands.smoothing)

    trees = subparsers.add_parser("trees", help="train networks on Tree-NeighborsMatch")
    _add_study(trees, "trees of a depth, for example trees-4")
    trees.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    trees.add_argument(
        "--architectures", nargs="+", help="gcn, gin, ggnn or gat; default all, with all norms"
    )
    trees.add_argument("--passes", type=_positive, default=500, help="over the training examples")
    trees.add_argument(
        "--passes-apart",
        type=_positive,
        help="of networks with PairNorm, which take longer; default as many",
    )
    trees.add_argument("--batch-size", type=_positive, default=1024)
    trees.add_argument("--lr", type=float, default=1e-3, help="learning rate at the start")
    trees.add_argument(
        "--block", type=_positive, default=10, help="passes after which progress is judged"
    )
    trees.add_argument("--sampling", default="grouped", help="grouped or shuffled")
    trees.set_defaults(function=study_commands.trees)

    laws = subparsers.add_parser("laws", help="fit laws to the ratios of collected runs")
    laws.add_argument("runs", nargs="+", help="names of collected runs, for example gt_zinc")
    laws.add_argument("--results", type=Path, required=True, help="folder of their tables")
    laws.add_argument("-o", "--output", type=Path, required=True, help="a .csv.gz file")
    laws.set_defaults(function=commands.laws)

    data = subparsers.add_parser("data", help="load a data set and say what it is")
    data.add_argument("dataset")
    data.set_defaults(function=commands.data)
    return parser


def _add_runs(command: argparse.ArgumentParser) -> None:
    """The options of commands that look at finished runs and their data."""
    command.add_argument("folders", nargs="+", type=Path, help="what train wrote")
    command.add_argument("--dataset", required=True, help="what the runs were trained on")
    command.add_argument("--threads", type=_positive, help="CPU threads")


def _add_study(command: argparse.ArgumentParser, dataset: str) -> None:
    """The options of commands that train many small networks and write several tables."""
    command.add_argument("--dataset", required=True, help=dataset)
    command.add_argument("--threads", type=_positive, help="CPU threads")
    command.add_argument(
        "-o",
        "--output",
        required=True,
        help="path prefix of the tables; trainings that depth, missing and trees find there are "
        "not done again",
    )


def _add_network(command: argparse.ArgumentParser) -> None:
    """The options of commands that build a network and look at a data set."""
    command.add_argument("--config", required=True, choices=CONFIGS, help="a configuration")
    command.add_argument("--dataset", required=True, help="a data set that studies.data.load knows")
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


def _positive(text: str) -> int:
    if not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
