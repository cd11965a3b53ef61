"""Whatever looks at a model does so in evaluation mode and restores the mode of every submodule."""

import pytest
import torch
from conftest import few_molecules
from torch import nn
from torch_geometric.loader import DataLoader

from mapkg.attack import Ascent, attack
from mapkg.attribution import by_type, edge_scores, faithfulness, first_layer, interventions, parts
from mapkg.configs import CONFIGS
from mapkg.detection import report
from mapkg.evaluation import calibrate_batch_norm, evaluate, predictions, score
from mapkg.experiments.explicit_bias import idle_term
from mapkg.hooks import evaluating
from mapkg.models import build
from mapkg.observation import bond_ratios, edge_maxima, summarise, summarise_scores

CONFIG = CONFIGS["GT-ZINC"].replace(
    hidden_channels=16, heads=4, num_layers=2, num_node_types=28, num_edge_types=4, dropout=0.5
)


def modes(model):
    return {name: module.training for name, module in model.named_modules(remove_duplicate=False)}


def frozen(model, kind):
    """In training, but for its first submodule of a kind."""
    model.train()
    first(model, kind).eval()
    return model


def left_on(model, kind):
    """In evaluation, but for its first submodule of a kind."""
    model.eval()
    first(model, kind).train()
    return model


def first(model, kind):
    return next(module for module in model.modules() if isinstance(module, kind))


MIXED = {
    "frozen BatchNorm": lambda model: frozen(model, nn.BatchNorm1d),
    "dropout left on": lambda model: left_on(model, nn.Dropout),
}
mixed = pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)


@mixed
def test_every_submodule_is_in_its_own_mode_afterwards(mix):
    model = mix(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.BatchNorm1d(3)))
    before = modes(model)
    assert len({*before.values()}) == 2
    with evaluating(model):
        assert not any(modes(model).values())
        with evaluating(model[1]):
            pass
        assert not any(modes(model).values())
    assert modes(model) == before


@mixed
def test_modes_are_restored_after_an_exception(mix):
    model = mix(nn.ModuleList([nn.Dropout(), nn.BatchNorm1d(3), nn.Dropout()]))
    before = modes(model)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        1 / 0  # noqa: B018
    assert modes(model) == before


def test_a_shared_submodule_keeps_the_mode_it_had_below_every_parent():
    shared = nn.Dropout()
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.Dropout())})
    model.train()
    model["a"].eval()  # and with it the first of b
    before = modes(model)
    assert (before["b"], before["b.0"], before["b.1"]) == (True, False, True)
    with evaluating(model):
        assert not any(modes(model).values())
    assert modes(model) == before


def test_a_module_that_holds_itself_to_one_mode_is_restored_to_it():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            return super().train(False)

    model = nn.ModuleList([Frozen(nn.BatchNorm1d(3)), nn.BatchNorm1d(3)]).train()
    before = modes(model)
    with evaluating(model):
        pass
    assert modes(model) == before
    assert not before["0.0"] and before["1"]


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
    "score_parts": lambda model, graphs: parts.score_parts(model, graphs, labels(graphs), "abcd"),
    "intervene": lambda model, graphs: interventions.intervene(model, graphs, reference=graphs),
    "first_layer": lambda model, graphs: first_layer.first_layer(
        model, first_layer.distinct_edges(graphs)
    ),
    "curve": lambda model, graphs: faithfulness.curve(model, graphs, some_importance(graphs)),
    "edge_importance": lambda model, graphs: edge_scores.edge_importance(model, graphs, "ratio"),
    "attack": lambda model, graphs: attack(
        model, graphs, [0.1], restarts=[0], ascent=Ascent(passes=1), progress=False
    ),
    "idle_term": lambda model, graphs: idle_term(model, CONFIG, graphs),
}
"""Calls of the functions that run a model and are not training."""


@pytest.fixture(scope="module")
def graphs(cache):
    return few_molecules(1, 1, 6).test


@mixed
@pytest.mark.parametrize("name", LOOKING)
def test_a_model_is_looked_at_in_evaluation_mode_and_left_in_its_own(name, mix, graphs):
    torch.manual_seed(0)
    model = mix(build(CONFIG))
    before, ran = modes(model), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: ran.append((module, module.training)))
    LOOKING[name](model, graphs)
    assert modes(model) == before
    in_training = {type(module) for module, training in ran if training}
    assert in_training == ({nn.BatchNorm1d} if name == "calibrate_batch_norm" else set())
    assert {nn.BatchNorm1d, nn.Dropout} <= {type(module) for module, _ in ran}
