"""The study of trees: its rows, its two budgets, and the command."""

import numpy as np
import pandas as pd
import pytest

from mapkg.__main__ import main
from mapkg.data import load
from mapkg.experiments.trees import PUBLISHED, VARIANTS, TreeVariant, tree_study
from mapkg.models.trees import ARCHITECTURES
from mapkg.train_trees import TreeSchedule, fit_trees

SHORT = TreeSchedule(passes=4, block=2, batch_size=64)


@pytest.fixture(scope="module")
def trees(cache):
    return load("trees-2")


def test_a_row_is_what_the_training_gave(trees):
    variant = TreeVariant(architecture="gat", norm="lipschitz", scale=4.0)
    study = tree_study(trees, [variant], seeds=[3], schedule=SHORT, progress=False)
    (row,) = study.runs.to_dict("records")
    run = fit_trees(variant.build(2, 3), trees, SHORT, seed=3, progress=False)
    assert (row["best"], row["test_accuracy"]) == (run.best, run.test_accuracy)
    assert (row["depth"], row["norm"], row["scale"], row["seed"]) == (2, "lipschitz", 4.0, 3)
    assert (row["passes_done"], row["stop_reason"]) == (4, "passes")
    assert (row["batch_size"], row["sampling"]) == (64, "grouped")
    assert study.curves["passes"].tolist() == [2, 4]
    assert study.curves["train_accuracy"].tolist() == run.history["train_accuracy"].tolist()


def test_networks_whose_trees_share_nothing_may_have_fewer_passes(trees):
    study = tree_study(trees, seeds=[0], schedule=SHORT, passes_apart=2, progress=False)
    assert len(study.runs) == len(VARIANTS) == 14
    apart = study.runs["norm"] == "pair"
    assert apart.sum() == 4
    assert set(study.runs.loc[apart, "passes_done"]) == {2}
    assert set(study.runs.loc[~apart, "passes_done"]) == {4}


def test_the_command_writes_what_the_study_gives(trees, tmp_path, same_number_of_threads):
    prefix = tmp_path / "trees"
    settings = ["--dataset", "trees-2", "--seeds", "0", "--passes", "2", "--batch-size", "64"]
    assert main(["trees", *settings, "--threads", "1", "-o", str(prefix)]) == 0
    runs = pd.read_csv(f"{prefix}_runs.csv.gz")
    expected = tree_study(
        trees, seeds=[0], schedule=TreeSchedule(passes=2, batch_size=64), progress=False
    ).runs
    np.testing.assert_allclose(runs["best"], expected["best"], rtol=1e-5)
    assert runs["norm"].fillna("none").tolist() == expected["norm"].tolist()


def test_what_are_no_trees_is_refused(papers):
    with pytest.raises(ValueError, match=r"expected trees, as load.* got synthetic citation graph"):
        tree_study(papers)


def test_published_accuracies_fall_with_depth():
    assert PUBLISHED.keys() == set(ARCHITECTURES)
    for values in PUBLISHED.values():
        assert values[:2] == (1, 1) and list(values) == sorted(values, reverse=True)
