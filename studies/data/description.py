"""What a loaded data set is: its splits and its description."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a data set holds and where it comes from."""

    name: str  # what ``load`` calls it
    title: str  # what a figure calls it
    task: str  # "graph regression", "graph classification" or "node classification"
    target: str  # what is predicted
    # Sizes of the embedding tables, one for each column of ids; None if features are not ids.
    num_node_types: int | tuple[int, ...] | None
    num_edge_types: int | tuple[int, ...] | None
    source: str
    licence: str
    edge_channels: int | None = None  # width of float edge features
    num_targets: int = 1
    edge_types: Mapping[int, str] = field(default_factory=dict)  # names of the ids in edge_type
    deviations: tuple[str, ...] = ()  # each known difference from the data set of the papers


@dataclass(frozen=True)
class Splits:
    """A data set in three splits, sequences of graphs or ``NodesOfGraph``, and its description."""

    train: Any
    val: Any
    test: Any
    description: Description
