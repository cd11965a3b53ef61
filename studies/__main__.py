"""The command line: ``python -m studies COMMAND``, with ``--help`` for the commands.

Options are the parameters of functions, and their help is the comment beside each. Both are read
from the source, so that help and a misspelt option wait for no import.
"""

import argparse
import ast
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

USAGE_ERROR = 2
"""Exit status when what was asked for cannot be done, as argparse uses it."""

COMMANDS = {
    "run": ("notebook:command", "run a notebook with other parameters"),
    "train": ("commands:train", "train one network, and record its scores as it learns"),
    "data": ("commands:data", "say what a data set is: origin, task and sizes"),
}
STUDIES = {
    "emergence": ("results:of_run", "of finished runs: join the tables that training wrote"),
    "bonds": ("bond_types:bond_types", "of finished runs: what massive activations sit on"),
    "shares": ("bond_types:shares_elsewhere", "of finished runs: the same on other molecules"),
    "explain": ("explanations:explain_run", "of finished runs: ratios as attributions of edges"),
    "remedy": ("explicit_bias:compact_run", "of finished runs: compact tables, with a fitted law"),
    "idle": ("explicit_bias:idle_term_of_run", "of finished runs: a bias term without effect"),
    "sink": ("explicit_bias:weight_on_sink_of_run", "of finished runs: attention to the sink"),
    "attack": ("robustness:attack_run", "of finished runs: noise on their embeddings"),
    "laws": ("grid:laws_of_runs", "of tables of emergence: laws fitted to their ratios"),
    "untrained": ("commands:untrained", "scores of networks that are not trained, as a null"),
    "gradients": ("gradient_explosion:gradients", "train deep networks: gradients of every layer"),
    "depth": ("depth:depth", "train deep networks: accuracy by number of layers"),
    "missing": ("depth:missing", "train deep networks: features that are hidden"),
    "smoothing": ("deep:smoothing", "train deep networks: features and errors alike"),
    "trees": ("neighbors_match:trees", "train networks on Tree-NeighborsMatch"),
}
"""Where each command and study is, and what it does. The tables in data/results begin with the
name of the study that writes them."""

EXAMPLES = """\
for example:
  python -m studies run notebooks/04_emergence.ipynb --list
  python -m studies train --config GT-ZINC --dataset moses --epochs 2 --out runs/try-0
  python -m studies study bonds runs/try-0 --dataset moses --output my_bonds
"""
SHORT = {"output": ["-o"], "parameter": ["-p"]}
METAVARS = {"int": "N", "float": "X", "str": "NAME", "Path": "PATH"}
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
        command = commands.add_parser(name, help=about, description=_sentence(about))
        if arguments[:1] == [name]:
            command.set_defaults(place=place)
            _add_parameters(command, place)
    about = "make the tables of a study"
    study = commands.add_parser("study", help=about, description=_sentence(about))
    names = study.add_subparsers(required=True, title="studies", metavar="NAME")
    for name, (place, about) in STUDIES.items():
        command = names.add_parser(name, help=about, description=_sentence(about))
        if arguments[:2] == ["study", name]:
            command.set_defaults(place=place, study=name)
            _add_study(command, place)
    return whole


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and first of all about options that are unknown."""

    def __init__(self, **settings: Any) -> None:
        look = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)
        super().__init__(allow_abbrev=False, formatter_class=look, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        for word in () if self._subparsers else args:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                close = get_close_matches(name, self._option_string_actions, 1)
                self.error(f"no option {name}{f'; did you mean {close[0]}?' if close else ''}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"error: {message} (see {self.prog} --help)\n")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _add_study(command: argparse.ArgumentParser, place: str) -> None:
    """The options of ``commands.make`` that a study needs, and those of its own."""
    takes = _add_parameters(command, place)
    if "folder" in takes:
        about = "finished runs, as train wrote them"
        command.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help=about)
    if "splits" in takes:
        about = "the one they were trained on" if "folder" in takes else "for example citation"
        command.add_argument("--dataset", required=True, metavar="NAME", help=about)
    if takes >= {"folder", "splits"}:
        about = "the change of the data that they were trained with"
        command.add_argument("--change", metavar="NAME", help=about)
    about = "what names of tables begin with, for example data/results/my"
    command.add_argument("-o", "--output", required=True, metavar="PREFIX", help=about)
    about = "CPU threads, if not as many as torch takes"
    command.add_argument("--threads", type=_whole("threads"), metavar="N", help=about)


def _add_parameters(command: argparse.ArgumentParser, place: str) -> set[str]:
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
            how.pop("action", None)
            command.add_argument(name, **how | {"metavar": name.upper()})
            continue
        if (shown := default and _shown(default, tree)) is not None:
            how["help"] += f" (default: {shown})"
        flags = [*SHORT.get(name, []), f"--{name.replace('_', '-')}"]
        how |= {"dest": name, "required": default is None, "default": argparse.SUPPRESS}
        command.add_argument(*flags, **how)
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
    convert = {"int": _whole(name), "float": float, "Path": Path, "str": str}[kind]
    return {"type": convert, "metavar": "NAME=VALUE" if name == "set" else METAVARS[kind]}


def _whole(name: str) -> Any:
    def whole(text: str) -> int:
        if not text.isdigit() or (int(text) == 0 and name not in FROM_ZERO):
            least = "" if name in FROM_ZERO else " above 0"
            raise argparse.ArgumentTypeError(f"expected a whole number{least}, got {text!r}")
        return int(text)

    return whole


if __name__ == "__main__":
    sys.exit(main())
