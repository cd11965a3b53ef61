"""nbval checks the pages: stored outputs against those of the executed copy.

A notebook whose executed copy is out of date or missing is run again.
"""

import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbval import plugin

sys.path.insert(0, str(Path(__file__).parents[1] / "book"))
import build


class ExecutedPage:
    """Answers as a kernel of nbval does, with what an executed copy holds."""

    def __init__(self, path: Path) -> None:
        cells = nbformat.read(path, 4).cells
        self._cells = iter([cell for cell in cells if cell.cell_type == "code"])
        self._messages = deque()

    def is_alive(self) -> bool:
        return True

    def stop(self) -> None:
        pass

    def execute_cell_input(
        self, source: str, allow_stdin: bool | None = None
    ) -> int:
        same = (cell for cell in self._cells if cell.source == source)
        cell = next(same, None)  # a skipped cell is passed over
        assert cell is not None, "the executed copy has no such cell"
        self._messages = deque(
            {"msg_type": output.output_type, "content": output}
            for output in cell.outputs
            if output.get("name") != "stderr"  # progress bars come and go
        )
        self._messages.append(
            {"msg_type": "status", "content": {"execution_state": "idle"}}
        )
        return cell.execution_count

    def await_reply(self, message: int, timeout: float | None = None) -> None:
        self._parent = {"msg_id": message}

    def get_message(self, stream: str, timeout: float | None = None) -> dict:
        return self._messages.popleft() | {"parent_header": self._parent}


def _setup(notebook: plugin.IPyNbFile) -> None:
    if build.is_current(notebook.path):
        notebook.kernel = ExecutedPage(build.EXECUTED / notebook.path.name)
        notebook.setup_sanitize_files()
    else:
        _start_kernel(notebook)
        notebook.kernel.get_message = _without_stderr(
            notebook.kernel.get_message
        )


def _without_stderr(get_message: Callable[..., dict]) -> Callable[..., dict]:
    """Progress bars are there on slow machines and not on fast ones."""

    def get(*arguments: Any, **options: Any) -> dict:
        while True:
            message = get_message(*arguments, **options)
            if message["content"].get("name") != "stderr":
                return message

    return get


_start_kernel, plugin.IPyNbFile.setup = plugin.IPyNbFile.setup, _setup
