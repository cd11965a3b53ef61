"""Whole networks: size, inputs, readout, batches, and PyG's explainers on an unchanged model."""

import pytest
import torch
from random_graphs import molecule
from torch import nn
from torch.nn.functional import one_hot
from torch_geometric.data import Batch
from torch_geometric.explain import AttentionExplainer, Explainer

from mapkg.hooks import record
from mapkg.models import GraphNetwork, build
from mapkg.models.network import TypeEmbedding
from studies.published import CONFIGS

SMALL = CONFIGS["GT-ZINC"].replace(hidden_channels=16, heads=4, num_layers=2)
EXACT = dict(rtol=1e-10, atol=1e-10)
GRAPH = molecule(0, 8)
INPUTS = GRAPH.x, GRAPH.edge_index, GRAPH.edge_attr


def random_network(seed=0, config=SMALL):
    """A network whose BatchNorm statistics are not the trivial ones, in evaluation mode."""
    torch.manual_seed(seed)
    model = build(config).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def head_by_formula(network, pooled):
    first, second, third = network.head[0], network.head[2], network.head[4]
    hidden = (pooled @ first.weight.T + first.bias).clamp(min=0)
    hidden = (hidden @ second.weight.T + second.bias).clamp(min=0)
    return hidden @ third.weight.T + third.bias


@pytest.mark.parametrize("recompute", [True, False])
def test_recomputed_edges_start_every_layer_from_the_embedded_features(recompute):
    torch.manual_seed(0)
    model = build(CONFIGS["GT-PROTEINS"].replace(recompute_edges=recompute)).eval()
    inputs = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, given, __: inputs.append(given[2]))
    edge_attr = torch.rand(4, 8)
    model(torch.tensor([0, 7, 3]), torch.tensor([[0, 1, 2, 2], [1, 0, 0, 1]]), edge_attr)
    embedded = model.edge_embedding(edge_attr)
    assert torch.equal(inputs[0], embedded)
    assert [torch.equal(given, embedded) for given in inputs[1:]] == [recompute] * 2


def built(name, **changes):
    return lambda: build(CONFIGS[name].replace(**changes))


def network(**changes):
    sizes = dict(num_node_types=2, num_edge_types=2, hidden_channels=4, out_channels=1)
    return lambda: GraphNetwork([], **sizes | {"readout": None} | changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (network(edge_channels=8), r"either num_edge_types.*or edge_channels"),
        (network(num_edge_types=None), r"either num_edge_types.*or edge_channels"),
        (network(readout="last"), r"expected one of \('mean', 'sum', 'max'\), got 'last'"),
        (built("EGAT-ZINC", residual=True), "residual: egat is built with False only, got True"),
        (built("EGAT-ZINC", dropout=0.5), "dropout: egat is built with 0.0 only"),
        (built("GAT-ZINC", batch_norm=False), "batch_norm: gat is built with True only"),
        (built("GPS-ZINC", use_bias=True), "use_bias: gps is built with False only"),
        (built("GATv2-ZINC", attention="uniform"), "attention: gatv2 is built with 'full' only"),
        (built("GT-ZINC", architecture="mlp"), r"architecture: .*'graphit'.* got 'mlp'"),
        (built("GT-TOX21"), r"config\.replace\(num_node_types=\.\.\.\)"),
        (built("GT-TOX21", num_node_types=9), r"config\.replace\(num_edge_types=\.\.\.\)"),
        (lambda: TypeEmbedding((3, 2), 5)(torch.zeros(4, 3).long()), r"rows, 2\].* \[4, 3\]"),
    ],
)
def test_a_part_that_is_missing_unknown_or_not_to_be_had_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


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


POOLS = {
    "mean": lambda nodes: nodes.mean(0, keepdim=True),
    "sum": lambda nodes: nodes.sum(0, keepdim=True),
    "max": lambda nodes: nodes.amax(0, keepdim=True),
    None: lambda nodes: nodes,  # a prediction for each node
}


@pytest.mark.parametrize("readout", POOLS)
@pytest.mark.parametrize("edge_channels", [None, 3])
def test_the_network_is_embeddings_then_layers_then_readout_then_head(readout, edge_channels):
    types = None if edge_channels else SMALL.num_edge_types
    changes = dict(readout=readout, edge_channels=edge_channels, num_edge_types=types)
    model = random_network(config=SMALL.replace(**changes))
    batch = Batch.from_data_list([molecule(seed, nodes) for seed, nodes in enumerate((5, 3, 8))])
    x, edge_attr = model.node_embedding.weight[batch.x], model.edge_embedding.weight
    if edge_channels:
        batch.edge_attr = torch.randn(batch.num_edges, 3, dtype=torch.float64)
        edge_attr = batch.edge_attr @ edge_attr.T + model.edge_embedding.bias
    else:
        edge_attr = edge_attr[batch.edge_attr]
    for layer in model.layers:
        x, edge_attr = layer(x, batch.edge_index, edge_attr)
    pooled = torch.cat([*map(POOLS[readout], x.split([5, 3, 8]))])
    found = model(batch.x, batch.edge_index, batch.edge_attr, batch.batch, 3)
    torch.testing.assert_close(found, head_by_formula(model, pooled), **EXACT)


@pytest.mark.parametrize("readout", ["mean", "sum"])
def test_graphs_without_nodes_are_read_out_as_zeros_if_the_batch_size_is_given(readout):
    model = random_network(config=SMALL.replace(readout=readout))
    node_graph = torch.tensor([1] * 8)  # graph 0 and graph 2 have no nodes
    alone = model(*INPUTS)[0]
    nothing = head_by_formula(model, torch.zeros(16, dtype=torch.float64))
    found = model(*INPUTS, node_graph, 3)
    torch.testing.assert_close(found, torch.stack([nothing, alone, nothing]), **EXACT)
    # Without it nothing says that graph 2 exists.
    torch.testing.assert_close(model(*INPUTS, node_graph), torch.stack([nothing, alone]), **EXACT)


def test_an_embedding_of_several_columns_is_the_sum_of_one_table_per_column():
    torch.manual_seed(0)
    embedding = TypeEmbedding((3, 2, 4), 5)
    first, second, third = embedding.weight.split([3, 2, 4])
    ids = torch.tensor([[2, 0, 3], [0, 1, 0]])
    expected = torch.stack([first[2] + second[0] + third[3], first[0] + second[1] + third[0]])
    assert torch.equal(embedding(ids), expected)
    one = TypeEmbedding(3, 5)
    assert torch.equal(one(ids[:, :1]), one.weight[[2, 0]])  # the shape that PyG gives ids
    columns = torch.cat([one_hot(ids[:, c], n) for c, n in enumerate((3, 2, 4))], dim=1)
    torch.testing.assert_close(embedding(columns.float()), expected)
    for floats in (ids[:, 0].float(), columns[:, 1:].float()):
        with pytest.raises(ValueError, match="expected type ids, whole numbers, or one-hot rows"):
            embedding(floats)
    for bad in ([[3, 0, 0]], [[0, -1, 0]], [[0, 0, 4]]):  # rows of another table, or of none
        with pytest.raises(IndexError, match="out of range"):
            embedding(torch.tensor(bad))
    with pytest.raises(ValueError, match=r"ids of shape \[rows, 1\], .* got shape \[2, 3\]"):
        one(ids)
    # Each table starts Glorot uniform.
    for table in TypeEmbedding((5, 1000), 64).weight.split([5, 1000]):
        bound = (6 / (table.size(0) + 64)) ** 0.5
        assert 0.9 * bound < table.abs().max() <= bound


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_attention_explainer_reads_the_attention_weights_and_changes_nothing(reduce):
    model = random_network()
    model_config = dict(mode="regression", task_level="graph", return_type="raw")
    kinds = dict(explanation_type="model", model_config=model_config, edge_mask_type="object")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with record(model, "layers.*.attention_weight") as seen:
        prediction = model(*INPUTS)
    x, edge_index, edge_attr = INPUTS
    explainer = Explainer(model, AttentionExplainer(reduce), **kinds)
    mask = explainer(x, edge_index, edge_attr=edge_attr).edge_mask
    weights = torch.stack([weight for (weight,) in seen.values()])  # [layers, E, H]
    expected = weights.amax(dim=(0, 2)) if reduce == "max" else weights.mean(dim=(0, 2))
    torch.testing.assert_close(mask, expected, **EXACT)
    assert torch.equal(model(*INPUTS), prediction), "the model came back changed"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
