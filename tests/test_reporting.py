"""One table and one verdict per layer: planted activations by hand, PyG models by loops."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.data import Data, HeteroData
from torch_geometric.explain.algorithm.utils import clear_masks, set_masks
from torch_geometric.loader import DataLoader
from torch_geometric.nn import (
    GAE,
    GAT,
    ARMAConv,
    EdgeConv,
    GATConv,
    GCNConv,
    GENConv,
    HeteroConv,
    SAGEConv,
)

from mapkg import hooks
from mapkg.all_measures import UNITS, is_massive_by_sun, layer_ratio, row_measures
from mapkg.measures import MEASURES, activation_ratio
from mapkg.nulls import ProductNull, product_of_normals
from mapkg.reporting import report
from mapkg.rows import graphs_of_rows

nan, inf = math.nan, math.inf


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


def network(forward, **parts):
    model = type("Network", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


def rows_of(*rows):
    return torch.tensor(rows, dtype=torch.float64)


MASSIVE = rows_of(
    [1.0, 2.0, -3.0, 5000.0],  # median 2: ratios 0.5, 1, 1.5, 2500
    [1.0, -1.0, 2.0, 2.0],
    [9000.0, 0.5, 1.0, -2000.0],  # median 1: 9000 and 2000
    [4.0, 3.0, 2.0, 1.0],
)


def graphs(number=12, channels=4, edge_attr=True):
    generator = torch.Generator().manual_seed(0)
    draw = lambda rows, width: torch.randn(rows, width, generator=generator)  # noqa: E731
    index = lambda: torch.randint(6, (2, 15), generator=generator)  # noqa: E731
    features = {"edge_attr": draw(15, 3)} if edge_attr else {}
    return [Data(x=draw(6, channels), edge_index=index(), **features) for _ in range(number)]


def plain(number=12, channels=4):
    return graphs(number, channels, edge_attr=False)


def only(model, loader, **options):
    return report(model, loader, **options).table.iloc[0]


def scored(x, **options):
    return report(Scored(), [x], names="first.score", **options).table.set_index("measure")


def largest_ratio(rows):
    ratios = [(row.abs().max() / row.abs().median()).item() for row in rows.double()]
    return max(ratio for ratio in ratios if math.isfinite(ratio))


def test_planted_massive_activations_by_hand():
    (row,) = report(Scored(), MASSIVE.split(1), names="first.score").table.iloc
    assert row[["layer", "axes"]].tolist() == ["first.score", "rows, channels"]
    assert row[["rows", "channels", "distinct_rows"]].tolist() == [4, 4, 4]
    assert row[["zero_medians", "nonfinite_rows", "floored_rows"]].tolist() == [0, 0, 0]
    assert (row["max_ratio"], row["max_abs"]) == pytest.approx((9000, 9000))
    assert row[["rows_with_massive", "share_rows_with_massive"]].tolist() == [2, 0.5]
    assert (row["massive_channels"], row["top_channels"]) == (2, ((3, 2), (0, 1)))
    assert row["p_value"] == float(ProductNull(4).exceedance(row["max_ratio"], 4))
    assert row["chance_level"] == ProductNull(4).threshold(0.05, 4)
    assert row["verdict"] == (
        "massive by the row ratio: 2 of 4 channels, up to 9,000 x the median, in 50 % of rows; "
        f"p = {row['p_value']:.2g} (product of normals)"
    )

    assert only(Scored(), [MASSIVE], threshold=5000.0)["top_channels"] == ((0, 1),)
    row = only(Scored(), [MASSIVE], threshold=1e4)
    assert (row["massive_channels"], row["top_channels"]) == (0, ())
    assert only(Scored(), [MASSIVE], threshold=0.5)["massive_channels"] == 4


@pytest.mark.parametrize(
    ("rows", "threshold", "words"),
    [
        ([[1.0, 1.0, 1000.0]], 1e9, "none by the row ratio: up to 1,000 x the median; "),
        ([[1.0, 1.0, 99.96]], 1e9, "none by the row ratio: up to 100 x the median; "),
        ([[1.0, 2.0, 9e3]] * 3, 1000.0, ", in 100 % of rows"),
        ([[1.0, 2.0, 9e3]] * 999 + [[1.0, 2.0, 3.0]], 1000.0, ", in over 99 % of rows"),
        ([[1.0, 2.0, 9e3]] * 98 + [[1.0, 2.0, 3.0]] * 2, 1000.0, ", in 98 % of rows"),
        ([[1.0, 2.0, 9e3]] + [[1.0, 2.0, 3.0]] * 19_999, 1000.0, ", in under 0.01 % of rows"),
    ],
)
def test_numbers_are_written_as_people_do(rows, threshold, words):
    assert words in only(Scored(), [rows_of(*rows)], threshold=threshold)["verdict"]


def test_what_is_not_finite_is_counted_and_named_and_spreads_nowhere():
    broken = MASSIVE.repeat(2, 1)
    broken[4, 1], broken[5], broken[6, 0] = nan, inf, -inf
    broken[7] = 0
    clean, row = (only(Scored(), [x]) for x in (MASSIVE, broken))
    assert row[["rows", "zero_medians", "nonfinite_rows"]].tolist() == [8, 1, 3]
    same = ["max_ratio", "max_abs", "share_rows_with_massive", "top_channels", "p_value"]
    assert row[same].tolist() == clean[same].tolist()
    left_out = "; left out: 1 row with a zero median, 3 rows with NaN or infinity"
    assert row["verdict"] == clean["verdict"] + left_out


NO_RATIO = "undefined: no row has a ratio (3 rows with a zero median)"
ALONE = "undefined: a single channel is its own median"
NO_ROWS = "undefined: no rows came; the module did not run, or on graphs without edges"
BAD = rows_of([0.0, 0.0, 5.0], [nan, 1.0, 2.0])


@pytest.mark.parametrize(
    ("x", "measure", "verdict"),
    [
        (torch.zeros(3, 4), "row", NO_RATIO),
        (BAD, "row", NO_RATIO[:31] + "1 row with a zero median, 1 row with NaN or infinity)"),
        (rows_of([0.0, 1.0, 2.0]), "spread", "undefined: no row has a spread (1 row with a zero)"),
        (rows_of([0.0, 0.0, 2.0]), "layer", "undefined: no row has a ratio to a median that is no"),
        (rows_of([0.0, 0.0, 200.0]), "sun", "massive by Sun's rule: |x| up to 200, in 1 of 1 grap"),
        (torch.ones(2, 10_001), "spread", "none by the spread: 0, no chance level"),
        (torch.ones(2, 10_001), "row", "none by the row ratio: up to 1 x the median"),
        *((torch.ones(3, 1), measure, ALONE) for measure in ("row", "isolation")),
        *((torch.ones(0, 4), measure, NO_ROWS) for measure in ("row", "isolation")),
    ],
)
def test_what_has_no_such_measure_is_said_to_be_undefined(x, measure, verdict):
    for over in UNITS:
        row = scored(x, measure=measure, over=over).iloc[0]
        assert row["verdict"].startswith(verdict) and "left out" not in row["verdict"]
        assert row["massive"] or not row["share_rows_with_massive"] > 0
    never = only(nn.Sequential(nn.Identity()), [x], names="0", forward=lambda *_: 0)
    assert (never["verdict"], never["rows"]) == (NO_ROWS, 0)


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_rows_that_come_again_count_once_for_chance(noise, monkeypatch):
    few = product_of_normals(31, 16)
    torch.manual_seed(0)
    many = few.repeat(100, 1)
    many = (many * (1 + noise * torch.randn(many.shape))).split(700)
    row, once = only(Scored(), many), only(Scored(), [few])
    assert row["rows"] == 3100 and 31 <= row["distinct_rows"] <= 31 + 100 * noise / 1e-6
    if not noise:
        assert (row["p_value"], row["chance_level"]) == (once["p_value"], once["chance_level"])
        assert row["verdict"].endswith("(product of normals, 31 distinct rows)")
        assert once["verdict"].endswith("(product of normals)")
    monkeypatch.setattr("mapkg.reporting.MAX_DISTINCT", 20)  # more are all taken as different
    assert only(Scored(), many)["distinct_rows"] == 3100


@pytest.mark.parametrize("measure", MEASURES)
def test_untrained_models_as_null_give_a_p_value_by_rank(measure):
    x = product_of_normals(40, 16) * 100
    x[0, 0] = 1e9
    model, *null = (Scored(lambda x, p=p: x.abs() ** p) for p in (1, 0.1, 0.2, 0.3))
    row = only(model, [x], null=iter(null), names="second.score", measure=measure)
    assert row["p_value"] == 1 / 4 and row["verdict"].endswith("; p = 0.25 (3 null models)")
    row = only(null[-1], [x], null=[null[0], null[-1], model], names="second.score")
    assert row["p_value"] == 3 / 4  # a tie and a larger one
    assert math.isnan(row["chance_level"]), "three models do not say what one in twenty exceeds"


@pytest.mark.parametrize(("number", "place"), [(19, 1), (38, 1), (39, 2), (60, 3)])
def test_the_chance_level_is_what_gives_a_p_value_of_a_twentieth(number, place):
    settings = dict(names="", measure="isolation")
    value = only(nn.Identity(), [MASSIVE], **settings)["value"]
    draws = np.sort(np.random.default_rng(0).random(number))
    draws[: number // 2] = -math.inf
    for below, is_massive in ((0.0, False), (1e-9, True)):
        null = {"": [*(draws - draws[-place] + value - below), math.nan]}
        row = only(nn.Identity(), [MASSIVE], null=null, **settings)
        assert row["chance_level"] == value - below
        assert row["massive"] == is_massive == (row["p_value"] <= 0.05)


def test_values_found_before_serve_as_null_and_each_layer_needs_them():
    null = {"first.score": [10.0, 20.0, 9e9], "second.score": [1.0] * 19}
    found = report(Scored(), [MASSIVE], null=null)
    assert found.table["p_value"].tolist() == [2 / 4, 1 / 20]
    assert found.table["verdict"].str.endswith("(values given)").all()
    with pytest.raises(KeyError, match=r"no values for 'second.score'; it has first.score"):
        report(Scored(), [MASSIVE], null={"first.score": [1.0]})
    with pytest.raises(ValueError, match="expected models for several measures, got values"):
        report(Scored(), [MASSIVE], null=null, measure="all")


def test_each_measure_has_its_value_its_null_and_its_verdict():
    x = product_of_normals(60, 16, seed=2)
    x[3] *= 1e4  # a row that is large as a whole
    table, of_rows = scored(x, measure="all"), row_measures(x)
    values = {
        "row": activation_ratio(x).max(),
        "layer": x.abs().max() / x.abs().median(),
        "sun": torch.tensor(1 / 60),
        "spread": of_rows["spread"].square().mean().sqrt(),
        "isolation": of_rows["max_over_second"].median(),
    }
    for name, value in values.items():
        row, exact = table.loc[name], name in ("row", "spread")
        assert row["value"] == pytest.approx(value.item(), rel=1e-9 if exact else 0.006)
        if name != "sun":
            chance = ProductNull(16).chance(name, row["value"], 60)
            assert (row["chance_level"], row["p_value"]) == chance
    large, spread = table.loc["layer", "value"], table.loc["spread"]
    words = {
        "row": f"none by the row ratio: up to {values['row']:.3g} x the median; p = ",
        "layer": f"massive by the layer ratio: up to {large:,.0f} x the median of the data, in 1.7",
        "sun": f"massive by Sun's rule: |x| up to {x.abs().max():,.3g}, in 1 of 1 graphs, in 1.7 %",
        "spread": f"none by the spread: {spread['value']:.3g}, chance up to "
        f"{spread['chance_level']:.3g}; p = {spread['p_value']:.2g} (product of normals)",
        "isolation": f"none by isolation: largest / second {table.loc['isolation', 'value']:.3g}, ",
    }
    for name, start in words.items():
        assert table.loc[name, "verdict"].startswith(start)
    assert table["share_rows_with_massive"].tolist()[:3] == pytest.approx([0, 1 / 60, 1 / 60])
    assert table["massive"].tolist() == [False, True, True, False, False]
    assert scored(x**2, measure="spread")["massive"].all()
    found = report(Scored(), [x], measure="all")
    assert found.measures.shape == (2, 5) and str(found).count("by Sun's rule: ") == 2
    assert len(found.plot().patches) == 10 and found._repr_html_().count("<tr") == 11


def test_the_median_of_a_layer_is_that_of_graphs_batches_or_all_data():
    # Three channels of one magnitude and one 50 times as large, magnitudes by graph:
    row, no_edges = torch.tensor([1.0, 1.0, 1.0, 50.0]), torch.zeros(2, 0).long()
    sizes = {6: 3.0, 5: 3.0, 8: 1.0, 4: 20.0}.items()
    data = [Data(x=scale * row.expand(n, 4), edge_index=no_edges) for n, scale in sizes]
    loader = DataLoader(data, 2)
    measured = dict(measure="layer", names="first.score", rows=lambda module, output, b: output)
    value = lambda over: only(Scored(), loader, over=over, **measured)["value"]  # noqa: E731
    assert value("graph") == 50
    assert value("batch") == 1000  # 24 of 48 magnitudes are 1
    assert value("data") == pytest.approx(1000 / 3, rel=0.006)  # 24 of 92 are 1, 33 are 3


def test_rows_are_of_the_graphs_of_their_nodes_or_edges_and_of_one_if_that_is_not_said():
    def batch(nodes, targets):
        """Graphs with edges from their first node."""
        ends = [torch.tensor([[0] * len(each), each]) for each in targets]
        each = [Data(num_nodes=n, edge_index=e) for n, e in zip(nodes, ends, strict=True)]
        return next(iter(DataLoader(each, len(each))))

    known = {
        5: [0, 0, 0, 1, 1],
        6: [0, 0, 1, 1, 1, 1],  # edges; one of the second graph's is a loop
        11: [0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1],
        10: [0, 0, 1, 1, 1, 0, 0, 0, 1, 1],  # with loops in place of its own
        7: [0] * 7,
    }
    for count, graph in known.items():
        of_batch = batch((3, 2), ([1, 2], [1, 1, 1, 0]))
        found, number = graphs_of_rows("", of_batch, torch.ones(count, 1))
        assert (found.tolist(), number) == (graph, max(graph) + 1)
    as_many = batch((3, 2), ([1], [1, 1, 1, 1]))  # five nodes, five edges
    assert graphs_of_rows("convs.0", as_many, torch.ones(5, 1))[1] == 1
    assert graphs_of_rows("layers.a:b", as_many, torch.ones(5, 1))[1] == 1
    stages = {"convs.0:message": [0, 1, 1, 1, 1], ":message_inputs": [0, 1, 1, 1, 1]}
    for stage, graph in (stages | {":aggregate": [0, 0, 0, 1, 1]}).items():
        found, number = graphs_of_rows(stage, as_many, torch.ones(5, 1))
        assert (found.tolist(), number) == (graph, 2)


def edges_through(activation):
    return EdgeConv(nn.Sequential(nn.Linear(8, 32), activation))


@pytest.mark.parametrize(
    "layer",
    [GENConv(4, 16), edges_through(nn.ReLU()), edges_through(nn.Threshold(0.05, -1e-9))],
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
    row = only(layer, plain())
    assert row["max_ratio"] == pytest.approx(max(expected), rel=1e-5)
    assert max(expected) < 100 and row["floored_rows"] == changed > 20
    words = f"; {changed} rows on a floor (a ReLU, an epsilon), compared with the median above it"
    assert row["verdict"].startswith("none") and words in row["verdict"]


def test_by_other_measures_than_the_row_ratio_zeros_are_zeros():
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    x[:, :6], x[3, 9], x[4, 12] = 0, 2500, math.nan
    table, massive = scored(x, measure="all"), is_massive_by_sun(x)
    largest = layer_ratio(x).nan_to_num().max().item()
    assert table.loc["layer", "value"] == pytest.approx(largest, rel=0.006)
    assert massive.any() and table.loc["sun", "value"] == massive.any(dim=1).sum() / 39
    assert table.loc["spread", "verdict"] == (
        "undefined: no row has a spread (1 row with NaN or infinity, 39 rows with a zero)"
    )
    nothing = scored(x * math.nan, measure="sun").loc["sun", "verdict"]
    assert nothing == "undefined: no row has a finite value (40 rows with NaN or infinity)"


def test_rows_without_a_spread_do_not_count_in_its_chance():
    x = product_of_normals(1000, 16, seed=1)
    x[5:, 0] = 0
    row = scored(x, measure="spread").loc["spread"]
    assert (row["distinct_rows"], row["rows"]) == (5, 1000)
    assert row["p_value"] == ProductNull(16).chance("spread", row["value"], 5)[1]


def test_the_largest_of_a_row_without_a_median_counts_in_its_layer():
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    x[3, :10], x[3, 12] = 0, 5000
    row = scored(x, measure="layer").loc["layer"]
    assert row["massive"] and row["share_rows_with_massive"] == pytest.approx(1 / 40)


def test_many_medians_have_no_null_and_names_may_come_one_by_one():
    loader = DataLoader([Data(x=product_of_normals(3, 8, seed=n).float()) for n in range(9)], 3)
    for over, has_level in (("graph", False), ("batch", False), ("data", True)):
        found = report(
            nn.Identity(),
            loader,
            names=(name for name in [""]),
            measure="layer",
            over=over,
            forward=lambda model, batch: model(batch.x),
        ).table
        assert found["chance_level"].notna().all() == has_level == found["p_value"].notna().all()


def test_what_is_massive_above_a_floor_or_stands_out_of_equal_channels_stays_so():
    x = torch.full((3, 8), 1e-7)
    x[0, 4:] = torch.tensor([1.0, 2.0, 3.0, 8000.0])  # 4000 times the median above the floor
    x[1, 4:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x[2] = 1.0
    x[2, 3] = 5000.0
    row = only(Scored(), [x])
    assert (row["floored_rows"], row["rows_with_massive"]) == (2, 2)
    assert row["top_channels"] == ((3, 1), (7, 1))
    assert row["max_ratio"] == pytest.approx(5000)


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
        assert found.loc[name, ["rows", "channels"]].tolist() == [len(rows), 16]
        assert found.loc[name, "max_ratio"] == pytest.approx(largest_ratio(rows))
        assert found.loc[name, "axes"] == "rows, heads, channels"


@pytest.mark.parametrize(
    ("layer", "rows", "count"),
    [
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
    seen = []
    given = lambda *about: seen.append(about) or rows(about[1])  # noqa: E731
    row = only(layer, [graph], rows=given)
    assert row["axes"] == "made by rows=" and seen[0][::2] == (layer, graph)
    with torch.no_grad(), hooks.record(layer, ":message") as seen:
        layer(graph.x, graph.edge_index)
    assert row["rows"] == count * len(seen[":message"])
    assert row["max_ratio"] >= largest_ratio(rows(seen[":message"][-1])) * (1 - 1e-6)


UNCLEAR = network(lambda self, x, labels, hints: self.score(x), score=nn.Identity())


def test_a_model_gets_what_its_parameters_name_or_the_batch():
    got = []

    def forward(self, x, edge_index, batch, batch_size, edge_attr=None, unknown=7):
        got[:] = edge_index, batch, edge_attr, batch_size, unknown
        return self.score(x)

    loader = DataLoader(graphs(), 12)
    (batch,) = loader
    model = network(forward, score=nn.Identity())
    expected = only(Scored(), [batch.x])["max_ratio"]  # a plain tensor
    assert only(model, loader)["max_ratio"] == expected
    pairs = zip(got, (batch.edge_index, batch.batch, batch.edge_attr), strict=False)
    assert all(torch.equal(*pair) for pair in pairs) and got[3:] == [12, 7]
    by_batch = network(lambda self, batch: self.score(batch.x), score=nn.Identity())
    for other in (by_batch, Scored()):  # by name: x alone
        assert only(other, loader)["max_ratio"] == expected
    given = dict(forward=lambda model, batch: model(batch.x, None, None))
    assert only(UNCLEAR, loader, **given)["max_ratio"] == expected
    data = graphs(1)[0]
    data.batch, data.batch_size = torch.zeros(6, dtype=torch.long), 2  # of a neighbor loader
    report(model, [data])
    assert got[3] == 2


def test_models_of_edges_alone_and_of_node_types_are_called_too():
    by_edges = network(  # with embeddings of its own, as LightGCN has
        lambda self, edge_index, edge_weight=None: self.conv(self.x.weight, edge_index),
        **dict(x=nn.Embedding(6, 4), conv=GCNConv(4, 4)),
    )
    assert only(by_edges, plain(1))["channels"] == 4
    data = HeteroData()
    data["a"].x, data["b"].x = torch.randn(9, 4), torch.randn(4, 4)
    data["a", "to", "b"].edge_index = torch.randint(4, (2, 10))
    data["b", "to", "a"].edge_index = torch.randint(4, (2, 7))
    to, back = SAGEConv(4, 4), GATConv(4, 4, add_self_loops=False)
    by_type = network(
        lambda self, x_dict, edge_index_dict: self.conv(x_dict, edge_index_dict),
        conv=HeteroConv({("a", "to", "b"): to, ("b", "to", "a"): back}),
    )
    assert report(by_type, [data]).table["rows"].tolist() == [10, 7]


def test_a_tied_layer_runs_several_times_and_is_named_once():
    shared = GCNConv(4, 4)
    model = nn.ModuleList([shared, shared])
    runs = dict(forward=lambda model, b: model[1](model[0](b.x, b.edge_index), b.edge_index))
    row = only(model, plain(), **runs)
    assert row["layer"] == "0:message" and row["verdict"].endswith("; runs 2 times a batch")


def test_two_reports_on_one_model_at_the_same_time_do_not_mix():
    model, loader = GAT(4, 16, 2, heads=4, dropout=0.5).train(), DataLoader(plain(40), 2)
    expected = report(model, loader).table
    with ThreadPoolExecutor(2) as threads:
        for found in threads.map(lambda _: report(model, loader).table, range(2)):
            assert found.equals(expected)
    assert all(module.training for module in model.modules())


def test_the_mask_of_an_explainer_is_not_taken_for_the_model():
    model, (graph,) = GAT(4, 4, 2), plain(1)
    expected = report(model, [graph]).table
    set_masks(model, nn.Parameter(torch.randn(15)), graph.edge_index)
    with pytest.raises(RuntimeError, match=r"'convs.0' still has the edge mask .*clear_masks\("):
        report(model, [graph])
    clear_masks(model)
    assert report(model, [graph]).table.equals(expected)


def returns(output):
    return Scored(lambda _: output), [MASSIVE], {}


INDEX = torch.ones(2, 3).long()
LINEAR = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
NESTED = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("model", "loader", "options", "error", "words"),
    [
        (GAE(GCNConv(4, 4)), plain(), {}, TypeError, r"GAE\.forward: it names no required argumen"),
        (GCNConv(4, 4), [HeteroData()], {}, TypeError, "a HeteroData does not carry x.*x_dict, b"),
        (GCNConv(4, 4), plain()[0], {}, TypeError, r"expected batches, got one Data: pass \[data"),
        (Scored(), MASSIVE, {}, TypeError, r"expected batches, got one Tensor: pass \[data\]"),
        (UNCLEAR, graphs(), {}, TypeError, "does not carry labels, hints: pass forward=lambda"),
        (None, [MASSIVE], {}, TypeError, "Module"),
        (Scored(), [MASSIVE, MASSIVE[:, :3]], {}, ValueError, "'first.score': expected 4 chan"),
        (Scored(), [], {}, ValueError, "expected batches, got an empty loader"),
        (Scored(), [MASSIVE], {"names": "first.scores"}, KeyError, r"near matches: .*first.score"),
        (Scored(), [MASSIVE], {"names": []}, ValueError, "names: expected at least one name"),
        (Scored(), [MASSIVE], {"measure": "median"}, ValueError, "one of row, layer, sun, spread,"),
        (Scored(), [MASSIVE], {"over": "edge"}, ValueError, "one of graph, batch, data, got"),
        (Scored(), [MASSIVE], {"threshold": nan}, ValueError, "a positive ratio, got nan"),
        (Scored(), iter([MASSIVE]), {"null": [Scored()]}, ValueError, r"pass list\(loader\)"),
        (Scored(), [MASSIVE], {"null": []}, ValueError, "at least one model as null"),
        (LINEAR, [torch.ones(2, 4)], {}, KeyError, "pass names=, of 0, 1"),
        (GCNConv(4, 4, decomposed_layers=2), plain(), {}, ValueError, "computed in 2 pieces.*set"),
        (*returns(NESTED), TypeError, "got a nested tensor .*pass rows=.* if it is nested"),
        (*returns(torch.ones(3)), ValueError, r"\[rows, channels\] or .* got \[3\]; name the mod"),
        (*returns(torch.ones(2, 0)), ValueError, r"got \[2, 0\]; name the module"),
        (*returns(INDEX), TypeError, "got a tensor of torch.int64"),
        (*returns((INDEX, None)), TypeError, "expected 'second.score' .* got tuple; name the mod"),
        (*returns(torch.eye(3).to_sparse()), TypeError, "a tensor of torch.float32, torch.sparse"),
        (*returns(torch.ones(2, 3, device="meta")), TypeError, "got a tensor of .* on meta; name"),
    ],
)
def test_what_cannot_be_reported_says_what_to_do(model, loader, options, error, words):
    with pytest.raises(error, match=words):
        report(model, loader, **options)


def test_a_report_is_printed_with_a_line_and_shown_with_a_bar_for_each_layer():
    model = nn.ModuleDict({"<b>": nn.Identity(), "cc": nn.Identity(), "d": nn.Identity()})
    forward = {"forward": lambda model, x: (model["<b>"](x), model["cc"](0 * x))}
    found = report(model, [MASSIVE], names=["cc", "<*"], **forward)
    first, *lines = str(found).splitlines()
    assert first == "ModuleDict: the row ratio, threshold 1,000; null: product of normals"
    verdicts = found.table["verdict"]
    assert lines == [f"<b>  {verdicts[0]}", f"cc   {verdicts[1]}"]
    page = found._repr_html_()
    assert page.startswith(f"<p>{first}</p>")
    assert page.count("<tr") == 3 and page.count("width:120px") == page.count("width:0px") == 1
    assert "<td>&lt;b&gt;</td>" in page and "<td>9e+03</td>" in page and "nan" not in page


def test_a_plot_has_a_bar_for_each_layer_its_chance_level_and_the_threshold():
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


def test_a_bar_is_shown_if_asked_for(capsys):
    for progress in (True, False):
        report(Scored(), [MASSIVE] * 3, progress=progress)
        assert ("3/3" in capsys.readouterr().err) is progress
