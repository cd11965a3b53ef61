"""Checkpoints, training states and provenance: whole, checked, and refused when they do not fit."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mapkg.models import build
from studies import files
from studies.checkpoint import load, read_state, save, write_state
from studies.files import alone, sha256, write_atomically
from studies.published import CONFIGS

SMALL = CONFIGS["GT-ZINC"].replace(hidden_channels=16, heads=4, num_layers=2)
TENSORS = {
    "model": {"a.weight": torch.arange(6.0).reshape(2, 3), "a/b": torch.tensor(7)},
    "adam": {"0.step": torch.tensor(3.0), "0.exp_avg": torch.ones(2, 3).double()},
}
VALUES = {"epoch": 3, "loss": 0.1 + 0.2, "history": [{"lr": 7e-4}], "nothing": None, "text": "é"}


def weights():
    torch.manual_seed(0)
    return build(SMALL).state_dict()


@pytest.fixture
def saved(tmp_path):
    save(tmp_path / "new" / "best.1", weights(), SMALL, seed=3, history=[{"val_loss": 0.1 + 0.2}])
    return tmp_path / "new" / "best.1"  # a dot in the name is no suffix


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".json"])
def test_a_saved_model_comes_back_by_its_name(saved, suffix):
    assert {*os.listdir(saved.parent)} == {"best.1.json", "best.1.safetensors"}
    model, information = load(f"{saved}{suffix}")
    assert not model.training
    for name, value in weights().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert information["sha256"] == sha256(Path(f"{saved}.safetensors"))
    assert (information["config"], information["seed"]) == (SMALL.to_dict(), 3)
    assert information["history"] == [{"val_loss": 0.1 + 0.2}]


@pytest.mark.parametrize(
    ("suffix", "old", "new", "message"),
    [
        (".safetensors", b"", b"\0", r"best\.1\.safetensors: expected sha256 \w{64}, found \w{64}"),
        (".json", b'"heads": 4', b'"heads": 8', r"best\.1\.json: changed after it was written"),
        (".json", b'"seed": 3', b'"seed": 4', r"best\.1\.json: changed after it was written"),
        (".json", b"{", b"", r"best\.1\.json: not the description of a checkpoint"),
        (".json", b'"sha256"', b'"sha"', r"best\.1\.json: not the description of a checkpoint"),
    ],
)
def test_a_change_of_either_file_is_refused(saved, suffix, old, new, message):
    path = Path(f"{saved}{suffix}")
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        load(saved)


def test_what_does_not_fit_is_refused(saved, tmp_path):
    save(tmp_path / "other", weights(), SMALL.replace(num_layers=3))
    with pytest.raises(ValueError, match="weights do not fit the configuration"):
        load(tmp_path / "other")
    spoiled = weights()
    spoiled["head.0.weight"][0, 0] = torch.nan
    save(tmp_path / "nan", spoiled, SMALL)
    with pytest.raises(ValueError, match=r"head\.0\.weight is not finite"):
        load(tmp_path / "nan")
    Path(f"{saved}.json").unlink()  # killed between the two
    with pytest.raises(FileNotFoundError, match=r"best\.1\.safetensors and .*best\.1\.json"):
        load(saved)


def test_a_state_comes_back_exactly_and_tied_weights_twice(tmp_path):
    tied = TENSORS["model"]["a.weight"]
    write_state(tmp_path / "state", TENSORS | {"tied": {"1": tied, "2": tied.T}}, VALUES)
    tensors, values = read_state(tmp_path / "state")
    assert values == VALUES
    for group, members in (TENSORS | {"tied": {"1": tied, "2": tied.T}}).items():
        assert tensors[group].keys() == members.keys()
        for name, value in members.items():
            assert torch.equal(tensors[group][name], value)
            assert tensors[group][name].dtype == value.dtype


def test_a_state_with_a_single_changed_bit_is_refused_before_use(tmp_path):
    path = tmp_path / "state"
    write_state(path, TENSORS, VALUES)
    whole = path.read_bytes()
    damaged = [b"", whole[:-1], whole[1:], whole + b"\0", safetensors.torch.save(TENSORS["model"])]
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"state: damaged, or not .* version; remove it"):
            read_state(path)


def test_a_write_has_the_mode_of_the_umask_and_a_failed_one_leaves_the_old_content(tmp_path):
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before, path = os.umask(umask), tmp_path / f"{umask}"
        try:
            write_atomically(path, b"old")
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == mode
        with pytest.raises(TypeError):
            write_atomically(path, ["not bytes"])
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old", b"old"]
    link = tmp_path / "link"
    link.symlink_to(path)  # a private file
    write_atomically(link, b"new")
    assert link.is_symlink() and (path.read_bytes(), path.stat().st_mode) == (b"new", 0o100600)


HOLD = """
import sys, time
from pathlib import Path
from studies.files import alone
with alone(sys.argv[1]):
    (Path(sys.argv[1]) / ".weights.x.part").write_bytes(b"half")
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_written_to_by_one_process_and_free_when_that_is_killed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"^{tmp_path}: another process writes to it"):
            alone(tmp_path).__enter__()
    finally:
        process.kill()  # SIGKILL: nothing is cleaned up
        process.communicate()
    assert (tmp_path / ".weights.x.part").exists()
    with alone(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        with pytest.raises(ValueError, match="another process writes to it"):
            alone(tmp_path).__enter__()  # nor by two threads of one process
    assert not any(tmp_path.iterdir())


# Where a result comes from, on small repositories made for the purpose.


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty git repository, untouched by the configuration and the hooks of the user."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for scope in ("GLOBAL", "SYSTEM"):
        monkeypatch.setenv(f"GIT_CONFIG_{scope}", "/dev/null")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    git(tmp_path, "init", "--quiet", "repository")
    return tmp_path / "repository"


def git(folder, *arguments):
    command = ["git", "-C", folder, "-c", "user.name=test", "-c", "user.email=test@localhost"]
    return subprocess.check_output([*command, *arguments], text=True).strip()


def commit_all(folder):
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "all")
    return git(folder, "rev-parse", "HEAD")


def commit_of(folder):
    """What the module says if the package lies in a folder."""
    path = Path(shutil.copy(files.__file__, folder))
    spec = importlib.util.spec_from_file_location("files_copy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)  # which is no change of the code
    return module.commit()


def test_versions_name_the_interpreter_and_the_packages_that_numbers_depend_on():
    entries = dict(entry.split(" ") for entry in files.versions().split("; "))
    assert entries.pop("python") == platform.python_version()
    assert list(entries) == ["torch", "torch-geometric", "numpy", "rdkit"]
    for package, number in entries.items():
        assert version(package).split("+")[0] == number, "a build tag is not kept"


def test_only_a_change_of_the_code_is_dirty_and_code_that_no_commit_holds_has_none(
    repository, tmp_path, monkeypatch
):
    places = [repository / "studies", repository / ".venv" / "studies", tmp_path / "studies"]
    for folder in places:
        folder.mkdir(parents=True)
    assert commit_of(places[0]) == "not available"
    (repository / "studies" / "model.py").write_text("one")
    (repository / ".gitignore").write_text(".venv")
    head = commit_all(repository)
    assert commit_of(places[0]) == head
    for name in ("README", "studies/new.py", "studies/model.py"):
        (repository / name).write_text("two")
        assert commit_of(places[0]) == head + "-dirty" * name.startswith("studies")
        git(repository, "stash", "--include-untracked")
    assert commit_of(places[1]) == "not available", "it takes another project's commit"
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert commit_of(places[2]) == "not available"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert commit_of(places[0]) == "not available"
