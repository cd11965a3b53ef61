#!/usr/bin/env bash
# torch-geometric 2.8.1, torch 2.13.0; seen 2026-11-29
#
# Expected: DiffGroupNorm.group_distance_ratio, a measure of oversmoothing, is the formula in its
#           documentation: the distances between groups over those within. It stays above 1 if features
#           say nothing about the groups, and grows as groups come to stand apart.
# Happens:  it is smaller by the number of groups less one, since it adds up a term for each group where the
#           formula has one for each pair. With two groups it is right. With seven, as many as Cora has,
#           groups that stand four times as far apart as they are wide get less than 1, which reads as
#           oversmoothed. Data sets with other numbers of groups do not compare.
# Output:
#   2 groups: features of no group 2.09, by the formula 2.09; groups apart 7.84, by the formula 7.84
#   7 groups: features of no group 0.20, by the formula 1.21; groups apart 0.83, by the formula 4.97
#   40 groups: features of no group 0.03, by the formula 1.07; groups apart 0.11, by the formula 4.48
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 torch-geometric==2.8.1
venv/bin/python - <<'PYTHON'
from itertools import permutations

import torch
from torch_geometric.nn import DiffGroupNorm


def formula(x, y, groups):
    parts = [x[y == group] for group in range(groups)]
    between = sum(torch.cdist(a, b).mean() for a, b in permutations(parts, 2)) / (groups - 1) ** 2
    within = sum(torch.cdist(a, a).mean() for a in parts) / groups
    return float(between / within)


torch.manual_seed(0)
for groups in (2, 7, 40):
    y = torch.arange(groups).repeat(25)
    noise = torch.randn(len(y), 64)
    apart = noise + 4 * torch.randn(groups, 64)[y]
    line = f"{groups} groups:"
    for name, x in (("features of no group", noise), ("groups apart", apart)):
        library, written = DiffGroupNorm.group_distance_ratio(x, y), formula(x, y, groups)
        line += f" {name} {library:.2f}, by the formula {written:.2f};"
        assert abs(library * (groups - 1) / written - 1) < 0.001
    print(line.rstrip(";"))
PYTHON
