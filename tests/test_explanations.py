"""Importance of edges and curves of removed bonds: hand values, derivatives, invariances."""

import math
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import few_molecules
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import SimpleConv, global_add_pool

from mapkg import hooks
from mapkg.models.network import ARCHITECTURES, TypeEmbedding
from studies.__main__ import main
from studies.data import molecule_graph
from studies.emergence import emergence
from studies.explanations import (
    METHODS,
    OneTarget,
    bond_importance,
    bond_of_edge,
    compare,
    curve,
    edge_importance,
    explain,
    explain_run,
    faithfulness,
    rank_correlation,
)
from studies.extras import build
from studies.published import CONFIGS

each_network = pytest.mark.parametrize("architecture", ["gt", "graphit"])


@pytest.fixture(scope="module")
def graphs():
    smiles = ("CC(=O)OC#N", "Clc1ccccc1", "C#CCN")
    return [molecule_graph(text, y=float(i)) for i, text in enumerate(smiles)]


def network(architecture, **changes):
    torch.manual_seed(2)
    config = next(
        config
        for config in CONFIGS.values()
        if config.architecture == architecture and config.dataset == "zinc"
    )
    small = dict(hidden_channels=16, heads=2, num_layers=2)
    return build(config.replace(**small, **changes)).double().eval()


class Additive(nn.Module):
    """Predicts the sum, over the edges of a graph, of a weight per type, through messages."""

    def __init__(self, *weights, sizes=None):
        super().__init__()
        self.edge_embedding = TypeEmbedding(sizes or len(weights), 1)
        self.edge_embedding.weight.data = torch.tensor(weights).unsqueeze(1)
        self.conv = SimpleConv(aggr="sum")

    def forward(self, x, edge_index, edge_attr, batch, batch_size):
        weight = self.edge_embedding(edge_attr).flatten()
        of_node = self.conv(torch.ones(len(x), 1), edge_index, weight)
        return global_add_pool(of_node, batch, batch_size)


def path(*types, y=None):
    """A path whose bonds have these types."""
    bonds = [pair for i in range(len(types)) for pair in ((i, i + 1), (i + 1, i))]
    return Data(
        x=torch.zeros(len(types) + 1, dtype=torch.long),
        edge_index=torch.tensor(bonds).t().contiguous(),
        edge_attr=torch.tensor(types).repeat_interleave(2),
        y=None if y is None else torch.tensor([[y]]),
    )


def by_bond(*importance):
    return torch.tensor(importance, dtype=torch.float).repeat_interleave(2)


def alone(model, graph, edge_attr=None):
    """The predictions for one graph, perhaps with other edge features."""
    batch = torch.zeros(graph.num_nodes, dtype=torch.long)
    edge_attr = graph.edge_attr if edge_attr is None else edge_attr
    with torch.no_grad():
        return model(graph.x, graph.edge_index, edge_attr, batch, 1)[0]


def one_hot(graph):
    return nn.functional.one_hot(graph.edge_attr, 4).double()


def with_sign(model, graph, method):
    """What a method gives for one graph before the magnitude is taken."""
    made = METHODS[method](OneTarget(deepcopy(model), 0), Batch.from_data_list([graph]), 0)
    return made.detach().double()


# What each method gives.


@pytest.mark.parametrize("layer", [0, 1])
def test_the_ratio_of_an_edge_is_its_largest_magnitude_over_the_lower_median(layer, graphs):
    model = network("gt")
    found = edge_importance(model, graphs, "ratio", layer=layer)
    for graph, of_edges in zip(graphs, found, strict=True):
        with hooks.record(model, f"layers.{layer}.attention.score") as seen:
            alone(model, graph)
        (score,) = seen[f"layers.{layer}.attention.score"]
        expected = [max(row) / sorted(row)[len(row) // 2 - 1] for row in score.abs().tolist()]
        torch.testing.assert_close(of_edges, torch.tensor(expected).double())


@pytest.mark.parametrize("method", ["gradient x input", "integrated gradients", "edge mask"])
def test_in_an_additive_model_an_edge_is_worth_the_weight_of_its_type(method):
    model, graphs = Additive(7.0, 2.0, -5.0, 0.5), [path(1, 2), path(3)]
    found = edge_importance(model, graphs, method)
    torch.testing.assert_close(found, [torch.tensor([2, 2, 5.0, 5]), torch.tensor([0.5, 0.5])])
    model, graph = Additive(1.0, 2.0, 4.0, 8.0, 16.0, sizes=(3, 2)), path(0)
    graph.edge_attr = torch.tensor([[1, 1], [2, 0]])
    (found,) = edge_importance(model, [graph], method)
    torch.testing.assert_close(found, torch.tensor([2 + 16.0, 4 + 8.0]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_times_input_is_the_derivative_by_a_scale_of_the_type(architecture, graphs):
    model, graph, step = network(architecture, out_channels=2), graphs[2], 1e-5
    found = [
        edge_importance(model, [graph], "gradient x input", target=target)[0] for target in (0, 1)
    ]
    for edge, of_targets in enumerate(torch.stack(found, dim=1)):
        scale = torch.zeros(graph.num_edges, 1).double()
        scale[edge] = step
        above, below = (alone(model, graph, one_hot(graph) * (1 + d)) for d in (scale, -scale))
        expected = ((above - below) / (2 * step)).abs()
        torch.testing.assert_close(of_targets, expected, rtol=1e-4, atol=1e-9)


@each_network
def test_attributions_sum_to_the_change_from_their_baseline(architecture, graphs):
    model = network(architecture)
    for graph in graphs:
        change = alone(model, graph, one_hot(graph)) - alone(model, graph, 0 * one_hot(graph))
        total = with_sign(model, graph, "integrated gradients").sum()
        torch.testing.assert_close(total, change[0], rtol=2e-2, atol=1e-7)
        change = alone(model, graph)
        with hooks.edit(model, {"layers.*.attention:message": torch.zeros_like}):
            change = change - alone(model, graph)
        total = with_sign(model, graph, "edge mask").sum()
        torch.testing.assert_close(total, change[0], rtol=5e-2, atol=1e-4)


def test_gnn_explainer_keeps_what_the_prediction_needs_and_drops_what_it_ignores():
    graph = path(1, 2, 1, 2, 1)
    (found,) = edge_importance(Additive(0.0, 3.0, 0.0), [graph], "GNNExplainer")
    needed = graph.edge_attr == 1
    assert (found[needed] > 0.5).all() and (found[~needed] == 0).all()


@each_network
def test_attention_explainer_gives_the_mean_weight_of_all_layers_and_heads(architecture, graphs):
    model = network(architecture)
    found = edge_importance(model, graphs, "AttentionExplainer")
    for graph, of_edges in zip(graphs, found, strict=True):
        with hooks.record(model, "layers.*.attention_weight") as seen:
            alone(model, graph)
        expected = torch.cat([weight for (weight,) in seen.values()], dim=1).mean(dim=1)
        torch.testing.assert_close(of_edges, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_depends_on_the_graph_alone_and_leaves_no_trace(method, graphs):
    model, atom = network("gt", dropout=0.5), molecule_graph("C", y=0.0)
    graphs = [atom, *graphs]
    expected = edge_importance(model, graphs, method, batch_size=1)
    assert [len(of_edges) for of_edges in expected] == [graph.num_edges for graph in graphs]
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    parameters = [list(module._parameters) for module in model.modules()]
    generator = torch.random.get_rng_state()
    with torch.no_grad():
        found = edge_importance(model, graphs, method, batch_size=3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert [list(module._parameters) for module in model.modules()] == parameters
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    other = edge_importance(model, graphs, method, seed=1)
    is_drawn = method in ("GNNExplainer", "random")
    assert torch.isclose(torch.cat(found), torch.cat(other)).any().item() != is_drawn


def test_a_network_edited_by_hooks_is_explained_as_it_is_edited(graphs):
    model = network("graphit")
    with hooks.edit(model, {"layers.*.attention.score": torch.zeros_like}):
        assert torch.cat(edge_importance(model, graphs, "gradient x input")).max() == 0
    assert torch.cat(edge_importance(model, graphs, "gradient x input")).min() > 0


def test_what_cannot_be_explained_is_refused(graphs):
    model = network("gt")
    with pytest.raises(ValueError, match=r"unknown method 'saliency'; known: ratio, gradient"):
        edge_importance(model, graphs, "saliency")
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=f"layer: expected 0 to 1, got {layer}"):
            edge_importance(model, graphs, "ratio", layer=layer)
    with pytest.raises(ValueError, match="got full-graph attention"):
        edge_importance(network("graphit", full_graph=True), graphs, "edge mask")
    model, graph = network("gt", edge_channels=3, num_edge_types=None), path(1)
    graph.edge_attr = torch.rand(2, 3).double()
    with pytest.raises(ValueError, match=r"edges with type ids .* torch.float64, shape \[2, 3\]"):
        edge_importance(model, [graph], "integrated gradients")
    assert (edge_importance(model, [graph], "edge mask")[0] > 0).all()


# Bonds and their order.


def test_a_bond_has_the_larger_importance_of_its_directions():
    graph = Data(
        x=torch.zeros(4), edge_index=torch.tensor([[2, 0, 3, 3, 1, 2], [1, 3, 0, 3, 2, 0]])
    )
    assert bond_of_edge(graph).tolist() == [0, 1, 1, 2, 0, 3]
    found = bond_importance(graph, torch.tensor([1.0, -2, -3, 7, 5, math.nan]))
    torch.testing.assert_close(found, torch.tensor([5, -2, 7, math.nan]), equal_nan=True)


def test_the_rank_correlation_is_that_of_the_bonds_if_both_sides_order_them():
    graph, nan = path(1, 1, 1, 1), math.nan
    a = torch.tensor([1.0, 0, 2, 9, 0, 3, 0, 4])  # bonds 1, 9, 3, 4
    for values, expected in (
        ([10.0, 0, 0, 40, 20, 0, 0, 30], 1.0),
        ([4.0, 0, 0, 1, 3, 0, 0, 2], -1.0),
        ([1.0, 0, 0, 2, 3, 0, 0, 4], 0.4),  # ranks 1 4 2 3 and 1 2 3 4: 1 - 6 * 6 / (4 * 15)
        ([2.0, 1, 2, 0, 0, 2, 2, 2], nan),
        ([nan, 1, 2, 3, 4, 5, 6, 7], nan),
    ):
        for sides in ((a, torch.tensor(values)), (torch.tensor(values), a)):
            found = rank_correlation(*([side] for side in sides), [graph])
            assert found == pytest.approx([expected], nan_ok=True)
    few = [path(1), molecule_graph("C")]
    assert np.isnan(rank_correlation(*2 * [[torch.rand(2), torch.empty(0)]], few)).all()


THIRDS = (0, 1 / 3, 2 / 3, 1)
GRAPH = path(1, 2, 3, y=200.0)
MODEL = Additive(0.0, 1.0, 10.0, 100.0)
"""Its prediction for the graph is 2 * (1 + 10 + 100)."""


@pytest.mark.parametrize(
    ("order", "prediction"),
    [("descending", [222.0, 22.0, 2.0, 0.0]), ("ascending", [222.0, 220.0, 200.0, 0.0])],
)
def test_bonds_go_in_the_order_of_their_importance(order, prediction):
    found = curve(MODEL, [GRAPH], [by_bond(0.1, 0.2, 0.3)], order=order, fractions=THIRDS)
    columns = {"graph": 0, "fraction": THIRDS, "bonds": 3, "removed": [0, 1, 2, 3]}
    expected = pd.DataFrame(columns | {"prediction": prediction})
    expected["change"] = 222 - expected["prediction"]
    expected["absolute_error"] = (200 - expected["prediction"]).abs()
    pd.testing.assert_frame_equal(found, expected)


def test_bonds_go_whole_and_a_half_of_one_is_rounded_to_the_even_number():
    importance = torch.tensor([0.0, 9, 5, 5, 6, 1])  # bonds 9, 5, 6
    found = curve(MODEL, [GRAPH], [importance], fractions=THIRDS)
    assert found["prediction"].tolist() == [222, 220, 20, 0]
    found = curve(MODEL, [path(1, 1, 1, 1, 1)], [by_bond(1, 2, 3, 4, 5)])
    assert found["removed"].tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5]
    assert found["prediction"].tolist() == [10, 10, 8, 6, 6, 6, 4, 2, 2, 2, 0]
    assert found["absolute_error"].isna().all(), "there is no target"
    with pytest.raises(ValueError, match="graph 0: expected an importance that can be"):
        curve(MODEL, [GRAPH], [by_bond(1, np.nan, 2)])


def test_equally_important_bonds_go_in_an_order_of_each_graph():
    graphs = [path(1, 2, 3, 4)] * 30
    found = curve(Additive(0.0, 1.0, 2.0, 4.0, 8.0), graphs, [by_bond(0, 0, 0, 0)] * 30)
    assert set(found.query("removed == 1")["change"]) == {2, 4, 8, 16}


def test_each_point_is_the_prediction_of_the_graph_with_the_bonds_that_are_left(graphs):
    model = network("gt")
    importance = edge_importance(model, graphs, "random", seed=3)
    for row in curve(model, graphs, importance, fractions=(0, 0.25, 0.6, 1)).itertuples():
        graph, of_edges = graphs[row.graph], importance[row.graph].view(-1, 2)
        left = of_edges.amax(dim=1).argsort()[: row.bonds - row.removed].sort().values
        edges = torch.stack([2 * left, 2 * left + 1], dim=1).flatten()
        assert row.removed == round(row.fraction * len(of_edges))
        expected = alone(model, graph.edge_subgraph(edges)).item()
        assert row.prediction == pytest.approx(expected, rel=1e-9)
        assert row.change == pytest.approx(abs(alone(model, graph).item() - expected), abs=1e-12)
        assert row.absolute_error == pytest.approx(abs(expected - row.graph), rel=1e-9)


def curves(change, fractions=(0, 0.5, 1)):
    """Curves from a row of changes per graph."""
    change = np.array(change, dtype=float)
    graph, place = (index.ravel() for index in np.indices(change.shape))
    columns = {"graph": graph, "fraction": np.array(fractions)[place], "change": change.ravel()}
    return pd.DataFrame(columns)


def test_methods_are_compared_by_areas_on_the_same_graphs():
    repeated = [curves([[0, 1, 4], [6, 6, 6]]), curves([[0, 3, 4], [6, 6, 6]])]  # areas 2 and 6
    better = curves([[1, 3, 5], [7, 7, 7]])  # one more on each graph
    found = compare({"random": pd.concat(repeated), "better": better}, resamples=99)
    found = found.set_index("method")
    assert found["graphs"].tolist() == [2, 2]
    assert found["area"].to_dict() == {"random": 4, "better": 5}
    assert found.loc["better", ["area_low", "area_high"]].tolist() == [3, 7]
    ends = ["difference", "difference_low", "difference_high"]
    assert found[ends].T.to_dict("list") == {"random": [0] * 3, "better": [1] * 3}
    uneven = compare({"random": curves([[0, 1, 4]] * 2, fractions=(0, 0.2, 1))}, resamples=9)
    assert uneven["area"].item() == pytest.approx(0.1 + 2)


# Studies.


def test_tables_are_means_over_molecules_of_correlations_and_curves(graphs):
    model, methods = network("gt"), ("ratio", "gradient x input", "random")
    found = explain(model, graphs, methods=methods, resamples=50, progress=False)
    ratio, other = (edge_importance(model, graphs, method) for method in methods[:2])
    row = found["correlation"].set_index("method").loc["gradient x input"]
    assert row["mean"] == pytest.approx(rank_correlation(ratio, other, graphs).mean())
    assert row[["defined", "graphs"]].tolist() == [3, 3] and row["low"] <= row["high"]
    expected = curve(model, graphs, ratio, order="ascending")
    means = expected.groupby("fraction")[["change", "absolute_error"]].mean()
    where = "order == 'ascending' and method == 'ratio'"
    rows = found["curves"].query(where).set_index("fraction")
    pd.testing.assert_frame_equal(rows[["change", "absolute_error"]], means)
    areas = found["areas"].query(where)
    assert areas["area"].item() == pytest.approx(np.trapezoid(means["change"], dx=0.1))
    grid = faithfulness(found["curves"].assign(run="A"))
    drawn = [line.get_ydata() for line in grid.axes[1, 0].lines]
    assert any(np.array_equal(line, rows["change"]) for line in drawn)


def test_a_run_is_explained_by_the_command(cache, tmp_path, monkeypatch):
    splits = few_molecules(48, 16, 4)
    config = CONFIGS["SAN-ZINC"].replace(
        hidden_channels=16, heads=4, num_layers=2, batch_size=16, max_epochs=1
    )
    emergence(config, splits, seed=2, name="SAN-ZINC", folder=tmp_path, progress=False)
    found = explain_run(tmp_path, splits, graphs=3, resamples=10, progress=False)
    monkeypatch.setattr("studies.commands.load", lambda name: splits)
    command = ["study", "explain", str(tmp_path), "--dataset", "moses", "--graphs", "3"]
    assert main([*command, "-o", str(tmp_path / "x")]) == 0
    for name in ("correlation", "curves", "areas", "interventions"):
        written = pd.read_csv(tmp_path / f"x_{name}.csv.gz")
        assert list(written) == list(found[name]) and len(written) == len(found[name])
        assert set(written["seed"]) == {2} and set(written["config"]) == {"SAN-ZINC"}
    assert {*METHODS, "frequency"} == {*found["areas"]["method"]}
    np.testing.assert_allclose(written["shift"], found["interventions"]["shift"], rtol=1e-4)
