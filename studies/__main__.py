"""The command line: ``python -m studies COMMAND``, with ``--help`` for the commands.

Options are the parameters of functions, and their help is the comment beside each. Both are read
from the source, so that help and a misspelt option wait for no import.
"""

import argparse
import ast
import contextlib
import re
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

USAGE_ERROR, INTERRUPTED = 2, 130
"""Exit status when what was asked for cannot be done, as argparse uses it, and after Control-C."""

MOLECULES, GRAPHS, NODES = ("molecules",), ("molecules", "graphs"), ("nodes",)
"""Kinds of data that commands take, names of ``studies.data.KINDS``."""

COMMANDS = {
    "run": ("notebook:command", "Run a notebook of the book with other parameters", ()),
    "train": ("commands:train", "Train a network and record its activations", GRAPHS),
    "data": ("commands:data", "Load a data set and describe it", ()),
}
STUDIES = {
    "emergence": ("results:of_run", "Join the tables that train wrote (04 to 06)", ()),
    "bonds": ("bond_types:bond_types", "Massive activations by bond type (08, 10)", GRAPHS),
    "shares": ("bond_types:shares_elsewhere", "The same on other molecules (08)", MOLECULES),
    "explain": ("explanations:explain_run", "Ratios beside attributions (09)", GRAPHS),
    "remedy": ("explicit_bias:compact_run", "Ratios by epoch, and a fitted law (11)", ()),
    "measures": ("untrained:measured_run", "A few numbers by every measure (05)", GRAPHS),
    "idle": ("explicit_bias:idle_term_of_run", "Add a bias term without effect (11)", GRAPHS),
    "sink": ("explicit_bias:weight_on_sink_of_run", "Attention to a term's sink (11)", GRAPHS),
    "attack": ("robustness:attack_run", "The most harmful noise on embeddings (12)", GRAPHS),
    "laws": ("results:laws", "Fit laws to the tables of emergence (06)", ()),
    "untrained": ("commands:untrained", "Ratios of untrained networks (05, 06)", GRAPHS),
    "nulls": ("commands:nulls", "All measures of untrained networks (05)", GRAPHS),
    "gradients": ("gradient_explosion:gradients", "Gradients of every layer (21)", NODES),
    "dose": ("gradient_explosion:dose", "Gradients by rates of dropout (21)", NODES),
    "amplification": ("gradient_explosion:amplification", "Constants in training (21)", NODES),
    "depth": ("depth:depth", "Accuracy by number of layers (22)", NODES),
    "missing": ("depth:missing", "Accuracy with hidden node features (24)", NODES),
    "smoothing": ("deep:smoothing", "Oversmoothing, forward and backward (25)", NODES),
    "mechanism": ("mechanism:mechanism", "What makes scores massive, arm by arm (14)", MOLECULES),
    "topology": ("topology:topology", "Ratios by curvature of the edge (16)", MOLECULES),
    "kinds": ("crossed_types:crossed", "Frequency crossed with meaning (10)", MOLECULES),
    "converged": ("commands:converged", "A network to the end of its schedule (13)", GRAPHS),
    "trees": ("neighbors_match:trees", "Accuracy on Tree-NeighborsMatch (23)", ("trees",)),
}
"""Where each command and study is, what it does, and the kinds of data it takes. The tables in
data/results begin with the name of the study that writes them."""

OF_FINISHED_RUNS = 9
"""How many studies, the first ones, look at runs of train."""

FOR_EXAMPLE = {"molecules": "moses", "nodes": "citation", "trees": "trees-2"}
EXAMPLES = """\
examples:
  python -m studies run notebooks/04_emergence.ipynb --list
  python -m studies run notebooks/04_emergence.ipynb -p epochs 10 -o longer.ipynb
  python -m studies train --config GT-ZINC --dataset moses --epochs 2 --out runs/try-0
  python -m studies study bonds runs/try-0 --dataset moses --output my_bonds
"""
SHORT = {"output": ["-o"], "parameter": ["-p"]}
RANGES = {
    **dict.fromkeys(("seed", "seeds", "first_seed"), (0, 10**9)),
    **dict.fromkeys(("layers", "depths", "heads"), (1, 1000)),
    **dict.fromkeys(("dropout", "attention_dropout"), (0, 1)),
    **{"epochs": (1, 10**5), "threads": (1, 1024), "networks": (1, 10**4), "lr": (0, 100)},
    "train:epochs": (0, 10**5),
    "squares": (0, 10**8),
}
"""What numbers may be, by the name of their option, also with that of its function; all others
count something, or weigh it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else [*arguments]
    parsed = vars(parser(arguments).parse_args(arguments))
    (place, _, kinds), study = parsed.pop("command"), parsed.pop("study", None)
    try:
        for name, values in parsed.items():
            if (
                name != "folders"
                and isinstance(values, list)
                and len(set(map(str, values))) < len(values)
            ):
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected different values, got {values}"
                )
        if kinds:
            import_module("studies.data").expect_kind(parsed["dataset"], kinds, "--dataset")
        module, name = place.split(":")
        function = getattr(import_module(f"studies.{module}"), name)
        if study is None:
            return function(**parsed) or 0
        import_module("studies.commands").make(study, function, **parsed)
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, FloatingPointError) as error:
        of_file = isinstance(error, OSError) and error.filename and error.strerror
        said = f"{error.filename}: {error.strerror}" if of_file else error
        print(f"error: {said}", file=sys.stderr)
        return USAGE_ERROR


def parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for these arguments; it knows the options of the command that they name."""
    whole = _Parser(
        prog="python -m studies",
        description="Run the notebooks and studies of this book, with data and settings of yours.",
        epilog=EXAMPLES,
    )
    commands = whole.add_subparsers(required=True, title="commands", metavar="COMMAND")
    for name, place in COMMANDS.items():
        command = commands.add_parser(name, help=place[1], description=f"{place[1]}.")
        if arguments[:1] == [name]:
            command.set_defaults(command=place)
            _add_parameters(command, place[0], command.add_argument_group("required"))
            command.usage = _usage(command)
    study = commands.add_parser("study", help="Make the tables of a study")
    study.description, study.usage = _list_of_studies(), f"{study.prog} NAME ..."
    look = dict(prog=study.prog, metavar="NAME", help=argparse.SUPPRESS)
    names = study.add_subparsers(required=True, **look)
    for name, place in STUDIES.items():
        about = re.sub(r"\((\d+.*)\)", lambda m: f"(page{'s' * (len(m[1]) > 2)} {m[1]})", place[1])
        command = names.add_parser(name, description=f"{about}.")
        if arguments[:2] == ["study", name]:
            command.set_defaults(command=place, study=name)
            _add_study(command, *place)
            command.usage = _usage(command)
    return whole


def _usage(command: argparse.ArgumentParser) -> str:
    """One line: what is needed, and that there are options."""
    words = [command.prog]
    for action in command._actions:
        if action.required:
            several = " ..." if action.nargs == "+" else ""
            words.append(" ".join([*action.option_strings[:1], f"{action.metavar}{several}"]))
    return " ".join([*words, "[options]"])


class _Look(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _split_lines(self, text: str, width: int) -> list[str]:
        text = text.replace("default: ", "default:\xa0")  # on one line with its value
        lines = textwrap.wrap(text, width, break_on_hyphens=False)  # no GT-, then ZINC
        return [line.replace("\xa0", " ") for line in lines]

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        is_list = action.nargs == argparse.PARSER  # of commands, below the word COMMAND
        return text.partition("\n")[2] if is_list else text


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
    lines = [f"  {name:<11}{about}" for name, (_, about, _) in STUDIES.items()]
    lines.insert(OF_FINISHED_RUNS, "\nother studies:")
    about = (
        "Make the tables of a study; NAME --help lists its options. In brackets, pages of the book."
    )
    return "\n".join([about, "\nstudies of finished runs, as train wrote them:", *lines])


def _add_study(command: argparse.ArgumentParser, place: str, _: str, kinds: Sequence[str]) -> None:
    """The options of ``commands.make`` that a study needs, and those of its own."""
    required = command.add_argument_group("required")
    takes = _add_parameters(command, place, required)
    if "folder" in takes:
        about = "finished runs, as train wrote them"
        command.add_argument("folders", nargs="+", type=_path, metavar="FOLDER", help=about)
    if "splits" in takes:
        about = f"a data set of {' or '.join(kinds)}, for example {FOR_EXAMPLE[kinds[0]]}"
        about = "the data set that they were trained on" if "folder" in takes else about
        required.add_argument("--dataset", required=True, metavar="NAME", help=about)
    if takes >= {"folder", "splits"}:
        about = "the change of the data that they were trained with"
        command.add_argument("--change", metavar="NAME", help=about)
        about = "permute the targets, if they were trained so"
        command.add_argument("--permute-targets", action="store_true", help=about)
        about = "only so many graphs of each split, if they were trained on so many"
        command.add_argument("--limit", type=_number("limit", int), metavar="N", help=about)
    about = "what names of tables begin with, for example data/results/my"
    required.add_argument("-o", "--output", required=True, metavar="PREFIX", help=about)
    about = "CPU threads; without it as many as torch takes"
    command.add_argument("--threads", type=_number("threads", int), metavar="N", help=about)


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
        of_function = f"{function.name}:{name}"
        key = of_function if of_function in RANGES else name
        how = _how(key, ast.unparse(parameter.annotation))
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
    if kind == "Sequence[Sequence[str]]":  # pairs
        return {"action": "append", "nargs": 2, "metavar": ("NAME", "VALUE")}
    if several := re.fullmatch(r"Sequence\[(\w+)\]", kind):
        return _how(name, several[1]) | {"action": "extend", "nargs": "+"}
    if name == "set":
        return {"metavar": "NAME=VALUE"}
    numbers = {"int": (_number(name, int), "N"), "float": (_number(name, float), "X")}
    kinds = numbers | {"Path": (_path, "PATH")}
    return dict(zip(("type", "metavar"), kinds.get(kind, (str, "NAME")), strict=True))


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got nothing")
    return Path(text)


def _number(name: str, kind: type) -> Any:
    low, high = RANGES.get(name, (int(kind is int), 10**6))

    def number(text: str) -> int | float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        expected = f"expected a {'whole ' * (kind is int)}number from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")

    return number


if __name__ == "__main__":
    sys.exit(main())
