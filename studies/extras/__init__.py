"""What no page uses, and published checkpoints and data need.

``build`` makes any network of a configuration, also those that GraphiT and SAN are with their own
mechanisms: attention over the full graph, and SAN's learned encoding of Laplacian eigenvectors.

On the full graph a graph's own edges are real and come first, in the order of the data; every other
ordered pair of different nodes of the same graph is a fake edge, which has its own projections.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch_geometric.utils import cumsum, to_dense_adj

from mapkg import models
from mapkg.models.config import Config
from mapkg.models.edge_attention import EdgeAttention, EdgeIndex, Edges, Nodes, NodeStreamLayer
from mapkg.models.network import GraphNetwork, TypeEmbedding, build_layer, network_sizes

LAPLACIAN_CHANNELS, LAPLACIAN_PAIRS = 8, 10
"""Hidden channels that hold SAN's encoding, and eigenpairs that it is made of, as published."""


class Completion(NamedTuple):
    """Fake edges, their features (one row for all, or each its own), and a factor of each edge."""

    edge_index: Int[Tensor, "2 F"]
    edge_attr: Float[Tensor, "rows D"]
    factor: Float[Tensor, "edges 1"]


class FullGraphAttention(EdgeAttention):
    r"""Attention over real and fake edges, with a factor on each weight.

    .. math::
        s_{ji} &= \frac{K_j \odot Q_i}{\sqrt{d}} \odot E_{ji} \ \text{(real)}, \qquad
            \frac{K^{(2)}_j \odot Q^{(2)}_i}{\sqrt{d}} \odot E^{(2)}_{ji} \ \text{(fake)} \\
        a_{ji}^k &= f_{ji} \exp\bigl(\mathrm{clamp}(\textstyle\sum_c s_{ji}^{k,c}, -5, 5)\bigr)

    Real and fake edges share one denominator and the values V. All else is as in
    ``EdgeAttention``, but there is no Explicit Bias Term.

    Source: massive-activations paper, published code of GraphiT and SAN with
    ``full_graph=True``, which none of its runs uses.
    """

    explicit_biases = ("none",)  # the published one names parameters that are never made

    def __init__(self, hidden_channels: int, heads: int, **options: Any) -> None:
        super().__init__(hidden_channels, heads, **options)
        for name in ("query", "key", "edge"):
            if (own := getattr(self, name)) is not None:
                own = nn.Linear(hidden_channels, hidden_channels, bias=own.bias is not None)
            self.add_module(f"fake_{name}", own)

    def forward(
        self, x: Nodes, edge_index: EdgeIndex, edge_attr: Edges, completion: Completion
    ) -> tuple[Nodes, Float[Tensor, "edges D"]]:
        """Attend over real and fake edges; return what is attended to and the score, [E + F, D]."""
        scale, scores = math.sqrt(self.head_channels), []
        for prefix, ends, features in (
            ("", edge_index, edge_attr),
            ("fake_", completion.edge_index, completion.edge_attr),
        ):
            query, key, edge = (getattr(self, prefix + name) for name in ("query", "key", "edge"))
            gate = None if edge is None else edge(features)
            scores.append(self.edge_score(query(x) / scale, key(x), ends, gate))
        score = self.score(self.bounded(torch.cat(scores)))
        every_edge = torch.cat([edge_index, completion.edge_index], dim=1)
        return self.attend(x, every_edge, self.head_weight(score) * completion.factor), score


class FullGraphLayer(NodeStreamLayer):
    """A ``NodeStreamLayer`` that attends over all pairs; GraphiT's and SAN's full-graph layer."""

    attention_type = FullGraphAttention

    def forward(
        self, x: Nodes, edge_index: EdgeIndex, edge_attr: Edges, completion: Completion
    ) -> tuple[Nodes, Edges]:
        """New node features [N, D] and the features of the real edges [E, D] as they came."""
        attended, _ = self.attention(x, edge_index, edge_attr, completion)
        return self.node_block(x, attended), edge_attr


FULL_GRAPH = {"graphit": FullGraphLayer, "san": FullGraphLayer}
"""The layers of architectures that can attend over the full graph."""


class DiffusionKernel(nn.Module):
    r"""GraphiT's factor: how much of a diffusion that starts at one node is at the other.

    .. math::
        f_{ji} = k_{ji}, \qquad k = (I - \gamma L)^p, \qquad L = I - D^{-1/2} A D^{-1/2}

    for real and fake edges alike. A counts parallel edges, and D sums its columns; a node without
    edges has degree 1 there.

    Source: massive-activations paper, published code of GraphiT; gamma 0.25 and p = 16 there.
    """

    def __init__(self, gamma: float = 0.25, power: int = 16) -> None:
        super().__init__()
        self.gamma, self.power = gamma, power

    def forward(
        self, edge_index: EdgeIndex, fake_index: Int[Tensor, "2 F"], batch: Int[Tensor, " N"]
    ) -> Float[Tensor, "edges 1"]:
        """The factor of each edge in double precision."""
        adjacency = to_dense_adj(edge_index, batch).double()  # [graphs, n, n]
        identity = torch.eye(adjacency.size(1)).to(adjacency)
        scale = adjacency.sum(dim=1).clamp(min=1).rsqrt()  # [graphs, n]
        laplacian = identity - scale.unsqueeze(2) * adjacency * scale.unsqueeze(1)
        kernel = torch.linalg.matrix_power(identity - self.gamma * laplacian, self.power)
        source, target = torch.cat([edge_index, fake_index], dim=1)
        graph, first = batch[source], cumsum(batch.bincount())[batch]
        return kernel[graph, source - first[source], target - first[target]].unsqueeze(-1)


class FakeEdgeShare(nn.Module):
    r"""SAN's factor: :math:`1/(1+\gamma)` for real edges, :math:`\gamma/(1+\gamma)` for fake ones.

    gamma is a fixed value; None learns one for all layers, from 0.1 on and clamped to [0, 1].

    Source: massive-activations paper, published code of SAN: fixed (1e-5) in its ``SAN`` folder,
    learned in ``gnn-lspe``.
    """

    def __init__(self, gamma: float | None = None) -> None:
        super().__init__()
        if gamma is not None and not 0 <= gamma <= 1:
            raise ValueError(f"gamma: expected a value in [0, 1] or None (learned), got {gamma!r}")
        self.gamma = nn.Parameter(torch.tensor([0.1])) if gamma is None else gamma

    def forward(
        self, edge_index: EdgeIndex, fake_index: Int[Tensor, "2 F"], batch: Int[Tensor, " N"]
    ) -> Float[Tensor, "edges 1"]:
        """The factor of each edge in double precision, real edges first."""
        gamma = torch.as_tensor(self.gamma, dtype=torch.double, device=batch.device).clamp(0, 1)
        real, fake = edge_index.size(1), fake_index.size(1)
        shares = (1 / (1 + gamma)).expand(real), (gamma / (1 + gamma)).expand(fake)
        return torch.cat(shares).unsqueeze(-1)


def fake_edges(edge_index: Int[Tensor, "2 E"], batch: Int[Tensor, " N"]) -> Int[Tensor, "2 F"]:
    """The ordered pairs of nodes of a graph that no edge joins, by graph, source and target."""
    adjacency = to_dense_adj(edge_index, batch)  # [graphs, n, n]
    place = torch.arange(adjacency.size(1), device=batch.device)
    exists = place < batch.bincount().unsqueeze(1)  # [graphs, n]
    missing = exists.unsqueeze(2) & exists.unsqueeze(1) & (adjacency == 0)
    missing &= place.unsqueeze(1) != place
    graph, source, target = missing.nonzero(as_tuple=True)
    return torch.stack([source, target]) + cumsum(batch.bincount())[graph]


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
            fake_index = fake_edges(edge_index, graph)
            factor = self.edge_factor(edge_index, fake_index, graph).to(no_edge.dtype)
            of_all["completion"] = Completion(fake_index, no_edge, factor)
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
