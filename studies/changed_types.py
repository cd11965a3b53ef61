"""Data sets whose types, or what depends on them, are changed before training.

Each function gives new splits and leaves its argument as it is; an edge type is drawn once for a
bond, both directions alike, from the seed. ``CHANGES`` has them by name, as the command line does.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch_geometric.data import Data

from studies.data import ATOM_TYPES, Description, Splits
from studies.data.bond_properties import GLOBAL
from studies.data.splitting import SPLITS

SHARES = (0.70, 0.25, 0.05)
"""Shares of the three types where the target is made to depend on one of them."""


def shuffle_types(splits: Splits, seed: int) -> Splits:
    """The same graphs, the types of all bonds of a split permuted among them.

    Types are as frequent as before, to the bond, and say nothing about the molecule.

    Args:
        splits: molecules.
        seed: of the permutation.

    Raises:
        ValueError: if the splits are not molecules with both directions of a bond side by side.
    """
    return _retyped(
        splits,
        seed,
        lambda types, generator: types[torch.randperm(len(types), generator=generator)],
        "bond types shuffled",
    )


def uniform_types(splits: Splits, seed: int) -> Splits:
    """The same graphs, each bond with one of the data set's types, all equally likely.

    Args, Raises:
        As ``shuffle_types``.

    Source: massive-activations paper, its "random edges" ablation. differs: its code draws once
    for each direction of a bond, without a seed.
    """
    names = torch.tensor(sorted(splits.description.edge_types))
    return _retyped(
        splits,
        seed,
        lambda types, generator: names[
            torch.randint(len(names), (len(types),), generator=generator)
        ],
        "bond types drawn uniformly",
    )


def split_types(splits: Splits, seed: int) -> Splits:
    """The same graphs, each type divided at random into so many that all are equally frequent.

    A type that is n times as frequent as the rarest one becomes n types, n rounded; each of its
    bonds has one of them, drawn uniformly. So no type is seen more often than another by much,
    and each says as much about its bond as the type it comes from.

    Args, Raises:
        As ``shuffle_types``; also a ValueError if a type never occurs in the training split.
    """
    _whole_graphs(splits)
    about = splits.description
    counts = torch.cat([graph.edge_type for graph in splits.train]).bincount(
        minlength=max(about.edge_types) + 1
    )
    absent = [name for i, name in about.edge_types.items() if counts[i] == 0]
    if absent:
        raise ValueError(
            f"expected every edge type in the training split of {about.title}, but there is no "
            f"edge of the type {', '.join(absent)}"
        )
    rarest = min(int(counts[i]) for i in about.edge_types)
    parts = {i: round(int(counts[i]) / rarest) for i in about.edge_types}
    names, first = {}, {}
    for i, name in about.edge_types.items():
        first[i] = len(names) + 1  # id 0 stays "no edge"
        names |= {first[i] + k: f"{name} {k + 1}" for k in range(parts[i])}

    def draw(types: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.empty_like(types)
        for i, number in parts.items():
            of_type = types == i
            number_of_bonds = int(of_type.sum())
            drawn[of_type] = first[i] + torch.randint(
                number, (number_of_bonds,), generator=generator
            )
        return drawn

    return _retyped(splits, seed, draw, "types divided until equally frequent", names)


def type_target(splits: Splits, seed: int, *, informative: int) -> Splits:
    r"""Bond types drawn at random, and a target that depends on one of them.

    Every bond has type 1, 2 or 3 with the probabilities ``SHARES``, whatever its atoms. With
    :math:`h_j = 1` for a source j that is not carbon, the target is

    .. math:: y \propto \sum_{j \to i} \bigl([t_{ji} = t] - p_t\bigr)\, h_j ,

    the number of edges of the informative type t that start at a heteroatom, less what is
    expected of the molecule; over the training split its standard deviation is 1. The other two
    types can change places without a change of the target.

    Args:
        splits: molecules.
        seed: of the draw.
        informative: the type the target depends on, 1 (the most frequent), 2 or 3 (the rarest).

    Raises:
        ValueError: if the type is none of these, or as ``shuffle_types``.
    """
    if informative not in (1, 2, 3):
        raise ValueError(f"informative: expected the type 1, 2 or 3, got {informative!r}")
    shares = torch.tensor(SHARES)
    names = {i + 1: f"type {i + 1} ({share:.0%})" for i, share in enumerate(SHARES)}
    names[informative] += ", informative"
    changed = _retyped(
        splits,
        seed,
        lambda types, generator: (
            1 + torch.multinomial(shares, len(types), replacement=True, generator=generator)
        ),
        f"target depends on type {informative}",
        names,
    )
    heteroatom = torch.tensor([name.split()[0] != "C" for name in ATOM_TYPES])

    def raw(graph: Data) -> Float[Tensor, ""]:
        excess = (graph.edge_type == informative).float() - SHARES[informative - 1]
        return (excess * heteroatom[graph.x[graph.edge_index[0]]]).sum()

    scale = torch.stack([raw(graph) for graph in changed.train]).std()
    for name in SPLITS:
        for graph in getattr(changed, name):
            graph.y = (raw(graph) / scale).reshape(1, 1)
    about = changed.description
    target = "edges of the informative type from heteroatoms, less the expected number"
    return replace(changed, description=replace(about, target=target))


def join_global_node(
    splits: Splits,
    seed: int = 0,
    *,
    edge_types: tuple[int, int] = (4, 5),
    node_type: int | None = None,
) -> Splits:
    """The same graphs, each with one more node that has an edge from and to every atom.

    The node is the last of its graph.

    Args:
        splits: molecules.
        seed: not used; nothing is drawn here.
        edge_types: ids of the edges from an atom to the global node, and from it to an atom;
            new ones, or an id that is in use. One id may stand for both.
        node_type: atom type of the node; None gives it one of its own, the first free id.

    Raises:
        ValueError: if an edge type is below 1, or the atom type below 0.

    Source: massive-activations paper, its edge ablation, whose printed counts have as many edges
    of two new types as there are atoms. Our reading: the code that adds the node is not
    published, so its atom type, and whether the readout counts it, are ours to choose; see
    ``Config.unread_node_type``.
    """
    _whole_graphs(splits)
    to_global, from_global = edge_types
    if min(edge_types) < 1:
        raise ValueError(f"edge_types: expected ids of 1 or more, got {edge_types}")
    about = splits.description
    node_type = about.num_node_types if node_type is None else node_type
    if node_type < 0:
        raise ValueError(f"node_type: expected an id of 0 or more, got {node_type}")

    def joined(graph: Data) -> Data:
        changed = copy(graph)
        atoms = torch.arange(graph.num_nodes)
        hub = torch.full_like(atoms, graph.num_nodes)
        edges = torch.cat([torch.stack([atoms, hub]), torch.stack([hub, atoms])], dim=1)
        types = torch.tensor(edge_types).repeat_interleave(graph.num_nodes)
        changed.x = torch.cat([graph.x, graph.x.new_tensor([node_type])])
        changed.edge_index = torch.cat([graph.edge_index, edges], dim=1)
        changed.edge_attr = changed.edge_type = torch.cat([graph.edge_type, types])
        return changed

    names = dict(about.edge_types)
    for i, name in zip(edge_types, GLOBAL, strict=True):
        names[i] = f"{names[i]} / {name}" if i in names else name
    return Splits(
        **{name: [joined(graph) for graph in getattr(splits, name)] for name in SPLITS},
        description=_described(
            about,
            f"global node, edge types {to_global} and {from_global}",
            names,
            num_node_types=max(about.num_node_types, node_type + 1),
        ),
    )


def count_neighbours(splits: Splits, seed: int = 0) -> Splits:
    """The same graphs, with node types that also say how many neighbours a node has.

    The new id is the old one plus the number of old ids times the number of neighbours. A mean
    over neighbours, whatever its weights, cannot tell how many they are; here each node is told.

    Args:
        splits: molecules.
        seed: not used; nothing is drawn here.

    Raises:
        ValueError: as ``join_global_node`` for data that are no molecules.
    """
    _whole_graphs(splits)
    about = splits.description

    def neighbours(graph: Data) -> Int[Tensor, " N"]:
        return graph.edge_index[1].bincount(minlength=graph.num_nodes)

    def counted(graph: Data) -> Data:
        changed = copy(graph)
        changed.x = graph.x + about.num_node_types * neighbours(graph)
        changed.edge_attr = changed.edge_type = graph.edge_type.clone()
        return changed

    every = [graph for name in SPLITS for graph in getattr(splits, name)]
    most = max((int(neighbours(graph).max()) for graph in every), default=0)
    return Splits(
        **{name: [counted(graph) for graph in getattr(splits, name)] for name in SPLITS},
        description=_described(
            about,
            "node types with the number of neighbours",
            about.edge_types,
            num_node_types=about.num_node_types * (most + 1),
        ),
    )


Change = Callable[[Splits, int], Splits]
"""Called with splits and a seed; gives the changed splits."""

CHANGES: Mapping[str, Change] = MappingProxyType(
    {
        "shuffled-types": shuffle_types,
        "uniform-types": uniform_types,
        "split-types": split_types,
        "frequent-informative": lambda splits, seed: type_target(splits, seed, informative=1),
        "rare-informative": lambda splits, seed: type_target(splits, seed, informative=3),
        "global-node": join_global_node,
        "global-node-triple": lambda splits, seed: join_global_node(
            splits, seed, edge_types=(3, 3)
        ),
        "neighbour-count": count_neighbours,
    }
)
"""The changes by name; ``global-node-triple`` uses the id of triple bonds again."""


def _retyped(
    splits: Splits,
    seed: int,
    draw: Callable[[Int[Tensor, " bonds"], torch.Generator], Int[Tensor, " bonds"]],
    what: str,
    names: Mapping[int, str] | None = None,
) -> Splits:
    """New types for the bonds of each split, all bonds of a split at once."""
    _whole_graphs(splits)
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for name in SPLITS:
        graphs = [copy(graph) for graph in getattr(splits, name)]
        bonds = [_bond_types(graph) for graph in graphs]
        drawn = draw(torch.cat(bonds), generator) if bonds else torch.empty(0)
        for graph, types in zip(graphs, drawn.split([len(b) for b in bonds]), strict=True):
            graph.edge_attr = graph.edge_type = types.repeat_interleave(2)
        changed[name] = graphs
    about = splits.description
    return Splits(**changed, description=_described(about, what, names or about.edge_types))


def _bond_types(graph: Data) -> Int[Tensor, " bonds"]:
    there, back = graph.edge_index[:, ::2], graph.edge_index[:, 1::2]
    if there.shape != back.shape or not torch.equal(there, back.flip(0)):
        raise ValueError(
            "expected molecules, with both directions of a bond next to each other in edge_index, "
            "as studies.data.molecule_graph makes them"
        )
    return graph.edge_type[::2]


def _described(about: Description, what: str, names: Mapping[int, str], **sizes) -> Description:
    return replace(
        about,
        title=f"{about.title}, {what}",
        edge_types=names,
        num_edge_types=max(*names, 0) + 1,
        deviations=(*about.deviations, f"Changed: {what}."),
        **sizes,
    )


def _whole_graphs(splits: Splits) -> None:
    about = splits.description
    if not isinstance(about.num_edge_types, int):
        raise ValueError(
            f"expected whole graphs with one type id per edge, but {about.title} has not; use a "
            "data set of molecules, as zinc or moses"
        )
