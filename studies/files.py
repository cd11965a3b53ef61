"""Files that one process at a time writes, whole or not at all, and where results come from."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

_PART = ".part"  # what names of files end with while they are written


@contextmanager
def alone(folder: Path | str | None, prefix: str = "") -> Iterator[None]:
    """Be the only process that writes to a folder, or to its files of a prefix, and tidy it up."""
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
            f"{'name' if prefix else 'folder'}"
        ) from None


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output(path: Path) -> None:
    """Raise, before the work that it is for, if no file can be written at a path."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or pipe"
        raise ValueError(f"{path} is {kind}; name a file as output")
    if path.is_file() and not path.stat().st_mode & 0o222:
        raise ValueError(f"{path} is read-only; name another output, or make it writable")
    existing = next(folder for folder in path.parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written, {existing}: {error.strerror}") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new; links and modes stay."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{_PART}")
    try:
        with temporary.open("xb") as file:
            if path.is_file():
                shutil.copymode(path, temporary)
            file.write(content)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):  # a full disk
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@cache
def versions() -> str:
    """Versions that results depend on, for example ``"python 3.11.7; torch 2.13.0; ..."``."""

    def number(name: str) -> str:
        try:  # a build tag such as +cpu says how torch was packaged, not what it computes
            return version(name).split("+")[0]
        except PackageNotFoundError:  # RDKit, where networks are trained from prepared tensors
            return "not installed"

    packages = ("torch", "torch-geometric", "numpy", "rdkit")
    numbers = {"python": platform.python_version()} | {name: number(name) for name in packages}
    return "; ".join(map(" ".join, numbers.items()))


def warn_of_another_rdkit(stored: str, path: Path) -> None:
    """Warn if ``stored`` versions name another RDKit: it may choose other double bonds in rings."""
    then, now = (re.search(r"rdkit (\d[\d.]*)", text) for text in (stored, versions()))
    if then and now and then[1] != now[1]:
        warnings.warn(
            f"{path}: trained on molecules that RDKit {then[1]} kekulized, but RDKit {now[1]} is "
            "at work; about half of the molecules may have other types of bonds in their rings",
            stacklevel=3,
        )


@cache
def commit() -> str:
    """The commit of ``mapkg`` and ``studies``, with ``-dirty`` if their code differs from it."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return result.stdout.strip()

    try:  # installed inside another project's tree, its commit is not ours
        git("ls-files", "--error-unmatch", "--", "studies/files.py")
        head = git("rev-parse", "HEAD")
        return f"{head}-dirty" if git("status", "--porcelain", "--", "mapkg", "studies") else head
    except (OSError, subprocess.CalledProcessError):
        return "not available"
