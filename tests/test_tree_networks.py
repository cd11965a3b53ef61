"""Networks for trees: the dense path against PyG's layers, and both against their definition."""

import pytest
import torch
from torch import nn
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GATConv, GatedGraphConv, GCNConv, GINConv, PairNorm

from mapkg.lipschitz_norm import LipschitzNorm
from studies.data.trees import level_order, neighbors_match, tree_edges
from studies.neighbors_match import LAYERS, TreeNetwork

CASES = [(kind, norm, None) for kind in LAYERS for norm in ("none", "layer", "pair")]
CASES += [("gat", "lipschitz", 1.0), ("gat", "lipschitz", 4.0), ("gat", "lipschitz-layer", 1.0)]


def network(kind, depth, norm="none", scale=None):
    torch.manual_seed(0)
    model = TreeNetwork(kind, depth, norm=norm, scale=scale, channels=8).double()
    for parameter in model.parameters():  # biases and weights of norms that are no longer neutral
        nn.init.normal_(parameter, std=0.5)
    return model


def assert_same(one, other, of_one, of_other, y):
    """Equal scores, and equal gradients of all parameters."""
    torch.testing.assert_close(of_other, of_one, rtol=1e-10, atol=1e-10)
    for scores in (of_one, of_other):
        nn.functional.cross_entropy(scores, y).backward()
    for (name, first), second in zip(one.named_parameters(), other.parameters(), strict=True):
        # An unused parameter has no gradient in one path and zeros in the other.
        grads = (torch.zeros(()) if p.grad is None else p.grad for p in (first, second))
        torch.testing.assert_close(
            *torch.broadcast_tensors(*grads), rtol=1e-8, atol=1e-10, msg=name
        )


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize(("kind", "norm", "scale"), CASES)
def test_the_dense_and_the_shared_path_equal_the_layers_of_pyg(kind, norm, scale, depth):
    trees = neighbors_match(depth, 0)[: 3 * 2**depth]  # all keys of a permutation in turn
    order = torch.randperm(len(trees), generator=torch.Generator().manual_seed(1))[:9]
    chosen, pairs = trees.at(order), trees.pairs[:, level_order(depth)]
    batch = next(iter(DataLoader(chosen, batch_size=len(chosen))))
    by_pyg, dense = (network(kind, depth, norm, scale) for _ in range(2))
    of_pyg = by_pyg(batch.x, batch.edge_index, batch.batch)
    assert_same(by_pyg, dense, of_pyg, dense.dense(pairs[order]), chosen.y)
    for one, other in zip(by_pyg.buffers(), dense.buffers(), strict=True):
        torch.testing.assert_close(other, one)  # of BatchNorm
    assert dense.can_share == (norm != "pair" and kind != "gin")
    if dense.can_share:
        apart, shared = (network(kind, depth, norm, scale) for _ in range(2))
        of_shared = shared.shared(pairs[:: 2**depth], pairs[order, 0, 0], order // 2**depth)
        assert_same(apart, shared, apart.dense(pairs[order]), of_shared, chosen.y)


@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_published_skeleton(kind):
    model, trees = network(kind, 2, "layer"), neighbors_match(2, 0)[:5]
    batch = next(iter(DataLoader(trees, batch_size=5)))
    h = model.key(batch.x[:, 0]) + model.value(batch.x[:, 1])
    for layer, norm in zip(model.layers, model.norms, strict=True):
        new = layer(h, batch.edge_index)
        new = torch.relu(new) if kind in ("gcn", "gin") else new
        h = norm(new if kind == "ggnn" else h + new)
    scores = model.head(h.view(5, 7, -1)[:, 0])
    torch.testing.assert_close(model(batch.x, batch.edge_index, batch.batch), scores)
    kinds = {"gcn": GCNConv, "gin": GINConv, "ggnn": GatedGraphConv, "gat": GATConv}
    assert [type(layer) for layer in model.layers] == [kinds[kind]] * 3
    assert model.head.bias is None and model.head.out_features == 5


def test_the_norm_is_the_one_asked_for():
    of = {"none": nn.Identity, "layer": nn.LayerNorm, "pair": PairNorm, "lipschitz": nn.Identity}
    for norm, kind in (of | {"lipschitz-layer": nn.LayerNorm}).items():
        model = network("gat", 2, norm, 4.0 if norm.startswith("lipschitz") else None)
        assert [type(each) for each in model.norms] == [kind] * 3
        if norm.startswith("lipschitz"):
            divided = [layer.score_norm.norm for layer in model.layers]
            assert [(type(each), each.scale) for each in divided] == [(LipschitzNorm, 4.0)] * 3
    gat = TreeNetwork("gat", 2).layers[0]
    assert (gat.heads, gat.out_channels, gat.dropout, gat.concat) == (4, 8, 0.0, True)


@pytest.mark.parametrize(("scale", "most"), [(1.0, 3.33), (4.0, 1.36)])
def test_normalised_weights_of_a_family_differ_by_a_bounded_factor(scale, most):
    layer = network("gat", 2, "lipschitz", scale).layers[0]
    # One key along the score's vector, the other against it: the bound is nearly reached.
    with torch.no_grad():
        layer.att_dst.zero_()
        direction = torch.linalg.lstsq(layer.lin.weight, layer.att_src.flatten()).solution
    x = torch.zeros(7, 8, dtype=torch.double)
    x[1], x[4] = direction, -direction  # the root's children in pre-order
    index, weights = layer(1e3 * x, tree_edges(2), return_attention_weights=True)[1]
    at_root = {int(j): w for j, i, w in zip(*index, weights, strict=True) if i == 0}
    assert 0.9 * most < (at_root[1] / at_root[4]).max().item() <= most


@pytest.mark.parametrize("kind", LAYERS)
def test_what_a_leaf_holds_reaches_the_root(kind):
    pairs, model = neighbors_match(3, 0)[:1].pairs[:, level_order(3)], network(kind, 3).eval()
    before = model.dense(pairs)
    for place in range(7, 15):
        changed = pairs.clone()
        changed[:, place, 1] = changed[:, place, 1] % 8 + 1
        assert not torch.allclose(before, model.dense(changed)), place
