"""Deep networks against the skeleton written out, their gradients, and smoothing in them."""

import math

import pytest
import torch
from random_graphs import random_graph
from torch import nn
from torch_geometric.nn import GATConv, GatedGraphConv, GCN2Conv, GCNConv, TransformerConv
from torch_geometric.utils import dropout_edge, to_undirected

from mapkg.oversmoothing import rank_one_distance, relative_spread, uniform_attention_limits
from studies import deep as study
from studies.data import NodesOfGraph, Splits
from studies.data.networks import regular_task

SMALL = dict(hidden_channels=4, heads=2)
CONVS = {"gat": GATConv, "gt": TransformerConv, "gcn": GCNConv, "ggnn": GatedGraphConv}
CONVS["gcnii"] = GCN2Conv


def network(architecture="gat", layers=3, **options):
    torch.manual_seed(0)
    return study.DeepNetwork(
        study.Variant(architecture=architecture, **SMALL | options), layers, 12, 3
    ).double()


def graph():
    x, edge_index, _ = random_graph(400)
    return x, edge_index


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", ["none", "pair", "pair-si", "layer"])
@pytest.mark.parametrize("architecture", study.LAYERS)
def test_it_is_the_published_skeleton(architecture, norm, residual):
    model = network(architecture, norm=norm, residual=residual, scale=2.0).eval()
    x, edge_index = graph()
    activations = {"gcn": torch.relu, "gcnii": torch.relu, "ggnn": lambda h: h}
    activation = activations.get(architecture, nn.functional.elu)
    h = model.embed(x)
    initial = (h,) if architecture == "gcnii" else ()
    for number, layer in enumerate(model.layers):
        assert type(layer) is CONVS[architecture]
        new = layer(h, *initial, edge_index)
        if norm == "layer":
            new = nn.functional.layer_norm(new, (8,))
        if number < 2:
            new = activation(new)
        if norm.startswith("pair"):
            new = new - new.mean(dim=0)
            square = new.square().sum(dim=1, keepdim=True)
            together = (1e-5 + square.mean()).sqrt()
            new = 2 * new / (1e-5 + square.sqrt() if norm == "pair-si" else together)
        h = h + new if residual and h.shape == new.shape else new
    torch.testing.assert_close(model(x, edge_index), model.head(h), rtol=1e-10, atol=1e-10)


def test_dropout_is_the_published_one():
    assert [network(name).dropout.p for name in study.LAYERS] == [0.6, 0.5, 0.5, 0.5, 0.5]
    assert {layer.dropout for name in ("gat", "gt") for layer in network(name).layers} == {0.3}


def test_further_remedies_are_the_published_ones():
    x, edge_index = graph()
    plain, jumping = network(dropout=0.0, attention_dropout=0.0), network(jumping=True).eval()
    h, given = jumping.embed(x), []
    for number, layer in enumerate(jumping.layers):
        h = layer(h, edge_index)
        h = nn.functional.elu(h) if number < 2 else h
        given.append(h)
    largest = torch.stack(given).amax(dim=0)
    torch.testing.assert_close(jumping(x, edge_index), jumping.head(largest))
    dropping = network(drop_edge=0.5, dropout=0.0, attention_dropout=0.0)
    torch.manual_seed(3)
    fewer = dropping(x, edge_index)
    torch.manual_seed(3)
    kept = dropout_edge(edge_index, 0.5)[0]
    assert kept.size(1) < edge_index.size(1)
    torch.testing.assert_close(fewer, plain(x, kept))
    torch.testing.assert_close(dropping.eval()(x, edge_index), plain(x, edge_index))
    # of GCNII, layer l: (1 - beta) p + beta p W, with p = 0.9 P h + 0.1 h0, beta = ln(0.5 / l + 1)
    deep = network("gcnii", layers=5)
    for number, layer in enumerate(deep.layers, 1):
        assert layer.alpha == 0.1 and layer.beta == pytest.approx(math.log(0.5 / number + 1))


def test_a_depth_whose_memory_does_not_fit_is_refused(papers, monkeypatch):
    free = type("memory", (), {"available": 10**6})
    monkeypatch.setattr("studies.deep.psutil.virtual_memory", lambda: free)
    study.Variant(hidden_channels=1, heads=1).build(1, papers, 0)
    with pytest.raises(ValueError, match=r"num_layers: 500 layers of 64 channels on .* are free"):
        study.Variant().build(500, papers, 0)


@pytest.mark.parametrize(
    ("norm", "scale"), [*zip(study.LIPSCHITZ_NORMS, (1.0, 4.0, 4.0), strict=True)]
)
def test_a_normalization_of_scores_is_in_every_layer(norm, scale):
    for architecture, given, expected in (("gat", None, scale), ("gt", None, 1), ("gat", 2.0, 2)):
        for layer in network(architecture, norm=norm, scale=given).layers:
            found = layer.score_norm.norm
            assert (found.mode, found.scale) == (study.LIPSCHITZ_NORMS[norm], expected)


def test_gradient_flow_conserves_what_a_balanced_start_sets_to_zero():
    model = network(balanced=True)
    weights = [*(layer.lin.weight for layer in model.layers), model.head.weight]
    assert torch.allclose(weights[0].norm(dim=1), torch.full((8,), 2**0.5).double())
    for before, after in zip([model.embed.weight, *weights], weights, strict=False):
        assert torch.allclose(before.norm(dim=1), after.norm(dim=0))
    assert not any(layer.att_src.any() or layer.att_dst.any() for layer in model.layers)
    for layer in model.layers:  # the law holds at any weights, for homogeneous activations
        nn.init.normal_(layer.att_src), nn.init.normal_(layer.att_dst)
    model.activation = torch.relu
    nn.functional.cross_entropy(model(*graph()), torch.arange(9) % 3).backward()
    moves = [weight * weight.grad for weight in weights]
    for layer, own, after in zip(model.layers[:-1], moves, moves[1:], strict=False):
        attention = sum((a * a.grad).flatten() for a in (layer.att_src, layer.att_dst))
        torch.testing.assert_close(own.sum(dim=1) - attention, after.sum(dim=0))


WEIGHTS = {
    "gat": ("lin.weight", "att_src att_dst"),
    "gt": (
        "lin_query.weight lin_key.weight lin_value.weight lin_skip.weight",
        "lin_query.weight lin_key.weight",
    ),
    "gcn": ("lin.weight", ""),
    "ggnn": ("weight rnn.weight_ih rnn.weight_hh", ""),
    "gcnii": ("weight1", ""),
}


@pytest.mark.parametrize("norm", ["none", "layer", "lipschitz"])
@pytest.mark.parametrize("architecture", WEIGHTS)
def test_gradient_norms_are_those_of_autograd(architecture, norm):
    model = network(architecture, norm=norm if architecture in ("gat", "gt") else "none")
    nn.functional.cross_entropy(model(*graph()), torch.arange(9) % 3).backward()
    expected = [
        {"epoch": 7, "layer": number, "kind": kind, "norm": pytest.approx(total.item() ** 0.5)}
        for kind, names in zip(("weights", "attention"), WEIGHTS[architecture], strict=True)
        for number, layer in enumerate(model.layers)
        if (total := sum(layer.get_parameter(n).grad.square().sum() for n in names.split()))
    ]
    assert study.gradient_norms(model, 7) == expected
    assert study.gradient_norms(model, 0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(norm="maxnorm"), r"norm maxnorm: .* none, layer"),
        (dict(architecture="gin"), r"architecture gin: .* gat, gt, gcn, ggnn"),
        (dict(architecture="gcn", norm="lipschitz"), r"divides attention scores, which 'gcn' "),
        (dict(architecture="ggnn", norm="lipschitz-published"), "which 'ggnn' does not have"),
        (dict(architecture="gt", balanced=True), "balanced: expected architecture 'gat', got 'gt'"),
        (dict(attention_dropout=1.0), r"attention_dropout: expected a rate in \[0, 1\), got 1.0"),
        (dict(drop_edge=1.0), r"drop_edge: expected a rate in \[0, 1\), got 1.0"),
        (dict(layers=0), "num_layers: expected 1 or more, got 0"),
        (dict(heads=0), "heads: expected 1 or more, got 0"),
    ],
)
def test_what_is_not_there_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)


def test_the_largest_component_keeps_its_training_nodes(papers):
    small = papers.train.graph.subgraph(torch.arange(40))
    small.edge_index = to_undirected(torch.tensor([[0, 5, 9, 20, 3], [5, 9, 33, 21, 2]]))
    train = NodesOfGraph(small, torch.tensor([0, 9, 20]))
    part = study.largest_component(Splits(train, train, train, papers.description))
    assert part.train.graph.num_nodes == 4 and part.description.title.endswith("largest component")
    assert torch.equal(part.train.graph.x[part.train.nodes], small.x[[0, 9]])


def test_smoothing_is_measured_on_the_layers_of_pyg(papers):
    variant = study.Variant(**SMALL, dropout=0.0, attention_dropout=0.0)
    settings = dict(num_layers=3, seeds=[1], epochs=2, progress=False)
    table = study.deep_smoothing(papers, {"plain": variant}, **settings).set_index("state")
    splits = study.largest_component(papers)
    graph, train = splits.train.graph, splits.train.nodes
    network = variant.build(3, splits, 1).eval()
    h, outputs = network.embed(graph.x), []
    for number, layer in enumerate(network.layers):
        outputs.append(layer(h, graph.edge_index))
        outputs[-1].retain_grad()
        h = nn.functional.elu(outputs[-1]) if number < 2 else outputs[-1]
    nn.functional.cross_entropy(network.head(h)[train], graph.y[train]).backward()
    limits = uniform_attention_limits(graph.edge_index, graph.num_nodes)
    expected = {
        "features": [relative_spread(x.detach()) for x in outputs],
        "errors_rank_one": [rank_one_distance(x.grad) for x in outputs],
        "errors": [relative_spread(x.grad, limits.errors) for x in outputs],
        "gradient": [layer.lin.weight.grad.norm().item() for layer in network.layers],
        "contraction": [limits.contraction] * 3,
    }
    rows = table.loc["untrained"]
    for name, values in expected.items():
        assert rows[name].tolist() == pytest.approx(values, rel=1e-3)
    assert table.loc["trained", "loss"].iloc[0] < rows["loss"].iloc[0]


def test_nodes_of_the_regular_graph_have_four_classes_of_equal_size():
    graph, task = study.regular_splits(60, 6, seed=1).train.graph, regular_task(60, 6, seed=1)
    assert graph.edge_index.size(1) == 60 * 6 and graph.is_undirected()
    assert not graph.has_self_loops() and torch.equal(graph.x, task.x)
    order = task.y.flatten().argsort()
    assert graph.y[order].tolist() == [label for label in range(4) for _ in range(15)]
