#!/usr/bin/env bash
# papermill 2.7.0, ipykernel 7.4.0; seen 2026-11-28
#
# Expected: a short commit id given with -p to a parameter whose default is a string arrives as it was typed,
#           whatever its digits are.
# Happens:  -p guesses a type from the value alone. Ids without a letter, or with one e between
#           digits, are read as numbers: one id of seven digits in eighteen. The notebook runs on, and
#           what it writes down as its origin is infinity. -r keeps the string.
# Output:
#   -p: inf 84417000000000.0
#   -r: '12e4567' '84417e9'
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet papermill==2.7.0 ipykernel==7.4.0
cat >page.ipynb <<'JSON'
{"cells": [
  {"cell_type": "code", "id": "a", "execution_count": null, "outputs": [],
   "metadata": {"tags": ["parameters"]}, "source": "weights = \"none\"  # commit id\ncode = \"none\"  # commit id"},
  {"cell_type": "code", "id": "b", "execution_count": null, "outputs": [],
   "metadata": {}, "source": "print(repr(weights), repr(code))"}],
 "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
 "nbformat": 4, "nbformat_minor": 5}
JSON
for flag in -p -r; do
    venv/bin/papermill page.ipynb "out$flag.ipynb" -k python3 $flag weights 12e4567 $flag code 84417e9 >log 2>&1 || { cat log; exit 1; }
    venv/bin/python -c "
import nbformat
print('$flag:', nbformat.read('out$flag.ipynb', 4).cells[-1].outputs[0].text.strip())" | tee -a seen
done
diff seen - <<'SEEN'
-p: inf 84417000000000.0
-r: '12e4567' '84417e9'
SEEN
