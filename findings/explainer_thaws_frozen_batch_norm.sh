#!/usr/bin/env bash
# torch-geometric 2.8.1, torch 2.13.0; seen 2026-11-28
#
# Expected: explaining a network, or printing its summary, leaves each module in the mode in which it was.
# Happens:  both evaluate the network and then put the whole of it back into the mode of its root. A
#           BatchNorm that was frozen for fine-tuning comes back in training mode, and the next batch
#           moves its running statistics.
# Output:
#   after GNNExplainer: frozen norm in training mode: True
#   after summary: frozen norm in training mode: True
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 torch-geometric==2.8.1 tabulate==0.9.0
venv/bin/python - 2>errors <<'PYTHON' || { cat errors; exit 1; }
import torch
from torch_geometric.explain import Explainer, GNNExplainer
from torch_geometric.nn import GAT, summary

x, edge_index = torch.randn(6, 8), torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
model = GAT(8, 8, num_layers=2, out_channels=3, norm="BatchNorm")
explainer = Explainer(
    model,
    algorithm=GNNExplainer(epochs=2),
    explanation_type="model",
    edge_mask_type="object",
    model_config={"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"},
)
for name, look in (
    ("GNNExplainer", lambda: explainer(x, edge_index)),
    ("summary", lambda: summary(model, x, edge_index)),
):
    model.train()
    model.norms[0].eval()
    look()
    print(f"after {name}: frozen norm in training mode: {model.norms[0].training}")
    assert model.norms[0].training
PYTHON
