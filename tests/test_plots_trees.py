"""Figures of trees: what is drawn is what the tables and the example say."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from studies import plots
from studies.data.trees import level_order, neighbors_match
from studies.plots.trees import ASKED_COLOUR


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def rows(**columns):
    table = []
    for panel, architecture in (("GCN", "gcn"), ("GAT", "gat")):
        for variant in ("no norm", "LayerNorm"):
            for depth in (2, 3):
                for seed in (0, 1):
                    row = dict(panel=panel, architecture=architecture, variant=variant)
                    row |= dict(depth=depth, seed=seed, best=0.8 + 0.1 * seed - 0.2 * (depth - 2))
                    table.append(row | columns)
    return pd.DataFrame(table)


def test_an_example_shows_keys_values_and_the_way_to_the_root():
    trees = neighbors_match(2)
    pairs = trees.pairs[7, level_order(2)]
    _, ax = plt.subplots()
    plots.tree_example(pairs, ax)
    texts = [text.get_text() for text in ax.texts if text.get_text()]
    assert texts[0] == f"{pairs[0, 0]}, ?"
    assert texts[1:] == [f"{key}, {value}" for key, value in pairs[3:].tolist()]
    asked = f"{pairs[0, 0]}, {trees.y[7]}"
    assert asked in texts
    arrows = [text for text in ax.texts if getattr(text, "arrow_patch", None)]
    assert len(arrows) == 6
    coloured = [
        a.xyann
        for a in arrows
        if a.arrow_patch.get_edgecolor() == plt.matplotlib.colors.to_rgba(ASKED_COLOUR)
    ]
    assert len(coloured) == 2  # from the leaf to the root
    (leaf,) = [t for t in ax.texts if t.get_text() == asked]
    assert leaf.get_position() in coloured


def test_accuracies_have_a_panel_per_network_and_stand_beside_the_published_ones():
    figure = plots.tree_accuracy(rows(), {"gcn": (1.0, 0.7, 0.1)})
    gcn, gat = figure.axes
    assert (gcn.get_title(), gat.get_title()) == ("GCN", "GAT")
    lines = {line.get_label(): line for line in gcn.get_lines()}
    assert lines["published"].get_ydata().tolist() == [1.0, 0.7]
    assert lines["chance"].get_ydata().tolist() == [0.25, 0.125]
    assert "published" not in {line.get_label() for line in gat.get_lines()}
    means = [bars.lines[0].get_ydata().astype(float) for bars in gcn.containers]
    np.testing.assert_allclose(means, [[0.85, 0.65]] * 2)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["no norm", "LayerNorm", "published", "chance"]


def test_curves_end_where_the_first_seed_ends():
    short, long = rows(passes=10, train_accuracy=0.2), rows(passes=20, train_accuracy=0.4)
    table = pd.concat([short, long[long["seed"] == 0]]).query("depth == 2")
    figure = plots.tree_curves(table)
    assert [ax.get_title() for ax in figure.axes] == ["GCN", "GAT"]
    assert [line.get_xdata().tolist() for line in figure.axes[0].get_lines()] == [[10], [10]]
    assert figure.axes[0].get_lines()[0].get_ydata().tolist() == [0.2]
