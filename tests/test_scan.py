"""One loop over batches: what it gives, and that nothing of it is left in the model."""

import weakref
from contextlib import nullcontext
from itertools import islice

import pytest
import torch
from torch import nn
from torch_geometric.nn import APPNP

from mapkg.hooks import evaluating, record, scan


def network():
    """A training model with a frozen BatchNorm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model[1].eval()
    return model


def state(model):
    """What a scan may change: the mode and the hooks of each module, and whether gradients flow."""
    modules = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    return modules, torch.is_grad_enabled()


@pytest.fixture
def loader():
    torch.manual_seed(1)
    return [torch.randn(rows, 3) for rows in (2, 5, 3)]


def test_each_batch_comes_with_its_outputs_in_evaluation_mode(loader):
    def forward(model, x):
        assert not model(x).requires_grad

    model = network()
    found = list(scan(model, loader, ["3", "0", ""], forward=forward))
    with evaluating(model), record(model, ["", "0", "3"]) as seen:
        predicted = [model(x) for x in loader]
    for index, (batch, outputs) in enumerate(found):
        assert batch is loader[index]
        assert list(outputs) == ["", "0", "3"]
        assert all(torch.equal(x, seen[name][index]) for name, x in outputs.items())
        assert torch.equal(outputs[""], predicted[index])


@pytest.mark.parametrize("end", ["none", "break", "exception", "close"])
def test_in_the_loop_and_however_it_ends_the_model_is_as_it_was(end, loader):
    model = network()
    before, passes = state(model), scan(model, loader, "*")
    with pytest.raises(KeyboardInterrupt) if end == "exception" else nullcontext():
        for _ in passes:  # held by its name, so that it is not closed by going away
            assert state(model) == before
            if end == "exception":
                raise KeyboardInterrupt
            if end != "none":
                break
    if end == "close":
        passes.close()
    assert state(model) == before


@pytest.mark.parametrize("where", ["forward", "reduce"])
def test_an_exception_is_passed_on_and_leaves_nothing_behind(where, loader):
    model = network()
    before = state(model)

    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(scan(model, loader, "0", **{where: fail}))
    assert state(model) == before


def test_batches_are_taken_when_the_loop_asks_for_them(loader):
    taken = []
    many = (taken.append(number) or loader[number % 3] for number in range(100))
    passes = scan(network(), many, "0")
    assert taken == []
    assert len(list(islice(passes, 4))) == 4
    assert taken == [0, 1, 2, 3]


def test_a_name_that_matches_nothing_is_an_error_before_the_first_batch():
    with pytest.raises(KeyError, match="no submodule '7'"):
        next(scan(network(), map(pytest.fail, "x"), "7"))


def test_an_output_that_the_loop_lets_go_is_gone_before_the_next_batch(loader):
    kept = []

    def watched():
        for batch in loader:
            assert all(output() is None for output in kept)
            yield batch

    for _, seen in scan(network(), watched(), "[03]"):
        kept += [weakref.ref(output) for output in seen.values()]
        assert [output() is None for output in kept[-2:]] == [False, False]
        del seen
    assert len(kept) == 6


def test_a_reducer_sees_every_output_with_its_batch_and_nothing_is_kept(loader):
    found, model = [], network()

    def reduce(name, output, batch):
        assert not torch.is_grad_enabled() and not output.requires_grad
        found.append((name, weakref.ref(output), batch))

    for _, seen in scan(model, loader, "[03]", reduce=reduce):
        assert seen == {}
        assert all(output() is None for _, output, _ in found)
    assert [name for name, _, _ in found] == ["0", "3"] * 3
    assert all(found[index][2] is loader[index // 2] for index in range(6))


def test_without_a_reducer_a_module_runs_once_in_a_pass():
    edge_index = torch.tensor([[0, 1], [1, 0]])

    def forward(model, x):
        return model(x, edge_index)

    steps = APPNP(K=3, alpha=0.1)
    with pytest.raises(RuntimeError, match=r"expected ':message' to run once .* ran 3 times; pass"):
        next(scan(steps, [torch.ones(2, 1)], ":message", forward=forward))
    found = []
    for _ in scan(
        steps, [torch.ones(2, 1)], ":message", forward=forward, reduce=lambda *a: found.append(a)
    ):
        assert len(found) == 3
    with pytest.raises(RuntimeError, match="expected '1' to run once for each batch, it ran 0"):
        next(scan(network(), [torch.ones(1, 3)], "[01]", forward=lambda model, x: model[0](x)))


def test_batches_are_moved_to_the_device_of_the_model(loader):
    model = network().to("meta")
    ((batch, seen), *_) = scan(model, loader, "")
    assert batch.device.type == seen[""].device.type == "meta"
