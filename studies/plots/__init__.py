"""Figures: from tidy tables to matplotlib Axes, one function per figure."""

from studies.figures import use_style
from studies.plots.converged import beside_anchor, seeds_before_and_after, through_schedule
from studies.plots.diagrams import score_in_layer
from studies.plots.distributions import distribution_grid, fitted_distribution, ratio_distribution
from studies.plots.emergence import base_against_trained, by_layer, row_maxima, trajectory
from studies.plots.grid import (
    against_permuted,
    against_untrained,
    layers_through_training,
    rank_grid,
    through_training,
)

__all__ = [
    "against_permuted",
    "against_untrained",
    "base_against_trained",
    "beside_anchor",
    "by_layer",
    "distribution_grid",
    "fitted_distribution",
    "layers_through_training",
    "rank_grid",
    "ratio_distribution",
    "row_maxima",
    "score_in_layer",
    "seeds_before_and_after",
    "through_schedule",
    "through_training",
    "trajectory",
    "use_style",
]
