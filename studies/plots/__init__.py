"""Figures: from tidy tables to matplotlib Axes, one function per figure."""

from studies.figures import use_style
from studies.plots.converged import beside_anchor, seeds_before_and_after, through_schedule
from studies.plots.depth import (
    by_depth,
    constants,
    gradient_heat,
    largest_gradients,
    loss_by_depth,
)
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
from studies.plots.smoothing import (
    collapse,
    last_layer_gradients,
    losses_in_training,
    spread_by_layer,
)
from studies.plots.trees import tree_accuracy, tree_curves, tree_example

__all__ = [
    "against_permuted",
    "against_untrained",
    "base_against_trained",
    "beside_anchor",
    "by_depth",
    "by_layer",
    "collapse",
    "constants",
    "distribution_grid",
    "fitted_distribution",
    "gradient_heat",
    "largest_gradients",
    "last_layer_gradients",
    "layers_through_training",
    "loss_by_depth",
    "losses_in_training",
    "rank_grid",
    "ratio_distribution",
    "row_maxima",
    "score_in_layer",
    "seeds_before_and_after",
    "spread_by_layer",
    "through_schedule",
    "through_training",
    "trajectory",
    "tree_accuracy",
    "tree_curves",
    "tree_example",
    "use_style",
]
