#!/usr/bin/env bash
# torch-geometric 2.8.1, torch 2.13.0; seen 2026-11-28
#
# Expected: whether an attribute of a graph belongs to nodes, to edges or to the graph depends on its name
#           or on what it was stored as, and is the same for all graphs of a data set.
# Happens:  unless the name says it ("edge_..."), it depends on the attribute's length in each graph. In a
#           molecule of two atoms, with its bond in both directions, there are as many edges as nodes, and
#           `order` of the bonds counts as of the atoms: the subgraph without the last atom keeps one order
#           and no bond. The batch then has more orders than bonds, and validate() finds nothing wrong.
#           In a graph with one edge the target of the graph counts as the edge's: ToUndirected doubles it,
#           and a batch of two graphs has three targets.
# Output:
#   2 atoms: 0 bonds, 1 orders; 3 atoms: 2 bonds, 2 orders
#   their batch: 2 bonds, 3 orders, valid: True
#   targets of two graphs after ToUndirected: 3
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 torch-geometric==2.8.1
venv/bin/python - <<'PYTHON'
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.transforms import ToUndirected


def chain(atoms, both_directions=True):
    end = torch.arange(atoms - 1)
    bond = torch.stack([end, end + 1])
    bond = torch.cat([bond, bond.flip(0)], dim=1) if both_directions else bond
    order = torch.ones(bond.size(1), dtype=torch.long)
    return Data(edge_index=bond, order=order, num_nodes=atoms, y=torch.tensor([1.5]))


smaller = [chain(n).subgraph(torch.arange(n) < n - 1) for n in (2, 3)]
sizes = [(graph.num_edges, len(graph.order)) for graph in smaller]
print("; ".join(f"{n} atoms: {b} bonds, {o} orders" for n, (b, o) in zip((2, 3), sizes)))
batch = Batch.from_data_list(smaller)
valid = batch.validate(raise_on_error=False)
print(f"their batch: {batch.num_edges} bonds, {len(batch.order)} orders, valid: {valid}")
targets = Batch.from_data_list([ToUndirected()(chain(n, False)) for n in (2, 3)]).y
print(f"targets of two graphs after ToUndirected: {len(targets)}")
assert sizes == [(0, 1), (2, 2)] and len(batch.order) == 3 and valid and len(targets) == 3
PYTHON
