"""The ZINC benchmark as PyG fetches it, brought to the form of our SMILES tables."""

import collections
import io
import itertools
import pickle
import sys
from pathlib import Path
from typing import Any, BinaryIO, ClassVar
from urllib.error import URLError

import platformdirs
import torch
from rdkit import Chem
from torch_geometric.data import Data
from torch_geometric.datasets import ZINC

from studies.data.molecules import to_molecule
from studies.data.raw_files import root_with
from studies.data.splitting import SPLITS

FOLDER = "ZINC"
"""Folder of PyG's ZINC under a data root; its files lie in ``raw/`` inside."""


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


def read_tensors(file: BinaryIO) -> Any:
    """Unpickle tensors from a file that is not trusted.

    Raises:
        pickle.UnpicklingError: if the file asks for anything but tensors.
    """
    return _TensorUnpickler(file).load()


class _BenchmarkZINC(ZINC):
    """PyG's ZINC, its files read without the power to run code."""

    @property
    def processed_dir(self) -> str:
        # Not PyG's own folder: what its class leaves there has no SMILES and other shapes.
        return str(Path(self.root) / "mapkg")

    def load(self, path: str) -> None:
        # PyG's own would unpickle whatever torch.load refuses.
        values, self.slices, _ = torch.load(path, weights_only=True)
        self.data = Data.from_dict(values)

    def process(self) -> None:
        raw, processed = Path(self.raw_dir), Path(self.processed_dir)
        for split in SPLITS:
            with (raw / f"{split}.pickle").open("rb") as file:
                molecules = read_tensors(file)
            chosen = (raw / f"{split}.index").read_text().strip().split(",")
            outside = [i for i in chosen if not (i.isdigit() and int(i) < len(molecules))]
            if outside:
                raise ValueError(
                    f"{raw / split}.index: expected numbers below {len(molecules)}, the number "
                    f"of molecules, got {outside[0]!r}"
                )
            graphs = [_benchmark_graph(molecules[int(i)]) for i in chosen]
            self.save(graphs, str(processed / f"{split}.pt"))


def _benchmark_graph(molecule: dict[str, Any]) -> Data:
    bonds = torch.as_tensor(molecule["bond_type"]).long()  # [N, N], 0 where no bond
    edge_index = bonds.nonzero().t().contiguous()
    data = Data(
        x=torch.as_tensor(molecule["atom_type"]).long().flatten(),
        edge_index=edge_index,
        edge_attr=bonds[edge_index[0], edge_index[1]],
        y=torch.as_tensor(molecule["logP_SA_cycle_normalized"]).float().reshape(1, 1),
    )
    data.smiles = Chem.MolToSmiles(to_molecule(data))
    return data


def benchmark_splits(roots: list[Path], *, download: bool) -> tuple[list[Data], ...] | None:
    """Train, validation and test graphs of the benchmark, or None if it cannot be had.

    Args:
        roots: folders that may hold ``ZINC/raw``; it is downloaded to the user's cache folder.
        download: whether to try the network if none does.

    Raises:
        ValueError: if a file is damaged, or holds anything but tensors.
    """
    names = [f"{FOLDER}/raw/{split}.{kind}" for split in SPLITS for kind in ("pickle", "index")]
    root = root_with(roots, names)
    if root is None:
        if not download:
            return None
        root = platformdirs.user_cache_path("mapkg")
    try:
        datasets = [
            _BenchmarkZINC(str(root / FOLDER), subset=True, split=split) for split in SPLITS
        ]
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{root / FOLDER}: not the benchmark's files, or damaged: {error}"
        ) from error
    except (URLError, TimeoutError) as error:
        print(f"could not fetch ZINC: {error}", file=sys.stderr)
        return None
    splits = tuple(list(dataset) for dataset in datasets)
    for graph in itertools.chain(*splits):
        graph.edge_type = graph.edge_attr
    return splits
