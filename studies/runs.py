"""What pages call the runs and studies of workflow/grid.yaml."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

GRID = Path(__file__).parents[1] / "workflow" / "grid.yaml"


@cache
def grid() -> dict[str, dict[str, Any]]:
    """Every run of the grid and every study of many trainings, by name."""
    read = yaml.safe_load(GRID.read_text(encoding="utf-8"))
    runs = {name: read["defaults"] | run for name, run in read["runs"].items()}
    return runs | {name: {"titles": {}} | study for name, study in read["studies"].items()}


def titles(group: str) -> dict[str, str]:
    """Titles of a group of runs or studies by name, in the order of the grid.

    Groups are the keys of ``titles`` in the grid, for example ``"grid"`` or ``"depth"``.
    """
    found = {name: run["titles"][group] for name, run in grid().items() if group in run["titles"]}
    if not found:
        known = sorted({name for run in grid().values() for name in run["titles"]})
        raise ValueError(f"no run of the grid is in {group!r}; groups are {', '.join(known)}")
    return found
