"""Smoothing in deep attention: what is measured, on which part of a graph, and the table of it."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch_geometric.utils import to_undirected

from mapkg.__main__ import main
from mapkg.data import NodesOfGraph, Splits
from mapkg.experiments.deep_smoothing import (
    REMEDIES,
    deep_smoothing,
    largest_component,
    smoothing_table,
)
from mapkg.experiments.depth import Variant
from mapkg.smoothing import rank_one_distance, relative_spread
from mapkg.train_nodes import Schedule

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
    weights = [layer.lin.weight.grad.norm().item() for layer in network.layers]
    assert rows["gradient"].tolist() == pytest.approx(weights, rel=1e-4)
    trained = table[table["state"] == "trained"]
    assert trained["loss"].iloc[0] < rows["loss"].iloc[0]


def test_every_remedy_is_measured(papers):
    small = {name: Variant(**{**vars(v), **SMALL}) for name, v in REMEDIES.items()}
    table = deep_smoothing(
        papers, small, num_layers=2, seeds=[0], schedule=Schedule(epochs=1), progress=False
    )
    assert table["variant"].unique().tolist() == list(REMEDIES)
    assert table.loc[table["layer"] < 2, ["features", "errors", "gradient"]].notna().all(axis=None)
    summary = smoothing_table(table)
    assert len(summary) == 10


def test_the_table_takes_last_least_and_ratio():
    found = pd.DataFrame(
        {
            "state": "trained",
            "variant": "plain",
            "seed": 0,
            "layer": [0, 1, 2],
            "features": [0.5, 0.25, 0.125],
            "errors_rank_one": [0.4, 0.1, 0.9],
            "gradient": [2.0, 3.0, 8.0],
            "loss": 1.5,
        }
    )
    (row,) = smoothing_table(found).to_dict("records")
    assert (row["features"], row["errors"], row["gradient"], row["loss"]) == (0.125, 0.1, 0.25, 1.5)
    assert not np.isnan(row["seed"])


def test_the_command_writes_deep_attention_and_vanilla_training(tmp_path, same_number_of_threads):
    prefix = tmp_path / "smoothing"
    settings = ["--dataset", "citation", "--layers", "2", "--epochs", "1", "--seeds", "0"]
    vanilla = ["--depths", "1", "2", "--steps", "20", "--threads", "1"]
    assert main(["smoothing", *settings, *vanilla, "-o", str(prefix)]) == 0
    deep = pd.read_csv(f"{prefix}_deep.csv.gz")
    assert len(deep) == 5 * 2 * 2
    assert set(deep["dataset"]) == {"synthetic citation graph, largest component"}
    training = pd.read_csv(f"{prefix}_training.csv.gz")
    assert len(training) == 2 * 2 * 2 * 3
    assert training["commit"].notna().all()
