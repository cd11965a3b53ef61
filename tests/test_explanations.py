"""Importance of edges and curves of removed bonds: hand values, exact sums, invariances."""

import math
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import few_molecules
from random_graphs import path
from torch import nn
from torch_geometric import nn as pyg
from torch_geometric.data import Batch, Data
from torch_geometric.explain import Explainer, GNNExplainer
from torch_geometric.explain.algorithm.utils import set_masks

from mapkg import hooks
from mapkg.attribution import heat_map
from mapkg.models.network import TypeEmbedding
from studies import explanations
from studies.__main__ import main
from studies.data import molecule_graph
from studies.emergence import emergence
from studies.explanations import METHODS, compare, curve, edge_importance, rank_correlation
from studies.extras import build
from studies.observation import bond_ratios, edge_maxima
from studies.published import CONFIGS


@pytest.fixture(scope="module")
def graphs():
    smiles = ("CC(=O)OC#N", "Clc1ccccc1", "C#CCN")
    return [molecule_graph(text, y=float(i)) for i, text in enumerate(smiles)]


def network(name, **changes):
    torch.manual_seed(2)
    small = dict(hidden_channels=16, heads=2, num_layers=2, **changes)
    return build(CONFIGS[f"{name}-ZINC"].replace(**small)).double().eval()


class Additive(nn.Module):
    """Predicts the sum, over the edges of a graph, of a weight per type, through messages."""

    def __init__(self, *weights, sizes=None):
        super().__init__()
        self.edge_embedding = TypeEmbedding(sizes or len(weights), 1)
        self.edge_embedding.weight.data = torch.tensor(weights).unsqueeze(1)
        self.conv = pyg.SimpleConv(aggr="sum")

    def forward(self, x, edge_index, edge_attr, batch, batch_size):
        weight = self.edge_embedding(edge_attr).flatten()
        of_node = self.conv(torch.ones(len(x), 1), edge_index, weight)
        return pyg.global_add_pool(of_node, batch, batch_size)


def by_bond(*importance):
    return torch.tensor(importance, dtype=torch.float).repeat_interleave(2)


def alone(model, graph, edge_attr):
    """The prediction for one graph with these edge features."""
    batch = torch.zeros(graph.num_nodes, dtype=torch.long)
    with torch.no_grad():
        return model(graph.x, graph.edge_index, edge_attr, batch, 1)[0, 0]


@pytest.mark.parametrize("method", ["gradient x input", "integrated gradients", "edge mask"])
def test_in_an_additive_model_an_edge_is_worth_the_weight_of_its_types(method):
    model, graphs = Additive(7.0, 2.0, -5.0, 0.5), [path(1, 2), path(3)]
    found = edge_importance(model, graphs, method)
    torch.testing.assert_close(found, [torch.tensor([2, 2, 5.0, 5]), torch.tensor([0.5, 0.5])])
    model, graph = Additive(1.0, 2.0, 4.0, 8.0, 16.0, sizes=(3, 2)), path(0)
    graph.edge_attr = torch.tensor([[1, 1], [2, 0]])
    (found,) = edge_importance(model, [graph], method)
    torch.testing.assert_close(found, torch.tensor([2 + 16.0, 4 + 8.0]))


@pytest.mark.parametrize("name", ["GT", "GraphiT"])
def test_attributions_sum_to_the_change_from_their_baseline(name, graphs):
    model = network(name)
    for graph in graphs:
        rows = nn.functional.one_hot(graph.edge_attr, 4).double()
        without_types = alone(model, graph, 0 * rows)
        with hooks.edit(model, {"layers.*.attention:message": torch.zeros_like}):
            without_messages = alone(model, graph, graph.edge_attr)
        for method, baseline, tolerance in (
            ("integrated gradients", without_types, dict(rtol=2e-2, atol=1e-7)),
            ("edge mask", without_messages, dict(rtol=5e-2, atol=1e-4)),
        ):
            batch = Batch.from_data_list([graph])
            signed = METHODS[method](explanations.OneTarget(deepcopy(model), 0, batch))
            change = alone(model, graph, graph.edge_attr) - baseline
            torch.testing.assert_close(signed.detach().double().sum(), change, **tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_depends_on_the_graph_alone_and_leaves_no_trace(method, graphs):
    model, graphs = network("GT", dropout=0.5), [molecule_graph("C", y=0.0), *graphs]
    expected = edge_importance(model, graphs, method, batch_size=1)
    assert [len(of_edges) for of_edges in expected] == [graph.num_edges for graph in graphs]
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [(set(vars(module)), *module._parameters) for module in model.modules()]
    generator = torch.random.get_rng_state()
    with torch.no_grad():
        found = edge_importance(model, graphs, method, batch_size=3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert [(set(vars(m)), *m._parameters) for m in model.modules()] == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    other = edge_importance(model, graphs, method, seed=1)
    is_drawn = method in ("GNNExplainer", "random")
    assert torch.isclose(torch.cat(found), torch.cat(other)).any().item() != is_drawn


def test_a_network_edited_by_hooks_is_explained_as_it_is_edited(graphs):
    model = network("GraphiT")
    with hooks.edit(model, {"layers.*.attention.score": torch.zeros_like}):
        assert torch.cat(edge_importance(model, graphs, "gradient x input")).max() == 0


# Layers of PyG, on graphs with self-loops of their own.


class Pooled(nn.Module):
    """A network of PyG and a sum over nodes and channels, with arguments by name."""

    def __init__(self, conv, pool=True):
        super().__init__()
        self.conv, self.pool = conv, pool

    def forward(self, x, edge_index, batch=None):
        of_nodes = self.conv(x, edge_index).sum(dim=1, keepdim=True)
        return pyg.global_add_pool(of_nodes, batch) if self.pool else of_nodes


LAYERS = {
    "GATConv": lambda: pyg.GATConv(3, 4, heads=2),
    "TransformerConv": lambda: pyg.TransformerConv(3, 4, heads=2),
    "kept": lambda: pyg.GATConv(3, 4, heads=2, add_self_loops=False),
}
LOOPS = {"none": [], "all but one": [3, 1, 0], "every": [0, 1, 2, 3], "twice": [2, 2]}


@pytest.mark.parametrize("loops", LOOPS)
@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_importances_by_layers_of_pyg_are_those_of_a_plain_loop(layer, loops):
    torch.manual_seed(0)
    model = Pooled(LAYERS[layer]()).eval()
    bonds = [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)]
    given = [*bonds[:2], *((i, i) for i in LOOPS[loops]), *bonds[2:]]
    x = torch.randn(4, 3)
    graph = Data(x=x, edge_index=torch.tensor(given).T)
    # A layer that replaces loops has one for each node.
    _, (used, weight) = model.conv(x, graph.edge_index, return_attention_weights=True)
    seen = list(map(tuple, used.T.tolist()))
    weight = weight[[seen.index(edge) for edge in given]]
    value = model.conv.lin_value if layer == "TransformerConv" else model.conv.lin
    value = value(x)[graph.edge_index[0]].view(len(given), -1, 4)
    message = weight.unsqueeze(-1) * value
    sizes = message.flatten(1).abs().sort(dim=1).values
    expected = {
        "edge mask": message.sum(dim=(1, 2)).abs(),
        "AttentionExplainer": weight.mean(dim=1),
        "ratio": sizes[:, -1] / sizes[:, (sizes.size(1) - 1) // 2],
    }
    for method, of_edges in expected.items():
        for graphs in ([graph], [graph, graph]):
            found = edge_importance(model, graphs, method)[-1]
            torch.testing.assert_close(found, of_edges, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(edge_maxima(model, [graph])[0], expected["ratio"])
    labels = [torch.arange(graph.num_edges)]
    shares = heat_map(model, [graph], labels, len(given), thresholds=[2.0])
    assert torch.equal(shares[0, 0].any(dim=1), expected["ratio"] > 2)


def test_the_ratio_is_that_of_a_layer_of_any_network_by_its_name():
    ends = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    graph, loop = Data(x=torch.randn(4, 3), edge_index=ends), torch.tensor([[0], [0]])
    with_loop = Data(x=graph.x, edge_index=torch.cat([loop, ends], dim=1))
    model = Pooled(pyg.GAT(3, 4, 2, heads=2))  # of PyG: two layers, of 4 and 8 channels
    for layer, choice in enumerate(({}, {"layer": 1}, {"names": "*1:message"})):
        expected = edge_maxima(model, [with_loop])[min(layer, 1)]
        assert torch.equal(edge_importance(model, [with_loop], "ratio", **choice)[0], expected)
    (of_bonds,) = bond_ratios(model, [graph], heads=2)
    expected = edge_maxima(model, [graph]).unflatten(1, (2, 2)).amax(dim=2)
    torch.testing.assert_close(of_bonds.amax(dim=1), expected)
    (of_last,) = bond_ratios(model, [graph], heads=2, names="*1:message")
    assert torch.equal(of_last, of_bonds[1:])
    of_last = edge_maxima(model, [graph], names="*1:message")
    assert torch.equal(of_last, edge_maxima(model, [graph])[1:])
    assert (of_bonds[:, 0] != of_bonds[:, 1]).all()


def test_what_cannot_be_explained_is_said(graphs):
    graph = Data(x=torch.randn(4, 3), edge_index=torch.tensor([[0, 0, 1], [0, 1, 2]]))
    kept, own = pyg.GATConv(3, 3, add_self_loops=False), network("GT")
    model = Pooled(kept)
    both = Pooled(pyg.Sequential("x, e", [(kept, "x, e -> x"), (pyg.GATConv(3, 3), "x, e -> x")]))
    linear = Pooled(pyg.Sequential("x, e", [(nn.Linear(3, 3), "x -> x")]))
    features = network("GT", edge_channels=3, num_edge_types=None)
    with_features = path(1).update({"edge_attr": torch.rand(2, 3).double()})
    mask, types = "edge mask", "integrated gradients"
    for words, *call, options in (
        ("method saliency: expected one of ratio, gradient", own, graphs, "saliency", {}),
        (r"expected 0 to 1, for layers.0\S*, \S*; got 2", own, graphs, "ratio", {"layer": 2}),
        ("got full-graph attention", network("GraphiT", full_graph=True), graphs, mask, {}),
        (r"type ids .* torch.float64, \[2, 3\]", features, [with_features], types, {}),
        (r"each of 1 graphs, got shape \[4, 1\]", Pooled(kept, pool=False), [graph], mask, {}),
        ("layers of both kinds; take them out", both, [graph], mask, {}),
        ("'conv': expected a row for each of 3", model, [graph], "ratio", {"names": "conv"}),
        ("no identity module called 'score' and no Message", linear, [graph], "ratio", {}),
    ):
        with pytest.raises((ValueError, KeyError), match=words):
            edge_importance(*call, **options)
    with pytest.raises(ValueError, match=r"one width, got .*convs.1:message': 5}: name those"):
        heat_map(Pooled(pyg.GAT(3, 4, 2, 5)), [graph], [torch.zeros(3, dtype=torch.long)], 1)
    expected = edge_importance(model, [graph], "ratio")
    set_masks(model, torch.zeros(3), graph.edge_index)
    with pytest.warns(UserWarning, match="left its edge mask in 1 layers, ignored"):
        torch.testing.assert_close(edge_importance(model, [graph], "ratio"), expected)


@pytest.mark.parametrize("method", ["edge mask", "GNNExplainer"])
def test_what_explained_a_model_before_does_not_matter(method):
    graph = Data(x=torch.randn(4, 3), edge_index=torch.tensor([[0, 0, 1], [0, 1, 2]]))
    model = Pooled(pyg.GATConv(3, 3))
    expected = edge_importance(model, [graph], method)
    config = dict(mode="regression", task_level="graph", return_type="raw")
    explain = Explainer(model, GNNExplainer(epochs=2), "model", config, edge_mask_type="object")
    explain(graph.x, graph.edge_index)
    assert "_edge_mask" in model.conv._parameters, "PyG leaves no place: the repair can go"
    torch.testing.assert_close(edge_importance(model, [graph], method), expected)


def test_a_bond_has_the_larger_importance_of_its_directions_in_any_order_of_edges():
    ends = torch.tensor([[2, 0, 3, 3, 1, 2], [1, 3, 0, 3, 2, 0]])
    graph = Data(x=torch.zeros(4), edge_index=ends)
    found = explanations.bond_importance(graph, torch.tensor([1.0, -2, -3, 7, 5, math.nan]))
    torch.testing.assert_close(found, torch.tensor([5, -2, 7, math.nan]), equal_nan=True)


def test_the_rank_correlation_is_that_of_the_bonds_if_both_sides_order_them():
    a = torch.tensor([1.0, 0, 2, 9, 0, 3, 0, 4])  # bonds 1, 9, 3, 4
    for values, expected in (
        ([10.0, 0, 0, 40, 20, 0, 0, 30], 1.0),
        ([1.0, 0, 0, 2, 3, 0, 0, 4], 0.4),  # ranks 1 4 2 3 and 1 2 3 4: 1 - 6 * 6 / (4 * 15)
        ([2.0, 1, 2, 0, 0, 2, 2, 2], math.nan),
        ([math.nan, 1, 2, 3, 4, 5, 6, 7], math.nan),
    ):
        for sides in ((a, torch.tensor(values)), (torch.tensor(values), a)):
            both = ([side, torch.rand(2)] for side in sides)
            found = rank_correlation(*both, [path(*4 * [1]), path(1)])
            assert found == pytest.approx([expected, math.nan], nan_ok=True)


MODEL = Additive(0.0, 1.0, 10.0, 100.0)


def test_bonds_go_whole_in_the_order_of_their_importance():
    graphs = [path(1, 2, 3, y=200.0), path(2, y=0.0)]  # predictions 2 * (1 + 10 + 100) and 20
    importance = [torch.tensor([0.0, 0.1, 0.2, 0.1, 0.3, 0.1]), by_bond(1)]
    orders = {"descending": [222.0, 22.0, 2.0, 0.0], "ascending": [222.0, 220.0, 200.0, 0.0]}
    for order, prediction in orders.items():
        found = curve(MODEL, graphs, importance, order=order, fractions=(0, 1 / 3, 2 / 3, 1))
        assert found["graph"].to_list() == [0] * 4 + [1] * 4
        assert found["removed"].to_list() == [0, 1, 2, 3, 0, 0, 1, 1]
        assert found["prediction"].to_list() == [*prediction, 20, 20, 0, 0]
        assert found["change"].to_list() == [*(222 - np.array(prediction)), 0, 0, 20, 20]
        assert found["absolute_error"].to_list()[:4] == [abs(p - 200) for p in prediction]
    with pytest.raises(ValueError, match="graph 0: expected an importance without NaN"):
        curve(MODEL, graphs, [by_bond(1, np.nan, 2), by_bond(1)])


def test_half_a_bond_is_rounded_to_the_even_number_and_ties_are_drawn_for_each_graph():
    found = curve(MODEL, [path(1, 1, 1, 1, 1)], [by_bond(1, 2, 3, 4, 5)])
    assert found["removed"].tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5]
    assert found["absolute_error"].isna().all(), "there is no target"
    ties = curve(MODEL, [path(1, 2, 3, 1)] * 30, [by_bond(0, 0, 0, 0)] * 30)
    assert set(ties.query("removed == 1")["change"]) == {2, 20, 200}


def test_methods_are_compared_by_areas_on_the_same_graphs():
    def curves(*rows):
        return pd.concat(
            pd.DataFrame({"graph": graph, "fraction": [0, 0.2, 1], "change": changes})
            for graph, changes in enumerate(rows)
        )

    repeated = [curves([0, 1, 4], [6, 6, 6]), curves([0, 3, 4], [6, 6, 6])]  # areas 2.6 and 6
    better = curves([1, 3, 5], [7, 7, 7])  # one more on each graph
    found = compare({"random": pd.concat(repeated), "better": better}, resamples=99)
    assert found["area"].to_list() == pytest.approx([4.3, 5.3])
    assert found.loc[1, ["area_low", "area_high"]].to_list() == pytest.approx([3.6, 7])
    ends = found[["difference", "difference_low", "difference_high"]]
    np.testing.assert_allclose(ends, [[0] * 3, [1] * 3], atol=1e-12)


def test_a_run_is_explained_by_the_command(cache, tmp_path, monkeypatch):
    splits = few_molecules(48, 16, 4)
    config = CONFIGS["SAN-ZINC"].replace(
        hidden_channels=16, heads=4, num_layers=2, batch_size=16, max_epochs=1
    )
    about = dict(seed=2, name="SAN-ZINC", progress=False)
    emergence(config, splits, folder=tmp_path, **about)
    monkeypatch.setattr("studies.commands.load", lambda name: splits)
    command = ["study", "explain", str(tmp_path), "--dataset", "moses", "--graphs", "3"]
    assert main([*command, "-o", str(tmp_path / "explain_x")]) == 0
    found = explanations.read_explanations(tmp_path, {"x": "A"})
    assert {*METHODS, "frequency"} == {*found["areas"]["label"]}
    assert all(set(table["seed"]) == {2} for table in found.values())
    model, _ = explanations.checkpoint.load(tmp_path / "best")
    ratio = edge_importance(model, splits.test[:3], "ratio")
    expected = curve(model, splits.test[:3], ratio, order="ascending").groupby("fraction").mean()
    where, columns = "order == 'ascending' and method == 'ratio'", ["change", "absolute_error"]
    rows = found["curves"].query(where)
    np.testing.assert_allclose(rows[columns], expected[columns], rtol=1e-4)
    lines = explanations.faithfulness(found["curves"]).axes[1, 0].lines
    assert any(np.array_equal(line.get_ydata(), rows["change"]) for line in lines)
