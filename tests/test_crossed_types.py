"""Frequency crossed with meaning: squares of networks, their contrasts and variances by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch_geometric.data import Data

from mapkg.hooks import record
from studies.crossed_types import (
    CONTRASTS,
    by_contrast,
    by_kind,
    crossed,
    measured,
    rows_and_types,
    untrained,
)
from studies.data import load
from studies.published import CONFIGS, grid

CONFIG = CONFIGS["SAN-ZINC"].replace(
    hidden_channels=16, heads=4, num_layers=2, num_node_types=6, num_edge_types=5
)


def curves(ratio, squares=8):
    """Tables as of a study, of what is given for each square, rotation, type and its row."""
    rows = [
        dict(square=s, rotation=k, edge=t, measure=measure)
        | {f"0-{kind}": ratio(s, k, t, (t - 1 - k) % 4) for kind in range(3)}
        for measure in ("ratio", "spread")
        for s in range(squares)
        for k in range(4)
        for t in range(1, 5)
    ]
    return pd.DataFrame(rows)


def test_each_type_has_each_row_of_the_embedding_once_in_a_square():
    networks = [untrained(CONFIG, 7, rotation) for rotation in range(4)]
    first, others = networks[0].state_dict(), [network.state_dict() for network in networks[1:]]
    name = "edge_embedding.weight"
    for rotation, other in enumerate(others, start=1):
        assert all(torch.equal(first[key], other[key]) for key in first if key != name)
        for edge in range(1, 5):
            assert torch.equal(other[name][edge], first[name][1 + (edge - 1 - rotation) % 4])
    tables = [measured(network).assign(square=7, rotation=k) for k, network in enumerate(networks)]
    means = by_kind(pd.concat(tables)).groupby("edge").mean()
    assert (means.max() - means.min()).max() < 1e-12  # no type is ahead at the start
    found = rows_and_types(pd.concat(tables), "ratio")["share"]
    assert found.to_dict() == pytest.approx({"type": 0, "row": 1})


def test_a_kind_is_measured_as_the_edge_of_a_graph_is():
    network = untrained(CONFIG, 3, 2).eval()
    graph = Data(x=torch.tensor([4, 1]), edge_index=torch.tensor([[0], [1]]))
    with torch.no_grad(), record(network, "layers.0.attention.score") as seen:
        network(graph.x, graph.edge_index, torch.tensor([3]))
    size = seen["layers.0.attention.score"][0].abs().log().flatten().sort().values
    found = measured(network).set_index(["measure", "edge"])["4-1"]
    assert found["ratio", 3] == pytest.approx(float(size[-1] - size[7]), abs=0.006)
    assert found["spread", 3] == pytest.approx(float(size.std()), abs=0.06)


def test_contrasts_of_frequent_types_by_hand():
    margins = grid()["kinds_moses"]["margins"]
    found = by_contrast(curves(lambda s, k, t, row: (t < 3) * (1 + s / 10) + row), margins)
    found = found.query("measure == 'ratio'").set_index("contrast")
    assert [*found.index] == [*CONTRASTS]
    frequent = found.loc["frequent over rare"]
    assert frequent["change"] == pytest.approx(1.35) and frequent["p"] == 2 / 2**8
    assert frequent["low"] < 1.35 < frequent["high"] and not frequent["within"]
    assert frequent["holm"] == pytest.approx(6 * 2 / 2**8)
    others = found.drop(index="frequent over rare")
    assert others["change"].abs().max() < 1e-12


def test_variances_of_a_square_are_those_of_types_and_of_rows():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(8, 4, 4))
    found = rows_and_types(
        curves(lambda s, k, t, row: 5 * s + k + 3 * (t < 3) + 0.1 * noise[s, k, row]), "ratio"
    )
    assert found.loc["type", "share"] > 0.99 and found.loc["type", "p"] < 1e-9
    found = rows_and_types(curves(lambda s, k, t, row: noise[s, k, row]), "ratio")
    assert (found["p"] > 0.01).all() and found["share"].between(0.05, 0.45).all()


def test_the_study_gives_every_kind_of_four_networks_a_square(cache):
    small = dict(epochs=1, graphs=64, hidden=8, heads=2, layers=1, progress=False)
    splits = load("moses")
    study = crossed(splits, squares=[3, 5], **small)
    assert len(by_kind(study.curves)) == 2 * 4 * 4 * 36
    assert study.runs["square"].tolist() == [3, 5]
    assert (study.runs["val_loss"] <= study.runs["worst_loss"]).all()
    about = replace(splits.description, num_edge_types=(22, 6, 2))
    with pytest.raises(ValueError, match="has not; use a data set of molecules"):
        crossed(replace(splits, description=about), squares=[3], **small)
