"""Files written whole or not at all, by one process at a time."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_PART = ".part"  # what names of files end with while they are written


@contextmanager
def alone(folder: Path | str | None, prefix: str = "") -> Iterator[None]:
    """Be the only process that writes to a folder, or to its files of a prefix; None locks nothing.

    What killed processes left half written in a whole folder is swept.
    """
    if folder is None:
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{prefix}.lock"
    try:
        with FileLock(path, timeout=0):  # the system's: it dies with the process
            for left in folder.glob(f".*{_PART}") if not prefix else ():
                left.unlink(missing_ok=True)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout:
        raise ValueError(
            f"{folder / prefix}: another process writes to it; wait for that, or choose another "
            f"{'prefix' if prefix else 'folder'}"
        ) from None


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, and its folders, so that a reader sees the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
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
