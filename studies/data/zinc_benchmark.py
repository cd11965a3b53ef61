"""The ZINC benchmark as PyG fetches it, for those who have no table of its SMILES."""

import collections
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from rdkit import Chem
from torch_geometric.data import Data
from torch_geometric.datasets import ZINC

from studies.data.graph_cache import cached_graphs
from studies.data.molecules import to_molecule
from studies.data.raw_files import read_url, root_with, unzipped
from studies.data.splitting import SPLITS

DEVIATIONS = (
    "Read from PyG's files, which carry no SMILES: they are written from the atom and bond ids, "
    "without stereochemistry.",
)


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles lists and dicts of tensors and nothing else, so that no code can run."""

    _allowed: ClassVar = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch.storage", "_load_from_bytes"): lambda content: torch.load(
            io.BytesIO(content), weights_only=True
        ),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(
                f"refused to load {module}.{name}: the benchmark's files hold tensors only"
            )
        return self._allowed[module, name]


def load(roots: Sequence[Path], *, download: bool) -> dict[str, list[Data]] | None:
    """The graphs of the benchmark by split, or None if ``ZINC/raw`` cannot be had.

    Raises:
        ValueError: if a file is damaged, or holds anything but tensors.
    """
    names = [f"{split}.{kind}" for split in SPLITS for kind in ("pickle", "index")]
    root = root_with(roots, [f"ZINC/raw/{name}" for name in names], _fetch if download else None)
    if root is None:
        return None
    splits = {}
    for split in SPLITS:
        raw = [root / f"ZINC/raw/{split}.{kind}" for kind in ("pickle", "index")]
        splits[split] = cached_graphs(raw, __file__, lambda raw=raw: _graphs(*raw))
    return splits


def _graphs(molecules: Path, chosen: Path) -> list[Data]:
    try:
        with molecules.open("rb") as file:
            known = _TensorUnpickler(file).load()
        return [benchmark_graph(known[int(i)]) for i in chosen.read_text().strip().split(",")]
    except (pickle.UnpicklingError, EOFError, LookupError, ValueError) as error:
        raise ValueError(f"{molecules}: not the benchmark's file, or damaged: {error}") from error


def benchmark_graph(molecule: dict[str, Any]) -> Data:
    """The graph of a molecule as the benchmark's pickles hold it."""
    bonds = torch.as_tensor(molecule["bond_type"]).long()  # [N, N], 0 where no bond
    edge_index = bonds.nonzero().t().contiguous()
    types = bonds[edge_index[0], edge_index[1]]
    data = Data(
        x=torch.as_tensor(molecule["atom_type"]).long().flatten(),
        edge_index=edge_index,
        edge_attr=types,
        edge_type=types,
        y=torch.as_tensor(molecule["logP_SA_cycle_normalized"]).float().reshape(1, 1),
    )
    data.smiles = Chem.MolToSmiles(to_molecule(data))
    return data


def _fetch() -> dict[str, bytes]:
    archive = {f"ZINC/raw/{split}.pickle": f"molecules/{split}.pickle" for split in SPLITS}
    indices = {f"ZINC/raw/{s}.index": read_url(ZINC.split_url.format(s)) for s in SPLITS}
    return unzipped(read_url(ZINC.url), archive) | indices
