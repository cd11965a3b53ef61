"""Store the checked outputs of the notebooks, and strip all others.

    python book/outputs.py

Only cells tagged ``nbval-check-output`` keep their text output, as the value that the tests
compare a fresh run with. Run it after such a number has changed, and look at the difference.
"""

import sys
import tempfile
from pathlib import Path

import nbformat

from studies import notebook
from studies.files import write_atomically

FOLDER = Path(__file__).parents[1] / "notebooks"
CHECKED = "nbval-check-output"


def main() -> None:
    """Run every notebook and rewrite its stored outputs."""
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(FOLDER.glob("*.ipynb")):
            executed = nbformat.read(notebook.run(path, Path(folder) / path.name, {}), 4)
            by_id = {cell.id: cell for cell in executed.cells}
            source = nbformat.read(path, 4)
            for cell in source.cells:
                if cell.cell_type == "code":
                    store(cell, by_id[cell.id])
            write_atomically(path, f"{nbformat.writes(source, indent=1)}\n".encode())
            print(f"stored the checked outputs of {path.name}", file=sys.stderr)


def store(cell: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> None:
    """Copy the printed text of a checked cell; strip any other cell."""
    checked = CHECKED in cell.metadata.get("tags", [])
    cell.outputs = [o for o in executed.outputs if o.get("name") == "stdout"] if checked else []
    cell.execution_count = executed.execution_count if checked else None


if __name__ == "__main__":
    main()
