"""The attention equations, by hand and against a plain loop, and what surrounds them in a layer."""

import itertools
import math

import numpy as np
import pytest
import torch
from random_graphs import random_graph
from torch import nn

from mapkg.hooks import record
from mapkg.models import EdgeAttention, GraphTransformerLayer, NodeStreamLayer
from mapkg.models.edge_attention import ResidualBlock

EXACT = dict(rtol=1e-11, atol=1e-11)
BLOCK_OPTIONS = [
    dict(zip(("residual", "batch_norm", "layer_norm"), options, strict=True))
    for options in itertools.product((False, True), repeat=3)
]


def random_attention(seed, channels=12, heads=3, bias=False):
    torch.manual_seed(seed)
    return EdgeAttention(channels, heads, bias=bias).double()


def diagonal_(linear, values):
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor(values)))


def attention_by_loop(attention, x, edge_index, edge_attr):
    """S1 to S3 edge by edge in numpy: score [E, D], weight [E, H] before and after division,
    and what each node attends to [N, D]."""

    def affine(linear, rows):
        weight = linear.weight.detach().numpy()
        bias = 0.0 if linear.bias is None else linear.bias.detach().numpy()
        return rows.detach().numpy() @ weight.T + bias

    heads, width = attention.heads, attention.head_channels
    num_nodes, num_channels = x.shape
    num_edges = edge_index.shape[1]
    query, key, value = (affine(m, x) for m in (attention.query, attention.key, attention.value))
    gate = affine(attention.edge, edge_attr)
    score = np.zeros((num_edges, num_channels))
    head_sum, weight = np.zeros((num_edges, heads)), np.zeros((num_edges, heads))
    for edge, (source, target) in enumerate(edge_index.T.tolist()):
        for head in range(heads):
            for channel in range(head * width, (head + 1) * width):
                product = key[source, channel] * query[target, channel] / width**0.5
                score[edge, channel] = product * gate[edge, channel]
                head_sum[edge, head] += score[edge, channel]
            weight[edge, head] = math.exp(min(5.0, max(-5.0, head_sum[edge, head])))
    alpha, attended = np.zeros((num_edges, heads)), np.zeros((num_nodes, num_channels))
    for edge, (source, target) in enumerate(edge_index.T.tolist()):
        for head in range(heads):
            incoming = [e for e in range(num_edges) if int(edge_index[1, e]) == target]
            total = sum(weight[e, head] for e in incoming)
            alpha[edge, head] = weight[edge, head] / (total + 1e-6)
            for channel in range(head * width, (head + 1) * width):
                attended[target, channel] += alpha[edge, head] * value[source, channel]
    return score, head_sum, alpha, attended


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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_equations_agree_with_a_loop_over_edges(seed, scale, bias):
    attention = random_attention(seed, bias=bias)
    x, edge_index, edge_attr = random_graph(seed + 10, scale=scale)
    if scale > 1:
        with torch.no_grad():
            attention.edge.weight *= 20
    with record(attention, ["score", "attention_weight", "attended"]) as seen:
        attended, score = attention(x, edge_index, edge_attr)
    expected_score, head_sum, alpha, expected = attention_by_loop(
        attention, x, edge_index, edge_attr
    )
    if scale > 1:  # the case is worth its name only if the clamp acts in both directions
        assert (head_sum > 5).any()
        assert (head_sum < -5).any()
    torch.testing.assert_close(score, torch.from_numpy(expected_score), **EXACT)
    torch.testing.assert_close(seen["attention_weight"][0], torch.from_numpy(alpha), **EXACT)
    torch.testing.assert_close(attended, torch.from_numpy(expected), **EXACT)
    assert torch.equal(seen["score"][0], score)
    assert torch.equal(seen["attended"][0], attended)


def test_nodes_without_incoming_edges_attend_to_exactly_nothing():
    attention = random_attention(0, bias=True)
    x, edge_index, edge_attr = random_graph(1)
    attended, _ = attention(x, edge_index, edge_attr)
    receives = torch.zeros(len(x), dtype=torch.bool)
    receives[edge_index[1]] = True
    assert not receives[-1]
    assert (attended[~receives] == 0).all()
    assert (attended[receives] != 0).all()


def test_no_edges_at_all_give_zeros_and_an_empty_score():
    attention = random_attention(0, bias=True)
    x, _, _ = random_graph(1)
    attended, score = attention(x, torch.empty(2, 0, dtype=torch.long), x.new_empty(0, 12))
    assert torch.equal(attended, torch.zeros_like(x))
    assert score.shape == (0, 12)


def test_the_query_is_the_targets_and_key_and_value_are_the_sources():
    attention = random_attention(0)
    x = torch.randn(2, 12, dtype=torch.float64)
    edge_index, edge_attr = torch.tensor([[0], [1]]), torch.randn(1, 12, dtype=torch.float64)
    attended, score = attention(x, edge_index, edge_attr)
    expected = attention.key(x[0]) * attention.query(x[1]) / 2 * attention.edge(edge_attr[0])
    torch.testing.assert_close(score[0], expected, **EXACT)  # d = 4, its root 2
    torch.testing.assert_close(attended[1], attention.value(x[0]), rtol=1e-3, atol=0)
    assert torch.equal(attended[0], torch.zeros(12, dtype=torch.float64))


def test_channels_are_head_major():
    # Only the first head has a score, so it alone prefers one neighbour to the other.
    attention = random_attention(0, channels=12, heads=3)
    with torch.no_grad():
        attention.edge.weight[4:] = 0
    x, edge_attr = torch.randn(3, 12).double(), 3 * torch.randn(2, 12).double()
    attended, score = attention(x, torch.tensor([[0, 1], [2, 2]]), edge_attr)
    mean = attention.value(x[:2]).mean(dim=0)
    torch.testing.assert_close(attended[2, 4:], mean[4:], rtol=1e-5, atol=1e-5)
    assert ((attended[2, :4] - mean[:4]).abs() > 1e-3).all()
    assert (score[:, 4:] == 0).all()


def test_equal_scores_give_the_mean_over_neighbours():
    attention = random_attention(0)
    nn.init.zeros_(attention.edge.weight)
    x, edge_index, edge_attr = random_graph(1)
    attended, score = attention(x, edge_index, edge_attr)
    assert (score == 0).all()
    value = attention.value(x)
    for node in range(len(x)):
        sources = edge_index[0, edge_index[1] == node]
        if len(sources):
            mean = value[sources].mean(dim=0)
            shrunk = mean * len(sources) / (len(sources) + 1e-6)
            torch.testing.assert_close(attended[node], mean, rtol=1e-6, atol=1e-12)
            torch.testing.assert_close(attended[node], shrunk, rtol=1e-12, atol=1e-13)


def test_parallel_edges_count_one_by_one():
    attention = random_attention(0)
    x, edge_attr = torch.randn(3, 12).double(), torch.randn(2, 12).double()
    twice = torch.tensor([[0, 0, 1], [2, 2, 2]])
    with record(attention, "attention_weight") as seen:
        attention(x, twice, edge_attr[[0, 0, 1]])
        attention(x, twice[:, 1:], edge_attr)
    double, single = seen["attention_weight"]
    assert torch.equal(double[0], double[1])
    odds = double[0] / double[2]
    torch.testing.assert_close(odds, single[0] / single[1], **EXACT)
    torch.testing.assert_close(double.sum(dim=0), torch.ones(3).double(), rtol=1e-4, atol=0)


def test_gradients_agree_with_finite_differences():
    attention = random_attention(0, channels=4, heads=2, bias=True)
    x, edge_index, edge_attr = random_graph(1, nodes=5, edges=8, channels=4, scale=0.5)
    names, parameters = zip(*attention.named_parameters(), strict=True)

    def function(x, edge_attr, *parameters):
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(attention, weights, (x, edge_index, edge_attr))

    inputs = [tensor.detach().requires_grad_() for tensor in (x, edge_attr, *parameters)]
    assert torch.autograd.gradcheck(function, inputs)


def test_a_saturated_head_lets_no_gradient_through_its_weight():
    attention = random_attention(0)
    with torch.no_grad():
        attention.edge.weight[:4] *= 1e4  # the first head only
    x, edge_index, edge_attr = random_graph(1)
    attended, score = attention(x, edge_index, edge_attr)
    assert (score[:, :4].sum(dim=1).abs() > 5).all()
    assert (score[:, 4:].unflatten(1, (2, 4)).sum(dim=2).abs() < 5).all()
    (gradient,) = torch.autograd.grad(attended.square().sum(), score)
    assert (gradient[:, :4] == 0).all()
    assert (gradient[:, 4:] != 0).any()


@pytest.mark.parametrize("module", ["attention", "layer"])
def test_permuting_nodes_permutes_the_outputs(module):
    model = {"attention": random_attention(0), "layer": random_layer(0)}[module]
    x, edge_index, edge_attr = random_graph(1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    position = order.argsort()  # node i moves to row position[i]
    nodes, edges = model(x, edge_index, edge_attr)
    permuted_nodes, permuted_edges = model(x[order], position[edge_index], edge_attr)
    torch.testing.assert_close(permuted_nodes, nodes[order], **EXACT)
    torch.testing.assert_close(permuted_edges, edges, **EXACT)


@pytest.mark.parametrize("module", ["attention", "layer"])
def test_the_order_of_edges_does_not_matter(module):
    model = {"attention": random_attention(0), "layer": random_layer(0)}[module]
    x, edge_index, edge_attr = random_graph(1)
    order = torch.randperm(len(edge_attr), generator=torch.Generator().manual_seed(2))
    nodes, edges = model(x, edge_index, edge_attr)
    permuted_nodes, permuted_edges = model(x, edge_index[:, order], edge_attr[order])
    torch.testing.assert_close(permuted_nodes, nodes, **EXACT)
    torch.testing.assert_close(permuted_edges, edges[order], **EXACT)


@pytest.mark.parametrize("module", ["attention", "layer"])
def test_a_batch_of_two_graphs_gives_what_each_gives_alone(module):
    model = {"attention": random_attention(0), "layer": random_layer(0)}[module]
    graphs = random_graph(1, nodes=5, edges=8), random_graph(2, nodes=7, edges=13)
    (x1, index1, e1), (x2, index2, e2) = graphs
    nodes, edges = model(
        torch.cat([x1, x2]), torch.cat([index1, index2 + 5], dim=1), torch.cat([e1, e2])
    )
    alone = [model(*graph) for graph in graphs]
    torch.testing.assert_close(nodes, torch.cat([alone[0][0], alone[1][0]]), **EXACT)
    torch.testing.assert_close(edges, torch.cat([alone[0][1], alone[1][1]]), **EXACT)


@pytest.mark.parametrize("heads", [5, 24])
def test_heads_that_do_not_divide_the_channels_are_an_error(heads):
    with pytest.raises(ValueError, match=f"got {heads} heads for 12"):
        EdgeAttention(12, heads)


def test_biases_are_there_only_if_asked_for():
    without = {name for name, _ in EdgeAttention(4, 2).named_parameters()}
    with_bias = {name for name, _ in EdgeAttention(4, 2, bias=True).named_parameters()}
    assert without == {f"{name}.weight" for name in ("query", "key", "value", "edge")}
    assert with_bias - without == {f"{name}.bias" for name in ("query", "key", "value", "edge")}


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


def random_layer(seed, channels=12, heads=3, **options):
    torch.manual_seed(seed)
    layer = GraphTransformerLayer(channels, heads, **options).double().eval()
    layer.node_block = random_block(seed + 1, channels, **options)
    layer.edge_block = random_block(seed + 2, channels, **options)
    return layer


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


def test_a_block_widens_to_twice_its_channels_and_all_its_maps_have_a_bias():
    block = ResidualBlock(6)
    shapes = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    assert shapes["project.weight"] == (6, 6)
    assert shapes["expand.weight"] == (12, 6)
    assert shapes["contract.weight"] == (6, 12)
    assert {f"{name}.bias" for name in ("project", "expand", "contract")} < set(shapes)


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


def test_dropout_acts_in_training_only():
    layer, without = random_layer(0, dropout=0.5), random_layer(0)
    graph = random_graph(1)
    for found, expected in zip(layer(*graph), without(*graph), strict=True):
        assert torch.equal(found, expected)
    layer.train(), without.train()
    for found, expected in zip(layer(*graph), without(*graph), strict=True):
        assert not torch.allclose(found, expected)
    first, second = layer(*graph), layer(*graph)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_by_default_a_score_in_training_is_the_one_in_evaluation():
    graph = random_graph(1, scale=3.0)
    torch.manual_seed(0)
    layers = NodeStreamLayer(12, 3), GraphTransformerLayer(12, 3)
    for attention in (EdgeAttention(12, 3), *(layer.attention for layer in layers)):
        expected = attention.double().eval()(*graph)[1]
        assert expected.abs().max() > 1, "nothing bounds it"
        assert torch.equal(attention.train()(*graph)[1], expected)


@pytest.mark.parametrize(
    "options", BLOCK_OPTIONS, ids=lambda o: "+".join(k for k, v in o.items() if v) or "plain"
)
def test_a_layer_sends_attended_values_to_nodes_and_the_score_to_edges(options):
    layer = random_layer(0, **options)
    x, edge_index, edge_attr = random_graph(1)
    score, _, _, attended = attention_by_loop(layer.attention, x, edge_index, edge_attr)
    nodes, edges = layer(x, edge_index, edge_attr)
    expected = block_by_formula(layer.node_block, x, torch.from_numpy(attended), **options)
    torch.testing.assert_close(nodes, expected, **EXACT)
    expected = block_by_formula(layer.edge_block, edge_attr, torch.from_numpy(score), **options)
    torch.testing.assert_close(edges, expected, **EXACT)


def test_every_option_of_a_layer_reaches_both_streams_and_the_attention():
    # By default residual and BatchNorm are on; LayerNorm, bias and dropout are off.
    default = GraphTransformerLayer(4, 2)
    changed = GraphTransformerLayer(
        4, 2, dropout=0.25, residual=False, batch_norm=False, layer_norm=True, use_bias=True
    )
    assert default.attention.query.bias is None
    assert changed.attention.query.bias is not None
    for stream in ("node_block", "edge_block"):
        block = getattr(default, stream)
        assert block.residual
        assert block.dropout.p == 0
        assert isinstance(block.batch_norm1, nn.BatchNorm1d)
        assert isinstance(block.batch_norm2, nn.BatchNorm1d)
        assert isinstance(block.layer_norm1, nn.Identity)
        assert isinstance(block.layer_norm2, nn.Identity)
        block = getattr(changed, stream)
        assert not block.residual
        assert block.dropout.p == 0.25
        assert isinstance(block.batch_norm1, nn.Identity)
        assert isinstance(block.batch_norm2, nn.Identity)
        assert isinstance(block.layer_norm1, nn.LayerNorm)
        assert isinstance(block.layer_norm2, nn.LayerNorm)


def test_the_two_streams_share_no_weights():
    layer = GraphTransformerLayer(4, 2)
    node = {id(parameter) for parameter in layer.node_block.parameters()}
    edge = {id(parameter) for parameter in layer.edge_block.parameters()}
    assert not node & edge
