#!/usr/bin/env bash
# torch-geometric 2.8.1, captum 0.9.0, torch 2.13.0; seen 2026-11-29
#
# Expected: what explains a prediction does not depend on the order of the edges. GCNConv and GATConv put
#           self-loops last, but explainers know of it: they drop loops from their masks and append ones.
# Happens:  they do so only where the layer changed the number of edges. It did not if each node came with
#           a loop. Unless the loops stood last, as they do not after dense_to_sparse or coalesce, the mask
#           of one edge then weighs another: what is named as deciding decides nothing, though the
#           prediction is right. With one of the loops left out the explanation is right again.
#           (A star around node 0. Node 3 alone has a feature: edge 3->0 decides about node 0.)
# Output (by IntegratedGradients and by GNNExplainer):
#   GCNConv, loops last: predicts 0.33, explained by 3->0 and 3->0
#   GCNConv, sorted: predicts 0.33, explained by 1->1 and 1->1
#   GCNConv, sorted, without 3->3: predicts 0.33, explained by 3->0 and 3->0
#   GATConv, loops last: predicts 0.19, explained by 3->0 and 3->0
#   GATConv, sorted: predicts 0.19, explained by 1->1 and 1->1
#   GATConv, sorted, without 3->3: predicts 0.19, explained by 3->0 and 3->0
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 torch-geometric==2.8.1 captum==0.9.0
venv/bin/python -W ignore - <<'PYTHON'
import torch
from torch_geometric.explain import CaptumExplainer, Explainer, GNNExplainer
from torch_geometric.nn import GATConv, GCNConv
from torch_geometric.utils import dense_to_sparse

star = torch.eye(4)
star[0] = star[:, 0] = 1
edges = dense_to_sparse(star)[0]
loop = edges[0] == edges[1]
graphs = {
    "loops last": torch.cat([edges[:, ~loop], edges[:, loop]], dim=1),
    "sorted": edges,
    "sorted, without 3->3": edges[:, :-1],
}
x = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
config = {"mode": "regression", "task_level": "node"}
for layer in (GCNConv, GATConv):
    for name, edge_index in graphs.items():
        line, found = f"{layer.__name__}, {name}:", []
        for method in (CaptumExplainer("IntegratedGradients"), GNNExplainer(epochs=20)):
            torch.manual_seed(0)
            network = layer(1, 1)
            explainer = Explainer(network, method, "model", config, edge_mask_type="object")
            mask = explainer(x, edge_index, index=0).edge_mask
            found += ["->".join(map(str, edge)) for edge in edge_index.T[mask.abs() > 1e-6].tolist()]
        print(f"{line} predicts {float(network(x, edge_index)[0]):.2f}, explained by {' and '.join(found)}")
        assert found == ["1->1"] * 2 if name == "sorted" else ["3->0"] * 2
PYTHON
