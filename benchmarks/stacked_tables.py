"""Write the tracked tables of a finished run of ``benchmarks/stacked.py``.

    python benchmarks/stacked_tables.py RUN zinc12k_official.csv.gz data/results/converged_gt_zinc_

RUN is its output folder; the second argument is the table of molecules it was trained on.
"""

import argparse
from pathlib import Path

import torch

from studies import converged
from studies.data import load_table
from studies.tables import write as write_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("molecules", type=Path)
    parser.add_argument("output", help="what the names of the tables begin with")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    run, about = converged.read_run(parsed.run), converged.origin(parsed.run)
    tables = {
        "epochs": converged.thinned(run),
        "windows": converged.windows(run),
        "errors": converged.errors(parsed.run, load_table(parsed.molecules)),
    }
    for name, table in tables.items():
        path = Path(f"{parsed.output}{name}.csv.gz")
        write_table(path, table.assign(**about))
        print(f"{path}: {len(table)} rows, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
