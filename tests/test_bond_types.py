"""What massive activations sit on: tables of runs, the first layer as a table of type triples."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NOT_BUNDLED, few_molecules
from torch_geometric.data import Data

from mapkg.evaluation import score
from mapkg.hooks import record
from studies import checkpoint
from studies.__main__ import main
from studies.bond_changes import join_global_node, shuffle_types
from studies.bond_types import (
    bond_types,
    by_label,
    edge_counts,
    examine_bond_types,
    heat_maps,
    published_heat,
    range_table,
    share_table,
)
from studies.data import BUNDLED, molecule_graph
from studies.emergence import emergence
from studies.extras import build
from studies.first_layer import (
    COLUMNS,
    distinct_edges,
    first_layer,
    first_layer_table,
    log_ratios,
    mean_by_type,
    predicted_heat,
    score_parts,
    separable_log_ratio,
    type_frequency,
)
from studies.observation import edge_maxima
from studies.published import CONFIGS
from studies.train import seed_all

SHIPPED = BUNDLED / "checkpoints" / "gt_moses_seed0"
SMALL = {
    name: CONFIGS[f"{name}-ZINC"].replace(
        hidden_channels=16, heads=4, num_layers=2, batch_size=16, max_epochs=1
    )
    for name in ("GT", "GraphiT", "SAN", "GAT")
}


@pytest.fixture(scope="module")
def splits(cache):
    return few_molecules(48, 16, 24)


@pytest.fixture(scope="module")
def folder(splits, tmp_path_factory):
    """A run on molecules with a global node whose edges have the id of triple bonds."""
    folder, joined = tmp_path_factory.mktemp("run"), join_global_node(splits, edge_types=(3, 3))
    config = SMALL["GT"].replace(num_node_types=29)
    about = dict(seed=3, name="GT-ZINC", keep_every=1, progress=False)
    emergence(config, joined, folder=folder, **about)
    return folder, joined


def network(name="GT", **changes):
    seed_all(0)
    return build(SMALL[name].replace(**changes)).eval()


def test_tables_of_a_run_are_of_every_state_and_tell_edges_of_one_id_apart(
    folder, splits, tmp_path
):
    folder, joined = folder
    found = bond_types(folder, joined, by=("role", "type"), resamples=5, progress=False)
    states = found["first_layer"].groupby("state", sort=False)["moved"].max()
    assert list(states.index) == ["base", "best", "epoch_000", "epoch_001"]
    assert states["base"] == 0 < states["epoch_001"]
    edges = found["shares"].query("by == 'role'").groupby("label", sort=False)["edges"].first()
    atoms = sum(graph.num_nodes for graph in splits.test)
    names = ["single", "double", "triple", "atom to global", "global to atom"]
    assert list(edges.index) == names and edges.to_list()[3:] == [atoms, atoms]
    losses, (model, _) = found["losses"].set_index("state"), checkpoint.load(folder / "best")
    expected = score(model, joined.test)["mae"]
    assert losses.loc["best", "loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"trained on 'MOSES sample, glob.*got 'MOSES sample, b"):
        bond_types(folder, shuffle_types(splits, 3), progress=False)
    path = tmp_path / "molecules.smi"
    path.write_text("\n".join(graph.smiles for graph in splits.test) + "\n\n")
    arguments = ["--dataset", "moses", "--smiles", str(path), "-o", str(tmp_path / "x")]
    assert main(["study", "shares", str(folder), *arguments]) == 0
    rows = pd.read_csv(tmp_path / "x_shares.csv.gz")
    massive = edge_maxima(model, splits.test) > 3000
    assert set(rows["looked_at"]) == {"molecules.smi"}
    rows = rows.query("threshold == 3000").groupby("layer")[["edges", "massive_edges"]].sum()
    assert rows["massive_edges"].to_list() == massive.sum(dim=1).tolist()
    assert set(rows["edges"]) == {massive.size(1)}


def test_shares_and_heat_of_the_shipped_network_are_counted_from_its_ratios(splits):
    found = examine_bond_types(SHIPPED, splits, properties=("type", "atom pair"), resamples=5)
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


def test_triples_are_counted_and_looked_up(splits):
    def triples(graph):
        ends = graph.x[graph.edge_index].tolist()
        return list(zip(*ends, graph.edge_attr.tolist(), strict=True))

    counts = Counter(triple for graph in splits.train for triple in triples(graph))
    rows = distinct_edges(splits.train).itertuples(index=False, name=None)
    assert {tuple(key): count for *key, count in rows} == counts
    for graph, found in zip(splits.test, type_frequency(splits.train, splits.test), strict=True):
        assert found.tolist() == [counts[triple] for triple in triples(graph)]


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("name", ["GT", "GraphiT", "SAN"])
def test_scores_from_weights_are_those_of_the_network_and_of_the_equation(name, use_bias, splits):
    model, graph = network(name, use_bias=use_bias), splits.test[0]
    triples = distinct_edges([graph])
    found = first_layer(model, triples)
    with torch.no_grad(), record(model, "layers.0.attention.score") as seen:
        model(graph.x, graph.edge_index, graph.edge_attr)
    edges = pd.DataFrame(graph.x[graph.edge_index].T.numpy(), columns=["source", "target"])
    edges = edges.assign(edge=graph.edge_attr.numpy())
    row = edges.merge(triples.reset_index(), how="left")["index"].to_list()
    (expected,) = seen["layers.0.attention.score"]
    torch.testing.assert_close(found["score"][row], expected, rtol=1e-4, atol=1e-6)
    source, target, kind, _ = triples.to_numpy().T
    layer = model.layers[0].attention
    key, query = (model.node_embedding.weight[ids] for ids in (source, target))
    match = layer.key(key) * layer.query(query) / math.sqrt(4)
    torch.testing.assert_close(found["match"], match.detach())
    gate = layer.edge(model.edge_embedding.weight[kind])
    torch.testing.assert_close(found["gate"], gate.detach())


def test_predictions_from_the_weights_are_the_shares_and_ratios_of_the_molecules(splits):
    model, graphs, names = network(), splits.test, splits.description.edge_types
    with torch.no_grad(), record(model, "layers.0.attention.score") as seen:
        for graph in graphs:
            model(graph.x, graph.edge_index, graph.edge_attr)
    sizes = torch.cat(seen["layers.0.attention.score"]).abs().double()
    ratios = sizes / sizes.sort(dim=1).values[:, 7:8]
    double = ratios[torch.cat([graph.edge_type for graph in graphs]) == 2]
    table = predicted_heat(model, graphs, names, threshold=3.0).query("label == 'double'")
    expected = 100 * (double > 3).double().mean(dim=0)
    np.testing.assert_allclose(table["percent"], expected[table["channel"].to_list()])
    assert len(table) == (expected > 0).sum() > 3
    logs = log_ratios(model, graphs, graphs, {2: "double", 9: "absent"})
    assert {*logs["label"]} == {"double"}
    measured = logs["measured"]
    np.testing.assert_allclose(measured, double.log10().mean(dim=0), rtol=1e-5)


def test_the_crossed_prediction_gives_every_type_the_same_atoms(splits):
    model, _ = checkpoint.load(SHIPPED)
    triples, names = distinct_edges(splits.test), splits.description.edge_types
    start = model.edge_embedding.weight.detach() / 3
    found = first_layer_table(model, triples, triples, names, start).set_index("label")
    for edge_type, name in names.items():
        massive = (first_layer(model, triples.assign(edge=edge_type))["ratio"] > 1000).any(dim=1)
        share = np.average(massive, weights=triples["count"])
        assert found.loc[name, "common_pairs"] == pytest.approx(share)
    np.testing.assert_allclose(found["moved"], 2, rtol=1e-5)


def test_the_separable_prediction_is_exact_if_and_only_if_atoms_do_not_depend_on_the_bond(splits):
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(1, 4))
    crossed = [
        Data(x=pair[:2], edge_index=torch.tensor([[0], [1]]), edge_attr=pair[2:]) for pair in pairs
    ]
    for graphs, is_exact in ((crossed, True), (splits.test, False)):
        triples = distinct_edges(graphs)
        arguments = first_layer(network(), triples), triples, [1, 2]
        layer, triples, ids = arguments
        measured = mean_by_type(layer["ratio"].double().log10(), triples, ids)
        difference = measured - separable_log_ratio(*arguments)
        assert (difference.abs().max() < 1e-5) == is_exact


def test_what_is_no_table_of_types_is_refused(splits):
    with pytest.raises(ValueError, match=r"edge_attr: expected one type id per row, got shape"):
        distinct_edges([Data(x=torch.zeros(2, dtype=torch.long), edge_attr=torch.rand(1, 8))])
    triples = distinct_edges(splits.test)
    with pytest.raises(ValueError, match="the first layer sees more than the types"):
        first_layer(network("SAN", full_graph=True), triples)
    with pytest.raises(ValueError, match="expected GT, GraphiT or SAN"):
        first_layer(network("GAT"), triples)


def test_parts_of_a_score_are_means_over_the_edges_of_a_label(splits):
    graphs, names, model = splits.test[:6], ("none", "single", "double", "triple"), network()
    labels = [graph.edge_attr for graph in graphs]
    found = score_parts(model, graphs, labels, names).set_index(["layer", "label"])
    rows = []
    for graph in graphs:
        with torch.no_grad(), record(model, "layers.*.attention.*") as seen:
            model(graph.x, graph.edge_index, graph.edge_attr)
        key, query, gate, size = (
            seen[f"layers.1.attention.{part}"][0].double().abs()
            for part in ("key", "query", "edge", "score")
        )
        for edge, (source, target) in enumerate(graph.edge_index.T.tolist()):
            sizes = size[edge].sort().values
            means = (key[source] * query[target]).mean() / 2, gate[edge].mean(), sizes.mean()
            logs = np.log10([sizes[7], sizes[-1], sizes[-1] / sizes[7]])
            rows.append([names[graph.edge_attr[edge]], *map(float, means), *logs])
    expected = pd.DataFrame(rows, columns=["label", *COLUMNS]).groupby("label").mean()
    expected[COLUMNS[3:]] = 10 ** expected[COLUMNS[3:]]
    np.testing.assert_allclose(found.loc[1].loc[expected.index, COLUMNS], expected, rtol=1e-4)
    assert found.loc[(0, "none"), ["edges", "usable"]].tolist() == [0, 0]
    assert np.isnan(found.loc[(0, "none"), COLUMNS].astype(float)).all()


def test_cells_of_the_published_map_are_sums_over_three_kinds_of_triple_bonds(monkeypatch):
    monkeypatch.setenv("MAPKG_DATA", str(NOT_BUNDLED))
    path = NOT_BUNDLED / "zinc" / "zinc12k_official.csv.gz"
    if published_heat().empty or not path.is_file():
        pytest.skip("the published numbers and ZINC are not bundled; MAPKG_DATA says where")
    rows = pd.read_csv(path).query("split == 'test'")
    graphs = [molecule_graph(smiles, 0.0) for smiles in rows["smiles"] if "#" in smiles]
    kinds = distinct_edges(graphs).query("edge == 3")["count"].to_list()
    assert sorted(kinds) == [18, 55, 55]
    sums = {100 * sum(some) / 128 for n in (1, 2, 3) for some in combinations(kinds, n)}
    for cell in published_heat().query("label == 'triple'").itertuples():
        assert sum(cell.low <= each <= cell.high for each in sums) == 1
    assert len(published_heat()) == 14 + 12 + 7


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
    table = share_table(ROWS)
    assert list(table.columns) == [("A", 0), ("A", 1), ("B", 0)]
    assert table[("A", 0)].to_dict() == {"x": "0.500 [0.400, 0.600]", "y": "none"}
    ranges = range_table(ROWS.assign(size=ROWS["share"] * 1e4), {"share": "s", "size": "n"})
    assert ranges.loc[("A", "x")].tolist() == ["0.25 to 0.5", "2,500 to 5,000"]
    assert ranges.loc[("B", "x"), "s"] == "1" and edge_counts(ROWS) == {"x": 3, "y": 1}
    with pytest.raises(ValueError, match="thresholds 1000, 3000, 4000"):
        edge_counts(ROWS.iloc[:0])
    for run, ax in by_label(ROWS.dropna(), line=0.5).axes_dict.items():
        rows = ROWS.dropna().query(f"run == '{run}'")
        shown = np.concatenate([line.get_ydata() for line in ax.lines])
        assert {*rows[["share", "share_low", "share_high"]].to_numpy().flat} <= {*shown}
    heat = pd.DataFrame(
        {"layer": 0, "threshold": [1e3, 1e3, 3e3], "label": ["x", "y", "x"]}
        | {"channel": [5, 0, 3], "percent": [80.0, 20.0, 7.0]}
    )
    figure = heat_maps(heat, {"x": 75, "y": 24, "none": 1}, heads=2, channels=3)
    arrays = [ax.images[0].get_array() for ax in figure.axes[:3]]
    assert arrays[0][1, 2] == 80  # channel 5 is the third one of the second head
    assert arrays[1][0, 0] == 20 and sum(array.sum() for array in arrays) == 100
