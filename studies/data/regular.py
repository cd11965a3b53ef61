"""Random regular graphs with features and a target, for the theory of smoothing."""

from dataclasses import dataclass

import networkx as nx
import torch
from jaxtyping import Float
from torch import Tensor
from torch_geometric.utils import from_networkx, to_dense_adj


@dataclass(frozen=True, eq=False)
class RegularTask:
    """Regression on the nodes of one regular graph, in double precision.

    Attributes:
        operator: P = (A + I) / (degree + 1), symmetric and doubly stochastic, shape [N, N].
        x: standard normal features plus 0.5, shape [N, D].
        y: 0.3 plus tanh of a standardised projection of P x, shape [N, 1]: what one layer can
            learn.
    """

    operator: Float[Tensor, "N N"]
    x: Float[Tensor, "N D"]
    y: Float[Tensor, "N 1"]

    @property
    def constant_loss(self) -> float:
        """The least loss of a constant prediction, half the variance of the target."""
        return 0.5 * self.y.var(correction=0).item()


def regular_task(
    num_nodes: int = 200, degree: int = 20, *, channels: int = 16, seed: int = 0
) -> RegularTask:
    """A connected random regular graph with features [N, channels] and a target.

    Source: ours, after the backward-oversmoothing paper, whose settings are not known to us.
    """
    if not 3 <= degree < num_nodes or num_nodes * degree % 2:
        raise ValueError(
            f"expected a degree from 3 to {num_nodes - 1}, and an even number of nodes times "
            f"degree, got {num_nodes} nodes of degree {degree}"
        )
    graph = nx.random_regular_graph(degree, num_nodes, seed=seed)
    if not nx.is_connected(graph):
        raise ValueError(f"the graph of seed {seed} is not connected; take another seed")
    adjacency = to_dense_adj(from_networkx(graph).edge_index, max_num_nodes=num_nodes)[0].double()
    operator = (adjacency + torch.eye(num_nodes, dtype=torch.float64)) / (degree + 1)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_nodes, channels, generator=generator, dtype=torch.float64) + 0.5
    weights = torch.randn(channels, 1, generator=generator, dtype=torch.float64)
    seen = operator @ x @ weights
    y = 0.3 + ((seen - seen.mean()) / seen.std(correction=0)).tanh()
    return RegularTask(operator, x, y)
