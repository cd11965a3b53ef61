"""Looking at networks over many graphs: every architecture, rows of edges and of nodes."""

import math

import pandas as pd
import pytest
import torch
from conftest import few_molecules
from torch_geometric.loader import DataLoader

from mapkg.evaluation import calibrate_batch_norm, predict, targets
from mapkg.hooks import record, resolve
from mapkg.measures import ActivationSummary
from mapkg.models.network import ARCHITECTURES, CLAMPED, SCORES, looked_at
from studies.extras import build
from studies.observation import observe_states, summarise
from studies.published import CONFIGS
from studies.train import seed_all

D, HEADS, LAYERS = 8, 2, 2
SIZES = dict(hidden_channels=D, heads=HEADS, num_layers=LAYERS, batch_size=4)
ON_ZINC = {
    config.architecture: config.replace(**SIZES)
    for config in CONFIGS.values()
    if config.dataset == "zinc"
}
"""A small network of each architecture for molecules."""

LOOKED_AT = {
    **dict.fromkeys(("gt", "graphit", "san", "egat"), "layers.*.score"),
    "gat": "layers.*.conv:message",
    "gatv2": "layers.*.conv:edge_update_inputs",
    "transformer": "layers.*.conv:message_inputs",
    "gps": "layers.*.conv.attn",
}


@pytest.fixture(scope="module")
def splits():
    return few_molecules(12, 4, 5)


@pytest.fixture(scope="module")
def graphs(splits):
    first, *others = splits.test
    no_edge = torch.zeros(first.num_edges, dtype=torch.bool)
    return [first, first.edge_subgraph(no_edge), *others]  # the second one has no maximum


def network(config, seed=0):
    seed_all(seed)
    return build(config).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_of_graphs_is_summed_up_as_each_graph_alone(architecture, graphs):
    assert len({graph.num_nodes for graph in graphs}) > 1, "dense attention pads some graphs"
    model, names = network(ON_ZINC[architecture]).double(), looked_at(architecture)
    assert names == LOOKED_AT[architecture] and len(resolve(model, names)) == LAYERS
    found = summarise(model, graphs, names=names, batch_size=5)
    alone = [summarise(model, [graph], names=names) for graph in graphs]
    other = summarise(model, graphs, names=names, batch_size=2)
    for name, summary in found.items():
        maxima = [maximum for one in alone for maximum in one[name].graph_maxima]
        assert summary.graph_maxima == pytest.approx(maxima, rel=1e-6, nan_ok=True)
        assert math.isnan(maxima[1]) == (architecture != "gps")
        kind = "num_nodes" if architecture == "gps" else "num_edges"
        assert summary.statistics()["rows"] == sum(getattr(graph, kind) for graph in graphs)
        of_both = [pd.Series(each.statistics(), dtype=float) for each in (summary, other[name])]
        pd.testing.assert_series_equal(*of_both, rtol=1e-6)
        assert torch.equal(summary.massive_by_channel, other[name].massive_by_channel)


@pytest.mark.parametrize("architecture", ["graphit", "san"])
def test_of_full_graph_attention_the_edges_of_the_data_are_summed_up(architecture, splits):
    graphs = splits.test
    model = network(ON_ZINC[architecture].replace(full_graph=True))
    found = summarise(model, graphs, heads=HEADS, batch_size=5)
    expected = {name: ActivationSummary(heads=HEADS) for name in found}
    for graph in graphs:
        with record(model, SCORES) as seen, torch.no_grad():
            model(graph.x, graph.edge_index, graph.edge_attr)
        for name, (score,) in seen.items():
            # Every ordered pair of two nodes is an edge, real or fake.
            assert len(score) == graph.num_nodes * (graph.num_nodes - 1) > graph.num_edges
            expected[name].update(score[: graph.num_edges])
    for name, summary in found.items():
        assert summary.statistics()["rows"] == sum(graph.num_edges for graph in graphs)
        assert summary.graph_maxima == pytest.approx(expected[name].graph_maxima, rel=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_states_of_a_network_are_looked_at_one_by_one(architecture, splits):
    config = ON_ZINC[architecture]
    first, second = (network(config, seed).state_dict() for seed in (0, 1))
    weights = {"base": first, "base_calibrated": first, "other": second}
    tables = observe_states(weights, config, splits)
    summary = tables["summary"].set_index(["state", "layer"])
    assert summary.index.tolist() == [(state, layer) for state in weights for layer in range(2)]
    heads = HEADS if architecture in CLAMPED else None
    for state in weights:
        model = network(config, 1 if state == "other" else 0)
        if state == "base_calibrated":
            calibrate_batch_norm(model, splits.train, batch_size=4)
        found = summarise(model, splits.test, names=looked_at(architecture), heads=heads)
        errors = [(predict(model, b) - targets(b)).abs() for b in DataLoader(splits.test, 5)]
        for layer, one in enumerate(found.values()):
            row, statistics = summary.loc[state, layer].to_dict(), one.statistics()
            if heads is None:
                assert math.isnan(row["share_saturated"] or math.nan)
                del statistics["share_saturated"]
            assert {key: row[key] for key in statistics} == pytest.approx(statistics, rel=1e-5)
            assert row["test_mae"] == pytest.approx(errors[0].mean().item(), rel=1e-5)
            part = tables["graph_maxima"].query("state == @state and layer == @layer")
            assert part["graph"].tolist() == list(range(5))
            assert part["max_ratio"].tolist() == pytest.approx(one.graph_maxima, rel=1e-5)
            bins = tables["histogram"].query("state == @state and layer == @layer")
            assert bins["count"].sum() == one.neg_log_ratio.counts.sum()
