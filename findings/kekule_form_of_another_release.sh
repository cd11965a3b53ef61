#!/usr/bin/env bash
# rdkit 2025.9.6 and 2026.9.1; seen 2026-11-28
#
# Expected: Kekulize makes the same bonds of one SMILES single and double in each release, so that
#           bond types that were stored once, as those of ZINC, can be made again.
# Happens:  a new argument, canonical, is on unless one switches it off, and picks another form. Of
#           3,4-lutidine no bond of the ring keeps its type. Nothing warns. Switched off, the old form is back.
# Output:
#   2025.9.6 1 2 1 2 1 2 1 1
#   2026.9.1 1 1 2 1 2 1 1 2
#   2026.9.1, not canonical 1 2 1 2 1 2 1 1
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
for release in 2025.9.6 2026.9.1; do
    python3 -m venv $release
    $release/bin/pip install --quiet rdkit==$release
done
cat >form.py <<'PYTHON'
import sys
from rdkit import Chem
molecule = Chem.MolFromSmiles("Cc1cnccc1C")
Chem.Kekulize(molecule, True, *map(bool, map(int, sys.argv[1:])))
print(*(round(bond.GetBondTypeAsDouble()) for bond in molecule.GetBonds()))
PYTHON
{
    echo "2025.9.6 $(2025.9.6/bin/python form.py)"
    echo "2026.9.1 $(2026.9.1/bin/python form.py)"
    echo "2026.9.1, not canonical $(2026.9.1/bin/python form.py 0)"
} | tee seen
diff seen - <<'SEEN'
2025.9.6 1 2 1 2 1 2 1 1
2026.9.1 1 1 2 1 2 1 1 2
2026.9.1, not canonical 1 2 1 2 1 2 1 1
SEEN
