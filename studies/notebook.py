"""Run a notebook with other parameters, strictly.

papermill injects a misspelt parameter without a word; here a name, a type or a value that the
notebook does not allow is an error before anything runs. The comment of a parameter may begin with
what its values are, of a list its entries: ``# 1 to 64: heads``, ``# one of gat, gt: layers``,
``# a data set of molecules: what is drawn``.
"""

import ast
import collections.abc
import contextlib
import json
import os
import pathlib
import re
import shutil
import sys
import tokenize
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import nbformat
import papermill
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from studies.files import alone, check_output


class NotebookFailed(RuntimeError):
    """A cell of the notebook raised, its kernel died, or it was interrupted."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a notebook: name, type, default as written, and comment."""

    name: str
    type: str
    default: str
    help: str

    def __str__(self) -> str:
        return f"{self.name}: {self.type} = {self.default}" + (self.help and f"  # {self.help}")

    def check(self, value: Any) -> None:
        """Raise unless a value of the right type is one that the comment allows."""
        entries = value if isinstance(value, list | tuple) else [value]
        expected = self.help.partition(":")[0]
        if isinstance(value, list) and any(v in value[:i] for i, v in enumerate(value)):
            raise ValueError(f"expected different values, got {value!r}, as parameter {self}")
        if kind := re.match(r"a data set of (\w+): ", self.help):
            from studies.data import expect_kind  # which takes seconds

            return expect_kind(value, [kind[1]], f"parameter {self.name}")
        if span := re.match(r"(\S+) to ([^\s:]+): ", self.help):
            low, high = float(span[1]), float(span[2])
            allowed = [
                e is None or (isinstance(e, int | float) and low <= e <= high) for e in entries
            ]
        elif names := re.match(r"one of ([^:]+): ", self.help):
            allowed = [str(each).removesuffix(".0") in names[1].split(", ") for each in entries]
        elif place := re.match(r"names of (\S+)\.(\w+): ", self.help):
            known = getattr(import_module(place[1]), place[2])
            allowed = [isinstance(each, str) and each in known for each in entries]
            expected = f"one of {', '.join(known)}"
        else:
            return None
        if not (allowed and all(allowed)):
            raise ValueError(f"expected {expected}, got {value!r}, as parameter {self}")


def command(
    notebook: Path,  # for example notebooks/04_emergence.ipynb
    *,
    parameter: Sequence[Sequence[str]] = (),  # set a parameter to a value; may be repeated
    output: Path | None = None,  # where the executed notebook goes
    list: bool = False,  # list the parameters, with their defaults, and stop
) -> int:
    """Run a notebook from the command line; returns the exit status."""
    if list:
        print(*(f"  {each}" for each in parameters(notebook).values()), sep="\n")
        return 0
    values = parse(notebook, parameter)
    if output is None:
        raise ValueError("nowhere to write to; name the executed notebook with -o OUT.ipynb")
    try:
        print(run(notebook, output, values))
    except NotebookFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parameters(path: Path | str) -> dict[str, Parameter]:
    """What the cell tagged ``parameters`` of a notebook declares."""
    _, cell = _read(path)
    source = re.sub(r"^[%!].*", "", cell.source, flags=re.MULTILINE)  # what only IPython knows
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"{path}: the cell tagged 'parameters': {error}") from None
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    comments = {t.start[0]: t.string[1:].strip() for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for node in body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        annotated = isinstance(node, ast.AnnAssign)
        name = ast.unparse(node.target if annotated else node.targets[0])
        kind = ast.unparse(node.annotation) if annotated else _type_of(node.value)
        help = comments.get(node.end_lineno, "")
        found[name] = Parameter(name, kind, ast.unparse(node.value), help)
    return found


def parse(path: Path | str, assignments: Iterable[Sequence[str]]) -> dict[str, Any]:
    """Values of parameters from pairs of name and text, each checked against the notebook."""
    pairs = [tuple(each) for each in assignments]
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError(f"expected each parameter once, got {' '.join(name for name, _ in pairs)}")
    return _checked(path, values, _readings)


def injected(path: Path | str, values: Mapping[str, Any]) -> nbformat.NotebookNode:
    """The notebook with a cell of other parameters after its own, each checked against it."""
    book, cell = _read(path)
    code = [f"{name} = {value!r}" for name, value in _checked(path, values).items()]
    if used := sorted({*re.findall(r"\b(inf|nan|PosixPath|WindowsPath)\b", "\n".join(code))}):
        code[:0] = [
            f"from {'math' if name in 'inf nan' else 'pathlib'} import {name}" for name in used
        ]
    if values:
        new = nbformat.v4.new_code_cell("\n".join(code))
        new.metadata["tags"] = ["injected-parameters"]
        book.cells.insert(book.cells.index(cell) + 1, new)
    return book


def run(
    path: Path | str,
    output: Path | str,
    values: Mapping[str, Any],
    *,
    progress: bool = True,
    **engine: Any,
) -> Path:
    """Execute a notebook in its own folder; the copy is written whole or not at all.

    If it fails, the copy up to there stays, with ``.failed`` in its name. ``engine`` are options of
    nbclient.
    """
    path, output = Path(path).resolve(), Path(output).resolve()
    book = injected(path, values)
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    for written in (output, failed):
        check_output(written)
        if written.exists() and written.samefile(path):
            raise ValueError(f"{written} is the notebook that is run; name another output")
    with alone(output.parent, output.name):
        failed.unlink(missing_ok=True)  # of a run before
        try:
            papermill.execute_notebook(
                book,
                re.sub(r"([{}])", r"\1\1", str(failed)),  # papermill formats names
                kernel_name="python3",  # the interpreter that runs papermill
                language="python",
                # Not cwd=, which changes the folder of this process: others may run beside.
                resources={"metadata": {"path": str(path.parent)}},
                progress_bar=progress,
                coalesce_streams=True,  # what is printed in pieces is one output
                extra_arguments=["--IPKernelApp.log_level=50"],  # what matters is in the copy
                **engine,
            )
            reason = None
        except papermill.exceptions.PapermillExecutionError as error:
            reason = f"{error.ename}: {error.evalue}"
        except (KeyboardInterrupt, RuntimeError) as error:  # a kernel that died
            if not failed.exists():
                raise
            reason = str(error) or "interrupted"
        _refuse_a_part(path, failed, reason)
        if output.exists():
            shutil.copymode(output, failed)
        os.replace(failed, output)
    return output


def _refuse_a_part(path: Path, executed: Path, reason: str | None) -> None:
    """Raise, naming the cell, if there is a reason or a cell has ended the run (sys.exit)."""
    cells = [cell for cell in nbformat.read(executed, 4).cells if cell.cell_type == "code"]
    if reason is None and not any(o.output_type == "error" for c in cells for o in c.outputs):
        return
    number = max(1, sum(bool(cell.metadata.papermill.get("start_time")) for cell in cells))
    line = cells[number - 1].source.strip().partition("\n")[0]
    raise NotebookFailed(
        f"{path.name}: code cell {number}, which begins {line!r}, failed: "
        f"{(reason or 'SystemExit').splitlines()[0]}; all up to there is in {executed}"
    )


def _read(path: Path | str) -> tuple[nbformat.NotebookNode, nbformat.NotebookNode]:
    """A notebook and its cell of parameters."""
    path = Path(path)
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.glob("*.ipynb")) or ["none"]
        raise FileNotFoundError(f"no notebook at {path}; notebooks there: {', '.join(siblings)}")
    try:
        with warnings.catch_warnings(action="ignore"):  # of ids that are missing, and then given
            book = nbformat.read(path, 4)
        nbformat.validate(book)
    except OSError:
        raise
    except Exception as error:  # whatever nbformat makes of a file that is none
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: not a notebook of format 4: {reason}") from error
    tagged = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    if not tagged:
        raise ValueError(f"{path}: no cell is tagged 'parameters', so nothing can be set")
    return book, tagged[0]


def _type_of(default: ast.expr) -> str:
    """The type of a parameter that has none, from its default."""
    try:
        kind = type(ast.literal_eval(default)).__name__
    except ValueError:
        return "Any"
    return "int | float" if kind in ("int", "float") else kind


def _checked(path: Path | str, values: Mapping[str, Any], readings: Any = None) -> dict[str, Any]:
    """The values, each of the type that the notebook declares, and one that it allows."""
    known, fitting = parameters(path), {}
    for name, given in values.items():
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}? It has" if close else "it has"
            raise ValueError(f"{path} has no parameter {name!r}; {hint} {', '.join(known)}")
        adapter = _adapter(known[name].type)
        for reading in readings(given, known[name].type) if readings else [given]:
            with contextlib.suppress(ValidationError, TypeError):
                # By way of JSON: it has no types of numpy, and its lists may be tuples.
                plain = lambda v: v.tolist() if hasattr(v, "tolist") else os.fspath(v)  # noqa: E731
                fitting[name] = adapter.validate_json(json.dumps(reading, default=plain))
                break
        else:
            kind = known[name].type
            raise ValueError(f"expected type {kind}, got {given!r}, as parameter {known[name]}")
        known[name].check(fitting[name])
    return fitting


def _readings(text: str, kind: str) -> Iterator[Any]:
    """What a text may stand for: literals of JSON and Python but for strings, then itself."""
    for read in (json.loads, ast.literal_eval, float) if kind != "str" else ():
        with contextlib.suppress(ValueError, SyntaxError):
            if not isinstance(value := read(text), str):
                yield value
    yield text


def _adapter(kind: str) -> TypeAdapter:
    """What checks values of an annotation; those of a class only the notebook knows are any."""
    try:
        names = dict(typing=typing, pathlib=pathlib, **vars(pathlib))
        known = eval(kind, vars(typing) | vars(collections.abc) | names)
        adapter = TypeAdapter(known, config={"strict": True})
        adapter.rebuild()  # names in quotes are looked up
        return adapter
    except (NameError, AttributeError, TypeError, PydanticSchemaGenerationError):
        return TypeAdapter(Any)
