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


# Raw files

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


def root_with(roots: Sequence[Path], files: Sequence[str], fetch: Download | None) -> Path | None:
    """The first root that has all files, else the user's cache after a download, else None.

    Checksums are checked before a file is read or kept. A damaged file in the user's cache, which
    is ours, is fetched again; anywhere else it is an error.
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
    """The rows of a CSV file, every value as the text that is there; the index is the line number.

    Blank lines are left out. Raises ValueError if it cannot be read, has no row, or has not each of
    the columns once.
    """
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


def graphs_of_rows(
    table: pd.DataFrame, path: Path | str, graph: Callable[[str, Any], Data]
) -> list[Data]:
    """The graph of ``smiles`` and ``y`` in each row; an error of ``graph`` is given its line."""
    graphs = []
    rows = zip(table.index, table["smiles"], table["y"], strict=True)
    for line, smiles, y in tqdm(
        rows, "reading molecules", total=len(table), delay=1, file=sys.stderr
    ):
        try:
            graphs.append(graph(smiles, y))
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
    return graphs


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
    entry = user_cache() / "graphs" / f"{key}.pt"
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
