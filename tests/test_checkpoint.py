"""Checkpoints and training states: whole, checked, and refused when they do not fit."""

import hashlib
import os

import pytest
import safetensors.torch
import torch

from mapkg.models import build
from studies.checkpoint import differences, load, read_state, save, write_atomically, write_state
from studies.published import CONFIGS

SMALL = CONFIGS["GT-ZINC"].replace(hidden_channels=16, heads=4, num_layers=2)
TENSORS = {
    "model": {"a.weight": torch.arange(6.0).reshape(2, 3), "a/b": torch.tensor(7)},
    "adam": {"0.step": torch.tensor(3.0), "0.exp_avg": torch.randn(2, 3).double()},
}
VALUES = {"epoch": 3, "loss": 0.1 + 0.2, "history": [{"lr": 7e-4}], "nothing": None, "text": "é"}


def trained_weights(seed=0):
    torch.manual_seed(seed)
    weights = build(SMALL).state_dict()
    for name, value in weights.items():
        if "running" in name:
            value.uniform_(0.5, 2)
    return weights


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# A model.


def test_a_saved_model_comes_back_with_its_weights_configuration_and_information(tmp_path):
    weights = trained_weights()
    history = [{"epoch": 1, "val_loss": 0.1 + 0.2}]
    save(tmp_path / "new" / "best", weights, SMALL, seed=3, history=history)
    assert files(tmp_path / "new") == ["best.json", "best.safetensors"]
    model, information = load(tmp_path / "new" / "best")
    assert not model.training
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(state[name], value), name
        assert state[name].dtype == value.dtype
    assert information["config"] == SMALL.to_dict()
    assert information["seed"] == 3
    assert information["history"] == history
    content = (tmp_path / "new" / "best.safetensors").read_bytes()
    assert information["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".json"])
def test_a_model_is_loaded_by_its_name_with_or_without_a_suffix(tmp_path, suffix):
    save(tmp_path / "epoch.40", trained_weights(), SMALL)  # a dot in the name is no suffix
    assert files(tmp_path) == ["epoch.40.json", "epoch.40.safetensors"]
    model, _ = load(str(tmp_path / f"epoch.40{suffix}"), SMALL)
    assert torch.equal(model.head[0].weight, trained_weights()["head.0.weight"])


def test_another_configuration_than_expected_is_an_error_that_names_the_difference(tmp_path):
    save(tmp_path / "best", trained_weights(), SMALL)
    expected = SMALL.replace(lr=0.5, heads=8)
    with pytest.raises(ValueError, match="another configuration than expected") as caught:
        load(tmp_path / "best", expected)
    message = str(caught.value)
    assert "heads: stored 4, asked for 8; lr: stored 0.0007, asked for 0.5" in message
    assert "hidden_channels" not in message


@pytest.mark.parametrize("position", [0, 200, -1])
def test_a_flipped_bit_is_refused(tmp_path, position):
    save(tmp_path / "best", trained_weights(), SMALL)
    path = tmp_path / "best.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"best\.safetensors: expected sha256 \w{64}, found \w{64}"
    ):
        load(tmp_path / "best")


@pytest.mark.parametrize("missing", ["best.json", "best.safetensors"])
def test_a_missing_file_is_an_error_that_names_both(tmp_path, missing):
    save(tmp_path / "best", trained_weights(), SMALL)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=r"best\.safetensors and .*best\.json"):
        load(tmp_path / "best")


@pytest.mark.parametrize("changes", [dict(hidden_channels=32), dict(num_layers=3)])
def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path, changes):
    save(tmp_path / "best", trained_weights(), SMALL.replace(**changes))
    with pytest.raises(ValueError, match="weights do not fit the configuration"):
        load(tmp_path / "best")


# The state of a training run.


def test_a_state_comes_back_exactly(tmp_path):
    write_state(tmp_path / "state", TENSORS, VALUES)
    tensors, values = read_state(tmp_path / "state")
    assert values == VALUES
    assert tensors.keys() == TENSORS.keys()
    for group, members in TENSORS.items():
        assert tensors[group].keys() == members.keys()
        for name, value in members.items():
            assert torch.equal(tensors[group][name], value)
            assert tensors[group][name].dtype == value.dtype


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[1:],
        lambda content: content.replace(b'"values"', b'"volues"'),
        lambda content: safetensors.torch.save(TENSORS["model"]),
        lambda content: safetensors.torch.save({"a": torch.ones(1)}, {"values": "{}"}),
        lambda content: safetensors.torch.save({"a/b": torch.ones(1)}, {"values": "{"}),
    ],
)
def test_a_damaged_state_is_refused_with_what_to_do(tmp_path, damage):
    path = tmp_path / "state"
    write_state(path, TENSORS, VALUES)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"state: not a training state, or damaged .*remove it"):
        read_state(path)


def test_differences_name_every_entry_that_differs_or_is_only_on_one_side():
    stored, expected = dict(a=1, b=2, c="x"), dict(a=1, b=3, d=None, e=5)
    assert differences(stored, expected) == (
        "b: stored 2, asked for 3; c: stored 'x', asked for None; e: stored None, asked for 5"
    )
    assert differences(stored, stored) == ""


# Writing whole or not at all.


def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, ["not bytes"])
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["file"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", b"new")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("text", ["{}", "[1]", "not json", '{"sha256": "", "config": {"x": 1}}'])
def test_a_description_of_something_else_is_refused(tmp_path, text):
    save(tmp_path / "best", trained_weights(), SMALL)
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(ValueError, match=r"best\.json: not the description of a checkpoint"):
        load(tmp_path / "best")
