"""Importance of edges: hand values, finite differences, what a batch and a model are left as."""

import math
from copy import deepcopy

import pytest
import torch
from rdkit import Chem
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import MessagePassing, global_add_pool
from torch_geometric.utils import scatter

from mapkg import hooks
from mapkg.models.network import ARCHITECTURES, TypeEmbedding
from studies.data import molecule_graph
from studies.edge_scores import (
    METHODS,
    OneTarget,
    bond_importance,
    bond_of_edge,
    edge_importance,
    rank_correlation,
)
from studies.extras import build
from studies.published import CONFIGS

DRAWN = ("GNNExplainer", "random")
"""Methods with draws, whose numbers for a graph depend on the graphs before it."""

each_method = pytest.mark.parametrize("method", METHODS)
each_network = pytest.mark.parametrize("architecture", ["gt", "graphit"])


@pytest.fixture(scope="module")
def graphs():
    smiles = ("CC(=O)OC#N", "Clc1ccccc1", "C#CCN", "CC(C)(C)F", "CCO")
    return [molecule_graph(text, y=0.0) for text in smiles]


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
    """Predicts the sum, over the edges of a graph, of a weight per type."""

    def __init__(self, *weights, sizes=None):
        super().__init__()
        self.edge_embedding = TypeEmbedding(sizes or len(weights), 1)
        self.edge_embedding.weight.data = torch.tensor(weights).unsqueeze(1)

    def forward(self, x, edge_index, edge_attr, batch, batch_size):
        of_edge = self.edge_embedding(edge_attr)
        return scatter(of_edge, batch[edge_index[0]], dim_size=batch_size, reduce="sum")


class Message(MessagePassing):
    """Sums a number per type of the incoming edges."""

    def __init__(self):
        super().__init__(aggr="add")

    def forward(self, x, edge_index, of_edge):
        return self.propagate(edge_index, x=x, of_edge=of_edge)

    def message(self, x_j, of_edge):
        return x_j * of_edge


class Messages(Additive):
    """The same prediction as the additive model, through messages."""

    def __init__(self, *weights):
        super().__init__(*weights)
        self.conv = Message()

    def forward(self, x, edge_index, edge_attr, batch, batch_size):
        ones = torch.ones(len(x), 1)
        of_node = self.conv(ones, edge_index, self.edge_embedding(edge_attr))
        return global_add_pool(of_node, batch, batch_size)


def path(*types):
    """A path whose bonds have these types."""
    bonds = [pair for i in range(len(types)) for pair in ((i, i + 1), (i + 1, i))]
    return Data(
        x=torch.zeros(len(types) + 1, dtype=torch.long),
        edge_index=torch.tensor(bonds).t().contiguous(),
        edge_attr=torch.tensor(types).repeat_interleave(2),
    )


def alone(model, graph, edge_attr):
    """The predictions for one graph with other edge features."""
    batch = torch.zeros(graph.num_nodes, dtype=torch.long)
    with torch.no_grad():
        return model(graph.x, graph.edge_index, edge_attr, batch, 1)[0]


def one_hot(graph, number=4):
    return nn.functional.one_hot(graph.edge_attr, number).double()


def with_sign(model, graph, method):
    """What a method gives for one graph before the magnitude is taken."""
    batch, network = Batch.from_data_list([graph]), OneTarget(deepcopy(model), 0)
    return METHODS[method](network, batch, 0).detach()


# What each method gives.


@each_network
@pytest.mark.parametrize("layer", [0, 1])
def test_the_ratio_of_an_edge_is_its_largest_magnitude_over_the_lower_median(
    architecture, layer, graphs
):
    model = network(architecture)
    found = edge_importance(model, graphs, "ratio", layer=layer)
    for graph, of_edges in zip(graphs, found, strict=True):
        with hooks.record(model, f"layers.{layer}.attention.score") as seen:
            alone(model, graph, graph.edge_attr)
        (score,) = seen[f"layers.{layer}.attention.score"]
        expected = [max(row) / sorted(row)[len(row) // 2 - 1] for row in score.abs().tolist()]
        torch.testing.assert_close(of_edges, torch.tensor(expected).double())


@pytest.mark.parametrize("method", ["gradient x input", "integrated gradients"])
def test_in_an_additive_model_an_edge_is_worth_the_weight_of_its_type(method):
    model, graphs = Additive(7.0, 2.0, -5.0, 0.5), [path(1, 2), path(3)]
    found = edge_importance(model, graphs, method)
    torch.testing.assert_close(found, [torch.tensor([2, 2, 5.0, 5]), torch.tensor([0.5, 0.5])])


def test_an_edge_with_several_type_ids_is_worth_the_sum_of_their_weights():
    model, graph = Additive(1.0, 2.0, 4.0, 8.0, 16.0, sizes=(3, 2)), path(0)
    graph.edge_attr = torch.tensor([[1, 1], [2, 0]])
    (found,) = edge_importance(model, [graph], "gradient x input")
    torch.testing.assert_close(found, torch.tensor([2 + 16.0, 4 + 8.0]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_times_input_is_the_derivative_by_a_scale_of_the_type_of_an_edge(
    architecture, graphs
):
    model = network(architecture, out_channels=2)
    for target in (0, 1):
        found = edge_importance(model, graphs[:2], "gradient x input", target=target)
        graph, step, expected = graphs[1], 1e-5, []
        for edge in range(graph.num_edges):
            scale = torch.ones(graph.num_edges, 1).double()
            sides = []
            for sign in (1, -1):
                scale[edge] = 1 + sign * step
                sides.append(alone(model, graph, one_hot(graph) * scale)[target])
            expected.append((sides[0] - sides[1]) / (2 * step))
        torch.testing.assert_close(found[1], torch.stack(expected).abs(), rtol=1e-4, atol=1e-9)


@each_network
def test_integrated_gradients_sum_to_the_change_from_edges_without_a_type(architecture, graphs):
    model = network(architecture)
    found = [with_sign(model, graph, "integrated gradients") for graph in graphs]
    for graph, of_edges in zip(graphs, found, strict=True):
        rows = one_hot(graph)
        change = alone(model, graph, rows) - alone(model, graph, 0 * rows)
        torch.testing.assert_close(of_edges.sum(), change[0], rtol=2e-2, atol=1e-7)
        assert change.abs() > 1e-5


@each_network
def test_the_edge_mask_sums_to_the_change_from_a_network_without_messages(architecture, graphs):
    model = network(architecture)
    found = [with_sign(model, graph, "edge mask") for graph in graphs]
    for graph, of_edges in zip(graphs, found, strict=True):
        change = alone(model, graph, graph.edge_attr)
        with hooks.edit(model, {"layers.*.attention:message": torch.zeros_like}):
            change = change - alone(model, graph, graph.edge_attr)
        assert change.abs() > 1e-3
        torch.testing.assert_close(of_edges.double().sum(), change[0], rtol=5e-2, atol=1e-4)


def test_the_edge_mask_of_an_additive_model_is_the_weight_of_the_message():
    (found,) = edge_importance(Messages(0.0, 2.0, -5.0), [path(1, 2)], "edge mask")
    torch.testing.assert_close(found, torch.tensor([2.0, 2, 5, 5]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gnn_explainer_keeps_what_the_prediction_needs_and_drops_what_it_ignores(seed):
    graph = path(1, 2, 1, 2, 1)
    (found,) = edge_importance(Messages(0.0, 3.0, 0.0), [graph], "GNNExplainer", seed=seed)
    needed = graph.edge_attr == 1
    assert (found[needed] > 0.5).all(), "half of them start below"
    assert (found[~needed] == 0).all(), "no gradient reaches these"


@each_network
def test_attention_explainer_gives_the_mean_weight_of_all_layers_and_heads(architecture, graphs):
    model = network(architecture)
    found = edge_importance(model, graphs, "AttentionExplainer")
    for graph, of_edges in zip(graphs, found, strict=True):
        with hooks.record(model, "layers.*.attention_weight") as seen:
            alone(model, graph, graph.edge_attr)
        expected = torch.cat([weight for (weight,) in seen.values()], dim=1).mean(dim=1)
        torch.testing.assert_close(of_edges, expected)
        in_degree = graph.edge_index[1].bincount()[graph.edge_index[1]]
        torch.testing.assert_close(
            of_edges[in_degree == 1],
            torch.ones(int((in_degree == 1).sum())).double(),
            rtol=0,
            atol=1e-5,
        )


@each_network
@pytest.mark.parametrize("method", [method for method in METHODS if method not in DRAWN])
def test_graphs_of_a_batch_get_what_each_gets_alone(architecture, method, graphs):
    model = network(architecture)
    graphs = graphs[:3]
    together = edge_importance(model, graphs, method, batch_size=2)
    for graph, of_edges in zip(graphs, together, strict=True):
        assert of_edges.shape == (graph.num_edges,)
        (by_itself,) = edge_importance(model, [graph], method)
        torch.testing.assert_close(of_edges, by_itself, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", DRAWN)
def test_draws_depend_on_the_seed_but_not_on_the_batch_size(method, graphs):
    model, graphs = network("graphit"), graphs[3:]
    first = edge_importance(model, graphs, method, batch_size=1)
    again = edge_importance(model, graphs, method, batch_size=2)
    other = edge_importance(model, graphs, method, seed=1)
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.isclose(torch.cat(first), torch.cat(other)).any()
    assert not torch.isclose(first[0][:4], first[1][:4]).any()


@each_method
def test_no_method_leaves_a_trace_in_the_model_or_in_torchs_generator(method, graphs):
    model, graphs = network("gt", dropout=0.5), graphs[-1:]
    expected = edge_importance(model, graphs, method)
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    parameters = [list(module._parameters) for module in model.modules()]
    generator = torch.random.get_rng_state()
    with torch.no_grad():
        found = edge_importance(model, graphs, method)
    assert torch.equal(*found, *expected), "evaluation mode"
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert [list(module._parameters) for module in model.modules()] == parameters
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@each_method
def test_a_graph_without_edges_has_no_importances(method, graphs):
    atom = molecule_graph("C", y=0.0)
    for place in ([atom], [atom, graphs[-1]]):
        found = edge_importance(network("graphit"), place, method)
        assert [len(of_edges) for of_edges in found] == [graph.num_edges for graph in place]


def test_a_network_edited_by_hooks_is_explained_as_it_is_edited(graphs):
    model = network("graphit")
    with hooks.edit(model, {"layers.*.attention.score": torch.zeros_like}):
        assert torch.cat(edge_importance(model, graphs, "gradient x input")).max() == 0
    assert torch.cat(edge_importance(model, graphs, "gradient x input")).min() > 0


# Bonds and ranks.


def test_a_bond_has_the_larger_importance_of_its_directions():
    graph = Data(
        x=torch.zeros(4), edge_index=torch.tensor([[2, 0, 3, 3, 1, 2], [1, 3, 0, 3, 2, 0]])
    )
    assert bond_of_edge(graph).tolist() == [0, 1, 1, 2, 0, 3]
    found = bond_importance(graph, torch.tensor([1.0, -2, -3, 7, 5, math.nan]))
    torch.testing.assert_close(found, torch.tensor([5, -2, 7, math.nan]), equal_nan=True)


def test_bonds_of_a_molecule_are_in_the_order_of_rdkit(graphs):
    for graph in graphs:
        molecule = Chem.MolFromSmiles(graph.smiles)
        bond = bond_of_edge(graph)
        assert bond.tolist() == [edge // 2 for edge in range(graph.num_edges)]
        for edge, (i, j) in enumerate(graph.edge_index.t().tolist()):
            assert molecule.GetBondBetweenAtoms(i, j).GetIdx() == bond[edge]


def test_the_rank_correlation_is_that_of_the_bonds_not_of_the_edges():
    graph = path(1, 1, 1, 1)
    a = torch.tensor([1.0, 0, 2, 9, 0, 3, 0, 4])  # bonds 1, 9, 3, 4
    for values, expected in (
        ([10.0, 0, 0, 40, 20, 0, 0, 30], 1.0),
        ([4.0, 0, 0, 1, 3, 0, 0, 2], -1.0),
        ([1.0, 0, 0, 2, 3, 0, 0, 4], 0.4),  # ranks 1 4 2 3 and 1 2 3 4: 1 - 6 * 6 / (4 * 15)
    ):
        found = rank_correlation([a], [torch.tensor(values)], [graph])
        assert found == pytest.approx([expected])


def test_without_an_order_there_is_no_rank_correlation():
    graphs = [path(1, 1, 1)] * 4 + [path(1), molecule_graph("C")]
    order = torch.arange(6.0)
    constant = torch.tensor([2.0, 1, 2, 0, 0, 2])
    undefined = torch.tensor([math.nan, 1, 2, 3, 4, 5])
    a = [order, constant, order, undefined, torch.rand(2), torch.empty(0)]
    b = [order, order, constant, order, torch.rand(2), torch.empty(0)]
    found = rank_correlation(a, b, graphs)
    assert found[0] == pytest.approx(1)
    assert [math.isnan(value) for value in found] == [False] + [True] * 5


# Bad input.


def test_an_unknown_method_is_an_error_that_lists_those_known(graphs):
    with pytest.raises(ValueError, match=r"unknown method 'saliency'; known: ratio, gradient"):
        edge_importance(network("gt"), graphs, "saliency")


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there_is_an_error(layer, graphs):
    with pytest.raises(ValueError, match=f"layer: expected 0 to 1, got {layer}"):
        edge_importance(network("gt"), graphs, "ratio", layer=layer)


def test_edges_with_float_features_have_no_types_to_explain():
    model, graph = network("gt", edge_channels=3, num_edge_types=None), path(1)
    graph.edge_attr = torch.rand(2, 3).double()
    for method in ("gradient x input", "integrated gradients"):
        with pytest.raises(
            ValueError, match=r"edges with type ids .* torch.float64, shape \[2, 3\]"
        ):
            edge_importance(model, [graph], method)
    (found,) = edge_importance(model, [graph], "edge mask")
    assert (found > 0).all()


def test_full_graph_attention_is_refused(graphs):
    with pytest.raises(ValueError, match="got full-graph attention"):
        edge_importance(network("graphit", full_graph=True), graphs, "edge mask")
