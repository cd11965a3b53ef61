"""Stacked training against training one by one, in double precision on the CPU."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import chain

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, few_molecules
from torch import nn

from mapkg.all_measures import COLUMNS
from mapkg.models import build
from studies import extras, steps
from studies import stacked as networks
from studies.data import SPLITS
from studies.observation import summarise_scores
from studies.published import CONFIGS, Schedule
from studies.stacked import why_not_stackable
from studies.steps import Stack
from studies.tasks import GraphTask
from studies.train import fit, seed_all
from studies.train_stacked import fit_stacked

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import stacked as script

SEEDS = (3, 0, 7)
SMALL = dict(hidden_channels=8, heads=2, num_layers=2, batch_size=8, max_epochs=3, lr=3e-5)
# A map before a BatchNorm has a bias whose gradient is nothing but rounding errors, some 1e-17.
# Adam divides it by 1e-8 at least, so that weights of both differ by up to 1e-9 times lr a step.
TOLERANCE = 1e-10


def config_of(name, **changes):
    return CONFIGS[name].replace(**(SMALL | changes))


def build_double(config):
    return build(config).double()


@pytest.fixture(scope="module")
def splits():
    whole = few_molecules(37, 11, 9)
    for split in (whole.train, whole.val, whole.test):
        for graph in split:
            graph.y = graph.y.double()
    return whole


def stacked(splits, config, seeds=SEEDS, make=build_double, **settings):
    settings = {"record_epochs": lambda epoch: False, "progress": False} | settings
    return fit(make, splits, config, seeds=seeds, **settings)


def one_by_one(splits, config, seeds=SEEDS, make=build_double):
    fits = {}
    for seed in seeds:
        seed_all(seed)
        fits[seed] = fit(make(config), splits, config, seed=seed, progress=False)
    return fits


def assert_same(found, expected, tolerance=TOLERANCE):
    for seed, single in expected.items():
        for name in ("best_weights", "last_weights"):
            pair = getattr(found, name)[seed], getattr(single, name)
            assert list(pair[0]) == list(pair[1])
            torch.testing.assert_close(*pair, rtol=0, atol=tolerance)
        history = found.history[found.history["seed"] == seed].reset_index(drop=True)
        columns, close = ["epoch", "train_loss", "val_loss"], dict(rtol=tolerance, atol=tolerance)
        pd.testing.assert_frame_equal(history[columns], single.history[columns], **close)
        assert history["lr"].tolist() == single.history["lr"].tolist()
        assert found.best_epoch[seed] == single.best_epoch
        assert found.stop_reason[seed] == single.stop_reason


GRID = [
    ("GT-ZINC", {"weight_decay": 0.1, "use_bias": True}),
    ("SAN-ZINC", {"explicit_bias": "sink"}),
    ("GraphiT-ZINC", {"explicit_bias": "intended"}),
    ("EGAT-ZINC", {}),
    ("GT-ZINC", {"dropout": 0.3, "score_dropout": 0.2, "lr_patience": 0}),
    ("GT-ZINC", {"batch_norm": False, "layer_norm": True, "explicit_bias": "published"}),
    ("SAN-ZINC", {"explicit_bias": "published"}),
    ("GraphiT-ZINC", {"explicit_bias": "published"}),
    ("GT-ZINC", {"batch_norm": False}),
]
ONE_BY_ONE = [
    ("GAT-ZINC", {"dropout": 0.3}),
    ("GATv2-ZINC", {}),
    ("TransformerConv-ZINC", {"weight_decay": 0.1, "lr_patience": 0}),
    ("GPS-ZINC", {"dropout": 0.3, "batch_size": 1}),
]


@pytest.mark.parametrize(("name", "changes"), GRID + ONE_BY_ONE)
def test_three_epochs_of_stacked_seeds_are_those_of_each_alone(splits, name, changes):
    config = config_of(name, **changes)
    assert_same(stacked(splits, config), one_by_one(splits, config))


def test_classification_with_missing_labels_is_that_of_each_alone(splits):
    generator, parts = torch.Generator().manual_seed(0), {}
    for name in SPLITS:
        parts[name] = [graph.clone() for graph in getattr(splits, name)]
        for graph in parts[name]:
            graph.y = torch.randint(2, (1, 2), generator=generator).double()
            graph.y[torch.rand(1, 2, generator=generator) < 0.6] = torch.nan
    labeled, layer_norm = replace(splits, **parts), dict(batch_norm=False, layer_norm=True)
    config = config_of("GT-ZINC", loss="bce", out_channels=2, batch_size=1, **layer_norm)
    assert any(graph.y.isnan().all() for graph in labeled.train)  # a batch that teaches nothing
    assert_same(stacked(labeled, config), one_by_one(labeled, config))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("GT-PROTEINS", {"batch_size": 2}),
        ("SAN-PROTEINS", {"batch_size": 1, "lr_patience": 0}),
        ("EGAT-PROTEINS", {"weight_decay": 0.1}),
        ("GATv2-ZINC", {"readout": None, "num_edge_types": None, "edge_channels": 8}),
    ],
)
def test_labels_of_nodes_are_learned_as_by_each_alone(splits, name, changes):
    generator, parts = torch.Generator().manual_seed(0), {}
    for split in SPLITS:
        parts[split] = [graph.clone() for graph in getattr(splits, split)[:5]]
        for graph in parts[split]:
            graph.edge_attr = torch.rand(graph.num_edges, 8, generator=generator).double()
            graph.y = torch.randint(2, (graph.num_nodes, 2), generator=generator).double()
            graph.y[torch.rand(graph.y.shape, generator=generator) < 0.5] = torch.nan
    labeled = replace(splits, **parts)
    config = config_of(name, num_node_types=28, out_channels=2, loss="bce", **changes)
    found, expected = stacked(labeled, config), one_by_one(labeled, config)
    assert_same(found, expected)
    assert bool(why_not_stackable(build(config))) == (name == "GATv2-ZINC")
    for readout, other in (("mean", None), (None, "mean")):  # what is built is another network

        def make(config, other=other):
            return build_double(config.replace(readout=other))

        of = "graph" if readout else "node"
        fitting = replace(labeled, **parts)
        if readout:
            fitting = replace(fitting, **{n: [of_graph(g) for g in parts[n]] for n in SPLITS})
        with pytest.raises(ValueError, match=f"predictions, one for each {of}, since .*readout"):
            stacked(fitting, config.replace(readout=readout), make=make)


def of_graph(graph):
    graph = graph.clone()
    graph.y = graph.y[:1]
    return graph


def test_targets_of_the_other_kind_are_refused_in_every_split(splits):
    config = config_of("GT-ZINC", readout=None)
    with pytest.raises(
        ValueError, match=r"train graph 0: y: expected .* \[\d+, 1\], got .* each node"
    ):
        stacked(splits, config)
    flat = {name: networks.FlatGraphs.of(getattr(splits, name)) for name in SPLITS}
    with pytest.raises(ValueError, match=r"train: expected \d+ rows .*, one for each node, since"):
        fit_stacked(build, flat, config, seeds=[0])
    flat["test"] = replace(flat["test"], y=torch.zeros(len(flat["test"].x), 1))
    with pytest.raises(ValueError, match=r"test: expected 9 rows .*, one for each graph, got"):
        fit_stacked(build, flat, config_of("GT-ZINC"), seeds=[0])


@pytest.mark.parametrize(("name", "split"), [("training", "train"), ("validation", "val")])
def test_a_split_without_a_label_is_refused_by_name(splits, name, split):
    parts = {n: [graph.clone() for graph in getattr(splits, n)] for n in SPLITS}
    for graph in chain.from_iterable(parts.values()):
        graph.y = (graph.y > 0).double()
    for graph in parts[split]:
        graph.y = graph.y * torch.nan
    with pytest.raises(ValueError, match=f"every {name} target is NaN"):
        stacked(replace(splits, **parts), config_of("GT-ZINC", loss="bce"))


@pytest.mark.parametrize("name", ["GT-ZINC", "GATv2-ZINC"])
def test_graphs_without_an_edge_are_trained_on_as_alone(splits, name):
    parts = {split: [graph.clone() for graph in getattr(splits, split)] for split in SPLITS}
    for graph in [graph for part in parts.values() for graph in part]:
        graph.edge_index, graph.edge_attr = graph.edge_index[:, :0], graph.edge_attr[:0]
    bare, config = replace(splits, **parts), config_of(name, batch_norm=True, lr=1e-3)
    assert_same(stacked(bare, config), one_by_one(bare, config), 1e-7)


def test_both_forms_of_adam_take_the_steps_of_torchs():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 50, generator=generator).double()
    lr, off = torch.tensor([1e-3, 2e-3, 3e-3]).double(), (1, 4)  # network, step without a label
    single = [nn.Parameter(row.clone()) for row in start]
    optimizers = [torch.optim.Adam([p], lr=r.item()) for p, r in zip(single, lr, strict=True)]
    zeros = [torch.zeros_like(start) for _ in range(2)] + [torch.zeros(3).double()]
    states = [[tensor.clone() for tensor in (start, *zeros)] for _ in range(2)]
    for step in range(8):
        gradient = torch.randn(3, 50, generator=generator).double()
        active = torch.tensor([(i, step) != off for i in range(3)]).double()
        for update, state in zip((steps.adam, steps.capturable_adam), states, strict=True):
            update(state[0], gradient, *state[1:], lr, active)
        for i, optimizer in enumerate(optimizers):
            single[i].grad = gradient[i].clone() if active[i] else None
            optimizer.step()
    for weights, *_, steps_done in states:
        torch.testing.assert_close(weights, torch.stack(single).detach(), rtol=0, atol=1e-12)
        assert steps_done.tolist() == [8, 7, 8]


def test_seeds_stop_by_their_own_schedules_and_leave_the_stack(splits, tmp_path, monkeypatch):
    plateaus = dict(lr=0.02, lr_patience=0, min_lr=0.008, dropout=0.3, max_epochs=11)
    config = config_of("GT-ZINC", batch_norm=False, layer_norm=True, **plateaus)
    expected = one_by_one(splits, config)
    stops = {seed: len(single.history) for seed, single in expected.items()}
    assert sorted(stops.values()) == [6, 9, 11], "choose another rate"
    sizes, measures = {}, []

    def look(run):
        sizes[Stack.worth, run.epoch] = run.stack.networks

    settings = dict(record_epochs=lambda epoch: True, watch=look)
    for worth, *ends in ((1.0, 11), (1.0, 6, 8, 11, 11), (0.5, 11)):  # in one go, and resumed
        monkeypatch.setattr(Stack, "worth", worth)
        folder = tmp_path if len(ends) > 1 else None
        for end in ends:
            run = stacked(splits, config.replace(max_epochs=end), **settings, folder=folder)
        assert_same(run, expected)
        assert run.observations.groupby("seed")["epoch"].max().to_dict() == stops
        measures.append(run.observations)
    for others in measures[1:]:
        pd.testing.assert_frame_equal(measures[0], others, rtol=TOLERANCE)
    assert [sizes[1.0, epoch] for epoch in range(12)] == [3] * 7 + [2] * 3 + [1] * 2
    assert [sizes[0.5, epoch] for epoch in range(12)] == [3] * 10 + [1] * 2


def test_a_resumed_run_is_that_of_an_uninterrupted_one(splits, tmp_path):
    always = dict(record_epochs=lambda epoch: True)
    config = config_of("GT-ZINC", lr=1e-3, lr_patience=0, dropout=0.3, max_epochs=4)
    expected = stacked(splits, config, **always)
    stopped = stacked(splits, config, **always, folder=tmp_path, watch=lambda run: True)
    assert set(stopped.stop_reason.values()) == {"not finished"} and stopped.history.empty
    shorter = config.replace(max_epochs=2)
    stacked(splits, shorter, **always, folder=tmp_path)
    for _ in range(2):  # the second time nothing is left to do
        run = stacked(splits, config, **always, folder=tmp_path)
        for name in ("best_weights", "last_weights"):
            pair = getattr(run, name), getattr(expected, name)
            torch.testing.assert_close(*pair, rtol=0, atol=0)
        pd.testing.assert_frame_equal(run.observations, expected.observations, check_exact=True)
        histories = (fit.history.drop(columns="seconds") for fit in (run, expected))
        pd.testing.assert_frame_equal(*histories, check_exact=True)
        assert (run.best_epoch, run.stop_reason) == (expected.best_epoch, expected.stop_reason)
    for change, message in (
        (dict(seeds=(1, 2)), "seeds: stored"),
        (dict(config=config.replace(lr=0.5)), "lr: stored"),
        (dict(config=shorter), "4 epochs, more than the 2 asked for"),
    ):
        with pytest.raises(ValueError, match=message):
            stacked(splits, **dict(config=config, folder=tmp_path) | change)
    others = [graph.clone() for graph in splits.train]
    others[7].y += 1
    with pytest.raises(ValueError, match="another run: checksum of train: stored"):
        stacked(replace(splits, train=others), config, folder=tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"damaged, .* remove it to start afresh"):
        stacked(splits, config, folder=tmp_path)


@pytest.mark.parametrize("name", ["GT-ZINC", *(name for name, _ in ONE_BY_ONE)])
def test_scores_are_measured_as_those_of_a_single_network(splits, name):
    config = config_of(name, max_epochs=2)
    found = stacked(splits, config, record_epochs=lambda epoch: epoch in (0, 2))
    assert found.observations["epoch"].unique().tolist() == [0, 2]
    assert len(found.observations) == 2 * len(SEEDS) * config.num_layers
    for seed in SEEDS:
        model = build_double(config)
        model.load_state_dict(found.last_weights[seed])
        last = found.observations.query("seed == @seed and epoch == 2")
        for layer, summary in enumerate(summarise_scores(model, config, splits.test)):
            expected = {n: v for n, v in summary.statistics().items() if v is not None}
            for name in set(expected) & set(COLUMNS):
                assert last[name].iloc[layer] == pytest.approx(expected[name], rel=0.012), name


def test_seeds_that_are_none_or_repeated_and_empty_splits_are_refused(splits):
    for seeds in ((), (1, 2, 1), (1.5,), "01", 3, torch.tensor([4, 4])):
        with pytest.raises(ValueError, match="seeds: expected different whole numbers"):
            stacked(splits, config_of("GT-ZINC"), seeds=seeds)
    for name in SPLITS:
        with pytest.raises(ValueError, match=f"the {name} split is empty"):
            stacked(replace(splits, **{name: []}), config_of("GT-ZINC"))


def test_the_test_split_is_looked_at_too_where_several_are_trained(splits):
    changed = [graph.clone() for graph in splits.test]
    changed[3].x[0] = 28
    with pytest.raises(ValueError, match="test graph 3: x: expected ids from 0, fewer than"):
        stacked(replace(splits, test=changed), config_of("GT-ZINC"))
    one_by_one(replace(splits, test=changed), config_of("GT-ZINC", max_epochs=1), SEEDS[:1])


@pytest.mark.parametrize("name", ["x", "edge_attr"])
def test_graphs_without_features_are_told_what_to_do(splits, name):
    bare = replace(splits, **{n: [graph.clone() for graph in getattr(splits, n)] for n in SPLITS})
    for graph in chain(bare.train, bare.val, bare.test):
        graph.num_nodes, graph[name] = graph.num_nodes, None
    with pytest.raises(ValueError, match=f"^{name}: expected in every graph .* give all the id 0"):
        stacked(bare, config_of("GT-ZINC"))


def test_settings_of_one_network_are_not_taken_for_those_of_several(splits):
    config, wanted = config_of("GT-ZINC", max_epochs=1), "expected no seed= or observe=, and the"
    other = Schedule.of(config.replace(lr=0.5))
    for given in (dict(seed=3), dict(observe=lambda model, epoch: []), dict(schedule=other)):
        task = GraphTask(splits, config)
        with pytest.raises(ValueError, match=f"seeds: {wanted} schedule of the Config"):
            fit(build_double, task, **dict(seeds=[0], progress=False) | given)
    with pytest.raises(TypeError, match="fodler, record_epochs: known with seeds= only"):
        fit(build_double(config), splits, config, fodler="x", record_epochs=bool)
    with pytest.raises(TypeError, match="model: expected a network, got function; what builds"):
        fit(build_double, splits, config)
    with pytest.raises(TypeError, match=r"build: expected what makes .* got one, GraphNet"):
        fit(build_double(config), splits, config, seeds=[0])


def test_no_epoch_is_none(splits):
    config = config_of("GT-ZINC", max_epochs=0)
    found, alone = stacked(splits, config, SEEDS[:1]), one_by_one(splits, config, SEEDS[:1])
    assert found.history.empty and found.stop_reason == {SEEDS[0]: "max epochs"}
    last = alone[SEEDS[0]].last_weights
    torch.testing.assert_close(found.last_weights[SEEDS[0]], last, rtol=0, atol=0)


def norm_of_two_layers(network):
    first, second = (layer.node_block for layer in network.layers)
    first.batch_norm1 = second.batch_norm1 = nn.BatchNorm1d(8, momentum=None).double()


def tied(network):
    query, key = (getattr(network.layers[0].attention, name) for name in ("query", "key"))
    query.weight = key.weight


def frozen(network):
    network.node_embedding.weight.requires_grad_(False)


def norm_of_graphs(network):
    network.head[1] = nn.BatchNorm1d(4).double()


class Shifted(nn.Module):
    is_row_by_row = True

    def __init__(self):
        super().__init__()
        self.register_buffer("by", torch.tensor(0.1).double())

    def forward(self, x):
        return x + self.by


def buffered(network):
    network.layers[0].attention.score = Shifted()


UNUSUAL = {
    norm_of_two_layers: r"layers\.1\.node_block\.batch_norm1: it stands in the network twice",
    tied: r"layers\.0\.attention\.key\.weight: it stands in the network twice",
    frozen: r"node_embedding\.weight: it is frozen",
    buffered: r"layers\.0\.attention\.score: Shifted is not known to treat every row",
    norm_of_graphs: r"head\.1: BatchNorm1d is not known to treat every row",
}


@pytest.mark.parametrize(("change", "reason"), UNUSUAL.items())
def test_what_cannot_be_stacked_is_trained_one_by_one_and_says_so(
    splits, tmp_path, capsys, change, reason
):
    def unusual(config):
        network = build_double(config)
        change(network)
        return network

    config = config_of("GT-ZINC", dropout=0.3, weight_decay=0.1)
    for epochs in (2, 4):  # and goes on
        run = stacked(splits, config.replace(max_epochs=epochs), make=unusual, folder=tmp_path)
    told = capsys.readouterr().err
    assert re.search(f"^{reason}.*, so that networks are trained one by one$", told, re.MULTILINE)
    # A norm of graphs takes away what shifts all their nodes, as a norm of nodes does a bias.
    tolerance = 1e-5 if change is norm_of_graphs else TOLERANCE
    assert_same(run, one_by_one(splits, config.replace(max_epochs=4), make=unusual), tolerance)
    assert not why_not_stackable(build(config))


def test_a_layer_that_stands_twice_is_trained_but_not_recorded(splits):
    def twice(config):
        network = build_double(config)
        network.layers = nn.ModuleList([network.layers[0]] * 2)
        return network

    config = config_of("GAT-ZINC")
    assert_same(stacked(splits, config, make=twice), one_by_one(splits, config, make=twice))
    with pytest.raises(ValueError, match="to be recorded in each of 2 layers, found 1;"):
        stacked(splits, config, make=twice, record_epochs=lambda epoch: True)


def test_of_a_full_graph_the_edges_of_the_data_are_recorded(splits):
    config = config_of("SAN-ZINC", full_graph=True, gamma=0.1, max_epochs=1)

    def make(config):
        return extras.build(config).double()

    found = stacked(splits, config, make=make, record_epochs=lambda epoch: epoch == 1)
    assert_same(found, one_by_one(splits, config, make=make))
    assert set(found.observations["rows"]) == {sum(graph.num_edges for graph in splits.test)}
    model = make(config)
    for seed in SEEDS:
        model.load_state_dict(found.last_weights[seed])
        largest = found.observations.query("seed == @seed")["max_ratio"]
        summaries = summarise_scores(model, config, splits.test)
        expected = [summary.statistics()["max_ratio"] for summary in summaries]
        assert largest.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("changes", [{"dropout": 0.3, "score_dropout": 0.2}, {"lr_patience": 0}])
def test_large_batches_are_trained_one_by_one_with_the_same_weights(
    splits, tmp_path, monkeypatch, changes
):
    config, kinds, standard = config_of("GT-ZINC", **changes), [], steps.LARGE

    def look(run):
        kinds.append(run.stack.is_apart)

    for large, epochs in ((standard, 1), (0, 2), (standard, 3)):  # and goes on as the other
        monkeypatch.setattr(steps, "LARGE", large)
        settings = dict(folder=tmp_path, watch=look, record_epochs=lambda epoch: True)
        run = stacked(splits, config.replace(max_epochs=epochs), **settings)
    assert kinds == [False] * 2 + [True] * 2 + [False] * 2
    assert_same(run, one_by_one(splits, config))
    alone = stacked(splits, config, seeds=SEEDS[1:2], record_epochs=lambda epoch: True).observations
    found = run.observations.query("seed == @SEEDS[1]").reset_index(drop=True)
    pd.testing.assert_frame_equal(found, alone, rtol=TOLERANCE)


def test_more_seeds_than_memory_holds_are_refused_and_those_that_fit_are_trained(
    splits, monkeypatch
):
    config, free = config_of("GT-ZINC", max_epochs=1), 0
    monkeypatch.setattr(networks, "free_memory", lambda device: free)
    with pytest.raises(ValueError, match=r"^seeds: 3 networks need .* so that 0 fit;") as error:
        stacked(splits, config)
    each = 1e6 * float(re.search(r"([\d.]+) MB each", str(error.value))[1])
    assert each > 8 * sum(weights.nbytes for weights in build_double(config).parameters())
    free = int(2.5 * each)
    with pytest.raises(ValueError, match="so that 2 fit; train fewer at once, or take a smaller"):
        stacked(splits, config)
    assert len(stacked(splits, config, seeds=SEEDS[:2]).history) == 2


def test_losses_that_are_not_finite_stop_a_run(splits):
    with pytest.raises(FloatingPointError, match="no seed has a finite loss after epoch 1"):
        stacked(splits, config_of("GT-ZINC", lr=1e200))


def test_the_script_trains_and_goes_on_from_prepared_tensors(tmp_path, capsys, monkeypatch):
    data = {name: script.random_graphs(12, seed) for seed, name in enumerate(SPLITS)}
    script.save_splits(tmp_path / script.DATA_FILE, data)
    monkeypatch.setattr(script, "CONFIGS", {"GT-ZINC": config_of("GT-ZINC")})
    out = tmp_path / "out"
    for epochs in ("2", "3"):
        words = f"stacked.py --data {tmp_path} --out {out} --state {tmp_path / 'state'} --seeds 2"
        monkeypatch.setattr("sys.argv", [*words.split(), "--max-epochs", epochs])
        script.main()
    table = pd.read_csv(out / "epochs.csv.gz")
    assert table["epoch"].value_counts().to_dict() == dict.fromkeys(range(4), 2 * 2)
    assert table.groupby("epoch")["train_loss"].count().tolist() == [0, 4, 4, 4]
    about = json.loads((out / "run.json").read_text())
    assert about["seeds"] == [0, 1] and about["epoch"] == 3
    assert about["relative_difference_of_losses"] < 1e-3
    names = ("best_0.safetensors", "epochs.csv.gz", "last_0.safetensors", "run.json")
    assert tuple(sorted(path.name for path in out.iterdir())) == names
    printed = capsys.readouterr()
    assert "stopped: {0: 'max epochs', 1: 'max epochs'}" in printed.out
    assert "falls back to 'eager': a CUDA graph needs CUDA" in printed.err


ELSEWHERE = """
import importlib.metadata as metadata, sys
version = metadata.version
def installed(name):
    if name == "rdkit":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = installed
absent = "rdkit", "sklearn", "scipy", "networkx", "snakemake", "matplotlib", "platformdirs"
sys.modules |= dict.fromkeys(absent)
sys.path.insert(0, "benchmarks")
import stacked
small = dict(hidden_channels=8, heads=2, num_layers=1, batch_size=8, max_epochs=1)
stacked.CONFIGS = {"GT-ZINC": stacked.CONFIGS["GT-ZINC"].replace(**small)}
stacked.main()
"""
"""As on a machine with nothing but what the script says that it needs."""


def test_the_script_trains_where_there_is_no_rdkit(tmp_path):
    data = {name: script.random_graphs(12, seed) for seed, name in enumerate(SPLITS)}
    script.save_splits(tmp_path / script.DATA_FILE, data)
    words = f"--data {tmp_path} --out {tmp_path / 'out'} --seeds 2".split()
    subprocess.run([sys.executable, "-c", ELSEWHERE, *words], cwd=REPOSITORY, check=True)
    about = json.loads((tmp_path / "out" / script.ABOUT_FILE).read_text())
    assert about["epoch"] == 1 and about["by_seed"].keys() == {"0", "1"}
    assert about["versions"].endswith("; rdkit not installed")
