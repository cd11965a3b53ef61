"""What is declared, what is locked and what is installed agree; what a reader types exists."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCN

from studies import notebook
from studies.__main__ import parser
from studies.commands import overrides

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
GROUPS = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
DECLARED = {
    canonicalize_name(requirement.name): (requirement, group)
    for group, texts in GROUPS.items()
    for requirement in map(Requirement, texts)
}
MAKEFILE = (REPOSITORY / "Makefile").read_text()
PAGES = [
    path
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "book").glob("*.md")))
    if "```" in path.read_text()
]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def test_the_lock_pins_every_declared_package_at_a_version_it_allows_and_that_is_installed():
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    # An index, a path or an option would tie the lock to the machine that wrote it.
    pins = [re.fullmatch(r"([a-z0-9][a-z0-9.-]*)==([0-9][0-9a-z.!]*)", line) for line in lines]
    assert all(pins)
    lock = {canonicalize_name(pin[1]): Version(pin[2]) for pin in pins}
    assert len(lock) == len(pins), "a package is pinned twice"
    for name, (requirement, group) in DECLARED.items():
        assert lock[name] in requirement.specifier, f"{name}; run make lock"
        try:
            # What follows a + is how it was built: torch's for a GPU is the same version.
            assert Version(metadata.version(name)).public == lock[name].public, "run make setup"
        except metadata.PackageNotFoundError:
            assert group, f"{name} is not installed; run make setup"


def test_the_environment_file_installs_the_lock_and_the_package():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-r requirements.lock", "-e ."]
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (python,) = (entry for entry in conda if re.match(r"python\b", entry))
    # conda's python=3.11 is any 3.11, and python>=3.11 any from 3.11 on.
    stated = re.fullmatch(r"python[=>]=?([0-9.]+)", python)[1]
    assert stated in Requirement(f"python{PROJECT['requires-python']}").specifier


@needs_make
def test_make_help_lists_every_target_with_a_line_of_its_own():
    phony = re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)[1].split()
    assert sorted(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)) == sorted(phony)
    look = dict(cwd=REPOSITORY, capture_output=True, text=True, check=True)
    listed = subprocess.run(["make", "--no-print-directory"], **look).stdout.splitlines()
    assert [line.split()[0] for line in listed if len(line.split()) > 2] == phony


@needs_make
@pytest.mark.parametrize("case", ["finished", "not finished", "its Python gone", "its Python old"])
def test_an_environment_that_cannot_be_used_is_made_anew_and_said_to_be(case, tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho False\n")
    old.chmod(0o755)
    pythons = {"its Python gone": tmp_path / "none", "its Python old": old}
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(pythons.get(case, sys.executable))
    if case != "not finished":
        (tmp_path / ".venv" / "installed").touch()
    command = ["make", "--dry-run", "--no-print-directory", "setup"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    for words in ("-m venv .venv", ".venv is not complete, or its Python"):
        assert (words in result.stdout) == (case != "finished")
    assert result.stderr == ""


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_of_a_page_is_one_that_exists(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    targets = re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE)
    lines = "".join(blocks(path, "sh")).splitlines()
    for words in [shlex.split(line, comments=True) for line in lines if line]:
        words = [word for word in words if not word.startswith("MAPKG_DATA=")]
        if words[0] == "make":
            assert words[1] in targets
            assert all(re.match(r"(CORES|WHAT)=\w+$", word) for word in words[2:]), words
        elif words[0].endswith("/snakemake"):
            given = [word for word in words[1:] if word.startswith("workflow/")]
            assert given and all((REPOSITORY / path).exists() for path in given), words
        elif words[1:3] == ["-m", "studies"]:
            parsed = vars(parser(words[3:]).parse_args(words[3:]))  # exits on an unknown option
            if words[3] == "run":
                notebook.parse(parsed["notebook"], parsed.get("parameter", ()))
            overrides(parsed.get("set", ()))
        else:
            assert Path(words[1]).is_file(), f"{path.name}: {' '.join(words)}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_python_example_of_a_page_runs(path, capsys):
    for example in blocks(path, "python"):
        torch.manual_seed(0)
        graph = Data(x=torch.randn(20, 8), edge_index=torch.randint(20, (2, 60)))
        model = GCN(in_channels=8, hidden_channels=16, num_layers=2)
        names = dict(model=model, loader=DataLoader([graph]))  # what an example takes for granted
        exec(compile(example, path.name, "exec"), names)
        if "report(" not in example:
            scores = names["model"](graph.x, graph.edge_index)
            assert scores.isfinite().all() and len(scores) == 20
            continue
        printed = capsys.readouterr().out
        verdicts = re.findall(r"^convs\.\d:message +none by the row ratio: up to ", printed, re.M)
        assert len(verdicts) >= 2, "a report has a line for each layer"


def test_every_file_that_is_linked_from_the_readme_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", (REPOSITORY / "README.md").read_text()):
        assert target.startswith("http") or (REPOSITORY / target).is_file(), target


EXAMPLE = """
from importlib.util import find_spec

import torch
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GAT

import mapkg

graph = Data(x=torch.randn(20, 8), edge_index=torch.randint(20, (2, 60)))
model = GAT(in_channels=8, hidden_channels=16, num_layers=3, heads=4)
print(mapkg.report(model, DataLoader([graph]), names="convs.*:message"))
assert mapkg.lipschitz_normalise(model)(graph.x, graph.edge_index).isfinite().all()
absent = ("rdkit", "sklearn", "matplotlib", "captum", "papermill", "studies")
assert not [name for name in absent if find_spec(name)]
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
    look = dict(cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    *verdicts, place = subprocess.run([python, "-c", EXAMPLE], **look).stdout.splitlines()
    assert sum("none by the row ratio: up to" in line for line in verdicts) >= 2
    assert place.startswith(str(tmp_path))
