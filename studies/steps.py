"""The steps of many networks of one configuration: stacked as one, or else one by one."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.adam import adam as functional_adam
from torch_geometric.data import Data

from mapkg import hooks
from mapkg.all_measures import AllMeasures
from mapkg.models.network import CLAMPED, looked_at
from mapkg.models.pyg_layers import recorded_rows
from studies import stacked
from studies.stacked import Layout, assemble, losses, why_not_stackable

LARGE = 30_000
"""Edges of a batch times channels above which a CPU is faster with one network at a time."""

_BETAS, _EPS = (0.9, 0.999), 1e-8  # torch's defaults of Adam, as studies.train has them


class OneByOne(nn.Module):
    """S networks of any kind, which take and give rows as a stacked network does.

    Each sees its own graphs alone, without padding, and so do hooks.
    """

    def __init__(self, single: nn.Module, tensors: Mapping[str, Tensor], layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.each = nn.ModuleList(copy.deepcopy(single) for _ in range(layout.networks))
        for i, one in enumerate(self.each):
            own = {name: of_all[i] for name, of_all in tensors.items()}
            one.load_state_dict(one.state_dict() | own)

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, batch_size: int
    ) -> Float[Tensor, "rows targets"]:
        """Predictions of the networks of ``layout.turn``, 0 for padding."""
        turn, real = self.layout.turn, self.layout.graphs.sum(dim=1).tolist()
        nodes, edges = (mask.sum(dim=(1, 2)).long().tolist() for mask in self.layout.masks)
        x, edge_attr, batch = (t.unflatten(0, (len(turn), -1)) for t in (x, edge_attr, batch))
        edge_index, graphs = edge_index.unflatten(1, (len(turn), -1)), batch_size // len(turn)
        predicted = []
        for place, (number, n, e, g) in enumerate(zip(turn, nodes, edges, real, strict=True)):
            ends = edge_index[:, place, :e] - place * x.size(1)
            about = ends, edge_attr[place, :e], batch[place, :n] - place * graphs, g
            with self._drawing(number):
                own = self.each[number](x[place, :n], *about)
            rows, expected = (x.size(1), n) if self.layout.of_nodes else (graphs, g)
            stacked.check_rows(len(own), expected, self.layout.of_nodes)
            predicted.append(nn.functional.pad(own, (0, 0, 0, rows - len(own))))
        return torch.cat(predicted)

    @contextmanager
    def _drawing(self, number: int) -> Iterator[None]:
        """Draw dropout as a network does that is trained alone."""
        generators = self.layout.generators if self.training else None
        if generators is None:
            yield
            return
        torch.set_rng_state(generators[number].get_state())
        yield
        generators[number].set_state(torch.get_rng_state())


class Stack:
    """S networks on a device, their optimizer, and the steps that train and measure them.

    What a step needs and adds up has fixed addresses, so that a CUDA graph can hold it.
    """

    worth = 1.0  # it is made anew for the seeds that run when they are this share of it or less

    def __init__(self, single, tensors, data, config, shape):
        self.data, self.config, self.shape = data, config, shape
        self.device, self.dtype = data["train"].y.device, data["train"].y.dtype
        tensors = {name: tensor.to(self.device, copy=True) for name, tensor in tensors.items()}
        self.layout, self.names = Layout(len(next(iter(tensors.values())))), [*tensors]
        self.layout.of_nodes = config.readout is None
        is_large = self.device.type == "cpu" and shape[1] * config.hidden_channels > LARGE
        self.is_apart = is_large or bool(why_not_stackable(single))
        make = OneByOne if self.is_apart else stacked.stack_networks
        self.network = make(single.to(self.device), tensors, self.layout)
        self.parts = [*self.network.each] if self.is_apart else [self.network]
        self.networks, self.layers = self.layout.networks, self.parts[0].layers
        self.parameters = [[p for p in part.parameters() if p.requires_grad] for part in self.parts]
        rows = self.networks // len(self.parts)
        self.turns = [range(first, first + rows) for first in range(0, self.networks, rows)]
        flat = ([p.detach().reshape(rows, -1) for p in own] for own in self.parameters)
        self.weights = torch.cat([torch.cat(own, dim=1) for own in flat])
        for parameters, own in zip(self.parameters, self.weights.split(rows), strict=True):
            sizes = [parameter.numel() // rows for parameter in parameters]
            for parameter, values in zip(parameters, own.split(sizes, 1), strict=True):
                parameter.data = values.view(parameter.shape)
        self.first, self.second = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        zeros = dict(dtype=torch.double, device=self.device)
        self.steps, self.lr = (torch.zeros(self.networks, **zeros) for _ in range(2))
        self.sums = {split: torch.zeros(2, self.networks, **zeros) for split in data}
        self.cursor = torch.zeros(1, dtype=torch.long, device=self.device)
        heads = config.heads if config.architecture in CLAMPED else None
        self.looked_at = looked_at(config.architecture)
        about = dict(heads=heads, device=self.device)
        # Of each layer, for all networks at once or apart.
        self.measures = [[AllMeasures(rows, **about) for _ in self.parts] for _ in self.layers]
        self.update = adam

    def prepare(self, order: Int[Tensor, "S steps graphs"], fixed: Mapping[str, Tensor]) -> None:
        """Make the steps ready for batches of these sizes."""
        self.fixed = {split: ids.to(self.device) for split, ids in fixed.items()}
        self.order = order.to(self.device, copy=True)
        self.calls = self.all_steps()

    def all_steps(self) -> dict[str, Callable[[], None]]:
        """What is done with a batch, by what the batch is for."""
        steps = {name: partial(self._evaluate_step, name) for name in self.fixed}
        return {"train": self._train_step, **steps}

    def begin(self, name: str) -> None:
        """Go to the first batch, in the mode of a step."""
        self.cursor.zero_()
        self.network.train(name == "train")

    def train(self, order: Tensor, generators: list[torch.Generator]) -> None:
        """Train for an epoch on batches [S, steps, graphs]; generators draw exact dropout."""
        self.layout.generators = generators if self.device.type == "cpu" else None
        self.order.copy_(order)
        self.sums["train"].zero_()
        self.begin("train")
        for _ in range(order.size(1)):
            self.calls["train"]()

    def evaluate(self, name: str) -> None:
        """Evaluate on a split, and measure the scores of ``record``, the test split again."""
        for of_part in chain.from_iterable(self.measures) if name == "record" else ():
            of_part.reset()
        self.sums[name].zero_()
        self.begin(name)
        for _ in range(len(self.fixed[name])):
            self.calls[name]()

    def state(self) -> dict[str, Tensor]:
        """Weights and running statistics of all networks by their plain names, copied, [S, ...]."""
        found = [part.state_dict() for part in self.parts]
        if self.is_apart:
            return {name: torch.stack([one[name] for one in found]) for name in self.names}
        return {
            name.replace("parametrizations.", "").removesuffix(".original"): tensor.clone()
            for name, tensor in found[0].items()
        }

    def tables(self) -> list[Float[Tensor, "S columns"]]:
        """What was measured of each layer."""
        return [torch.cat([of_part.table() for of_part in parts]) for parts in self.measures]

    def gradient(self) -> tuple[Float[Tensor, "S P"], Float[Tensor, " S"], Int[Tensor, " S"]]:
        """Gradient of each network's mean loss; sum and number of the losses."""
        ids = self.order.index_select(1, self.cursor).squeeze(1)
        of_parts = []
        for parameters, turn in zip(self.parameters, self.turns, strict=True):
            batch = self._take("train", ids[turn.start : turn.stop], turn)
            of_parts.append(self._gradient(parameters, batch))
        return tuple(torch.cat(values) for values in zip(*of_parts, strict=True))

    def _gradient(self, parameters: list[nn.Parameter], batch: Data) -> tuple[Tensor, ...]:
        values, count = losses(self.network, batch, self.config.loss)
        total, decay = values.sum(dim=(1, 2)), self.config.weight_decay
        mean = (total / count.clamp(min=1)).sum()
        gradients = torch.autograd.grad(mean, parameters, allow_unused=True)
        parts = [  # torch's Adam does not decay a parameter without a gradient either
            torch.zeros_like(p) if g is None else g.add(p.detach(), alpha=decay) if decay else g
            for p, g in zip(parameters, gradients, strict=True)
        ]
        flat = torch.cat([part.reshape(len(count), -1) for part in parts], dim=1)
        return flat, total.detach(), count

    def _train_step(self) -> None:
        gradient, total, count = self.gradient()
        with torch.no_grad():
            active = (count > 0).double()  # a batch without a label teaches nothing
            moments = self.first, self.second, self.steps
            self.update(self.weights, gradient, *moments, self.lr, active)
            # The mean as torch has it, in the precision of the networks.
            mean = (total / count.clamp(min=1)).double()
            self.sums["train"] += torch.stack([mean * count, count.double()])
            self.cursor += 1

    @torch.no_grad()
    def _evaluate_step(self, split: str) -> None:
        ids = self.fixed[split].index_select(0, self.cursor).expand(self.networks, -1)
        batch = self._take(split, ids, range(self.networks))
        root, names = self.network, self.looked_at
        if self.is_apart:
            root, names = self.network.each, f"*.{names}"
        modules = hooks.resolve(root, names) if split == "record" else {}
        places = {name: divmod(i, len(self.layers)) for i, name in enumerate(modules)}
        if modules and len(modules) != len(self.parts) * len(self.layers):
            raise ValueError(
                f"{names}: expected one to be recorded in each of {len(self.layers)} layers, found "
                f"{len(modules) // len(self.parts)}; nothing is recorded with record_epochs=lambda "
                "epoch: False"
            )

        def measure(name: str, output: Any) -> None:
            part, layer = places[name]
            graph, mask = batch.edge_graph, batch.edge_mask.squeeze(-1)
            if self.is_apart:  # without padding, some with rows of nodes or with further edges
                nodes, edges = (int(of[0].sum()) for of in (batch.node_mask, mask))
                output = recorded_rows(modules[name], output, batch.batch[:nodes])
                if isinstance(modules[name], nn.MultiheadAttention):
                    graph = batch.batch[:nodes].unsqueeze(0)
                else:
                    output, graph = output[:edges], graph[:1, :edges]
                mask = None
            rows = output.unflatten(0, (len(self.turns[part]), -1))
            self.measures[layer][part].update(rows, graph, ids.size(1), mask)

        with hooks.record(root, [*modules], reduce=measure):
            values, count = losses(self.network, batch, self.config.loss)
        self.sums[split] += torch.stack([values.double().sum(dim=(1, 2)), count.double()])
        self.cursor += 1

    def _take(self, split: str, ids: Int[Tensor, "_ graphs"], turn: Sequence[int]) -> Data:
        data, shape = self.data[split], self.shape
        if not ids.is_cuda:  # a captured step needs one shape, another one no more than its own
            shape = stacked.padded(*(int(count.max()) for count in data.rows(ids)))
        batch = assemble(data, ids, *shape, self.layout.of_nodes)
        self.layout.turn, self.layout.graphs = turn, batch.graph_mask
        self.layout.masks = [mask.to(self.dtype) for mask in (batch.node_mask, batch.edge_mask)]
        return batch


def adam(weights, gradient, first, second, steps, lr, active) -> None:
    """A step of torch's Adam in place, for weights [S, P], with a rate [S]; 0 in active: none."""
    if weights.is_cuda:
        return capturable_adam(weights, gradient, first, second, steps, lr, active)
    for i in active.nonzero().flatten().tolist():
        rows = ([of[i]] for of in (weights, gradient, first, second))
        about = dict(lr=lr[i].item(), weight_decay=0.0, eps=_EPS, amsgrad=False, maximize=False)
        about |= dict(beta1=_BETAS[0], beta2=_BETAS[1], fused=True)
        functional_adam(*rows, [], [steps[i].float()], **about)
    steps.add_(active)


def capturable_adam(weights, gradient, first, second, steps, lr, active) -> None:
    """The same as operations that a CUDA graph can hold; on a CPU they take many times as long."""
    (beta1, beta2), share = _BETAS, active.to(weights.dtype).unsqueeze(1)
    steps.add_(active)
    first.lerp_(gradient, (1 - beta1) * share)
    second.lerp_(gradient.square(), (1 - beta2) * share)
    size = (lr * active / (1 - beta1**steps).clamp(min=1e-3)).to(weights.dtype).unsqueeze(1)
    root = (1 - beta2**steps).clamp(min=1e-4).sqrt().to(weights.dtype).unsqueeze(1)
    weights.sub_(size * first / (second.sqrt() / root + _EPS))
