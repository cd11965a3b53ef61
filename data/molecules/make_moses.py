"""Draw the bundled molecules from the MOSES benchmark set and compute their target.

    pip download --no-deps molsets==0.3.1
    python -m zipfile -e molsets-0.3.1-py3-none-any.whl molsets
    python data/molecules/make_moses.py molsets/moses/dataset/data

writes two tables beside this script, each of 10,000 training and 1,000 validation molecules
drawn without replacement from the benchmark's training file and 1,000 test molecules from its
test file, with a fixed seed, in the order drawn: ``moses12k.csv.gz`` from all molecules,
``moses_triple12k.csv.gz`` from those with a triple bond, in which triple bonds are some 15 times
as frequent. The few imines that are written with an explicit hydrogen are passed over. The same
inputs and versions give the same bytes. A molecule may be in both tables.

With ``--unused FILE`` it writes nothing but the SMILES of the benchmark's test file that neither
table has, one per line, for ``python -m studies study shares --smiles FILE``.
"""

import argparse
import gzip
import hashlib
import io
import sys
from pathlib import Path

import pandas as pd
from rdkit import Chem
from tqdm import tqdm

from studies.data.molecules import logp_terms

SEED = 0
SIZES = {"train": 10_000, "val": 1_000, "test": 1_000}
SOURCE_SHA256 = {
    "train.csv.gz": "786f0313aa6b9ba5514df685f885742a70ea8d86f1a4fa48115f7f80a634265c",
    "test.csv.gz": "f896fbf3764f88d94670b9959e5872c600c12152a18233823e820761b7a791b2",
}
TABLES = {"moses12k": "", "moses_triple12k": "#"}  # a text that each of its SMILES contains


# Of the terms over ZINC-250k; not quite the constants of the benchmark.
MEAN = (2.4570953396190123, 3.0525811293166134, 0.0485696876403053)
STD = (1.434324401111988, 0.8335207024513095, 0.2860212110245455)


def target(smiles: str) -> float:
    """Penalised logP as the tracked tables have it, with networkx's own root for its rings."""
    terms = logp_terms(Chem.MolFromSmiles(smiles), root=None)
    logp, accessibility, excess = (
        (term - mean) / std for term, mean, std in zip(terms, MEAN, STD, strict=True)
    )
    return logp - accessibility - excess


def read_source(folder: Path, name: str) -> pd.Series:
    """The SMILES of one of the benchmark's files, its checksum checked first."""
    content = (folder / name).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SOURCE_SHA256[name]:
        raise ValueError(f"{name}: expected sha256 {SOURCE_SHA256[name]}, got {digest}")
    return pd.read_csv(io.BytesIO(gzip.decompress(content)))["SMILES"].drop_duplicates()


def draw(source: pd.Series, size: int) -> list[str]:
    """The first molecules of a random order, without imines written with an explicit hydrogen.

    The benchmark has no type for these as they are written.
    """
    order = source.sample(frac=1, random_state=SEED)
    return order[~order.str.contains("[H]", regex=False)].iloc[:size].tolist()


def make_table(folder: Path, containing: str) -> pd.DataFrame:
    """The table ``split,smiles,y`` of molecules whose SMILES contains a text."""

    def drawn(name: str, size: int) -> list[str]:
        source = read_source(folder, name)
        return draw(source[source.str.contains(containing, regex=False)], size)

    smiles = [
        *drawn("train.csv.gz", SIZES["train"] + SIZES["val"]),
        *drawn("test.csv.gz", SIZES["test"]),
    ]
    return pd.DataFrame(
        {
            "split": [split for split, size in SIZES.items() for _ in range(size)],
            "smiles": smiles,
            "y": [
                round(target(molecule), 8)
                for molecule in tqdm(smiles, "penalized logP", file=sys.stderr)
            ],
        }
    )


def unused(folder: Path) -> list[str]:
    """Test molecules of the benchmark that are in no table and whose atoms have known types."""
    paths = [Path(__file__).with_name(f"{name}.csv.gz") for name in TABLES]
    used = pd.concat([pd.read_csv(path)["smiles"] for path in paths])
    source = read_source(folder, "test.csv.gz")
    return draw(source[~source.isin(used)], len(source))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where train.csv.gz and test.csv.gz are")
    parser.add_argument("--unused", type=Path, help="write the test molecules of no table")
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.unused is not None:
        arguments.unused.write_text("\n".join(unused(folder)) + "\n")
        return
    for name, containing in TABLES.items():
        output = Path(__file__).with_name(f"{name}.csv.gz")
        content = make_table(folder, containing).to_csv(index=False).encode()
        temporary = output.with_suffix(".tmp")
        temporary.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))
        temporary.replace(output)
        print(f"{output.name}: sha256 {hashlib.sha256(output.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
