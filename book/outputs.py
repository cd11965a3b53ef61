"""Store the checked outputs of the notebooks, and strip all others.

    python book/outputs.py

Only cells tagged ``nbval-check-output`` keep their text output, as the value that the tests
compare a fresh run with. Run it after such a number has changed, and look at the difference.
"""

import sys
from pathlib import Path

import build
import nbformat

from studies.files import write_atomically

FOLDER = Path(__file__).parents[1] / "notebooks"
CHECKED = "nbval-check-output"


def main() -> None:
    """Run the notebooks that changed and rewrite what is stored of all."""
    notebooks = sorted(FOLDER.glob("*.ipynb"))
    if failed := build.execute(notebooks):
        sys.exit("\n\n".join(failed))
    for path in notebooks:
        executed = nbformat.read(build.EXECUTED / path.name, 4)
        by_id = {cell.id: cell for cell in executed.cells}
        source = nbformat.read(path, 4)
        for cell in source.cells:
            if cell.cell_type == "code":
                store(cell, by_id[cell.id])
        if (text := f"{nbformat.writes(source, indent=1)}\n") != path.read_text():
            write_atomically(path, text.encode())
            print(f"stored the checked outputs of {path.name}", file=sys.stderr)


def store(cell: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> None:
    """Copy the printed text of a checked cell; strip any other cell."""
    checked = CHECKED in cell.metadata.get("tags", [])
    cell.outputs = [o for o in executed.outputs if o.get("name") == "stdout"] if checked else []
    cell.execution_count = executed.execution_count if checked else None


if __name__ == "__main__":
    main()
