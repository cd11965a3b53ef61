"""Measures of massive activations, streamed for many networks, against plain loops."""

import math

import numpy as np
import pytest
import torch

from studies.score_measures import BIN, COLUMNS, QUANTILES, ScoreMeasures

HALF_BIN = 10 ** (BIN / 2) * (1 + 1e-6)
NETWORKS, LAYERS, CHANNELS, HEADS, GRAPHS = 2, 2, 12, 3, 4


def lower_quantile(values, q):
    return np.sort(np.ravel(values))[max(1, math.ceil(q * np.size(values))) - 1]


def lower_median(values):
    return lower_quantile(values, 0.5)


def by_loop(molecules):
    """The measures of one network and layer from its molecules' scores, one row after another."""
    found, rows, spreads, entries, sums = dict.fromkeys(COLUMNS, 0), [], [], [], []
    for score in molecules:
        finite = [row for row in score if np.isfinite(row).all()]
        found["rows"] += len(score)
        found["nonfinite_rows"] += len(score) - len(finite)
        if not finite:
            continue
        found["molecules"] += 1
        typical = lower_median(np.abs(finite))
        sun = [np.abs(row).max() > max(100, 1000 * typical) for row in finite]
        found["sun_edges"] += sum(sun)
        found["sun_molecules"] += any(sun)
        for row in finite:
            sums += list(np.abs(row.reshape(HEADS, -1).sum(axis=1)))
            ordered = np.sort(np.abs(row))
            entries += list(ordered)
            median, largest = lower_median(ordered), ordered[-1]
            if median == 0:
                found["zero_medians"] += 1
                continue
            q90 = ordered[math.ceil(0.9 * CHANNELS) - 1]
            kurtosis = (row**4).mean() / (row**2).mean() ** 2
            rows.append(
                (largest / median, largest, median, largest / ordered[-2], largest / q90, kurtosis)
            )
            if ordered[0] == 0:
                found["rows_with_zero"] += 1
            else:
                spreads.append(np.log(ordered).std(ddof=1))
    ratios, largest, medians, seconds, q90s, kurtoses = np.array(rows).T
    layer_median = lower_median(entries)
    return found | {
        "max_ratio": ratios.max(),
        "rows_with_massive": (ratios > 1000).sum(),
        "share_rows_with_massive": (ratios > 1000).mean(),
        "max_abs": max(entries),
        "row_max_abs_q50": lower_median(largest),
        "row_median_q50": lower_median(medians),
        "layer_median": layer_median,
        "max_layer_ratio": max(entries) / layer_median,
        "share_rows_with_layer_massive": (largest > 1000 * layer_median).mean(),
        "spread_mean": np.mean(spreads),
        "spread_sd": np.std(spreads, ddof=1),
        "max_over_second_q50": lower_median(seconds),
        "max_over_q90_q50": lower_median(q90s),
        "kurtosis_q50": lower_median(kurtoses),
        "share_saturated": (np.array(sums) > 5).mean(),
        **{f"row_max_ratio_q{round(100 * q):02d}": lower_quantile(ratios, q) for q in QUANTILES},
    }


def molecules(generator, scale):
    """Scores of a batch: heavy-tailed, with bad rows, and edges of each molecule together."""
    batch = []
    for graph in range(GRAPHS):
        score = scale * generator.normal(size=(generator.integers(3, 9), CHANNELS)) ** 3
        score[0, 3] *= 4000 if graph else 1
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
def test_every_measure_agrees_with_a_loop_over_rows(dtype):
    generator = np.random.default_rng(0)
    measures = ScoreMeasures(NETWORKS, LAYERS, CHANNELS, heads=HEADS, dtype=dtype)
    measures.update(0, torch.ones(2, 1, CHANNELS), *(torch.ones(2, 1).bool(),) * 2, 2)
    measures.reset()  # forgets that
    seen = {(s, layer): [] for s in range(NETWORKS) for layer in range(LAYERS)}
    for layer in (0, 1) * 3:
        both = [molecules(generator, scale) for scale in (0.5, 10.0)]
        for s, batch in enumerate(both):
            seen[s, layer] += [x.astype(str(dtype)[6:]).astype(float) for x in batch]
        score, mask, graph = (
            torch.tensor(np.stack(x)) for x in zip(*map(padded, both), strict=True)
        )
        measures.update(layer, score.to(dtype), mask, graph, GRAPHS)
    table = measures.table()
    binned = [name for name in COLUMNS if name.endswith(("q01", "q25", "q50", "q75", "q99"))]
    binned += ["layer_median", "max_layer_ratio"]
    for (s, layer), scores in seen.items():
        expected = by_loop(scores)
        found = dict(zip(COLUMNS, table[s, layer].tolist(), strict=True))
        assert found["sun_edges"] > 0 and found["rows_with_massive"] > 0
        assert found["zero_medians"] > 0 and found["nonfinite_rows"] > 0
        for name in COLUMNS:
            if name in binned:
                assert 1 / HALF_BIN < found[name] / expected[name] < HALF_BIN, name
            else:
                assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def test_without_heads_no_sum_is_clamped_and_without_rows_there_is_no_ratio():
    measures = ScoreMeasures(1, 1, 4, heads=None)
    measures.update(0, torch.ones(1, 3, 4), torch.zeros(1, 3).bool(), torch.zeros(1, 3).long(), 2)
    found = dict(zip(COLUMNS, measures.table()[0, 0].tolist(), strict=True))
    assert found["rows"] == found["molecules"] == 0
    assert all(math.isnan(found[name]) for name in ("share_saturated", "max_ratio", "spread_mean"))
