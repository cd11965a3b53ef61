"""Peak memory of ``mapkg.report`` on a stream of batches and on ten times as many.

Each is a process of its own, whose batches are made when they are asked for. What the peak grows
by after a first report is compared with what it would take to keep every batch.
"""

import resource
import subprocess
import sys
from collections.abc import Iterator

import torch
from torch_geometric.data import Data
from torch_geometric.nn import GAT

from mapkg import report

NODES, EDGES = 2000, 20_000


def stream(batches: int) -> Iterator[Data]:
    """Random graphs, one after the other."""
    for seed in range(batches):
        torch.manual_seed(seed)
        yield Data(x=torch.randn(NODES, 16), edge_index=torch.randint(NODES, (2, EDGES)))


def measure(batches: int) -> None:
    """Print the growth of the peak, in MB, over one batch."""
    torch.set_num_threads(1)
    model = GAT(16, 64, num_layers=4, heads=8)
    report(model, stream(1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report(model, stream(batches))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    few, many = 30, 300
    peak = {}
    for batches in (few, many):
        command = [sys.executable, __file__, str(batches)]
        peak[batches] = float(subprocess.run(command, capture_output=True, check=True).stdout)
        print(f"{batches:4} batches: {peak[batches]:.1f} MB more than for one")
    kept = (many - few) * (NODES * 16 * 4 + EDGES * 2 * 8) / 2**20
    print(f"ten times the batches: {peak[many] - peak[few]:+.1f} MB; to keep them takes {kept:.0f}")


if __name__ == "__main__":
    measure(int(sys.argv[1])) if len(sys.argv) > 1 else main()
