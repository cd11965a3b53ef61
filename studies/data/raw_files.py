"""Raw files of published data sets: found under a root, fetched, checked and read."""

import gzip
import hashlib
import sys
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from http.client import HTTPException
from io import BytesIO
from pathlib import Path

import pandas as pd
from torch_geometric.data import download_url

_DAMAGED_GZIP = (gzip.BadGzipFile, zlib.error, EOFError)


def root_with(roots: Iterable[Path], names: Sequence[str]) -> Path | None:
    """The first root that has all files of those names, or None.

    Args:
        roots: folders, the preferred one first.
        names: paths relative to a root.
    """
    for root in roots:
        if all((root / name).is_file() for name in names):
            return root
    return None


def decompressed(content: bytes, source: str) -> bytes:
    """What is in a gzip file.

    Raises:
        ValueError: if it is damaged; the message names ``source``.
    """
    try:
        return gzip.decompress(content)
    except _DAMAGED_GZIP as error:
        raise ValueError(f"{source}: damaged gzip file, restore it: {error}") from error


def check(content: bytes, digest: str, source: str, own: str) -> None:
    """Refuse a content that is not the published one.

    Args:
        content: what was read or fetched.
        digest: its expected SHA-256, as hexadecimal digits.
        source: where it comes from, for the error.
        own: the function that reads data of one's own, for the error.

    Raises:
        ValueError: if the checksum is another one.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise ValueError(
            f"{source}: expected sha256 {digest}, found {found}. The file is damaged or another "
            f"one: restore it, or read data of your own with {own}"
        )


def fetch(url: str) -> bytes | None:
    """What a URL holds, or None (and a line on stderr) if it cannot be had.

    PyG's download verifies no certificate: check the content before it is used or kept.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            return Path(download_url(url, folder, log=False)).read_bytes()
        except (OSError, HTTPException) as error:
            print(f"could not fetch {url}: {error}", file=sys.stderr)
            return None


def read_rows(file: Path | BytesIO, source: str, columns: Sequence[str]) -> pd.DataFrame:
    """The rows of a CSV file, every value as the text that is there.

    Args:
        file: a path (compressed or not) or an open content.
        source: what to call it in errors, for example its path.
        columns: columns that it must have.

    Returns:
        All columns, blank lines left out. The index is the line number in the file (the header
        is line 1).

    Raises:
        ValueError: if it is no CSV table, a column is missing, or there are no rows.
    """
    try:
        # Blank lines are dropped below, so that the others keep their line numbers.
        rows = pd.read_csv(file, dtype=str, keep_default_na=False, skip_blank_lines=False)
    except pd.errors.EmptyDataError:
        rows = pd.DataFrame(columns=list(columns))
    except (UnicodeDecodeError, pd.errors.ParserError, *_DAMAGED_GZIP) as error:
        raise ValueError(f"{source}: expected a CSV table, could not read it: {error}") from error
    missing = [name for name in columns if name not in rows.columns]
    if missing:
        raise ValueError(
            f"{source}: missing column {', '.join(missing)}; expected {', '.join(columns)}, "
            f"found {', '.join(map(str, rows.columns))}"
        )
    rows.index = pd.RangeIndex(2, len(rows) + 2, name="line")
    rows = rows[(rows != "").any(axis="columns")]
    if rows.empty:
        raise ValueError(f"{source}: the table has no rows; expected at least one molecule")
    return rows
