"""Curves of removed bonds against hand values, and one network's ratios beside attributions."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import few_molecules
from torch import nn
from torch_geometric.data import Data
from torch_geometric.utils import scatter

from mapkg.models import build
from studies import checkpoint
from studies.__main__ import main
from studies.data import BUNDLED, molecule_graph
from studies.edge_scores import edge_importance, rank_correlation
from studies.emergence import emergence
from studies.explanations import (
    FRACTIONS,
    area,
    compare,
    curve,
    explain,
    explain_run,
    faithfulness,
    remove_massive,
    type_frequency,
)
from studies.published import CONFIGS

SHIPPED = BUNDLED / "checkpoints" / "gt_moses_seed0"
QUICK = ("ratio", "gradient x input", "AttentionExplainer", "random")


class Additive(nn.Module):
    """Predicts the sum, over the edges of a graph, of a weight per type."""

    def __init__(self, *weights):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights))

    def forward(self, x, edge_index, edge_attr, batch, batch_size):
        of_edge = self.weight[edge_attr]
        return scatter(of_edge, batch[edge_index[0]], dim_size=batch_size, reduce="sum")[:, None]


def path(*types, y=None):
    """A path whose bonds have these types."""
    bonds = [pair for i in range(len(types)) for pair in ((i, i + 1), (i + 1, i))]
    return Data(
        x=torch.zeros(len(types) + 1, dtype=torch.long),
        edge_index=torch.tensor(bonds).t().contiguous(),
        edge_attr=torch.tensor(types).repeat_interleave(2),
        y=None if y is None else torch.tensor([[y]]),
    )


def by_bond(*importance):
    return torch.tensor(importance, dtype=torch.float).repeat_interleave(2)


THIRDS = (0, 1 / 3, 2 / 3, 1)
GRAPH = path(1, 2, 3, y=200.0)
MODEL = Additive(0.0, 1.0, 10.0, 100.0)
"""Its prediction for the graph is 2 * (1 + 10 + 100)."""


@pytest.fixture(scope="module")
def splits(cache):
    return few_molecules(48, 16, 12)


@pytest.fixture(scope="module")
def shipped():
    return checkpoint.load(SHIPPED)[0]


@pytest.fixture(scope="module")
def found(shipped, splits):
    return explain(shipped, splits.test, methods=QUICK, resamples=50, progress=False)


# Curves.


@pytest.mark.parametrize(
    ("order", "prediction"),
    [("descending", [222.0, 22.0, 2.0, 0.0]), ("ascending", [222.0, 220.0, 200.0, 0.0])],
)
def test_bonds_go_in_the_order_of_their_importance(order, prediction):
    found = curve(MODEL, [GRAPH], [by_bond(0.1, 0.2, 0.3)], order=order, fractions=THIRDS)
    columns = {"graph": 0, "fraction": THIRDS, "bonds": 3, "removed": [0, 1, 2, 3]}
    expected = pd.DataFrame(columns | {"prediction": prediction})
    expected["change"] = 222 - expected["prediction"]
    expected["absolute_error"] = (200 - expected["prediction"]).abs()
    pd.testing.assert_frame_equal(found, expected)


def test_a_bond_has_the_larger_importance_of_its_directions_and_goes_with_both():
    importance = torch.tensor([0.0, 9, 5, 5, 6, 1])  # bonds 9, 5, 6
    found = curve(MODEL, [GRAPH], [importance], fractions=THIRDS)
    assert found["prediction"].tolist() == [222, 220, 20, 0]


def test_a_share_of_bonds_is_rounded_to_whole_ones_a_half_to_the_even_one():
    found = curve(MODEL, [path(1, 1, 1, 1, 1)], [by_bond(1, 2, 3, 4, 5)])
    assert found["fraction"].tolist() == list(FRACTIONS)
    assert found["removed"].tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5]
    assert found["prediction"].tolist() == [10, 10, 8, 6, 6, 6, 4, 2, 2, 2, 0]
    assert found["absolute_error"].isna().all(), "there is no target"


def test_the_best_order_of_an_additive_model_is_above_every_other_one():
    graph, fifths = path(3, 1, 4, 2, 5), [i / 5 for i in range(6)]
    model = Additive(0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
    every = [
        curve(model, [graph], [by_bond(*order)], fractions=fifths)["change"].to_numpy()
        for order in itertools.permutations(range(5))
    ]
    best = model.weight.detach()[graph.edge_attr]
    upper = curve(model, [graph], [best], fractions=fifths)["change"]
    lower = curve(model, [graph], [best], fractions=fifths, order="ascending")["change"]
    assert upper.tolist() == np.max(every, axis=0).tolist() == [0, 32, 48, 56, 60, 62]
    assert lower.tolist() == np.min(every, axis=0).tolist() == [0, 2, 6, 14, 30, 62]


def test_each_point_is_the_prediction_of_the_graph_with_the_bonds_that_are_left():
    torch.manual_seed(0)
    config = CONFIGS["GT-ZINC"].replace(hidden_channels=8, heads=2, num_layers=2)
    network = build(config).double().eval()
    smiles = ("CC(=O)OC#N", "Clc1ccccc1", "CCO", "N")
    molecules = [molecule_graph(text, y=float(i)) for i, text in enumerate(smiles)]
    importance = edge_importance(network, molecules, "random", seed=3)
    found = curve(network, molecules, importance, fractions=(0, 0.25, 0.6, 1), batch_size=3)
    for row in found.itertuples():
        graph, of_edges = molecules[row.graph], importance[row.graph].tolist()
        of_bonds = [max(of_edges[i : i + 2]) for i in range(0, len(of_edges), 2)]
        left = sorted(range(len(of_bonds)), key=of_bonds.__getitem__)
        left = left[: len(of_bonds) - round(row.fraction * len(of_bonds))]
        edges = [edge for bond in left for edge in (2 * bond, 2 * bond + 1)]
        batch = torch.zeros(graph.num_nodes, dtype=torch.long)
        with torch.no_grad():
            whole, expected = (
                network(graph.x, graph.edge_index[:, kept], graph.edge_attr[kept], batch, 1).item()
                for kept in (slice(None), torch.tensor(edges, dtype=torch.long))
            )
        assert row.removed == len(of_bonds) - len(left)
        assert row.prediction == pytest.approx(expected, rel=1e-9)
        assert row.change == pytest.approx(abs(whole - expected), abs=1e-12)
        assert row.absolute_error == pytest.approx(abs(expected - row.graph), rel=1e-9)


def test_equally_important_bonds_go_in_an_order_drawn_from_the_seed():
    model, graph = Additive(0.0, 1.0, 2.0, 4.0, 8.0, 100.0), path(1, 2, 3, 4, 5)
    importance, fifths = by_bond(1, 1, 1, 1, 2), [i / 5 for i in range(6)]

    def predictions(seed):
        found = curve(model, [graph], [importance], fractions=fifths, seed=seed)
        return found["prediction"].tolist()

    drawn = [predictions(seed) for seed in range(60)]
    assert predictions(0) == drawn[0]
    assert {values[1] for values in drawn} == {30}, "the most important one is always first"
    assert {values[2] for values in drawn} == {28, 26, 22, 14}
    assert len({tuple(values) for values in drawn}) > 15  # of 24 orders
    of_graphs = curve(model, [path(1, 2, 3, 4)] * 30, [by_bond(0, 0, 0, 0)] * 30, fractions=[0.25])
    assert set(of_graphs["change"]) == {2, 4, 8, 16}, "each graph has an order of its own"


def test_an_importance_that_has_no_order_is_an_error():
    with pytest.raises(ValueError, match="graph 0: expected an importance that can be"):
        curve(MODEL, [GRAPH], [by_bond(1, np.nan, 2)])


def curves(change, fractions=(0, 0.5, 1)):
    """Curves from a row of changes per graph."""
    change = np.array(change, dtype=float)
    graph, place = (index.ravel() for index in np.indices(change.shape))
    columns = {"graph": graph, "fraction": np.array(fractions)[place], "change": change.ravel()}
    return pd.DataFrame(columns)


def test_the_area_is_that_of_the_trapezia_and_of_the_mean_of_several_curves():
    assert area(curves([[0, 1, 4], [3, 3, 3]])).to_dict() == {0: 0.25 + 1.25, 1: 3}
    found = area(curves([[0, 1, 4]], fractions=(0, 0.2, 1)))
    assert found.to_dict() == pytest.approx({0: 0.1 + 2})
    repeated = pd.concat([curves([[0, 1, 4]]), curves([[0, 3, 0]]), curves([[3, 2, 2]])])
    assert area(repeated).to_dict() == {0: 0.5 * (1 + 2) / 2 + 0.5 * (2 + 2) / 2}


def test_methods_are_compared_by_their_mean_areas_and_on_the_same_graphs():
    by_method = {
        "random": curves([[0, 2, 4], [0, 6, 12]]),  # areas 2 and 6
        "better": curves([[1, 3, 5], [1, 7, 13]]),  # one more on each graph
    }
    found = compare(by_method).set_index("method")
    assert found["graphs"].tolist() == [2, 2]
    assert found["area"].to_dict() == {"random": 4, "better": 5}
    assert found.loc["better", ["area_low", "area_high"]].tolist() == [3, 7]
    ends = ["difference", "difference_low", "difference_high"]
    assert found[ends].T.to_dict("list") == {"random": [0] * 3, "better": [1] * 3}
    rng = np.random.default_rng(0)
    control, other = rng.exponential(size=(400, 1)), rng.exponential(size=(400, 1)) + 0.5
    many = compare({"random": curves(control + np.zeros(3)), "x": curves(other + np.zeros(3))})
    for name, values in (("area", other), ("difference", other - control)):  # the normal law
        row, half = many.iloc[1], 1.96 * values.std() / np.sqrt(400)
        assert row[f"{name}_low"] == pytest.approx(values.mean() - half, abs=0.15 * half)
        assert row[f"{name}_high"] == pytest.approx(values.mean() + half, abs=0.15 * half)


# Networks.


def test_tables_are_means_over_molecules_of_correlations_and_curves(found, shipped, splits):
    ratio, other = (
        edge_importance(shipped, splits.test, method, progress=False)
        for method in ("ratio", "gradient x input")
    )
    expected = rank_correlation(ratio, other, splits.test)
    assert list(found["correlation"]["method"]) == [m for m in QUICK if m != "ratio"]
    row = found["correlation"].set_index("method").loc["gradient x input"]
    assert row["mean"] == pytest.approx(np.nanmean(expected))
    assert (row["defined"], row["graphs"]) == (np.isfinite(expected).sum(), 12)
    assert row["low"] <= row["mean"] <= row["high"]
    expected = curve(shipped, splits.test, ratio, order="ascending")
    means = expected.groupby("fraction")[["change", "absolute_error"]].mean()
    where = "order == 'ascending' and method == 'ratio'"
    rows = found["curves"].query(where).set_index("fraction")
    pd.testing.assert_frame_equal(rows[["change", "absolute_error"]], means)
    assert rows["change"].between(rows["change_low"], rows["change_high"]).all()
    assert found["areas"].query(where)["area"].item() == pytest.approx(area(expected).mean())
    control = found["areas"].query("method == 'random'")
    assert (control[["difference", "difference_low", "difference_high"]] == 0).all(axis=None)
    grid = faithfulness(found["curves"].assign(run="A"))
    lines = {line.get_label(): line for line in grid.axes[1, 0].lines}
    np.testing.assert_array_equal(lines["ratio"].get_ydata(), rows["change"])
    with pytest.raises(ValueError, match="expected 'ratio' among them, got random"):
        explain(shipped, splits.test, methods=("random",))


def test_without_massive_activations_predictions_change_and_above_no_threshold_they_do_not(
    shipped, splits
):
    some, none = (
        remove_massive(shipped, splits.test, splits.train, threshold=threshold, resamples=20)
        for threshold in (1000.0, 1e9)
    )
    assert len(some) == 3 * 3
    assert (none[["changed", "loss_change", "shift"]] == 0).all(axis=None)
    massive = some.query("what == 'massive'")
    assert (massive["changed"] > 1000).all() and (massive["loss_change_low"] > 0).all()


def test_a_run_is_explained_by_the_command(splits, tmp_path, monkeypatch):
    config = CONFIGS["SAN-ZINC"].replace(
        hidden_channels=16, heads=4, num_layers=2, batch_size=16, max_epochs=1
    )
    folder = tmp_path / "run"
    emergence(config, splits, seed=2, name="SAN-ZINC", folder=folder, progress=False)
    found = explain_run(folder, splits, graphs=4, resamples=10, progress=False)
    assert set(found) == {"correlation", "curves", "areas", "interventions"}
    for table in found.values():
        assert (table["seed"] == 2).all() and (table["config"] == "SAN-ZINC").all()
    assert {"GNNExplainer", "frequency"} <= {*found["correlation"]["method"]}
    monkeypatch.setattr("studies.commands.load", lambda name: splits)
    output = tmp_path / "explain_x"
    arguments = [
        "study",
        "explain",
        str(folder),
        "--dataset",
        "moses",
        "--graphs",
        "4",
        "-o",
        str(output),
    ]
    assert main(arguments) == 0
    written = pd.read_csv(f"{output}_areas.csv.gz")["area"]
    assert written.to_list() == pytest.approx(found["areas"]["area"].to_list(), rel=1e-4)


def test_frequency_counts_training_edges_of_the_same_types(splits):
    found = type_frequency(splits.train, splits.test)
    assert [len(counts) for counts in found] == [graph.num_edges for graph in splits.test]
    for graph, counts in zip(splits.test[:2], found, strict=False):
        for edge, (source, target) in enumerate(graph.edge_index.t().tolist()):
            expected = sum(
                int(
                    (
                        (other.x[other.edge_index[0]] == graph.x[source])
                        & (other.x[other.edge_index[1]] == graph.x[target])
                        & (other.edge_attr == graph.edge_attr[edge])
                    ).sum()
                )
                for other in splits.train
            )
            assert counts[edge] == expected
    nothing = type_frequency(splits.train[:1], [graph for graph in splits.test if 6 in graph.x])
    assert min(float(counts.min()) for counts in nothing) == 0
