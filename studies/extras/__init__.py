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

    A fake edge has the features of no edge: type id 0 (in a data set where id 0 is a type of edge,
    that one's embedding), or float features of 0. The encoding fills the last channels of the node
    features. ``edge_factor`` has the factor on the weights of real and fake edges.
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
        """Predict the targets of each graph, from arguments as a ``GraphNetwork`` has them."""
        x, edge_attr = self.node_embedding(x), self.edge_embedding(edge_attr)
        graph = x.new_zeros(len(x), dtype=torch.long) if batch is None else batch
        if self.encoding is not None:
            x = torch.cat([x, self.encoding(edge_index, graph)], dim=1)
        of_all = {}
        if self.edge_factor is not None:
            of_all["completion"] = complete(edge_index, graph, self._no_edge(), self.edge_factor)
        return self.from_embedded(x, edge_index, edge_attr, batch, batch_size, **of_all)

    def _no_edge(self) -> Float[Tensor, "1 D"]:
        """The embedding of an edge that is not there."""
        embedding = self.edge_embedding
        if isinstance(embedding, TypeEmbedding):
            return embedding(torch.zeros_like(embedding.offsets).unsqueeze(0))
        return embedding(embedding.weight.new_zeros(1, embedding.in_features))


def build(config: Config) -> GraphNetwork:
    """The untrained network of a configuration, with the mechanisms that it switches on."""
    is_full_san = config.full_graph and config.architecture == "san"
    _check(config, is_full_san)
    if not (config.full_graph or config.laplacian_encoding):
        return models.build(config)
    sizes = network_sizes(config)
    kinds = (FULL_GRAPH,) if config.full_graph else ()
    layers = [build_layer(config, *kinds) for _ in range(config.num_layers)]
    edge_factor = encoding = None
    if config.full_graph:
        edge_factor = FakeEdgeShare(config.gamma) if is_full_san else DiffusionKernel()
    if config.laplacian_encoding:
        encoding = LaplacianEncoding(sign_flips=config.laplacian_sign_flips)
    return FullGraphNetwork(layers, edge_factor=edge_factor, encoding=encoding, **sizes)


def _check(config: Config, is_full_san: bool) -> None:
    """Whether the mechanisms that are switched on fit the rest."""
    if config.full_graph and config.architecture not in FULL_GRAPH:
        raise ValueError(
            "full_graph: expected False, only graphit and san attend over the full graph, "
            f"got True for {config.architecture!r}"
        )
    if (config.full_graph or config.laplacian_encoding) and config.readout is None:
        raise ValueError(
            "full_graph and laplacian_encoding: expected False for a node-level task (readout "
            "None), whose sampled neighborhoods are not whole graphs, got True"
        )
    if config.gamma is not None and not (is_full_san and 0 <= config.gamma <= 1):
        raise ValueError(
            "gamma: expected a value in [0, 1] for san with full_graph=True, None otherwise, "
            f"got {config.gamma!r}"
        )
    if config.laplacian_encoding and config.hidden_channels <= LAPLACIAN_CHANNELS:
        raise ValueError(
            f"hidden_channels: expected more than the {LAPLACIAN_CHANNELS} of the Laplacian "
            f"encoding, got {config.hidden_channels}"
        )
    if config.laplacian_sign_flips and not config.laplacian_encoding:
        raise ValueError("laplacian_sign_flips: expected laplacian_encoding=True with it")
