"""Files of results: the same bytes for the same table, whole or not at all, chosen states."""

import gzip

import numpy as np
import pandas as pd
import pytest

from studies.results import TABLES, collect, read_emergence, write_table

STATES = ["base", "base_calibrated", "best", "last"]
LARGE = ("graph_maxima", "histogram")


def write_run(folder, seed, states=STATES):
    """A run whose numbers tell seed, state and table apart."""
    for number, name in enumerate(TABLES):
        by_state = name in ("summary", *LARGE)
        rows = [
            {"seed": seed, **({"state": state} if by_state else {}), "value": 100 * number + i}
            for i, state in enumerate(states)
            for _ in range(2)
        ]
        write_table(folder / f"{name}.csv.gz", pd.DataFrame(rows))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / f"seed-{seed}", seed) for seed in (4, 2)]


# Writing.


@pytest.fixture
def table():
    return pd.DataFrame({"name": ["a", "b, c"], "value": [1 / 3, 123456789.0], "count": [1, 2]})


def test_the_file_is_compressed_csv_of_six_digits_without_the_index(table, tmp_path):
    path = tmp_path / "new" / "folder" / "table.csv.gz"
    write_table(path, table.set_index(pd.Index([7, 9])))
    text = gzip.decompress(path.read_bytes()).decode()
    assert text == 'name,value,count\na,0.333333,1\n"b, c",1.23457e+08,2\n'


def test_the_same_table_gives_the_same_bytes_whenever_and_wherever_it_is_written(table, tmp_path):
    paths = [tmp_path / "table.csv.gz", tmp_path / "other.csv.gz"]
    for path in paths:
        write_table(path, table.copy())
    first, second = (path.read_bytes() for path in paths)
    assert first == second, "gzip can store a file's name"
    assert first[4:8] == bytes(4), "and here the time of writing"


def test_a_table_that_is_read_and_written_again_keeps_its_bytes(tmp_path):
    draw = np.random.default_rng(0)
    values = 10 ** draw.uniform(-12, 12, 500)
    write_table(tmp_path / "first.csv.gz", pd.DataFrame({"value": values, "gap": np.nan}))
    read = pd.read_csv(tmp_path / "first.csv.gz")
    np.testing.assert_allclose(read["value"], values, rtol=5e-6)
    write_table(tmp_path / "second.csv.gz", read)
    assert (tmp_path / "first.csv.gz").read_bytes() == (tmp_path / "second.csv.gz").read_bytes()


class Unprintable:
    def __str__(self):
        raise RuntimeError("no text")


def test_a_table_that_cannot_be_written_leaves_the_old_file_and_nothing_else(table, tmp_path):
    path = tmp_path / "table.csv.gz"
    write_table(path, table)
    before = path.read_bytes()
    bad = pd.DataFrame({"value": [*range(10_000), Unprintable()]})  # late in the file
    with pytest.raises(RuntimeError, match="no text"):
        write_table(path, bad)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.csv.gz"]


def test_who_reads_the_old_file_meanwhile_reads_all_of_it(table, tmp_path):
    path = tmp_path / "table.csv.gz"
    write_table(path, table)
    before = path.read_bytes()
    with path.open("rb") as reader:
        write_table(path, table.assign(count=[3, 4]))
        assert reader.read() == before
    assert pd.read_csv(path)["count"].tolist() == [3, 4]


# Collecting.


def test_chosen_states_are_kept_in_the_two_large_tables_only(runs, tmp_path):
    collect(runs, tmp_path / "few_", ["best", "base"])
    collect(runs, tmp_path / "all_")
    few, whole = (read_emergence(tmp_path, prefix) for prefix in ("few_", "all_"))
    for name in TABLES:
        expected = getattr(whole, name)
        if name in LARGE:
            expected = expected[expected["state"].isin(["base", "best"])].reset_index(drop=True)
            assert expected["state"].tolist() == ["base", "base", "best", "best"] * 2
        pd.testing.assert_frame_equal(getattr(few, name), expected)
    assert set(few.summary["state"]) == set(STATES)
    assert few.histogram["seed"].tolist() == [4] * 4 + [2] * 4, "runs stay in their order"


def test_all_states_by_name_are_all_states(runs, tmp_path):
    for prefix, states in (("named_", STATES), ("all_", None)):
        collect(runs, tmp_path / prefix, states)
    for name in TABLES:
        named, whole = (tmp_path / f"{prefix}{name}.csv.gz" for prefix in ("named_", "all_"))
        assert named.read_bytes() == whole.read_bytes()


def test_an_unknown_state_is_refused_with_those_there_are_before_anything_is_written(
    runs, tmp_path
):
    message = "no state first, worst in .*seed-4; there are base, base_calibrated, best, last"
    with pytest.raises(ValueError, match=message):
        collect(runs, tmp_path / "joined_", ["worst", "base", "first"])
    assert list(tmp_path.glob("joined_*")) == []


def test_a_state_that_only_some_of_the_runs_have_is_refused_with_the_run_that_lacks_it(
    runs, tmp_path
):
    short = write_run(tmp_path / "short", 1, ["base", "best"])
    with pytest.raises(ValueError, match=r"no state last in .*short; there are base, best"):
        collect([*runs, short], tmp_path / "joined_", ["last"])
    assert list(tmp_path.glob("joined_*")) == []


def test_collecting_what_is_there_again_changes_no_byte(runs, tmp_path):
    paths = collect(runs, tmp_path / "joined_", ["best"])
    before = [path.read_bytes() for path in paths]
    assert collect(runs, tmp_path / "joined_", ["best"]) == paths
    assert [path.read_bytes() for path in paths] == before
