"""A cache of processed graphs: keyed by content and code, checked before use."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import platformdirs
import rdkit
import safetensors.torch
import torch
import torch_geometric
from torch_geometric.data import Data

from studies.files import sha256, write_atomically

FORMAT = 2
"""Version of the cache's own layout, part of every key."""


def cached_graphs(
    digests: Sequence[str], code: Path | str, build: Callable[[], list[Data]]
) -> list[Data]:
    """Graphs from the cache, or built and kept.

    The key covers the raw files, the code that reads them and the versions of RDKit and PyG. A
    damaged entry is built again. A cache folder that cannot be written costs time, not data.

    Args:
        digests: checksums of the raw content.
        code: the module that makes graphs of it.
        build: makes them: at least one graph, all with the same fields, which are tensors and
            texts.
    """
    parts = [*digests, sha256(Path(code)), rdkit.__version__, torch_geometric.__version__]
    key = hashlib.sha256("\n".join([*parts, str(FORMAT)]).encode()).hexdigest()[:32]
    entry = platformdirs.user_cache_path("mapkg") / "graphs" / f"{key}.safetensors"
    graphs = _read(entry)
    if graphs is None:
        graphs = build()
        try:
            _write(entry, graphs)
        except OSError as error:
            warnings.warn(f"processed graphs were not cached at {entry}: {error}", stacklevel=2)
    return graphs


def _write(entry: Path, graphs: list[Data]) -> None:
    stored = {}
    for name in graphs[0].keys():  # noqa: SIM118, not a dict
        values, kind = [graph[name] for graph in graphs], "tensor"
        if isinstance(values[0], str):
            values, kind = [torch.tensor(list(text.encode())).byte() for text in values], "text"
        stored[f"{kind} {name}"] = torch.cat(values, _dim(name))
        stored[f"sizes {name}"] = torch.tensor([value.size(_dim(name)) for value in values])
    content = safetensors.torch.save(stored)
    write_atomically(entry, hashlib.sha256(content).digest() + content)


def _read(entry: Path) -> list[Data] | None:
    """The cached graphs, or None if there are none or the entry is damaged."""
    try:
        raw = entry.read_bytes()
    except OSError:
        return None
    digest, content = raw[:32], raw[32:]
    if hashlib.sha256(content).digest() != digest:
        return None
    stored = safetensors.torch.load(content)
    fields = {}
    for key, value in stored.items():
        kind, _, name = key.partition(" ")
        if kind != "sizes":
            fields[name] = value.split(stored[f"sizes {name}"].tolist(), _dim(name))
        if kind == "text":
            fields[name] = [text.numpy().tobytes().decode() for text in fields[name]]
    rows = zip(*fields.values(), strict=True)
    return [_graph(dict(zip(fields, row, strict=True))) for row in rows]


def _graph(values: dict[str, Any]) -> Data:
    graph = Data()
    graph.stores[0].update(values)  # as Data(**values), but without a property for each of them
    return graph


def _dim(name: str) -> int:
    """The dimension along which a field of several graphs is joined, as PyG joins it."""
    return -1 if name == "edge_index" else 0
