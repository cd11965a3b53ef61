r"""Gradient-ascent noise on the embedded nodes and edges of a frozen network.

To the embeddings of nodes and edges is added

.. math:: \delta(n) = \sigma \, \frac{n}{\mathrm{std}(n)} ,

with the standard deviation over all entries of n. The noise n starts standard normal, the *random*
noise, and is then *optimized* by gradient ascent on the mean loss.

The published noise is not centered: nothing bounds its mean, since a constant n has no standard
deviation. ``centered=True`` takes the mean away first, and the worst case is bounded.

Source: massive-activations paper, its adversarial framework (published code of GT on TOX21).
differs: noise for every batch, where the published one has the size of the last one; noise on
some edges alone; a rate that falls when the loss no longer grows by 1e-4 of itself (in the
published code torch's schedule is given the negative loss and never lowers the rate).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch_geometric.data import Data
from tqdm import tqdm

from mapkg import hooks
from mapkg.calling import call_on_copy
from mapkg.evaluation import batches, check_targets, losses, measure, targets
from mapkg.measures import MASSIVE_RATIO, activation_ratio, is_massive
from mapkg.models.network import SCORES

SIGMAS = (0.01, 10**-1.5, 0.1)
"""The published standard deviations."""

EMBEDDINGS = ("node_embedding", "edge_embedding")
"""What the noise is added to."""

MASKED = ("edges", "channels", "largest")
"""The choices of ``where_massive``."""

Mask = Callable[[Any], Float[Tensor, "rows _"]]
"""From a batch to 1 where an embedding is disturbed and 0 elsewhere, [rows, D] or [rows, 1]."""

Predict = Callable[[int, Any], Tensor]
"""From the number of a batch and the batch to predictions."""


class TooFewEntries(ValueError):
    """Noise is to act on fewer than two entries, which have no standard deviation."""


@dataclass(frozen=True)
class Ascent:
    """How noise is optimized.

    By at most so many ``passes`` over the graphs with Adam, whose rate ``lr`` is halved after
    ``patience`` passes without a better mean loss; below ``min_lr`` it ends.

    Source: massive-activations paper, published code; all values are the published ones.
    """

    lr: float = 7e-4
    passes: int = 1000
    patience: int = 15
    min_lr: float = 1e-6

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (0 < value < math.inf or (name == "patience" and value == 0)):
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")


def scaled(
    noise: Float[Tensor, "rows D"],
    sigma: float,
    *,
    centered: bool = False,
    mask: Float[Tensor, "rows _"] | None = None,
) -> Float[Tensor, "rows D"]:
    """Noise of standard deviation sigma, over the entries where the mask is 1 (None: all).

    ``centered`` takes their mean away. Raises ``TooFewEntries`` if there are fewer than two.
    """
    inside = torch.ones_like(noise) if mask is None else mask.expand_as(noise)
    inside = inside.to(noise.device, torch.bool)
    chosen = noise[inside]
    if len(chosen) < 2:
        raise TooFewEntries(
            f"expected two entries or more to disturb, got {len(chosen)}; widen the mask"
        )
    if centered:
        chosen = chosen - chosen.mean()
    return torch.zeros_like(noise).masked_scatter(inside, sigma * chosen / chosen.std())


def attack(
    model: nn.Module,
    graphs: Sequence[Data],
    sigmas: Iterable[float] = SIGMAS,
    *,
    loss: str = "l1",
    restarts: Sequence[int] = (0, 1, 2),
    shared: bool = False,
    relative: bool = False,
    centered: bool = False,
    masks: Mapping[str, Mask] | None = None,
    ascent: Ascent = Ascent(),
    batch_size: int = 128,
    progress: bool = True,
) -> pd.DataFrame:
    """What noise on the embeddings does to a network in evaluation mode, random and optimized.

    Args:
        model: with submodules ``node_embedding`` and ``edge_embedding``; it is left as it was.
        graphs: whole graphs with targets.
        sigmas: standard deviations of what is added, above 0.
        loss: what is ascended, ``"l1"`` or ``"bce"``.
        restarts: seeds of the noise; the optimization starts anew from each.
        shared: one vector of noise for all nodes and one for all edges.
        relative: sigma is in units of the standard deviation of the embedding that is disturbed.
        centered: what is added has the mean 0.
        masks: for some of ``EMBEDDINGS``, where they are disturbed, see ``where_massive``; the
            others are left alone. None disturbs both everywhere. Not for shared noise.
        ascent: how noise is optimized.
        batch_size: graphs per forward pass.
        progress: whether to show a progress bar on stderr.

    Returns:
        A row per ``sigma``, ``restart`` and ``noise`` (``"none"``, ``"random"``, ``"optimised"``),
        with ``loss``, the metrics of ``evaluation.measure``, ``gain``, the optimized loss over the
        random one less 1, ``passes`` of the optimization, and the number of ``disturbed`` entries.

    Raises ``ValueError`` if there is no graph, a target is missing or (with ``"l1"``) not finite, a
    sigma is not above 0, or noise is shared and masked; ``TooFewEntries`` if a mask leaves fewer
    than two entries in a batch that has rows of the embedding.
    """
    sigmas = tuple(sigmas)
    for name, values in {"graphs": graphs, "sigmas": sigmas, "restarts": restarts}.items():
        if len(values) == 0:
            raise ValueError(f"{name}: expected at least one, got none")
    check_targets(graphs, loss)
    for sigma in sigmas:
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma: expected a standard deviation above 0, got {sigma!r}")
    if shared and masks is not None:
        raise ValueError("masks: expected none with shared noise, which is alike for all rows")
    device = next((parameter.device for parameter in model.parameters()), "cpu")
    every = [(batch, targets(batch)) for batch in batches(graphs, batch_size, device)]
    names, rows = EMBEDDINGS if masks is None else tuple(masks), []
    with hooks.evaluating(model):
        embedded = [seen for _, seen in hooks.scan(model, [b for b, _ in every], names)]
        places = [{n: mask(batch) for n, mask in (masks or {}).items()} for batch, _ in every]
        disturbed = sum(
            int(place[name].expand_as(x).count_nonzero()) if name in place else x.numel()
            for place, seen in zip(places, embedded, strict=True)
            for name, x in seen.items()
        )
        if not any(len(x) for seen in embedded for x in seen.values()):
            raise TooFewEntries("expected two entries or more to disturb, got none in any graph")
        units = dict.fromkeys(names, 1.0)
        if relative:
            joined = {n: torch.cat([seen[n].flatten() for seen in embedded]) for n in names}
            units = {name: x.std().item() for name, x in joined.items()}
        clean = _scores(lambda _, batch: call_on_copy(model, batch), every, loss)
        pairs = [*product(sigmas, restarts)]
        for sigma, restart in tqdm(pairs, "attacks", disable=not progress):
            generator = torch.Generator().manual_seed(restart)
            noise = {
                name: [
                    torch.randn(1 if shared else len(x), x.size(1), generator=generator).to(x)
                    for x in (seen[name] for seen in embedded[: 1 if shared else None])
                ]
                for name in names
            }
            parameters = [values.requires_grad_() for values in chain(*noise.values())]

            def add(number, name, x, noise=noise, sigma=sigma):
                if not len(x):  # a batch without edges
                    return x
                values, mask = noise[name][0 if shared else number], places[number].get(name)
                return x + scaled(values, sigma * units[name], centered=centered, mask=mask)

            def disturb(number, batch, add=add):
                edits = {name: partial(add, number, name) for name in names}
                with hooks.edit(model, edits):
                    return call_on_copy(model, batch)

            random = _scores(disturb, every, loss)
            taken = _ascend(disturb, parameters, every, loss, ascent)
            optimised = _scores(disturb, every, loss)
            start, rest = {"sigma": sigma, "restart": restart}, {"disturbed": disturbed}
            gained = {"gain": optimised["loss"] / random["loss"] - 1, "passes": taken}
            none = {"gain": math.nan, "passes": 0}
            rows += [
                start | {"noise": "none"} | clean | none | rest,
                start | {"noise": "random"} | random | none | rest,
                start | {"noise": "optimised"} | optimised | gained | rest,
            ]
    return pd.DataFrame(rows)


def where_massive(
    model: nn.Module, by: str = "edges", *, threshold: float = MASSIVE_RATIO, control: bool = False
) -> Mask:
    """Where edge embeddings are disturbed: at what is massive by the row ratio.

    Args:
        model: the network as it is.
        by: ``"edges"``, all channels of edges with a massive activation; ``"channels"``, the
            massive channels of each edge, in one layer or more; ``"largest"``, the channel of
            each edge with the largest score in the first layer, which the published attack
            computes and never uses.
        threshold: ratio above which an activation is massive, above 0.
        control: as many others instead, drawn at random: other edges of the batch, or other
            channels of the same edges. Where there are fewer others, the mask has only as many of
            the chosen, drawn at random, so that it and its control are of equal size.

    Raises ``ValueError`` if there is no such choice, or the threshold is not above 0.
    """
    if by not in MASKED:
        raise ValueError(f"by: expected one of {MASKED}, got {by!r}")
    if not threshold > 0:
        raise ValueError(f"threshold: expected a ratio above 0, got {threshold!r}")
    generator = torch.Generator().manual_seed(0)

    def mask(batch: Any) -> Tensor:
        ((_, seen),) = hooks.scan(model, [batch], SCORES)
        scores = list(seen.values())
        if by == "largest":
            largest = scores[0].abs().argmax(dim=1)
            chosen = nn.functional.one_hot(largest, scores[0].size(1)).bool()
        else:
            massive = [is_massive(activation_ratio(score), threshold) for score in scores]
            chosen = torch.stack(massive).any(dim=0)
        if by == "edges":
            chosen = chosen.any(dim=1).unsqueeze(0)  # one row, of edges
        pool = ~chosen if control else chosen
        number = torch.minimum(chosen.sum(1, keepdim=True), (~chosen).sum(1, keepdim=True))
        order = torch.rand(chosen.shape, generator=generator).to(scores[0])
        rank = order.masked_fill(~pool, 2).argsort(dim=1).argsort(dim=1)
        chosen = (rank < number) & pool
        return (chosen.t() if by == "edges" else chosen).to(scores[0])

    return mask


def _scores(forward: Predict, every: Sequence[tuple[Any, Tensor]], loss: str) -> dict[str, float]:
    with torch.no_grad():
        predicted = [forward(number, batch) for number, (batch, _) in enumerate(every)]
    metrics = measure(torch.cat(predicted), torch.cat([target for _, target in every]), loss)
    return {"loss": metrics["mae" if loss == "l1" else loss], **metrics}


def _ascend(
    forward: Predict,
    noise: Sequence[Tensor],
    every: Sequence[tuple[Any, Tensor]],
    loss: str,
    ascent: Ascent,
) -> int:
    """Optimize the noise in place; returns the number of passes."""
    optimizer = torch.optim.Adam(noise, lr=ascent.lr)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", factor=0.5, patience=ascent.patience
    )
    for taken in range(1, ascent.passes + 1):
        total, number_of_losses = 0.0, 0
        for number, (batch, target) in enumerate(every):
            each = losses(forward(number, batch), target, loss)
            if not each.requires_grad:  # nothing is disturbed in this batch
                continue
            gradients = torch.autograd.grad(-each.mean(), noise, allow_unused=True)
            for values, gradient in zip(noise, gradients, strict=True):
                values.grad = gradient  # None for the noise of other batches
            optimizer.step()
            total += each.sum().item()
            number_of_losses += each.numel()
        schedule.step(total / number_of_losses)
        if optimizer.param_groups[0]["lr"] < ascent.min_lr:
            return taken
    return ascent.passes
