"""Interventions: what a network predicts once its massive activations are taken away.

Activations of the score that are massive by the row ratio are replaced in the forward pass by one
of three rules, in one layer or in several; which ones a later layer has depends on what was changed
before it. Two controls change as many other activations, on the same edges of the same layers.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, product

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.utils import scatter

from mapkg import hooks
from mapkg.calling import call_on_copy
from mapkg.evaluation import batches, check_targets, each_loss, pooled_mean, targets
from mapkg.measures import MASSIVE_RATIO, activation_ratio, is_massive

RULES = ("channel mean", "zero", "clip")
"""What replaces an activation, the mean of its channel over reference graphs, zero,
or itself, scaled down to a magnitude of the threshold times the median of its row."""

CHANGED = ("massive", "random", "largest non-massive")
"""Which activations are changed, the massive ones and those of two controls.

An edge with n massive activations has n others changed, drawn at random or the largest ones, and
clipped by the factors of the massive ones, in the order of the channels.
"""


@torch.no_grad()
def intervene(
    model: nn.Module,
    graphs: Sequence[Data],
    *,
    reference: Sequence[Data],
    layers: str | Iterable[str] = "layers.*.score",
    threshold: float = MASSIVE_RATIO,
    loss: str = "l1",
    seed: int = 0,
) -> pd.DataFrame:
    """Predictions with and without the massive activations of a network, in evaluation mode.

    In a GraphTransformer both the attention and the edge stream get the changed score.

    Args:
        model: a trained network; it is left as it is.
        graphs: whole graphs with targets, to predict.
        reference: graphs over whose edges the mean of a channel is taken, usually those of
            training.
        layers: names or patterns of the submodules that return scores [E, D], changed in one pass.
        threshold: ratio above which an activation is massive, at least 1.
        loss: ``"l1"`` or ``"bce"``, as for ``evaluation.losses``.
        seed: of the random control; every rule sees the same draws.

    Returns:
        A row per rule, what is changed (``CHANGED``), graph and target. Columns are ``layers``,
        ``threshold``, ``rule``, ``what``, ``graph``, ``target``, ``activations`` (of the graph in
        these layers), ``changed`` (how many of them), ``before`` and ``after`` (predictions,
        logits for ``"bce"``), ``loss_before`` and ``loss_after`` (NaN where unlabeled).

    Raises ``ValueError`` if the threshold is below 1, there is no graph, a target is missing or
    (with ``"l1"``) not finite, the reference has no edge, there is not one prediction per graph, or
    an output has not a row of channels per edge.
    """
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    if not threshold >= 1:
        # From 1 on at most half of a row is massive, so that the controls find enough others.
        raise ValueError(f"threshold: expected a ratio of at least 1, got {threshold!r}")
    check_targets(graphs, loss)
    means = channel_means(model, reference, list(hooks.resolve(model, layers)))
    # Drawn on the CPU, so that a seed means the same on every device.
    generator, first = torch.Generator().manual_seed(seed), 0
    tables: dict[str, list[pd.DataFrame]] = {rule: [] for rule in RULES}
    massive: dict[str, tuple[Tensor, Tensor]] = {}  # how many of each edge, and their factors
    for batch, seen in hooks.scan(model, batches(graphs, 128), ""):
        before, target = seen[""], targets(batch)
        if len(before) != batch.num_graphs:
            counts = f"one for each of {batch.num_graphs} graphs, got {len(before)}"
            raise ValueError(f"expected predictions of whole graphs, {counts}")
        graph_of_edge = batch.batch[batch.edge_index[0]]
        edges = graph_of_edge.bincount(minlength=batch.num_graphs)
        start = generator.get_state()
        for rule, what in product(RULES, CHANGED):
            generator.set_state(start)
            changed = torch.zeros_like(graph_of_edge)

            def change(name, score, rule=rule, what=what, batch=batch, changed=changed):
                if score.dim() != 2 or len(score) != batch.num_edges:
                    raise ValueError(
                        f"{name}: expected a row of channels per edge, [{batch.num_edges}, D], got "
                        f"{list(score.shape)}; name the score of a layer"
                    )
                ratio = activation_ratio(score)
                chosen, factor = is_massive(ratio, threshold), threshold / ratio
                draws = torch.rand(score.shape, generator=generator).to(score)
                if what == "massive":
                    massive[name] = chosen.sum(dim=1), factor[chosen]
                else:
                    size = draws if what == "random" else score.abs()
                    number, factors = massive[name]
                    chosen = _largest(size.masked_fill(chosen, -1), number)
                    factor = torch.ones_like(score).masked_scatter(chosen, factors)
                changed += chosen.sum(dim=1)
                new = {"channel mean": means[name].to(score), "zero": 0, "clip": score * factor}
                return torch.where(chosen, new[rule], score)

            edits = {name: partial(change, name) for name in means}
            with hooks.evaluating(model), hooks.edit(model, edits):
                after = call_on_copy(model, batch)
            columns = {
                "graph": torch.arange(batch.num_graphs).unsqueeze(1) + first,
                "target": torch.arange(target.size(1)),
                "activations": (edges * sum(map(len, means.values()))).unsqueeze(1),
                "changed": scatter(changed, graph_of_edge, dim_size=len(edges)).unsqueeze(1),
                **{"before": before, "after": after},
                "loss_before": each_loss(before, target, loss),
                "loss_after": each_loss(after, target, loss),
            }
            halves = {k: v for k, v in columns.items() if v.element_size() == 2}
            columns |= {k: v.float() for k, v in halves.items()}  # NumPy has no bfloat16
            flat = {k: v.cpu().expand(target.shape).flatten().numpy() for k, v in columns.items()}
            constant = {"layers": ", ".join(layers), "threshold": float(threshold)}
            tables[rule].append(pd.DataFrame(constant | {"rule": rule, "what": what} | flat))
        first += batch.num_graphs
    return pd.concat(chain.from_iterable(tables.values()), ignore_index=True)


def channel_means(
    model: nn.Module, graphs: Sequence[Data], names: Iterable[str]
) -> dict[str, Float[Tensor, " D"]]:
    """Signed means over all edges of what submodules return, in evaluation mode."""
    rows, sums = 0, {}
    for batch, seen in hooks.scan(model, batches(graphs, 128), names):
        rows += batch.num_edges
        for name, score in seen.items():
            sums[name] = sums.get(name, 0) + score.double().sum(dim=0)
    if rows == 0:
        raise ValueError("expected reference graphs with edges, whose scores have a mean, got none")
    return {name: total / rows for name, total in sums.items()}


def summarise_interventions(table: pd.DataFrame, *, resamples: int = 2000) -> pd.DataFrame:
    """Means over graphs of what ``intervene`` found, with 95 % bootstrap intervals.

    Graphs are drawn with replacement, each with all its targets, before and after together. Tables
    of ``intervene`` may be joined, if layers or thresholds differ.

    Returns:
        A row per layers, threshold, rule and what is changed. Columns are ``graphs``; ``changed``
        activations and their ``share`` of all; ``loss_before`` and ``loss_after``, means over
        labeled targets; ``loss_change``, their difference, and ``shift``, the mean magnitude of
        the change of a prediction, both with ``_low`` and ``_high``.

    Raises ``ValueError`` if fewer than two graphs are labeled.
    """
    keys = ["layers", "threshold", "rule", "what"]
    table = table.assign(
        labeled=table["loss_before"].notna() | table["before"].isna(),
        loss_change=table["loss_after"] - table["loss_before"],
        shift=(table["after"] - table["before"]).abs(),
        predictions=1,
    )
    rows = []
    for key, part in table.groupby(keys, sort=False):
        names = ["loss_before", "loss_after", "loss_change", "shift", "labeled", "predictions"]
        part = part.assign(**part[names[:3]].where(part["labeled"], 0))
        by_graph = part.groupby("graph")
        sums = by_graph[names].sum(skipna=False)
        counts = by_graph[["changed", "activations"]].first().sum()
        row = dict(zip(keys, key, strict=True)) | {"graphs": len(sums)}
        row |= {"changed": counts["changed"], "share": counts["changed"] / counts["activations"]}
        losses = sums[["loss_before", "loss_after"]].sum(skipna=False)
        row |= dict(losses / sums["labeled"].sum())
        for name, number in (("loss_change", "labeled"), ("shift", "predictions")):
            pairs = sums[name].to_numpy(), sums[number].to_numpy()
            mean = pooled_mean(*pairs, resamples=resamples)
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), mean, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def _largest(size: Float[Tensor, "E D"], number: Int[Tensor, " E"]) -> Bool[Tensor, "E D"]:
    """Mask of the ``number[i]`` largest entries of row i."""
    chosen = torch.zeros_like(size, dtype=torch.bool)
    some = number > 0  # few rows; sorting takes most of the time
    rank = size[some].argsort(dim=1, descending=True).argsort(dim=1)
    chosen[some] = rank < number[some].unsqueeze(1)
    return chosen
