"""Whole networks for graph-level tasks: embeddings, layers, readout, head."""

from collections.abc import Callable

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch_geometric.nn import global_add_pool, global_mean_pool

from mapkg.configs import Config
from mapkg.models.edge_attention import GraphTransformerLayer

_READOUTS: dict[str, Callable] = {"mean": global_mean_pool, "sum": global_add_pool}


class TypeEmbedding(nn.Embedding):
    """An embedding of type ids that also takes one-hot rows.

    Ids are what a data set gives, as [rows] or, as PyG has them, [rows, 1]. One-hot rows (or
    anything between them) are what an explainer or an attack needs, since gradients can flow
    into them.
    """

    def forward(self, types: Shaped[Tensor, "rows ..."]) -> Float[Tensor, "rows D"]:
        """Embed ids of shape [rows] or [rows, 1], or float rows of shape [rows, num_types]."""
        if types.is_floating_point():
            return types @ self.weight
        return super().forward(types.squeeze(-1) if types.dim() == 2 else types)


class GraphNetwork(nn.Module):
    """Type embeddings, a stack of layers, a readout over nodes, and an MLP head.

    Args:
        layers: modules called as ``layer(x, edge_index, edge_attr) -> (x, edge_attr)``.
        num_node_types, num_edge_types: rows of the embedding tables.
        hidden_channels: D; the head maps D -> D/2 -> D/4 -> out_channels.
        out_channels: number of targets.
        readout: ``"mean"`` or ``"sum"`` over the nodes of a graph.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        *,
        num_node_types: int,
        num_edge_types: int,
        hidden_channels: int,
        out_channels: int,
        readout: str,
    ) -> None:
        super().__init__()
        if readout not in _READOUTS:
            raise ValueError(f"readout: expected one of {tuple(_READOUTS)}, got {readout!r}")
        width = hidden_channels
        self.readout = readout
        self.node_embedding = TypeEmbedding(num_node_types, width)
        self.edge_embedding = TypeEmbedding(num_edge_types, width)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.ReLU(),
            nn.Linear(width // 2, width // 4),
            nn.ReLU(),
            nn.Linear(width // 4, out_channels),
        )

    def forward(
        self,
        x: Shaped[Tensor, "N ..."],
        edge_index: Int[Tensor, "2 E"],
        edge_attr: Shaped[Tensor, "E ..."],
        batch: Int[Tensor, " N"] | None = None,
        batch_size: int | None = None,
    ) -> Float[Tensor, "graphs targets"]:
        """Predict the targets of each graph.

        Args:
            x: node type ids, shape [N] or [N, 1], or float one-hot rows, shape
                [N, num_node_types].
            edge_index: source and target of each edge, shape [2, E].
            edge_attr: edge type ids, shape [E] or [E, 1], or float one-hot rows.
            batch: graph of each node, shape [N]; None means one graph.
            batch_size: number of graphs; None means as many as ``batch`` names.

        Returns:
            Predictions, shape [graphs, targets].
        """
        x, edge_attr = self.node_embedding(x), self.edge_embedding(edge_attr)
        for layer in self.layers:
            x, edge_attr = layer(x, edge_index, edge_attr)
        return self.head(_READOUTS[self.readout](x, batch, batch_size))


def build(config: Config) -> GraphNetwork:
    """The untrained network that a configuration describes.

    Seed torch before the call to fix the initial weights.

    Args:
        config: for example ``configs.CONFIGS["GT-ZINC"]``.

    Raises:
        ValueError: if the architecture or the task is not one that is built here, or if the
            configuration leaves the size of an embedding table open.
    """
    if config.architecture != "gt":
        raise ValueError(f"architecture: expected 'gt', got {config.architecture!r}")
    if config.readout is None:
        raise ValueError(
            "readout: expected 'mean' or 'sum', got None; node-level networks are not built here"
        )
    for name in ("num_node_types", "num_edge_types"):
        if getattr(config, name) is None:
            raise ValueError(
                f"{name} is not stated for this configuration; set it to the data set's number "
                f"of types with config.replace({name}=...)"
            )
    layers: list[nn.Module] = [
        GraphTransformerLayer(
            config.hidden_channels,
            config.heads,
            dropout=config.dropout,
            residual=config.residual,
            batch_norm=config.batch_norm,
            layer_norm=config.layer_norm,
            use_bias=config.use_bias,
        )
        for _ in range(config.num_layers)
    ]
    return GraphNetwork(
        layers,
        num_node_types=config.num_node_types,
        num_edge_types=config.num_edge_types,
        hidden_channels=config.hidden_channels,
        out_channels=config.out_channels,
        readout=config.readout,
    )
