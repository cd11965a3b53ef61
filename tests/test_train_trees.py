"""Training on trees: its steps, its batches, when it stops, and that sharing changes nothing."""

import pytest
import torch
from torch import nn

from studies.data import load
from studies.data.trees import level_order
from studies.train_trees import TreeSchedule, _Examples, fit_trees
from studies.tree_networks import tree_network


@pytest.fixture(scope="module")
def trees(cache):
    return {depth: load(f"trees-{depth}") for depth in (2, 3)}


def network(kind="gat", depth=2, seed=0, **options):
    torch.manual_seed(seed)
    return tree_network(kind, depth, channels=8, **options)


@pytest.mark.parametrize("sampling", ["shuffled", "grouped"])
@pytest.mark.parametrize(("kind", "norm"), [("gat", "layer"), ("gin", "none"), ("gcn", "pair")])
def test_it_takes_the_steps_of_a_loop_written_out(trees, kind, norm, sampling):
    found, expected = (network(kind, norm=norm).double() for _ in range(2))
    schedule = TreeSchedule(passes=3, block=2, batch_size=20, sampling=sampling)
    run = fit_trees(found, trees[2], schedule, seed=5, progress=False)
    train = trees[2].train
    examples = _Examples.of(train, expected)
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-3)
    right = []
    for _ in range(3):
        right.append(0)
        for chosen in examples.batches(schedule, generator):
            scores = expected.dense(train.pairs[chosen][:, level_order(2)])
            right[-1] += int((scores.argmax(1) == train.y[chosen]).sum())
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores, train.y[chosen]).backward()
            optimizer.step()
    assert run.history["passes"].tolist() == [2, 3]
    accuracies = [sum(right[:2]) / 152, right[2] / 76]
    assert run.history["train_accuracy"].tolist() == pytest.approx(accuracies)
    assert run.best == pytest.approx(max(accuracies))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, msg=name)
    expected.eval()
    for part, accuracy in (("train", run.train_accuracy), ("test", run.test_accuracy)):
        rows = getattr(trees[2], part)
        scores = expected.dense(rows.pairs[:, level_order(2)])
        assert accuracy == pytest.approx((scores.argmax(1) == rows.y).double().mean().item())


@pytest.mark.parametrize("sampling", ["shuffled", "grouped"])
def test_every_pass_has_every_example_once(trees, sampling):
    examples = _Examples.of(trees[3].train, network(depth=3))
    schedule = TreeSchedule(batch_size=256, sampling=sampling)
    generator = torch.Generator().manual_seed(0)
    first, second = (list(examples.batches(schedule, generator)) for _ in range(2))
    for batches in (first, second):
        assert torch.cat(batches).sort().values.tolist() == list(range(6400))
        assert {len(batch) for batch in batches} == {256}
    assert not torch.equal(first[0], second[0])


def test_grouped_batches_have_few_permutations_and_shuffled_ones_many(trees):
    examples = _Examples.of(trees[3].train, network(depth=3))
    generator = torch.Generator().manual_seed(0)
    number = {}
    for sampling in ("grouped", "shuffled"):
        schedule = TreeSchedule(batch_size=256, sampling=sampling)
        batch = next(iter(examples.batches(schedule, generator)))
        number[sampling] = len(examples.group[batch].unique())
    # 6.4 keys of a permutation are for training, so that 40 of them or a few more make a batch.
    assert 35 <= number["grouped"] <= 46
    assert number["shuffled"] > 200


def test_groups_are_the_permutations(trees):
    examples = _Examples.of(trees[3].train, network(depth=3))
    leaves = examples.pairs[:, -8:, 1]
    for group in (0, 7, 900):
        assert len(leaves[examples.group == group].unique(dim=0)) == 1
    assert int(examples.group.max()) == 999


def test_it_stops_when_everything_is_right_or_nothing_more_is_gained(trees):
    schedule = TreeSchedule(passes=2000, batch_size=64, lr=0.01)
    torch.manual_seed(0)
    run = fit_trees(tree_network("ggnn", 2), trees[2], schedule, progress=False)
    assert run.stop_reason == "solved"
    assert run.best == run.history["train_accuracy"].iloc[-1] == 1
    assert run.history["passes"].iloc[-1] < 2000
    still = TreeSchedule(passes=2000, lr=1e-12, patience=3, block=1)
    run = fit_trees(network(), trees[2], still, progress=False)
    assert run.stop_reason == "plateau"
    assert len(run.history) == 4  # the first gains on nothing
    short = fit_trees(network(), trees[2], TreeSchedule(passes=3), progress=False)
    assert short.stop_reason == "passes"
    assert short.history["passes"].tolist() == [3]


def test_the_rate_falls_when_accuracy_does_not_rise(trees):
    schedule = TreeSchedule(passes=6, lr=1e-12, block=1, lr_patience=1)
    run = fit_trees(network(), trees[2], schedule, progress=False)
    assert run.history["lr"].tolist() == pytest.approx([1e-12] * 3 + [5e-13] * 2 + [2.5e-13])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(passes=0), "passes: expected 1 or more, got 0"),
        (dict(batch_size=0), "batch_size: expected 1 or more, got 0"),
        (dict(lr=0.0), "lr: expected a value above 0"),
        (dict(sampling="by-key"), "sampling: expected one of .* got 'by-key'"),
    ],
)
def test_a_schedule_that_is_none_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TreeSchedule(**options)


def test_what_are_no_trees_of_that_depth_is_refused(trees, papers):
    with pytest.raises(ValueError, match=r"expected Trees, as load.* gives them, got NodesOfGraph"):
        fit_trees(network(), papers, progress=False)
    with pytest.raises(ValueError, match="depth 2, with 7 nodes, got 15 nodes"):
        fit_trees(network(), trees[3], progress=False)
