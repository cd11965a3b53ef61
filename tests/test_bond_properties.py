"""Labels of bonds, by hand on molecules that every chemist knows, and counts on whole splits."""

from collections import Counter
from dataclasses import replace

import networkx
import pytest
import torch
from rdkit import Chem
from torch_geometric.data import Data
from torch_geometric.utils import from_smiles

from studies.bond_changes import join_global_node, shuffle_types
from studies.data import DESCRIPTIONS, Splits, load, molecule_graph
from studies.data.bond_properties import CONJUGATION, OTHER, PROPERTIES, RINGS, edge_labels
from studies.data.graph_classification import PAIR_TYPES
from studies.data.smiles_tables import benchmark_graph

ABOUT = DESCRIPTIONS["moses"]
COLUMNS = replace(
    ABOUT,
    title="atoms in columns",
    num_node_types=(119, 9, 11, 12, 9, 5, 8, 2, 2),
    num_edge_types=(22, 6, 2),
    edge_types={1: "single", 2: "double", 3: "triple", 12: "aromatic"},
)
NO_RING, RING_5, RING_6, OTHER_RING = RINGS
PLAIN, CONJUGATED = CONJUGATION


@pytest.fixture(scope="module")
def moses():
    return load("moses")


def named(smiles, by, about=ABOUT, graph=None, **options):
    """The label of each bond of a molecule, by its atoms, lower index first."""
    graph = molecule_graph(smiles) if graph is None else graph
    (labels,), names = edge_labels([graph], by, about, **options)
    of_bond = {}
    for j, i, label in zip(*graph.edge_index.tolist(), labels.tolist(), strict=True):
        of_bond.setdefault((min(i, j), max(i, j)), []).append(names[label])
    assert all(len(both) == 2 and len(set(both)) == 1 for both in of_bond.values())
    return {bond: both[0] for bond, both in of_bond.items()}


def columns(smiles):
    """A graph as TOX21 has it."""
    graph = from_smiles(smiles)
    graph.edge_type = graph.edge_attr[:, 0]
    return graph


RING = [(1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (1, 6)]


# By hand.


@pytest.mark.parametrize(
    ("smiles", "ring", "conjugation"),
    [
        # The nitrogen of aniline is conjugated with its ring and not in it.
        (
            "Nc1ccccc1",
            {(0, 1): NO_RING, **dict.fromkeys(RING, RING_6)},
            dict.fromkeys([(0, 1), *RING], CONJUGATED),
        ),
        # So is the middle of an amide, and its ends are not.
        (
            "CC(=O)NC",
            dict.fromkeys([(0, 1), (1, 2), (1, 3), (3, 4)], NO_RING),
            {(0, 1): PLAIN, (1, 2): CONJUGATED, (1, 3): CONJUGATED, (3, 4): PLAIN},
        ),
        ("CC#N", dict.fromkeys([(0, 1), (1, 2)], NO_RING), dict.fromkeys([(0, 1), (1, 2)], PLAIN)),
    ],
)
def test_rings_and_conjugation_of_known_molecules(smiles, ring, conjugation):
    assert named(smiles, "ring") == ring
    assert named(smiles, "conjugation") == conjugation
    for by in ("atom pair", "ring", "conjugation"):
        assert named(smiles, by, COLUMNS, columns(smiles)) == named(smiles, by)


@pytest.mark.parametrize(
    ("smiles", "rings"),
    [
        ("C1CC2CCC1C2", {RING_5: 8}),  # norbornane: the ring of six is the sum of two of five
        ("C1CCC1", {OTHER_RING: 4}),
        ("C1CCCCCC1", {OTHER_RING: 7}),
        ("c1ccc2CCCc2c1", {RING_5: 5, RING_6: 5}),  # indane: the shared bond is of the smaller
        ("C1CCCC1C1CCCCC1", {RING_5: 5, RING_6: 6, NO_RING: 1}),  # one bond joins two rings
    ],
)
def test_a_bond_counts_for_its_smallest_ring(smiles, rings):
    assert Counter(named(smiles, "ring").values()) == rings


def test_pairs_of_elements_have_no_direction_and_carbon_comes_first():
    found = named("ClC(Br)=NO", "atom pair")
    expected = {(0, 1): "C–Cl", (1, 2): "C–Br", (1, 3): "C–N", (3, 4): "N–O"}
    assert found == expected
    # Charge and hydrogens are no part of the element.
    found = named("C[NH2+]CC[O-]", "atom pair")
    assert found == {(0, 1): "C–N", (1, 2): "C–N", (2, 3): "C–C", (3, 4): "C–O"}


def test_frequent_pairs_come_first_and_rare_ones_are_put_together():
    graphs = [molecule_graph(smiles) for smiles in ("CCCC", "CCO", "CN", "CO", "CF")]
    # Of 8 bonds: four C–C, two C–O, one C–F, one C–N.
    labels, names = edge_labels(graphs, "atom pair", ABOUT)
    assert names == ("C–C", "C–O", "C–F", "C–N")
    assert torch.cat(labels).tolist() == [*[0] * 6, *(0, 0, 1, 1), *(3, 3), *(1, 1), *(2, 2)]
    labels, names = edge_labels(graphs, "atom pair", ABOUT, rare=0.2)
    assert names == ("C–C", "C–O", OTHER)
    assert torch.cat(labels).tolist() == [*[0] * 6, *(0, 0, 1, 1), *(2, 2), *(1, 1), *(2, 2)]
    _, names = edge_labels(graphs, "atom pair", ABOUT, rare=0.125)
    assert len(names) == 4, "a pair with just that share is not rare"


def test_a_molecule_of_one_atom_has_no_edge_and_no_label():
    for by in PROPERTIES:
        labels, _ = edge_labels([molecule_graph("C"), molecule_graph("CC")], by, ABOUT)
        assert [of_graph.shape for of_graph in labels] == [(0,), (2,)]
        assert {of_graph.dtype for of_graph in labels} == {torch.long}


def test_types_are_labelled_in_the_order_of_their_ids():
    labels, names = edge_labels([columns("C#Cc1ccccc1")], "type", COLUMNS)
    assert names == ("single", "double", "triple", "aromatic")
    assert Counter(labels[0].tolist()) == {0: 2, 2: 2, 3: 12}


def test_six_edge_types_that_start_at_zero():
    protein = Data(
        x=torch.tensor([0, 1, 2]),
        edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]),
        edge_type=torch.tensor([1, 1, 4, 4]),
    )
    about = replace(ABOUT, title="PROTEINS", num_node_types=3, edge_types=PAIR_TYPES)
    labels, names = edge_labels([protein], "type", about)
    assert labels[0].tolist() == [1, 1, 4, 4]
    assert names == tuple(PAIR_TYPES.values())
    for by in ("atom pair", "ring", "conjugation"):
        with pytest.raises(ValueError, match=r"expected nodes that are atoms, .* PROTEINS"):
            edge_labels([protein], by, about)
    with pytest.raises(
        ValueError, match="one of type, role, atom pair, ring, conjugation, got 'x'"
    ):
        edge_labels([protein], "x", about)


# The order of atoms.


def test_smiles_in_another_order_of_atoms_are_refused_unless_written_from_the_ids():
    graph = molecule_graph("CCO")
    graph.smiles = "C(O)C"
    with pytest.raises(ValueError, match=r"not the atoms and bonds of its SMILES 'C\(O\)C'"):
        edge_labels([graph], "ring", ABOUT)
    graph.smiles = "CCN"
    with pytest.raises(ValueError, match="not the atoms and bonds of its SMILES 'CCN'"):
        edge_labels([graph], "conjugation", ABOUT)


def test_the_benchmark_writes_smiles_in_an_order_of_its_own_and_has_the_right_labels():
    smiles = "Clc1ccc(CC2CCCN2)cc1C#N"
    graph = molecule_graph(smiles)
    bonds = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.long)
    bonds[graph.edge_index[0], graph.edge_index[1]] = graph.edge_type
    raw = {"atom_type": graph.x, "bond_type": bonds, "logP_SA_cycle_normalized": torch.zeros(1)}
    benchmark = benchmark_graph(raw)
    symbols = [atom.GetSymbol() for atom in Chem.MolFromSmiles(benchmark.smiles).GetAtoms()]
    assert symbols[0] != "Cl", "the order is another one"
    for by in ("atom pair", "ring", "conjugation"):
        assert named(smiles, by, graph=benchmark) == named(smiles, by)


# Whole splits.


def count(graphs, by, about):
    labels, names = edge_labels(graphs, by, about)
    for graph, of_graph in zip(graphs, labels, strict=True):
        assert of_graph.shape == (graph.num_edges,)
    counts = torch.cat(labels).bincount(minlength=len(names)).tolist()
    assert len(counts) == len(names)
    return dict(zip(names, counts, strict=True))


@pytest.mark.parametrize("by", PROPERTIES)
def test_every_edge_of_the_bundled_molecules_has_one_label(moses, by):
    found = count(moses.test, by, moses.description)
    assert sum(found.values()) == sum(graph.num_edges for graph in moses.test)
    assert min(found.values()) > 0
    if by == "atom pair":
        *frequent, _ = found.values()
        assert list(found)[-1] == OTHER
        assert frequent == sorted(frequent, reverse=True)
        assert min(frequent) >= 0.01 * sum(found.values())
        assert list(found)[:3] == ["C–C", "C–N", "C–O"]


def test_the_smallest_ring_of_a_bond_is_the_shortest_way_around(moses):
    few = moses.test[:100]
    labels, names = edge_labels(few, "ring", moses.description)
    size = {5: RING_5, 6: RING_6}
    for graph, of_graph in zip(few, labels, strict=True):
        bonds = networkx.Graph(graph.edge_index.t().tolist())
        for j, i, label in zip(*graph.edge_index.tolist(), of_graph.tolist(), strict=True):
            without = networkx.restricted_view(bonds, [], [(i, j)])
            if networkx.has_path(without, i, j):
                around = networkx.shortest_path_length(without, i, j) + 1
                assert names[label] == size.get(around, OTHER_RING)
            else:
                assert names[label] == NO_RING


def test_types_that_were_changed_leave_the_labels_of_the_molecule(moses):
    few = replace(moses, train=moses.train[:30], val=moses.val[:1], test=moses.test[:1])
    changed = shuffle_types(few, 0)
    for by in ("atom pair", "ring", "conjugation"):
        found, expected = (edge_labels(data.train, by, data.description) for data in (changed, few))
        assert found[1] == expected[1]
        assert all(
            torch.equal(one, other) for one, other in zip(found[0], expected[0], strict=True)
        )


@pytest.mark.parametrize("ids", [(4, 5), (3, 3), (2, 3)])
def test_edges_of_a_global_node_are_told_apart_from_bonds_of_the_same_type(ids):
    graphs = [molecule_graph("C#CC=O")]
    joined = join_global_node(Splits(graphs, graphs, graphs, ABOUT), edge_types=ids)
    found = count(joined.test, "role", joined.description)
    assert found == {
        **{"single": 2, "double": 2, "triple": 2},
        **{"atom to global": 4, "global to atom": 4},
    }
    labels, names = edge_labels(joined.test, "role", joined.description)
    to_global = joined.test[0].edge_index[1] == joined.test[0].num_nodes - 1
    assert torch.equal(labels[0] == names.index("atom to global"), to_global)


# Bad input.


@pytest.mark.parametrize("by", ["ring", "conjugation"])
def test_a_graph_without_smiles_is_refused_where_the_molecule_is_needed(by):
    graph = molecule_graph("CCO")
    del graph.smiles
    with pytest.raises(ValueError, match=r"a graph of MOSES sample has no SMILES"):
        edge_labels([graph], by, ABOUT)
    assert edge_labels([graph], "atom pair", ABOUT)[1] == ("C–C", "C–O")


def test_a_type_that_the_description_does_not_name_is_refused():
    graphs = [molecule_graph("CCO")]
    joined = join_global_node(Splits(graphs, graphs, graphs, ABOUT))
    with pytest.raises(ValueError, match="has the type 4, but MOSES sample names only 1, 2, 3"):
        edge_labels(joined.test, "type", ABOUT)
    labels, names = edge_labels(joined.test, "type", joined.description)
    assert names[3:] == ("atom to global", "global to atom")
    assert Counter(labels[0].tolist()) == {0: 4, 3: 3, 4: 3}
    with pytest.raises(ValueError, match="expected nodes that are atoms"):
        edge_labels(joined.test, "ring", joined.description)
