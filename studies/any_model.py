"""Networks as people write them, for the page on any model. None of them knows of this book."""

from torch import Tensor, nn
from torch_geometric.data import Batch
from torch_geometric.nn import GINEConv, GPSConv
from torch_geometric.utils import to_dense_batch


class BatchLayer(nn.Module):
    """A layer in GraphGym's style: it takes the batch, changes it and returns it."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        local = GINEConv(nn.Linear(channels, channels))
        self.gps = GPSConv(channels, local, heads=heads)

    def forward(self, batch: Batch) -> Batch:
        """The same batch, with new node features."""
        batch.x = self.gps(batch.x, batch.edge_index, batch.batch, edge_attr=batch.edge_attr)
        return batch


class GraphGymGPS(nn.Module):
    """A stack of such layers behind a linear encoder of nodes and edges."""

    def __init__(
        self, in_channels: int, edge_dim: int, channels: int, layers: int, heads: int
    ) -> None:
        super().__init__()
        self.nodes, self.edges = nn.Linear(in_channels, channels), nn.Linear(edge_dim, channels)
        self.layers = nn.Sequential(*(BatchLayer(channels, heads) for _ in range(layers)))

    def forward(self, batch: Batch) -> Tensor:
        """New node features [N, channels]."""
        batch.x, batch.edge_attr = self.nodes(batch.x), self.edges(batch.edge_attr)
        return self.layers(batch).x


class DenseTransformer(nn.Module):
    """PyTorch's encoder over all nodes of a graph, graphs padded to the largest."""

    def __init__(self, in_channels: int, channels: int, layers: int, heads: int) -> None:
        super().__init__()
        self.nodes = nn.Linear(in_channels, channels)
        settings = dict(batch_first=True, norm_first=True)
        layer = nn.TransformerEncoderLayer(channels, heads, 2 * channels, **settings)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        """New node features [N, channels]."""
        padded, is_node = to_dense_batch(self.nodes(x), batch)
        return self.encoder(padded, src_key_padding_mask=~is_node)[is_node]
