"""The runs and studies of workflow/grid.yaml: what pages call them; and errors of wrong names."""

from collections.abc import Mapping
from difflib import get_close_matches
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
    groups: dict[str, dict[str, str]] = {}
    for name, run in grid().items():
        for each, title in run["titles"].items():
            groups.setdefault(each, {})[name] = title
    return known("group", group, groups)


def known(what: str, name: str, among: Mapping[str, Any]) -> Any:
    """The value of a name, or an error that says which names there are."""
    if name not in among:
        close = get_close_matches(name, among, 1)
        hint = f"did you mean {close[0]}? Known are" if close else "expected one of"
        raise ValueError(f"{what} {name}: {hint} {', '.join(among)}")
    return among[name]
