"""Tables of what massive activations sit on, from finished runs and shipped networks."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import few_molecules

from mapkg.attribution import THRESHOLDS
from mapkg.evaluation import score
from studies import checkpoint
from studies.__main__ import main
from studies.bond_changes import join_global_node, shuffle_types, split_types
from studies.bond_types import (
    bond_types,
    by_label,
    edge_counts,
    examine_bond_types,
    heat_maps,
    range_table,
    share_table,
)
from studies.data import BUNDLED, load
from studies.emergence import emergence
from studies.observation import edge_maxima
from studies.published import CONFIGS

SHIPPED = BUNDLED / "checkpoints" / "gt_moses_seed0"
PROPERTIES = ("type", "atom pair", "ring", "conjugation")
TINY = CONFIGS["GT-ZINC"].replace(
    hidden_channels=16, heads=4, num_layers=2, batch_size=16, max_epochs=2
)


@pytest.fixture(scope="module")
def splits(cache):
    return few_molecules(48, 16, 24)


@pytest.fixture(scope="module")
def folder(splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    emergence(TINY, splits, seed=3, name="GT-ZINC", folder=folder, keep_every=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def shipped(splits):
    return examine_bond_types(SHIPPED, splits, properties=PROPERTIES, resamples=20)


def test_the_tables_of_a_run_have_every_state_layer_and_type(folder, splits):
    found = bond_types(folder, splits, resamples=50, progress=False)
    for name in ("shares", "parts"):
        assert set(found[name]["state"]) == {"base", "best"}
        assert sorted(found[name]["layer"].unique()) == [0, 1]
        assert list(found[name]["label"].unique()) == ["single", "double", "triple"]
        assert (found[name]["seed"] == 3).all()
    assert sorted(found["shares"]["threshold"].unique()) == list(THRESHOLDS)
    first = found["first_layer"].set_index("state")
    assert {*first.index} == {"base", "best", "epoch_000", "epoch_001", "epoch_002"}
    numbers = ["gate_median", "median", "max_ratio", "moved", "correlation"]
    np.testing.assert_array_equal(first.loc["epoch_000", numbers], first.loc["base", numbers])
    assert (first.loc["base", "moved"] == 0).all()
    assert (first.loc["epoch_002", "moved"] > 0).sum() >= 2  # an absent type stays
    losses = found["losses"].set_index("state")
    model, _ = checkpoint.load(folder / "best")
    assert losses.loc["best", "loss"] == pytest.approx(score(model, splits.test)["mae"], rel=1e-5)
    assert losses["loss"].between(losses["loss_low"], losses["loss_high"]).all()
    middle = torch.cat([graph.y for graph in splits.train]).median()
    away = torch.cat([graph.y for graph in splits.test]) - middle
    assert losses["constant"].to_numpy() == pytest.approx(away.abs().mean().item(), rel=1e-2)
    with pytest.raises(ValueError, match=r"was trained on 'MOSES sample', got 'MOSES sample, bond"):
        bond_types(folder, shuffle_types(splits, 3), progress=False)


def test_shares_and_heat_of_the_shipped_network_are_counted_from_its_ratios(shipped, splits):
    model, _ = checkpoint.load(SHIPPED)
    maxima = edge_maxima(model, splits.test)
    types = torch.cat([graph.edge_type for graph in splits.test])
    shares = shipped["shares"]
    best = shares.query("state == 'best' and by == 'type'")
    best = best.set_index(["layer", "threshold", "label"])["share"].sort_index()
    largest = shipped["heat"].groupby(["layer", "threshold", "label"])["percent"].max() / 100
    assert largest.between(0, 1).all()
    for (layer, threshold, label), share in best.items():
        (edge_type,) = (i for i, name in splits.description.edge_types.items() if name == label)
        massive = (maxima[layer] > threshold)[types == edge_type].float()
        assert share == pytest.approx(float(massive.mean()), nan_ok=True)
        assert largest.get((layer, threshold, label), 0.0) <= np.nan_to_num(share) + 1e-9
        assert ((layer, threshold, label) in largest.index) == (share > 0)
    assert best[0, 1000.0].max() > 0.9
    properties = shares.groupby("state")["by"].agg(set)
    assert properties.to_dict() == {"base": {"type"}, "best": {*PROPERTIES}}
    totals = shares.groupby(["state", "by", "threshold", "layer"])["massive_edges"].sum()
    totals = totals["best"].unstack("by")
    assert totals.eq(totals["type"], axis=0).all(axis=None)


def test_the_first_layer_is_predicted_by_the_weights_of_the_shipped_network(shipped):
    rows = shipped["first_layer"].query("state == 'best'").set_index("label")
    shares = shipped["shares"].query(
        "state == 'best' and by == 'type' and layer == 0 and threshold == 1000"
    )
    shares = shares.set_index("label")["share"]
    present = rows.index[rows["edges"] > 0]
    np.testing.assert_allclose(rows.loc[present, "measured"], shares[present])
    assert rows.loc["single", "correlation"] > 0.999
    assert rows.loc["double", "correlation"] > 0.99
    # On molecules like these the weights and the training molecules say what will be found.
    common = rows.loc[["single", "double"]]
    assert (common["measured"] - common["predicted"]).abs().max() < 0.05


def test_a_data_set_with_many_types_is_looked_at_by_all_of_them(tmp_path):
    whole = load("moses-triple")
    fewer = replace(whole, train=whole.train[:40], val=whole.val[:10], test=whole.test[:10])
    changed = split_types(fewer, 0)
    config = TINY.replace(num_edge_types=changed.description.num_edge_types, max_epochs=1)
    emergence(config, changed, name="GT-ZINC", folder=tmp_path, progress=False)
    found = bond_types(tmp_path, changed, resamples=5, progress=False)["first_layer"]
    names = list(changed.description.edge_types.values())
    assert len(names) > 10
    assert list(found.query("state == 'best'")["label"]) == names


def test_edges_of_a_global_node_that_share_an_id_are_told_apart_by_what_they_join(splits, tmp_path):
    joined = join_global_node(splits, edge_types=(3, 3))
    sizes = {"num_node_types": 29, "num_edge_types": joined.description.num_edge_types}
    config = TINY.replace(**sizes, max_epochs=1)
    emergence(config, joined, name="GT-ZINC", folder=tmp_path, progress=False)
    by = ("type", "role")
    shares = bond_types(tmp_path, joined, by=by, resamples=5, progress=False)["shares"]
    best = shares.query("state == 'best' and layer == 0 and threshold == 1000")
    roles = best.query("by == 'role'").set_index("label")["edges"]
    assert list(roles.index) == ["single", "double", "triple", "atom to global", "global to atom"]
    atoms = sum(graph.num_nodes for graph in splits.test)
    assert roles["atom to global"] == roles["global to atom"] == atoms
    assert roles.sum() == best.query("by == 'type'")["edges"].sum()


def test_molecules_of_a_file_are_looked_at_like_a_test_split(folder, splits, tmp_path):
    path = tmp_path / "molecules.smi"
    path.write_text("\n".join(graph.smiles for graph in splits.test) + "\n\n")
    arguments = ["--dataset", "moses", "--smiles", str(path), "-o", str(tmp_path / "bonds")]
    assert main(["study", "shares", str(folder), *arguments]) == 0
    assert [file.name for file in tmp_path.glob("bonds*")] == ["bonds_shares.csv.gz"]
    found = pd.read_csv(tmp_path / "bonds_shares.csv.gz")
    assert set(found["looked_at"]) == {"molecules.smi"}
    expected = bond_types(folder, splits, resamples=5, progress=False)["shares"]
    expected = expected.query("state == 'best'").reset_index(drop=True)
    columns = ["layer", "threshold", "label", "edges", "massive_edges"]
    pd.testing.assert_frame_equal(found[columns], expected[columns], check_dtype=False)


ROWS = pd.DataFrame(
    {
        "run": ["A", "A", "A", "A", "B", "B"],
        "seed": [0, 0, 1, 1, 0, 0],
        "label": ["x", "y"] * 3,
        "edges": [3, 1] * 3,
        "share": [0.5, np.nan, 0.25, 0.125, 1.0, 0.0],
        "share_low": [0.4, np.nan, 0.2, 0.1, 1.0, 0.0],
        "share_high": [0.6, np.nan, 0.3, 0.2, 1.0, 0.0],
    }
)


def test_tables_to_read_show_intervals_ranges_and_counts():
    table = share_table(ROWS)
    assert list(table.index) == ["x", "y"]
    assert list(table.columns) == [("A", 0), ("A", 1), ("B", 0)]
    assert table[("A", 0)].tolist() == ["0.500 [0.400, 0.600]", "none"]
    ranges = range_table(ROWS.assign(size=ROWS["share"] * 1e4), {"share": "s", "size": "n"})
    assert ranges.loc[("A", "x")].tolist() == ["0.25 to 0.5", "2,500 to 5,000"]
    assert ranges.loc[("B", "x"), "s"] == "1"
    assert edge_counts(ROWS) == {"x": 3, "y": 1}
    with pytest.raises(ValueError, match="thresholds 1000, 3000, 4000"):
        edge_counts(ROWS.iloc[:0])


def test_figures_show_the_numbers_of_their_tables():
    heat = pd.DataFrame(
        {"layer": 0, "threshold": [1e3, 1e3, 3e3], "label": ["x", "y", "x"]}
        | {"channel": [5, 0, 3], "percent": [80.0, 20.0, 7.0]}
    )
    figure = heat_maps(heat, {"x": 75, "y": 24, "none": 1}, heads=2, channels=3)
    arrays = [ax.images[0].get_array() for ax in figure.axes[:3]]
    assert arrays[0][1, 2] == 80  # channel 5 is the third one of the second head
    assert arrays[1][0, 0] == 20 and sum(array.sum() for array in arrays) == 100
    assert {ax.images[0].get_clim() for ax in figure.axes[:3]} == {(0, 80)}
    assert figure.axes[2].texts[0].get_text() == "nothing above the threshold"
    grid = by_label(ROWS.dropna(), line=0.5)
    for (run, ax), labels in zip(grid.axes_dict.items(), (["x", "y"], ["x", "y"]), strict=True):
        assert [tick.get_text() for tick in ax.get_xticklabels()] == labels
        for seed, container in zip((0, 1), ax.containers, strict=True):
            rows = ROWS[(ROWS["run"] == run) & (ROWS["seed"] == seed)].set_index("label")
            rows = rows.reindex(labels)
            line, _, (bars,) = container.lines
            np.testing.assert_array_equal(line.get_ydata(), rows["share"])
            ends = [bar[:, 1] for bar in bars.get_segments() if len(bar)]
            expected = rows[["share_low", "share_high"]].dropna()
            np.testing.assert_allclose(np.reshape(ends, (-1, 2))[: len(expected)], expected)
