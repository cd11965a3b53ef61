"""Do massive activations follow frequency, meaning, or the embedding rows? Four types, by kinds.

``bond_changes.cross_types`` draws the data. In a *square* of four networks with the same initial
weights, the rows of the edge embedding are rotated over the types: each type has each row once.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import nn

from mapkg.all_measures import row_measures
from mapkg.models.config import Config
from mapkg.models.network import build
from studies.bond_changes import NODE_TYPES, ROLES, cross_types
from studies.data import Splits
from studies.edge_kinds import first_layer
from studies.published import CONFIGS
from studies.statistics import equivalence, hierarchical_bootstrap, sign_flips, with_holm
from studies.tables import Result, Study, run_study
from studies.train import fit

KINDS = pd.DataFrame(
    product(range(1, 5), range(NODE_TYPES), range(NODE_TYPES)), columns=["edge", "source", "target"]
)
"""All that the first layer can tell apart, 36 kinds of each edge type."""

PAIRS = [f"{source}-{target}" for source, target in product(range(NODE_TYPES), repeat=2)]

CONTRASTS = {
    "frequent over rare": (1, 1, -1, -1),
    "informative over uninformative": (1, -1, 1, -1),
    "interaction": (1, -1, -1, 1),
}
"""Signs of the types 1 to 4; a contrast is half the sum with these signs."""

PREDICTED = pd.DataFrame(
    [
        ("frequency alone", "above", "none", "none", "no"),
        ("information alone", "none", "below", "none", "no"),
        ("embedding rows alone", "none", "none", "none", "yes"),
        ("both: common and saying nothing", "above", "below", "below", "no"),
        ("what we expect", "above", "none", "none", "yes"),
    ],
    columns=["if massive activations follow", *CONTRASTS, "rows"],
)
"""Written before any run of these seeds. None means within the margin of the grid by two one-sided
t tests over squares; else it is above or below if the exact test of sign flips has p < 0.05 after
Holm's correction over both measures, else open. In the last column rows differ if p < 0.05. The
row ratio decides. One square of another seed had been seen at 24 epochs, to choose sizes:
log ratios 0.5 larger for frequent types than for rare ones, 0.05 to 0.1 for informative ones."""


def untrained(config: Config, square: int, rotation: int) -> nn.Module:
    """A network of a square, its embedding rows of edge types moved on by the rotation."""
    torch.manual_seed(square)
    network = build(config)
    rows = network.edge_embedding.weight.data[1:]
    rows.copy_(rows.roll(rotation, 0))
    return network


def measured(network: nn.Module) -> pd.DataFrame:
    """The logarithm of the row ratio and the spread in the first layer; a column per kind."""
    found = row_measures(first_layer(network, KINDS)["score"].double())
    # Rounded to a size that can be tracked.
    values = found["ratio"].log().round(decimals=2), found["spread"].round(decimals=1)
    index = pd.MultiIndex.from_product([["ratio", "spread"], range(1, 5)])
    table = pd.DataFrame(torch.cat(values).view(8, -1).numpy(), index, PAIRS)
    return table.rename_axis(["measure", "edge"]).reset_index()


def crossed(
    splits: Splits,
    *,
    squares: Sequence[int] = (0, 1, 2, 3, 4, 5, 6, 7),  # seeds of weights and data, 4 networks each
    epochs: int = 48,  # of each training
    graphs: int = 4096,  # to train on; one for 32 of them to validate
    batch_size: int = 16,  # graphs of a step
    hidden: int = 32,  # channels
    heads: int = 4,  # of attention
    layers: int = 2,  # of attention
    lr: float = 0.003,  # which does not fall
    prefix: Path | str | None = None,
    progress: bool = True,
) -> Study:
    """Train the squares; ``curves`` has every kind of each trained network, see ``measured``."""
    sizes = dict(hidden_channels=hidden, heads=heads, num_layers=layers, batch_size=batch_size)
    ids = dict(num_node_types=NODE_TYPES, num_edge_types=len(ROLES) + 1)
    schedule = dict(lr=lr, lr_patience=epochs, max_epochs=epochs)
    config = CONFIGS["SAN-ZINC"].replace(**sizes, **ids, **schedule)
    few = [split[: graphs // 32] for split in (splits.val, splits.test)]
    few = Splits(splits.train[:graphs], *few, splits.description)

    def train(square: int) -> Result:
        data = cross_types(few, square)

        def make(config: Config) -> nn.Module:  # ``fit`` has seeded torch with the network's seed
            return untrained(config, square, torch.initial_seed() % 4)

        seeds = range(4 * square, 4 * square + 4)
        how = dict(record_epochs=lambda epoch: False, progress=False)
        run = fit(make, data, config, seeds=[*seeds], **how)
        network, found = untrained(config, square, 0), []
        before = measured(network).set_index(["measure", "edge"]).mean(axis=1)
        for rotation, seed in enumerate(seeds):
            network.load_state_dict(run.last_weights[seed])
            found.append(measured(network).assign(rotation=rotation))
        values = before.groupby("measure").mean().add_prefix("untrained_").to_dict()
        last = run.history.groupby("seed")["val_loss"].last()
        values |= {"val_loss": last.mean(), "worst_loss": last.max()}
        values["zero_loss"] = torch.cat([graph.y for graph in data.val]).abs().mean().item()
        return values, pd.concat(found)

    about = {"dataset": splits.description.title, **sizes, "graphs": graphs, "epochs": epochs}
    trainings = [({"square": s, **about, "lr": lr}, partial(train, s)) for s in squares]
    return run_study(trainings, labels=("square",), prefix=prefix, progress=progress)


def by_kind(curves: pd.DataFrame) -> pd.DataFrame:
    """A row per network (square, rotation), edge type and kind, a column per measure."""
    place = ["measure", "square", "rotation", "edge"]
    kinds = curves.set_index(place).rename_axis(columns="kind").stack()
    return kinds.unstack("measure").sort_index()


def by_contrast(curves: pd.DataFrame, margins: Mapping[str, float]) -> pd.DataFrame:
    """Contrasts by both measures: the bootstrap over squares, networks and kinds, and tests."""
    kinds, rows = by_kind(curves), []
    for measure, margin in margins.items():
        by_type = kinds[measure].unstack("edge")
        for name, signs in CONTRASTS.items():
            change = (by_type @ np.array(signs) / 2).rename("change").reset_index()
            interval = hierarchical_bootstrap(change, "change", ["square", "rotation"])
            of_square = change.groupby("square")["change"].mean()
            same = equivalence(of_square, margin)["equivalent"]
            found = dict(zip(("change", "low", "high"), interval, strict=True))
            found |= {"p": sign_flips(of_square), "within": same}
            rows.append({"measure": measure, "contrast": name, **found})
    table = with_holm(pd.DataFrame(rows))
    side = np.where(table["holm"] < 0.05, np.where(table["change"] > 0, "above", "below"), "open")
    return table.assign(found=np.where(table["within"], "none", side))


def rows_and_types(curves: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Shares of types and rows in the variance within networks of Latin squares, with F and p."""
    place = ["square", "rotation"]
    table = by_kind(curves)[measure].groupby([*place, "edge"]).mean().reset_index()
    table["row"] = (table["edge"] - 1 - table["rotation"]) % 4  # see ``untrained``
    inside = table[measure] - table.groupby(place)[measure].transform("mean")
    sums = {
        source: inside.groupby([table["square"], table[source]]).transform("mean").pow(2).sum()
        for source in ("edge", "row")
    }
    whole, squares = inside.pow(2).sum(), table["square"].nunique()
    found = pd.DataFrame({"share": pd.Series(sums) / whole}).rename({"edge": "type"})
    found["F"] = 2 * found["share"] / (1 - found["share"].sum())
    return found.assign(p=stats.f.sf(found["F"], 3 * squares, 6 * squares))
