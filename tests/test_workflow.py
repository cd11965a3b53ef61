"""The workflow: the whole grid and the clusters in dry runs, a grid of seconds for real."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec

import pandas as pd
import pytest
import yaml
from conftest import REPOSITORY

from studies.__main__ import parser
from studies.commands import overrides
from studies.explicit_bias import ARMS, COUNTED, OTHERS
from studies.published import CONFIGS, titles

WORKFLOW = REPOSITORY / "workflow"
sys.path.insert(0, str(WORKFLOW))
import publish  # noqa: E402

GRID = yaml.safe_load((WORKFLOW / "grid.yaml").read_text())
TINY = yaml.safe_load((WORKFLOW / "tiny.yaml").read_text())
RUNS = {name: GRID["defaults"] | run for name, run in GRID["runs"].items()}
WANTED = publish.wanted(RUNS, GRID["studies"])
PLUGINS = {
    "slurm": ("snakemake_executor_plugin_slurm",),
    "kubernetes": ("snakemake_executor_plugin_kubernetes", "snakemake_storage_plugin_fs"),
}
needs_snakemake = pytest.mark.skipif(
    find_spec("snakemake") is None,
    reason="snakemake is not installed; it comes with the extra: workflow",
)


def command(directory, *arguments):
    snakefile = ["--snakefile", str(WORKFLOW / "Snakefile"), "--directory", str(directory)]
    return [sys.executable, "-m", "snakemake", *snakefile, *arguments]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Bundled data, caches of the module's own, no cluster that a home directory knows of."""
    home = tmp_path_factory.mktemp("home")
    hidden = ("MAPKG_DATA", "KUBECONFIG", "SNAKEMAKE_PROFILE")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}


@pytest.fixture(scope="module")
def snakemake(environment):
    """Runs the workflow on a grid; returns the finished process, its output in one text."""

    def run(directory, *arguments, grid=None):
        if grid is not None:
            (directory / "grid.yaml").write_text(yaml.safe_dump(grid))
            arguments += ("--configfile", str(directory / "grid.yaml"))
        look = dict(env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.run(command(directory, *arguments, "--cores", "2"), **look)

    return run


def succeed(result):
    """The result of a run of the workflow, which did not fail."""
    assert result.returncode == 0, result.stdout
    return result


def planned_by(output):
    """What the command line makes of the commands of a dry run, by their name."""
    lines, found = re.findall(r"^Shell command: (?!None$)(.*)$", output, re.MULTILINE), {}
    for words in [shlex.split(re.split(r" 2?> | && ", line)[0]) for line in lines]:
        if words[1:3] == ["-m", "studies"]:
            assert words[0] == sys.executable
            values = vars(parser(words[3:]).parse_args(words[3:]))  # exits if one is misspelt
            found.setdefault(values.get("study", words[3]), []).append(values)
        elif words[1].endswith(".py"):
            found.setdefault(words[1].rpartition("/")[2], []).append(words[2:])
    return found


def folder_of(name, run=None):
    """The folder of a run's trainings, but for their seeds."""
    return f"{name}-{publish.of_training(run or RUNS[name])}"


@pytest.fixture(scope="module")
def planned(snakemake, tmp_path_factory):
    """The commands of the whole grid, parsed."""
    directory = tmp_path_factory.mktemp("dry")
    result = succeed(snakemake(directory, "--dry-run"))
    assert [path.name for path in directory.iterdir()] == [".snakemake"]
    return planned_by(result.stdout)


@needs_snakemake
def test_every_run_is_trained_once_for_each_seed_with_settings_that_its_network_takes(planned):
    trained = {str(values["out"]): values for values in planned["train"]}
    assert len(trained) == len(planned["train"]) == sum(len(run["seeds"]) for run in RUNS.values())
    for name, run in RUNS.items():
        pair = RUNS.get(run["titles"].get("further"), run)
        assert len({*run["seeds"], *pair["seeds"]}) >= 3
        for seed in run["seeds"]:
            values = trained[f"runs/{folder_of(name)}-{seed}"]
            for key in ("config", "dataset", "epochs", "threads"):
                assert values[key] == run[key]
            assert (values["seed"], values.get("change", "")) == (seed, run["change"])
            assert values.get("permute_targets", False) == ("permuted" in name)
            CONFIGS[run["config"]].replace(**overrides(values.get("set", ())))
    for values in planned["untrained"]:
        name = re.fullmatch(r"runs/tables/untrained_(\w+)-\w+\.csv\.gz", values["output"])[1]
        of_run = trained[f"runs/{folder_of(name)}-0"]
        assert all(values.get(key) == of_run.get(key) for key in ("config", "dataset", "set"))
        assert values["networks"] == RUNS[name]["untrained"] == 20
    wanted = {name for name, run in RUNS.items() if run["untrained"]}
    assert wanted == titles("grid").keys() | titles("variants").keys()


@needs_snakemake
def test_studies_are_made_of_all_seeds_as_they_were_trained_and_published_as_a_whole(planned):
    published = {name: (digest, tables) for name, digest, *tables in planned["publish.py"]}
    assert {name: digest for name, (digest, _) in published.items()} == WANTED
    made = {values["output"]: values for study in publish.OF_RUNS for values in planned[study]}
    for name, run in RUNS.items():
        folder = folder_of(name)
        tables = set()
        for study, options in run["studies"].items():
            prefix = f"runs/tables/{study}_{name}-{publish.of_study(run, study)}"
            values = made.pop(prefix)
            folders = [f"runs/{folder}-{seed}" for seed in run["seeds"]]
            assert [*map(str, values["folders"])] == folders
            words = ["study", study, "x", "-o", prefix, *shlex.split(options)]
            if study not in ("emergence", "remedy"):
                words += ["--dataset", run["dataset"]]
                words += ["--change", run["change"]] if run["change"] else []
            assert values | {"folders": 0} == vars(parser(words).parse_args(words)) | {"folders": 0}
            tables |= {f"{prefix}{t and f'_{t}'}.csv.gz" for t in publish.OF_RUNS[study]}
        assert {t for t in published.get(name, (0, ()))[1] if "/untrained_" not in t} == tables
    assert made == {}
    for name, study in GRID["studies"].items():
        where = f"runs/studies/unfinished/{name}-{WANTED[name]}"
        (values,) = (each for each in planned[study["study"]] if each["output"] == where)
        assert values["dataset"] == study["dataset"]
    (laws,) = planned["laws"]
    assert laws["runs"] == [name for name, run in RUNS.items() if "emergence" in run["studies"]]
    assert len(planned["figures.py"]) == len(planned["build.py"]) == 1
    used = {entry["dataset"] for entry in (*RUNS.values(), *GRID["studies"].values())}
    assert sorted(values["dataset"] for values in planned["data"]) == sorted(used)


def test_networks_with_a_remedy_differ_from_those_without_in_it_alone():
    arms = {**ARMS, **OTHERS, **COUNTED}
    for name, run in RUNS.items():
        if "remedy" in run["studies"]:
            pair, _, arm = name.rpartition("_")
            assert arm in arms
            assert run["change"] == ("neighbour-count" if arm in COUNTED else "")
            pair = pair.removesuffix("_more")
            without = RUNS.get(f"{pair}_none") or RUNS[pair]  # or that of the grid of emergence
            assert all(run[key] == without[key] for key in ("config", "dataset", "epochs"))


@needs_snakemake
def test_what_is_misspelt_or_missing_in_the_grid_is_refused(snakemake, tmp_path):
    tiny = TINY["runs"]["tiny"]
    lacks = {key: value for key, value in tiny.items() if key not in ("epochs", "config")}
    for run, named in (
        (tiny | {"epoch": 3}, "missing or unknown: epoch"),
        (lacks, "missing or unknown: config, epochs"),
        (tiny | {"studies": {"bond": ""}}, "unknown studies bond; known: emergence, bonds"),
    ):
        result = snakemake(tmp_path, "--dry-run", grid=TINY | {"runs": {"tiny": run}})
        assert result.returncode != 0 and named in result.stdout


def test_tracked_tables_are_those_of_the_grid(capsys):
    assert publish.main([]) == 0, f"make check-results: {capsys.readouterr().err}"


@needs_snakemake
@pytest.mark.parametrize(
    ("name", "change", "trainings"),
    [
        ("gt_zinc", {"titles": {}, "hours": 13}, 0),
        ("gt_zinc", {"seeds": [0, 1, 2, 3]}, 4),
        ("shuffled", {"threads": 2}, 3),
        ("san_zinc", {"studies": RUNS["san_zinc"]["studies"] | {"bonds": "--by ring"}}, 3),
        ("trees_2", {"options": "--passes 5001"}, 0),
    ],
    ids=["a title", "a fourth seed", "threads", "a study", "other"],
)
def test_a_fresh_clone_makes_what_was_changed_and_nothing_else(
    name, change, trainings, snakemake, tmp_path
):
    shutil.copytree(REPOSITORY / "data" / "results", tmp_path / "data" / "results")
    grid = json.loads(json.dumps(GRID))
    grid["runs" if name in RUNS else "studies"][name] |= change
    result = succeed(snakemake(tmp_path, "results", "--dry-run", grid=grid))
    found = planned_by(result.stdout)
    trained = Counter(str(values["out"]).split("-")[0] for values in found.get("train", ()))
    assert trained == ({f"runs/{name}": trainings} if trainings else {})
    made = {words[0] for words in found.get("publish.py", ())} - {"laws"}
    made -= publish.stale(WANTED, REPOSITORY / publish.RESULTS).keys()
    assert made == ({name} if trainings or name not in RUNS else set())


def test_tables_are_published_as_a_whole_and_what_became_of_them_since_is_said(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tables = [tmp_path / f"remedy_x-12345678_{kind}.csv.gz" for kind in ("layers", "epochs")]
    for path in tables:
        path.write_bytes(path.name.encode())
    layers, results = "remedy_x_layers.csv.gz", tmp_path / "data" / "results"
    publish.publish("x", "12345678", tables)
    assert {*os.listdir(results)} == {"made.json", "remedy_x_epochs.csv.gz", layers}
    assert publish.stale({"x": "12345678"}) == {}
    assert "12345678, now 0" in publish.stale({"x": "0"})["x"]
    assert publish.stale({"y": "1"}) == {"y": "was not made with its settings, 1"}
    tables[0].write_bytes(b"newer")
    tables[1].unlink()
    with pytest.raises(FileNotFoundError):
        publish.publish("x", "0", tables)
    assert publish.stale({"x": "12345678"}) == {}, "nothing was replaced"
    publish.publish("x", "0", tables[:1])
    assert {*os.listdir(results)} == {"made.json", layers}
    assert (results / layers).read_bytes() == b"newer"
    (results / layers).write_bytes(b"by hand")
    assert publish.stale({"x": "0"}) == {"x": f"was changed by hand: {layers}"}
    (results / layers).unlink()
    assert publish.stale({"x": "0"}) == {"x": f"lacks {layers}"}


def test_a_run_may_be_called_by_a_date_and_keeps_its_tables_to_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "data" / "results"
    for name in ("x-20261129", "x-20261130", "x"):
        table = tmp_path / f"idle_{name}-12345678.csv.gz"
        table.write_bytes(name.encode())
        publish.publish(name, "0", [table])
        assert (results / f"idle_{name}.csv.gz").read_bytes() == name.encode()
    with pytest.raises(ValueError, match=r"y: expected tables of its own, got idle_x.csv.gz of x"):
        publish.publish("y", "0", [results / "idle_x.csv.gz"])
    assert publish.stale(dict.fromkeys(("x-20261129", "x-20261130", "x"), "0")) == {}
    (results / "made.json").write_text('{"x": ')
    with pytest.raises(SystemExit, match=r"made.json: damaged, .*; restore it with git"):
        publish.publish("x", "0", [])


def test_tables_of_what_is_no_longer_in_the_grid_are_named(capsys, monkeypatch):
    entries = publish.made(REPOSITORY / publish.RESULTS)
    monkeypatch.setattr(
        publish, "made", lambda *_: entries | {"gone": {"digest": "0", "tables": {}}}
    )
    assert publish.main([]) == 1
    assert "gone is in made.json, and no longer in the grid" in capsys.readouterr().err


@needs_snakemake
@pytest.mark.parametrize("name", PLUGINS)
def test_a_profile_says_what_trainings_need_and_where_a_cluster_keeps_their_files(
    name, snakemake, tmp_path
):
    for plugin in PLUGINS[name]:
        if find_spec(plugin) is None:
            pytest.skip(f"{plugin} is not installed; it comes with the extra: workflow")
    profile = ("--profile", str(WORKFLOW / "profiles" / name))
    result = succeed(snakemake(tmp_path, "--dry-run", *profile, "gt_zinc", "missing_cora"))
    needs = re.findall(r"^rule train:\n(?:    .*\n)*?    resources: (.*)$", result.stdout, re.M)
    found, run = planned_by(result.stdout), RUNS["gt_zinc"]
    expected = {f"mem_mb={run['mem_mb']}", f"runtime={60 * run['hours']}"}
    assert [expected <= {*need.split(", ")} for need in needs] == [True] * 3
    storage = {"slurm": "", "kubernetes": ".snakemake/storage/fs/mnt/mapkg/files/"}[name]
    folder = f"{storage}runs/{folder_of('gt_zinc')}"
    assert {str(values["out"]) for values in found["train"]} == {f"{folder}-{s}" for s in range(3)}
    sources = {name: tables for name, _, *tables in found["publish.py"]}
    prefix = f"{storage}runs/studies/missing_cora-{WANTED['missing_cora']}"
    assert sources["missing_cora"] == [f"{prefix}_runs.csv.gz", f"{prefix}_curves.csv.gz"]
    (values,) = found["missing"]
    assert values["output"].startswith(f"{storage}runs/studies/unfinished/missing_cora-")


@pytest.fixture(scope="module")
def tried(snakemake, tmp_path_factory):
    """The try-out and a run that fails, run side by side: the folder and the process."""
    directory = tmp_path_factory.mktemp("tried")
    options = "--set hidden_channels=8 heads=3"
    broken = TINY["runs"]["tiny"] | {"seeds": [0], "options": options, "untrained": 0}
    grid = TINY | {"runs": {"broken": broken, **TINY["runs"]}}
    return directory, snakemake(directory, "broken", "tiny", grid=grid)


@pytest.mark.slow
@needs_snakemake
def test_a_failed_run_leaves_its_log_and_does_not_stop_the_others(tried):
    directory, result = tried
    assert result.returncode != 0
    message = "hidden_channels (8) must be a multiple of heads (3)"
    (log,) = (directory / "runs/logs").glob("train-broken-*-0.log")
    assert message in log.read_text() and message in result.stdout
    names = {"made.json", "untrained_tiny.csv.gz"}
    for study in ("emergence", "bonds"):
        names |= {f"{study}_tiny_{table}.csv.gz" for table in publish.OF_RUNS[study]}
    assert {*os.listdir(directory / "data/results")} == names
    summary = pd.read_csv(directory / "data/results/emergence_tiny_summary.csv.gz")
    assert summary["seed"].unique().tolist() == [0, 1]
    assert set(summary["dataset"]) == {"MOSES sample, first 16"}


@pytest.mark.slow
@needs_snakemake
def test_what_is_done_is_not_done_again_and_no_change_deletes_it(tried, snakemake, tmp_path):
    directory, _ = tried
    result = succeed(snakemake(directory, "results", grid=TINY))
    rules = Counter(re.findall(r"^(?:local)?rule (\w+):$", result.stdout, re.MULTILINE))
    assert (rules["train"], rules["emergence"], rules["laws"]) == (1, 0, 1)
    layers = pd.read_csv(directory / "data/results/remedy_tiny_sink_layers.csv.gz")
    assert layers["state"].tolist() == ["base", "best"]
    study = pd.read_csv(directory / "data/results/tiny_depth_runs.csv.gz")
    assert study["norm"].fillna("none").tolist() == ["none", "lipschitz"]

    def contents():
        files = [*directory.glob("runs/tiny*/*"), *directory.glob("data/results/*")]
        return {path: path.read_bytes() for path in files}

    before, changed = contents(), json.loads(json.dumps(TINY))
    changed["runs"]["tiny"] |= {"options": "--set hidden_channels=8 heads=3"}  # cannot be trained
    assert snakemake(directory, "results", grid=changed).returncode != 0
    assert contents() == before, "tables of the older settings stay, each of them"
    copy = tmp_path / "copy"  # whose files are of another age, the tables newer than what follows
    shutil.copytree(directory, copy, copy_function=shutil.copyfile)
    for path in sorted(copy.rglob("*.csv.gz"), reverse=True):
        path.touch()
    for folder in (directory, copy):
        assert "Nothing to be done" in snakemake(folder, "results", grid=TINY).stdout


@pytest.mark.slow
@needs_snakemake
def test_an_interrupted_training_goes_on_from_its_state(environment, snakemake, tmp_path):
    run = TINY["runs"]["tiny"] | {"epochs": 100}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(TINY | {"runs": {"tiny": run}}))
    folder = f"runs/{folder_of('tiny', TINY['defaults'] | run)}-0"
    settings = (f"{folder}/history.csv.gz", "--configfile", str(tmp_path / "grid.yaml"))

    def heed_interrupts():  # which a job in the background of a shell inherits as ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    # A session of its own, to press Control-C for Snakemake and the training alike.
    look = dict(env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    look |= dict(start_new_session=True, preexec_fn=heed_interrupts)
    process = subprocess.Popen(command(tmp_path, *settings, "--cores", "1"), **look)
    while not (tmp_path / folder / "state.safetensors").is_file():
        assert process.poll() is None, "the workflow ended before the first epoch"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() != 0
    assert not (tmp_path / folder / "history.csv.gz").exists()
    succeed(snakemake(tmp_path, *settings))
    log = (tmp_path / f"runs/logs/train-{folder.removeprefix('runs/')}.log").read_text()
    assert 0 < int(re.search(r"resumed after epoch (\d+) from", log).group(1)) < 100
    history = pd.read_csv(tmp_path / folder / "history.csv.gz")
    assert history["epoch"].tolist() == list(range(1, 101))
