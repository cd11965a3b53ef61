"""One table and one verdict per layer: planted activations by hand, PyG models by recording."""

import math

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from torch import nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GAT

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


def only(found):
    """The first row of a report."""
    return found.table.iloc[0]


# The table.


def test_planted_massive_activations_by_hand():
    found = report(Scored(), [MASSIVE[:1], MASSIVE[1:]], names="first.score")
    row = only(found)
    assert len(found.table) == 1
    assert row[["layer", "rows", "channels"]].tolist() == ["first.score", 4, 4]
    assert row[["zero_medians", "nonfinite_rows"]].tolist() == [0, 0]
    assert (row["max_ratio"], row["max_abs"]) == pytest.approx((9000, 9000))
    assert row[["rows_with_massive", "share_rows_with_massive"]].tolist() == [2, 0.5]
    assert row["massive_channels"] == 2
    assert row["top_channels"] == ((3, 2), (0, 1))
    assert row["p_value"] == float(ProductNull(4).exceedance(row["max_ratio"], 4))
    assert row["verdict"] == (
        "massive: 2 of 4 channels, up to 9,000 x the median, in 50 % of rows; "
        f"p = {row['p_value']:.2g} (product of normals)"
    )


def test_a_higher_threshold_and_fewer_channels_may_be_asked_for():
    row = only(report(Scored(), [MASSIVE], top=1))
    assert row["top_channels"] == ((3, 2),)
    assert row["massive_channels"] == 2
    found = report(Scored(), [MASSIVE], threshold=5000.0)
    assert only(found)["top_channels"] == ((0, 1),)
    assert found.threshold == 5000
    row = only(report(Scored(), [MASSIVE], threshold=1e4))
    assert row["verdict"].startswith("none: up to 9,000 x the median; p = ")
    assert (row["massive_channels"], row["top_channels"]) == (0, ())


def test_layers_are_in_the_models_order_and_each_is_looked_at():
    found = report(Scored(lambda x: x.abs().sqrt()), [MASSIVE], names=["second.score", "first.*"])
    assert found.table["layer"].tolist() == ["first.score", "second.score"]
    assert found.table["max_ratio"].tolist() == pytest.approx([9000, math.sqrt(9000)])
    assert found.table["verdict"].str.startswith("massive").tolist() == [True, False]


def test_heads_are_put_side_by_side():
    flat = report(Scored(), [MASSIVE])
    beside = dict(rows=lambda module, output, batch: output.flatten(1))
    heads = report(Scored(), [MASSIVE.unflatten(1, (2, 2))], **beside)
    assert heads.table.equals(flat.table)


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
    clean = only(report(Scored(), [MASSIVE]))
    row = only(report(Scored(), [broken]))
    assert row[["rows", "zero_medians", "nonfinite_rows"]].tolist() == [8, 1, 3]
    same = ["max_ratio", "max_abs", "share_rows_with_massive", "top_channels", "p_value"]
    assert row[same].tolist() == clean[same].tolist()
    left_out = "; left out: 1 row with a zero median, 3 rows with NaN or infinity"
    assert row["verdict"] == clean["verdict"] + left_out


@pytest.mark.parametrize(
    ("x", "verdict"),
    [
        (torch.zeros(3, 4), "undefined: all medians are zero"),
        (torch.full((3, 4), math.nan), "undefined: no row is finite"),
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
    assert math.isnan(row["p_value"])
    assert row["massive_channels"] == 0


def test_a_module_that_never_runs_is_undefined():
    model = Scored()
    model.unused = nn.Identity()
    row = only(report(model, [MASSIVE], names="unused"))
    assert (row["rows"], row["channels"]) == (0, 0)
    assert row["verdict"].startswith("undefined: no rows came")


# Nulls.


def test_the_product_of_normals_is_unsurprising_under_itself():
    p = [
        only(report(Scored(), [product_of_normals(300, 32, seed=seed)]))["p_value"]
        for seed in range(60)
    ]
    # Uniform: fewer than 10 of 60 below 0.05, some below 0.5.
    assert (np.array(p) <= 0.05).sum() < 10
    assert 15 < (np.array(p) <= 0.5).sum() < 45


def test_untrained_models_as_null_give_a_p_value_by_rank():
    def scaled(power):
        return Scored(lambda x: x.abs() ** power)

    row = only(
        report(scaled(1), [MASSIVE], names="second.score", null=map(scaled, [0.1, 0.2, 0.3, 0.4]))
    )
    assert row["p_value"] == 1 / 5
    assert row["verdict"].endswith("; p = 0.2 (4 null models)")
    # Powers of at least 0.3 have a largest ratio as large: a tie and a larger one.
    found = report(scaled(0.3), [MASSIVE], names="second.score", null=map(scaled, [0.2, 0.3, 1]))
    assert only(found)["p_value"] == 3 / 4
    assert found.null == "3 null models"


def test_values_found_before_serve_as_null():
    null = {"first.score": [10.0, 20.0, 9e9], "second.score": [1.0] * 19}
    found = report(Scored(), [MASSIVE], null=null)
    assert found.table["p_value"].tolist() == [2 / 4, 1 / 20]
    assert found.table["verdict"].str.endswith("(values given)").all()
    with pytest.raises(KeyError, match=r"no values for 'second.score'; it has first.score"):
        report(Scored(), [MASSIVE], null={"first.score": [1.0]})


def test_a_null_of_models_needs_a_loader_for_each_and_at_least_one():
    with pytest.raises(ValueError, match=r"one-time list_iterator: pass list\(loader\)"):
        report(Scored(), iter([MASSIVE]), null=[Scored()])
    with pytest.raises(ValueError, match="at least one model as null"):
        report(Scored(), [MASSIVE], null=[])
    assert only(report(Scored(), iter([MASSIVE])))["rows"] == 4  # enough for the model alone


def test_wider_rows_than_the_null_knows_have_no_p_value():
    x = product_of_normals(2, 10_002)
    row = only(report(Scored(), [x]))
    assert math.isnan(row["p_value"])
    assert row["verdict"] == f"none: up to {row['max_ratio']:.3g} x the median"


def test_a_tiny_p_value_is_a_bound_in_words():
    x = product_of_normals(50, 64)
    x[0, 3] = 1e6
    row = only(report(Scored(), [x]))
    assert 0 < row["p_value"] < 1e-20
    assert row["verdict"].endswith("in 2 % of rows; p < 0.000001 (product of normals)")
    x = product_of_normals(20_000, 8).clamp(-1, 1)
    x[0, 3] = 1e6
    assert "in under 0.01 % of rows" in only(report(Scored(), [x]))["verdict"]


def test_from_a_thousand_on_a_ratio_is_written_out():
    for largest, words in ((999.0, "999"), (1000.0, "1,000"), (99.96, "100"), (12345.6, "12,346")):
        row = only(report(Scored(), [rows_of([1.0, 1.0, largest])], threshold=1e9))
        assert row["verdict"].startswith(f"none: up to {words} x the median; ")


def test_a_p_value_is_a_bound_only_below_a_millionth():
    for draws, words in ((999_999, "p = 1e-06"), (1_000_000, "p < 0.000001")):
        null = {"first.score": np.zeros(draws), "second.score": np.zeros(draws)}
        row = only(report(Scored(), [MASSIVE], null=null))
        assert row["p_value"] == 1 / (1 + draws)
        assert row["verdict"].endswith(f"; {words} (values given)")


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
        ratio = activation_ratio(rows.double())
        assert found.loc[name, "rows"] + found.loc[name, "zero_medians"] >= 12 * 15
        assert found.loc[name, "channels"] == 16
        expected = ratio[ratio.isfinite().all(dim=1)].max().item()
        assert found.loc[name, "max_ratio"] == pytest.approx(expected)


def test_outputs_of_pyg_layers_are_rows_of_nodes():
    torch.manual_seed(0)
    found = report(GAT(4, 16, 2, heads=4), DataLoader(graphs(), 5), names="convs.?")
    assert found.table["layer"].tolist() == ["convs.0", "convs.1"]
    assert found.table["rows"].tolist() == [12 * 6] * 2


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


# How a model is called.


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.score = nn.Identity()
        self.got = None

    def forward(self, x, edge_index, batch, batch_size, edge_attr=None, unknown=7):
        self.got = (edge_index, batch, batch_size, edge_attr, unknown)
        return self.score(x)


class ByBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.score = nn.Identity()

    def forward(self, batch):
        return self.score(batch.x)


class Unclear(ByName):
    def forward(self, x, labels, hints):
        return self.score(x)


def test_a_model_gets_what_its_parameters_name_or_the_batch():
    loader = DataLoader(graphs(), 12)
    batch = next(iter(loader))
    model = ByName()
    expected = only(report(Scored(), [batch.x]))["max_ratio"]
    assert only(report(model, loader))["max_ratio"] == expected
    edge_index, vector, size, edge_attr, unknown = model.got
    assert torch.equal(edge_index, batch.edge_index)
    assert torch.equal(vector, batch.batch)
    assert torch.equal(edge_attr, batch.edge_attr)
    assert (size, unknown) == (12, 7)
    assert only(report(ByBatch(), loader))["max_ratio"] == expected
    assert only(report(Scored(), loader))["max_ratio"] == expected  # by name: x alone
    assert only(report(Scored(), [batch.x]))["max_ratio"] == expected  # a plain tensor
    unclear = Unclear()
    with pytest.raises(TypeError, match="does not carry labels, hints: pass forward=lambda"):
        report(unclear, loader)
    found = report(unclear, loader, forward=lambda model, batch: model(batch.x, None, None))
    assert only(found)["max_ratio"] == expected


def test_a_seed_batch_of_a_neighbour_loader_passes_its_number_of_seeds():
    data = graphs(1)[0]
    data.batch, data.batch_size = torch.zeros(6, dtype=torch.long), 2
    model = ByName()
    report(model, [data])
    assert model.got[2] == 2


# Bad input.


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (torch.ones(3), ValueError, r"\[rows, channels\] or .* got \[3\]; name a module"),
        (torch.ones(2, 3, 4, 5), ValueError, r"got \[2, 3, 4, 5\]; name a module"),
        (torch.ones(2, 3, dtype=torch.long), TypeError, "got a tensor of torch.int64"),
        ((torch.ones(2, 3), None), TypeError, "real numbers, got tuple; name the module"),
    ],
)
def test_an_output_that_is_not_rows_of_channels_is_named(output, error, message):
    model = Scored(lambda _: output)
    with pytest.raises(error, match=f"expected 'second.score' to return.*{message}"):
        report(model, [MASSIVE])


def test_a_module_that_changes_its_width_is_named():
    with pytest.raises(ValueError, match=r"'first\.score': expected 4 channels as before, got 3"):
        report(Scored(), [MASSIVE, MASSIVE[:, :3]])


def test_an_empty_loader_is_an_error():
    with pytest.raises(ValueError, match="expected batches, got an empty loader"):
        report(Scored(), [])


def test_names_that_match_nothing_are_an_error():
    with pytest.raises(KeyError, match=r"no submodule 'first.scores'; near matches: .*first.score"):
        report(Scored(), [MASSIVE], names="first.scores")
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    with pytest.raises(KeyError, match="pass names=, of 0, 1"):
        report(plain, [torch.ones(2, 4)])
    found = report(plain, [torch.ones(2, 4)], names="0", forward=lambda model, x: model(x))
    assert only(found)["channels"] == 8


# Reading it.


def test_a_report_is_printed_with_a_line_for_each_layer():
    found = report(Scored(), [MASSIVE])
    first, *lines = str(found).splitlines()
    assert first == (
        "Scored: activations above 1,000 times the median of their row; null: product of normals"
    )
    verdicts = found.table["verdict"]
    assert lines == [f"first.score   {verdicts[0]}", f"second.score  {verdicts[1]}"]


def test_a_report_in_a_notebook_is_its_table():
    page = report(Scored(), [MASSIVE])._repr_html_()
    assert page.startswith("<p>Scored: activations above 1,000 times")
    for cell in ("first.score", "second.score", "share_rows_with_massive", "in 50 % of rows"):
        assert cell in page
    assert page.count("<tr>") + page.count("<tr ") == 3


def test_a_report_cannot_be_changed():
    with pytest.raises(AttributeError, match="cannot assign"):
        report(Scored(), [MASSIVE]).threshold = 1.0


def test_rows_are_made_of_other_outputs_by_a_function_that_sees_module_and_batch():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = nn.ModuleList([_Tuple()])

        def forward(self, x):
            return self.pair[0](x)

    class _Tuple(nn.Module):
        def forward(self, x):
            return x, None

    seen = []

    def first(module, output, batch):
        seen.append((type(module), batch))
        return output[0][:, :3]

    x = torch.tensor([[1.0, -2.0, 3000.0, 9e9], [1.0, 2.0, 4.0, 9e9]])
    with pytest.raises(TypeError, match="got tuple"):
        report(Pairs(), [x], names="pair.0")
    table = report(Pairs(), [x], names="pair.0", rows=first).table
    assert table["max_ratio"].tolist() == [pytest.approx(1500.0)]
    assert table["channels"].tolist() == [3]
    assert seen == [(_Tuple, x)]
