"""Losses and metrics against hand values and loops."""

import math

import numpy as np
import pytest
import torch

from mapkg.metrics import best_constant, each_loss, losses, mean_roc_auc, measure, pooled_mean

NAN = float("nan")


def test_the_absolute_error_of_every_entry():
    predicted = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    target = torch.tensor([[0.0, 1.0], [0.5, -1.0]])
    assert losses(predicted, target, "l1").tolist() == [1.0, 3.0, 0.0, 4.0]
    assert measure(predicted, target, "l1") == {"mae": 2.0}


def test_a_bad_value_among_the_targets_of_a_regression_shows():
    found = measure(torch.zeros(2, 1), torch.tensor([[1.0], [NAN]]), "l1")
    assert math.isnan(found["mae"])


def test_the_cross_entropy_counts_labelled_entries_only():
    logits = torch.tensor([[0.0, 2.0], [-1.0, 100.0]])
    target = torch.tensor([[1.0, 0.0], [NAN, NAN]])
    expected = [math.log(2), math.log(1 + math.exp(2))]
    assert losses(logits, target, "bce").tolist() == pytest.approx(expected)
    assert measure(logits, target, "bce")["bce"] == pytest.approx(sum(expected) / 2)


def test_an_unlabelled_entry_gets_no_gradient():
    logits = torch.tensor([[0.5, -0.5]], requires_grad=True)
    losses(logits, torch.tensor([[1.0, NAN]]), "bce").mean().backward()
    assert logits.grad.tolist() == [[pytest.approx(1 / (1 + math.exp(-0.5)) - 1), 0.0]]


def test_the_area_under_the_curve_is_the_share_of_pairs_in_the_right_order():
    torch.manual_seed(0)
    logits = torch.randn(40, 3).round(decimals=1)  # with ties
    target = (torch.rand(40, 3) < 0.4).float()
    target[torch.rand(40, 3) < 0.3] = NAN
    areas = []
    for column in range(3):
        positive = logits[target[:, column] == 1, column]
        negative = logits[target[:, column] == 0, column]
        pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
        areas.append(float(sum(pairs)) / len(pairs))
    assert mean_roc_auc(logits, target) == pytest.approx(sum(areas) / 3)


def test_a_target_with_one_class_is_left_out_of_the_mean():
    logits = torch.tensor([[0.1, 5.0], [0.9, -5.0]])
    target = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert mean_roc_auc(logits, target) == 1.0
    assert math.isnan(mean_roc_auc(logits[:, 1:], target[:, 1:]))


def test_accuracy_is_that_of_the_sign_of_the_logit():
    logits = torch.tensor([[0.1], [-0.1], [3.0], [-3.0]])
    target = torch.tensor([[1.0], [1.0], [0.0], [NAN]])
    assert measure(logits, target, "bce")["accuracy"] == pytest.approx(1 / 3)


def test_nothing_labelled_is_an_error():
    with pytest.raises(ValueError, match="every target is NaN"):
        measure(torch.zeros(2, 1), torch.full((2, 1), NAN), "bce")


def test_a_class_that_is_no_class_is_an_error():
    with pytest.raises(ValueError, match="expected targets 0, 1 or NaN"):
        losses(torch.zeros(1, 1), torch.tensor([[2.0]]), "bce")


def test_other_shapes_are_an_error_not_broadcast():
    with pytest.raises(ValueError, match=r"predicts \(4, 1\) for targets of shape \(4, 2\)"):
        losses(torch.zeros(4, 1), torch.zeros(4, 2), "l1")


def test_an_unknown_loss_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"'l1', 'bce'.* got 'mse'"):
        losses(torch.zeros(1, 1), torch.zeros(1, 1), "mse")


def test_the_loss_of_each_entry_stands_where_its_target_does():
    predicted = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    target = torch.tensor([[1.0, torch.nan], [0.0, 1.0]])
    found = each_loss(predicted, target, "bce")
    assert found.shape == target.shape
    assert found[0, 1].isnan()
    torch.testing.assert_close(found[~target.isnan()], losses(predicted, target, "bce"))
    with pytest.raises(ValueError, match="out_channels"):
        each_loss(predicted, target[:1], "bce")


@pytest.mark.parametrize("loss", ["l1", "bce"])
def test_no_other_constant_has_less_loss_than_the_best(loss):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(51, 2, generator=generator)
    if loss == "bce":
        target = (target > 0.6).float()
        target[:4, 0] = torch.nan
    best = best_constant(target, loss)
    least = losses(best.expand_as(target), target, loss).mean()
    for other in torch.randn(20, 2, generator=generator):
        assert losses(other.expand_as(target), target, loss).mean() > least


def test_the_pooled_mean_weighs_entries_alike_and_draws_whole_graphs():
    sums, numbers = np.array([6.0, 0.0, 3.0, 1.0]), np.array([3, 0, 1, 2])
    mean, low, high = pooled_mean(sums, numbers, resamples=500, seed=1)
    assert mean == pytest.approx(10 / 6)
    assert 0.5 <= low < mean < high <= 3.0
    same = pooled_mean(np.repeat(sums, 25), np.repeat(numbers, 25), resamples=500)
    assert same[0] == pytest.approx(mean)
    assert same[2] - same[1] < (high - low) / 2  # more graphs, a narrower interval
    with pytest.raises(ValueError, match="two graphs"):
        pooled_mean(sums[:1], numbers[:1])
