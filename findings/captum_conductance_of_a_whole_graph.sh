#!/usr/bin/env bash
# captum 0.9.0, torch-geometric 2.8.1, torch 2.13.0; seen 2026-11-28
#
# Expected: attributions to the nodes of one graph add up to f(x) - f(0), as completeness says, or
#           captum refuses; internal_batch_size, made for memory, changes nothing.
# Happens:  captum takes rows for independent examples and stacks its steps along them. The network
#           then sees one graph with edges and many copies of its nodes without, and nothing fails.
#           IntegratedGradients is right only with steps of one copy. LayerConductance always needs two
#           copies, and is worst there. A network that repeats its edges for the copies gets both right.
# Output:
#   f(x) - f(0): -4.28
#   edges once        IntegratedGradients  -5.38, one copy a step  -4.28; LayerConductance   -5.38, one copy a step  177.07
#   edges repeated    IntegratedGradients  -4.28, one copy a step  -4.28; LayerConductance   -4.28, one copy a step   -4.28
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 torch-geometric==2.8.1 captum==0.9.0
venv/bin/python -W ignore - <<'PYTHON'
import torch
from captum.attr import IntegratedGradients, LayerConductance
from torch_geometric.nn import GAT

torch.manual_seed(0)
x, edge_index = torch.randn(6, 4), torch.randint(0, 6, (2, 12))


class Network(torch.nn.Module):
    def __init__(self, repeated):
        super().__init__()
        torch.manual_seed(1)
        self.gat, self.repeated = GAT(4, 5, num_layers=2, out_channels=3), repeated

    def forward(self, x):
        copies = len(x) // 6 if self.repeated else 1
        return self.gat(x, torch.cat([edge_index + 6 * copy for copy in range(copies)], dim=1))


network = Network(False).eval()
true = float((network(x) - network(0 * x))[:, 0].sum())
print(f"f(x) - f(0): {true:.2f}")
gap = {}
for repeated in (False, True):
    network = Network(repeated).eval()
    line = f"edges {'repeated' if repeated else 'once':<12}"
    for name, method in (
        ("IntegratedGradients", IntegratedGradients(network)),
        ("LayerConductance", LayerConductance(network, network.gat.convs[0])),
    ):
        for size in (None, 6):
            total = method.attribute(x, target=0, n_steps=200, internal_batch_size=size).sum()
            gap[repeated, name, size] = abs(float(total) - true)
            line += f" {name} {total:6.2f}," if size is None else f" one copy a step {total:7.2f};"
    print(line.rstrip(";"))
once = {(name, size): value for (repeated, name, size), value in gap.items() if not repeated}
assert once["IntegratedGradients", None] > 1 and once["IntegratedGradients", 6] < 0.01
assert once["LayerConductance", None] > 1 and once["LayerConductance", 6] > 100
assert max(value for (repeated, *_), value in gap.items() if repeated) < 0.01
PYTHON
