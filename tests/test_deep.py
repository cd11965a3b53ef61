"""Deep networks layer by layer against the skeleton written out, and their gradients."""

import pytest
import torch
from random_graphs import random_graph
from torch import nn
from torch_geometric.nn import (
    GATConv,
    GatedGraphConv,
    GCNConv,
    LayerNorm,
    PairNorm,
    TransformerConv,
)

from mapkg.lipschitz_norm import LipschitzNorm, QuadraticLipschitzNorm
from studies.deep import ARCHITECTURES, LIPSCHITZ_NORMS, NORMS, deep_network, gradient_norms

SIZES = dict(in_channels=12, out_channels=3, hidden_channels=4, heads=2)


def network(architecture="gat", layers=3, *, seed=0, **options):
    torch.manual_seed(seed)
    return deep_network(architecture, layers, **SIZES | options).double()


def graph(seed=0):
    x, edge_index, _ = random_graph(400 + seed)
    return x, edge_index


@pytest.mark.parametrize("norm", ["none", "pair", "pair-si", "layer", "layer-graph"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_published_skeleton(architecture, norm):
    model = network(architecture, norm=norm).eval()
    x, edge_index = graph()
    activation = {"gcn": torch.relu, "ggnn": lambda h: h}.get(architecture, nn.functional.elu)
    h = model.embed(x)
    for number, layer in enumerate(model.layers):
        h = layer(h, edge_index)
        if norm.startswith("layer"):
            h = model.norms[number](h)
        if number < 2:
            h = activation(h)
        if norm.startswith("pair"):
            h = model.norms[number](h)
    torch.testing.assert_close(model(x, edge_index), model.head(h), rtol=0, atol=0)
    kinds = {"gat": GATConv, "gt": TransformerConv, "gcn": GCNConv, "ggnn": GatedGraphConv}
    kind = kinds[architecture]
    assert all(type(layer) is kind for layer in model.layers)
    named = {"pair": PairNorm, "layer": LayerNorm}
    if norm != "none":
        assert all(isinstance(n, named[norm.partition("-")[0]]) for n in model.norms)


def test_sizes_heads_and_loops_are_the_published_ones():
    gat, gt, gcn, ggnn = (network(a, layers=3) for a in ARCHITECTURES)
    assert [layer.in_channels for layer in gat.layers] == [4, 8, 8]
    assert all(layer.concat and layer.heads == 2 for layer in [*gat.layers, *gt.layers])
    assert all(layer.add_self_loops for layer in gat.layers)
    assert all(layer.negative_slope == 0.2 and layer.dropout == 0.3 for layer in gat.layers)
    assert all(layer.root_weight and layer.dropout == 0.3 for layer in gt.layers)
    assert [model.dropout.p for model in (gat, gt, gcn, ggnn)] == [0.6, 0.5, 0.5, 0.5]
    assert [(layer.in_channels, layer.out_channels) for layer in gcn.layers] == [
        (4, 8),
        (8, 8),
        (8, 8),
    ]
    assert [(layer.out_channels, layer.num_layers) for layer in ggnn.layers] == [(8, 1)] * 3
    big = deep_network("gat", 2, in_channels=1433, out_channels=7)
    assert big.layers[1].lin.weight.shape == (512, 512)


@pytest.mark.parametrize("architecture", ["gat", "gt"])
def test_initial_attention_vectors_are_drawn_as_published(architecture):
    layers = deep_network(architecture, 3, **SIZES | dict(hidden_channels=64, heads=8)).layers
    if architecture == "gat":
        limit = (6 / (8 + 64)) ** 0.5
        vectors = torch.cat([layer.att_src.flatten() for layer in layers]).abs()
        assert 0.97 * limit < vectors.max() <= limit


@pytest.mark.parametrize(
    ("norm", "mode", "scale"),
    [
        ("lipschitz", "paper", 1.0),
        ("lipschitz-published", "published", 4.0),
        ("lipschitz-published-si", "published-si", 4.0),
    ],
)
def test_a_normalisation_of_scores_is_in_every_layer(norm, mode, scale):
    gat, gt = (network(a, norm=norm) for a in ("gat", "gt"))
    for layer in gat.layers:
        assert type(layer.score_norm.norm) is LipschitzNorm
        assert (layer.score_norm.norm.mode, layer.score_norm.norm.scale) == (mode, scale)
    for layer in gt.layers:
        assert type(layer.score_norm.norm) is QuadraticLipschitzNorm
        assert (layer.score_norm.norm.mode, layer.score_norm.norm.scale) == (mode, 1.0)
    assert network("gat", norm=norm, scale=2.0).layers[0].score_norm.norm.scale == 2.0
    x, edge_index = graph()
    assert not torch.allclose(gat.eval()(x, edge_index), network("gat").eval()(x, edge_index))


def test_the_scale_of_pair_norm_is_handed_on():
    assert network(norm="pair-si", scale=10.0).norms[0].scale == 10.0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_norm_trains_at_any_depth(architecture, norm):
    x, edge_index = graph()
    if norm in LIPSCHITZ_NORMS and architecture in ("gcn", "ggnn"):
        with pytest.raises(ValueError, match=r"divides attention scores, which .* does not have"):
            network(architecture, norm=norm)
        return
    for layers in (1, 6):
        model = network(architecture, layers, norm=norm)
        nn.functional.cross_entropy(model(x, edge_index), torch.arange(9) % 3).backward()
        norms = gradient_norms(model)
        assert len(norms["weights"]) == layers
        assert len(norms["attention"]) == layers * (architecture in ("gat", "gt"))
        assert torch.tensor(norms["weights"]).isfinite().all()
        assert max(norms["weights"]) > 0


@pytest.mark.parametrize("architecture", ["gcn", "ggnn"])
def test_residuals_add_what_came_before_from_the_second_layer_on(architecture):
    model, (x, edge_index) = network(architecture, residual=True).eval(), graph()
    activation = {"gcn": torch.relu, "ggnn": lambda h: h}[architecture]
    first, second, third = model.layers
    h = activation(first(model.embed(x), edge_index))
    h = h + activation(second(h, edge_index))
    h = h + third(h, edge_index)
    torch.testing.assert_close(model(x, edge_index), model.head(h), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_norms_are_those_of_autograd(architecture):
    x, edge_index = graph()
    model = network(architecture, 2)
    model(x, edge_index).square().sum().backward()
    found = gradient_norms(model)
    layer = model.layers[1]
    if architecture == "gat":
        assert found["weights"][1] == pytest.approx(layer.lin.weight.grad.norm().item())
        both = torch.cat([layer.att_src.grad, layer.att_dst.grad])
        assert found["attention"][1] == pytest.approx(both.norm().item())
    elif architecture == "gcn":
        assert found["weights"][1] == pytest.approx(layer.lin.weight.grad.norm().item())
    elif architecture == "ggnn":
        weights = [layer.weight.grad, layer.rnn.weight_ih.grad, layer.rnn.weight_hh.grad]
        sizes = torch.stack([gradient.norm() for gradient in weights])
        assert found["weights"][1] == pytest.approx(sizes.norm().item())
    else:
        weights = [
            getattr(layer, f"lin_{n}").weight.grad for n in ("query", "key", "value", "skip")
        ]
        assert found["weights"][1] == pytest.approx(torch.stack(weights).norm().item())
        assert found["attention"][1] == pytest.approx(torch.stack(weights[:2]).norm().item())


def test_two_graphs_are_normalised_alone():
    model = network(norm="pair").eval()
    one, two = graph(0), graph(1)
    x = torch.cat([one[0], two[0]])
    edge_index = torch.cat([one[1], two[1] + 9], dim=1)
    batch = torch.arange(2).repeat_interleave(9)
    alone = torch.cat([model(*one), model(*two)])
    torch.testing.assert_close(model(x, edge_index, batch), alone)


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"norm: expected one of none.* got 'maxnorm'"):
        network(norm="maxnorm")
    with pytest.raises(ValueError, match=r"architecture: expected one of .* got 'gin'"):
        network("gin")
    with pytest.raises(ValueError, match="num_layers: expected 1 or more, got 0"):
        network(layers=0)
    with pytest.raises(ValueError, match="heads: expected 1 or more, got 0"):
        network(heads=0)
    with pytest.raises(ValueError, match=r"call loss\.backward"):
        gradient_norms(network())
