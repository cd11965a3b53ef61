"""One network's ratios beside other attributions, and what removal of massive activations does."""

import numpy as np
import pandas as pd
import pytest
from conftest import few_molecules

from studies import checkpoint
from studies.__main__ import main
from studies.data import BUNDLED
from studies.edge_scores import edge_importance, rank_correlation
from studies.emergence import emergence
from studies.explanations import explain, explain_run, remove_massive, type_frequency
from studies.faithfulness import area, curve
from studies.published import CONFIGS

SHIPPED = BUNDLED / "checkpoints" / "gt_moses_seed0"
QUICK = ("ratio", "gradient x input", "AttentionExplainer", "random")


@pytest.fixture(scope="module")
def splits(cache):
    return few_molecules(48, 16, 12)


@pytest.fixture(scope="module")
def model():
    return checkpoint.load(SHIPPED)[0]


@pytest.fixture(scope="module")
def found(model, splits):
    modes = ("deletion", "insertion")
    return explain(model, splits.test, methods=QUICK, modes=modes, resamples=50, progress=False)


def test_correlations_are_means_over_the_molecules_that_have_one(found, model, splits):
    ratio, other = (
        edge_importance(model, splits.test, method, progress=False)
        for method in ("ratio", "gradient x input")
    )
    expected = rank_correlation(ratio, other, splits.test)
    row = found.correlation.set_index("method").loc["gradient x input"]
    assert row["mean"] == pytest.approx(np.nanmean(expected))
    assert row["defined"] == np.isfinite(expected).sum()
    assert row["graphs"] == 12
    assert row["low"] <= row["mean"] <= row["high"]
    assert list(found.correlation["method"]) == [m for m in QUICK if m != "ratio"]


def test_curves_and_areas_are_those_of_the_importances(found, model, splits):
    ratio = edge_importance(model, splits.test, "ratio", progress=False)
    expected = curve(model, splits.test, ratio, mode="deletion", order="ascending")
    where = "mode == 'deletion' and order == 'ascending' and method == 'ratio'"
    means = expected.groupby("fraction")[["change", "absolute_error"]].mean()
    rows = found.curves.query(where).set_index("fraction")
    pd.testing.assert_frame_equal(rows[["change", "absolute_error"]], means)
    assert found.areas.query(where)["area"].item() == pytest.approx(area(expected).mean())
    assert (rows["change_low"] <= rows["change"]).all()
    assert (rows["change"] <= rows["change_high"]).all()


def test_insertion_is_deletion_in_the_other_order_read_backwards(found):
    """Both go through the graphs with the most important bonds, up to ties and rounding."""
    areas = found.areas.set_index(["mode", "order", "method"])["area"]
    for method in QUICK:
        for one, other in (("ascending", "descending"), ("descending", "ascending")):
            assert areas["insertion", one, method] == pytest.approx(
                areas["deletion", other, method], rel=0.2
            )


def test_the_control_is_the_mean_of_several_random_orders(found):
    control = found.areas.query("method == 'random'")
    assert (control[["difference", "difference_low", "difference_high"]] == 0).all(axis=None)
    descending, ascending = control.query("mode == 'deletion'")["area"]
    assert descending == pytest.approx(ascending, rel=0.3)


def test_what_is_compared_must_be_there(model, splits):
    with pytest.raises(ValueError, match="expected 'ratio' among them, got random"):
        explain(model, splits.test, methods=("random",))
    with pytest.raises(ValueError, match="expected 'random' among them, got ratio"):
        explain(model, splits.test, methods=("ratio",))


def test_removal_is_summed_up_over_thresholds_and_layers(model, splits):
    layers = ("layers.*.score", "layers.3.attention.score")
    found = remove_massive(
        model, splits.test, splits.train, thresholds=(1000.0, 1e9), layers=layers, resamples=20
    )
    assert len(found) == 2 * 2 * 3 * 3
    none = found.query("threshold == 1e9 or layers == 'layers.3.attention.score'")
    assert (none[["changed", "loss_change", "shift"]] == 0).all(axis=None)
    massive = found.query("threshold == 1000 and layers == 'layers.*.score' and what == 'massive'")
    assert (massive["changed"] > 1000).all()
    assert (massive["loss_change_low"] > 0).all()


def test_a_run_is_explained_by_the_command(splits, tmp_path, monkeypatch):
    config = CONFIGS["SAN-ZINC"].replace(
        hidden_channels=16, heads=4, num_layers=2, batch_size=16, max_epochs=1
    )
    folder = tmp_path / "run"
    emergence(config, splits, seed=2, name="SAN-ZINC", folder=folder, progress=False)
    found = explain_run(folder, splits, graphs=4, resamples=10, layers=(0, 1), progress=False)
    assert set(found) == {"correlation", "curves", "areas", "interventions"}
    for table in found.values():
        assert (table["seed"] == 2).all()
        assert (table["config"] == "SAN-ZINC").all()
    by_layer = found["correlation"].groupby("layer")["method"].agg(list)
    assert {"GNNExplainer", "frequency"} <= set(by_layer[0])
    assert by_layer[1] == ["random"]
    monkeypatch.setattr("studies.data.load", lambda name: splits)
    output = tmp_path / "explain_x"
    arguments = ["explain", str(folder), "--dataset", "moses", "--graphs", "4", "-o", str(output)]
    assert main(arguments) == 0
    written = pd.read_csv(f"{output}_areas.csv.gz")
    expected = found["areas"].query("layer == 0")
    assert written["area"].to_list() == pytest.approx(expected["area"].to_list(), rel=1e-4)
    assert main(["explain", str(tmp_path / "no"), *arguments[2:]]) == 2


def test_frequency_counts_training_edges_of_the_same_types(splits):
    found = type_frequency(splits.train, splits.test)
    for graph, counts in zip(splits.test[:3], found, strict=False):
        for edge, (source, target) in enumerate(graph.edge_index.t().tolist()):
            expected = sum(
                int(
                    (
                        (other.x[other.edge_index[0]] == graph.x[source])
                        & (other.x[other.edge_index[1]] == graph.x[target])
                        & (other.edge_attr == graph.edge_attr[edge])
                    ).sum()
                )
                for other in splits.train
            )
            assert counts[edge] == expected
    assert [len(counts) for counts in found] == [graph.num_edges for graph in splits.test]
    nothing = type_frequency(splits.train[:1], [graph for graph in splits.test if 6 in graph.x])
    assert min(float(counts.min()) for counts in nothing) == 0
