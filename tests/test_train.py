"""One trainer for graphs, nodes and trees: its steps, its stops, and going on exactly."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import SMALL_CITATION, few_molecules
from torch import nn

from mapkg.evaluation import evaluate
from mapkg.hooks import record
from mapkg.models import build
from studies.__main__ import main
from studies.checkpoint import read_state
from studies.data import NodesOfGraph, load
from studies.data.networks import citation_like
from studies.data.trees import level_order
from studies.deep import DeepNetwork, Variant, gradient_norms
from studies.published import CONFIGS
from studies.schedule import Schedule
from studies.tasks import (
    TREES,
    Examples,
    GraphTask,
    NodeTask,
    TreeTask,
    hide_features,
)
from studies.train import STATE_FILE, fit, seed_all
from studies.tree_networks import TreeNetwork

SMALL = CONFIGS["GT-ZINC"].replace(
    hidden_channels=16, heads=4, num_layers=2, batch_size=32, max_epochs=3
)
NODES = Schedule(epochs=5, lr=0.01)
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


# All tasks alike.


@pytest.fixture(scope="module")
def trees(cache):
    return {depth: load(f"trees-{depth}") for depth in (2, 3)}


def node_network(seed=0, layers=2, **options):
    torch.manual_seed(seed)
    return DeepNetwork(Variant(hidden_channels=8, heads=2, **options), layers, 40, 3)


def small_trees(kind="gat", depth=2, seed=0, **options):
    torch.manual_seed(seed)
    return TreeNetwork(kind, depth, channels=8, **options)


@pytest.fixture(params=["graphs", "graphs without dropout", "nodes", "gradients", "trees"])
def case(request, splits, papers, trees):
    """What gives a network, a task, a schedule of four epochs whose rate falls, an observer."""
    config = SMALL.replace(dropout=0.1, lr=0.02, lr_patience=0, max_epochs=4)
    if request.param == "graphs":
        return network, GraphTask(splits, config), Schedule.of(config), watch
    if request.param == "graphs without dropout":
        config = config.replace(dropout=0.0)
        return network, GraphTask(splits, config), Schedule.of(config), None
    if request.param == "trees":
        schedule = replace(TREES, epochs=4, block=1, batch_size=20, lr=1e-9, lr_patience=0)
        return small_trees, TreeTask(trees[2]), schedule, watch
    schedule = Schedule(epochs=4, lr=0.5, lr_patience=0)
    if request.param == "nodes":
        return node_network, NodeTask(papers), schedule, watch
    return node_network, NodeTask(papers, evaluate=False), schedule, gradient_norms


def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(case, tmp_path, capsys):
    make, task, schedule, observe = case
    settings = dict(seed=3, observe=observe, progress=False)
    torch.manual_seed(8)
    before = torch.get_rng_state()
    model = make()
    torch.set_rng_state(before)
    expected = fit(model, task, schedule, **settings)
    assert torch.equal(torch.get_rng_state(), before), "training leaves the random state alone"
    assert expected.stop_reason == "max epochs" and not model.training
    assert same_weights(model.state_dict(), expected.last_weights)
    assert expected.history["epoch"].tolist() == [1, 2, 3, 4]
    assert expected.history["seconds"].gt(0).all()

    torch.manual_seed(9)
    settings["folder"] = tmp_path
    fit(make(), task, replace(schedule, epochs=1), **settings)
    assert "resumed" not in capsys.readouterr().err
    hours = replace(schedule, max_hours=1e-12)
    assert fit(make(), task, hours, **settings).stop_reason == "time limit"
    fit(make(), task, replace(schedule, epochs=3), **settings)
    other = make(seed=9)  # its weights do not matter: the state has them all
    assert_same_fit(fit(other, task, schedule, **settings), expected)
    assert f"resumed after epoch 3 from {tmp_path / STATE_FILE}" in capsys.readouterr().err
    assert_same_fit(fit(make(), task, schedule, **settings), expected)
    content = (tmp_path / STATE_FILE).read_bytes()
    for changes, message in ((dict(seed=4), "seed: stored 3, asked for 4"), ({}, "lr: stored")):
        with pytest.raises(ValueError, match=f"holds the state of another run: {message}"):
            other = schedule if changes else replace(schedule, lr=schedule.lr / 2)
            fit(make(), task, other, **settings | changes)
    assert (tmp_path / STATE_FILE).read_bytes() == content


def test_the_seed_fixes_the_run(case):
    make, task, schedule, observe = case
    first, again, other = (
        fit(make(), task, schedule, seed=seed, observe=observe, progress=False)
        for seed in (1, 1, 2)
    )
    assert_same_fit(again, first)
    assert not same_weights(other.last_weights, first.last_weights)


def test_what_cannot_be_trained_on_is_refused(splits, papers, trees):
    with pytest.raises(ValueError, match=r"expected a Config, .* MOSES sample is neither nodes"):
        fit(network(), splits, NODES)
    for name in ("train", "val"):
        with pytest.raises(ValueError, match=f"the {name} split is empty"):
            run(replace(splits, **{name: []}))
    empty = replace(papers, train=NodesOfGraph(papers.train.graph, torch.tensor([]).long()))
    with pytest.raises(ValueError, match="train split is empty"):
        fit(node_network(), empty, NODES)
    with pytest.raises(ValueError, match="epochs: expected 1 or more, got 0"):
        fit(node_network(), papers, Schedule(epochs=0))
    with pytest.raises(ValueError, match="depth 2, with 7 nodes, got 15 nodes"):
        fit(small_trees(), trees[3], TREES, progress=False)
    with pytest.raises(ValueError, match=r"expected Trees, as load.* gives them, got NodesOfGraph"):
        TreeTask(papers)
    with pytest.raises(ValueError, match=r"sampling: expected one of .* got 'by-key'"):
        TreeTask(trees[2], "by-key")
    with pytest.raises(ValueError, match="only networks for graphs"):
        fit(node_network, papers, NODES, seeds=range(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(epochs=-1), "epochs: expected 0 or more, got -1"),
        (dict(batch_size=0), "batch_size: expected 1 or more, got 0"),
        (dict(lr=0.0), r"lr: expected a value above 0, got 0\.0"),
        (dict(lr_factor=1.0), r"lr_factor: expected a value in \(0, 1\), got 1\.0"),
    ],
)
def test_a_schedule_that_is_none_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**options)


# Graphs.


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


def test_the_rate_is_halved_after_the_patience_until_it_is_too_small(splits):
    config = SMALL.replace(lr=0.8, lr_patience=2, min_lr=0.15, max_epochs=100)
    found = run(splits, config, model=Flat())
    # Epoch 1 is the best; the third epoch without improvement in a row, the fourth in all, is one
    # more than the patience. Then three more each time, until 0.1 lies below 0.15.
    assert found.history["lr"].tolist() == [0.8] * 4 + [0.4] * 3 + [0.2] * 3
    assert found.stop_reason == "min lr"
    assert found.best_epoch == 1
    assert found.history["val_loss"].nunique() == 1


@pytest.mark.parametrize(
    ("changes", "seed", "limit", "difference"),
    [
        (dict(lr=0.5), 0, 64, "lr: stored 0.0007, asked for 0.5"),
        (dict(dropout=0.5), 0, 64, "dropout: stored 0.0, asked for 0.5"),
        ({}, 1, 64, "seed: stored 0, asked for 1"),
        ({}, 0, 63, "train: stored 64, asked for 63"),
    ],
    ids=["rate", "dropout", "seed", "data"],
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


# Nodes of a graph.


def test_nodes_take_the_steps_of_a_loop_written_out(papers):
    found = node_network(dropout=0.0, attention_dropout=0.0)
    expected = node_network(dropout=0.0, attention_dropout=0.0)
    history = fit(found, papers, NODES, progress=False).history
    graph, train = papers.train.graph, papers.train.nodes
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.01, weight_decay=5e-4)
    for row in history.itertuples():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(
            expected(graph.x, graph.edge_index)[train], graph.y[train]
        )
        assert row.train_loss == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            right = expected(graph.x, graph.edge_index).argmax(1) == graph.y
        assert row.test_accuracy == pytest.approx(right[papers.test.nodes].double().mean().item())
        assert row.val_accuracy == pytest.approx(right[papers.val.nodes].double().mean().item())
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value)


def test_training_ends_when_the_rate_has_died_and_going_on_would_change_nothing(papers):
    settings = dict(epochs=120, lr=0.01, lr_patience=3)
    found, longer = node_network(seed=1), node_network(seed=1)
    short = fit(found, papers, Schedule(**settings), progress=False)
    long = fit(longer, papers, Schedule(**settings, min_lr=0.0), progress=False)
    assert (short.stop_reason, long.stop_reason) == ("min lr", "max epochs")
    ended = len(short.history)
    assert ended < 100 and long.history["lr"].iloc[ended] < 1e-6 <= short.history["lr"].iloc[-1]
    pd.testing.assert_frame_equal(
        *(run.history.head(ended).drop(columns="seconds") for run in (short, long))
    )
    for name, value in longer.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=1e-4)
    assert short.history["test_accuracy"].iloc[-1] > 0.6 > short.history["test_accuracy"].iloc[0]


def test_without_validation_or_patience_the_rate_stays(papers):
    schedule = Schedule(epochs=10, lr=0.5, lr_patience=0)
    assert fit(node_network(), papers, schedule, progress=False).history["lr"].min() < 0.1
    found = fit(node_network(), NodeTask(papers, evaluate=False), schedule, progress=False)
    assert set(found.history) == {"epoch", "train_loss", "lr", "seconds"}
    constant = fit(node_network(), papers, replace(schedule, lr_patience=None), progress=False)
    assert set(constant.history["lr"]) == set(found.history["lr"]) == {0.5}


def test_gradients_are_observed_after_every_epoch_in_every_layer(papers):
    found = fit(node_network(layers=3), papers, NODES, observe=gradient_norms, progress=False)
    assert len(found.observations) == 5 * 3 * 2
    by_epoch = found.observations.groupby(["epoch", "kind"])["layer"].agg(list)
    assert by_epoch.map(len).eq(3).all()


def test_a_loss_of_nodes_that_is_not_finite_ends_the_training_and_is_kept(papers):
    model = node_network()
    with torch.no_grad():
        model.head.weight.fill_(math.inf)
    found = fit(model, papers, NODES, progress=False)
    assert (found.stop_reason, len(found.history)) == ("not finite", 1)
    first = (papers.train.graph.y[papers.test.nodes] == 0).double().mean().item()
    assert found.history["test_accuracy"].item() == pytest.approx(first)


def test_hidden_features_are_zero_outside_the_training_nodes(papers):
    graph = papers.train.graph
    outside = torch.ones(300, dtype=torch.bool)
    outside[papers.train.nodes] = False
    for rate in (0.0, 0.25, 1.0):
        hidden = hide_features(papers, rate, seed=1)
        changed = (hidden.train.graph.x != graph.x).any(1)
        assert not changed[papers.train.nodes].any()
        assert int(changed.sum()) == round(rate * int(outside.sum()))
        assert (hidden.test.graph.x[changed] == 0).all()
        assert f"{rate:.0%} missing" in hidden.description.title
    assert torch.equal(graph.x, citation_like(0, **SMALL_CITATION).x), "the original is as it was"
    one, same, other = (hide_features(papers, 0.5, seed=s).test.graph.x for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    with pytest.raises(ValueError, match=r"rate: expected a share in \[0, 1\], got 1\.5"):
        hide_features(papers, 1.5)


# Trees.


@pytest.mark.parametrize("sampling", ["shuffled", "grouped"])
@pytest.mark.parametrize(("kind", "norm"), [("gat", "layer"), ("gin", "none"), ("gcn", "pair")])
def test_trees_take_the_steps_of_a_loop_written_out(trees, kind, norm, sampling):
    found, expected = (small_trees(kind, norm=norm).double() for _ in range(2))
    schedule, task = replace(TREES, epochs=3, block=2, batch_size=20), TreeTask(trees[2], sampling)
    run = fit(found, task, schedule, seed=5, progress=False)
    train, examples, right = trees[2].train, Examples(trees[2].train), []
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-3)
    torch.manual_seed(5)
    for _ in range(3):
        right.append(0)
        for chosen in examples.batches(20, sampling):
            scores = expected.dense(train.pairs[chosen][:, level_order(2)])
            right[-1] += int((scores.argmax(1) == train.y[chosen]).sum())
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores, train.y[chosen]).backward()
            optimizer.step()
    assert run.history["epoch"].tolist() == [2, 3]
    accuracies = [sum(right[:2]) / 152, right[2] / 76]
    assert run.history["train_accuracy"].tolist() == pytest.approx(accuracies)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, msg=name)
    expected.eval()
    for part, accuracy in task.accuracies(found).items():
        rows = getattr(trees[2], part.removesuffix("_accuracy"))
        scores = expected.dense(rows.pairs[:, level_order(2)])
        assert accuracy == pytest.approx((scores.argmax(1) == rows.y).double().mean().item())


def test_an_epoch_has_every_example_once_and_grouped_batches_few_permutations(trees):
    examples = Examples(trees[3].train)
    leaves = examples.pairs[:, -8:, 1]
    for group in (0, 7, 900):
        assert len(leaves[examples.group == group].unique(dim=0)) == 1
    assert int(examples.group.max()) == 999
    number = {}
    for sampling in ("grouped", "shuffled"):
        torch.manual_seed(0)
        first, second = (list(examples.batches(256, sampling)) for _ in range(2))
        for batches in (first, second):
            assert torch.cat(batches).sort().values.tolist() == list(range(6400))
            assert {len(batch) for batch in batches} == {256}
        assert not torch.equal(first[0], second[0])
        number[sampling] = len(examples.group[first[0]].unique())
    # 6.4 keys of a permutation are for training, so that 40 of them or a few more make a batch.
    assert 35 <= number["grouped"] <= 46 and number["shuffled"] > 200


def test_trees_are_done_when_everything_is_right_or_nothing_more_is_gained(trees):
    torch.manual_seed(0)
    fast = replace(TREES, epochs=2000, batch_size=64, lr=0.005, patience=400)
    run = fit(TreeNetwork("ggnn", 2), trees[2], fast, progress=False)
    assert run.stop_reason == "solved" and run.history["epoch"].iloc[-1] < 2000
    assert run.history["train_accuracy"].iloc[-1] == 1
    still = replace(TREES, epochs=2000, lr=1e-12, patience=3, block=1)
    run = fit(small_trees(), trees[2], still, progress=False)
    assert (run.stop_reason, len(run.history)) == ("plateau", 4)  # the first gains on nothing
    slow = replace(TREES, epochs=6, lr=1e-12, block=1, lr_patience=1)
    run = fit(small_trees(), trees[2], slow, progress=False)
    assert run.history["lr"].tolist() == pytest.approx([1e-12] * 3 + [5e-13] * 2 + [2.5e-13])
