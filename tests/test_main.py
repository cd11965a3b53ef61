"""The command line on runs of seconds: exit statuses, messages and what is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from studies import checkpoint
from studies.__main__ import USAGE_ERROR, main
from studies.published import CONFIGS

REPOSITORY = Path(__file__).parents[1]
TABLES = ("summary", "trajectory", "graph_maxima", "histogram", "history")
STATES = ("base", "best", "last")
LIMIT, LAYERS, EPOCHS = 32, 2, 2
SMALL = {"hidden_channels": 8, "heads": 2, "num_layers": LAYERS}

UNKNOWN_DATA_SET = (
    "error: unknown data set 'qm9'; known: citation, citeseer, cora, moses, moses-triple, "
    "proteins, pubmed, pubmed-missing, tox21, tox21-random, trees-2, trees-3, trees-4, trees-5, "
    "zinc, zinc-substitute\n"
)

pytestmark = pytest.mark.usefixtures("cache", "same_number_of_threads")


def train(out, *further, epochs=EPOCHS, seed=0, dataset="moses"):
    """Exit status of a training run of seconds."""
    small = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    return main(
        [
            *("train", "--config", "GT-ZINC", "--dataset", dataset, "--out", str(out)),
            *("--limit", str(LIMIT), "--epochs", str(epochs), "--seed", str(seed)),
            *("--threads", "1", *small, *further),
        ]
    )


def tables(folder, prefix=""):
    return {table: pd.read_csv(folder / f"{prefix}{table}.csv.gz") for table in TABLES}


def contents(folder):
    """Every table of a folder, byte by byte."""
    return {table: (folder / f"{table}.csv.gz").read_bytes() for table in TABLES}


@pytest.fixture(scope="module")
def runs(cache, tmp_path_factory):
    """Two finished runs that differ in their seed."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        assert train(folder / f"seed-{seed}", seed=seed) == 0
    return [folder / "seed-0", folder / "seed-1"]


# train


def test_training_writes_tables_and_checkpoints_and_nothing_else(runs):
    written = {path.name for path in runs[0].iterdir()}
    expected = {f"{table}.csv.gz" for table in TABLES} | {"state.safetensors"}
    expected |= {f"{state}{suffix}" for state in STATES for suffix in (".json", ".safetensors")}
    assert written == expected


def test_the_tables_have_a_row_for_all_that_was_asked_for(runs):
    found = tables(runs[1])
    assert found["history"]["epoch"].tolist() == [1, 2]
    assert found["trajectory"][["epoch", "layer"]].values.tolist() == [
        *([0, 0], [0, 1]),
        *([1, 0], [1, 1]),
        *([2, 0], [2, 1]),
    ]
    states = ["base", "base_calibrated", "best", "last"]
    layers = [[state, layer] for state in states for layer in range(LAYERS)]
    assert found["summary"][["state", "layer"]].values.tolist() == layers
    assert len(found["graph_maxima"]) == len(layers) * LIMIT
    for table in found.values():
        assert set(table["config"]) == {"GT-ZINC"}
        assert set(table["seed"]) == {1}
        assert set(table["dataset"]) == {"MOSES sample, first 32"}
        for name, value in SMALL.items():
            assert table["changes"].str.contains(f"{name}={value}").all()


def test_the_checkpoint_has_the_configuration_that_was_asked_for(runs):
    expected = CONFIGS["GT-ZINC"].replace(**SMALL, max_epochs=EPOCHS)
    for state in STATES:
        model, information = checkpoint.load(runs[1] / state, expected)
        assert len(model.layers) == LAYERS
        assert information["seed"] == 1
        assert information["name"] == "GT-ZINC"
    assert json.loads((runs[1] / "base.json").read_text())["epoch"] == 0
    assert json.loads((runs[1] / "last.json").read_text())["epoch"] == EPOCHS


def test_another_seed_gives_another_network(runs):
    zero, one = (tables(folder)["history"]["train_loss"] for folder in runs)
    assert (zero != one).all()


def test_running_again_resumes_and_changes_nothing(runs, capsys):
    before = contents(runs[0])
    assert train(runs[0]) == 0
    state = runs[0] / "state.safetensors"
    assert f"resumed after epoch {EPOCHS} from {state}" in capsys.readouterr().err
    assert contents(runs[0]) == before


def test_a_run_that_is_continued_is_the_run_that_was_not_stopped(runs, tmp_path, capsys):
    assert train(tmp_path, epochs=1) == 0
    assert "resumed" not in capsys.readouterr().err
    assert train(tmp_path, epochs=EPOCHS) == 0
    assert "resumed after epoch 1" in capsys.readouterr().err
    continued, whole = tables(tmp_path), tables(runs[0])
    for table in TABLES:
        timing = ["seconds"] if "seconds" in whole[table] else []
        pd.testing.assert_frame_equal(
            continued[table].drop(columns=timing), whole[table].drop(columns=timing)
        )


def test_a_folder_with_another_run_is_refused_with_the_difference(runs, capsys):
    before = contents(runs[0])
    assert train(runs[0], "--set", "lr=0.01") == USAGE_ERROR == 2
    message = capsys.readouterr().err
    assert "holds the state of another run" in message
    assert "lr: stored 0.0007, asked for 0.01" in message
    assert contents(runs[0]) == before


def test_the_untrained_network_alone_is_a_run(tmp_path):
    assert train(tmp_path, epochs=0) == 0
    found = tables(tmp_path)
    assert len(found["history"]) == 0
    assert set(found["trajectory"]["epoch"]) == {0}
    by_state = found["summary"].set_index("state").drop(columns="layer")
    pd.testing.assert_frame_equal(
        by_state.loc["base"].reset_index(drop=True), by_state.loc["last"].reset_index(drop=True)
    )


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("lr", "--set lr: expected NAME=VALUE with NAME one of architecture, dataset"),
        ("", "--set : expected NAME=VALUE"),
        ("width=8", "--set width=8: expected NAME=VALUE with NAME one of architecture, dataset"),
        ("heads=two", "--set heads=two: expected a int"),
        ("heads=2.5", "--set heads=2.5: expected a int"),
        ("lr=fast", "--set lr=fast: expected a float"),
        ("residual=perhaps", "--set residual=perhaps: expected a bool"),
        ("heads=3", "hidden_channels (8) must be a multiple of heads (3)"),
        ("lr=-1", "lr: expected a value above 0, got -1.0"),
        ("lr=nan", "lr: expected a value above 0, got nan"),
        ("readout=max", "readout: expected one of"),
    ],
)
def test_a_bad_change_is_refused_before_anything_is_written(assignment, message, tmp_path, capsys):
    assert train(tmp_path / "out", "--set", assignment) == USAGE_ERROR
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_values_of_every_kind_are_taken_over(tmp_path):
    changes = ("lr=1e-3", "residual=False", "use_bias=true", "readout=sum", "num_node_types=30")
    further = [part for change in changes for part in ("--set", change)]
    assert train(tmp_path, "--threads", "2", *further, epochs=0) == 0
    assert torch.get_num_threads() == 2
    config = json.loads((tmp_path / "last.json").read_text())["config"]
    expected = {"lr": 1e-3, "residual": False, "use_bias": True, "readout": "sum"}
    expected |= {"num_node_types": 30, **SMALL}
    found = {name: config[name] for name in expected}
    assert found == expected
    assert list(map(type, found.values())) == list(map(type, expected.values()))


def test_fewer_than_no_epochs_are_refused(tmp_path, capsys):
    assert train(tmp_path, epochs=-1) == USAGE_ERROR
    assert "max_epochs: expected 0 or more, got -1" in capsys.readouterr().err


def test_an_unknown_data_set_is_refused_with_the_known_names(tmp_path, capsys):
    assert train(tmp_path / "out", dataset="qm9") == USAGE_ERROR
    assert capsys.readouterr().err == UNKNOWN_DATA_SET
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--config", "GT-ZINC", "--dataset", "moses"], "are required: --out"),
        (["train", "--config", "GT", "--dataset", "moses", "--out", "x"], "invalid choice: 'GT'"),
        (["collect", "-o", "x"], "are required: folders"),
        (["collect", "x"], "are required: -o/--output"),
        (["data"], "are required: dataset"),
    ],
)
def test_an_incomplete_command_exits_with_its_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == USAGE_ERROR
    captured = capsys.readouterr().err
    assert captured.startswith("usage: python -m studies")
    assert message in captured


# collect


def test_collecting_joins_the_tables_of_the_runs_in_their_order(runs, tmp_path, capsys):
    prefix = tmp_path / "results" / "emergence_small_"
    assert main(["collect", *map(str, runs), "-o", str(prefix)]) == 0
    paths = [Path(f"{prefix}{table}.csv.gz") for table in TABLES]
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(map(str, paths))
    joined = tables(tmp_path / "results", "emergence_small_")
    parts = [tables(folder) for folder in runs]
    for table in TABLES:
        expected = pd.concat([part[table] for part in parts], ignore_index=True)
        pd.testing.assert_frame_equal(joined[table], expected)
        assert joined[table]["seed"].is_monotonic_increasing
        assert set(joined[table]["seed"]) == {0, 1}


def test_collecting_a_run_that_is_not_finished_is_refused_and_writes_nothing(
    runs, tmp_path, capsys
):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    prefix = tmp_path / "joined_"
    assert main(["collect", str(runs[0]), str(unfinished), "-o", str(prefix)]) == USAGE_ERROR
    message = capsys.readouterr().err
    assert message.startswith(f"error: no table at {unfinished}")
    assert "python -m studies train" in message
    assert list(tmp_path.glob("joined_*")) == []


# data


def test_the_data_command_says_what_a_data_set_is(capsys):
    assert main(["data", "moses"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["name: moses", "title: MOSES sample"]
    assert "deviations: Not a data set of the paper: the bundled stand-in for ZINC." in lines
    assert lines[-3:] == [
        "train: 10,000 graphs, 216,190 nodes, 463,906 directed edges",
        "val: 1,000 graphs, 21,737 nodes, 46,622 directed edges",
        "test: 1,000 graphs, 21,518 nodes, 46,104 directed edges",
    ]


def test_damaged_data_is_an_error_and_no_traceback(tmp_path, monkeypatch, capsys):
    path = tmp_path / "molecules" / "moses12k.csv.gz"
    path.parent.mkdir()
    path.write_bytes(b"damaged")
    monkeypatch.setenv("MAPKG_DATA", str(tmp_path))
    assert main(["data", "moses"]) == USAGE_ERROR
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {path}: expected sha256 ")
    assert captured.out == ""


def test_the_status_reaches_the_shell():
    result = subprocess.run(
        [sys.executable, "-m", "studies", "data", "qm9"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == USAGE_ERROR
    assert result.stderr == UNKNOWN_DATA_SET
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--device", "toaster"], "--device toaster: cannot be used here"),
        (["--set", "num_node_types=abc"], "expected a int"),
        (["--set", "num_node_types=5"], "num_node_types: the configuration has 5"),
        (["--set", "out_channels=12"], "out_channels: the configuration has 12, but"),
        (["--set", "loss=bce"], "loss: the configuration has 'bce', but"),
    ],
)
def test_a_setting_that_cannot_be_used_exits_with_2_and_says_why(
    tmp_path, capsys, arguments, complaint
):
    tiny = ["--limit", "16", "--set", "hidden_channels=8", "--set", "num_layers=1"]
    command = ["train", "--config", "GT-ZINC", "--dataset", "moses", "--epochs", "1"]
    status = main([*command, *tiny, "--out", str(tmp_path / "run"), *arguments])
    assert status == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--limit", "--threads"])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_count_must_be_a_whole_number_above_0(tmp_path, capsys, option, value):
    command = ["train", "--config", "GT-ZINC", "--dataset", "moses", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        main([*command, option, value])
    assert stopped.value.code == 2
    assert "expected a whole number above 0" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_exits_with_2(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    command = ["train", "--config", "GT-ZINC", "--dataset", "moses", "--epochs", "1"]
    tiny = ["--limit", "16", "--set", "hidden_channels=8", "--set", "num_layers=1"]
    assert main([*command, *tiny, "--out", str(tmp_path / "file" / "run")]) == 2
    assert "file" in capsys.readouterr().err
