r"""Interventions: what a network predicts once its massive activations are taken away.

The massive activations of the score are replaced in the forward pass by one of three rules, in
one layer or in several; which ones a later layer has depends on what was changed before it. Two
controls change as many activations that are not massive, on the same edges of the same layers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.utils import scatter

from mapkg import hooks
from mapkg.evaluation import batches, each_loss, pooled_mean, predict, targets
from mapkg.measures import MASSIVE_RATIO, activation_ratio, is_massive

Rule = Callable[
    [Float[Tensor, "E D"], Float[Tensor, " D"], Float[Tensor, "E D"]], Float[Tensor, "E D"]
]
"""From scores, the mean of each channel, and factors, to what replaces the scores."""

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "channel mean": lambda score, mean, factor: mean.expand_as(score),
        "zero": lambda score, mean, factor: torch.zeros_like(score),
        "clip": lambda score, mean, factor: score * factor,
    }
)
"""What an activation is replaced by.

The mean of its channel over reference graphs; zero; or itself, scaled down to a magnitude of the
threshold times the median of its row.

:meta hide-value:
"""

CHANGED = ("massive", "random", "largest non-massive")
"""Which activations are changed, the massive ones and those of two controls.

An edge with n massive activations has n others changed: drawn at random, or those of the largest
magnitude, which are still smaller than the massive ones. Where massive ones are clipped, that is
multiplied by a factor below 1, the controls are multiplied by the same factors, those of their
edge, in the order of the channels.
"""


def intervene(
    model: nn.Module,
    graphs: Sequence[Data],
    *,
    reference: Sequence[Data],
    layers: str | Iterable[str] = "layers.*.score",
    threshold: float = MASSIVE_RATIO,
    rules: Iterable[str] = tuple(RULES),
    loss: str = "l1",
    seed: int = 0,
    batch_size: int = 128,
) -> pd.DataFrame:
    """Predictions with and without the massive activations of a network, in evaluation mode.

    In a GraphTransformer the score feeds the attention and the edge stream, and both are given
    the changed one; the two cannot be told apart here.

    Args:
        model: a trained network; it is left as it is.
        graphs: whole graphs with targets, to predict.
        reference: the graphs over whose edges the mean of a channel is taken, in the network
            as it is; usually those it was trained on.
        layers: which scores are changed, all in one pass: names or patterns of submodules that
            return [E, D].
        threshold: ratio above which an activation is massive, at least 1.
        rules: names of ``RULES``.
        loss: ``"l1"`` or ``"bce"``, as for ``evaluation.losses``.
        seed: of the random control; every rule sees the same draws.
        batch_size: graphs per forward pass. Only the draws depend on it.

    Returns:
        A row per rule, what is changed (``CHANGED``), graph and target. Columns are
        ``layers``,
        ``threshold``, ``rule``, ``what``, ``graph``, ``target`` (its number), ``activations``
        (of the graph in these layers), ``changed`` (how many of them), ``before`` and ``after``
        (predictions, logits for ``"bce"``), ``loss_before`` and ``loss_after`` (NaN where
        unlabelled).

    Raises:
        KeyError: if a layer is unknown.
        ValueError: if a rule is unknown, the threshold is below 1, the reference has no edge,
            or an output has not a row of channels per edge.
    """
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    rules = tuple(rules)
    if unknown := [rule for rule in rules if rule not in RULES]:
        raise ValueError(f"rules: expected some of {', '.join(RULES)}, got {unknown[0]!r}")
    if not threshold >= 1:
        # From 1 on at most half of a row is massive, so that the controls find enough others.
        raise ValueError(f"threshold: expected a ratio of at least 1, got {threshold!r}")
    names = list(hooks.resolve(model, layers))
    with hooks.evaluating(model):
        means = channel_means(model, reference, names, batch_size=batch_size)
        tables = [
            _one_rule(model, batches(graphs, batch_size), means, rule, threshold, loss, seed)
            for rule in rules
        ]
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "layers", ", ".join(layers))
    table.insert(1, "threshold", float(threshold))
    return table


def channel_means(
    model: nn.Module, graphs: Sequence[Data], names: Iterable[str], *, batch_size: int = 128
) -> dict[str, Float[Tensor, " D"]]:
    """The signed mean of each channel over all edges, in evaluation mode.

    Args:
        model: a network.
        graphs: whole graphs.
        names: submodules that return [E, D], names or patterns.
        batch_size: graphs per forward pass.

    Raises:
        ValueError: if there is no edge.
    """
    rows, sums = 0, {}
    for batch, seen in hooks.scan(model, batches(graphs, batch_size), names, forward=predict):
        rows += batch.num_edges
        for name, score in seen.items():
            sums[name] = sums.get(name, 0) + score.double().sum(dim=0)
    if rows == 0:
        raise ValueError("expected reference graphs with edges, whose scores have a mean, got none")
    return {name: total / rows for name, total in sums.items()}


def summarise_interventions(
    table: pd.DataFrame, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Means over graphs of what ``intervene`` found, with bootstrap intervals.

    Graphs are drawn with replacement, each with all its targets, before and after together.

    Args:
        table: as ``intervene`` returns it; several of them joined may be given, if they differ
            in layers or threshold, or in further columns that are dropped before.
        resamples: number of bootstrap samples.
        confidence: of the intervals, in (0, 1).
        seed: of the bootstrap.

    Returns:
        A row per layers, threshold, rule and what is changed. Columns are
        ``graphs``; ``changed``, the
        number of changed activations, and ``share`` of all; ``loss_before`` and ``loss_after``,
        means over labelled targets; ``loss_change``, their difference, and ``shift``, the mean
        magnitude of the change of a prediction, each with ``_low`` and ``_high``.

    Raises:
        ValueError: if there are fewer than two graphs.
    """
    rows = []
    keys = ["layers", "threshold", "rule", "what"]
    table = table.assign(
        labelled=table["loss_before"].notna().astype(int),
        loss_change=table["loss_after"] - table["loss_before"],
        shift=(table["after"] - table["before"]).abs(),
        predictions=1,
    )
    for key, part in table.groupby(keys, sort=False):
        by_graph = part.groupby("graph")
        sums = by_graph[
            ["loss_before", "loss_after", "loss_change", "shift", "labelled", "predictions"]
        ].sum()
        if len(sums) < 2:
            raise ValueError(f"expected two graphs or more, to draw from, got {len(sums)}")
        counts = by_graph[["changed", "activations"]].first().sum()
        row = dict(zip(keys, key, strict=True)) | {
            "graphs": len(sums),
            "changed": int(counts["changed"]),
            "share": counts["changed"] / counts["activations"],
        }
        labelled = sums["labelled"].sum()
        row |= {name: sums[name].sum() / labelled for name in ("loss_before", "loss_after")}
        for name, number in (("loss_change", "labelled"), ("shift", "predictions")):
            pairs = sums[name].to_numpy(), sums[number].to_numpy()
            mean = pooled_mean(*pairs, resamples=resamples, confidence=confidence, seed=seed)
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), mean, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass
class _Intervention:
    """Changes the scores of one batch: first the massive ones, then as many for each control.

    Attributes:
        rule: name of one of ``RULES``.
        threshold: ratio above which an activation is massive.
        means: of the channels of each score that is changed.
        num_edges: of the batch.
        generator: draws the random control.
        number: how many massive activations of each edge were changed, [E] by score.
        factor: what clipping multiplies each of them by, edge by edge, by score.
        changed: how many activations of each edge the last pass changed, by score.
    """

    rule: str
    threshold: float
    means: Mapping[str, Float[Tensor, " D"]]
    num_edges: int
    generator: torch.Generator
    number: dict[str, Int[Tensor, " E"]] = field(default_factory=dict)
    factor: dict[str, Float[Tensor, " massive"]] = field(default_factory=dict)
    changed: dict[str, Int[Tensor, " E"]] = field(default_factory=dict)

    def predict(self, model: nn.Module, batch: Any, what: str) -> Float[Tensor, "graphs targets"]:
        edits = {name: partial(self._change, name, what) for name in self.means}
        with hooks.edit(model, edits):
            return predict(model, batch)

    def _change(self, name: str, what: str, score: Tensor) -> Tensor:
        if score.dim() != 2 or len(score) != self.num_edges:
            raise ValueError(
                f"{name}: expected a row of channels per edge, [{self.num_edges}, D], got "
                f"{list(score.shape)}; name the score of a layer"
            )
        ratio = activation_ratio(score)
        chosen = massive = is_massive(ratio, self.threshold)
        if what == "massive":
            factor = self.threshold / ratio
            self.number[name], self.factor[name] = massive.sum(dim=1), factor[massive]
        else:
            size = score.abs() if what == "largest non-massive" else self._draw(score)
            chosen = _largest(size.masked_fill(massive, -1), self.number[name])
            factor = torch.ones_like(score).masked_scatter(chosen, self.factor[name])
        self.changed[name] = chosen.sum(dim=1)
        replacement = RULES[self.rule](score, self.means[name].to(score), factor)
        return torch.where(chosen, replacement, score)

    def _draw(self, score: Tensor) -> Tensor:
        # Drawn where the generator is, so that a seed means the same on every device.
        return torch.rand(score.shape, generator=self.generator).to(score)


def _largest(size: Float[Tensor, "E D"], number: Int[Tensor, " E"]) -> Bool[Tensor, "E D"]:
    """Which entries of each row are among its so many largest ones."""
    chosen = torch.zeros_like(size, dtype=torch.bool)
    some = number > 0  # few rows; sorting takes most of the time
    rank = size[some].argsort(dim=1, descending=True).argsort(dim=1)
    chosen[some] = rank < number[some].unsqueeze(1)
    return chosen


@torch.no_grad()
def _one_rule(
    model: nn.Module,
    loader: Iterable[Any],
    means: Mapping[str, Float[Tensor, " D"]],
    rule: str,
    threshold: float,
    loss: str,
    seed: int,
) -> pd.DataFrame:
    """The rows of one rule, from batches of graphs."""
    generator = torch.Generator().manual_seed(seed)
    tables, first = [], 0
    for batch, seen in hooks.scan(model, loader, "", forward=predict):
        before, target = seen[""], targets(batch)
        intervention = _Intervention(rule, threshold, means, batch.num_edges, generator)
        graph_of_edge = batch.batch[batch.edge_index[0]]
        edges = graph_of_edge.bincount(minlength=batch.num_graphs)
        for what in CHANGED:
            after = intervention.predict(model, batch, what)
            changed = torch.stack(list(intervention.changed.values())).sum(dim=0)
            changed = scatter(changed, graph_of_edge, dim_size=batch.num_graphs)
            columns = {
                "graph": torch.arange(batch.num_graphs).unsqueeze(1) + first,
                "target": torch.arange(target.size(1)),
                "activations": (edges * sum(map(len, means.values()))).unsqueeze(1),
                "changed": changed.unsqueeze(1),
                "before": before,
                "after": after,
                "loss_before": each_loss(before, target, loss),
                "loss_after": each_loss(after, target, loss),
            }
            flat = {
                name: value.cpu().expand(target.shape).flatten().numpy()
                for name, value in columns.items()
            }
            tables.append(pd.DataFrame({"rule": rule, "what": what, **flat}))
        first += batch.num_graphs
    return pd.concat(tables, ignore_index=True)
