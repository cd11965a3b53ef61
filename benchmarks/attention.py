"""A training step of the edge attention, against two yardsticks, as ratios within one run.

Plain indexing is the same attention written with ``x[index]``, whose backward pass is slow.
PyG's ``TransformerConv`` with edge features is another attention of the same size: additive
edges, a scalar score. The batch has the size of 128 ZINC molecules.
"""

import math

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch_geometric.nn import TransformerConv

from mapkg.models import EdgeAttention

NODES, EDGES, CHANNELS, HEADS = 2960, 6370, 64, 8
SECONDS = 3.0


class PlainIndexing(EdgeAttention):
    """The same equations with advanced indexing in place of ``index_select``."""

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> tuple[Tensor, Tensor]:
        source, target = edge_index
        scale = math.sqrt(self.head_channels)
        score = self.key(x)[source] * self.query(x)[target] / scale * self.edge(edge_attr)
        weight = self.split_heads(score).sum(-1).clamp(-5, 5).exp()
        total = torch.zeros(len(x), self.heads).index_put((target,), weight, accumulate=True)
        alpha = weight / (total[target] + 1e-6)
        message = (alpha[..., None] * self.split_heads(self.value(x))[source]).flatten(1)
        attended = torch.zeros_like(x).index_put((target,), message, accumulate=True)
        return attended, score


class PyGTransformer(nn.Module):
    """PyG's attention with edge features, returning what the others return."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = TransformerConv(
            CHANNELS, CHANNELS // HEADS, HEADS, edge_dim=CHANNELS, root_weight=False, bias=False
        )

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x, edge_index, edge_attr), edge_attr


def step(layer: nn.Module, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> None:
    """One forward and backward pass."""
    attended, score = layer(x, edge_index, edge_attr)
    (attended.square().mean() + score.square().mean()).backward()


def main() -> None:
    torch.manual_seed(0)
    inputs = dict(
        x=torch.randn(NODES, CHANNELS, requires_grad=True),
        edge_index=torch.randint(NODES, (2, EDGES)),
        edge_attr=torch.randn(EDGES, CHANNELS, requires_grad=True),
    )
    layers = {
        "ours": EdgeAttention(CHANNELS, HEADS),
        "plain indexing": PlainIndexing(CHANNELS, HEADS),
        "PyG TransformerConv": PyGTransformer(),
    }
    layers["plain indexing"].load_state_dict(layers["ours"].state_dict())
    for found, expected in zip(
        layers["plain indexing"](**inputs), layers["ours"](**inputs), strict=True
    ):
        torch.testing.assert_close(found, expected)
    rows = []
    for threads in (1, 2):
        for name, layer in layers.items():
            timer = Timer(
                "step(layer, **inputs)",
                globals=dict(step=step, layer=layer, inputs=inputs),
                num_threads=threads,
            )
            measured = timer.blocked_autorange(min_run_time=SECONDS)
            rows.append({"threads": threads, "layer": name, "milliseconds": 1e3 * measured.median})
    table = pd.DataFrame(rows)
    ours = table[table["layer"] == "ours"].set_index("threads")["milliseconds"]
    table["time / ours"] = table["milliseconds"] / table["threads"].map(ours)
    print(table.round(2).to_string(index=False))


if __name__ == "__main__":
    main()
