"""A small ogbn-proteins in OGB's raw format, for the tests that read it or train on it."""

import gzip

import numpy as np

from studies.extras.ogbn_proteins import SPECIES

NUM_NODES = 30
TRAIN, VALID, TEST = [4, 0, 2, *range(10, 20)], [1, 3, *range(20, 24)], [5, 29, 6, 7]
"""Nodes of the splits; some are in none."""


def place(root, name):
    return root / "ogbn_proteins" / f"{name}.csv.gz"


def write(root, name, text):
    path = place(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def write_ogbn_proteins(root):
    """Writes the raw files under a data root and returns what they say, as arrays."""
    random = np.random.default_rng(0)
    pairs = random.permutation(np.argwhere(np.triu(np.ones((28, 28)), 1)))[:120]
    swapped = random.random(len(pairs)) < 0.5  # either end comes first
    pairs[swapped] = pairs[swapped, ::-1]
    content = {
        "edges": pairs,  # 28 and 29 have none
        "edge_attr": random.integers(0, 1001, (len(pairs), 8)) / 1000,
        "species": random.permutation(np.resize(list(SPECIES), NUM_NODES)),
        "y": random.integers(0, 2, (NUM_NODES, 112)),
        "root": root,
    }
    columns = {
        "raw/num-node-list": [[NUM_NODES]],
        "raw/num-edge-list": [[len(pairs)]],
        "raw/edge": content["edges"],
        "raw/edge-feat": content["edge_attr"],
        "raw/node_species": content["species"][:, None],
        "raw/node-label": content["y"],
        "split/species/train": [[node] for node in TRAIN],
        "split/species/valid": [[node] for node in VALID],
        "split/species/test": [[node] for node in TEST],
    }
    for name, rows in columns.items():
        write(root, name, "".join(",".join(map(str, row)) + "\n" for row in rows))
    return content
