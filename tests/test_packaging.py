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
PIN = re.compile(r"([a-z0-9][a-z0-9.-]*)==([0-9][0-9a-z.+!]*)")
PINS = [
    line
    for line in (REPOSITORY / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
]


def requirements(*groups):
    parsed = map(Requirement, (text for group in groups for text in group))
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


CORE = requirements(PROJECT["dependencies"])
DECLARED = requirements(*EXTRAS.values(), PROJECT["dependencies"])


@pytest.fixture(scope="module")
def lock():
    """Versions of the lock by canonical name."""
    pins = filter(None, map(PIN.fullmatch, PINS))
    return {canonicalize_name(pin[1]): Version(pin[2]) for pin in pins}


def installed(name):
    """The installed version; skips if there is none."""
    try:
        return Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")


def test_every_line_of_the_lock_pins_another_package(lock):
    # An index, a path or an option would tie the lock to the machine that wrote it.
    assert len(lock) == len(PINS)
    # A tag such as +cpu is on no index but torch's own: the lock could not be installed.
    assert str(lock["torch"]) == "2.13.0" and str(CORE["torch"].specifier) == "==2.13.0"


@pytest.mark.parametrize("name", DECLARED)
def test_a_declared_package_is_locked_at_a_version_it_allows_and_that_is_installed(name, lock):
    assert name in lock, f"{name} is declared and not locked; run make lock"
    assert lock[name] in DECLARED[name].specifier
    # What follows a + is how it was built: torch's for a GPU is the same version.
    assert installed(name).public == lock[name].public, "run make setup"


def test_the_environment_file_installs_the_lock_and_the_package():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert environment["name"] == "mapkg" and "pip" in conda
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}
    (python,) = (entry for entry in conda if re.match(r"python\b", entry))
    # conda's python=3.11 is any 3.11, and python>=3.11 any from 3.11 on.
    version = re.fullmatch(r"python[=>]=?([0-9.]+)", python)[1]
    assert Version(version) in Requirement(f"python{PROJECT['requires-python']}").specifier


def test_the_declared_version_is_the_installed_one():
    assert installed(PROJECT["name"]) == Version(PROJECT["version"])


def make(*arguments, cwd=REPOSITORY):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)


def test_make_help_lists_every_target_with_a_line_of_its_own():
    makefile = (REPOSITORY / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split()
    listed = [line.split(maxsplit=1) for line in make("help").stdout.splitlines()]
    assert all(len(entry) == 2 and len(entry[1]) > 8 for entry in listed)
    assert [target for target, _ in listed] == phony
    assert sorted(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)) == sorted(phony)
    assert make().stdout == make("help").stdout


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
print(found := report(model, DataLoader([graph]), names="convs.*:message"))
assert lipschitz_normalise(model)(graph.x, graph.edge_index).isfinite().all()
for absent in ("rdkit", "sklearn", "matplotlib", "captum", "papermill", "studies"):
    try:
        __import__(absent)
    except ImportError:
        continue
    sys.exit(f"{absent} was installed with the library")
try:
    found.plot()
except ImportError as error:
    assert "matplotlib is required" in str(error)
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
