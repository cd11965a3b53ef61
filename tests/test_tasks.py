"""From data to tables on tiny data: every architecture, every kind of task and of features."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import few_molecules, ogb_files

from mapkg.evaluation import batches, predict
from studies.data import Splits, load, networks
from studies.data.graph_classification import TASKS, read_proteins, read_tox21, split_proteins
from studies.emergence import _changes, emergence, fit_to_data
from studies.extras import build
from studies.published import CONFIGS
from studies.train import seed_all

SEED = 4
SIZES = dict(hidden_channels=16, heads=2, num_layers=2, batch_size=8, lr=0.01, max_epochs=2)
ON_ZINC = [name for name, config in CONFIGS.items() if config.dataset == "zinc"]
SMILES = [
    *("CCO", "CC(=O)O", "CCN", "c1ccccc1", "Cc1ccccc1", "Oc1ccccc1", "CC#N", "C=CC=O", "CCCl"),
    *("CS(=O)C", "C1CCCCC1", "c1ccncc1", "CC(C)O", "NCCO", "BrCCBr", "FC(F)F", "CCSCC", "O=CO"),
    *("C1CC1", "CN(C)C", "OCC(O)CO", "c1ccoc1", "CCCCCC", "N#CC#N", "C[N+](C)(C)C", "OO"),
    *("CC=C", "CCOCC", "ClC=CCl", "CC(N)C(=O)O"),
]
QUICK = [*((name, "moses") for name in ON_ZINC), ("GT-ZINC", "tox21"), ("SAN-TU", "proteins")]
QUICK += [("GT-PROTEINS", "network")]
RUNS = [
    *QUICK,
    *((name, "tox21") for name in ON_ZINC if name != "GT-ZINC"),
    *((name, "proteins") for name in ("GT-TU", "GraphiT-TU")),
    *(("GraphiT-ZINC full_graph=True", "moses"), ("SAN-ZINC full_graph=True", "moses")),
]
"""Configurations and the data they are run on; each architecture and kind of data is quick."""

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def data(cache, tmp_path_factory):
    # Thirty molecules; a third of the labels is missing, and in the last task nearly all.
    labels = {
        name: [
            "" if (row + task) % 3 == 0 or (task == 11 and row % 5) else str((row * task) % 2)
            for row in range(len(SMILES))
        ]
        for task, name in enumerate(TASKS)
    }
    folder = tmp_path_factory.mktemp("data")
    pd.DataFrame(labels).assign(mol_id="TOX", smiles=SMILES).to_csv(folder / "tox21.csv")
    # Thirty random trees in the raw format of the TUDataset collection.
    random, edges, indicator = np.random.default_rng(0), [], []
    for graph in range(30):
        first = len(indicator) + 1
        indicator += [graph + 1] * int(random.integers(3, 8))
        for node in range(first + 1, len(indicator) + 1):
            other = int(random.integers(first, node))
            edges += [f"{node}, {other}", f"{other}, {node}"]
    columns = {
        "A": edges,
        "graph_indicator": indicator,
        "graph_labels": [1 + graph % 2 for graph in range(30)],
        "node_labels": [*range(3), *random.integers(0, 3, len(indicator) - 3)],
    }
    for name, rows in columns.items():
        (folder / f"PROTEINS_{name}.txt").write_text("".join(f"{row}\n" for row in rows))
    return {
        "moses": few_molecules(24, 8, 9),
        "tox21": read_tox21(folder / "tox21.csv", "random"),
        "proteins": split_proteins(read_proteins(folder)),
        "network": network_of_proteins(folder),
    }


def network_of_proteins(folder):
    about = dict(task="node classification", num_node_types=3, edge_channels=8, num_targets=2)
    description = replace(load("citation").description, **about)
    graphs = networks.read_ogb_proteins(ogb_files(folder))
    return Splits(**{name: [graph] for name, graph in graphs.items()}, description=description)


def config_for(name, data="moses", **changes):
    name, _, is_full = name.partition(" ")
    if data == "network":
        changes |= dict(out_channels=2)
    if data == "tox21":
        changes |= dict(num_node_types=None, num_edge_types=None, out_channels=12, loss="bce")
    return CONFIGS[name].replace(**SIZES | changes | ({"full_graph": True} if is_full else {}))


@pytest.mark.parametrize(
    "run", [pytest.param(run, marks=[] if run in QUICK else pytest.mark.slow) for run in RUNS]
)
def test_training_moves_every_weight_that_the_prediction_depends_on(run, data):
    (name, kind), splits = run, data[run[1]]
    config = config_for(*run)
    tables = emergence(config, splits, seed=SEED, name=name, progress=False)
    seed_all(SEED)
    base = build(fit_to_data(config, splits.description)).eval()
    predict(base, next(iter(batches(splits.train, 8)))).sum().backward()
    # The edge stream of the last layer goes nowhere.
    idle = {name for name, value in base.named_parameters() if value.grad is None}
    assert all("edge" in name for name in idle), idle
    last = tables.fit.last_weights
    moved = {n for n, value in base.named_parameters() if not torch.equal(value.data, last[n])}
    assert moved == {name for name, _ in base.named_parameters()} - idle
    rows = "num_nodes" if "GPS" in name else "num_edges"
    assert set(tables.summary["rows"]) == {sum(getattr(graph, rows) for graph in splits.test)}
    losses = {"test_mae"} if kind == "moses" else {"test_bce", "test_roc_auc", "test_accuracy"}
    assert set(tables.summary.filter(like="test_")) == losses


def test_every_configuration_fits_the_data_set_that_it_names(data):
    ogbn = dict(name="ogbn-proteins", num_node_types=8, edge_channels=8, num_targets=112)
    known = {name: splits.description for name, splits in data.items()}
    known |= {"zinc": known["moses"]}
    known |= {"ogbn-proteins": replace(load("citation").description, **ogbn)}
    for name, config in CONFIGS.items():
        about = known[config.dataset]
        fitted = fit_to_data(config, about)
        build(fitted.replace(hidden_channels=8, heads=2, num_layers=1))
        sizes = ("num_node_types", "num_edge_types", "edge_channels")
        stated = {size: getattr(config, size) for size in sizes}
        for size, value in stated.items():
            wanted = getattr(about, size) if value is None else value
            assert getattr(fitted, size) == wanted, (name, size)
        assert fitted.replace(**stated) == config, "nothing else changes"
    large = CONFIGS["GT-ZINC"].replace(num_node_types=40)
    assert fit_to_data(large, known["moses"]) == large


@pytest.mark.parametrize(
    ("name", "kind", "changes", "message"),
    [
        ("GT-ZINC", "moses", {"num_edge_types": 3}, "num_edge_types: .* has 3, .* 4"),
        ("GT-TOX21", "tox21", {"num_edge_types": (22, 5, 2)}, r"has \(22, 5, 2\), .* \(22, 6, 2\)"),
        ("GT-TOX21", "tox21", {"num_edge_types": (22, 6)}, r"the configuration has \(22, 6\)"),
        ("GT-TOX21", "tox21", {"num_node_types": 200}, "num_node_types: .* has 200"),
        ("GT-ZINC", "moses", {"out_channels": 2}, "out_channels: .* 2, .* 1 targets"),
        ("GT-ZINC", "moses", {"loss": "bce"}, "loss: .* graph regression, which needs 'l1'"),
        ("SAN-TU", "proteins", {"readout": None}, "readout: .* None, .* needs mean or sum"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_before_training(
    name, kind, changes, message, data, tmp_path
):
    config = CONFIGS[name].replace(**SIZES | changes)
    with pytest.raises(ValueError, match=message):
        emergence(config, data[kind], folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_tables_state_what_differs_from_the_named_configuration():
    for name, change, text in (
        ("SAN-ZINC", dict(full_graph=True, gamma=0.5), "full_graph=True; gamma=0.5"),
        ("GT-PROTEINS", dict(edge_channels=9), "edge_channels=9"),
        ("GT-TOX21", dict(num_node_types=(3, 4), heads=2), "heads=2"),  # left to the data
        ("GT-ZINC", dict(), "none"),
    ):
        assert _changes(CONFIGS[name].replace(**change), name) == text
