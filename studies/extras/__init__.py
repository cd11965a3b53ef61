"""What no page uses, and published checkpoints and data need.

``build`` makes any network of a configuration, also those that GraphiT and SAN are with their own
mechanisms: attention over the full graph, and SAN's learned encoding of Laplacian eigenvectors.
"""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from mapkg import models
from mapkg.models.config import Config
from mapkg.models.network import GraphNetwork, TypeEmbedding, build_layer, network_sizes
from studies.extras.full_graph import DiffusionKernel, FakeEdgeShare, FullGraphLayer, complete
from studies.extras.laplacian_encoding import LAPLACIAN_CHANNELS, LaplacianEncoding

FULL_GRAPH = {"graphit": FullGraphLayer, "san": FullGraphLayer}
"""The layers of architectures that can attend over the full graph."""


class FullGraphNetwork(GraphNetwork):
    """A ``GraphNetwork`` with fake edges, with an encoding of a node's place, or with both.

    A fake edge has the features of no edge: type id 0, or float features of 0. The encoding fills
    the last channels of the node features. ``edge_factor`` weighs real and fake edges.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        *,
        edge_factor: DiffusionKernel | FakeEdgeShare | None = None,
        encoding: LaplacianEncoding | None = None,
        **sizes: Any,
    ) -> None:
        super().__init__(layers, **sizes)
        if encoding is not None:
            width = sizes["hidden_channels"] - encoding.channels
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
            no_edge = embed(torch.zeros_like(nothing))
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
    sizes, kinds = network_sizes(config), (FULL_GRAPH,) if full else ()
    layers = [build_layer(config, *kinds) for _ in range(config.num_layers)]
    edge_factor = encoding = None
    if full:
        edge_factor = FakeEdgeShare(config.gamma) if is_full_san else DiffusionKernel()
    if encoded:
        encoding = LaplacianEncoding(sign_flips=config.laplacian_sign_flips)
    return FullGraphNetwork(layers, edge_factor=edge_factor, encoding=encoding, **sizes)
