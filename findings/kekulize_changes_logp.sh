#!/usr/bin/env bash
# rdkit 2026.9.1; seen 2026-11-28
#
# Expected: after Kekulize with its default, which keeps the aromatic flags, a molecule has the same
#           descriptors as before: it is the same molecule.
# Happens:  Crippen's logP matches atoms by the orders of bonds, too, so it is another number. And it is
#           kept in the molecule: who asked before Kekulize is given the old number afterwards as well.
#           Reading bonds in their Kekule form, as ZINC's bond types want it, changes a target computed
#           later from the same object, or not, by what was called in between.
# Output:
#   as read 1.351; after Kekulize 0.508; after Kekulize, but asked before 1.351
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet rdkit==2026.9.1
venv/bin/python - <<'PYTHON' | tee seen
from rdkit import Chem
from rdkit.Chem.Crippen import MolLogP

paracetamol = "CC(=O)Nc1ccc(O)cc1"
after, both = Chem.MolFromSmiles(paracetamol), Chem.MolFromSmiles(paracetamol)
before = MolLogP(both)
Chem.Kekulize(after)
Chem.Kekulize(both)
print(
    f"as read {before:.3f}; after Kekulize {MolLogP(after):.3f};"
    f" after Kekulize, but asked before {MolLogP(both):.3f}"
)
PYTHON
diff seen - <<'SEEN'
as read 1.351; after Kekulize 0.508; after Kekulize, but asked before 1.351
SEEN
