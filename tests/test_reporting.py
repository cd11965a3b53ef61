"""One table and one verdict per layer: planted activations by hand, PyG models by loops."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from torch import nn
from torch_geometric.data import Data, HeteroData
from torch_geometric.explain.algorithm.utils import clear_masks, set_masks
from torch_geometric.loader import DataLoader
from torch_geometric.nn import (
    GAE,
    GAT,
    ARMAConv,
    DenseGCNConv,
    EdgeConv,
    GATConv,
    GATv2Conv,
    GCNConv,
    GENConv,
    HeteroConv,
    SAGEConv,
)
from torch_geometric.utils import remove_self_loops

from mapkg import hooks
from mapkg.measures import activation_ratio
from mapkg.nulls import ProductNull, product_of_normals
from mapkg.reporting import report
from studies import checkpoint
from studies.data import load


class Scored(nn.Module):
    """Passes its input through modules whose outputs can be named."""

    def __init__(self, function=lambda x: x):
        super().__init__()
        self.first, self.second = nn.Module(), nn.Module()
        self.first.score, self.second.score = nn.Identity(), nn.Identity()
        self.dropout = nn.Dropout(0.9)
        self.function = function

    def forward(self, x):
        return self.second.score(self.function(self.first.score(self.dropout(x))))


def rows_of(*rows):
    return torch.tensor(rows, dtype=torch.float64)


MASSIVE = rows_of(
    [1.0, 2.0, -3.0, 5000.0],  # median 2: ratios 0.5, 1, 1.5, 2500
    [1.0, -1.0, 2.0, 2.0],
    [9000.0, 0.5, 1.0, -2000.0],  # median 1: 9000 and 2000
    [4.0, 3.0, 2.0, 1.0],
)


def graphs(number=12, channels=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Data(
            x=torch.randn(6, channels, generator=generator),
            edge_index=torch.randint(6, (2, 15), generator=generator),
            edge_attr=torch.randn(15, 3, generator=generator),
        )
        for _ in range(number)
    ]


def plain(*args):
    """Graphs without edge features."""
    return [Data(x=graph.x, edge_index=graph.edge_index) for graph in graphs(*args)]


def only(found):
    """The first row of a report."""
    return found.table.iloc[0]


def largest_ratio(rows):
    """By a plain loop."""
    ratios = [(row.abs().max() / row.abs().median()).item() for row in rows.double()]
    return max(ratio for ratio in ratios if math.isfinite(ratio))


# The table.


def test_planted_massive_activations_by_hand():
    found = report(Scored(), [MASSIVE[:1], MASSIVE[1:]], names="first.score")
    row = only(found)
    assert len(found.table) == 1
    assert row[["layer", "axes"]].tolist() == ["first.score", "rows, channels"]
    assert row[["rows", "channels", "distinct_rows"]].tolist() == [4, 4, 4]
    assert row[["zero_medians", "nonfinite_rows", "floored_rows"]].tolist() == [0, 0, 0]
    assert (row["max_ratio"], row["max_abs"]) == pytest.approx((9000, 9000))
    assert row[["rows_with_massive", "share_rows_with_massive"]].tolist() == [2, 0.5]
    assert (row["massive_channels"], row["top_channels"]) == (2, ((3, 2), (0, 1)))
    assert row["p_value"] == float(ProductNull(4).exceedance(row["max_ratio"], 4))
    assert row["chance_level"] == ProductNull(4).threshold(0.05, 4)
    assert row["verdict"] == (
        "massive: 2 of 4 channels, up to 9,000 x the median, in 50 % of rows; "
        f"p = {row['p_value']:.2g} (product of normals)"
    )


def test_a_higher_threshold_and_fewer_channels_may_be_asked_for():
    found = report(Scored(lambda x: x.abs().sqrt()), [MASSIVE], names=["second.score", "first.*"])
    assert found.table["layer"].tolist() == ["first.score", "second.score"]  # in model order
    assert found.table["max_ratio"].tolist() == pytest.approx([9000, math.sqrt(9000)])
    for largest, words in ((999.0, "999"), (1000.0, "1,000"), (99.96, "100"), (12345.6, "12,346")):
        row = only(report(Scored(), [rows_of([1.0, 1.0, largest])], threshold=1e9))
        assert row["verdict"].startswith(f"none: up to {words} x the median; ")
    row = only(report(Scored(), [MASSIVE], top=1))
    assert (row["top_channels"], row["massive_channels"]) == (((3, 2),), 2)
    found = report(Scored(), [MASSIVE], threshold=5000.0)
    assert (only(found)["top_channels"], found.threshold) == (((0, 1),), 5000)
    row = only(report(Scored(), [MASSIVE], threshold=1e4))
    assert row["verdict"].startswith("none: up to 9,000 x the median; p = ")
    assert (row["massive_channels"], row["top_channels"]) == (0, ())


@pytest.mark.parametrize("sizes", [[200], [50] * 4, [1, 150, 0, 49]])
def test_the_partition_into_batches_does_not_matter(sizes):
    x = product_of_normals(200, 16) ** 3
    whole = report(Scored(), [x]).table
    assert whole["massive_channels"].iloc[0] > 3
    assert report(Scored(), x.split(sizes)).table.equals(whole)


def test_what_is_not_finite_is_counted_and_named_and_spreads_nowhere():
    broken = MASSIVE.repeat(2, 1)
    broken[4, 1], broken[5], broken[6, 0] = math.nan, math.inf, -math.inf
    broken[7] = 0
    clean, row = (only(report(Scored(), [x])) for x in (MASSIVE, broken))
    assert row[["rows", "zero_medians", "nonfinite_rows"]].tolist() == [8, 1, 3]
    same = ["max_ratio", "max_abs", "share_rows_with_massive", "top_channels", "p_value"]
    assert row[same].tolist() == clean[same].tolist()
    left_out = "; left out: 1 row with a zero median, 3 rows with NaN or infinity"
    assert row["verdict"] == clean["verdict"] + left_out


@pytest.mark.parametrize(
    ("x", "verdict"),
    [
        (torch.zeros(3, 4), "undefined: no row has a ratio (3 rows with a zero median)"),
        (
            torch.full((3, 4), math.nan),
            "undefined: no row has a ratio (3 rows with NaN or infinity)",
        ),
        (
            rows_of([0.0, 0.0, 5.0], [math.nan, 1.0, 2.0]),
            "undefined: no row has a ratio (1 row with a zero median, 1 row with NaN or infinity)",
        ),
        (torch.ones(3, 1), "undefined: a single channel is its own median"),
        (
            torch.ones(0, 4),
            "undefined: no rows came; the module did not run, or on graphs without edges",
        ),
    ],
)
def test_a_layer_without_a_ratio_is_undefined_not_massive(x, verdict):
    row = only(report(Scored(), [x]))
    assert row["verdict"] == verdict
    assert math.isnan(row["p_value"]) and row["massive_channels"] == 0
    never = only(
        report(nn.Sequential(nn.Identity(), nn.Identity()), [x], names="1", forward=lambda *_: 0)
    )
    assert never["verdict"].startswith("undefined: no rows came") and never["rows"] == 0


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[1.0, 2.0, 9e3]] * 3, "in 100 % of rows"),
        ([[1.0, 2.0, 9e3]] * 999 + [[1.0, 2.0, 3.0]], "in over 99 % of rows"),
        ([[1.0, 2.0, 9e3]] * 98 + [[1.0, 2.0, 3.0]] * 2, "in 98 % of rows"),
        ([[1.0, 2.0, 9e3]] + [[1.0, 2.0, 3.0]] * 19_999, "in under 0.01 % of rows"),
    ],
)
def test_shares_of_rows_are_written_as_people_do(rows, words):
    assert words in only(report(Scored(), [rows_of(*rows)]))["verdict"]


# Nulls.


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_rows_that_come_again_count_once_for_chance(noise, monkeypatch):
    few = product_of_normals(31, 16)
    torch.manual_seed(0)
    many = few.repeat(100, 1)
    many = (many * (1 + noise * torch.randn(many.shape))).split(700)
    row, once = (only(report(Scored(), x)) for x in (many, [few]))
    assert (row["rows"], once["rows"]) == (3100, 31)
    assert 31 <= row["distinct_rows"] <= 31 + 100 * noise / 1e-6
    if not noise:
        assert (row["p_value"], row["chance_level"]) == (once["p_value"], once["chance_level"])
        assert row["verdict"].endswith("(product of normals, 31 distinct rows)")
        assert once["verdict"].endswith("(product of normals)")
    monkeypatch.setattr("mapkg.reporting.MAX_DISTINCT", 20)  # more are all taken as different
    assert only(report(Scored(), many))["distinct_rows"] == 3100


def test_untrained_models_as_null_give_a_p_value_by_rank():
    def scaled(power):
        return Scored(lambda x: x.abs() ** power)

    null = map(scaled, [0.1, 0.2, 0.3, 0.4])
    row = only(report(scaled(1), [MASSIVE], names="second.score", null=null))
    assert row["p_value"] == 1 / 5
    assert row["verdict"].endswith("; p = 0.2 (4 null models)")
    assert row["chance_level"] == pytest.approx(
        np.quantile([9000**p for p in (0.1, 0.2, 0.3, 0.4)], 0.95)
    )
    # Powers of at least 0.3 have a largest ratio as large: a tie and a larger one.
    found = report(scaled(0.3), [MASSIVE], names="second.score", null=map(scaled, [0.2, 0.3, 1]))
    assert (only(found)["p_value"], found.null) == (3 / 4, "3 null models")


def test_values_found_before_serve_as_null():
    null = {"first.score": [10.0, 20.0, 9e9], "second.score": [1.0] * 19}
    found = report(Scored(), [MASSIVE], null=null)
    assert found.table["p_value"].tolist() == [2 / 4, 1 / 20]
    assert found.table["verdict"].str.endswith("(values given)").all()
    with pytest.raises(KeyError, match=r"no values for 'second.score'; it has first.score"):
        report(Scored(), [MASSIVE], null={"first.score": [1.0]})
    for draws, words in ((999_999, "p = 1e-06"), (1_000_000, "p < 0.000001")):
        null = {"first.score": np.zeros(draws), "second.score": np.zeros(draws)}
        assert only(report(Scored(), [MASSIVE], null=null))["verdict"].endswith(
            f"; {words} (values given)"
        )


def test_a_null_of_models_needs_a_loader_for_each_and_at_least_one():
    with pytest.raises(ValueError, match=r"one-time list_iterator: pass list\(loader\)"):
        report(Scored(), iter([MASSIVE]), null=[Scored()])
    with pytest.raises(ValueError, match="at least one model as null"):
        report(Scored(), [MASSIVE], null=[])
    assert only(report(Scored(), iter([MASSIVE])))["rows"] == 4  # enough for the model alone


def test_wider_rows_than_the_null_knows_have_no_p_value():
    row = only(report(Scored(), [product_of_normals(2, 10_002)]))
    assert math.isnan(row["p_value"]) and math.isnan(row["chance_level"])
    assert row["verdict"] == f"none: up to {row['max_ratio']:.3g} x the median"


# Medians that are no typical magnitude.


def edges_through(activation):
    return EdgeConv(nn.Sequential(nn.Linear(8, 32), activation))


@pytest.mark.parametrize(
    "layer",
    [
        GENConv(4, 16),
        GENConv(4, 16, eps=1e-4),
        edges_through(nn.ReLU()),
        edges_through(nn.Threshold(0.05, -1e-9)),
    ],
)
def test_a_floor_that_a_relu_or_an_epsilon_makes_is_no_median(layer):
    with torch.no_grad(), hooks.record(layer, ":message") as seen:
        for graph in plain():
            layer(graph.x, graph.edge_index)
    expected, changed = [], 0
    for row in torch.cat(seen[":message"]).abs().double():
        above, median = row[row > 1.01 * row.min()], row.median().item()
        if len(above) <= len(row) * 3 / 4 and median > 0:
            median, changed = above.median().item(), changed + 1
        expected.append(row.max().item() / median if median else 0.0)
    row = only(report(layer, plain()))
    assert row["max_ratio"] == pytest.approx(max(expected), rel=1e-5)
    assert max(expected) < 100 and row["floored_rows"] == changed > 20
    words = f"; {changed} rows on a floor (a ReLU, an epsilon), compared with the median above it"
    assert row["verdict"].startswith("none") and words in row["verdict"]


def test_what_is_massive_above_a_floor_or_stands_out_of_equal_channels_stays_so():
    x = torch.full((3, 8), 1e-7)
    x[0, 4:] = torch.tensor([1.0, 2.0, 3.0, 8000.0])  # 4000 times the median above the floor
    x[1, 4:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x[2] = 1.0
    x[2, 3] = 5000.0
    row = only(report(Scored(), [x]))
    assert (row["floored_rows"], row["rows_with_massive"]) == (2, 2)
    assert row["top_channels"] == ((3, 1), (7, 1))
    assert row["max_ratio"] == pytest.approx(5000)


# Any model.


def test_messages_of_a_pyg_model_are_what_its_hooks_see():
    torch.manual_seed(0)
    model = GAT(4, 16, 2, heads=4, v2=True, edge_dim=3)
    loader = DataLoader(graphs(), 4)
    with torch.no_grad(), hooks.record(model.eval(), "*:message") as seen:
        for batch in loader:
            model(batch.x, batch.edge_index, edge_attr=batch.edge_attr)
    found = report(model, loader).table.set_index("layer")
    assert found.index.tolist() == ["convs.0:message", "convs.1:message"] == list(seen)
    for name, messages in seen.items():
        rows = torch.cat([x.flatten(1) for x in messages])
        assert found.loc[name, "rows"] == len(rows) >= 12 * 15
        assert found.loc[name, "channels"] == 16
        assert found.loc[name, "max_ratio"] == pytest.approx(largest_ratio(rows))
        assert found.loc[name, "axes"] == "rows, heads, channels"
    nodes = report(model, loader, names="convs.?").table
    assert nodes["rows"].tolist() == [12 * 6] * 2


def test_the_shipped_network_is_massive_where_its_scores_are():
    model, _ = checkpoint.load(REPOSITORY / "data" / "checkpoints" / "gt_moses_seed0")
    loader = DataLoader(load("moses").test[:40], 16)
    found = report(model, loader).table.set_index("layer")
    with torch.no_grad(), hooks.record(model.eval(), "*score") as seen:
        for batch in loader:
            model(batch.x, batch.edge_index, batch.edge_attr, batch.batch, batch.batch_size)
    assert list(seen) == found.index.tolist()
    for name, scores in seen.items():
        massive = activation_ratio(torch.cat(scores).double()) > 1000
        assert found.loc[name, "rows_with_massive"] == massive.any(dim=1).sum()
        counts = massive.sum(dim=0)
        assert found.loc[name, "massive_channels"] == (counts > 0).sum()
        assert all(counts[channel] == rows for channel, rows in found.loc[name, "top_channels"])
    assert found["verdict"].str.startswith("massive").iloc[0]
    assert (found["p_value"] < 1e-6).iloc[0]
    assert (found["p_value"] > 1e-3).sum() >= 5


class Ranking(nn.Module):
    """A GNN whose head is called ``score``, and one of its parts ``edge_score``."""

    def __init__(self, head):
        super().__init__()
        self.conv, self.edge_score, self.head = GCNConv(4, 4), nn.Identity(), head
        setattr(self, head, nn.Linear(4, 1))

    def forward(self, x, edge_index):
        return getattr(self, self.head)(self.edge_score(self.conv(x, edge_index)))


@pytest.mark.parametrize("head", ["score", "out"])
def test_a_head_called_score_does_not_hide_the_layers(head):
    assert report(Ranking(head), plain()).table["layer"].tolist() == ["conv:message"]


class Doubling(nn.Module):
    """Layers that take one object, write into it and hand it on, as those of GraphGym do."""

    def __init__(self, in_place):
        super().__init__()
        self.layers, self.in_place = nn.ModuleList(nn.Identity() for _ in range(3)), in_place

    def forward(self, batch):
        for layer in self.layers:
            batch.x = layer(batch.x.mul_(2) if self.in_place else 2 * batch.x)
        return batch


@pytest.mark.parametrize("in_place", [True, False])
def test_batches_that_a_model_writes_into_are_the_same_in_the_next_pass(in_place):
    model, loader = Doubling(in_place), graphs()
    before = [graph.x.clone() for graph in loader]
    kept = dict(names="layers.*", null=[model])
    first, second = (report(model, loader, **kept).table for _ in range(2))
    assert first.equals(second) and (first["p_value"] == 1).all()
    assert all(torch.equal(graph.x, x) for graph, x in zip(loader, before, strict=True))


# Which axes are rows.


def by_loop(layer, loader, rows):
    """Largest ratio of what a loop makes of each output."""
    with torch.no_grad():
        return largest_ratio(torch.cat([rows(layer(*batch)) for batch in loader]))


def test_rows_of_a_padded_batch_are_asked_for_and_are_those_of_a_loop_over_its_nodes():
    torch.manual_seed(0)
    x, adj = torch.randn(3, 9, 8), torch.eye(9).expand(3, 9, 9)
    x[:, 0] *= 5000
    model = nn.ModuleDict({"conv": DenseGCNConv(8, 16)})
    about = dict(names="conv", forward=lambda model, batch: model["conv"](*batch))
    with pytest.raises(ValueError, match="does not say what a row is: pass rows=lambda"):
        report(model, [(x, adj)], **about)
    rows = dict(rows=lambda module, output, batch: output.flatten(0, 1))
    row = only(report(model, [(x, adj)], **about, **rows))
    expected = by_loop(model["conv"], [(x, adj)], lambda y: torch.cat([*y]))
    assert (row["max_ratio"], row["rows"]) == (pytest.approx(expected, rel=1e-5), 27)
    assert row["axes"] == "made by rows="


@pytest.mark.parametrize(
    ("layer", "rows", "count"),
    [
        (ARMAConv(4, 4, num_stacks=3), lambda m: m.transpose(0, 1).flatten(1), 15),
        (ARMAConv(4, 4, num_stacks=15), lambda m: m.flatten(0, 1), 15 * 15),  # as many as edges
        (SAGEConv(4, 4), lambda m: m.flatten(0, 1), 2 * 15),  # of x [graphs, nodes, channels]
    ],
)
def test_messages_whose_first_axis_has_no_edges_are_refused_and_rows_says_how(layer, rows, count):
    (graph,) = plain(1)
    if isinstance(layer, SAGEConv):
        graph.x = torch.stack([graph.x, -2 * graph.x])
    with pytest.raises(ValueError, match=r"':message' returned .*, of which axis 1 has the rows"):
        report(layer, [graph])
    row = only(report(layer, [graph], rows=lambda module, output, batch: rows(output)))
    with torch.no_grad(), hooks.record(layer, ":message") as seen:
        layer(graph.x, graph.edge_index)
    expected = rows(seen[":message"][-1])
    assert row["rows"] == count * len(seen[":message"])
    assert row["max_ratio"] >= largest_ratio(expected) * (1 - 1e-6)


def test_tokens_pieces_and_nested_tensors_are_no_rows():
    tokens = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match="does not say what a row is"):
        report(tokens, [torch.randn(2, 7, 8)], names="linear2")
    square = nn.Sequential(nn.Unflatten(1, (6, 2)))  # six nodes, and as many heads
    (graph,) = plain(1, 12)
    with pytest.raises(ValueError, match=r"\[6, 6, 2\], of which the batch does not say"):
        report(square, [graph], names="0", forward=lambda model, batch: model(batch.x))
    with pytest.raises(ValueError, match=r"computed in 2 pieces.*set decomposed_layers"):
        report(GCNConv(4, 4, decomposed_layers=2), plain())
    nested = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"returned a nested tensor.*pass rows="):
        report(nn.Sequential(nn.Identity()), [nested], names="0")


@pytest.mark.parametrize("loops", [0, 2])
def test_heads_of_nodes_and_of_edges_with_self_loops_are_known_rows(loops):
    (graph,) = plain(1)
    edge_index = remove_self_loops(graph.edge_index)[0]
    edges = edge_index.size(1) + 6
    graph.edge_index = torch.cat([edge_index, torch.arange(loops).expand(2, -1)], dim=1)
    row = only(report(GATConv(4, 3, heads=2), [graph], names=":message"))
    assert row[["rows", "channels"]].tolist() == [edges, 6]
    model = nn.ModuleDict({"conv": GATConv(4, 3, heads=2), "kept": nn.Identity()})

    def forward(model, batch):
        _, (_, weight) = model["conv"](batch.x, batch.edge_index, return_attention_weights=True)
        model["kept"](weight.unsqueeze(-1).expand(-1, -1, 4))

    row = only(report(model, [graph], names="kept", forward=forward))
    assert row[["rows", "channels"]].tolist() == [edges, 8]
    assert row["axes"] == "rows, heads, channels"


def test_rows_are_made_of_other_outputs_by_a_function_that_sees_module_and_batch():
    class Pairs(nn.Module):
        def forward(self, x):
            return x, None

    seen = []

    def first(module, output, batch):
        seen.append((type(module), batch))
        return output[0][:, :3]

    x = torch.tensor([[1.0, -2.0, 3000.0, 9e9], [1.0, 2.0, 4.0, 9e9]])
    row = only(report(Pairs(), [x], names="", rows=first))
    assert (row["max_ratio"], row["channels"]) == (pytest.approx(1500.0), 3)
    assert seen == [(Pairs, x)]


# How a model is called.


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.score, self.got = nn.Identity(), None

    def forward(self, x, edge_index, batch, batch_size, edge_attr=None, unknown=7):
        self.got = (edge_index, batch, batch_size, edge_attr, unknown)
        return self.score(x)


class ByBatch(ByName):
    def forward(self, batch):
        return self.score(batch.x)


class Unclear(ByName):
    def forward(self, x, labels, hints):
        return self.score(x)


class ByEdges(nn.Module):
    """Embeddings of its own, as LightGCN has: all that it takes is the graph."""

    def __init__(self):
        super().__init__()
        self.embedding, self.conv = nn.Embedding(6, 4), GCNConv(4, 4)

    def forward(self, edge_index, edge_weight=None):
        return self.conv(self.embedding.weight, edge_index, edge_weight)


class ByType(nn.Module):
    def __init__(self):
        super().__init__()
        to, back = SAGEConv(4, 4), GATConv(4, 4, add_self_loops=False)
        self.conv = HeteroConv({("a", "to", "b"): to, ("b", "to", "a"): back})

    def forward(self, x_dict, edge_index_dict):
        return self.conv(x_dict, edge_index_dict)


def test_a_model_gets_what_its_parameters_name_or_the_batch():
    loader = DataLoader(graphs(), 12)
    batch = next(iter(loader))
    model = ByName()
    expected = only(report(Scored(), [batch.x]))["max_ratio"]  # a plain tensor
    assert only(report(model, loader))["max_ratio"] == expected
    edge_index, vector, size, edge_attr, unknown = model.got
    assert torch.equal(edge_index, batch.edge_index) and torch.equal(vector, batch.batch)
    assert torch.equal(edge_attr, batch.edge_attr) and (size, unknown) == (12, 7)
    for other in (ByBatch(), Scored(), nn.DataParallel(Scored())):  # by name: x alone
        assert only(report(other, loader))["max_ratio"] == expected
    with pytest.raises(TypeError, match="does not carry labels, hints: pass forward=lambda"):
        report(Unclear(), loader)
    found = report(Unclear(), loader, forward=lambda model, batch: model(batch.x, None, None))
    assert only(found)["max_ratio"] == expected
    data = graphs(1)[0]
    data.batch, data.batch_size = torch.zeros(6, dtype=torch.long), 2  # of a neighbor loader
    report(model, [data])
    assert model.got[2] == 2


def test_models_of_edges_alone_of_node_types_and_wrapped_ones_are_called_too():
    assert only(report(ByEdges(), plain(1)))["channels"] == 4
    data = HeteroData()
    data["a"].x, data["b"].x = torch.randn(9, 4), torch.randn(4, 4)
    data["a", "to", "b"].edge_index = torch.randint(4, (2, 10))
    data["b", "to", "a"].edge_index = torch.randint(4, (2, 7))
    assert report(ByType(), [data]).table["rows"].tolist() == [10, 7]
    averaged = torch.optim.swa_utils.AveragedModel(GCNConv(4, 4))
    assert report(averaged, plain()).table["layer"].tolist() == ["module:message"]


@pytest.mark.parametrize(
    ("model", "loader", "words"),
    [
        (GAE(GCNConv(4, 4)), plain(), r"GAE\.forward: it names no required argument"),
        (GCNConv(4, 4), [HeteroData()], r"a HeteroData keeps its features by type.*x_dict"),
        (GCNConv(4, 4), plain()[0], r"expected batches, got one Data: pass \[data\]"),
        (Scored(), MASSIVE, r"expected batches, got one Tensor: pass \[data\]"),
    ],
)
def test_how_to_call_a_model_is_asked_for_truly(model, loader, words):
    with pytest.raises(TypeError, match=words):
        report(model, loader)


def test_a_call_that_fails_says_how_the_model_was_called():
    with pytest.raises(AssertionError) as caught:  # without edge_dim
        report(GATv2Conv(4, 4), graphs())
    assert "called with x, edge_index, edge_attr, which the batch" in caught.value.__notes__[0]
    forward = {"forward": lambda model, batch: model(batch.x, batch.edge_index)}
    assert only(report(GATv2Conv(4, 4), graphs(), **forward))["rows"] > 0


def test_a_tied_layer_runs_several_times_and_is_named_once():
    shared = GCNConv(4, 4)
    model = nn.ModuleList([shared, shared])
    runs = dict(forward=lambda model, b: model[1](model[0](b.x, b.edge_index), b.edge_index))
    row = only(report(model, plain(), **runs))
    assert row["layer"] == "0:message" and row["verdict"].endswith("; runs 2 times a batch")
    for name in ("1", "1:message"):
        with pytest.raises(KeyError, match=r"'1' is one module with '0' \(tied\): name that one"):
            report(model, plain(), names=name)


def test_two_reports_on_one_model_at_the_same_time_do_not_mix():
    model, loader = GAT(4, 16, 2, heads=4, dropout=0.5).train(), DataLoader(plain(40), 2)
    expected = report(model, loader).table
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: report(model, loader).table, range(2)))
    assert found[0].equals(expected) and found[1].equals(expected)
    assert all(module.training for module in model.modules())


def test_the_mask_of_an_explainer_is_not_taken_for_the_model():
    model, (graph,) = GAT(4, 4, 2), plain(1)
    expected = report(model, [graph]).table
    set_masks(model, nn.Parameter(torch.randn(15)), graph.edge_index)
    with pytest.raises(RuntimeError, match=r"'convs.0' still has the edge mask .*clear_masks\("):
        report(model, [graph])
    clear_masks(model)
    assert report(model, [graph]).table.equals(expected)


# Bad input.


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (torch.ones(3), ValueError, r"\[rows, channels\] or .* got \[3\]; name a module"),
        (torch.ones(2, 3, 4, 5), ValueError, r"got \[2, 3, 4, 5\]; name a module"),
        (torch.ones(2, 3, dtype=torch.long), TypeError, "got a tensor of torch.int64"),
        ((torch.ones(2, 3), None), TypeError, "real numbers, got tuple; name the module"),
        (torch.eye(3).to_sparse(), TypeError, "got a tensor of torch.float32, torch.sparse_coo, "),
        (torch.ones(2, 3, device="meta"), TypeError, "got a tensor of .* on meta; name"),
        (torch.ones(2, 0), ValueError, r"got \[2, 0\]; name a module"),
    ],
)
def test_an_output_that_is_not_rows_of_channels_is_named(output, error, message):
    model = Scored(lambda _: output)
    with pytest.raises(error, match=f"expected 'second.score' to return.*{message}"):
        report(model, [MASSIVE])


def test_widths_loaders_and_names_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match=r"'first\.score': expected 4 channels as before, got 3"):
        report(Scored(), [MASSIVE, MASSIVE[:, :3]])
    with pytest.raises(ValueError, match="expected batches, got an empty loader"):
        report(Scored(), [])
    with pytest.raises(KeyError, match=r"no submodule 'first.scores'; near matches: .*first.score"):
        report(Scored(), [MASSIVE], names="first.scores")
    with pytest.raises(ValueError, match="names: expected at least one name or pattern, got none"):
        report(Scored(), [MASSIVE], names=[])
    with pytest.raises(ValueError, match="threshold: expected a positive ratio, got nan"):
        report(Scored(), [MASSIVE], threshold=math.nan)
    for model in (None, torch.relu):
        with pytest.raises(TypeError, match="Module"):
            report(model, [MASSIVE])
    linear = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    with pytest.raises(KeyError, match="pass names=, of 0, 1"):
        report(linear, [torch.ones(2, 4)])
    assert only(report(linear, [torch.ones(2, 4)], names="0"))["channels"] == 8


# Reading it.


def test_a_report_is_printed_with_a_line_for_each_layer():
    found = report(Scored(), [MASSIVE])
    first, *lines = str(found).splitlines()
    assert first == (
        "Scored: activations above 1,000 times the median of their row; null: product of normals"
    )
    verdicts = found.table["verdict"]
    assert lines == [f"first.score   {verdicts[0]}", f"second.score  {verdicts[1]}"]
    with pytest.raises(AttributeError, match="cannot assign"):
        found.threshold = 1.0


def test_in_a_notebook_layers_are_bars_on_a_log_scale_and_names_are_escaped():
    model = nn.ModuleDict({"<b>": nn.Identity(), "c": nn.Identity()})
    forward = {"forward": lambda model, x: (model["<b>"](x), model["c"](0 * x))}
    page = report(model, [MASSIVE], names="?*", **forward)._repr_html_()
    assert page.startswith("<p>ModuleDict: activations above 1,000 times")
    assert page.count("<tr") == 3 and page.count("width:120px") == page.count("width:0px") == 1
    assert "<td>&lt;b&gt;</td>" in page and "<td>9e+03</td>" in page and "nan" not in page


def test_a_plot_has_a_bar_for_each_layer_its_chance_level_and_the_threshold(monkeypatch):
    found = report(Scored(lambda x: x.abs().sqrt()), [MASSIVE])
    ax = found.plot()
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in ax.patches]
    assert bars == [(0, pytest.approx(9000)), (1, pytest.approx(math.sqrt(9000)))]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["first.score", "second.score"]
    assert ax.get_xscale() == "log" and ax.get_ylim()[0] > ax.get_ylim()[1]
    chance, threshold = ax.lines
    assert chance.get_xdata().tolist() == found.table["chance_level"].tolist()
    assert list(threshold.get_xdata()) == [1000, 1000]
    assert found.plot(ax=ax) is ax
    ax.figure.clear()


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_is_shown_if_asked_for(progress, capsys):
    report(Scored(), [MASSIVE] * 3, progress=progress)
    assert ("3/3" in capsys.readouterr().err) is progress
