"""The command line: ``python -m studies COMMAND``, with ``--help`` for the commands.

Options are the parameters of functions, and their help is the comment beside each. Both are read
from the source, so that help and a misspelt option wait for no import.
"""

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

USAGE_ERROR = 2
"""Exit status when what was asked for cannot be done, as argparse uses it."""

COMMANDS = {
    "run": ("notebook:command", "Run a notebook with other parameters"),
    "train": ("commands:train", "Train a network and watch its activations"),
    "data": ("commands:data", "Describe a data set: origin, task, sizes"),
}
STUDIES = {
    "emergence": ("results:of_run", "Join the tables that training wrote (pages 04 to 06)"),
    "bonds": ("bond_types:bond_types", "Bonds with massive activations, by type (pages 08, 10)"),
    "shares": ("bond_types:shares_elsewhere", "The same on molecules of other data (page 08)"),
    "explain": ("explanations:explain_run", "Activation ratios beside attributions (page 09)"),
    "remedy": ("explicit_bias:compact_run", "Ratios through training and a fitted law (page 11)"),
    "idle": ("explicit_bias:idle_term_of_run", "Add a bias term without effect (page 11)"),
    "sink": ("explicit_bias:weight_on_sink_of_run", "Attention to the sink of a term (page 11)"),
    "attack": ("robustness:attack_run", "The most harmful noise on embeddings (page 12)"),
    "laws": (
        "results:laws_of_runs",
        "Fit laws to the ratios that study emergence joined (page 06)",
    ),
    "untrained": ("commands:untrained", "Untrained networks, as a null (pages 05, 06)"),
    "gradients": ("gradient_explosion:gradients", "Gradients of every layer (page 21)"),
    "depth": ("depth:depth", "Accuracy by number of layers (page 22)"),
    "missing": ("depth:missing", "Accuracy with hidden node features (page 24)"),
    "smoothing": ("deep:smoothing", "Oversmoothing, forward and backward (page 25)"),
    "mechanism": ("mechanism:mechanism", "What makes scores massive, arm by arm (page 14)"),
    "trees": ("neighbors_match:trees", "Accuracy on Tree-NeighborsMatch (page 23)"),
}
"""Where each command and study is, and what it does. The tables in data/results begin with the
name of the study that writes them."""

OF_FINISHED_RUNS = 8
"""How many studies, the first ones, look at runs of train."""

EXAMPLES = """\
for example:
  python -m studies run notebooks/04_emergence.ipynb --list
  python -m studies train --config GT-ZINC --dataset moses --epochs 2 --out runs/try-0
  python -m studies study bonds runs/try-0 --dataset moses --output my_bonds
"""
SHORT = {"output": ["-o"], "parameter": ["-p"]}
FROM_ZERO = ("seed", "seeds", "first_seed", "epochs")
"""Whole numbers that may be 0; all others count something."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else [*arguments]
    parsed = vars(parser(arguments).parse_args(arguments))
    place, study = parsed.pop("place"), parsed.pop("study", None)
    try:
        module, name = place.split(":")
        function = getattr(import_module(f"studies.{module}"), name)
        if study is not None:
            from studies.commands import make

            return make(study, function, **parsed)
        return function(**parsed)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR


def parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for these arguments; it knows the options of the command that they name."""
    whole = _Parser(prog="python -m studies", description="The studies of this book, to rerun.")
    whole.epilog = EXAMPLES
    commands = whole.add_subparsers(required=True, title="commands", metavar="COMMAND")
    for name, (place, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=f"{about}.")
        if arguments[:1] == [name]:
            command.set_defaults(place=place)
            _add_parameters(command, place, command.add_argument_group("required"))
    study = commands.add_parser("study", help="Make the tables of a study")
    study.description, study.usage = _list_of_studies(), f"{study.prog} NAME ..."
    look = dict(prog=study.prog, metavar="NAME", help=argparse.SUPPRESS)
    names = study.add_subparsers(required=True, **look)
    for name, (place, about) in STUDIES.items():
        command = names.add_parser(name, description=f"{about}.")
        if arguments[:2] == ["study", name]:
            command.set_defaults(place=place, study=name)
            _add_study(command, place)
    return whole


class _Look(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # no GT-, then ZINC


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and first of all about options that are unknown."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Look, **settings)
        self._negative_number_matcher = re.compile(r"-[\d.]|-(inf|nan)$")  # -1e-3 is one, too

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        for word in () if self._subparsers else args:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                close = get_close_matches(name, self._option_string_actions, 1)
                self.error(f"no option {name}{f'; did you mean {close[0]}?' if close else ''}")
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        self._action_groups.sort(key=lambda group: group.title == "options")  # come last
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"error: {message} (see {self.prog} --help)\n")


def _list_of_studies() -> str:
    lines = [f"  {name:<11}{about}" for name, (_, about) in STUDIES.items()]
    lines.insert(OF_FINISHED_RUNS, "\nothers:")
    about = "Make the tables of a study. With NAME --help for its options."
    return "\n".join([about, "\nstudies of finished runs, as train wrote them:", *lines])


def _add_study(command: argparse.ArgumentParser, place: str) -> None:
    """The options of ``commands.make`` that a study needs, and those of its own."""
    required = command.add_argument_group("required")
    takes = _add_parameters(command, place, required)
    if "folder" in takes:
        about = "finished runs, as train wrote them"
        command.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help=about)
    if "splits" in takes:
        about = "the one they were trained on" if "folder" in takes else "for example citation"
        required.add_argument("--dataset", required=True, metavar="NAME", help=about)
    if takes >= {"folder", "splits"}:
        about = "the change of the data that they were trained with"
        command.add_argument("--change", metavar="NAME", help=about)
        about = "only so many graphs of each split, if they were trained on so many"
        command.add_argument("--limit", type=_whole("limit"), metavar="N", help=about)
    about = "what names of tables begin with, for example data/results/my"
    required.add_argument("-o", "--output", required=True, metavar="PREFIX", help=about)
    about = "CPU threads; without it as many as torch takes"
    command.add_argument("--threads", type=_whole("threads"), metavar="N", help=about)


def _add_parameters(command: argparse.ArgumentParser, place: str, required: Any) -> set[str]:
    """Add what a function takes: by place, or as an option if it is keyword-only. Their names."""
    module, name = place.split(":")
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    by_place, options = function.args.args, function.args.kwonlyargs
    defaults = dict(zip(options, function.args.kw_defaults, strict=True))
    for parameter in (*by_place, *options):
        name, default = parameter.arg, defaults.get(parameter)
        if name in ("folder", "splits", "prefix", "progress"):  # that ``commands.make`` gives
            continue
        how = _how(name, ast.unparse(parameter.annotation))
        how["help"] = lines[parameter.lineno - 1].partition("#")[2].strip()
        if parameter in by_place:
            command.add_argument(name, **how | {"action": None, "metavar": name.upper()})
            continue
        if (shown := default and _shown(default, tree)) is not None:
            how["help"] += f" (default: {shown})"
        flags = [*SHORT.get(name, []), f"--{name.replace('_', '-')}"]
        how |= {"dest": name, "required": default is None, "default": argparse.SUPPRESS}
        (command if default else required).add_argument(*flags, **how)
    return {parameter.arg for parameter in (*by_place, *options)}


def _shown(default: ast.expr, tree: ast.Module) -> str | None:
    """A default as one would type it, if it is a literal or a constant of the module."""
    if isinstance(default, ast.Name):
        assigned = (n for n in tree.body if isinstance(n, ast.Assign))
        (default,) = (n.value for n in assigned if ast.unparse(n.targets[0]) == default.id)
    value = ast.literal_eval(default)
    values = value if isinstance(value, tuple) else (value,)
    return None if value is None or value is False else " ".join(map(str, values)) or None


def _how(name: str, annotation: str) -> dict[str, Any]:
    """What ``add_argument`` needs to know of a type."""
    kind = annotation.removesuffix(" | None")
    if kind == "bool":
        return {"action": "store_true"}
    if kind == "Sequence[tuple[str, str]]":
        return {"action": "append", "nargs": 2, "metavar": ("NAME", "VALUE")}
    if several := re.fullmatch(r"Sequence\[(\w+)\]", kind):
        return _how(name, several[1]) | {"action": "extend", "nargs": "+"}
    if name == "set":
        return {"metavar": "NAME=VALUE"}
    kinds = {"int": (_whole(name), "N"), "float": (float, "X"), "Path": (Path, "PATH")}
    return dict(zip(("type", "metavar"), kinds.get(kind, (str, "NAME")), strict=True))


def _whole(name: str) -> Any:
    least, most = int(name not in FROM_ZERO), 1024 if name == "threads" else 10**9

    def whole(text: str) -> int:
        if not text.isdigit() or len(text) > 10 or not least <= int(text) <= most:
            expected = f"expected a whole number from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
        return int(text)

    return whole


if __name__ == "__main__":
    sys.exit(main())
