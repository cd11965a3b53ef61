"""The strict notebook runner, and every notebook of the book: form, and a run of seconds."""

import ast
import json
import os
import re
import signal
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from IPython.core.formatters import DisplayFormatter

from studies import notebook
from studies.__main__ import main, parser
from studies.files import alone

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
CHECKED = "nbval-check-output"
SMALL = dict(epochs=1, train_graphs=64, hidden_channels=8, num_layers=2, heads=2)
DEEP = dict(epochs=2, hidden_channels=4, heads=2)
TINY = {
    "01_graphs": dict(graph=3),
    "02_edge_attention": dict(hidden_channels=6, heads=3, edge_scale=2.0, seed=1),
    "03_detection": dict(graphs=20, rows=500, molecules=5, networks=1, threshold=500.0, graph=3),
    "04_emergence": dict(SMALL, epochs=2, test_graphs=20, seed=1),
    "05_grid": dict(SMALL, test_graphs=20, architecture="graphit"),
    "06_distributions": dict(graphs=20, run="gt_zinc", seed=1, rows=500, networks=1),
    "07_any_model": dict(SMALL, networks=1),
    "08_bond_types": dict(test_graphs=40, resamples=5, shown=3, layer=1),
    "09_do_they_attribute": dict(
        test_graphs=3, methods=["gradient x input"], edited_graphs=8, resamples=10, graph=3
    ),
    "10_ablations": dict(
        squares=[3], epochs=1, graphs=32, hidden_channels=8, heads=2, num_layers=1
    ),
    "11_explicit_bias": dict(graphs=2, network_seed=1, term_seed=1, scale=0.5, threshold=500.0),
    "12_robustness": dict(
        graphs=2, sigmas=[0.05], kinds=["shared"], restarts=[1], passes=1, lr=0.05, threshold=500.0
    ),
    "13_converged": dict(SMALL, seeds=[2, 5], train_graphs=32, test_graphs=16, batch_size=16),
    "14_why_they_emerge": dict(
        dict(arms=["SGD", "k = 4"], seeds=[2, 5], epochs=1, graphs=32, hidden_channels=8),
        **dict(heads=4, num_layers=1),
    ),
    "15_edges_that_explode": dict(molecules=60, first_layer=5, margin=0.2, seed=1),
    "16_curvature": dict(molecules=5, seed=1),
    "17_trained_with_the_term": dict(
        dict(SMALL, term="published", test_graphs=8, lr=0.001, seed=1),
    ),
    "20_attention_is_not_lipschitz": dict(points=2, layer_points=1, scales=[1.0, 10.0]),
    "21_gradient_explosion": dict(
        DEEP, num_layers=3, norms=["none", "pair-si", "lipschitz-published-si"]
    ),
    "22_depth": dict(
        DEEP, layers=[1, 3], norms=["layer", "lipschitz-published"], architecture="gt", seeds=[1, 2]
    ),
    "23_trees": dict(
        dict(depth=3, passes=2, norms=["pair"], batch_size=1024),
        **dict(seeds=[1], scales=[2.0], example=0),
    ),
    "24_missing_features": dict(
        dict(DEEP, rates=[0.25], models=["GGNN", "GAT-Pn"], layers=[1], seeds=[1, 2]),
        **dict(lr=0.01, shown_rate=0.0),
    ),
    "25_backward_oversmoothing": dict(
        dict(num_layers=8, hidden_channels=8, seeds=[1], shown=[0, 3, 5], gains=[2.0]),
        **dict(sparse_layers=4, last_layer_depths=[2], training_depths=[1], steps=20),
        **dict(attention_layers=2, epochs=2),
    ),
}
each_page = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


# The runner: what papermill lets pass is refused here.

PARAMETERS = """\
%matplotlib inline
from pathlib import Path
seed = 3
epochs: int = 2  # 1 to 9: passes over the data
color: str = "#ff0000"  # of lines
size: int | None = None  # 4 to 8: of a page
where: Path = Path("a")  # folder
pair: tuple[int, float] = (1, 2.0)
ids: "list[int]" = [1]  # 0 to 1e9: of seeds
flag = False
norm: str = "none"  # one of none, layer: what follows a layer
odd: "Unknown" = None
norms: list = ["pair"]  # names of studies.deep.NORMS: live
scales: list = [1.0]  # 0 to 9: sizes
dataset: str = "moses"  # a data set of molecules: what is drawn
"""


def write(path, *code, parameters=PARAMETERS):
    cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *code)]
    cells[0].metadata["tags"] = ["parameters"] if parameters else []
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture
def page(tmp_path):
    return write(tmp_path / "a.ipynb")


def printed(path):
    outputs = [o for cell in nbformat.read(path, 4).cells for o in cell.get("outputs", [])]
    return "".join(o["text"] for o in outputs if o.get("name") == "stdout")


def test_parameters_are_listed_as_they_are_written(page, capsys):
    assert main(["run", str(page), "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 13
    assert listed[:2] == [
        "  seed: int | float = 3",
        "  epochs: int = 2  # 1 to 9: passes over the data",
    ]


@pytest.mark.parametrize(
    ("name", "given", "code"),
    [
        *(("seed", "5", "seed = 5"), ("seed", "-1e-3", "seed = -0.001")),
        ("seed", "-inf", "from math import inf\nseed = -inf"),
        *(("color", "#00", "color = '#00'"), ("color", "7", "color = '7'")),
        *(("size", "None", "size = None"), ("size", "7", "size = 7")),
        ("where", "b/c", "from pathlib import PosixPath\nwhere = PosixPath('b/c')"),
        *(("pair", "(3, 4.5)", "pair = (3, 4.5)"), ("ids", "[1, 2]", "ids = [1, 2]")),
        *(("flag", "true", "flag = True"), ("odd", "any", "odd = 'any'")),
        # From Python, what numpy and torch have.
        *(("seed", np.int64(3), "seed = 3"), ("seed", torch.tensor(0.5), "seed = 0.5")),
        ("ids", np.array([1, 2]), "ids = [1, 2]"),
        ("pair", (1, np.float64(2)), "pair = (1, 2.0)"),
    ],
)
def test_a_text_or_a_number_becomes_a_value_of_the_declared_type(name, given, code, page):
    values = {name: given}
    if isinstance(given, str):
        words = ["run", str(page), "-p", name, given, "-o", "out.ipynb"]
        values = notebook.parse(page, parser(words).parse_args(words).parameter)
    assert notebook.injected(page, values).cells[1].source == code
    with pytest.raises(ValueError, match=f"expected each parameter once, got {name} {name}"):
        notebook.parse(page, [(name, given)] * 2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"epoch": 5}, "has no parameter 'epoch'; did you mean epochs? It has seed, epochs, "),
        ({"epochs": "five"}, "expected type int, got 'five', as parameter epochs: int = 2  # 1 to"),
        ({"epochs": True}, "expected type int"),
        ({"epochs": 10}, "expected 1 to 9, got 10, as parameter epochs: int = 2"),
        ({"epochs": np.int64(0)}, "expected 1 to 9, got 0"),
        ({"size": "7.5"}, "expected type int | None, got '7.5'"),
        ({"pair": "[3]"}, "expected type tuple[int, float], got '[3]'"),
        ({"ids": '["a", 1.5]'}, "expected type"),
        ({"ids": [1, -1]}, "expected 0 to 1e9, got [1, -1]"),
        ({"ids": []}, "expected 0 to 1e9, got []"),
        ({"scales": [0, 0.0]}, "expected different values, got [0, 0.0]"),
        ({"ids": [1, 2, 1]}, "expected different values, got [1, 2, 1]"),
        ({"dataset": "mosses"}, "unknown data set 'mosses'; known: citation, "),
        ({"flag": "1"}, "expected type bool, got '1'"),
        ({"color": 5}, "expected type str, got 5"),
        ({"norm": "pair"}, "expected one of none, layer, got 'pair'"),
        ({"norms": []}, "expected one of none, layer, pair, "),
        ({"norms": [[1]]}, "expected one of none, layer, pair, "),
        ({"dataset": "citation"}, "parameter dataset: expected a data set of molecules (moses, "),
    ],
)
def test_a_value_that_the_notebook_does_not_allow_is_refused_before_it_runs(
    value, message, page, tmp_path
):
    with pytest.raises(ValueError, match=re.escape(message)):
        notebook.run(page, tmp_path / "out.ipynb", value)
    if all(isinstance(each, str) for each in value.values()):
        with pytest.raises(ValueError, match=re.escape(message)):
            notebook.parse(page, value.items())
    assert os.listdir(tmp_path) == ["a.ipynb"]


def test_a_notebook_runs_with_other_parameters_and_writes_only_its_output(tmp_path, capsys):
    path = write(tmp_path / "a.ipynb", "print(epochs, color, flag)")
    (tmp_path / "{made}").mkdir()  # a link to a private file stays one, and the file private
    output, private = tmp_path / "out.ipynb", tmp_path / "{made}" / "private.ipynb"
    private.touch(mode=0o600)
    output.symlink_to(private)
    before = path.read_bytes()
    words = ["run", str(path), "-p", "epochs", "5", "-p", "flag", "true", "-o", str(output)]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{private}\n"
    assert printed(output) == "5 #ff0000 True\n"
    assert path.read_bytes() == before
    assert output.is_symlink() and private.stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in tmp_path.rglob("*.*")) == [
        *("a.ipynb", "out.ipynb", "private.ipynb")
    ]


CELL = '{"cell_type": "raw", "source": "", "metadata": {"tags": "parameters"}}'
BAD = {
    "text": "not json",
    "empty": "",
    "a list": "[1]",
    "format 5": '{"nbformat": 5, "nbformat_minor": 0, "metadata": {}, "cells": []}',
    "no cells": '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}',
    "a cell of nothing": '{"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": [{}]}',
    "tags of text": f'{{"nbformat": 4, "nbformat_minor": 4, "metadata": {{}}, "cells": [{CELL}]}}',
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_what_is_no_notebook_is_refused_in_one_line(content, tmp_path, capsys):
    path = tmp_path / "bad.ipynb"
    path.write_text(content)
    assert main(["run", str(path), "-o", str(tmp_path / "out.ipynb")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: not a notebook of format 4: ")


PLACES = {
    "out.ipynb is a folder; name a file as output": lambda page, out: out.mkdir(),
    "out.ipynb is a device or pipe; name a file": lambda page, out: os.mkfifo(out),
    "out.ipynb is read-only; name another output": lambda page, out: out.touch(mode=0o444),
    "a.ipynb is the notebook that is run; name": lambda page, out: out.symlink_to(page),
    "out.failed.ipynb is the notebook that is run": lambda page, out: page.rename(
        out.with_name("out.failed.ipynb")
    ),
    "out.ipynb cannot be written, ": lambda page, out: page / "out.ipynb",
    "out.ipynb cannot be written, /proc: ": lambda page, out: Path("/proc/a/out.ipynb"),
}


@pytest.mark.parametrize("message", PLACES)
def test_where_nothing_can_be_written_is_said_before_the_run(message, page, tmp_path):
    output, before = tmp_path / "out.ipynb", page.read_bytes()
    given = PLACES[message](page, output)
    if "failed" in message:
        page = given
    elif given:
        output = given
    with pytest.raises(ValueError, match=message):
        notebook.run(page, output, {})
    assert page.read_bytes() == before and len(os.listdir(tmp_path)) <= 2


def test_what_has_no_parameters_or_no_output_or_another_run_on_it_is_refused(page, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"b.ipynb; notebooks there: a.ipynb"):
        notebook.parameters(tmp_path / "b.ipynb")
    with pytest.raises(ValueError, match=r"-o OUT.ipynb"):
        notebook.command(page)
    with alone(tmp_path, "out.ipynb"), pytest.raises(ValueError, match="another process writes"):
        notebook.run(page, tmp_path / "out.ipynb", {})
    with pytest.raises(ValueError, match="no cell is tagged 'parameters'"):
        notebook.parameters(write(page, parameters=""))


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("# ratio\n1 / 0", "ZeroDivisionError: division by zero"),
        ("import os; os._exit(0)", "Kernel died"),
        ("raise SystemExit('')", "SystemExit"),
        ("import os, time; os.kill(os.getppid(), 2); time.sleep(99)", "interrupted"),
    ],
)
def test_a_run_that_fails_names_the_cell_and_keeps_what_was_done_and_an_older_output(
    cell, reason, tmp_path, capsys, monkeypatch
):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # of Control-C
    pieces = "import os; print('one', flush=True)\nprint('two', os.getpid(), flush=True)"
    path = write(tmp_path / "a.ipynb", pieces, cell, "print('three')")
    output = tmp_path / "out.ipynb"
    output.write_text("older")
    assert main(["run", str(path), "-o", str(output)]) == 1
    signal.signal(signal.SIGINT, before)
    failed, line = tmp_path / "out.failed.ipynb", capsys.readouterr().err.splitlines()[-1]
    first = cell.partition("\n")[0]
    words = f"error: a.ipynb: code cell 3, which begins {first!r}, failed: {reason}"
    assert line.startswith(words) and line.endswith(f"; all up to there is in {failed}")
    assert output.read_text() == "older"
    (stream,) = (o for c in cells(failed, "code") for o in c.outputs if o.get("name") == "stdout")
    one, two, kernel = stream.text.split()
    assert (one, two) == ("one", "two"), "what is printed in pieces is one output"
    with pytest.raises(ProcessLookupError):
        os.kill(int(kernel), 0)


# The pages.


def cells(path, kind=None):
    return [c for c in nbformat.read(path, 4).cells if kind is None or c.cell_type == kind]


def tags(cell):
    return cell.metadata.get("tags", [])


@each_page
def test_it_follows_the_form_of_a_page(path):
    every, code = cells(path), cells(path, "code")
    assert every[0].cell_type == "markdown" and every[0].source.startswith("# ")
    assert ["parameters" in tags(cell) for cell in code] == [True, *[False] * (len(code) - 1)]
    for parameter in notebook.parameters(path).values():
        assert parameter.type != "None", f"{parameter.name} has no type"
        assert parameter.help, f"{parameter.name} has no comment"
        default = ast.literal_eval(parameter.default)
        parameter.check(default)
        is_number = not isinstance(default[0] if isinstance(default, list) else default, str)
        assert not is_number or re.match(r"one of|\S+ to ", parameter.help), "it has no range"
    for cell in code:
        if CHECKED in tags(cell):
            assert cell.execution_count is not None, "nbval would not check this cell"
            assert {output.output_type for output in cell.outputs} == {"stream"}
        else:
            assert (cell.execution_count, cell.outputs) == (None, [])


@each_page
def test_code_only_chooses_calls_and_shows(path):
    code = cells(path, "code")
    for cell in code:
        lines = sum(
            node.end_lineno - node.lineno + 1
            for node in ast.parse(cell.source).body
            if not isinstance(node, ast.Import | ast.ImportFrom)
        )
        assert lines <= 20 or "remove-cell" in tags(cell), f"{lines} lines:\n{cell.source}"
        assert not re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE), cell.source
        for forbidden in ("!pip", "%pip", "sys.path", "filterwarnings", ".backward("):
            assert forbidden not in cell.source
        assert not re.search(r"['\"]/\w+/", cell.source), f"an absolute path in:\n{cell.source}"
    shown = [cell for cell in code if not {"hide-input", "remove-cell"} & {*tags(cell)}]
    prose = sum(len(cell.source.split()) for cell in cells(path, "markdown"))
    assert prose >= sum(len(cell.source.split()) for cell in shown), "more code than prose"


@each_page
def test_what_it_reads_is_declared(path):
    reads = json.loads(path.read_text())["metadata"]["mapkg"]["reads"]
    assert all((REPOSITORY / name).exists() for name in reads)
    code = "\n".join(cell.source for cell in cells(path, "code"))
    is_drawn = '"citation"' in code or '"trees-' in code
    needs = {"load(": "data/molecules"} if not is_drawn else {}
    needs |= {"read_emergence": "data/results", "examine_checkpoint": "data/checkpoints"}
    assert {folder for call, folder in needs.items() if call in code} <= {*reads}


def run_here(path, values):
    """Run a notebook in this process with other parameters; returns the names it leaves."""
    names = {"__name__": "__main__"}
    for cell in notebook.injected(path, values).cells:
        body = ast.parse(cell.source).body if cell.cell_type == "code" else []
        shown = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), path.name, "exec"), names)
        if shown is not None:
            value = eval(compile(ast.Expression(shown.value), path.name, "eval"), names)
            DisplayFormatter().format(value)
        plt.close("all")
    return names


@each_page
def test_it_runs_with_other_parameters(path, monkeypatch):
    assert path.stem in TINY, "add a tiny parameter set for the new notebook"
    monkeypatch.chdir(path.parent)
    with plt.rc_context():
        names = run_here(path, TINY[path.stem])
    assert {name: names[name] for name in TINY[path.stem]} == TINY[path.stem]
    if path.stem == "04_emergence":  # other parameters, other results: a row per epoch
        assert len(names["live"].history) == TINY[path.stem]["epochs"]
