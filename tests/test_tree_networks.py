"""Networks for trees: the dense path against PyG's layers, and both against their definition."""

import pytest
import torch
from torch import nn
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GATConv, GatedGraphConv, GCNConv, GINConv, PairNorm

from mapkg.lipschitz_norm import LipschitzNorm
from studies.data.trees import level_order, neighbors_match, tree_edges
from studies.tree_networks import LAYERS, TreeNetwork

CASES = [(kind, norm, None) for kind in LAYERS for norm in ("none", "layer", "pair")]
CASES += [("gat", "lipschitz", 1.0), ("gat", "lipschitz", 4.0), ("gat", "lipschitz-layer", 1.0)]


def some_trees(depth, number=9, seed=0):
    trees = neighbors_match(depth, seed)
    chosen = torch.randperm(len(trees), generator=torch.Generator().manual_seed(seed))[:number]
    return trees.at(chosen)


def network(kind, depth, norm="none", scale=None, seed=0):
    torch.manual_seed(seed)
    model = TreeNetwork(kind, depth, norm=norm, scale=scale, channels=8).double()
    for parameter in model.parameters():  # biases and weights of norms that are no longer neutral
        nn.init.normal_(parameter, std=0.5)
    return model


def batched(trees):
    return next(iter(DataLoader(trees, batch_size=len(trees))))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(("kind", "norm", "scale"), CASES)
def test_the_dense_path_equals_the_layers_of_pyg_in_values_and_gradients(kind, norm, scale, depth):
    trees = some_trees(depth, 4 if depth == 1 else 9)
    batch = batched(trees)
    by_pyg, dense = (network(kind, depth, norm, scale) for _ in range(2))
    of_pyg = by_pyg(batch.x, batch.edge_index, batch.batch)
    of_dense = dense.dense(trees.pairs[:, level_order(depth)])
    torch.testing.assert_close(of_dense, of_pyg, rtol=1e-10, atol=1e-10)
    for scores in (of_pyg, of_dense):
        nn.functional.cross_entropy(scores, trees.y).backward()
    compared = 0
    for (name, one), other in zip(by_pyg.named_parameters(), dense.parameters(), strict=True):
        # An unused parameter has no gradient in one path and zeros in the other.
        one, other = (torch.zeros(()) if p.grad is None else p.grad for p in (one, other))
        torch.testing.assert_close(other.expand_as(one), one, rtol=1e-8, atol=1e-10, msg=name)
        compared += bool(one.abs().max() > 1e-12)
    assert compared > 5
    for one, other in zip(by_pyg.buffers(), dense.buffers(), strict=True):
        torch.testing.assert_close(other, one)  # of BatchNorm


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(("kind", "norm", "scale"), CASES)
def test_keys_of_one_permutation_share_what_is_below_the_root(kind, norm, scale, depth):
    trees = neighbors_match(depth, 0)[: 3 * 2**depth]
    apart, shared = (network(kind, depth, norm, scale) for _ in range(2))
    pairs = trees.pairs[:, level_order(depth)]
    tree = torch.arange(len(pairs)) // 2**depth
    first, keys = pairs[:: 2**depth], pairs[:, 0, 0]
    if norm == "pair" or kind == "gin":
        assert not shared.can_share, "nodes see the whole batch or tree"
        return
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))
    of_each = apart.dense(pairs[order])
    of_all = shared.shared(first, keys[order], tree[order])
    torch.testing.assert_close(of_all, of_each, rtol=1e-10, atol=1e-10)
    for scores in (of_each, of_all):
        nn.functional.cross_entropy(scores, trees.y[order]).backward()
    for (name, one), other in zip(apart.named_parameters(), shared.parameters(), strict=True):
        one, other = (torch.zeros(()) if p.grad is None else p.grad for p in (one, other))
        torch.testing.assert_close(other.expand_as(one), one, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_published_skeleton(kind):
    model, trees = network(kind, 2, "layer"), some_trees(2)
    batch = batched(trees)
    h = model.key(batch.x[:, 0]) + model.value(batch.x[:, 1])
    for layer, norm in zip(model.layers, model.norms, strict=True):
        new = layer(h, batch.edge_index)
        if kind in ("gcn", "gin"):
            new = torch.relu(new)
        h = norm(new if kind == "ggnn" else h + new)
    scores = model.head(h.view(len(trees), 7, -1)[:, 0])
    torch.testing.assert_close(model(batch.x, batch.edge_index, batch.batch), scores)
    kinds = {"gcn": GCNConv, "gin": GINConv, "ggnn": GatedGraphConv, "gat": GATConv}
    assert len(model.layers) == 3
    assert all(type(layer) is kinds[kind] for layer in model.layers)
    assert model.head.bias is None and model.head.out_features == 5


def test_the_norm_is_the_one_asked_for():
    assert all(type(n) is nn.Identity for n in network("gat", 2).norms)
    assert all(type(n) is nn.LayerNorm for n in network("gat", 2, "layer").norms)
    assert all(type(n) is PairNorm for n in network("gat", 2, "pair").norms)
    divided = network("gat", 2, "lipschitz", 4.0)
    assert [layer.score_norm.norm.scale for layer in divided.layers] == [4.0] * 3
    assert isinstance(divided.layers[0].score_norm.norm, LipschitzNorm)
    both = network("gat", 2, "lipschitz-layer", 1.0)
    assert all(type(n) is nn.LayerNorm for n in both.norms)
    assert isinstance(both.layers[0].score_norm.norm, LipschitzNorm)
    gat = TreeNetwork("gat", 2).layers[0]
    assert (gat.heads, gat.out_channels, gat.dropout, gat.concat) == (4, 8, 0.0, True)


def test_trees_in_a_batch_do_not_see_each_other():
    trees = some_trees(3, 5)
    for norm in ("none", "layer", "pair", "lipschitz"):
        model = network("gat", 3, norm)
        together = model.dense(trees.pairs[:, level_order(3)])
        alone = [model.dense(tree.pairs[:, level_order(3)]) for tree in (trees[:1], trees[4:])]
        torch.testing.assert_close(together[[0, 4]], torch.cat(alone))


@pytest.mark.parametrize(("scale", "most"), [(1.0, 3.33), (4.0, 1.36)])
def test_normalised_weights_of_a_family_differ_by_a_bounded_factor(scale, most):
    torch.manual_seed(0)
    model = network("gat", 2, "lipschitz", scale)
    layer = model.layers[0]
    edge_index = tree_edges(2)
    largest = 0.0
    for size in (1.0, 100.0):
        weights = layer(
            size * torch.randn(7, 8, dtype=torch.double), edge_index, return_attention_weights=True
        )[1]
        for target in range(3):
            family = weights[1][weights[0][1] == target]
            largest = max(largest, (family.amax(0) / family.amin(0)).max().item())
    assert 1 < largest <= most
    # one key along the score's vector, the others against it: the bound is nearly reached
    with torch.no_grad():
        layer.att_dst.zero_()
        direction = torch.linalg.lstsq(layer.lin.weight, layer.att_src.flatten()).solution
    x = torch.zeros(7, 8, dtype=torch.double)
    x[1], x[4] = direction, -direction  # the root's children in pre-order
    index, weights = layer(1e3 * x, edge_index, return_attention_weights=True)[1]
    at_root = {int(j): w for j, i, w in zip(*index, weights, strict=True) if i == 0}
    factor = (at_root[1] / at_root[4]).max().item()
    assert 0.9 * most < factor <= most


def test_what_a_leaf_holds_reaches_the_root():
    trees = some_trees(3, 1)
    pairs = trees.pairs[:, level_order(3)].clone()
    for kind in LAYERS:
        model = network(kind, 3).eval()
        before = model.dense(pairs)
        for place in range(7, 15):
            changed = pairs.clone()
            changed[:, place, 1] = changed[:, place, 1] % 8 + 1
            assert not torch.allclose(before, model.dense(changed)), (kind, place)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(architecture="sage"), r"architecture: expected one of .* got 'sage'"),
        (dict(norm="batch"), r"norm: expected one of .* got 'batch'"),
        (dict(architecture="gcn", norm="lipschitz"), "'gcn' does not have"),
        (dict(scale=4.0), "scale: expected None but with LipschitzNorm, got 4.0"),
    ],
)
def test_what_makes_no_network_is_refused(options, message):
    settings = dict(architecture="gat", depth=2) | options
    with pytest.raises(ValueError, match=message):
        TreeNetwork(settings.pop("architecture"), settings.pop("depth"), **settings)
