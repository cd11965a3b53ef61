"""Errors that smooth on their way back: the vanilla network, and what training makes of it.

The experiments: K1, features forward; K2, errors backward; K3, training the last layer alone; K4,
training all layers.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn
from tqdm import tqdm

from mapkg.oversmoothing import smoothing_by_layer
from studies.data.networks import RegularTask, regular_task
from studies.figures import layer_colors, over_seeds, whole_ticks

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "linear": nn.Identity}
GAINS = {"relu": math.sqrt(2), "tanh": 1.0, "linear": 1.0}
"""Gains of orthogonal weights that keep the size of features, by activation."""


class VanillaNetwork(nn.Module):
    r"""L layers that average and mix, without biases, norms or residual connections.

    .. math:: H^{(k)} = P X^{(k)} W^{(k)}, \qquad X^{(k+1)} = \rho(H^{(k)})

    for k from 0 to L - 1, and the output :math:`P X^{(L)} W^{(L)}`. Hooks find H at the L + 1
    ``layers``, the last of which gives the output, and X at the L ``activations``.

    Args:
        operator: P; None means the identity, a multilayer perceptron for each node.
        sizes: channels of the input, of every hidden layer, and of the output.
        activation: one of ``ACTIVATIONS``.

    Source: backward-oversmoothing paper, vanilla GNN; without a graph its counter-example.
    """

    def __init__(
        self, operator: Float[Tensor, "N N"] | None, sizes: Sequence[int], activation: str
    ) -> None:
        super().__init__()
        self.register_buffer("operator", operator, persistent=False)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        self.activations = nn.ModuleList(ACTIVATIONS[activation]() for _ in sizes[2:])

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N out"]:
        """Predictions of every node."""
        return self.trace(x)[1]

    def trace(self, x: Float[Tensor, "N D"]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """H and X of every hidden layer, and the output."""
        states = []
        for layer, activation in zip(self.layers, self.activations, strict=False):
            h = layer(self.average(x))
            x = activation(h)
            states.append((h, x))
        return states, self.layers[-1](self.average(x))

    def average(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """P x."""
        return x if self.operator is None else self.operator @ x


@dataclass(frozen=True, kw_only=True)
class Vanilla:
    """Hyper-parameters of a ``VanillaNetwork``, without the number of layers.

    Attributes:
        activation: one of ``ACTIVATIONS``.
        hidden_channels: width of every hidden layer.
        gain: of the weights; None means that of ``GAINS``.
        draw: of the initial weights, ``"orthogonal"`` (rectangular ones have orthonormal rows or
            columns) or ``"normal"`` with variance gain^2 over the number of inputs.
        is_graph: whether it averages over neighbors; without, it is a multilayer perceptron.
    """

    activation: str = "relu"
    hidden_channels: int = 64
    gain: float | None = None
    draw: str = "orthogonal"
    is_graph: bool = True

    def build(self, task: RegularTask, num_layers: int, seed: int) -> VanillaNetwork:
        """The untrained network of a seed, in double precision."""
        gain = GAINS[self.activation] if self.gain is None else self.gain
        sizes = [task.x.size(1), *[self.hidden_channels] * num_layers, 1]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            operator = task.operator if self.is_graph else None
            network = VanillaNetwork(operator, sizes, self.activation)
            for layer in network.layers:
                if self.draw == "orthogonal":
                    nn.init.orthogonal_(layer.weight, gain)
                else:
                    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
        return network.double()


def squared_loss(prediction: Tensor, task: RegularTask) -> Float[Tensor, ""]:
    """Half the mean squared error over all nodes."""
    return 0.5 * (prediction - task.y).square().mean()


def smoothing(
    variant: Vanilla,
    *,
    num_layers: int = 30,
    seeds: Sequence[int] = (0, 1, 2),
    degree: int = 20,
    num_nodes: int = 200,
) -> pd.DataFrame:
    """K1 and K2: smoothness of features and errors by layer, at initialization.

    Args:
        variant: the network.
        num_layers: L.
        seeds: of graph, data and weights.
        degree, num_nodes: of the regular graph.

    Returns:
        The rows of ``oversmoothing.smoothing_by_layer`` with ``seed`` and ``limit_error``, see
        ``linear_limit_errors``. Row k has the features :math:`X^{(k+1)}` that layer k gives and the
        errors at its :math:`H^{(k)}`.

    Source: backward-oversmoothing paper; settings ours.
    """
    parts = []
    for seed in seeds:
        task = regular_task(num_nodes, degree, seed=seed)
        network = variant.build(task, num_layers, seed)
        table = smoothing_by_layer(
            network,
            lambda n=network, t=task: squared_loss(n(t.x), t),
            "activations.*",
            "layers.*",
        )
        limit = linear_limit_errors(network, task)
        parts.append(table.assign(seed=seed, limit_error=limit))
    return pd.concat(parts, ignore_index=True)


def shrinkage(table: pd.DataFrame, first: int = 5) -> pd.Series:
    """By how much the relative spread of features shrinks from layer to layer, for each seed.

    Fitted to the logarithm from layer ``first`` on, since theory speaks of many layers.
    """
    rows = table[(table["layer"] >= first) & (table["features"] > 0)]
    return pd.Series(
        {
            seed: math.exp(np.polyfit(of_seed["layer"], np.log(of_seed["features"]), 1)[0])
            for seed, of_seed in rows.groupby("seed")
        }
    )


def layer_matrices(
    variant: Vanilla, layers: Sequence[int], *, num_layers: int = 30, seed: int = 0
) -> dict[str, dict[int, Float[Tensor, "N D"]]]:
    """``features`` and ``errors`` of all nodes in some layers, divided by their largest entry."""
    task = regular_task(seed=seed)
    states, output = variant.build(task, num_layers, seed).trace(task.x)
    errors = torch.autograd.grad(squared_loss(output, task), [h for h, _ in states])
    features = [x.detach() for _, x in states]
    return {
        name: {k: matrices[k] / matrices[k].abs().max() for k in layers}
        for name, matrices in (("features", features), ("errors", errors))
    }


def linear_limit_errors(network: VanillaNetwork, task: RegularTask) -> list[float]:
    r"""How far errors are from what linear averaging of their mean gives, by layer.

    .. math:: \frac{\lVert B^{(k)} - 1 b^{(k)\top} \rVert}{\lVert B^{(k)} \rVert}, \qquad
        b^{(L)} = \bar B^{(L)}, \quad
        b^{(k)} = \bar\rho'(H^{(k)}) \odot W^{(k+1)} b^{(k+1)},

    with means over nodes: the errors as they would be if activations were the same at all nodes,
    so that they smooth as in a linear network.
    """
    states, output = network.trace(task.x)
    inputs = [*(h for h, _ in states), output]
    errors = torch.autograd.grad(squared_loss(output, task), inputs, retain_graph=True)
    slopes = [
        torch.autograd.grad(x, h, torch.ones_like(x), retain_graph=True)[0].mean(dim=0)
        for h, x in states
    ]
    means = [errors[-1].mean(dim=0)]
    for layer, slope in zip(reversed(network.layers), reversed(slopes), strict=False):
        means.append(slope * (layer.weight.detach().t() @ means[-1]))
    pairs = zip(errors, reversed(means), strict=True)
    return [((error - mean).norm() / error.norm()).item() for error, mean in pairs]


def hidden_gradient(network: VanillaNetwork, task: RegularTask) -> float:
    r"""Norm of the gradient of all weights but the last layer's.

    .. math:: \Bigl(\sum_{k < L} \lVert \partial L / \partial W^{(k)} \rVert_F^2\Bigr)^{1/2}
    """
    weights = [layer.weight for layer in network.layers[:-1]]
    gradients = torch.autograd.grad(squared_loss(network(task.x), task), weights)
    return torch.stack([gradient.norm() for gradient in gradients]).norm().item()


@torch.no_grad()
def train_last_layer(network: VanillaNetwork, task: RegularTask, steps: int = 2000) -> None:
    """Gradient descent on the last layer alone, in place, at the largest step that descends.

    The step is one over the largest eigenvalue of the second derivative. Solving the least squares
    outright would use directions of 1e-12, with huge weights.

    Source: backward-oversmoothing paper, stationary points.
    """
    z = network.average(network.trace(task.x)[0][-1][1])
    curvature = z.t() @ z / len(z)
    pull = z.t() @ task.y / len(z)
    rate = 1 / torch.linalg.matrix_norm(curvature, ord=2)
    weight = network.layers[-1].weight.t().clone()
    for _ in range(steps):
        weight -= rate * (curvature @ weight - pull)
    network.layers[-1].weight.copy_(weight.t())


def last_layer_study(
    variants: Mapping[str, Vanilla],
    *,
    depths: Sequence[int] = (2, 4, 8, 16, 32),
    seeds: Sequence[int] = (0, 1, 2),
    progress: bool = True,
) -> pd.DataFrame:
    """K3: what is left of the gradient of hidden layers once the last layer is trained.

    Returns:
        A row per variant, depth and seed. ``before`` and ``after`` are the norms of
        ``hidden_gradient``; ``loss`` after; and ``constant_loss``, that of the best constant.

    Source: backward-oversmoothing paper, spurious stationary points; settings ours.
    """
    rows = []
    for row, task, network in _networks(variants, depths, seeds, progress):
        row["before"] = hidden_gradient(network, task)
        train_last_layer(network, task)
        row["after"] = hidden_gradient(network, task)
        row["loss"] = squared_loss(network(task.x), task).item()
        rows.append(row | {"constant_loss": task.constant_loss})
    return pd.DataFrame(rows)


def last_layer_table(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over seeds: gradients, what is left of them, and the loss over the constant's."""
    shares = table.assign(
        left=table["after"] / table["before"], share=table["loss"] / table["constant_loss"]
    )
    columns = ["before", "after", "left", "share"]
    return shares.groupby(["variant", "num_layers"], sort=False)[columns].median()


OPTIMIZERS = {
    "gradient descent": lambda weights: torch.optim.SGD(weights, lr=0.05),
    "Adam": lambda weights: torch.optim.Adam(weights, lr=3e-3),
}
"""Of ``full_training``, by name."""


def full_training(
    variants: Mapping[str, Vanilla],
    *,
    depths: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 1000,
    optimizer: str = "gradient descent",
    every: int = 10,
    progress: bool = True,
) -> pd.DataFrame:
    """K4: losses of whole networks in training, by one of ``OPTIMIZERS``.

    Returns:
        A row per variant, depth, seed and ``step``, every so many and the last, with ``loss``
        before the step, ``gradient``, the norm of ``hidden_gradient``, and ``constant_loss``.

    Source: backward-oversmoothing paper, training of deep networks; settings ours.
    """
    rows = []
    for about, task, network in _networks(variants, depths, seeds, progress):
        weights = [layer.weight for layer in network.layers]
        descent = OPTIMIZERS[optimizer](weights)
        for step in range(steps + 1):
            loss = squared_loss(network(task.x), task)
            descent.zero_grad()
            loss.backward()
            if step % every == 0 or step == steps:
                norms = [weight.grad.norm() for weight in weights[:-1]]
                row = {**about, "step": step, "loss": loss.item()}
                row |= {"gradient": torch.stack(norms).norm().item()}
                rows.append(row | {"constant_loss": task.constant_loss})
            descent.step()
    return pd.DataFrame(rows)


def training_table(table: pd.DataFrame, quantity: str = "share") -> pd.DataFrame:
    """How trainings ended, medians over seeds: ``gradient``, or the loss over the constant's."""
    last = table[table["step"] == table["step"].max()]
    last = last.assign(share=last["loss"] / last["constant_loss"])
    index = ["optimiser", "variant"]  # as the tracked table calls it
    return last.pivot_table(quantity, index, "num_layers", aggfunc="median", sort=False)


def _networks(
    variants: Mapping[str, Vanilla], depths: Sequence[int], seeds: Sequence[int], progress: bool
) -> Iterator[tuple[dict[str, Any], RegularTask, VanillaNetwork]]:
    """What a row says of each network, its data, and the untrained network."""
    cases = list(product(variants.items(), depths, seeds))
    bar = tqdm(cases, "networks", file=sys.stderr, disable=not progress)
    for (name, variant), depth, seed in bar:
        task = regular_task(seed=seed)
        about = {"variant": name, "num_layers": depth, "seed": seed}
        yield about, task, variant.build(task, depth, seed)


def spread_by_layer(spreads: Mapping[str, pd.DataFrame]) -> sns.FacetGrid:
    """Relative spreads of features and errors by layer, a line per network, but those of zero."""
    table = pd.concat({name: table.reset_index() for name, table in spreads.items()}, names=["of"])
    titles = {"features": "features, forward", "errors": "errors, backward"}
    long = table.rename(columns=titles).melt(
        ["layer", "seed"], list(titles.values()), ignore_index=False
    )
    grid = over_seeds(
        long[long["value"] > 0].reset_index(),
        **dict(x="layer", y="value", color="of", panel="variable", log="y", marker=None),
        labels={"value": "relative spread over nodes"},
        size=(4.2, 3.2),
    )
    whole_ticks(grid)
    return grid


def collapse(matrices: Mapping[str, Mapping[int, Tensor]], *, nodes: int = 40) -> Figure:
    """Matrices of ``layer_matrices`` as pictures; once all nodes are alike they are striped."""
    rows, columns = len(matrices), len(next(iter(matrices.values())))
    size = dict(figsize=(0.8 + 1.35 * columns, 0.5 + 1.35 * rows))
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", **size)
    look = dict(cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="none")
    for row, (kind, by_layer) in zip(axes, matrices.items(), strict=True):
        for ax, (layer, matrix) in zip(row, by_layer.items(), strict=True):
            ax.imshow(matrix[:nodes].numpy(), **look)
            ax.set(xticks=[], yticks=[], title=f"layer {layer}" if ax in axes[0] else "")
        row[0].set_ylabel(kind)
    return figure


def last_layer_gradients(table: pd.DataFrame) -> sns.FacetGrid:
    """The gradient of hidden layers before and after the last layer is trained, by depth."""
    long = table.melt(["variant", "num_layers", "seed"], ["before", "after"])
    grid = over_seeds(
        long,
        **dict(x="num_layers", y="value", color="variable", panel="variant", log="xy"),
        labels={"num_layers": "hidden layers", "value": "gradient of hidden layers"},
        palette={"before": "#8D99AE", "after": "#E76F51"},
        size=(2.4, 2.8),
    )
    depths = sorted(table["num_layers"].unique())
    for ax in grid.axes.flat:
        ax.set_xticks(depths, [str(depth) for depth in depths])
        ax.minorticks_off()
    return grid


def losses_in_training(table: pd.DataFrame, *, bottom: float = 1e-3) -> sns.FacetGrid:
    """Training loss over that of the best constant, by step, cut below ``bottom``."""
    grid = over_seeds(
        table.assign(share=table["loss"] / table["constant_loss"]),
        **dict(x="step", y="share", color="num_layers", panel="variant", log="y", marker=None),
        labels={"share": "loss over that of a constant"},
        palette=layer_colors(table["num_layers"]),
        size=(2.6, 2.8),
    )
    grid.legend.set_title("hidden layers")
    grid.refline(y=1, color="black", lw=0.8, ls=":")
    grid.set(ylim=(max(grid.axes.flat[0].get_ylim()[0], bottom), None))
    for ax in grid.axes.flat:
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    return grid
