"""The steps of many networks of one configuration: stacked as one, or else one by one."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch_geometric.data import Data

from mapkg import hooks
from mapkg.all_measures import AllMeasures
from mapkg.models.network import CLAMPED, looked_at
from mapkg.models.pyg_layers import recorded_rows
from studies import stacked
from studies.stacked import Layout, assemble, losses, why_not_stackable

LARGE = 50_000
"""Edges of a batch times channels above which a CPU takes networks one by one."""


class OneByOne(nn.Module):
    """S networks of any kind, which takes and gives rows as a stacked network does.

    ``each`` holds the weights of all, [S, ...], and runs with those of one after the other. What
    its hooks see is of one network, without padding.
    """

    def __init__(self, single: nn.Module, tensors: Mapping[str, Tensor], layout: Layout) -> None:
        super().__init__()
        self.layout, self.each = layout, copy.deepcopy(single)
        kept = single.state_dict(keep_vars=True)
        shared: dict[int, Tensor] = {}  # what modules share they go on sharing
        places: dict[tuple[int, str], str] = {}  # and a module that stands twice is one
        for name, tensor in tensors.items():
            owner, _, own = name.rpartition(".")
            module = self.each.get_submodule(owner)
            places[id(module), own] = name
            if is_weight := own in module._parameters:
                tensor = nn.Parameter(tensor)
            kind = module._parameters if is_weight else module._buffers
            kind[own] = shared.setdefault(id(kept[name]), tensor)
        self.names = [*places.values()]

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, batch_size: int
    ) -> Float[Tensor, "rows targets"]:
        """Predictions for the graphs of all networks, padding among them."""
        networks, graphs = self.layout.networks, batch_size // self.layout.networks
        of_all = self.each.state_dict(keep_vars=True)
        weights = {name: of_all[name].unbind() for name in self.names}
        nodes, edges = (mask.sum(dim=(1, 2)).long().tolist() for mask in self.layout.masks)
        x, edge_attr, batch = (t.unflatten(0, (networks, -1)) for t in (x, edge_attr, batch))
        edge_index, predicted = edge_index.unflatten(1, (networks, -1)), []
        for i, (n, e) in enumerate(zip(nodes, edges, strict=True)):
            own = {name: of_each[i] for name, of_each in weights.items()}
            ends, graph = edge_index[:, i, :e] - i * x.size(1), batch[i, :n] - i * graphs
            about = x[i, :n], ends, edge_attr[i, :e], graph, graphs
            with self._drawing(i):
                predicted.append(functional_call(self.each, own, about, tie_weights=False))
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
        apart = why_not_stackable(single) or (self.device.type == "cpu" and self._is_large())
        make = OneByOne if apart else stacked.stack_networks
        self.network = make(single.to(self.device), tensors, self.layout)
        self.inside = getattr(self.network, "each", self.network)  # where hooks look
        self.networks, self.layers = self.layout.networks, self.inside.layers
        self.parameters = list(self.network.parameters())
        sizes = [parameter[0].numel() for parameter in self.parameters]
        self.weights = torch.cat([p.detach().flatten(1) for p in self.parameters], dim=1)
        for parameter, part in zip(self.parameters, self.weights.split(sizes, 1), strict=True):
            parameter.data = part.view(parameter.shape)
        self.first, self.second = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        zeros = dict(dtype=torch.double, device=self.device)
        self.steps, self.lr = (torch.zeros(self.networks, **zeros) for _ in range(2))
        self.sums = {split: torch.zeros(2, self.networks, **zeros) for split in data}
        self.cursor = torch.zeros(1, dtype=torch.long, device=self.device)
        heads = config.heads if config.architecture in CLAMPED else None
        self.looked_at = looked_at(config.architecture)
        about = dict(heads=heads, device=self.device)
        self.measures = [AllMeasures(self.networks, **about) for _ in self.layers]
        self.update = stacked.adam

    def _is_large(self) -> bool:
        """Whether a core is faster with one network at a time, see benchmarks/README.md."""
        return self.layout.networks == 1 or self.shape[1] * self.config.hidden_channels > LARGE

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
        for of_layer in self.measures if name == "record" else ():
            of_layer.reset()
        self.sums[name].zero_()
        self.begin(name)
        for _ in range(len(self.fixed[name])):
            self.calls[name]()

    def state(self) -> dict[str, Tensor]:
        """Weights and running statistics of all networks by their plain names, copied, [S, ...]."""
        state = {
            name.replace("parametrizations.", "").removesuffix(".original"): tensor
            for name, tensor in self.inside.state_dict().items()
        }
        return {name: state[name].clone() for name in self.names if name in state}

    def gradient(self) -> tuple[Float[Tensor, "S P"], Float[Tensor, " S"], Int[Tensor, " S"]]:
        """Gradient of each network's mean loss; sum and number of the losses."""
        ids = self.order.index_select(1, self.cursor).squeeze(1)
        values, count = losses(self.network, self._take("train", ids), self.config.loss)
        total, decay = values.sum(dim=(1, 2)), self.config.weight_decay
        mean = (total / count.clamp(min=1)).sum()
        gradients = torch.autograd.grad(mean, self.parameters, allow_unused=True)
        parts = [  # torch's Adam does not decay a parameter without a gradient either
            torch.zeros_like(p) if g is None else g.add(p.detach(), alpha=decay) if decay else g
            for g, p in zip(gradients, self.parameters, strict=True)
        ]
        return torch.cat([p.flatten(1) for p in parts], dim=1), total.detach(), count

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
        batch = self._take(split, ids)
        modules = hooks.resolve(self.inside, self.looked_at) if split == "record" else {}
        names, seen = [*modules], {name: [] for name in modules}

        def measure(name: str, output: Any) -> None:
            graph, mask, parts = batch.edge_graph, batch.edge_mask.squeeze(-1), seen[name]
            if isinstance(self.network, OneByOne):  # without padding, some with rows of nodes
                nodes = batch.batch[: int(batch.node_mask[0].sum())]
                parts.append(recorded_rows(modules[name], output, nodes))
                if len(parts) < self.networks:
                    return
                if isinstance(modules[name], nn.MultiheadAttention):
                    graph = nodes.expand(self.networks, -1)
                output, graph, mask = torch.cat(parts), graph[:, : len(parts[0])], None
            rows = output.unflatten(0, (self.networks, -1))
            self.measures[names.index(name)].update(rows, graph, ids.size(1), mask)

        with hooks.record(self.inside, names, reduce=measure):
            values, count = losses(self.network, batch, self.config.loss)
        self.sums[split] += torch.stack([values.double().sum(dim=(1, 2)), count.double()])
        self.cursor += 1

    def _take(self, split: str, ids: Int[Tensor, "S graphs"]) -> Data:
        data, shape = self.data[split], self.shape
        if not ids.is_cuda:  # a captured step needs one shape, another one no more than its own
            shape = stacked.padded(*(int(count.max()) for count in data.rows(ids)))
        batch = assemble(data, ids, *shape)
        self.layout.masks = [mask.to(self.dtype) for mask in (batch.node_mask, batch.edge_mask)]
        return batch
