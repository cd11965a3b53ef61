"""Ratios and thresholds by hand."""

import math

import pytest
import torch

from mapkg.measures import (
    activation_ratio,
    is_massive,
    row_median,
)

# The ratio.


def test_the_ratio_and_the_median_of_magnitudes_by_hand():
    odd = torch.tensor([[-3.0, 1.0, 12.0], [0.5, -0.25, 0.0]])
    expected = torch.tensor([[1.0, 1 / 3, 4.0], [2.0, 1.0, 0.0]])
    torch.testing.assert_close(activation_ratio(odd), expected)
    # Of an even number of channels the lower middle one: 2 of 1, 2, 4, 8; not their mean 3.
    even = torch.tensor([[4.0, -1.0, 2.0, -8.0]])
    assert torch.equal(row_median(even), torch.tensor([2.0]))
    assert torch.equal(activation_ratio(even), torch.tensor([[2.0, 0.5, 1.0, 4.0]]))
    assert torch.equal(row_median(torch.tensor([[-7.0]])), torch.tensor([7.0]))
    # The median of the values would be 0.
    assert torch.equal(row_median(torch.tensor([[-6.0, -5.0, 0.0, 1.0, 5.0]])), torch.tensor([5.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_ratio_of_half_precision_is_compared_with_an_unrounded_threshold(dtype):
    x = torch.tensor([[4.0, -1.0, 2.0, -8.0]], dtype=dtype)
    assert activation_ratio(x).tolist() == [[2.0, 0.5, 1.0, 4.0]]
    assert activation_ratio(x).dtype == dtype
    for value, threshold in ((1000.0, 999.0), (3008.0, 3000.0), (32.125, 32.0625)):
        ratio = torch.tensor([[value]], dtype=dtype)
        assert is_massive(ratio, threshold).item() is (ratio.item() > threshold)
        assert not is_massive(ratio, ratio.item()).item()


def test_the_ratio_has_gradients_of_the_activation_and_of_the_median():
    x = torch.tensor([[4.0, -1.0, 2.0, -8.0]], requires_grad=True)
    activation_ratio(x)[0, 3].backward()  # |x_3| / |x_2|
    assert x.grad.tolist() == [[0, 0, -8 / 2**2, -1 / 2]]


def test_the_ratio_ignores_scale_and_sign_and_follows_permutations():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    scales = 10 ** torch.randn(50, 1, generator=generator, dtype=torch.float64)
    order, rows = (torch.randperm(size, generator=generator) for size in (8, 50))
    found = activation_ratio((-x * scales)[rows][:, order])
    torch.testing.assert_close(found, activation_ratio(x)[rows][:, order], rtol=1e-13, atol=0)


def test_rows_without_a_usable_median_are_nan_and_leave_the_others_alone():
    nan, inf = math.nan, math.inf
    x = torch.tensor(
        [
            [0.0, 0.0, 3.0, 5.0],  # the lower middle one is zero
            [0.0, 2.0, 3.0, 5.0],
            [nan, 1.0, 2.0, 3.0],
            [inf, 1.0, 2.0, 3.0],  # a finite median, but not a finite row
            [1.0, 1.0, -inf, -inf],
        ]
    )
    ratio = activation_ratio(x)
    assert ratio.isnan().all(dim=1).tolist() == [True, False, True, True, True]
    torch.testing.assert_close(ratio[1], torch.tensor([0.0, 1.0, 1.5, 2.5]))


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(3),
        torch.ones(3, 0),
        torch.ones(2, 2).long(),
        torch.ones(2, 2, dtype=torch.cfloat),
        [[1.0]],
    ],
)
def test_what_is_no_table_of_floats_has_no_ratio(x):
    # Our words, or in tests those of the checked types.
    with pytest.raises((ValueError, TypeError), match=r"x: expected a tensor of floats|Type"):
        activation_ratio(x)


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_a_threshold_that_is_no_ratio_is_refused(threshold):
    with pytest.raises(ValueError, match=f"threshold: expected a ratio above 0, got {threshold}"):
        is_massive(torch.ones(2, 2), threshold)


def test_massive_is_strictly_above_the_threshold_and_nan_is_not():
    above = math.nextafter(1000.0, math.inf)
    ratio = torch.tensor([[999.0, 1000.0, above, 1e9, math.nan]], dtype=torch.float64)
    assert is_massive(ratio).tolist() == [[False, False, True, True, False]]
    assert is_massive(ratio, 999.0).tolist() == [[False, True, True, True, False]]
