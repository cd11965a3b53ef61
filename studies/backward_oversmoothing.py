"""Errors that smooth on their way back: the vanilla network, and what training makes of it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise, product
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from mapkg.oversmoothing import smoothing_by_layer
from studies import tables
from studies.data.networks import RegularTask, regular_task, task_on
from studies.figures import layer_colors, over_seeds, whole_ticks

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "linear": nn.Identity}
GAINS = {"relu": math.sqrt(2), "tanh": 1.0, "linear": 1.0}
"""Gains of orthogonal weights that keep the size of features, by activation."""

Settings = Mapping[str, Any]
"""Keyword arguments of a ``VanillaNetwork``, and the ``family`` of its graph, if not regular."""


class VanillaNetwork(nn.Module):
    r"""L layers that average and mix, without biases, norms or residual connections.

    .. math:: H^{(k)} = P X^{(k)} W^{(k)}, \qquad X^{(k+1)} = \rho(H^{(k)})

    for k from 0 to L - 1, and the output :math:`P X^{(L)} W^{(L)}`, in double precision. Hooks find
    H at the L + 1 ``layers``, the last of which gives the output, and X at the L ``activations``.
    Weights are drawn ``"orthogonal"`` (rectangular ones have orthonormal rows or columns) or
    ``"normal"`` with variance gain^2 over the number of inputs. If it is no graph, P is the
    identity, and the network a multilayer perceptron for each node.

    Source: backward-oversmoothing paper, vanilla GNN; without a graph its counter-example.
    """

    def __init__(
        self,
        task: RegularTask,
        num_layers: int,
        seed: int,
        *,
        activation: str = "relu",
        hidden_channels: int = 64,
        gain: float | None = None,
        draw: str = "orthogonal",
        is_graph: bool = True,
    ) -> None:
        super().__init__()
        self.register_buffer("operator", task.operator if is_graph else None, persistent=False)
        gain = GAINS[activation] if gain is None else gain
        sizes = [task.x.size(1), *[hidden_channels] * num_layers, 1]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
            for layer in self.layers:
                if draw == "orthogonal":
                    nn.init.orthogonal_(layer.weight, gain)
                else:
                    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
        self.activations = nn.ModuleList(ACTIVATIONS[activation]() for _ in sizes[2:])
        self.double()

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


def squared_loss(prediction: Tensor, task: RegularTask) -> Float[Tensor, ""]:
    """Half the mean squared error over all nodes."""
    return 0.5 * (prediction - task.y).square().mean()


def irregular_task(num_nodes: int = 200, degree: int = 20, *, seed: int = 0) -> RegularTask:
    """As ``regular_task``, on a connected random graph of that average degree.

    Metropolis weights, 1 / (1 + the larger degree) for an edge, keep P symmetric and doubly
    stochastic. Source: ours.
    """
    graph = nx.gnp_random_graph(num_nodes, degree / (num_nodes - 1), seed=seed)
    if not nx.is_connected(graph):
        raise ValueError(f"the graph of seed {seed} is not connected; take another seed")
    adjacency = torch.from_numpy(nx.to_numpy_array(graph))
    degrees = adjacency.sum(dim=0)
    operator = adjacency / (1 + torch.maximum(degrees, degrees[:, None]))
    operator += torch.diag(1 - operator.sum(dim=0))
    return task_on(operator, seed=seed)


FAMILIES = {"regular": regular_task, "irregular": irregular_task}
"""Graphs on which features that are all alike stay so."""


def smoothing(
    *,
    num_layers: int,
    seeds: Sequence[int],
    degree: int = 20,
    family: str = "regular",
    **settings: Any,
) -> pd.DataFrame:
    """K1 and K2: smoothness of features and errors by layer, at initialization.

    Row k has the features :math:`X^{(k+1)}` that layer k gives and the errors at its
    :math:`H^{(k)}`. Source: backward-oversmoothing paper; settings ours.
    """
    parts = []
    for seed in seeds:
        task = FAMILIES[family](degree=degree, seed=seed)
        network = VanillaNetwork(task, num_layers, seed, **settings)
        loss = partial(lambda n, t: squared_loss(n(t.x), t), network, task)
        table = smoothing_by_layer(network, loss, "activations.*", "layers.*")
        parts.append(table.assign(seed=seed, limit_error=linear_limit_errors(network, task)))
    return pd.concat(parts, ignore_index=True)


def shrinkage(table: pd.DataFrame, first: int = 5) -> pd.Series:
    """By how much the spread of features shrinks from layer to layer, a fit for each seed.

    What is below 1e-12 is rounding.
    """
    rows = table[(table["layer"] >= first) & (table["features"] > 1e-12)].groupby("seed")
    fits = {seed: np.polyfit(of["layer"], np.log(of["features"]), 1) for seed, of in rows}
    return np.exp(pd.DataFrame(fits).loc[0])


def linear_limit_errors(network: VanillaNetwork, task: RegularTask) -> list[float]:
    r"""How far errors are from what linear averaging of their mean gives, by layer.

    .. math:: \frac{\lVert B^{(k)} - 1 b^{(k)\top} \rVert}{\lVert B^{(k)} \rVert}, \qquad
        b^{(L)} = \bar B^{(L)}, \quad
        b^{(k)} = \bar\rho'(H^{(k)}) \odot W^{(k+1)} b^{(k+1)},

    with means over nodes: the errors if activations were the same at all nodes.
    """
    states, output = network.trace(task.x)
    inputs = [*(h for h, _ in states), output]
    errors = torch.autograd.grad(squared_loss(output, task), inputs, retain_graph=True)
    mean = errors[-1].mean(dim=0)
    found = [(errors[-1] - mean).norm() / errors[-1].norm()]
    backward = zip(network.layers[:0:-1], states[::-1], errors[-2::-1], strict=True)
    for layer, (h, x), error in backward:
        (slope,) = torch.autograd.grad(x, h, torch.ones_like(x), retain_graph=True)
        mean = slope.mean(dim=0) * (layer.weight.detach().t() @ mean)
        found.append((error - mean).norm() / error.norm())
    return torch.stack(found[::-1]).tolist()


def hidden_gradient(network: VanillaNetwork, task: RegularTask) -> float:
    """Norm of the gradient of all weights but the last layer's."""
    weights = [layer.weight for layer in network.layers[:-1]]
    gradients = torch.autograd.grad(squared_loss(network(task.x), task), weights)
    return nn.utils.get_total_norm(gradients).item()


@torch.no_grad()
def train_last_layer(network: VanillaNetwork, task: RegularTask, steps: int = 2000) -> None:
    """Gradient descent on the last layer alone, in place, at the largest step that descends.

    Solving the least squares outright would use directions of 1e-12, with huge weights.

    Source: backward-oversmoothing paper, stationary points.
    """
    z = network.average(network.trace(task.x)[0][-1][1])
    curvature, pull = z.t() @ z / len(z), z.t() @ task.y / len(z)
    rate = 1 / torch.linalg.matrix_norm(curvature, ord=2)
    weight = network.layers[-1].weight.t().clone()
    for _ in range(steps):
        weight -= rate * (curvature @ weight - pull)
    network.layers[-1].weight.copy_(weight.t())


def _networks(
    variants: Mapping[str, Settings], depths: Sequence[int], seeds: Sequence[int], progress: bool
) -> Iterator[tuple[dict[str, Any], RegularTask, VanillaNetwork]]:
    """What a row says of each network, its data, and the untrained network."""
    cases = list(product(variants.items(), depths, seeds))
    bar = tqdm(cases, "networks", disable=not progress)
    for (name, settings), depth, seed in bar:
        task = FAMILIES[settings.get("family", "regular")](seed=seed)
        own = {key: value for key, value in settings.items() if key != "family"}
        about = {"variant": name, "num_layers": depth, "seed": seed}
        yield about, task, VanillaNetwork(task, depth, seed, **own)


def last_layer_study(
    variants: Mapping[str, Settings],
    *,
    depths: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
    progress: bool = True,
) -> pd.DataFrame:
    """K3: what is left of the gradient of hidden layers once the last layer is trained.

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
    left, share = table["after"] / table["before"], table["loss"] / table["constant_loss"]
    by_network = table.assign(left=left, share=share).groupby(["variant", "num_layers"], sort=False)
    return by_network[["before", "after", "left", "share"]].median()


OPTIMIZERS = {
    "gradient descent": lambda weights: torch.optim.SGD(weights, lr=0.05),
    "Adam": lambda weights: torch.optim.Adam(weights, lr=3e-3),
}
"""Of ``full_training``, by name."""


def full_training(
    variants: Mapping[str, Settings],
    *,
    depths: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    optimizer: str = "gradient descent",
    progress: bool = True,
) -> pd.DataFrame:
    """K4: losses and hidden gradients of whole networks before every tenth step, and the last.

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
            if step % 10 == 0 or step == steps:
                hidden = nn.utils.get_total_norm([weight.grad for weight in weights[:-1]])
                row = {**about, "step": step, "loss": loss.item(), "gradient": hidden.item()}
                rows.append(row | {"constant_loss": task.constant_loss})
            descent.step()
    return pd.DataFrame(rows)


def training_table(table: pd.DataFrame, quantity: str = "share") -> pd.DataFrame:
    """How trainings ended, medians over seeds: ``gradient``, or the loss over the constant's."""
    last = table[table["step"] == table["step"].max()]
    last = last.assign(share=last["loss"] / last["constant_loss"])
    index = ["optimiser", "variant"]  # as the tracked table calls it
    return last.pivot_table(quantity, index, "num_layers", aggfunc="median", sort=False)


def spread_by_layer(spreads: Mapping[str, pd.DataFrame]) -> sns.FacetGrid:
    """Relative spreads of features and errors by layer, a line per network, but those of zero."""
    table = pd.concat([table.assign(of=name) for name, table in spreads.items()])
    titles = {"features": "features, forward", "errors": "errors, backward"}
    long = table.rename(columns=titles).melt(["of", "layer", "seed"], list(titles.values()))
    grid = over_seeds(
        long[long["value"] > 0],
        **dict(x="layer", y="value", color="of", panel="variable", log="y", marker=None),
        labels={"value": "relative spread over nodes"},
        size=(4.2, 3.2),
    )
    whole_ticks(grid)
    return grid


def losses_in_training(table: pd.DataFrame) -> sns.FacetGrid:
    """Training loss over that of the best constant, by step, cut below a thousandth."""
    grid = over_seeds(
        table.assign(share=table["loss"] / table["constant_loss"]),
        **dict(x="step", y="share", color="num_layers", panel="variant", log="y", marker=None),
        labels={"share": "loss over that of a constant"},
        palette=layer_colors(table["num_layers"]),
        size=(2.6, 2.8),
    )
    grid.legend.set_title("hidden layers")
    grid.refline(y=1, color="black", lw=0.8, ls=":")
    return grid.set(ylim=(max(grid.axes.flat[0].get_ylim()[0], 1e-3), None))


def smoothing_table(smoothness: pd.DataFrame) -> pd.DataFrame:
    """Spread of features in the last layer, least of errors in any, and the gradient of all."""
    keys = ["dataset", "num_layers", "state", "variant", "seed"]
    by_network = smoothness.sort_values("layer", kind="stable").groupby(keys, sort=False)
    table = by_network.agg(
        features=("features", "last"),
        errors=("errors", "min"),
        rank=("errors_rank_one", "min"),
        gradient=("gradient", lambda norms: norms.pow(2).sum() ** 0.5),
        loss=("loss", "first"),
    )
    return table.rename(columns={"rank": "rank one"}).reset_index()


def remedy_table(smoothness: pd.DataFrame) -> pd.DataFrame:
    """``smoothing_table`` over seeds of one data set, from the least to the greatest."""
    networks = smoothing_table(smoothness)
    forms = dict(features=".2g", errors=".2g", gradient=".3g", loss=".3g") | {"rank one": ".2g"}
    look = dict(rows=["num_layers", "state", "variant"], statistic="range")
    names = ("features", "errors", "rank one", "gradient", "loss")
    parts = [tables.over_seeds(networks, name, form=forms[name], **look) for name in names]
    return pd.concat(parts, axis="columns")
