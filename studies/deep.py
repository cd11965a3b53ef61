"""Deep networks for the nodes of one graph, and how features and errors smooth in them.

The skeleton is that of the LipschitzNorm paper's code: a linear map, L times dropout, a layer of
PyG and an activation (but for the last), and a linear map to the classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from typing import Any

import pandas as pd
import psutil
import torch
import torch_geometric.nn as gnn
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.transforms import LargestConnectedComponents
from torch_geometric.utils import dropout_edge, index_to_mask
from tqdm import tqdm

from mapkg.lipschitz_norm import lipschitz_normalise
from mapkg.oversmoothing import smoothing_by_layer, uniform_attention_limits
from studies.backward_oversmoothing import OPTIMIZERS, full_training
from studies.data import Description, NodesOfGraph, Splits
from studies.data.networks import regular_task
from studies.files import commit, versions
from studies.published import Schedule, known
from studies.tasks import NodeTask
from studies.train import fit

FEATURE_NORMS = {
    "none": lambda width, scale: nn.Identity(),
    "layer": lambda width, scale: nn.LayerNorm(width),
    "pair": lambda width, scale: gnn.PairNorm(scale),
    "pair-si": lambda width, scale: gnn.PairNorm(scale, scale_individually=True),
}
LIPSCHITZ_NORMS = {
    "lipschitz": "paper",
    "lipschitz-published": "published",
    "lipschitz-published-si": "published-si",
}
"""Normalizations of scores, by name, with the mode of ``LipschitzNorm``."""

NORMS = (*FEATURE_NORMS, *LIPSCHITZ_NORMS)
"""What ``norm`` of ``DeepNetwork`` may be. The published code takes any other name for none."""

RIVALS = {"residual": {"residual": True}, "balanced": {"balanced": True}}
"""Remedies that are no norms, with what each sets of a ``Variant``."""

REMEDY_NAMES = (*NORMS, *RIVALS)
"""What networks are compared by."""

LAYERS = {
    "gat": gnn.GATConv,
    "gt": gnn.TransformerConv,
    "gcn": lambda size, hidden, heads, dropout: gnn.GCNConv(size, hidden * heads),
    # A narrower input is filled with zeros.
    "ggnn": lambda size, hidden, heads, dropout: gnn.GatedGraphConv(hidden * heads, num_layers=1),
    "gcnii": lambda size, hidden, heads, dropout: gnn.GCN2Conv(hidden * heads, 0.1, 0.5, layer=1),
}
"""GAT has self-loops; the Graph Transformer has a root weight and no loops. GCNII is as published,
with the input of the first layer in every layer, and weights nearer to one with each."""

ACTIVATIONS = {"gcn": nn.functional.relu, "ggnn": lambda x: x, "gcnii": nn.functional.relu}
"""Of architectures that have another one than ELU."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Hyper-parameters of a ``DeepNetwork``, without the number of layers."""

    architecture: str = "gat"  # one of ``LAYERS``
    norm: str = "none"  # one of ``NORMS``, of features after every layer or of scores inside it
    scale: float | None = None  # f of LipschitzNorm or s of PairNorm, if not their defaults
    hidden_channels: int = 16  # of each head
    heads: int = 4  # concatenated; GCN and GGNN have none, and channels for as many
    dropout: float | None = None  # of features, if not 0.6 for GAT and else 0.5, as published
    attention_dropout: float = 0.3
    residual: bool = False  # each layer but the first, which changes the width, is added
    balanced: bool = False  # initial weights of GAT, see ``balance``
    drop_edge: float = 0.0  # share of edges that no layer has in a training step
    jumping: bool = False  # the classes are read from the largest of what each layer gives

    def __post_init__(self) -> None:
        known("architecture", self.architecture, LAYERS)
        known("norm", self.norm, dict.fromkeys(NORMS))
        for name in ("heads", "hidden_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("dropout", "attention_dropout", "drop_edge"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name}: expected a rate in [0, 1), got {getattr(self, name)}")
        if self.balanced and self.architecture != "gat":
            raise ValueError(f"balanced: expected architecture 'gat', got {self.architecture!r}")
        if self.norm in LIPSCHITZ_NORMS and self.architecture not in ("gat", "gt"):
            raise ValueError(
                f"norm: {self.norm!r} divides attention scores, which {self.architecture!r} does "
                "not have; expected architecture 'gat' or 'gt'"
            )

    def build(self, num_layers: int, splits: Splits, seed: int) -> "DeepNetwork":
        """The untrained network of a seed for the features and classes of a data set.

        Raises ``ValueError`` if a step of training would need more memory than is free.
        """
        graph = splits.train.graph
        sizes = graph.num_features, splits.description.num_targets
        width = self.hidden_channels * self.heads
        # Adam keeps two values for each weight and its gradient; the backward pass needs about four
        # arrays of all nodes in a layer, and two of all edges. These are the larger parts.
        numbers = num_layers * (4 * width**2 + (4 * graph.num_nodes + 2 * graph.num_edges) * width)
        free = psutil.virtual_memory().available
        if (needed := graph.x.element_size() * numbers) > free:
            raise ValueError(
                f"num_layers: {num_layers} layers of {width} channels on {graph.num_nodes:,} nodes "
                f"need about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; take fewer "
                "layers, heads or channels"
            )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return DeepNetwork(self, num_layers, *sizes)


class DeepNetwork(nn.Module):
    """Linear -> L x [dropout -> layer -> LayerNorm? -> activation -> PairNorm? -> + x?] -> Linear.

    Source: LipschitzNorm paper, published code ``models/deepgat.py`` and ``models/deepgt.py``.
    differs: LayerNorm has weights of its own in every layer, takes any number of heads, and is
    there for GAT, too; that code has no GCN, GGNN and GCNII, and none of the other remedies.
    """

    def __init__(
        self, variant: Variant, num_layers: int, in_channels: int, out_channels: int
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers: expected 1 or more, got {num_layers}")
        hidden, norm, architecture = variant.hidden_channels, variant.norm, variant.architecture
        width, own = hidden * variant.heads, (hidden, variant.heads)
        first = width if architecture == "gcnii" else hidden
        layers = [
            LAYERS[architecture](size, *own, dropout=variant.attention_dropout)
            for size in [hidden, *[width] * (num_layers - 1)]
        ]
        for number, layer in enumerate(layers if architecture == "gcnii" else (), 1):
            layer.beta = math.log(0.5 / number + 1)
        make_norm = FEATURE_NORMS.get(norm, FEATURE_NORMS["none"])
        scale = 1.0 if variant.scale is None else variant.scale
        self.embed = nn.Linear(in_channels, first)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(make_norm(width, scale) for _ in layers)
        self.head = nn.Linear(width, out_channels)
        usual = 0.6 if architecture == "gat" else 0.5
        self.dropout = nn.Dropout(usual if variant.dropout is None else variant.dropout)
        self.activation = ACTIVATIONS.get(architecture, nn.functional.elu)
        self.is_norm_first, self.residual = norm == "layer", variant.residual
        self.drop_edge = variant.drop_edge
        self.jump = gnn.JumpingKnowledge("max") if variant.jumping else None
        if norm in LIPSCHITZ_NORMS:
            lipschitz_normalise(self, LIPSCHITZ_NORMS[norm], scale=variant.scale)
        if variant.balanced:
            balance(self)

    def forward(
        self, x: Float[Tensor, "N words"], edge_index: Int[Tensor, "2 E"]
    ) -> Float[Tensor, "N classes"]:
        """Scores of the classes of every node."""
        edge_index, _ = dropout_edge(edge_index, self.drop_edge, training=self.training)
        x, given = self.embed(x), []
        initial = (x,) if isinstance(self.layers[0], gnn.GCN2Conv) else ()
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True), 1):
            new = layer(self.dropout(x), *initial, edge_index)
            if self.is_norm_first:
                new = norm(new)
            if number < len(self.layers):
                new = self.activation(new)
            if not self.is_norm_first:
                new = norm(new)
            x = x + new if self.residual and x.shape == new.shape else new
            given.append(x)
        return self.head(x if self.jump is None else self.jump(given))


@torch.no_grad()
def balance(network: DeepNetwork) -> None:
    r"""Rescale the weights of a GAT, in place, so that no hidden unit is out of balance.

    Gradient flow of positively homogeneous layers keeps, for every hidden unit i,

    .. math:: \lVert W^{(l)}_{i \cdot} \rVert^2 - \lVert a^{(l)}_i \rVert^2
        - \lVert W^{(l + 1)}_{\cdot i} \rVert^2 .

    It is zero after this: attention vectors are zero, rows of the first layer have the squared
    norm 2, and the columns of each later matrix the norms of the rows before it.

    Source: Mustafa, Bojchevski and Burkholz 2023, public code ``balLtoRconst``. differs: weights
    are drawn uniformly; ELU is not homogeneous; there are biases, and a linear map before the
    first layer, whose rows take the norms of that layer's columns.
    """
    matrices = [*(layer.lin.weight for layer in network.layers), network.head.weight]
    matrices[0].mul_(math.sqrt(2) / matrices[0].norm(dim=1, keepdim=True))
    for before, after in pairwise(matrices):
        after.mul_(before.norm(dim=1) / after.norm(dim=0))
    embed, columns = network.embed.weight, matrices[0].norm(dim=0)
    embed.mul_((columns / embed.norm(dim=1))[:, None])
    for layer in network.layers:
        layer.att_src.zero_(), layer.att_dst.zero_()


PARAMETERS = {"weights": ("lin", "weight", "rnn"), "attention": ("att", "lin_query", "lin_key")}
"""What the names of a layer's parameters begin with, by kind; all matrices, and those of scores."""


def gradient_norms(network: DeepNetwork, epoch: int = 1) -> list[dict[str, Any]]:
    """Frobenius norms of the last gradients, a row per layer and kind; an observer of ``fit``."""
    rows = []
    pairs = product(PARAMETERS.items(), enumerate(network.layers)) if epoch else ()
    for (kind, beginnings), (number, layer) in pairs:
        parameters = layer.named_parameters()
        chosen = [p for name, p in parameters if name.startswith(beginnings) and p.dim() > 1]
        if chosen:  # of attention there are none in GCN and GGNN
            norm = torch.stack([p.grad.double().norm() for p in chosen]).norm().item()
            rows.append({"epoch": epoch, "layer": number, "kind": kind, "norm": norm})
    return rows


_PLAIN = Variant(dropout=0.0, attention_dropout=0.0)
REMEDIES = {
    "no remedy": _PLAIN,
    "PairNorm": replace(_PLAIN, norm="pair"),
    "LayerNorm": replace(_PLAIN, norm="layer"),
    "LipschitzNorm": replace(_PLAIN, norm="lipschitz"),
    "residual": replace(_PLAIN, residual=True),
}
"""Deep GATs without dropout, which the theory of smoothing does not have."""

FURTHER = {
    "balanced start": {"balanced": True},
    "DropEdge": {"drop_edge": 0.5},
    "jumping knowledge": {"jumping": True},
    "GCNII": {"architecture": "gcnii"},
}
"""Remedies that none of the papers has; what each sets of a ``Variant``. Half of the edges are
dropped, our choice; the last is another network, without attention. Predicted before any run, at
the published dropouts: gradients of 25 layers explode with each but GCNII, which has no scores to
amplify; see ``gradient_explosion.dose`` for what explodes."""

UNTRAINED = (16, 64, 256, 512)
"""Numbers of layers, as many as the spectral gap of a citation graph asks for."""

CLASSES = 4
"""Of the nodes of ``regular_splits``."""


def regular_splits(num_nodes: int = 200, degree: int = 20, *, seed: int = 0) -> Splits:
    """The regular graph of the theory with the quartiles of its target as classes of its nodes."""
    task = regular_task(num_nodes, degree, seed=seed)
    target = task.y.flatten()
    bounds = torch.quantile(target, torch.arange(1, CLASSES).to(target) / CLASSES)
    edges = (task.operator - torch.diag(task.operator.diag())).nonzero().t().contiguous()
    graph = Data(x=task.x, edge_index=edges, y=torch.bucketize(target, bounds))
    about = Description(
        **dict(name="regular", title=f"{degree}-regular", task="node classification"),
        **dict(target="quantile of a projection of averaged features", num_targets=CLASSES),
        **dict(num_node_types=None, num_edge_types=None),
        **dict(source="drawn at random", licence="none needed"),
    )
    nodes = torch.arange(num_nodes)
    every, none = NodesOfGraph(graph, nodes), NodesOfGraph(graph, nodes[:0])
    return Splits(every, none, none, about)


def largest_component(splits: Splits) -> Splits:
    """The training nodes of the largest part of a graph: features of different parts never meet."""
    graph = splits.train.graph.clone()
    graph.is_train = index_to_mask(splits.train.nodes, graph.num_nodes)
    part = LargestConnectedComponents(connection="strong")(graph)
    train = NodesOfGraph(part, part.is_train.nonzero().flatten())
    none = NodesOfGraph(part, train.nodes[:0])
    about = replace(splits.description, title=f"{splits.description.title}, largest component")
    return Splits(train, none, none, about)


def deep_smoothing(
    splits: Splits,
    variants: Mapping[str, Variant] = REMEDIES,
    *,
    num_layers: int = 16,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 100,
    progress: bool = True,
) -> pd.DataFrame:
    """Smoothness of features and errors in every layer of deep networks, before and after training.

    On the largest component. Where features are alike, attention weighs neighbors alike, and errors
    are drawn to the degrees, the direction of ``errors``; where they are not, no direction is
    known, and ``errors_rank_one`` takes the best. The ``gradient`` is of a layer's weights, and the
    ``contraction`` that of uniform attention on the graph.

    Source: ours; it joins the LipschitzNorm and the backward-oversmoothing paper.
    """
    schedule = Schedule(epochs=epochs, lr_patience=None)
    splits = largest_component(splits)
    graph, task = splits.train.graph, NodeTask(splits, evaluate=False)
    limits = uniform_attention_limits(graph.edge_index, graph.num_nodes)
    origin = {"dataset": splits.description.title, "versions": versions(), "commit": commit()}
    origin |= {"num_layers": num_layers, "contraction": limits.contraction}
    parts = []
    pairs = list(product(variants.items(), seeds))
    for (name, variant), seed in tqdm(pairs, "networks", disable=not progress):
        network = variant.build(num_layers, splits, seed).to(graph.x.dtype)
        for state in ("untrained", "trained")[: 1 + bool(epochs)]:
            if state == "trained":
                fit(network, task, schedule, seed=seed, progress=False)
            network.eval()
            loss = partial(lambda network: next(task.steps(network, schedule, 0))[0], network)
            table = smoothing_by_layer(network, loss, "layers.*", errors_direction=limits.errors)
            network.zero_grad()
            value = loss()
            value.backward()
            rows = gradient_norms(network)
            table["gradient"] = [row["norm"] for row in rows if row["kind"] == "weights"]
            about = {"variant": name, "seed": seed, "state": state, "loss": value.item()}
            about |= {"epochs": epochs * (state == "trained")}
            parts.append(table.assign(**about, **origin))
    return pd.concat(parts, ignore_index=True)


def smoothing(
    splits: Splits,
    *,
    layers: Sequence[int] = (2, 16),  # of attention networks
    epochs: int = 200,  # of attention networks
    depths: Sequence[int] = (1, 2, 4, 8, 16, 32),  # layers of vanilla networks on regular graphs
    steps: int = 1000,  # of vanilla networks
    seeds: Sequence[int] = (0, 1, 2),  # of both, a training for each
    further: bool = False,  # remedies that no paper has, on regular graphs, and nothing else
    very_deep: bool = False,  # up to 512 layers on the graph, untrained, and nothing else
) -> dict[str, pd.DataFrame]:
    """``deep`` attention on a graph and on regular ones, and ``training`` of vanilla networks."""
    if further:
        variants = {name: replace(_PLAIN, **settings) for name, settings in FURTHER.items()}
        of_regular = dict(variants=variants, epochs=epochs)
        deep = [
            deep_smoothing(regular_splits(seed=s), num_layers=n, seeds=[s], **of_regular)
            for n, s in product(layers, seeds)
        ]
        return {"deep": pd.concat(deep, ignore_index=True)}
    if very_deep:
        narrow = dict(variants={"no remedy": replace(_PLAIN, heads=1)}, seeds=seeds, epochs=0)
        deep = [deep_smoothing(splits, num_layers=number, **narrow) for number in UNTRAINED]
        return {"deep": pd.concat(deep, ignore_index=True)}
    cases = [(splits, seeds), *((regular_splits(seed=seed), [seed]) for seed in seeds)]
    deep = [
        deep_smoothing(case, num_layers=num_layers, seeds=of_case, epochs=epochs)
        for case, of_case in cases
        for num_layers in layers
    ]
    variants = {
        f"{name}, {activation}": dict(
            activation=activation, gain=gain, hidden_channels=32, is_graph=name == "GNN"
        )
        for activation, gain in (("relu", None), ("tanh", 1.2))
        for name in ("GNN", "MLP")
    }
    sizes = dict(depths=depths, seeds=seeds, steps=steps)
    trained = [
        full_training(variants, optimizer=name, **sizes).assign(optimiser=name)
        for name in OPTIMIZERS
    ]
    training = pd.concat(trained, ignore_index=True)
    training = training.assign(versions=versions(), commit=commit())
    return {"deep": pd.concat(deep, ignore_index=True), "training": training}
