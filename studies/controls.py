"""Controls: networks that have not been trained, and data with nothing to learn."""

import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import pandas as pd
import torch
from torch_geometric.data import Data
from tqdm import tqdm

from mapkg.evaluation import calibrate_batch_norm
from mapkg.models.config import Config
from studies.data import NodesOfGraph, Splits
from studies.emergence import fit_to_data
from studies.extras import build
from studies.observation import summarise_scores
from studies.provenance import commit, versions
from studies.train import seed_all

CALIBRATION_GRAPHS = 1000
"""How many training graphs set the BatchNorm statistics of an untrained network."""


def permute_targets(splits: Splits, seed: int) -> Splits:
    """The same data with the targets of the training and validation graphs permuted.

    A null for the question whether massive activations need something to learn: graphs and
    targets are as before, each within its split, but have nothing to do with one another. The
    test split stays as it is.

    Args:
        splits: whole graphs.
        seed: of the permutations.

    Raises:
        ValueError: if the splits are nodes of one graph.
    """
    if isinstance(splits.train, NodesOfGraph):
        raise ValueError(
            "expected whole graphs, whose targets can change places, but "
            f"{splits.description.title} has nodes of one graph; use a data set of graphs"
        )
    generator = torch.Generator().manual_seed(seed)

    def permuted(graphs: list[Data]) -> list[Data]:
        copies = [copy(graph) for graph in graphs]  # a copy shares tensors, not attributes
        order = torch.randperm(len(graphs), generator=generator).tolist()
        for graph, other in zip(copies, order, strict=True):
            graph.y = graphs[other].y
        return copies

    about = splits.description
    return Splits(
        train=permuted(splits.train),
        val=permuted(splits.val),
        test=splits.test,
        description=replace(about, title=f"{about.title}, targets permuted"),
    )


def untrained(
    config: Config,
    splits: Splits,
    seeds: Sequence[int],
    *,
    name: str = "custom",
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """The ratios of untrained networks on the test split: the null of the trained ones.

    Args:
        config: what the networks are.
        splits: the data; the first thousand training graphs calibrate BatchNorm.
        seeds: of the initial weights, one network each; take others than those of the trained
            networks.
        name: what the table calls the configuration.
        device: where to compute.
        progress: whether to show a progress bar on stderr.

    Returns:
        A row per seed, state (``base`` and ``base_calibrated``, as in ``Emergence``) and
        layer, with the statistics of ``ActivationSummary``.
    """
    config = fit_to_data(config, splits.description)
    rows = []
    for seed in tqdm(seeds, "untrained networks", file=sys.stderr, disable=not progress):
        seed_all(seed)
        model = build(config).to(device).eval()
        for state in ("base", "base_calibrated"):
            if state == "base_calibrated":
                graphs = splits.train[:CALIBRATION_GRAPHS]
                calibrate_batch_norm(model, graphs, batch_size=config.batch_size)
            rows += [
                {"state": state, "layer": layer, "seed": seed, **summary.statistics()}
                for layer, summary in enumerate(summarise_scores(model, config, splits.test))
            ]
    origin = {"config": name, "dataset": splits.description.title}
    return pd.DataFrame(rows).assign(**origin, versions=versions(), commit=commit())
