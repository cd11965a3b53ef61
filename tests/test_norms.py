"""Normalised scores against loops over their formulas, on PyG's layers and ours."""

import copy
import math

import pytest
import torch
from random_graphs import random_graph
from torch import nn
from torch_geometric.nn import GATConv, GATv2Conv, TransformerConv
from torch_geometric.utils import add_self_loops, remove_self_loops

from mapkg.hooks import record
from mapkg.lipschitz_norm import MODES, LipschitzNorm, QuadraticLipschitzNorm, lipschitz_normalise
from mapkg.models import EdgeAttention

HEADS, CHANNELS = 3, 4
EXACT = dict(rtol=1e-10, atol=1e-10)


def graph(seed=0, **sizes):
    x, edge_index, edge_attr = random_graph(200 + seed, channels=HEADS * CHANNELS, **sizes)
    return x, edge_index, edge_attr


def with_loops(edge_index, nodes):
    return add_self_loops(remove_self_loops(edge_index)[0], num_nodes=nodes)[0]


def gat(seed=0, heads=HEADS, **options):
    torch.manual_seed(seed)
    layer = GATConv(HEADS * CHANNELS, CHANNELS, heads=heads, **options).double()
    nn.init.normal_(layer.bias)
    return layer.eval()


def transformer(seed=0, **options):
    torch.manual_seed(seed)
    return TransformerConv(HEADS * CHANNELS, CHANNELS, heads=HEADS, **options).double().eval()


def gat_by_loop(layer, x, edge_index, mode, scale):
    """The layer's output, node by node and head by head, from the formulas."""
    heads = layer.heads
    z = layer.lin(x).view(len(x), heads, CHANNELS)
    att = torch.cat([layer.att_src, layer.att_dst], dim=-1)[0]
    edges = with_loops(edge_index, len(x)).t().tolist()
    neighbours = [[j for j, i in edges if i == node] for node in range(len(x))]
    largest = [
        [max(z[j, k].norm() ** 2 for j in neighbours[i]) for k in range(heads)]
        for i in range(len(x))
    ]
    out = torch.zeros_like(z)
    for i in range(len(x)):
        for k in range(heads):
            scores = []
            for j in neighbours[i]:
                e = layer.att_src[0, 0 + k] @ z[j, k] + layer.att_dst[0, k] @ z[i, k]
                if mode == "paper":
                    c = att[k].norm() * (largest[i][k] + z[i, k].norm() ** 2).sqrt()
                else:
                    norm = att.norm() if mode == "published" else att[k].norm()
                    c = norm * (largest[i // heads][i % heads] + z[j, k].norm() ** 2).sqrt()
                scores.append(nn.functional.leaky_relu(e / (scale * c), 0.2))
            weights = torch.stack(scores).softmax(0)
            out[i, k] = sum(w * z[j, k] for w, j in zip(weights, neighbours[i], strict=True))
    return out.flatten(1) + layer.bias


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("mode", MODES)
def test_gat_agrees_with_a_loop_over_the_formula(mode, heads):
    x, edge_index, _ = graph()
    layer = gat(heads=heads)
    expected = gat_by_loop(layer, x, edge_index, mode, 1.0 if mode == "paper" else 4.0)
    found = lipschitz_normalise(layer, mode)(x, edge_index)
    torch.testing.assert_close(found, expected, **EXACT)


def test_the_scale_divides_the_score():
    x, edge_index, _ = graph(1)
    expected = gat_by_loop(gat(), x, edge_index, "paper", 2.5)
    found = lipschitz_normalise(gat(), scale=2.5)(x, edge_index)
    torch.testing.assert_close(found, expected, **EXACT)


def test_scales_are_1_but_4_for_published_linear_scores():
    linear = {mode: LipschitzNorm(mode).scale for mode in MODES}
    assert linear == {"paper": 1, "published": 4, "published-si": 4}
    assert {QuadraticLipschitzNorm(mode).scale for mode in MODES} == {1}
    assert {LipschitzNorm(mode, scale=2.5).scale for mode in MODES} == {2.5}
    assert {QuadraticLipschitzNorm(mode, scale=2.5).scale for mode in MODES} == {2.5}


def transformer_by_loop(layer, x, edge_index, mode, scale=1.0):
    q, k, v = (
        linear(x).view(len(x), HEADS, CHANNELS)
        for linear in (layer.lin_query, layer.lin_key, layer.lin_value)
    )
    edges = edge_index.t().tolist()
    out = torch.zeros_like(v)
    for i in range(len(x)):
        neighbours = [j for j, target in edges if target == i]
        for h in range(HEADS):
            if not neighbours:
                continue
            if mode == "paper":
                u, root = q[i, h].norm(), 1.0
            else:
                u, root = sum(q[t, h].norm() ** 2 for _, t in edges).sqrt(), math.sqrt(CHANNELS)
            v_max = max(k[j, h].norm() for j in neighbours)
            w_max = max(v[j, h].norm() for j in neighbours)
            c = scale * max(u * v_max, u * w_max, v_max * w_max)
            weights = torch.stack([q[i, h] @ k[j, h] / root / c for j in neighbours]).softmax(0)
            out[i, h] = sum(w * v[j, h] for w, j in zip(weights, neighbours, strict=True))
    return out.flatten(1) + layer.lin_skip(x)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("mode", MODES)
def test_transformer_agrees_with_a_loop_over_the_formula(mode, scale):
    x, edge_index, _ = graph(2)
    expected = transformer_by_loop(transformer(), x, edge_index, mode, scale)
    found = lipschitz_normalise(transformer(), mode, scale=scale)(x, edge_index)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("attention", ["full", "no_edge"])
def test_our_attention_agrees_with_a_loop_over_the_formula(attention):
    x, edge_index, edge_attr = graph(3)
    torch.manual_seed(0)
    layer = EdgeAttention(HEADS * CHANNELS, HEADS, attention=attention).double()
    plain = copy.deepcopy(layer)
    lipschitz_normalise(layer, scale=2.0)
    with record(layer, ["score", "attention_weight"]) as seen:
        found, score = layer(x, edge_index, edge_attr)
    assert torch.equal(score, seen["score"][0])
    q, k, v = (getattr(plain, n)(x).view(len(x), HEADS, -1) for n in ("query", "key", "value"))
    gate = None if attention == "no_edge" else plain.edge(edge_attr).view(-1, HEADS, CHANNELS)
    expected = torch.zeros_like(v)
    source, target = edge_index.tolist()
    for i in range(len(x)):
        edges = [e for e in range(len(target)) if target[e] == i]
        for h in range(HEADS):
            if not edges:
                continue
            keys = [k[source[e], h] * (1 if gate is None else gate[e, h]) for e in edges]
            v_max = max(key.norm() for key in keys)
            w_max = max(v[source[e], h].norm() for e in edges)
            u = q[i, h].norm()
            c = 2.0 * max(u * v_max, u * w_max, v_max * w_max)
            raw = torch.stack([(q[i, h] @ key / c).exp() for key in keys])
            weights = raw / (raw.sum() + 1e-6)
            expected[i, h] = sum(w * v[source[e], h] for w, e in zip(weights, edges, strict=True))
    torch.testing.assert_close(found, expected.flatten(1), **EXACT)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_normalised_score_is_at_most_one_over_the_scale(scale):
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        x, edge_index, _ = graph(seed)
        loops = with_loops(edge_index, len(x))
        z = torch.randn(len(x), HEADS, CHANNELS, generator=generator).double() * 10.0 ** (seed % 5)
        att = torch.randn(HEADS, 2 * CHANNELS, generator=generator).double()
        left, right = att.split(CHANNELS, dim=-1)
        score = (z * left).sum(-1)[loops[0]] + (z * right).sum(-1)[loops[1]]
        divided = score / LipschitzNorm(scale=scale)(z, att, loops)
        assert divided.abs().max() <= 1 / scale + 1e-9
    # Attained where all of a neighbourhood is along the attention vectors.
    z = torch.cat([left[:1], right[:1]]).reshape(2, 1, CHANNELS)
    one = torch.tensor([[0, 1], [1, 1]])
    att = torch.cat([z[0], z[1]], dim=-1)
    size = torch.maximum(z[0].norm() ** 2, z[1].norm() ** 2) + z[1].norm() ** 2
    exact = (z[0].norm() ** 2 + z[1].norm() ** 2) / (att.norm() * size.sqrt())
    found = (z[0, 0] @ att[0, :CHANNELS] + z[1, 0] @ att[0, CHANNELS:]) / LipschitzNorm()(
        z, att, one
    )[0, 0]
    assert found.item() == pytest.approx(exact.item())


def test_published_lets_weights_of_a_neighbourhood_differ_by_little():
    torch.manual_seed(0)
    x, edge_index, _ = graph(5)
    layer = GATConv(12, 12, heads=1).double().eval()
    with torch.no_grad():  # attention as unequal as it can be
        layer.att_src.mul_(1e6)
        layer.att_dst.mul_(1e6)
    lipschitz_normalise(layer, "published")
    _, (loops, weights) = layer(1e3 * x, edge_index, return_attention_weights=True)
    for i in range(len(x)):
        of_node = weights[loops[1] == i]
        assert of_node.max() / of_node.min() <= math.exp(0.25 + 0.05) + 1e-9


@pytest.mark.parametrize("build", [gat, transformer])
@pytest.mark.parametrize("mode", ["paper", "published-si"])
def test_features_of_any_size_give_the_same_weights(build, mode):
    x, edge_index, _ = graph(6)
    layer = build(bias=False) if build is transformer else build()
    lipschitz_normalise(layer, mode)
    weights = [layer(s * x, edge_index, return_attention_weights=True)[1][1] for s in (1, 1e4)]
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_neighbourhood_of_zeros_has_no_nan(mode):
    for layer in (gat(), transformer(bias=False), gat(heads=1)):
        lipschitz_normalise(layer, mode)
        x, edge_index, _ = graph(7)
        x[edge_index[0, edge_index[1] == 0]] = 0
        x[0] = 0
        x.requires_grad_()
        out = layer(x, edge_index)
        out.square().sum().backward()
        assert out.isfinite().all()
        assert x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("build", [gat, transformer])
def test_gradients_flow_through_the_norms(build):
    x, edge_index, _ = graph(8)
    layer = lipschitz_normalise(build())
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x, edge_index), (x,), atol=1e-6)


@pytest.mark.parametrize("build", [gat, transformer])
def test_a_batch_is_each_graph_alone(build):
    layer = lipschitz_normalise(build())
    one, two = graph(9), graph(10, nodes=7, edges=20)
    x = torch.cat([one[0], 100 * two[0]])
    edge_index = torch.cat([one[1], two[1] + len(one[0])], dim=1)
    both = layer(x, edge_index)
    alone = torch.cat([layer(one[0], one[1]), layer(100 * two[0], two[1])])
    torch.testing.assert_close(both, alone, **EXACT)


def test_a_published_transformer_is_not_the_same_in_a_batch():
    layer = lipschitz_normalise(transformer(), "published")
    one, two = graph(9), graph(10)
    x = torch.cat([one[0], two[0]])
    edge_index = torch.cat([one[1], two[1] + len(one[0])], dim=1)
    difference = layer(x, edge_index)[: len(one[0])] - layer(one[0], one[1])
    assert difference.abs().max() > 1e-4


@pytest.mark.parametrize("build", [gat, transformer])
def test_a_permutation_of_nodes_permutes_the_output(build):
    layer = lipschitz_normalise(build())
    x, edge_index, _ = graph(11)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    place = order.argsort()
    permuted = layer(x[order], place[edge_index])
    torch.testing.assert_close(permuted, layer(x, edge_index)[order], **EXACT)


def test_heads_of_the_paper_are_independent_and_published_ones_are_not():
    x, edge_index, _ = graph(12)
    changed = {}
    for mode in ("paper", "published-si"):
        layer = lipschitz_normalise(gat(), mode)
        before = layer(x, edge_index)
        with torch.no_grad():
            layer.lin.weight[:CHANNELS] *= 3  # the first head's features
        changed[mode] = (layer(x, edge_index) - before)[:, CHANNELS:].abs().max()
    assert changed["paper"] == 0
    assert changed["published-si"] > 1e-6


@pytest.mark.parametrize("build", [gat, transformer])
def test_a_copy_is_normalised_and_independent(build):
    x, edge_index, _ = graph(13)
    plain = build()
    layer = lipschitz_normalise(copy.deepcopy(plain))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x, edge_index), layer(x, edge_index))
    assert not torch.allclose(twin(x, edge_index), plain(x, edge_index))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert not torch.allclose(twin(x, edge_index), layer(x, edge_index))
    torch.testing.assert_close(
        lipschitz_normalise(copy.deepcopy(plain))(x, edge_index), layer(x, edge_index)
    )
    assert layer.score_norm._seen == {}


def test_one_line_normalises_every_layer_of_a_model():
    model = nn.ModuleList([gat(), nn.ModuleList([transformer()]), EdgeAttention(12, 3)])
    assert lipschitz_normalise(model) is model
    assert isinstance(model[0].score_norm.norm, LipschitzNorm)
    assert isinstance(model[1][0].score_norm.norm, QuadraticLipschitzNorm)
    assert isinstance(model[2].score_norm.norm, QuadraticLipschitzNorm)


def test_what_cannot_be_normalised_is_refused():
    with pytest.raises(ValueError, match=r"mode: expected one of .*'paper'.* got 'maxnorm'"):
        LipschitzNorm("maxnorm")
    with pytest.raises(ValueError, match=r"scale: expected a value above 0, got 0\.0"):
        LipschitzNorm(scale=0.0)
    with pytest.raises(ValueError, match="got Linear without any"):
        lipschitz_normalise(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got GATv2Conv without any"):
        lipschitz_normalise(GATv2Conv(2, 2))
    with pytest.raises(ValueError, match="edge features in its score"):
        lipschitz_normalise(GATConv(2, 2, edge_dim=3))
    with pytest.raises(ValueError, match="two projections"):
        lipschitz_normalise(GATConv((2, 3), 2, add_self_loops=False))
    with pytest.raises(ValueError, match="has edge features"):
        lipschitz_normalise(TransformerConv(2, 2, edge_dim=3))
    with pytest.raises(ValueError, match="Explicit Bias Term, 'sink'"):
        lipschitz_normalise(EdgeAttention(12, 3, explicit_bias="sink"))
    with pytest.raises(ValueError, match="without its score"):
        lipschitz_normalise(EdgeAttention(12, 3, attention="uniform"))
    model = nn.ModuleList([gat(), GATConv(2, 2, edge_dim=3)])
    with pytest.raises(ValueError, match="1: GATConv has edge features"):
        lipschitz_normalise(model)
    assert not hasattr(model[0], "score_norm"), "nothing is changed by halves"
    layer = lipschitz_normalise(gat())
    with pytest.raises(ValueError, match="normalised already"):
        lipschitz_normalise(layer)
    x, edge_index, _ = graph()
    with pytest.raises(ValueError, match="got a pair of sources and targets"):
        layer((x, x), edge_index)
    assert layer(x, edge_index).isfinite().all(), "an error leaves nothing behind"
    adjacency = torch.sparse_coo_tensor(
        edge_index.flip(0), torch.ones(edge_index.size(1)), (len(x),) * 2, check_invariants=True
    )
    adjacency = adjacency.coalesce()
    sparse = lipschitz_normalise(gat(add_self_loops=False))
    with pytest.raises(ValueError, match="expected edge_index as a tensor of shape"):
        sparse(x, adjacency)
