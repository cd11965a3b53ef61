"""Interventions: dense loops on three atoms, exact counts, controls, and what stays as it was."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from mapkg import hooks
from mapkg.evaluation import evaluate
from mapkg.interventions import CHANGED, RULES, intervene, summarise_interventions
from mapkg.measures import activation_ratio
from mapkg.models import build
from studies.data import molecule_graph
from studies.published import CONFIGS
from studies.train import seed_all

SIZES = dict(hidden_channels=16, heads=4)
SMILES = ("CC#N", "CCO", "c1ccccc1O", "CC(=O)NC", "N#CCCCl", "C1CCCC1F")
FIRST = "layers.0.attention.score"
LOW = 4.0
"""A threshold that untrained networks reach in every row or so."""


def network(name="GT-ZINC", layers=2, seed=1, **changes):
    """An untrained network in double precision that does not ignore what it is given.

    Its BatchNorm statistics are not the trivial ones, and the ReLUs of its head are open.
    """
    seed_all(seed)
    model = build(CONFIGS[name].replace(**SIZES, num_layers=layers, **changes)).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    for linear in (model.head[0], model.head[2]):
        torch.nn.init.constant_(linear.bias, 5)
    return model


def molecules(*smiles):
    graphs = [molecule_graph(text) for text in smiles or SMILES]
    return [g.update({"y": torch.full((1, 1), i).double()}) for i, g in enumerate(graphs)]


REFERENCE = molecules("CCN", "CC=O", "CF")
UNKNOWN = [*molecules("CCO"), molecule_graph("CF", math.nan)]


def found(model, graphs=None, **options):
    options = {"reference": REFERENCE, "threshold": LOW, **options}
    return intervene(model, molecules() if graphs is None else graphs, **options)


def scores(model, graph):
    with torch.no_grad(), hooks.record(model, FIRST) as seen:
        model(graph.x, graph.edge_index, graph.edge_attr)
    return seen[FIRST][0].numpy()


def edited_by_loop(values, mean, rule, what, draws):
    """The scores after an intervention, edge by edge and channel by channel."""
    edited = values.copy()
    for row, new, draw in zip(values, edited, draws, strict=True):
        median = sorted(abs(row))[(len(row) - 1) // 2]
        massive = [c for c in range(len(row)) if abs(row[c]) / median > LOW]
        others = [c for c in range(len(row)) if c not in massive]
        order = draw if what == "random" else abs(row)
        largest = sorted(sorted(others, key=lambda c: -order[c])[: len(massive)])
        for c, paired in zip(massive if what == "massive" else largest, massive, strict=True):
            shrunk = row[c] * LOW * median / abs(row[paired])
            new[c] = {"channel mean": mean[c], "zero": 0, "clip": shrunk}[rule]
    return edited


@torch.no_grad()
def test_predictions_of_three_atoms_are_those_of_scores_that_a_loop_changed():
    model = network("GraphiT-ZINC", layers=1)
    (graph,) = molecules("CC#N")
    values = scores(model, graph)
    mean = np.concatenate([scores(model, other) for other in REFERENCE]).mean(axis=0)
    draws = torch.rand(values.shape, generator=torch.Generator().manual_seed(3)).numpy()
    table = found(model, [graph], seed=3)
    assert (table["activations"] == values.size).all()
    for rule, what in itertools.product(RULES, CHANGED):
        edited = edited_by_loop(values, mean, rule, what, draws)
        with hooks.edit(model, {FIRST: lambda _, edited=edited: torch.from_numpy(edited)}):
            expected = model(graph.x, graph.edge_index, graph.edge_attr).item()
        (row,) = table.query("rule == @rule and what == @what").to_dict("records")
        assert row["after"] == pytest.approx(expected, rel=1e-9)
        assert abs(expected - row["before"]) > 1e-6
        assert row["changed"] == (edited != values).sum() > 3


def test_zeroing_is_an_edit_of_every_layer():
    model, graphs = network(layers=3), molecules()
    edit = {"layers.*.score": lambda s: s.masked_fill(activation_ratio(s) > LOW, 0)}
    with torch.no_grad(), hooks.edit(model, edit):
        expected = [model(g.x, g.edge_index, g.edge_attr).item() for g in graphs]
    table = found(model, graphs).query("rule == 'zero' and what == 'massive'")
    np.testing.assert_allclose(table["after"], expected, rtol=1e-9)


def test_where_nothing_is_massive_nothing_changes():
    no_median = network()
    torch.nn.init.zeros_(no_median.layers[0].attention.edge.weight)
    alone = found(network(), molecules("C", "CCO")).query("graph == 0")  # without a bond
    assert (alone["activations"] == 0).all()
    table = found(network(), threshold=1e12)
    for same in (found(no_median, layers=FIRST), alone, table):
        assert (same["changed"] == 0).all()
        assert (same["after"] == same["before"]).all()
    summary = summarise_interventions(table, resamples=100)
    assert (summary[["changed", "share"]] == 0).all(axis=None)
    for name in ("loss_change", "shift"):
        assert (summary[[name, f"{name}_low", f"{name}_high"]] == 0).all(axis=None)


def test_a_classification_has_a_row_per_target_and_no_loss_where_unlabeled():
    model, graphs = network(out_channels=2, loss="bce"), molecules()
    labels = [[1, 0], [0, 1], [1, torch.nan], [0, 0], [torch.nan, 1], [1, 1]]
    for graph, y in zip(graphs, labels, strict=True):
        graph.y = torch.tensor([y], dtype=torch.double)
    table = found(model, graphs, loss="bce")
    assert table["target"].tolist() == [0, 1] * len(graphs) * len(CHANGED) * len(RULES)
    y = np.tile(np.ravel(labels), len(CHANGED) * len(RULES))
    for when in ("before", "after"):
        p = 1 / (1 + np.exp(-table[when]))
        np.testing.assert_allclose(
            table[f"loss_{when}"], -np.log(np.where(y == 1, p, 1 - p)) + 0 * y
        )
    summary = summarise_interventions(table, resamples=100)
    expected = evaluate(model, graphs, loss="bce")
    np.testing.assert_allclose(summary["loss_before"], expected)
    assert (summary["graphs"] == 6).all()


def table_of(before, after, changed):
    """As ``intervene`` gives it, for one intervention and targets of 0."""
    values = {"before": before, "after": after, "changed": changed}
    values |= {"loss_before": np.abs(before), "loss_after": np.abs(after)}
    constant = dict(layers="a", threshold=9.0, rule="zero", what="massive", target=0)
    return pd.DataFrame({"graph": range(len(before)), "activations": 10, **values, **constant})


def test_the_summary_by_hand():
    table = table_of(before=[1, -2, 3, 0], after=[2, -1, 3, -3], changed=[1, 2, 0, 5])
    (row,) = summarise_interventions(table, resamples=500).to_dict("records")
    assert (row["graphs"], row["changed"], row["share"]) == (4, 8, 0.2)
    assert (row["loss_before"], row["loss_after"]) == (6 / 4, 9 / 4)
    assert (row["loss_change"], row["shift"]) == (3 / 4, 5 / 4)
    assert row["loss_change_low"] < 3 / 4 < row["loss_change_high"]


def test_a_graph_with_more_targets_counts_once_for_each_but_is_drawn_whole():
    one = table_of([0.0, 0.0], [1.0, 3.0], 1)
    two = pd.concat([one, one[one["graph"] == 1].assign(target=1, after=5.0, loss_after=np.nan)])
    two.loc[two["target"] == 1, "loss_before"] = np.nan
    (row,) = summarise_interventions(two, resamples=500).to_dict("records")
    assert row["shift"] == (1 + 3 + 5) / 3
    assert row["loss_after"] == (1 + 3) / 2, "one entry has no label"
    assert row["changed"] == 2
    assert (row["shift_low"], row["shift_high"]) == (1, 4), "both draws may be of one graph"


def test_graphs_of_a_second_batch_are_as_if_alone():
    graphs = molecules(*SMILES * 22)  # 132; a batch has 128
    table = found(network(), graphs).query("what != 'random'").set_index("graph")
    assert table.index.unique().tolist() == list(range(132))
    alone = found(network(), graphs[130:131]).query("what != 'random'")
    columns = ["activations", "changed", "before", "after", "loss_before", "loss_after"]
    np.testing.assert_allclose(table.loc[130, columns], alone[columns], rtol=1e-9)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        *(({"threshold": t}, ValueError, f"at least 1, got {t}") for t in (0.99, float("nan"))),
        ({"layers": "layers.7.attention.score"}, KeyError, r"layers\.7"),
        ({"graphs": []}, ValueError, "expected graphs with targets y, got none"),
        ({"reference": []}, ValueError, "expected reference graphs with edges"),
        ({"reference": [molecule_graph("C")]}, ValueError, "expected reference graphs with edges"),
        ({"layers": ["layers.1.node_block"]}, ValueError, "node_block: expected a row of channels"),
        ({"graphs": molecules("CCO")}, ValueError, "two labeled graphs or more, to draw .*, got 1"),
        (
            {"graphs": UNKNOWN},
            ValueError,
            "graph 1: expected numbers as targets of loss 'l1', got NaN",
        ),
        (
            {"model": network(readout=None)},
            ValueError,
            "predictions of whole graphs, one for each of 6 graphs, got 29",
        ),
    ],
)
def test_what_cannot_be_done_is_an_error_that_says_what_was_expected(changes, error, words):
    with pytest.raises(error, match=words):
        summarise_interventions(found(**{"model": network()} | changes))


def test_a_network_that_breaks_has_no_mean_loss_and_unlabeled_graphs_do_not_count():
    graphs = molecules()
    for graph, label in zip(graphs, (0, 1, math.nan, 1, 0, math.nan), strict=True):
        graph.y = torch.full((1, 1), label).double()
    table = found(network(), graphs, loss="bce")
    expected = table.groupby(["rule", "what"], sort=False)["loss_after"].mean()
    summary = summarise_interventions(table, resamples=20)
    assert summary["loss_after"].tolist() == pytest.approx(expected.tolist())
    numbers = ["loss_before", "loss_after", "loss_change", "shift"]
    for graph, columns, known in (
        (1, ["after", "loss_after"], [True, False, False, False]),
        (1, ["before", "loss_before"], [False, True, False, False]),
        (2, ["after"], [True, True, True, False]),  # without a label
    ):
        broken = table.copy()
        broken.loc[table["graph"] == graph, columns] = math.nan
        summary = summarise_interventions(broken, resamples=20)
        assert (summary[numbers].notna() == known).all(axis=None)
