"""Trained networks among two hundred untrained ones, by every measure; and how tails are made."""

import sys
from collections.abc import Sequence

import pandas as pd
from torch import Tensor
from tqdm import tqdm

from mapkg import hooks
from mapkg.all_measures import SUN_MAGNITUDE, row_measures
from mapkg.evaluation import batches, calibrate_batch_norm, predict
from mapkg.measures import LOG_EPS, MASSIVE_RATIO
from mapkg.models.config import Config
from mapkg.models.network import SCORES
from studies.data import Splits
from studies.emergence import fit_to_data
from studies.extras import build
from studies.files import commit, versions
from studies.train import seed_all

MEASURES = {
    "row": "row ratio",
    "layer": "layer ratio",
    "sun": "Sun's rule",
    "spread": "spread",
    "isolation": "isolation",
    "largest": "largest |s|",
}
"""Measures of a network, each its maximum over layers. For the layer's median stands the typical
median of a row. Sun's rule is met where the lesser of |s| / 100 and layer ratio / 1000 is above 1.
Isolation is the median over rows of largest over second largest. ``row_spread``, beside the spread
of ln r over all entries, is the mean of the spreads of rows."""


def measured(
    config: Config,
    splits: Splits,
    seeds: Sequence[int],
    *,
    graphs: int = 128,
    name: str = "custom",
    progress: bool = True,
) -> pd.DataFrame:
    """``MEASURES`` of untrained networks on the first test graphs, a row per seed.

    BatchNorm has the statistics of as many training graphs.
    """
    config = fit_to_data(config, splits.description)
    test, rows = list(batches(splits.test[:graphs], graphs)), []
    for seed in tqdm(seeds, name, file=sys.stderr, disable=not progress):
        seed_all(seed)
        model = calibrate_batch_norm(build(config).eval(), splits.train[:graphs])
        ((_, seen),) = hooks.scan(model, test, SCORES, forward=predict)
        layers = pd.DataFrame([_of_layer(score) for score in seen.values()])
        rows.append({"seed": seed, **layers.max()})
    origin = {"config": name, "dataset": splits.description.title, "graphs": graphs}
    return pd.DataFrame(rows).assign(**origin, versions=versions(), commit=commit())


def _of_layer(score: Tensor) -> dict[str, float]:
    rows = row_measures(score)
    largest, median = rows["largest"].max().item(), rows["median"].median().item()
    ratio = score.abs() / rows["median"].unsqueeze(-1)
    return {
        "row": rows["ratio"].max().item(),
        "layer": largest / median,
        "sun": min(largest / SUN_MAGNITUDE, largest / median / MASSIVE_RATIO),
        "spread": ratio.add(LOG_EPS).log().std().item(),
        "row_spread": rows["spread"].mean().item(),
        "isolation": rows["max_over_second"].median().item(),
        "largest": largest,
    }
