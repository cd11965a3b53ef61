"""Depth studies on a small graph: rows, resuming, and the explosion that the paper describes."""

import numpy as np
import pandas as pd
import pytest

from studies.__main__ import main
from studies.data import load
from studies.depth import (
    Variant,
    by_depth_table,
    compact_gradients,
    depth_study,
    gradient_evolution,
    gradient_table,
    gradient_variants,
    named,
    read_depth,
)
from studies.schedule import Schedule
from studies.train import fit

SMALL = dict(hidden_channels=8, heads=2)
SHORT = Schedule(epochs=12, lr=0.01)


def test_a_row_is_what_the_training_gave(papers):
    variant = Variant(norm="pair", scale=2.0, **SMALL)
    tables = depth_study(papers, [variant], depths=[3], seeds=[4], schedule=SHORT, progress=False)
    (row,) = tables.runs.to_dict("records")
    run = fit(variant.build(3, papers, 4), papers, SHORT, seed=4, progress=False)
    history = run.history
    assert row["test_last"] == history["test_accuracy"].iloc[-1]
    first_best = history["val_accuracy"].argmax()
    assert row["best_epoch"] == first_best + 1
    assert row["test_best"] == history["test_accuracy"].iloc[first_best]
    assert (row["norm"], row["scale"], row["num_layers"], row["seed"]) == ("pair", 2.0, 3, 4)
    assert row["finite"]
    assert tables.curves["epoch"].tolist() == [1, 5, 10]
    assert tables.curves["train_loss"].tolist() == history["train_loss"].iloc[[0, 4, 9]].tolist()
    assert {"versions", "commit", "dataset", "epochs", "lr"} <= row.keys()


def test_convergence_is_the_first_epoch_below_the_target_or_never(papers):
    schedule = Schedule(epochs=80, lr=0.02)
    variants = [Variant(dropout=0.0, attention_dropout=0.0, **SMALL), Variant(**SMALL)]
    tables = depth_study(
        papers, variants, depths=[2], seeds=[0], schedule=schedule, progress=False
    ).runs
    losses = fit(variants[0].build(2, papers, 0), papers, schedule, seed=0, progress=False).history[
        "train_loss"
    ]
    assert tables["converged"][0] == (losses < 0.5).argmax() + 1
    short = depth_study(papers, variants, depths=[2], seeds=[0], schedule=SHORT, progress=False)
    assert np.isnan(short.runs["converged"][1])


def test_what_is_there_is_not_trained_again(papers, tmp_path, monkeypatch):
    prefix = tmp_path / "depth"
    variants = [Variant(norm=norm, **SMALL) for norm in ("none", "lipschitz")]
    settings = dict(seeds=[0], schedule=SHORT, prefix=prefix, progress=False)
    first = depth_study(papers, variants, depths=[1], **settings)
    trained = []
    import studies.depth as module

    def counted(network, *arguments, **options):
        trained.append(len(network.layers))
        return fit(network, *arguments, **options)

    monkeypatch.setattr(module, "fit", counted)
    tables = depth_study(papers, variants, depths=[1, 2], **settings)
    assert trained == [2, 2]
    assert len(tables.runs) == 4
    written = pd.read_csv(f"{prefix}_runs.csv.gz")
    assert written["num_layers"].tolist() == [1, 1, 2, 2]
    assert written["test_last"].tolist()[:2] == pytest.approx(first.runs["test_last"].tolist())
    assert len(pd.read_csv(f"{prefix}_curves.csv.gz")) == 4 * 3


def test_the_same_seed_gives_every_norm_the_same_initial_weights(papers):
    one, other = (Variant(norm=n, **SMALL).build(2, papers, 3) for n in ("none", "lipschitz"))
    for name, value in one.state_dict().items():
        assert (other.state_dict()[name] == value).all()


def test_gradients_are_there_for_every_variant_seed_epoch_and_layer(papers):
    variants = {"plain": Variant(**SMALL), "normalised": Variant(norm="lipschitz", **SMALL)}
    schedule = Schedule(epochs=3)
    found = gradient_evolution(
        papers, variants, num_layers=4, seeds=[0, 1], schedule=schedule, progress=False
    )
    assert len(found.gradients) == 2 * 2 * 3 * 4 * 2
    assert len(found.history) == 2 * 2 * 3


def test_of_gradients_the_largest_and_one_seed_are_kept(papers):
    variants = {"plain": Variant(**SMALL), "normalised": Variant(norm="lipschitz", **SMALL)}
    whole = gradient_evolution(
        papers,
        variants,
        num_layers=3,
        seeds=[5, 6],
        schedule=Schedule(epochs=2),
        progress=False,
    )
    found = compact_gradients(whole)
    assert set(found["heat"]["seed"]) == {5}
    assert len(found["heat"]) == 2 * 2 * 3
    row = found["largest"].query("variant == 'plain' and seed == 6 and epoch == 2")
    row = row[row["kind"] == "attention"].squeeze()
    rows = whole.gradients.query("variant == 'plain' and seed == 6 and epoch == 2")
    assert row["norm"] == rows.loc[rows["kind"] == "attention", "norm"].max()
    losses = whole.history.query("variant == 'plain' and seed == 6")["train_loss"]
    assert row["train_loss"] == losses.iloc[1]
    whole.gradients.loc[whole.gradients["layer"] == 1, "norm"] = np.nan
    assert compact_gradients(whole)["largest"]["norm"].isna().all()


def test_the_command_watches_every_variant(papers, tmp_path, monkeypatch):
    monkeypatch.setattr("studies.data.load", lambda name: papers)
    options = ["gradients", "--dataset", "citation", "--layers", "2", "--seeds", "1", "2"]
    options += ["--epochs", "2", "--hidden", "4", "--heads", "2", "-o", str(tmp_path / "g")]
    assert main(options) == 0
    largest = pd.read_csv(tmp_path / "g_largest.csv.gz")
    assert largest["variant"].unique().tolist() == [*gradient_variants()]
    assert set(largest["heads"]) == {2}
    assert (tmp_path / "g_heat.csv.gz").is_file()


@pytest.mark.slow
def test_without_a_norm_25_layers_explode_with_it_they_do_not_and_dropout_is_why(cache):
    variants = {
        "none": Variant(),
        "no dropout": Variant(dropout=0.0, attention_dropout=0.0),
        "lipschitz": Variant(norm="lipschitz"),
    }
    schedule = Schedule(epochs=16, lr_patience=None)
    found = gradient_evolution(
        load("citation"), variants, seeds=[0], schedule=schedule, progress=False
    ).gradients
    largest = found[found["kind"] == "weights"].groupby("variant")["norm"].max()
    assert largest["none"] > 1e4
    assert largest["no dropout"] < 2
    assert largest["lipschitz"] < 2


def test_the_command_trains_what_it_is_told(papers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("studies.data.load", lambda name: papers)
    prefix = tmp_path / "depth"
    options = ["depth", "--dataset", "citation", "--architecture", "gt", "-o", str(prefix)]
    options += ["--layers", "1", "2", "--seeds", "3", "--epochs", "2", "--hidden", "4"]
    assert main([*options, "--heads", "2", "--norms", "none", "lipschitz=4"]) == 0
    found = pd.read_csv(f"{prefix}_runs.csv.gz")
    assert set(found["architecture"]) == {"gt"}
    assert found["num_layers"].tolist() == [1, 1, 2, 2]
    assert found["norm"].tolist() == ["none", "lipschitz"] * 2
    assert found["scale"].fillna(0).tolist() == [0, 4] * 2
    assert set(found["epochs"]) == {2} and set(found["lr_patience"]) == {10}
    assert main([*options, "--heads", "2", "--norms", "none", "--constant-rate"]) == 0
    more = pd.read_csv(f"{prefix}_runs.csv.gz")
    assert len(more) == 6, "another schedule is another training"
    assert more["lr_patience"].isna().tolist() == [False] * 4 + [True] * 2
    assert main([*options, "--norms", "lipschitz=much"]) == 2
    assert "expected NORM or NORM=SCALE" in capsys.readouterr().err
    assert main([*options, "--norms", "maxnorm"]) == 2
    assert "norm: expected one of none, layer" in capsys.readouterr().err


def some_runs():
    rows = [("none", np.nan, 2, s, c) for s, c in enumerate([10.0, 30.0, np.nan])]
    rows += [("none", np.nan, 5, s, np.nan) for s in range(3)]
    rows += [("lipschitz", 4.0, 2, s, 12.0) for s in range(3)]
    return pd.DataFrame(rows, columns=["norm", "scale", "num_layers", "seed", "converged"])


def test_a_table_by_depth_says_median_range_and_never():
    table = by_depth_table(named(some_runs()), "converged", form="{:.0f}")
    assert table.loc["no norm"].tolist() == ["30 (10-never)", "never"]
    assert table.loc["LipschitzNorm, f = 4"].tolist()[0] == "12"
    assert table.columns.tolist() == [2, 5]
    ranges = by_depth_table(named(some_runs()), "converged", form="{:.0f}", has_median=False)
    assert ranges.loc["no norm"].tolist() == ["10-never", "never"]
    assert ranges.loc["LipschitzNorm, f = 4"].tolist()[0] == "12"


def test_tracked_studies_are_joined_with_titles(papers, tmp_path):
    variants = [Variant(**SMALL), Variant(norm="lipschitz", scale=4.0, **SMALL)]
    settings = dict(depths=[1], seeds=[0], schedule=SHORT, progress=False)
    depth_study(papers, variants, prefix=tmp_path / "one", **settings)
    found = read_depth(tmp_path, {"one": "GAT, papers"})
    assert found.runs["variant"].tolist() == ["no norm", "LipschitzNorm, f = 4"]
    assert set(found.curves["panel"]) == set(found.runs["panel"]) == {"GAT, papers"}
    assert set(found.curves["variant"]) == set(found.runs["variant"])
    with pytest.raises(FileNotFoundError, match="two_runs"):
        read_depth(tmp_path, {"two": "missing"})


def test_the_table_of_gradients_has_medians_ranges_and_overflows():
    rows = [
        dict(heads=2, variant="plain", seed=s, epoch=e, kind="weights", norm=n, train_loss=5.0 * e)
        for s, peak in enumerate([2e10, 3e7, 5e12])
        for e, n in ((1, 10.0), (2, peak))
    ]
    rows += [
        dict(heads=2, variant="normed", seed=s, epoch=1, kind="weights", norm=n, train_loss=0.5)
        for s, n in enumerate([0.25, 0.5, np.nan])
    ]
    rows += [row | dict(kind="attention", norm=1e30) for row in rows]
    table = gradient_table(pd.DataFrame(rows))
    assert table.to_dict("list") == {
        "heads": [2, 2],
        "variant": ["plain", "normed"],
        "largest gradient": ["2.0e10 (3.0e7-5.0e12)", "0.38 (0.25-0.5)"],
        "last loss": ["10 (10-10)", "0.5 (0.5-0.5)"],
        "overflowed": ["0/3", "1/3"],
    }
