"""Attacks on finished runs, their tables, and what these are summed up to."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import few_molecules

from mapkg.attack import Ascent, attack
from mapkg.evaluation import batches, predict
from mapkg.hooks import record
from mapkg.measures import activation_ratio
from mapkg.models import build
from studies import checkpoint
from studies.__main__ import main
from studies.bond_changes import count_neighbors
from studies.data import molecule_graph
from studies.emergence import emergence
from studies.published import CONFIGS
from studies.robustness import (
    PLACES,
    USUAL,
    attack_network,
    attack_run,
    damage,
    damage_table,
    losses_under_attack,
    read_attacks,
)

SMALL = dict(hidden_channels=16, heads=4, num_layers=2)
SHORT = Ascent(lr=0.1, passes=3)


@pytest.fixture(scope="module")
def molecules(cache):
    return few_molecules(16, 12, 8)


@pytest.fixture(scope="module")
def network(molecules):
    torch.manual_seed(0)
    sizes = dict(num_node_types=28, num_edge_types=4)
    config = CONFIGS["SAN-ZINC"].replace(**SMALL, **sizes)
    return build(config).eval(), config


def test_every_kind_is_the_attack_of_that_name(network, molecules):
    model, config = network
    settings = dict(ascent=SHORT, restarts=[5], progress=False)
    found = attack_network(model, config, molecules.val, sigmas=[0.1], **settings)
    assert found["kind"].unique().tolist() == [*USUAL]
    for kind in USUAL:
        options = {"own": {}, "shared": {"shared": True}, "relative": {"relative": True}}[kind]
        expected = attack(model, molecules.val, [0.1], centred=True, **options, **settings)
        losses = found.query("kind == @kind")["loss"]
        assert losses.to_numpy() == pytest.approx(expected["loss"].to_numpy(), rel=1e-6)


def test_a_place_and_its_control_are_equally_large(network, molecules):
    model, config = network
    settings = dict(ascent=SHORT, restarts=[0], threshold=20.0, sigmas=[0.01, 0.1])
    found = attack_network(
        model, config, molecules.val, kinds=(), places=PLACES, progress=False, **settings
    )
    assert set(found["sigma"]) == {0.1}
    sizes = found.groupby("kind")["disturbed"].first()
    channels = 16 * sum(graph.num_edges for graph in molecules.val)
    for place in ("massive edges", "massive channels", "largest channel"):
        assert 0 < sizes[place] == sizes[f"{place}, control"] < channels
    # Random noise of one seed on two places of the same size is not the same attack.
    random = found.query("noise == 'random'").set_index("kind")["loss"]
    assert random["massive edges"] != random["massive edges, control"]


def test_a_place_of_a_single_entry_is_left_out(network):
    model, config = network
    graphs = [molecule_graph("C=NO", 0.5)]  # no edge is like another
    (batch,) = batches(graphs, 1)
    with torch.no_grad(), record(model, "layers.*.score") as seen:
        predict(model, batch)
    ratios = torch.cat([activation_ratio(score[0]).flatten() for score in seen.values()])
    largest, second = ratios.topk(2).values.tolist()
    settings = dict(ascent=SHORT, restarts=[0], sigmas=[0.1], progress=False, kinds=())
    found = attack_network(
        model, config, graphs, places=PLACES, threshold=(largest + second) / 2, **settings
    )
    # All channels of one edge can be disturbed, one channel of it cannot.
    assert set(found["kind"]) == {*PLACES} - {"massive channels", "massive channels, control"}


def test_what_is_unknown_or_leaves_nothing_is_refused(network, molecules):
    model, config = network
    with pytest.raises(ValueError, match=r"kinds: expected some of own, shared, relative"):
        attack_network(model, config, molecules.val, kinds=["public"])
    with pytest.raises(ValueError, match=r"places: expected some of massive edges"):
        attack_network(model, config, molecules.val, places=["edges"])
    with pytest.raises(ValueError, match=r"places: none of massive edges is in these graphs"):
        attack_network(
            model, config, molecules.val, kinds=(), places=["massive edges"], threshold=1e12
        )


def test_a_finished_run_is_attacked_on_the_first_validation_graphs(molecules, tmp_path, capsys):
    config = CONFIGS["SAN-ZINC"].replace(max_epochs=1, **SMALL)
    emergence(config, molecules, name="SAN-ZINC", folder=tmp_path, progress=False, seed=4)
    settings = dict(sigmas=[0.1], restarts=[0], kinds=["own"], ascent=SHORT, progress=False)
    found = attack_run(tmp_path, molecules, graphs=5, **settings)
    assert set(found["graphs"]) == {5}
    assert set(found["seed"]) == {4}
    assert set(found["epochs"]) == {1}
    assert set(found["explicit_bias"]) == {"none"}
    also = attack_run(tmp_path, molecules, graphs=5, places=True, threshold=20.0, **settings)
    assert also["kind"].unique().tolist() == ["own", *PLACES]
    model, _ = checkpoint.load(tmp_path / "best")
    settings.pop("kinds")
    expected = attack(model.eval(), molecules.val[:5], centred=True, **settings)
    assert found["loss"].to_numpy() == pytest.approx(expected["loss"].to_numpy(), rel=1e-6)
    # The command reads the data itself: another title is other data.
    path = tmp_path / "attack.csv.gz"
    arguments = ["study", "attack", str(tmp_path / "none"), "--dataset", "moses", "-o", str(path)]
    assert main(arguments) == 2
    assert not path.exists()


def test_a_run_on_changed_data_is_attacked_on_such_data(molecules, tmp_path, capsys, monkeypatch):
    changed = count_neighbors(molecules)
    types = changed.description.num_node_types
    config = CONFIGS["SAN-ZINC"].replace(max_epochs=1, num_node_types=types, **SMALL)
    emergence(config, changed, name="SAN-ZINC", folder=tmp_path, progress=False)
    monkeypatch.setattr("studies.commands.load", lambda name: molecules)
    path = tmp_path / "attack.csv.gz"
    arguments = [
        "study",
        "attack",
        str(tmp_path),
        "--dataset",
        "moses",
        "--graphs",
        "3",
        "-o",
        str(path),
    ]
    arguments += ["--kinds", "own"]
    assert main(arguments) == 2
    assert "neighbours" in capsys.readouterr().err and not path.exists()
    assert main([*arguments, "--change", "neighbour-count"]) == 0
    found = pd.read_csv(path)
    clean = found[found["noise"] == "none"]["loss"].unique()
    model, _ = checkpoint.load(tmp_path / "best")
    graphs = changed.val[:3]
    with torch.no_grad():
        predicted = [predict(model.eval(), batch) for batch in batches(graphs, 3)]
    target = torch.cat([graph.y for graph in graphs])
    expected = (torch.cat(predicted).flatten() - target.flatten()).abs().mean().item()
    assert clean == pytest.approx([expected], rel=1e-5)


def rows(run, seed, losses, restart=0):
    return [
        dict(label="GT", run=run, kind="own", sigma=0.1, seed=seed, restart=restart)
        | dict(noise=noise, loss=loss)
        for noise, loss in zip(("none", "random", "optimised"), losses, strict=True)
    ]


def test_damage_is_a_factor_of_geometric_means_over_restarts():
    table = pd.DataFrame([*rows("none", 0, (1, 2, 4)), *rows("none", 0, (1, 8, 36), restart=1)])
    (found,) = damage(table).to_dict("records")
    assert found["random"] == pytest.approx(4)
    assert found["optimised"] == pytest.approx(12)
    assert found["random_factor"] == pytest.approx(4)
    assert found["optimised_factor"] == pytest.approx(12)
    assert found["gain_factor"] == pytest.approx(3)


def test_the_table_has_geometric_means_with_intervals_over_seeds():
    table = [r for seed, loss in enumerate((1, 10, 100)) for r in rows("none", seed, (1, 1, loss))]
    found = damage_table(
        damage(pd.DataFrame(table)), {"random": "a", "optimised": "b"}, rows=["label", "run"]
    ).loc[("GT", "none")]
    half = 4.302653 * np.log(10) / np.sqrt(3)
    low, high = np.exp([np.log(10) - half, np.log(10) + half])
    assert found["b"] == f"10 [{low:.3g}, {high:.3g}]"
    assert found["a"] == "1 [1, 1]"


def test_tables_are_read_with_their_labels(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"attack_gt\.csv\.gz"):
        read_attacks(tmp_path, {"gt": ("GT", "none")})
    pd.DataFrame(rows("none", 0, (1, 2, 3))).drop(columns=["label", "run"]).to_csv(
        tmp_path / "attack_gt.csv.gz", index=False
    )
    found = read_attacks(tmp_path, {"gt": ("GT, ZINC", "no term")})
    assert set(found["label"]) == {"GT, ZINC"}
    assert set(found["run"]) == {"no term"}


def test_a_single_seed_has_no_interval(recwarn):
    damages = pd.DataFrame({"run": ["a", "b", "b"], "factor": [2.0, 2.0, 8.0]})
    table = damage_table(damages, {"factor": "times"}, rows=["run"])
    assert table.loc["a", "times"] == "2" and table.loc["b", "times"].startswith("4 [")
    assert not recwarn.list


def test_the_figure_has_geometric_means_of_each_network_with_named_remedies_first():
    table = [r for seed, loss in enumerate((1, 100)) for r in rows("none", seed, (1, 2, loss))]
    grid = losses_under_attack(
        damage(pd.DataFrame(table + rows("sink", 0, (1, 1, 3)))), runs=["sink"]
    )
    values = sorted(line.get_ydata()[0] for line in grid.axes[0].lines if len(line.get_ydata()))
    assert values == pytest.approx([1, 1, 1, 2, 3, 10])
    texts = [text.get_text() for text in grid.legend.get_texts()]
    assert texts.index("sink") < texts.index("none")
