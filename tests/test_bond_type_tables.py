"""Tables to read of what massive activations sit on, and small retrained networks."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import few_molecules
from scipy import stats

from mapkg.attribution import heat_map
from mapkg.models import build
from studies.bond_type_tables import (
    edge_counts,
    late_means,
    log_ratios,
    predicted_heat,
    range_table,
    read_bonds,
    share_table,
    type_shares,
)
from studies.bond_types import retrain
from studies.changed_types import join_global_node, shuffle_types
from studies.data.bond_properties import edge_labels
from studies.first_layer import distinct_edges, first_layer
from studies.published import CONFIGS
from studies.results import contrasts
from studies.train import seed_all

TINY = CONFIGS["SAN-ZINC"].replace(
    hidden_channels=16, heads=4, num_layers=1, batch_size=16, max_epochs=1
)


@pytest.fixture(scope="module")
def splits(cache):
    return few_molecules(48, 16, 24)


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


def test_shares_stand_with_their_intervals_in_the_order_of_the_rows():
    table = share_table(ROWS)
    assert list(table.index) == ["x", "y"]
    assert list(table.columns) == [("A", 0), ("A", 1), ("B", 0)]
    assert table[("A", 0)].tolist() == ["0.500 [0.400, 0.600]", "none"]
    assert table[("B", 0)].tolist() == ["1.000 [1.000, 1.000]", "0.000 [0.000, 0.000]"]
    single = share_table(ROWS[ROWS["run"] == "A"], columns=["seed"])
    assert list(single.columns) == [0, 1]


def test_ranges_go_over_seeds_and_equal_ends_stand_once():
    table = range_table(ROWS.assign(size=ROWS["share"] * 1e4), {"share": "s", "size": "n"})
    assert table.loc[("A", "x"), "s"] == "0.25 to 0.5"
    assert table.loc[("A", "x"), "n"] == "2,500 to 5,000"
    assert table.loc[("B", "x"), "s"] == "1"
    by_label = range_table(ROWS, {"share": "s"}, rows=["label"], digits=1)
    assert by_label["s"].to_dict() == {"x": "0.2 to 1", "y": "0 to 0.1"}


def test_edges_are_counted_once_for_all_runs():
    assert edge_counts(ROWS) == {"x": 3, "y": 1}


def test_a_table_that_is_missing_is_named_with_what_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"bonds_x_shares.csv.gz; write it with python -m"):
        read_bonds(tmp_path, "shares", {"x": "X"})


def test_types_are_counted_as_shares_of_the_training_edges(splits):
    table = type_shares({"a": splits, "b": join_global_node(splits)})
    ids = torch.cat([graph.edge_type for graph in splits.train])
    assert table.loc["a", "type 1"] == f"{float((ids == 1).float().mean()):.2%}"
    assert table.loc["a", "type 4"] == ""
    assert table.loc["b", "type 4"] == table.loc["b", "type 5"]


def test_log_ratios_are_those_of_the_edges_of_a_type(splits):
    seed_all(0)
    model = build(TINY)
    found = log_ratios(model, splits.train, splits.test, {1: "single", 2: "double", 9: "absent"})
    assert list(found["label"].unique()) == ["single", "double"]
    triples = distinct_edges(splits.test)
    ratio = first_layer(model, triples).ratio[triples.index]  # of every edge
    types = torch.cat([graph.edge_type for graph in splits.test])
    expected = ratio[types == 2].double().log10().mean(dim=0).numpy()
    measured = found[found["label"] == "double"].sort_values("channel")["measured"]
    np.testing.assert_allclose(measured, expected, rtol=1e-5)
    assert np.corrcoef(found["measured"], found["predicted"])[0, 1] > 0.9


def test_retraining_gives_every_change_seed_and_state(splits):
    changes = {"as it is": lambda splits, seed: splits, "shuffled": shuffle_types}
    changes["global"] = join_global_node
    found = retrain(TINY, splits, changes, [0, 1], progress=False)
    groups = found.groupby(["run", "seed", "state"], sort=False)["label"].agg(len)
    assert groups.to_dict() == {
        (run, seed, state): 5 if run == "global" else 3
        for run in changes
        for seed in (0, 1)
        for state in ("base", "best")
    }
    base = found.query("state == 'base' and run == 'as it is'").set_index(["seed", "label"])
    other = found.query("state == 'base' and run == 'shuffled'").set_index(["seed", "label"])
    # The same seed starts from the same weights, whatever the data.
    pd.testing.assert_series_equal(base["gate_median"], other["gate_median"])
    assert (base["moved"] == 0).all()
    best = found.query("state == 'best'")
    assert (best.groupby(["run", "seed"])["moved"].max() > 0).all()
    assert best["val_loss"].gt(0).all()


def first_layer_rows(values, run="a"):
    """Rows of one type, from ratios by seed and epoch."""
    return pd.DataFrame(
        [
            {
                **{"run": run, "label": "x", "seed": seed, "state": f"epoch_{epoch:03d}"},
                **{"epoch": epoch, "max_ratio": ratio, "gate_median": 2.0},
                "measured": 0.5 if ratio > 1000 else 0.0,
            }
            for seed, ratios in enumerate(values)
            for epoch, ratio in zip((10, 15, 20), ratios, strict=True)
        ]
    )


def test_late_means_are_geometric_and_leave_early_epochs_and_other_states_out():
    table = first_layer_rows([[7.0, 10.0, 4000.0], [1.0, 2.0, 8.0]])
    best = table.iloc[[2]].assign(state="best", max_ratio=1e9)
    found = late_means(pd.concat([table, best])).set_index("seed")
    np.testing.assert_allclose(found["max_ratio"], [200.0, 4.0])
    np.testing.assert_allclose(found["gate_median"], 2.0)
    assert found["measured"].tolist() == [0.25, 0.0]
    assert found["epochs"].tolist() == [2, 2]
    assert found["epochs_with"].tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"of epoch 21 or later; train with --keep-every"):
        late_means(table, since=21)


def test_a_contrast_is_a_factor_with_the_t_interval_of_its_logarithm():
    rows = [
        {"run": run, "label": "x", "seed": seed, "max_ratio": ratio}
        for run, ratios in (("a", [1.0, 2.0, 5.0]), ("b", [10.0, 10.0, 125.0, 3.0]))
        for seed, ratio in enumerate(ratios)
    ]
    pairs = {"b over a": (("a", "x"), ("b", "x"))}
    found = contrasts(pd.DataFrame(rows), pairs).loc["b over a"]
    logs = np.log([10.0, 5.0, 25.0])  # a seed that one of them lacks is left out
    assert found["factor"] == pytest.approx(np.exp(logs.mean()))
    low, high = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert [found["low"], found["high"]] == pytest.approx([np.exp(low), np.exp(high)])
    assert [found["least"], found["greatest"]] == pytest.approx([5.0, 25.0])
    with pytest.raises(ValueError, match="b over a: expected two common seeds or more, got 1"):
        contrasts(pd.DataFrame([rows[0], rows[3]]), pairs)


def test_no_rows_to_count_edges_of_is_an_error_that_names_the_thresholds():
    with pytest.raises(ValueError, match="thresholds 1000, 3000, 4000"):
        edge_counts(pd.DataFrame({"label": [], "edges": []}))


def test_the_predicted_heat_map_is_that_of_the_training_molecules(splits):
    seed_all(0)
    model = build(TINY).eval()
    names = splits.description.edge_types
    predicted = predicted_heat(model, splits.train, names, threshold=20.0)
    labels, label_names = edge_labels(splits.train, "type", splits.description)
    measured = heat_map(model, splits.train, labels, len(label_names), thresholds=(20.0,))[0, 0]
    found = np.zeros(measured.shape)
    for row in predicted.itertuples():
        found[label_names.index(row.label), row.channel] = row.percent / 100
    assert found.max() > 0
    np.testing.assert_allclose(found, measured.nan_to_num(), atol=1e-9)
    assert (predicted["percent"] > 0).all()
    assert set(predicted["layer"]) == {0}
    nothing = predicted_heat(model, splits.train, names, threshold=1e9)
    assert nothing.empty
    assert {"layer", "threshold", "label", "channel", "percent"} <= set(nothing.columns)
