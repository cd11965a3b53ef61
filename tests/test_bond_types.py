"""What massive activations sit on: tables of runs, and figures."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NOT_BUNDLED

from mapkg.evaluation import evaluate
from studies import bond_types as study
from studies import checkpoint, tables
from studies.__main__ import main
from studies.bond_changes import join_global_node
from studies.data import BUNDLED, molecule_graph
from studies.edge_kinds import distinct_edges
from studies.emergence import emergence
from studies.observation import edge_maxima
from studies.published import CONFIGS

SHIPPED = BUNDLED / "checkpoints" / "gt_moses_seed0"
SMALL = dict(hidden_channels=16, heads=4, num_layers=2, batch_size=16, max_epochs=1)


def test_tables_of_a_run_are_of_every_state_and_tell_edges_of_one_id_apart(
    splits, tmp_path, monkeypatch
):
    """Of a run on molecules with a global node whose edges have the id of triple bonds."""
    folder, joined = tmp_path / "run", join_global_node(splits, edge_types=(3, 3))
    config = CONFIGS["GT-ZINC"].replace(**SMALL, num_node_types=29)
    about = dict(seed=3, name="GT-ZINC", keep_every=1, progress=False)
    emergence(config, joined, folder=folder, **about)
    found = study.bond_types(folder, joined, by=("role", "type"), resamples=5, progress=False)
    states = found["first_layer"].groupby("state", sort=False)["moved"].max()
    assert list(states.index) == ["base", "best", "epoch_000", "epoch_001"]
    assert states["base"] == 0 < states["epoch_001"]
    edges = found["shares"].query("by == 'role'").groupby("label", sort=False)["edges"].first()
    atoms = sum(graph.num_nodes for graph in splits.test)
    names = ["single", "double", "triple", "atom to global", "global to atom"]
    assert list(edges.index) == names and edges.to_list()[3:] == [atoms, atoms]
    losses, (model, _) = found["losses"].set_index("state"), checkpoint.load(folder / "best")
    expected = evaluate(model, joined.test)
    assert losses.loc["best", "loss"] == pytest.approx(expected, rel=1e-5)

    path = tmp_path / "molecules.smi"
    path.write_text("\n".join(graph.smiles for graph in splits.test) + "\n\n")
    arguments = ["--dataset", "moses", "--smiles", str(path), "-o", str(tmp_path / "x")]
    assert main(["study", "shares", str(folder), *arguments]) == 2, "other data"
    monkeypatch.setattr("studies.commands.load", lambda name: splits)
    arguments += ["--change", "global-node-triple"]
    assert main(["study", "shares", str(folder), *arguments]) == 0
    rows = pd.read_csv(tmp_path / "x_shares.csv.gz")
    massive = edge_maxima(model, splits.test) > 3000
    assert set(rows["looked_at"]) == {"molecules.smi"}
    rows = rows.query("threshold == 3000").groupby("layer")[["edges", "massive_edges"]].sum()
    assert rows["massive_edges"].to_list() == massive.sum(dim=1).tolist()
    assert set(rows["edges"]) == {massive.size(1)}


def test_shares_and_heat_of_the_shipped_network_are_counted_from_its_ratios(splits):
    found = study.examine_bond_types(SHIPPED, splits, properties=("type", "atom pair"), resamples=5)
    ratio = edge_maxima(checkpoint.load(SHIPPED)[0], splits.test)
    double = torch.cat([graph.edge_type for graph in splits.test]) == 2
    place = ["layer", "threshold"]
    shares = found["shares"].query("state == 'best' and by == 'type' and label == 'double'")
    largest = found["heat"].query("label == 'double'").groupby(place)["percent"].max() / 100
    for (layer, threshold), share in shares.set_index(place)["share"].items():
        assert share == pytest.approx(float((ratio[layer, double] > threshold).float().mean()))
        assert 0 < largest.get((layer, threshold), share) <= share or share == 0
    rows = found["first_layer"].query("state == 'best' and label == 'double'")
    assert rows["measured"].item() == pytest.approx(shares["share"].iloc[0])
    assert rows["correlation"].item() > 0.99


KINDS = {"C≡N": 55, "N≡C": 55, "C≡C": 18}
"""Directed triple bonds of the test split of ZINC, by kind."""


def test_shares_of_three_kinds_of_triple_bonds_can_be_six_numbers():
    sums = study.sums_of_kinds(KINDS).round(1)
    assert sums["none"] == 0 and sums["C≡C"] == 14.1 and sums["N≡C"] == 43.0
    assert sums["C≡N + C≡C"] == 57.0 and sums["C≡N + N≡C"] == 85.9 and len(sums) == 8
    assert sorted(set(sums)) == [0, 14.1, 43.0, 57.0, 85.9, 100]
    heat = tables.read(BUNDLED / "results", "bonds", study.ON_ZINC, "heat")
    ours = heat.query("layer == 0 and label == 'triple'")["percent"]
    assert set(ours.round(1)) == {14.1, 43.0}


def test_cells_of_the_published_map_are_sums_over_three_kinds_of_triple_bonds(monkeypatch):
    monkeypatch.setenv("MAPKG_DATA", str(NOT_BUNDLED))
    path = NOT_BUNDLED / "zinc" / "zinc12k_official.csv.gz"
    if study.published_heat().empty or not path.is_file():
        pytest.skip("the published numbers and ZINC are not bundled; MAPKG_DATA says where")
    rows = pd.read_csv(path).query("split == 'test'")
    graphs = [molecule_graph(smiles, 0.0) for smiles in rows["smiles"] if "#" in smiles]
    kinds = distinct_edges(graphs).query("edge == 3")["count"].to_list()
    assert sorted(kinds) == [18, 55, 55]
    sums = study.sums_of_kinds(KINDS).unique()
    for cell in study.published_heat().query("label == 'triple'").itertuples():
        assert sum(cell.low <= each <= cell.high for each in sums) == 1
    assert len(study.published_heat()) == 14 + 12 + 7


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


def test_tables_and_figures_show_intervals_ranges_and_counts():
    table = study.share_table(ROWS)
    assert list(table.columns) == [("A", 0), ("A", 1), ("B", 0)]
    assert table[("A", 0)].to_dict() == {"x": "0.500 [0.400, 0.600]", "y": "none"}
    assert study.edge_counts(ROWS) == {"x": 3, "y": 1}
    for run, ax in study.by_label(ROWS.dropna(), line=0.5).axes_dict.items():
        rows = ROWS.dropna().query(f"run == '{run}'")
        shown = np.concatenate([line.get_xdata() for line in ax.lines])
        assert {*rows[["share", "share_low", "share_high"]].to_numpy().flat} <= {*shown}
    heat = pd.DataFrame(
        {"layer": 0, "threshold": [1e3, 1e3, 3e3], "label": ["x", "y", "x"]}
        | {"channel": [4, 0, 3], "percent": [80.0, 20.0, 7.0]}
    )
    figure = study.heat_maps(heat, {"x": 75, "y": 24, "none": 1}, heads=2, channels=3)
    arrays = [ax.images[0].get_array() for ax in figure.axes[:3]]
    assert arrays[0][1, 1] == 80  # channel 4 is the second one of the second head
    assert arrays[1][0, 0] == 20 and sum(array.sum() for array in arrays) == 100
