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


def heavy_tailed(rows, channels=8, seed=0, dtype=torch.float64):
    """Rows with massive activations, and planted zeros, NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator, dtype=torch.float64) ** 5
    x *= 10 ** torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    x[3, : channels // 2 + 1] = 0  # zero median
    x[7] = 0
    x[11, : channels // 2 - 1] = 0  # zeros, but not the median
    x[13, 2] = torch.nan
    x[17, 0], x[17, 5] = torch.inf, -torch.inf
    x[19] = torch.nan
    return x.to(dtype)


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


# The histogram.


@pytest.mark.parametrize("total", [1, 2, 99, 1000])
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
    assert (histogram.num_below, histogram.num_above) == ((values < -4).sum(), (values > 5).sum())
    assert (histogram.min, histogram.max) == (values.min().item(), values.max().item())
    for q in (0.0, *QUANTILES, 1.0):
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
    assert (histogram.num_below, histogram.num_above) == (1, 2)  # the end of the range is outside
    histogram = filled(-20.0, -10.0, 2.25, 30.0, 50.0)
    assert [histogram.quantile(q) for q in (0.2, 0.4, 0.6, 0.8, 1.0)] == [-20, -20, 2.5, 50, 50]
    assert filled(1.75, 1.75).quantile(0.5) == 1.75  # not the bin's center, 1.5
    assert filled(1.75, 1.75, 1.125, 1.875).quantile(0.5) == 1.5
    for low, high, bins in ((1.0, 1.0, 3), (2.0, 1.0, 3), (0.0, 1.0, 0)):
        with pytest.raises(ValueError, match="expected low < high and bins > 0"):
            StreamingHistogram(low, high, bins)


# The summary.


@pytest.mark.parametrize("channels", [8, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_statistic_is_that_of_all_measures_or_of_the_ratio(channels, dtype):
    heads = 3 if channels == 15 else 4
    x = heavy_tailed(400, channels, seed=channels, dtype=dtype)
    summary, reference = ActivationSummary(heads=heads), AllMeasures(channels, heads=heads)
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


def test_the_histogram_holds_the_negative_logarithm_of_every_usable_ratio():
    x = heavy_tailed(400)
    x[20] = torch.tensor([1e9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])  # ratios 1e9, 1 and 0
    summary = ActivationSummary()
    summary.update(x)
    ratio = activation_ratio(x).numpy()
    values = -np.log10(ratio[np.isfinite(ratio)] + 2.220446049250313e-16)  # 15.65 for zeros
    expected, _ = np.histogram(values, bins=1000, range=(-8, 17))
    counts = summary.neg_log_ratio.counts.numpy()
    # The median itself has the ratio 1: its logarithm lies on the edge of bins 319 and 320.
    np.testing.assert_array_equal(np.delete(counts, [319, 320]), np.delete(expected, [319, 320]))
    assert counts.sum() == expected.sum()
    assert (summary.neg_log_ratio.num_below, summary.neg_log_ratio.num_above) == (1, 0)


@pytest.mark.parametrize("threshold", [10.0, 1000.0])
def test_a_planted_massive_activation_is_found_where_it_is(threshold):
    x = torch.ones(6, 5)
    x[4, 2] = -threshold - 1
    x[1, 3] = threshold  # not above it
    summary = ActivationSummary(threshold=threshold)
    with pytest.raises(ValueError, match="5 channels are not a multiple of 4 heads"):
        ActivationSummary(heads=4).update(x)
    summary.update(x, torch.tensor([0, 0, 1, 1, 2, 2]))
    with pytest.raises(ValueError, match="expected 5 channels as before, got 4"):
        summary.update(x[:, :4])
    found = summary.statistics()
    assert summary.massive_by_channel.tolist() == [0, 0, 1, 0, 0]
    assert (found["rows_with_massive"], found["share_rows_with_massive"]) == (1, 1 / 6)
    assert (found["share_massive"], found["share_channels_with_massive"]) == (1 / 30, 1 / 5)
    assert found["max_ratio"] == pytest.approx(threshold + 1, rel=1e-12)
    assert summary.graph_maxima == [threshold, 1, threshold + 1]
    summary.update(x[:3], torch.tensor([0, 2, 2]))  # as many graphs as are named
    summary.update(x[:0], torch.empty(0, dtype=torch.long))
    summary.update(torch.tensor([[1e-20] * 4 + [1e20]]))  # one, beyond single precision
    np.testing.assert_allclose(summary.graph_maxima[3:], [1, math.nan, threshold, 1e40], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [[30], [1] * 30, [7, 0, 11, 12], [29, 1]])
def test_any_partition_into_batches_gives_equal_statistics(sizes, dtype):
    # 30 graphs of 10 rows each, but graph 4 of none.
    x = heavy_tailed(290, dtype=dtype)
    graph = torch.arange(30).repeat_interleave(torch.tensor([10] * 4 + [0] + [10] * 25))
    whole, parts = ActivationSummary(heads=4), ActivationSummary(heads=4)
    whole.update(x, graph, 30)
    first = 0
    for size in sizes:
        chosen = (graph >= first) & (graph < first + size)
        parts.update(x[chosen], graph[chosen] - first, size)
        first += size
    assert parts.statistics() == whole.statistics()
    np.testing.assert_array_equal(parts.graph_maxima, whole.graph_maxima)
    assert torch.equal(parts.massive_by_channel, whole.massive_by_channel)
    assert torch.equal(parts.neg_log_ratio.counts, whole.neg_log_ratio.counts)


def test_a_head_is_saturated_if_its_sum_lies_outside_the_clamp():
    x = torch.tensor(
        [
            [2.0, 3.0, -6.0, 1.0],  # sums 5 and -5: at the clamp, not outside
            [2.0, 3.5, -6.5, 1.0],  # 5.5 and -5.5
            [9.0, -9.0, 0.0, 5.25],  # 0 and 5.25
            [math.nan, 9.0, 9.0, 9.0],  # not finite: not counted
            [0.0, 0.0, 0.0, 8.0],  # no median, but sums 0 and 8
        ]
    )
    for options, share in (({}, 4 / 8), (dict(clamp=4.0), 6 / 8)):
        summary = ActivationSummary(heads=2, **options)
        summary.update(x)
        assert summary.statistics()["share_saturated"] == share


@pytest.mark.parametrize("fill", [0.0, math.nan])
@pytest.mark.parametrize("rows", [0, 3])
def test_without_a_usable_row_shares_and_values_are_nan(fill, rows):
    summary = ActivationSummary()
    assert summary.statistics()["channels"] == 0
    summary.update(torch.full((rows, 4), fill))
    np.testing.assert_array_equal(summary.graph_maxima, [math.nan])
    found = summary.statistics()
    counts = ("rows", "channels", "zero_medians", "nonfinite_rows", "rows_with_massive")
    bad = (0, rows) if math.isnan(fill) else (rows, 0)
    assert tuple(map(found.pop, counts)) == (rows, 4, *bad, 0)
    assert found.pop("share_saturated") is None
    assert all(math.isnan(value) for value in found.values())
