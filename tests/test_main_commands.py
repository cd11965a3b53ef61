"""The commands for controls, laws and chosen states on runs of seconds."""

from dataclasses import replace

import pandas as pd
import pytest

from studies.__main__ import USAGE_ERROR, main
from studies.controls import permute_targets, untrained
from studies.data import load
from studies.emergence import emergence
from studies.grid import laws, read_runs, read_untrained
from studies.laws import LAWS
from studies.published import CONFIGS
from studies.results import TABLES, read_emergence

LIMIT = 12
SMALL = {"hidden_channels": 8, "heads": 2, "num_layers": 2}
NETWORK = [
    *("--config", "GT-ZINC", "--dataset", "moses", "--limit", str(LIMIT), "--threads", "1"),
    *(part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")),
]

pytestmark = pytest.mark.usefixtures("cache", "same_number_of_threads")


def train(out, *further, seed=0):
    return main(
        ["train", *NETWORK, "--epochs", "1", "--seed", str(seed), "--out", str(out), *further]
    )


@pytest.fixture(scope="module")
def runs(cache, tmp_path_factory):
    """Two finished runs that differ in their seed."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        assert train(folder / f"seed-{seed}", seed=seed) == 0
    return [folder / "seed-0", folder / "seed-1"]


def limited():
    """The data that the commands above look at, as the package loads them."""
    whole = load("moses")
    few = {name: getattr(whole, name)[:LIMIT] for name in ("train", "val", "test")}
    title = f"MOSES sample, first {LIMIT}"
    return replace(whole, description=replace(whole.description, title=title), **few)


# train --permute-targets


@pytest.fixture(scope="module")
def permuted(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("permuted")
    assert train(folder, "--permute-targets", seed=1) == 0
    return folder


def test_a_run_on_permuted_targets_says_so_in_every_row(permuted):
    found = read_emergence(permuted)
    for name in TABLES:
        titles = set(getattr(found, name)["dataset"])
        assert titles == {f"MOSES sample, first {LIMIT}, targets permuted"}


def test_it_starts_from_the_network_of_the_plain_run_and_learns_something_else(permuted, runs):
    null, plain = (read_emergence(folder) for folder in (permuted, runs[1]))
    assert (null.history["train_loss"] != plain.history["train_loss"]).all()
    null, plain = (run.summary.set_index(["state", "layer"]) for run in (null, plain))
    for statistic in ("max_ratio", "test_mae"):
        assert null.loc["base", statistic].equals(plain.loc["base", statistic])
        assert (null.loc["last", statistic] != plain.loc["last", statistic]).all()


def test_the_seed_of_the_run_is_that_of_the_permutation(permuted):
    config = CONFIGS["GT-ZINC"].replace(**SMALL, max_epochs=1)
    expected = emergence(config, permute_targets(limited(), 1), seed=1, progress=False).history
    other = emergence(config, permute_targets(limited(), 0), seed=1, progress=False).history
    found = read_emergence(permuted).history
    columns = ["train_loss", "val_loss"]
    pd.testing.assert_frame_equal(found[columns], expected[columns], rtol=1e-5)
    assert (found["train_loss"] - other["train_loss"]).abs().min() > 1e-4


def test_a_plain_run_does_not_go_on_from_one_on_permuted_targets(permuted, capsys):
    assert train(permuted, seed=1) == USAGE_ERROR
    message = capsys.readouterr().err
    assert "holds the state of another run" in message
    assert "targets permuted" in message


# collect --states


def test_collect_keeps_the_states_that_are_asked_for(runs, tmp_path, capsys):
    prefix = str(tmp_path / "emergence_small_")
    assert main(["collect", *map(str, runs), "-o", prefix, "--states", "best", "base"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{prefix}{name}.csv.gz" for name in TABLES]
    found = read_emergence(tmp_path, "emergence_small_")
    for name in ("graph_maxima", "histogram"):
        whole = pd.concat([getattr(read_emergence(folder), name) for folder in runs])
        expected = whole[whole["state"].isin(["base", "best"])].reset_index(drop=True)
        pd.testing.assert_frame_equal(getattr(found, name), expected)
    assert found.summary["state"].unique().tolist() == ["base", "base_calibrated", "best", "last"]


def test_collect_refuses_an_unknown_state_and_writes_nothing(runs, tmp_path, capsys):
    prefix = str(tmp_path / "joined_")
    command = ["collect", str(runs[0]), "-o", prefix, "--states", "base", "trained"]
    assert main(command) == USAGE_ERROR
    captured = capsys.readouterr()
    assert captured.err.startswith("error: no state trained in ")
    assert "there are base, base_calibrated, best, last" in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


# untrained


def test_the_table_of_untrained_networks_is_that_of_the_package(tmp_path, capsys):
    path = tmp_path / "new" / "untrained_small.csv.gz"
    command = ["untrained", *NETWORK, "--networks", "2", "--first-seed", "7", "-o", str(path)]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{path}\n"
    config = CONFIGS["GT-ZINC"].replace(**SMALL)
    expected = untrained(config, limited(), [7, 8], name="GT-ZINC", progress=False)
    pd.testing.assert_frame_equal(pd.read_csv(path), expected, rtol=1e-5, check_dtype=False)
    assert set(expected["seed"]) == {7, 8}
    found = read_untrained(path.parent, ["small"])
    assert (found["run"] == "small").all()


def test_twenty_networks_with_seeds_from_a_thousand_on_are_looked_at_unless_told_otherwise(
    tmp_path,
):
    path = tmp_path / "table.csv.gz"
    tiny = ["--limit", "2", "--set", "num_layers=1", "--set", "hidden_channels=8"]
    command = ["untrained", "--config", "GT-ZINC", "--dataset", "moses", *tiny, "-o", str(path)]
    assert main([*command, "--threads", "1"]) == 0
    found = pd.read_csv(path)
    assert found["seed"].unique().tolist() == list(range(1000, 1020))
    assert len(found) == 40


@pytest.mark.parametrize(
    ("further", "complaint"),
    [
        (["--dataset", "qm9"], "unknown data set 'qm9'"),
        (["--set", "num_node_types=5"], "num_node_types: the configuration has 5"),
        (["--set", "width=5"], "expected NAME=VALUE with NAME one of"),
        (["--device", "toaster"], "--device toaster: cannot be used here"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_and_nothing_is_written(
    further, complaint, tmp_path, capsys
):
    command = ["untrained", *NETWORK, "--networks", "1", "-o", str(tmp_path / "x.csv.gz")]
    assert main([*command, *further]) == USAGE_ERROR
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert complaint in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ["0", "-1", "some"])
def test_a_number_of_networks_must_be_above_0(number, tmp_path, capsys):
    command = ["untrained", *NETWORK, "-o", str(tmp_path / "x.csv.gz")]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--networks", number])
    assert stopped.value.code == USAGE_ERROR
    assert "expected a whole number above 0" in capsys.readouterr().err


# laws


@pytest.fixture(scope="module")
def results(runs, tmp_path_factory):
    """A folder of collected runs by two names, each of one seed."""
    folder = tmp_path_factory.mktemp("results")
    for name, run in zip(("one", "other"), runs, strict=True):
        command = ["collect", str(run), "-o", str(folder / f"emergence_{name}_")]
        assert main([*command, "--states", "base", "best"]) == 0
    return folder


def test_the_laws_of_collected_runs_are_those_of_the_package(results, tmp_path, capsys):
    path = tmp_path / "laws.csv.gz"
    assert main(["laws", "other", "one", "--results", str(results), "-o", str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"{path}\n")
    found = pd.read_csv(path)
    expected = laws(read_runs(results, ["other", "one"]).histogram)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5, check_dtype=False)
    # Runs, states, layers and laws.
    assert len(found) == 2 * 2 * 2 * len(LAWS)
    assert set(found["run"]) == {"one", "other"}
    assert found.groupby("run")["seed"].unique().map(list).to_dict() == {"one": [0], "other": [1]}


def test_laws_of_a_run_that_is_not_there_are_refused(results, tmp_path, capsys):
    path = tmp_path / "laws.csv.gz"
    assert main(["laws", "one", "third", "--results", str(results), "-o", str(path)]) == USAGE_ERROR
    message = capsys.readouterr().err
    assert message.startswith(f"error: no table at {results / 'emergence_third_summary.csv.gz'}")
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["untrained", "--config", "GT-ZINC", "--dataset", "moses"], "required: -o/--output"),
        (["untrained", "--dataset", "moses", "-o", "x"], "are required: --config"),
        (["laws", "--results", "x", "-o", "y"], "are required: runs"),
        (["laws", "one", "-o", "y"], "are required: --results"),
        (["laws", "one", "--results", "x"], "are required: -o/--output"),
        (["collect", "x", "-o", "y", "--states"], "--states: expected at least one argument"),
    ],
)
def test_an_incomplete_command_exits_with_its_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == USAGE_ERROR
    captured = capsys.readouterr().err
    assert captured.startswith("usage: python -m studies")
    assert message in captured


# Nodes of one graph


def test_the_data_command_counts_nodes(capsys):
    assert main(["data", "citation"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "name: citation"
    assert lines[-3:] == [
        "train: 140 nodes of one graph",
        "val: 500 nodes of one graph",
        "test: 1,000 nodes of one graph",
    ]
