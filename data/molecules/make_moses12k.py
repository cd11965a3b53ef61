"""Draw the bundled molecules from the MOSES benchmark set and compute their target.

    pip download --no-deps molsets==0.3.1
    python -m zipfile -e molsets-0.3.1-py3-none-any.whl molsets
    python data/molecules/make_moses12k.py molsets/moses/dataset/data

writes ``moses12k.csv.gz`` beside this script: 10,000 training and 1,000 validation molecules
drawn without replacement from the benchmark's training file, 1,000 test molecules from its
test file, with a fixed seed, in the order drawn. The few molecules with an atom outside the
28 types of ``mapkg.data.molecules.ATOM_TYPES`` are passed over. The same inputs and versions
give the same bytes.
"""

import argparse
import gzip
import hashlib
import io
import sys
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from mapkg.data.molecules import molecule_graph, penalised_logp

SEED = 0
SIZES = {"train": 10_000, "val": 1_000, "test": 1_000}
SOURCE_SHA256 = {
    "train.csv.gz": "786f0313aa6b9ba5514df685f885742a70ea8d86f1a4fa48115f7f80a634265c",
    "test.csv.gz": "f896fbf3764f88d94670b9959e5872c600c12152a18233823e820761b7a791b2",
}
OUTPUT = Path(__file__).with_name("moses12k.csv.gz")


def read_source(folder: Path, name: str) -> pd.Series:
    """The SMILES of one of the benchmark's files, its checksum checked first."""
    content = (folder / name).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SOURCE_SHA256[name]:
        raise ValueError(f"{name}: expected sha256 {SOURCE_SHA256[name]}, got {digest}")
    return pd.read_csv(io.BytesIO(gzip.decompress(content)))["SMILES"].drop_duplicates()


def draw(source: pd.Series, size: int) -> list[str]:
    """The first molecules of a random order whose atoms are all of the benchmark's 28 types.

    The others, imines written with an explicit hydrogen, are counted on stderr.
    """
    drawn, skipped = [], 0
    for smiles in source.sample(frac=1, random_state=SEED):
        try:
            molecule_graph(smiles)
        except ValueError:
            skipped += 1
            continue
        drawn.append(smiles)
        if len(drawn) == size:
            break
    print(f"{len(drawn)} drawn, {skipped} with another atom type skipped", file=sys.stderr)
    return drawn


def make_table(folder: Path) -> pd.DataFrame:
    """The table ``split,smiles,y``."""
    smiles = [
        *draw(read_source(folder, "train.csv.gz"), SIZES["train"] + SIZES["val"]),
        *draw(read_source(folder, "test.csv.gz"), SIZES["test"]),
    ]
    return pd.DataFrame(
        {
            "split": [split for split, size in SIZES.items() for _ in range(size)],
            "smiles": smiles,
            "y": [
                round(penalised_logp(molecule), 8)
                for molecule in tqdm(smiles, "penalised logP", file=sys.stderr)
            ],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where train.csv.gz and test.csv.gz are")
    table = make_table(parser.parse_args().folder)
    content = table.to_csv(index=False).encode()
    temporary = OUTPUT.with_suffix(".tmp")
    temporary.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))
    temporary.replace(OUTPUT)
    print(f"{OUTPUT.name}: sha256 {hashlib.sha256(OUTPUT.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
