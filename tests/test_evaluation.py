"""Scores of models against scikit-learn and by hand."""

import pytest
import torch
from conftest import few_molecules
from sklearn.metrics import accuracy_score, log_loss, mean_absolute_error, roc_auc_score
from torch import nn
from torch_geometric.data import Data

from mapkg.evaluation import batches, calibrate_batch_norm, evaluate, score
from mapkg.models import build
from studies.published import CONFIGS

NAN = float("nan")


class Sums(nn.Module):
    """Predicts for each graph the sum of its rows."""

    def forward(self, x, edge_index, edge_attr, batch, batch_size):
        return x.new_zeros(batch_size, x.size(1)).index_add_(0, batch, x)


def graph(x, y):
    edge_index = torch.tensor([[0], [0]])
    return Data(
        x=torch.tensor(x),
        edge_index=edge_index,
        edge_attr=torch.zeros(1),
        y=torch.tensor([y]),
    )


@pytest.fixture(scope="module")
def graphs():
    """Forty graphs of one to four nodes with three targets, a third of them unlabelled."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(40):
        x = torch.randn(1 + number % 4, 3, generator=generator)
        y = (torch.rand(1, 3, generator=generator) < 0.4).float()
        y[torch.rand(1, 3, generator=generator) < 0.33] = NAN
        found.append(
            Data(x=x, edge_index=torch.zeros(2, 1, dtype=torch.long), edge_attr=x[:1], y=y)
        )
    return found


# Metrics of whole graphs.


def test_the_mean_absolute_error_of_two_graphs_by_hand():
    pair = [graph([[1.0], [2.0]], [5.0]), graph([[-1.0]], [1.0])]
    assert score(Sums(), pair) == {"mae": 2.0}


def test_the_mean_absolute_error_is_that_of_scikit_learn(graphs):
    complete = [replace_y(one, one.y.nan_to_num(0.5)) for one in graphs]
    predicted = torch.stack([one.x.sum(0) for one in complete])
    target = torch.cat([one.y for one in complete])
    found = score(Sums(), complete, batch_size=7)
    assert found == {"mae": pytest.approx(mean_absolute_error(target, predicted), rel=1e-6)}


def replace_y(one, y):
    changed = one.clone()
    changed.y = y
    return changed


def test_the_metrics_of_a_classification_are_those_of_scikit_learn_on_labelled_entries(graphs):
    logits = torch.stack([one.x.sum(0) for one in graphs]).double()
    target = torch.cat([one.y for one in graphs])
    labelled = ~target.isnan()
    assert 20 < int((~labelled).sum()) < 60
    found = score(Sums(), graphs, loss="bce", batch_size=7)
    probability = logits.sigmoid()
    assert found["bce"] == pytest.approx(
        log_loss(target[labelled], probability[labelled]), rel=1e-5
    )
    areas = [
        roc_auc_score(target[labelled[:, task], task], logits[labelled[:, task], task])
        for task in range(3)
    ]
    assert found["roc_auc"] == pytest.approx(sum(areas) / 3)
    right = accuracy_score(target[labelled], probability[labelled] > 0.5)
    assert found["accuracy"] == pytest.approx(right)
    assert set(found) == {"bce", "roc_auc", "accuracy"}


@pytest.mark.parametrize("loss", ["l1", "bce"])
def test_no_metric_depends_on_how_graphs_are_put_into_batches(loss, graphs):
    graphs = graphs if loss == "bce" else [replace_y(one, one.y.nan_to_num(0)) for one in graphs]
    expected = score(Sums(), graphs, loss=loss, batch_size=len(graphs))
    for batch_size in (1, 3, 39):  # the last batch is smaller
        found = score(Sums(), graphs, loss=loss, batch_size=batch_size)
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_batch_without_any_label_takes_part_in_nothing(graphs):
    silent = [replace_y(one, torch.full((1, 3), NAN)) for one in graphs[:5]]
    expected = score(Sums(), graphs[5:], loss="bce", batch_size=5)
    assert score(Sums(), [*silent, *graphs[5:]], loss="bce", batch_size=5) == expected


def test_nothing_labelled_is_an_error(graphs):
    silent = [replace_y(one, torch.full((1, 3), NAN)) for one in graphs[:3]]
    with pytest.raises(ValueError, match="every target is NaN"):
        score(Sums(), silent, loss="bce")


@pytest.mark.parametrize(("loss", "metric"), [("l1", "mae"), ("bce", "bce")])
def test_evaluate_gives_the_loss_alone(loss, metric, graphs):
    graphs = [replace_y(one, one.y.nan_to_num(1)) for one in graphs]
    found = evaluate(Sums(), graphs, loss=loss, batch_size=6)
    assert found == score(Sums(), graphs, loss=loss, batch_size=6)[metric]


# Batches.


def test_batches_of_graphs_keep_their_order_and_hold_as_many_as_asked_for(graphs):
    found = list(batches(graphs, 16))
    assert [batch.num_graphs for batch in found] == [16, 16, 8]
    assert torch.equal(torch.cat([batch.x for batch in found]), torch.cat([g.x for g in graphs]))


def test_shuffled_batches_hold_every_graph_once_in_an_order_of_torchs_generator(graphs):
    def order(seed):
        torch.manual_seed(seed)
        return [
            float(x)
            for batch in batches(graphs, 16, shuffle=True)
            for x in batch.x[batch.ptr[:-1], 0]
        ]

    first = order(0)
    assert order(0) == first != order(1)
    assert sorted(first) == sorted(float(one.x[0, 0]) for one in graphs)


# BatchNorm.


@pytest.mark.parametrize("batch_size", [64, 32])
def test_calibration_sets_the_statistics_to_those_of_the_data(batch_size):
    config = CONFIGS["GT-ZINC"].replace(hidden_channels=16, heads=4, num_layers=2, dropout=0.5)
    molecules, model = few_molecules(64, 1, 1).train, build(config)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm1d)}
    assert len(norms) == 8
    inputs = {name: [] for name in norms}
    for name, norm in norms.items():
        nn.init.normal_(norm.running_mean)  # statistics of before, to be forgotten
        norm.num_batches_tracked.fill_(7)
        norm.momentum = 0.3
        norm.register_forward_pre_hook(lambda _, x, name=name: inputs[name].append(x[0].double()))
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.train()
    found = calibrate_batch_norm(model, molecules, batch_size=batch_size)
    assert found is model
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    for name, norm in norms.items():
        assert norm.momentum == 0.3
        assert len(inputs[name]) == 64 // batch_size
        mean = torch.stack([x.mean(dim=0) for x in inputs[name]]).mean(dim=0)
        squares = [((x - x.mean(dim=0)) ** 2).sum(dim=0) / (len(x) - 1) for x in inputs[name]]
        variance = torch.stack(squares).mean(dim=0)
        close = dict(check_dtype=False, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_mean, mean, **close)
        torch.testing.assert_close(norm.running_var, variance, **close)
