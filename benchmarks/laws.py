"""A gamma fit from binned counts against scipy's fit of the values, as ratios within one run.

The histograms are those of the ten layers of the trained network in the tracked results; the
values are drawn from them, uniformly within bins, and both fits are of these. A binned fit of
all 3.2 million values of a layer takes no longer than that of the sample, scipy's as much
longer as there are more values. Scipy's fit may stop short of the maximum: where the gain in
log-likelihood is not zero, compare with the column of a fit by scipy that starts from ours.
"""

import time

import numpy as np
import pandas as pd
import torch
from scipy import stats

from mapkg.measures import StreamingHistogram
from studies.data import BUNDLED
from studies.laws import fit_law, histogram_from_table

SAMPLE = 100_000


def main() -> None:
    table = pd.read_csv(BUNDLED / "results" / "emergence_gt_zinc_histogram.csv.gz")
    table = table[(table["state"] == "best") & (table["seed"] == 0)]
    generator = np.random.default_rng(0)
    rows = []
    for layer, part in table.groupby("layer"):
        histogram = histogram_from_table(part)
        share = part["count"].to_numpy() / part["count"].sum()
        width = (histogram.high - histogram.low) / histogram.bins
        values = generator.choice(part["low"].to_numpy(), SAMPLE, p=share)
        values = values + width * generator.random(SAMPLE)
        sample = StreamingHistogram(histogram.low, histogram.high, histogram.bins)
        sample.update(torch.from_numpy(values))
        start = time.process_time()
        binned = fit_law(sample)
        middle = time.process_time()
        plain = stats.gamma(*stats.gamma.fit(values))
        end = time.process_time()
        shape, loc, scale = binned.params
        started = stats.gamma(*stats.gamma.fit(values, shape, loc=loc, scale=scale))
        grid = np.linspace(values.min(), values.max(), 2001)
        ours = stats.gamma(*binned.params).logpdf(values).mean()
        rows.append(
            {
                "layer": layer,
                "binned, s": middle - start,
                "scipy, s": end - middle,
                "gain in log-likelihood": ours - plain.logpdf(values).mean(),
                "CDF difference": np.abs(binned.cdf(grid) - plain.cdf(grid)).max(),
                "CDF difference, started": np.abs(binned.cdf(grid) - started.cdf(grid)).max(),
                "KS, binned": binned.ks.statistic,
                "KS, values": stats.kstest(values, started.cdf).statistic,
                "all values": int(histogram.counts.sum()),
            }
        )
    found = pd.DataFrame(rows).set_index("layer")
    print(found.to_string(float_format="{:.5f}".format))
    seconds = found.iloc[:, :2].sum()
    ratio = seconds.iloc[1] / seconds.iloc[0]
    whole = ratio * found["all values"].mean() / SAMPLE
    print(f"\nten layers, binned: {seconds.iloc[0]:.1f} s of processor time")
    print(f"scipy / binned: {ratio:.1f} for {SAMPLE:,} values; for all, in proportion: {whole:.0f}")


if __name__ == "__main__":
    main()
