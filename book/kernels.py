"""Notebook kernels that start with everything imported.

Importing torch, PyG, RDKit and the plotting libraries takes several seconds. A server process
imports once what the notebooks name, and each kernel is a fork of it: what a kernel computes
is seen by no other. Jupyter Book, whose autodoc imports the same, runs in a further fork.
"""

import ast
import gc
import json
import os
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ipykernel.kernelapp import IPKernelApp
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

_forks = get_context("forkserver")


class ForkedKernelManager(AsyncKernelManager):
    """Starts kernels as forks of the server; see ``preload``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.provisioner = _Provisioner(parent=self, kernel_spec=self.kernel_spec)


def preload(notebooks: Iterable[Path], threads: int) -> None:
    """Have the server import what notebooks import, before the first kernel starts.

    Args:
        notebooks: whose imports count.
        threads: of arithmetic, in each kernel.
    """
    # Both are read once, when torch and matplotlib are imported.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    names = {"ipykernel.ipkernel", "matplotlib.pyplot"}
    _forks.set_forkserver_preload(sorted(names.union(*map(_imports, notebooks))))


def _imports(notebook: Path) -> set[str]:
    """The modules that the code cells of a notebook name."""
    cells = json.loads(notebook.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def run_jupyter_book(arguments: list[str], log: Path) -> int:
    """Run the command ``jupyter-book`` in a fork of the server; returns its exit status.

    Args:
        arguments: of the command.
        log: the file for all that it prints.
    """
    process = _forks.Process(target=_jupyter_book, args=(arguments, log))
    process.start()
    process.join()
    return process.exitcode


def _jupyter_book(arguments: list[str], log: Path) -> None:
    from jupyter_book.cli.main import main

    _redirect(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
    main(arguments)


class _Kernel(_forks.Process):
    """A kernel's process, with what ``jupyter_client`` asks of a ``Popen``."""

    stdin = stdout = stderr = None

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> int | None:
        self.join()
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class _Provisioner(LocalProvisioner):
    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
        """Fork instead of running the command ``python -m ipykernel_launcher -f FILE ...``."""
        options = cmd[cmd.index("-f") :]
        self.process = _Kernel(target=_run, args=(options, kwargs["cwd"]), daemon=True)
        self.process.start()
        self.pid, self.pgid, self.cwd = self.process.pid, None, Path(kwargs["cwd"])
        return self.connection_info


def _run(options: list[str], folder: str) -> None:
    gc.freeze()  # what was imported is not looked through again and again
    os.chdir(folder)
    _redirect(os.open(os.devnull, os.O_RDWR))
    IPKernelApp.launch_instance(argv=options)


def _redirect(descriptor: int) -> None:
    """Have a file in place of the terminal."""
    for standard in range(3):
        os.dup2(descriptor, standard)
