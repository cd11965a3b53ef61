"""Smoothing in deep attention: what is measured, on which part of a graph, and the table of it."""

import pandas as pd
import pytest
import torch
from torch import nn
from torch_geometric.utils import to_undirected

from mapkg.oversmoothing import rank_one_distance, relative_spread, uniform_attention_limits
from studies.__main__ import main
from studies.data import NodesOfGraph, Splits
from studies.data.networks import regular_task
from studies.deep_smoothing import (
    REMEDIES,
    deep_smoothing,
    largest_component,
    regular_splits,
    remedy_table,
    smoothing_table,
)
from studies.depth import Variant
from studies.schedule import Schedule

SMALL = dict(hidden_channels=4, heads=2, dropout=0.0, attention_dropout=0.0)


def test_the_largest_component_keeps_its_nodes_with_their_splits(papers):
    graph = papers.train.graph.clone()
    keep = torch.arange(40)
    small = graph.subgraph(keep)
    small.edge_index = to_undirected(torch.tensor([[0, 5, 9, 20, 3], [5, 9, 33, 21, 2]]))
    parts = {
        "train": NodesOfGraph(small, torch.tensor([0, 20, 9])),
        "val": NodesOfGraph(small, torch.tensor([1, 33])),
        "test": NodesOfGraph(small, torch.tensor([5])),
    }
    found = largest_component(Splits(**parts, description=papers.description))
    assert found.train.graph.num_nodes == 4
    for name, nodes in (("train", [0, 9]), ("val", [33]), ("test", [5])):
        part = getattr(found, name)
        assert torch.equal(part.graph.x[part.nodes], small.x[nodes])
    assert found.description.title.endswith("largest component")


def test_rows_are_measured_on_the_layers_of_pyg(papers):
    variant = Variant(**SMALL)
    table = deep_smoothing(
        papers,
        {"plain": variant},
        num_layers=3,
        seeds=[1],
        schedule=Schedule(epochs=2),
        progress=False,
    )
    assert table["state"].tolist() == ["untrained"] * 3 + ["trained"] * 3
    splits = largest_component(papers)
    graph, train = splits.train.graph, splits.train.nodes
    network = variant.build(3, splits, 1).eval()
    h, outputs = network.embed(graph.x), []
    for number, layer in enumerate(network.layers):
        h = layer(h, graph.edge_index)
        h.retain_grad()
        outputs.append(h)
        h = nn.functional.elu(h) if number < 2 else h
    nn.functional.cross_entropy(network.head(h)[train], graph.y[train]).backward()
    rows = table[table["state"] == "untrained"]
    assert rows["features"].tolist() == pytest.approx(
        [relative_spread(x.detach()) for x in outputs], rel=1e-4
    )
    assert rows["errors_rank_one"].tolist() == pytest.approx(
        [rank_one_distance(x.grad) for x in outputs], rel=1e-3
    )
    limits = uniform_attention_limits(graph.edge_index, graph.num_nodes)
    assert rows["errors"].tolist() == pytest.approx(
        [relative_spread(x.grad, limits.errors) for x in outputs], rel=1e-3
    )
    assert set(table["contraction"]) == {limits.contraction} and set(table["num_layers"]) == {3}
    weights = [layer.lin.weight.grad.norm().item() for layer in network.layers]
    assert rows["gradient"].tolist() == pytest.approx(weights, rel=1e-4)
    trained = table[table["state"] == "trained"]
    assert trained["loss"].iloc[0] < rows["loss"].iloc[0]


def test_nodes_of_the_regular_graph_have_four_classes_of_equal_size():
    splits = regular_splits(60, 6, seed=1)
    task = regular_task(60, 6, seed=1)
    graph = splits.train.graph
    assert graph.edge_index.size(1) == 60 * 6 and graph.is_undirected()
    assert not graph.has_self_loops()
    torch.testing.assert_close(graph.x, task.x, rtol=0, atol=0)
    order = task.y.flatten().argsort()
    assert graph.y[order].tolist() == [label for label in range(4) for _ in range(15)]
    assert splits.train.nodes.tolist() == list(range(60)) and len(splits.val) == 0
    assert largest_component(splits).train.graph.num_nodes == 60


def test_on_the_regular_graph_pairnorm_keeps_errors_apart_and_lipschitznorm_does_not():
    small = {name: Variant(**{**vars(v), **SMALL}) for name, v in REMEDIES.items()}
    table = deep_smoothing(
        regular_splits(seed=0),
        small,
        num_layers=16,
        seeds=[0],
        schedule=Schedule(epochs=1),
        progress=False,
    )
    rows = smoothing_table(table[table["state"] == "untrained"]).set_index("variant")
    for name in ("no remedy", "LayerNorm", "LipschitzNorm"):
        assert rows.loc[name, "errors"] < 0.02 and rows.loc[name, "features"] < 1e-4
    assert rows.loc["PairNorm", "errors"] > 0.9 and rows.loc["PairNorm", "features"] > 0.5


def test_tables_take_the_last_layer_the_least_and_the_total_over_seeds():
    spreads = dict(dataset="Cora", num_layers=3, state="trained", variant="plain")
    spreads |= dict(layer=[2, 0, 1], errors=[0.75, 0.5, 0.3], errors_rank_one=[0.9, 0.4, 0.1])
    spreads |= dict(gradient=[12.0, 3.0, 4.0])
    seeds = [
        pd.DataFrame(spreads | {"seed": seed, "loss": loss, "features": [spread, 0.5, 0.5]})
        for seed, loss, spread in ((0, 1.5, 2e-7), (1, 0.5, 3e-5), (2, 0.1, 4e-6))
    ]
    row = smoothing_table(seeds[0]).iloc[0]
    assert row[["features", "errors", "rank one", "gradient", "loss"]].tolist() == [
        *(2e-7, 0.3, 0.1, 13.0, 1.5)
    ]
    row = remedy_table(pd.concat(seeds)).loc[(3, "trained", "plain")]
    assert row.tolist() == ["2e-07 to 3e-05", "0.3", "0.1", "13", "0.1 to 1.5"]


def test_the_command_writes_deep_attention_and_vanilla_training(tmp_path, same_number_of_threads):
    prefix = tmp_path / "smoothing"
    settings = ["--dataset", "citation", "--layers", "1", "2", "--epochs", "1", "--seeds", "0"]
    vanilla = ["--depths", "1", "2", "--steps", "20", "--threads", "1"]
    assert main(["study", "smoothing", *settings, *vanilla, "-o", str(prefix)]) == 0
    deep = pd.read_csv(f"{prefix}_deep.csv.gz")
    assert len(deep) == 2 * 5 * 2 * (1 + 2)  # data sets, variants, states, layers
    assert list(deep["dataset"].unique()) == [
        f"{title}, largest component" for title in ("synthetic citation graph", "20-regular")
    ]
    training = pd.read_csv(f"{prefix}_training.csv.gz")
    assert len(training) == 4 * 2 * 2 * 3  # variants, depths, optimisers, steps
    assert list(training["variant"].unique()) == [
        *("GNN, relu", "MLP, relu", "GNN, tanh", "MLP, tanh")
    ]
    assert training["commit"].notna().all()
