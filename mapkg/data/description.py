"""What a loaded data set is: its splits and its description."""

from dataclasses import dataclass

from torch_geometric.data import Data


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a data set holds and where it comes from.

    Attributes:
        name: what ``load`` calls it.
        title: what a figure calls it.
        task: for example ``"graph regression"``.
        target: what is predicted.
        num_node_types, num_edge_types: sizes of the embedding tables.
        source: origin.
        licence: terms of the data.
        deviations: each known difference from the data set of the papers.
    """

    name: str
    title: str
    task: str
    target: str
    num_node_types: int
    num_edge_types: int
    source: str
    licence: str
    deviations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Splits:
    """The graphs of a data set in three splits, and its description."""

    train: list[Data]
    val: list[Data]
    test: list[Data]
    description: Description
