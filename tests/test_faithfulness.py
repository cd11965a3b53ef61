"""Deletion and insertion curves: an additive model whose best order is known, and real networks."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch_geometric.data import Data
from torch_geometric.utils import scatter

from mapkg.models import build
from studies.data import molecule_graph
from studies.edge_scores import edge_importance
from studies.faithfulness import FRACTIONS, area, compare, curve
from studies.published import CONFIGS


class Additive(nn.Module):
    """Predicts the sum, over the edges of a graph, of a weight per type."""

    def __init__(self, *weights):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights))

    def forward(self, x, edge_index, edge_attr, batch, batch_size):
        of_edge = self.weight[edge_attr]
        total = scatter(of_edge, batch[edge_index[0]], dim_size=batch_size, reduce="sum")
        return torch.stack([total, -2 * total], dim=1)


def path(*types, y=None):
    """A path whose bonds have these types."""
    bonds = [pair for i in range(len(types)) for pair in ((i, i + 1), (i + 1, i))]
    return Data(
        x=torch.zeros(len(types) + 1, dtype=torch.long),
        edge_index=torch.tensor(bonds).t().contiguous(),
        edge_attr=torch.tensor(types).repeat_interleave(2),
        y=None if y is None else torch.tensor([y]),
    )


def by_bond(*importance):
    return torch.tensor(importance, dtype=torch.float).repeat_interleave(2)


def by_weight(model, graphs):
    return [model.weight.detach()[graph.edge_attr] for graph in graphs]


THIRDS = (0, 1 / 3, 2 / 3, 1)
GRAPH = path(1, 2, 3, y=[200.0, 0.0])
MODEL = Additive(0.0, 1.0, 10.0, 100.0)
"""Its prediction for the graph is 2 * (1 + 10 + 100)."""


@pytest.fixture(scope="module")
def molecules():
    smiles = ("CC(=O)OC#N", "Clc1ccccc1", "C#CCN", "CC(C)(C)F", "CCO")
    return [molecule_graph(text, y=float(i)) for i, text in enumerate(smiles)]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    small = dict(hidden_channels=8, heads=2, num_layers=2)
    return build(CONFIGS["GT-ZINC"].replace(**small)).double().eval()


@pytest.fixture(scope="module")
def importance(network, molecules):
    """An importance without ties."""
    return edge_importance(network, molecules, "random", seed=3)


# Hand values.


@pytest.mark.parametrize(
    ("mode", "order", "removed", "prediction"),
    [
        ("deletion", "descending", [0, 1, 2, 3], [222, 22, 2, 0]),
        ("deletion", "ascending", [0, 1, 2, 3], [222, 220, 200, 0]),
        ("insertion", "descending", [3, 2, 1, 0], [0, 200, 220, 222]),
        ("insertion", "ascending", [3, 2, 1, 0], [0, 2, 22, 222]),
    ],
)
def test_bonds_go_and_come_in_the_order_of_their_importance(mode, order, removed, prediction):
    importance = by_bond(0.1, 0.2, 0.3)
    found = curve(MODEL, [GRAPH], [importance], mode=mode, order=order, fractions=THIRDS)
    expected = pd.DataFrame(
        {
            "graph": 0,
            "fraction": THIRDS,
            "bonds": 3,
            "removed": removed,
            "prediction": np.array(prediction, dtype=float),
            "change": 222 - np.array(prediction, dtype=float),
            "absolute_error": np.abs(200 - np.array(prediction, dtype=float)),
        }
    )
    pd.testing.assert_frame_equal(found, expected)


def test_a_bond_has_the_larger_importance_of_its_directions_and_goes_with_both():
    importance = torch.tensor([0.0, 9, 5, 5, 6, 1])  # bonds 9, 5, 6
    found = curve(MODEL, [GRAPH], [importance], fractions=THIRDS)
    assert found["prediction"].tolist() == [222, 220, 20, 0]


def test_another_target_is_compared_with_its_own_values():
    found = curve(MODEL, [GRAPH], [by_bond(1, 2, 3)], fractions=THIRDS, target=1)
    assert found["prediction"].tolist() == [-444, -44, -4, 0]
    assert found["change"].tolist() == [0, 400, 440, 444]
    assert found["absolute_error"].tolist() == [444, 44, 4, 0]


def test_a_share_of_bonds_is_rounded_to_whole_ones_a_half_to_the_even_one():
    graph = path(1, 1, 1, 1, 1)
    found = curve(MODEL, [graph], [by_bond(1, 2, 3, 4, 5)])
    assert found["fraction"].tolist() == list(FRACTIONS)
    assert found["removed"].tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5]
    assert found["prediction"].tolist() == [10, 10, 8, 6, 6, 6, 4, 2, 2, 2, 0]


def test_without_a_target_there_is_no_error_of_it():
    found = curve(MODEL, [path(1, 2)], [by_bond(1, 2)])
    assert found["absolute_error"].isna().all()
    assert found["change"].notna().all()


def test_the_best_order_of_an_additive_model_is_above_every_other_one():
    graph, fifths = path(3, 1, 4, 2, 5), [i / 5 for i in range(6)]
    model = Additive(0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
    every = [
        curve(model, [graph], [by_bond(*order)], fractions=fifths)["change"].to_numpy()
        for order in itertools.permutations(range(5))
    ]
    (best,) = by_weight(model, [graph])
    upper = curve(model, [graph], [best], fractions=fifths)["change"]
    lower = curve(model, [graph], [best], fractions=fifths, order="ascending")["change"]
    assert upper.tolist() == np.max(every, axis=0).tolist() == [0, 32, 48, 56, 60, 62]
    assert lower.tolist() == np.min(every, axis=0).tolist() == [0, 2, 6, 14, 30, 62]


def test_a_random_order_lies_between_the_best_and_the_worst():
    model = Additive(0.0, 1.0, 3.0, 9.0)
    generator = torch.Generator().manual_seed(0)
    graphs = [path(*torch.randint(1, 4, (12,), generator=generator).tolist()) for _ in range(20)]
    best = by_weight(model, graphs)
    random = [torch.rand(graph.num_edges, generator=generator) for graph in graphs]
    upper, lower, between = (
        curve(model, graphs, best),
        curve(model, graphs, best, order="ascending"),
        curve(model, graphs, random),
    )
    assert (lower["change"] <= between["change"]).all()
    assert (between["change"] <= upper["change"]).all()
    assert (area(lower) < area(between)).all()
    assert (area(between) < area(upper)).all()


# Real networks.


@pytest.mark.parametrize("order", ["descending", "ascending"])
def test_the_ends_of_both_curves_are_the_whole_graph_and_its_atoms(
    order, network, molecules, importance
):
    ends = {
        mode: curve(
            network, molecules, importance, mode=mode, order=order, fractions=(0, 1)
        ).set_index(["fraction", "graph"])
        for mode in ("deletion", "insertion")
    }
    for index, graph in enumerate(molecules):
        batch = torch.zeros(graph.num_nodes, dtype=torch.long)
        with torch.no_grad():
            whole = network(graph.x, graph.edge_index, graph.edge_attr, batch, 1).item()
            none = torch.empty(2, 0, dtype=torch.long), torch.empty(0, dtype=torch.long)
            atoms = network(graph.x, *none, batch, 1).item()
        assert abs(whole - atoms) > 1e-3
        for mode, places in (("deletion", (0, 1)), ("insertion", (1, 0))):
            full, empty = (ends[mode].loc[(place, index)] for place in places)
            assert full["prediction"] == pytest.approx(whole, rel=1e-9)
            assert full["change"] == pytest.approx(0, abs=1e-12)
            assert full["absolute_error"] == pytest.approx(abs(whole - index), rel=1e-9)
            assert empty["prediction"] == pytest.approx(atoms, rel=1e-9)
            assert empty["change"] == pytest.approx(abs(whole - atoms), rel=1e-9)
            assert (full["removed"], empty["removed"]) == (0, graph.num_edges // 2)


def test_each_point_is_the_prediction_of_the_graph_with_the_bonds_that_are_left(
    network, molecules, importance
):
    found = curve(network, molecules, importance, fractions=(0.25, 0.6))
    for row in found.itertuples():
        graph, of_edges = molecules[row.graph], importance[row.graph].tolist()
        of_bonds = [max(of_edges[i : i + 2]) for i in range(0, len(of_edges), 2)]
        left = sorted(range(len(of_bonds)), key=of_bonds.__getitem__)
        left = left[: len(of_bonds) - round(row.fraction * len(of_bonds))]
        edges = [edge for bond in left for edge in (2 * bond, 2 * bond + 1)]
        with torch.no_grad():
            expected = network(
                graph.x,
                graph.edge_index[:, edges],
                graph.edge_attr[edges],
                torch.zeros(graph.num_nodes, dtype=torch.long),
                1,
            ).item()
        assert row.removed == len(of_bonds) - len(left)
        assert row.prediction == pytest.approx(expected, rel=1e-9)


def test_to_add_the_first_bonds_is_to_remove_the_last_ones(network, molecules, importance):
    for graph, of_edges in zip(molecules, importance, strict=True):
        bonds = graph.num_edges // 2
        steps = [k / bonds for k in range(bonds + 1)]
        added = curve(network, [graph], [of_edges], mode="insertion", fractions=steps)
        removed = curve(network, [graph], [of_edges], order="ascending", fractions=steps)
        np.testing.assert_allclose(added["prediction"], removed["prediction"][::-1], rtol=1e-9)


@pytest.mark.parametrize("mode", ["deletion", "insertion"])
def test_curves_do_not_depend_on_the_batch_size_or_on_the_other_graphs(
    mode, network, molecules, importance
):
    expected = curve(network, molecules, importance, mode=mode)
    for size in (1, 7):
        found = curve(network, molecules, importance, mode=mode, batch_size=size)
        pd.testing.assert_frame_equal(found, expected, rtol=1e-9, atol=1e-12)
    (last,) = curve(network, molecules[-1:], importance[-1:], mode=mode).groupby("graph")
    expected = expected[expected["graph"] == len(molecules) - 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        last[1].drop(columns=["graph", "absolute_error"]),
        expected.drop(columns=["graph", "absolute_error"]),
        rtol=1e-9,
        atol=1e-12,
    )


def test_a_graph_without_bonds_never_changes(network):
    atom = molecule_graph("N", y=1.0)
    found = curve(network, [atom], [torch.empty(0)])
    assert (found["bonds"] == 0).all()
    assert (found["removed"] == 0).all()
    assert found["change"].tolist() == pytest.approx([0] * len(FRACTIONS), abs=1e-12)


# Ties.


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


def test_graphs_with_the_same_ties_get_different_orders():
    model, graph = Additive(0.0, 1.0, 2.0, 4.0, 8.0), path(1, 2, 3, 4)
    found = curve(model, [graph] * 30, [by_bond(0, 0, 0, 0)] * 30, fractions=(0.25,))
    assert set(found["change"]) == {2, 4, 8, 16}


# Areas.


def curves(change, fractions=(0, 0.5, 1)):
    """Curves from a row of changes per graph."""
    change = np.array(change, dtype=float)
    graph, place = np.indices(change.shape)
    return pd.DataFrame(
        {
            "graph": graph.ravel(),
            "fraction": np.array(fractions)[place.ravel()],
            "change": change.ravel(),
            "absolute_error": 2 * change.ravel(),
        }
    )


def test_the_area_is_that_of_the_trapezia():
    found = area(curves([[0, 1, 4], [3, 3, 3]], fractions=(0, 0.5, 1)))
    assert found.to_dict() == {0: 0.25 + 1.25, 1: 3}
    found = area(curves([[0, 1, 4]], fractions=(0, 0.2, 1)))
    assert found.to_dict() == pytest.approx({0: 0.1 + 2})
    shuffled = curves([[0, 1, 4], [3, 3, 3]]).sample(frac=1, random_state=0)
    assert area(shuffled, "absolute_error").to_dict() == {0: 3, 1: 6}


def test_several_curves_of_a_graph_are_averaged():
    repeated = pd.concat([curves([[0, 1, 4]]), curves([[0, 3, 0]]), curves([[3, 2, 2]])])
    assert area(repeated).to_dict() == {0: 0.5 * (1 + 2) / 2 + 0.5 * (2 + 2) / 2}


def test_methods_are_compared_by_their_mean_areas_and_on_the_same_graphs():
    found = compare(
        {
            "random": curves([[0, 2, 4], [0, 6, 12]]),  # areas 2 and 6
            "better": curves([[1, 3, 5], [1, 7, 13]]),  # one more on each graph
        }
    ).set_index("method")
    assert found["graphs"].tolist() == [2, 2]
    assert found["area"].to_dict() == {"random": 4, "better": 5}
    assert found.loc["better", ["area_low", "area_high"]].tolist() == [3, 7]
    assert (
        found.loc["better", ["difference", "difference_low", "difference_high"]].tolist() == [1] * 3
    )
    assert (
        found.loc["random", ["difference", "difference_low", "difference_high"]].tolist() == [0] * 3
    )


def test_intervals_are_those_of_the_normal_law_for_many_graphs():
    rng = np.random.default_rng(0)
    control, other = rng.exponential(size=(400, 1)), rng.exponential(size=(400, 1)) + 0.5
    by_method = {"none": curves(control + np.zeros(3)), "some": curves(other + np.zeros(3))}
    found = compare(by_method, control="none", seed=4).set_index("method").loc["some"]
    for name, values in (("area", other), ("difference", other - control)):
        half = 1.96 * values.std() / np.sqrt(400)
        assert found[name] == pytest.approx(values.mean())
        assert found[f"{name}_low"] == pytest.approx(values.mean() - half, abs=0.15 * half)
        assert found[f"{name}_high"] == pytest.approx(values.mean() + half, abs=0.15 * half)
    again = compare(by_method, control="none", seed=4).set_index("method").loc["some"]
    pd.testing.assert_series_equal(again, found)
    other_seed = compare(by_method, control="none", seed=5).set_index("method").loc["some"]
    assert other_seed["area_low"] != found["area_low"]


# Bad input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "removal"}, r"mode: expected one of \('deletion', 'insertion'\), got 'removal'"),
        ({"order": "random"}, r"order: expected one of \('descending', 'ascending'\)"),
        ({"fractions": ()}, r"fractions: expected shares in \[0, 1\], got \(\)"),
        ({"fractions": (0, 1.1)}, r"shares in \[0, 1\], got \(0, 1.1\)"),
        ({"fractions": (-0.1, 1)}, r"shares in \[0, 1\], got \(-0.1, 1\)"),
        ({"fractions": (math.nan,)}, r"shares in \[0, 1\], got \(nan,\)"),
        ({"graphs": [], "importance": []}, "at least one graph .* got 0 graphs"),
        ({"importance": []}, "importance for each, got 1 graphs and 0 importances"),
        ({"importance": [by_bond(1, 2)]}, "importance for each of 6 edges, got 4"),
        ({"importance": [by_bond(1, math.nan, 2)]}, "graph 0: expected an importance that can be"),
    ],
)
def test_bad_input_is_an_error(changes, message):
    arguments = {"graphs": [GRAPH], "importance": [by_bond(1, 2, 3)]} | changes
    with pytest.raises(ValueError, match=message):
        curve(MODEL, **arguments)


def test_curves_with_different_fractions_have_no_areas():
    different = pd.concat([curves([[0, 1, 2]]), curves([[0, 1, 2]], (0, 0.4, 1)).assign(graph=1)])
    with pytest.raises(ValueError, match="6 different rows of 2 graphs and 4 fractions"):
        area(different)
    with pytest.raises(ValueError, match="two fractions or more"):
        area(curves([[1], [2]], fractions=(0,)))


def test_a_comparison_needs_its_control_and_the_same_graphs():
    some = curves([[0, 1, 2], [0, 2, 3]])
    with pytest.raises(ValueError, match="control 'random' among the methods, got 'a', 'b'"):
        compare({"a": some, "b": some})
    with pytest.raises(ValueError, match="'a' and 'random': expected curves of the same graphs"):
        compare({"random": some, "a": some.assign(graph=some["graph"] + 1)})
    with pytest.raises(ValueError, match="at least two graphs, got 1"):
        compare({"random": curves([[0, 1, 2]])})
