"""Shares, enrichment, intervals and tests of massive edges by label, and the heat map."""

import numpy as np
import pandas as pd
import pytest
import torch
from random_graphs import path
from scipy import stats
from torch_geometric.data import Data

from mapkg.attribution import THRESHOLDS, attribute, heat_map
from mapkg.hooks import record
from mapkg.measures import activation_ratio
from mapkg.models import build
from studies.data import molecule_graph
from studies.published import CONFIGS

SMALL = CONFIGS["GT-ZINC"].replace(hidden_channels=16, heads=4, num_layers=2)


def attributed(molecules, massive, **options):
    """The table of molecules with these labels of their bonds."""
    graphs = [path(*molecule) for molecule in molecules]
    labels = [graph.edge_attr for graph in graphs]
    return attribute(graphs, labels, ("a", "b", "c"), massive, **options)


def rows_of(table, label):
    return table[table["label"] == label].iloc[0]


def test_shares_and_enrichment_are_those_counted_by_hand():
    # Massive: both directions of the first bond of either molecule, one of a bond of type b.
    massive = np.array([[1, 1, 0, 0, 1, 0, 1, 1, 0, 0]], dtype=bool)
    table = attributed([[0, 0, 1], [0, 1]], massive, resamples=50, permutations=50)
    a, b, c = (rows_of(table, name) for name in "abc")
    assert (a["edges"], a["graphs"], a["massive_edges"]) == (6, 2, 4)
    assert (b["edges"], b["graphs"], b["massive_edges"]) == (4, 2, 1)
    assert a["share"] == pytest.approx(4 / 6)
    assert b["share"] == pytest.approx(1 / 4)
    assert a["enrichment"] == pytest.approx((4 / 5) / (6 / 10))
    assert b["enrichment"] == pytest.approx((1 / 5) / (4 / 10))
    assert (c["edges"], c["graphs"]) == (0, 0)
    assert np.isnan([c["share"], c["enrichment"], c["share_low"], c["share_bound"]]).all()


def test_the_bound_of_a_share_is_the_exact_one_of_as_many_graphs():
    hits = np.zeros((3, 240), dtype=bool)
    hits[1, [2, 3, 6]] = hits[2] = True  # bonds of type b, in two graphs; all
    table = attributed([[0, 1]] * 60, hits, resamples=5, permutations=5)
    none, two, every = table[table["label"] == "b"]["share_bound"]
    assert every == 1
    assert none == pytest.approx(1 - 0.05 ** (1 / 60))
    # With this share of graphs, two hits or fewer have a probability of 5 %.
    assert stats.binom.cdf(2, 60, two) == pytest.approx(0.05)


def test_the_interval_is_that_of_a_bootstrap_over_graphs():
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 6, size=40)
    # All edges of a graph are massive or none: graphs, not edges, are the draws.
    whole = rng.random(40) < 0.4
    massive = np.repeat(whole, 2 * sizes)[None]
    found = attributed([[0] * n for n in sizes], massive, resamples=4000, permutations=1).iloc[0]

    def share(index):
        return (whole * sizes)[index].sum() / sizes[index].sum()

    expected = stats.bootstrap(
        (np.arange(40),), share, vectorized=False, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found["share_low"] == pytest.approx(expected.low, abs=0.015)
    assert found["share_high"] == pytest.approx(expected.high, abs=0.015)
    assert (found["enrichment_low"], found["enrichment_high"]) == (1, 1), "there is one label"
    for sizes in ([0] * 9 + [1, 2, 3], [1, 0, 2, 3] + [0] * 8):  # graphs without edges, anywhere
        massive, options = np.arange(12)[None] < 4, dict(resamples=200, permutations=1)
        rows = [
            attributed([[0] * n for n in each], massive, **options) for each in (sizes, [1, 2, 3])
        ]
        pd.testing.assert_frame_equal(*rows)
    of_one = attributed([[0, 0, 1]], np.arange(6)[None] < 2, resamples=50, permutations=50)
    ends = [f"{value}_{end}" for value in ("share", "enrichment") for end in ("low", "high")]
    assert of_one[ends].isna().all(axis=None) and of_one["share"].tolist()[:2] == [0.5, 0]


PATH = path(0, 0, 0).edge_index
BONDS = {
    # Four bonds, one of type b, and only that one is massive: one deal in four does that. The
    # massive edges of b are 2 with probability 1/4 and 0 else, 0.5 on average: only the 2 of
    # the observation is as far from it.
    "both ways": (path(0, 0, 0, 0).edge_index, [1, 1, 0, 0, 0, 0, 0, 0], [0, 1], 1 / 4),
    # One of three bonds has the labels b there and c back. Only its way there is massive: the
    # massive edge has the label b in one deal of three, and never c.
    "two labels": (PATH, [0, 0, 0, 0, 1, 2], [4], 1 / 3),
    # Edges without their reverse have one label each.
    "one way": (torch.tensor([[1, 1, 2], [0, 2, 0]]), [0, 1, 0], [1], 1 / 3),
}


@pytest.mark.parametrize(("edge_index", "labels", "places", "p"), BONDS.values(), ids=BONDS)
def test_the_permutation_test_gives_the_exact_p_value_of_one_molecule(
    edge_index, labels, places, p
):
    massive, of = np.isin(np.arange(len(labels)), places)[None], [torch.tensor(labels)]
    graphs, draws = [Data(edge_index=edge_index)], dict(resamples=1, permutations=4000)
    table = attribute(graphs, of, ("a", "b", "c"), massive, **draws)
    for label, expected in (("a", p), ("b", p), ("c", 1)):
        assert rows_of(table, label)["p_value"] == pytest.approx(expected, abs=0.03)


def test_types_are_dealt_out_within_molecules_only():
    # Massive edges are all those of one molecule, or none: no deal changes a count.
    massive = np.array([[1] * 8 + [0] * 6, [0] * 14], dtype=bool)
    table = attributed([[0, 0, 1, 1], [0, 1, 1]], massive, resamples=20, permutations=100)
    assert (table["p_value"] == 1).all()
    none = table[(table["column"] == 1) & (table["label"] != "c")]
    assert (none[["share", "share_low", "share_high"]] == 0).all(axis=None)
    assert none["enrichment"].isna().all()


def test_bad_labels_are_refused():
    graph = path(0, 1)
    labels = graph.edge_attr
    empty = Data(edge_index=torch.empty(2, 0, dtype=torch.long))
    twice = Data(edge_index=graph.edge_index.repeat(1, 2))
    both, none = torch.cat([labels, 1 - labels]), empty.edge_index[0]
    for of, label, names, edges, words in (
        (graph, labels[:3], "ab", 4, "each of the 4 edges of graph 0, from 0 to 1, got 3"),
        (graph, labels, "a", 4, r"from 0 to 0, got 4, among them \[0, 1\]"),
        (graph, labels - 1, "ab", 4, r"from 0 to 1, got 4, among them \[-1, 0\]"),
        (empty, none, "a", 0, "there is no edge"),
        (twice, both, "ab", 8, "to another to have the same label"),
        (graph, labels, "ab", 5, r"expected 4 edges in each of its rows, got \(1, 5\)"),
    ):
        with pytest.raises(ValueError, match=words):
            attribute([of], [label], tuple(names), np.ones((1, edges), dtype=bool))
    massive = torch.ones(1, 4, dtype=torch.bool)
    for given, words in (
        (([], [], "a", massive), "there is no edge"),
        (([graph], [labels], "ab", massive, 0), "resamples: expected 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            attribute(*given[:4], **dict(zip(["resamples"], given[4:], strict=False)))
    with pytest.raises(ValueError, match="from 0 to 0, got 4, among them"):
        heat_map(build(SMALL), [graph], [labels], 1)


def test_the_heat_map_is_the_one_of_a_loop_over_edges():
    smiles = ("CC#N", "CCO", "c1ccccc1O", "CC(=O)NC", "N#CCCCl", "C1CCCC1F")
    graphs = [molecule_graph(text) for text in smiles]
    labels = [graph.edge_type - 1 for graph in graphs]
    torch.manual_seed(0)
    model = build(SMALL).eval()
    thresholds = (2.0, 20.0)
    found = heat_map(model, graphs, labels, 4, thresholds=thresholds)
    assert THRESHOLDS == (1000, 3000, 4000), "as published"
    counts, edges = np.zeros((2, 2, 4, 16)), np.zeros(4)
    for graph, label in zip(graphs, labels, strict=True):
        with torch.no_grad(), record(model, "layers.*.score") as seen:
            model(graph.x, graph.edge_index, graph.edge_attr)
        edges += np.bincount(label, minlength=4)
        for layer in range(2):
            ratio = activation_ratio(seen[f"layers.{layer}.attention.score"][0]).numpy()
            for row, of_edge in zip(ratio, label.tolist(), strict=True):
                for index, threshold in enumerate(thresholds):
                    counts[layer, index, of_edge] += row > threshold
    assert edges[3] == 0
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found, counts / edges[:, None], atol=1e-12)
    assert found[0, 0, 0].max() > 0
