"""Whole networks: size, inputs, readout, batches, and PyG's explainers on an unchanged model."""

import pytest
import torch
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.explain import AttentionExplainer, Explainer, GNNExplainer
from torch_geometric.explain.algorithm.utils import clear_masks, set_masks

from mapkg.hooks import record
from mapkg.models import GraphNetwork, build
from mapkg.models.network import TypeEmbedding
from studies.published import CONFIGS

SMALL = CONFIGS["GT-ZINC"].replace(hidden_channels=16, heads=4, num_layers=2)
EXACT = dict(rtol=1e-10, atol=1e-10)


def random_graph(seed, nodes, edges):
    generator = torch.Generator().manual_seed(seed)
    return Data(
        x=torch.randint(28, (nodes,), generator=generator),
        edge_index=torch.randint(nodes, (2, edges), generator=generator),
        edge_attr=torch.randint(4, (edges,), generator=generator),
    )


def random_network(seed=0, config=SMALL):
    """A network whose BatchNorm statistics are not the trivial ones, in evaluation mode."""
    torch.manual_seed(seed)
    model = build(config).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def inputs(graph):
    return graph.x, graph.edge_index, graph.edge_attr


def one_hot(graph):
    return (
        nn.functional.one_hot(graph.x, 28).double(),
        graph.edge_index,
        nn.functional.one_hot(graph.edge_attr, 4).double(),
    )


def head_by_formula(network, pooled):
    first, second, third = network.head[0], network.head[2], network.head[4]
    hidden = (pooled @ first.weight.T + first.bias).clamp(min=0)
    hidden = (hidden @ second.weight.T + second.bias).clamp(min=0)
    return hidden @ third.weight.T + third.bias


# Building.


def test_a_node_level_network_predicts_for_every_node_from_float_edge_features():
    torch.manual_seed(0)
    model = build(CONFIGS["SAN-PROTEINS"]).eval()
    edge_index = torch.tensor([[0, 1, 2, 2], [1, 0, 0, 1]])
    found = model(torch.tensor([0, 7, 3]), edge_index, torch.rand(4, 8))
    assert found.shape == (3, 112)
    fewer = model(torch.tensor([0, 7, 3]), edge_index[:, :2], torch.rand(4, 8)[:2])
    assert torch.equal(found[2], fewer[2]), "node 2 has no incoming edge in either graph"
    assert not torch.allclose(found[0], fewer[0])


@pytest.mark.parametrize("recompute", [True, False])
def test_recomputed_edges_start_every_layer_from_the_embedded_features(recompute):
    torch.manual_seed(0)
    config = CONFIGS["GT-PROTEINS"].replace(recompute_edges=recompute)
    model = build(config).eval()
    inputs = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, given, __: inputs.append(given[2]))
    edge_attr = torch.rand(4, 8)
    model(torch.tensor([0, 7, 3]), torch.tensor([[0, 1, 2, 2], [1, 0, 0, 1]]), edge_attr)
    embedded = model.edge_embedding(edge_attr)
    assert torch.equal(inputs[0], embedded)
    assert [torch.equal(given, embedded) for given in inputs[1:]] == [recompute] * 2


def test_edges_have_either_type_ids_or_float_features():
    sizes = dict(num_node_types=2, hidden_channels=4, out_channels=1, readout=None)
    for both in ({"num_edge_types": 2, "edge_channels": 8}, {"num_edge_types": None}):
        with pytest.raises(ValueError, match=r"either num_edge_types.*or edge_channels"):
            GraphNetwork([], **sizes, **both)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("EGAT-ZINC", {"residual": True}, "residual: egat is built with False only, got True"),
        ("EGAT-ZINC", {"dropout": 0.5}, "dropout: egat is built with 0.0 only"),
        ("GAT-ZINC", {"batch_norm": False}, "batch_norm: gat is built with True only"),
        ("GPS-ZINC", {"use_bias": True}, "use_bias: gps is built with False only"),
        ("GATv2-ZINC", {"attention": "uniform"}, "attention: gatv2 is built with 'full' only"),
        ("GT-ZINC", {"architecture": "mlp"}, r"architecture: .*'graphit'.* got 'mlp'"),
    ],
)
def test_a_part_that_an_architecture_has_no_choice_in_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(CONFIGS[name].replace(**changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [({}, "num_node_types"), (dict(num_node_types=9), "num_edge_types")],
)
def test_a_configuration_without_a_number_of_types_is_an_error_that_says_what_to_set(
    changes, named
):
    with pytest.raises(ValueError, match=rf"config\.replace\({named}=\.\.\.\)"):
        build(CONFIGS["GT-TOX21"].replace(**changes))


def test_an_unknown_readout_is_an_error():
    with pytest.raises(ValueError, match=r"expected one of \('mean', 'sum', 'max'\), got 'last'"):
        GraphNetwork(
            [],
            num_node_types=2,
            num_edge_types=2,
            hidden_channels=4,
            out_channels=1,
            readout="last",
        )


def test_the_seed_before_build_fixes_the_weights():
    first, again, other = (random_network(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["node_embedding.weight"], other["node_embedding.weight"])
    assert not torch.equal(
        first["layers.0.attention.query.weight"], first["layers.1.attention.query.weight"]
    )


# The forward pass.


@pytest.mark.parametrize("readout", ["mean", "sum"])
def test_the_network_is_embeddings_then_layers_then_readout_then_head(readout):
    model = random_network(config=SMALL.replace(readout=readout))
    graphs = [random_graph(seed, nodes, 2 * nodes) for seed, nodes in enumerate((5, 1, 8))]
    batch = Batch.from_data_list(graphs)
    x = model.node_embedding.weight[batch.x]
    edge_attr = model.edge_embedding.weight[batch.edge_attr]
    for layer in model.layers:
        x, edge_attr = layer(x, batch.edge_index, edge_attr)
    pooled = torch.zeros(3, 16, dtype=torch.float64)
    for node, graph in enumerate(batch.batch.tolist()):
        pooled[graph] += x[node]
    if readout == "mean":
        pooled /= torch.tensor([[5.0], [1.0], [8.0]], dtype=torch.float64)
    expected = head_by_formula(model, pooled)
    found = model(*inputs(batch), batch.batch, 3)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("readout", ["mean", "sum"])
def test_graphs_without_nodes_are_read_out_as_zeros_if_the_batch_size_is_given(readout):
    model = random_network(config=SMALL.replace(readout=readout))
    graph = random_graph(0, 8, 20)
    node_graph = torch.tensor([1] * 8)  # graph 0 and graph 2 have no nodes
    alone = model(*inputs(graph))[0]
    nothing = head_by_formula(model, torch.zeros(16, dtype=torch.float64))
    found = model(*inputs(graph), node_graph, 3)
    torch.testing.assert_close(found, torch.stack([nothing, alone, nothing]), **EXACT)
    # Without it nothing says that graph 2 exists.
    found = model(*inputs(graph), node_graph)
    torch.testing.assert_close(found, torch.stack([nothing, alone]), **EXACT)


# PyG's explainers.


def explained(algorithm, arguments, **settings):
    model = random_network()
    explainer = Explainer(
        model,
        algorithm,
        explanation_type="model",
        model_config=dict(mode="regression", task_level="graph", return_type="raw"),
        **settings,
    )
    x, edge_index, edge_attr = arguments
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prediction = model(*arguments)
    explanation = explainer(x, edge_index, edge_attr=edge_attr)
    assert torch.equal(model(*arguments), prediction), "the model came back changed"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return model, explanation


def test_gnn_explainer_learns_a_mask_over_edges():
    torch.manual_seed(1)
    graph = random_graph(0, 8, 20)
    _, explanation = explained(GNNExplainer(epochs=5), one_hot(graph), edge_mask_type="object")
    mask = explanation.edge_mask
    assert mask.shape == (20,)
    assert ((mask >= 0) & (mask <= 1)).all()
    assert mask.unique().numel() == 20  # every edge has its own gradient


def test_gnn_explainer_masks_the_attributes_of_one_hot_nodes():
    torch.manual_seed(1)
    graph = random_graph(0, 8, 20)
    _, explanation = explained(
        GNNExplainer(epochs=5),
        one_hot(graph),
        node_mask_type="attributes",
        edge_mask_type="object",
    )
    assert explanation.node_mask.shape == (8, 28)
    # A mask multiplies the rows, so only the type that a node has can matter.
    assert torch.equal(explanation.node_mask > 0, nn.functional.one_hot(graph.x, 28) > 0)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_attention_explainer_reads_the_attention_weights(reduce):
    graph = random_graph(0, 8, 20)
    model, explanation = explained(
        AttentionExplainer(reduce), inputs(graph), edge_mask_type="object"
    )
    with record(model, "layers.*.attention_weight") as seen:
        model(*inputs(graph))
    weights = torch.stack([weight for (weight,) in seen.values()])  # [layers, E, H]
    expected = weights.amax(dim=(0, 2)) if reduce == "max" else weights.mean(dim=(0, 2))
    torch.testing.assert_close(explanation.edge_mask, expected, **EXACT)


def test_masking_an_edge_takes_away_its_message_and_leaves_the_other_weights():
    model, graph = random_network(config=SMALL.replace(num_layers=1)), random_graph(0, 8, 20)
    attention, names = model.layers[0].attention, ("score", "attention_weight", "attended")
    mask = torch.ones(20, dtype=torch.float64)
    mask[6] = 0
    source, target = graph.edge_index[:, 6].tolist()
    assert (graph.edge_index[1] == target).sum() > 1
    with record(attention, names) as seen:
        whole = model(*inputs(graph))
        set_masks(model, mask, graph.edge_index, apply_sigmoid=False)
        masked = model(*inputs(graph))
        clear_masks(model)
        again = model(*inputs(graph))
    for name in ("score", "attention_weight"):
        assert torch.equal(seen[name][0], seen[name][1])
    value = attention.value(model.node_embedding(graph.x))[source]
    expected = seen["attended"][0].clone()
    expected[target] -= seen["attention_weight"][0][6].repeat_interleave(4) * value
    torch.testing.assert_close(seen["attended"][1], expected, **EXACT)
    assert torch.equal(again, whole) and not torch.allclose(masked, whole)


def test_an_embedding_of_several_columns_is_the_sum_of_one_table_per_column():
    torch.manual_seed(0)
    embedding = TypeEmbedding((3, 2, 4), 5)
    first, second, third = embedding.weight.split([3, 2, 4])
    ids = torch.tensor([[2, 0, 3], [0, 1, 0]])
    expected = torch.stack([first[2] + second[0] + third[3], first[0] + second[1] + third[0]])
    assert torch.equal(embedding(ids), expected)
    one = TypeEmbedding(3, 5)
    assert torch.equal(one(ids[:, :1]), one.weight[[2, 0]])  # the shape that PyG gives ids
    columns = [torch.nn.functional.one_hot(ids[:, c], n) for c, n in enumerate((3, 2, 4))]
    one_hot = torch.cat(columns, dim=1).float()
    torch.testing.assert_close(embedding(one_hot), expected)


def test_tables_of_several_columns_start_glorot_uniform_one_by_one():
    torch.manual_seed(0)
    small, large = TypeEmbedding((5, 1000), 64).weight.split([5, 1000])
    for table in (small, large):
        bound = (6 / (table.size(0) + 64)) ** 0.5
        assert 0.9 * bound < table.abs().max() <= bound


def test_ids_with_another_number_of_columns_are_an_error():
    with pytest.raises(ValueError, match=r"\[rows, 2\].* got shape \[4, 3\]"):
        TypeEmbedding((3, 2), 5)(torch.zeros(4, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("name", "changes", "parameters"),
    [
        ("GT-ZINC", {}, 588_353),
        ("GT-ZINC", dict(use_bias=True, explicit_bias="published"), 592_833),
        ("GraphiT-ZINC", {}, 378_433),
        ("SAN-ZINC", {}, 290_529),
        # SAN's learned gamma, which gets no gradient on a sparse graph, is not built.
        *(("GT-PROTEINS", {}, 180_704), ("GraphiT-PROTEINS", {}, 220_178)),
        ("SAN-PROTEINS", {}, 220_178),
    ],
)
def test_networks_have_the_published_number_of_parameters(name, changes, parameters):
    model = build(CONFIGS[name].replace(**changes))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
