"""Measures of massive activations, streamed for many networks, against numpy."""

import itertools
import math

import numpy as np
import pytest
import torch

from mapkg.all_measures import (
    BIN,
    COLUMNS,
    AllMeasures,
    _bisected_medians,
    _graph_medians,
    is_massive_by_sun,
    layer_ratio,
    row_measures,
)
from mapkg.measures import QUANTILES

HALF_BIN = 10 ** (BIN / 2) * (1 + 1e-6)
NETWORKS, LAYERS, CHANNELS, HEADS, GRAPHS = 2, 2, 12, 3, 4


def lower_quantile(values, q):
    return np.sort(np.ravel(values))[max(1, math.ceil(q * np.size(values))) - 1]


def lower_median(values):
    return lower_quantile(values, 0.5)


def by_numpy(molecules):
    """The measures of one network and layer from its molecules' scores."""
    every, sizes = np.concatenate(molecules), [len(each) for each in molecules]
    graph = np.repeat(range(len(molecules)), sizes)
    finite = np.isfinite(every).all(axis=1)
    score, graph = every[finite], graph[finite]
    ordered = np.sort(np.abs(score))
    typical = np.array([lower_median(ordered[graph == each]) for each in graph])
    sun = ordered[:, -1] > np.maximum(100, 1000 * typical)
    rows = ordered[ordered[:, (CHANNELS - 1) // 2] > 0]
    largest, median = rows[:, -1], rows[:, (CHANNELS - 1) // 2]
    ratios, layer_median = largest / median, lower_median(ordered)
    spreads = np.log(rows[rows[:, 0] > 0]).std(axis=1, ddof=1)
    return {
        "rows": len(every),
        "nonfinite_rows": len(every) - len(score),
        "zero_medians": len(score) - len(rows),
        "rows_with_zero": len(rows) - len(spreads),
        "molecules": len(np.unique(graph)),
        "sun_edges": sun.sum(),
        "sun_molecules": len(np.unique(graph[sun])),
        "max_ratio": ratios.max(),
        "rows_with_massive": (ratios > 1000).sum(),
        "share_rows_with_massive": (ratios > 1000).mean(),
        "max_abs": ordered.max(),
        "row_max_abs_q50": lower_median(largest),
        "row_median_q50": lower_median(median),
        "layer_median": layer_median,
        "max_layer_ratio": ordered.max() / layer_median,
        "share_rows_with_layer_massive": (ordered[:, -1] > 1000 * layer_median).mean(),
        "spread_mean": spreads.mean(),
        "spread_sd": spreads.std(ddof=1),
        "max_over_second_q50": lower_median(largest / rows[:, -2]),
        "max_over_q90_q50": lower_median(largest / rows[:, math.ceil(0.9 * CHANNELS) - 1]),
        "kurtosis_q50": lower_median((rows**4).mean(axis=1) / (rows**2).mean(axis=1) ** 2),
        "share_saturated": (np.abs(score.reshape(len(score), HEADS, -1).sum(axis=2)) > 5).mean(),
        **{name: lower_quantile(ratios, q) for name, q in QUANTILES.items()},
    }


def molecules(generator, scale):
    """Scores of a batch: heavy-tailed, with bad rows, and edges of each molecule together."""
    batch = []
    for graph in range(GRAPHS):
        score = scale * generator.normal(size=(generator.integers(3, 9), CHANNELS)) ** 3
        score[0, 3] *= 4000
        score *= 1e-3 if graph == 0 else 1  # above 1000 medians, but not above 100
        batch.append(score)
    batch[1][1, :7] = 0  # a zero median
    batch[1][2, 5] = 0  # a zero, no zero median
    batch[2][1, 2] = np.nan
    batch[3][:] = np.inf if scale > 5 else batch[3]  # a molecule without a finite row
    return batch


def padded(batch, rows=48):
    score, graph = np.full((rows, CHANNELS), 1e9), np.full(rows, GRAPHS)
    count = sum(map(len, batch))
    score[:count] = np.concatenate(batch)
    graph[:count] = np.repeat(range(GRAPHS), [len(molecule) for molecule in batch])
    return score, graph < GRAPHS, graph


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("over", ["data", "batch", "graph"])
def test_every_measure_agrees_with_numpy(dtype, over):
    generator = np.random.default_rng(0)
    measures = AllMeasures(NETWORKS, heads=HEADS, over=over)
    measures.update(torch.ones(2, 1, CHANNELS), torch.ones(2, 1).long(), 2)
    measures.reset()  # forgets that
    seen = [[] for _ in range(NETWORKS)]
    for _ in range(3):
        both = [molecules(generator, scale) for scale in (0.5, 10.0)]
        for batches, batch in zip(seen, both, strict=True):
            batches.append([x.astype(str(dtype)[6:]).astype(float) for x in batch])
        score, mask, graph = (
            torch.tensor(np.stack(x)) for x in zip(*map(padded, both), strict=True)
        )
        measures.update(score.to(dtype), graph, GRAPHS, mask)
    binned = [name for name in COLUMNS if name.endswith(("q01", "q25", "q50", "q75", "q99"))]
    binned += ["layer_median"] + ["max_layer_ratio"] * (over == "data")
    for batches, row in zip(seen, measures.table(), strict=True):
        expected = by_numpy([molecule for batch in batches for molecule in batch])
        if over != "data":
            expected |= by_unit(batches, over)
        found = dict(zip(COLUMNS, row.tolist(), strict=True))
        assert found["sun_edges"] > 0 and found["rows_with_massive"] > 0
        assert found["zero_medians"] > 0 and found["nonfinite_rows"] > 0
        for name in COLUMNS:
            if name in binned:
                assert 1 / HALF_BIN < found[name] / expected[name] < HALF_BIN, name
            else:
                assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def by_unit(batches, over):
    ratios = []
    for score in itertools.chain(*batches) if over == "graph" else map(np.concatenate, batches):
        finite = np.abs([row for row in score if np.isfinite(row).all()])
        ratios += [*(finite.max(axis=1) / lower_median(finite))] if len(finite) else []
    massive = np.array(ratios) > 1000
    return {"max_layer_ratio": max(ratios), "share_rows_with_layer_massive": massive.mean()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_medians_by_bisection_as_on_a_gpu_are_the_selected_ones(dtype):
    generator = torch.Generator().manual_seed(0)
    ascending = torch.randn(2, 60, 7, generator=generator, dtype=dtype).pow(5).abs().sort().values
    ascending[0, :9] = 0
    graph = torch.randint(5, (2, 60), generator=generator)
    graph[0, :9], graph[1, graph[1] == 2] = 0, 4  # a median of zero; no row in the third graph
    selected = _graph_medians(ascending, graph, 4)[:, :4]
    for i, j in itertools.product(range(2), range(4)):
        rows = ascending[i, graph[i] == j].numpy()
        expected = lower_median(rows) if len(rows) else math.nan
        np.testing.assert_equal(selected[i, j].item(), expected)
    there = ~selected.isnan()
    assert torch.equal(_bisected_medians(ascending, graph, 4)[:, :4][there], selected[there])
    assert there.sum() == 7 and selected.nan_to_num().min() == 0


def test_without_heads_no_sum_is_clamped_and_without_rows_there_is_no_ratio():
    measures = AllMeasures()
    measures.update(torch.ones(1, 0, 4), torch.zeros(1, 0).long(), 2)
    none = torch.zeros(1, 3)
    measures.update(torch.ones(1, 3, 4), none.long(), 2, none.bool())
    found = dict(zip(COLUMNS, measures.table()[0].tolist(), strict=True))
    assert found["rows"] == found["molecules"] == found["max_abs"] == 0
    assert all(math.isnan(found[name]) for name in ("share_saturated", "max_ratio", "spread_mean"))
    measures.update(torch.tensor([[[0.0, 0, 0.5]]]), none[:, :1].long(), 1)
    assert measures.statistics()["max_abs"] == 0.5
    assert measures.statistics()["max_layer_ratio"].isnan(), "the median is zero"


def test_half_precision_is_read_as_single_and_a_single_channel_has_no_measure():
    half = torch.tensor([[1, -2, 3, 60000]]).half()
    assert row_measures(half)["ratio"].item() == 30_000
    with pytest.raises(ValueError, match="at least 2 channels, got 1: a single channel"):
        row_measures(torch.ones(3, 1))


def test_the_layer_ratio_and_suns_rule_divide_by_the_median_of_a_graph():
    x = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6000.0], [0.01, 0.01, 99.0], [9.0, 1.0, 0.01]])
    x = torch.cat([x, torch.tensor([[math.nan, 1.0, 1.0], [0.0, 0.0, 0.0]])])
    whole, graph = layer_ratio(x[:4]), torch.tensor([0, 0, 1, 1, 1, 2])
    torch.testing.assert_close(whole, x[:4].abs() / 2)  # 12 magnitudes, the sixth is 2
    of_graph = layer_ratio(x, graph)  # medians 3, 0.01 and 0
    torch.testing.assert_close(of_graph[:4], x[:4].abs() / torch.tensor([[3.0, 3, 0.01, 0.01]]).T)
    assert of_graph[4:].isnan().all()
    assert is_massive_by_sun(x, graph).nonzero().tolist() == [[1, 2]]  # 99 is not above 100
    assert is_massive_by_sun(x[1:2] * 10).nonzero().tolist() == [[0, 2]]
    assert not is_massive_by_sun(torch.tensor([[0.2, 0.2, 199.0]])).any()
