"""What a data set is, and its raw files: found or fetched, checked, read and cached."""

import hashlib
import io
import pickle
import sys
import tempfile
import time
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from typing import Any

import pandas as pd
import platformdirs
import rdkit
import torch
import torch_geometric
from torch_geometric.data import Data
from torch_geometric.data.collate import collate
from torch_geometric.data.separate import separate
from tqdm import tqdm

from studies.files import sha256, write_atomically

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a data set holds and where it comes from."""

    name: str  # what ``load`` calls it
    title: str  # what a figure calls it
    task: str  # "graph regression", "graph classification" or "node classification"
    target: str  # what is predicted
    # Sizes of the embedding tables, one for each column of ids; None if features are not ids.
    num_node_types: int | tuple[int, ...] | None
    num_edge_types: int | tuple[int, ...] | None
    source: str
    licence: str
    edge_channels: int | None = None  # width of float edge features
    num_targets: int = 1
    edge_types: Mapping[int, str] = field(default_factory=dict)  # names of the ids in edge_type
    deviations: tuple[str, ...] = ()  # each known difference from the data set of the papers


@dataclass(frozen=True)
class Splits:
    """A data set in three splits, sequences of graphs or ``NodesOfGraph``, and its description."""

    train: Any
    val: Any
    test: Any
    description: Description


@dataclass(frozen=True)
class Source:
    """Raw files of a data set, by their paths under a data root, and who reads and fetches them."""

    files: Sequence[str]
    read: Callable[..., Splits]  # takes the path of each file
    fetch: Callable[[], Mapping[str, bytes]] | None = None  # contents by path; None if not online


SHA256 = dict(
    reversed(line.split(maxsplit=1))
    for line in Path(__file__).with_name("registry.txt").read_text().splitlines()
)
"""Checksums by path under a data root, where ``sha256sum --check registry.txt`` checks them too."""

SECONDS = 600
"""After which a download is given up."""


def user_cache() -> Path:
    """The user's cache folder; in a container without users, a temporary one, with a warning."""
    try:
        return platformdirs.user_cache_path("mapkg").expanduser()
    except RuntimeError:  # no HOME, and no entry in the password file
        folder = Path(tempfile.gettempdir()) / "mapkg"
    warnings.warn(
        f"no home folder is known, so data sets are kept at {folder}; set XDG_CACHE_HOME to keep "
        "them elsewhere",
        stacklevel=1,  # once, whoever asks
    )
    return folder


def root_with(
    roots: Sequence[Path], files: Sequence[str], fetch: Callable[[], Mapping[str, bytes]] | None
) -> Path | None:
    """The first root that has all files, else the user's cache after a download, else None.

    A file with a wrong checksum in the user's cache, which is ours, is fetched again; anywhere else
    it is an error.
    """
    cache = user_cache()
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
    """The rows of a CSV file but for blank ones, all as text, by their line numbers."""
    if not path.is_file():
        raise FileNotFoundError(f"no table at {path}: expected a CSV file")
    try:
        rows = pd.read_csv(
            path, dtype=str, header=None, keep_default_na=False, skip_blank_lines=False
        )
    except Exception as error:  # each kind of compression has errors of its own
        raise ValueError(f"{path}: expected a CSV table, could not read it: {error}") from error
    header = rows.iloc[0].tolist()
    for name in columns:
        if (times := header.count(name)) != 1:
            raise ValueError(
                f"{path}: expected each of the columns {', '.join(columns)} once, found {name} "
                f"{times} times in {', '.join(header)}"
            )
    rows = rows[1:].set_axis(header, axis="columns")
    rows.index = pd.RangeIndex(2, len(rows) + 2, name="line")
    rows = rows[(rows != "").any(axis="columns")]
    if rows.empty:
        raise ValueError(f"{path}: the table has no rows; expected at least one molecule")
    return rows


def check_values(path: Path, column: pd.Series, is_right: pd.Series, expected: str) -> None:
    """Raise ValueError with the line of the first value of a table's column that is not right."""
    if not is_right.all():
        line = is_right.idxmin()
        raise ValueError(
            f"{path}, line {line}: {column.name} must be {expected}, got {column[line]!r}"
        )


def expect_all(folder: Path | str, right: Mapping[str, bool]) -> None:
    """Raise ValueError with the first thing that raw files should have and have not."""
    for what, is_so in right.items():
        if not is_so:
            raise ValueError(f"{folder}: expected {what}; a file is cut short or of other data")


def graphs_of_rows(
    table: pd.DataFrame, path: Path | str, graph: Callable[[str, Any], Data]
) -> list[Data]:
    """The graph of ``smiles`` and ``y`` in each row; an error of ``graph`` is given its line."""
    graphs = []
    rows = zip(table.index, table["smiles"], table["y"], strict=True)
    for line, smiles, y in tqdm(rows, "reading molecules", total=len(table), delay=1):
        try:
            graphs.append(graph(smiles, y))
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
    return graphs


def cached_graphs(
    raw: Sequence[Path], code: Path | str, build: Callable[[], list[Data]]
) -> list[Data]:
    """Graphs with the same fields from the cache, or built and kept.

    The key covers the raw files, the module ``code`` that makes graphs of them, this one and the
    versions of RDKit and PyG. A damaged entry is built again.
    """
    parts = [sha256(Path(file)) for file in (*raw, code, __file__)]
    parts += [rdkit.__version__, torch_geometric.__version__]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    entry = user_cache() / "graphs" / f"{key}.pt"
    try:
        content = entry.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            fields, slices = torch.load(io.BytesIO(content[32:]), weights_only=True)
            joined, number = Data.from_dict(fields), len(next(iter(slices.values()))) - 1
            return [separate(Data, joined, i, slices, decrement=False) for i in range(number)]
    except (OSError, RuntimeError, pickle.UnpicklingError):
        pass
    graphs = build()
    joined, slices, _ = collate(Data, graphs, increment=False, add_batch=False)
    torch.save((joined.to_dict(), dict(slices)), buffer := io.BytesIO())
    try:
        write_atomically(entry, hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    except OSError as error:
        warnings.warn(f"processed graphs were not cached at {entry}: {error}", stacklevel=2)
    return graphs
