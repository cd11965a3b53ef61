"""Published checkpoints, and agreement with the published layers."""

import json

import pytest
import torch

from mapkg.hooks import record
from studies.extras import Completion, FakeEdgeShare, build
from studies.extras.official import load_layer, load_network
from studies.published import CONFIGS

ATTENTION = {"query": "Q", "key": "K", "value": "V", "edge": "E"}
ATTENTION |= {f"fake_{name}": f"{ATTENTION[name]}_2" for name in ("query", "key", "edge")}
BLOCK = {"project": "O_{}", "expand": "FFN_{}_layer1", "contract": "FFN_{}_layer2"}
BLOCK |= {f"{kind}_norm{n}": f"{kind}_norm{n}_{{}}" for kind in ("batch", "layer") for n in "12"}
BLOCK = {
    f"{stream}_block.{ours}": theirs.format(stream[0].replace("n", "h"))
    for stream in ("node", "edge")
    for ours, theirs in BLOCK.items()
}
NETWORK = {"node_embedding": "embedding_h", "edge_embedding": "embedding_e"}
NETWORK |= {f"head.{2 * number}": f"MLP_layer.FC_layers.{number}" for number in range(3)}
SMALL = CONFIGS["GT-ZINC"].replace(hidden_channels=16, heads=4, num_layers=3)
TERM = dict(explicit_bias="published", use_bias=True)
NETWORKS = {
    "as published": ("gt", "attention", {}),
    "LayerNorm": ("gt", "attention", dict(batch_norm=False, layer_norm=True)),
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


PUBLISHED_LAYERS = ("gt__base", "gt__bias", "graphit__base", "graphit__bias", "graphit__full")
PUBLISHED_LAYERS += ("san__base", "san__full")
ROWS_OF_EDGES = ("e", "e_out", "malog_e", "score_exp", "alpha", "real", "k_RW", "cot_e")
ROWS_OF_EDGES += ("train/e_out", "train/grad_e")


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


def outputs_of(layer, published, h, e):
    """Nodes, edges, scores and weights (before division) of a layer, fake edges last."""
    edge_index, meta = published["edge_index"], published["meta"]
    rest, factor, real = (), 1.0, len(e)
    if meta["full_graph"]:
        real, factor = int(published["real"].sum()), published["k_RW"]
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
    if module in BLOCK:
        return f"{BLOCK[module]}.{parameter}"
    name = module.removeprefix("attention.")
    theirs = "proj_e" if (kind, name) == ("gt", "edge") else ATTENTION[name]
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
        if module in NETWORK:
            theirs = f"{NETWORK[module]}.{parameter}"
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


def predictions(model):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(28, (12,), generator=generator)
    edge_index = torch.randint(6, (2, 30), generator=generator)
    edge_index[:, 15:] += 6
    edge_attr = torch.randint(4, (30,), generator=generator)
    return model(x, edge_index, edge_attr, torch.arange(12) // 6, 2)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_outputs_gradients_and_statistics_agree_with_the_published_layer(published):
    weights = {k.removeprefix("sd/"): v for k, v in published.items() if k.startswith("sd/")}
    kind, attention = published["meta"]["layer"], "attention"
    layer = load_layer(weights, kind, heads=published["meta"]["heads"])
    with record(layer, ["attention.attended", "attention.attention_weight"]) as seen:
        x, edge_attr, score, weight = outputs_of(layer, published, published["h"], published["e"])
    close(x, published["h_out"])
    # A layer without an edge stream, recorded or not, gives its edges back.
    close(edge_attr, published.get("e_out", published["e"]))
    close(score, published["malog_e"])
    close(weight, published["score_exp"])
    close(seen["attention.attended"][0], published["malog_h"])
    close(seen["attention.attention_weight"][0], published["alpha"])

    h, e = (published[name].clone().requires_grad_() for name in "he")
    x, edge_attr, _, _ = outputs_of(layer.train(), published, h, e)
    close(x, published["train/h_out"])
    loss = (x * published["cot_h"]).sum()
    if "train/e_out" in published:
        close(edge_attr, published["train/e_out"])
        loss = loss + (edge_attr * published["cot_e"]).sum()
    loss.backward()
    close(h.grad, published["train/grad_h"])
    close(e.grad, published["train/grad_e"])
    if kind == "graphit":
        attention = "attention_h"
    for name, parameter in layer.named_parameters():
        close(parameter.grad, published[f"grad/{published_name(name, kind, attention)}"])
        assert parameter.grad.any(), name
    for name, buffer in layer.named_buffers():
        close(buffer, published[f"train/buf/{published_name(name, kind)}"])


@pytest.mark.parametrize(("kind", "attention", "changes"), NETWORKS.values(), ids=NETWORKS)
def test_a_published_network_gives_the_outputs_of_ours(kind, attention, changes):
    model = own_network(kind, **changes)
    weights = as_published(model, kind, attention)
    loaded = load_network(weights, kind, heads=4, gamma=changes.get("gamma"))
    assert not loaded.training
    ours, theirs = ([(n, type(m)) for n, m in x.named_modules()] for x in (model, loaded))
    assert ours == theirs
    assert torch.equal(predictions(loaded), predictions(model))
    for value in weights.values():
        value.zero_()
    assert predictions(loaded).any(), "the weights are a copy"


def test_what_weights_do_not_show_is_what_the_caller_says():
    weights, own = as_published(own_network()), own_network()
    for changes in (dict(heads=2), dict(readout="sum"), dict(readout="max"), dict(residual=False)):
        expected = build(SMALL.replace(**changes)).double().eval()
        expected.load_state_dict(own.state_dict())
        found = predictions(load_network(weights, "gt", **{"heads": 4} | changes))
        assert torch.equal(found, predictions(expected))
        assert not torch.allclose(found, predictions(own))
    # "O_linear": false, as if the map were the identity.
    found = predictions(load_network(weights, "gt", heads=4, project=False))
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if "project" in name:
                parameter.copy_(torch.eye(16) if name.endswith("weight") else torch.zeros(16))
    assert torch.equal(found, predictions(own))


def test_encoders_of_several_tables_are_read():
    model = own_network(num_node_types=(5, 28, 3), num_edge_types=(4, 2))
    weights = as_published(model)
    for name, kind, sizes in (("h", "atom", (5, 28, 3)), ("e", "bond", (4, 2))):
        tables = weights.pop(f"embedding_{name}.weight").split(sizes)
        names = (f"embedding_{name}.{kind}_embedding_list.{i}.weight" for i in range(3))
        weights |= dict(reversed([*zip(names, tables, strict=False)]))  # in any order
    loaded = load_network(weights, "gt", heads=4)
    for ours in ("node_embedding", "edge_embedding"):
        found, expected = (getattr(each, ours) for each in (loaded, model))
        assert found.sizes == expected.sizes and torch.equal(found.weight, expected.weight)
    narrow = as_published(own_network())
    narrow["embedding_h.weight"] = narrow["embedding_h.weight"][:, :6]
    with pytest.raises(ValueError, match=r"embedding_h: expected 16 channels.*got 6; .* TOX21"):
        load_network(narrow, "gt", heads=4)


def prefixed(prefix):
    return lambda weights: {f"{prefix}{name}": value for name, value in weights.items()}


def without(part):
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def changed(name):
    return lambda weights: weights | {name: weights.get(name, torch.zeros(2))[:-1]}


BAD = [
    (lambda weights: {"epoch": 3, "model": weights}, "'epoch' is none.* there: epoch, model; pass"),
    (prefixed("module."), r"all names begin with 'module\.': module\.embedding_h\.weight, "),
    (prefixed("net."), r"numbered from 0 .* that are there: net\.embedding_h\.weight, "),
    (lambda weights: "run/best.pt", "expected a dict from names to tensors.* got str"),
    (changed("layers.1.attention.proj_x.weight"), r"unknown names .*: layers\.1\..*x\.weight;"),
    (changed("gamma"), "unknown names .*: gamma;"),
    (without("layers.0.attention.Q.w"), r"missing .*weights: layers\.0\.attention\.Q\.weight$"),
    (without("proj_e.weight"), r"missing .*: layers\.0\..*proj_e.weight, .*layers\.2\..*weight$"),
    (without("running_var"), r"missing .*: .*layers\.2\.batch_norm2_e\.running_var$"),
    (without("embedding_e"), r"missing .*: embedding_e\.weight$"),
    (without("layers.1."), r"numbered from 0 .*, found \[0, 2\]"),
    (changed("layers.1.FFN_h_layer1.weight"), "unexpected shape"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_weights_that_do_not_fit_are_an_error_that_shows_what_is_there(change, message):
    weights = as_published(own_network(**TERM))
    with pytest.raises((TypeError, ValueError), match=message):
        load_network(change(weights), "gt", heads=4)


def test_another_kind_is_an_error_and_a_layer_needs_its_names():
    weights = as_published(own_network())
    for load, state, kind, message in (
        (load_layer, weights, "egat", r"kind: expected one of .*'san'\), got 'egat'"),
        (load_network, weights, "san", r"unknown names .*attention\.proj_e\.weight"),
        (load_layer, {}, "gt", r"missing .*: attention\.Q\.weight$"),
    ):
        with pytest.raises(ValueError, match=message):
            load(state, kind, heads=4)


def test_the_gamma_of_san_is_read_once_and_where_it_is_used():
    for changes in (dict(full_graph=True), {}):  # learned, stored in every layer, too, and unused
        model = own_network("san", **changes)
        weights = as_published(model, "san", "attention_h")
        gamma = weights.setdefault("gamma", torch.ones(1).double())
        weights |= {f"layers.{number}.attention_h.gamma": gamma for number in range(3)}
        found = load_network(weights, "san", heads=4)
        assert torch.equal(predictions(found), predictions(model))
        with pytest.raises(ValueError, match=r"gamma: expected None, it has no use, got 0\.2"):
            load_network(weights, "san", heads=4, gamma=0.2)
    fixed = own_network("san", full_graph=True, gamma=0.2)
    with pytest.raises(ValueError, match="gamma: expected a value, the weights have none"):
        load_network(as_published(fixed, "san"), "san", heads=4)
