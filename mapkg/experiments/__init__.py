"""Experiments: from a configuration to tidy tables, one function per question."""

from mapkg.experiments.controls import permute_targets, untrained
from mapkg.experiments.emergence import (
    emergence,
    examine_checkpoint,
    fit_to_data,
    observation_epochs,
)
from mapkg.experiments.results import (
    TABLES,
    Emergence,
    collect,
    count_types,
    emergence_table,
    range_over_seeds,
    read_emergence,
)

__all__ = [
    "TABLES",
    "Emergence",
    "collect",
    "count_types",
    "emergence",
    "emergence_table",
    "examine_checkpoint",
    "fit_to_data",
    "observation_epochs",
    "permute_targets",
    "range_over_seeds",
    "read_emergence",
    "untrained",
]
