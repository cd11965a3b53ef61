"""The attention equations, by hand and against a plain loop, and what surrounds them in a layer."""

import itertools
import math

import numpy as np
import pytest
import torch
from random_graphs import random_graph
from torch import nn

from mapkg.hooks import record
from mapkg.models import EdgeAttention, GraphTransformerLayer, NodeStreamLayer, build
from mapkg.models.edge_attention import EXPLICIT_BIASES, ResidualBlock
from studies.published import CONFIGS, PUBLISHED

EXACT = dict(rtol=1e-11, atol=1e-11)
SEEN = ("score", "attention_weight", "attended")
TERMS = ("intended", "overwritten", "sink")
BLOCK_OPTIONS = [
    dict(zip(("residual", "batch_norm", "layer_norm"), options, strict=True))
    for options in itertools.product((False, True), repeat=3)
]


def random_attention(seed=0, channels=12, heads=3, scale=1.0, **options):
    torch.manual_seed(seed)
    attention = EdgeAttention(channels, heads, **options).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.mul_(scale)
    return attention


def without_term(attention):
    """The same layer with no Explicit Bias Term and no bound."""
    sizes = attention.heads * attention.head_channels, attention.heads
    plain = EdgeAttention(*sizes, bias=attention.query.bias is not None).double()
    weights = attention.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    return plain


def diagonal_(linear, values):
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor(values)))


@torch.no_grad()
def attention_by_loop(a, x, edge_index, edge_attr):
    """Score [E, D], weights [E, H] and attended values [N, D], node by node and head by head."""
    query, key, value = (linear(x) for linear in (a.query, a.key, a.value))
    gate = torch.ones_like(edge_attr) if a.edge is None else a.edge(edge_attr)
    score, attended = torch.zeros_like(gate), torch.zeros_like(x)
    alpha = x.new_zeros(len(gate), a.heads)
    clamp = lambda value: min(5.0, max(-5.0, value))  # noqa: E731
    for head, i in itertools.product(range(a.heads), range(len(x))):
        part = slice(head * a.head_channels, (head + 1) * a.head_channels)
        root, beta, weights = math.sqrt(a.head_channels), 0.0, {}
        if a.explicit_bias != "none":
            beta = (query[i, part] @ a.key_term[head] / root).item()
        for e in (edge_index[1] == i).nonzero().flatten().tolist():
            j = edge_index[0, e]
            score[e, part] = key[j, part] * query[i, part] / root * gate[e, part]
            if a.explicit_bias in ("intended", "overwritten"):
                score[e, part] += beta * a.edge_term[head]
            summed = beta if a.explicit_bias == "overwritten" else score[e, part].sum().item()
            weights[e] = 1.0 if a.attention == "uniform" else math.exp(clamp(summed))
        sink = math.exp(min(5.0, beta)) if a.explicit_bias == "sink" else 0.0
        total = sum(weights.values()) + sink + 1e-6
        for e, weight in weights.items():
            alpha[e, head] = weight / total
            brought = value[edge_index[0, e], part]
            if a.explicit_bias in ("intended", "overwritten"):
                brought = brought + a.value_term[head]
            attended[i, part] += weight / total * brought
        if sink:
            attended[i, part] += sink / total * a.value_term[head]
    return score, alpha, attended


def test_three_nodes_by_hand():
    # Two heads of two channels. Q = h, K = 2h, E = e, V = diag(1, 10, 100, 1000) h.
    attention = EdgeAttention(4, 2).double()
    diagonal_(attention.query, [1.0, 1.0, 1.0, 1.0])
    diagonal_(attention.key, [2.0, 2.0, 2.0, 2.0])
    diagonal_(attention.edge, [1.0, 1.0, 1.0, 1.0])
    diagonal_(attention.value, [1.0, 10.0, 100.0, 1000.0])
    x = torch.tensor([[1, 2, 0, 1], [0, 1, 1, -1], [2, 0, 1, 1]], dtype=torch.float64)
    edge_index = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 0]])
    edge_attr = torch.tensor(
        [[1, 1, 1, 1], [1, -1, 2, 1], [3, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.float64
    )
    with record(attention, "attention_weight") as seen:
        attended, score = attention(x, edge_index, edge_attr)

    root = math.sqrt(2)
    # K_j Q_i E_ji / sqrt(2); first channel of the edge 2 -> 0: 4 * 1 * 3 / sqrt(2) = 6 sqrt(2).
    expected_score = torch.tensor(
        [
            [2 * root, 0, 0, root],
            [0, 0, 2 * root, -root],
            [6 * root, 0, 0, root],
            [0, 2 * root, 0, -root],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(score, expected_score, **EXACT)
    # Head sums: (2.83, 1.41), (0, 1.41); (8.49 -> 5, 1.41), (2.83, -1.41).
    # exp(2.828427) = 16.918829, exp(1.414214) = 4.113250, exp(-1.414214) = 0.243117,
    # exp(5) = 148.413159: 16.918829 / 17.918829 = 0.944193, 148.413159 / 165.331988 = 0.897668.
    expected_weight = torch.tensor(
        [[0.944193, 0.5], [0.055807, 0.5], [0.897668, 0.944193], [0.102332, 0.055807]],
        dtype=torch.float64,
    )
    torch.testing.assert_close(seen["attention_weight"][0], expected_weight, rtol=0, atol=1e-6)
    # V_0 = (1, 20, 0, 1000), V_1 = (0, 10, 100, -1000), V_2 = (2, 0, 100, 1000).
    # Node 0: 0.897668 V_2 + 0.102332 V_1 in head 0, 0.944193 V_2 + 0.055807 V_1 in head 1.
    # Node 2: 0.944193 V_0 + 0.055807 V_1 in head 0, half and half in head 1.
    expected_attended = torch.tensor(
        [
            [1.795336, 1.023320, 100.0, 888.386],
            [0.0, 0.0, 0.0, 0.0],
            [0.944193, 19.441930, 50.0, 0.0],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(attended, expected_attended, rtol=1e-6, atol=1e-4)
    assert torch.equal(attended[1], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        # Head sum beyond the clamp on both sides: exp(-5) / (exp(-5) + 1e-6) and the same at +5.
        (-1000.0, 0.006737946999085467 / (0.006737946999085467 + 1e-6)),
        (+1000.0, 148.4131591025766 / (148.4131591025766 + 1e-6)),
        (0.0, 1 / (1 + 1e-6)),
        (4.9, 134.28977968493552 / (134.28977968493552 + 1e-6)),
    ],
)
def test_a_lone_edge_has_a_weight_of_one_up_to_the_epsilon(gate, expected):
    attention = EdgeAttention(1, 1).double()
    for linear in (attention.query, attention.key, attention.value, attention.edge):
        nn.init.ones_(linear.weight)
    attended, score = attention(
        torch.ones(2, 1, dtype=torch.float64),
        torch.tensor([[0], [1]]),
        torch.tensor([[gate]], dtype=torch.float64),
    )
    assert score.item() == gate
    assert attended[1].item() == pytest.approx(expected, rel=1e-12)


VARIANTS = [
    *({"explicit_bias": term, "bias": bias} for term in ("none", *TERMS) for bias in (False, True)),
    *({"attention": attention} for attention in ("uniform", "no_edge")),
]


@pytest.mark.parametrize("scale", [0.4, 3.0])
@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_equations_agree_with_a_loop_over_edges(options, scale):
    attention, graph = random_attention(scale=scale, **options), random_graph(11)
    with record(attention, SEEN) as seen:
        attended, score = attention(*graph)
    expected = attention_by_loop(attention, *graph)
    for name, values in zip(SEEN, expected, strict=True):
        torch.testing.assert_close(seen[name][0], values, **EXACT)
    assert torch.equal(seen["score"][0], score)
    assert torch.equal(seen["attended"][0], attended)
    sums = attention.split_heads(score).sum(dim=-1)  # the clamp acts on both sides, or not at all
    if "attention" not in options:
        assert ((sums > 5).any() and (sums < -5).any()) == (scale > 1)
    if attention.explicit_bias != "sink":  # the last node only sends
        assert (attended[-1] == 0).all()


@pytest.mark.parametrize("term", ["none", *TERMS])
def test_gradients_agree_with_finite_differences(term):
    attention = random_attention(channels=4, heads=2, bias=True, explicit_bias=term)
    x, edge_index, edge_attr = random_graph(1, nodes=5, edges=8, channels=4, scale=0.5)
    names, parameters = zip(*attention.named_parameters(), strict=True)

    def function(x, edge_attr, *parameters):
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(attention, weights, (x, edge_index, edge_attr))

    inputs = [tensor.detach().requires_grad_() for tensor in (x, edge_attr, *parameters)]
    assert torch.autograd.gradcheck(function, inputs)


def test_a_saturated_head_lets_no_gradient_through_its_weight():
    attention = random_attention()
    with torch.no_grad():
        attention.edge.weight[:4] *= 1e4  # the first head only
    x, edge_index, edge_attr = random_graph(1)
    attended, score = attention(x, edge_index, edge_attr)
    assert (score[:, :4].sum(dim=1).abs() > 5).all()
    assert (score[:, 4:].unflatten(1, (2, 4)).sum(dim=2).abs() < 5).all()
    (gradient,) = torch.autograd.grad(attended.square().sum(), score)
    assert (gradient[:, :4] == 0).all()
    assert (gradient[:, 4:] != 0).any()


@pytest.mark.parametrize(
    ("bound", "apply"), [("clip", lambda s: s.clamp(-1, 1)), ("tanh", torch.tanh)]
)
def test_a_bounded_score_is_the_bounded_product(bound, apply):
    attention, graph = random_attention(scale=3.0, score_bound=bound), random_graph(2)
    free = without_term(attention)(*graph)[1]
    assert free.abs().max() > 1
    torch.testing.assert_close(attention(*graph)[1], apply(free), **EXACT)


def test_the_dropout_of_the_score_acts_in_training_only_and_on_its_entries():
    attention, graph = random_attention(score_dropout=0.3), random_graph(2)
    plain, score = without_term(attention)(*graph)[1], attention(*graph)[1]
    dropped = score == 0
    assert 0.15 < dropped.double().mean() < 0.45
    torch.testing.assert_close(score[~dropped], plain[~dropped] / 0.7, **EXACT)
    assert torch.equal(attention.eval()(*graph)[1], plain)


def test_by_default_a_score_in_training_is_the_one_in_evaluation():
    graph = random_graph(1, scale=3.0)
    torch.manual_seed(0)
    layers = NodeStreamLayer(12, 3), GraphTransformerLayer(12, 3)
    for attention in (EdgeAttention(12, 3), *(layer.attention for layer in layers)):
        expected = attention.double().eval()(*graph)[1]
        assert expected.abs().max() > 1, "nothing bounds it"
        assert torch.equal(attention.train()(*graph)[1], expected)


# What the Explicit Bias Term comes to.


def test_unless_the_clamp_cuts_the_intended_term_adds_its_value_and_nothing_else():
    graph = random_graph(3)
    has_edges = torch.isin(torch.arange(9), graph[1][1])
    for scale, is_cut in ((0.4, False), (3.0, True)):
        attention = random_attention(scale=scale, explicit_bias="intended")
        found, score = attention(*graph)
        plain, plain_score = without_term(attention)(*graph)
        assert not torch.allclose(score, plain_score)  # what is recorded does change
        assert (attention.split_heads(score).sum(-1).abs().max() > 5) == is_cut
        rest = attention.split_heads(found - plain)[has_edges] - attention.value_term
        # Up to the epsilon of the denominator: weights sum to S / (S + eps), not to 1.
        assert rest.abs().max() > 0.1 if is_cut else rest.abs().max() < 1e-4


@pytest.mark.parametrize("bias", [False, True])
def test_the_published_term_of_a_node_stream_averages_neighbors(bias):
    torch.manual_seed(1)
    layer = NodeStreamLayer(12, 3, explicit_bias="published", use_bias=bias).double()
    attention, (x, edge_index, edge_attr) = layer.attention, random_graph(4)
    found, _ = attention(x, edge_index, edge_attr)
    for i in range(len(x) - 1):
        mean = attention.value(x)[edge_index[0, edge_index[1] == i]].mean(0)
        expected = mean + attention.value_term.flatten()
        torch.testing.assert_close(found[i], expected.nan_to_num(0.0), rtol=0, atol=1e-4)


def test_the_published_term_of_a_node_stream_leaves_key_and_edge_without_gradient():
    torch.manual_seed(2)
    layer = NodeStreamLayer(12, 3, explicit_bias="published", use_bias=True).double()
    layer(*random_graph(5))[0].square().sum().backward()
    a = layer.attention
    for parameter in (*a.key.parameters(), *a.edge.parameters(), a.edge_term):
        assert parameter.grad is None or not parameter.grad.any()
    assert a.value_term.grad.any()
    # The query is left with the epsilon's share, tiny but not nothing: Adam rescales it.
    assert 0 < a.query.weight.grad.abs().max() < 1e-3 * a.value.weight.grad.abs().max()


def test_a_sink_whose_key_is_minus_infinity_is_none():
    attention, graph = random_attention(explicit_bias="sink", bias=True), random_graph(6)
    with torch.no_grad():  # queries of one, so that every beta is the sum of the key term
        attention.query.weight.zero_()
        attention.query.bias.fill_(1)
    plain = without_term(attention)(*graph)[0]
    assert not torch.allclose(attention(*graph)[0], plain)
    with torch.no_grad():
        attention.key_term.fill_(-torch.inf)
    assert torch.equal(attention(*graph)[0], plain)


@pytest.mark.parametrize("layer_type", [NodeStreamLayer, GraphTransformerLayer])
@pytest.mark.parametrize("term", EXPLICIT_BIASES)
def test_terms_and_biases_are_there_each_for_itself(layer_type, term):
    terms = {"none": (), "sink": ("key_term", "value_term")}
    maps = ("query", "key", "value", "edge")
    for use_bias in (False, True):
        layer = layer_type(12, 3, explicit_bias=term, use_bias=use_bias)
        expected = {*terms.get(term, ("key_term", "value_term", "edge_term"))}
        expected |= {f"{name}.{p}" for name in maps for p in ("weight", "bias")[: 1 + use_bias]}
        assert {name for name, _ in layer.attention.named_parameters()} == expected
        published = {NodeStreamLayer: "overwritten", GraphTransformerLayer: "intended"}[layer_type]
        assert layer.attention.explicit_bias == (published if term == "published" else term)


def test_the_term_of_san_on_ogbn_proteins_never_arrives():
    def term(name, value="published"):
        model = build(PUBLISHED[f"{name}-PROTEINS"].replace(explicit_bias=value))
        return model.layers[0].attention.explicit_bias

    assert [term(n) for n in ("GT", "GraphiT", "SAN")] == ["intended", "overwritten", "none"]
    assert term("SAN", "intended") == "intended"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "GT",
            dict(explicit_bias="sinks"),
            r"explicit_bias: expected one of \('none', 'published'",
        ),
        (
            "GT",
            dict(score_bound="relu"),
            r"score_bound: expected one of \('none', 'clip', 'tanh'\)",
        ),
        (
            "GT",
            dict(attention="some"),
            r"attention: expected one of \('full', 'uniform', 'no_edge'\)",
        ),
        ("GAT", dict(explicit_bias="sink"), "explicit_bias: gat is built with 'none' only"),
    ],
)
def test_unknown_values_are_errors_that_name_the_known_ones(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(CONFIGS[f"{name}-ZINC"].replace(**changes))


# What follows attention in a stream.


def random_block(seed, channels=6, **options):
    """A block whose norms have weights and running statistics that are worth applying."""
    torch.manual_seed(seed)
    block = ResidualBlock(channels, **options).double().eval()
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, nn.LayerNorm | nn.BatchNorm1d):
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return block


def block_by_formula(block, x, attended, *, residual, batch_norm, layer_norm):
    """The block's equation in numpy, from its weights; batch statistics if it is training."""
    weights = {name: tensor.detach().numpy() for name, tensor in block.state_dict().items()}

    def affine(name, rows):
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(number, rows):
        if layer_norm:
            centred = rows - rows.mean(axis=1, keepdims=True)
            scale = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
            name = f"layer_norm{number}"
            rows = centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        if batch_norm:
            name = f"batch_norm{number}"
            mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
            if block.training:
                mean, variance = rows.mean(axis=0), rows.var(axis=0)
            rows = (rows - mean) / np.sqrt(variance + 1e-5)
            rows = rows * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        return rows

    x, attended = x.numpy(), attended.numpy()
    update = affine("project", attended)
    u = norm(1, x + update if residual else update)
    update = affine("contract", np.maximum(affine("expand", u), 0))
    return torch.from_numpy(norm(2, u + update if residual else update))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options", BLOCK_OPTIONS, ids=lambda o: "+".join(k for k, v in o.items() if v) or "plain"
)
def test_a_block_agrees_with_its_equation(options, training):
    block = random_block(0, **options).train(training)
    x, attended = torch.randn(2, 11, 6, dtype=torch.float64)
    expected = block_by_formula(block, x, attended, **options)
    torch.testing.assert_close(block(x, attended), expected, **EXACT)


def test_dropout_of_the_attended_values_comes_before_the_projection():
    # The projection is the identity, the old features are zero and the feed-forward map adds
    # nothing: the output is what dropout leaves of the input.
    block = ResidualBlock(50, dropout=0.3, batch_norm=False).train()
    with torch.no_grad():
        block.project.weight.copy_(torch.eye(50))
        block.project.bias.fill_(7.0)  # added after dropout: never dropped, never scaled
        block.contract.weight.zero_()
        block.contract.bias.zero_()
    torch.manual_seed(0)
    attended = torch.rand(200, 50) + 1
    output = block(torch.zeros(200, 50), attended)
    dropped = output == 7
    torch.testing.assert_close(output[~dropped], (attended / 0.7 + 7)[~dropped])
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.02)  # 4 standard errors


def test_dropout_in_the_feed_forward_map_comes_after_the_relu():
    block = ResidualBlock(50, dropout=0.3, batch_norm=False, residual=False).train()
    with torch.no_grad():
        block.project.weight.zero_()
        block.project.bias.fill_(1.0)  # so that dropout of the attended values has no effect
        block.expand.weight.zero_()
        block.expand.bias.copy_(torch.linspace(-5, -1, 100).where(torch.arange(100) >= 50, 3.0))
        block.contract.weight.copy_(torch.cat([torch.eye(50), torch.eye(50)], dim=1))
        block.contract.bias.zero_()
    torch.manual_seed(0)
    output = block(torch.zeros(200, 50), torch.zeros(200, 50))
    # The second half of the hidden units is negative, so relu leaves the first half: 3 or 3/0.7.
    dropped = output == 0
    torch.testing.assert_close(output[~dropped], torch.full_like(output, 3 / 0.7)[~dropped])
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("layer_type", [NodeStreamLayer, GraphTransformerLayer])
def test_a_layer_sends_attended_values_to_nodes_and_the_score_to_edges(layer_type):
    torch.manual_seed(0)
    layer, (x, edge_index, edge_attr) = layer_type(12, 3).double().eval(), random_graph(1)
    score, _, attended = attention_by_loop(layer.attention, x, edge_index, edge_attr)
    nodes, edges = layer(x, edge_index, edge_attr)
    torch.testing.assert_close(nodes, layer.node_block(x, attended), **EXACT)
    if layer_type is NodeStreamLayer:
        assert edges is edge_attr
    else:
        torch.testing.assert_close(edges, layer.edge_block(edge_attr, score), **EXACT)


def test_every_option_of_a_layer_reaches_both_streams_and_the_attention():
    # By default residual and BatchNorm are on; LayerNorm, bias and dropout are off.
    off = dict(residual=False, batch_norm=False, layer_norm=True)
    for options in ({}, dict(off, dropout=0.25, use_bias=True)):
        layer = GraphTransformerLayer(4, 2, **options)
        assert (layer.attention.query.bias is None) == (not options)
        for block in (layer.node_block, layer.edge_block):
            assert block.residual == (not options)
            assert block.dropout.p == options.get("dropout", 0)
            norms = [getattr(block, f"{kind}_norm{i}") for kind in ("layer", "batch") for i in "12"]
            kinds = (nn.LayerNorm, nn.Identity) if options else (nn.Identity, nn.BatchNorm1d)
            assert [type(norm) for norm in norms] == [kind for kind in kinds for _ in range(2)]
