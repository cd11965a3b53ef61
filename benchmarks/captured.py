"""A stack whose steps run as CUDA graphs, captured once and replayed, or compiled before that."""

import sys
import traceback
from collections.abc import Callable

import torch
from torch import nn

from studies.steps import Stack

ENGINES = ("eager", "graph", "compile+graph")
"""How steps run. ``"graph"`` replays a CUDA graph; ``"compile+graph"`` compiles a layer first."""

WARM_UP = 3  # runs before a capture, as torch's documentation asks for
GRADIENT_TOLERANCE = 0.01  # of compiled layers; single precision is a hundred times closer


class CapturedStack(Stack):
    """Falls back to the next simpler engine if it must, and says why on stderr."""

    worth = 0.5  # to capture steps takes as long as many epochs

    def __init__(self, *about, engine: str) -> None:
        super().__init__(*about)
        self.engine, self.plain = engine, self.update

    def prepare(self, order, fixed) -> None:
        """Compile and capture the steps."""
        super().prepare(order, fixed)
        if self.engine != "eager" and self.device.type != "cuda":
            self._fall_back(f"a CUDA graph needs CUDA, the device is {self.device.type}")
        while self.engine != "eager" and self.is_apart:
            self._fall_back("networks that are trained one by one are not captured")
        while self.engine != "eager" and not self._is_ready():
            pass

    def changed(self) -> list[torch.Tensor]:
        """Every tensor that a step changes, but those of the measures."""
        state = [self.weights, self.first, self.second, self.steps, self.cursor]
        return [*state, *self.sums.values(), *self.network.buffers()]

    def _is_ready(self) -> bool:
        """Whether the engine could be made ready; otherwise it is the next simpler one now."""
        kept = [tensor.clone() for tensor in self.changed()]
        try:
            if self.engine == "compile+graph":
                self._compile()
            self.calls = {name: self._captured(name) for name in self.all_steps()}
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # of a compiler or driver: whatever it is, train without it
            text = str(error).strip().splitlines() or [""]
            self.calls, self.network.layers, self.update = self.all_steps(), self.layers, self.plain
            self._fall_back(f"{type(error).__name__}: {text[0]}")
            traceback.print_exc()
            return False
        finally:
            for tensor, value in zip(self.changed(), kept, strict=True):
                tensor.copy_(value)
        return True

    def _fall_back(self, reason: str) -> None:
        to = "graph" if self.engine == "compile+graph" and self.device.type == "cuda" else "eager"
        print(f"engine {self.engine!r} falls back to {to!r}: {reason}", file=sys.stderr)
        self.engine = to

    def _compile(self) -> None:
        """Compile one layer, which all layers share, and the optimizer."""
        self.begin("record")  # the modules as they are
        self.network.train()
        expected = self.gradient()[0]
        torch._dynamo.reset()

        def run(layer, x, edge_index, edge_attr):
            return layer(x, edge_index, edge_attr)

        compiled = torch.compile(run, dynamic=False, fullgraph=True)
        self.compiled = nn.ModuleList(_Compiled(layer, compiled) for layer in self.layers)
        self.update = torch.compile(self.plain, dynamic=False, fullgraph=True)
        self.begin("train")
        error = (self.gradient()[0] - expected).norm(dim=1) / expected.norm(dim=1)
        if not (error < GRADIENT_TOLERANCE).all():  # compilers have been wrong without a word
            raise RuntimeError(f"compiled gradients are off by {error.max():.1e}")
        for name in ("train", "val"):
            self._step(name)

    def _captured(self, name: str) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._step(name)
        torch.cuda.current_stream().wait_stream(stream)
        self.begin(name)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.all_steps()[name]()
        return graph.replay

    def _step(self, name: str) -> None:
        self.begin(name)
        self.all_steps()[name]()

    def begin(self, name: str) -> None:
        """Hooks need the modules as they are, and evaluation differs from recording by nothing."""
        super().begin(name)
        if self.is_apart:
            return
        use_compiled = self.engine == "compile+graph" and name in ("train", "val", "test")
        self.network.layers = self.compiled if use_compiled else self.layers
        self.network.layers.train(name == "train")


class _Compiled(nn.Module):
    """A layer that runs through a function which all layers share."""

    def __init__(self, layer: nn.Module, run: Callable):
        super().__init__()
        self.layer, self.run = layer, run

    def forward(self, x, edge_index, edge_attr):
        return self.run(self.layer, x, edge_index, edge_attr)
