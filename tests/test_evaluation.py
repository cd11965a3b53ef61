"""Losses, metrics and predictions against hand values, loops and scikit-learn; modes of modules."""

import math

import numpy as np
import pytest
import torch
from conftest import few_molecules
from sklearn.metrics import accuracy_score, log_loss, mean_absolute_error, roc_auc_score
from torch import nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from mapkg import interventions
from mapkg.attack import Ascent, attack, where_massive
from mapkg.evaluation import (
    batches,
    calibrate_batch_norm,
    each_loss,
    evaluate,
    losses,
    mean_roc_auc,
    measure,
    pooled_mean,
    predictions,
)
from mapkg.hooks import evaluating
from mapkg.models import build
from mapkg.reporting import report
from studies import edge_kinds, explanations
from studies.explicit_bias import idle_term, readings
from studies.published import CONFIGS

NAN = math.nan


def test_a_bad_target_of_a_regression_shows():
    assert math.isnan(measure(torch.zeros(2, 1), torch.tensor([[0.0], [NAN]]), "l1")["mae"])


def test_the_cross_entropy_has_gradients_of_labeled_entries_only():
    logits = torch.tensor([[0.0, 2.0], [-1.0, 100.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0], [NAN, NAN]])
    each_loss(logits, target, "bce").nansum().backward()
    expected = torch.tensor([[-0.5, 1 - 1 / (1 + math.exp(2))], [0.0, 0.0]])
    torch.testing.assert_close(logits.grad, expected)
    assert losses(logits, target, "bce").shape == (2,)


def test_a_target_with_one_class_is_left_out_of_the_area_under_the_curve():
    logits, target = torch.tensor([[0.1, 3.0], [0.2, 4.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert mean_roc_auc(logits, target) == 1
    assert math.isnan(mean_roc_auc(logits[:, 1:], target[:, 1:]))


@pytest.mark.parametrize(
    ("predicted", "target", "loss", "message"),
    [
        (torch.zeros(2, 1), torch.full((2, 1), NAN), "bce", "every target is NaN"),
        (torch.zeros(1, 1), torch.tensor([[2.0]]), "bce", "expected targets 0, 1 or NaN"),
        (torch.zeros(4, 1), torch.zeros(4, 2), "l1", r"predicts \(4, 1\) for .* \(4, 2\); give"),
        (torch.zeros(1, 1), torch.zeros(1, 1), "mse", r"'l1', 'bce'.* got 'mse'"),
    ],
)
def test_what_cannot_be_measured_is_an_error(predicted, target, loss, message):
    with pytest.raises(ValueError, match=message):
        measure(predicted, target, loss)


def test_the_pooled_mean_weighs_entries_alike_and_draws_whole_graphs():
    sums, numbers = np.array([6.0, 0.0, 3.0, 1.0]), np.array([3, 0, 1, 2])
    mean, low, high = pooled_mean(sums, numbers, resamples=500, seed=1)
    assert mean == pytest.approx(10 / 6)
    assert 0.5 <= low < mean < high <= 3.0
    same = pooled_mean(np.repeat(sums, 25), np.repeat(numbers, 25), resamples=500)
    assert same[0] == pytest.approx(mean)
    assert same[2] - same[1] < (high - low) / 2  # more graphs, a narrower interval
    few = np.eye(1, 900)[0] + np.eye(1, 900, 5)[0]  # the others are not drawn
    assert pooled_mean(3 * few, few, resamples=200) == (3, 3, 3)
    with pytest.raises(ValueError, match="two labeled graphs or more, to draw from, got 1"):
        pooled_mean(sums[:2], numbers[:2])


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.double])
def test_labels_of_any_kind_and_halves_are_compared_in_single_precision(kind):
    logits, target = torch.tensor([[0.5], [-2.0], [3.0]]), torch.tensor([[1], [0], [0]])
    expected = measure(logits, target.float(), "bce")
    assert measure(logits, target.to(kind), "bce") == expected
    assert measure(logits.bfloat16(), target.to(kind), "bce") == expected  # exact in eight bits


def test_statistics_of_a_calibration_that_fails_stay(graphs):
    model = build(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    far = graphs[0].clone().update({"x": graphs[0].x + 99})
    for options, bad, words in (
        ({}, [], "graphs: expected 1 graph or more, got 0"),
        ({"batch_size": 3}, [], "graphs: expected 1 graph or more, got 0"),
        ({"batch_size": -1}, graphs, "batch_size: expected 1 graph or more, got -1"),
        ({}, [Data(x=graphs[0].x)], "GraphNetwork.forward: it needs x, edge_index, edge_attr"),
        ({"batch_size": 3}, [*graphs[:3], far], "out of range"),
    ):
        with pytest.raises((ValueError, TypeError, IndexError), match=words):
            calibrate_batch_norm(model, bad, **options)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Writes(nn.Module):
    """A network that writes into what it is given, as networks of GraphGym do."""

    def __init__(self):
        super().__init__()
        net = build(CONFIG)
        self.node_embedding, self.edge_embedding = net.node_embedding, net.edge_embedding
        self.net = net

    def forward(self, data):
        data.x, data.edge_attr = self.node_embedding(data.x), self.edge_embedding(data.edge_attr)
        values = data.x, data.edge_index, data.edge_attr, data.batch, data.batch_size
        return self.net.from_embedded(*values)


def test_a_model_that_writes_into_its_batch_is_disturbed_as_any_other(graphs):
    torch.manual_seed(0)
    model = Writes()
    same = dict(reference=graphs, layers="net.layers.*.score", threshold=1e9)
    changed = interventions.intervene(model, graphs, **same)
    assert (changed["changed"] == 0).all()
    assert np.array_equal(changed["before"], changed["after"])
    assert changed["loss_after"].mean() == pytest.approx(evaluate(model, graphs), rel=1e-5)
    mask = {"edge_embedding": lambda batch: torch.ones(batch.num_edges, 1)}
    for found in (
        attack(model, graphs, [1e-9], **BRIEF),
        attack(model, graphs, [1e-9], masks=mask, **BRIEF),
    ):
        assert found["loss"].tolist() == pytest.approx([evaluate(model, graphs)] * 3, rel=1e-5)


class Sums(nn.Module):
    def forward(self, x, edge_index, edge_attr, batch, batch_size):
        return x.new_zeros(batch_size, x.size(1)).index_add_(0, batch, x)


@pytest.fixture(scope="module")
def rows():
    """Forty graphs of one to four nodes with three targets, a third of them unlabeled."""
    generator = torch.Generator().manual_seed(0)
    edge_index, graphs = torch.zeros(2, 1, dtype=torch.long), []
    for number in range(40):
        x = torch.randn(1 + number % 4, 3, generator=generator)
        y = (torch.rand(1, 3, generator=generator) < 0.4).float()
        y[torch.rand(1, 3, generator=generator) < 0.33] = NAN
        graphs.append(Data(x=x, edge_index=edge_index, edge_attr=x[:1], y=y))
    return graphs


@pytest.mark.parametrize("batch_size", [1, 39, 40])  # some batches have no label
def test_metrics_are_those_of_scikit_learn_for_any_batch_size(batch_size, rows):
    logits = torch.stack([one.x.sum(0) for one in rows]).double()
    target = torch.cat([one.y for one in rows])
    known, areas = ~target.isnan(), []
    for task in range(3):
        labels, column = target[known[:, task], task], logits[known[:, task], task]
        areas.append(roc_auc_score(labels, column))
    expected = {
        "bce": log_loss(target[known], logits[known].sigmoid()),
        "roc_auc": sum(areas) / 3,
        "accuracy": accuracy_score(target[known], logits[known] > 0),
    }
    about = dict(batch_size=batch_size)
    measured = measure(*predictions(Sums(), rows, **about), "bce")
    assert measured == pytest.approx(expected, rel=1e-5)
    assert evaluate(Sums(), rows, loss="bce", **about) == pytest.approx(expected["bce"], rel=1e-5)
    labeled = [Data(**graph.to_dict() | {"y": graph.y.nan_to_num(0.5)}) for graph in rows]
    mae = mean_absolute_error(target.nan_to_num(0.5), logits)
    assert evaluate(Sums(), labeled, **about) == pytest.approx(mae, rel=1e-6)


@pytest.mark.parametrize(("batch_size", "number"), [(32, 2), (None, 1)])
def test_calibration_takes_the_mean_of_the_statistics_of_batches(batch_size, number):
    molecules, model = few_molecules(64, 1, 1).train, build(CONFIG)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm1d)}
    assert len(norms) == 8
    inputs = {name: [] for name in norms}
    for name, norm in norms.items():
        nn.init.normal_(norm.running_mean)  # statistics of before, to be forgotten
        norm.num_batches_tracked.fill_(7)
        norm.momentum = 0.3
        norm.register_forward_pre_hook(lambda _, x, name=name: inputs[name].append(x[0].double()))
    assert calibrate_batch_norm(model.train(), molecules, batch_size=batch_size) is model
    for name, norm in norms.items():
        assert (norm.momentum, len(inputs[name])) == (0.3, number)
        mean = torch.stack([x.mean(dim=0) for x in inputs[name]]).mean(dim=0)
        variance = torch.stack([x.var(dim=0) for x in inputs[name]]).mean(dim=0)
        close = dict(check_dtype=False, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_mean, mean, **close)
        torch.testing.assert_close(norm.running_var, variance, **close)


SIZES = dict(hidden_channels=16, heads=4, num_layers=2, num_node_types=28, num_edge_types=4)
CONFIG = CONFIGS["GT-ZINC"].replace(**SIZES, dropout=0.5)


def modes(model):
    return {name: module.training for name, module in model.named_modules(remove_duplicate=False)}


def test_every_submodule_is_in_its_own_mode_afterwards_also_shared_and_frozen_ones():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            return super().train(False)

    shared = nn.Dropout()
    part = nn.Sequential(shared, nn.Dropout())
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": part, "c": Frozen(nn.Dropout())})
    model.train()["a"].eval()  # and with it the first of b
    before = modes(model)
    assert list(before.values()) == [True, False, False, True, False, True, False, False]
    with pytest.raises(ZeroDivisionError), evaluating(model):
        with evaluating(model["b"]):
            pass
        assert not any(modes(model).values())
        raise ZeroDivisionError
    assert modes(model) == before


def labels(graphs):
    return [graph.edge_attr.flatten() for graph in graphs]


def some_importance(graphs):
    return [torch.arange(float(graph.num_edges)) for graph in graphs]


BRIEF = dict(restarts=[0], ascent=Ascent(passes=1), progress=False)
LOOKING = {
    "report": lambda m, graphs: report(m, DataLoader(graphs, 4)),
    "calibrate_batch_norm": calibrate_batch_norm,
    "score_parts": lambda m, graphs: edge_kinds.score_parts(m, graphs, labels(graphs), "abcd"),
    "first_layer": lambda m, gs: edge_kinds.first_layer(m, edge_kinds.distinct_edges(gs)),
    "intervene": lambda m, graphs: interventions.intervene(m, graphs, reference=graphs),
    "curve": lambda m, graphs: explanations.curve(m, graphs, some_importance(graphs)),
    "edge_importance": lambda m, graphs: explanations.edge_importance(m, graphs, "ratio"),
    "attack": lambda m, graphs: attack(m, graphs, [0.1], **BRIEF),
    "where_massive": lambda m, graphs: where_massive(m)(next(batches(graphs, 6))),
    "idle_term": lambda m, graphs: idle_term(m, CONFIG, graphs),
    "readings": readings,
}
"""Calls that run a model in other ways than by a scan alone, and do not train it."""


@pytest.fixture(scope="module")
def graphs(cache):
    return few_molecules(1, 1, 6).test


@pytest.mark.parametrize("name", LOOKING)
def test_a_model_is_looked_at_in_evaluation_mode_and_left_as_it_was(name, graphs):
    torch.manual_seed(0)
    model = build(CONFIG).train()
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d)).eval()
    model.layers[0].eval()  # frozen, but for a dropout that is left on
    next(m for m in model.layers[0].modules() if isinstance(m, nn.Dropout)).train()
    model.head.requires_grad_(False)
    before = modes(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ran = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: ran.append((module, module.training)))
    LOOKING[name](model, graphs)

    calibrates = name == "calibrate_batch_norm"
    in_training = {type(module) for module, training in ran if training}
    assert ran and in_training == ({nn.BatchNorm1d} if calibrates else set())
    assert modes(model) == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]) or (calibrates and "batch_norm" in key), key
    for key, parameter in model.named_parameters():
        assert parameter.grad is None and parameter.requires_grad != key.startswith("head"), key
    assert not any(module._forward_hooks for module in model.modules())
