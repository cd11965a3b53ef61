"""The command line on runs of seconds: exit statuses, messages and what is written."""

import errno
import gzip
import inspect
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pandas as pd
import pytest
from conftest import REPOSITORY, few_molecules

from mapkg.models.config import Config
from studies import checkpoint, tables
from studies.__main__ import COMMANDS, STUDIES, USAGE_ERROR, main
from studies.commands import overrides
from studies.emergence import emergence, with_permuted_targets, without_training
from studies.published import CONFIGS
from studies.results import TABLES, read_emergence, read_runs

LIMIT, EPOCHS = 16, 2
SMALL = CONFIGS["GT-ZINC"].replace(hidden_channels=8, heads=2, num_layers=2, max_epochs=EPOCHS)
SET = ["--set", "hidden_channels=8", "heads=2", "num_layers=2"]
NETWORK = ["--config", "GT-ZINC", "--dataset", "moses", "--limit", str(LIMIT), *SET]
STATES = ["base", "best", "last"]

pytestmark = pytest.mark.usefixtures("cache", "same_number_of_threads")


def train(out, *further, epochs=EPOCHS, seed=0):
    numbers = ["--epochs", str(epochs), "--seed", str(seed), "--threads", "1"]
    return main(["train", *NETWORK, *numbers, "--out", str(out), *further])


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
    assert last.startswith("error: ") and not [line for line in before if "rror: " in line]
    return last


@pytest.fixture(scope="module")
def runs(cache, tmp_path_factory):
    """Two finished runs that differ in their seed."""
    folder = tmp_path_factory.mktemp("runs")
    assert [train(folder / f"seed-{seed}", seed=seed) for seed in (0, 1)] == [0, 0]
    return [folder / "seed-0", folder / "seed-1"]


def limited():
    """The data that the commands above look at, as the package loads them."""
    few = few_molecules(LIMIT, LIMIT, LIMIT)
    title = f"MOSES sample, first {LIMIT}"
    return replace(few, description=replace(few.description, title=title))


@pytest.mark.parametrize("name", [*COMMANDS, *STUDIES])
def test_options_are_the_parameters_of_the_function_with_their_defaults(name, capsys):
    module, function = (COMMANDS | STUDIES)[name][0].split(":")
    function = getattr(import_module(f"studies.{module}"), function)
    with pytest.raises(SystemExit):
        main([*([name] if name in COMMANDS else ["study", name]), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for parameter in inspect.signature(function).parameters.values():
        option, default = f"--{parameter.name.replace('_', '-')}", parameter.default
        if parameter.name in ("folder", "splits", "prefix", "progress", "settings"):
            continue
        if parameter.kind is not parameter.KEYWORD_ONLY:
            assert f"{parameter.name.upper()} " in shown
        elif default is parameter.empty:
            assert f"{option} " in shown and f"[{option} " not in shown
        else:
            assert f"{option} " in shown or f"[{option}]" in shown
            values = default if isinstance(default, tuple) else (default,)
            text = f"(default: {' '.join(map(str, values))})"
            assert default in (None, False, ()) or text in shown


def test_help_and_a_misspelt_option_wait_for_no_import():
    code = (
        "import contextlib, sys\nfrom studies.__main__ import main\n"
        "for words in ('--help', 'study --help', 'study depth --help', 'train --confg', 'fly'):\n"
        "    with contextlib.suppress(SystemExit):\n        main(words.split())\n"
        "assert not {'torch', 'numpy', 'pandas', 'yaml'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)
    command = [sys.executable, "-m", "studies", "data", "qm9"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (USAGE_ERROR, "")
    assert result.stderr.startswith("error: unknown data set 'qm9'; known: citation, citeseer, ")


TRAIN = "train --config GT-ZINC --dataset moses --out x"
DEPTH = "study depth --architecture gat --norms none -o x --dataset"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "are required: COMMAND (see python -m studies --help)"),
        ("trian", "invalid choice: 'trian' (choose from "),
        ("study", "are required: NAME (see python -m studies study --help)"),
        ("train --config GT-ZINC --datset moses", "no option --datset; did you mean --dataset?"),
        ("train --config GT-ZINC --dataset moses", "are required: --out"),
        ("train --config GT-ZINK --dataset moses --out x", "--config GT-ZINK: did you mean GT-ZI"),
        ("train --config GT-ZINC --dataset qm9 --out x", "unknown data set 'qm9'; known: "),
        (f"{TRAIN} --change shufled-types", "did you mean shuffled-types? Known are "),
        (f"{TRAIN} --device toaster", "--device toaster: cannot be used here"),
        (f"{TRAIN} --set lr", "--set lr: expected NAME=VALUE with NAME one of architecture, "),
        (f"{TRAIN} --set dataset=cora", "--set dataset=cora: expected NAME=VALUE with NAME one "),
        (f"{TRAIN} --set source=me", "--set source=me: expected NAME=VALUE with NAME one of "),
        (f"{TRAIN} --set heads=2 heads=4", "--set heads=4: heads is set twice"),
        (f"{TRAIN} --set heads=two", "--set heads=two: expected a int"),
        (f"{TRAIN} --set heads=3", "hidden_channels (64) must be a multiple of heads (3)"),
        (f"{TRAIN} --set num_node_types=5", "the configuration has 5, but MOSES sample has 28"),
        ("study emergence nowhere -o x", "no table at nowhere/summary.csv.gz; python -m studies t"),
        ("study sink nowhere --dataset moses -o x", "no checkpoint: expected nowhere/best.safe"),
        ("study bonds nowhere --dataset moses -o x --change no", "--change no: expected one of "),
        ("study laws one --results nowhere -o x", "no table at nowhere/emergence_one_summary"),
        ("study depth --dataset citation -o x --architecture gt --norms pai", "did you mean pair"),
        # Out of range.
        (f"{TRAIN} --seed 1.5", "expected a whole number from 0 to 1000000000, got '1.5'"),
        (f"{TRAIN} --limit 0", "a whole number from 1 to 1000000, got '0'"),
        (f"{TRAIN} --set lr=inf", "--set lr=inf: expected a number up to 1000000"),
        (f"{DEPTH} citation --layers 1 1001", "a whole number from 1 to 1000, got '1001'"),
        (f"{DEPTH} citation --dropout nan", "a number from 0 to 1, got 'nan'"),
        (f"{DEPTH} citation --epochs 0", "a whole number from 1 to 100000, got '0'"),
        (f"{DEPTH} citation --seeds 0 1 0", "--seeds: expected different values, got [0, 1, 0]"),
        # Data of another kind.
        ("train --config GT-ZINC --dataset cora --out x", "molecules or graphs (moses, moses-tr"),
        (f"{DEPTH} trees-2", "got 'trees-2', one of trees"),
        ("study trees -o x --dataset cora", "of trees (trees-2, trees-3, trees-4, trees-5), got"),
        ("study shares a --smiles b -o x --dataset proteins", "expected a data set of molecules ("),
        # Places that cannot be written.
        ("study missing -o x/ --dataset citation", "--output x/: expected what names of tables be"),
        ("study missing -o .csv.gz --dataset citation", "--output .csv.gz: expected what names "),
        ("study smoothing -o /proc/x --dataset citation", "/proc/x.csv.gz cannot be written, /p"),
        ("train --config GT-ZINC --dataset moses --out /dev/null", "cannot be written, /dev/null"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_nothing_is_written(
    line, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, line.split())
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("studies.commands.load", interrupt)
    assert main(["data", "moses"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_damaged_table_and_a_full_disk_name_the_file(runs, tmp_path, capsys, monkeypatch):
    path = shutil.copytree(runs[0], tmp_path / "run") / "histogram.csv.gz"
    whole = path.read_bytes()
    other = gzip.compress(b"state,x\nbase", mtime=0)
    for damaged in (whole[:200], whole[:100] + b"0" + whole[101:], b"", b"no gzip", other[:-9]):
        path.write_bytes(damaged)
        line = refused(capsys, ["study", "emergence", str(path.parent), "-o", str(tmp_path / "x")])
        assert line.startswith(f"error: {path}: damaged, or no compressed table: ")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path.write_bytes(whole)
    monkeypatch.setattr("os.replace", full)
    line = refused(capsys, ["study", "emergence", str(path.parent), "-o", str(tmp_path / "x")])
    assert line == f"error: {tmp_path / 'x_summary.csv.gz'}: No space left on device"
    assert [each.name for each in tmp_path.iterdir()] == ["run"]


def test_values_of_a_network_are_of_the_type_of_their_field():
    texts = ["lr=1e-3", "residual=False", "use_bias=true", "readout=sum", "num_node_types=30"]
    values = {"lr": 1e-3, "residual": False, "use_bias": True, "readout": "sum"}
    found = overrides([*texts, "num_edge_types=none"])
    assert found == values | {"num_node_types": 30, "num_edge_types": None}
    assert type(found["num_node_types"]) is int and found["residual"] is False


def test_a_run_holds_what_was_asked_for_and_one_that_is_continued_the_same(runs, tmp_path, capsys):
    expected = {f"{table}.csv.gz" for table in TABLES} | {"state.safetensors"}
    expected |= {f"{s}.{kind}" for s in STATES for kind in ("json", "safetensors")}
    assert {path.name for path in runs[1].iterdir()} - {".lock"} == expected
    information = checkpoint.load(runs[1] / "best")[1]
    assert (information["seed"], information["name"]) == (1, "GT-ZINC")
    config = Config.from_dict(information["config"])
    assert (config.hidden_channels, config.heads, config.num_layers) == (8, 2, 2)
    for epochs, is_resumed in ((1, False), (EPOCHS, True)):
        assert train(tmp_path, epochs=epochs) == 0
        assert ("resumed after epoch 1" in capsys.readouterr().err) == is_resumed
    both = (read_emergence(tmp_path), read_emergence(runs[0]))
    for name in TABLES:
        pair = (getattr(run, name).drop(columns="seconds", errors="ignore") for run in both)
        pd.testing.assert_frame_equal(*pair)
    before = contents(tmp_path)
    assert train(tmp_path) == 0
    assert contents(tmp_path) == before


def test_another_run_is_refused_and_permuted_targets_are_of_its_seed_and_said_in_every_row(
    runs, tmp_path, capsys
):
    before = contents(runs[0])
    for change, message in (
        (("--set", "lr=0.01"), "lr: stored 0.0007, asked for 0.01"),
        (("--permute-targets",), "targets permuted"),
    ):
        capsys.readouterr()
        assert train(runs[0], *change) == USAGE_ERROR
        assert message in capsys.readouterr().err
    assert contents(runs[0]) == before
    assert train(tmp_path, "--permute-targets", seed=1) == 0
    found = read_emergence(tmp_path)
    assert set(found.history["dataset"]) == {f"MOSES sample, first {LIMIT}, targets permuted"}
    same = emergence(SMALL, with_permuted_targets(limited(), 1), seed=1, progress=False).history
    columns = ["train_loss", "val_loss"]
    pd.testing.assert_frame_equal(found.history[columns], same[columns], rtol=1e-5)
    of_run = ["study", "bonds", str(tmp_path), "--dataset", "moses", "--limit", str(LIMIT)]
    of_run += ["--by", "type", "-o", str(tmp_path / "of_run")]
    assert main(of_run) == USAGE_ERROR
    assert main([*of_run, "--permute-targets"]) == 0


def test_a_run_of_no_epoch_can_be_read(tmp_path):
    assert train(tmp_path, epochs=0) == 0
    found = read_emergence(tmp_path)
    assert len(found.history) == 0 < len(found.summary)


def test_tables_of_two_trainings_in_one_folder_are_refused(runs, tmp_path):
    for name in TABLES:
        shutil.copy(runs[0] / f"{name}.csv.gz", tmp_path)
    history = pd.read_csv(tmp_path / "history.csv.gz")
    tables.write(tmp_path / "history.csv.gz", history.assign(epochs=99))
    with pytest.raises(ValueError, match="same training, but history is of another than summary"):
        read_emergence(tmp_path)
    tables.write(tmp_path / "history.csv.gz", history[["epoch"]])
    with pytest.raises(
        ValueError, match=r"history.csv.gz: no table of train, it lacks commit, conf"
    ):
        read_emergence(tmp_path)


def test_tables_of_runs_are_joined_in_their_order(runs, tmp_path, capsys):
    words = ["study", "emergence", *map(str, reversed(runs)), "-o", str(tmp_path / "emergence_x")]
    assert "no state trained in" in refused(capsys, [*words, "--states", "base", "trained"])
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--states", "best", "base"]) == 0
    paths = [str(tmp_path / f"emergence_x_{table}.csv.gz") for table in TABLES]
    assert capsys.readouterr().out.splitlines() == paths
    found, parts = read_runs(tmp_path, ["x"]), [read_emergence(folder) for folder in reversed(runs)]
    for name in TABLES:
        expected = pd.concat([getattr(part, name) for part in parts], ignore_index=True)
        if name in ("graph_maxima", "histogram"):
            expected = expected[expected["state"].isin(["base", "best"])].reset_index(drop=True)
        joined = getattr(found, name).drop(columns="run")
        rtol = 5.1e-4 if name == "graph_maxima" else 0  # of four digits
        pd.testing.assert_frame_equal(joined, expected[list(joined)], rtol=rtol)
    before = contents(tmp_path)
    assert main([*words, "--states", "base", "best"]) == 0
    assert contents(tmp_path) == before


def test_untrained_networks_are_those_of_the_package(tmp_path, capsys):
    path = tmp_path / "new" / "untrained_small.csv.gz"
    words = ["study", "untrained", *NETWORK, "--networks", "2", "--first-seed", "7"]
    assert main([*words, "-o", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    expected = without_training(SMALL, limited(), [7, 8], name="GT-ZINC", progress=False)
    pd.testing.assert_frame_equal(pd.read_csv(path), expected, rtol=1e-5, check_dtype=False)


def test_the_data_command_says_what_a_data_set_is(capsys):
    for name, line in (
        ("moses", "test: 1,000 graphs, 21,518 nodes, 46,104 directed edges"),
        ("citation", "test: 1,000 nodes of one graph"),
    ):
        assert main(["data", name]) == 0
        said = capsys.readouterr().out.splitlines()
        assert (said[0], said[-1]) == (f"name: {name}", line)
