"""The study of trees: its rows, its two budgets, table, figures and command."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from studies.data import load
from studies.data.trees import level_order, neighbors_match
from studies.neighbors_match import (
    ASKED_COLOR,
    titled,
    tree_example,
    tree_table,
    trees,
    untrained,
)
from studies.tasks import TREES, TreeTask
from studies.train import fit


@pytest.fixture(scope="module")
def splits(cache):
    return load("trees-2")


def test_what_are_no_trees_is_refused(papers):
    with pytest.raises(ValueError, match=r"expected Trees, as load\('trees-4'\) gives them"):
        trees(papers, progress=False)


def test_a_row_is_what_the_training_gave(splits):
    settings = dict(architectures=["gat"], norms=["lipschitz=4"], seeds=[3], progress=False)
    study = trees(splits, passes=4, block=2, batch_size=64, **settings)
    (row,) = study.runs.to_dict("records")
    network = untrained(2, 3, architecture="gat", norm="lipschitz", scale=4.0)
    schedule = replace(TREES, epochs=4, block=2, batch_size=64)
    history = fit(network, TreeTask(splits), schedule, seed=3, progress=False).history
    assert row["best"] == history["train_accuracy"].max()
    assert row["test_accuracy"] == TreeTask(splits).accuracies(network)["test_accuracy"]
    assert (row["depth"], row["norm"], row["scale"], row["seed"]) == (2, "lipschitz", 4.0, 3)
    assert (row["passes_done"], row["stop_reason"], row["sampling"]) == (4, "passes", "grouped")
    assert study.curves["passes"].tolist() == [2, 4]
    assert study.curves["train_accuracy"].tolist() == history["train_accuracy"].tolist()


@pytest.fixture
def runs():
    return titled(
        pd.DataFrame(
            dict(depth=depth, architecture=name, norm=norm, scale=scale, seed=seed)
            | dict(best=best - 0.1 * seed - 0.1 * depth)
            for name in ("gcn", "gat")
            for depth in (2, 4)
            for norm, scale, best in (("none", None, 0.9), ("layer", 4.0, 0.5))
            for seed in range(3)
        )
    )


def test_the_table_has_ranges_over_seeds_and_what_was_published(runs):
    table = tree_table(runs)
    assert table.columns.tolist() == [2, 4]
    assert table.loc[("GAT", "no norm")].tolist() == ["50 to 70", "30 to 50"]
    assert table.loc[("GCN", "LayerNorm, f = 4"), 4] == "-10 to 10"
    assert table.loc[("GCN", "published")].tolist() == ["100", "70"]
    networks = ["GCN"] * 3 + ["GAT"] * 3 + ["GGNN", "GIN"]
    assert table.index.get_level_values("network").tolist() == networks


def test_an_example_shows_keys_values_and_the_way_to_the_root():
    data = neighbors_match(2)
    pairs = data.pairs[7, level_order(2)]
    ax = tree_example(pairs, plt.subplots()[1])
    leaves = [f"{key}, {value}" for key, value in pairs[3:].tolist()]
    assert [text.get_text() for text in ax.texts] == [f"{pairs[0, 0]}, ?", *leaves]
    (nodes,) = (c for c in ax.collections if len(c.get_offsets()) == 7)
    is_asked = (nodes.get_facecolors() == to_rgba(ASKED_COLOR)).all(axis=1)
    answer = 3 + leaves.index(f"{pairs[0, 0]}, {data.y[7]}")
    assert np.flatnonzero(is_asked).tolist() == [0, (answer - 1) // 2, answer]
    plt.close("all")
