"""The Explicit Bias Term: its equations against loops, and what they come to."""

import copy
import math

import pytest
import torch
from random_graphs import random_graph

from mapkg.hooks import record
from mapkg.models import EdgeAttention, GraphTransformerLayer, NodeStreamLayer, build
from mapkg.models.edge_attention import DENOMINATOR_EPS, EXPLICIT_BIASES, SCORE_CLAMP
from studies.extras.official import load_layer
from studies.published import CONFIGS, PUBLISHED

EXACT = dict(rtol=1e-10, atol=1e-10)
TERMS = ("intended", "overwritten", "sink")


def attention_with(term, *, seed=0, channels=12, heads=3, scale=1.0, **options):
    torch.manual_seed(seed)
    attention = EdgeAttention(channels, heads, explicit_bias=term, **options).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.mul_(scale)
    return attention


def without_term(attention):
    """The same layer with no Explicit Bias Term."""
    plain = EdgeAttention(
        attention.heads * attention.head_channels,
        attention.heads,
        bias=attention.query.bias is not None,
    ).double()
    weights = attention.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    return plain


def graph(seed=0, channels=12):
    return random_graph(100 + seed, channels=channels)


def by_loop(attention, x, edge_index, edge_attr):
    """Score [E, D] and attended values [N, D], node by node and head by head."""
    heads, width, term = attention.heads, attention.head_channels, attention.explicit_bias
    query, key, value = attention.query(x), attention.key(x), attention.value(x)
    gate = attention.edge(edge_attr)
    score, attended = torch.zeros_like(gate), torch.zeros_like(x)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(len(x)):
            beta = (query[i, part] @ attention.key_term[head]) / math.sqrt(width)
            top, bottom = torch.zeros(width, dtype=x.dtype), x.new_tensor(DENOMINATOR_EPS)
            for e in (edge_index[1] == i).nonzero().flatten().tolist():
                j = edge_index[0, e]
                s = key[j, part] * query[i, part] / math.sqrt(width) * gate[e, part]
                brought = value[j, part]
                if term != "sink":
                    s = s + beta * attention.edge_term[head]
                    brought = brought + attention.value_term[head]
                score[e, part] = s
                summed = beta if term == "overwritten" else s.sum()
                weight = summed.clamp(-SCORE_CLAMP, SCORE_CLAMP).exp()
                top, bottom = top + weight * brought, bottom + weight
            if term == "sink":
                weight = beta.clamp(max=SCORE_CLAMP).exp()
                top, bottom = top + weight * attention.value_term[head], bottom + weight
            attended[i, part] = top / bottom
    return score, attended


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("term", TERMS)
def test_every_term_agrees_with_a_loop_over_its_equation(term, bias, scale):
    attention = attention_with(term, bias=bias, scale=scale)
    x, edge_index, edge_attr = graph()
    found, score = attention(x, edge_index, edge_attr)
    expected_score, expected = by_loop(attention, x, edge_index, edge_attr)
    torch.testing.assert_close(score, expected_score, **EXACT)
    torch.testing.assert_close(found, expected, **EXACT)


def test_unless_the_clamp_cuts_the_intended_term_adds_its_value_and_nothing_else():
    attention = attention_with("intended", scale=0.4)
    x, edge_index, edge_attr = graph()
    with record(attention, ["score", "attention_weight"]) as seen:
        found, score = attention(x, edge_index, edge_attr)
    assert attention.split_heads(score).sum(-1).abs().max() < SCORE_CLAMP
    plain, plain_score = without_term(attention)(x, edge_index, edge_attr)
    assert not torch.allclose(score, plain_score)  # what is recorded does change
    # Up to the epsilon of the denominator: weights sum to S / (S + eps), not to 1.
    weights = seen["attention_weight"][0]
    total = torch.zeros(len(x), attention.heads).double().index_add_(0, edge_index[1], weights)
    has_edges = torch.zeros(len(x)).index_add_(0, edge_index[1], torch.ones(len(weights))) > 0
    assert ((1 - total[has_edges]).abs() < 1e-4).all()
    target = edge_index[1]
    beta = attention.split_heads(attention.query(x) / 2).mul(attention.key_term).sum(-1)
    factor = (beta * attention.edge_term.sum(-1)).exp()  # of all weights of a node and head
    raw = without_term(attention).head_weight(plain_score)
    sums = torch.zeros_like(total).index_add_(0, target, raw)
    shrunk = ((sums + DENOMINATOR_EPS) * factor / (sums * factor + DENOMINATOR_EPS)).unsqueeze(-1)
    rest = attention.split_heads(found) - attention.split_heads(plain) * shrunk
    torch.testing.assert_close(rest, total.unsqueeze(-1) * attention.value_term, **EXACT)


def test_a_cut_by_the_clamp_makes_the_intended_term_matter():
    attention = attention_with("intended", scale=3.0)
    x, edge_index, edge_attr = graph()
    found, score = attention(x, edge_index, edge_attr)
    assert attention.split_heads(score).sum(-1).abs().max() > SCORE_CLAMP
    plain, _ = without_term(attention)(x, edge_index, edge_attr)
    has_edges = torch.isin(torch.arange(len(x)), edge_index[1])
    rest = attention.split_heads(found - plain)[has_edges] - attention.value_term
    assert rest.abs().max() > 0.1


@pytest.mark.parametrize("bias", [False, True])
def test_the_published_term_of_a_node_stream_averages_neighbours(bias):
    torch.manual_seed(1)
    layer = NodeStreamLayer(12, 3, explicit_bias="published", use_bias=bias).double()
    attention = layer.attention
    x, edge_index, edge_attr = graph(1)
    found, _ = attention(x, edge_index, edge_attr)
    value = attention.value(x)
    for i in range(len(x)):
        neighbours = edge_index[0, edge_index[1] == i]
        mean = (
            value[neighbours].mean(0) + attention.value_term.flatten()
            if len(neighbours)
            else torch.zeros(12).double()
        )
        torch.testing.assert_close(found[i], mean, rtol=0, atol=1e-4)


def test_the_published_term_of_a_node_stream_leaves_key_and_edge_without_gradient():
    torch.manual_seed(2)
    layer = NodeStreamLayer(12, 3, explicit_bias="published", use_bias=True).double()
    x, edge_index, edge_attr = graph(2)
    out, _ = layer(x, edge_index, edge_attr)
    out.square().sum().backward()
    attention = layer.attention
    for name in ("key", "edge"):
        for parameter in getattr(attention, name).parameters():
            assert parameter.grad is None or not parameter.grad.any(), name
    assert attention.edge_term.grad is None or not attention.edge_term.grad.any()
    assert attention.value_term.grad.any()
    # The query is left with the epsilon's share, tiny but not nothing: Adam rescales it.
    tiny = attention.query.weight.grad.abs().max()
    assert 0 < tiny < 1e-3 * attention.value.weight.grad.abs().max()


def test_the_published_term_of_the_graph_transformer_is_the_intended_one():
    torch.manual_seed(3)
    published = GraphTransformerLayer(12, 3, explicit_bias="published").double()
    intended = GraphTransformerLayer(12, 3, explicit_bias="intended").double()
    intended.load_state_dict(published.state_dict())
    for found, expected in zip(published(*graph()), intended(*graph()), strict=True):
        assert torch.equal(found, expected)


def test_a_sink_whose_key_is_minus_infinity_is_none():
    attention = attention_with("sink", bias=True)
    with torch.no_grad():  # queries of one, so that every beta is the sum of the key term
        attention.query.weight.zero_()
        attention.query.bias.fill_(1)
    x, edge_index, edge_attr = graph()
    plain = without_term(attention)(x, edge_index, edge_attr)[0]
    assert not torch.allclose(attention(x, edge_index, edge_attr)[0], plain)
    with torch.no_grad():
        attention.key_term.fill_(-torch.inf)
    assert torch.equal(attention(x, edge_index, edge_attr)[0], plain)


def test_a_sink_takes_weight_from_neighbours_and_fills_nodes_without_any():
    attention = attention_with("sink")
    x, edge_index, edge_attr = graph()
    edge_index = edge_index.clamp(max=7)  # node 8 has no incoming edge
    with record(attention, ["attention_weight"]) as seen:
        found, _ = attention(x, edge_index, edge_attr)
    (weight,) = seen["attention_weight"]
    total = torch.zeros(len(x), 3).double().index_add_(0, edge_index[1], weight)
    assert (total < 0.999).all()
    lonely = attention.split_heads(found)[8]
    torch.testing.assert_close(lonely, attention.value_term.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("term", TERMS)
def test_gradients_agree_with_finite_differences(term):
    attention = attention_with(term, channels=4, heads=2)
    x, edge_index, edge_attr = graph(channels=4)
    inputs = x[:5].requires_grad_(), edge_attr[:8].requires_grad_()
    index = edge_index[:, :8] % 5
    assert torch.autograd.gradcheck(lambda x, e: attention(x, index, e), inputs)


@pytest.mark.parametrize("layer_type", [NodeStreamLayer, GraphTransformerLayer])
@pytest.mark.parametrize("term", EXPLICIT_BIASES)
def test_terms_and_biases_are_there_each_for_itself(layer_type, term):
    for use_bias in (False, True):
        layer = layer_type(12, 3, explicit_bias=term, use_bias=use_bias)
        names = {name for name, _ in layer.attention.named_parameters()}
        terms = {"key_term", "value_term", "edge_term"}
        assert names & terms == ({"none": set(), "sink": terms - {"edge_term"}}.get(term, terms))
        assert ("query.bias" in names) == use_bias


def test_the_published_numbers_of_parameters():
    def size(**changes):
        return sum(p.numel() for p in build(CONFIGS["GT-ZINC"].replace(**changes)).parameters())

    assert size() == 588_353
    assert size(use_bias=True, explicit_bias="published") == 592_833


def test_the_term_of_san_on_ogbn_proteins_never_arrives():
    arrived = {
        name: build(config.replace(explicit_bias="published", num_edge_types=None))
        .layers[0]
        .attention.explicit_bias
        for name, config in PUBLISHED.items()
        if name.endswith("-PROTEINS") and not name.startswith("EGAT")
    }
    assert arrived == {
        "GT-PROTEINS": "intended",
        "GraphiT-PROTEINS": "overwritten",
        "SAN-PROTEINS": "none",
    }
    fixed = build(PUBLISHED["SAN-PROTEINS"].replace(explicit_bias="intended"))
    assert fixed.layers[0].attention.explicit_bias == "intended"


@pytest.mark.parametrize("bound, limit", [("none", None), ("clip", 1.0), ("tanh", 1.0)])
def test_a_bounded_score_is_the_bounded_product(bound, limit):
    attention = attention_with("none", scale=3.0, score_bound=bound)
    x, edge_index, edge_attr = graph()
    free = without_term(attention)(x, edge_index, edge_attr)[1]
    found = attention(x, edge_index, edge_attr)[1]
    assert free.abs().max() > 1
    expected = {"none": free, "clip": free.clamp(-1, 1), "tanh": free.tanh()}[bound]
    torch.testing.assert_close(found, expected, **EXACT)
    assert limit is None or found.abs().max() <= limit


def test_the_dropout_of_the_score_acts_in_training_only():
    attention = attention_with("none", score_dropout=0.3)
    x, edge_index, edge_attr = graph()
    plain = without_term(attention)(x, edge_index, edge_attr)[1]
    score = attention(x, edge_index, edge_attr)[1]
    dropped = score == 0
    assert 0.15 < dropped.double().mean() < 0.45
    torch.testing.assert_close(score[~dropped], plain[~dropped] / 0.7, **EXACT)
    assert torch.equal(attention.eval()(x, edge_index, edge_attr)[1], plain)


def test_published_weights_with_the_term_are_read():
    for kind, layer_type in (("gt", GraphTransformerLayer), ("graphit", NodeStreamLayer)):
        torch.manual_seed(4)
        layer = layer_type(12, 3, explicit_bias="published", use_bias=True).double().eval()
        attention = "attention" if kind == "gt" else "attention_h"
        edge = "proj_e" if kind == "gt" else "E"
        names = {"query": "Q", "key": "K", "value": "V", "edge": edge}
        block = {
            "project": "O_{}",
            "expand": "FFN_{}_layer1",
            "contract": "FFN_{}_layer2",
            "batch_norm1": "batch_norm1_{}",
            "batch_norm2": "batch_norm2_{}",
        }
        shapes = {"key_term": (3, 4, 1), "edge_term": (3, 1, 4), "value_term": (3, 1, 4)}
        weights = {}
        for name, value in layer.state_dict().items():
            owner, module, *rest = name.split(".")
            if module in shapes:
                theirs = f"{attention}.{module[0]}_bias"
                weights[theirs] = value.reshape(shapes[module])
            elif owner == "attention":
                weights[".".join([attention, names[module], *rest])] = value
            else:
                letter = "h" if owner == "node_block" else "e"
                weights[".".join([block[module].format(letter), *rest])] = value
        loaded = load_layer(weights, kind, heads=3)
        for found, expected in zip(loaded(*graph()), layer(*graph()), strict=True):
            assert torch.equal(found, expected)
        broken = copy.deepcopy(weights)
        del broken[f"{attention}.e_bias"]
        with pytest.raises(ValueError, match=rf"missing .*: {attention}\.e_bias"):
            load_layer(broken, kind, heads=3)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(explicit_bias="sinks"), r"explicit_bias: expected one of \('none', 'published'"),
        (dict(score_bound="relu"), r"score_bound: expected one of \('none', 'clip', 'tanh'\)"),
        (dict(score_dropout=1.0), r"score_dropout: expected a probability in \[0, 1\)"),
    ],
)
def test_unknown_values_are_errors_that_name_the_known_ones(changes, message):
    with pytest.raises(ValueError, match=message):
        build(CONFIGS["GT-ZINC"].replace(**changes))


def test_an_architecture_without_the_term_refuses_it():
    full = CONFIGS["GraphiT-ZINC"].replace(full_graph=True, explicit_bias="intended")
    with pytest.raises(ValueError, match=r"explicit_bias: expected one of \('none',\)"):
        build(full)
    with pytest.raises(ValueError, match="explicit_bias: gat is built with 'none' only"):
        build(CONFIGS["GAT-ZINC"].replace(explicit_bias="sink"))
