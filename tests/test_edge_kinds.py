"""Kinds of edges: labels of bonds by hand, and the first layer against the network it is of."""

import math
from collections import Counter
from dataclasses import replace

import networkx
import numpy as np
import pandas as pd
import pytest
import torch
from rdkit import Chem
from torch_geometric.data import Data
from torch_geometric.utils import from_smiles

from mapkg.hooks import record
from studies import checkpoint
from studies import edge_kinds as study
from studies.bond_changes import join_global_node, shuffle_types
from studies.data import BUNDLED, DESCRIPTIONS, Splits, molecule_graph
from studies.data.graph_classification import PAIR_TYPES
from studies.data.molecules import benchmark_graph
from studies.extras import build
from studies.published import CONFIGS
from studies.train import seed_all

ABOUT = DESCRIPTIONS["moses"]
IN_COLUMNS = replace(
    ABOUT,
    title="atoms in columns",
    num_node_types=(119, 9, 11, 12, 9, 5, 8, 2, 2),
    num_edge_types=(22, 6, 2),
    edge_types={1: "single", 2: "double", 3: "triple", 12: "aromatic"},
)
NO_RING, RING_5, RING_6, OTHER_RING = study.RINGS
PLAIN, CONJUGATED = study.CONJUGATION


def named(smiles, by, about=ABOUT, graph=None):
    """The label of each bond of a molecule, by its atoms, lower index first."""
    graph = molecule_graph(smiles) if graph is None else graph
    (labels,), names = study.edge_labels([graph], by, about)
    of_bond = {}
    for j, i, label in zip(*graph.edge_index.tolist(), labels.tolist(), strict=True):
        of_bond.setdefault((min(i, j), max(i, j)), []).append(names[label])
    assert all(len(both) == 2 and len(set(both)) == 1 for both in of_bond.values())
    return {bond: both[0] for bond, both in of_bond.items()}


def in_columns(smiles):
    graph = from_smiles(smiles)
    graph.edge_type = graph.edge_attr[:, 0]
    return graph


def test_the_bonds_of_aniline_and_of_an_amide_by_hand():
    ring = [(1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (1, 6)]
    # The nitrogen of aniline is conjugated with its ring and not in it.
    assert named("Nc1ccccc1", "ring") == {(0, 1): NO_RING, **dict.fromkeys(ring, RING_6)}
    assert set(named("Nc1ccccc1", "conjugation").values()) == {CONJUGATED}
    # So is the middle of an amide, and its ends are not.
    ends = {(0, 1): PLAIN, (1, 2): CONJUGATED, (1, 3): CONJUGATED, (3, 4): PLAIN}
    assert named("CC(=O)NC", "conjugation") == ends
    # Carbon comes first; charge and hydrogens are no part of the element.
    pairs = {(0, 1): "C–Cl", (1, 2): "C–Br", (1, 3): "C–N", (3, 4): "N–O"}
    assert named("ClC(Br)=NO", "atom pair") == pairs
    pairs = {(0, 1): "C–N", (1, 2): "C–N", (2, 3): "C–C", (3, 4): "C–O"}
    assert named("C[NH2+]CC[O-]", "atom pair") == pairs


def test_the_smallest_ring_of_a_bond_is_the_shortest_way_around(splits):
    norbornane, cyclobutane, indane = "C1CC2CCC1C2", "C1CCC1", "c1ccc2CCCc2c1"
    several = map(molecule_graph, (norbornane, cyclobutane, indane, "C1CCCC1C1CCCCC1"))
    graphs = [*several, *splits.train]
    labels, names = study.edge_labels(graphs, "ring", ABOUT)
    size = {5: RING_5, 6: RING_6}
    for graph, of_graph in zip(graphs, labels, strict=True):
        bonds = networkx.Graph(graph.edge_index.t().tolist())
        for j, i, label in zip(*graph.edge_index.tolist(), of_graph.tolist(), strict=True):
            without, around = networkx.restricted_view(bonds, [], [(i, j)]), NO_RING
            if networkx.has_path(without, i, j):
                length = networkx.shortest_path_length(without, i, j) + 1
                around = size.get(length, OTHER_RING)
            assert names[label] == around


@pytest.mark.parametrize("by", ["atom pair", "ring", "conjugation"])
def test_labels_are_of_the_molecule_however_its_graph_is_written(by):
    smiles = "Clc1ccc(CC2CCCN2)cc1C#N"
    graph, expected = molecule_graph(smiles), named(smiles, by)
    assert named(smiles, by, IN_COLUMNS, in_columns(smiles)) == expected
    shuffled = shuffle_types(Splits([graph], [], [], ABOUT), 0).train[0]
    assert named(smiles, by, graph=shuffled) == expected
    # The benchmark writes its SMILES from the ids, with the atoms in an order of its own.
    bonds = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.long)
    bonds[graph.edge_index[0], graph.edge_index[1]] = graph.edge_type
    raw = {"atom_type": graph.x, "bond_type": bonds, "logP_SA_cycle_normalized": torch.zeros(1)}
    benchmark = benchmark_graph(raw)
    assert Chem.MolFromSmiles(benchmark.smiles).GetAtomWithIdx(0).GetSymbol() != "Cl"
    assert named(smiles, by, graph=benchmark) == expected


def test_frequent_pairs_come_first_and_those_below_a_hundredth_are_put_together():
    graphs = [molecule_graph(smiles) for smiles in ("CO", *["CCCC"] * 32, "CO", "CN", "CF")]
    labels, names = study.edge_labels(graphs, "atom pair", ABOUT)
    assert names == ("C–C", "C–O", "C–F", "C–N")  # of 100 bonds one is not rare
    assert torch.cat([labels[0], *labels[-3:]]).tolist() == [1, 1, 1, 1, 3, 3, 2, 2]
    labels, names = study.edge_labels([*graphs, graphs[0]], "atom pair", ABOUT)
    assert names == ("C–C", "C–O", "other")
    assert torch.cat(labels[-4:]).tolist() == [1, 1, 2, 2, 2, 2, 1, 1]


def test_types_are_labeled_in_the_order_of_their_ids_whatever_the_first_id_is():
    labels, names = study.edge_labels([in_columns("C#Cc1ccccc1")], "type", IN_COLUMNS)
    assert names == ("single", "double", "triple", "aromatic")
    assert Counter(labels[0].tolist()) == {0: 2, 2: 2, 3: 12}
    about = replace(ABOUT, num_node_types=3, edge_types=PAIR_TYPES)
    protein = Data(edge_index=torch.tensor([[0, 1], [1, 0]]), edge_type=torch.tensor([0, 4]))
    labels, names = study.edge_labels([protein], "type", about)
    assert labels[0].tolist() == [0, 4] and names == tuple(PAIR_TYPES.values())
    for by in study.PROPERTIES:
        labels, _ = study.edge_labels([molecule_graph("C"), molecule_graph("CC")], by, ABOUT)
        assert [of_graph.shape for of_graph in labels] == [(0,), (2,)]
        assert {of_graph.dtype for of_graph in labels} == {torch.long}


@pytest.mark.parametrize("ids", [(4, 5), (3, 3), (2, 3)])
def test_edges_of_a_global_node_are_told_apart_from_bonds_of_the_same_type(ids):
    graphs = [molecule_graph("C#CC=O")]
    joined = join_global_node(Splits(graphs, graphs, graphs, ABOUT), edge_types=ids)
    (labels,), names = study.edge_labels(joined.test, "role", joined.description)
    assert names == ("single", "double", "triple", "atom to global", "global to atom")
    assert labels.bincount().tolist() == [2, 2, 2, 4, 4]
    to_global = joined.test[0].edge_index[1] == joined.test[0].num_nodes - 1
    assert torch.equal(labels == names.index("atom to global"), to_global)


def test_what_has_no_label_is_refused():
    graph = molecule_graph("CCO")
    joined = join_global_node(Splits([graph], [], [], ABOUT))
    protein = replace(ABOUT, title="PROTEINS", num_node_types=3)
    nameless = graph.clone()
    del nameless.smiles
    reordered, other = (graph.clone().update({"smiles": s}) for s in ("C(O)C", "CCN"))
    for words, of_graph, by, about in (
        ("by x: expected one of type, role, atom pair, ring, conj", graph, "x", ABOUT),
        ("the type 4, but MOSES sample names only 1, 2, 3", joined.train[0], "type", ABOUT),
        (r"expected nodes that are atoms, .* PROTEINS", graph, "atom pair", protein),
        ("expected nodes that are atoms", joined.train[0], "ring", joined.description),
        (r"a graph of MOSES sample has no SMILES", nameless, "ring", ABOUT),
        (r"not the atoms and bonds of its SMILES 'C\(O\)C'", reordered, "ring", ABOUT),
        ("not the atoms and bonds of its SMILES 'CCN'", other, "conjugation", ABOUT),
    ):
        with pytest.raises(ValueError, match=words):
            study.edge_labels([of_graph], by, about)


def network(name="GT", **changes):
    seed_all(0)
    small = dict(hidden_channels=16, heads=4, num_layers=2)
    return build(CONFIGS[f"{name}-ZINC"].replace(**small, **changes)).eval()


def test_triples_are_counted_and_looked_up(splits):
    def triples(graph):
        ends = graph.x[graph.edge_index].tolist()
        return list(zip(*ends, graph.edge_attr.tolist(), strict=True))

    counts = Counter(triple for graph in splits.train for triple in triples(graph))
    rows = study.distinct_edges(splits.train).itertuples(index=False, name=None)
    assert {tuple(key): count for *key, count in rows} == counts
    for graph, found in zip(
        splits.test, study.type_frequency(splits.train, splits.test), strict=True
    ):
        assert found.tolist() == [counts[triple] for triple in triples(graph)]


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("name", ["GT", "GraphiT", "SAN"])
def test_scores_from_weights_are_those_of_the_network_and_of_the_equation(name, use_bias, splits):
    model, graph = network(name, use_bias=use_bias), splits.test[0]
    triples = study.distinct_edges([graph])
    found = study.first_layer(model, triples)
    with torch.no_grad(), record(model, "layers.0.attention.score") as seen:
        model(graph.x, graph.edge_index, graph.edge_attr)
    edges = pd.DataFrame(graph.x[graph.edge_index].T.numpy(), columns=["source", "target"])
    edges = edges.assign(edge=graph.edge_attr.numpy())
    row = edges.merge(triples.reset_index(), how="left")["index"].to_list()
    (expected,) = seen["layers.0.attention.score"]
    torch.testing.assert_close(found["score"][row], expected, rtol=1e-4, atol=1e-6)
    source, target, kind, _ = triples.to_numpy().T
    layer = model.layers[0].attention
    key, query = (model.node_embedding.weight[ids] for ids in (source, target))
    match = layer.key(key) * layer.query(query) / math.sqrt(4)
    torch.testing.assert_close(found["match"], match.detach())
    gate = layer.edge(model.edge_embedding.weight[kind])
    torch.testing.assert_close(found["gate"], gate.detach())


def test_predictions_from_the_weights_are_the_shares_and_ratios_of_the_molecules(splits):
    model, graphs = network(), splits.test
    with torch.no_grad(), record(model, "layers.0.attention.score") as seen:
        for graph in graphs:
            model(graph.x, graph.edge_index, graph.edge_attr)
    sizes = torch.cat(seen["layers.0.attention.score"]).abs().double()
    ratios = sizes / sizes.sort(dim=1).values[:, 7:8]
    double = ratios[torch.cat([graph.edge_type for graph in graphs]) == 2]
    kinds = study.distinct_edges(graphs)
    (share,) = study.mean_by_type(study.first_layer(model, kinds)["ratio"] > 3, kinds, [2])
    torch.testing.assert_close(share, (double > 3).double().mean(dim=0))
    assert share.count_nonzero() > 3
    logs = study.log_ratios(model, graphs, graphs, {2: "double", 9: "absent"})
    assert {*logs["label"]} == {"double"}
    measured = logs["measured"]
    np.testing.assert_allclose(measured, double.log10().mean(dim=0), rtol=1e-5)


def test_the_crossed_prediction_gives_every_type_the_same_atoms(splits):
    model, _ = checkpoint.load(BUNDLED / "checkpoints" / "gt_moses_seed0")
    triples, names = study.distinct_edges(splits.test), splits.description.edge_types
    start = model.edge_embedding.weight.detach() / 3
    found = study.first_layer_table(model, triples, triples, names, start).set_index("label")
    for edge_type, name in names.items():
        massive = (study.first_layer(model, triples.assign(edge=edge_type))["ratio"] > 1000).any(
            dim=1
        )
        share = np.average(massive, weights=triples["count"])
        assert found.loc[name, "common_pairs"] == pytest.approx(share)
    np.testing.assert_allclose(found["moved"], 2, rtol=1e-5)


def test_the_separable_prediction_is_exact_if_and_only_if_atoms_do_not_depend_on_the_bond(splits):
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(1, 4))
    ends = torch.tensor([[0], [1]])
    crossed = [Data(x=pair[:2], edge_index=ends, edge_attr=pair[2:]) for pair in pairs]
    for graphs, is_exact in ((crossed, True), (splits.test, False)):
        triples = study.distinct_edges(graphs)
        layer = study.first_layer(network(), triples)
        measured = study.mean_by_type(layer["ratio"].double().log10(), triples, [1, 2])
        difference = measured - study.separable_log_ratio(layer, triples, [1, 2])
        assert (difference.abs().max() < 1e-5) == is_exact
    # The profile is of all edges, whatever their type.
    match = np.average(layer["match"].abs().log10(), axis=0, weights=triples["count"])
    sizes = layer["score"].abs().sort(dim=1).values
    own = study.mean_by_type(layer["gate"].abs().log10() - sizes[:, 7:8].log10(), triples, [1, 2])
    found = study.separable_log_ratio(layer, triples, [1, 2]) - own
    np.testing.assert_allclose(found, [match, match], rtol=1e-4)


def test_what_is_no_table_of_types_is_refused(splits):
    x = torch.zeros(2, dtype=torch.long)
    for words, values in (("shape", {"edge_attr": torch.rand(1, 8)}), ("none", {})):
        with pytest.raises(
            ValueError, match=f"edge_attr: expected one type id per row, got {words}"
        ):
            study.distinct_edges([Data(x=x, **values)])
    triples = study.distinct_edges(splits.test)
    with pytest.raises(ValueError, match="the first layer sees more than the types"):
        study.first_layer(network("SAN", full_graph=True), triples)
    with pytest.raises(ValueError, match="expected GT, GraphiT or SAN"):
        study.first_layer(network("GAT"), triples)


def test_massive_kinds_of_a_type_are_compared_with_a_blind_draw():
    rows = [("a", 4, 2), ("b", 2, 0), ("c", 1, 1)]  # 3 of 7 are massive
    table = pd.DataFrame(rows, columns=["label", "triples", "massive_triples"])
    table = pd.concat([table.assign(seed=0), table.assign(seed=1, massive_triples=0)])
    found = study.massive_kinds(table.assign(run="x"))
    # At most two of the three are of the four kinds of a: not all three, 1 - 4 / 35.
    assert found["p_fewer"].tolist() == pytest.approx([31 / 35, (4 * 3) / (7 * 6), 1])
    assert found[["seed", "kinds", "massive"]].values.tolist() == [[0, 4, 2], [0, 2, 0], [0, 1, 1]]


def test_parts_of_a_score_are_means_over_the_edges_of_a_label(splits):
    graphs, names, model = splits.test[:6], ("none", "single", "double", "triple"), network()
    labels = [graph.edge_attr for graph in graphs]
    found = study.score_parts(model, graphs, labels, names).set_index(["layer", "label"])
    rows, columns = [], ["match", "gate", "score", "median", "maximum", "max_ratio"]
    for graph in graphs:
        with torch.no_grad(), record(model, "layers.*.attention.*") as seen:
            model(graph.x, graph.edge_index, graph.edge_attr)
        key, query, gate, size = (
            seen[f"layers.1.attention.{part}"][0].double().abs()
            for part in ("key", "query", "edge", "score")
        )
        for edge, (source, target) in enumerate(graph.edge_index.T.tolist()):
            sizes = size[edge].sort().values
            means = (key[source] * query[target]).mean() / 2, gate[edge].mean(), sizes.mean()
            logs = np.log10([sizes[7], sizes[-1], sizes[-1] / sizes[7]])
            rows.append([names[graph.edge_attr[edge]], *map(float, means), *logs])
    expected = pd.DataFrame(rows, columns=["label", *columns]).groupby("label").mean()
    expected[columns[3:]] = 10 ** expected[columns[3:]]
    np.testing.assert_allclose(found.loc[1].loc[expected.index, columns], expected, rtol=1e-4)
    assert found.loc[(0, "none"), ["edges", "usable"]].tolist() == [0, 0]
    assert np.isnan(found.loc[(0, "none"), columns].astype(float)).all()
