"""Looking at networks over many graphs: every architecture, rows of edges and nodes, bad input."""

import math

import pytest
import torch
from conftest import few_molecules
from torch import nn
from torch_geometric.loader import DataLoader

from mapkg.evaluation import calibrate_batch_norm, predict
from mapkg.hooks import edit, record, resolve
from mapkg.measures import ActivationSummary, activation_ratio
from mapkg.models.network import ARCHITECTURES, CLAMPED, SCORES
from mapkg.models.pyg_layers import vector_score
from studies.extras import build
from studies.observation import (
    bond_ratios,
    edge_maxima,
    looked_at,
    observe_states,
    summarise,
)
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

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(scope="module")
def splits():
    return few_molecules(12, 4, 5)


@pytest.fixture(scope="module")
def graphs(splits):
    return splits.test


def network(config, seed=0):
    seed_all(seed)
    return build(config).eval()


def same_statistics(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        if value is None:
            assert found[key] is None, key
        else:
            assert found[key] == pytest.approx(value, rel=1e-6, nan_ok=True), key


def same_summaries(found, expected):
    assert list(found) == list(expected)
    for name, summary in found.items():
        same_statistics(summary.statistics(), expected[name].statistics())
        assert torch.equal(summary.massive_by_channel, expected[name].massive_by_channel)
        assert summary.graph_maxima == pytest.approx(expected[name].graph_maxima, rel=1e-5)


# What is looked at.


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("gt", "layers.*.score"),
        ("graphit", "layers.*.score"),
        ("san", "layers.*.score"),
        ("egat", "layers.*.score"),
        ("gat", "layers.*.conv:message"),
        ("gatv2", "layers.*.conv:edge_update_inputs"),
        ("transformer", "layers.*.conv:message_inputs"),
        ("gps", "layers.*.conv.attn"),
    ],
)
def test_the_score_is_looked_at_or_what_attention_sends_where_there_is_none(architecture, name):
    assert looked_at(architecture) == name
    assert len(resolve(network(ON_ZINC[architecture]), name)) == LAYERS


@each_architecture
def test_a_batch_of_graphs_is_summed_up_as_each_graph_alone(architecture, graphs):
    model = network(ON_ZINC[architecture]).double()
    names = looked_at(architecture)
    found = summarise(model, graphs, names=names, batch_size=5)
    same_summaries(found, summarise(model, graphs, names=names, batch_size=2))
    alone = [summarise(model, [graph], names=names) for graph in graphs]
    for name, summary in found.items():
        maxima = [maximum for one in alone for maximum in one[name].graph_maxima]
        assert summary.graph_maxima == pytest.approx(maxima, rel=1e-6)
        kind = "num_nodes" if architecture == "gps" else "num_edges"
        assert summary.num_rows == sum(getattr(graph, kind) for graph in graphs)
        assert summary.statistics()["channels"] == D


def test_a_summary_of_a_transformer_is_that_of_its_logits_before_the_sum(graphs):
    """Against PyG's own attention weights: a softmax of the sums over the channels of a head."""
    model = network(ON_ZINC["transformer"])
    names = looked_at("transformer")
    seen = []
    with record(model, names, reduce=lambda name, inputs: seen.append((name, inputs))):
        predict(model, next(iter(DataLoader(graphs, 5))))
    for layer, (name, inputs) in enumerate(seen):
        score = vector_score(resolve(model, name)[name], inputs)
        expected = ActivationSummary()
        expected.update(score)
        found = summarise(model, graphs, names=names, batch_size=5)[name]
        assert found.statistics() == expected.statistics()
        assert name == f"layers.{layer}.conv:message_inputs"
        logits = score.unflatten(1, (HEADS, -1)).sum(dim=-1)
        query, key = inputs["query_i"], inputs["key_j"]
        edge = model.layers[layer].conv.lin_edge(inputs["edge_attr"]).view_as(key)
        torch.testing.assert_close(logits, (query * (key + edge)).sum(-1) / (D / HEADS) ** 0.5)


def test_dense_attention_is_summed_up_without_its_padding(graphs):
    sizes = [graph.num_nodes for graph in graphs]
    assert len(set(sizes)) > 1, "some graphs are padded"
    model = network(ON_ZINC["gps"])
    found = summarise(model, graphs, names=looked_at("gps"), batch_size=5)
    outputs = {name: [] for name in found}
    for graph in graphs:  # alone, nothing is padded
        with record(model, looked_at("gps")) as seen, torch.no_grad():
            model(graph.x, graph.edge_index, graph.edge_attr)
        for name, (output,) in seen.items():
            assert output[0].shape == (1, graph.num_nodes, D)
            outputs[name].append(activation_ratio(output[0][0]).amax())
    for name, summary in found.items():
        expected = torch.stack(outputs[name]).tolist()
        assert summary.graph_maxima == pytest.approx(expected, rel=1e-3)


def test_graphs_are_told_apart_by_the_source_of_their_edges(graphs):
    """The maxima of graphs follow the graphs, also where one of them has no edge."""
    lonely = graphs[0].clone()
    lonely.edge_index = lonely.edge_index[:, :0]
    lonely.edge_attr = lonely.edge_type = lonely.edge_attr[:0]
    model = network(ON_ZINC["gt"])
    mixed = [graphs[1], lonely, graphs[2], lonely]
    for name, summary in summarise(model, mixed, batch_size=4).items():
        first, none, last, nothing = summary.graph_maxima
        assert math.isnan(none)
        assert math.isnan(nothing)
        expected = [summarise(model, [graph])[name].graph_maxima[0] for graph in graphs[1:3]]
        assert [first, last] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("architecture", ["graphit", "san"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_of_full_graph_attention_the_edges_of_the_data_are_summed_up(
    architecture, batch_size, graphs
):
    model = network(ON_ZINC[architecture].replace(full_graph=True))
    found = summarise(model, graphs, heads=HEADS, batch_size=batch_size)
    expected = {name: ActivationSummary(heads=HEADS) for name in found}
    for graph in graphs:
        with record(model, SCORES) as seen, torch.no_grad():
            model(graph.x, graph.edge_index, graph.edge_attr)
        for name, (score,) in seen.items():
            # Every ordered pair of two nodes is an edge, real or fake.
            assert len(score) == graph.num_nodes * (graph.num_nodes - 1) > graph.num_edges
            expected[name].update(score[: graph.num_edges])
    for name, summary in found.items():
        assert summary.num_rows == sum(graph.num_edges for graph in graphs)
        assert summary.graph_maxima == pytest.approx(expected[name].graph_maxima, rel=1e-3)


# Outputs that do not fit.


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("gt", "node_embedding"), ("gat", "layers.0.norm"), ("gps", "head.0")],
)
def test_an_output_without_a_row_per_edge_is_refused_with_its_name_and_the_numbers(
    architecture, name, graphs
):
    model = network(ON_ZINC[architecture])
    edges = sum(graph.num_edges for graph in graphs)
    rows = len(graphs) if name == "head.0" else sum(graph.num_nodes for graph in graphs)
    message = f"^{name}: expected a row per edge, {edges}, got {rows}; name a submodule that"
    with pytest.raises(ValueError, match=message):
        summarise(model, graphs, names=name, batch_size=5)


class Unsuitable(nn.Module):
    """Edges through a module whose output is no table of rows."""

    def __init__(self, kind):
        super().__init__()
        self.edges = Kind(kind)

    def forward(self, x, edge_index, edge_attr, batch, batch_size):
        self.edges(edge_attr.float().unsqueeze(1))
        return x.new_zeros(batch_size, 1)


class Kind(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, rows):
        return {"a pair": (rows, rows), "no channels": rows[:, 0], "text": "text"}[self.kind]


@pytest.mark.parametrize("kind", ["a pair", "no channels", "text"])
def test_an_output_that_is_no_table_of_rows_is_refused_with_its_name(kind, graphs):
    with pytest.raises(ValueError, match=r"^edges: expected rows .*; name a submodule"):
        summarise(Unsuitable(kind), graphs, names="edges")


class FirstNodes(nn.Module):
    """Dense attention that most nodes do not take part in."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(28, D)
        self.attention = nn.MultiheadAttention(D, HEADS, batch_first=True)

    def forward(self, x, edge_index, edge_attr, batch, num_graphs):
        h = self.embedding(x)[:2].unsqueeze(0)
        return self.attention(h, h, h)[0].squeeze(0)


def test_dense_attention_without_a_row_per_node_is_refused_too(graphs):
    with pytest.raises(ValueError, match=r"^attention: expected rows of channels: .* name a"):
        summarise(FirstNodes(), graphs[:1], names="attention")


def test_a_name_that_matches_nothing_is_refused(graphs):
    with pytest.raises(KeyError, match=r"layers\.\*\.scores"):
        summarise(network(ON_ZINC["gt"]), graphs, names="layers.*.scores")


# Values that are not finite.


def test_rows_with_a_bad_value_are_counted_and_reach_no_other_statistic(graphs):
    model = network(ON_ZINC["gt"]).double()
    last = "layers.1.attention.score"  # nothing that is looked at comes after it

    def spoil(score):
        score = score.clone()
        score[0, 3] = torch.nan
        score[5, 0] = torch.inf
        return score

    clean = summarise(model, graphs, heads=HEADS, batch_size=5)
    with edit(model, {last: spoil}):
        found = summarise(model, graphs, heads=HEADS, batch_size=5)
    assert (
        found["layers.0.attention.score"].statistics()
        == clean["layers.0.attention.score"].statistics()
    )
    statistics = found[last].statistics()
    assert statistics["nonfinite_rows"] == 2
    assert statistics["rows"] == clean[last].num_rows
    assert statistics["zero_medians"] == 0
    assert not any(isinstance(v, float) and not math.isfinite(v) for v in statistics.values())
    assert all(math.isfinite(maximum) for maximum in found[last].graph_maxima)

    expected = ActivationSummary(heads=HEADS)  # the other rows alone
    with record(model, last) as seen, torch.no_grad():
        predict(model, next(iter(DataLoader(graphs, 5))))
    keep = torch.ones(len(seen[last][0]), dtype=torch.bool)
    keep[[0, 5]] = False
    expected.update(seen[last][0][keep])
    for key, value in expected.statistics().items():
        if key not in ("rows", "nonfinite_rows"):
            assert statistics[key] == pytest.approx(value, rel=1e-9), key


def test_a_row_of_one_edge_has_the_rows_largest_ratio_or_none(graphs):
    model = network(ON_ZINC["gt"])

    def spoil(score):
        score = score.clone()
        score[2] = torch.tensor([0.0, 0, 0, 0, 0, 1, 2, 3])  # the lower middle one is zero
        return score

    with edit(model, {"layers.1.attention.score": spoil}):
        found = edge_maxima(model, graphs[:1])
        statistics = summarise(model, graphs[:1])["layers.1.attention.score"].statistics()
    assert found.isnan().nonzero().tolist() == [[1, 2]]
    assert statistics["zero_medians"] == 1
    assert statistics["nonfinite_rows"] == 0


# States.


@each_architecture
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
        found = summarise(
            model, splits.test, names=looked_at(architecture), heads=heads, batch_size=4
        )
        for layer, one in enumerate(found.values()):
            row = summary.loc[state, layer]
            statistics = one.statistics()
            found_row = {key: row[key] for key in statistics}
            if heads is None:
                assert math.isnan(found_row.pop("share_saturated") or math.nan)
                del statistics["share_saturated"]
            same_statistics(found_row, statistics)
            part = tables["graph_maxima"].query("state == @state and layer == @layer")
            assert part["graph"].tolist() == list(range(5))
            assert part["max_ratio"].tolist() == pytest.approx(one.graph_maxima)
            bins = tables["histogram"].query("state == @state and layer == @layer")
            counts = one.neg_log_ratio.counts
            assert bins["bin"].tolist() == counts.nonzero().flatten().tolist()
            assert bins["count"].tolist() == counts[counts > 0].tolist()
    mae = summary["test_mae"].unstack()
    assert (mae[0] == mae[1]).all()
    assert mae.loc["base", 0] != mae.loc["other", 0]


def test_bond_ratios_are_the_largest_of_both_directions_in_each_head(graphs):
    config = ON_ZINC["gt"]
    model = network(config)
    found = bond_ratios(model, graphs[:2], heads=config.heads)
    for graph, ratios in zip(graphs[:2], found, strict=True):
        with torch.no_grad(), record(model, SCORES) as seen:
            model(graph.x, graph.edge_index, graph.edge_attr)
        assert ratios.shape == (len(seen), config.heads, graph.num_edges // 2)
        width = config.hidden_channels // config.heads
        for layer, outputs in enumerate(seen.values()):
            of_edges = activation_ratio(outputs[0])
            for bond in range(graph.num_edges // 2):
                for head in range(config.heads):
                    both = of_edges[2 * bond : 2 * bond + 2, head * width : (head + 1) * width]
                    assert float(ratios[layer, head, bond]) == pytest.approx(
                        float(both.max()), rel=1e-4
                    )
