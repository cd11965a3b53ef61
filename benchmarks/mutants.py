"""Do the tests notice a wrong line? Small errors in the science core, one at a time::

    .venv/bin/python benchmarks/mutants.py --out before.jsonl
    .venv/bin/python benchmarks/mutants.py --checkout ../other --out after.jsonl
    .venv/bin/python benchmarks/mutants.py --out after.jsonl --compare before.jsonl

A mutant is the source of one module with one change: another operator or comparison, a constant
plus 1 (or times 2 if it is a float), a negated condition, ``amax`` for ``amin``, no ``abs``,
index 0 for 1, two swapped names, see ``mutations.py``. The draw is stratified over the modules,
and it is the same wherever their sources are.

A process that has imported all but the package forks for each mutant; the child is given the
changed source when it imports the module, and runs tests until one fails. First come the tests
of the module itself, for all mutants, then, for those that survive, all other quick tests whose
files import the module, be it through others. Files are never changed, and a run that was cut
off goes on where it was. Tests that fail without any mutant are left out and named.

How to read it: "own" were killed by the tests of their module, "rest" by others alone; one that
hangs or crashes counts as killed. A mutant that survives is either equivalent, which means that
no result depends on the change and ``mutants_equivalent.csv`` says why, or a gap in the tests.
"""

import argparse
import csv
import importlib
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from mutations import OWN_TESTS, Mutant, drawn, other_tests, own_tests
from tqdm import tqdm

PRELOADED = """torch torch_geometric.loader torch_geometric.nn torch_geometric.utils beartype
    captum.attr jaxtyping matplotlib.pyplot networkx pandas pytest rdkit.Chem safetensors.torch
    scipy.optimize scipy.sparse.csgraph scipy.sparse.linalg scipy.stats seaborn sklearn.metrics"""

MEMORY = 12 * 2**30
"""Bytes that a mutant may ask for."""

EQUIVALENT = Path(__file__).with_name("mutants_equivalent.csv")


@dataclass(eq=False)  # pytest hashes its plugins
class Outcome:
    """What pytest reports, and whether the module was imported at all."""

    code: str | int = "crash"
    seconds: Counter = field(default_factory=Counter)  # by file
    failed: list[tuple[str, str]] = field(default_factory=list)  # test, first line of the error
    loaded: bool = False

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = [item for item in items if item.get_closest_marker("slow") is None]

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid.partition("::")[0]] += report.duration
        self.pytest_collectreport(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            errors = re.findall(r"^E +(\S.*)", report.longreprtext, re.MULTILINE)
            self.failed.append((report.nodeid, (errors or [""])[0][:200]))


class Runner:
    """Runs tests of a checkout in forked processes, and keeps what it finds in a file."""

    def __init__(self, checkout: Path, temporary: Path, out: Path) -> None:
        self.checkout, self.temporary, self.out = checkout, temporary, out
        self.log = temporary / "log"
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = out.read_text().splitlines() if out.exists() else []
        self.found = {entry["id"]: entry for entry in map(json.loads, lines)}

    def keep(self, entry: dict[str, Any]) -> None:
        self.found[entry["id"]] = entry
        with self.out.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def clean(self, files: list[str]) -> None:
        """Runs tests without a mutant, to know how long they take and which of them fail."""
        if files := [name for name in files if name not in self.found]:
            outcome = self.run(files, [], "", b"", None)
            if not outcome.seconds:
                raise SystemExit(f"no test ran, and pytest said:\n{self.log.read_text()}")
            for name in files:
                failed = [test for test, _ in outcome.failed if test.partition("::")[0] == name]
                self.keep({"id": name, "seconds": outcome.seconds[name], "failed": failed})
                for test in failed:
                    print(f"left out, it fails without a mutant: {test}", file=sys.stderr)

    def test(self, mutant: Mutant, source: bytes, stage: str, files: list[str]) -> None:
        """Runs tests until one fails."""
        clean = [self.found[name] for name in files]
        options = ["-x", *(f"--deselect={test}" for entry in clean for test in entry["failed"])]
        limit = 60 + 3 * sum(entry["seconds"] for entry in clean)
        start = time.monotonic()
        outcome = self.run(files, options, mutant.module, source, limit)
        result = {0: "survived", "timeout": "timeout", "crash": "crash"}.get(outcome.code, "killed")
        if result == "survived" and not outcome.loaded:
            raise SystemExit(f"{mutant.module} was not imported by {', '.join(files)}")
        test, why = outcome.failed[0] if outcome.failed else ("", "")
        found = {"stage": stage, "outcome": result, "test": test, "why": why}
        seconds = round(time.monotonic() - start, 1)
        self.keep({"id": mutant.id, **asdict(mutant), **found, "seconds": seconds})

    def run(
        self, files: list[str], options: list[str], module: str, source: bytes, limit: float | None
    ) -> Outcome:
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        options = [f"--basetemp={self.temporary / 'tests'}", *options, *files]
        process = context.Process(target=self.child, args=(sender, options, module, source))
        process.start()
        sender.close()
        try:
            if not receiver.poll(limit):
                return Outcome("timeout")
            with suppress(EOFError):
                return Outcome(*receiver.recv())
            return Outcome("crash")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()

    def child(self, sender: Any, options: list[str], module: str, source: bytes) -> None:
        """Runs pytest with this source of the module; never returns."""
        import pytest

        os.setpgrp()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.chdir(self.checkout)
        sys.path[0] = os.environ["PYTHONPATH"] = str(self.checkout)
        outcome = Outcome()
        get_data, set_data = SourceFileLoader.get_data, SourceFileLoader.set_data

        def get(loader: SourceFileLoader, path: str) -> bytes:
            if not module or not loader.path.endswith(module):
                return get_data(loader, path)
            outcome.loaded = True
            if path != loader.path:
                raise OSError("what has been compiled is not the mutant")
            return source

        def put(loader: SourceFileLoader, path: str, data: bytes, **mode: int) -> None:
            if not module or not loader.path.endswith(module):
                set_data(loader, path, data, **mode)

        SourceFileLoader.get_data, SourceFileLoader.set_data = get, put
        always = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        always += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is preloaded
        code = pytest.main([*always, *options], plugins=[outcome])
        sender.send((int(code), outcome.seconds, outcome.failed, outcome.loaded))
        os._exit(0)


def report(mutants: dict[Mutant, bytes], found: dict[str, Any], equivalent: set[tuple]) -> None:
    """Prints a table by module, and what survived."""
    counts = {module: Counter() for module in (*OWN_TESTS, "all")}
    survivors = []
    for mutant in mutants:
        entry = found[mutant.id]
        kind = entry["stage"] if entry["outcome"] != "survived" else "survived"
        if mutant.key in equivalent:
            if kind != "survived":
                print(f"{mutant.id} is listed as equivalent, but {entry['test']} kills it")
            else:
                kind = "equivalent"
        counts[mutant.module][kind] += 1
        counts["all"][kind] += 1
        survivors += [mutant] if kind == "survived" else []
    kinds = ("own", "rest", "survived", "equivalent")
    print(f"{'':32}" + "".join(f"{kind:>12}" for kind in ("mutants", *kinds)))
    for module, count in counts.items():
        if count:
            numbers = (count.total(), *(count[kind] for kind in kinds))
            print(f"{module:32}" + "".join(f"{number:12}" for number in numbers))
    for m in survivors:
        print(f"\n{m.id} {m.module}:{m.line} {m.mutation}\n  - {m.text}\n  + {m.mutated}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--checkout", type=Path, default=here, help="whose package and tests")
    parser.add_argument("--number", type=int, default=126, help="of mutants (default: 126)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--module", default="", help="only modules whose path contains this")
    parser.add_argument(
        "--out", type=Path, default="runs/mutants.jsonl", help="a run goes on there"
    )
    parser.add_argument("--compare", type=Path, help="what another run wrote to its --out")
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    modules = [module for module in OWN_TESTS if options.module in module]
    mutants = drawn(checkout, modules, options.number, options.seed)
    with EQUIVALENT.open() as file:
        rows = list(csv.DictReader(file))
    equivalent = {(r["module"], r["text"], int(r["occurrence"]), r["mutation"]) for r in rows}

    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTEST_ADDOPTS": ""}
    tqdm.monitor_interval = 0  # no thread, because this process forks
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends the child, too
    for name in PRELOADED.split():
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as temporary:
        sys.dont_write_bytecode, sys.pycache_prefix = False, f"{temporary}/bytecode"
        runner = Runner(checkout, Path(temporary), options.out)
        found = runner.found
        for stage, tests in (("own", own_tests), ("rest", other_tests)):
            for mutant, source in tqdm(mutants.items(), f"{stage} tests", file=sys.stderr):
                entry = found.get(mutant.id)
                survived = entry is not None and entry["outcome"] == "survived"
                is_next = survived and entry["stage"] == "own" and mutant.key not in equivalent
                if entry is None if stage == "own" else is_next:
                    files = tests(checkout, mutant.module)
                    runner.clean(files)
                    runner.test(mutant, source, stage, files)
    report(mutants, found, equivalent)
    if options.compare:
        there = {e["id"]: e for e in map(json.loads, options.compare.read_text().splitlines())}
        for before, after, words in ((there, found, "dead there"), (found, there, "dead here")):
            both = [m for m in mutants if m.id in before and m.id in after]
            lost = [m for m in both if before[m.id]["outcome"] != "survived"]
            lost = [m for m in lost if after[m.id]["outcome"] == "survived"]
            print(f"\n{words} and alive in the other run: {len(lost)} of {len(both)} mutants")
            for m in lost:
                print(f"{m.id} {m.module}:{m.line} {m.mutation}, by {before[m.id]['test']}")


if __name__ == "__main__":
    main()
