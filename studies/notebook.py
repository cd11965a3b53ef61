"""Run a notebook with other parameters, strictly.

papermill injects a misspelt parameter without a word; here a name or a type that the notebook
does not know is an error before anything runs.
"""

import ast
import collections.abc
import contextlib
import json
import os
import pathlib
import re
import sys
import tokenize
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import nbformat
import papermill
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

KERNEL = "python3"  # resolves to the interpreter that runs papermill


class NotebookFailed(RuntimeError):
    """A cell of the notebook raised."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a notebook: name, type, default as written, and comment."""

    name: str
    type: str
    default: str
    help: str


def command(
    notebook: Path,  # for example notebooks/04_emergence.ipynb
    *,
    parameter: Sequence[tuple[str, str]] = (),  # a parameter and its value; may be repeated
    output: Path | None = None,  # where the executed notebook goes
    list: bool = False,  # list the parameters and stop
) -> int:
    """What ``python -m studies run`` does; returns the exit status."""
    if list:
        print(describe(parameters(notebook)))
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
        for target in [node.target] if isinstance(node, ast.AnnAssign) else node.targets:
            default = ast.unparse(node.value)
            annotated = isinstance(node, ast.AnnAssign)
            kind = ast.unparse(node.annotation) if annotated else _type_of(node.value)
            about = (ast.unparse(target), kind, default, comments.get(node.end_lineno, ""))
            found[about[0]] = Parameter(*about)
    return found


def parse(path: Path | str, assignments: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Values of parameters from pairs of name and text, each checked against the notebook."""
    return _checked(path, dict(assignments), _readings)


def describe(known: dict[str, Parameter]) -> str:
    """A line per parameter: name, type, default, comment."""
    return "\n".join(
        f"  {p.name}: {p.type} = {p.default}" + (f"  # {p.help}" if p.help else "")
        for p in known.values()
    )


def injected(path: Path | str, values: Mapping[str, Any]) -> nbformat.NotebookNode:
    """The notebook with a cell of other parameters after its own, each checked against it."""
    book, cell = _read(path)
    code = [f"{name} = {value!r}" for name, value in _checked(path, values).items()]
    for module, names in (("math", "inf|nan"), ("pathlib", "PosixPath|WindowsPath")):
        if used := sorted({*re.findall(rf"\b({names})\b", "\n".join(code))}):
            code.insert(0, f"from {module} import {', '.join(used)}")
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

    If a cell raises, the copy up to it stays beside ``output`` with ``.failed`` in its name.
    ``engine`` are options of nbclient, for example ``kernel_manager_class``.
    """
    path, output = Path(path).resolve(), Path(output).resolve()
    book = injected(path, values)
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    try:
        papermill.execute_notebook(
            book,
            str(failed),
            kernel_name=KERNEL,
            language="python",
            # Not cwd=, which changes the folder of this process: others may run beside.
            resources={"metadata": {"path": str(path.parent)}},
            progress_bar=progress,
            coalesce_streams=True,  # what is printed in pieces is one output
            **engine,
        )
    except papermill.exceptions.PapermillExecutionError as error:
        raise NotebookFailed(f"{path.name} failed, see {failed}:\n{error}") from error
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            failed.unlink()
        raise
    os.replace(failed, output)
    return output


def _read(path: Path | str) -> tuple[nbformat.NotebookNode, nbformat.NotebookNode]:
    """A notebook and its cell of parameters."""
    path = Path(path)
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.glob("*.ipynb")) or ["none"]
        raise FileNotFoundError(f"no notebook at {path}; notebooks there: {', '.join(siblings)}")
    try:
        book = nbformat.read(path, 4)
        tagged = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    except Exception as error:  # whatever nbformat makes of a file that is none
        raise ValueError(f"{path}: not a notebook: {str(error).splitlines()[0]}") from error
    if not tagged:
        raise ValueError(f"{path}: no cell is tagged 'parameters', so nothing can be set")
    return book, tagged[0]


def _type_of(default: ast.expr) -> str:
    """The type of a parameter that has none, from its default."""
    try:
        kind = type(ast.literal_eval(default))
    except ValueError:
        return "Any"
    if kind in (int, float):
        return "int | float"
    return kind.__name__ if kind in (bool, str, list, tuple, dict) else "Any"


def _checked(path: Path | str, values: Mapping[str, Any], readings: Any = None) -> dict[str, Any]:
    """The values, each of the type that the notebook declares."""
    known, fitting = parameters(path), {}
    for name, given in values.items():
        if name not in known:
            raise ValueError(f"{path} has no parameter {name!r}; it knows:\n{describe(known)}")
        adapter = _adapter(known[name].type)
        for reading in readings(given, known[name].type) if readings else [given]:
            with contextlib.suppress(ValidationError, TypeError):
                # By way of JSON: it has no types of numpy, and its lists may be tuples.
                fitting[name] = adapter.validate_json(json.dumps(reading, default=_plain))
                break
        else:
            raise ValueError(
                f"parameter {name!r} is of type {known[name].type}, got {given!r}; "
                f"{path} knows:\n{describe(known)}"
            )
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
    names = {**vars(typing), **vars(collections.abc), **vars(pathlib)}
    try:
        known = eval(kind, {"typing": typing, "pathlib": pathlib, **names})
        return TypeAdapter(known, config={"strict": True})
    except (NameError, AttributeError, TypeError, PydanticSchemaGenerationError):
        return TypeAdapter(Any)


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch, and paths, as JSON has them."""
    return value.tolist() if hasattr(value, "tolist") else os.fspath(value)
