"""The EGAT comparison: its equations by hand and against a plain loop, and its shared scoring."""

import math

import numpy as np
import pytest
import torch
from random_graphs import random_graph

from mapkg.hooks import record
from mapkg.models.egat import EdgeGATAttention, EdgeGATLayer
from mapkg.models.network import GraphNetwork

EXACT = dict(rtol=1e-11, atol=1e-11)
SEEN = ("score", "attention_weight", "attended")


def random_attention(seed, channels=12, heads=3, use_bias=False):
    torch.manual_seed(seed)
    return EdgeGATAttention(channels, heads, use_bias=use_bias).double()


def attention_by_loop(attention, x, edge_index, edge_attr):
    """f' [E, D], alpha [E, H] and h' [N, D], edge by edge and head by head in numpy."""

    def affine(linear, row):
        bias = 0.0 if linear.bias is None else linear.bias.detach().numpy()
        return linear.weight.detach().numpy() @ row + bias

    x, edge_attr = x.numpy(), edge_attr.numpy()
    heads = attention.heads
    width = x.shape[1] // heads
    pairs = edge_index.T.tolist()
    score, weight = np.zeros_like(edge_attr), np.zeros((len(pairs), heads))
    for edge, (source, target) in enumerate(pairs):
        before = affine(attention.edge, np.concatenate([x[source], edge_attr[edge], x[target]]))
        score[edge] = [value if value > 0 else value / 100 for value in before]
        for head in range(heads):
            outputs = affine(attention.logit, score[edge, head * width : (head + 1) * width])
            assert outputs.shape == (heads,)
            weight[edge, head] = math.exp(sum(outputs))
    alpha, attended = np.zeros_like(weight), np.zeros_like(x)
    for edge, (source, target) in enumerate(pairs):
        for head in range(heads):
            total = sum(weight[e, head] for e, pair in enumerate(pairs) if pair[1] == target)
            alpha[edge, head] = weight[edge, head] / total
            channels = slice(head * width, (head + 1) * width)
            attended[target, channels] += (
                alpha[edge, head] * affine(attention.value, x[source])[channels]
            )
    return score, alpha, attended


@pytest.mark.parametrize("heads", [1, 3, 12])
@pytest.mark.parametrize("use_bias", [False, True])
def test_the_equations_hold_edge_by_edge(heads, use_bias):
    attention, graph = random_attention(1, heads=heads, use_bias=use_bias), random_graph(1)
    with record(attention, SEEN) as seen:
        attended, score = attention(*graph)
    expected = attention_by_loop(attention, *graph)
    for name, values in zip(SEEN, expected, strict=True):
        torch.testing.assert_close(seen[name][0], torch.from_numpy(values), **EXACT)
    assert torch.equal(seen["score"][0], score)
    assert torch.equal(seen["attended"][0], attended)
    assert torch.equal(attended[-1], torch.zeros(12, dtype=torch.float64))


def test_all_heads_share_one_scoring_vector():
    attention, graph = random_attention(0, use_bias=True), random_graph(0)
    expected, _ = attention(*graph)
    shared = attention.logit.weight.sum(dim=0)  # [d]
    with torch.no_grad():  # other rows, the same sum; the bias cancels
        rows = shared + 5, torch.full((4,), -7.0), torch.full((4,), 2.0)
        attention.logit.weight.copy_(torch.stack(rows))
        attention.logit.bias.fill_(1.5)
    torch.testing.assert_close(attention(*graph)[0], expected, **EXACT)


def test_weights_are_drawn_normal_with_the_gain_of_relu():
    torch.manual_seed(0)
    attention = EdgeGATAttention(256, 4)
    # sqrt(2) * sqrt(2 / (fan in + fan out))
    fans = {attention.value: 256 + 256, attention.edge: 768 + 256, attention.logit: 64 + 4}
    for linear, fan in fans.items():
        weight, expected = linear.weight, 2 / math.sqrt(fan)
        assert weight.std().item() == pytest.approx(expected, rel=4 / weight.numel() ** 0.5)
        assert weight.abs().max() > 2.2 * expected  # a uniform draw ends at sqrt(3)


def test_a_layer_gives_its_score_to_the_next():
    torch.manual_seed(0)
    layers = [EdgeGATLayer(12, 3).double() for _ in range(2)]
    sizes = dict(num_node_types=5, num_edge_types=3, hidden_channels=12, out_channels=1)
    network = GraphNetwork(layers, readout="mean", **sizes).double()
    with record(network, [f"layers.*.{name}" for name in SEEN]) as seen:
        network(torch.arange(9) % 5, random_graph(2)[1], torch.arange(30) % 3)
    attended, score = seen["layers.0.attention.attended"][0], seen["layers.0.attention.score"][0]
    expected = attention_by_loop(layers[1].attention, attended, random_graph(2)[1], score)
    for name, values in zip(SEEN, expected, strict=True):
        found = seen[f"layers.1.attention.{name}"][0]
        torch.testing.assert_close(found, torch.from_numpy(values), **EXACT)
