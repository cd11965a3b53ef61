"""Networks trained on molecules whose bond types, or what depends on them, were changed.

Each change gives new splits and leaves its argument as it is; an edge type is drawn once for a
bond, both directions alike, from the seed. ``CHANGES`` has them by name, as the command line does.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Generator, Tensor
from torch_geometric.data import Data

from studies.data import ATOM_TYPES, Description, Splits, bond_of_edge, directions
from studies.data.sets import SPLITS
from studies.edge_kinds import GLOBAL
from studies.published import titles
from studies.statistics import t_interval, with_holm

EXPERIMENTS = titles("changes")
"""Retrained networks on data with changed types, from names of files to titles."""

SHARES = (0.70, 0.25, 0.05)
"""Shares of the three types where the target is made to depend on one of them."""

NODE_TYPES = 6
"""How many are drawn where frequency is crossed with meaning."""

ROLES = {
    "frequent, informative": (0.45, 1),
    "frequent, uninformative": (0.45, 0),
    "rare, informative": (0.05, 1),
    "rare, uninformative": (0.05, 0),
}
"""The share of bonds of the edge types 1 to 4 there, and whether the target depends on them."""


def shuffle_types(splits: Splits, seed: int) -> Splits:
    """The same graphs, the types of all bonds of a split permuted among them."""

    def draw(types: Tensor, generator: Generator) -> Tensor:
        return types[torch.randperm(len(types), generator=generator)]

    return _retyped(splits, seed, draw, "bond types shuffled")


def uniform_types(splits: Splits, seed: int) -> Splits:
    """The same graphs, each bond with one of the data set's types, all equally likely.

    Source: massive-activations paper, its "random edges"; it draws for each direction of a bond.
    """
    ids = torch.tensor(sorted(splits.description.edge_types))

    def draw(types: Tensor, generator: Generator) -> Tensor:
        return ids[torch.randint(len(ids), (len(types),), generator=generator)]

    return _retyped(splits, seed, draw, "bond types drawn uniformly")


def split_types(splits: Splits, seed: int) -> Splits:
    """The same graphs, each type divided at random into so many that all are equally frequent."""
    about = _whole_graphs(splits)
    types = torch.cat([graph.edge_type for graph in splits.train]).tolist()
    counts = {i: types.count(i) for i in about.edge_types}
    if absent := [name for i, name in about.edge_types.items() if counts[i] == 0]:
        raise ValueError(
            f"expected every edge type in the training split of {about.title}, but there is no "
            f"edge of the type {', '.join(absent)}"
        )
    parts = {i: round(count / min(counts.values())) for i, count in counts.items()}
    names, first = {}, {}
    for i, name in about.edge_types.items():
        first[i] = len(names) + 1  # id 0 stays "no edge"
        names |= {first[i] + k: f"{name} {k + 1}" for k in range(parts[i])}

    def draw(types: Tensor, generator: Generator) -> Tensor:
        drawn = torch.empty_like(types)
        for i, number in parts.items():
            bonds = (int((types == i).sum()),)
            drawn[types == i] = first[i] + torch.randint(number, bonds, generator=generator)
        return drawn

    return _retyped(splits, seed, draw, "types divided until equally frequent", names)


def type_target(splits: Splits, seed: int, *, informative: int) -> Splits:
    r"""Bond types drawn at random, and a target that depends on one of them.

    Every bond has type 1, 2 or 3 with the probabilities ``SHARES``. With :math:`h_j = 1` for a
    source j that is not carbon, the target is that of edges of type t, less what is expected:

    .. math:: y \propto \sum_{j \to i} \bigl([t_{ji} = t] - p_t\bigr)\, h_j .
    """
    names = {i: f"type {i} ({share:.0%})" for i, share in enumerate(SHARES, start=1)}
    names[informative] += ", informative"

    def draw(types: Tensor, generator: Generator) -> Tensor:
        look = dict(num_samples=len(types), replacement=True, generator=generator)
        return 1 + torch.multinomial(torch.tensor(SHARES), **look)

    what = f"target depends on type {informative}"
    changed = _retyped(splits, seed, draw, what, names)
    heteroatom = torch.tensor([name.split()[0] != "C" for name in ATOM_TYPES])

    def raw(graph: Data) -> Float[Tensor, ""]:
        excess = (graph.edge_type == informative).float() - SHARES[informative - 1]
        return (excess * heteroatom[graph.x[graph.edge_index[0]]]).sum()

    target = "edges of the informative type from heteroatoms, less the expected number"
    return _with_target(changed, raw, target)


def cross_types(splits: Splits, seed: int) -> Splits:
    r"""Edge types and node types drawn at random, and a target that depends on two of four types.

    Every edge type has all 36 kinds (source, type, target), equally often. ``ROLES`` says how
    frequent a type is and whether :math:`a_t` is 1 or 0 in the target:

    .. math:: y \propto \sum_{j \to i} a_{t_{ji}} h_j , \qquad h_j = (-1)^{x_j} .
    """
    shares, informative = torch.tensor([*ROLES.values()]).unbind(dim=1)

    def draw(types: Tensor, generator: Generator) -> Tensor:
        return 1 + shares.multinomial(len(types), replacement=True, generator=generator)

    names = dict(enumerate(ROLES, start=1))
    changed = _retyped(splits, seed, draw, "frequency crossed with meaning", names)
    generator = Generator().manual_seed(seed)
    for graph in _every(changed):
        graph.x = torch.randint(NODE_TYPES, (graph.num_nodes,), generator=generator)

    def raw(graph: Data) -> Float[Tensor, ""]:
        sign = 1 - 2 * (graph.x[graph.edge_index[0]] % 2)
        return (informative[graph.edge_type - 1] * sign).sum()

    changed = _with_target(changed, raw, "edges of informative types, by the sign of the source")
    about = replace(changed.description, num_node_types=NODE_TYPES)
    return replace(changed, description=about)


def join_global_node(
    splits: Splits,
    seed: int = 0,
    *,
    edge_types: tuple[int, int] = (4, 5),  # from an atom to the node, and back; one id or two
) -> Splits:
    """The same graphs, each with one more node, its last, joined to every atom both ways.

    Source: massive-activations paper, its edge ablation. The code that adds the node is not
    published: its atom type, and that the readout counts it, are our choice.
    """
    about = _whole_graphs(splits)

    def joined(graph: Data) -> dict[str, Tensor]:
        atoms = torch.arange(graph.num_nodes)
        new = torch.stack([atoms, torch.full_like(atoms, graph.num_nodes)])
        types = torch.tensor(edge_types).repeat_interleave(graph.num_nodes)
        return {
            "x": torch.cat([graph.x, graph.x.new_tensor([about.num_node_types])]),
            "edge_index": torch.cat([graph.edge_index, new, new.flip(0)], dim=1),
            "edge_type": torch.cat([graph.edge_type, types]),
        }

    names = dict(about.edge_types)
    for i, name in zip(edge_types, GLOBAL, strict=True):
        names[i] = f"{names[i]} / {name}" if i in names else name
    what = "global node, edge types {} and {}".format(*edge_types)
    return _changed(splits, joined, what, names, num_node_types=about.num_node_types + 1)


def count_neighbors(splits: Splits, seed: int = 0) -> Splits:
    """The same graphs; node types also say the number of neighbors, which no mean can tell."""
    about = _whole_graphs(splits)

    def neighbors(graph: Data) -> Tensor:
        return graph.edge_index[1].bincount(minlength=graph.num_nodes)

    def counted(graph: Data) -> dict[str, Tensor]:
        x = graph.x + about.num_node_types * neighbors(graph)
        return {"x": x, "edge_type": graph.edge_type.clone()}

    most = max((int(neighbors(graph).max()) for graph in _every(splits)), default=0)
    what = "node types with the number of neighbours"  # as checkpoints and tables have it
    number = about.num_node_types * (most + 1)
    return _changed(splits, counted, what, about.edge_types, num_node_types=number)


Change = Callable[[Splits, int], Splits]
"""Called with splits and a seed; gives the changed splits."""

CHANGES: Mapping[str, Change] = {
    "shuffled-types": shuffle_types,
    "uniform-types": uniform_types,
    "split-types": split_types,
    "frequent-informative": partial(type_target, informative=1),
    "rare-informative": partial(type_target, informative=3),
    "global-node": join_global_node,
    "global-node-triple": partial(join_global_node, edge_types=(3, 3)),
    "neighbour-count": count_neighbors,
}
"""The changes by name; ``global-node-triple`` uses the id of triple bonds again."""


Draw = Callable[[Int[Tensor, " bonds"], Generator], Int[Tensor, " bonds"]]


def _retyped(
    splits: Splits, seed: int, draw: Draw, what: str, names: Mapping[int, str] | None = None
) -> Splits:
    """New types for the bonds of each split, all bonds of a split at once."""
    about = _whole_graphs(splits)
    generator, drawn = Generator().manual_seed(seed), []
    for split in SPLITS:
        if bonds := [g.edge_type[directions(g)[0]] for g in getattr(splits, split)]:
            drawn += draw(torch.cat(bonds), generator).split([*map(len, bonds)])
    types = iter(drawn)

    def retyped(graph: Data) -> dict[str, Tensor]:
        return {"edge_type": next(types)[bond_of_edge(graph)]}

    return _changed(splits, retyped, what, names or about.edge_types)


def _changed(
    splits: Splits,
    change: Callable[[Data], dict],
    what: str,
    names: Mapping[int, str],
    **sizes: int,
) -> Splits:
    """Copies of all graphs with what ``change`` gives, and a description that says so."""
    made = [copy(graph).update(change(graph)) for graph in _every(splits)]
    for graph in made:
        graph.edge_attr = graph.edge_type
    train, val = len(splits.train), len(splits.train) + len(splits.val)
    about, sizes = splits.description, sizes | {"num_edge_types": max(*names, 0) + 1}
    title, deviations = f"{about.title}, {what}", (*about.deviations, f"Changed: {what}.")
    about = replace(about, title=title, edge_types=names, deviations=deviations, **sizes)
    return Splits(made[:train], made[train:val], made[val:], about)


def _with_target(splits: Splits, raw: Callable[[Data], Tensor], target: str) -> Splits:
    """Give graphs a target, divided by its standard deviation over the training split."""
    scale = torch.stack([raw(graph) for graph in splits.train]).std()
    for graph in _every(splits):
        graph.y = (raw(graph) / scale).reshape(1, 1)
    return replace(splits, description=replace(splits.description, target=target))


def _every(splits: Splits) -> list[Data]:
    return [*splits.train, *splits.val, *splits.test]


def _whole_graphs(splits: Splits) -> Description:
    about = splits.description
    if not isinstance(about.num_edge_types, int):
        raise ValueError(
            f"expected whole graphs with one type id per edge, but {about.title} has not; use a "
            "data set of molecules, as zinc or moses"
        )
    return about


def late_means(first_layer: pd.DataFrame, *, since: int = 15) -> pd.DataFrame:
    """Means over kept epochs from ``since`` on, of ratios geometric ones; ``epochs_with`` an MA."""
    late = first_layer[first_layer["state"].str.startswith("epoch_")].query("epoch >= @since")
    logarithmic = ["max_ratio", "gate_median"]
    late = late.assign(**np.log(late[logarithmic]), epochs_with=late["measured"] > 0, epochs=1)
    how = dict.fromkeys([*logarithmic, "measured"], "mean")
    how |= dict.fromkeys(["epochs", "epochs_with"], "sum")
    means = late.groupby(["run", "label", "seed"], sort=False).agg(how)
    means[logarithmic] = np.exp(means[logarithmic])
    return means.reset_index()


def factors(
    late: pd.DataFrame, pairs: Mapping[str, tuple[tuple[str, str], tuple[str, str]]]
) -> pd.DataFrame:
    """The largest ratio of the second (run, label) of each pair over the first's, over seeds.

    The geometric mean with Student's interval, extremes, and p of his test with Holm's correction.
    """
    logs, rows = np.log(late.pivot(index="seed", columns=["run", "label"], values="max_ratio")), {}
    for title, (one, other) in pairs.items():
        change = (logs[other] - logs[one]).dropna()
        names = ("factor", "low", "high", "least", "greatest")
        found = np.exp([*t_interval(change), change.min(), change.max()])
        rows[title] = dict(zip(names, found, strict=True))
        rows[title]["p"] = stats.ttest_1samp(change, 0).pvalue
    return with_holm(pd.DataFrame(rows).T)


def types_through_training(
    first_layer: pd.DataFrame, values: Mapping[str, str], *, logarithmic: Sequence[str]
) -> sns.FacetGrid:
    """Lines of each seed and edge type: a column of panels per run, a row per value and label."""
    long = first_layer.melt(["run", "label", "seed", "epoch"], [*values], var_name="quantity")
    lines = dict(x="epoch", y="value", hue="label", units="seed", estimator=None, marker=".")
    panels = dict(col="run", row="quantity", height=2.2, aspect=1.25, palette="colorblind")
    shared = dict(sharey="row", margin_titles=True)
    grid = sns.relplot(long, kind="line", **lines, **panels, facet_kws=shared)
    grid.set_titles(col_template="{col_name}", row_template="")
    for (value, text), row in zip(values.items(), grid.axes, strict=True):
        row[0].set_ylabel(text)
        row[0].set_yscale("log" if value in logarithmic else "linear")
    grid.legend.set_title(None)
    return grid
