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

from studies.__main__ import _parser
from studies.bond_changes import CHANGES
from studies.commands import overrides
from studies.data import load
from studies.deep import NORMS
from studies.emergence import fit_to_data
from studies.grid import MODELS
from studies.published import CONFIGS
from studies.remedies import ARMS, COUNTED, OF_THE_GRID, OTHERS, SAME, SETTINGS
from studies.results import TABLES

WORKFLOW = REPOSITORY / "workflow"
GRID = yaml.safe_load((WORKFLOW / "grid.yaml").read_text())
TINY = yaml.safe_load((WORKFLOW / "tiny.yaml").read_text())
PAIRS = {name: GRID["defaults"] | pair for name, pair in GRID["pairs"].items()}
CHANGED = {name: GRID["defaults"] | pair for name, pair in GRID["changed"].items()}
REMEDIES = {name: GRID["defaults"] | pair for name, pair in GRID["remedies"].items()}
ALL = PAIRS | CHANGED | REMEDIES
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


def commands_of_mapkg(output):
    """What the parser of the command line makes of the commands of a dry run, by their name."""
    found = {}
    for words in shell_commands(output):
        if words[1:3] == ["-m", "studies"]:
            assert words[0] == sys.executable
            found.setdefault(words[3], []).append(_parser().parse_args(words[3:]))
    return found


@pytest.fixture(scope="module")
def planned(dry_run):
    """The commands of the whole grid, parsed."""
    return commands_of_mapkg(dry_run)


def executed(output, rule):
    return len(re.findall(rf"^(?:local)?rule {rule}:$", output, re.MULTILINE))


# the grid


@pytest.fixture(scope="module")
def dry_run(snakemake, tmp_path_factory):
    directory = tmp_path_factory.mktemp("dry")
    result = snakemake(directory, "--dry-run", "--cores", "2")
    assert result.returncode == 0, result.stdout
    assert [path.name for path in directory.iterdir()] == [".snakemake"]
    return result.stdout


def test_every_pair_is_trained_once_for_each_seed(planned):
    trained = sorted(
        (
            *(str(run.out), run.config, run.dataset, run.epochs, run.seed, run.permute_targets),
            *(run.change or "", run.keep_every or 0),
        )
        for run in planned["train"]
    )
    assert trained == sorted(
        (
            *(f"runs/{name}-{seed}", pair["config"], pair["dataset"], pair["epochs"], seed),
            "--permute-targets" in pair["training"],
            pair["change"],
            5 if name in CHANGED else 0,
        )
        for name, pair in ALL.items()
        for seed in pair["seeds"]
    )
    assert all(len(pair["seeds"]) >= 3 for pair in ALL.values())


def test_every_training_is_one_process_of_one_thread(planned):
    assert {run.threads for run in planned["train"]} == {1}


def test_every_change_of_a_configuration_is_one_that_it_takes(planned):
    changed = {}
    for run in planned["train"] + planned["untrained"]:
        values = overrides(run.set)
        CONFIGS[run.config].replace(**values)  # raises ValueError if one is out of range
        changed |= {run.config: values} if values else {}
    assert changed["GT-TOX21"] == {"hidden_channels": 96}


@pytest.mark.slow
def test_every_change_of_data_fits_the_network_that_is_trained_on_it(planned, cache):
    for run in planned["train"]:
        if run.change is None or run.seed > 0:
            continue
        splits = load("moses-triple" if run.dataset == "moses-triple" else "moses")
        changed = CHANGES[run.change](splits, run.seed)
        config = CONFIGS[run.config].replace(**overrides(run.set))
        fit_to_data(config, changed.description)  # raises ValueError if a table is too small
        assert config.num_edge_types == max(4, changed.description.num_edge_types)


def test_what_is_to_be_looked_at_is_looked_at_as_it_was_trained(planned):
    attributed = {
        run.output: (list(map(str, run.folders)), run.dataset, run.change or "", run.by)
        for run in planned["attribute"]
    }
    assert attributed == {
        f"data/results/bonds_{name}": (
            [f"runs/{name}-{seed}" for seed in pair["seeds"]],
            *(pair["dataset"], pair["change"], pair["by"]),
        )
        for name, pair in ALL.items()
        if pair["by"]
    }
    assert {f"data/results/bonds_{name}" for name in CHANGED} <= attributed.keys()
    explained = {run.output: (run.graphs, len(run.folders)) for run in planned["explain"]}
    assert explained == {
        f"data/results/explain_{name}": (pair["explain"], len(pair["seeds"]))
        for name, pair in ALL.items()
        if pair["explain"]
    }


def test_networks_with_a_remedy_become_compact_tables(planned):
    assert {run.output: list(map(str, run.folders)) for run in planned["remedy"]} == {
        f"data/results/remedy_{name}": [f"runs/{name}-{seed}" for seed in pair["seeds"]]
        for name, pair in REMEDIES.items()
    }
    assert {(str(run.output), run.dataset) for run in planned["idle"]} == {
        (f"data/results/idle_{model}_zinc.csv.gz", "zinc-substitute")
        for model in ("gt", "graphit", "san")
    }
    assert {(str(run.output), run.dataset) for run in planned["sink"]} == {
        (f"data/results/sink_{model}_zinc_sink.csv.gz", "zinc-substitute")
        for model in ("gt", "graphit", "san")
    }
    attacked = {
        (str(run.output), run.dataset, run.change or "", run.graphs, run.places)
        for run in planned["attack"]
    }
    assert attacked == {
        (
            f"data/results/attack_{name}.csv.gz",
            pair["dataset"],
            pair["change"],
            int(pair["attack"].split()[1]),
            "--places" in pair["attack"],
        )
        for name, pair in ALL.items()
        if pair["attack"]
    }
    for run in planned["attack"]:
        assert len(run.folders) == (5 if "_more_" in run.output.name else 3)


def test_studies_of_deep_networks_are_made_apart_and_then_copied(planned, dry_run):
    commands = ("gradients", "depth", "smoothing", "missing", "trees")
    assert {study["command"] for study in GRID["studies"].values()} == {*commands}
    runs = [run for command in commands for run in planned[command]]
    assert {str(run.output): run.dataset for run in runs} == {
        f"runs/studies/unfinished/{name}": study["dataset"]
        for name, study in GRID["studies"].items()
    }
    assert all(
        {norm.partition("=")[0] for norm in run.norms} <= set(NORMS) for run in planned["depth"]
    )
    for name, study in GRID["studies"].items():
        for table in study["tables"]:
            assert f"runs/studies/{name}_{table}.csv.gz data/results" in dry_run or (
                f"runs/studies/{name}_{table}.csv.gz runs/studies/{name}" in dry_run
            )


def test_every_arm_of_the_page_is_trained_once_and_for_as_long_as_the_others(planned):
    arms = {f"{m.lower()}_zinc_{arm}" for m in MODELS for arm in ARMS} - SAME.keys()
    arms |= {f"san_zinc_{arm}" for arm in (*OTHERS, *COUNTED)}
    arms |= {
        f"{m.lower()}_{data}_{arm}"
        for m in MODELS
        for data in ("tox21", "proteins")
        for arm in ("bias", "intended")
    }
    arms |= {f"gt_tox21_more_{arm}" for arm in ("bias", "intended")}  # of further seeds
    assert arms == REMEDIES.keys()
    assert {*SAME.values()} <= arms
    pairs = {name.rpartition("_")[0] for name in arms}
    assert len(pairs) == 10
    for pair in pairs:
        none = f"{pair.removesuffix('_more')}_none"
        none = OF_THE_GRID.get(none, none)
        runs = [ALL[none], *(ALL[name] for name in arms if name.rpartition("_")[0] == pair)]
        assert len({(run["config"], run["dataset"], run["epochs"]) for run in runs}) == 1
    for run in planned["train"]:
        name = run.out.name.rpartition("-")[0]
        if name in REMEDIES:
            set_for_all = {"hidden_channels": 96} if name.startswith("gt_tox21") else {}
            arm = name.rpartition("_")[2]
            assert overrides(run.set) == SETTINGS[arm] | set_for_all
            assert run.change == ("neighbour-count" if arm in COUNTED else None)


def test_the_untrained_networks_are_those_that_are_trained(planned):
    wanted = {name: pair["untrained"] for name, pair in PAIRS.items() if pair["untrained"]}
    counts = {run.output.name.removesuffix(".csv.gz"): run.networks for run in planned["untrained"]}
    assert counts == wanted
    trained = {
        (run.config, run.dataset, *run.set)
        for run in planned["train"]
        if run.out.name.rpartition("-")[0] in PAIRS
    }
    assert {(run.config, run.dataset, *run.set) for run in planned["untrained"]} == trained


def test_the_seeds_of_a_pair_are_joined_in_order(planned):
    joined = {run.output: run.folders for run in planned["collect"]}
    assert joined.keys() == {f"data/results/emergence_{name}_" for name in PAIRS}
    for name, pair in PAIRS.items():
        folders = [str(folder) for folder in joined[f"data/results/emergence_{name}_"]]
        assert folders == [f"runs/{name}-{seed}" for seed in pair["seeds"]]


def test_each_data_set_is_prepared_once(planned):
    prepared = [run.dataset for run in planned["data"]]
    used = [entry["dataset"] for entry in (*ALL.values(), *GRID["studies"].values())]
    assert sorted(prepared) == sorted(set(used))


def test_laws_figures_and_book_follow_and_exist(planned, dry_run):
    (laws,) = planned["laws"]
    assert laws.runs == list(PAIRS)
    scripts = [words[1] for words in shell_commands(dry_run) if words[1].startswith("book/")]
    assert scripts == ["book/figures.py", "book/build.py"]
    assert all((REPOSITORY / script).is_file() for script in scripts)


def test_every_default_of_the_grid_is_explained():
    text = (WORKFLOW / "grid.yaml").read_text()
    for key in GRID["defaults"]:
        assert re.search(rf"^  {key}: .* # \w", text, re.MULTILINE), f"{key} has no comment"


@pytest.mark.parametrize(
    ("change", "named"),
    [({"epoch": 3}, "epoch"), ({"epochs": None, "config": None}, "config, epochs")],
    ids=["misspelt", "missing"],
)
def test_a_key_that_is_misspelt_or_missing_is_refused(change, named, snakemake, tmp_path):
    pair = {k: v for k, v in (TINY["pairs"]["tiny"] | change).items() if v is not None}
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump(TINY | {"pairs": {"tiny": pair}}))
    result = snakemake(tmp_path, "--dry-run", "--cores", "1", "--configfile", str(grid))
    assert result.returncode != 0
    assert f"missing or unknown: {named}" in result.stdout


# clusters


@pytest.fixture(scope="module", params=PLUGINS)
def cluster(request, snakemake, tmp_path_factory):
    """A profile's name, and a dry run of one pair with it."""
    name = request.param
    for plugin in PLUGINS[name]:
        if find_spec(plugin) is None:
            pytest.skip(f"{plugin} is not installed; it comes with the extra: workflow")
    profile = str(WORKFLOW / "profiles" / name)
    directory = tmp_path_factory.mktemp(name)
    result = snakemake(directory, "--dry-run", "--profile", profile, "gt_zinc")
    assert result.returncode == 0, result.stdout
    return name, result.stdout


def test_a_profile_plans_one_job_for_each_seed_and_needs_no_cluster(cluster):
    name, output = cluster
    profile = yaml.safe_load((WORKFLOW / "profiles" / name / "config.yaml").read_text())
    assert profile["executor"] == name
    assert "This was a dry-run" in output
    assert {run.seed for run in commands_of_mapkg(output)["train"]} == {0, 1, 2}
    assert executed(output, "train") == 3


def test_a_job_states_the_memory_and_time_it_needs(cluster):
    needs = re.findall(r"^rule train:\n(?:    .*\n)*?    resources: (.*)$", cluster[1], re.M)
    assert len(needs) == 3
    pair = PAIRS["gt_zinc"]
    for line in needs:
        stated = dict(part.split("=") for part in line.split(", "))
        assert int(stated["mem_mb"]) == pair["mem_mb"]
        assert int(stated["runtime"]) == 60 * pair["hours"]


def test_tables_come_into_the_repository_and_runs_where_the_cluster_keeps_files(cluster):
    name, output = cluster
    found = commands_of_mapkg(output)
    storage = {"slurm": "", "kubernetes": ".snakemake/storage/fs/mnt/mapkg/files/"}[name]
    runs = {f"{storage}runs/gt_zinc-{seed}" for seed in range(3)}
    assert {str(run.out) for run in found["train"]} == runs
    (collect,) = found["collect"]
    assert {str(folder) for folder in collect.folders} == runs
    assert collect.output == "data/results/emergence_gt_zinc_"
    copies = [words for words in shell_commands(output) if words[0] == "cp"]
    untrained = f"{storage}runs/untrained/gt_zinc.csv.gz"
    assert copies == [["cp", untrained, "data/results/untrained_gt_zinc.csv.gz"]]


# for real


@pytest.fixture(scope="module")
def tried(snakemake, tmp_path_factory):
    """The try-out and a pair that fails, run side by side: the folder and the process."""
    directory = tmp_path_factory.mktemp("tried")
    broken = TINY["pairs"]["tiny"] | {
        "seeds": [0],
        "options": "--set hidden_channels=8 --set heads=3",
        "untrained": 0,
    }
    grid = directory / "grid.yaml"
    grid.write_text(yaml.safe_dump(TINY | {"pairs": {"broken": broken, **TINY["pairs"]}}))
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
    assert made == {f"emergence_tiny_{table}.csv.gz" for table in TABLES} | {
        "untrained_tiny.csv.gz"
    }


@pytest.mark.slow
def test_the_joined_table_has_both_seeds_of_what_the_grid_says(tried):
    summary = pd.read_csv(tried[0] / "data/results/emergence_tiny_summary.csv.gz")
    assert summary["seed"].unique().tolist() == [0, 1]
    assert set(summary["epochs"]) == {1}
    assert set(summary["dataset"]) == {"MOSES sample, first 16"}
    assert summary["changes"].str.contains("num_layers=1").all()


@pytest.mark.slow
def test_what_is_done_is_not_done_again(tried, snakemake):
    directory, _ = tried
    settings = ("results", "--cores", "2", "--configfile", str(WORKFLOW / "tiny.yaml"))
    result = snakemake(directory, *settings)
    assert result.returncode == 0, result.stdout
    assert [executed(result.stdout, rule) for rule in ("train", "collect", "laws")] == [1, 0, 1]
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
    pair = TINY["pairs"]["tiny"] | {"epochs": epochs}
    grid.write_text(yaml.safe_dump(TINY | {"pairs": {"tiny": pair}}))
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
