"""Where a result comes from, on small repositories made for the purpose."""

import importlib.util
import platform
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from studies import provenance

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty git repository, untouched by the configuration of the user."""
    for scope in ("GLOBAL", "SYSTEM"):
        monkeypatch.setenv(f"GIT_CONFIG_{scope}", "/dev/null")
    # A hook that runs these tests would otherwise point git at its own repository.
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    return folder


def git(folder, *arguments):
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    result = subprocess.run(
        ["git", "-C", folder, *identity, *arguments], capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def commit_all(folder):
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "all")
    return git(folder, "rev-parse", "HEAD")


def copied_to(folder):
    """The module as if the package lay in a folder; its cache is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(shutil.copy(provenance.__file__, folder))
    spec = importlib.util.spec_from_file_location("provenance_copy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Importing leaves __pycache__, which is no change of the code.
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    return module


def test_versions_name_the_interpreter_and_the_packages_that_numbers_depend_on():
    entries = dict(entry.split(" ") for entry in provenance.versions().split("; "))
    assert list(entries) == ["python", "torch", "torch-geometric", "numpy", "rdkit"]
    assert entries.pop("python") == platform.python_version()
    for package, number in entries.items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", number), "a build tag was kept"
        assert version(package) == number or version(package).startswith(f"{number}+")


@needs_git
@pytest.mark.parametrize(
    ("changed", "is_dirty"),
    [(None, False), ("README", False), ("studies/model.py", True), ("studies/new.py", True)],
)
def test_a_change_of_the_code_is_marked_dirty_and_no_other(repository, changed, is_dirty):
    module = copied_to(repository / "studies")
    for name in ("README", "studies/model.py"):
        (repository / name).write_text("one\n")
    head = commit_all(repository)
    assert re.fullmatch("[0-9a-f]{40}", head)
    if changed:
        (repository / changed).write_text("two\n")
    assert module.commit() == head + "-dirty" * is_dirty


@needs_git
def test_code_that_no_commit_holds_has_none(repository, tmp_path, monkeypatch):
    module = copied_to(repository / "studies")
    git(repository, "add", "--all")
    assert module.commit() == provenance.NOT_AVAILABLE == "not available"
    (repository / ".gitignore").write_text(".venv\n")
    commit_all(repository)  # an installed copy does not take another project's commit
    assert copied_to(repository / ".venv" / "studies").commit() == "not available"
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert copied_to(tmp_path / "studies").commit() == "not available"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert copied_to(repository / "studies").commit() == "not available"
