"""Interventions: dense loops on three atoms, exact counts, controls, and what stays as it was."""

import numpy as np
import pandas as pd
import pytest
import torch

from mapkg import hooks
from mapkg.evaluation import score
from mapkg.interventions import CHANGED, RULES, channel_means, intervene, summarise_interventions
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
    graphs = [molecule_graph(text, float(i)) for i, text in enumerate(smiles or SMILES)]
    for graph in graphs:
        graph.y = graph.y.double()
    return graphs


REFERENCE = molecules("CCN", "CC=O", "CF")


def found(model, graphs=None, **options):
    options = {"reference": REFERENCE, "threshold": LOW, **options}
    return intervene(model, molecules() if graphs is None else graphs, **options)


def after(table, rule, what):
    return table.loc[(table["rule"] == rule) & (table["what"] == what), "after"].to_numpy()


def scores(model, graph, name=FIRST):
    with torch.no_grad(), hooks.record(model, name) as seen:
        model(graph.x, graph.edge_index, graph.edge_attr)
    return seen[name][0].numpy()


# By hand: one layer, three atoms.


def edited_by_loop(values, mean, rule, what, draws):
    """The scores after an intervention, edge by edge and channel by channel."""
    edited = values.copy()
    for row, new, draw in zip(values, edited, draws, strict=True):
        median = sorted(abs(row))[(len(row) - 1) // 2]
        massive = [c for c in range(len(row)) if abs(row[c]) / median > LOW]
        others = [c for c in range(len(row)) if c not in massive]
        order = {"random": draw, "largest non-massive": abs(row)}.get(what)
        chosen = (
            massive
            if what == "massive"
            else sorted(sorted(others, key=lambda c: -order[c])[: len(massive)])
        )
        for c, paired in zip(chosen, massive, strict=True):
            if rule == "channel mean":
                new[c] = mean[c]
            elif rule == "zero":
                new[c] = 0
            elif what == "massive":
                new[c] = np.sign(row[c]) * LOW * median
            else:
                new[c] = row[c] * LOW * median / abs(row[paired])
    return edited


def predicted_by_loop(model, graph, values):
    """What a one-layer GraphiT predicts from these scores, attention written out."""
    attention = model.layers[0].attention
    heads, width = attention.heads, attention.head_channels
    x = model.node_embedding(graph.x)
    value = attention.value(x).detach().numpy()
    attended = np.zeros_like(value)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        weight = [np.exp(np.clip(row[own].sum(), -5, 5)) for row in values]
        for node in range(graph.num_nodes):
            incoming = [e for e, i in enumerate(graph.edge_index[1].tolist()) if i == node]
            total = sum(weight[e] for e in incoming) + 1e-6
            for e in incoming:
                attended[node, own] += weight[e] / total * value[graph.edge_index[0, e], own]
    x = model.layers[0].node_block(x, torch.from_numpy(attended))
    return model.head(x.sum(dim=0)).item()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("what", CHANGED)
@torch.no_grad()
def test_the_prediction_of_three_atoms_is_that_of_a_dense_loop(rule, what):
    model = network("GraphiT-ZINC", layers=1)
    (graph,) = molecules("CC#N")
    values = scores(model, graph)
    mean = np.concatenate([scores(model, other) for other in REFERENCE]).mean(axis=0)
    draws = torch.rand(values.shape, generator=torch.Generator().manual_seed(3)).numpy()
    table = found(model, [graph], seed=3, rules=[rule])
    assert table["before"].unique() == pytest.approx([predicted_by_loop(model, graph, values)])
    edited = edited_by_loop(values, mean, rule, what, draws)
    assert (edited != values).sum() == (activation_ratio(torch.from_numpy(values)) > LOW).sum() > 3
    expected = predicted_by_loop(model, graph, edited)
    assert after(table, rule, what) == pytest.approx([expected], rel=1e-9)
    assert abs(expected - table["before"].iloc[0]) > 1e-6


@pytest.mark.parametrize("name", ["GT-ZINC", "GraphiT-ZINC"])
def test_zeroing_is_an_edit_of_every_layer(name):
    model, graphs = network(name, layers=3), molecules()
    edit = {"layers.*.score": lambda s: s.masked_fill(activation_ratio(s) > LOW, 0)}
    with torch.no_grad(), hooks.edit(model, edit):
        expected = [model(g.x, g.edge_index, g.edge_attr).item() for g in graphs]
    table = found(model, graphs)
    np.testing.assert_allclose(after(table, "zero", "massive"), expected, rtol=1e-9)
    one_layer = found(model, graphs, layers="layers.1.attention.score")
    assert np.abs(after(one_layer, "zero", "massive") - expected).min() > 1e-6


# What is changed.


@pytest.fixture
def seen_scores():
    """The scores of layer 0, as they were and as the layer gave them on, pass by pass."""

    def look(model, **options):
        before, given_on = [], []
        keep = {
            FIRST: lambda _, s: before.append(s.clone()),
            "layers.0.attention": lambda _, output: given_on.append(output[1].clone()),
        }
        with (
            hooks.record(model, FIRST, reduce=keep[FIRST]),
            hooks.record(model, "layers.0.attention", reduce=keep["layers.0.attention"]),
        ):
            table = found(model, layers=FIRST, **options)
        # The pass over the reference, then one as it is and one for each of what is changed.
        return table, before[2:], given_on[2:]

    return look


@pytest.mark.parametrize("rule", RULES)
def test_a_control_changes_as_many_others_on_every_edge(seen_scores, rule):
    table, before, given_on = seen_scores(network(), rules=[rule])
    assert len(before) == len(CHANGED)
    massive = activation_ratio(before[0]) > LOW
    changed = [(new != old) for new, old in zip(given_on, before, strict=True)]
    assert torch.equal(changed[0], massive)
    for control in changed[1:]:
        assert not (control & massive).any()
        assert torch.equal(control.sum(dim=1), massive.sum(dim=1))
    assert not torch.equal(changed[1], changed[2])
    for what, mask in zip(CHANGED, changed, strict=True):
        rows = table[table["what"] == what]
        assert rows["changed"].sum() == mask.sum() > 50
        assert rows["activations"].sum() == mask.numel()


def test_clipped_activations_keep_their_sign_at_the_threshold_and_controls_shrink(seen_scores):
    _, (before, *_), (massive, *controls) = seen_scores(network(), rules=["clip"])
    chosen = massive != before
    assert torch.equal(massive.sign(), before.sign())
    torch.testing.assert_close(
        activation_ratio(massive)[chosen], torch.full_like(massive[chosen], LOW)
    )
    shrunk = (massive / before)[chosen]
    for control in controls:
        torch.testing.assert_close((control / before)[control != before], shrunk)


def test_the_largest_others_are_larger_than_all_that_stay(seen_scores):
    _, before, given_on = seen_scores(network(), rules=["zero"])
    massive, largest = (given_on[i] != before[i] for i in (0, 2))
    size = before[2].abs().masked_fill(massive, torch.nan)
    least = size.masked_fill(~largest, torch.inf).nan_to_num(torch.inf).amin(dim=1)
    most = size.masked_fill(largest, -torch.inf).nan_to_num(-torch.inf).amax(dim=1)
    assert (least >= most)[largest.any(dim=1)].all()


def test_the_table_counts_the_massive_activations_of_each_graph():
    model, graphs = network("GraphiT-ZINC", layers=1), molecules()
    table = found(model, graphs)
    for i, graph in enumerate(graphs):
        rows = table[table["graph"] == i]
        assert len(rows) == len(RULES) * len(CHANGED)
        massive = activation_ratio(torch.from_numpy(scores(model, graph))) > LOW
        assert set(rows["changed"]) == {massive.sum().item()}
        assert set(rows["activations"]) == {16 * graph.num_edges}
    assert table["layers"].unique() == ["layers.*.score"]
    assert table["threshold"].unique() == [LOW]


def test_a_threshold_that_nothing_reaches_changes_nothing():
    table = found(network(), threshold=1e12)
    assert (table["changed"] == 0).all()
    assert (table["after"] == table["before"]).all()
    summary = summarise_interventions(table, resamples=100)
    assert (summary[["changed", "share"]] == 0).all(axis=None)
    for name in ("loss_change", "shift"):
        assert (summary[[name, f"{name}_low", f"{name}_high"]] == 0).all(axis=None)


def test_rows_without_a_median_have_no_massive_activations_and_stay():
    model = network()
    torch.nn.init.zeros_(model.layers[0].attention.edge.weight)
    table = found(model, layers=FIRST)
    assert (table["changed"] == 0).all()
    assert (table["after"] == table["before"]).all()


def test_molecules_without_a_bond_are_predicted_and_have_nothing_to_change():
    table = found(network(), molecules("C", "CCO"))
    alone = table[table["graph"] == 0]
    assert (alone["activations"] == 0).all()
    assert (alone["after"] == alone["before"]).all()


# Means of channels.


def test_the_means_are_those_over_all_edges_of_all_graphs():
    model, graphs = network(), molecules()
    means = channel_means(model, graphs, ["layers.*.score"], batch_size=4)
    assert list(means) == [FIRST, "layers.1.attention.score"]
    for name, mean in means.items():
        expected = np.concatenate([scores(model, graph, name) for graph in graphs]).mean(axis=0)
        np.testing.assert_allclose(mean, expected, rtol=1e-9)
        assert (mean < 0).any() and (mean > 0).any()


def test_the_reference_matters_to_the_means_alone():
    model = network()
    one, other = found(model), found(model, reference=molecules("FC(F)F"))
    for what in CHANGED:
        for rule in ("zero", "clip"):
            np.testing.assert_array_equal(after(one, rule, what), after(other, rule, what))
    difference = after(one, "channel mean", "massive") - after(other, "channel mean", "massive")
    assert np.abs(difference).max() > 1e-6


# Draws, batches, and what stays.


def test_the_draw_depends_on_the_seed_alone_and_only_the_random_control_on_the_draw():
    model = network()
    torch.manual_seed(1)
    first = found(model, seed=5)
    torch.manual_seed(2)
    pd.testing.assert_frame_equal(found(model, seed=5), first)
    other = found(model, seed=6)
    differs = (other["after"] != first["after"]).groupby(first["what"]).any()
    assert differs.to_dict() == {"massive": False, "random": True, "largest non-massive": False}


def test_a_rule_gives_the_same_alone_and_among_others():
    model = network()
    whole = found(model)
    for rule in RULES:
        expected = whole[whole["rule"] == rule].reset_index(drop=True)
        pd.testing.assert_frame_equal(found(model, rules=[rule]), expected)


def test_only_the_random_control_depends_on_the_batches():
    model = network()
    whole, parts = (
        found(model, batch_size=size).set_index(["rule", "what", "graph"]).sort_index()
        for size in (128, 2)
    )
    for what in ("massive", "largest non-massive"):
        one, other = (table.xs(what, level="what") for table in (whole, parts))
        pd.testing.assert_frame_equal(one, other, rtol=1e-9)
    assert whole["changed"].xs("random", level="what").sum() > 0


# Several targets, and the summary.


def labelled():
    graphs = molecules()
    labels = [[1, 0], [0, 1], [1, torch.nan], [0, 0], [torch.nan, 1], [1, 1]]
    for graph, y in zip(graphs, labels, strict=True):
        graph.y = torch.tensor([y], dtype=torch.double)
    return graphs


def test_a_classification_has_a_row_per_target_and_no_loss_where_unlabelled():
    model, graphs = network(out_channels=2, loss="bce"), labelled()
    table = found(model, graphs, loss="bce", rules=["zero"])
    assert table["target"].tolist() == [0, 1] * len(graphs) * len(CHANGED)
    for row in table.itertuples():
        y = graphs[row.graph].y[0, row.target].item()
        for logit, loss in ((row.before, row.loss_before), (row.after, row.loss_after)):
            p = 1 / (1 + np.exp(-logit))
            expected = np.nan if np.isnan(y) else -np.log(p if y == 1 else 1 - p)
            assert loss == pytest.approx(expected, nan_ok=True)
    summary = summarise_interventions(table, resamples=100)
    expected = score(model, graphs, loss="bce")["bce"]
    np.testing.assert_allclose(summary["loss_before"], expected)
    assert (summary["graphs"] == 6).all()


def test_the_summary_begins_at_the_error_of_the_network():
    model, graphs = network(), molecules()
    summary = summarise_interventions(found(model, graphs), resamples=100)
    assert summary[["rule", "what"]].to_numpy().tolist() == [[r, w] for r in RULES for w in CHANGED]
    np.testing.assert_allclose(summary["loss_before"], score(model, graphs)["mae"])
    np.testing.assert_allclose(
        summary["loss_change"], summary["loss_after"] - summary["loss_before"]
    )


def table_of(before, after, changed, y=0.0):
    """As ``intervene`` gives it, for one intervention and one target."""
    before, after = np.array(before), np.array(after)
    values = {"before": before, "after": after, "changed": changed}
    values |= {"loss_before": abs(before - y), "loss_after": abs(after - y)}
    constant = dict(layers="a", threshold=9.0, rule="zero", what="massive", target=0)
    return pd.DataFrame({"graph": range(len(before)), "activations": 10, **values, **constant})


def test_the_summary_by_hand():
    table = table_of(before=[1, -2, 3, 0], after=[2, -1, 3, -3], changed=[1, 2, 0, 5])
    (row,) = summarise_interventions(table, resamples=500).to_dict("records")
    assert (row["graphs"], row["changed"], row["share"]) == (4, 8, 0.2)
    assert (row["loss_before"], row["loss_after"]) == (6 / 4, 9 / 4)
    assert (row["loss_change"], row["shift"]) == (3 / 4, 5 / 4)
    assert row["loss_change_low"] < 3 / 4 < row["loss_change_high"]
    again = summarise_interventions(table, resamples=500)
    assert again.to_dict("records") == [row]


def test_the_interval_is_that_of_a_mean_of_independent_graphs():
    shifts = np.random.default_rng(0).gamma(2.0, size=400)
    table = table_of(np.zeros(400), shifts, 1)
    (row,) = summarise_interventions(table, resamples=4000).to_dict("records")
    half = 1.96 * shifts.std() / 20
    assert row["shift_high"] - row["shift"] == pytest.approx(half, rel=0.15)
    assert row["shift"] - row["shift_low"] == pytest.approx(half, rel=0.15)
    narrow = summarise_interventions(table, resamples=4000, confidence=0.5).iloc[0]
    width = narrow["shift_high"] - narrow["shift_low"]
    assert width == pytest.approx(2 * half * 0.6745 / 1.96, rel=0.15)


def test_a_graph_with_more_targets_counts_once_for_each_but_is_drawn_whole():
    one = table_of([0.0, 0.0], [1.0, 3.0], 1)
    two = pd.concat([one, one[one["graph"] == 1].assign(target=1, after=5.0, loss_after=np.nan)])
    two.loc[two["target"] == 1, "loss_before"] = np.nan
    (row,) = summarise_interventions(two, resamples=500).to_dict("records")
    assert row["shift"] == (1 + 3 + 5) / 3
    assert row["loss_after"] == (1 + 3) / 2, "one entry has no label"
    assert row["changed"] == 2
    assert (row["shift_low"], row["shift_high"]) == (1, 4), "both draws may be of one graph"


# Bad input.


@pytest.mark.parametrize("threshold", [0.0, -1.0, 0.99, float("nan")])
def test_a_threshold_below_one_is_refused(threshold):
    with pytest.raises(ValueError, match=f"expected a ratio of at least 1, got {threshold}"):
        found(network(), threshold=threshold)


def test_an_unknown_rule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="expected some of channel mean, zero, clip, got 'halve'"):
        found(network(), rules=["zero", "halve"])


def test_an_unknown_layer_is_refused():
    with pytest.raises(KeyError, match=r"layers\.7"):
        found(network(), layers="layers.7.attention.score")


@pytest.mark.parametrize("reference", [[], [molecule_graph("C")]])
def test_a_reference_without_an_edge_is_refused(reference):
    with pytest.raises(ValueError, match="expected reference graphs with edges"):
        found(network(), reference=reference)


def test_an_interval_needs_two_graphs():
    table = found(network(), molecules("CCO"))
    with pytest.raises(ValueError, match="expected two graphs or more, to draw from, got 1"):
        summarise_interventions(table)


def test_an_output_that_has_no_row_per_edge_is_refused():
    with pytest.raises(ValueError, match=r"layers\.1\.node_block: expected a row of channels"):
        found(network(), layers=["layers.1.node_block"])
