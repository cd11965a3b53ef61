"""Tables come into data/results as a whole, with a digest of the settings that they are of.

    python workflow/publish.py                    says which tracked tables are not of the grid
    python workflow/publish.py NAME DIGEST TABLE...   what the workflow runs

``made.json`` beside the tables has, for every run and study of the grid, that digest and the
checksums of its tables.
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from studies.files import sha256, write_atomically

ROOT = Path(__file__).parents[1]
RESULTS = Path("data/results")
EMERGENCE = ("summary", "trajectory", "graph_maxima", "histogram", "history")
OF_RUNS = {  # studies of finished runs, and the tables that each writes
    "emergence": EMERGENCE,
    "bonds": ("shares", "heat", "parts", "first_layer", "losses"),
    "explain": ("correlation", "curves", "areas", "interventions"),
    "remedy": ("layers", "epochs"),
    "measures": ("layers", "network"),
    "idle": ("",),
    "sink": ("",),
    "attack": ("",),
}
NETWORK = ("config", "dataset", "options")
TRAINING = (*NETWORK, "epochs", "training", "change", "threads")
"""What a training is; two that differ in one of these have different folders."""


def digest(*parts: Any) -> str:
    """Eight digits that tell settings apart; it does not matter how a text is broken in lines."""
    text = re.sub(r"(\\n|\s)+", " ", json.dumps(parts, sort_keys=True))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def of_training(run: Mapping[str, Any]) -> str:
    """The digest of a run's training, but for the seed."""
    return digest({key: run[key] for key in TRAINING})


def of_study(run: Mapping[str, Any], study: str) -> str:
    """The digest of a study of finished runs, or of ``untrained`` networks, of a run."""
    if study == "untrained":
        return digest({key: run[key] for key in (*NETWORK, "untrained")})
    return digest(of_training(run), run["seeds"], study, run["studies"][study])


def studies_of(run: Mapping[str, Any]) -> list[str]:
    """The studies whose tables are kept of a run."""
    return [*run["studies"], *(["untrained"] if run["untrained"] else [])]


def wanted(runs: Mapping[str, Any], studies: Mapping[str, Any]) -> dict[str, str]:
    """The digest of all tables of each run and study of the grid, and of ``laws``."""
    keys = ("study", "dataset", "options", "tables")
    found = {name: digest({key: study[key] for key in keys}) for name, study in studies.items()}
    collected = {}
    for name, run in runs.items():
        if parts := {study: of_study(run, study) for study in studies_of(run)}:
            found[name] = digest(parts)
        if "emergence" in parts:
            collected[name] = parts["emergence"]
    return found | ({"laws": digest(collected)} if collected else {})


def made(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """What was published."""
    path = results / "made.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise SystemExit(f"{path}: damaged, {error}; restore it with git") from error


def stale(digests: Mapping[str, str], results: Path = RESULTS) -> dict[str, str]:
    """Why tables of a run or study are not those of the grid."""
    entries, found = made(results), {}
    for name, expected in digests.items():
        entry = entries.get(name, {"digest": None, "tables": {}})
        paths = {results / table: total for table, total in entry["tables"].items()}
        if entry["digest"] is None:
            found[name] = f"was not made with its settings, {expected}"
        elif entry["digest"] != expected:
            found[name] = f"was made with other settings: {entry['digest']}, now {expected}"
        elif missing := [path.name for path in paths if not path.is_file()]:
            found[name] = f"lacks {', '.join(missing)}"
        elif other := [path.name for path, total in paths.items() if sha256(path) != total]:
            found[name] = f"was changed by hand: {', '.join(other)}"
    return found


def publish(name: str, expected: str, tables: Sequence[Path], results: Path = RESULTS) -> None:
    """Put all tables of a run or study in place of those that it had."""
    named = rf"(?<={re.escape(name)})-[0-9a-f]{{8}}(?=[_.])"
    contents = {re.sub(named, "", path.name, count=1): path.read_bytes() for path in tables}
    results.mkdir(parents=True, exist_ok=True)
    (results.parents[1] / "runs").mkdir(exist_ok=True)
    with FileLock(results.parents[1] / "runs" / "made.lock"):
        entries = made(results)
        for other in entries.keys() - {name}:
            if taken := entries[other]["tables"].keys() & contents:
                raise ValueError(f"{name}: expected tables of its own, got {min(taken)} of {other}")
        for table in entries.get(name, {"tables": {}})["tables"].keys() - contents:
            (results / table).unlink(missing_ok=True)
        for table, content in contents.items():
            write_atomically(results / table, content)
        totals = {table: sha256(results / table) for table in contents}
        entries[name] = {"digest": expected, "tables": totals}
        text = json.dumps(dict(sorted(entries.items())), indent=1)
        write_atomically(results / "made.json", f"{text}\n".encode())


def main(arguments: Sequence[str]) -> int:
    """Check or publish; returns the exit status."""
    if arguments:
        name, expected, *tables = arguments
        publish(name, expected, [Path(table) for table in tables])
        return 0
    grid = yaml.safe_load((ROOT / "workflow" / "grid.yaml").read_text(encoding="utf-8"))
    runs = {name: grid["defaults"] | run for name, run in grid["runs"].items()}
    digests, results = wanted(runs, grid["studies"]), ROOT / RESULTS
    found, entries = stale(digests, results), made(results)
    gone = sorted(entries.keys() - digests.keys())
    found |= dict.fromkeys(gone, "is in made.json, and no longer in the grid")
    known = {table for entry in entries.values() for table in entry["tables"]}
    for path in sorted(results.glob("*.csv.gz")):
        if path.name not in known and not any(path.match(other) for other in grid["others"]):
            found[path.name] = "is of no run or study of the grid"
    for name, why in found.items():
        print(f"{name} {why}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
