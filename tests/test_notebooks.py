"""The strict notebook runner, and every notebook of the book: form, and a run of seconds."""

import ast
import json
import os
import re
import subprocess
import sys
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

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
CHECKED = "nbval-check-output"
SMALL = dict(epochs=1, train_graphs=64, hidden_channels=8, num_layers=2, heads=2)
DEEP = dict(epochs=2, hidden_channels=4, heads=2)
TINY = {
    "01_graphs": dict(graph=3),
    "02_edge_attention": dict(hidden_channels=6, heads=3, edge_scale=2.0, seed=1),
    "03_detection": dict(graphs=20, rows=500, threshold=500.0, seed=1),
    "04_emergence": dict(SMALL, epochs=2, test_graphs=20, seed=1),
    "05_grid": dict(SMALL, test_graphs=20, architecture="graphit"),
    "06_distributions": dict(graphs=20, run="gt_zinc", seed=1, rows=500, networks=1),
    "07_any_model": dict(SMALL, networks=1),
    "08_bond_types": dict(test_graphs=40, resamples=5, shown=3, layer=1),
    "09_do_they_attribute": dict(
        test_graphs=3, methods=["gradient x input"], edited_graphs=8, resamples=10
    ),
    "10_ablations": dict(SMALL, val_graphs=20, seeds=[3], num_layers=1),
    "11_explicit_bias": dict(graphs=2, network_seed=1, term_seed=1, scale=0.5, threshold=500.0),
    "12_robustness": dict(
        graphs=2, sigmas=[0.05], kinds=["shared"], restarts=[1], passes=1, lr=0.05, threshold=500.0
    ),
    "13_converged": dict(SMALL, seeds=[2, 5], train_graphs=32, test_graphs=16, batch_size=16),
    "14_why_they_emerge": dict(
        dict(arms=["SGD", "k = 4"], seeds=[2, 5], epochs=1, graphs=32, hidden_channels=8),
        **dict(heads=4, num_layers=1),
    ),
    "20_attention_is_not_lipschitz": dict(points=2, layer_points=1, scales=[1.0, 10.0]),
    "21_gradient_explosion": dict(
        DEEP, num_layers=3, norms=["none", "pair-si", "lipschitz-published-si"]
    ),
    "22_depth": dict(
        DEEP, layers=[1, 3], norms=["layer", "lipschitz-published"], architecture="gt", seeds=[1, 2]
    ),
    "23_trees": dict(
        dict(depth=3, passes=2, norms=["pair", "lipschitz"], scale=2.0, batch_size=1024),
        **dict(seeds=[1], scales=[2.0], shown_depth=3, example=0),
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
epochs: int = 2  # passes over the data
lr: float = 0.1  # learning rate
name: str = "a"
quick: bool = False
sizes: list[int] = [1, 2]
"""


def write(path, *code, parameters=PARAMETERS):
    cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *code)]
    cells[0].metadata["tags"] = ["parameters"] if parameters else []
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(book, path)
    return path


@pytest.fixture
def small(tmp_path):
    """A notebook that prints its parameters."""
    return write(tmp_path / "small.ipynb", "print(epochs, lr, name, quick, sizes)")


def printed(path):
    outputs = [o for cell in nbformat.read(path, 4).cells for o in cell.get("outputs", [])]
    return "".join(o["text"] for o in outputs if o.get("name") == "stdout")


def test_parameters_are_listed_and_converted_to_the_declared_type(small, capsys):
    assert main(["run", str(small), "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == "  epochs: int = 2  # passes over the data"
    assert [line.split(":")[0].strip() for line in listed] == [
        *("epochs", "lr", "name", "quick", "sizes")
    ]
    texts = [("epochs", "5"), ("lr", "1e-3"), ("name", "7"), ("quick", "true"), ("sizes", "[3]")]
    expected = {"epochs": 5, "lr": 0.001, "name": "7", "quick": True, "sizes": [3]}
    assert notebook.parse(small, texts) == expected


FOREIGN = """\
%matplotlib inline
from pathlib import Path
seed = 3
color: str = "#ff0000"  # of lines
size: int | None = None
where: Path = Path("a")  # folder
pair: tuple[int, float] = (1, 2.0)
ids: "list[int]" = [1]
flag = False
odd: Unknown = None
"""


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("seed", "5", 5),
        ("seed", "-1e-3", -0.001),
        ("seed", "-inf", -float("inf")),
        ("color", "#00", "#00"),
        ("size", "None", None),
        ("size", "7", 7),
        ("where", "b/c", Path("b/c")),
        ("pair", "(3, 4.5)", (3, 4.5)),
        ("ids", "[1, 2]", [1, 2]),
        ("flag", "true", True),
        ("odd", "any", "any"),
        ("seed", "x", None),
        ("size", "7.5", None),
        ("pair", "[3]", None),
        ("ids", '["a", 1.5]', None),
        ("ids", "[true]", None),
        ("flag", "1", None),
    ],
)
def test_parameters_of_other_peoples_notebooks_are_of_their_types(name, text, expected, tmp_path):
    path = write(tmp_path / "foreign.ipynb", parameters=FOREIGN)
    book = nbformat.read(path, 4)
    del book.metadata["kernelspec"]
    nbformat.write(book, path)
    lines = notebook.describe(notebook.parameters(path)).splitlines()
    assert lines[1:3] == ["  color: str = '#ff0000'  # of lines", "  size: int | None = None"]
    words = ["run", str(path), "-p", name, text, "-o", str(tmp_path / "out.ipynb")]
    parsed = parser(words).parse_args(words).parameter
    if expected is None and text != "None":
        with pytest.raises(ValueError, match=f"parameter '{name}' is of type "):
            notebook.parse(path, parsed)
    else:
        value = notebook.parse(path, parsed)[name]
        assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("seed", np.int64(3), "seed = 3"),
        ("seed", torch.tensor(0.5), "seed = 0.5"),
        ("seed", float("nan"), "from math import nan\nseed = nan"),
        ("ids", np.array([1, 2]), "ids = [1, 2]"),
        ("pair", (1, np.float64(2)), "pair = (1, 2.0)"),
        ("where", Path("q"), "from pathlib import PosixPath\nwhere = PosixPath('q')"),
        ("flag", np.bool_(True), "flag = True"),
        ("seed", True, None),
        ("ids", [1.5], None),
        ("color", 5, None),
        ("sed", 1, None),
    ],
)
def test_values_of_python_are_checked_as_strictly_and_may_be_of_numpy(name, value, code, tmp_path):
    path = write(tmp_path / "foreign.ipynb", parameters=FOREIGN)
    if code is None:
        with pytest.raises(ValueError, match=f"{name}' is of type|no parameter '{name}'"):
            notebook.run(path, tmp_path / "out.ipynb", {name: value})
        assert not (tmp_path / "out.ipynb").exists()
    else:
        assert notebook.injected(path, {name: value}).cells[1].source == code


def test_a_notebook_runs_with_other_parameters_and_writes_only_its_output(small, tmp_path):
    output = tmp_path / "made" / "out.ipynb"
    before = small.read_bytes()
    words = ["run", str(small), "-p", "epochs", "5", "-p", "quick", "true"]
    assert main([*words, "-o", str(output)]) == 0
    assert printed(output) == "5 0.1 a True [1, 2]\n"
    assert small.read_bytes() == before
    assert [path.name for path in output.parent.iterdir()] == ["out.ipynb"]


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("epoch", "5", "no parameter 'epoch'"),
        ("epochs", "five", "is of type int, got 'five'"),
        ("epochs", "1.5", "is of type int"),
        ("lr", "fast", "is of type float"),
        ("quick", "yes", "is of type bool"),
        ("sizes", "3", "is of type list"),
        ("sizes", "[3", "is of type list"),
    ],
)
def test_a_wrong_parameter_exits_with_2_and_lists_what_is_known(
    small, tmp_path, capsys, name, value, complaint
):
    output = tmp_path / "out.ipynb"
    assert main(["run", str(small), "-p", name, value, "-o", str(output)]) == 2
    message = capsys.readouterr().err
    assert complaint in message
    assert "epochs: int = 2  # passes over the data" in message
    assert not output.exists()


def test_what_is_no_notebook_or_has_no_parameters_or_no_output_is_refused(small, tmp_path, capsys):
    untagged, text = write(tmp_path / "untagged.ipynb", parameters=""), tmp_path / "text.ipynb"
    text.write_text("not json")
    (tmp_path / "list.ipynb").write_text(json.dumps([1]))
    output = ["-o", str(tmp_path / "out.ipynb")]
    for path, message, further in (
        (tmp_path / "smal.ipynb", "small.ipynb", output),
        (text, "not a notebook", output),
        (tmp_path / "list.ipynb", "not a notebook", output),
        (untagged, "tagged 'parameters'", output),
        (small, "-o OUT.ipynb", []),
    ):
        assert main(["run", str(path), *further]) == 2
        assert message in capsys.readouterr().err


def test_what_is_printed_in_pieces_is_one_output_and_a_failing_cell_keeps_an_older_one(
    tmp_path, capsys
):
    pieces = "print('one', flush=True)\nprint('two', flush=True)"
    failing = write(tmp_path / "failing.ipynb", pieces, "1 / 0")
    output = tmp_path / "out.ipynb"
    output.write_text("older")
    assert main(["run", str(failing), "-o", str(output)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert output.read_text() == "older"
    assert printed(tmp_path / "out.failed.ipynb") == "one\ntwo\n"
    streams = [o for cell in cells(tmp_path / "out.failed.ipynb", "code") for o in cell.outputs]
    assert [each.text for each in streams if "text" in each] == ["one\ntwo\n"]


# The pages.


def cells(path, kind=None):
    return [c for c in nbformat.read(path, 4).cells if kind is None or c.cell_type == kind]


def tags(cell):
    return cell.metadata.get("tags", [])


@each_page
def test_it_follows_the_form_of_a_page(path):
    every, code = cells(path), cells(path, "code")
    assert every[0].cell_type == "markdown" and every[0].source.startswith("# ")
    claim = every[0].source.splitlines()[2]
    assert claim.startswith("*"), "a one-sentence claim follows the title"
    assert re.search(r"\{cite\}`\w+`", every[0].source), "the opening cites its source"
    assert [tags(cell) for cell in code].count(["parameters"]) == 1
    assert tags(code[0]) == ["parameters"], "parameters come before all other code"
    assert any(re.search("^## Summary", c.source, re.M) for c in cells(path, "markdown"))
    for parameter in notebook.parameters(path).values():
        assert parameter.type != "None", f"{parameter.name} has no type"
        assert parameter.help, f"{parameter.name} has no comment"
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
    prose = sum(len(cell.source.split()) for cell in cells(path, "markdown"))
    assert prose >= sum(len(cell.source.split()) for cell in code), "more code than prose"


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


@pytest.mark.slow
@each_page
def test_the_command_line_runs_it_with_other_parameters(path, tmp_path):
    output, command = tmp_path / path.name, [sys.executable, "-m", "studies", "run", str(path)]
    for name, value in TINY[path.stem].items():
        command += ["-p", name, value if isinstance(value, str) else json.dumps(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    look = dict(capture_output=True, text=True, env=environment)
    result = subprocess.run([*command, "-o", str(output)], **look)
    assert result.returncode == 0, result.stderr
    injected = [cell for cell in cells(output, "code") if "injected-parameters" in tags(cell)]
    for name, value in TINY[path.stem].items():
        assert f"{name} = {value!r}" in injected[0].source
