"""Tables of what massive activations sit on, from finished runs and shipped networks."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import few_molecules

from mapkg.attribution import THRESHOLDS, Edges, attribute
from mapkg.evaluation import score
from studies import checkpoint
from studies.__main__ import main
from studies.bond_types import (
    bond_types,
    examine_bond_types,
    join,
    shares_elsewhere,
    write_bond_types,
)
from studies.changed_types import join_global_node, shuffle_types, split_types
from studies.data import BUNDLED, load
from studies.emergence import emergence
from studies.first_layer import distinct_edges, first_layer, first_layer_table
from studies.observation import edge_maxima
from studies.published import CONFIGS

SHIPPED = BUNDLED / "checkpoints" / "gt_moses_seed0"
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
    by = ("type", "atom pair", "ring", "conjugation")
    return examine_bond_types(SHIPPED, splits, properties=by, resamples=20)


def test_the_tables_of_a_run_have_every_state_layer_and_type(folder, splits):
    found = bond_types(folder, splits, resamples=5, progress=False)
    names = list(splits.description.edge_types.values())
    for table in (found.shares, found.parts):
        assert set(table["state"]) == {"base", "best"}
        assert sorted(table["layer"].unique()) == [0, 1]
        assert list(table["label"].unique()) == names
        assert (table["seed"] == 3).all()
    assert sorted(found.shares["threshold"].unique()) == list(THRESHOLDS)
    assert set(found.first_layer["state"]) == {
        *("base", "best"),
        *("epoch_000", "epoch_001", "epoch_002"),
    }
    start, base = (found.first_layer.query("state == @s") for s in ("epoch_000", "base"))
    numbers = ["gate_median", "median", "max_ratio", "moved", "correlation"]
    np.testing.assert_array_equal(start[numbers], base[numbers])
    assert (start["moved"] == 0).all()
    later = found.first_layer.query("state == 'epoch_002'")
    assert (later["moved"] > 0).sum() >= 2  # a type that no training molecule has stays


def test_the_loss_of_each_state_stands_beside_that_of_a_constant(folder, splits):
    losses = bond_types(folder, splits, resamples=50, progress=False).losses.set_index("state")
    assert list(losses.index) == ["base", "best"]
    assert set(losses["kind"]) == {"l1"}
    model, _ = checkpoint.load(folder / "best")
    assert losses.loc["best", "loss"] == pytest.approx(score(model, splits.test)["mae"], rel=1e-5)
    assert (losses["loss_low"] < losses["loss"]).all()
    assert (losses["loss"] < losses["loss_high"]).all()
    middle = torch.cat([graph.y for graph in splits.train]).median()
    away = torch.cat([graph.y for graph in splits.test]) - middle
    assert losses["constant"].to_numpy() == pytest.approx(away.abs().mean().item(), rel=1e-2)


def test_shares_of_the_shipped_network_are_counted_from_its_ratios(shipped, splits):
    model, _ = checkpoint.load(SHIPPED)
    maxima = edge_maxima(model, splits.test)
    types = torch.cat([graph.edge_type for graph in splits.test])
    rows = shipped.shares.query("state == 'best' and by == 'type'")
    for (layer, threshold), part in rows.groupby(["layer", "threshold"]):
        shares = part.set_index("label")["share"]
        for edge_type, name in splits.description.edge_types.items():
            mine = types == edge_type
            expected = (maxima[layer] > threshold)[mine].float().mean() if mine.any() else np.nan
            assert shares[name] == pytest.approx(float(expected), nan_ok=True)
    assert rows.query("layer == 0 and threshold == 1000")["share"].max() > 0.9


def test_other_properties_are_looked_at_in_the_trained_state_only(shipped):
    properties = shipped.shares.groupby("state")["by"].agg(set)
    assert properties["base"] == {"type"}
    assert properties["best"] == {"type", "atom pair", "ring", "conjugation"}
    totals = shipped.shares.groupby(["state", "by", "threshold", "layer"])["massive_edges"].sum()
    best = totals["best"].unstack("by")
    assert best.eq(best["type"], axis=0).all(axis=None)


def test_the_heat_table_leaves_out_zeros_and_agrees_with_the_shares(shipped):
    heat = shipped.heat
    assert (heat["percent"] > 0).all()
    assert (heat["percent"] <= 100).all()
    largest = heat.groupby(["layer", "threshold", "label"])["percent"].max() / 100
    shares = shipped.shares.query("state == 'best' and by == 'type'")
    shares = shares.set_index(["layer", "threshold", "label"])["share"]
    for index, share in shares.items():
        assert largest.get(index, 0.0) <= np.nan_to_num(share) + 1e-9
        assert (index in largest.index) == (share > 0)


def test_the_first_layer_is_predicted_by_the_weights_of_the_shipped_network(shipped, splits):
    rows = shipped.first_layer.query("state == 'best'").set_index("label")
    shares = shipped.shares.query(
        "state == 'best' and by == 'type' and layer == 0 and threshold == 1000"
    ).set_index("label")
    present = rows.index[rows["edges"] > 0]
    np.testing.assert_allclose(rows.loc[present, "measured"], shares.loc[present, "share"])
    assert rows.loc["single", "correlation"] > 0.999
    assert rows.loc["double", "correlation"] > 0.99
    # On molecules like these the weights and the training molecules say what will be found.
    common = ["single", "double"]
    difference = (rows.loc[common, "measured"] - rows.loc[common, "predicted"]).abs()
    assert difference.max() < 0.05


def test_the_crossed_prediction_gives_every_type_the_same_atoms(splits):
    model, _ = checkpoint.load(SHIPPED)
    train, test = distinct_edges(splits.train), distinct_edges(splits.test)
    names = splits.description.edge_types
    start = model.edge_embedding.weight.detach()
    found = first_layer_table(model, train, test, names, start).set_index("label")
    pairs = {}
    for source, target, count in zip(train.source, train.target, train.count, strict=True):
        key = (int(source), int(target))
        pairs[key] = pairs.get(key, 0) + int(count)
    for edge_type, name in names.items():
        share = 0.0
        for (source, target), count in pairs.items():
            one = type(train)(
                *(torch.tensor([i]) for i in (source, target, edge_type)),
                count=torch.tensor([1]),
                index=torch.tensor([0]),
            )
            share += count * bool((first_layer(model, one).ratio > 1000).any())
        assert found.loc[name, "common_pairs"] == pytest.approx(share / sum(pairs.values()))


def test_a_run_is_looked_at_with_its_own_data_only(folder, splits):
    shuffled = shuffle_types(splits, 3)
    with pytest.raises(ValueError, match=r"was trained on 'MOSES sample', got 'MOSES sample, bond"):
        bond_types(folder, shuffled, progress=False)


def test_a_data_set_with_many_types_is_looked_at_by_all_of_them(splits, tmp_path):
    whole = load("moses-triple")
    fewer = replace(whole, train=whole.train[:40], val=whole.val[:10], test=whole.test[:10])
    changed = split_types(fewer, 0)
    config = TINY.replace(num_edge_types=changed.description.num_edge_types, max_epochs=1)
    emergence(config, changed, name="GT-ZINC", folder=tmp_path, progress=False)
    found = bond_types(tmp_path, changed, resamples=5, progress=False)
    names = list(changed.description.edge_types.values())
    assert len(names) > 10
    assert list(found.first_layer.query("state == 'best'")["label"]) == names


@pytest.mark.parametrize("edge_types", [(4, 5), (3, 3)])
def test_a_global_node_whose_edges_differ_by_direction(splits, tmp_path, edge_types):
    joined = join_global_node(splits, edge_types=edge_types)
    sizes = {"num_node_types": 29, "num_edge_types": joined.description.num_edge_types}
    config = TINY.replace(**sizes, max_epochs=1)
    emergence(config, joined, name="GT-ZINC", folder=tmp_path, progress=False)
    by = ("type", "role")
    found = bond_types(tmp_path, joined, properties=by, resamples=5, progress=False)
    best = found.shares.query("state == 'best' and layer == 0 and threshold == 1000")
    roles = best.query("by == 'role'").set_index("label")["edges"]
    assert list(roles.index) == ["single", "double", "triple", "atom to global", "global to atom"]
    atoms = sum(graph.num_nodes for graph in splits.test)
    assert roles["atom to global"] == roles["global to atom"] == atoms
    assert roles.sum() == best.query("by == 'type'")["edges"].sum()


def test_molecules_of_a_file_are_looked_at_like_a_test_split(folder, splits, tmp_path):
    path = tmp_path / "molecules.smi"
    path.write_text("\n".join(graph.smiles for graph in splits.test) + "\n\n")
    arguments = ["--dataset", "moses", "--smiles", str(path), "-o", str(tmp_path / "bonds")]
    assert main(["attribute", str(folder), *arguments]) == 0
    found = pd.read_csv(tmp_path / "bonds_shares.csv.gz")
    assert sorted(file.name for file in tmp_path.glob("bonds*")) == ["bonds_shares.csv.gz"]
    assert set(found["looked_at"]) == {"molecules.smi"}
    expected = bond_types(folder, splits, resamples=5, progress=False).shares
    expected = expected.query("state == 'best'").reset_index(drop=True)
    columns = ["layer", "threshold", "label", "edges", "massive_edges"]
    pd.testing.assert_frame_equal(found[columns], expected[columns], check_dtype=False)
    path.write_text("CCO\nC1CC\n")
    with pytest.raises(ValueError, match=r"molecules.smi, line 2: unreadable SMILES 'C1CC'"):
        from studies.data import read_smiles

        read_smiles(path)


def test_the_command_joins_runs_and_names_what_is_missing(folder, splits, tmp_path, capsys):
    shares = shares_elsewhere(folder, splits.test, splits.description, title="test", resamples=5)
    both = join([shares, shares])
    assert len(both.shares) == 2 * len(shares.shares)
    paths = write_bond_types(both, tmp_path / "bonds_x")
    assert [path.name for path in paths] == ["bonds_x_shares.csv.gz"]
    output = ["-o", str(tmp_path / "y")]
    assert main(["attribute", str(tmp_path / "no"), "--dataset", "moses", *output]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    arguments = ["attribute", str(folder), "--dataset", "moses", "--change", "swap", *output]
    assert main(arguments) == 2
    assert "--change swap: expected one of shuffled-types" in capsys.readouterr().err


def test_an_enrichment_of_the_whole_is_one(shipped, splits):
    rows = shipped.shares.query("state == 'best' and by == 'type' and massive_edges > 0")
    for _, part in rows.groupby(["layer", "threshold"]):
        weights = part["edges"] / part["edges"].sum()
        total = shipped.shares["edges"].iloc[:3].sum()
        if part["edges"].sum() == total:
            assert (weights * part["enrichment"]).sum() == pytest.approx(1)
    edges = Edges.of(
        splits.test, [torch.zeros(g.num_edges, dtype=torch.long) for g in splits.test], ("all",)
    )
    massive = np.arange(len(edges.label))[None] % 5 == 0
    found = attribute(edges, massive, resamples=50, permutations=5).iloc[0]
    assert (found[["enrichment", "enrichment_low", "enrichment_high"]] == 1).all()


def test_molecules_of_a_file_are_not_changed_and_that_is_said(tmp_path, capsys):
    arguments = ["attribute", str(tmp_path), "--dataset", "moses", "-o", str(tmp_path / "bonds")]
    arguments += ["--smiles", str(tmp_path / "x.smi"), "--change", "shuffled-types"]
    assert main(arguments) == 2
    assert "expected one of them" in capsys.readouterr().err
