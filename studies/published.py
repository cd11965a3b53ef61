"""What is published or has a name: configurations, schedules, runs of the workflow's grid.

``PUBLISHED`` are the massive-activations paper's ten pairs of network and data set; ``CONFIGS`` has
pairs that the paper does not have, too.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
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
PUBLISHED = {n: c for n, c in CONFIGS.items() if not c.source.startswith("this companion: ")}

EPOCH_STRIDE = 1_000_003  # a prime: keeps the seeds of all runs' epochs apart


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast a network is trained, with Adam.

    Progress is as in torch's ``ReduceLROnPlateau``: the validation loss falls by more than 1e-4 of
    its least value so far (trees: the accuracy gains more than 1e-4).

    Source: the defaults are those of the LipschitzNorm paper's code, for the nodes of a graph.
    """

    epochs: int = 200
    batch_size: int | None = None  # None takes all data in a step
    lr: float = 0.005
    weight_decay: float = 5e-4
    lr_factor: float = 0.1  # of the rate after more than lr_patience rows without progress
    lr_patience: int | None = 10  # None leaves the rate
    min_lr: float = 1e-6  # ends training, as do ``patience`` rows without progress, and max_hours
    block: int = 1  # epochs of a row of the history
    patience: int | None = None
    max_hours: float = math.inf

    def __post_init__(self) -> None:
        for name, least in dict(epochs=0, batch_size=1, block=1, patience=1, min_lr=0).items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}: expected {least} or more, got {value}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected a value above 0, got {self.lr}")
        if self.lr < self.min_lr:
            raise ValueError(
                f"lr: expected min_lr, {self.min_lr}, or more, got {self.lr}; training would end "
                "before its first epoch"
            )
        if not 0 < self.lr_factor < 1:
            raise ValueError(f"lr_factor: expected a value in (0, 1), got {self.lr_factor}")

    @classmethod
    def of(cls, config: Config) -> "Schedule":
        """The schedule that a configuration states."""
        names = ("batch_size", "lr", "weight_decay", "lr_factor", "lr_patience", "min_lr")
        stated = {name: getattr(config, name) for name in names}
        return cls(epochs=config.max_epochs, max_hours=config.max_hours, **stated)

    def columns(self, *names: str) -> dict[str, Any]:
        """Some values, for the row of a table."""
        return {name: getattr(self, name) for name in names}


@cache
def _workflow() -> dict[str, Any]:
    return yaml.safe_load(GRID.read_text(encoding="utf-8"))


def margin(of: str) -> float:
    """The factor within which an ``"error"`` or a ``"ratio"`` counts as equal."""
    return _workflow()["margins"][of]


@cache
def grid() -> dict[str, dict[str, Any]]:
    """Every run of the grid and every study of many trainings, by name."""
    read = _workflow()
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
