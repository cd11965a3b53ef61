"""What training gives, and its files with checksums: checkpoints, the states of trainings.

A checkpoint is weights as safetensors, and what is known of them as JSON; a state is one file.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mapkg.models.config import Config
from studies.extras import build
from studies.files import warn_of_another_rdkit, write_atomically

_BLANK = "0" * 64  # in place of the checksum of a state when it is computed


@dataclass
class Fit:
    """What training gave; of several seeds, tables have a column ``seed``, other values a dict."""

    history: pd.DataFrame  # rows of epoch, train_loss, what the task validates, lr, seconds
    observations: pd.DataFrame  # of the observer, or of several seeds the measures of their scores
    best_epoch: Any  # with the least validation loss; 0 before or without the first one
    best_weights: dict[Any, Any]
    last_weights: dict[Any, Any]
    stop_reason: Any  # why it ended, for example "min lr"
    commit: str  # as ``versions`` of the process that started the run
    versions: str


@dataclass
class SeedProgress:
    """How far one of several seeds that are trained at once has come."""

    seed: int
    lr: float
    best_loss: float = math.inf
    best_epoch: int = 0
    last_epoch: int = 0
    stop_reason: str = ""
    plateau: dict[str, Any] = field(default_factory=dict)

    def learn_from(self, val_loss: float, config: Config) -> None:
        """Let torch's own scheduler decide on the learning rate."""
        dummy = torch.optim.SGD([torch.zeros(1)], lr=self.lr)
        factor, patience = config.lr_factor, config.lr_patience
        plateau = ReduceLROnPlateau(dummy, factor=factor, patience=patience, eps=0)
        plateau.load_state_dict(self.plateau)  # nothing before the first epoch
        plateau.step(val_loss)
        self.plateau, self.lr = plateau.state_dict(), dummy.param_groups[0]["lr"]


def save(path: Path | str, weights: dict[str, Tensor], config: Config, **information: Any) -> None:
    """Save weights as ``PATH.safetensors`` and what is known of them as ``PATH.json``."""
    content = safetensors.torch.save(_apart(weights))
    checksum = hashlib.sha256(content).hexdigest()
    described = {"config": config.to_dict(), "sha256": checksum, **information}
    described["sha256_of_this"] = _checksum(described)
    weights_path, json_path = _paths(path)
    write_atomically(weights_path, content)
    write_atomically(json_path, json.dumps(described, indent=1).encode())


def load(path: Path | str, *, dataset: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """A saved model, and its JSON file; trained on a data set of this title, if it is given."""
    weights_path, json_path = _paths(path)
    if not (weights_path.is_file() and json_path.is_file()):
        raise FileNotFoundError(f"no checkpoint: expected {weights_path} and {json_path}")
    content = weights_path.read_bytes()
    try:
        information = json.loads(json_path.read_text())
        expected, stored = information["sha256"], Config.from_dict(information["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{json_path}: not the description of a checkpoint: {error!r}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(
            f"{weights_path}: expected sha256 {expected}, found {found}; the two "
            "files do not belong together, or one is damaged"
        )
    if information.get("sha256_of_this", own := _checksum(information)) != own:
        raise ValueError(f"{json_path}: changed after it was written, or damaged")
    if dataset not in (None, trained_on := information.get("dataset")):
        raise ValueError(
            f"{json_path}: trained on {trained_on!r}, got {dataset!r}; load the same data, as many "
            "graphs, with the same change"
        )
    if stored.dataset == "zinc":
        warn_of_another_rdkit(information.get("versions", ""), json_path)
    model, weights = build(stored), safetensors.torch.load(content)
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{weights_path}: {name} is not finite")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{weights_path}: weights do not fit the configuration: {error}") from None
    return model.eval(), information


def _checksum(described: dict[str, Any]) -> str:
    others = {name: value for name, value in described.items() if name != "sha256_of_this"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _paths(path: Path | str) -> list[Path]:
    path = Path(path)
    name = path.name.removesuffix(".safetensors").removesuffix(".json")
    return [path.with_name(name + suffix) for suffix in (".safetensors", ".json")]


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory, as tied weights do."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def write_state(path: Path, tensors: dict[str, dict[str, Tensor]], values: dict[str, Any]) -> None:
    """Write groups of tensors and plain values as one file, with the checksum of all of it."""
    flat = {f"{group}/{name}": t for group, named in tensors.items() for name, t in named.items()}
    metadata = {"values": json.dumps(values), "sha256": _BLANK}
    content = safetensors.torch.save(_apart(flat), metadata=metadata)
    checksum = hashlib.sha256(content).hexdigest()
    write_atomically(path, content.replace(_entry(_BLANK), _entry(checksum), 1))


def read_state(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what ``write_state`` wrote; raises if a single bit is another, or it is another file."""
    content = path.read_bytes()
    stored = re.search(_entry("([0-9a-f]{64})"), content)
    checksum = stored and stored[1].decode()
    blank = content.replace(_entry(checksum), _entry(_BLANK), 1) if stored else b""
    if hashlib.sha256(blank).hexdigest() != checksum:
        raise ValueError(
            f"{path}: damaged, or not a training state of this version; remove it to start afresh"
        )
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in safetensors.torch.load(content).items():
        group, name = key.split("/", 1)
        groups.setdefault(group, {})[name] = tensor
    return groups, json.loads(header["__metadata__"]["values"])


def _entry(checksum: str) -> bytes:
    return f'"sha256":"{checksum}"'.encode()


def refuse_another_run(
    path: Path, stored: dict[str, Any], asked: dict[str, Any], epochs: tuple[int, int]
) -> None:
    """Raise unless a state is of the run that is asked for, with as many epochs or fewer."""
    if names := [name for name in stored | asked if stored.get(name) != asked.get(name)]:
        others = (f"{n}: stored {stored.get(n)!r}, asked for {asked.get(n)!r}" for n in names)
        raise ValueError(
            f"{path} holds the state of another run: {'; '.join(others)}. "
            "Choose another folder, or remove the file to start afresh"
        )
    done, asked_for = epochs
    if done > asked_for:
        raise ValueError(
            f"{path} holds {done} epochs, more than the {asked_for} asked for: tables would be of "
            f"{done}. Ask for {done} or more, choose another folder, or remove the file"
        )
