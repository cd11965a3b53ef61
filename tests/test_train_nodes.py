"""Training on the nodes of one graph: its steps, its evaluation, and features that are hidden."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import SMALL_CITATION, few_molecules
from torch import nn

from studies.data import NodesOfGraph
from studies.data.networks import citation_like
from studies.deep import deep_network
from studies.train_nodes import Schedule, fit_nodes, hide_features


def network(seed=0, layers=2, **options):
    torch.manual_seed(seed)
    sizes = dict(in_channels=40, out_channels=3, hidden_channels=8, heads=2)
    return deep_network("gat", layers, **sizes | options)


def fit(model, papers, **settings):
    schedule = Schedule(epochs=settings.pop("epochs", 5), lr=0.01)
    return fit_nodes(model, papers, schedule, progress=False, **settings)


def test_it_takes_the_steps_of_a_loop_written_out(papers):
    found = network(dropout=0.0, attention_dropout=0.0)
    expected = network(dropout=0.0, attention_dropout=0.0)
    history = fit(found, papers, epochs=4).history
    graph, train = papers.train.graph, papers.train.nodes
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.01, weight_decay=5e-4)
    for row in history.itertuples():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(
            expected(graph.x, graph.edge_index)[train], graph.y[train]
        )
        assert row.train_loss == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            right = expected(graph.x, graph.edge_index).argmax(1) == graph.y
        assert row.test_accuracy == pytest.approx(right[papers.test.nodes].double().mean().item())
        assert row.val_accuracy == pytest.approx(right[papers.val.nodes].double().mean().item())
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value)
    assert not found.training


def test_it_learns(papers):
    history = fit(network(), papers, epochs=60).history
    assert history["test_accuracy"].iloc[-1] > 0.6 > history["test_accuracy"].iloc[0]


def test_it_ends_when_the_rate_has_died_and_going_on_would_change_nothing(papers):
    settings = dict(epochs=120, lr=0.01, lr_patience=3)
    found, longer = network(seed=1), network(seed=1)
    short = fit_nodes(found, papers, Schedule(**settings), progress=False)
    long = fit_nodes(longer, papers, Schedule(**settings, min_lr=0.0), progress=False)
    assert short.stop_reason == "rate" and long.stop_reason == "epochs"
    ended = len(short.history)
    assert ended < 100 and long.history["lr"].iloc[ended] < 1e-6 <= short.history["lr"].iloc[-1]
    pd.testing.assert_frame_equal(short.history, long.history.head(ended))
    for name, value in longer.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=1e-4)
    assert short.history["test_accuracy"].iloc[-1] == long.history["test_accuracy"].iloc[-1]


def test_the_seed_fixes_dropout_and_nothing_outside_is_changed(papers):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    runs = [fit(network(), papers, seed=seed).history for seed in (1, 1, 2)]
    torch.manual_seed(7)
    assert torch.equal(torch.get_rng_state(), before)
    pd.testing.assert_frame_equal(runs[0], runs[1])
    assert runs[0]["train_loss"].tolist() != runs[2]["train_loss"].tolist()


def test_the_rate_falls_when_the_validation_loss_does_not(papers):
    schedule = Schedule(epochs=40, lr=0.5, lr_patience=2)
    history = fit_nodes(network(), papers, schedule, progress=False).history
    assert history["lr"].min() < 0.1
    constant = replace(schedule, lr_patience=None)
    history = fit_nodes(network(), papers, constant, progress=False).history
    assert set(history["lr"]) == {0.5}


def test_gradients_are_recorded_for_every_epoch_and_layer(papers):
    found = fit(network(layers=3), papers, record_gradients=True, evaluate=False)
    assert len(found.gradients) == 5 * 3 * 2
    assert found.gradients.groupby(["epoch", "kind"])["layer"].agg(list).map(len).eq(3).all()
    assert {*found.history} == {"epoch", "train_loss", "lr"}
    assert fit(network(), papers).gradients.empty


def test_a_loss_that_is_not_finite_ends_the_training_and_is_kept(papers):
    model = network()
    with torch.no_grad():
        model.head.weight.fill_(math.inf)
    found = fit(model, papers)
    assert found.stop_reason == "not finite"
    assert len(found.history) == 1
    first = (papers.train.graph.y[papers.test.nodes] == 0).double().mean().item()
    assert found.history["test_accuracy"].item() == pytest.approx(first)


def test_hidden_features_are_zero_outside_the_training_nodes(papers):
    graph = papers.train.graph
    outside = torch.ones(300, dtype=torch.bool)
    outside[papers.train.nodes] = False
    for rate in (0.0, 0.25, 1.0):
        hidden = hide_features(papers, rate, seed=1)
        changed = (hidden.train.graph.x != graph.x).any(1)
        assert not changed[papers.train.nodes].any()
        assert int(changed.sum()) == round(rate * int(outside.sum()))
        assert (hidden.test.graph.x[changed] == 0).all()
        assert f"{rate:.0%} missing" in hidden.description.title
    assert torch.equal(
        graph.x,
        citation_like(0, **SMALL_CITATION).x,
    ), "the original is left as it was"
    one, same, other = (hide_features(papers, 0.5, seed=s).test.graph.x for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_bad_input_is_refused(papers, cache):
    with pytest.raises(ValueError, match="epochs: expected 1 or more, got 0"):
        Schedule(epochs=0)
    with pytest.raises(ValueError, match=r"lr: expected a value above 0, got 0\.0"):
        Schedule(lr=0.0)
    with pytest.raises(ValueError, match=r"min_lr: expected a value in \[0, lr\), got 0\.01"):
        Schedule(min_lr=0.01)
    with pytest.raises(ValueError, match=r"rate: expected a share in \[0, 1\], got 1\.5"):
        hide_features(papers, 1.5)
    with pytest.raises(ValueError, match=r"expected nodes of one graph.*got MOSES"):
        fit(network(), few_molecules(2, 2, 2))
    empty = replace(papers, train=NodesOfGraph(papers.train.graph, torch.tensor([]).long()))
    with pytest.raises(ValueError, match="train split is empty"):
        fit(network(), empty)
