"""Studies of many trainings: what is kept, what is not done twice, and half a pair of tables."""

import pandas as pd
import pytest

from studies.study import run_study


def trainings(log, seeds=(0, 1), scale=None):
    def train(seed):
        log.append(seed)
        return {"loss": seed + 0.123456789}, pd.DataFrame({"epoch": [1, 2], "value": [0.5, seed]})

    return [
        ({"norm": "none", "scale": scale, "seed": seed}, lambda seed=seed: train(seed))
        for seed in seeds
    ]


def test_rows_have_settings_results_and_origin():
    study = run_study(trainings([]), labels=["seed"], progress=False)
    assert study.runs["loss"].tolist() == [0.123456789, 1.123456789]
    assert study.runs["seed"].tolist() == [0, 1]
    assert study.runs["versions"].str.contains("torch").all()
    assert study.runs["commit"].notna().all()
    assert study.curves.columns.tolist() == ["epoch", "value", "seed"]
    assert study.curves["value"].tolist() == [0.5, 0, 0.5, 1]


@pytest.mark.parametrize("scale", [None, 1.0, 4])
def test_what_is_written_is_not_done_again(tmp_path, scale):
    log, prefix = [], tmp_path / "deep" / "study"
    run_study(trainings(log, [0], scale), labels=["seed"], prefix=prefix, progress=False)
    settings = dict(labels=["seed"], prefix=prefix, progress=False)
    study = run_study(trainings(log, [0, 1], scale), **settings)
    assert log == [0, 1]
    assert study.runs["seed"].tolist() == [0, 1]
    assert pd.read_csv(f"{prefix}_runs.csv.gz")["loss"].tolist() == [0.123457, 1.12346]
    assert len(pd.read_csv(f"{prefix}_curves.csv.gz")) == 4
    other = run_study(trainings(log, [0], 7.5), **settings)
    assert log == [0, 1, 0] and len(other.runs) == 3


def test_a_training_that_fails_leaves_what_was_done(tmp_path):
    prefix = tmp_path / "study"

    def fails():
        raise RuntimeError("out of luck")

    some = [*trainings([], [0]), ({"norm": "none", "scale": None, "seed": 1}, fails)]
    with pytest.raises(RuntimeError, match="out of luck"):
        run_study(some, labels=["seed"], prefix=prefix, progress=False)
    assert pd.read_csv(f"{prefix}_runs.csv.gz")["seed"].tolist() == [0]


def test_half_a_pair_of_tables_and_those_of_another_study_are_refused(tmp_path):
    prefix = tmp_path / "study"
    settings = dict(labels=["seed"], prefix=prefix, progress=False)
    run_study(trainings([], [0]), **settings)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    others = [({"model": "GCN", "seed": 0}, train) for _, train in trainings([])]
    with pytest.raises(ValueError, match=r"study_runs.csv.gz holds the table of another study"):
        run_study(others, **settings)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "study_curves.csv.gz").unlink()
    with pytest.raises(ValueError, match=r"expected both tables .* found .*runs.csv.gz alone"):
        run_study(trainings([], [0]), **settings)


def test_two_studies_at_a_time_do_not_write_over_each_other(tmp_path):
    prefix, log = tmp_path / "study", []
    settings = dict(labels=["seed"], prefix=prefix, progress=False)

    def meanwhile():
        with pytest.raises(ValueError, match=r"another study is writing to .*study now"):
            run_study(trainings(log, [0]), **settings)
        return {"loss": 0.5}, pd.DataFrame({"epoch": [1]})

    run_study([({"norm": "none", "scale": None, "seed": 9}, meanwhile)], **settings)
    assert log == []
    run_study(trainings(log, [0]), **settings)
    assert log == [0]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("study_runs.csv.gz", "study_curves.csv.gz")
    }
