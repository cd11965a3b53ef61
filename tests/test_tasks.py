"""From data to tables on tiny data: every architecture, every kind of task and of features."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, mean_absolute_error, roc_auc_score

from mapkg.evaluation import batches, predict, targets
from mapkg.models.config import Config
from mapkg.models.network import CLAMPED
from studies.data import Splits, load
from studies.data.graph_classification import TASKS, read_proteins, read_tox21, split_proteins
from studies.emergence import _changes, emergence, examine_checkpoint, fit_to_data
from studies.extras import build
from studies.published import CONFIGS
from studies.results import TABLES, Emergence
from studies.train import seed_all

STATES = ["base", "base_calibrated", "best", "last"]
LAYERS, SEED = 2, 4
SIZES = dict(hidden_channels=16, heads=2, num_layers=LAYERS, batch_size=8, lr=0.01, max_epochs=2)
ON_ZINC = {
    config.architecture: name for name, config in CONFIGS.items() if config.dataset == "zinc"
}
"""A configuration of each architecture."""

SMILES = [
    *("CCO", "CC(=O)O", "CCN", "c1ccccc1", "Cc1ccccc1", "Oc1ccccc1", "CC#N", "C=CC=O", "CCCl"),
    *("CS(=O)C", "C1CCCCC1", "c1ccncc1", "CC(C)O", "NCCO", "BrCCBr", "FC(F)F", "CCSCC", "O=CO"),
    *("C1CC1", "CN(C)C", "OCC(O)CO", "c1ccoc1", "CCCCCC", "N#CC#N", "C[N+](C)(C)C", "OO"),
    *("CC=C", "CCOCC", "ClC=CCl", "CC(N)C(=O)O"),
]

pytestmark = pytest.mark.usefixtures("cache")


@dataclass
class Task:
    """Data of a task, and what is known of them without the package."""

    splits: Splits
    num_targets: int
    loss: str


@pytest.fixture(scope="module")
def moses(cache):
    whole = load("moses")
    splits = replace(whole, train=whole.train[:24], val=whole.val[:8], test=whole.test[:9])
    return Task(splits, 1, "l1")


@pytest.fixture(scope="module")
def tox21(cache, tmp_path_factory):
    """Thirty molecules; a third of the labels is missing, and in the last task nearly all."""
    labels = pd.DataFrame(
        [
            [
                "" if (row + task) % 3 == 0 or (task == 11 and row % 5) else str((row * task) % 2)
                for task in range(12)
            ]
            for row in range(len(SMILES))
        ],
        columns=list(TASKS),
    )
    path = tmp_path_factory.mktemp("tox21") / "tox21.csv"
    labels.assign(mol_id="TOX", smiles=SMILES).to_csv(path, index=False)
    return Task(read_tox21(path, "random"), 12, "bce")


@pytest.fixture(scope="module")
def proteins(cache, tmp_path_factory):
    """Thirty random trees in the raw format of the TUDataset collection."""
    random = np.random.default_rng(0)
    edges, indicator, first = [], [], 1
    for graph in range(30):
        size = int(random.integers(3, 8))
        for node in range(1, size):
            ends = (first + node, first + int(random.integers(node)))
            edges += [ends, ends[::-1]]
        indicator += [graph + 1] * size
        first += size
    columns = {
        "A": [f"{source}, {target}" for source, target in edges],
        "graph_indicator": indicator,
        "graph_labels": [1 + graph % 2 for graph in range(30)],
        "node_labels": [*range(3), *random.integers(0, 3, len(indicator) - 3)],
    }
    folder = tmp_path_factory.mktemp("proteins")
    for name, rows in columns.items():
        (folder / f"PROTEINS_{name}.txt").write_text("".join(f"{row}\n" for row in rows))
    return Task(split_proteins(read_proteins(folder)), 1, "bce")


RUNS = [
    *((name, "moses") for name in ON_ZINC.values()),
    *((name, "tox21") for name in ON_ZINC.values()),
    *((name, "proteins") for name in ("GT-TU", "GraphiT-TU", "SAN-TU")),
]
"""Configurations and the data they are run on."""

QUICK = [
    *((name, "moses") for name in ON_ZINC.values()),
    *(("GT-ZINC", "tox21"), ("SAN-TU", "proteins")),
]


def on(pairs):
    """Pairs as parameters; each architecture and each kind of data once is quick enough."""
    return [
        pytest.param(pair, id=" on ".join(pair), marks=[] if pair in QUICK else pytest.mark.slow)
        for pair in pairs
    ]


def small(name, **changes):
    return CONFIGS[name].replace(**SIZES | changes)


def config_for(name, data):
    if data == "tox21":
        open_sizes = dict(num_node_types=None, num_edge_types=None)
        return small(name, **open_sizes, out_channels=12, loss="bce")
    return small(name)


@dataclass
class Run:
    """What went into a run and what came out."""

    config: Config
    task: Task
    tables: Emergence

    def network(self, state):
        """The network of a state in evaluation mode, its sizes those of the data."""
        seed_all(SEED)
        model = build(fit_to_data(self.config, self.task.splits.description)).eval()
        if state in ("best", "last"):
            model.load_state_dict(getattr(self.tables.fit, f"{state}_weights"))
        return model

    def rows(self, state):
        return self.tables.summary[self.tables.summary["state"] == state]


@pytest.fixture(scope="module", params=on(RUNS))
def run(request):
    """A network trained for two epochs."""
    name, data = request.param
    task, config = request.getfixturevalue(data), config_for(name, data)
    tables = emergence(config, task.splits, seed=SEED, name=name, progress=False)
    return Run(config, task, tables)


def test_training_moves_every_weight_that_the_prediction_depends_on(run):
    assert run.tables.history["epoch"].tolist() == [1, 2]
    assert run.tables.history[["train_loss", "val_loss"]].map(math.isfinite).all(axis=None)
    base, last = run.network("base"), run.tables.fit.last_weights
    predict(base, next(iter(batches(run.task.splits.train, 8)))).sum().backward()
    # The edge stream of the last layer goes nowhere.
    idle = {name for name, value in base.named_parameters() if value.grad is None}
    assert all("edge" in name for name in idle), idle
    unmoved = {
        name for name, value in base.named_parameters() if torch.equal(value.data, last[name])
    }
    assert unmoved == idle


def test_the_test_split_is_looked_at_in_every_state_and_after_every_epoch(run):
    summary, test = run.tables.summary, run.task.splits.test
    places = list(zip(summary["state"], summary["layer"], strict=True))
    assert places == [(state, layer) for state in STATES for layer in range(LAYERS)]
    passed = list(batches(test, 8))
    kind = "num_nodes" if run.config.architecture == "gps" else "num_edges"
    assert set(summary["rows"]) == {sum(getattr(batch, kind) for batch in passed)}
    assert set(summary["channels"]) == {16}
    assert len(run.tables.graph_maxima) == len(places) * len(test)
    trajectory = run.tables.trajectory
    epochs = list(zip(trajectory["epoch"], trajectory["layer"], strict=True))
    assert epochs == [(epoch, layer) for epoch in range(3) for layer in range(LAYERS)]
    has_clamp = run.config.architecture in CLAMPED
    assert summary["share_saturated"].notna().tolist() == [has_clamp] * len(summary)


@pytest.mark.parametrize("state", ["base", "best", "last"])
def test_the_metrics_are_those_of_scikit_learn_on_labelled_targets(run, state):
    model, test = run.network(state), run.task.splits.test
    with torch.no_grad():
        pairs = [(predict(model, batch), targets(batch)) for batch in batches(test, 8)]
    predicted, target = (torch.cat(part).double() for part in zip(*pairs, strict=True))
    assert predicted.shape == target.shape == (len(test), run.task.num_targets)
    expected = metrics(predicted, target, run.task.loss)
    rows = run.rows(state)
    assert [name for name in rows if name.startswith("test_")] == [f"test_{m}" for m in expected]
    for metric, value in expected.items():
        found = rows[f"test_{metric}"].tolist()
        assert found == pytest.approx([value] * LAYERS, rel=1e-5, nan_ok=True), metric


def metrics(predicted, target, loss):
    if loss == "l1":
        return {"mae": mean_absolute_error(target, predicted)}
    labelled = ~target.isnan()
    areas = [
        roc_auc_score(target[chosen, task], predicted[chosen, task])
        for task, chosen in enumerate(labelled.T)
        if len(set(target[chosen, task].tolist())) == 2
    ]
    return {
        "bce": log_loss(target[labelled], predicted[labelled].sigmoid(), labels=[0, 1]),
        "roc_auc": sum(areas) / len(areas) if areas else math.nan,
        "accuracy": accuracy_score(target[labelled], predicted[labelled] > 0),
    }


# Stopped and resumed runs, and saved networks: one of each kind of data.


@pytest.mark.parametrize(
    "pair",
    on(
        [
            ("GT-ZINC", "moses"),
            ("SAN-TOX21", "tox21"),  # with dropout, and sizes that are tuples
            ("SAN-TU", "proteins"),
        ]
    ),
)
def test_a_run_that_was_stopped_goes_on_as_one_that_was_not(pair, request, tmp_path, capsys):
    name, data = pair
    task, config = request.getfixturevalue(data), config_for(name, data)
    for epochs in (1, 2):
        resumed = emergence(
            config.replace(max_epochs=epochs),
            task.splits,
            seed=SEED,
            name=name,
            folder=tmp_path,
            progress=False,
        )
    assert "resumed after epoch 1" in capsys.readouterr().err
    whole = emergence(config, task.splits, seed=SEED, name=name, progress=False)
    for table in TABLES:
        found, expected = (
            getattr(tables, table).drop(columns="seconds", errors="ignore")
            for tables in (resumed, whole)
        )
        pd.testing.assert_frame_equal(found, expected, check_exact=True)

    examined = examine_checkpoint(tmp_path / "last", task.splits)["summary"]
    own = {"base": "base", "base_calibrated": "base_calibrated", "best": "last"}
    for state, kept in own.items():
        found = examined.loc[examined["state"] == state, "max_ratio"].tolist()
        assert found == whole.summary.loc[whole.summary["state"] == kept, "max_ratio"].tolist()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("GraphiT-ZINC", {"full_graph": True}),
        ("SAN-ZINC", {"full_graph": True, "gamma": 0.5, "laplacian_encoding": True}),
    ],
)
def test_attention_over_the_full_graph_is_trained_and_observed(name, changes, moses):
    config = small(name, max_epochs=1, hidden_channels=32, **changes)
    found = emergence(config, moses.splits, seed=SEED, name=name, progress=False)
    assert set(found.summary["rows"]) == {sum(graph.num_edges for graph in moses.splits.test)}
    stated = found.summary["changes"].str
    for key, value in changes.items():
        assert stated.contains(f"{key}={value}").all()


# Labels that are missing.


def test_a_graph_without_labels_does_not_count_in_the_loss(tox21):
    """In one batch the loss of the first epoch is that of the untrained network."""
    graphs = [graph.clone() for graph in tox21.splits.train[:10]]
    graphs[3].y[:] = math.nan
    splits = replace(tox21.splits, train=graphs)
    config = small("GT-TOX21", batch_size=64, max_epochs=1, batch_norm=False)
    found = emergence(config, splits, seed=SEED, progress=False).history["train_loss"].tolist()
    seed_all(SEED)
    model = build(fit_to_data(config, splits.description))
    with torch.no_grad():
        (batch,) = batches(graphs, 64)
        logits, target = predict(model, batch).double(), targets(batch)
    labelled = ~target.isnan()
    assert not labelled[3].any()
    assert 10 < int(labelled.sum()) < 9 * 12
    expected = log_loss(target[labelled], logits[labelled].sigmoid())
    assert found == [pytest.approx(expected, rel=1e-5)]


# Configurations and data.


OGBN_PROTEINS = replace(
    load("citation").description,
    name="ogbn-proteins",
    num_node_types=8,
    edge_channels=8,
    num_targets=112,
)
"""What the published configurations for ogbn-proteins are made for; the data set is not read."""


def descriptions(moses, tox21, proteins):
    known = {"zinc": moses, "tox21": tox21, "proteins": proteins}
    found = {name: task.splits.description for name, task in known.items()}
    return found | {"ogbn-proteins": OGBN_PROTEINS}


def test_every_configuration_fits_the_data_set_that_it_names(moses, tox21, proteins):
    known = descriptions(moses, tox21, proteins)
    for name, config in CONFIGS.items():
        fitted = fit_to_data(config, known[config.dataset])
        build(fitted.replace(hidden_channels=8, heads=2, num_layers=1))
        sizes = ("num_node_types", "num_edge_types", "edge_channels")
        stated = {size: getattr(config, size) for size in sizes}
        for size, value in stated.items():
            wanted = getattr(known[config.dataset], size) if value is None else value
            assert getattr(fitted, size) == wanted, (name, size)
        assert fitted.replace(**stated) == config, "nothing else changes"


def test_tables_that_are_large_enough_are_kept(moses, tox21):
    zinc = CONFIGS["GT-ZINC"].replace(num_node_types=40)
    assert fit_to_data(zinc, moses.splits.description) == zinc
    sizes = (119, 9, 11, 13, 9, 5, 8, 2, 2)
    larger = CONFIGS["GT-TOX21"].replace(num_node_types=sizes)
    assert fit_to_data(larger, tox21.splits.description).num_node_types == sizes


REFUSED = {
    "too few types": ("GT-ZINC", "moses", {"num_edge_types": 3}, "num_edge_types: .* has 3, .* 4"),
    "too few types of one column": (
        *("GT-TOX21", "tox21", {"num_edge_types": (22, 5, 2)}),
        r"num_edge_types: the configuration has \(22, 5, 2\), .* random split has \(22, 6, 2\)",
    ),
    "too few columns": (
        *("GT-TOX21", "tox21", {"num_edge_types": (22, 6)}),
        r"num_edge_types: the configuration has \(22, 6\)",
    ),
    "one number for several columns": (
        *("GT-TOX21", "tox21", {"num_node_types": 200}),
        "num_node_types: the configuration has 200",
    ),
    "other targets": ("GT-ZINC", "moses", {"out_channels": 2}, "out_channels: .* 2, .* 1 targets"),
    "a loss for classes": (
        *("GT-ZINC", "moses", {"loss": "bce"}),
        "loss: the configuration has 'bce', .* graph regression, which needs 'l1'",
    ),
    "no readout of whole graphs": (
        *("SAN-TU", "proteins", {"readout": None}),
        "readout: the configuration has None, .* graph classification, which needs mean or sum",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_does_not_fit_is_refused_before_training(case, request, tmp_path):
    name, data, changes, message = REFUSED[case]
    splits = request.getfixturevalue(data).splits
    config = small(name, **changes)
    with pytest.raises(ValueError, match=message):
        fit_to_data(config, splits.description)
    with pytest.raises(ValueError, match=message):
        emergence(config, splits, folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edge_channels": 7}, "edge_channels: .* 7, .* 8"),
        ({"loss": "l1"}, "loss: the configuration has 'l1', .* which needs 'bce'"),
        ({"readout": "mean"}, "readout: the configuration has 'mean', .* which needs None"),
    ],
)
def test_a_configuration_for_nodes_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        fit_to_data(small("GT-PROTEINS", **changes), OGBN_PROTEINS)


# What the tables call a change.


def test_the_sizes_that_a_configuration_leaves_to_the_data_are_no_change(tox21, moses):
    run = emergence(small("GT-TOX21"), tox21.splits, seed=SEED, name="GT-TOX21", progress=False)
    expected = {name: str(value) for name, value in SIZES.items()}
    stated = run.history["changes"].unique().tolist()
    assert [dict(part.split("=") for part in text.split("; ")) for text in stated] == [expected]


def test_a_size_that_a_configuration_states_is_a_change(moses):
    config = small("GT-ZINC", num_node_types=30, max_epochs=1)
    run = emergence(config, moses.splits, seed=SEED, name="GT-ZINC", progress=False)
    assert run.history["changes"].str.contains("num_node_types=30;").all()


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("SAN-ZINC", dict(full_graph=True, gamma=0.5), "full_graph=True; gamma=0.5"),
        ("SAN-ZINC", dict(full_graph=True), "full_graph=True"),
        ("GT-PROTEINS", dict(readout="mean"), "readout=mean"),
        ("GT-PROTEINS", dict(edge_channels=9), "edge_channels=9"),
        ("GT-ZINC", dict(), "none"),
    ],
)
def test_a_value_that_is_none_where_it_is_stated_and_no_size_is_a_change(name, change, text):
    assert _changes(CONFIGS[name].replace(**change), name) == text
