"""Raw files of published data sets: found under a root or fetched, checked, and read."""

import hashlib
import sys
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from io import BytesIO
from pathlib import Path

import pandas as pd
import platformdirs

from studies.checkpoint import write_atomically

SHA256 = dict(
    reversed(line.split(maxsplit=1))
    for line in Path(__file__).with_name("registry.txt").read_text().splitlines()
)
"""Checksum of each published file, by its path under a data root.

``sha256sum --check registry.txt`` in a data root checks them as well.

:meta hide-value:
"""

Download = Callable[[], Mapping[str, bytes]]
"""Gives the contents of files by their paths under a root."""


def root_with(roots: Sequence[Path], files: Sequence[str], fetch: Download | None) -> Path | None:
    """The first root that has all files, else the user's cache after a download.

    Args:
        roots: folders, the preferred one first.
        files: paths relative to a root. Those in ``SHA256`` are checked before they are kept.
        fetch: downloads them; None if that is not wanted.

    Returns:
        The root, or None if no root has the files and they cannot be fetched.

    Raises:
        ValueError: if a checksum is wrong. Nothing that was fetched is kept then.
    """
    for root in roots:
        if all((root / file).is_file() for file in files):
            for file in files:
                _check((root / file).read_bytes(), file, str(root / file))
            return root
    if fetch is None:
        return None
    try:
        contents = fetch()
    except (OSError, HTTPException, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        print(f"could not fetch {files[0]}: {error}", file=sys.stderr)
        return None
    for file in files:
        _check(contents[file], file, f"{file}, as fetched")
    cache = platformdirs.user_cache_path("mapkg")
    for file in files:
        write_atomically(cache / file, contents[file])
    return cache


def _check(content: bytes, file: str, source: str) -> None:
    digest, found = SHA256.get(file), hashlib.sha256(content).hexdigest()
    if digest not in (None, found):
        raise ValueError(
            f"{source}: expected sha256 {digest}, found {found}. The file is damaged or another "
            "one: restore it, or read data of your own with the functions of studies.data"
        )


def read_url(url: str) -> bytes:
    """What a URL holds; an error if it cannot be had, or ends before its stated length."""
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read()


def read_rows(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The rows of a CSV file, every value as the text that is there.

    Args:
        path: a file, compressed or not.
        columns: columns that it must have.

    Returns:
        All columns, blank lines left out. The index is the line number in the file (the header
        is line 1).

    Raises:
        ValueError: if it is no CSV table, a column is missing, or there are no rows.
    """
    try:
        # Blank lines are dropped below, so that the others keep their line numbers.
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False)
    except pd.errors.EmptyDataError:
        rows = pd.DataFrame(columns=list(columns))
    except FileNotFoundError:
        raise
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise ValueError(f"{path}: expected a CSV table, could not read it: {error}") from error
    missing = [name for name in columns if name not in rows.columns]
    if missing:
        raise ValueError(
            f"{path}: missing column {', '.join(missing)}; expected {', '.join(columns)}, "
            f"found {', '.join(map(str, rows.columns))}"
        )
    rows.index = pd.RangeIndex(2, len(rows) + 2, name="line")
    rows = rows[(rows != "").any(axis="columns")]
    if rows.empty:
        raise ValueError(f"{path}: the table has no rows; expected at least one molecule")
    return rows


def unzipped(content: bytes, members: Mapping[str, str]) -> dict[str, bytes]:
    """Members of a zip file, from their new names to their names in the archive."""
    with zipfile.ZipFile(BytesIO(content)) as archive:
        return {new: archive.read(name) for new, name in members.items()}
