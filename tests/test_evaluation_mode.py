"""Whatever looks at a model does so in evaluation mode and restores the mode of every submodule."""

import pytest
import torch
from conftest import few_molecules
from torch import nn
from torch_geometric.loader import DataLoader

from mapkg import attribution as by_type
from mapkg import interventions
from mapkg.attack import Ascent, attack, where_massive
from mapkg.evaluation import batches, calibrate_batch_norm, evaluate, predictions, score
from mapkg.hooks import evaluating
from mapkg.models import build
from mapkg.reporting import report
from studies import edge_kinds, explanations
from studies.explicit_bias import idle_term, readings
from studies.observation import bond_ratios, edge_maxima, summarise, summarise_scores
from studies.published import CONFIGS

CONFIG = CONFIGS["GT-ZINC"].replace(
    hidden_channels=16, heads=4, num_layers=2, num_node_types=28, num_edge_types=4, dropout=0.5
)


def modes(model):
    return {name: module.training for name, module in model.named_modules(remove_duplicate=False)}


def test_every_submodule_is_in_its_own_mode_afterwards_also_shared_and_frozen_ones():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            return super().train(False)

    shared = nn.Dropout()
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(shared, nn.BatchNorm1d(3)),
            "b": nn.Sequential(shared, nn.Dropout()),
            "c": Frozen(nn.BatchNorm1d(3)),
        }
    ).train()
    model["a"].eval()  # and with it the first of b
    before = modes(model)
    assert list(before.values()) == [True, False, False, False, True, False, True, False, False]
    with pytest.raises(ZeroDivisionError), evaluating(model):
        with evaluating(model["b"]):
            pass
        assert not any(modes(model).values())
        raise ZeroDivisionError
    assert modes(model) == before


# The functions that look at a model.


def labels(graphs):
    return [graph.edge_attr.flatten() for graph in graphs]


def some_importance(graphs):
    return [torch.arange(float(graph.num_edges)) for graph in graphs]


LOOKING = {
    "report": lambda model, graphs: report(model, DataLoader(graphs, 4)),
    "summarise": lambda model, graphs: summarise(model, graphs),
    "summarise_scores": lambda model, graphs: summarise_scores(model, CONFIG, graphs),
    "edge_maxima": lambda model, graphs: edge_maxima(model, graphs),
    "bond_ratios": lambda model, graphs: bond_ratios(model, graphs, heads=4),
    "predictions": lambda model, graphs: predictions(model, graphs),
    "score": lambda model, graphs: score(model, graphs),
    "evaluate": lambda model, graphs: evaluate(model, graphs),
    "calibrate_batch_norm": lambda model, graphs: calibrate_batch_norm(model, graphs),
    "heat_map": lambda model, graphs: by_type.heat_map(model, graphs, labels(graphs), 4),
    "score_parts": lambda model, graphs: edge_kinds.score_parts(
        model, graphs, labels(graphs), "abcd"
    ),
    "intervene": lambda model, graphs: interventions.intervene(model, graphs, reference=graphs),
    "first_layer": lambda model, graphs: edge_kinds.first_layer(
        model, edge_kinds.distinct_edges(graphs)
    ),
    "curve": lambda model, graphs: explanations.curve(model, graphs, some_importance(graphs)),
    "edge_importance": lambda model, graphs: explanations.edge_importance(model, graphs, "ratio"),
    "attack": lambda model, graphs: attack(
        model, graphs, [0.1], restarts=[0], ascent=Ascent(passes=1), progress=False
    ),
    "channel_means": lambda model, graphs: interventions.channel_means(model, graphs, "*.score"),
    "where_massive": lambda model, graphs: where_massive(model)(next(batches(graphs, 6))),
    "idle_term": lambda model, graphs: idle_term(model, CONFIG, graphs),
    "readings": lambda model, graphs: readings(model, graphs),
}
"""Calls of the functions that run a model and do not train it."""


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

    assert {nn.BatchNorm1d, nn.Dropout} <= {type(module) for module, _ in ran}
    calibrates = name == "calibrate_batch_norm"
    in_training = {type(module) for module, training in ran if training}
    assert in_training == ({nn.BatchNorm1d} if calibrates else set())
    assert modes(model) == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]) or (calibrates and "batch_norm" in key), key
    for key, parameter in model.named_parameters():
        assert parameter.grad is None and parameter.requires_grad != key.startswith("head"), key
    assert not any(module._forward_hooks for module in model.modules())
