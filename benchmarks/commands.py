"""How long the commands of the README take in two checkouts of this repository.

    python benchmarks/commands.py OLD NEW --runs 3

Each command is run in OLD and NEW in turn, so that a change of the machine's speed meets both;
a ratio is that of the medians. Both checkouts need ``make setup`` first, and nothing else should
run. Measuring everything takes hours: ``--rows`` chooses, and ``--out`` keeps each time as it
is measured, so that a further call adds to it.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tqdm import tqdm

HEAVY = ("rdkit", "sklearn", "networkx", "matplotlib", "captum", "papermill")
CHANGED = Path("notebooks/01_graphs.ipynb")
CLEARED = {"MAPKG_DATA"}  # the bundled data alone


def seconds(checkout: Path, *command: str, status: int = 0) -> float:
    """Wall time of a command in a checkout; raises if it ends with another status."""
    environment = {key: value for key, value in os.environ.items() if key not in CLEARED}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode != status:
        raise RuntimeError(f"{command} in {checkout}:\n{done.stdout}\n{done.stderr}"[-4000:])
    return taken


def python(checkout: Path) -> str:
    """The interpreter of a checkout's environment."""
    return str(checkout.resolve() / ".venv" / "bin" / "python")


def make_test(checkout: Path) -> float:
    """``make test``, installed, with the site built."""
    seconds(checkout, "make", "book")
    return seconds(checkout, "make", "test")


def book_from_nothing(checkout: Path) -> float:
    """``make book``, installed, without anything built."""
    shutil.rmtree(checkout / "_build", ignore_errors=True)
    return seconds(checkout, "make", "book")


def book_one_changed(checkout: Path) -> float:
    """``make book`` after one word more in one notebook."""
    seconds(checkout, "make", "book")
    path = checkout / CHANGED
    before = path.read_bytes()
    content = json.loads(before)
    content["cells"][0]["source"] += ["\n\nChanged."]
    try:
        path.write_text(json.dumps(content, indent=1))
        return seconds(checkout, "make", "book")
    finally:
        path.write_bytes(before)


def book_unchanged(checkout: Path) -> float:
    """``make book`` with nothing to do."""
    seconds(checkout, "make", "book")
    return seconds(checkout, "make", "book")


def continuous_integration(checkout: Path) -> float:
    """``.ci/run`` in a fresh clone, with the installation."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "project" / "clone"
        subprocess.run(["git", "clone", "-q", checkout.resolve(), clone], check=True)
        return seconds(clone, "bash", ".ci/run")


def package(checkout: Path) -> str:
    """The package that has the command line; before there were studies it was mapkg."""
    return next(n for n in ("studies", "mapkg") if (checkout / n / "__main__.py").is_file())


def show_help(checkout: Path) -> float:
    """``python -m studies --help``."""
    return seconds(checkout, python(checkout), "-m", package(checkout), "--help")


def misspelt(checkout: Path) -> float:
    """``python -m studies trian``, a command that is not there."""
    return seconds(checkout, python(checkout), "-m", package(checkout), "trian", status=2)


def loaded(checkout: Path) -> int:
    """How many of the heavy packages ``import mapkg.hooks`` loads."""
    code = f"import sys, mapkg.hooks; print(sum(name in sys.modules for name in {HEAVY}))"
    return int(subprocess.check_output([python(checkout), "-c", code], cwd=checkout))


ROWS = {
    "test": ("make test, installed, site built", make_test, 0.25),
    "book": ("make book from nothing, installed", book_from_nothing, 0.4),
    "one": ("make book, one notebook changed", book_one_changed, 1.0),
    "nothing": ("make book, nothing changed", book_unchanged, None),
    "ci": (".ci/run on a clean clone, with the installation", continuous_integration, 0.3),
    "help": ("python -m studies --help", show_help, 0.15),
    "misspelt": ("a misspelt command", misspelt, 0.15),
    "loaded": (f"import mapkg.hooks: loaded of {', '.join(HEAVY)}", loaded, 0),
}
"""Per row: the command, what measures it, and the ratio that is aimed at."""


def main() -> None:
    """Measure what is asked for and print the table of all that was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--runs", type=int, default=3, help="of each command (--help: ten)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("commands.csv"))
    parsed = parser.parse_args()
    for row in tqdm(parsed.rows, file=sys.stderr):
        _, measure, _ = ROWS[row]
        runs = {"help": 10, "misspelt": 10, "loaded": 1}.get(row, parsed.runs)
        for _ in range(runs):
            for which in ("old", "new"):
                value = measure(getattr(parsed, which))
                with parsed.out.open("a", newline="") as file:
                    csv.writer(file).writerow([row, which, value])
    print(table(parsed.out))


def table(measured: Path) -> str:
    """The medians of what was measured, in Markdown."""
    values: dict[tuple[str, str], list[float]] = {}
    with measured.open(newline="") as file:
        for row, which, value in csv.reader(file):
            values.setdefault((row, which), []).append(float(value))
    lines = [f"{os.cpu_count()} cores", "", "| command | old | new | ratio | aim | runs |"]
    lines.append("|---|---|---|---|---|---|")
    for row, (name, _, aim) in ROWS.items():
        if (row, "old") not in values or (row, "new") not in values:
            continue
        old, new = median(values[row, "old"]), median(values[row, "new"])
        unit = "" if row == "loaded" else " s"
        ratio = f"{new / old:.3f}" if old else "-"
        goal = {None: "below 1 s"}.get(aim, f"<= {aim}")
        runs = f"{len(values[row, 'old'])}, {len(values[row, 'new'])}"
        lines.append(f"| {name} | {old:.3g}{unit} | {new:.3g}{unit} | {ratio} | {goal} | {runs} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
