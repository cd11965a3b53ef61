"""Ratios and thresholds by hand, and streaming summaries against numpy."""

import math
import pickle

import numpy as np
import pytest
import torch

from mapkg.measures import (
    MASSIVE_RATIO,
    QUANTILES,
    ActivationSummary,
    StreamingHistogram,
    activation_ratio,
    is_massive,
    row_median,
)
from mapkg.nulls import product_of_normals

HALF_BIN = 10**0.0025  # of the summary's quantiles: bins of 0.005 decades


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


def by_numpy(x, heads, threshold=1000.0):
    """The statistics of a summary, row by row; quantiles are exact order statistics."""
    ratios, maxima, medians, massive = [], [], [], []
    zero_medians = nonfinite = saturated = head_sums = 0
    for row in x.numpy():
        if not np.isfinite(row).all():
            nonfinite += 1
            continue
        for head in np.split(row, heads):
            saturated += abs(head.sum()) > 5
            head_sums += 1
        magnitude = np.sort(np.abs(row))
        median = magnitude[(len(row) - 1) // 2]
        if median == 0:
            zero_medians += 1
            continue
        ratio = np.abs(row) / median
        ratios.append(ratio.max())
        maxima.append(magnitude[-1])
        medians.append(median)
        massive.append(ratio > threshold)
    massive = np.array(massive)

    def quantile(values, q):
        return np.quantile(values, q, method="inverted_cdf")

    return {
        "rows": len(x),
        "channels": x.shape[1],
        "zero_medians": zero_medians,
        "nonfinite_rows": nonfinite,
        "rows_with_massive": massive.any(axis=1).sum(),
        "share_rows_with_massive": massive.any(axis=1).mean(),
        "share_massive": massive.mean(),
        "share_channels_with_massive": massive.any(axis=0).mean(),
        "max_ratio": max(ratios),
        **{f"row_max_ratio_q{100 * q:02.0f}": quantile(ratios, q) for q in QUANTILES},
        "max_abs": max(maxima),
        "row_max_abs_q50": quantile(maxima, 0.5),
        "row_median_q50": quantile(medians, 0.5),
        "share_saturated": saturated / head_sums,
    }


# The ratio.


def test_the_ratio_by_hand():
    odd = torch.tensor([[-3.0, 1.0, 12.0], [0.5, -0.25, 0.0]])
    expected = torch.tensor([[1.0, 1 / 3, 4.0], [2.0, 1.0, 0.0]])
    torch.testing.assert_close(activation_ratio(odd), expected)
    # Of an even number of channels the lower middle one: 2 of 1, 2, 4, 8; not their mean 3.
    even = torch.tensor([[4.0, -1.0, 2.0, -8.0]])
    assert torch.equal(row_median(even), torch.tensor([2.0]))
    assert torch.equal(activation_ratio(even), torch.tensor([[2.0, 0.5, 1.0, 4.0]]))
    assert torch.equal(row_median(torch.tensor([[-7.0]])), torch.tensor([7.0]))


def test_the_median_is_that_of_magnitudes():
    # The median of the values would be 0, that of the magnitudes is 5.
    assert torch.equal(row_median(torch.tensor([[-6.0, -5.0, 0.0, 1.0, 5.0]])), torch.tensor([5.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_ratio_of_half_precision_by_hand(dtype):
    x = torch.tensor([[4.0, -1.0, 2.0, -8.0]], dtype=dtype)
    assert activation_ratio(x).tolist() == [[2.0, 0.5, 1.0, 4.0]]
    assert activation_ratio(x).dtype == dtype


def test_the_ratio_has_gradients_of_the_activation_and_of_the_median():
    x = torch.tensor([[4.0, -1.0, 2.0, -8.0]], requires_grad=True)
    activation_ratio(x)[0, 3].backward()  # |x_3| / |x_2|
    assert x.grad.tolist() == [[0, 0, -8 / 2**2, -1 / 2]]


@pytest.mark.parametrize("channels", [7, 8])
def test_the_ratio_ignores_scale_and_sign_and_follows_permutations(channels):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, channels, generator=generator, dtype=torch.float64)
    ratio = activation_ratio(x)
    scales = 10 ** torch.randn(50, 1, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(activation_ratio(x * scales), ratio, rtol=1e-13, atol=0)
    assert torch.equal(activation_ratio(-x), ratio)
    order = torch.randperm(channels, generator=generator)
    assert torch.equal(activation_ratio(x[:, order]), ratio[:, order])
    rows = torch.randperm(50, generator=generator)
    assert torch.equal(activation_ratio(x[rows]), ratio[rows])


def test_rows_without_a_usable_median_are_nan_and_leave_the_others_alone():
    nan, inf = math.nan, math.inf
    x = torch.tensor(
        [
            [0.0, 0.0, 0.0, 5.0],  # zero median
            [0.0, 0.0, 3.0, 5.0],  # the lower middle one is zero
            [0.0, 2.0, 3.0, 5.0],
            [nan, 1.0, 2.0, 3.0],
            [inf, 1.0, 2.0, 3.0],  # a finite median, but not a finite row
            [1.0, 1.0, -inf, -inf],
            [0.0, 0.0, 0.0, 0.0],
        ]
    )
    ratio = activation_ratio(x)
    usable = torch.tensor([False, False, True, False, False, False, False])
    assert torch.equal(ratio.isnan().all(dim=1), ~usable)
    torch.testing.assert_close(ratio[2], torch.tensor([0.0, 1.0, 1.5, 2.5]))
    assert not is_massive(ratio).any()


def test_massive_is_strictly_above_the_threshold():
    above = math.nextafter(1000.0, math.inf)
    ratio = torch.tensor([[999.0, 1000.0, above, 1e9, math.nan]], dtype=torch.float64)
    assert is_massive(ratio).tolist() == [[False, False, True, True, False]]
    assert is_massive(ratio, 999.0).tolist() == [[False, True, True, True, False]]
    assert MASSIVE_RATIO == 1000


def test_the_null_model_is_a_product_of_standard_normals():
    for factors in (1, 2, 3):
        x = product_of_normals(2000, 64, factors=factors, seed=1)
        assert x.shape == (2000, 64)
        assert x.dtype == torch.float64
        # E x = 0, E x^2 = 1, E |x| = (2 / pi)^(factors / 2): within five standard errors.
        for values, mean in ((x, 0), (x**2, 1), (x.abs(), (2 / math.pi) ** (factors / 2))):
            error = values.std().item() / math.sqrt(x.numel())
            assert abs(values.mean().item() - mean) < 5 * error
    assert torch.equal(x, product_of_normals(2000, 64, seed=1))
    assert not torch.equal(x, product_of_normals(2000, 64, seed=2))


def test_products_of_three_normals_are_never_massive():
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 20_000, 64, generator=generator)
    for x in (a * b * c, product_of_normals(20_000, 64)):
        ratio = activation_ratio(x)
        row_max = ratio.amax(dim=1)
        assert 20 < row_max.median().item() < 37
        assert 60 < row_max.quantile(0.99).item() < 90
        assert ratio.max().item() < 1000
        assert not is_massive(ratio).any()


# The histogram.


def test_counts_agree_with_numpy():
    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(5000, generator=generator, dtype=torch.float64)
    histogram = StreamingHistogram(-4.0, 5.0, 37)
    for part in values.split([1, 0, 1999, 3000]):
        histogram.update(part.reshape(-1, 1))
    expected, edges = np.histogram(values.numpy(), bins=37, range=(-4, 5))
    np.testing.assert_array_equal(histogram.counts.numpy(), expected)
    np.testing.assert_allclose(histogram.edges.numpy(), edges, rtol=0, atol=1e-14)
    assert histogram.num_below == (values < -4).sum() > 0
    assert histogram.num_above == (values > 5).sum() > 0
    assert histogram.counts.sum() + histogram.num_below + histogram.num_above == 5000
    assert histogram.min == values.min().item()
    assert histogram.max == values.max().item()


@pytest.mark.parametrize("total", [1, 2, 99, 100, 1000])
def test_quantiles_agree_with_numpy_to_half_a_bin(total):
    generator = torch.Generator().manual_seed(total)
    values = torch.randn(total, generator=generator, dtype=torch.float64)
    histogram = StreamingHistogram(-8.0, 8.0, 320)
    histogram.update(values)
    for q in (0.0, *QUANTILES, 1.0):
        expected = np.quantile(values.numpy(), q, method="inverted_cdf")
        assert abs(histogram.quantile(q) - expected) <= 0.025 + 1e-12
    assert values.min() <= histogram.quantile(0.0)
    assert histogram.quantile(1.0) <= values.max()


def test_a_value_on_an_edge_belongs_to_the_bin_above_it():
    histogram = StreamingHistogram(0.0, 4.0, 4)
    histogram.update(torch.tensor([-1e-9, 0.0, 0.999999, 1.0, 2.0, 2.5, 3.999999, 4.0, 1e30]))
    assert histogram.counts.tolist() == [2, 1, 2, 1]
    assert histogram.num_below == 1
    assert histogram.num_above == 2  # the upper end of the range is not in it


def test_quantiles_outside_the_range_are_the_extremes():
    histogram = StreamingHistogram(0.0, 4.0, 4)
    histogram.update(torch.tensor([-20.0, -10.0, 2.25, 30.0, 50.0]))
    assert [histogram.quantile(q) for q in (0.2, 0.4, 0.6, 0.8, 1.0)] == [-20, -20, 2.5, 50, 50]


def test_a_quantile_never_leaves_the_values_seen():
    histogram = StreamingHistogram(0.0, 4.0, 4)
    histogram.update(torch.tensor([1.75, 1.75]))
    assert histogram.quantile(0.5) == 1.75  # not the bin's centre, 1.5
    histogram.update(torch.tensor([1.125, 1.875]))
    assert histogram.quantile(0.5) == 1.5


def test_an_empty_histogram_has_no_quantiles():
    histogram = StreamingHistogram(0.0, 4.0, 4)
    histogram.update(torch.empty(0))
    histogram.update(torch.empty(0, 3))
    assert math.isnan(histogram.quantile(0.5))
    assert histogram.counts.tolist() == [0, 0, 0, 0]
    assert histogram.num_below == histogram.num_above == 0


def test_a_histogram_of_one_bin_counts_what_is_in_it():
    histogram = StreamingHistogram(0.0, 1.0, 1)
    histogram.update(torch.tensor([-0.5, 0.25, 0.75, 1.5, 2.0]))
    assert (histogram.num_below, histogram.counts.tolist(), histogram.num_above) == (1, [2], 2)


@pytest.mark.parametrize(("low", "high", "bins"), [(1.0, 1.0, 3), (2.0, 1.0, 3), (0.0, 1.0, 0)])
def test_a_histogram_without_a_range_or_bins_is_an_error(low, high, bins):
    with pytest.raises(ValueError, match="expected low < high and bins > 0"):
        StreamingHistogram(low, high, bins)


# The summary.


@pytest.mark.parametrize("channels", [8, 12, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_statistic_agrees_with_numpy(channels, dtype):
    heads = 3 if channels == 15 else 4
    x = heavy_tailed(400, channels, seed=channels, dtype=dtype)
    summary = ActivationSummary(heads=heads)
    summary.update(x)
    expected = by_numpy(x, heads)
    assert expected["rows_with_massive"] > 10
    assert 0 < expected["share_saturated"] < 1
    assert expected["zero_medians"] == 2
    assert expected["nonfinite_rows"] == 3
    found = summary.statistics()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if "_q" in name:
            assert value / HALF_BIN * (1 - 1e-6) <= found[name] <= value * HALF_BIN * (1 + 1e-6)
        elif isinstance(value, float | np.floating):
            assert found[name] == pytest.approx(
                value, rel=1e-6 if dtype == torch.float32 else 1e-12
            )
        else:
            assert found[name] == value


def test_the_histogram_holds_the_negative_logarithm_of_every_usable_ratio():
    x = heavy_tailed(400)
    x[20] = torch.tensor([1e9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])  # ratios 1e9, 1 and 0
    summary = ActivationSummary()
    summary.update(x)
    ratio = activation_ratio(x).numpy()
    values = -np.log10(ratio[np.isfinite(ratio)] + 2.220446049250313e-16)
    expected, edges = np.histogram(values, bins=1000, range=(-8, 17))
    counts = summary.neg_log_ratio.counts.numpy()
    # The median itself has the ratio 1: its logarithm lies on the edge of bins 319 and 320.
    assert edges[320] == pytest.approx(0, abs=1e-12)
    apart = np.delete(np.arange(1000), [319, 320])
    np.testing.assert_array_equal(counts[apart], expected[apart])
    assert counts.sum() == expected.sum()
    assert summary.neg_log_ratio.num_below == (values < -8).sum() == 1
    assert summary.neg_log_ratio.num_above == 0
    assert counts[int((15.653559774527022 + 8) / 0.025)] >= (x[11] == 0).sum() + 1


def test_massive_activations_are_counted_by_channel():
    x = heavy_tailed(400)
    summary = ActivationSummary()
    summary.update(x[:150])
    summary.update(x[150:])
    ratio = activation_ratio(x).numpy()
    expected = (ratio > 1000).sum(axis=0)
    assert expected.sum() > 10
    np.testing.assert_array_equal(summary.massive_by_channel.numpy(), expected)


@pytest.mark.parametrize("threshold", [10.0, 1000.0])
def test_a_planted_massive_activation_is_found_where_it_is(threshold):
    x = torch.ones(6, 5)
    x[4, 2] = -threshold - 1
    x[1, 3] = threshold  # not above it
    graph = torch.tensor([0, 0, 1, 1, 2, 2])
    summary = ActivationSummary(threshold=threshold)
    summary.update(x, graph)
    found = summary.statistics()
    assert summary.massive_by_channel.tolist() == [0, 0, 1, 0, 0]
    assert found["rows_with_massive"] == 1
    assert found["share_rows_with_massive"] == 1 / 6
    assert found["share_massive"] == 1 / 30
    assert found["share_channels_with_massive"] == 1 / 5
    assert found["max_ratio"] == pytest.approx(threshold + 1, rel=1e-12)
    assert summary.graph_maxima == [threshold, 1, threshold + 1]


def test_the_maximum_of_a_graph_is_over_its_usable_rows():
    x = heavy_tailed(100)
    generator = torch.Generator().manual_seed(1)
    graph = torch.randint(9, (100,), generator=generator)
    graph[graph == 5] = 4  # graph 5 has no rows
    graph[graph == 8] = 7
    graph[7] = 8  # graph 8 has only a row without a median
    summary = ActivationSummary()
    summary.update(x, graph, 11)
    ratio = activation_ratio(x).tolist()
    expected = [math.nan] * 11
    for row, number in zip(ratio, graph.tolist(), strict=True):
        if not math.isnan(row[0]):
            known = expected[number]
            expected[number] = max(row) if math.isnan(known) else max(known, *row)
    assert [number for number in range(11) if math.isnan(expected[number])] == [5, 8, 9, 10]
    np.testing.assert_array_equal(summary.graph_maxima, expected)


def test_without_a_number_of_graphs_there_are_as_many_as_are_named():
    summary = ActivationSummary()
    summary.update(torch.ones(3, 2), torch.tensor([0, 2, 2]))
    np.testing.assert_array_equal(summary.graph_maxima, [1, math.nan, 1])
    summary.update(torch.ones(0, 2), torch.empty(0, dtype=torch.long))
    assert len(summary.graph_maxima) == 3
    summary.update(3 * torch.ones(3, 2))  # one graph if none is named
    np.testing.assert_array_equal(summary.graph_maxima, [1, math.nan, 1, 1])


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
    assert first == 30
    statistics = whole.statistics()
    assert not any(math.isnan(value) for value in statistics.values())
    assert parts.statistics() == statistics
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
    summary = ActivationSummary(heads=2)
    summary.update(x)
    assert summary.statistics()["share_saturated"] == 4 / 8
    narrow = ActivationSummary(heads=2, clamp=4.0)
    narrow.update(x)
    assert narrow.statistics()["share_saturated"] == 6 / 8
    without = ActivationSummary()
    without.update(x)
    assert without.statistics()["share_saturated"] is None


def test_quantiles_of_rows_are_centres_of_bins_of_a_two_hundredth_decade():
    # Of three rows the middle one: median 10^0.001, maximum 10^1.001, ratio 10: the bins of their
    # logarithms begin at 0, at 1 and at 1.
    row = 10.0 ** torch.tensor([0.001, 0.001, 1.001], dtype=torch.double)
    least, most = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1e4]], dtype=torch.double)
    summary = ActivationSummary()
    summary.update(torch.stack([least / 100, row, 100 * most]))
    found = summary.statistics()
    assert found["row_median_q50"] == pytest.approx(10**0.0025, rel=1e-9)
    assert found["row_max_abs_q50"] == pytest.approx(10**1.0025, rel=1e-9)
    assert found["row_max_ratio_q50"] == pytest.approx(10**1.0025, rel=1e-9)


def test_another_number_of_channels_is_an_error():
    summary = ActivationSummary()
    summary.update(torch.ones(2, 4))
    with pytest.raises(ValueError, match="expected 4 channels as before, got 5"):
        summary.update(torch.ones(2, 5))
    assert summary.statistics()["rows"] == 2


def test_channels_that_heads_do_not_divide_are_an_error():
    with pytest.raises(ValueError, match="10 channels are not a multiple of 4 heads"):
        ActivationSummary(heads=4).update(torch.ones(2, 10))


@pytest.mark.parametrize(
    "x",
    [None, torch.empty(0, 4), torch.zeros(3, 4), torch.full((3, 4), math.nan)],
    ids=["no batch", "no rows", "no medians", "not finite"],
)
def test_without_a_usable_row_shares_and_values_are_nan(x):
    summary = ActivationSummary()
    if x is not None:
        summary.update(x)
        np.testing.assert_array_equal(summary.graph_maxima, [math.nan])
    found = summary.statistics()
    rows = 0 if x is None else len(x)
    counted = {
        "rows": rows,
        "channels": 0 if x is None else 4,
        "zero_medians": rows if x is not None and x.isfinite().all() else 0,
        "nonfinite_rows": rows if x is not None and x.isnan().any() else 0,
        "rows_with_massive": 0,
        "share_saturated": None,
    }
    for name, value in found.items():
        if name in counted:
            assert value == counted[name], name
        else:
            assert math.isnan(value), name


def test_rows_without_edges_between_batches_change_nothing():
    x = heavy_tailed(40)
    plain, mixed = ActivationSummary(heads=2), ActivationSummary(heads=2)
    plain.update(x)
    mixed.update(x[:0], torch.empty(0, dtype=torch.long), 0)
    mixed.update(x)
    mixed.update(x[:0], torch.empty(0, dtype=torch.long), 0)
    assert mixed.statistics() == plain.statistics()
    assert mixed.graph_maxima == plain.graph_maxima


def test_memory_does_not_grow_with_batches_but_for_one_number_per_graph():
    def size(summary):
        return len(pickle.dumps(vars(summary) | {"graph_maxima": []}))

    summary = ActivationSummary(heads=4)
    summary.update(heavy_tailed(100), torch.arange(100) // 50)
    before = size(summary)
    for seed in range(30):
        summary.update(heavy_tailed(100, seed=seed), torch.arange(100) // 50)
    assert size(summary) - before < 64  # counters have more digits now
    assert len(summary.graph_maxima) == 2 * 31


def test_a_ratio_beyond_single_precision_is_counted_as_what_it_is():
    summary = ActivationSummary()
    summary.update(torch.tensor([[1e-20, 1e-20, 1e20]]))
    found = summary.statistics()
    assert (found["zero_medians"], found["rows_with_massive"]) == (0, 1)
    assert found["max_ratio"] == pytest.approx(1e40, rel=1e-6)
