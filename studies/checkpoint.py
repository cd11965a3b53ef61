"""Files that are whole or not there: checkpoints, the states of trainings, checksums.

A checkpoint is weights as safetensors, and what is known of them as JSON; a state is one file.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from mapkg.models.config import Config
from studies.extras import build

_VALUES = "values"  # key of the JSON text in a state file's own header


def save(path: Path | str, weights: dict[str, Tensor], config: Config, **information: Any) -> None:
    """Save weights as ``PATH.safetensors`` and what is known of them as ``PATH.json``."""
    content = safetensors.torch.save(_apart(weights))
    checksum = hashlib.sha256(content).hexdigest()
    described = {"config": config.to_dict(), "sha256": checksum, **information}
    weights_path, json_path = _paths(path)
    write_atomically(weights_path, content)
    write_atomically(json_path, json.dumps(described, indent=1).encode())


def load(path: Path | str, config: Config | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """A saved model in evaluation mode, and the content of its JSON file.

    Raises unless checksum and weights fit, and the configuration is the expected one, if given.
    """
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
    if config is not None and config != stored:
        raise ValueError(
            f"{json_path}: the checkpoint has another configuration than expected: "
            f"{differences(stored.to_dict(), config.to_dict())}"
        )
    model = build(stored)
    try:
        model.load_state_dict(safetensors.torch.load(content))
    except RuntimeError as error:
        raise ValueError(f"{weights_path}: weights do not fit the configuration: {error}") from None
    return model.eval(), information


def _paths(path: Path | str) -> list[Path]:
    path = Path(path)
    name = path.name.removesuffix(".safetensors").removesuffix(".json")
    return [path.with_name(name + suffix) for suffix in (".safetensors", ".json")]


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory, as weights may that are tied."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def write_state(path: Path, tensors: dict[str, dict[str, Tensor]], values: dict[str, Any]) -> None:
    """Write groups of tensors and plain values as one file."""
    flat = {f"{group}/{name}": t for group, named in tensors.items() for name, t in named.items()}
    content = safetensors.torch.save(_apart(flat), metadata={_VALUES: json.dumps(values)})
    write_atomically(path, content)


def read_state(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what ``write_state`` wrote; raises if it is damaged or of another kind."""
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()[_VALUES])
            for key in file.keys():  # noqa: SIM118, not a dict
                group, name = key.split("/", 1)
                groups.setdefault(group, {})[name] = file.get_tensor(key)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a training state, or damaged ({error}); remove it to start afresh"
        ) from error
    return groups, values


def differences(stored: dict[str, Any], expected: dict[str, Any]) -> str:
    """The entries in which two flat dicts differ, for an error."""
    names = [name for name in stored | expected if stored.get(name) != expected.get(name)]
    return "; ".join(
        f"{name}: stored {stored.get(name)!r}, asked for {expected.get(name)!r}" for name in names
    )


def refuse_another_run(path: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise unless a state is of the run that is asked for; its length may differ."""
    if stored != asked:
        raise ValueError(
            f"{path} holds the state of another run: {differences(stored, asked)}. "
            "Choose another folder, or remove the file to start afresh"
        )


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, and its folders, so that a reader sees the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp gives 0600
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
