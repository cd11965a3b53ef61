"""Ratios and thresholds by hand, and streaming summaries against numpy."""

import math

import numpy as np
import pytest
import torch

from mapkg.all_measures import AllMeasures
from mapkg.measures import (
    QUANTILES,
    ActivationSummary,
    StreamingHistogram,
    activation_ratio,
    is_massive,
    row_median,
)

nan, inf = math.nan, math.inf


def heavy_tailed(rows, channels=8, seed=0, dtype=torch.float64):
    """Rows with massive activations, and planted zeros, NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator, dtype=torch.float64) ** 5
    x *= 10 ** torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    x[3, : channels // 2 + 1] = 0  # zero median
    x[7] = 0
    x[11, : channels // 2 - 1] = 0  # zeros, but not the median
    x[13, 2] = nan
    x[17, 0], x[17, 5] = inf, -inf
    x[19] = nan
    return x.to(dtype)


@pytest.mark.parametrize(
    ("row", "median", "ratio"),
    [
        ([-3.0, 1.0, 12.0], 3, [1.0, 1 / 3, 4.0]),
        ([0.5, -0.25, 0.0], 0.25, [2.0, 1.0, 0.0]),
        ([4.0, -1.0, 2.0, -8.0], 2, [2.0, 0.5, 1.0, 4.0]),  # the lower middle one, not the mean 3
        ([-6.0, -5.0, 0.0, 1.0, 5.0], 5, [1.2, 1.0, 0.0, 0.2, 1.0]),  # that of the values is 0
        ([0.0, 0.0, 3.0, 5.0], 0, [nan] * 4),
        ([0.0, 2.0, 3.0, 5.0], 2, [0.0, 1.0, 1.5, 2.5]),
        ([nan, 1.0, 2.0, 3.0], nan, [nan] * 4),
        ([inf, 1.0, 2.0, 3.0], 2, [nan] * 4),  # a finite median, but not a finite row
        ([1.0, 1.0, -inf, -inf], 1, [nan] * 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_median_and_the_ratio_of_a_row_by_hand(row, median, ratio, dtype):
    x = torch.tensor([[1.0] * len(row), row], dtype=dtype)
    close = dict(equal_nan=True, check_dtype=False)
    torch.testing.assert_close(row_median(x)[1], torch.tensor(median, dtype=dtype), **close)
    torch.testing.assert_close(activation_ratio(x)[1], torch.tensor(ratio, dtype=dtype), **close)
    assert activation_ratio(x).dtype == dtype and (activation_ratio(x)[0] == 1).all()


def test_massive_is_strictly_above_an_unrounded_threshold_and_nan_is_not():
    above = math.nextafter(1000.0, inf)
    ratio = torch.tensor([[999.0, 1000.0, above, 1e9, nan]], dtype=torch.float64)
    assert is_massive(ratio).tolist() == [[False, False, True, True, False]]
    assert is_massive(ratio, 999.0).tolist() == [[False, True, True, True, False]]
    for dtype in (torch.float16, torch.bfloat16):
        for value, threshold in ((1000.0, 999.0), (3008.0, 3000.0), (32.125, 32.0625)):
            ratio = torch.tensor([[value]], dtype=dtype)
            assert is_massive(ratio, threshold).item() is (ratio.item() > threshold)


def test_the_ratio_has_gradients_of_the_activation_and_of_the_median():
    x = torch.tensor([[4.0, -1.0, 2.0, -8.0]], requires_grad=True)
    activation_ratio(x)[0, 3].backward()  # |x_3| / |x_2|
    assert x.grad.tolist() == [[0, 0, -8 / 2**2, -1 / 2]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        # Our words, or in tests those of the checked types.
        (lambda: activation_ratio(torch.ones(3)), "x: expected a tensor of floats|Type"),
        (lambda: activation_ratio(torch.ones(3, 0)), "x: expected a tensor of floats|Type"),
        (lambda: activation_ratio(torch.ones(2, 2).long()), "x: expected a tensor of floats|Type"),
        (lambda: activation_ratio([[1.0]]), "x: expected a tensor of floats|Type"),
        (lambda: is_massive(torch.ones(2, 2), 0.0), "threshold: expected a ratio above 0, got 0.0"),
        (lambda: is_massive(torch.ones(2, 2), nan), "threshold: expected a ratio above 0, got nan"),
        (lambda: StreamingHistogram(1.0, 1.0, 3), "expected low < high and bins > 0"),
        (lambda: StreamingHistogram(0.0, 1.0, 0), "expected low < high and bins > 0"),
    ],
)
def test_what_has_no_ratio_or_range_is_an_error(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


@pytest.mark.parametrize("total", [2, 1000])
def test_counts_and_quantiles_agree_with_numpy_to_half_a_bin(total):
    generator = torch.Generator().manual_seed(total)
    values = 3 * torch.randn(total, generator=generator, dtype=torch.float64)
    histogram = StreamingHistogram(-4.0, 5.0, 180)
    assert math.isnan(histogram.quantile(0.5))
    for part in values.split(400):
        histogram.update(part.reshape(-1, 1))
    histogram.update(torch.empty(0, 3))
    expected, edges = np.histogram(values.numpy(), bins=180, range=(-4, 5))
    np.testing.assert_array_equal(histogram.counts.numpy(), expected)
    np.testing.assert_allclose(histogram.edges.numpy(), edges, rtol=0, atol=1e-14)
    assert histogram.num_outside == total - expected.sum()
    for q in (0.0, *QUANTILES.values(), 1.0):
        exact = np.quantile(values.numpy(), q, method="inverted_cdf")
        if -4 < exact < 5:
            assert abs(histogram.quantile(q) - exact) <= 0.025 + 1e-12


def test_edges_belong_to_the_bin_above_and_quantiles_stay_among_the_values_seen():
    def filled(*values):
        histogram = StreamingHistogram(0.0, 4.0, 4)
        histogram.update(torch.tensor(values))
        return histogram

    histogram = filled(-1e-9, 0.0, 0.999999, 1.0, 2.0, 2.5, 3.999999, 4.0, 1e30)
    assert histogram.counts.tolist() == [2, 1, 2, 1]
    assert histogram.num_outside == 3  # the end of the range is outside
    histogram = filled(-20.0, -10.0, 2.25, 30.0, 50.0)
    assert [histogram.quantile(q) for q in (0.2, 0.4, 0.6, 0.8, 1.0)] == [-20, -20, 2.5, 50, 50]
    assert filled(1.75, 1.75).quantile(0.5) == 1.75  # not the bin's center, 1.5
    assert filled(1.75, 1.75, 1.125, 1.875).quantile(0.5) == 1.5
    again = StreamingHistogram.from_counts(0.0, 4.0, torch.tensor([2, 1, 2, 1]))
    assert again.counts.tolist() == [2, 1, 2, 1] and again.quantile(0.5) == 1.5


@pytest.mark.parametrize("channels", [8, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_statistic_is_that_of_all_measures_or_of_the_ratio(channels, dtype):
    heads = 3 if channels == 15 else 4
    x = heavy_tailed(400, channels, seed=channels, dtype=dtype)
    x[20] = torch.tensor([1e9] + [1.0] * (channels - 2) + [0.0])  # ratios 1e9, 1 and 0
    summary, reference = ActivationSummary(heads=heads), AllMeasures(heads=heads)
    for part in x.split(150):
        summary.update(part)
        reference.update(part.unsqueeze(0), torch.zeros(1, len(part)).long(), 1)
    found, ratio = summary.statistics(), activation_ratio(x.double())
    usable = ~ratio.isnan().any(dim=1)
    massive = ratio[usable] > 1000
    assert massive.any(dim=1).sum() > 10 and 0 < found["share_saturated"] < 1
    assert (found["zero_medians"], found["nonfinite_rows"]) == (2, 3)
    assert torch.equal(summary.massive_by_channel, massive.sum(dim=0))
    expected = {
        **{name: value.item() for name, value in reference.statistics().items()},
        "channels": channels,
        "share_massive": massive.double().mean().item(),
        "share_channels_with_massive": massive.any(dim=0).double().mean().item(),
        "max_abs": x[usable].abs().max().item(),
    }
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=0.012 if "_q" in name else 1e-6), name
    # The histogram has -log10 of every ratio, 15.65 of zeros.
    values = -np.log10(ratio[usable].numpy() + 2.220446049250313e-16)
    expected, _ = np.histogram(values, bins=1000, range=(-8, 17))
    counts = summary.neg_log_ratio.counts.numpy()
    # The median itself has the ratio 1: its logarithm lies on the edge of bins 319 and 320.
    np.testing.assert_array_equal(np.delete(counts, [319, 320]), np.delete(expected, [319, 320]))
    assert (counts.sum(), summary.neg_log_ratio.num_outside) == (expected.sum(), 1)


@pytest.mark.parametrize("threshold", [10.0, 1000.0])
def test_a_planted_massive_activation_is_found_where_it_is(threshold):
    x = torch.ones(6, 5)
    x[4, 2] = -threshold - 1
    x[1, 3] = threshold  # not above it
    x[2:4, 0] = 5.0  # at the clamp of sums, here of one channel, not beyond it
    summary = ActivationSummary(heads=5, threshold=threshold)
    summary.update(x, torch.tensor([0, 0, 1, 1, 2, 2]), 3)
    with pytest.raises(ValueError, match="expected 5 channels as before, got 4"):
        summary.update(x[:, :4])
    found = summary.statistics()
    assert summary.massive_by_channel.tolist() == [0, 0, 1, 0, 0]
    assert (found["rows_with_massive"], found["share_rows_with_massive"]) == (1, 1 / 6)
    assert (found["share_massive"], found["share_channels_with_massive"]) == (1 / 30, 1 / 5)
    assert found["max_ratio"] == pytest.approx(threshold + 1, rel=1e-12)
    assert found["share_saturated"] == 2 / 30
    assert summary.graph_maxima == [threshold, 5, threshold + 1]
    summary.update(x[:3], torch.tensor([0, 2, 2]), 3)
    summary.update(torch.tensor([[1e-20] * 4 + [1e20]]))  # one graph, beyond single precision
    np.testing.assert_allclose(summary.graph_maxima[3:], [1, nan, threshold, 1e40], rtol=1e-6)


@pytest.mark.parametrize(("fill", "rows"), [(0.0, 0), (0.0, 3), (nan, 3)])
def test_without_a_usable_row_shares_and_values_are_nan(fill, rows):
    summary = ActivationSummary()
    assert summary.statistics()["channels"] == 0
    summary.update(torch.full((rows, 4), fill))
    np.testing.assert_array_equal(summary.graph_maxima, [nan])
    found = summary.statistics()
    counts = ("rows", "channels", "zero_medians", "nonfinite_rows", "rows_with_massive")
    bad = (0, rows) if math.isnan(fill) else (rows, 0)
    assert tuple(map(found.pop, counts)) == (rows, 4, *bad, 0)
    assert found.pop("share_saturated") is None
    assert all(math.isnan(value) for value in found.values())
