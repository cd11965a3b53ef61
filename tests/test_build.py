"""How the book runs notebooks, and how what it ran is checked."""

import subprocess
import sys
from textwrap import dedent

import nbformat
import pytest
from conftest import REPOSITORY

CHECKED = {"tags": ["nbval-check-output"]}
CONFTEST = f"""
import importlib.util
from pathlib import Path

path = "{REPOSITORY / "notebooks" / "conftest.py"}"
spec = importlib.util.spec_from_file_location("pages", path)
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)
pages.build.EXECUTED = Path("executed").resolve()
pages.build.is_current = lambda path: True
"""

pytest_plugins = ["pytester"]


def write(path, *sources, printed=None):
    """A notebook; what is printed is the stored output of every cell, which is checked."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    if printed is not None:
        for cell in cells:
            cell.metadata, cell.execution_count = nbformat.from_dict(CHECKED), 1
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=printed)]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.mark.parametrize(("now", "outcome"), [("0.25\n", "passed"), ("0.26\n", "failed")])
def test_nbval_compares_the_stored_output_with_that_of_the_executed_copy(now, outcome, pytester):
    pytester.makeconftest(CONFTEST)
    source = "raise SystemError('no kernel runs this')"
    write(pytester.path / "page.ipynb", source, printed="0.25\n")
    write(pytester.path / "executed" / "page.ipynb", source, printed=now)
    result = pytester.runpytest_subprocess("--nbval-lax", "--nbval-current-env", "page.ipynb")
    result.assert_outcomes(**{outcome: 1})


def in_a_process(folder, code):
    """What a script prints that sees the modules of ``book`` and works on a folder.

    nbclient leaves its event loop open, which the tests' own process would report.
    """
    script = f"import sys; sys.path.insert(0, {str(REPOSITORY / 'book')!r})\n{dedent(code)}"
    (folder / "script.py").write_text(script)
    command = [sys.executable, "script.py"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_notebook_is_out_of_date_when_it_or_the_package_or_its_copy_is_changed(tmp_path):
    (tmp_path / "mapkg").mkdir()
    (tmp_path / "requirements.lock").touch()
    path = write(tmp_path / "page.ipynb", "x = 1")
    code = """
        import build
        from pathlib import Path

        build.ROOT = Path.cwd()
        build.EXECUTED = build.ROOT / "executed"
        build.KEYS = build.EXECUTED / "keys.json"
        page, module = build.ROOT / "page.ipynb", build.ROOT / "mapkg" / "new.py"

        def show():
            build._contents.cache_clear()
            print(build.is_current(page), end=" ")

        if __name__ == "__main__":
            show()
            assert build.execute([page]) == []
            show()
            module.touch()
            show()
            module.unlink()
            show()
            page.write_text(page.read_text().replace("x = 1", "x = 2"))
            show()
            page.write_text(page.read_text().replace("x = 2", "x = 1"))
            show()
            (build.EXECUTED / "page.ipynb").unlink()
            show()
    """
    expected = ["never executed", True, "a module more", True, "another word", True, "no copy"]
    assert path.is_file()
    assert in_a_process(tmp_path, code).split() == [str(shown is True) for shown in expected]


RUN = """
    import kernels, nbformat
    from studies import notebook

    def run():
        try:
            notebook.run(
                "page.ipynb", "out.ipynb", {}, progress=False,
                kernel_manager_class=kernels.ForkedKernelManager,
            )
        except Exception as error:
            return print(type(error).__name__, error)
        for cell in nbformat.read("out.ipynb", 4).cells:
            print(*(output.text.strip() for output in cell.outputs))

    if __name__ == "__main__":
        run()
        run()
"""


def test_each_forked_kernel_is_a_process_of_its_own_in_the_folder_of_the_notebook(tmp_path):
    seen = "import os; print(os.getpid(), os.path.exists('page.ipynb'), 'x' in globals()); x = 1"
    write(tmp_path / "page.ipynb", "", seen)
    first, second = (line.split() for line in in_a_process(tmp_path, RUN).splitlines() if line)
    assert first[1:] == second[1:] == ["True", "False"]
    assert first[0] != second[0]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("raise KeyError('no such thing')", "NotebookFailed page.ipynb failed"),
        ("import os; os._exit(3)", "DeadKernelError Kernel died"),
    ],
)
def test_a_failing_cell_or_a_dying_kernel_is_an_error(cell, message, tmp_path):
    write(tmp_path / "page.ipynb", "", cell)
    assert in_a_process(tmp_path, RUN).count(message) == 2
