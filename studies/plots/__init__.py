"""Figures: from tidy tables to matplotlib Axes, one function per figure."""

from studies.figures import use_style
from studies.plots.attribution import (
    by_label,
    faithfulness,
    heat_maps,
    measured_and_predicted,
    types_through_training,
    variants,
)
from studies.plots.bonds import gallery
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
from studies.plots.molecules import molecule, type_counts
from studies.plots.remedies import arms, losses_under_attack, with_and_without_term
from studies.plots.viewer import viewer

__all__ = [
    "against_permuted",
    "against_untrained",
    "arms",
    "base_against_trained",
    "beside_anchor",
    "by_label",
    "by_layer",
    "distribution_grid",
    "faithfulness",
    "fitted_distribution",
    "gallery",
    "heat_maps",
    "layers_through_training",
    "losses_under_attack",
    "measured_and_predicted",
    "molecule",
    "rank_grid",
    "ratio_distribution",
    "row_maxima",
    "score_in_layer",
    "seeds_before_and_after",
    "through_schedule",
    "through_training",
    "trajectory",
    "type_counts",
    "types_through_training",
    "use_style",
    "variants",
    "viewer",
    "with_and_without_term",
]
