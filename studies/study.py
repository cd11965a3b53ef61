"""Studies of many short trainings: a row and a curve for each, kept as they come."""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from tqdm import tqdm

from studies import tables
from studies.provenance import commit, versions

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
    """
    paths = {n: Path(f"{prefix}_{n}.csv.gz") for n in ("runs", "curves") if prefix is not None}
    with _alone(prefix):
        study = _read(paths, {name for about, _ in trainings for name in about})
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
                tables.write(path, getattr(study, name), digits=4 if name == "curves" else 6)
    return study


@contextmanager
def _alone(prefix: Path | str | None) -> Iterator[None]:
    """Keep other processes from writing tables of that prefix, each over what the other wrote."""
    if prefix is None:
        yield
        return
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{prefix}.lock", timeout=0) as lock:
            try:
                yield
            finally:
                Path(lock.lock_file).unlink()
    except Timeout:
        raise ValueError(
            f"another study is writing to {prefix} now; wait for it, or name another prefix"
        ) from None


def _read(paths: Mapping[str, Path], settings: Collection[str]) -> Study:
    """What was done before of a study with these settings."""
    there = [path for path in paths.values() if path.is_file()]
    if not there:
        return Study()
    if len(there) == 1:
        raise ValueError(
            f"expected both tables or none, found {there[0]} alone: restore the other, or remove "
            "it to train again"
        )
    done = Study(**{name: pd.read_csv(path) for name, path in paths.items()})
    tables.refuse_another_study(paths["runs"], {*settings} <= {*done.runs})
    return done


def _is_same(about: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    return all(_text(row.get(name)) == _text(value) for name, value in about.items())


def _text(value: Any) -> str:
    """A setting, alike before and after it is written to a table."""
    return "none" if pd.isna(value) else f"{value}".removesuffix(".0")
