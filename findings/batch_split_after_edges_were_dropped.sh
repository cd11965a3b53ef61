#!/usr/bin/env bash
# torch-geometric 2.8.1, torch 2.13.0; seen 2026-11-28
#
# Expected: a Batch whose edge_index was replaced by fewer edges splits into graphs that have the edges
#           that are left, or refuses.
# Happens:  it splits by the numbers of edges of before. The first graph takes edges of the second, with
#           nodes that it does not have; other graphs take edges whose nodes come out negative.
#           As long as the numbers add up, no error comes.
# Output:
#   first graph: 4 nodes, largest node of an edge 5
#   last graph: 4 nodes, smallest node of an edge -9
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 torch-geometric==2.8.1
venv/bin/python - <<'PYTHON'
import torch
from torch_geometric.data import Batch, Data


def ring(nodes):
    source = torch.arange(nodes)
    edge = torch.stack([source, (source + 1) % nodes])
    return Data(edge_index=torch.cat([edge, edge.flip(0)], dim=1), num_nodes=nodes)


batch = Batch.from_data_list([ring(4), ring(5), ring(4)])
# One edge of each of the first two graphs is dropped; two virtual edges come at the end.
kept = [edge for edge in range(batch.num_edges) if edge not in (0, 9)]
batch.edge_index = torch.cat([batch.edge_index[:, kept], batch.edge_index[:, :2]], dim=1)
graphs = batch.to_data_list()
first, last = int(graphs[0].edge_index.max()), int(graphs[-1].edge_index.min())
print(f"first graph: {graphs[0].num_nodes} nodes, largest node of an edge {first}")
print(f"last graph: {graphs[-1].num_nodes} nodes, smallest node of an edge {last}")
assert first == 5 and last == -9
PYTHON
