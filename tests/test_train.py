"""One trainer for graphs, nodes and trees: its steps, its stops, and going on exactly."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import SMALL_CITATION
from torch import nn
from torch_geometric.data import Data

from mapkg.evaluation import evaluate
from mapkg.models import build
from studies.data import SPLITS, NodesOfGraph, load
from studies.data.networks import citation_like, level_order
from studies.deep import DeepNetwork, Variant, gradient_norms
from studies.neighbors_match import TreeNetwork
from studies.published import CONFIGS, Schedule
from studies.tasks import TREES, Examples, GraphTask, NodeTask, TreeTask, hide_features
from studies.train import STATE_FILE, fit, seed_all

SMALL = CONFIGS["GT-ZINC"].replace(
    hidden_channels=16, heads=4, num_layers=2, batch_size=32, max_epochs=3
)
NODES = Schedule(epochs=5, lr=0.01)


@pytest.fixture(scope="module")
def trees(cache):
    return {depth: load(f"trees-{depth}") for depth in (2, 3)}


def network(config=SMALL, seed=0):
    seed_all(seed)
    return build(config)


def node_network(seed=0, **options):
    torch.manual_seed(seed)
    return DeepNetwork(Variant(hidden_channels=8, heads=2, **options), 2, 40, 3)


def small_trees(kind="gat", seed=0, **options):
    torch.manual_seed(seed)
    return TreeNetwork(kind, 2, channels=8, **options)


def run(splits, config=SMALL, *, model=None, **settings):
    return fit(model or network(config), splits, config, progress=False, **settings)


def same_weights(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def assert_same_fit(found, expected):
    for name in ("last_weights", "best_weights"):
        assert same_weights(getattr(found, name), getattr(expected, name))
    for name in ("best_epoch", "stop_reason"):
        assert getattr(found, name) == getattr(expected, name)
    histories = (fit.history.drop(columns="seconds") for fit in (found, expected))
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    pd.testing.assert_frame_equal(found.observations, expected.observations, check_exact=True)


def watch(model, epoch):
    """An observer whose rows depend on the weights and on the mode."""
    assert not torch.is_grad_enabled()
    assert not any(module.training for module in model.modules())
    return [{"epoch": epoch, "sum": next(model.parameters()).double().sum().item()}]


class Given(nn.Module):
    """Trains one weight, but predicts what it is told: in evaluation mode, and in training NaN."""

    def __init__(self, values=(0.0,), bad_step=None):
        super().__init__()
        self.weight, self.values = nn.Parameter(torch.tensor(1.0)), list(values)
        self.steps, self.bad_step = 0, bad_step

    def forward(self, x, edge_index, edge_attr, batch, batch_size):
        if self.training:
            self.steps += 1
            value = math.nan if self.steps == self.bad_step else 0.0
            return torch.full((batch_size, 1), value) + self.weight
        value = self.values.pop(0) if len(self.values) > 1 else self.values[0]
        return torch.full((batch_size, 1), value)


@pytest.fixture(params=["graphs", "nodes", "gradients", "trees"])
def case(request, splits, papers, trees):
    """What gives a network, a task, a schedule of four epochs whose rate falls, an observer."""
    config = SMALL.replace(dropout=0.1, lr=0.02, lr_patience=0, max_epochs=4)
    config = config.replace(num_node_types=(28,), num_edge_types=(4,))  # JSON knows no tuples
    quick = replace(TREES, epochs=4, block=1, batch_size=20, lr=1e-9, lr_patience=0)
    falling = Schedule(epochs=4, lr=0.5, lr_patience=0)
    return {
        "graphs": (network, GraphTask(splits, config), Schedule.of(config), watch),
        "trees": (small_trees, TreeTask(trees[2]), quick, None),
        "nodes": (node_network, NodeTask(papers), falling, watch),
        "gradients": (node_network, NodeTask(papers, evaluate=False), falling, gradient_norms),
    }[request.param]


def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(case, tmp_path, capsys):
    make, task, schedule, observe = case
    settings = dict(seed=3, observe=observe, progress=False)
    model = make()
    before = torch.get_rng_state()
    expected = fit(model, task, schedule, **settings)
    assert torch.equal(torch.get_rng_state(), before), "training leaves the random state alone"
    assert expected.stop_reason == "max epochs" and not model.training
    assert same_weights(model.state_dict(), expected.last_weights)
    assert expected.history["epoch"].tolist() == [1, 2, 3, 4]
    assert expected.history["seconds"].gt(0).all()
    other = fit(make(), task, schedule, **settings | dict(seed=4))
    assert not same_weights(other.last_weights, expected.last_weights)

    settings["folder"] = tmp_path
    fit(make(), task, replace(schedule, epochs=1), **settings)
    hours = replace(schedule, max_hours=1e-12)
    assert fit(make(), task, hours, **settings).stop_reason == "time limit"
    fit(make(), task, replace(schedule, epochs=3), **settings)
    for _ in range(2):  # weights of another seed do not matter: the state has them all
        assert_same_fit(fit(make(seed=9), task, schedule, **settings), expected)
    assert f"resumed after epoch 3 from {tmp_path / STATE_FILE}" in capsys.readouterr().err
    content = (tmp_path / STATE_FILE).read_bytes()
    for seed, changed, message in (
        (4, schedule, "holds the state of another run: seed: stored 3, asked for 4. Choose"),
        (3, replace(schedule, lr=schedule.lr / 2), "holds the state of another run: lr: stored"),
        (3, replace(schedule, epochs=3), "holds 4 epochs, more than the 3 asked for"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(make(), task, changed, **settings | dict(seed=seed))
    assert (tmp_path / STATE_FILE).read_bytes() == content
    (tmp_path / STATE_FILE).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"damaged, .* remove it to start afresh"):
        fit(make(), task, schedule, **settings)


def test_what_cannot_be_trained_on_is_refused(splits, papers, trees):
    empty = replace(papers, train=NodesOfGraph(papers.train.graph, torch.tensor([]).long()))
    lazy = replace(splits, train=(graph for graph in splits.train))
    for message, call in {
        "expected a Config, which names the loss of graphs.*": lambda: fit(network, splits, NODES),
        "expected a Schedule for nodes, .* got Config": lambda: run(papers),
        "train: expected a list of graphs, .* got generator": lambda: run(lazy),
        "train: .* got Data": lambda: run(replace(splits, train=splits.train[0])),
        "the val split is empty": lambda: run(replace(splits, val=[])),
        "the train split is empty": lambda: fit(node_network(), empty, NODES),
        "epochs: expected 1 or more": lambda: fit(node_network(), papers, Schedule(epochs=0)),
        "depth 2, with 7 nodes, got 15": lambda: fit(small_trees(), trees[3], progress=False),
        "expected Trees, as load.*, got NodesOfGraph": lambda: TreeTask(papers),
        "sampling: expected one of": lambda: TreeTask(trees[2], "group"),
        "trained one after the other, with seed=": lambda: fit(
            node_network, papers, NODES, seeds=range(2)
        ),
        "batch_size: expected 1 or more, got 0": lambda: Schedule(batch_size=0),
        r"lr: expected a value above 0, got 0\.0": lambda: Schedule(lr=0.0),
        r"lr: expected min_lr, 0\.1, or more, got 0\.05": lambda: Schedule(lr=0.05, min_lr=0.1),
        "lr: expected min_lr, 2, or more": lambda: run(splits, SMALL.replace(min_lr=2), seeds=[0]),
        r"lr_factor: expected a value in \(0, 1\)": lambda: Schedule(lr_factor=1.0),
        r"rate: expected a share in \[0, 1\]": lambda: hide_features(papers, 1.1),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


ENDS = torch.tensor([[0, 1], [1, 0]])
BAD_GRAPHS = [  # what a graph has instead, and what is said of it
    (dict(x=torch.tensor([0, 28])), r"x: expected ids from 0, fewer than \[28\], got \[0\] to \[2"),
    (dict(x=torch.tensor([0, -1])), r"x: .* got \[-1\] to \[0\]"),
    (dict(x=torch.tensor([[0, 1], [1, 0]])), "x: expected 1 ids per row, got 2"),
    (dict(x=torch.full((2, 28), math.nan)), "x: expected finite values"),
    (dict(x=torch.zeros(2, 28)), r"x: .* got torch.float32 of shape \['rows', 28\]"),
    (dict(x=None, num_nodes=2), "x: expected torch.int64 .* as in the first graph, got None"),
    (dict(edge_attr=torch.tensor([0, 4])), r"edge_attr: .* fewer than \[4\]"),
    (dict(edge_attr=torch.tensor([0])), "edge_attr: expected a row for each of 2, got 1"),
    (dict(edge_index=ENDS.int()), "edge_index: expected int64 .* got torch.int32"),
    (dict(edge_index=torch.zeros(3, 2).long()), r"edge_index: .* of shape \[3, 2\]"),
    (dict(edge_index=ENDS - 1), "edge_index: expected nodes from 0 to 1, got -1 to 0"),
    (dict(edge_index=ENDS + 1), "edge_index: .* got 1 to 2"),
    (dict(y=None), r"no target y, of shape \[1, 1\]"),
    (dict(y=torch.zeros(1)), r"y: expected floats of shape \[1, 1\], got .* \[1\]"),
    (dict(y=torch.tensor([[True]])), r"y: .* got torch.bool .* convert with \.float"),
    (dict(y="high"), r"y: .* got str"),
    (dict(y=torch.tensor([[1e39]]).double()), r"y: expected finite targets, got \[inf\]"),
    (dict(y=torch.tensor([[math.nan]])), r"y: expected finite targets, got \[nan\]"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_GRAPHS)
def test_a_graph_that_does_not_fit_is_named_before_training(splits, changes, message):
    pair = dict(x=torch.tensor([0, 1]), edge_index=ENDS, edge_attr=torch.tensor([1, 1]))
    for split in ("train", "val"):
        graphs = list(getattr(splits, split))
        graphs[5] = Data(**{**graphs[5].to_dict(), **pair, **changes})
        with pytest.raises(ValueError, match=f"{split} graph 5: {message}"):
            run(replace(splits, **{split: graphs}))
    bare = [Data(**{**graph.to_dict(), "edge_attr": None}) for graph in splits.train]
    without = GraphTask(replace(splits, train=bare, val=bare), SMALL)
    assert not [*without.faults()], "not every network needs them"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(y=torch.zeros(300)), r"y: expected a class .* of shape \[300\], got torch.float"),
        (dict(y=torch.full((300,), 3)), "y: expected classes from 0 to 2, got 3 to 3"),
        (dict(x=torch.zeros(299, 40)), "x: expected a row for each of 300, got 299"),
        (dict(edge_index=ENDS + 299), "edge_index: expected nodes from 0 to 299, got 299 to 300"),
        (dict(last=300), "test: expected nodes from 0 to 299, got up to 300"),
    ],
)
def test_nodes_that_do_not_fit_are_refused(papers, changes, message):
    last = torch.tensor([changes.pop("last", 0)])
    graph = Data(**{**papers.train.graph.to_dict(), **changes, "num_nodes": 300})
    parts = {name: NodesOfGraph(graph, getattr(papers, name).nodes) for name in SPLITS}
    with pytest.raises(ValueError, match=message):
        fit(node_network(), replace(papers, **parts | {"test": NodesOfGraph(graph, last)}), NODES)


def test_the_best_weights_are_those_of_the_least_validation_loss(splits):
    config = SMALL.replace(max_epochs=8, lr=0.05)  # so large that the loss jumps about
    found = run(splits, config)
    losses = found.history.set_index("epoch")["val_loss"]
    assert found.best_epoch == losses.idxmin() != 8, "choose another rate: best and last are one"
    model = network()
    for weights, loss in ((found.best_weights, losses.min()), (found.last_weights, losses[8])):
        model.load_state_dict(weights)
        assert evaluate(model, splits.val, batch_size=32) == loss


def test_the_loss_is_the_mean_over_graphs(splits):
    # Without BatchNorm the batches do not matter, here 30, 30 and 4 graphs.
    config = SMALL.replace(batch_norm=False, batch_size=30, lr=1e-30, min_lr=1e-40, max_epochs=1)
    still = run(splits, config).history["train_loss"][0]
    assert still == pytest.approx(evaluate(network(config), splits.train), rel=1e-6)


def test_the_observer_sees_every_epoch_and_the_untrained_model_and_changes_nothing(splits):
    model = network()
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    found = run(splits, model=model, observe=watch)
    assert found.observations["epoch"].tolist() == [0, 1, 2, 3]
    assert found.observations["sum"].nunique() == 4
    assert_same_fit(replace(found, observations=pd.DataFrame()), run(splits))
    none = run(splits, SMALL.replace(max_epochs=0), observe=watch)
    assert none.observations["sum"].tolist() == found.observations["sum"].head(1).tolist()
    assert same_weights(none.best_weights, initial) and same_weights(none.last_weights, initial)
    assert (none.best_epoch, len(none.history)) == (0, 0)


def test_the_rate_is_halved_after_the_patience_until_it_is_too_small(splits):
    config = SMALL.replace(lr=0.8, lr_patience=2, min_lr=0.15, max_epochs=100)
    found = run(splits, config, model=Given())
    # Epoch 1 is the best; the third epoch without improvement in a row, the fourth in all, is one
    # more than the patience. Then three more each time, until 0.1 lies below 0.15.
    assert found.history["lr"].tolist() == [0.8] * 4 + [0.4] * 3 + [0.2] * 3
    assert (found.stop_reason, found.best_epoch) == ("min lr", 1)
    tiny = config.replace(lr=3e-8, min_lr=1e-9, lr_patience=0)  # halved below 1e-8, too
    lrs = run(splits, tiny, model=Given()).history["lr"].tolist()
    assert lrs == [3e-8 / 2 ** max(epoch - 1, 0) for epoch in range(6)]


def test_a_fall_by_less_than_a_ten_thousandth_is_no_progress_but_gives_the_best_weights(splits):
    graphs = [graph.clone() for graph in splits.val]
    for graph in graphs:
        graph.y = torch.zeros(1, 1)
    data = replace(splits, val=graphs)  # the loss is what the model predicts
    config = SMALL.replace(lr=0.8, lr_patience=1, max_epochs=4)
    for step, lrs in ((0.5e-4, [0.8, 0.8, 0.8, 0.4]), (2e-4, [0.8] * 4)):
        losses = [1000 * (1 - step * epoch) for epoch in range(4)]
        found = run(data, config, model=Given(losses))
        assert found.history["lr"].tolist() == lrs, "of the least loss so far, not in itself"
        assert found.best_epoch == 4
        assert found.history["val_loss"].tolist() == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize(
    ("which", "given"),
    [("training", Given(bad_step=1)), ("validation", Given([math.inf]))],
)
def test_a_loss_that_is_not_finite_names_its_epoch_and_keeps_the_last(
    splits, tmp_path, which, given
):
    run(splits, SMALL.replace(max_epochs=2), model=Given(), folder=tmp_path)
    message = (
        f"the {which} loss is (nan|inf) at epoch 3.*; last good checkpoint: epoch 2 is kept in"
    )
    with pytest.raises(FloatingPointError, match=message):
        run(splits, model=given, folder=tmp_path)
    assert_same_fit(run(splits, model=Given(), folder=tmp_path), run(splits, model=Given()))


def test_nodes_take_the_steps_of_a_loop_written_out(papers):
    found, expected = (node_network(dropout=0.0, attention_dropout=0.0) for _ in range(2))
    history = fit(found, papers, NODES, progress=False).history
    graph, train = papers.train.graph, papers.train.nodes
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.01, weight_decay=5e-4)
    for row in history.itertuples():
        optimizer.zero_grad()
        scores = expected(graph.x, graph.edge_index)
        loss = nn.functional.cross_entropy(scores[train], graph.y[train])
        assert row.train_loss == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            right = expected(graph.x, graph.edge_index).argmax(1) == graph.y
        assert row.test_accuracy == pytest.approx(right[papers.test.nodes].double().mean().item())
        assert row.val_accuracy == pytest.approx(right[papers.val.nodes].double().mean().item())
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value)


def test_without_validation_or_patience_the_rate_stays(papers):
    schedule = Schedule(epochs=10, lr=0.5, lr_patience=0)
    blind = fit(node_network(), NodeTask(papers, evaluate=False), schedule, progress=False)
    assert set(blind.history) == {"epoch", "train_loss", "lr", "seconds"}
    constant = fit(node_network(), papers, replace(schedule, lr_patience=None), progress=False)
    assert set(constant.history["lr"]) == set(blind.history["lr"]) == {0.5}


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
    for rate in (0.0, 0.25, 1.0):
        hidden = hide_features(papers, rate, seed=1)
        changed = (hidden.train.graph.x != graph.x).any(1)
        assert not changed[papers.train.nodes].any()
        assert int(changed.sum()) == round(rate * (300 - len(papers.train.nodes)))
        assert (hidden.test.graph.x[changed] == 0).all()
        assert f"{rate:.0%} missing" in hidden.description.title
    assert torch.equal(graph.x, citation_like(0, **SMALL_CITATION).x), "the original is as it was"
    one, same, other = (hide_features(papers, 0.5, seed=s).test.graph.x for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("kind", "norm", "sampling"),
    [("gat", "layer", "shuffled"), ("gin", "none", "grouped"), ("gcn", "pair", "grouped")],
)
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
    examples, number = Examples(trees[3].train), {}
    leaves = examples.pairs[:, -8:, 1]
    assert all(len(leaves[examples.group == group].unique(dim=0)) == 1 for group in (0, 7, 900))
    for sampling in ("grouped", "shuffled"):
        batches = list(examples.batches(256, sampling))
        assert torch.cat(batches).sort().values.tolist() == list(range(6400))
        assert {len(batch) for batch in batches} == {256}
        number[sampling] = len(examples.group[batches[0]].unique())
    # 6.4 keys of a permutation are for training, so that 40 of them or a few more make a batch.
    assert 35 <= number["grouped"] <= 46 and number["shuffled"] > 200


def test_trees_are_done_when_everything_is_right_or_nothing_more_is_gained(trees):
    torch.manual_seed(0)
    fast = replace(TREES, epochs=2000, batch_size=64, lr=0.005, patience=400)
    run = fit(TreeNetwork("ggnn", 2), trees[2], fast, progress=False)
    assert run.stop_reason == "solved" and run.history["train_accuracy"].iloc[-1] == 1
    still = replace(TREES, epochs=2000, lr=1e-12, patience=3, block=1)
    run = fit(small_trees(), trees[2], still, progress=False)
    assert (run.stop_reason, len(run.history)) == ("plateau", 4)  # the first gains on nothing
    slow = replace(TREES, epochs=6, lr=1e-12, block=1, lr_patience=1)
    lrs = fit(small_trees(), trees[2], slow, progress=False).history["lr"]
    assert (lrs * 1e12).tolist() == pytest.approx([1] * 3 + [0.5] * 2 + [0.25])
