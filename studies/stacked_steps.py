"""Steps that train and measure many networks at once, eager, captured or compiled."""

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mapkg import hooks
from mapkg.models.config import Config
from mapkg.models.network import CLAMPED, SCORES
from studies.padded_batches import FlatGraphs, PaddedBatch, Shape, assemble
from studies.score_measures import ScoreMeasures
from studies.stacked import Rows, plain_name, stack_networks

ENGINES = ("eager", "graph", "compile+graph")
"""How steps run. ``"graph"`` replays a CUDA graph; ``"compile+graph"`` compiles a layer first."""

_BETAS, _EPS = (0.9, 0.999), 1e-8  # torch's defaults of Adam, as studies.train has them
_WARM_UP = 3  # runs before a capture, as torch's documentation asks for
_GRADIENT_TOLERANCE = 0.01  # of compiled layers; single precision is a hundred times closer
_ALIGN = 4  # parameters begin at multiples of 16 bytes, for wide loads


class Stack:
    """S networks on a device, their optimizer, and the steps that train and measure them.

    All a step needs lies on the device under fixed addresses, and a step returns nothing: what it
    computes is added up there. So a CUDA graph can hold it, and an epoch never waits.
    """

    def __init__(
        self,
        single: nn.Module,
        tensors: Mapping[str, Tensor],
        data: Mapping[str, FlatGraphs],
        config: Config,
        shape: Shape,
        *,
        engine: str = "eager",
    ) -> None:
        self.data, self.config, self.shape, self.engine = data, config, shape, engine
        self.device, self.dtype = data["train"].y.device, data["train"].y.dtype
        tensors = {name: tensor.to(self.device, copy=True) for name, tensor in tensors.items()}
        self.network, self.layout = stack_networks(single.to(self.device), tensors)
        self.networks = self.layout.networks
        self.layers = self.network.layers
        self.statistics = {  # running ones, of BatchNorm
            name: buffer for name, buffer in self.network.named_buffers() if "running_" in name
        }
        self.weights = self._flatten_parameters()
        self.first, self.second = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.steps, self.lr = self._zeros(self.networks), self._zeros(self.networks)
        self.sums = {split: self._zeros(2, self.networks) for split in ("train", "val", "test")}
        self.cursor = torch.zeros(1, dtype=torch.long, device=self.device)
        self.order: Tensor | None = None
        self.host_step = 0
        self.measures: ScoreMeasures | None = None
        self._calls: dict[str, Callable[[], None]] = {}
        self._update = _adam

    def _zeros(self, *size: int) -> Tensor:
        return torch.zeros(*size, dtype=torch.double, device=self.device)

    def _flatten_parameters(self) -> Tensor:
        """Bring all parameters into one tensor [S, P], of which they become views."""
        self.slices: dict[str, tuple[int, int, torch.Size]] = {}
        self.parameters: list[nn.Parameter] = []
        start = 0
        for name, parameter in self.network.named_parameters():
            size = parameter[0].numel()
            self.slices[plain_name(name)] = (start, size, parameter.shape[1:])
            start += -(-size // _ALIGN) * _ALIGN
        flat = torch.zeros(self.networks, start, dtype=self.dtype, device=self.device)
        for name, parameter in self.network.named_parameters():
            start, size, shape = self.slices[plain_name(name)]
            view = flat[:, start : start + size].view(self.networks, *shape)
            view.copy_(parameter.detach())
            parameter.data = view
            self.parameters.append(parameter)
        self.decay: Tensor | None = None
        return flat

    # What a step does.

    def _train_step(self) -> None:
        gradient, total, count = self._gradient()
        with torch.no_grad():
            # A batch without a label teaches nothing; without NaN every target is a label.
            active = (count > 0).double() if self.config.loss == "bce" else None
            self._update(
                *(self.weights, gradient, self.first, self.second),
                *(self.steps, self.lr, self.decay, active),
            )
            # The mean as torch has it, in the precision of the networks.
            mean = (total / count.clamp(min=1)).double()
            self.sums["train"] += torch.stack([mean * count, count.double()])
            self.cursor += 1
        self.host_step += 1

    def _gradient(self) -> tuple[Float[Tensor, "S P"], Float[Tensor, " S"], Int[Tensor, " S"]]:
        """Gradient of each network's mean loss; sum and number of the losses."""
        ids = self.order.index_select(1, self.cursor).squeeze(1)
        total, count = self._losses(self._take("train", ids))
        gradients = torch.autograd.grad(
            (total / count.clamp(min=1)).sum(), self.parameters, allow_unused=True
        )
        if self.config.weight_decay and self.decay is None:
            # A parameter without a gradient is not decayed by torch's Adam either.
            used = [
                None if gradient is None else torch.ones_like(gradient) for gradient in gradients
            ]
            self.decay = self._flat(used) * self.config.weight_decay
        return self._flat(gradients), total.detach(), count

    @torch.no_grad()
    def _evaluate_step(self, split: str, record: bool = False) -> None:
        ids = self.fixed[split].index_select(0, self.cursor).expand(self.networks, -1)
        batch = self._take(split, ids)
        names = list(hooks.resolve(self.network, SCORES)) if record else []

        def measure(name: str, score: Tensor) -> None:
            self.measures.update(
                names.index(name),
                score.unflatten(0, (self.networks, -1)),
                batch.edge_mask.squeeze(-1),
                batch.edge_graph,
                self.shape.graphs,
            )

        with hooks.record(self.network, names, reduce=measure):
            total, count = self._losses(batch, of_double=True)
        self.sums[split] += torch.stack([total, count.double()])
        self.cursor += 1

    def _take(self, split: str, ids: Int[Tensor, "S graphs"]) -> PaddedBatch:
        batch = assemble(self.data[split], ids, self.shape)
        sizes = [None, None]
        if self.layout.generators is not None and split == "train":
            step = self.host_step
            sizes = [part[:, step].tolist() for part in self.host_sizes]
        self.layout.nodes = self._rows(batch.node_mask, sizes[0])
        self.layout.edges = self._rows(batch.edge_mask, sizes[1])
        return batch

    def _rows(self, mask: Tensor, sizes: list[int] | None) -> Rows:
        mask = mask.to(self.dtype)
        return Rows(mask, mask.sum(dim=1, keepdim=True).clamp(min=1), sizes)

    def _losses(
        self, batch: PaddedBatch, of_double: bool = False
    ) -> tuple[Float[Tensor, " S"], Int[Tensor, " S"]]:
        """Sum of the losses over the labels of each network's batch, and their number."""
        predicted = self.network(
            batch.x, batch.edge_index, batch.edge_attr, batch.graph, batch.num_graphs
        )
        predicted = predicted.unflatten(0, (self.networks, -1))[:, :-1]
        labeled, y = batch.graph_mask.unsqueeze(-1).expand_as(batch.y), batch.y
        if self.config.loss == "bce":
            labeled = labeled & ~y.isnan()
        y = torch.where(labeled, y, 0)
        if self.config.loss == "bce":
            values = nn.functional.binary_cross_entropy_with_logits(predicted, y, reduction="none")
        else:
            values = (predicted - y).abs()
        values = torch.where(labeled, values, 0)
        values = values.double() if of_double else values
        return values.sum(dim=(1, 2)), labeled.sum(dim=(1, 2))

    def _flat(self, gradients: Sequence[Tensor | None]) -> Float[Tensor, "S P"]:
        parts = []
        for gradient, (_, size, _) in zip(gradients, self.slices.values(), strict=True):
            fill = -size % _ALIGN
            if gradient is None:
                size, fill = 0, size + fill
            else:
                parts.append(gradient.reshape(self.networks, -1))
            if fill:
                parts.append(self.weights.new_zeros(self.networks, fill))
        return torch.cat(parts, dim=1)

    # How steps run.

    def prepare(self, order: Int[Tensor, "S steps graphs"], fixed: Mapping[str, Tensor]) -> None:
        """Make the steps ready: compile and capture them, or fall back and say why."""
        self.fixed = {split: ids.to(self.device) for split, ids in fixed.items()}
        self.order = order.to(self.device, copy=True)
        self._calls = self._steps()
        if self.engine != "eager" and self.device.type != "cuda":
            self._fall_back(f"a CUDA graph needs CUDA, the device is {self.device.type}")
        while self.engine != "eager" and not self._is_ready():
            pass

    def _steps(self) -> dict[str, Callable[[], None]]:
        return {
            "train": self._train_step,
            **{split: lambda split=split: self._evaluate_step(split) for split in self.fixed},
            "record": lambda: self._evaluate_step("test", record=True),
        }

    def _is_ready(self) -> bool:
        """Whether the engine could be made ready; otherwise it is the next simpler one now."""
        kept = [tensor.clone() for tensor in self._changed()]
        try:
            if self.engine == "compile+graph":
                self._compile()
            self._calls = {name: self._captured(name) for name in self._steps()}
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # of a compiler or driver: whatever it is, train without it
            text = str(error).strip().splitlines() or [""]
            self._calls, self.network.layers, self._update = self._steps(), self.layers, _adam
            self._fall_back(f"{type(error).__name__}: {text[0]}")
            traceback.print_exc()
            return False
        finally:
            for tensor, value in zip(self._changed(), kept, strict=True):
                tensor.copy_(value)
        return True

    def _fall_back(self, reason: str) -> None:
        to = "graph" if self.engine == "compile+graph" and self.device.type == "cuda" else "eager"
        print(f"engine {self.engine!r} falls back to {to!r}: {reason}", file=sys.stderr)
        self.engine = to

    def _changed(self) -> list[Tensor]:
        """Every tensor that a step changes, but those of the measures."""
        state = [self.weights, self.first, self.second, self.steps, self.cursor]
        return [*state, *self.sums.values(), *self.statistics.values()]

    def _compile(self) -> None:
        """Compile one layer, which all layers share, and the optimizer."""
        self._begin("record")  # the modules as they are
        self.network.train()
        expected = self._gradient()[0]
        torch._dynamo.reset()

        def run(layer, x, edge_index, edge_attr):
            return layer(x, edge_index, edge_attr)

        compiled = torch.compile(run, dynamic=False, fullgraph=True)
        self._compiled = nn.ModuleList(_Compiled(layer, compiled) for layer in self.layers)
        self._update = torch.compile(_adam, dynamic=False, fullgraph=True)
        self._begin("train")
        error = (self._gradient()[0] - expected).norm(dim=1) / expected.norm(dim=1)
        if not (error < _GRADIENT_TOLERANCE).all():  # compilers have been wrong without a word
            raise RuntimeError(f"compiled gradients are off by {error.max():.1e}")
        for name in ("train", "val"):
            self.step(name)

    def _captured(self, name: str) -> Callable[[], None]:
        if name == "record" and self.measures is None:
            self.measures = self._new_measures()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self.step(name)
        torch.cuda.current_stream().wait_stream(stream)
        self._begin(name)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._steps()[name]()
        return graph.replay

    def _begin(self, name: str) -> None:
        self.cursor.zero_()
        self.network.train(name == "train")
        # Hooks need the modules as they are, and evaluation differs from recording by nothing.
        use_compiled = self.engine == "compile+graph" and name in ("train", "val", "test")
        self.network.layers = self._compiled if use_compiled else self.layers
        self.network.layers.train(name == "train")

    def _new_measures(self) -> ScoreMeasures:
        heads = self.config.heads if self.config.architecture in CLAMPED else None
        sizes = self.networks, len(self.layers), self.config.hidden_channels
        return ScoreMeasures(*sizes, heads=heads, device=self.device, dtype=self.dtype)

    # What a trainer calls.

    def step(self, name: str) -> None:
        """Run the first step of an epoch on ``"train"``, ``"val"``, ``"test"`` or ``"record"``."""
        self._begin(name)
        self._steps()[name]()

    def train(self, order: Tensor, generators: list[torch.Generator]) -> None:
        """Train for an epoch on batches [S, steps, graphs]; generators draw exact dropout."""
        exact = self.device.type == "cpu" and (self.config.dropout or self.config.score_dropout)
        self.layout.generators = generators if exact else None
        if exact:
            self.host_sizes = self.data["train"].rows(order)
        self.order.copy_(order)
        self.host_step = 0
        self.sums["train"].zero_()
        self._begin("train")
        for _ in range(order.size(1)):
            self._calls["train"]()

    def evaluate(self, split: str, *, record: bool = False) -> None:
        """Evaluate on a split, and measure the scores if asked for, of the test split only."""
        name = "record" if record else split
        if record:
            self.measures = self._new_measures() if self.measures is None else self.measures
            self.measures.reset()
        self.sums[split].zero_()
        self._begin(name)
        for _ in range(len(self.fixed[split])):
            self._calls[name]()

    def state(self) -> dict[str, Tensor]:
        """Weights and running statistics of all networks by name, copied, [S, ...]."""
        weights = {
            name: self.weights[:, start : start + size].reshape(-1, *shape).clone()
            for name, (start, size, shape) in self.slices.items()
        }
        return weights | {name: tensor.clone() for name, tensor in self.statistics.items()}


class _Compiled(nn.Module):
    """A layer that runs through a function which all layers share."""

    def __init__(self, layer: nn.Module, run: Callable[..., tuple[Tensor, Tensor]]):
        super().__init__()
        self.layer, self.run = layer, run

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> tuple[Tensor, Tensor]:
        return self.run(self.layer, x, edge_index, edge_attr)


def _adam(
    weights: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    active: Tensor | None,
) -> None:
    """A step of torch's Adam in place, for weights [S, P] and a learning rate [S] each."""
    if decay is not None:
        gradient = gradient + decay * weights
    beta1, beta2 = _BETAS
    if active is None:
        steps.add_(1)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    else:
        steps.add_(active)
        share = active.to(weights.dtype).unsqueeze(1)
        first.add_((gradient - first) * (1 - beta1) * share)
        second.add_((gradient * gradient - second) * (1 - beta2) * share)
        lr = lr * active
    size = (lr / (1 - beta1**steps).clamp(min=1e-3)).to(weights.dtype).unsqueeze(1)
    root = (1 - beta2**steps).clamp(min=1e-4).sqrt().to(weights.dtype).unsqueeze(1)
    weights.sub_(size * first / (second.sqrt() / root + _EPS))
