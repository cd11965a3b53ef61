"""The study of trees: its rows, its two budgets, tables, figures and the command."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from studies.__main__ import main
from studies.data import load
from studies.data.trees import level_order, neighbors_match
from studies.neighbors_match import (
    ASKED_COLOR,
    PUBLISHED,
    VARIANTS,
    TreeVariant,
    titled,
    tree_accuracy,
    tree_curves,
    tree_example,
    tree_study,
    tree_table,
)
from studies.tasks import TREES, TreeTask
from studies.train import fit
from studies.tree_networks import LAYERS

SHORT = replace(TREES, epochs=4, block=2, batch_size=64)


@pytest.fixture(scope="module")
def trees(cache):
    return load("trees-2")


def test_a_row_is_what_the_training_gave(trees):
    variant = TreeVariant(architecture="gat", norm="lipschitz", scale=4.0)
    study = tree_study(trees, [variant], seeds=[3], schedule=SHORT, progress=False)
    (row,) = study.runs.to_dict("records")
    network = variant.build(2, 3)
    history = fit(network, TreeTask(trees), SHORT, seed=3, progress=False).history
    assert row["best"] == history["train_accuracy"].max()
    assert row["test_accuracy"] == TreeTask(trees).accuracies(network)["test_accuracy"]
    assert (row["depth"], row["norm"], row["scale"], row["seed"]) == (2, "lipschitz", 4.0, 3)
    assert (row["passes_done"], row["stop_reason"]) == (4, "passes")
    assert (row["batch_size"], row["sampling"]) == (64, "grouped")
    assert study.curves["passes"].tolist() == [2, 4]
    assert study.curves["train_accuracy"].tolist() == history["train_accuracy"].tolist()


def test_networks_with_pair_norm_may_have_fewer_passes(trees):
    study = tree_study(trees, seeds=[0], schedule=SHORT, passes_apart=2, progress=False)
    assert len(study.runs) == len(VARIANTS) == 15
    passes = study.runs.groupby(study.runs["norm"] == "pair")["passes_done"]
    assert passes.unique().tolist() == [[4], [2]] and passes.size().tolist() == [11, 4]


def test_the_command_writes_what_the_study_gives(trees, tmp_path, same_number_of_threads):
    prefix = tmp_path / "trees"
    settings = ["--dataset", "trees-2", "--seeds", "0", "--passes", "2", "--batch-size", "64"]
    settings += ["--block", "1", "--lr", "0.01", "--architectures", "ggnn", "gat"]
    assert main(["study", "trees", *settings, "--threads", "1", "-o", str(prefix)]) == 0
    runs = pd.read_csv(f"{prefix}_runs.csv.gz")
    schedule = replace(TREES, epochs=2, batch_size=64, block=1, lr=0.01)
    chosen = [v for v in VARIANTS.values() if v.architecture in ("ggnn", "gat")]
    expected = tree_study(trees, chosen, seeds=[0], schedule=schedule, progress=False).runs
    assert len(runs) == 9 and runs["norm"].tolist() == expected["norm"].tolist()
    np.testing.assert_allclose(runs["best"], expected["best"], rtol=1e-5)


def test_what_are_no_trees_is_refused(papers):
    with pytest.raises(ValueError, match=r"expected trees, as load.* got synthetic citation graph"):
        tree_study(papers)


def test_published_accuracies_fall_with_depth():
    assert PUBLISHED.keys() == set(LAYERS)
    for values in PUBLISHED.values():
        assert values[:2] == (1, 1) and list(values) == sorted(values, reverse=True)


def some_runs():
    rows = [
        dict(depth=depth, architecture=name, norm=norm, scale=scale, seed=seed)
        | dict(best=best - 0.1 * seed - 0.1 * depth)
        for name in ("gcn", "gat")
        for depth in (2, 4)
        for norm, scale, best in (("none", None, 0.9), ("layer", 4.0, 0.5))
        for seed in range(3)
    ]
    return titled(pd.DataFrame(rows))


def test_the_table_has_ranges_over_seeds_and_what_was_published():
    table = tree_table(some_runs())
    assert table.columns.tolist() == [2, 4]
    assert table.loc[("GAT", "no norm")].tolist() == ["50 to 70", "30 to 50"]
    assert table.loc[("GCN", "LayerNorm, f = 4"), 4] == "-10 to 10"
    assert table.loc[("GCN", "published")].tolist() == ["100", "70"]
    networks = ["GCN"] * 3 + ["GAT"] * 3 + ["GGNN", "GIN"]
    assert table.index.get_level_values("network").tolist() == networks


def test_an_example_shows_keys_values_and_the_way_to_the_root():
    trees = neighbors_match(2)
    pairs = trees.pairs[7, level_order(2)]
    ax = tree_example(pairs, plt.subplots()[1])
    texts = [text for text in ax.texts if text.get_text()]
    asked = f"{pairs[0, 0]}, {trees.y[7]}"
    leaves = [f"{key}, {value}" for key, value in pairs[3:].tolist()]
    assert [text.get_text() for text in texts] == [f"{pairs[0, 0]}, ?", *leaves]
    arrows = [text for text in ax.texts if getattr(text, "arrow_patch", None)]
    colored = [a.xyann for a in arrows if a.arrow_patch.get_edgecolor() == to_rgba(ASKED_COLOR)]
    (leaf,) = (text for text in texts if text.get_text() == asked)
    assert len(arrows) == 6 and len(colored) == 2 and leaf.get_position() in colored
    plt.close("all")


def test_accuracies_are_means_beside_the_published_ones_and_chance():
    ax = tree_accuracy(some_runs()).axes_dict["GCN"]
    drawn = [line.get_ydata().tolist() for line in ax.lines if len(line.get_ydata())]
    np.testing.assert_allclose(drawn, [[0.6, 0.4], [0.2, 0], [1, 0.7], [0.25, 0.0625]], atol=1e-12)
    plt.close("all")


def test_curves_end_where_the_first_seed_ends():
    ends = some_runs().query("depth == 2").assign(passes=10, train_accuracy=0.2)
    longer = ends[ends["seed"] == 0].assign(passes=20)
    ax = tree_curves(pd.concat([ends, longer])).axes_dict["GAT"]
    drawn = [line.get_xydata().tolist() for line in ax.lines if len(line.get_xydata())]
    assert drawn == [[[10, 0.2]]] * 2
    plt.close("all")
