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

import pandas as pd
import pytest
from conftest import few_molecules

from mapkg.models import build
from studies import checkpoint, tables
from studies.__main__ import main
from studies.data import sets
from studies.emergence import emergence
from studies.published import CONFIGS
from studies.train import STATE_FILE, fit
from studies.train_stacked import STATE_FILE as STACKED_FILE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("cache", "same_number_of_threads"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
rounds = pytest.mark.parametrize("number", range(int(os.environ.get("MAPKG_ROUNDS", "1"))))

SIZES = dict(hidden_channels=8, heads=2, num_layers=2, batch_size=16, dropout=0.1)
TRAIN = ["train", "--config", "GT-ZINC", "--dataset", "moses", "--limit", "32", "--threads", "1"]
TRAIN += ["--epochs", "10", "--set", *(f"{name}={value}" for name, value in SIZES.items()), "--out"]
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


def in_another_process(function, *arguments):
    """Start a process that has all imports already."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


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
    both = [in_another_process(train, folder, log) for log in logs]
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
@pytest.mark.parametrize("seeds", [None, (3, 0)])
def test_a_damaged_state_is_named_and_never_trained_on(number, seeds, tmp_path):
    draw, splits = random.Random(number), few_molecules(32, 8, 8)
    config = CONFIGS["GT-ZINC"].replace(**SIZES, max_epochs=2)
    path = tmp_path / (STACKED_FILE if seeds else STATE_FILE)

    def train():
        model, stacked = (build, dict(seeds=seeds)) if seeds else (build(config), {})
        return fit(model, splits, config, folder=tmp_path, progress=False, **stacked)

    train()
    whole = path.read_bytes()
    for content in (whole.replace(b'lr\\": 0.0007', b'lr\\": 0.0008'), damaged(whole, draw)):
        assert content != whole
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"safetensors: damaged, .* remove it to start afresh"):
            train()


@rounds
def test_a_checkpoint_that_is_damaged_is_refused_and_written_again(number, tmp_path):
    draw, splits = random.Random(number), few_molecules(32, 8, 8)
    settings = dict(seed=number, folder=tmp_path, progress=False)
    config = CONFIGS["GT-ZINC"].replace(**SIZES, max_epochs=2)
    emergence(config, splits, **settings)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("best.safetensors", "best.json", "summary.csv.gz"):
        (tmp_path / name).write_bytes(damaged(before[name], draw))
    with pytest.raises(ValueError, match=r"damaged|do not belong together|not the description"):
        checkpoint.load(tmp_path / "best")
    emergence(config, splits, **settings)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def do_study(folder, left=None):
    """Five trainings; killed in the middle of a write after so many."""
    write = tables.write_atomically

    def or_die(path, content):
        nonlocal left
        left -= 1
        if left < 0:
            (path.parent / f".{path.name}.x.part").write_bytes(content[:9])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)

    def learn(seed):
        return {"loss": seed / 7}, pd.DataFrame({"epoch": [1, 2], "value": [seed, seed / 3]})

    tables.write_atomically = write if left is None else or_die
    jobs = [({"seed": seed}, lambda seed=seed: learn(seed)) for seed in range(5)]
    tables.run_study(jobs, labels=["seed"], prefix=folder / "study", progress=False)


@rounds
def test_a_study_killed_between_its_tables_goes_on(number, tmp_path):
    draw = random.Random(number)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for left in (draw.randrange(6), draw.randrange(4)):
        process = in_another_process(do_study, killed, left)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    written = []
    for folder in (whole, killed):
        do_study(folder)
        written.append({p.name: p.read_bytes() for p in folder.glob("study_*.csv.gz")})
    assert written[0] == written[1] and len(written[0]) == 2
    with pytest.raises(ValueError, match="holds the table of another study"):
        tables.run_study([({"norm": "x"}, print)], labels=["norm"], prefix=killed / "study")


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
