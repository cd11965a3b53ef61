"""What several test modules share."""

import contextlib
import gc
import gzip
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import torch

from studies.data import NodesOfGraph, Splits, load
from studies.data.networks import citation_like

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"
ORACLE = Path(os.environ.get("MAPKG_ORACLE", SHARED / "oracle"))
NOT_BUNDLED = Path(os.environ.get("MAPKG_DATA", SHARED / "data"))
"""Where the data sets are that the repository does not carry, if they are anywhere."""


def pytest_collection_finish():
    """What was imported is not looked through for garbage again and again."""
    gc.freeze()


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium that resolves no name; skips with the reason where it is missing."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    flags = ["--no-sandbox", "--disable-gpu", offline, "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--no-first-run"]
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=chromium, args=flags)
        yield started
        started.close()


def write(path, content):
    """A file with a content, and the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def all_graphs(splits):
    """The graphs of all splits, in their order."""
    return [*splits.train, *splits.val, *splits.test]


def few_molecules(train, val, test):
    """The first of the bundled molecules, so many of each split."""
    whole = load("moses")
    return replace(whole, train=whole.train[:train], val=whole.val[:val], test=whole.test[:test])


@pytest.fixture(scope="session")
def splits():
    return few_molecules(64, 32, 32)


SMALL_CITATION = dict(num_nodes=300, num_edges=600, num_words=40, num_classes=3)


def not_bundled(name):
    """A data set that the repository may not carry, or a skip with the reason."""
    try:
        return load(name, None if name == "moses" else NOT_BUNDLED, download=False)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def papers():
    """The nodes of a small synthetic citation graph, in three splits."""
    graph = citation_like(0, **SMALL_CITATION)
    parts = {
        name: NodesOfGraph(graph, graph[f"{name}_mask"].nonzero().flatten())
        for name in ("train", "val", "test")
    }
    about = replace(load("citation").description, num_targets=SMALL_CITATION["num_classes"])
    return Splits(**parts, description=about)


OGB = {
    "raw/num-node-list": "5",
    "raw/num-edge-list": "4",
    "raw/edge": "0,1\n2,1\n3,2\n0,2",
    "raw/edge-feat": "0,0,0,0,.7,0,0,.3\n0,0,0,0,0,.2,0,.2\n1,0,0,0,0,0,0,0\n0,.5,0,0,0,0,0,0",
    "raw/node_species": "9606\n3702\n9606\n4932\n9606",
    "raw/node-label": "1,0\n0,1\n1,1\n0,0\n1,0",
    "split/species/train": "3\n0",
    "split/species/valid": "1",
    "split/species/test": "2",
}
"""A small network of proteins as OGB lays it out; protein 4 has no edge and is in no split."""


def ogb_files(folder, **changes):
    """The folder with these files, some of them with other text."""
    for name, text in (OGB | changes).items():
        write(folder / f"{name}.csv.gz", gzip.compress(text.encode()))
    return folder


@pytest.fixture(scope="module")
def cache():
    """A cache folder of the tests' own in place of the user's, and no MAPKG_DATA.

    It stays between runs, and shares the graphs that the book has cached: the key of an entry
    covers the data and the code that reads them.
    """
    folder = REPOSITORY / "_build" / "test_cache"
    own, cached = folder / "mapkg" / "graphs", platformdirs.user_cache_path("mapkg") / "graphs"
    own.parent.mkdir(parents=True, exist_ok=True)
    if cached.is_dir():
        with contextlib.suppress(FileExistsError):
            own.symlink_to(cached)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.delenv("MAPKG_DATA", raising=False)
        yield folder / "mapkg"


@pytest.fixture
def same_number_of_threads():
    """Takes back what --threads does to the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mapkg"


@pytest.fixture
def oracle():
    """Loads recorded values of the published layers, or skips with the reason."""

    def load(name):
        path = ORACLE / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"no recorded values of the published layers at {path}")
        with np.load(path) as stored:
            return {
                key: str(stored[key]) if key == "meta" else torch.from_numpy(stored[key])
                for key in stored.files
            }

    return load
