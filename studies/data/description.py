"""What a loaded data set is: its splits and its description."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a data set holds and where it comes from.

    Attributes:
        name: what ``load`` calls it.
        title: what a figure calls it.
        task: ``"graph regression"``, ``"graph classification"`` or ``"node classification"``.
        target: what is predicted.
        num_node_types, num_edge_types: sizes of the embedding tables; a tuple if a node (edge)
            has several ids, one size per column; None if features are not ids.
        edge_channels: width of float edge features; None if edges have type ids.
        num_targets: number of targets of a graph or node.
        target_names: their names, if they have any.
        edge_types: names of the ids in ``edge_type``, which every graph carries for
            attribution.
        source: origin.
        licence: terms of the data.
        deviations: each known difference from the data set of the papers.
    """

    name: str
    title: str
    task: str
    target: str
    num_node_types: int | tuple[int, ...] | None
    num_edge_types: int | tuple[int, ...] | None
    source: str
    licence: str
    edge_channels: int | None = None
    num_targets: int = 1
    target_names: tuple[str, ...] = ()
    edge_types: Mapping[int, str] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Splits:
    """A data set in three splits, and its description.

    A split is a sequence of graphs, or ``NodesOfGraph`` for a node-level data set.
    """

    train: Any  # Sequence[Data], or NodesOfGraph, Trees
    val: Any  # Sequence[Data], or NodesOfGraph, Trees
    test: Any  # Sequence[Data], or NodesOfGraph, Trees
    description: Description
