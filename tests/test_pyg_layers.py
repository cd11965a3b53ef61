"""PyG's own attention layers: what is recorded of them, against what PyG and plain loops say."""

import math

import pytest
import torch
from random_graphs import molecule
from torch import nn
from torch_geometric.nn import GATv2Conv, GINEConv, TransformerConv
from torch_geometric.nn.attention import PerformerAttention
from torch_geometric.utils import softmax

from mapkg.hooks import record
from mapkg.models.pyg_layers import recorded_rows, standard_layer

EXACT = dict(rtol=1e-10, atol=1e-10)
CHANNELS, HEADS, WIDTH = 12, 3, 4


@pytest.fixture
def features():
    """x [N, D], edge_index and edge_attr [E, D] of a graph."""
    torch.manual_seed(0)
    edge_index = molecule(0, 9).edge_index
    x, edge_attr = (torch.randn(n, CHANNELS).double() for n in (9, edge_index.size(1)))
    return x, edge_index, edge_attr


def layer(architecture):
    torch.manual_seed(0)
    return standard_layer(architecture, CHANNELS, HEADS).double().eval()


@pytest.mark.parametrize("architecture", ["gat", "gatv2", "transformer"])
def test_a_layer_adds_the_normalised_and_rectified_convolution(architecture, features):
    x, edge_index, edge_attr = features
    module = layer(architecture)
    with torch.no_grad():
        module.norm.running_mean.normal_()
        module.norm.running_var.uniform_(0.5, 2.0)
    found, edges = module(x, edge_index, edge_attr)
    conv = module.conv(x, edge_index, edge_attr)
    normal = (conv - module.norm.running_mean) / (module.norm.running_var + 1e-5).sqrt()
    torch.testing.assert_close(found, x + normal.clamp(min=0), **EXACT)
    assert edges is edge_attr


@pytest.mark.parametrize("edge_dim", [CHANNELS, None])
@pytest.mark.parametrize("kind", [TransformerConv, GATv2Conv])
def test_the_vector_score_sums_to_the_logit_of_the_attention_that_pyg_returns(
    kind, edge_dim, features
):
    x, edge_index, edge_attr = features
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
    if kind is TransformerConv:
        source, target = x[edge_index]
        key = conv.lin_key(source) + (conv.lin_edge(edge_attr) if edge_dim else 0)
        torch.testing.assert_close(score, conv.lin_query(target) * key / math.sqrt(WIDTH), **EXACT)


@pytest.mark.parametrize("edge_dim", [CHANNELS, None, 5])
def test_rows_of_gine_are_its_messages_before_the_relu(edge_dim, features):
    x, edge_index, edge_attr = features
    conv = GINEConv(nn.Linear(CHANNELS, CHANNELS), edge_dim=edge_dim).double()
    with record(conv, ":message_inputs") as seen:
        conv(x, edge_index, edge_attr[:, :edge_dim])
    rows = recorded_rows(conv, seen[":message_inputs"][0])
    edge = edge_attr if edge_dim is None else conv.lin(edge_attr[:, :edge_dim])
    torch.testing.assert_close(rows, x[edge_index[0]] + edge, **EXACT)


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
    x, edge_index, edge_attr = features
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
