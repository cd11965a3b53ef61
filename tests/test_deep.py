"""Deep networks layer by layer against the skeleton written out, and their gradients."""

import pytest
import torch
from random_graphs import random_graph
from torch import nn
from torch_geometric.nn import GATConv, GatedGraphConv, GCNConv, TransformerConv

from studies.deep import LAYERS, LIPSCHITZ_NORMS, NORMS, DeepNetwork, gradient_norms

SIZES = dict(in_channels=12, out_channels=3, hidden_channels=4, heads=2)


def network(architecture="gat", layers=3, **options):
    torch.manual_seed(0)
    return DeepNetwork(architecture, layers, **SIZES | options).double()


def graph():
    x, edge_index, _ = random_graph(400)
    return x, edge_index


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", ["none", "pair", "pair-si", "layer"])
@pytest.mark.parametrize("architecture", LAYERS)
def test_it_is_the_published_skeleton(architecture, norm, residual):
    model = network(architecture, norm=norm, residual=residual, scale=2.0).eval()
    x, edge_index = graph()
    activation = {"gcn": torch.relu, "ggnn": lambda h: h}.get(architecture, nn.functional.elu)
    h = model.embed(x)
    for number, layer in enumerate(model.layers):
        new = layer(h, edge_index)
        if norm == "layer":
            new = nn.functional.layer_norm(new, (8,))
        if number < 2:
            new = activation(new)
        if norm.startswith("pair"):
            new = new - new.mean(dim=0)
            square = new.square().sum(dim=1, keepdim=True)
            together = (1e-5 + square.mean()).sqrt()
            new = 2 * new / (1e-5 + square.sqrt() if norm == "pair-si" else together)
        h = h + new if residual and number else new
    torch.testing.assert_close(model(x, edge_index), model.head(h), rtol=1e-10, atol=1e-10)
    kinds = {"gat": GATConv, "gt": TransformerConv, "gcn": GCNConv, "ggnn": GatedGraphConv}
    assert all(type(layer) is kinds[architecture] for layer in model.layers)


def test_sizes_heads_and_loops_are_the_published_ones():
    gat, gt, gcn, ggnn = (network(architecture) for architecture in LAYERS)
    assert [layer.in_channels for layer in gat.layers] == [4, 8, 8]
    assert all(layer.concat and layer.heads == 2 for layer in [*gat.layers, *gt.layers])
    assert all(layer.add_self_loops and layer.negative_slope == 0.2 for layer in gat.layers)
    assert all(layer.root_weight for layer in gt.layers)
    assert all(layer.dropout == 0.3 for layer in [*gat.layers, *gt.layers])
    assert [model.dropout.p for model in (gat, gt, gcn, ggnn)] == [0.6, 0.5, 0.5, 0.5]
    sizes = [(layer.in_channels, layer.out_channels) for layer in gcn.layers]
    assert sizes == [(4, 8), (8, 8), (8, 8)]
    assert [(layer.out_channels, layer.num_layers) for layer in ggnn.layers] == [(8, 1)] * 3
    big = DeepNetwork("gat", 2, in_channels=1433, out_channels=7)
    assert big.layers[1].lin.weight.shape == (512, 512)


@pytest.mark.parametrize(
    ("norm", "mode", "scale"),
    [
        ("lipschitz", "paper", 1.0),
        ("lipschitz-published", "published", 4.0),
        ("lipschitz-published-si", "published-si", 4.0),
    ],
)
def test_a_normalization_of_scores_is_in_every_layer(norm, mode, scale):
    for architecture, default in (("gat", scale), ("gt", 1.0)):
        for layer in network(architecture, norm=norm).layers:
            assert (layer.score_norm.norm.mode, layer.score_norm.norm.scale) == (mode, default)
    assert network("gat", norm=norm, scale=2.0).layers[0].score_norm.norm.scale == 2.0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("architecture", LAYERS)
def test_gradient_norms_are_those_of_autograd_at_any_depth(architecture, norm):
    x, edge_index = graph()
    if norm in LIPSCHITZ_NORMS and architecture in ("gcn", "ggnn"):
        with pytest.raises(ValueError, match=r"divides attention scores, which .* does not have"):
            network(architecture, norm=norm)
        return
    names = {
        "gat": (["lin.weight"], ["att_src", "att_dst"]),
        "gt": ([f"lin_{n}.weight" for n in ("query", "key", "value", "skip")],) * 2,
        "gcn": (["lin.weight"], []),
        "ggnn": (["weight", "rnn.weight_ih", "rnn.weight_hh"], []),
    }
    for layers in (1, 6):
        model = network(architecture, layers, norm=norm)
        nn.functional.cross_entropy(model(x, edge_index), torch.arange(9) % 3).backward()
        norms = gradient_norms(model)
        for kind, parts in zip(("weights", "attention"), names[architecture], strict=True):
            parts = parts[:2] if kind == "attention" else parts
            expected = [
                sum(layer.get_parameter(name).grad.square().sum() for name in parts) ** 0.5
                for layer in model.layers
                if parts
            ]
            assert norms[kind] == pytest.approx([value.item() for value in expected])
        assert 0 < max(norms["weights"]) < float("inf")


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"norm: expected one of none.* got 'maxnorm'"):
        network(norm="maxnorm")
    with pytest.raises(ValueError, match=r"architecture: expected one of .* got 'gin'"):
        network("gin")
    with pytest.raises(ValueError, match="num_layers: expected 1 or more, got 0"):
        network(layers=0)
    with pytest.raises(ValueError, match="heads: expected 1 or more, got 0"):
        network(heads=0)
