"""Tables of results: written the same for the same table, read together, shown over seeds."""

import gzip
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from studies.checkpoint import write_atomically

STATISTICS = ("median", "mean", "range")


def write(path: Path | str, table: pd.DataFrame, *, digits: int = 6) -> None:
    """Write a table as compressed CSV, whole or not at all, the same bytes for the same table.

    Args:
        path: where to.
        table: without a meaningful index.
        digits: significant digits of numbers.
    """
    text = table.to_csv(index=False, float_format=f"%.{digits}g").encode()
    write_atomically(Path(path), gzip.compress(text, mtime=0))


def write_all(
    prefix: Path | str, made: Mapping[str, pd.DataFrame], digits: Mapping[str, int]
) -> list[Path]:
    """Write tables as ``PREFIX_NAME.csv.gz``, one without a name as ``PREFIX.csv.gz``.

    Nothing is written if a file of another study, with other columns, would be replaced. Tables
    that ``digits`` does not name have six.
    """
    base = str(prefix).removesuffix(".csv.gz")
    paths = {name: Path("_".join(filter(None, (base, name))) + ".csv.gz") for name in made}
    for name, path in paths.items():
        if path.is_file():
            refuse_another_study(path, read_columns(path) == list(made[name]))
    for name, path in paths.items():
        write(path, made[name], digits=digits.get(name, 6))
    return list(paths.values())


def read_columns(path: Path) -> list[str]:
    """The columns of a table that was written."""
    return list(pd.read_csv(path, nrows=0).columns)


def refuse_another_study(path: Path, is_same: bool) -> None:
    """Raise unless a table that is there is of the same study."""
    if not is_same:
        raise ValueError(
            f"{path} holds the table of another study; name another prefix, or remove the file"
        )


def read(
    folder: Path | str,
    kind: str,
    runs: Iterable[str] | Mapping[str, str],
    table: str = "",
    *,
    text: bool = False,
) -> pd.DataFrame:
    """One table of several runs or studies, joined.

    Args:
        folder: where ``KIND_RUN_TABLE.csv.gz`` are, or ``KIND_RUN.csv.gz`` without a table.
        kind: what wrote them, for example ``"emergence"``; ``""`` if files begin with the run.
        runs: their names; a mapping also gives the title that stands in the column ``run``.
        table: for example ``"summary"``.
        text: whether the text "none" is a value and not missing.

    Returns:
        The rows in the order of ``runs``; ``run`` is the title, or the name.

    Raises:
        FileNotFoundError: if a table is missing; names it and what writes it.
    """
    titles = runs if isinstance(runs, Mapping) else {name: name for name in runs}
    parts = []
    for name, title in titles.items():
        path = Path(folder) / ("_".join(filter(None, (kind, name, table))) + ".csv.gz")
        if not path.is_file():
            raise FileNotFoundError(
                f"no table at {path}; workflow/Snakefile writes it: snakemake {name}"
            )
        parts.append(pd.read_csv(path, keep_default_na=not text).assign(run=title))
    return pd.concat(parts, ignore_index=True)


def over_seeds(
    table: pd.DataFrame,
    value: str,
    *,
    rows: Sequence[str],
    columns: Sequence[str] = (),
    statistic: str = "median",
    form: str = ".3g",
) -> pd.DataFrame:
    """A value over seeds as text, a line for each group in the order of the table.

    Args:
        table: a row per group and seed.
        value: the column that is shown.
        rows, columns: what tells groups apart, down and across.
        statistic: ``"median"``, as "median [least, greatest]"; ``"mean"``, as "mean ± standard
            deviation"; ``"range"``, as "least to greatest".
        form: format of a number, ``",.0f"`` for example.

    Raises:
        ValueError: if the statistic is unknown.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"statistic: expected one of {STATISTICS}, got {statistic!r}")
    groups = table.groupby([*rows, *columns], sort=False)[value]
    shown = groups.agg(partial(_shown, statistic=statistic, form=form))
    if not columns:
        return shown.to_frame(value)
    order = {name: table[name].unique() for name in (*rows, *columns)}
    wide = shown.unstack(list(columns))
    for axis, names in ((0, rows), (1, columns)):
        for level, name in reversed(list(enumerate(names))):
            places = {each: place for place, each in enumerate(order[name])}
            look = dict(level=level, key=lambda v, p=places: v.map(p), sort_remaining=False)
            wide = wide.sort_index(axis=axis, kind="stable", **look)
    return wide


def _shown(values: pd.Series, statistic: str, form: str) -> str:
    values = values.dropna()
    if values.empty:
        return "-"
    least, greatest = f"{values.min():{form}}", f"{values.max():{form}}"
    if statistic == "mean":
        return f"{values.mean():{form}} ± {values.std():{form}}"
    if statistic == "range":
        return least if least == greatest else f"{least} to {greatest}"
    return f"{values.median():{form}} [{least}, {greatest}]"
