"""Every notebook of the book: its form, and a run with other, tiny parameters."""

import ast
import json
import os
import re
import subprocess
import sys

import matplotlib.pyplot as plt
import nbformat
import pytest
from conftest import REPOSITORY
from IPython.core.formatters import DisplayFormatter
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from studies import notebook

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
TINY = {
    "01_graphs": {"graph": 3},
    "02_edge_attention": {"hidden_channels": 6, "heads": 3, "edge_scale": 2.0, "seed": 1},
    "03_detection": {"graphs": 20, "rows": 500, "threshold": 500.0, "seed": 1},
    "04_emergence": {
        "test_graphs": 20,
        "epochs": 2,
        "train_graphs": 64,
        "hidden_channels": 8,
        "num_layers": 2,
        "heads": 2,
        "seed": 1,
    },
    "05_grid": {
        "test_graphs": 20,
        "architecture": "graphit",
        "epochs": 1,
        "train_graphs": 64,
        "hidden_channels": 8,
        "num_layers": 2,
        "heads": 2,
    },
    "06_distributions": {"graphs": 20, "run": "gt_zinc", "seed": 1, "rows": 500, "networks": 1},
    "08_bond_types": {"test_graphs": 40, "resamples": 5, "shown": 3, "layer": 1},
    "09_do_they_attribute": {
        "test_graphs": 3,
        "methods": ["gradient x input"],
        "edited_graphs": 8,
        "resamples": 10,
    },
    "11_explicit_bias": {
        "graphs": 2,
        "network_seed": 1,
        "term_seed": 1,
        "scale": 0.5,
        "threshold": 500.0,
    },
    "12_robustness": {
        "graphs": 2,
        "sigmas": [0.05],
        "kinds": ["shared"],
        "restarts": [1],
        "passes": 1,
        "lr": 0.05,
        "threshold": 500.0,
    },
    "13_converged": {
        "seeds": [2, 5],
        "epochs": 1,
        "train_graphs": 32,
        "test_graphs": 16,
        "batch_size": 16,
        "hidden_channels": 8,
        "num_layers": 2,
        "heads": 2,
    },
    "20_attention_is_not_lipschitz": {"points": 2, "layer_points": 1, "scales": [1.0, 10.0]},
    "21_gradient_explosion": {
        "epochs": 2,
        "num_layers": 3,
        "heads": 2,
        "hidden_channels": 4,
        "norms": ["none", "pair-si", "lipschitz-published-si"],
    },
    "22_depth": {
        "epochs": 2,
        "layers": [1, 3],
        "norms": ["layer", "lipschitz-published"],
        "architecture": "gt",
        "hidden_channels": 4,
        "heads": 2,
        "seeds": [1, 2],
    },
    "23_trees": {
        "depth": 3,
        "passes": 2,
        "norms": ["pair", "lipschitz"],
        "scale": 2.0,
        "batch_size": 1024,
        "seeds": [1],
        "scales": [2.0],
        "shown_depth": 3,
        "example": 0,
    },
    "24_missing_features": {
        "rates": [0.25],
        "models": ["GGNN", "GAT-Pn"],
        "layers": [1],
        "epochs": 2,
        "seeds": [1, 2],
        "hidden_channels": 4,
        "heads": 2,
        "lr": 0.01,
        "shown_rate": 0.0,
    },
    "25_backward_oversmoothing": {
        "num_layers": 8,
        "hidden_channels": 8,
        "seeds": [1],
        "shown": [0, 3, 5],
        "gains": [2.0],
        "sparse_layers": 4,
        "last_layer_depths": [2],
        "training_depths": [1],
        "steps": 20,
        "attention_layers": 2,
        "epochs": 2,
    },
    "10_ablations": {
        "val_graphs": 20,
        "epochs": 1,
        "train_graphs": 64,
        "seeds": [3],
        "hidden_channels": 8,
        "num_layers": 1,
        "heads": 2,
    },
    "07_any_model": {
        "epochs": 1,
        "train_graphs": 64,
        "hidden_channels": 8,
        "num_layers": 2,
        "heads": 2,
        "networks": 1,
    },
}
CHECKED = "nbval-check-output"

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind=None):
    return [c for c in nbformat.read(path, 4).cells if kind is None or c.cell_type == kind]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_it_follows_the_form_of_a_page(path):
    every = cells(path)
    assert every[0].cell_type == "markdown"
    assert every[0].source.startswith("# ")
    claim = every[0].source.splitlines()[2]
    assert claim.startswith("*"), "a one-sentence claim follows the title"
    assert re.search(r"\{cite\}`\w+`", every[0].source), "the opening cites its source"
    code = cells(path, "code")
    assert [tags(cell) for cell in code].count(["parameters"]) == 1
    assert tags(code[0]) == ["parameters"], "parameters come before all other code"
    assert any(re.search("^## Summary", c.source, re.M) for c in cells(path, "markdown"))


def test_code_only_chooses_calls_and_shows(path):
    code = cells(path, "code")
    for cell in code:
        lines = sum(
            node.end_lineno - node.lineno + 1
            for node in ast.parse(cell.source).body
            if not isinstance(node, ast.Import | ast.ImportFrom)
        )
        assert lines <= 20 or "remove-cell" in tags(cell), (
            f"a cell of {lines} lines:\n{cell.source}"
        )
        assert not re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE), cell.source
        for forbidden in ("!pip", "%pip", "sys.path", "filterwarnings", ".backward("):
            assert forbidden not in cell.source
        assert not re.search(r"['\"]/\w+/", cell.source), f"an absolute path in:\n{cell.source}"
    prose = sum(len(cell.source.split()) for cell in cells(path, "markdown"))
    assert prose >= sum(len(cell.source.split()) for cell in code), "more code than prose"


def test_every_parameter_is_typed_and_explained(path):
    for parameter in notebook.parameters(path).values():
        assert parameter.type != "None", f"{parameter.name} has no type"
        assert parameter.help, f"{parameter.name} has no comment"


def test_only_checked_cells_keep_outputs_and_these_are_text(path):
    for cell in cells(path, "code"):
        if CHECKED in tags(cell):
            assert cell.execution_count is not None, "nbval would not check this cell"
            assert {output.output_type for output in cell.outputs} == {"stream"}
        else:
            assert cell.execution_count is None
            assert cell.outputs == []


def test_what_it_reads_is_declared(path):
    reads = json.loads(path.read_text())["metadata"]["mapkg"]["reads"]
    assert all((REPOSITORY / name).exists() for name in reads)
    code = "\n".join(cell.source for cell in cells(path, "code"))
    is_drawn = '"citation"' in code or '"trees-' in code
    if "load(" in code and not is_drawn:
        assert "data/molecules" in reads
    if "read_emergence" in code:
        assert "data/results" in reads
    if "examine_checkpoint" in code:
        assert "data/checkpoints" in reads


def run_here(path, values):
    """Run a notebook in this process with other parameters; returns the names it leaves."""
    book = parameterize_notebook(load_notebook_node(str(path)), values)
    names = {"__name__": "__main__"}
    for cell in book.cells:
        body = ast.parse(cell.source).body if cell.cell_type == "code" else []
        shown = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), path.name, "exec"), names)
        if shown is not None:
            value = eval(compile(ast.Expression(shown.value), path.name, "eval"), names)
            DisplayFormatter().format(value)
        plt.close("all")
    return names


def test_it_runs_with_other_parameters(path, monkeypatch):
    assert path.stem in TINY, "add a tiny parameter set for the new notebook"
    monkeypatch.chdir(path.parent)
    with plt.rc_context():
        names = run_here(path, TINY[path.stem])
    for name, value in TINY[path.stem].items():
        assert names[name] == value
    if path.stem == "04_emergence":
        # Other parameters, other results: the live history has one row per epoch asked for.
        assert len(names["live"].history) == TINY[path.stem]["epochs"]


@pytest.mark.slow
def test_the_command_line_runs_it_with_other_parameters(path, tmp_path):
    output = tmp_path / path.name
    settings = [
        part
        for name, value in TINY[path.stem].items()
        for part in ("-p", name, value if isinstance(value, str) else json.dumps(value))
    ]
    command = [sys.executable, "-m", "studies", "run", str(path), *settings, "-o", str(output)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    injected = [cell for cell in cells(output, "code") if "injected-parameters" in tags(cell)]
    for name, value in TINY[path.stem].items():
        assert f"{name} = {json.dumps(value)}" in injected[0].source
