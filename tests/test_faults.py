"""What is killed, doubled or damaged comes out as if nothing had happened, or is named.

Each round has other moments, places and bits; the environment's MAPKG_ROUNDS says how many there
are. ``python -m pytest -m slow tests/test_faults.py``.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
import zipfile

import pytest
from conftest import few_molecules

from studies.__main__ import main
from studies.data import sets

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("cache", "same_number_of_threads"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
rounds = pytest.mark.parametrize("number", range(int(os.environ.get("MAPKG_ROUNDS", "1"))))

TRAIN = ["train", "--config", "GT-ZINC", "--dataset", "moses", "--limit", "32", "--threads", "1"]
TRAIN += ["--epochs", "10", "--set", "hidden_channels=8", "heads=2", "num_layers=2"]
TRAIN += ["batch_size=16", "dropout=0.1", "--out"]
WRITTEN = [f"{state}.safetensors" for state in ("base", "best", "last")]
WRITTEN += [f"{n}.csv.gz" for n in ("summary", "trajectory", "graph_maxima", "histogram")]


def damaged(content, draw):
    """A content cut, longer, or with a single bit flipped."""
    place = draw.randrange(len(content))
    kind = draw.choice(["cut", "longer", "flip", "flip", "flip", "flip"])
    if kind == "cut":
        return content[:place]
    if kind == "longer":
        return content + draw.randbytes(1 + place % 9)
    flipped = bytearray(content)
    flipped[place] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def train(folder, log):
    with log.open("w") as sys.stderr:
        sys.exit(main([*TRAIN, str(folder)]))


@rounds
def test_two_processes_on_one_folder_and_one_killed_lose_nothing(number, tmp_path):
    whole, folder, draw = tmp_path / "whole", tmp_path / "run", random.Random(number)
    few_molecules(1, 1, 1)  # are read from files now
    start = time.perf_counter()
    assert main([*TRAIN, str(whole)]) == 0
    seconds = time.perf_counter() - start
    logs = [tmp_path / name for name in ("one", "other")]
    fork = multiprocessing.get_context("fork")  # has all imports already
    both = [fork.Process(target=train, args=(folder, log)) for log in logs]
    both[0].start(), both[1].start()
    while not folder.exists() and any(one.is_alive() for one in both):
        time.sleep(0.005)
    time.sleep(draw.uniform(0, seconds))
    draw.choice(both).kill()  # SIGKILL: nothing is cleaned up
    for one, log in zip(both, logs, strict=True):
        one.join()
        refused = one.exitcode == 2 and "another process writes to it" in log.read_text()
        assert refused or one.exitcode in (0, -signal.SIGKILL), log.read_text()
    assert main([*TRAIN, str(folder)]) == 0
    for name in WRITTEN:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert not any(path.name.endswith(".part") for path in folder.iterdir())


@rounds
def test_a_damaged_download_or_cache_is_never_kept(number, tmp_path, fresh_cache, monkeypatch):
    draw, file = random.Random(number), "small/table.csv"
    content, path = draw.randbytes(3000).hex().encode(), tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("raw/table.csv", content)
    monkeypatch.setitem(sets.SHA256, file, sets.hashlib.sha256(content).hexdigest())
    whole, kept = path.read_bytes(), fresh_cache / file

    def load(archive):
        return sets.root_with(
            [fresh_cache], [file], lambda: sets.unzipped(archive, {file: "raw/table.csv"})
        )

    headers = [*range(60), *range(len(whole) - 120, len(whole))] if number == 0 else []
    flips = [(place, 1 << bit) for place in headers for bit in range(8)]
    flipped = [bytes(b ^ bit * (i == at) for i, b in enumerate(whole)) for at, bit in flips]
    for archive in (*flipped, *(damaged(whole, draw) for _ in range(50))):
        try:
            root = load(archive)
        except ValueError as error:
            assert "The file is damaged" in str(error)
        else:
            assert root is None or kept.read_bytes() == content
        kept.unlink(missing_ok=True)
    assert load(whole) == fresh_cache and kept.read_bytes() == content
    kept.write_bytes(damaged(content, draw))
    assert load(whole) == fresh_cache and kept.read_bytes() == content
