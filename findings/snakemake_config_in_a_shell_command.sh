#!/usr/bin/env bash
# snakemake 9.27.1; seen 2026-11-28
#
# Expected: Snakemake runs a rule again when a setting changes that its shell command names, as it does for
#           params; "code" and "params" are among its default triggers.
# Happens:  {config[lr]} in the command is filled in after the comparison, so a changed setting is
#           "nothing to be done" and the table of the old one stays. {params.lr} is compared.
# Output:
#   config in the command: 0.1, then with another setting 0.1
#   through params: 0.1, then with another setting 0.2
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet snakemake==9.27.1
cat >Snakefile <<'RULES'
rule direct:
    output: "direct.txt"
    shell: "echo {config[lr]} > {output}"
rule params:
    output: "params.txt"
    params: lr=config["lr"]
    shell: "echo {params.lr} > {output}"
RULES
for rate in 0.1 0.2; do
    venv/bin/snakemake direct.txt params.txt --cores 1 --config lr=$rate >log 2>&1 || { cat log; exit 1; }
    cp direct.txt "direct-$rate" && cp params.txt "params-$rate"
done
tee seen <<SEEN
config in the command: $(cat direct-0.1), then with another setting $(cat direct-0.2)
through params: $(cat params-0.1), then with another setting $(cat params-0.2)
SEEN
diff seen - <<'SEEN'
config in the command: 0.1, then with another setting 0.1
through params: 0.1, then with another setting 0.2
SEEN
