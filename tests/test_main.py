"""The command line on runs of seconds: exit statuses, messages and what is written."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY

from studies import checkpoint
from studies.__main__ import COMMANDS, STUDIES, USAGE_ERROR, main
from studies.data import load
from studies.emergence import emergence, with_permuted_targets, without_training
from studies.grid import laws, read_runs, read_untrained
from studies.laws import LAWS
from studies.published import CONFIGS
from studies.results import TABLES, read_emergence

LIMIT, LAYERS, EPOCHS = 16, 2, 2
SMALL = {"hidden_channels": 8, "heads": 2, "num_layers": LAYERS}
SET = ["--set", *(f"{name}={value}" for name, value in SMALL.items())]
NETWORK = ["--config", "GT-ZINC", "--dataset", "moses", "--limit", str(LIMIT), *SET]
UNKNOWN_DATA_SET = (
    "error: unknown data set 'qm9'; known: citation, citeseer, cora, moses, moses-triple, "
    "proteins, pubmed, pubmed-missing, tox21, tox21-random, trees-2, trees-3, trees-4, trees-5, "
    "zinc, zinc-substitute\n"
)

pytestmark = pytest.mark.usefixtures("cache", "same_number_of_threads")


def train(out, *further, epochs=EPOCHS, seed=0):
    """Exit status of a training run of seconds."""
    numbers = ["--epochs", str(epochs), "--seed", str(seed), "--threads", "1"]
    return main(["train", *NETWORK, *numbers, "--out", str(out), *further])


def tables(folder, prefix=""):
    return {table: pd.read_csv(folder / f"{prefix}{table}.csv.gz") for table in TABLES}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(capsys, arguments):
    """The one line that a command which cannot be done says, and that it exits with 2."""
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    assert (status, captured.out) == (USAGE_ERROR, "")
    *before, last = captured.err.splitlines()
    assert last.startswith("error: ") and not [line for line in before if ": " in line]
    return last


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


# What can be typed.


@pytest.mark.parametrize("name", [*COMMANDS, *STUDIES])
def test_options_are_the_parameters_of_the_function_with_their_defaults(name, capsys):
    words = [name] if name in COMMANDS else ["study", name]
    module, function = (COMMANDS | STUDIES)[name][0].split(":")
    function = getattr(import_module(f"studies.{module}"), function)
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in ("folder", "splits", "prefix", "progress", "settings"):
            continue
        option, default = f"--{parameter.name.replace('_', '-')} ", parameter.default
        if parameter.kind is not parameter.KEYWORD_ONLY:
            assert f"{parameter.name.upper()} " in shown
            continue
        assert option in shown or f"{option.strip()}]" in shown
        if default is parameter.empty:
            assert f"[{option}" not in shown
        elif default not in (None, False, ()):
            values = default if isinstance(default, tuple) else (default,)
            assert f"(default: {' '.join(map(str, values))})" in shown
    assert "--out" in shown or name == "data"


def test_help_and_a_misspelt_option_wait_for_no_import():
    code = (
        "import contextlib, sys\nfrom studies.__main__ import main\n"
        "for words in ('--help', 'study --help', 'study depth --help', 'train --confg', 'fly'):\n"
        "    with contextlib.suppress(SystemExit):\n        main(words.split())\n"
        "assert not {'torch', 'numpy', 'pandas', 'yaml'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "are required: COMMAND (see python -m studies --help)"),
        ("trian", "invalid choice: 'trian' (choose from "),
        ("study", "are required: NAME (see python -m studies study --help)"),
        ("study snik", "invalid choice: 'snik' (choose from "),
        ("data", "are required: DATASET"),
        ("data qm9", UNKNOWN_DATA_SET.strip()),
        ("train --config GT-ZINC --datset moses", "no option --datset; did you mean --dataset?"),
        ("train --config GT-ZINC --dataset moses", "are required: --out"),
        ("train --config GT-ZINK --dataset moses --out x", "--config GT-ZINK: did you mean GT-ZI"),
        ("train --config GT-ZINC --dataset qm9 --out x", "unknown data set 'qm9'; known: "),
        ("train --config GT-ZINC --dataset moses --out x --change shufled-types",
         "--change shufled-types: did you mean shuffled-types? Known are "),
        ("train --config GT-ZINC --dataset moses --out x --seed 1.5", "expected a whole number,"),
        ("train --config GT-ZINC --dataset moses --out x --limit 0", "a whole number above 0"),
        ("train --config GT-ZINC --dataset moses --out x --threads many", "a whole number above 0"),
        ("train --config GT-ZINC --dataset moses --out x --set", "expected at least one argument"),
        ("study emergence -o x", "are required: FOLDER"),
        ("study emergence x", "are required: -o/--output"),
        ("study emergence nowhere -o x", "no table at nowhere/summary.csv.gz; write it with "),
        ("study sink nowhere --dataset moses -o x", "no checkpoint: expected nowhere/best.safe"),
        ("study bonds nowhere --dataset moses -o x --change no", "--change no: expected one of "),
        ("study laws one --results nowhere -o x", "no table at nowhere/emergence_one_summary"),
        ("study untrained --dataset moses -o x", "are required: --config"),
        ("study depth --dataset citation -o x --architecture mlp --norms none", "mlp: expected "),
        ("study depth --dataset citation -o x --architecture gt --norms pai", "did you mean pair"),
        ("study missing --dataset citation -o x --models MLP", "--models MLP: expected one of "),
        ("study trees --dataset trees-2 -o x --lr fast", "invalid float value: 'fast'"),
    ],
)  # fmt: skip
def test_what_is_misspelt_or_missing_is_one_line_and_nothing_is_written(
    line, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, line.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train --out", "study untrained --networks 1 -o"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr", "--set lr: expected NAME=VALUE with NAME one of architecture, dataset"),
        ("width=8", "--set width=8: expected NAME=VALUE with NAME one of architecture, dataset"),
        ("heads=two", "--set heads=two: expected a int"),
        ("residual=perhaps", "--set residual=perhaps: expected a bool"),
        ("heads=3", "hidden_channels (8) must be a multiple of heads (3)"),
        ("lr=nan", "lr: expected a value above 0, got nan"),
        ("readout=max", "readout: expected one of"),
        ("num_node_types=5", "num_node_types: the configuration has 5, but the data set"),
        ("loss=bce", "loss: the configuration has 'bce', but"),
    ],
)
def test_a_network_that_cannot_be_is_refused(command, setting, message, tmp_path, capsys):
    words = [*command.split(), str(tmp_path / "x"), *NETWORK, "--set", setting]
    assert message in refused(capsys, words)
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_is_refused(tmp_path, capsys):
    words = ["train", *NETWORK, "--out", str(tmp_path / "x"), "--device", "toaster"]
    assert "--device toaster: cannot be used here" in refused(capsys, words)


def test_the_status_reaches_the_shell():
    result = subprocess.run(
        [sys.executable, "-m", "studies", "data", "qm9"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (USAGE_ERROR, "")
    assert result.stderr == UNKNOWN_DATA_SET


# Training.


def test_training_writes_tables_and_checkpoints_as_asked_for(runs):
    states = ("base", "best", "last")
    expected = {f"{table}.csv.gz" for table in TABLES} | {"state.safetensors"}
    expected |= {f"{state}{suffix}" for state in states for suffix in (".json", ".safetensors")}
    assert {path.name for path in runs[1].iterdir()} == expected
    for table in tables(runs[1]).values():
        assert set(table["config"]) == {"GT-ZINC"} and set(table["seed"]) == {1}
        assert set(table["dataset"]) == {f"MOSES sample, first {LIMIT}"}
        for name, value in SMALL.items():
            assert table["changes"].str.contains(f"{name}={value}").all()
    config = CONFIGS["GT-ZINC"].replace(**SMALL, max_epochs=EPOCHS)
    for state in states:
        information = checkpoint.load(runs[1] / state, config)[1]
        assert (information["seed"], information["name"]) == (1, "GT-ZINC")


def test_values_of_every_kind_are_taken_over(tmp_path):
    changes = ["lr=1e-3", "residual=False", "use_bias=true", "readout=sum", "num_node_types=30"]
    further = ["--threads", "2", "--set", *changes[:2], "--set", *changes[2:]]
    assert train(tmp_path, *further, epochs=0) == 0
    assert torch.get_num_threads() == 2
    config = json.loads((tmp_path / "last.json").read_text())["config"]
    expected = {"lr": 1e-3, "residual": False, "use_bias": True, "readout": "sum"}
    expected |= {"num_node_types": 30, **SMALL}
    found = {name: config[name] for name in expected}
    assert found == expected
    assert list(map(type, found.values())) == list(map(type, expected.values()))


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
    before = contents(tmp_path)
    assert train(tmp_path) == 0
    assert contents(tmp_path) == before


def test_a_folder_with_another_run_is_refused_with_the_difference(runs, capsys):
    before = contents(runs[0])
    capsys.readouterr()
    assert train(runs[0], "--set", "lr=0.01") == USAGE_ERROR
    message = capsys.readouterr().err
    assert "holds the state of another run" in message
    assert "lr: stored 0.0007, asked for 0.01" in message
    assert train(runs[0], "--permute-targets") == USAGE_ERROR
    assert "targets permuted" in capsys.readouterr().err
    assert contents(runs[0]) == before


def test_permuted_targets_are_of_the_seed_of_the_run_and_said_in_every_row(runs, tmp_path):
    assert train(tmp_path, "--permute-targets", seed=1) == 0
    found = read_emergence(tmp_path)
    title = f"MOSES sample, first {LIMIT}, targets permuted"
    assert all(set(getattr(found, name)["dataset"]) == {title} for name in TABLES)
    config = CONFIGS["GT-ZINC"].replace(**SMALL, max_epochs=EPOCHS)
    columns = ["train_loss", "val_loss"]
    same, other = (
        emergence(config, with_permuted_targets(limited(), seed), seed=1, progress=False).history
        for seed in (1, 0)
    )
    pd.testing.assert_frame_equal(found.history[columns], same[columns], rtol=1e-5)
    assert (found.history["train_loss"] - other["train_loss"]).abs().min() > 1e-4
    plain, null = (run.summary.query("state == 'base'") for run in (read_emergence(runs[1]), found))
    assert null["max_ratio"].equals(plain["max_ratio"]), "the same network before training"


def test_an_output_that_cannot_be_written_exits_with_2(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert train(tmp_path / "file" / "run", epochs=0) == USAGE_ERROR
    assert "file" in capsys.readouterr().err


# Studies.


def test_tables_of_runs_are_joined_in_their_order_with_the_states_asked_for(runs, tmp_path, capsys):
    words = ["study", "emergence", *map(str, reversed(runs)), "-o", str(tmp_path / "emergence_x")]
    assert main([*words, "--states", "best", "base"]) == 0
    paths = [str(tmp_path / f"emergence_x_{table}.csv.gz") for table in TABLES]
    assert capsys.readouterr().out.splitlines() == paths
    found, parts = tables(tmp_path, "emergence_x_"), [tables(folder) for folder in runs]
    for table in TABLES:
        expected = pd.concat([part[table] for part in reversed(parts)], ignore_index=True)
        if table in ("graph_maxima", "histogram"):
            expected = expected[expected["state"].isin(["base", "best"])].reset_index(drop=True)
        pd.testing.assert_frame_equal(found[table], expected)
    before = contents(tmp_path)
    assert main([*words, "--states", "base", "best"]) == 0
    assert contents(tmp_path) == before


def test_a_state_that_a_run_lacks_is_refused_before_anything_is_written(runs, tmp_path, capsys):
    words = ["study", "emergence", *map(str, runs), "-o", str(tmp_path / "x")]
    assert main([*words, "--states", "base", "trained"]) == USAGE_ERROR
    assert "no state trained in " in (message := capsys.readouterr().err)
    assert "there are base, base_calibrated, best, last" in message
    assert list(tmp_path.iterdir()) == []


def test_two_studies_on_one_prefix_are_refused(runs, tmp_path, capsys):
    network = ["study", "untrained", *NETWORK, "--networks", "1", "-o", str(tmp_path / "x")]
    assert main(network) == main(network) == 0
    before = contents(tmp_path)
    assert main(["study", "emergence", str(runs[0]), "-o", str(tmp_path / "one")]) == 0
    capsys.readouterr()
    laws = ["study", "laws", "one", "--results", str(tmp_path), "-o", str(tmp_path / "x")]
    (tmp_path / "emergence_one_summary.csv.gz").touch()
    for table in TABLES:
        (tmp_path / f"one_{table}.csv.gz").rename(tmp_path / f"emergence_one_{table}.csv.gz")
    message = refused(capsys, laws)
    assert "x.csv.gz holds the table of another study; name another prefix" in message
    assert (tmp_path / "x.csv.gz").read_bytes() == before["x.csv.gz"]


def test_untrained_networks_are_those_of_the_package(tmp_path, capsys):
    path = tmp_path / "new" / "untrained_small.csv.gz"
    words = ["study", "untrained", *NETWORK, "--networks", "2", "--first-seed", "7"]
    assert main([*words, "-o", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    config = CONFIGS["GT-ZINC"].replace(**SMALL)
    expected = without_training(config, limited(), [7, 8], name="GT-ZINC", progress=False)
    pd.testing.assert_frame_equal(pd.read_csv(path), expected, rtol=1e-5, check_dtype=False)
    assert (read_untrained(path.parent, ["small"])["run"] == "small").all()


def test_laws_are_fitted_to_the_runs_that_are_named(runs, tmp_path):
    for name, run in zip(("one", "other"), runs, strict=True):
        joined = ["study", "emergence", str(run), "-o", str(tmp_path / f"emergence_{name}")]
        assert main([*joined, "--states", "base", "best"]) == 0
    path = tmp_path / "laws.csv.gz"
    words = ["study", "laws", "other", "one", "--results", str(tmp_path), "-o", str(path)]
    assert main(words) == 0
    found = pd.read_csv(path)
    expected = laws(read_runs(tmp_path, ["other", "one"]).histogram)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5, check_dtype=False)
    assert len(found) == 2 * 2 * LAYERS * len(LAWS)  # of runs and states
    assert found.groupby("run")["seed"].unique().map(list).to_dict() == {"one": [0], "other": [1]}


# Data.


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "moses",
            [
                "train: 10,000 graphs, 216,190 nodes, 463,906 directed edges",
                "val: 1,000 graphs, 21,737 nodes, 46,622 directed edges",
                "test: 1,000 graphs, 21,518 nodes, 46,104 directed edges",
            ],
        ),
        (
            "citation",
            [
                "train: 140 nodes of one graph",
                "val: 500 nodes of one graph",
                "test: 1,000 nodes of one graph",
            ],
        ),
    ],
)
def test_the_data_command_says_what_a_data_set_is(name, lines, capsys):
    assert main(["data", name]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"name: {name}"
    assert said[-3:] == lines
    if name == "moses":
        assert "deviations: Not a data set of the paper: the bundled stand-in for ZINC." in said


def test_damaged_data_is_an_error_and_no_traceback(tmp_path, monkeypatch, capsys):
    path = tmp_path / "molecules" / "moses12k.csv.gz"
    path.parent.mkdir()
    path.write_bytes(b"damaged")
    monkeypatch.setenv("MAPKG_DATA", str(tmp_path))
    assert refused(capsys, ["data", "moses"]).startswith(f"error: {path}: expected sha256 ")
