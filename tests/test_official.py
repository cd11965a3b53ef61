"""Published checkpoints, and agreement with the published layers."""

import json
import re

import pytest
import torch

from mapkg.configs import CONFIGS
from mapkg.hooks import record
from mapkg.models import build
from mapkg.models.official import load_layer, load_network

TOLERANCE = dict(rtol=1e-10, atol=1e-10)
OURS_TO_PUBLISHED = {
    "attention.query": "attention.Q",
    "attention.key": "attention.K",
    "attention.value": "attention.V",
    "attention.edge": "attention.proj_e",
    **{
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
    },
}
NETWORK_TO_PUBLISHED = {
    "node_embedding": "embedding_h",
    "edge_embedding": "embedding_e",
    "head.0": "MLP_layer.FC_layers.0",
    "head.2": "MLP_layer.FC_layers.1",
    "head.4": "MLP_layer.FC_layers.2",
}
SMALL = CONFIGS["GT-ZINC"].replace(hidden_channels=16, heads=4, num_layers=3)
VARIANTS = {
    "as published": {},
    "LayerNorm": dict(batch_norm=False, layer_norm=True),
    "both norms": dict(layer_norm=True),
    "no norm": dict(batch_norm=False),
    "biases": dict(use_bias=True),
    "biases without norm": dict(use_bias=True, batch_norm=False),
}


@pytest.fixture(params=["base", "bias"])
def published(request, oracle):
    """Recorded inputs, weights and outputs of a published layer."""
    return oracle(f"gt__{request.param}__f64")


def layer_of(published):
    weights = {k.removeprefix("sd/"): v for k, v in published.items() if k.startswith("sd/")}
    return load_layer(weights, "gt", heads=json.loads(published["meta"])["heads"])


def published_name(ours):
    module, _, parameter = ours.rpartition(".")
    return f"{OURS_TO_PUBLISHED[module]}.{parameter}"


def own_network(seed=0, **changes):
    """A network of ours with statistics and norm weights that are worth reading."""
    torch.manual_seed(seed)
    model = build(SMALL.replace(**changes)).double().eval()
    for name, value in model.state_dict().items():
        if "norm" in name and value.is_floating_point():
            value.uniform_(0.5, 2)
    return model


def as_published(model):
    """The weights of a network of ours under the names of the published one."""
    weights = {}
    for name, value in model.state_dict().items():
        module, _, parameter = name.rpartition(".")
        if module in NETWORK_TO_PUBLISHED:
            theirs = f"{NETWORK_TO_PUBLISHED[module]}.{parameter}"
        else:
            layers, number, within = name.split(".", 2)
            theirs = f"{layers}.{number}.{published_name(within)}"
        weights[theirs] = value
    return weights


def predictions(model):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(28, (12,), generator=generator)
    edge_index = torch.randint(6, (2, 30), generator=generator)
    edge_index[:, 15:] += 6
    edge_attr = torch.randint(4, (30,), generator=generator)
    return model(x, edge_index, edge_attr, torch.arange(12) // 6, 2)


def test_evaluation_mode_agrees_with_the_published_layer(published):
    layer = layer_of(published)
    with record(layer, "attention.*") as seen:
        x, edge_attr = layer(published["h"], published["edge_index"], published["e"])
    torch.testing.assert_close(x, published["h_out"], **TOLERANCE)
    torch.testing.assert_close(edge_attr, published["e_out"], **TOLERANCE)
    for ours, theirs in {
        "attention.score": "malog_e",
        "attention.attended": "malog_h",
        "attention.attention_weight": "alpha",
    }.items():
        torch.testing.assert_close(seen[ours][0], published[theirs], **TOLERANCE)


def test_training_mode_gradients_and_statistics_agree_with_the_published_layer(published):
    layer = layer_of(published).train()
    h, e = (published[name].clone().requires_grad_() for name in "he")
    x, edge_attr = layer(h, published["edge_index"], e)
    torch.testing.assert_close(x, published["train/h_out"], **TOLERANCE)
    torch.testing.assert_close(edge_attr, published["train/e_out"], **TOLERANCE)
    loss = (x * published["cot_h"]).sum() + (edge_attr * published["cot_e"]).sum()
    loss.backward()
    torch.testing.assert_close(loss.detach(), published["train/loss"], **TOLERANCE)
    torch.testing.assert_close(h.grad, published["train/grad_h"], **TOLERANCE)
    torch.testing.assert_close(e.grad, published["train/grad_e"], **TOLERANCE)
    for name, parameter in layer.named_parameters():
        expected = published[f"grad/{published_name(name)}"]
        torch.testing.assert_close(parameter.grad, expected, **TOLERANCE)
    for name, buffer in layer.named_buffers():
        expected = published[f"train/buf/{published_name(name)}"]
        torch.testing.assert_close(buffer, expected, **TOLERANCE)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_published_network_gives_the_outputs_of_ours(changes):
    model = own_network(**changes)
    weights = as_published(model)
    loaded = load_network(weights, "gt", heads=4)
    assert not loaded.training
    assert torch.equal(predictions(loaded), predictions(model))
    assert {name for name, _ in loaded.named_modules()} == {n for n, _ in model.named_modules()}
    for (name, found), (_, expected) in zip(
        loaded.named_modules(), model.named_modules(), strict=True
    ):
        assert type(found) is type(expected), name


def test_reading_weights_shares_no_memory_with_them():
    weights = as_published(own_network())
    loaded = load_network(weights, "gt", heads=4)
    before = predictions(loaded)
    for value in weights.values():
        value.zero_()
    assert torch.equal(predictions(loaded), before)


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
    [
        "layers.1.attention.proj_x.weight",
        "layers.1.gamma",
        "embedding_lap_pos_enc.weight",
        "MLP_layer.FC_layers.3.weight",
    ],
)
def test_an_unknown_name_is_an_error_that_lists_it(name):
    weights = as_published(own_network()) | {name: torch.zeros(1)}
    with pytest.raises(ValueError, match=rf"unknown names .*: {re.escape(name)};"):
        load_network(weights, "gt", heads=4)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.attention.Q.weight",
        "layers.1.attention.proj_e.weight",
        "layers.2.O_h.bias",
        "layers.2.batch_norm2_e.running_var",
        "embedding_e.weight",
        "MLP_layer.FC_layers.2.weight",
        "MLP_layer.FC_layers.0.bias",
    ],
)
def test_a_missing_name_is_an_error_that_lists_it(name):
    weights = as_published(own_network())
    del weights[name]
    with pytest.raises(ValueError, match=f"missing in the published weights: {re.escape(name)}$"):
        load_network(weights, "gt", heads=4)


def test_every_missing_name_is_listed():
    weights = as_published(own_network())
    gone = [name for name in weights if "FFN_e_layer2" in name]
    assert len(gone) == 6
    for name in gone:
        del weights[name]
    with pytest.raises(ValueError, match=f"missing .*: {re.escape(', '.join(gone))}$"):
        load_network(weights, "gt", heads=4)


def test_a_layer_alone_can_be_read_and_names_what_it_misses():
    model = own_network()
    weights = {
        name.removeprefix("layers.1."): value
        for name, value in as_published(model).items()
        if name.startswith("layers.1.")
    }
    layer = load_layer(weights, "gt", heads=4)
    inputs = torch.randn(5, 16).double(), torch.tensor([[0, 1], [2, 2]]), torch.ones(2, 16).double()
    for found, expected in zip(layer(*inputs), model.layers[1](*inputs), strict=True):
        assert torch.equal(found, expected)
    del weights["O_e.weight"]
    with pytest.raises(ValueError, match=r"missing in the published weights: O_e\.weight$"):
        load_layer(weights, "gt", heads=4)
    with pytest.raises(ValueError, match=r"missing .*: attention\.Q\.weight$"):
        load_layer({}, "gt", heads=4)


@pytest.mark.parametrize("load", [load_layer, load_network])
def test_another_kind_is_an_error_that_names_the_known_ones(load):
    with pytest.raises(ValueError, match=r"kind: expected one of \('gt',\), got 'graphit'"):
        load(as_published(own_network()), "graphit", heads=4)


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
