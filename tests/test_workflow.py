"""The workflow: the whole grid and the clusters in dry runs, a grid of seconds for real."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pandas as pd
import pytest
import yaml
from conftest import REPOSITORY

from studies.__main__ import STUDIES, parser
from studies.bond_changes import CHANGES
from studies.commands import overrides
from studies.data import load
from studies.emergence import fit_to_data
from studies.explicit_bias import ARMS, COUNTED, OTHERS
from studies.published import CONFIGS, titles
from studies.results import TABLES

WORKFLOW = REPOSITORY / "workflow"
GRID = yaml.safe_load((WORKFLOW / "grid.yaml").read_text())
TINY = yaml.safe_load((WORKFLOW / "tiny.yaml").read_text())
RUNS = {name: GRID["defaults"] | run for name, run in GRID["runs"].items()}
REMEDIES = {name: run for name, run in RUNS.items() if "remedy" in run["studies"]}
PLUGINS = {
    "slurm": ("snakemake_executor_plugin_slurm",),
    "kubernetes": ("snakemake_executor_plugin_kubernetes", "snakemake_storage_plugin_fs"),
}

pytestmark = pytest.mark.skipif(
    find_spec("snakemake") is None,
    reason="snakemake is not installed; it comes with the extra: workflow",
)


def command(directory, *arguments):
    snakefile = str(WORKFLOW / "Snakefile")
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", snakefile),
        *("--directory", str(directory), *arguments),
    ]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Bundled data, caches of the module's own, no cluster that a home directory knows of."""
    home = tmp_path_factory.mktemp("home")
    hidden = ("MAPKG_DATA", "KUBECONFIG", "SNAKEMAKE_PROFILE")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}


@pytest.fixture(scope="module")
def snakemake(environment):
    """Runs the workflow; returns the finished process, its output in one text."""

    def run(directory, *arguments):
        return subprocess.run(
            command(directory, *arguments),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run


def shell_commands(output):
    """The words of each command of a dry run, without where its output goes."""
    lines = re.findall(r"^Shell command: (?!None$)(.*)$", output, re.MULTILINE)
    return [shlex.split(re.split(r" 2?> ", line)[0]) for line in lines]


def parsed(output):
    """What the command line makes of the commands of a dry run, by their name."""
    found = {}
    for words in shell_commands(output):
        if words[1:3] == ["-m", "studies"]:
            assert words[0] == sys.executable
            values = vars(parser(words[3:]).parse_args(words[3:]))  # exits if one is misspelt
            found.setdefault(values.get("study", words[3]), []).append(values)
    return found


@pytest.fixture(scope="module")
def dry_run(snakemake, tmp_path_factory):
    directory = tmp_path_factory.mktemp("dry")
    result = snakemake(directory, "--dry-run", "--cores", "2")
    assert result.returncode == 0, result.stdout
    assert [path.name for path in directory.iterdir()] == [".snakemake"]
    return result.stdout


@pytest.fixture(scope="module")
def planned(dry_run):
    """The commands of the whole grid, parsed."""
    return parsed(dry_run)


def executed(output, rule):
    return len(re.findall(rf"^(?:local)?rule {rule}:$", output, re.MULTILINE))


# The grid.


def test_every_run_is_trained_once_for_each_seed_in_a_process_of_one_thread(planned):
    trained = {str(run.pop("out")): run for run in map(dict, planned["train"])}
    assert len(trained) == len(planned["train"])
    assert trained.keys() == {
        f"runs/{n}-{seed}" for n, run in RUNS.items() for seed in run["seeds"]
    }
    for folder, run in trained.items():
        name, _, seed = folder.removeprefix("runs/").rpartition("-")
        entry = RUNS[name]
        for key in ("config", "dataset", "epochs"):
            assert run[key] == entry[key]
        assert (run["seed"], run["threads"]) == (int(seed), 1)
        assert run.get("change", "") == entry["change"]
        assert run.get("permute_targets", False) == ("permuted" in name)
        assert len(entry["seeds"]) >= 3


def test_every_change_of_a_configuration_is_one_that_it_takes(planned):
    changed = {}
    for run in planned["train"] + planned["untrained"]:
        values = overrides(run.get("set", ()))
        CONFIGS[run["config"]].replace(**values)  # raises ValueError if one is out of range
        changed |= {run["config"]: values} if values else {}
    assert changed["GT-TOX21"]["hidden_channels"] == 96


@pytest.mark.slow
def test_every_change_of_data_fits_the_network_that_is_trained_on_it(planned, cache):
    for run in planned["train"]:
        if "change" not in run or run["seed"] > 0:
            continue
        splits = load("moses-triple" if run["dataset"] == "moses-triple" else "moses")
        changed = CHANGES[run["change"]](splits, run["seed"])
        config = CONFIGS[run["config"]].replace(**overrides(run.get("set", ())))
        fit_to_data(config, changed.description)  # raises ValueError if a table is too small
        assert config.num_edge_types == max(4, changed.description.num_edge_types)


@pytest.mark.parametrize("study", sorted({s for run in RUNS.values() for s in run["studies"]}))
def test_a_study_of_finished_runs_is_made_of_all_seeds_as_they_were_trained(study, planned):
    made = {values["output"]: values for values in planned[study]}
    wanted = {name: run for name, run in RUNS.items() if study in run["studies"]}
    assert made.keys() == {f"data/results/{study}_{name}" for name in wanted}
    for name, run in wanted.items():
        values = made[f"data/results/{study}_{name}"]
        assert [*map(str, values["folders"])] == [f"runs/{name}-{seed}" for seed in run["seeds"]]
        if study not in ("emergence", "remedy"):
            assert (values["dataset"], values["change"] or "") == (run["dataset"], run["change"])
        words = ["study", study, "x", "-o", "x", *shlex.split(run["studies"][study])]
        words += ["--dataset", "x"] if "dataset" in values else []
        options = vars(parser(words).parse_args(words))
        shared = ("folders", "output", "dataset", "change")
        for key, value in options.items():
            assert key in shared or values[key] == value


def test_tables_that_are_tracked_are_those_that_the_grid_makes(dry_run):
    made = set(re.findall(r"data/results/\w+\.csv\.gz", dry_run))
    tracked = {f"data/results/{path.name}" for path in REPOSITORY.glob("data/results/*.csv.gz")}
    others = r"/(converged_|emergence_gt_moses_|remedy_times|bonds_\w+_unused_|gradient)"
    assert made <= tracked | {table for table in made if "gradient" in table}
    assert [table for table in tracked - made if not re.search(others, table)] == []


def test_studies_of_many_trainings_are_made_apart_and_then_copied(planned, dry_run):
    made = {values["output"]: values for study in STUDIES for values in planned.get(study, ())}
    for name, study in GRID["studies"].items():
        values = made[f"runs/studies/unfinished/{name}"]
        assert (values["study"], values["dataset"]) == (study["study"], study["dataset"])
        for table in study["tables"]:
            assert f"runs/studies/{name}_{table}.csv.gz data/results" in dry_run or (
                f"runs/studies/{name}_{table}.csv.gz runs/studies/{name}" in dry_run
            )


def test_networks_with_a_remedy_differ_from_those_without_in_it_alone():
    arms = {**ARMS, **OTHERS, **COUNTED}
    for name, run in REMEDIES.items():
        pair, _, arm = name.rpartition("_")
        assert arm in arms
        assert run["change"] == ("neighbour-count" if arm in COUNTED else "")
        pair = pair.removesuffix("_more")
        without = RUNS.get(f"{pair}_none") or RUNS[pair]  # or that of the grid of emergence
        for key in ("config", "dataset", "epochs"):
            assert run[key] == without[key]


def test_untrained_networks_are_those_that_are_trained(planned):
    counts = {str(values["output"]): values for values in planned["untrained"]}
    wanted = {name: run for name, run in RUNS.items() if run["untrained"]}
    assert counts.keys() == {f"data/results/untrained_{name}.csv.gz" for name in wanted}
    trained = {str(values["out"]): values for values in planned["train"]}
    for name, run in wanted.items():
        values = counts[f"data/results/untrained_{name}.csv.gz"]
        assert values["networks"] == run["untrained"] == 20
        for key in ("config", "dataset", "set"):
            assert values.get(key) == trained[f"runs/{name}-0"].get(key)
    assert wanted.keys() == titles("grid").keys() | titles("variants").keys()


def test_each_data_set_is_prepared_once_and_laws_figures_and_book_follow(planned, dry_run):
    used = {entry["dataset"] for entry in (*RUNS.values(), *GRID["studies"].values())}
    assert sorted(values["dataset"] for values in planned["data"]) == sorted(used)
    (laws,) = planned["laws"]
    assert laws["runs"] == [name for name, run in RUNS.items() if "emergence" in run["studies"]]
    scripts = [words[1] for words in shell_commands(dry_run) if words[1].startswith("book/")]
    assert scripts == ["book/figures.py", "book/build.py"]


def test_every_default_of_the_grid_is_explained():
    text = (WORKFLOW / "grid.yaml").read_text()
    for key in GRID["defaults"]:
        assert re.search(rf"^  {key}: .* # \w", text, re.MULTILINE), f"{key} has no comment"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epoch": 3}, "missing or unknown: epoch"),
        ({"epochs": None, "config": None}, "missing or unknown: config, epochs"),
        ({"studies": {"bond": ""}}, "unknown studies bond; known: emergence, bonds"),
    ],
    ids=["misspelt", "missing", "study"],
)
def test_what_is_misspelt_or_missing_in_the_grid_is_refused(change, named, snakemake, tmp_path):
    run = {k: v for k, v in (TINY["runs"]["tiny"] | change).items() if v is not None}
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump(TINY | {"runs": {"tiny": run}}))
    result = snakemake(tmp_path, "--dry-run", "--cores", "1", "--configfile", str(grid))
    assert result.returncode != 0
    assert named in result.stdout


def test_pages_call_runs_by_the_titles_of_the_grid():
    assert titles("grid")["gt_zinc"] == "GT, ZINC" and titles("variants")["gt_zinc"] == "GT"
    with pytest.raises(ValueError, match="group gird: did you mean grid"):
        titles("gird")


# Clusters.


@pytest.fixture(scope="module", params=PLUGINS)
def cluster(request, snakemake, tmp_path_factory):
    """A profile's name, and a dry run of one run and one study with it."""
    name = request.param
    for plugin in PLUGINS[name]:
        if find_spec(plugin) is None:
            pytest.skip(f"{plugin} is not installed; it comes with the extra: workflow")
    profile = str(WORKFLOW / "profiles" / name)
    directory = tmp_path_factory.mktemp(name)
    result = snakemake(directory, "--dry-run", "--profile", profile, "gt_zinc", "missing_cora")
    assert result.returncode == 0, result.stdout
    return name, result.stdout


def test_a_profile_says_what_trainings_need_and_a_dry_run_needs_no_cluster(cluster):
    name, output = cluster
    profile = yaml.safe_load((WORKFLOW / "profiles" / name / "config.yaml").read_text())
    assert profile["executor"] == name
    assert "This was a dry-run" in output
    assert {values["seed"] for values in parsed(output)["train"]} == {0, 1, 2}
    listed = re.findall(r"^rule (\w+):\n(?:    .*\n)*?    resources: (.*)$", output, re.M)
    needs = [(rule, dict(part.split("=") for part in line.split(", "))) for rule, line in listed]
    stated = [(rule, need) for rule, need in needs if "mem_mb" in need and rule != "data"]
    assert sorted(rule for rule, _ in stated) == [*["train"] * 3, "train_missing_cora"]
    for rule, need in stated:
        if rule == "train":
            assert int(need["mem_mb"]) == RUNS["gt_zinc"]["mem_mb"]
            assert int(need["runtime"]) == 60 * RUNS["gt_zinc"]["hours"]


def test_tables_come_into_the_repository_and_runs_where_the_cluster_keeps_files(cluster):
    name, output = cluster
    found = parsed(output)
    storage = {"slurm": "", "kubernetes": ".snakemake/storage/fs/mnt/mapkg/files/"}[name]
    runs = {f"{storage}runs/gt_zinc-{seed}" for seed in range(3)}
    assert {str(values["out"]) for values in found["train"]} == runs
    for study in RUNS["gt_zinc"]["studies"]:
        (values,) = found[study]
        assert {str(folder) for folder in values["folders"]} == runs
        assert values["output"] == f"data/results/{study}_gt_zinc"
    (copied,) = (words for words in shell_commands(output) if words[0] == "cp")
    tables = [f"{storage}runs/studies/missing_cora_{kind}.csv.gz" for kind in ("runs", "curves")]
    assert copied == ["cp", *tables, "data/results"]


# For real.


@pytest.fixture(scope="module")
def tried(snakemake, tmp_path_factory):
    """The try-out and a run that fails, run side by side: the folder and the process."""
    directory = tmp_path_factory.mktemp("tried")
    broken = TINY["runs"]["tiny"] | {
        "seeds": [0],
        "options": "--set hidden_channels=8 heads=3",
        "untrained": 0,
    }
    grid = directory / "grid.yaml"
    grid.write_text(yaml.safe_dump(TINY | {"runs": {"broken": broken, **TINY["runs"]}}))
    settings = ("--cores", "2", "--configfile", str(grid))
    return directory, snakemake(directory, "broken", "tiny", *settings)


@pytest.mark.slow
def test_a_failed_run_leaves_its_log_and_does_not_stop_the_others(tried):
    directory, result = tried
    assert result.returncode != 0
    message = "hidden_channels (8) must be a multiple of heads (3)"
    assert message in (directory / "runs/logs/train-broken-0.log").read_text()
    assert message in result.stdout
    made = {path.name for path in (directory / "data/results").iterdir()}
    assert made == {"untrained_tiny.csv.gz"} | {f"emergence_tiny_{t}.csv.gz" for t in TABLES}
    summary = pd.read_csv(directory / "data/results/emergence_tiny_summary.csv.gz")
    assert summary["seed"].unique().tolist() == [0, 1]
    assert set(summary["dataset"]) == {"MOSES sample, first 16"}
    assert summary["changes"].str.contains("num_layers=1").all()


@pytest.mark.slow
def test_what_is_done_is_not_done_again(tried, snakemake):
    directory, _ = tried
    settings = ("results", "--cores", "2", "--configfile", str(WORKFLOW / "tiny.yaml"))
    result = snakemake(directory, *settings)
    assert result.returncode == 0, result.stdout
    assert [executed(result.stdout, rule) for rule in ("train", "emergence", "laws")] == [1, 0, 1]
    assert (directory / "data/results/laws.csv.gz").is_file()
    layers = pd.read_csv(directory / "data/results/remedy_tiny_sink_layers.csv.gz")
    assert layers["state"].tolist() == ["base", "best"]
    study = pd.read_csv(directory / "data/results/tiny_depth_runs.csv.gz")
    assert study["norm"].fillna("none").tolist() == ["none", "lipschitz"]
    result = snakemake(directory, *settings)
    assert result.returncode == 0
    assert "Nothing to be done" in result.stdout


@pytest.mark.slow
def test_an_interrupted_training_goes_on_from_its_state(environment, snakemake, tmp_path):
    epochs = 100
    grid = tmp_path / "grid.yaml"
    run = TINY["runs"]["tiny"] | {"epochs": epochs}
    grid.write_text(yaml.safe_dump(TINY | {"runs": {"tiny": run}}))
    target = "runs/tiny-0/history.csv.gz"
    settings = (target, "--cores", "1", "--configfile", str(grid))

    def heed_interrupts():  # which a job in the background of a shell inherits as ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    # A session of its own, to press Control-C for Snakemake and the training alike.
    process = subprocess.Popen(
        command(tmp_path, *settings),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    state = tmp_path / "runs/tiny-0/state.safetensors"
    while not state.is_file():
        assert process.poll() is None, "the workflow ended before the first epoch"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() != 0
    assert state.is_file()
    assert not (tmp_path / target).exists()

    result = snakemake(tmp_path, *settings)
    assert result.returncode == 0, result.stdout
    log = (tmp_path / "runs/logs/train-tiny-0.log").read_text()
    assert 0 < int(re.search(r"resumed after epoch (\d+) from", log).group(1)) < epochs
    assert pd.read_csv(tmp_path / target)["epoch"].tolist() == list(range(1, epochs + 1))
