"""Attacks on networks and finished runs, and what these are summed up to."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import few_molecules, not_bundled
from scipy import stats

from mapkg.attack import Ascent, attack
from mapkg.evaluation import evaluate
from mapkg.models import build
from studies import checkpoint
from studies.__main__ import main
from studies.bond_changes import count_neighbors
from studies.emergence import emergence
from studies.published import CONFIGS
from studies.robustness import PLACES, USUAL, attack_network, damage, damage_table, drawn

SMALL = dict(hidden_channels=16, heads=4, num_layers=2)
SHORT = dict(ascent=Ascent(lr=0.1, passes=3), restarts=[5], progress=False)


@pytest.fixture(scope="module")
def molecules(cache):
    return few_molecules(16, 12, 8)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = CONFIGS["SAN-ZINC"].replace(**SMALL, num_node_types=28, num_edge_types=4)
    return build(config).eval(), config


def test_every_kind_is_the_attack_of_that_name(network, molecules):
    table = attack_network(*network, molecules.val, sigmas=[0.1], **SHORT)
    assert table["kind"].unique().tolist() == [*USUAL]
    for kind, options in zip(USUAL, ({}, {"shared": True}, {"relative": True}), strict=True):
        expected = attack(network[0], molecules.val, [0.1], centered=True, **options, **SHORT)
        losses = table[table["kind"] == kind]["loss"].tolist()
        assert losses == pytest.approx(expected["loss"].tolist(), rel=1e-6)


def test_a_place_and_its_control_are_equally_large(network, molecules):
    settings = dict(threshold=20.0, sigmas=[0.01, 0.1], kinds=(), places=PLACES)
    table = attack_network(*network, molecules.val, **settings, **SHORT)
    assert set(table["sigma"]) == {0.1}
    by_place = table[table["noise"] == "random"].set_index("kind")
    channels = 16 * sum(graph.num_edges for graph in molecules.val)
    for place in ("massive edges", "massive channels", "largest channel"):
        one, other = by_place.loc[place], by_place.loc[f"{place}, control"]
        assert 0 < one["disturbed"] == other["disturbed"] < channels
        assert one["loss"] != other["loss"]  # the same noise elsewhere


def test_what_is_unknown_or_leaves_nothing_is_refused(network, molecules):
    with pytest.raises(ValueError, match=r"kind public: did you mean published"):
        attack_network(*network, molecules.val, kinds=["public"])
    with pytest.raises(ValueError, match=r"places: none of massive edges is in these graphs"):
        places = dict(kinds=(), places=["massive edges"], threshold=1e12)
        attack_network(*network, molecules.val, **places, **SHORT)


def test_a_finished_run_is_attacked_on_its_changed_data(molecules, tmp_path, monkeypatch):
    changed = count_neighbors(molecules)
    types = changed.description.num_node_types
    config = CONFIGS["SAN-ZINC"].replace(max_epochs=1, num_node_types=types, **SMALL)
    emergence(config, changed, name="SAN-ZINC", folder=tmp_path, progress=False, seed=4)
    monkeypatch.setattr("studies.commands.load", lambda name: molecules)
    path = tmp_path / "attack.csv.gz"
    arguments = ["study", "attack", str(tmp_path), "--dataset", "moses", "--graphs", "3"]
    arguments += ["-o", str(path), "--kinds", "own"]
    assert main(arguments) == 2 and not path.exists()
    assert main([*arguments, "--change", "neighbour-count"]) == 0
    table = pd.read_csv(path)
    assert table[["graphs", "seed", "epochs"]].drop_duplicates().values.tolist() == [[3, 4, 1]]
    model, _ = checkpoint.load(tmp_path / "best")
    clean = evaluate(model.eval(), drawn(changed.val, 3, 4))
    assert table[table["noise"] == "none"]["loss"].unique() == pytest.approx([clean], rel=1e-5)


def test_attacked_molecules_are_drawn_by_seed_without_repetition():
    one, same, other = (drawn(range(100), 64, seed) for seed in (0, 0, 1))
    assert one == same != other
    assert len({*one}) == 64 and not {*one} <= {*range(64)}
    assert sorted(drawn(range(5), 64, 0)) == [*range(5)]


def rows(seed, losses, restart=0):
    return [
        dict(label="GT", run="none", kind="own", sigma=0.1, seed=seed, restart=restart)
        | dict(noise=noise, loss=loss)
        for noise, loss in zip(("none", "random", "optimised"), losses, strict=True)
    ]


def test_damage_is_a_factor_of_geometric_means_over_restarts():
    (row,) = damage(pd.DataFrame([*rows(0, (1, 2, 4)), *rows(0, (1, 8, 36), restart=1)])).values
    assert row[-6:].tolist() == pytest.approx([1, 4, 12, 4, 12, 3])


def test_the_table_has_geometric_means_with_intervals_over_seeds_and_none_of_a_single_one():
    table = damage(pd.DataFrame([r for seed in range(3) for r in rows(seed, (1, 1, 10**seed))]))
    values = {"random": "a", "optimised": "b"}
    half = 4.302653 * np.log(10) / np.sqrt(3)
    low, high = np.exp([np.log(10) - half, np.log(10) + half])
    expected = ["1 [1, 1]", f"10 [{low:.3g}, {high:.3g}]"]
    assert damage_table(table, values, rows=["run"]).loc["none"].tolist() == expected
    assert damage_table(table[2:], values, rows=["run"]).loc["none"].tolist() == ["1", "100"]


def test_the_first_validation_molecules_of_zinc_are_as_good_as_a_draw():
    """Tracked attacks on ZINC use the first 64; those of TOX21, sorted by scaffold, are not."""
    alike = {}
    for name in ("zinc-substitute", "tox21"):
        graphs = not_bundled(name).val
        sizes = [graph.num_nodes for graph in graphs]
        targets = [graph.y.nanmean().item() for graph in graphs]
        p = [stats.mannwhitneyu(x[:64], x[64:]).pvalue for x in (sizes, targets)]
        p += [stats.spearmanr(x, range(len(x))).pvalue for x in (sizes, targets)]
        alike[name] = min(p) > 0.05
    assert alike == {"zinc-substitute": True, "tox21": False}
