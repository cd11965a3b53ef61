"""What is declared, what is locked and what is installed agree."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCK_LINES = (REPOSITORY / "requirements.lock").read_text().splitlines()
PIN = re.compile(r"([a-z0-9][a-z0-9.-]*)==([0-9][0-9a-z.+!]*)")


def requirements(*groups):
    """Requirements by canonical name; the package itself is no requirement."""
    parsed = map(Requirement, (text for group in groups for text in group))
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


CORE = requirements(PROJECT["dependencies"])
DECLARED = requirements(*EXTRAS.values(), PROJECT["dependencies"])


@pytest.fixture(scope="module")
def lock():
    """Versions of the lock by canonical name."""
    pins = [PIN.fullmatch(line) for line in LOCK_LINES if line and not line.startswith("#")]
    return {canonicalize_name(pin[1]): Version(pin[2]) for pin in pins if pin}


def installed(name):
    """The installed version, or None."""
    try:
        return Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def test_every_line_of_the_lock_is_a_pin_or_a_comment():
    # An index, a path or an option would tie the lock to the machine that wrote it.
    others = [
        line for line in LOCK_LINES if line and not line.startswith("#") and not PIN.fullmatch(line)
    ]
    assert others == []


def test_no_package_is_pinned_twice(lock):
    pins = [line for line in LOCK_LINES if line and not line.startswith("#")]
    assert len(lock) == len(pins)


@pytest.mark.parametrize("name", DECLARED)
def test_the_lock_pins_a_declared_package_at_a_version_it_allows(name, lock):
    assert name in lock, f"{name} is declared and not locked; run make lock"
    assert lock[name] in DECLARED[name].specifier


def test_torch_is_one_version_without_a_build_tag(lock):
    # A tag such as +cpu is on no index but torch's own: the lock could not be installed.
    assert str(lock["torch"]) == "2.13.0"
    assert str(CORE["torch"].specifier) == "==2.13.0"


def test_the_extras_are_declared():
    assert sorted(EXTRAS) == ["book", "test", "workflow"]


def test_the_environment_file_installs_the_lock_and_the_package():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    assert environment["name"] == "mapkg"
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-r requirements.lock", "-e ."]
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    assert "pip" in conda
    (python,) = (entry for entry in conda if re.match(r"python\b", entry))
    # conda's python=3.11 is any 3.11, and python>=3.11 any from 3.11 on.
    version = re.fullmatch(r"python[=>]=?([0-9.]+)", python)[1]
    assert Version(version) in Requirement(f"python{PROJECT['requires-python']}").specifier


def test_this_python_is_one_the_package_is_for():
    running = Version(".".join(map(str, sys.version_info[:3])))
    assert running in Requirement(f"python{PROJECT['requires-python']}").specifier


@pytest.mark.parametrize("name", DECLARED)
def test_the_installed_version_is_the_locked_one(name, lock):
    found = installed(name)
    if found is None and name not in CORE:
        extra = next(key for key, group in EXTRAS.items() if name in requirements(group))
        pytest.skip(f"{name}, of the extra {extra!r}, is not installed")
    assert found is not None, f"{name} is not installed; run make setup"
    # What follows a + is how it was built: torch's for a GPU is the same version.
    assert found.public == lock[name].public, "the environment is not the lock's; run make setup"


def phony_targets():
    makefile = (REPOSITORY / "Makefile").read_text()
    return re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split()


def test_make_help_lists_every_target_with_a_line_of_its_own():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    result = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    listed = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert all(len(entry) == 2 and len(entry[1]) > 8 for entry in listed)
    assert [target for target, _ in listed] == phony_targets()
    default = subprocess.run(
        ["make", "--no-print-directory"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert default.stdout == result.stdout


@pytest.fixture
def setup(tmp_path):
    """What ``make setup`` would do in a folder of its own, of which .venv/bin/python is given."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)

    def plan(python, *, is_finished):
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / ".venv" / "bin" / "python").symlink_to(python)
        if is_finished:
            (tmp_path / ".venv" / "installed").touch()
        command = ["make", "--dry-run", "--no-print-directory", "setup"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    return plan


def test_a_finished_environment_is_left_alone(setup):
    assert "-m venv" not in setup(sys.executable, is_finished=True).stdout


@pytest.mark.parametrize("case", ["not finished", "its Python is gone", "its Python is too old"])
def test_an_environment_that_cannot_be_used_is_made_anew_and_said_to_be(case, setup, tmp_path):
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho False\n")
    old.chmod(0o755)
    pythons = {"not finished": sys.executable, "its Python is gone": tmp_path / "none"}
    result = setup(pythons.get(case, old), is_finished=case != "not finished")
    assert (
        ".venv is not complete, or its Python is gone or too old; it is made anew" in result.stdout
    )
    assert "-m venv .venv" in result.stdout
    assert result.stderr == ""


def test_every_target_that_is_no_file_is_phony():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    assert sorted(targets) == sorted(phony_targets())


def test_the_declared_version_is_the_installed_one():
    found = installed(PROJECT["name"])
    if found is None:
        pytest.skip("the package is imported from its folder and not installed")
    assert found == Version(PROJECT["version"])


EXAMPLE = """
import sys

import torch
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GAT

import mapkg
from mapkg import lipschitz_normalise, report

graph = Data(x=torch.randn(20, 8), edge_index=torch.randint(20, (2, 60)))
model = GAT(in_channels=8, hidden_channels=16, num_layers=3, heads=4)
print(report(model, DataLoader([graph]), names="convs.*:message"))
assert lipschitz_normalise(model)(graph.x, graph.edge_index).isfinite().all()
for absent in ("rdkit", "sklearn", "matplotlib", "captum", "papermill", "studies"):
    try:
        __import__(absent)
    except ImportError:
        continue
    sys.exit(f"{absent} was installed with the library")
print(mapkg.__file__)
"""


@pytest.mark.slow
def test_the_wheel_of_the_library_runs_the_examples_of_the_readme_alone(tmp_path):
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, REPOSITORY]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("mapkg-*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "clean"], check=True)
    python = tmp_path / "clean" / "bin" / "python"
    locked = ["--constraint", REPOSITORY / "requirements.lock"]
    subprocess.run([python, *pip, "install", "--no-compile", *locked, wheel], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [python, "-c", EXAMPLE], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    *verdicts, place = result.stdout.splitlines()
    assert sum("none: up to" in line for line in verdicts) >= 2
    assert place.startswith(str(tmp_path))
