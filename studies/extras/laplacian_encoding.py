"""SAN's learned encoding of a node's place in its graph, from the Laplacian's eigenpairs."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch_geometric.utils import to_dense_adj

LAPLACIAN_CHANNELS = 8
"""Hidden channels that hold the encoding, as published."""


class LaplacianEncoding(nn.Module):
    r"""A transformer over the spectrum of a graph, seen from one of its nodes.

    Node i has a sequence of m pairs :math:`(\phi_k(i), \lambda_k)`, the entry of the k-th
    eigenvector and its eigenvalue, fewer in a graph of fewer nodes. Each pair is mapped to C
    channels, a TransformerEncoder lets the pairs of one node attend to each other, and the sum
    over the pairs is the encoding.

    Eigenvectors have no sign of their own. Here a rule chooses one (``laplacian_eigenpairs``);
    ``sign_flips`` draws one per graph and eigenvector in each training pass instead. Nothing fixes
    the sign where a symmetry of the bonds turns an eigenvector into its negative, nor the basis of
    a repeated eigenvalue: relabelling the nodes of most molecules can change the encoding.

    Source: SAN (Kreuzer et al. 2021) as in the published code of the massive-activations paper,
    whose runs do not use it: m = 10, Linear(2 -> 8), two layers of four heads with torch's
    defaults, dropout 0.1 and 2048 channels inside. differs: its training loop draws signs but
    never applies them; its eigenvectors have the sign and basis that numpy gives.
    """

    def __init__(
        self,
        channels: int = LAPLACIAN_CHANNELS,
        *,
        num_layers: int = 2,
        feedforward_channels: int = 2048,
        sign_flips: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.eigenpairs, self.sign_flips = channels, 10, sign_flips
        self.project = nn.Linear(2, channels)
        # A loop, not nn.TransformerEncoder: that one copies a layer, weights and all.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(channels, 4, feedforward_channels, batch_first=True)
            for _ in range(num_layers)
        )

    def forward(
        self, edge_index: Int[Tensor, "2 E"], batch: Int[Tensor, " N"]
    ) -> Float[Tensor, "N C"]:
        """The encoding of each node, from edges both ways and the graph of each node, ascending."""
        vectors, values, missing = laplacian_eigenpairs(edge_index, batch, self.eigenpairs)
        if self.training and self.sign_flips:
            shape = (int(batch.max()) + 1, self.eigenpairs)
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
    """The ``count`` eigenpairs of the Laplacian D - A of each graph with the smallest eigenvalues.

    The sign of an eigenvector makes the sum of its cubed entries positive: relabelling nodes then
    changes no entry, unless that sum is zero. Returns for each node its entry of the eigenvectors
    and the eigenvalues, in double precision, and where its graph has no such pair (there both are
    0).
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
