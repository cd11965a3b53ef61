"""Errors that smooth on their way back: the vanilla network, and what training makes of it."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mapkg.oversmoothing import smoothing_by_layer
from studies.data.regular import RegularTask, regular_task
from studies.vanilla import VanillaNetwork

GAINS = {"relu": math.sqrt(2), "tanh": 1.0, "linear": 1.0}
"""Gains of orthogonal weights that keep the size of features, by activation."""


@dataclass(frozen=True, kw_only=True)
class Vanilla:
    """A vanilla network but for its depth.

    Attributes:
        activation, hidden_channels, gain, draw: as for ``models.vanilla.VanillaNetwork``; a gain
            of None means that of ``GAINS``.
        is_graph: whether it averages over neighbours; without, it is a multilayer perceptron.
    """

    activation: str = "relu"
    hidden_channels: int = 64
    gain: float | None = None
    draw: str = "orthogonal"
    is_graph: bool = True

    def build(self, task: RegularTask, num_layers: int, seed: int) -> VanillaNetwork:
        """The untrained network of a seed, in double precision.

        Args:
            task: gives the operator and the number of features.
            num_layers: L.
            seed: of the weights.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return VanillaNetwork(
                task.operator if self.is_graph else None,
                num_layers,
                in_channels=task.x.size(1),
                hidden_channels=self.hidden_channels,
                activation=self.activation,
                gain=GAINS[self.activation] if self.gain is None else self.gain,
                draw=self.draw,
            ).double()


def squared_loss(network: VanillaNetwork, task: RegularTask) -> Float[Tensor, ""]:
    """Half the mean squared error over all nodes."""
    return 0.5 * (network(task.x) - task.y).square().mean()


def smoothing(
    variant: Vanilla,
    *,
    num_layers: int = 30,
    seeds: Sequence[int] = (0, 1, 2),
    degree: int = 20,
    num_nodes: int = 200,
) -> pd.DataFrame:
    """Smoothness of features and errors by layer, at initialisation.

    Args:
        variant: the network.
        num_layers: L.
        seeds: of graph, data and weights.
        degree, num_nodes: of the regular graph.

    Returns:
        The rows of ``smoothing.smoothing_by_layer`` with ``seed`` and ``limit_error``, see
        ``linear_limit_errors``. Row k has the features :math:`X^{(k+1)}` that layer k gives and the
        errors at its :math:`H^{(k)}`.

    Source: backward-oversmoothing paper; settings ours.
    """
    tables = []
    for seed in seeds:
        task = regular_task(num_nodes, degree, seed=seed)
        network = variant.build(task, num_layers, seed)
        table = smoothing_by_layer(
            network, lambda n=network, t=task: squared_loss(n, t), "activations.*", "layers.*"
        )
        limit = linear_limit_errors(network, task)
        tables.append(table.assign(seed=seed, limit_error=limit))
    return pd.concat(tables, ignore_index=True)


def shrinkage(table: pd.DataFrame, first: int = 5) -> pd.Series:
    """By how much the relative spread of features shrinks from one layer to the next.

    Args:
        table: of ``smoothing``.
        first: layer from which on a line is fitted to the logarithm, since theory speaks of many.

    Returns:
        The factor, below 1 if features become alike, by seed.
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
    """Features and errors of all nodes in some layers, to be looked at.

    Args:
        variant: the network.
        layers: which, from 0 to L - 1.
        num_layers: L.
        seed: of graph, data and weights.

    Returns:
        ``features`` and ``errors``, from layer to a matrix with a row per node, each divided by its
        largest magnitude, since they differ by orders of magnitude.
    """
    task = regular_task(seed=seed)
    network = variant.build(task, num_layers, seed)
    outputs, activated = [], []
    x = task.x
    for layer, activation in zip(network.layers, network.activations, strict=False):
        outputs.append(layer(network.average(x)))
        x = activation(outputs[-1])
        activated.append(x)
    loss = 0.5 * (network.layers[-1](network.average(x)) - task.y).square().mean()
    errors = torch.autograd.grad(loss, outputs)
    return {
        "features": {k: activated[k].detach() / activated[k].detach().abs().max() for k in layers},
        "errors": {k: errors[k] / errors[k].abs().max() for k in layers},
    }


def linear_limit_errors(network: VanillaNetwork, task: RegularTask) -> list[float]:
    r"""How far errors are from what linear averaging of their mean gives, by layer.

    .. math:: \frac{\lVert B^{(k)} - 1 b^{(k)\top} \rVert}{\lVert B^{(k)} \rVert}, \qquad
        b^{(L)} = \bar B^{(L)}, \quad
        b^{(k)} = \bar\rho'(H^{(k)}) \odot W^{(k+1)} b^{(k+1)}

    with means over nodes: the errors as they would be if activations were the same at all nodes,
    so that they smooth as in a linear network.

    Args:
        network: a vanilla network.
        task: its data.
    """
    outputs = []
    x = task.x
    for layer, activation in zip(network.layers, network.activations, strict=False):
        h = layer(network.average(x))
        x = activation(h)
        outputs.append((h, x))
    last = network.layers[-1](network.average(x))
    loss = 0.5 * (last - task.y).square().mean()
    errors = torch.autograd.grad(loss, [*(h for h, _ in outputs), last], retain_graph=True)
    slopes = [
        torch.autograd.grad(x, h, torch.ones_like(x), retain_graph=True)[0].mean(dim=0)
        for h, x in outputs
    ]
    mean = errors[-1].mean(dim=0)
    found = [_apart(errors[-1], mean)]
    for layer, slope, error in zip(
        reversed(network.layers), reversed(slopes), reversed(errors[:-1]), strict=False
    ):
        mean = slope * (layer.weight.detach().t() @ mean)
        found.append(_apart(error, mean))
    return found[::-1]


def _apart(errors: Tensor, mean: Tensor) -> float:
    return ((errors - mean).norm() / errors.norm()).item()


def hidden_gradient(network: VanillaNetwork, task: RegularTask) -> float:
    r"""Norm of the gradient of all weights but the last layer's.

    .. math:: \Bigl(\sum_{k < L} \lVert \partial L / \partial W^{(k)} \rVert_F^2\Bigr)^{1/2}
    """
    weights = [layer.weight for layer in network.layers[:-1]]
    gradients = torch.autograd.grad(squared_loss(network, task), weights)
    return torch.stack([gradient.norm() for gradient in gradients]).norm().item()


@torch.no_grad()
def train_last_layer(network: VanillaNetwork, task: RegularTask, steps: int = 2000) -> None:
    """Gradient descent on the last layer alone, in place, at the largest step that descends.

    The step is one over the largest eigenvalue of the second derivative. Solving the least squares
    outright would use directions of 1e-12, with huge weights.

    Args:
        network: a vanilla network.
        task: its data.
        steps: of gradient descent.

    Source: backward-oversmoothing paper, stationary points.
    """
    x = task.x
    for layer, activation in zip(network.layers, network.activations, strict=False):
        x = activation(layer(network.average(x)))
    z = network.average(x)
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
    steps: int = 2000,
    progress: bool = True,
) -> pd.DataFrame:
    """What is left of the gradient of hidden layers once the last layer is trained.

    Args:
        variants: networks, by the name that the table gives them.
        depths: numbers of hidden layers.
        seeds: of graph, data and weights.
        steps: of gradient descent on the last layer.
        progress: whether to show a progress bar on stderr.

    Returns:
        A row per variant, depth and seed. ``before`` and ``after`` are the norms of
        ``hidden_gradient``; ``loss`` after; and ``constant_loss``, that of the best constant.

    Source: backward-oversmoothing paper, spurious stationary points; settings ours.
    """
    rows = []
    for about, task, network in _networks(variants, depths, seeds, progress):
        row = {**about, "before": hidden_gradient(network, task)}
        train_last_layer(network, task, steps)
        row["after"] = hidden_gradient(network, task)
        row |= {"loss": squared_loss(network, task).item(), "constant_loss": task.constant_loss}
        rows.append(row)
    return pd.DataFrame(rows)


def last_layer_table(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over seeds of what the training of the last layer leaves.

    Args:
        table: of ``last_layer_study``.

    Returns:
        A row per variant and depth with ``before``, ``after``, ``left``, the one over the other,
        and ``share``, the loss over that of the best constant.
    """
    shares = table.assign(
        left=table["after"] / table["before"], share=table["loss"] / table["constant_loss"]
    )
    columns = ["before", "after", "left", "share"]
    return shares.groupby(["variant", "num_layers"], sort=False)[columns].median()


OPTIMISERS = {
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
    optimiser: str = "gradient descent",
    every: int = 10,
    progress: bool = True,
) -> pd.DataFrame:
    """Losses of whole networks in training.

    Args:
        variants: networks, by the name that the table gives them.
        depths: numbers of hidden layers.
        seeds: of graph, data and weights.
        steps: of the whole data.
        optimiser: one of ``OPTIMISERS``.
        every: steps between two rows; the first and the last step are always there.
        progress: whether to show a progress bar on stderr.

    Returns:
        A row per variant, depth, seed and ``step``, with ``loss`` before the step, ``gradient``,
        the norm of ``hidden_gradient``, and ``constant_loss``.

    Raises:
        ValueError: if the optimiser is unknown.

    Source: backward-oversmoothing paper, training of deep networks; settings ours.
    """
    if optimiser not in OPTIMISERS:
        known = ", ".join(OPTIMISERS)
        raise ValueError(f"optimiser: expected one of {known}, got {optimiser!r}")
    rows = []
    for about, task, network in _networks(variants, depths, seeds, progress):
        weights = [layer.weight for layer in network.layers]
        steppable = OPTIMISERS[optimiser](weights)
        for step in range(steps + 1):
            loss = squared_loss(network, task)
            steppable.zero_grad()
            loss.backward()
            if step % every == 0 or step == steps:
                norms = [weight.grad.norm() for weight in weights[:-1]]
                row = {**about, "step": step, "loss": loss.item()}
                row |= {"gradient": torch.stack(norms).norm().item()}
                rows.append(row | {"constant_loss": task.constant_loss})
            steppable.step()
    return pd.DataFrame(rows)


def training_table(table: pd.DataFrame, quantity: str = "share") -> pd.DataFrame:
    """How trainings ended: medians over seeds, a row per optimiser and variant, a column per depth.

    Args:
        table: of ``full_training``, with ``optimiser``.
        quantity: ``share``, the last loss over that of the best constant, or ``gradient``, the
            last gradient of hidden layers.
    """
    last = table[table["step"] == table["step"].max()]
    last = last.assign(share=last["loss"] / last["constant_loss"])
    index = ["optimiser", "variant"]
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
