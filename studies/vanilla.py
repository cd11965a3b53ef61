"""The plain network that the theory of smoothing is about, and the same without a graph."""

import math
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "linear": nn.Identity}
"""Between layers, by the name of ``VanillaNetwork``."""

DRAWS = ("orthogonal", "normal")
"""How initial weights are drawn."""


class VanillaNetwork(nn.Module):
    r"""L layers that average and mix, without biases, norms or residuals.

    .. math:: H^{(k)} = P X^{(k)} W^{(k)}, \qquad X^{(k+1)} = \rho(H^{(k)})

    for k from 0 to L - 1, and the output :math:`P X^{(L)} W^{(L)}`. Seed torch before to fix the
    initial weights: ``"orthogonal"`` ones times the gain (rectangular ones have orthonormal rows
    or columns), or ``"normal"`` ones with variance gain^2 over the number of inputs.

    Args:
        operator: P, shape [N, N]; None means the identity, a multilayer perceptron for each node.
        num_layers: L, the hidden layers, 1 or more.
        in_channels, out_channels: of a node.
        hidden_channels: width of every hidden layer.
        activation: one of ``ACTIVATIONS``.
        gain: of the weights.
        draw: one of ``DRAWS``.

    Attributes:
        layers: the L + 1 linear maps, whose outputs are H; the last gives the output.
        activations: L of them, whose outputs are X.

    Raises:
        ValueError: if a name is unknown or a size below 1.

    Source: backward-oversmoothing paper, vanilla GNN; without a graph its counter-example.
    """

    def __init__(
        self,
        operator: Float[Tensor, "N N"] | None,
        num_layers: int,
        *,
        in_channels: int,
        out_channels: int = 1,
        hidden_channels: int = 32,
        activation: str = "relu",
        gain: float = math.sqrt(2),
        draw: str = "orthogonal",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation: expected one of {known}, got {activation!r}")
        if draw not in DRAWS:
            raise ValueError(f"draw: expected one of {DRAWS}, got {draw!r}")
        for name, value in (("num_layers", num_layers), ("hidden_channels", hidden_channels)):
            if value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        self.register_buffer("operator", operator, persistent=False)
        sizes = [in_channels, *[hidden_channels] * num_layers, out_channels]
        self.layers = nn.ModuleList(
            nn.Linear(before, after, bias=False) for before, after in pairwise(sizes)
        )
        self.activations = nn.ModuleList(ACTIVATIONS[activation]() for _ in range(num_layers))
        for layer in self.layers:
            if draw == "orthogonal":
                nn.init.orthogonal_(layer.weight, gain)
            else:
                nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N out"]:
        """Predictions of every node."""
        for layer, activation in zip(self.layers, self.activations, strict=False):
            x = activation(layer(self.average(x)))
        return self.layers[-1](self.average(x))

    def average(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """P x."""
        return x if self.operator is None else self.operator @ x
