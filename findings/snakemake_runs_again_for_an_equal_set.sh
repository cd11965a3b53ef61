#!/usr/bin/env bash
# snakemake 9.27.1, Python 3.11; seen 2026-11-28
#
# Expected: a rule whose parameter is the same set of names is up to date the next time.
# Happens:  parameters are compared by how they are written, and Python writes a set of strings in another
#           order in most processes. So finished runs are planned anew ("Params have changed since last
#           execution") though nothing changed. A sorted list stays as it is.
# Output (of ten dry runs each):
#   set: planned again in most runs
#   list: planned again in 0 runs
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet snakemake==9.27.1
cat >Snakefile <<'RULES'
remedies = {"none", "bias", "norm", "clip", "tanh", "dropout"}
rule as_set:
    output: "set.txt"
    params: remedies=remedies
    shell: "touch {output}"
rule as_list:
    output: "list.txt"
    params: remedies=sorted(remedies)
    shell: "touch {output}"
RULES
venv/bin/snakemake set.txt list.txt --cores 1 >log 2>&1 || { cat log; exit 1; }
again() { for _ in $(seq 10); do venv/bin/snakemake "$1" --dry-run --cores 1 2>&1 | grep -c "Params have changed" || true; done | grep -vc '^0$' || true; }
as_set=$(again set.txt) as_list=$(again list.txt)
echo "set: planned again in $([ "$as_set" -gt 5 ] && echo most || echo few) runs"
echo "list: planned again in $as_list runs"
[ "$as_set" -gt 5 ] && [ "$as_list" -eq 0 ]
