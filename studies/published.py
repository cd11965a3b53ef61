"""What has a name: configurations of ``published.toml``, runs and studies of the workflow's grid.

``PUBLISHED`` are the massive-activations paper's ten pairs of network and data set, with the place
of each value; ``OWN`` are pairs that the paper does not have, ``CONFIGS`` both.
"""

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from mapkg.models.config import Config

GRID = Path(__file__).parents[1] / "workflow" / "grid.yaml"

_NOT_STATED = dict.fromkeys(("num_node_types", "num_edge_types", "readout"))


def _read() -> dict[str, Config]:
    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    configs: dict[str, Config] = {}
    for name, values in tables.items():
        like = values.pop("like", None)
        configs[name] = configs[like].replace(**values) if like else Config(**_NOT_STATED | values)
    return configs


CONFIGS: Mapping[str, Config] = MappingProxyType(_read())
OWN = {n: c for n, c in CONFIGS.items() if c.source.startswith("this companion")}
PUBLISHED = {name: config for name, config in CONFIGS.items() if name not in OWN}


@cache
def grid() -> dict[str, dict[str, Any]]:
    """Every run of the grid and every study of many trainings, by name."""
    read = yaml.safe_load(GRID.read_text(encoding="utf-8"))
    runs = {name: read["defaults"] | run for name, run in read["runs"].items()}
    return runs | {name: {"titles": {}} | study for name, study in read["studies"].items()}


def titles(group: str) -> dict[str, str]:
    """What pages call the runs of a group, for example ``"depth"``, in the order of the grid."""
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
