"""Draw the picture of the README and the introduction from the tracked results.

    python book/figures.py

The picture carries the checksum of the table it was drawn from, so that a test can tell when
it is out of date.
"""

import hashlib
from pathlib import Path

from studies import figures
from studies.data import BUNDLED
from studies.emergence import by_rank
from studies.results import read_emergence

PICTURE = Path(__file__).with_name("emergence.png")
PREFIX = "emergence_gt_zinc_"
TABLE = BUNDLED / "results" / f"{PREFIX}graph_maxima.csv.gz"


def main() -> None:
    figures.use_style()
    results = read_emergence(BUNDLED / "results", prefix=PREFIX)
    figure = by_rank(results.graph_maxima)
    checksum = hashlib.sha256(TABLE.read_bytes()).hexdigest()
    figure.savefig(PICTURE, metadata={"Source-SHA256": checksum}, dpi=110)


if __name__ == "__main__":
    main()
