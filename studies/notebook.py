"""Run a notebook with other parameters, strictly.

papermill injects a misspelt parameter without a word; here a name or a type that the notebook
does not know is an error before anything runs.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import papermill

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
    path = Path(path)
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.glob("*.ipynb")) or ["none"]
        raise FileNotFoundError(f"no notebook at {path}; notebooks there: {', '.join(siblings)}")
    try:
        cells = json.loads(path.read_text())["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a notebook: {error}") from error
    if not any("parameters" in cell["metadata"].get("tags", ()) for cell in cells):
        raise ValueError(f"{path}: no cell is tagged 'parameters', so nothing can be set")
    found = papermill.inspect_notebook(str(path))
    return {
        name: Parameter(name, entry["inferred_type_name"], entry["default"], entry["help"])
        for name, entry in found.items()
    }


def parse(path: Path | str, assignments: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Values of parameters from pairs of name and text, each checked against the notebook."""
    known = parameters(path)
    values = {}
    for name, text in assignments:
        if name not in known:
            raise ValueError(f"{path} has no parameter {name!r}; it knows:\n{describe(known)}")
        try:
            values[name] = _convert(text, known[name].type)
        except (ValueError, json.JSONDecodeError):
            raise ValueError(
                f"parameter {name!r} is of type {known[name].type}, got {text!r}; "
                f"{path} knows:\n{describe(known)}"
            ) from None
    return values


def describe(known: dict[str, Parameter]) -> str:
    """A line per parameter: name, type, default, comment."""
    return "\n".join(
        f"  {p.name}: {p.type} = {p.default}" + (f"  # {p.help}" if p.help else "")
        for p in known.values()
    )


def run(
    path: Path | str,
    output: Path | str,
    values: dict[str, Any],
    *,
    progress: bool = True,
    **engine: Any,
) -> Path:
    """Execute a notebook in its own folder; the copy is written whole or not at all.

    If a cell raises, the copy up to it stays beside ``output`` with ``.failed`` in its name.
    ``engine`` are options of nbclient, for example ``kernel_manager_class``.
    """
    path, output = Path(path).resolve(), Path(output).resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    try:
        papermill.execute_notebook(
            str(path),
            str(failed),
            parameters=values,
            kernel_name=KERNEL,
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


def _convert(text: str, kind: str) -> Any:
    if kind == "str":
        return text
    if kind == "bool":
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if kind in ("int", "float"):
        return {"int": int, "float": float}[kind](text)
    value = json.loads(text)
    if not isinstance(value, list if kind.startswith(("list", "List")) else object):
        raise ValueError(text)
    return value
