"""What a fresh term does to layers, and tables of networks that were trained with a remedy."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import few_molecules

from mapkg.models import build
from studies.__main__ import main
from studies.data import molecule_graph
from studies.emergence import emergence
from studies.explicit_bias import (
    READINGS,
    idle_term,
    later_epochs,
    readings,
    remedy_table,
    weight_on_sink,
)
from studies.published import CONFIGS

SMALL = dict(hidden_channels=16, heads=4, num_layers=2)


@pytest.fixture(scope="module")
def molecules(cache):
    return few_molecules(16, 8, 24)


def network(architecture="SAN-ZINC", **changes):
    torch.manual_seed(0)
    config = CONFIGS[architecture].replace(**SMALL, num_node_types=28, num_edge_types=4, **changes)
    return build(config).eval(), config


def test_where_the_clamp_does_not_cut_an_intended_term_shifts_and_a_closed_sink_is_none(molecules):
    model, _ = network()
    for layer in model.layers:
        torch.nn.init.normal_(layer.attention.query.weight, std=0.05)  # small sums
    table = readings(model, molecules.test, scale=0.5)
    assert table["reading"].tolist() == [*READINGS] * 2
    plain, shifted, mean, cut, key = (
        table.pivot(index="layer", columns="reading", values=name)
        for name in ("to_plain", "to_shifted", "to_mean", "share_saturated", "key_gradient")
    )
    assert (cut == 0).all(axis=None)
    assert (shifted["intended"] < 1e-5).all() and (plain["intended"] > 0.1).all()
    assert (mean["overwritten"] < 1e-5).all() and (mean["intended"] > 1e-3).all()
    assert (plain["sink, closed"] == 0).all() and (plain["sink"] > 0.1).all()
    assert (key["overwritten"] == 0).all() and (key.drop(columns="overwritten") > 0).all(axis=None)


@pytest.mark.parametrize("architecture", ["SAN-ZINC", "GraphiT-ZINC"])
def test_an_idle_term_changes_the_record_and_no_prediction(architecture, molecules):
    table = idle_term(*network(architecture), molecules.test)
    assert (table["largest_change"] < 1e-4).all()
    medians = table.pivot(index="layer", columns="term", values="row_median_q50")
    assert (medians[True] > 1.5 * medians[False]).all()


def test_what_does_not_fit_the_network_is_refused(molecules):
    with pytest.raises(ValueError, match=r"no Explicit Bias Term, got 'sink'"):
        idle_term(*network(explicit_bias="sink"), molecules.test)
    with pytest.raises(ValueError, match="expected layers with a sink"):
        weight_on_sink(network()[0], molecules.test)


def test_the_weight_on_the_sink_is_what_a_loop_over_nodes_gives(molecules):
    model, _ = network(explicit_bias="sink")
    graphs = [*molecules.test, molecule_graph("C", 0.0)]  # an atom without a neighbor is left out
    table = weight_on_sink(model, graphs, batch_size=5).set_index(["layer", "neighbours"])
    shares = {}
    for graph in graphs:
        x, edge = model.node_embedding(graph.x), model.edge_embedding(graph.edge_attr)
        for number, layer in enumerate(model.layers):
            a = layer.attention
            maps = ((a.query, x), (a.key, x), (a.edge, edge))
            query, key, gate = (of(rows).unflatten(-1, (4, 4)) for of, rows in maps)
            for node in range(graph.num_nodes):
                at = (graph.edge_index[1] == node).nonzero().flatten()
                score = key[graph.edge_index[0, at]] * query[node] * gate[at] / 2
                neighbors = score.sum(-1).clamp(-5, 5).exp().sum(0)
                sink = (query[node] * a.key_term / 2).sum(-1).clamp(max=5).exp()
                shares.setdefault((number, len(at)), []).append(sink / (sink + neighbors))
            x, edge = layer(x, graph.edge_index, edge)
    assert {*table.index} == {key for key in shares if key[1] > 0}
    for key, row in table.iterrows():
        heads = torch.stack(shares[key]).mean(0)
        expected = [len(shares[key]), *(f(heads).item() for f in (torch.mean, min, max))]
        assert row.tolist() == pytest.approx(expected, abs=1e-5)


def test_finished_runs_are_studied_by_name(molecules, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("studies.commands.load", lambda name: molecules)
    config = CONFIGS["SAN-ZINC"].replace(max_epochs=1, **SMALL)
    for arm in ("none", "sink"):
        settings = dict(name="SAN-ZINC", progress=False, seed=4, folder=tmp_path / arm)
        emergence(config.replace(explicit_bias=arm), molecules, **settings)
    data, tables = ["--dataset", "moses"], {}
    for study, run, options in (
        ("idle", "none", data),
        ("sink", "sink", data),
        ("remedy", "none", []),
    ):
        arguments = ["study", study, str(tmp_path / run), *options, "-o", str(tmp_path / study)]
        assert main(arguments) == 0
        for path in tmp_path.glob(f"{study}*.csv.gz"):
            tables[path.name.split(".")[0]] = pd.read_csv(path)
    assert tables.keys() == {"idle", "sink", "remedy_layers", "remedy_epochs"}
    for rows in tables.values():
        assert set(rows["seed"]) == {4} and set(rows["epochs"]) == {1}
        assert rows[["config", "dataset", "versions", "commit"]].notna().all(axis=None)
    assert tables["remedy_epochs"].groupby("layer")["epoch"].agg(list).tolist() == [[0, 1]] * 2
    assert main(["study", "remedy", str(tmp_path / "no run"), "-o", str(tmp_path / "x")]) == 2
    assert "no table at" in capsys.readouterr().err


def epochs_of(seed, ratios):
    """Two layers; the first has the given ratios after epochs 0, 1, ..., the second 10."""
    return pd.DataFrame(
        dict(label="SAN", run="sink", seed=seed, layer=layer, epoch=epoch, max_ratio=r)
        | dict(max_abs=1099.4 / (1 + layer), row_median_q50=0.1, share_saturated=0.0)
        | dict(share_rows_with_massive=0.5 * (r > 1000))
        for epoch, ratio in enumerate(ratios)
        for layer, r in ((0, ratio), (1, 10.0))
    )


def test_later_epochs_are_the_second_half_with_geometric_means():
    table = pd.concat([epochs_of(0, [1, 1, 1, 4000, 1000]), epochs_of(1, [9e9, 9, 9, 90, 90])])
    late = later_epochs(table).set_index("seed")
    # Epochs 3 and 4: in layer 0 ratios of 4000 and 1000, in layer 1 of 10.
    assert late["max_ratio"].tolist() == pytest.approx([(2000 * 10) ** 0.5, 30.0])
    assert late["largest"].tolist() == pytest.approx([2000.0, 90.0])
    assert late["max_abs"].tolist() == pytest.approx([1099.4, 1099.4])  # of layer 0 alone
    for name, share in (("share_rows_with_massive", 0.125), ("edges_with", 0.25)):
        assert late[name].tolist() == pytest.approx([share, 0.0])
    assert late["epochs_with"].tolist() == [0.5, 0.0]
    of_layer = later_epochs(table, keys=("layer",)).set_index(["seed", "layer"])["max_ratio"]
    assert of_layer[0].tolist() == pytest.approx([2000.0, 10.0])


def test_the_table_has_the_metric_with_its_interval_over_seeds():
    epochs = pd.concat([epochs_of(seed, [1, 1, 2000 * (seed > 0) + 1]) for seed in range(3)])
    layers = pd.DataFrame(
        dict(label="SAN", run="sink", seed=seed, layer=layer, state="best", test_mae=mae)
        for seed, mae in enumerate((0.4, 0.5, 0.6))
        for layer in (0, 1)
    )
    row = remedy_table(dict(layers=layers, epochs=epochs), "mae").loc[("SAN", "sink")]
    half = 4.302653 * 0.1 / np.sqrt(3)  # of Student's t with two degrees of freedom
    assert row.to_dict() == {
        "test score": f"0.500 [{0.5 - half:.3f}, {0.5 + half:.3f}]",
        **{"epochs with one": "0% to 100%", "largest ratio": "10 to 2,001"},
        **{"largest |s|": "1,100", "median |s|": "0.1"},
    }
