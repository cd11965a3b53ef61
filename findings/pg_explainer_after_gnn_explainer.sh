#!/usr/bin/env bash
# torch-geometric 2.8.1, torch 2.13.0; seen 2026-11-29
#
# Expected: explainers can be compared on one network. GNNExplainer takes its masks off when it is done, so
#           that PGExplainer afterwards finds what it would have found before.
# Happens:  it learns nothing of the prediction any more. In each layer an empty place for a parameter has
#           stayed, and a mask put there is made a parameter of its own, cut off from what computed it. The
#           mask that is learned is the same whatever is to be explained. A deep copy has the places, too;
#           a new network with the same weights has not.
#           (A star around node 0. Node 3 alone has a large feature: edge 3->0 decides about node 0.)
# Output:
#   before: edge 3->0 1.00, the others at most 0.00; to explain 0 instead: other numbers
#   after GNNExplainer: edge 3->0 0.00, the others at most 0.00; to explain 0 instead: the same numbers
#   a deep copy: edge 3->0 0.00, the others at most 0.00; to explain 0 instead: the same numbers
#   a new network, same weights: edge 3->0 1.00, the others at most 0.00; to explain 0 instead: other numbers
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 torch-geometric==2.8.1
venv/bin/python -W ignore - <<'PYTHON'
import copy

import torch
from torch_geometric.explain import Explainer, GNNExplainer, PGExplainer
from torch_geometric.nn import GCN

torch.manual_seed(1)
x = 0.1 * torch.randn(8, 3)
x[3] = 10
edge_index = torch.stack([torch.arange(1, 8), torch.zeros(7, dtype=torch.long)])


def explainer(network, algorithm, kind):
    config = {"mode": "regression", "task_level": "node"}
    return Explainer(network, algorithm, kind, config, edge_mask_type="object")


def learned(network, target):
    torch.manual_seed(1)
    explain = explainer(network, PGExplainer(epochs=60, lr=0.01), "phenomenon")
    for epoch in range(60):
        explain.algorithm.train(epoch, network, x, edge_index, target=target, index=0)
    return explain(x, edge_index, target=target, index=0).edge_mask


network = GCN(3, 8, num_layers=2, out_channels=1).eval()
again = GCN(3, 8, num_layers=2, out_channels=1).eval()
again.load_state_dict(network.state_dict())
target = network(x, edge_index).detach()


def show(name, network):
    mask, other = learned(network, target), learned(network, torch.zeros_like(target))
    same = torch.equal(mask, other)
    print(
        f"{name}: edge 3->0 {mask[2]:.2f}, the others at most {mask[[0, 1, 3, 4, 5, 6]].max():.2f};"
        f" to explain 0 instead: {'the same numbers' if same else 'other numbers'}"
    )
    return float(mask[2]) > 0.9 and not same, float(mask[2]) < 0.1 and same


learns, _ = show("before", network)
explainer(network, GNNExplainer(epochs=5), "model")(x, edge_index, index=0)
_, blind = show("after GNNExplainer", network)
_, copy_blind = show("a deep copy", copy.deepcopy(network))
again_learns, _ = show("a new network, same weights", again)
assert learns and blind and copy_blind and again_learns
PYTHON
