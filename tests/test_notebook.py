"""The strict notebook runner: what papermill lets pass is refused here."""

import json

import nbformat
import pytest

from studies import notebook
from studies.__main__ import main

PARAMETERS = """\
epochs: int = 2  # passes over the data
lr: float = 0.1  # learning rate
name: str = "a"
quick: bool = False
sizes: list[int] = [1, 2]
"""


def write(path, *code, tagged=True):
    cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, *code)]
    if tagged:
        cells[0].metadata["tags"] = ["parameters"]
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


def test_parameters_are_listed_with_type_default_and_comment(small, capsys):
    assert main(["run", str(small), "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == "  epochs: int = 2  # passes over the data"
    assert [line.split(":")[0].strip() for line in listed] == [
        "epochs",
        "lr",
        "name",
        "quick",
        "sizes",
    ]


def test_values_are_converted_to_the_declared_type(small):
    texts = [("epochs", "5"), ("lr", "1e-3"), ("name", "7"), ("quick", "true"), ("sizes", "[3]")]
    assert notebook.parse(small, texts) == {
        "epochs": 5,
        "lr": 0.001,
        "name": "7",
        "quick": True,
        "sizes": [3],
    }


def test_a_notebook_runs_with_other_parameters_and_writes_only_its_output(small, tmp_path):
    output = tmp_path / "made" / "out.ipynb"
    before = small.read_bytes()
    assert (
        main(["run", str(small), "-p", "epochs", "5", "-p", "quick", "true", "-o", str(output)])
        == 0
    )
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


def test_what_is_printed_in_pieces_is_one_output(tmp_path):
    pieces = write(tmp_path / "pieces.ipynb", "print('one', flush=True)\nprint('two', flush=True)")
    made = nbformat.read(notebook.run(pieces, tmp_path / "out.ipynb", {}, progress=False), 4)
    assert [output.text for output in made.cells[-1].outputs] == ["one\ntwo\n"]


def test_a_missing_notebook_exits_with_2_and_lists_those_there(small, tmp_path, capsys):
    assert main(["run", str(tmp_path / "smal.ipynb"), "-o", str(tmp_path / "out.ipynb")]) == 2
    assert "small.ipynb" in capsys.readouterr().err


def test_a_file_that_is_no_notebook_and_one_without_parameters_are_refused(tmp_path):
    (tmp_path / "text.ipynb").write_text("not json")
    with pytest.raises(ValueError, match="not a notebook"):
        notebook.parameters(tmp_path / "text.ipynb")
    (tmp_path / "list.ipynb").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="not a notebook"):
        notebook.parameters(tmp_path / "list.ipynb")
    with pytest.raises(ValueError, match="tagged 'parameters'"):
        notebook.parameters(write(tmp_path / "untagged.ipynb", tagged=False))


def test_running_without_an_output_exits_with_2(small, capsys):
    assert main(["run", str(small)]) == 2
    assert "-o OUT.ipynb" in capsys.readouterr().err


def test_a_failing_cell_exits_with_1_and_keeps_an_older_output(tmp_path, capsys):
    failing = write(tmp_path / "failing.ipynb", "print('so far')", "1 / 0")
    output = tmp_path / "out.ipynb"
    output.write_text("older")
    assert main(["run", str(failing), "-o", str(output)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert output.read_text() == "older"
    assert "so far" in printed(tmp_path / "out.failed.ipynb")
