"""The study of trees: its rows, its two budgets, and the command."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from studies.__main__ import main
from studies.data import load
from studies.neighbors_match import (
    PUBLISHED,
    VARIANTS,
    TreeVariant,
    read_trees,
    titled,
    tree_study,
    tree_table,
)
from studies.tasks import TREES, TreeTask
from studies.train import fit
from studies.tree_networks import ARCHITECTURES

SHORT = replace(TREES, epochs=4, block=2, batch_size=64)


@pytest.fixture(scope="module")
def trees(cache):
    return load("trees-2")


def test_a_row_is_what_the_training_gave(trees):
    variant = TreeVariant(architecture="gat", norm="lipschitz", scale=4.0)
    study = tree_study(trees, [variant], seeds=[3], schedule=SHORT, progress=False)
    (row,) = study.runs.to_dict("records")
    network = variant.build(2, 3)
    run = fit(network, trees, SHORT, seed=3, progress=False)
    assert row["best"] == run.history["train_accuracy"].max()
    assert row["test_accuracy"] == TreeTask(trees).accuracies(network)["test_accuracy"]
    assert (row["depth"], row["norm"], row["scale"], row["seed"]) == (2, "lipschitz", 4.0, 3)
    assert (row["passes_done"], row["stop_reason"]) == (4, "passes")
    assert (row["batch_size"], row["sampling"]) == (64, "grouped")
    assert study.curves["passes"].tolist() == [2, 4]
    assert study.curves["train_accuracy"].tolist() == run.history["train_accuracy"].tolist()


def test_networks_whose_trees_share_nothing_may_have_fewer_passes(trees):
    study = tree_study(trees, seeds=[0], schedule=SHORT, passes_apart=2, progress=False)
    assert len(study.runs) == len(VARIANTS) == 15
    apart = study.runs["norm"] == "pair"
    assert apart.sum() == 4
    assert set(study.runs.loc[apart, "passes_done"]) == {2}
    assert set(study.runs.loc[~apart, "passes_done"]) == {4}


def test_the_command_writes_what_the_study_gives(trees, tmp_path, same_number_of_threads):
    prefix = tmp_path / "trees"
    settings = ["--dataset", "trees-2", "--seeds", "0", "--passes", "2", "--batch-size", "64"]
    settings += ["--block", "1", "--lr", "0.01"]
    assert main(["trees", *settings, "--threads", "1", "-o", str(prefix)]) == 0
    runs = pd.read_csv(f"{prefix}_runs.csv.gz")
    schedule = replace(TREES, epochs=2, batch_size=64, block=1, lr=0.01)
    expected = tree_study(trees, seeds=[0], schedule=schedule, progress=False).runs
    np.testing.assert_allclose(runs["best"], expected["best"], rtol=1e-5)
    assert runs["norm"].fillna("none").tolist() == expected["norm"].tolist()


def test_the_command_trains_the_architectures_it_is_told(trees, tmp_path, same_number_of_threads):
    prefix = tmp_path / "some"
    settings = ["--dataset", "trees-2", "--seeds", "0", "--passes", "1", "--threads", "1"]
    names = ["--architectures", "ggnn", "gat"]
    assert main(["trees", *settings, *names, "-o", str(prefix)]) == 0
    runs = pd.read_csv(f"{prefix}_runs.csv.gz")
    assert runs["architecture"].tolist() == ["ggnn"] * 3 + ["gat"] * 6


def test_what_are_no_trees_is_refused(papers):
    with pytest.raises(ValueError, match=r"expected trees, as load.* got synthetic citation graph"):
        tree_study(papers)


def test_published_accuracies_fall_with_depth():
    assert PUBLISHED.keys() == set(ARCHITECTURES)
    for values in PUBLISHED.values():
        assert values[:2] == (1, 1) and list(values) == sorted(values, reverse=True)


def some_runs():
    rows = []
    for depth in (2, 4):
        for norm, scale, best in (("none", "", 0.9), ("lipschitz", 4.0, 0.5)):
            for seed in range(3):
                row = dict(depth=depth, architecture="gat", norm=norm, scale=scale, seed=seed)
                value = best - 0.1 * seed - 0.1 * depth
                rows.append(row | dict(best=value, test_accuracy=value / 2))
    return pd.DataFrame(rows)


def test_the_table_has_ranges_over_seeds_and_what_was_published():
    table = tree_table(titled(some_runs()))
    assert table.columns.tolist() == [2, 4]
    assert table.loc[("GAT", "no norm")].tolist() == ["50-70", "30-50"]
    assert table.loc[("GAT", "LipschitzNorm, f = 4"), 4] == "-10-10"
    assert table.loc[("GAT", "published")].tolist() == ["100", "100"]
    assert "published" not in tree_table(titled(some_runs()), "test_accuracy").index.levels[1]


def test_tables_of_depths_are_read_as_one(tmp_path):
    runs = some_runs()
    for depth, rows in runs.groupby("depth"):
        rows.to_csv(tmp_path / f"trees_{depth}_runs.csv.gz", index=False)
        rows.assign(passes=10).to_csv(tmp_path / f"trees_{depth}_curves.csv.gz", index=False)
    study = read_trees(tmp_path, ["trees_2", "trees_4"])
    assert len(study.runs) == len(study.curves) == len(runs)
    assert set(study.runs["variant"]) == {"no norm", "LipschitzNorm, f = 4"}
    assert set(study.curves["panel"]) == {"GAT"}
    with pytest.raises(FileNotFoundError, match="trees_3"):
        read_trees(tmp_path, ["trees_3"])
