"""What a fresh term does to a trained layer, and a term that nothing but the record feels."""

from dataclasses import replace

import pytest
import torch
from conftest import REPOSITORY, few_molecules

from mapkg.models import build
from mapkg.models.config import Config
from studies import checkpoint
from studies.__main__ import main
from studies.emergence import emergence
from studies.explicit_bias import (
    READINGS,
    idle_term,
    idle_term_of_run,
    readings,
    weight_on_sink,
    weight_on_sink_of_run,
    with_and_without_term,
    with_idle_term,
)
from studies.published import CONFIGS

SMALL = dict(hidden_channels=16, heads=4, num_layers=2, num_node_types=28, num_edge_types=4)


@pytest.fixture(scope="module")
def molecules(cache):
    return few_molecules(16, 8, 24)


@pytest.fixture(scope="module")
def trained():
    """The bundled network: its first layer has massive activations."""
    model, information = checkpoint.load(REPOSITORY / "data/checkpoints/gt_moses_seed0")
    return model.eval(), Config.from_dict(information["config"])


def network(architecture="SAN-ZINC", seed=0, **changes):
    torch.manual_seed(seed)
    config = CONFIGS[architecture].replace(**SMALL | changes)
    return build(config).eval(), config


def by_reading(table, column):
    return table.pivot(index="layer", columns="reading", values=column)


def test_an_intended_term_shifts_by_its_value_where_the_clamp_does_not_cut(molecules):
    model, _ = network()
    for layer in model.layers:
        torch.nn.init.normal_(layer.attention.query.weight, std=0.05)  # small sums
    found = readings(model, molecules.test, scale=0.5)
    assert found["reading"].tolist() == [*READINGS] * 2
    assert (by_reading(found, "max_abs_sum") < 5).all().all()
    assert (by_reading(found, "to_shifted")["intended"] < 1e-5).all()
    assert (by_reading(found, "to_plain")["intended"] > 0.1).all()
    assert (by_reading(found, "to_mean")["intended"] > 1e-3).all()


def test_where_the_clamp_cuts_it_does_more(trained, molecules):
    found = readings(trained[0], molecules.test)
    assert (by_reading(found, "max_abs_sum")["intended"] > 5).all()
    assert (by_reading(found, "to_shifted")["intended"] > 0.01).all()


def test_an_overwritten_term_averages_neighbours_and_leaves_key_and_edge_without_gradient(
    trained, molecules
):
    found = readings(trained[0], molecules.test)
    assert (by_reading(found, "to_mean")["overwritten"] < 1e-4).all()
    for name in ("key_gradient", "edge_gradient"):
        gradients = by_reading(found, name)
        assert (gradients["overwritten"] == 0).all()
        assert (gradients.drop(columns="overwritten") > 0).all().all()


def test_a_closed_sink_is_none_and_an_open_one_is_not(trained, molecules):
    plain = by_reading(readings(trained[0], molecules.test), "to_plain")
    assert (plain["sink, closed"] == 0).all()
    assert (plain["none"] == 0).all()
    assert (plain["sink"] > 0.1).all()


def test_the_record_of_a_sink_is_that_of_none(trained, molecules):
    table = by_reading(readings(trained[0], molecules.test), "max_ratio")
    assert (table["sink"] == table["none"]).all()
    assert (table["intended"] < table["none"]).all()


@pytest.mark.parametrize("architecture", ["SAN-ZINC", "GraphiT-ZINC"])
def test_an_idle_term_changes_the_record_and_no_prediction(architecture, molecules):
    model, config = network(architecture)
    found = idle_term(model, config, molecules.test)
    assert (found["largest_change"] < 1e-4).all()
    before, after = (found[found["term"] == term].reset_index() for term in (False, True))
    assert (after["row_median_q50"] > 1.5 * before["row_median_q50"]).all()


def test_an_idle_term_takes_massive_activations_off_the_record(trained, molecules):
    found = idle_term(*trained, molecules.test).query("layer == 0").set_index("term")
    assert found["share_rows_with_massive"][False] > 0.5
    assert found["share_rows_with_massive"][True] == 0
    assert found["max_abs"][True] == pytest.approx(found["max_abs"][False], rel=0.1)


def test_an_idle_term_copies_the_network_and_its_mode():
    model, config = network()
    changed = with_idle_term(model.train(), config, seed=3)
    assert changed.training
    for name, value in model.state_dict().items():
        assert torch.equal(changed.state_dict()[name], value)
    for layer in changed.layers:
        assert layer.attention.edge_term.sum(-1).abs().max() < 1e-5
        assert (layer.attention.value_term == 0).all()
        assert layer.attention.edge_term.std() > 0.5


def test_a_network_that_has_a_term_is_refused(molecules):
    model, config = network(explicit_bias="sink")
    with pytest.raises(ValueError, match=r"no Explicit Bias Term, got 'sink'"):
        with_idle_term(model, config)


def test_a_finished_run_is_given_an_idle_term(molecules, tmp_path, capsys):
    config = CONFIGS["SAN-ZINC"].replace(max_epochs=1, **SMALL)
    emergence(config, molecules, name="SAN-ZINC", folder=tmp_path, progress=False, seed=4)
    found = idle_term_of_run(tmp_path, molecules)
    assert set(found["seed"]) == {4}
    assert set(found["dataset"]) == {molecules.description.title}
    other = replace(molecules, description=replace(molecules.description, title="others"))
    with pytest.raises(ValueError, match="expected a network trained on others, got one trained"):
        idle_term_of_run(tmp_path, other)
    path = tmp_path / "idle.csv.gz"
    assert main(["study", "idle", str(tmp_path), "--dataset", "moses", "-o", str(path)]) == 0
    assert path.is_file()


def test_the_weight_on_the_sink_is_what_a_loop_over_nodes_finds(molecules):
    model, _ = network(explicit_bias="sink")
    found = weight_on_sink(model, molecules.test, batch_size=5).set_index(["layer", "neighbours"])
    shares = {}
    for graph in molecules.test:
        x = model.node_embedding(graph.x)
        edge = model.edge_embedding(graph.edge_attr)
        for number, layer in enumerate(model.layers):
            attention = layer.attention
            query = attention.query(x).unflatten(-1, (4, 4)) / 2
            key, gate = (
                m(v).unflatten(-1, (4, 4)) for m, v in ((attention.key, x), (attention.edge, edge))
            )
            for node in range(graph.num_nodes):
                at = (graph.edge_index[1] == node).nonzero().flatten()
                score = key[graph.edge_index[0, at]] * query[node] * gate[at]
                neighbours = score.sum(-1).clamp(-5, 5).exp().sum(0)
                sink = (query[node] * attention.key_term).sum(-1).clamp(max=5).exp()
                shares.setdefault((number, len(at)), []).append(sink / (sink + neighbours))
            x, edge = layer(x, graph.edge_index, edge)
    assert {*found.index} == {key for key in shares if key[1] > 0}
    for key, row in found.iterrows():
        heads = torch.stack(shares[key]).mean(0)
        assert row["nodes"] == len(shares[key])
        assert row["share"] == pytest.approx(heads.mean().item(), abs=1e-5)
        assert row["least_head"] == pytest.approx(heads.min().item(), abs=1e-5)
        assert row["most_head"] == pytest.approx(heads.max().item(), abs=1e-5)


def test_a_finished_run_with_a_sink_shows_its_weight(molecules, tmp_path, capsys):
    config = CONFIGS["SAN-ZINC"].replace(max_epochs=1, explicit_bias="sink", **SMALL)
    emergence(config, molecules, name="SAN-ZINC", folder=tmp_path, progress=False, seed=4)
    found = weight_on_sink_of_run(tmp_path, molecules)
    assert set(found["seed"]) == {4} and set(found["explicit_bias"]) == {"sink"}
    path = tmp_path / "sink.csv.gz"
    assert main(["study", "sink", str(tmp_path), "--dataset", "moses", "-o", str(path)]) == 0
    assert path.is_file()


def test_without_a_sink_there_is_no_weight_on_it(molecules):
    with pytest.raises(ValueError, match="expected layers with a sink, but layer 0 has none"):
        weight_on_sink(network()[0], molecules.test)


def test_the_figure_has_a_line_for_each_seed_without_the_term_and_with_it(molecules):
    model, config = network()
    table = idle_term(model, config, molecules.test).assign(label="SAN", seed=0)
    grid = with_and_without_term(table)
    lines = [line.get_ydata() for line in grid.axes[0, 1].lines if len(line.get_ydata())]
    expected = [table[table["term"] == term]["max_abs"].tolist() for term in (False, True)]
    assert sorted(map(list, lines)) == sorted(expected)
