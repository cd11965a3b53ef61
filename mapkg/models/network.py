"""Whole networks: embeddings, layers, readout over the nodes of a graph or none, head."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch_geometric.nn import global_add_pool, global_max_pool, global_mean_pool

from mapkg.models import edge_attention as own
from mapkg.models import pyg_layers as standard
from mapkg.models.config import Config
from mapkg.models.edge_attention import EdgeIndex, Edges, Nodes
from mapkg.models.egat import EdgeGATLayer

SCORES = "layers.*.score"
"""The score of every layer, the tensor the massive-activations paper analyses."""

CLAMPED = ("gt", "graphit", "san")
"""Architectures that sum the score of a head and clamp the sum."""

_READOUTS = {"mean": global_mean_pool, "sum": global_add_pool, "max": global_max_pool}


class TypeEmbedding(nn.Module):
    """An embedding of type ids that also takes one-hot rows, into which gradients can flow.

    Of several ids per row the embeddings are summed: ``num_types`` has then one number per column.

    Source: one column as in the massive-activations paper's code for ZINC, standard normal;
    several as in the encoders of Open Graph Benchmark, Glorot-uniform, which it uses for TOX21.
    """

    def __init__(self, num_types: int | tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.sizes = (num_types,) if isinstance(num_types, int) else num_types
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), channels))  # tables, stacked
        if isinstance(num_types, int):
            nn.init.normal_(self.weight)
        else:
            for table in self.weight.detach().split(self.sizes):
                nn.init.xavier_uniform_(table)
        sizes = torch.tensor(self.sizes)
        self.register_buffer("limits", sizes, persistent=False)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)

    def forward(self, types: Shaped[Tensor, "rows ..."]) -> Float[Tensor, "rows D"]:
        """Embed ids of shape [rows] or [rows, columns], or float rows [rows, sum(num_types)]."""
        if types.is_floating_point():
            if types.dim() != 2 or types.size(1) != len(self.weight):
                raise ValueError(
                    f"expected type ids, whole numbers, or one-hot rows of width "
                    f"{len(self.weight)}, got floats of shape {list(types.shape)}"
                )
            return types @ self.weight
        columns, shape = len(self.sizes), tuple(types.shape[1:])
        if shape != (columns,) and (columns, shape) != (1, ()):
            raise ValueError(
                f"expected ids of shape [rows, {columns}], one column per table of sizes "
                f"{self.sizes}, got shape {list(types.shape)}"
            )
        if columns == 1:
            return nn.functional.embedding(types.flatten(), self.weight)
        is_known = (types >= 0) & (types < self.limits)
        places = (types + self.offsets).where(is_known, -1)  # which no table has
        return nn.functional.embedding(places, self.weight).sum(dim=1)


class GraphNetwork(nn.Module):
    """Embeddings, a stack of layers, a readout over nodes, and an MLP head.

    Args:
        layers: modules called as ``layer(x, edge_index, edge_attr) -> (x, edge_attr)``, those whose
            attribute ``needs_batch`` is True also with ``batch``.
        num_node_types, num_edge_types: rows of the embedding tables; a tuple if a node or an edge
            has several ids.
        hidden_channels: D; the head maps D -> D/2 -> D/4 -> out_channels.
        readout: ``"mean"``, ``"sum"`` or ``"max"`` over the nodes of a graph; None predicts for
            each node.
        edge_channels: width of float edge features, in place of ``num_edge_types``.
        recompute_edges: every layer starts from the embedded edge features.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        *,
        num_node_types: int | tuple[int, ...],
        num_edge_types: int | tuple[int, ...] | None,
        hidden_channels: int,
        out_channels: int,
        readout: str | None,
        edge_channels: int | None = None,
        recompute_edges: bool = False,
    ) -> None:
        super().__init__()
        if readout is not None and readout not in _READOUTS:
            raise ValueError(f"readout: expected one of {tuple(_READOUTS)}, got {readout!r}")
        if (num_edge_types is None) == (edge_channels is None):
            raise ValueError(
                "expected either num_edge_types, for edges with type ids, or edge_channels, for "
                f"edges with float features, got {num_edge_types} and {edge_channels}"
            )
        width, half, quarter = hidden_channels, hidden_channels // 2, hidden_channels // 4
        self.readout, self.recompute_edges = readout, recompute_edges
        self.node_embedding = TypeEmbedding(num_node_types, width)
        if edge_channels is None:
            self.edge_embedding = TypeEmbedding(num_edge_types, width)
        else:
            self.edge_embedding = nn.Linear(edge_channels, width)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Sequential(
            *(nn.Linear(width, half), nn.ReLU()),
            *(nn.Linear(half, quarter), nn.ReLU()),
            nn.Linear(quarter, out_channels),
        )

    def forward(
        self,
        x: Shaped[Tensor, "N ..."],
        edge_index: EdgeIndex,
        edge_attr: Shaped[Tensor, "E ..."],
        batch: Int[Tensor, " N"] | None = None,
        batch_size: int | None = None,
    ) -> Float[Tensor, "rows targets"]:
        """Predict the targets of each graph, or of each node.

        Args:
            x: node type ids, [N] or [N, columns], or float one-hot rows [N, num_node_types].
            edge_index: source and target of each edge.
            edge_attr: edge type ids, [E] or [E, columns], or float one-hot rows, or float
                features [E, edge_channels].
            batch: graph of each node; None means one graph.
            batch_size: number of graphs; None means as many as ``batch`` names.
        """
        x, edge_attr = self.node_embedding(x), self.edge_embedding(edge_attr)
        return self.from_embedded(x, edge_index, edge_attr, batch, batch_size)

    def from_embedded(
        self,
        x: Nodes,
        edge_index: EdgeIndex,
        edge_attr: Edges,
        batch: Int[Tensor, " N"] | None,
        batch_size: int | None,
        **of_all: Any,
    ) -> Float[Tensor, "rows targets"]:
        """Layers, readout and head; ``of_all`` is what every layer is given beside the graph."""
        embedded = edge_attr
        for layer in self.layers:
            of_layer = {"batch": batch} if getattr(layer, "needs_batch", False) else {}
            edge_input = embedded if self.recompute_edges else edge_attr
            x, edge_attr = layer(x, edge_index, edge_input, **of_layer, **of_all)
        if self.readout is not None:
            x = _READOUTS[self.readout](x, batch, batch_size)
        return self.head(x)


Layers = Mapping[str, type[own.NodeStreamLayer]]
LAYERS: Layers = {
    "gt": own.GraphTransformerLayer,
    **dict.fromkeys(("graphit", "san"), own.NodeStreamLayer),
}
"""The paper's layers by architecture."""

OTHERS: Mapping[str, type[nn.Module]] = {"egat": EdgeGATLayer}
"""Layers that decide on residual and dropout themselves, ``layer(channels, heads, use_bias=)``."""

ARCHITECTURES = (*LAYERS, *OTHERS, *standard.ARCHITECTURES)
"""What ``build`` builds, the paper's networks, its comparison, and the layers of PyG."""


def looked_at(architecture: str) -> str:
    """Pattern of what is looked at of an architecture: scores, messages (gat) or nodes (gps)."""
    if architecture not in standard.ARCHITECTURES:
        return SCORES
    names = standard.RECORDED[architecture]
    return names[-1] if architecture == "gps" else names[0]


def build(config: Config) -> GraphNetwork:
    """The untrained network that a configuration describes; seed torch before to fix its weights.

    Raises ``ValueError`` if an architecture is unknown or has no such part, or a size is left open.
    """
    for name in ("full_graph", "gamma", "laplacian_encoding", "laplacian_sign_flips"):
        if (value := getattr(config, name)) is not None and value is not False:
            raise ValueError(
                f"{name}: expected a network without it, got {value!r}; use studies.extras.build"
            )
    sizes = network_sizes(config)
    # The layers first: the initial weights of a seed are then those of the tracked results.
    return GraphNetwork([build_layer(config) for _ in range(config.num_layers)], **sizes)


def network_sizes(config: Config) -> dict[str, Any]:
    """The arguments of a ``GraphNetwork`` other than its layers."""
    for name, other in (("num_node_types", None), ("num_edge_types", config.edge_channels)):
        if getattr(config, name) is None and other is None:
            raise ValueError(
                f"{name} is not stated for this configuration; set it to the data set's number "
                f"of types with config.replace({name}=...)"
            )
    names = ("num_node_types", "num_edge_types", "edge_channels", "hidden_channels")
    names += ("out_channels", "readout", "recompute_edges")
    return {name: getattr(config, name) for name in names}


def build_layer(config: Config, layers: Layers = LAYERS) -> nn.Module:
    """One layer; raises if the configuration sets an option that the architecture has not."""
    architecture, sizes = config.architecture, (config.hidden_channels, config.heads)
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture: expected one of {ARCHITECTURES}, got {architecture!r}")
    if architecture in layers:
        names = ("dropout", "residual", "batch_norm", "layer_norm", "use_bias", "attention")
        options = {name: getattr(config, name) for name in (*names, "score_bound", "score_dropout")}
        # The published SAN for ogbn-proteins does not hand its term on.
        lost = (architecture, config.dataset) == ("san", "ogbn-proteins")
        term = "none" if lost and config.explicit_bias == "published" else config.explicit_bias
        return layers[architecture](*sizes, explicit_bias=term, **options)
    is_other = architecture in OTHERS
    fixed = {"residual": not is_other, "layer_norm": False, "attention": "full"}
    fixed |= {"explicit_bias": "none", "score_bound": "none", "score_dropout": 0.0}
    # EGAT has no BatchNorm either, but its published file states one: that cannot be refused.
    fixed |= {"dropout": 0.0} if is_other else {"batch_norm": True, "use_bias": False}
    for name, value in fixed.items():
        if (found := getattr(config, name)) != value:
            only = f"{architecture} is built with {value!r} only"
            raise ValueError(f"{name}: {only}, got {found!r}")
    if is_other:
        return OTHERS[architecture](*sizes, use_bias=config.use_bias)
    return standard.standard_layer(architecture, *sizes, dropout=config.dropout)
