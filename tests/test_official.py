"""Published checkpoints, and agreement with the published layers."""

import json
import re

import pytest
import torch

from mapkg.hooks import record
from mapkg.models import GraphTransformerLayer, NodeStreamLayer
from studies.extras import build
from studies.extras.full_graph import Completion, FakeEdgeShare, FullGraphLayer
from studies.extras.official import load_layer, load_network
from studies.published import CONFIGS

TOLERANCE = dict(rtol=1e-10, atol=1e-10)
ATTENTION_TO_PUBLISHED = {
    "query": "Q",
    "key": "K",
    "value": "V",
    "edge": "E",
    "fake_query": "Q_2",
    "fake_key": "K_2",
    "fake_edge": "E_2",
}
BLOCK_TO_PUBLISHED = {
    f"{stream}_block.{ours}": theirs.format(letter)
    for stream, letter in (("node", "h"), ("edge", "e"))
    for ours, theirs in {
        "project": "O_{}",
        "expand": "FFN_{}_layer1",
        "contract": "FFN_{}_layer2",
        "batch_norm1": "batch_norm1_{}",
        "batch_norm2": "batch_norm2_{}",
        "layer_norm1": "layer_norm1_{}",
        "layer_norm2": "layer_norm2_{}",
    }.items()
}
NETWORK_TO_PUBLISHED = {
    "node_embedding": "embedding_h",
    "edge_embedding": "embedding_e",
    "head.0": "MLP_layer.FC_layers.0",
    "head.2": "MLP_layer.FC_layers.1",
    "head.4": "MLP_layer.FC_layers.2",
}
SMALL = CONFIGS["GT-ZINC"].replace(hidden_channels=16, heads=4, num_layers=3)
TERM = dict(explicit_bias="published", use_bias=True)
NETWORKS = {
    "as published": ("gt", "attention", {}),
    "LayerNorm": ("gt", "attention", dict(batch_norm=False, layer_norm=True)),
    "both norms": ("gt", "attention", dict(layer_norm=True)),
    "no norm": ("gt", "attention", dict(batch_norm=False)),
    "biases": ("gt", "attention", dict(use_bias=True, batch_norm=False)),
    "term": ("gt", "attention", TERM),
    "GraphiT": ("graphit", "attention_h", {}),
    "GraphiT, term": ("graphit", "attention_h", TERM),
    "SAN": ("san", "attention", {}),
    "SAN of LSPE": ("san", "attention_h", {}),
    "GraphiT, full": ("graphit", "attention_h", dict(full_graph=True)),
    "SAN, full": ("san", "attention", dict(full_graph=True, gamma=1e-5)),
    "SAN of LSPE, full": ("san", "attention_h", dict(full_graph=True)),
    "SAN, biases": ("san", "attention", dict(use_bias=True, full_graph=True, gamma=0.5)),
}
each_network = pytest.mark.parametrize(
    ("kind", "attention", "changes"), NETWORKS.values(), ids=NETWORKS
)


PUBLISHED_LAYERS = [
    *("gt__base", "gt__bias"),
    *("graphit__base", "graphit__bias", "graphit__full"),
    *("san__base", "san__full"),
]
ROWS_OF_EDGES = ("e", "e_out", "malog_e", "score_exp", "alpha", "real", "k_RW", "cot_e")
ROWS_OF_EDGES += ("train/e_out", "train/grad_e")
TYPES = {"gt": GraphTransformerLayer, "graphit": NodeStreamLayer, "san": NodeStreamLayer}


@pytest.fixture(params=PUBLISHED_LAYERS)
def published(request, oracle):
    """Recorded inputs, weights and outputs of a published layer, its real edges first."""
    values = oracle(f"{request.param}__f64")
    values["meta"] = json.loads(values["meta"])
    if values["meta"]["full_graph"]:
        order = values["real"].argsort(descending=True, stable=True)
        values["edge_index"] = values["edge_index"][:, order]
        values |= {name: values[name][order] for name in ROWS_OF_EDGES if name in values}
    return values


def layer_of(published):
    weights = {k.removeprefix("sd/"): v for k, v in published.items() if k.startswith("sd/")}
    meta = published["meta"]
    layer = load_layer(weights, meta["layer"], heads=meta["heads"])
    assert type(layer) is (FullGraphLayer if meta["full_graph"] else TYPES[meta["layer"]])
    return layer


def outputs_of(layer, published, h, e):
    """Nodes, edges, scores and weights (before division) of a layer, fake edges last."""
    edge_index, meta = published["edge_index"], published["meta"]
    rest, factor = (), 1.0
    real = len(e)
    if meta["full_graph"]:
        real = int(published["real"].sum())
        assert published["real"][:real].all()
        factor = published["k_RW"]
        if meta["layer"] == "san":
            share = FakeEdgeShare(meta["gamma"])
            factor = share(edge_index[:, :real], edge_index[:, real:], published["batch"])
        rest = (Completion(edge_index[:, real:], e[real:], factor),)
    with record(layer, "attention.score") as seen:
        x, edge_attr = layer(h, edge_index[:, :real], e[:real], *rest)
    (score,) = seen["attention.score"]
    return x, torch.cat([edge_attr, e[real:]]), score, layer.attention.head_weight(score) * factor


def published_name(ours, kind, attention="attention"):
    module, _, parameter = ours.rpartition(".")
    if module in BLOCK_TO_PUBLISHED:
        return f"{BLOCK_TO_PUBLISHED[module]}.{parameter}"
    name = module.removeprefix("attention.")
    theirs = "proj_e" if (kind, name) == ("gt", "edge") else ATTENTION_TO_PUBLISHED[name]
    return f"{attention}.{theirs}.{parameter}"


def own_network(kind="gt", seed=0, **changes):
    """A network of ours with statistics and norm weights that are worth reading."""
    torch.manual_seed(seed)
    readout = "mean" if kind == "gt" else "sum"
    changes = dict(architecture=kind, readout=readout) | changes
    model = build(SMALL.replace(**changes)).double().eval()
    for name, value in model.state_dict().items():
        if "norm" in name and value.is_floating_point():
            value.uniform_(0.5, 2)
        if "gamma" in name:
            value.fill_(0.3)  # not what an untrained network has
    return model


def as_published(model, kind="gt", attention="attention"):
    """The weights of a network of ours under the names, and in the shapes, of the published one."""
    weights = {}
    for name, value in model.state_dict().items():
        module, _, parameter = name.rpartition(".")
        if module in NETWORK_TO_PUBLISHED:
            theirs = f"{NETWORK_TO_PUBLISHED[module]}.{parameter}"
        elif name == "edge_factor.gamma":
            theirs = "gamma"
        elif parameter.endswith("_term"):
            theirs = f"{module.rpartition('.')[0]}.{attention}.{parameter[0]}_bias"
            value = value.unsqueeze(2 if parameter == "key_term" else 1)
        else:
            layers, number, within = name.split(".", 2)
            theirs = f"{layers}.{number}.{published_name(within, kind, attention)}"
        weights[theirs] = value
    return weights


def layer_1(weights):
    prefix = "layers.1."
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def predictions(model):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(28, (12,), generator=generator)
    edge_index = torch.randint(6, (2, 30), generator=generator)
    edge_index[:, 15:] += 6
    edge_attr = torch.randint(4, (30,), generator=generator)
    return model(x, edge_index, edge_attr, torch.arange(12) // 6, 2)


def test_evaluation_mode_agrees_with_the_published_layer(published):
    layer = layer_of(published)
    with record(layer, ["attention.attended", "attention.attention_weight"]) as seen:
        x, edge_attr, score, weight = outputs_of(layer, published, published["h"], published["e"])
    torch.testing.assert_close(x, published["h_out"], **TOLERANCE)
    # A layer without an edge stream, recorded or not, gives its edges back.
    torch.testing.assert_close(edge_attr, published.get("e_out", published["e"]), **TOLERANCE)
    torch.testing.assert_close(score, published["malog_e"], **TOLERANCE)
    torch.testing.assert_close(weight, published["score_exp"], **TOLERANCE)
    for ours, theirs in {"attended": "malog_h", "attention_weight": "alpha"}.items():
        torch.testing.assert_close(seen[f"attention.{ours}"][0], published[theirs], **TOLERANCE)


def test_training_mode_gradients_and_statistics_agree_with_the_published_layer(published):
    layer, kind = layer_of(published).train(), published["meta"]["layer"]
    attention = "attention_h" if kind == "graphit" else "attention"
    h, e = (published[name].clone().requires_grad_() for name in "he")
    x, edge_attr, _, _ = outputs_of(layer, published, h, e)
    torch.testing.assert_close(x, published["train/h_out"], **TOLERANCE)
    loss = (x * published["cot_h"]).sum()
    if "train/e_out" in published:
        torch.testing.assert_close(edge_attr, published["train/e_out"], **TOLERANCE)
        loss = loss + (edge_attr * published["cot_e"]).sum()
    loss.backward()
    torch.testing.assert_close(loss.detach(), published["train/loss"], **TOLERANCE)
    torch.testing.assert_close(h.grad, published["train/grad_h"], **TOLERANCE)
    torch.testing.assert_close(e.grad, published["train/grad_e"], **TOLERANCE)
    for name, parameter in layer.named_parameters():
        expected = published[f"grad/{published_name(name, kind, attention)}"]
        torch.testing.assert_close(parameter.grad, expected, **TOLERANCE)
        assert parameter.grad.any(), name
    for name, buffer in layer.named_buffers():
        expected = published[f"train/buf/{published_name(name, kind)}"]
        torch.testing.assert_close(buffer, expected, **TOLERANCE)


@each_network
def test_a_published_network_gives_the_outputs_of_ours(kind, attention, changes):
    model = own_network(kind, **changes)
    weights = as_published(model, kind, attention)
    loaded = load_network(weights, kind, heads=4, gamma=changes.get("gamma"))
    assert not loaded.training
    ours, theirs = ([(n, type(m)) for n, m in x.named_modules()] for x in (model, loaded))
    assert ours == theirs
    assert torch.equal(predictions(loaded), predictions(model))
    layer = load_layer(layer_1(weights), kind, heads=4)
    for found, expected in zip(layer.parameters(), model.layers[1].parameters(), strict=True):
        assert torch.equal(found, expected)
    for value in weights.values():
        value.zero_()
    assert predictions(loaded).any(), "the weights are a copy"


def test_the_weights_keep_their_precision():
    weights = as_published(own_network())
    assert next(load_network(weights, "gt", heads=4).parameters()).dtype == torch.float64
    single = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    assert next(load_network(single, "gt", heads=4).parameters()).dtype == torch.float32


def test_heads_readout_and_residual_are_what_the_caller_says():
    weights = as_published(own_network())
    for changes, settings in [
        (dict(heads=2), dict(heads=2)),
        (dict(readout="sum"), dict(heads=4, readout="sum")),
        (dict(residual=False), dict(heads=4, residual=False)),
    ]:
        expected = build(SMALL.replace(**changes)).double().eval()
        expected.load_state_dict(own_network().state_dict())
        found = predictions(load_network(weights, "gt", **settings))
        assert torch.equal(found, predictions(expected))
        assert not torch.allclose(found, predictions(own_network()))


def test_every_name_goes_to_its_own_place():
    weights = as_published(own_network())
    marked = {name: torch.full_like(value, i) for i, (name, value) in enumerate(weights.items())}
    loaded = as_published(load_network(marked, "gt", heads=4))
    assert loaded.keys() == marked.keys()
    for name, value in marked.items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize(
    "name",
    ["layers.1.attention.proj_x.weight", "layers.1.gamma", "gamma", "MLP_layer.FC_layers.3.weight"],
)
def test_an_unknown_name_is_an_error_that_lists_it(name):
    weights = as_published(own_network()) | {name: torch.zeros(1)}
    with pytest.raises(ValueError, match=rf"unknown names .*: {re.escape(name)};"):
        load_network(weights, "gt", heads=4)


@pytest.mark.parametrize(
    "part", ["layers.0.attention.Q.weight", "proj_e.weight", "running_var", "embedding_e", "e_bias"]
)
def test_missing_names_are_an_error_that_lists_them_all(part):
    weights = as_published(own_network(**TERM))
    gone = [name for name in weights if part in name]
    for name in gone:
        del weights[name]
    with pytest.raises(ValueError, match=f"missing .*weights: {re.escape(', '.join(gone))}$"):
        load_network(weights, "gt", heads=4)
    with pytest.raises(ValueError, match=r"missing .*: attention\.Q\.weight$"):
        load_layer({}, "gt", heads=4)


@pytest.mark.parametrize("load", [load_layer, load_network])
def test_another_kind_is_an_error_that_names_the_known_ones(load):
    with pytest.raises(ValueError, match=r"kind: expected one of \('gt', .*'san'\), got 'egat'"):
        load(as_published(own_network()), "egat", heads=4)


def test_a_gap_in_the_numbers_of_the_layers_is_an_error():
    weights = as_published(own_network())
    gap = {name: value for name, value in weights.items() if not name.startswith("layers.1.")}
    with pytest.raises(ValueError, match=r"numbered from 0 .*, found \[0, 2\]"):
        load_network(gap, "gt", heads=4)
    none = {name: value for name, value in weights.items() if not name.startswith("layers.")}
    with pytest.raises(ValueError, match=r"numbered from 0 .*, found \[\]"):
        load_network(none, "gt", heads=4)


def test_layers_are_ordered_by_number_not_by_name():
    model = own_network(num_layers=11)
    weights = dict(sorted(as_published(model).items(), reverse=True))
    assert torch.equal(predictions(load_network(weights, "gt", heads=4)), predictions(model))


@pytest.mark.parametrize("name", ["layers.1.FFN_h_layer1.weight", "MLP_layer.FC_layers.0.bias"])
def test_a_wrong_shape_is_an_error(name):
    weights = as_published(own_network())
    weights[name] = weights[name][:-1]
    with pytest.raises(ValueError, match="unexpected shape"):
        load_network(weights, "gt", heads=4)


# The gamma of SAN.


def test_the_copies_of_a_learned_gamma_in_the_layers_are_read_once():
    model = own_network("san", full_graph=True)
    weights = as_published(model, "san", "attention_h")
    copies = {f"layers.{number}.attention_h.gamma": weights["gamma"] for number in range(3)}
    assert torch.equal(
        predictions(load_network(weights | copies, "san", heads=4)), predictions(model)
    )
    part = layer_1(weights | copies)
    assert "attention_h.gamma" in part
    layer = load_layer(part, "san", heads=4)
    assert torch.equal(layer.attention.query.weight, model.layers[1].attention.query.weight)


def test_a_sparse_network_that_has_a_gamma_never_uses_it():
    model = own_network("san")
    weights = as_published(model, "san", "attention_h")
    gamma = {f"layers.{number}.attention_h.gamma": torch.ones(1) for number in range(3)}
    found = load_network(weights | gamma | {"gamma": torch.ones(1)}, "san", heads=4)
    assert torch.equal(predictions(found), predictions(model))


def test_a_fixed_gamma_is_asked_for_where_the_weights_have_none_and_only_there():
    fixed = own_network("san", full_graph=True, gamma=0.2)
    weights = as_published(fixed, "san")
    with pytest.raises(ValueError, match="gamma: expected a value, the weights have none"):
        load_network(weights, "san", heads=4)
    assert torch.equal(
        predictions(load_network(weights, "san", heads=4, gamma=0.2)), predictions(fixed)
    )
    learned, sparse = ("san", dict(full_graph=True)), ("san", {})
    for kind, changes in (learned, sparse, ("graphit", dict(full_graph=True))):
        weights = as_published(own_network(kind, **changes), kind, "attention_h")
        with pytest.raises(ValueError, match=r"gamma: expected None, it has no use, got 0\.2"):
            load_network(weights, kind, heads=4, gamma=0.2)


def test_names_of_one_kind_are_unknown_to_another():
    weights = as_published(own_network("graphit"), "graphit", "attention_h")
    with pytest.raises(ValueError, match=r"missing .*layers\.0\.attention\.Q\.weight"):
        load_network(weights, "gt", heads=4)
    weights = as_published(own_network())
    with pytest.raises(ValueError, match=r"unknown names .*attention\.proj_e\.weight"):
        load_network(weights, "san", heads=4)
