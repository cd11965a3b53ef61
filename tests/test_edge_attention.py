"""The attention equations against plain loops, and what surrounds them in a layer; EGAT."""

import itertools
import math

import pytest
import torch
from random_graphs import random_graph

from mapkg.hooks import record
from mapkg.models import EdgeAttention, GraphTransformerLayer, NodeStreamLayer, build
from mapkg.models.edge_attention import ResidualBlock
from mapkg.models.egat import EdgeGATAttention, EdgeGATLayer
from studies.published import CONFIGS, PUBLISHED

EXACT = dict(rtol=1e-11, atol=1e-11)
SEEN = ("score", "attention_weight", "attended")
TERMS = ("intended", "overwritten", "sink")


def random_attention(scale=1.0, **options):
    torch.manual_seed(0)
    attention = EdgeAttention(12, 3, **options).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.mul_(scale)
    return attention


def unbounded(attention):
    """The same layer without bound and dropout."""
    plain = EdgeAttention(12, 3).double()
    plain.load_state_dict(attention.state_dict())
    return plain


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


def test_a_bounded_score_is_the_bounded_product():
    for bound, apply in (("clip", lambda s: s.clamp(-1, 1)), ("tanh", torch.tanh)):
        attention, graph = random_attention(scale=3.0, score_bound=bound), random_graph(2)
        free = unbounded(attention)(*graph)[1]
        assert free.abs().max() > 1
        torch.testing.assert_close(attention(*graph)[1], apply(free), **EXACT)


def test_the_dropout_of_the_score_acts_in_training_only_on_its_entries_and_not_by_default():
    attention, graph = random_attention(score_dropout=0.3), random_graph(2)
    plain, score = unbounded(attention)(*graph)[1], attention(*graph)[1]
    torch.manual_seed(0)
    layer = GraphTransformerLayer(12, 3).attention.double()
    assert torch.equal(layer(*graph)[1], layer.eval()(*graph)[1])
    dropped = score == 0
    assert 0.15 < dropped.double().mean() < 0.45
    torch.testing.assert_close(score[~dropped], plain[~dropped] / 0.7, **EXACT)
    assert torch.equal(attention.eval()(*graph)[1], plain)


def test_the_term_of_san_on_ogbn_proteins_never_arrives():
    for name, term, expected in (
        *(("GT", "published", "intended"), ("GraphiT", "published", "overwritten")),
        *(("SAN", "published", "none"), ("SAN", "intended", "intended")),
    ):
        model = build(PUBLISHED[f"{name}-PROTEINS"].replace(explicit_bias=term))
        assert model.layers[0].attention.explicit_bias == expected


def test_unknown_values_are_errors_that_name_the_known_ones():
    for name, changes, message in (
        ("GT", dict(explicit_bias="sinks"), r"explicit_bias: expected one of \('none', 'publi"),
        ("GT", dict(score_bound="relu"), r"score_bound: expected one of \('none', 'clip', 'tanh'"),
        ("GT", dict(attention="some"), r"attention: expected one of \('full', 'uniform', 'no_e"),
        ("GAT", dict(explicit_bias="sink"), "explicit_bias: gat is built with 'none' only"),
    ):
        with pytest.raises(ValueError, match=message):
            build(CONFIGS[f"{name}-ZINC"].replace(**changes))


def block_by_formula(block, x, attended, *, residual, batch_norm, layer_norm):
    """The block's equation from its weights; batch statistics if it is training."""
    weights = block.state_dict()

    def affine(name, rows):
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(number, rows):
        for kind, axis, is_on in (("layer", 1, layer_norm), ("batch", 0, batch_norm)):
            name = f"{kind}_norm{number}"
            mean, variance = rows.mean(axis, keepdim=True), rows.var(axis, False, keepdim=True)
            if kind == "batch" and is_on and not block.training:
                mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
            if is_on:
                rows = (rows - mean) / (variance + 1e-5).sqrt()
                rows = rows * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        return rows

    update = affine("project", attended)
    u = norm(1, x + update if residual else update)
    update = affine("contract", affine("expand", u).clamp(min=0))
    return norm(2, u + update if residual else update)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("switches", [*itertools.product((False, True), repeat=3)], ids=str)
@torch.no_grad()
def test_a_block_agrees_with_its_equation(switches, training):
    torch.manual_seed(0)
    options = dict(zip(("residual", "batch_norm", "layer_norm"), switches, strict=True))
    block = ResidualBlock(6, **options).double().train(training)
    for name, value in block.state_dict().items():
        if "norm" in name and value.is_floating_point():
            value.uniform_(0.5, 2)
    x, attended = torch.randn(2, 11, 6, dtype=torch.float64)
    expected = block_by_formula(block, x, attended, **options)
    torch.testing.assert_close(block(x, attended), expected, **EXACT)


def test_dropout_comes_before_the_projection_and_after_the_relu():
    torch.manual_seed(0)
    block = ResidualBlock(50, dropout=0.3, batch_norm=False, residual=False).train()
    seen = []
    for module in (block.project, block.contract):
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    attended = torch.rand(200, 50) + 1
    block(torch.zeros(200, 50), attended)
    whole = attended, block.expand(block.project(seen[0])).relu()
    for found, without in zip(seen[:2], whole, strict=True):
        kept = found != 0
        torch.testing.assert_close(found[kept], without[kept] / 0.7)
        share = (~kept[without > 0]).double().mean().item()
        assert share == pytest.approx(0.3, abs=0.02)  # four standard errors


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


@torch.no_grad()
def egat_by_loop(a, x, edge_index, edge_attr):
    """f' [E, D], alpha [E, H] and h' [N, D], edge by edge and head by head."""
    edges = edge_index.T.tolist()
    rows = [torch.cat([x[j], row, x[i]]) for (j, i), row in zip(edges, edge_attr, strict=True)]
    before = torch.stack([a.edge.weight @ row for row in rows])
    before = before if a.edge.bias is None else before + a.edge.bias
    score = torch.where(before > 0, before, before / 100)
    # The bias of the logit cancels.
    logits = [[(a.logit.weight @ head).sum() for head in row.view(3, 4)] for row in score]
    weight = torch.tensor(logits).double().exp()
    alpha, attended = torch.zeros_like(weight), torch.zeros_like(x).view(-1, 3, 4)
    for e, (j, i) in enumerate(edges):
        alpha[e] = weight[e] / sum(weight[n] for n, (_, target) in enumerate(edges) if target == i)
        attended[i] += alpha[e, :, None] * (a.value.weight @ x[j] + a.value.bias).view(3, 4)
    return score, alpha, attended.flatten(1)


@pytest.mark.parametrize("use_bias", [False, True])
def test_the_equations_of_egat_hold_edge_by_edge_and_a_layer_gives_its_score_to_the_next(use_bias):
    x, edge_index, edge_attr = random_graph(1)
    layers = torch.nn.ModuleList(EdgeGATLayer(12, 3, use_bias=use_bias).double() for _ in range(2))
    with record(layers, [f"?.attention.{name}" for name in SEEN]) as seen:
        for layer in layers:
            x, edge_attr = layer(x, edge_index, edge_attr)
    attended, given = random_graph(1)[::2]
    for number, layer in enumerate(layers):
        score, alpha, attended = egat_by_loop(layer.attention, attended, edge_index, given)
        for name, expected in zip(SEEN, (score, alpha, attended), strict=True):
            found = seen[f"{number}.attention.{name}"][0]
            torch.testing.assert_close(found, expected, **EXACT)
        given = score
    assert torch.equal(edge_attr, seen["1.attention.score"][0]) and torch.equal(x, found)


def test_weights_of_egat_are_drawn_normal_with_the_gain_of_relu():
    torch.manual_seed(0)
    attention = EdgeGATAttention(256, 4)
    # sqrt(2) * sqrt(2 / (fan in + fan out))
    fans = {attention.value: 256 + 256, attention.edge: 768 + 256, attention.logit: 64 + 4}
    for linear, fan in fans.items():
        weight, expected = linear.weight, 2 / math.sqrt(fan)
        assert weight.std().item() == pytest.approx(expected, rel=4 / weight.numel() ** 0.5)
        assert weight.abs().max() > 2.2 * expected  # a uniform draw ends at sqrt(3)
