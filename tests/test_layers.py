"""What every layer has to do, whatever it computes: one contract for all networks."""

from functools import partial

import pytest
import torch
from random_graphs import molecule
from torch import nn
from torch_geometric.data import Batch, Data

from mapkg.hooks import edit, record, resolve
from mapkg.models import EdgeAttention, EdgeGATLayer
from mapkg.models.network import SCORES
from mapkg.models.pyg_layers import ARCHITECTURES as OF_PYG
from mapkg.models.pyg_layers import RECORDED, recorded_rows, standard_layer
from studies.extras import build
from studies.published import CONFIGS

EXACT = dict(rtol=1e-10, atol=1e-10)
CHANNELS, HEADS, LAYERS = 12, 3, 2
SIZES = dict(hidden_channels=CHANNELS, heads=HEADS, num_layers=LAYERS)
PAIRS = {"GT": "gt", "GraphiT": "graphit", "SAN": "san", "EGAT": "egat", "GAT": "gat"}
PAIRS |= {"GATv2": "gatv2", "TransformerConv": "transformer", "GPS": "gps"}
OF = {short: CONFIGS[f"{name}-ZINC"].replace(**SIZES) for name, short in PAIRS.items()}
NETWORKS = OF | {
    "gt, intended term": OF["gt"].replace(explicit_bias="intended", use_bias=True),
    "gt, sink": OF["gt"].replace(explicit_bias="sink"),
    "gt, bound": OF["gt"].replace(score_bound="tanh"),
    "gt, LayerNorm": OF["gt"].replace(batch_norm=False, layer_norm=True, residual=False),
    "kernel": OF["graphit"].replace(full_graph=True),
    "learned gamma": OF["san"].replace(full_graph=True),
    "fixed gamma": OF["san"].replace(full_graph=True, gamma=1e-5),
    "encoding": OF["san"].replace(laplacian_encoding=True),
    "gamma and encoding": OF["san"].replace(full_graph=True, laplacian_encoding=True),
}
each = pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)


def network(config, **changes):
    """In double precision, with statistics of BatchNorm that are worth applying."""
    torch.manual_seed(0)
    model = build(config.replace(**changes)).double().eval()
    for name, value in model.named_buffers():
        if "running" in name:
            value.uniform_(0.5, 2)
    model.head = nn.Identity()  # a narrow head may have dead units and hide differences
    return model


def inputs(graph):
    return graph.x, graph.edge_index, graph.edge_attr, graph.batch


THREE = [molecule(seed, nodes) for seed, nodes in enumerate((9, 5, 12))]
BATCH = Batch.from_data_list(THREE)


@each
def test_a_batch_gives_what_each_graph_gives_alone(config):
    none = torch.empty(0, dtype=torch.long)
    lonely = Data(x=torch.tensor([3]), edge_index=torch.stack([none, none]), edge_attr=none)
    model, graphs = network(config), [*THREE, lonely]
    batch = Batch.from_data_list(graphs)
    alone = torch.cat([model(*inputs(graph)) for graph in graphs])
    assert alone.std(dim=0).min() > 1e-3, "the graphs are the same"
    torch.testing.assert_close(model(*inputs(batch)), alone, **EXACT)
    torch.testing.assert_close(model(*inputs(batch), 4), alone, **EXACT)


@each
def test_renumbered_nodes_and_reordered_edges_give_the_same_prediction(config):
    model, graph = network(config), molecule(3, 11)
    generator = torch.Generator().manual_seed(1)
    order, edges = (torch.randperm(n, generator=generator) for n in (11, graph.num_edges))
    moved = graph.x[order], order.argsort()[graph.edge_index[:, edges]], graph.edge_attr[edges]
    torch.testing.assert_close(model(*moved), model(*inputs(graph)), **EXACT)


@each
def test_a_gradient_reaches_every_weight(config):
    model = network(config)
    model(*inputs(BATCH)).square().sum().backward()
    unused = f"layers.{LAYERS - 1}.edge_block."  # no layer comes after the last edge stream
    for name, parameter in model.named_parameters():
        if not name.startswith(unused):
            assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "egat"])
def test_dropout_acts_in_training_only(name):
    model, without = (network(NETWORKS[name], dropout=p) for p in (0.5, 0.0))
    assert torch.equal(model(*inputs(BATCH)), without(*inputs(BATCH)))
    model.train()
    assert not torch.equal(model(*inputs(BATCH)), model(*inputs(BATCH)))


@each
def test_the_score_is_seen_and_can_be_changed(config):
    model = network(config)
    of_pyg = config.architecture in OF_PYG
    names = RECORDED[config.architecture] if of_pyg else (SCORES,)
    modules = resolve(model, names)
    assert len(modules) == LAYERS * len(names)
    expected = model(*inputs(BATCH))
    with record(model, names) as seen:
        assert torch.equal(model(*inputs(BATCH)), expected)
    pairs = sum(n * (n - 1) for n in (9, 5, 12))
    edges = pairs if config.full_graph else BATCH.num_edges
    for name, (output,) in seen.items():
        rows = recorded_rows(modules[name], output, BATCH.batch)
        assert rows.shape == (BATCH.num_nodes if name.endswith("attn") else edges, CHANNELS)
        assert rows.std() > 0
    if not of_pyg:
        with edit(model, {SCORES: torch.zeros_like}):
            assert not torch.allclose(model(*inputs(BATCH)), expected)


def test_heads_that_do_not_divide_the_channels_are_an_error():
    for heads in (5, 24):
        message = rf"hidden_channels \(12\) must be a multiple of heads \({heads}\)"
        for make in (EdgeAttention, EdgeGATLayer, *(partial(standard_layer, a) for a in OF_PYG)):
            with pytest.raises(ValueError, match=message):
                make(12, heads)
