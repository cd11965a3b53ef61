"""What graphs, the nodes of a graph, and trees differ in when a network is trained on them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.utils import index_to_mask

from mapkg.evaluation import batches, evaluate, losses, predict, targets
from mapkg.hooks import evaluating
from mapkg.models.config import Config
from studies.data import SPLITS, NodesOfGraph, Splits, Trees
from studies.data.networks import level_order
from studies.published import Schedule

COLUMNS = ("epochs", "lr", "weight_decay", "lr_factor", "lr_patience", "min_lr")
"""What tables of nodes say of a schedule."""

TREES = Schedule(
    **dict(epochs=500, batch_size=1024, lr=1e-3, weight_decay=0.0, min_lr=0.0),
    **dict(block=10, lr_factor=0.5, lr_patience=10, patience=20),
)
"""The published schedule but for its length, up to 50,000 epochs in blocks of 100, with batches of
64 up to depth 3. Progress is a gain in ``train_accuracy`` while training."""


@dataclass
class Task:
    """What is trained on; graphs, nodes and trees differ in nothing else."""

    splits: Splits
    checked: ClassVar[tuple[str, ...]] = ("train",)  # splits that must not be empty
    adam: ClassVar[dict[str, Any]] = {}  # settings of the optimizer
    plateau: ClassVar[dict[str, Any]] = {}  # and of the scheduler
    may_diverge: ClassVar[bool] = True  # a loss that is not finite ends a run, or is an error
    solved: ClassVar[float] = -math.inf  # nothing is left to learn at this value of ``score``

    def faults(self, others: Sequence[str] = ()) -> Iterator[str]:
        """Why the splits cannot be trained on; ``others`` are used besides ``checked`` ones."""
        for name in (*self.checked, *others):
            part = getattr(self.splits, name)
            if not hasattr(part, "__len__") or isinstance(part, Data):
                yield (
                    f"{name}: expected a list of graphs, which is read again in each epoch, got "
                    f"{type(part).__name__}; pass a list of it"
                )
            if len(part) == 0:
                yield f"the {name} split is empty; training needs at least one example"

    def to(self, device: torch.device) -> "Task":
        """The task with its data on a device."""
        return self

    def steps(self, model: nn.Module, schedule: Schedule, seed: int) -> Iterator[tuple]:
        """Of each batch of an epoch the mean loss, number of targets, sums to be averaged."""
        raise NotImplementedError

    def validate(self, model: nn.Module, schedule: Schedule) -> dict[str, float]:
        """Further values of the history."""
        return {}

    def score(self, row: dict[str, float | int]) -> float | None:
        """The value of a row of the history that is to fall; None leaves the rate as it is."""
        return row.get("val_loss")

    def settings(self, schedule: Schedule, model: nn.Module) -> dict[str, Any]:
        """What makes a run another one, but for its length and its seed."""
        settings = asdict(schedule) | {"network": repr(model)}
        return {k: v for k, v in settings.items() if k not in ("epochs", "max_hours")}


@dataclass
class GraphTask(Task):
    """Graphs by the loss of a configuration; an epoch's order and dropout depend on its seed alone.

    Source: massive-activations paper, training script of its code.
    """

    config: Config
    checked: ClassVar = ("train", "val")
    adam: ClassVar = dict(fused=True)
    may_diverge: ClassVar = False

    def faults(self, others=()):
        yield from super().faults(others)
        for name in (*self.checked, *others):
            for place, graph in enumerate(getattr(self.splits, name)):
                for fault in _faults_of_graph(graph, self.splits.train[0], self.config):
                    yield f"{name} graph {place}: {fault}"

    def steps(self, model, schedule, seed):
        """Shuffled batches; one without a label teaches nothing."""
        torch.manual_seed(seed)
        device = next(model.parameters()).device
        for batch in batches(self.splits.train, schedule.batch_size, device, shuffle=True):
            values = losses(predict(model, batch), targets(batch), self.config.loss)
            if values.numel():
                yield values.mean(), values.numel(), {}

    def validate(self, model, schedule):
        loss, size = self.config.loss, schedule.batch_size
        return {"val_loss": evaluate(model, self.splits.val, loss=loss, batch_size=size)}

    def settings(self, schedule, model):
        values = asdict(schedule)
        settings = {name: values.get(name, old) for name, old in self.config.to_dict().items()}
        return {k: v for k, v in settings.items() if k not in ("max_epochs", "max_hours")}


def _faults_of_graph(graph: Any, first: Data, config: Config) -> Iterator[str]:
    if not isinstance(graph, Data):
        yield f"expected PyG Data, got {type(graph).__name__}"
    yield from _faults_of_ends(graph)
    yield from _faults_of_values("x", graph.x, graph.num_nodes, config.num_node_types)
    yield from _faults_of_values(
        "edge_attr", graph.edge_attr, graph.num_edges, config.num_edge_types
    )
    y, rows = graph.y, graph.num_nodes if config.readout is None else 1
    shape = (rows, config.out_channels)
    if y is None:
        yield f"no target y, of shape {list(shape)}"
    if not isinstance(y, Tensor) or y.shape != shape or not y.is_floating_point():
        advice = "; a row for each node, since readout is None" if config.readout is None else ""
        if isinstance(y, Tensor) and not y.is_floating_point():
            advice = "; convert with .float()"
        yield f"y: expected floats of shape {list(shape)}, got {_look(y)}{advice}"
    if config.loss == "l1" and not y.float().isfinite().all():
        yield f"y: expected finite targets, got {y.flatten().tolist()}"
    for name in ("x", "edge_attr"):
        found, expected = (
            None if tensor is None else f"{tensor.dtype} of shape {['rows', *tensor.shape[1:]]}"
            for tensor in (getattr(graph, name), getattr(first, name))
        )
        if found != expected:
            yield f"{name}: expected {expected} as in the first graph, got {found}"


def _faults_of_ends(graph: Data) -> Iterator[str]:
    ends, last = graph.edge_index, graph.num_nodes - 1
    if ends is None or ends.dtype != torch.long or ends.dim() != 2 or len(ends) != 2:
        yield f"edge_index: expected int64 of shape [2, edges], got {_look(ends)}"
    if ends.numel() and not 0 <= ends.min() <= ends.max() <= last:
        yield f"edge_index: expected nodes from 0 to {last}, got {ends.min()} to {ends.max()}"


def _faults_of_values(
    name: str, values: Tensor | None, rows: int, types: int | tuple[int, ...] | None = None
) -> Iterator[str]:
    """Of features of nodes or edges, type ids or floats; None are no features."""
    if values is None or not values.numel():
        return
    if len(values) != rows:
        yield f"{name}: expected a row for each of {rows}, got {len(values)}"
    if values.is_floating_point():
        if not values.isfinite().all():
            yield f"{name}: expected finite values, got {values}"
        return
    sizes, ids = types if isinstance(types, tuple) else (types,), values.reshape(rows, -1)
    if types is not None and ids.size(1) != len(sizes):
        yield f"{name}: expected {len(sizes)} ids per row, got {ids.size(1)}"
    least, most = ids.amin(dim=0).tolist(), ids.amax(dim=0).tolist()
    if min(least) < 0 or (types is not None and any(map(int.__ge__, most, sizes))):
        yield f"{name}: expected ids from 0, fewer than {list(sizes)}, got {least} to {most}"


def _look(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "none" if value is None else type(value).__name__
    return f"{value.dtype} of shape {list(value.shape)}"


@dataclass
class NodeTask(Task):
    """Classes of nodes; the loss of an epoch is that before its step, the rate falls with val_loss.

    A run ends with a loss that is not finite; such a network predicts the first class everywhere.

    Source: LipschitzNorm paper, training scripts of its code.
    """

    evaluate: bool = True  # or the learning rate stays

    def faults(self, others=()):
        yield from super().faults(others)
        graph, classes = self._graph, self.splits.description.num_targets
        y, number = graph.y, graph.num_nodes
        yield from _faults_of_ends(graph)
        yield from _faults_of_values("x", graph.x, number)
        if y is None or y.dtype != torch.long or y.shape != (number,):
            yield f"y: expected a class for each node, int64 of shape [{number}], got {_look(y)}"
        if not 0 <= y.min() <= y.max() < classes:
            yield f"y: expected classes from 0 to {classes - 1}, got {y.min()} to {y.max()}"
        for name in SPLITS:
            nodes = getattr(self.splits, name).nodes
            if len(nodes) and not 0 <= nodes.min() <= nodes.max() < number:
                yield f"{name}: expected nodes from 0 to {number - 1}, got up to {nodes.max()}"

    def to(self, device):
        return replace(self, splits=_with_graph(self.splits, self._graph.clone().to(device)))

    def steps(self, model, schedule, seed):
        yield self._loss(model(self._graph.x, self._graph.edge_index), "train"), 1, {}

    @torch.no_grad()
    def validate(self, model, schedule):
        if not self.evaluate:
            return {}
        with evaluating(model):
            scores = model(self._graph.x, self._graph.edge_index)
        right = scores.nan_to_num().argmax(dim=1) == self._graph.y
        row = {"val_loss": self._loss(scores, "val").item()}
        for name in ("val", "test"):
            nodes = getattr(self.splits, name).nodes
            row[f"{name}_accuracy"] = right[nodes].double().mean().item()
        return row

    @property
    def _graph(self) -> Any:
        return self.splits.train.graph

    def _loss(self, scores: Tensor, name: str) -> Tensor:
        nodes = getattr(self.splits, name).nodes
        return nn.functional.cross_entropy(scores[nodes], self._graph.y[nodes])


def hide_features(splits: Splits, rate: float, seed: int = 0) -> Splits:
    """The same graph with features of zero at a share of the nodes outside the training set.

    Source: PairNorm paper, missing features.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a share in [0, 1], got {rate}")
    graph = splits.train.graph.clone()
    others = (~index_to_mask(splits.train.nodes, graph.num_nodes)).nonzero().flatten()
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    graph.x = graph.x.clone()
    graph.x[others[order[: round(rate * len(others))]]] = 0
    title = f"{splits.description.title}, {rate:.0%} missing"
    hidden = _with_graph(splits, graph)
    return replace(hidden, description=replace(splits.description, title=title))


def _with_graph(splits: Splits, graph: Any) -> Splits:
    return replace(splits, **{n: NodesOfGraph(graph, getattr(splits, n).nodes) for n in SPLITS})


@dataclass
class TreeTask(Task):
    """Trees, until a block of epochs is without an error.

    ``"shuffled"`` batches are of examples, as published. ``"grouped"`` ones are of permutations
    with all their keys, so that a batch has few different trees.

    Source: Tree-NeighborsMatch, published code ``experiment.py``.
    """

    sampling: str = "grouped"
    plateau: ClassVar = dict(threshold_mode="abs")
    solved: ClassVar = -1.0

    def __post_init__(self):
        if self.sampling not in (names := ("grouped", "shuffled")):
            raise ValueError(f"sampling: expected one of {names}, got {self.sampling!r}")
        self.train, self.test = Examples(self.splits.train), Examples(self.splits.test)

    def steps(self, model, schedule, seed):
        for chosen in self.train.batches(schedule.batch_size, self.sampling):
            scores, y = self.train.scores(model, chosen), self.train.y[chosen]
            right = int((scores.argmax(dim=1) == y).sum())
            yield nn.functional.cross_entropy(scores, y), len(y), {"train_accuracy": right}

    def score(self, row):
        """The accuracy while training is to rise."""
        return -row["train_accuracy"]

    def settings(self, schedule, model):
        return super().settings(schedule, model) | {"sampling": self.sampling}

    def accuracies(self, model: nn.Module) -> dict[str, float]:
        """Of the network as it is, no longer changing."""
        parts = {"train": self.train, "test": self.test}
        return {f"{name}_accuracy": part.accuracy(model) for name, part in parts.items()}


class Examples:
    """Trees with their classes ``y``: ``pairs`` in level order, ``group``, the permutation."""

    def __init__(self, trees: Trees):
        if not isinstance(trees, Trees):
            raise ValueError(
                f"splits: expected Trees, as load('trees-4') gives them, got {type(trees).__name__}"
            )
        depth = trees.pairs.size(1).bit_length() - 1
        self.pairs, self.y = trees.pairs[:, level_order(depth)], trees.y
        self.group = self.pairs[:, -(2**depth) :, 1].unique(dim=0, return_inverse=True)[1]

    def batches(self, batch_size: int | None, sampling: str) -> Iterator[Tensor]:
        """Places of the examples of each batch of one epoch, drawn from torch's generator."""
        order = torch.randperm(len(self.y))
        if sampling == "grouped":
            rank = torch.randperm(int(self.group.max()) + 1)
            order = order[rank[self.group[order]].argsort(stable=True)]
        yield from order.split(batch_size or len(order))

    def scores(self, network: nn.Module, chosen: Tensor) -> Tensor:
        """Scores of the classes of some examples; trees of one permutation are passed once."""
        if self.pairs.size(1) != network.num_nodes:
            raise ValueError(
                f"splits: expected trees of the network's depth {network.depth}, with "
                f"{network.num_nodes} nodes, got {self.pairs.size(1)} nodes"
            )
        if not network.can_share:
            return network.dense(self.pairs[chosen])
        groups, tree = self.group[chosen].unique(return_inverse=True)
        first = torch.empty_like(groups).scatter_(0, tree, chosen)  # any example of each
        return network.shared(self.pairs[first], self.pairs[chosen, 0, 0], tree)

    @torch.no_grad()
    def accuracy(self, network: nn.Module) -> float:
        """Share of right answers; NaN without examples."""
        if not len(self.y):
            return float("nan")
        with evaluating(network):
            places = torch.arange(len(self.y)).split(1024)
            right = [self.scores(network, p).argmax(dim=1) == self.y[p] for p in places]
        return torch.cat(right).double().mean().item()
