"""What no page uses, and published checkpoints and data need.

``build`` makes any network of a configuration, also those that GraphiT and SAN are with their own
mechanisms: attention over the full graph, and SAN's learned encoding of Laplacian eigenvectors.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch_geometric.utils import to_dense_adj

from mapkg import models
from mapkg.models.config import Config
from mapkg.models.network import GraphNetwork, TypeEmbedding, build_layer, network_sizes
from studies.extras.full_graph import DiffusionKernel, FakeEdgeShare, FullGraphLayer, complete

FULL_GRAPH = {"graphit": FullGraphLayer, "san": FullGraphLayer}
"""The layers of architectures that can attend over the full graph."""

LAPLACIAN_CHANNELS, LAPLACIAN_PAIRS = 8, 10
"""Hidden channels that hold SAN's encoding, and eigenpairs that it is made of, as published."""


class FullGraphNetwork(GraphNetwork):
    """A ``GraphNetwork`` with fake edges of no features, an encoding of a node's place, or both."""

    def __init__(
        self,
        layers: list[nn.Module],
        *,
        edge_factor: DiffusionKernel | FakeEdgeShare | None = None,
        encoding: "LaplacianEncoding | None" = None,
        **sizes: Any,
    ) -> None:
        super().__init__(layers, **sizes)
        if encoding is not None:
            width = sizes["hidden_channels"] - LAPLACIAN_CHANNELS
            self.node_embedding = TypeEmbedding(sizes["num_node_types"], width)
        self.edge_factor, self.encoding = edge_factor, encoding

    def forward(
        self,
        x: Shaped[Tensor, "N ..."],
        edge_index: Int[Tensor, "2 E"],
        edge_attr: Shaped[Tensor, "E ..."],
        batch: Int[Tensor, " N"] | None = None,
        batch_size: int | None = None,
    ) -> Float[Tensor, "graphs targets"]:
        """Predict the targets of each graph."""
        x, edge_attr = self.node_embedding(x), self.edge_embedding(edge_attr)
        graph = x.new_zeros(len(x), dtype=torch.long) if batch is None else batch
        if self.encoding is not None:
            x = torch.cat([x, self.encoding(edge_index, graph)], dim=1)
        of_all = {}
        if self.edge_factor is not None:
            embed = self.edge_embedding
            is_map = isinstance(embed, nn.Linear)
            nothing = embed.weight[:1] if is_map else embed.offsets.unsqueeze(0)
            no_edge = embed(torch.zeros_like(nothing))  # type id 0, or float features of 0
            of_all["completion"] = complete(edge_index, graph, no_edge, self.edge_factor)
        return self.from_embedded(x, edge_index, edge_attr, batch, batch_size, **of_all)


def build(config: Config) -> GraphNetwork:
    """The untrained network of a configuration, with the mechanisms that it switches on."""
    full, encoded = config.full_graph, config.laplacian_encoding
    is_full_san = full and config.architecture == "san"
    expected = None
    if full and config.architecture not in FULL_GRAPH:
        expected = "architecture: expected one of graphit and san with full_graph"
    elif (full or encoded) and config.readout is None:
        expected = "readout: expected whole graphs with full_graph or laplacian_encoding"
    elif config.gamma is not None and not is_full_san:
        expected = "gamma: expected None but for san with full_graph"
    elif encoded and config.hidden_channels <= LAPLACIAN_CHANNELS:
        expected = f"hidden_channels: expected more than the {LAPLACIAN_CHANNELS} of the encoding"
    elif config.laplacian_sign_flips and not encoded:
        expected = "laplacian_sign_flips: expected laplacian_encoding with it"
    if expected:
        raise ValueError(f"{expected}, got {getattr(config, expected.partition(':')[0])!r}")
    if not (full or encoded):
        return models.build(config)
    kinds = (FULL_GRAPH,) if full else ()
    layers = [build_layer(config, *kinds) for _ in range(config.num_layers)]
    edge_factor = encoding = None
    if full:
        edge_factor = FakeEdgeShare(config.gamma) if is_full_san else DiffusionKernel()
    if encoded:
        encoding = LaplacianEncoding(sign_flips=config.laplacian_sign_flips)
    sizes = network_sizes(config)
    return FullGraphNetwork(layers, edge_factor=edge_factor, encoding=encoding, **sizes)


class LaplacianEncoding(nn.Module):
    r"""SAN's encoding of a node's place: a transformer over the spectrum of its graph.

    Node i has pairs :math:`(\phi_k(i), \lambda_k)`, the entry of the k-th eigenvector and its
    eigenvalue, mapped to C channels. They attend to each other, and their sum is the encoding.
    ``sign_flips`` draws signs of eigenvectors in each training pass.

    Source: SAN (Kreuzer et al. 2021) as in the published code of the massive-activations paper,
    whose runs do not use it. differs: its training loop draws signs but never applies them; its
    eigenvectors have the sign and basis that numpy gives.
    """

    def __init__(
        self, *, num_layers: int = 2, feedforward_channels: int = 2048, sign_flips: bool = False
    ) -> None:
        super().__init__()
        self.sign_flips = sign_flips
        self.project = nn.Linear(2, LAPLACIAN_CHANNELS)
        # A loop, not nn.TransformerEncoder: that one copies a layer, weights and all.
        sizes = LAPLACIAN_CHANNELS, 4, feedforward_channels
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(*sizes, batch_first=True) for _ in range(num_layers)
        )

    def forward(
        self, edge_index: Int[Tensor, "2 E"], batch: Int[Tensor, " N"]
    ) -> Float[Tensor, "N C"]:
        """The encoding of each node, from edges both ways and the graph of each node, ascending."""
        vectors, values, missing = laplacian_eigenpairs(edge_index, batch, LAPLACIAN_PAIRS)
        if self.training and self.sign_flips:
            shape = (int(batch.max()) + 1, LAPLACIAN_PAIRS)
            vectors = vectors * (2 * torch.randint(2, shape, device=batch.device) - 1)[batch]
        pairs = torch.stack([vectors, values], dim=-1).to(self.project.weight.dtype)
        pairs = self.project(pairs)  # [N, m, C]
        for layer in self.layers:
            pairs = layer(pairs, src_key_padding_mask=missing)
        return pairs.masked_fill(missing.unsqueeze(-1), 0).sum(dim=1)


@torch.no_grad()
def laplacian_eigenpairs(
    edge_index: Int[Tensor, "2 E"], batch: Int[Tensor, " N"], count: int
) -> tuple[Float[Tensor, "N m"], Float[Tensor, "N m"], Bool[Tensor, "N m"]]:
    """Entries of the first eigenvectors of D - A of each node's graph, eigenvalues, and where none.

    The sum of an eigenvector's cubed entries is positive.
    """
    adjacency = to_dense_adj(edge_index, batch).double()  # [graphs, n, n]
    if not torch.equal(adjacency, adjacency.mT):
        raise ValueError(
            "edge_index: expected each edge both ways, as the Laplacian is that of an undirected "
            "graph; torch_geometric.utils.to_undirected adds the missing ones"
        )
    pairs = []
    # One by one: equal graphs then have equal eigenvectors, whatever else is in the batch.
    for matrix, size in zip(adjacency, batch.bincount().tolist(), strict=True):
        matrix = matrix[:size, :size]
        values, vectors = torch.linalg.eigh(torch.diag(matrix.sum(dim=0)) - matrix)
        signs = torch.where(vectors.pow(3).sum(dim=0) < 0, -1.0, 1.0)
        known = torch.stack([vectors * signs, values.abs().expand(size, -1)])[..., :count]
        absent = torch.full((2, size, count - known.size(-1)), torch.nan).to(known)
        pairs.append(torch.cat([known, absent], dim=-1))
    vectors, values = torch.cat(pairs, dim=1)
    return vectors.nan_to_num(), values.nan_to_num(), values.isnan()
