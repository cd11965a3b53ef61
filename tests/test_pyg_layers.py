"""PyG's own attention layers: what is recorded of them, against what PyG and plain loops say."""

import math

import pytest
import torch
from random_graphs import molecule
from torch import nn
from torch_geometric.data import Batch
from torch_geometric.nn import GATv2Conv, GINEConv, TransformerConv
from torch_geometric.nn.attention import PerformerAttention
from torch_geometric.utils import softmax

from mapkg.hooks import record
from mapkg.measures import activation_ratio
from mapkg.models.pyg_layers import recorded_rows, standard_layer

EXACT = dict(rtol=1e-10, atol=1e-10)
CHANNELS, HEADS, WIDTH = 12, 3, 4
SIZES = (5, 4, 7)
GRAPHS = Batch.from_data_list([molecule(seed, nodes) for seed, nodes in enumerate(SIZES)])
NODES = sum(SIZES)


@pytest.fixture
def features():
    """x [N, D], edge_index, edge_attr [E, D], batch of the three graphs."""
    torch.manual_seed(0)
    x, edge_attr = torch.randn(NODES + GRAPHS.num_edges, CHANNELS).double().tensor_split([NODES])
    return x, GRAPHS.edge_index, edge_attr, GRAPHS.batch


def layer(architecture, **options):
    torch.manual_seed(0)
    return standard_layer(architecture, CHANNELS, HEADS, **options).double().eval()


@pytest.mark.parametrize("architecture", ["gat", "gatv2", "transformer"])
def test_a_layer_adds_the_normalised_and_rectified_convolution(architecture, features):
    x, edge_index, edge_attr, _ = features
    module = layer(architecture)
    with torch.no_grad():
        module.norm.running_mean.normal_()
        module.norm.running_var.uniform_(0.5, 2.0)
    found, edges = module(x, edge_index, edge_attr)
    conv = module.conv(x, edge_index, edge_attr)
    normal = (conv - module.norm.running_mean) / (module.norm.running_var + 1e-5).sqrt()
    torch.testing.assert_close(found, x + normal.clamp(min=0), **EXACT)
    assert edges is edge_attr


@pytest.mark.parametrize("architecture", ["gat", "gatv2"])
def test_attention_weights_are_those_of_pyg_and_not_dropped_out(architecture, features):
    x, edge_index, edge_attr, _ = features
    module = layer(architecture, dropout=0.9).train()
    with record(module, ["conv:edge_update"]) as seen:
        first, _ = module(x, edge_index, edge_attr)
        second, _ = module(x, edge_index, edge_attr)
    _, (_, expected) = module.conv(x, edge_index, edge_attr, return_attention_weights=True)
    assert all(torch.equal(weight, expected) for weight in seen["conv:edge_update"])
    assert not torch.equal(first, second), "nothing was dropped out"


@pytest.mark.parametrize("edge_dim", [CHANNELS, None])
@pytest.mark.parametrize("kind", [TransformerConv, GATv2Conv])
def test_the_vector_score_sums_to_the_logit_of_the_attention_that_pyg_returns(
    kind, edge_dim, features
):
    x, edge_index, edge_attr, _ = features
    torch.manual_seed(0)
    conv = kind(CHANNELS, WIDTH, HEADS, edge_dim=edge_dim).double()
    name = ":message_inputs" if kind is TransformerConv else ":edge_update_inputs"
    with record(conv, name) as seen:
        _, (used, weight) = conv(
            x, edge_index, edge_attr if edge_dim else None, return_attention_weights=True
        )
    score = recorded_rows(conv, seen[name][0])
    logit = score.unflatten(-1, (HEADS, WIDTH)).sum(dim=-1)
    torch.testing.assert_close(softmax(logit, used[1]), weight, **EXACT)
    in_degree = torch.bincount(used[1])[used[1]]
    assert (weight - 1 / in_degree.unsqueeze(1)).abs().max() > 0.05, "uniform, whatever the score"
    if kind is TransformerConv:
        source, target = x[edge_index]
        key = conv.lin_key(source) + (conv.lin_edge(edge_attr) if edge_dim else 0)
        torch.testing.assert_close(score, conv.lin_query(target) * key / math.sqrt(WIDTH), **EXACT)


@pytest.mark.parametrize("edge_dim", [CHANNELS, None, 5])
def test_rows_of_gine_are_its_messages_before_the_relu(edge_dim, features):
    x, edge_index, edge_attr, _ = features
    conv = GINEConv(nn.Linear(CHANNELS, CHANNELS), edge_dim=edge_dim).double()
    with record(conv, [":message_inputs", ":message"]) as seen:
        conv(x, edge_index, edge_attr[:, :edge_dim])
    (inputs,), (message,) = seen.values()
    rows = recorded_rows(conv, inputs)
    torch.testing.assert_close(rows.relu(), message, **EXACT)
    if edge_dim is None:
        torch.testing.assert_close(rows, x[edge_index[0]] + edge_attr, **EXACT)
    # The ReLU zeroes the median of many rows, and no ratio is left.
    assert activation_ratio(message).isnan().any(dim=1).double().mean() > 0.25
    assert not activation_ratio(rows).isnan().any()


@pytest.mark.parametrize("training", [False, True])
def test_dense_attention_is_a_loop_over_graphs_and_heads(training, features):
    x, edge_index, edge_attr, batch = features
    module = layer("gps").train(training)
    attention = module.conv.attn
    with torch.no_grad(), record(module, "conv.attn") as seen:
        module(x, edge_index, edge_attr, batch)
        maps = attention.in_proj_weight.split(CHANNELS)
        biases = attention.in_proj_bias.split(CHANNELS)
        expected = []
        for nodes in x.split(SIZES):
            query, key, value = (nodes @ m.T + b for m, b in zip(maps, biases, strict=True))
            heads = []
            for head in range(HEADS):
                own = slice(head * WIDTH, (head + 1) * WIDTH)
                logit = query[:, own] @ key[:, own].T / math.sqrt(WIDTH)
                heads.append(logit.softmax(dim=1) @ value[:, own])
            expected.append(attention.out_proj(torch.cat(heads, dim=1)))
    found = recorded_rows(attention, seen["conv.attn"][0], batch)  # without padding, in order
    torch.testing.assert_close(found, torch.cat(expected), **EXACT)


def test_rows_of_a_performer_are_given_only_where_padding_cannot_reach_them():
    attention, x = PerformerAttention(CHANNELS, HEADS).eval(), torch.randn(2, 5, CHANNELS)
    whole, some = torch.ones(2, 5).bool(), torch.arange(10).view(2, 5) < 8
    alone, beside = attention(x[1:, :3], some[1:, :3]), attention(x, some)[1:, :3]
    assert not torch.allclose(alone, beside, atol=1e-6)  # PyG's, with padding
    output = attention(x, whole)
    rows = recorded_rows(attention, output, torch.arange(2).repeat_interleave(5))
    assert torch.equal(rows, output.flatten(0, 1))
    assert torch.equal(rows, recorded_rows(attention, output))
    with pytest.raises(ValueError, match="PerformerAttention counts padding in its denominator"):
        recorded_rows(attention, output, some.nonzero()[:, 0])


def test_what_has_no_score_or_is_not_known_is_an_error(features):
    x, edge_index, edge_attr, _ = features
    conv = layer("gat").conv
    with record(conv, ":edge_update_inputs") as seen:
        conv(x, edge_index, edge_attr)
    for call, error, words in (
        (lambda: recorded_rows(conv, seen[":edge_update_inputs"][0]), TypeError, "got GATConv"),
        (lambda: recorded_rows(nn.Identity(), (x, x)), TypeError, "a dict of arguments, got tuple"),
        (lambda: standard_layer("gt", 8, 2), ValueError, "one of .*'gat'.*'gt'"),
    ):
        with pytest.raises(error, match=words):
            call()
