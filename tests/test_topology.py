"""Curvature by hand, barbells, and what goes with curvature."""

import networkx
import numpy as np
import pandas as pd
import pytest
import torch
from torch_geometric.utils import from_networkx

from studies.data import load
from studies.topology import BRIDGE, balanced_forman, barbells, ranks, topology, verdicts


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        (networkx.cycle_graph(3), 1.5),
        (networkx.cycle_graph(4), 1),
        (networkx.cycle_graph(5), 0),
        (networkx.complete_graph(6), 6 / 5),
        (networkx.hypercube_graph(3), 2 / 3),  # d = 3, two squares at either end, one each
        (networkx.complete_bipartite_graph(3, 3), 0),
        (networkx.grid_2d_graph(5, 5, periodic=True), 0),
        (networkx.star_graph(4), 0),
    ],
)
def test_curvature_of_graphs_whose_edges_are_alike(graph, expected):
    curvature = balanced_forman(from_networkx(graph))
    torch.testing.assert_close(curvature, torch.full_like(curvature, expected))


def test_a_barbell_has_one_bridge_of_negative_curvature_and_a_target_across_it():
    for graph in barbells(5, seed=1):
        bridge = graph.edge_type == BRIDGE
        assert bridge.sum() == 2 and graph.is_undirected() and not graph.has_self_loops()
        degrees = graph.edge_index[1].bincount()[graph.edge_index[:, bridge]]
        expected = 2 / degrees[0] + 2 / degrees[1] - 2
        torch.testing.assert_close(balanced_forman(graph)[bridge], expected)
        whole = networkx.Graph(graph.edge_index[:, ~bridge].t().tolist())
        signs = [
            sum(2 * graph.x[n].item() - 1 for n in p) for p in networkx.connected_components(whole)
        ]
        assert graph.y.item() == signs[0] * signs[1] / 8 and all(
            5 <= len(p) <= 10 for p in networkx.connected_components(whole)
        )


def test_ranks_within_graphs_and_bridges_by_hand():
    made = {"graph": [0, 0, 0, 1, 1, 1], "type": [1, 1, BRIDGE] * 2, "layer": 0}
    made |= {"curvature": [1.0, 2, 3, 3, 2, 1], "row": [1, 2, 4, 8, 8, 8 * np.e]}
    made["layer ratio"] = [1.0, 2, 3, 3, 1, 2]
    (row,) = ranks(pd.DataFrame(made)).to_dict("records")
    # Ties share a rank: the second graph has -sqrt(3) / 2 by the row, and 0.5 by the layer.
    assert row["row_rank"] == pytest.approx((1 - np.sqrt(3) / 2) / 2)
    assert row["layer_rank"] == pytest.approx(0.75)
    clique = np.log([1, 2, 8, 8]).mean()
    assert row["row_bridge"] == pytest.approx(np.log([4, 8 * np.e]).mean() - clique)
    without = ranks(pd.DataFrame(made | {"type": 1}))
    assert without[["row_bridge", "layer_bridge"]].isna().all(axis=None)


def test_the_study_measures_every_network_before_and_after(cache):
    small = dict(seeds=[3, 5], epochs=4, graphs=20, molecules=16, hidden=8, heads=2, layers=1)
    study = topology(load("moses"), **small, progress=False)
    assert study.runs["dataset"].tolist() == ["barbell graphs", "MOSES sample"]
    assert len(study.curves) == 2 * 2 * 2
    table = verdicts(study.curves)
    assert table.xs("MOSES sample").index.unique("measure").tolist() == ["row_rank", "layer_rank"]
    mean = study.curves.query("dataset == 'barbell graphs' and state == 'trained'").mean(
        numeric_only=True
    )
    at = ("barbell graphs", "trained", 0, "layer_bridge")
    assert table.loc[at, "change"] == pytest.approx(mean["layer_bridge"])
