r"""What edges can be told apart by: properties of bonds, and what the first layer sees of them.

Without positional encodings the first score of an edge is a function of the types of its source,
its target and itself, its *kind*: :math:`K(x_j) \odot Q(x_i) \odot E(t_{ji}) / \sqrt d`. Ratios of
kinds are read off the weights; how often each occurs gives all shares and heat maps of the layer.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from rdkit import Chem
from scipy import stats
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.utils import scatter
from torch_geometric.utils.smiles import x_map

from mapkg import hooks
from mapkg.evaluation import batches
from mapkg.measures import MASSIVE_RATIO, activation_ratio, row_median
from studies.data import ATOM_TYPES, Description, to_molecule
from studies.published import known

GLOBAL = ("atom to global", "global to atom")
"""Edges to and from a node that is joined to all atoms."""

RINGS = ("in no ring", "in a ring of 5", "in a ring of 6", "in a ring of another size")
"""By the smallest ring that a bond is part of."""

CONJUGATION = ("not conjugated", "conjugated")
"""As RDKit finds it; aromatic bonds and those next to a double bond are."""

Labels = tuple[list[Int[Tensor, " _"]], tuple[str, ...]]
"""A label per edge of each graph, and what the labels 0, 1, ... are called."""


def edge_labels(graphs: Sequence[Data], by: str, description: Description) -> Labels:
    """The label of each edge by one of ``PROPERTIES``; rings and conjugation need ``smiles``."""
    return known("by", by, PROPERTIES)(graphs, description)


def _by_type(graphs: Sequence[Data], description: Description) -> Labels:
    places = {i: place for place, i in enumerate(sorted(description.edge_types))}
    used = {i for graph in graphs for i in graph.edge_type.unique().tolist()}
    if unknown := used - {*places}:
        raise ValueError(
            f"an edge has the type {min(unknown)}, but {description.title} names only "
            f"{', '.join(map(str, places))}; pass the description of the splits of the graphs"
        )
    label = torch.tensor([places.get(i, -1) for i in range(max([0, *places]) + 1)])
    return [label[g.edge_type] for g in graphs], tuple(description.edge_types[i] for i in places)


def _by_role(graphs: Sequence[Data], description: Description) -> Labels:
    of_types, types = _by_type(graphs, description)
    if description.num_node_types != len(ATOM_TYPES) + 1:  # no global node
        return of_types, types
    bonds = [name.split(" / ")[0] for name in types]  # of a shared id the bond comes first
    names = tuple(dict.fromkeys((*bonds, *GLOBAL)))
    of_bond = torch.tensor([names.index(bond) for bond in bonds])
    labels = []
    for graph, of_type in zip(graphs, of_types, strict=True):
        from_global, to_global = graph.x.flatten()[graph.edge_index] == len(ATOM_TYPES)
        label = of_bond[of_type]
        label[to_global], label[from_global] = map(names.index, GLOBAL)
        labels.append(label)
    return labels, names


def _by_atom_pair(graphs: Sequence[Data], description: Description) -> Labels:
    pairs = []
    for graph in graphs:
        symbols = _elements(graph, description)
        # Carbon first, else in the order of the alphabet.
        both = [[symbols[j], symbols[i]] for j, i in graph.edge_index.t().tolist()]
        pairs.append(["–".join(sorted(pair, key=lambda s: (s != "C", s))) for pair in both])
    counts = Counter(pair for of_graph in pairs for pair in of_graph)
    common = [pair for pair, count in counts.items() if count >= 0.01 * counts.total()]
    common.sort(key=lambda pair: (-counts[pair], pair))
    place = {pair: i for i, pair in enumerate(common)}
    labels = [[place.get(pair, len(common)) for pair in of_graph] for of_graph in pairs]
    names = (*common, *(["other"] if len(common) < len(counts) else []))
    return [torch.tensor(of_graph, dtype=torch.long) for of_graph in labels], names


def _ring(bond: Chem.Bond) -> int:
    size = bond.GetOwningMol().GetRingInfo().MinBondRingSize(bond.GetIdx())
    return {0: 0, 5: 1, 6: 2}.get(size, 3)


def _by_bond(names: tuple[str, ...], label: Callable[[Chem.Bond], int]) -> Callable[..., Labels]:
    def by(graphs: Sequence[Data], description: Description) -> Labels:
        labels = []
        for graph in graphs:
            molecule, ends = _molecule(graph, description), graph.edge_index.t().tolist()
            found = [int(label(molecule.GetBondBetweenAtoms(*pair))) for pair in ends]
            labels.append(torch.tensor(found, dtype=torch.long))
        return labels, names

    return by


PROPERTIES = {
    "type": _by_type,
    "role": _by_role,
    "atom pair": _by_atom_pair,
    "ring": _by_bond(RINGS, _ring),
    "conjugation": _by_bond(CONJUGATION, Chem.Bond.GetIsConjugated),
}
"""What edges can be told apart by."""


def _elements(graph: Data, description: Description) -> list[str]:
    """The element of each node."""
    if description.num_node_types == tuple(map(len, x_map.values())):  # columns of from_smiles
        table = Chem.GetPeriodicTable()
        return [table.GetElementSymbol(number) for number in graph.x[:, 0].tolist()]
    if description.num_node_types == len(ATOM_TYPES):
        return [ATOM_TYPES[i].split()[0] for i in graph.x.flatten().tolist()]
    raise ValueError(
        f"expected nodes that are atoms, of {len(ATOM_TYPES)} types or with PyG's columns, but "
        f"{description.title} has node types of the sizes {description.num_node_types}; only "
        "'type' tells its edges apart"
    )


def _molecule(graph: Data, description: Description) -> Chem.Mol:
    """The molecule of a graph, atoms in the order of the nodes."""
    symbols = _elements(graph, description)
    if "smiles" not in graph:
        raise ValueError(
            f"a graph of {description.title} has no SMILES, of which rings and conjugation are "
            "read; set graph.smiles, its atoms in the order of the nodes"
        )
    molecule = Chem.MolFromSmiles(graph.smiles)
    if molecule is not None and symbols == [atom.GetSymbol() for atom in molecule.GetAtoms()]:
        bonds = {(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in molecule.GetBonds()}
        both = bonds | {(end, begin) for begin, end in bonds}
        if set(map(tuple, graph.edge_index.t().tolist())) == both:
            return molecule
    # The SMILES of PyG's ZINC are written from the ids, with the atoms in an order of their own.
    if description.num_node_types == len(ATOM_TYPES):
        molecule = to_molecule(graph)
        if Chem.MolToSmiles(molecule) == graph.smiles:
            return molecule
    raise ValueError(
        f"the nodes and edges of a graph are not the atoms and bonds of its SMILES "
        f"{graph.smiles!r} in their order; set graph.smiles to that of the molecule"
    )


# The first layer.


def edges(graphs: Sequence[Data]) -> pd.DataFrame:
    """The types of each edge's ends and of itself: columns ``source``, ``target``, ``edge``."""
    for graph in graphs:
        for key in ("x", "edge_attr"):
            ids = graph.get(key)
            if ids is None or ids.is_floating_point() or ids.numel() != ids.size(0):
                found = "none" if ids is None else f"shape {list(ids.shape)} of {ids.dtype}"
                raise ValueError(
                    f"{key}: expected one type id per row, got {found}; only then has an edge a "
                    "kind (source type, edge type, target type)"
                )
    ends = torch.cat([graph.x.flatten()[graph.edge_index] for graph in graphs], dim=1)
    types = torch.cat([graph.edge_attr.flatten() for graph in graphs])
    return pd.DataFrame({"source": ends[0], "target": ends[1], "edge": types})


def distinct_edges(graphs: Sequence[Data]) -> pd.DataFrame:
    """The kinds of edges, all that the first layer can tell apart, and their ``count``."""
    return edges(graphs).value_counts(sort=False).sort_index().reset_index()


def type_frequency(train: Sequence[Data], graphs: Sequence[Data]) -> list[Float[Tensor, " edges"]]:
    """How many training edges have the types of each edge and of its two ends: no network."""
    counts = edges(graphs).merge(distinct_edges(train), how="left")["count"].fillna(0)
    counts = torch.tensor(counts.to_numpy(np.float32))
    return list(counts.split([graph.num_edges for graph in graphs]))


def first_layer(model: nn.Module, triples: pd.DataFrame) -> dict[str, Float[Tensor, "triples D"]]:
    r"""Score, ratio, gate E and match :math:`K Q / \sqrt d` of kinds of edges, from the weights."""
    if getattr(model, "encoding", None) is not None or getattr(model, "edge_factor", None):
        raise ValueError(
            "expected a network without positional encodings and without full-graph attention: "
            "with them the first layer sees more than the types of an edge and its ends"
        )
    # The network is run on a graph that has one edge of each kind and nothing else.
    number = len(triples)
    edge_index = torch.arange(2 * number).view(2, number)
    x = torch.from_numpy(triples[["source", "target"]].to_numpy().T.flatten())
    graph = Data(x=x, edge_index=edge_index, edge_attr=torch.tensor(triples["edge"].to_numpy()))
    names = [f"layers.0.attention.{part}" for part in ("score", "edge", "key", "query")]
    try:
        ((_, seen),) = hooks.scan(model, [graph], names)
    except KeyError as error:
        raise ValueError(f"expected GT, GraphiT or SAN, with {', '.join(names)}") from error
    score, gate, key, query = (seen[name] for name in names)
    scale = (score.size(1) / model.layers[0].attention.heads) ** 0.5
    match = key[:number] * query[number:] / scale
    return {"score": score, "ratio": activation_ratio(score), "gate": gate, "match": match}


def mean_by_type(
    values: Shaped[Tensor, "triples D"], triples: pd.DataFrame, ids: Iterable[int]
) -> Float[Tensor, "types D"]:
    """Means over the edges of each type; NaN for a type without an edge."""
    edge, count = (torch.tensor(triples[name].to_numpy()) for name in ("edge", "count"))
    total = edge.bincount(count.double(), minlength=max(ids) + 1)
    table = scatter(values.double() * count.unsqueeze(1), edge, dim_size=len(total))
    return (table / total.where(total > 0, torch.nan).unsqueeze(1))[[*ids]]


def separable_log_ratio(
    layer: Mapping[str, Tensor], triples: pd.DataFrame, ids: Iterable[int]
) -> Float[Tensor, "types D"]:
    r"""The mean log ratio, predicted from a type's gate and a profile common to all types.

    .. math::
        \overline{\log r}_{t,c} \approx \log|E_{t,c}| + p_c - m_t , \qquad
        p_c = \overline{\log|K Q / \sqrt d|_c} \text{ over all edges}

    with m_t the mean log median of a row; exact if a bond's atoms did not depend on its type.
    """
    match, gate = (layer[name].double().abs().log10() for name in ("match", "gate"))
    profile = mean_by_type(match, triples.assign(edge=0), [0])
    median = row_median(layer["score"].double()).log10().unsqueeze(1)
    return mean_by_type(gate - median, triples, ids) + profile


@torch.no_grad()
def first_layer_table(
    model: nn.Module,
    train: pd.DataFrame,  # the distinct edges of a split
    test: pd.DataFrame,
    names: Mapping[int, str],  # of edge types by id
    start: Float[Tensor, "types D"],  # the edge embedding before training
) -> pd.DataFrame:
    """What the first layer's weights say of each edge type, and what is measured on ``test``.

    ``predicted`` is the share of massive edges from weights and the training split's frequencies,
    ``common_pairs`` the same if atoms at the ends of a bond did not depend on its type.
    """
    pairs = train.groupby(["source", "target"])["count"].sum().reset_index()
    crossed = pairs.merge(pd.DataFrame({"edge": [*names]}), how="cross")
    splits = {"measured": test, "predicted": train, "common_pairs": crossed}
    layers = {name: first_layer(model, triples) for name, triples in splits.items()}
    massive = {name: layer["ratio"] > MASSIVE_RATIO for name, layer in layers.items()}
    heat = {name: mean_by_type(massive[name], splits[name], names) for name in splits}
    error = (heat["measured"] - heat["predicted"]).abs().amax(dim=1)
    on_test = layers["measured"]
    logs = [mean_by_type(on_test["ratio"].double().log10(), test, names)]
    logs += [separable_log_ratio(layers["predicted"], train, names)]
    typical = torch.stack([row_median(on_test["score"]), on_test["ratio"].amax(dim=1)], dim=1)
    typical = 10 ** mean_by_type(typical.double().log10(), test, names)
    gate = layers["common_pairs"]["gate"][: len(names)].abs().double()  # of one pair, all types
    moved = (model.edge_embedding.weight - start).norm(dim=1) / start.norm(dim=1)
    by_type = test.assign(massive=massive["measured"].any(dim=1).numpy()).groupby("edge")
    counts = by_type.agg(edges=("count", "sum"), size=("count", "size"), massive=("massive", "sum"))
    counts = counts.reindex([*names], fill_value=0)
    shares = {
        name: mean_by_type(each.any(dim=1, keepdim=True), splits[name], names).flatten()
        for name, each in massive.items()
    }
    table = {
        "label": [*names.values()],
        "edges": counts["edges"],
        "triples": counts["size"],
        "moved": moved[[*names]].double(),
        "gate_median": gate.median(dim=1).values,
        "gate_max": gate.amax(dim=1),
        **shares,
        "massive_triples": counts["massive"],
        "median": typical[:, 0],
        "max_ratio": typical[:, 1],
        "heat_error": error,
        "correlation": [float(pair.corrcoef()[0, 1]) for pair in torch.stack(logs, dim=1)],
    }
    return pd.DataFrame({name: np.asarray(values) for name, values in table.items()})


def massive_kinds(first_layer: pd.DataFrame) -> pd.DataFrame:
    """How many kinds of each type are massive, of networks with any, and ``p_fewer``.

    That is the hypergeometric probability of no more if the massive kinds were drawn from all.
    """
    columns = {"triples": "kinds", "massive_triples": "massive"}
    table = first_layer[["run", "seed", "label", *columns]].rename(columns=columns)
    every = table.groupby(["run", "seed"])[[*columns.values()]].transform("sum")
    each = table["massive"], every["kinds"], every["massive"], table["kinds"]
    return table.assign(p_fewer=stats.hypergeom.cdf(*each))[every["massive"] > 0]


def log_ratios(
    model: nn.Module, train: Sequence[Data], test: Sequence[Data], names: Mapping[int, str]
) -> pd.DataFrame:
    """Mean log10 ratio of each type and channel, on ``test`` and as ``train`` predicts it."""
    seen, known = distinct_edges(test), distinct_edges(train)
    ratio = first_layer(model, seen)["ratio"].double()
    logs = {
        "measured": mean_by_type(ratio.log10(), seen, names),
        "predicted": separable_log_ratio(first_layer(model, known), known, names),
    }
    columns = {n: pd.DataFrame(log, index=[*names.values()]).stack() for n, log in logs.items()}
    return pd.DataFrame(columns).rename_axis(["label", "channel"]).dropna().reset_index()


def score_parts(
    model: nn.Module,
    graphs: Sequence[Data],
    labels: Sequence[Int[Tensor, " _"]],  # one per edge of each graph
    names: Sequence[str],  # of labels
) -> pd.DataFrame:
    """Means of the magnitude of match, gate and score, and geometric means of what is of rows."""
    attentions = hooks.resolve(model, "layers.*.attention")
    attentions = {name: each for name, each in attentions.items() if hasattr(each, "score")}
    parts, columns = ("query", "key", "edge", "score"), ["match", "gate", "score"]
    columns += ["median", "maximum", "max_ratio"]
    recorded = [f"{name}.{part}" for name in attentions for part in parts]
    label, start, rows = torch.cat(list(labels)), 0, []
    for batch, seen in hooks.scan(model, batches(graphs, 128), recorded):
        of_batch = label[start : start + batch.num_edges]
        start += batch.num_edges
        source, target = batch.edge_index
        for layer, (name, attention) in enumerate(attentions.items()):
            query, key, gate, score = (seen[f"{name}.{part}"].double() for part in parts)
            match = key[source] * query[target] / attention.head_channels**0.5
            means = [part.abs().mean(dim=1) for part in (match, gate, score)]
            ratio = activation_ratio(score).amax(dim=1)
            logs = torch.stack([row_median(score), score.abs().amax(dim=1), ratio]).log10()
            values = torch.stack([*means, *logs.where(ratio.isfinite(), torch.nan)], dim=1)
            table = pd.DataFrame(values.numpy(), columns=columns)
            rows.append(table.assign(layer=layer, label=of_batch.numpy()))
    groups = pd.concat(rows).groupby(["layer", "label"])
    means = groups.mean()
    means[columns[3:]] = 10 ** means[columns[3:]]
    counts = pd.DataFrame({"edges": groups.size(), "usable": groups["max_ratio"].count()})
    levels = range(len(attentions)), range(len(names))
    every = pd.MultiIndex.from_product(levels, names=["layer", "label"])
    counts = counts.reindex(every, fill_value=0)
    table = counts.join(means).reset_index()
    return table.assign(label=table["label"].map(dict(enumerate(names))))
