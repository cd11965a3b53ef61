"""Tables of results: written the same for the same table, read together, shown over seeds."""

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler
from tqdm import tqdm

from studies.files import alone, commit, versions, write_atomically

Result = tuple[Mapping[str, Any], pd.DataFrame]
"""What a training of a study gives, values of its row and its curve."""


def write(path: Path | str, table: pd.DataFrame, *, digits: int = 6) -> None:
    """Write a table as CSV, compressed, whole or not at all, without its index."""
    text = table.to_csv(index=False, float_format=f"%.{digits}g").encode()
    write_atomically(Path(path), gzip.compress(text, mtime=0))


def write_all(
    prefix: Path | str, made: Mapping[str, pd.DataFrame], digits: Mapping[str, int]
) -> list[Path]:
    """Write ``PREFIX_NAME.csv.gz``, all or, if a table of another study is there, none."""
    base = str(prefix).removesuffix(".csv.gz")
    paths = {name: Path("_".join(filter(None, (base, name))) + ".csv.gz") for name in made}
    for name, path in paths.items():
        if path.is_file():
            _refuse_another_study(path, list(read_one(path, "", nrows=0)) == list(made[name]))
    for name, path in paths.items():
        write(path, made[name], digits=digits.get(name, 6))
    return list(paths.values())


def read(
    folder: Path | str, kind: str, runs: Iterable[str] | Mapping[str, str], table: str = ""
) -> pd.DataFrame:
    """``KIND_RUN_TABLE.csv.gz`` of several runs, joined, with its name or title as ``run``."""
    titles = runs if isinstance(runs, Mapping) else {name: name for name in runs}
    parts = []
    for name, title in titles.items():
        path = Path(folder) / ("_".join(filter(None, (kind, name, table))) + ".csv.gz")
        parts.append(read_one(path, f"make paper WHAT={name}").assign(run=title))
    return pd.concat(parts, ignore_index=True)


def read_one(path: Path, command: str, **settings: Any) -> pd.DataFrame:
    """A table, or an error that names the command that writes it."""
    if not path.is_file():
        raise FileNotFoundError(f"no table at {path}; {command} writes it")
    try:
        return pd.read_csv(path, **settings)
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged, or no compressed table: {error}") from error


def over_seeds(
    table: pd.DataFrame,
    value: str,
    *,
    rows: Sequence[str],
    columns: Sequence[str] = (),
    statistic: str = "median",
    form: str = ".3g",
) -> pd.DataFrame:
    """A column over seeds as text, "median [least, greatest]" or a "range", in their order."""

    def shown(values: pd.Series) -> str:
        if (values := values.dropna()).empty:
            return "-"
        if statistic == "range":
            return span(values, form)
        return f"{values.median():{form}} [{values.min():{form}}, {values.max():{form}}]"

    texts = table.groupby([*rows, *columns], sort=False)[value].agg(shown)
    if not columns:
        return texts.to_frame(value)
    wide, names = texts.unstack([*columns]), (*rows, *columns)
    order = {name: {v: n for n, v in enumerate(table[name].unique())} for name in names}
    for axis in (0, 1):
        wide = wide.sort_index(axis=axis, key=lambda level: level.map(order[level.name]))
    return wide


def span(values: pd.Series, form: str) -> str:
    """The least and the greatest value, or the only one."""
    least, greatest = f"{values.min():{form}}", f"{values.max():{form}}"
    return least if least == greatest else f"{least} to {greatest}"


_WORDS = {
    "num_layers": "layers",
    "optimiser": "optimizer",  # so in tracked tables
    "mae": "MAE",
    "max_ratio": "largest row ratio",
    "max_layer_ratio": "largest layer ratio",
    "max_abs": "largest |s|",
    "spread_mean": "mean spread",
}


def _in_words(name: Any) -> Any:
    return _WORDS.get(name, name.replace("_", " ")) if isinstance(name, str) else name


def _on_a_line(value: Any) -> Any:
    is_short = isinstance(value, str) and len(value) <= 20 and value[:1] in {*"-0123456789"}
    if not is_short:
        return value
    return re.sub("([-–])", "\\1\N{WORD JOINER}", value.replace(" ", "\N{NO-BREAK SPACE}"))


def styled(table: pd.DataFrame, form: Any = None) -> Styler:
    """A table as pages show it; ``form`` is a number's format, or a format for each column.

    Headers are in words, whatever columns are called; "1.2 [0.3, 4.5]" stays on a line.
    """
    table = (
        table.map(_on_a_line)
        .rename(columns=_in_words)
        .rename_axis(
            index=[*map(_in_words, table.index.names)],
            columns=[*map(_in_words, table.columns.names)],
        )
    )
    form = {_in_words(name): f for name, f in form.items()} if isinstance(form, dict) else form
    if table.columns.nlevels == table.index.nlevels == 1:  # the name of rows stands in the corner
        table = table.rename_axis(index=None, columns=table.index.name)
    look = table.style.format(form, precision=2, thousands=",", na_rep="–", escape="html")
    look.format({True: "yes", False: "no"}.get, subset=table.select_dtypes(bool).columns)
    # The theme leaves other tables on a light ground in the dark.
    return look.set_table_attributes('class="dataframe"')


@dataclass
class Study:
    """A row for each finished training, with settings, results and origin; and their curves."""

    runs: pd.DataFrame = field(default_factory=pd.DataFrame)
    curves: pd.DataFrame = field(default_factory=pd.DataFrame)


def run_study(
    trainings: Sequence[tuple[Mapping[str, Any], Callable[[], Result]]],
    *,
    labels: Sequence[str],
    prefix: Path | str | None = None,
    progress: bool = True,
) -> Study:
    """Do what is not done yet of trainings, pairs of settings and what does it; write after each.

    Tables are ``PREFIX_runs.csv.gz`` and, with those settings that are ``labels``, ``_curves``.
    Labels tell trainings apart: ValueError if two have the same, or one has other settings there.
    """
    keys = [_key(about, labels) for about, _ in trainings]
    if twice := [key for key, number in Counter(keys).items() if number > 1]:
        raise ValueError(f"expected different trainings, got {_said(twice[0])} twice")
    paths = {n: Path(f"{prefix}_{n}.csv.gz") for n in ("curves", "runs") if prefix is not None}
    place = (None,) if prefix is None else (Path(prefix).parent, Path(prefix).name)
    with alone(*place):
        study = _read(paths, {name for about, _ in trainings for name in about}, labels)
        done = {_key(row, labels): row for row in study.runs.to_dict("records")}
        for (about, _), key in zip(trainings, keys, strict=True):
            if other := key in done and _texts(about) - _texts(done[key]):
                has = _texts({name: done[key][name] for name, _ in other})
                raise ValueError(
                    f"{paths['runs']} has {_said(key)} with {_said(has)}, not {_said(other)}; name "
                    "another prefix, or remove the file"
                )
        origin = {"versions": versions(), "commit": commit()}
        for about, train in tqdm(trainings, "trainings", disable=not progress):
            if _key(about, labels) in done:
                continue
            values, curve = train()
            row = pd.DataFrame([{**about, **values, **origin}])
            curve = curve.assign(**{name: about[name] for name in labels})
            study.runs = pd.concat([study.runs, row], ignore_index=True)
            study.curves = pd.concat([study.curves, curve], ignore_index=True)
            for name, path in paths.items():  # curves first, see _read
                write(path, getattr(study, name), digits=4 if name == "curves" else 6)
    return study


def _read(paths: Mapping[str, Path], settings: set[str], labels: Sequence[str]) -> Study:
    """What was done before of a study with these settings, without a curve whose row is missing."""
    there = [name for name, path in paths.items() if path.is_file()]
    if there == ["runs"]:
        raise ValueError(
            f"expected {paths['curves']} beside {paths['runs']}: restore it, or remove the other "
            "to train again"
        )
    if "runs" not in there:
        return Study()
    done = Study(**{name: read_one(path, "the study") for name, path in paths.items()})
    for name, columns in {"runs": settings, "curves": {*labels}}.items():
        _refuse_another_study(paths[name], columns <= {*getattr(done, name)})
    whole = pd.MultiIndex.from_frame(done.runs[[*labels]])
    done.curves = done.curves[pd.MultiIndex.from_frame(done.curves[[*labels]]).isin(whole)]
    return done


def _refuse_another_study(path: Path, is_same: bool) -> None:
    if not is_same:
        raise ValueError(
            f"{path} holds the table of another study; name another prefix, or remove the file"
        )


def _texts(settings: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Settings, alike before and after they are written to a table."""
    texts = {name: f"{v:.6g}" if isinstance(v, float) else str(v) for name, v in settings.items()}
    return {(n, "none" if pd.isna(settings[n]) else text.lower()) for n, text in texts.items()}


def _key(settings: Mapping[str, Any], labels: Sequence[str]) -> frozenset[tuple[str, str]]:
    return frozenset(_texts({name: settings[name] for name in labels}))


def _said(settings: Iterable[tuple[str, str]]) -> str:
    return ", ".join(" ".join(each) for each in sorted(settings))
