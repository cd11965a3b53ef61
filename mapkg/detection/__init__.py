"""Detect massive activations (MAs): ratios, thresholds, and summaries that stream.

An activation is massive when its magnitude exceeds 1000 times the median magnitude of its
row. A row is one edge (or node), its channels are those of all heads together.

- ``ratios``: the ratio and the threshold.
- ``summary``: what a layer looks like, gathered batch by batch.
- ``laws``: which probability law the ratios follow.
- ``nulls``: which ratios chance gives, and p-values.
- ``reporting``: one table and one verdict per layer, for any model.
"""

from mapkg.detection.laws import (
    LAWS,
    Distance,
    Fit,
    compare_laws,
    fit_law,
    histogram_from_table,
    ks_to_law,
    ks_two_sample,
)
from mapkg.detection.nulls import ProductNull, chance_level, p_value, product_of_normals
from mapkg.detection.ratios import MASSIVE_RATIO, activation_ratio, is_massive, row_median
from mapkg.detection.reporting import Report, report
from mapkg.detection.summary import (
    LOG_EPS,
    NEG_LOG_RATIO_BINS,
    QUANTILES,
    ActivationSummary,
    StreamingHistogram,
)

__all__ = [
    "LAWS",
    "LOG_EPS",
    "MASSIVE_RATIO",
    "NEG_LOG_RATIO_BINS",
    "QUANTILES",
    "ActivationSummary",
    "Distance",
    "Fit",
    "ProductNull",
    "Report",
    "StreamingHistogram",
    "activation_ratio",
    "chance_level",
    "compare_laws",
    "fit_law",
    "histogram_from_table",
    "is_massive",
    "ks_to_law",
    "ks_two_sample",
    "p_value",
    "product_of_normals",
    "report",
    "row_median",
]
