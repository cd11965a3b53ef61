"""Studies of many short trainings: a row and a curve for each, kept as they come."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from studies.provenance import commit, versions
from studies.results import write_table

Result = tuple[Mapping[str, Any], pd.DataFrame]
"""What a training gives, values of its row and its curve."""


@dataclass
class Study:
    """Finished trainings.

    Attributes:
        runs: a row per training, with its settings, its results and its origin.
        curves: values through training, with some of the settings.
    """

    runs: pd.DataFrame = field(default_factory=pd.DataFrame)
    curves: pd.DataFrame = field(default_factory=pd.DataFrame)


def run_study(
    trainings: Sequence[tuple[Mapping[str, Any], Callable[[], Result]]],
    *,
    labels: Sequence[str],
    prefix: Path | str | None = None,
    progress: bool = True,
) -> Study:
    """Do what is not done yet of a list of trainings.

    Args:
        trainings: the settings that tell each from the others, and what does it.
        labels: the settings that curves carry.
        prefix: where tables are written after each training, ``PREFIX_runs.csv.gz`` and
            ``PREFIX_curves.csv.gz``; what is there already is not done again. None keeps all in
            memory.
        progress: whether to show a progress bar on stderr.

    Raises:
        ValueError: if one of both tables is there and the other is not.
    """
    study = Study()
    paths = {} if prefix is None else {n: Path(f"{prefix}_{n}.csv.gz") for n in vars(study)}
    there = [path for path in paths.values() if path.is_file()]
    if len(there) == 1:
        raise ValueError(
            f"expected both tables of {prefix} or none, found {there[0]} alone: restore the other, "
            "or remove it to train again"
        )
    if there:
        study = Study(**{name: pd.read_csv(path) for name, path in paths.items()})
    rows = study.runs.to_dict("records")
    origin = {"versions": versions(), "commit": commit()}
    for about, train in tqdm(trainings, "trainings", file=sys.stderr, disable=not progress):
        if any(_is_same(about, row) for row in rows):
            continue
        values, curve = train()
        row = {**about, **values, **origin}
        rows.append(row)
        curve = curve.assign(**{name: about[name] for name in labels})
        study.runs = pd.concat([study.runs, pd.DataFrame([row])], ignore_index=True)
        study.curves = pd.concat([study.curves, curve], ignore_index=True)
        for name, path in paths.items():
            write_table(path, getattr(study, name), digits=4 if name == "curves" else 6)
    return study


def _is_same(about: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    return all(_text(row.get(name)) == _text(value) for name, value in about.items())


def _text(value: Any) -> str:
    """A setting, alike before and after it is written to a table."""
    return "none" if pd.isna(value) else f"{value}".removesuffix(".0")
