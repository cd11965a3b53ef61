"""Tree-NeighborsMatch: its networks against PyG's layers, the study's rows, table and figure."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgba
from torch import nn
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GATConv, GatedGraphConv, GCNConv, GINConv, PairNorm

from studies.data import load
from studies.data.networks import level_order, neighbors_match
from studies.neighbors_match import (
    ASKED_COLOR,
    LAYERS,
    TreeNetwork,
    probe,
    titled,
    tree_example,
    tree_table,
    trees,
    untrained,
)
from studies.tasks import TREES, TreeTask
from studies.train import fit

CASES = [(kind, norm, None) for kind in LAYERS for norm in ("none", "layer", "pair")]
CASES += [("gat", "lipschitz", 1.0), ("gat", "lipschitz", 4.0), ("gat", "lipschitz-layer", 1.0)]
AFTER = {"layer": nn.LayerNorm, "pair": PairNorm, "lipschitz-layer": nn.LayerNorm}
CONVS = {"gcn": GCNConv, "gin": GINConv, "ggnn": GatedGraphConv, "gat": GATConv}


def network(kind, depth, norm="none", scale=None):
    torch.manual_seed(0)
    model = TreeNetwork(kind, depth, norm=norm, scale=scale, channels=8).double()
    for parameter in model.parameters():  # biases and weights of norms that are no longer neutral
        nn.init.normal_(parameter, std=0.5)
    return model


def assert_same(one, other, of_one, of_other, y):
    """Equal scores, and equal gradients of all parameters."""
    torch.testing.assert_close(of_other, of_one, rtol=1e-10, atol=1e-10)
    gradients = [
        torch.autograd.grad(
            nn.functional.cross_entropy(scores, y), [*model.parameters()], materialize_grads=True
        )
        for model, scores in ((other, of_other), (one, of_one))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize(("kind", "norm", "scale"), CASES)
def test_the_dense_and_the_shared_path_equal_the_layers_of_pyg(kind, norm, scale, depth):
    every = neighbors_match(depth, 0)[: 3 * 2**depth]  # all keys of a permutation in turn
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(1))[:9]
    chosen, pairs = every[order], every.pairs[:, level_order(depth)]
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


@pytest.mark.parametrize(("kind", "norm", "scale"), CASES)
def test_it_is_the_published_skeleton(kind, norm, scale):
    model, drawn = network(kind, 2, norm, scale), neighbors_match(2, 0)[:5]
    batch = next(iter(DataLoader(drawn, batch_size=5)))
    h = model.key(batch.x[:, 0]) + model.value(batch.x[:, 1])
    for layer, after in zip(model.layers, model.norms, strict=True):
        new = layer(h, batch.edge_index)
        new = torch.relu(new) if kind in ("gcn", "gin") else new
        new = new if kind == "ggnn" else h + new
        h = after(new, batch.batch) if norm == "pair" else after(new)
    scores = model.head(h.view(5, 7, -1)[:, 0])
    torch.testing.assert_close(model(batch.x, batch.edge_index, batch.batch), scores)
    assert [type(layer) for layer in model.layers] == [CONVS[kind]] * 3
    assert [type(each) for each in model.norms] == [AFTER.get(norm, nn.Identity)] * 3
    divided = [layer.score_norm.norm.scale for layer in model.layers if "lipschitz" in norm]
    assert divided == [scale] * len(divided)
    assert model.head.bias is None and model.head.out_features == 5
    gat = TreeNetwork("gat", 2).layers[0]
    assert (gat.heads, gat.out_channels, gat.dropout, gat.concat) == (4, 8, 0.0, True)


def test_a_row_is_what_the_training_gave(cache):
    splits = load("trees-2")
    settings = dict(architectures=["gat"], norms=["lipschitz=4"], seeds=[3], progress=False)
    study = trees(splits, passes=4, block=2, batch_size=64, **settings)
    (row,) = study.runs.to_dict("records")
    network = untrained(2, 3, architecture="gat", norm="lipschitz", scale=4.0)
    schedule = replace(TREES, epochs=4, block=2, batch_size=64)
    history = fit(network, TreeTask(splits), schedule, seed=3, progress=False).history
    assert row["best"] == history["train_accuracy"].max()
    assert row["test_accuracy"] == TreeTask(splits).accuracies(network)["test_accuracy"]
    assert (row["depth"], row["norm"], row["scale"], row["seed"]) == (2, "lipschitz", 4.0, 3)
    assert (row["passes_done"], row["stop_reason"], row["sampling"]) == (4, "passes", "grouped")
    assert study.curves["passes"].tolist() == [2, 4]
    assert study.curves["train_accuracy"].tolist() == history["train_accuracy"].tolist()


def test_the_table_has_ranges_over_seeds_and_what_was_published():
    runs = pd.DataFrame(
        dict(depth=depth, architecture=name, norm=norm, scale=scale, seed=seed)
        | dict(best=best - 0.1 * seed - 0.1 * depth)
        for name in ("gcn", "gat")
        for depth in (2, 4)
        for norm, scale, best in (("none", None, 0.9), ("layer", 4.0, 0.5))
        for seed in range(3)
    )
    table = tree_table(titled(runs))
    assert table.columns.tolist() == [2, 4]
    assert table.loc[("GAT", "no norm")].tolist() == ["50 to 70", "30 to 50"]
    assert table.loc[("GCN", "LayerNorm, f = 4"), 4] == "-10 to 10"
    assert table.loc[("GCN", "published")].tolist() == ["100", "70"]
    networks = ["GCN"] * 3 + ["GAT"] * 3 + ["GGNN", "GIN"]
    assert table.index.get_level_values("network").tolist() == networks


def test_an_example_shows_keys_values_and_the_way_to_the_root():
    data = neighbors_match(2)
    pairs = data.pairs[7, level_order(2)]
    ax = tree_example(pairs, plt.subplots()[1])
    leaves = [f"{key}, {value}" for key, value in pairs[3:].tolist()]
    assert [text.get_text() for text in ax.texts] == [f"{pairs[0, 0]}, ?", *leaves]
    (nodes,) = (c for c in ax.collections if len(c.get_offsets()) == 7)
    is_asked = (nodes.get_facecolors() == to_rgba(ASKED_COLOR)).all(axis=1)
    answer = 3 + leaves.index(f"{pairs[0, 0]}, {data.y[7]}")
    assert np.flatnonzero(is_asked).tolist() == [0, (answer - 1) // 2, answer]
    plt.close("all")


def test_a_probe_tells_left_from_right_unless_attention_is_a_mean():
    for depth in (2, 3):
        plain, bounded, mean = (
            probe(untrained(depth, 1, architecture="gat", norm=norm, scale=scale))
            for norm, scale in (("none", None), ("lipschitz", 4.0), ("lipschitz", 1e6))
        )
        assert min(plain["left"], plain["right"], bounded["left"], bounded["right"]) > 0.8
        assert mean["swap"] < 1e-4 < bounded["swap"] < plain["swap"] / 4
        assert max(mean["left"], mean["right"]) <= 0.5  # of two values that it cannot tell apart
