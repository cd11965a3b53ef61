"""Where a result comes from: versions and commit."""

import platform
import re
import subprocess
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

NOT_AVAILABLE = "not available"


@cache
def versions() -> str:
    """Versions that results depend on, for example ``"python 3.11.7; torch 2.13.0; ..."``."""
    packages = ("torch", "torch-geometric", "numpy", "rdkit")
    numbers = [f"python {platform.python_version()}"]
    # A build tag such as +cpu says how torch was packaged, not what it computes.
    numbers += [f"{name} {_version(name).split('+')[0]}" for name in packages]
    return "; ".join(numbers)


def warn_of_another_rdkit(stored: str, path: Path) -> None:
    """Warn if ``stored`` versions name another RDKit: it may choose other double bonds in rings."""
    then, now = (re.search(r"rdkit (\d[\d.]*)", text) for text in (stored, versions()))
    if then and now and then[1] != now[1]:
        warnings.warn(
            f"{path}: trained on molecules that RDKit {then[1]} kekulized, but RDKit {now[1]} is "
            "at work; about half of the molecules may have other types of bonds in their rings",
            stacklevel=3,
        )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # training from prepared tensors needs no RDKit
        return "not installed"


@cache
def commit() -> str:
    """The commit of ``mapkg`` and ``studies``, with ``-dirty`` if their code differs from it.

    "not available" where the code is not tracked in a git work tree. One that is installed
    inside another project's tree does not take that project's commit for its own.
    """
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", "studies/provenance.py")
        head = git("rev-parse", "HEAD")
        return f"{head}-dirty" if git("status", "--porcelain", "--", "mapkg", "studies") else head
    except (OSError, subprocess.CalledProcessError):
        return NOT_AVAILABLE
