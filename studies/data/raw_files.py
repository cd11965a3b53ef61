"""Raw files of published data sets: found under a root or fetched, checked, read and cached."""

import hashlib
import io
import pickle
import sys
import time
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException, IncompleteRead
from pathlib import Path

import pandas as pd
import platformdirs
import rdkit
import torch
import torch_geometric
from torch_geometric.data import Data

from studies.files import sha256, write_atomically

SHA256 = dict(
    reversed(line.split(maxsplit=1))
    for line in Path(__file__).with_name("registry.txt").read_text().splitlines()
)
"""Checksum of each published file, by its path under a data root.

``sha256sum --check registry.txt`` in a data root checks them as well.
"""

SECONDS = 600
"""After which a download is given up."""

Download = Callable[[], Mapping[str, bytes]]
"""Gives the contents of files by their paths under a root; ValueError if they are wrong."""


def root_with(roots: Sequence[Path], files: Sequence[str], fetch: Download | None) -> Path | None:
    """The first root that has all files, else the user's cache after a download, else None.

    Checksums are checked before a file is read or kept. A damaged file in the user's cache, which
    is ours, is fetched again; anywhere else it is an error.
    """
    cache = platformdirs.user_cache_path("mapkg")
    for root in roots:
        if all((root / file).is_file() for file in files):
            try:
                for file in files:
                    _check((root / file).read_bytes(), file, str(root / file))
            except ValueError:
                if root != cache or fetch is None:
                    raise
            else:
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
    """What a URL holds; an error if it cannot be had, ends too early or takes too long."""
    end, content = time.monotonic() + SECONDS, bytearray()
    with urllib.request.urlopen(url, timeout=60) as response:
        stated = int(response.headers.get("Content-Length") or 0)
        read = getattr(response, "read1", response.read)  # what there is, without waiting for more
        while part := read(1 << 16):
            content += part
            if time.monotonic() > end:
                raise TimeoutError(f"{url}: not complete after {SECONDS} seconds")
    if len(content) < stated:
        raise IncompleteRead(bytes(content), stated - len(content))
    return bytes(content)


def unzipped(content: bytes, members: Mapping[str, str]) -> dict[str, bytes]:
    """Members of a zip file, from their new names to their names in the archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return {new: archive.read(name) for new, name in members.items()}
    except (RuntimeError, ValueError) as error:  # one bit may claim a password or a wrong place
        raise zipfile.BadZipFile(f"damaged: {error}") from error


def read_rows(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The rows of a CSV file, every value as the text that is there; the index is the line number.

    Blank lines are left out. Raises ValueError if it is no table, or has no row or not the columns.
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


def cached_graphs(
    raw: Sequence[Path], code: Path | str, build: Callable[[], list[Data]]
) -> list[Data]:
    """Graphs from the cache, or built and kept.

    The key covers the raw files, the module ``code`` that makes graphs of them, this one and the
    versions of RDKit and PyG. A damaged entry is built again. All graphs have the same fields,
    which are tensors and texts.
    """
    parts = [sha256(Path(file)) for file in (*raw, code, __file__)]
    parts += [rdkit.__version__, torch_geometric.__version__]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    entry = platformdirs.user_cache_path("mapkg") / "graphs" / f"{key}.pt"
    graphs = _read(entry)
    if graphs is None:
        graphs = build()
        try:
            _write(entry, graphs)
        except OSError as error:
            warnings.warn(f"processed graphs were not cached at {entry}: {error}", stacklevel=2)
    return graphs


def _write(entry: Path, graphs: list[Data]) -> None:
    """Write every field of all graphs together, a hundred times faster than one by one."""
    fields = {}
    for name in graphs[0].keys():  # noqa: SIM118, not a dict
        values = [graph[name] for graph in graphs]
        if not isinstance(values[0], str):
            sizes = torch.tensor([value.size(_dim(name)) for value in values])
            values = (torch.cat(values, _dim(name)), sizes)
        fields[name] = values
    torch.save(fields, buffer := io.BytesIO())
    write_atomically(entry, hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())


def _read(entry: Path) -> list[Data] | None:
    """The cached graphs, or None if there are none or the entry is damaged."""
    try:
        raw = entry.read_bytes()
        digest, content = raw[:32], raw[32:]
        if hashlib.sha256(content).digest() != digest:
            return None
        fields = torch.load(io.BytesIO(content), weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError):
        return None
    for name, value in fields.items():
        if isinstance(value, tuple):
            fields[name] = value[0].split(value[1].tolist(), _dim(name))
    graphs = [Data() for _ in next(iter(fields.values()))]
    for graph, row in zip(graphs, zip(*fields.values(), strict=True), strict=True):
        # As Data(**values), but without a property for each of them.
        graph.stores[0].update(zip(fields, row, strict=True))
    return graphs


def _dim(name: str) -> int:
    """The dimension along which a field of several graphs is joined, as PyG joins it."""
    return -1 if name == "edge_index" else 0
