"""Training, stopping and resuming exactly, evaluation, and BatchNorm calibration."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import few_molecules
from torch import nn

from mapkg.evaluation import calibrate_batch_norm, evaluate
from mapkg.hooks import record
from mapkg.models import build
from studies.__main__ import main
from studies.checkpoint import read_state
from studies.published import CONFIGS
from studies.train import STATE_FILE, fit, seed_all

SMALL = CONFIGS["GT-ZINC"].replace(
    hidden_channels=16, heads=4, num_layers=2, batch_size=32, max_epochs=3
)
KILL_AFTER = 60.0  # seconds to wait for the second epoch, far more than it takes


@pytest.fixture(scope="module")
def splits():
    return few_molecules(64, 32, 32)


def network(config=SMALL, seed=0):
    seed_all(seed)
    return build(config)


def run(splits, config=SMALL, *, seed=0, model=None, **settings):
    model = network(config) if model is None else model
    return fit(model, splits, config, seed=seed, progress=False, **settings)


def same_weights(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def assert_same_fit(found, expected):
    assert same_weights(found.last_weights, expected.last_weights)
    assert same_weights(found.best_weights, expected.best_weights)
    assert found.best_epoch == expected.best_epoch
    assert found.stop_reason == expected.stop_reason
    pd.testing.assert_frame_equal(
        found.history.drop(columns="seconds"),
        expected.history.drop(columns="seconds"),
        check_exact=True,
    )
    pd.testing.assert_frame_equal(found.observations, expected.observations, check_exact=True)


def watch(model, epoch):
    """An observer whose rows depend on the weights and on the mode."""
    assert not torch.is_grad_enabled()
    assert not any(module.training for module in model.modules())
    return [{"epoch": epoch, "sum": next(model.parameters()).double().sum().item()}]


class Flat(nn.Module):
    """Trains one weight, but predicts 0 in evaluation mode: nothing ever improves."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, x, edge_index, edge_attr, batch, batch_size):
        return torch.zeros(batch_size, 1) + (self.weight if self.training else 0)


def poisoned(splits, split, value, index=5):
    """The same data with one bad target."""
    graphs = list(getattr(splits, split))
    graphs[index] = graphs[index].clone()
    graphs[index].y = torch.full((1, 1), value)
    return replace(splits, **{split: graphs})


# What training gives.


def test_the_loss_falls_and_the_model_keeps_the_last_weights(splits):
    model = network()
    found = run(splits, SMALL.replace(max_epochs=12, lr=0.005), model=model)
    losses = found.history["train_loss"]
    assert losses.iloc[-1] < 0.8 * losses.iloc[0]
    assert found.history["epoch"].tolist() == list(range(1, 13))
    assert (found.history["lr"] == 0.005).all()
    assert found.stop_reason == "max epochs"
    assert same_weights(model.state_dict(), found.last_weights)
    assert not model.training


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_seed_fixes_the_run(splits, dropout):
    config = SMALL.replace(dropout=dropout)
    first, again, other = (run(splits, config, seed=seed) for seed in (0, 0, 1))
    assert_same_fit(again, first)
    assert not same_weights(other.last_weights, first.last_weights)


def test_a_run_neither_reads_nor_moves_the_global_random_state(splits):
    torch.manual_seed(1)
    model, state = network(), None
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    first = run(splits, SMALL.replace(dropout=0.1), model=model)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(3)
    model = network()
    torch.manual_seed(4)
    assert_same_fit(run(splits, SMALL.replace(dropout=0.1), model=model), first)


def test_the_best_weights_are_those_of_the_least_validation_loss(splits):
    config = SMALL.replace(max_epochs=8, lr=0.05)  # so large that the loss jumps about
    found = run(splits, config)
    losses = found.history.set_index("epoch")["val_loss"]
    assert found.best_epoch == losses.idxmin()
    model = network()
    for weights, loss in (
        (found.best_weights, losses.min()),
        (found.last_weights, losses.iloc[-1]),
    ):
        model.load_state_dict(weights)
        assert evaluate(model, splits.val, batch_size=32) == loss
    assert found.best_epoch != 8, "choose another rate: best and last are one"
    shorter = run(splits, config.replace(max_epochs=found.best_epoch))
    assert same_weights(shorter.last_weights, found.best_weights)


def test_the_training_loss_is_the_mean_over_graphs(splits):
    # The weights hardly move, and without BatchNorm the batches do not matter: 30, 30, 4 graphs.
    config = SMALL.replace(batch_norm=False, batch_size=30, lr=1e-30, min_lr=1e-40, max_epochs=1)
    model = network(config)
    expected = evaluate(model, splits.train)
    found = run(splits, config, model=model)
    assert found.history["train_loss"][0] == pytest.approx(expected, rel=1e-6)


def test_the_first_step_is_adams_with_the_configured_rate_and_decay(splits):
    # The first step of Adam moves each weight by lr against the sign of its gradient.
    config = SMALL.replace(batch_size=64, max_epochs=1, batch_norm=False)
    model = network(config)
    before = {name: value.clone() for name, value in model.named_parameters()}
    found = run(splits, config, model=model)
    moved = found.last_weights["head.4.bias"] - before["head.4.bias"]
    assert moved.abs().item() == pytest.approx(7e-4, rel=1e-3)
    unused = "layers.1.edge_block.contract.weight"  # its output goes nowhere
    assert torch.equal(found.last_weights[unused], before[unused])
    decayed = run(splits, config.replace(weight_decay=0.1))
    assert not torch.equal(
        decayed.last_weights["head.4.weight"], found.last_weights["head.4.weight"]
    )


def test_the_observer_sees_every_epoch_and_the_untrained_model(splits):
    model = network()
    initial = next(model.parameters()).double().sum().item()
    found = run(splits, model=model, observe=watch)
    assert found.observations["epoch"].tolist() == [0, 1, 2, 3]
    assert found.observations["sum"][0] == initial
    assert found.observations["sum"].nunique() == 4
    assert_same_fit(
        replace(found, observations=pd.DataFrame()), run(splits)
    )  # observation changes nothing


def test_without_epochs_the_weights_are_the_initial_ones(splits):
    config = SMALL.replace(max_epochs=0)
    found = run(splits, config, observe=watch)
    initial = network().state_dict()
    assert same_weights(found.best_weights, initial)
    assert same_weights(found.last_weights, initial)
    assert (found.best_epoch, len(found.history), len(found.observations)) == (0, 0, 1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_split_is_refused(splits, split):
    with pytest.raises(ValueError, match=f"the {split} split is empty"):
        run(replace(splits, **{split: []}))


# Stopping.


def test_the_rate_is_halved_after_the_patience_until_it_is_too_small(splits):
    config = SMALL.replace(lr=0.8, lr_patience=2, min_lr=0.15, max_epochs=100)
    found = run(splits, config, model=Flat())
    # Epoch 1 is the best; the third epoch without improvement in a row, the fourth in all, is one
    # more than the patience. Then three more each time, until 0.1 lies below 0.15.
    assert found.history["lr"].tolist() == [0.8] * 4 + [0.4] * 3 + [0.2] * 3
    assert found.stop_reason == "min lr"
    assert found.best_epoch == 1
    assert found.history["val_loss"].nunique() == 1


def test_a_rate_equal_to_the_least_one_still_trains(splits):
    config = SMALL.replace(lr=0.8, lr_patience=0, lr_factor=0.25, min_lr=0.2, max_epochs=100)
    found = run(splits, config, model=Flat())
    assert found.history["lr"].tolist() == [0.8, 0.8, 0.2]
    assert found.stop_reason == "min lr"


def test_training_stops_at_the_time_limit_and_goes_on_with_a_longer_one(splits, tmp_path):
    found = run(splits, SMALL.replace(max_hours=1e-9), folder=tmp_path)
    assert found.stop_reason == "time limit"
    assert len(found.history) == 1
    found = run(splits, SMALL.replace(max_hours=1e-9), folder=tmp_path)
    assert (found.stop_reason, len(found.history)) == ("time limit", 1)
    assert_same_fit(run(splits, folder=tmp_path), run(splits))


# Stopping and going on.


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(splits, tmp_path, dropout):
    config = SMALL.replace(dropout=dropout, max_epochs=4, lr=0.02)
    expected = run(splits, config, observe=watch)
    run(splits, config.replace(max_epochs=2), folder=tmp_path, observe=watch)
    other = network(config, seed=9)  # its weights do not matter: the state has them all
    found = run(splits, config, model=other, folder=tmp_path, observe=watch)
    assert_same_fit(found, expected)
    assert found.history["seconds"].gt(0).all()
    assert_same_fit(run(splits, config, folder=tmp_path, observe=watch), expected)


def test_the_schedule_survives_a_stop(splits, tmp_path):
    config = SMALL.replace(lr=0.8, lr_patience=2, min_lr=0.15, max_epochs=100)
    expected = run(splits, config, model=Flat())
    for epochs in (3, 5, 100):
        found = run(splits, config.replace(max_epochs=epochs), model=Flat(), folder=tmp_path)
    assert_same_fit(found, expected)


def test_a_resumed_run_says_so(splits, tmp_path, capsys):
    run(splits, SMALL.replace(max_epochs=1), folder=tmp_path)
    assert "resumed" not in capsys.readouterr().err
    run(splits, SMALL.replace(max_epochs=2), folder=str(tmp_path))
    assert f"resumed after epoch 1 from {tmp_path / STATE_FILE}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "seed", "limit", "difference"),
    [
        (dict(lr=0.5), 0, 64, "lr: stored 0.0007, asked for 0.5"),
        (dict(dropout=0.5), 0, 64, "dropout: stored 0.0, asked for 0.5"),
        ({}, 1, 64, "seed: stored 0, asked for 1"),
        (dict(seed=5), 0, 64, "config.seed: stored 41, asked for 5"),
        ({}, 0, 63, "train: stored 64, asked for 63"),
    ],
    ids=["rate", "dropout", "seed", "seed of the configuration", "data"],
)
def test_the_state_of_another_run_is_refused_with_the_difference(
    splits, tmp_path, changes, seed, limit, difference
):
    run(splits, SMALL.replace(max_epochs=1), folder=tmp_path)
    before = (tmp_path / STATE_FILE).read_bytes()
    less = replace(splits, train=splits.train[:limit])
    with pytest.raises(ValueError, match="holds the state of another run") as caught:
        run(less, SMALL.replace(**changes), seed=seed, folder=tmp_path)
    assert f": {difference}. Choose another folder" in str(caught.value)
    assert (tmp_path / STATE_FILE).read_bytes() == before


def test_the_state_of_a_run_on_other_data_is_refused(splits, tmp_path):
    run(splits, SMALL.replace(max_epochs=1), folder=tmp_path)
    other = replace(splits, description=replace(splits.description, title="another"))
    with pytest.raises(ValueError, match="data: stored 'MOSES sample', asked for 'another'"):
        run(other, folder=tmp_path)


def test_a_damaged_state_is_refused(splits, tmp_path):
    run(splits, SMALL.replace(max_epochs=1), folder=tmp_path)
    path = tmp_path / STATE_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"not a training state, or damaged .* start afresh"):
        run(splits, folder=tmp_path)


@pytest.mark.slow
def test_a_killed_process_goes_on_as_if_nothing_had_happened(tmp_path):
    epochs = 25
    arguments = ["train", "--config", "GT-ZINC", "--dataset", "moses", "--limit", "64"]
    for setting in (
        "hidden_channels=16",
        "heads=4",
        "num_layers=2",
        "batch_size=32",
        "dropout=0.1",
    ):
        arguments += ["--set", setting]
    arguments += ["--epochs", str(epochs), "--threads", "1", "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    state = killed / STATE_FILE

    def finished_epochs():
        return read_state(state)[1]["progress"]["epoch"] if state.is_file() else 0

    command = [sys.executable, "-m", "studies", *arguments, str(killed)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + KILL_AFTER
            while finished_epochs() < 2:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.005)
        finally:
            process.kill()  # SIGKILL: nothing is cleaned up
            process.wait()
    assert 2 <= finished_epochs() < epochs
    assert not (killed / "last.safetensors").exists()

    threads = torch.get_num_threads()
    try:
        assert main([*arguments, str(killed)]) == 0
        assert main([*arguments, str(whole)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert finished_epochs() == epochs
    for name in ("base", "best", "last"):
        found, expected = (folder / f"{name}.safetensors" for folder in (killed, whole))
        assert found.read_bytes() == expected.read_bytes(), name
    histories = [
        [
            {key: value for key, value in row.items() if key != "seconds"}
            for row in json.loads((folder / "last.json").read_text())["history"]
        ]
        for folder in (killed, whole)
    ]
    assert len(histories[0]) == epochs
    assert histories[0] == histories[1]
    for table in ("summary", "trajectory", "graph_maxima", "histogram"):
        found, expected = (
            pd.read_csv(folder / f"{table}.csv.gz").drop(columns="commit")
            for folder in (killed, whole)
        )
        pd.testing.assert_frame_equal(found, expected, check_exact=True)


# Losses that are not finite.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_training_loss_that_is_not_finite_names_its_step_and_keeps_the_last_epoch(
    splits, tmp_path, value
):
    config = SMALL.replace(batch_size=16, max_epochs=4)
    run(splits, config.replace(max_epochs=2), folder=tmp_path)
    model, calls = network(config), []
    with (
        pytest.raises(FloatingPointError) as caught,
        record(model, "", reduce=lambda name, x: calls.append(name)),
    ):
        run(poisoned(splits, "train", value), config, model=model, folder=tmp_path)
    message = str(caught.value)
    assert f"the training loss is {value} at epoch 3, step {len(calls)};" in message
    assert f"epoch 2 is kept in {tmp_path / STATE_FILE}" in message
    assert "lr=0.0007" in message
    assert_same_fit(run(splits, config, folder=tmp_path), run(splits, config))


def test_a_loss_that_is_not_finite_at_once_leaves_nothing(splits, tmp_path):
    bad = poisoned(splits, "train", float("nan"))
    for folder in (None, tmp_path):
        with pytest.raises(FloatingPointError, match=r"at epoch 1, step .*none is kept"):
            run(bad, folder=folder)
    assert not list(tmp_path.iterdir())


def test_a_validation_loss_that_is_not_finite_does_not_replace_the_last_good_state(
    splits, tmp_path
):
    run(splits, SMALL.replace(max_epochs=2), folder=tmp_path)
    bad = poisoned(splits, "val", float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"validation loss is nan at epoch 3; .*epoch 2 is"
    ):
        run(bad, folder=tmp_path)
    assert_same_fit(run(splits, folder=tmp_path), run(splits))


# Evaluation.


def test_evaluation_agrees_with_a_loop_over_graphs(splits):
    model = network().double()
    nn.init.uniform_(model.layers[0].node_block.batch_norm1.running_var, 0.5, 2)
    model.eval()
    errors = [abs(model(g.x, g.edge_index, g.edge_attr).item() - g.y.item()) for g in splits.train]
    expected = sum(errors) / len(errors)
    for batch_size in (1, 7, 64, 1000):
        found = evaluate(model, splits.train, batch_size=batch_size)
        assert found == pytest.approx(expected, rel=1e-12)


# BatchNorm calibration.


@pytest.mark.parametrize("batch_size", [64, 32])
def test_calibration_sets_the_statistics_to_those_of_the_data(splits, batch_size):
    model = network(SMALL.replace(dropout=0.5))
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm1d)}
    assert len(norms) == 8
    inputs = {name: [] for name in norms}
    for name, norm in norms.items():
        nn.init.normal_(norm.running_mean)  # statistics of before, to be forgotten
        norm.num_batches_tracked.fill_(7)
        norm.momentum = 0.3
        norm.register_forward_pre_hook(lambda _, x, name=name: inputs[name].append(x[0].double()))
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.train()
    found = calibrate_batch_norm(model, splits.train, batch_size=batch_size)
    assert found is model
    assert same_weights(dict(model.named_parameters()), before)
    for name, norm in norms.items():
        assert norm.momentum == 0.3
        assert len(inputs[name]) == 64 // batch_size
        mean = torch.stack([x.mean(dim=0) for x in inputs[name]]).mean(dim=0)
        squares = [((x - x.mean(dim=0)) ** 2).sum(dim=0) / (len(x) - 1) for x in inputs[name]]
        variance = torch.stack(squares).mean(dim=0)
        close = dict(check_dtype=False, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_mean, mean, **close)
        torch.testing.assert_close(norm.running_var, variance, **close)


def test_the_first_norm_sees_what_the_embeddings_and_attention_give_it(splits):
    # The first BatchNorm's input, from the layer's own parts in evaluation mode.
    model = calibrate_batch_norm(network(), splits.train, batch_size=64).eval()
    layer, rows = model.layers[0], []
    with torch.no_grad():
        for graph in splits.train:
            x = model.node_embedding(graph.x)
            attended, _ = layer.attention(
                x, graph.edge_index, model.edge_embedding(graph.edge_attr)
            )
            rows.append(x + layer.node_block.project(attended))
    rows = torch.cat(rows)
    norm = layer.node_block.batch_norm1
    torch.testing.assert_close(norm.running_mean, rows.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, rows.var(dim=0), rtol=1e-4, atol=1e-5)


def test_calibration_needs_no_norms(splits):
    model = network(SMALL.replace(batch_norm=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert same_weights(calibrate_batch_norm(model, splits.train).state_dict(), before)
