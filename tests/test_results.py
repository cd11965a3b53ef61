"""Tables: how they are written, studies of many trainings, and what the tracked ones hold."""

import gzip
import re
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY
from PIL import Image
from scipy import stats

from mapkg.measures import MASSIVE_RATIO
from studies import checkpoint
from studies.data import BUNDLED, load
from studies.emergence import examine_checkpoint
from studies.files import sha256
from studies.published import CONFIGS, titles
from studies.results import TABLES, contrasts, count_types, read_emergence
from studies.tables import over_seeds, run_study, write

RESULTS = BUNDLED / "results"
PREFIX = "emergence_gt_zinc_"
SHIPPED = BUNDLED / "checkpoints" / "gt_moses_seed0"


# Writing and reading.


def test_a_table_is_compressed_csv_of_six_digits_and_the_same_bytes_anywhere(tmp_path):
    table = pd.DataFrame({"name": ["a", "b, c"], "value": [1 / 3, 123456789.0], "count": [1, 2]})
    paths = [tmp_path / "new" / "table.csv.gz", tmp_path / "other.csv.gz"]
    for path in paths:
        write(path, table.set_index(pd.Index([7, 9])))
    first, second = (path.read_bytes() for path in paths)
    text = gzip.decompress(first).decode()
    assert text == 'name,value,count\na,0.333333,1\n"b, c",1.23457e+08,2\n'
    assert first == second, "gzip can store a file's name"
    assert first[4:8] == bytes(4), "and here the time of writing"
    values = 10 ** np.random.default_rng(0).uniform(-12, 12, 500)
    write(paths[0], pd.DataFrame({"value": values, "gap": np.nan}))
    write(paths[1], pd.read_csv(paths[0]))
    assert paths[0].read_bytes() == paths[1].read_bytes(), "read and written again"


def test_who_reads_a_table_meanwhile_reads_all_of_the_old_one(tmp_path):
    path = tmp_path / "table.csv.gz"
    write(path, pd.DataFrame({"count": [1, 2]}))
    before = path.read_bytes()

    class Unprintable:
        def __str__(self):
            raise RuntimeError("no text")

    with pytest.raises(RuntimeError, match="no text"):
        write(path, pd.DataFrame({"value": [*range(10_000), Unprintable()]}))  # late in the file
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [
        (path.name, before)
    ]
    with path.open("rb") as reader:
        write(path, pd.DataFrame({"count": [3, 4]}))
        assert reader.read() == before
    assert pd.read_csv(path)["count"].tolist() == [3, 4]


def test_values_over_seeds_stand_in_the_order_of_the_table():
    rows = [("b", "y", 1.0), ("b", "y", 4.0), ("b", "x", 2.0), ("a", "x", 9.0), ("a", "y", np.nan)]
    table = pd.DataFrame(rows, columns=["row", "column", "value"])
    look = dict(rows=["row"], columns=["column"], form=".1f")
    found = over_seeds(table, "value", **look)
    assert found.values.tolist() == [["2.5 [1.0, 4.0]", "2.0 [2.0, 2.0]"], ["-", "9.0 [9.0, 9.0]"]]
    assert (found.index.tolist(), found.columns.tolist()) == (["b", "a"], ["y", "x"])
    spans = over_seeds(table, "value", statistic="range", **look)
    assert spans.loc["b"].tolist() == ["1.0 to 4.0", "2.0"]
    assert over_seeds(table, "value", statistic="mean", rows=["row"])["value"].tolist()[0] == (
        "2.33 ± 1.53"
    )


def test_a_contrast_is_a_factor_with_the_t_interval_of_its_logarithm():
    ratios = {"a": [1.0, 2.0, 5.0], "b": [10.0, 10.0, 125.0, 3.0]}
    rows = [(run, "x", seed, r) for run, each in ratios.items() for seed, r in enumerate(each)]
    table = pd.DataFrame(rows, columns=["run", "label", "seed", "max_ratio"])
    found = contrasts(table, {"b over a": (("a", "x"), ("b", "x"))}).loc["b over a"]
    logs = np.log([10.0, 5.0, 25.0])  # a seed that one of them lacks is left out
    low, high = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    expected = [np.exp(logs.mean()), np.exp(low), np.exp(high), 5.0, 25.0]
    assert found.tolist() == pytest.approx(expected)


def test_types_are_counted_in_every_split():
    splits = load("moses")
    counts = count_types(splits)
    for (split, kind), part in counts.groupby(["split", "kind"]):
        key = "x" if kind == "atom" else "edge_attr"
        ids = [i for graph in getattr(splits, split)[:] for i in graph[key].tolist()]
        assert part.set_index("id")["count"].to_dict() == {i: ids.count(i) for i in part["id"]}
        assert part["count"].sum() == len(ids)
    assert counts.groupby(["split", "kind"]).ngroups == 6


def test_pages_call_runs_by_the_titles_of_the_grid():
    assert titles("grid")["gt_zinc"] == "GT, ZINC" and titles("variants")["gt_zinc"] == "GT"
    with pytest.raises(ValueError, match="group gird: did you mean grid"):
        titles("gird")


# Studies of many trainings.


def trainings(log, seeds=(0, 1), scale=None):
    def train(seed):
        log.append(seed)
        return {"loss": seed + 0.123456789}, pd.DataFrame({"epoch": [1, 2], "value": [0.5, seed]})

    about = {"norm": "none", "scale": scale}
    return [({**about, "seed": seed}, lambda seed=seed: train(seed)) for seed in seeds]


@pytest.fixture
def study(tmp_path):
    """Does some trainings; those that are written under a prefix are not done again."""

    def run(some):
        prefix = tmp_path / "deep" / "study"
        return run_study(some, labels=["scale", "seed"], prefix=prefix, progress=False)

    return run


@pytest.mark.parametrize("scale", [None, 1.0, 4])
def test_what_is_written_is_not_done_again(study, tmp_path, scale):
    log = []
    study(trainings(log, [0], scale))
    found = study(trainings(log, [0, 1], scale))
    assert log == [0, 1]
    assert found.runs["seed"].tolist() == [0, 1]
    assert found.runs["versions"].str.contains("torch").all() and found.runs["commit"].all()
    runs = pd.read_csv(tmp_path / "deep" / "study_runs.csv.gz")
    assert runs["loss"].tolist() == [0.123457, 1.12346]
    curves = pd.read_csv(tmp_path / "deep" / "study_curves.csv.gz")
    assert curves["value"].tolist() == [0.5, 0, 0.5, 1]
    other = study(trainings(log, [0], 7.5))
    assert log == [0, 1, 0] and len(other.runs) == 3


def test_a_study_that_was_stopped_anywhere_goes_on_with_nothing_lost_or_doubled(study, tmp_path):
    def fails():
        raise RuntimeError("out of luck")

    paths = [tmp_path / "deep" / f"study_{name}.csv.gz" for name in ("runs", "curves")]
    with pytest.raises(RuntimeError, match="out of luck"):
        study([*trainings([], [0]), ({"norm": "none", "scale": None, "seed": 1}, fails)])
    before = [path.read_bytes() for path in paths]
    whole = study(trainings([], [0, 1]))
    paths[0].write_bytes(before[0])  # the curve of the second was written, its row was not
    log = []
    again = study(trainings(log, [0, 1]))
    assert log == [1]
    pd.testing.assert_frame_equal(again.curves, whole.curves, check_dtype=False)
    paths[0].unlink()
    assert len(study(trainings(log, [0, 1])).curves) == 4 and log == [1, 0, 1]


def test_half_a_pair_of_tables_and_those_of_another_study_are_refused(study, tmp_path):
    study(trainings([], [0]))
    before = {path.name: path.read_bytes() for path in (tmp_path / "deep").iterdir()}
    others = [({"model": "GCN", "scale": 1, "seed": 0}, train) for _, train in trainings([])]
    with pytest.raises(ValueError, match=r"study_runs.csv.gz holds the table of another study"):
        study(others)
    assert {path.name: path.read_bytes() for path in (tmp_path / "deep").iterdir()} == before
    (tmp_path / "deep" / "study_curves.csv.gz").unlink()
    with pytest.raises(ValueError, match=r"expected .*curves.csv.gz beside .*runs.csv.gz"):
        study(trainings([], [0]))


def test_two_studies_at_a_time_do_not_write_over_each_other(study, tmp_path):
    log = []

    def meanwhile():
        with pytest.raises(ValueError, match="study: another process writes to it"):
            study(trainings(log, [0]))
        return {"loss": 0.5}, pd.DataFrame({"epoch": [1]})

    study([({"norm": "none", "scale": None, "seed": 9}, meanwhile)])
    assert log == []
    study(trainings(log, [0]))
    assert log == [0]
    names = {path.name for path in (tmp_path / "deep").iterdir()}
    assert names == {"study_runs.csv.gz", "study_curves.csv.gz"}


# Tracked results.


@pytest.fixture(scope="module")
def zinc():
    return read_emergence(RESULTS, PREFIX)


def test_every_row_says_where_it_comes_from(zinc):
    for name in TABLES:
        table = getattr(zinc, name)
        assert not table[["config", "changes", "dataset", "seed", "epochs"]].isna().any().any()
        assert table["commit"].str.fullmatch("[0-9a-f]{40}").all(), "committed code"
        assert table["versions"].str.contains(f"torch {version('torch').split('+')[0]}").all()


def test_the_tables_are_complete_and_agree_with_each_other(zinc):
    keys = ["seed", "state", "layer"]
    summary = zinc.summary.set_index(keys)
    states = ["base", "base_calibrated", "best", "last"]
    assert len(summary) == 3 * len(states) * CONFIGS["GT-ZINC"].num_layers
    assert sorted(zinc.summary["state"].unique()) == states
    assert set(summary["rows"]) == {49_720}  # directed edges of the ZINC test split
    assert set(summary["changes"]) == {"max_epochs=100"}
    assert (zinc.history.groupby("seed")["epoch"].max() == 100).all()
    maxima = zinc.graph_maxima.groupby(keys)["max_ratio"].agg(["max", "size"])
    assert set(maxima["size"]) == {1000}
    look = dict(check_names=False, rtol=1e-5)
    pd.testing.assert_series_equal(maxima["max"], summary["max_ratio"].sort_index(), **look)
    usable = summary["rows"] - summary["zero_medians"] - summary["nonfinite_rows"]
    counted = zinc.histogram.groupby(keys)["count"].sum()
    pd.testing.assert_series_equal(counted, (usable * summary["channels"]).sort_index(), **look)
    massive = summary["max_ratio"] > MASSIVE_RATIO
    assert (massive == (summary["rows_with_massive"] > 0)).all()
    start = zinc.trajectory[zinc.trajectory["epoch"] == 0].set_index(["seed", "layer"])
    base = zinc.summary[zinc.summary["state"] == "base"].set_index(["seed", "layer"])
    pd.testing.assert_series_equal(start["max_ratio"], base["max_ratio"])


@pytest.mark.slow
def test_the_tracked_tables_of_the_bundled_run_are_those_of_the_shipped_checkpoint():
    model, information = checkpoint.load(SHIPPED, CONFIGS["GT-ZINC"].replace(max_epochs=100))
    assert sum(p.numel() for p in model.parameters()) == 588_353
    assert (information["dataset"], information["seed"]) == ("MOSES sample", 0)
    assert re.fullmatch("[0-9a-f]{40}", information["commit"])
    examined = examine_checkpoint(SHIPPED, load("moses"))
    history = examined["history"].set_index("epoch")
    assert information["epoch"] == history["val_loss"].idxmin()
    tracked = read_emergence(RESULTS, "emergence_gt_moses_").summary
    tracked = tracked[tracked["state"] != "last"].reset_index(drop=True)
    # Sums run in another order on another number of threads.
    for name in ("test_mae", "max_ratio", "max_abs", "row_median_q50"):
        pd.testing.assert_series_equal(examined["summary"][name], tracked[name], rtol=2e-3)


def test_the_picture_of_the_readme_was_drawn_from_the_tracked_results():
    with Image.open(REPOSITORY / "book" / "emergence.png") as image:
        stored = image.text["Source-SHA256"]
    assert stored == sha256(RESULTS / f"{PREFIX}graph_maxima.csv.gz"), "run book/figures.py"


def test_tracked_data_and_results_stay_small():
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 15e6
