"""The first layer as a table of type triples: exact ratios, shares and predictions from weights."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch_geometric.data import Data

from mapkg.attribution import heat_map
from mapkg.hooks import record
from studies import checkpoint
from studies.data import BUNDLED, load
from studies.data.bond_properties import edge_labels
from studies.extras import build
from studies.first_layer import (
    distinct_edges,
    first_layer,
    first_layer_table,
    log_ratios,
    mean_log_ratio,
    predicted_heat,
    score_parts,
    separable_log_ratio,
)
from studies.published import CONFIGS
from studies.train import seed_all

SMALL = {
    name: CONFIGS[f"{name}-ZINC"].replace(hidden_channels=16, heads=4, num_layers=2)
    for name in ("GT", "GraphiT", "SAN")
}


@pytest.fixture(scope="module")
def graphs(cache):
    return load("moses").test[:40]


def network(config=SMALL["GT"], seed=0):
    seed_all(seed)
    return build(config)


def test_distinct_edges_are_counted_and_found_again(graphs):
    triples = distinct_edges(graphs)
    found = {}
    position = 0
    for graph in graphs:
        for (source, target), kind in zip(
            graph.edge_index.t().tolist(), graph.edge_attr.tolist(), strict=True
        ):
            key = (graph.x[source].item(), graph.x[target].item(), kind)
            found[key] = found.get(key, 0) + 1
            index = triples.index[position]
            assert key == tuple(
                int(part[index]) for part in (triples.source, triples.target, triples.edge)
            )
            position += 1
    assert len(triples.count) == len(found)
    assert sorted(triples.count.tolist()) == sorted(found.values())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("use_bias", [False, True])
def test_scores_from_weights_are_those_of_the_network_on_molecules(name, use_bias, graphs):
    model = network(SMALL[name].replace(use_bias=use_bias))
    triples = distinct_edges(graphs)
    found = first_layer(model, triples)
    for graph in graphs[:5]:
        with torch.no_grad(), record(model, "layers.0.attention.score") as seen:
            model(graph.x, graph.edge_index, graph.edge_attr)
        expected = seen["layers.0.attention.score"][0]
        rows = triples.index[: graph.num_edges]
        torch.testing.assert_close(found.score[rows], expected, rtol=1e-4, atol=1e-6)
        triples = type(triples)(**{**vars(triples), "index": triples.index[graph.num_edges :]})
    torch.testing.assert_close(found.match * found.gate, found.score)
    # By the equation, for one triple.
    attention, index = model.layers[0].attention, 3
    key = attention.key(model.node_embedding.weight[triples.source[index]])
    query = attention.query(model.node_embedding.weight[triples.target[index]])
    gate = attention.edge(model.edge_embedding.weight[triples.edge[index]])
    torch.testing.assert_close(found.score[index], (key * query / math.sqrt(4) * gate).detach())
    torch.testing.assert_close(found.gate[index], gate.detach())


def test_predictions_from_weights_are_the_heat_map_and_ratios_of_the_molecules(graphs):
    model, about = network(), load("moses").description
    labels, names = edge_labels(graphs, "type", about)
    measured = heat_map(model, graphs, labels, len(names), thresholds=(3.0,))[0, 0].nan_to_num()
    found = np.zeros(measured.shape)
    table = predicted_heat(model, graphs, about.edge_types, threshold=3.0)
    for row in table.itertuples():
        found[names.index(row.label), row.channel] = row.percent / 100
    assert 0.05 < found[0].mean() < 0.9
    np.testing.assert_allclose(found, measured, atol=1e-9)
    assert (table["percent"] > 0).all() and set(table["layer"]) == {0}
    assert predicted_heat(model, graphs, about.edge_types, threshold=1e9).empty
    logs = log_ratios(model, graphs, graphs, {1: "single", 2: "double", 9: "absent"})
    assert list(logs["label"].unique()) == ["single", "double"]
    triples = distinct_edges(graphs)
    ratio = first_layer(model, triples).ratio[triples.index]  # of every edge
    expected = ratio[torch.cat(labels) == names.index("double")].double().log10().mean(dim=0)
    np.testing.assert_allclose(logs.query("label == 'double'")["measured"], expected, rtol=1e-5)


def test_the_crossed_prediction_gives_every_type_the_same_atoms(graphs):
    model, _ = checkpoint.load(BUNDLED / "checkpoints" / "gt_moses_seed0")
    triples, names = distinct_edges(graphs), {1: "single", 2: "double", 3: "triple"}
    start = model.edge_embedding.weight.detach()
    found = first_layer_table(model, triples, triples, names, start).set_index("label")
    pairs = {}
    for *pair, count in zip(triples.source, triples.target, triples.count, strict=True):
        key = tuple(map(int, pair))
        pairs[key] = pairs.get(key, 0) + int(count)
    for edge_type, name in names.items():
        share = 0
        for (source, target), count in pairs.items():
            one = [torch.tensor([i]) for i in (source, target, edge_type, 1, 0)]
            share += count * bool((first_layer(model, type(triples)(*one)).ratio > 1000).any())
        expected = share / sum(pairs.values())
        assert found.loc[name, "common_pairs"] == pytest.approx(expected)


def test_the_separable_prediction_is_exact_if_atoms_do_not_depend_on_the_bond():
    # Every pair of atom types with every bond type, equally often.
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(1, 4))
    graphs = [
        Data(x=pair[:2], edge_index=torch.tensor([[0], [1]]), edge_attr=pair[2:]) for pair in pairs
    ]
    triples = distinct_edges(graphs)
    layer = first_layer(network(), triples)
    arguments = (layer, triples, 4)
    measured, predicted = mean_log_ratio(*arguments), separable_log_ratio(*arguments)
    torch.testing.assert_close(predicted, measured, equal_nan=True, rtol=1e-4, atol=1e-5)
    expected = layer.ratio[triples.edge == 2].double().log10().mean(dim=0)
    torch.testing.assert_close(measured[2], expected)


def test_the_separable_prediction_is_not_exact_if_they_do(graphs):
    triples = distinct_edges(graphs)
    layer = first_layer(network(), triples)
    arguments = (layer, triples, 4)
    difference = (mean_log_ratio(*arguments) - separable_log_ratio(*arguments))[1:3].abs()
    assert 0.001 < difference.max() < 1


def test_what_is_no_table_of_types_is_refused(graphs):
    with pytest.raises(ValueError, match=r"edge_attr: expected one type id per row, got shape"):
        distinct_edges([Data(x=torch.zeros(2, dtype=torch.long), edge_attr=torch.rand(1, 8))])
    with pytest.raises(ValueError, match=r"x: expected one type id per row"):
        distinct_edges([Data(x=torch.zeros(2, 9, dtype=torch.long))])
    triples = distinct_edges(graphs)
    encoded = SMALL["SAN"].replace(laplacian_encoding=True)
    with pytest.raises(ValueError, match="the first layer sees more than the types"):
        first_layer(network(encoded), triples)
    with pytest.raises(ValueError, match="the first layer sees more than the types"):
        first_layer(network(SMALL["SAN"].replace(full_graph=True)), triples)
    gat = CONFIGS["GAT-ZINC"].replace(hidden_channels=16, heads=4, num_layers=2)
    with pytest.raises(ValueError, match="expected GT, GraphiT or SAN"):
        first_layer(network(gat), triples)


def test_the_shipped_network_has_its_massive_activations_in_a_few_triples(cache):
    graphs = load("moses").test
    model, _ = checkpoint.load(BUNDLED / "checkpoints" / "gt_moses_seed0")
    triples = distinct_edges(graphs)
    massive = first_layer(model, triples).ratio.amax(dim=1) > 1000
    on_edges = massive[triples.index].float().mean()
    assert len(triples.count) == 31
    assert massive.sum() < 20
    assert on_edges > 0.8


# The parts of a score.


def test_parts_are_means_over_the_edges_of_a_label(graphs):
    graphs, names = graphs[:6], ("none", "single", "double", "triple")
    model = network().eval()
    found = score_parts(model, graphs, [g.edge_attr for g in graphs], names, batch_size=4)
    rows = {key: [] for key in ("layer", "label", "match", "gate", "score", "median", "maximum")}
    for graph in graphs:
        parts = [f"layers.*.attention.{part}" for part in ("key", "query", "edge", "score")]
        with torch.no_grad(), record(model, parts) as seen:
            model(graph.x, graph.edge_index, graph.edge_attr)
        for layer in range(2):
            key, query, gate, score = (
                seen[f"layers.{layer}.attention.{part}"][0].double().numpy()
                for part in ("key", "query", "edge", "score")
            )
            for edge, (source, target) in enumerate(graph.edge_index.t().tolist()):
                magnitudes = np.sort(np.abs(score[edge]))
                rows["layer"].append(layer)
                rows["label"].append(names[graph.edge_attr[edge]])
                rows["match"].append(np.abs(key[source] * query[target]).mean() / 2)
                rows["gate"].append(np.abs(gate[edge]).mean())
                rows["score"].append(magnitudes.mean())
                rows["median"].append(np.log10(magnitudes[7]))
                rows["maximum"].append(np.log10(magnitudes[-1]))
    expected = pd.DataFrame(rows).groupby(["layer", "label"]).mean()
    expected[["median", "maximum"]] = 10 ** expected[["median", "maximum"]]
    found = found.set_index(["layer", "label"])
    for index, row in expected.iterrows():
        for column, value in row.items():
            assert found.loc[index, column] == pytest.approx(value, rel=1e-4), (index, column)
        ratio = found.loc[index, "maximum"] / found.loc[index, "median"]
        assert found.loc[index, "max_ratio"] == pytest.approx(ratio, rel=1e-6)
    assert found.loc[(0, "none"), "edges"] == 0
    assert np.isnan(found.loc[(0, "none"), ["match", "median"]].astype(float)).all()
