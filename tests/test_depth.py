"""Depth and missing features on a small graph: rows, resuming, tables, figures, explosion."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import planetoid

from studies.__main__ import main
from studies.data import load
from studies.depth import (
    Variant,
    compact_gradients,
    depth_study,
    gradient_evolution,
    gradient_heat,
    gradient_table,
    gradient_variants,
    largest_gradients,
    loss_by_depth,
    read_depth,
)
from studies.missing_features import MODELS, beside_published, best_layers, missing_study
from studies.schedule import Schedule
from studies.tasks import hide_features
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


def test_the_command_watches_every_variant(papers, tmp_path, monkeypatch):
    monkeypatch.setattr("studies.commands.load", lambda name: papers)
    options = ["study", "gradients", "--dataset", "citation", "--layers", "2", "--seeds", "1", "2"]
    options += ["--epochs", "2", "--hidden", "4", "--heads", "2", "-o", str(tmp_path / "g")]
    assert main(options) == 0
    largest = pd.read_csv(tmp_path / "g_largest.csv.gz")
    assert largest["variant"].unique().tolist() == [*gradient_variants()]
    assert set(largest["heads"]) == {2}
    assert (tmp_path / "g_heat.csv.gz").is_file()


def test_the_command_trains_what_it_is_told(papers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("studies.commands.load", lambda name: papers)
    prefix = tmp_path / "depth"
    options = ["study", "depth", "--dataset", "citation", "--architecture", "gt", "-o", str(prefix)]
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
    assert "--norms maxnorm: expected one of none, layer" in capsys.readouterr().err


def test_of_gradients_the_largest_and_one_seed_are_kept(papers):
    variants = {"plain": Variant(**SMALL), "normalized": Variant(norm="lipschitz", **SMALL)}
    schedule = Schedule(epochs=2)
    settings = dict(num_layers=3, seeds=[5, 6], schedule=schedule, progress=False)
    whole = gradient_evolution(papers, variants, **settings)
    assert len(whole) == 2 * 2 * 2 * 3 * 2  # variants, seeds, epochs, layers, kinds
    tables = compact_gradients(whole)
    assert set(tables["heat"]["seed"]) == {5} and len(tables["heat"]) == 2 * 2 * 3
    case = "variant == 'plain' and seed == 6 and epoch == 2 and kind == 'attention'"
    row, rows = tables["largest"].query(case).squeeze(), whole.query(case)
    assert row["norm"] == rows["norm"].max()
    assert row["train_loss"] == rows["train_loss"].iloc[0] > 0
    whole.loc[whole["layer"] == 1, "norm"] = np.nan
    assert compact_gradients(whole)["largest"]["norm"].isna().all()


@pytest.mark.slow
def test_without_a_norm_25_layers_explode_with_it_they_do_not_and_dropout_is_why(cache):
    still = Variant(dropout=0.0, attention_dropout=0.0)
    variants = {"none": Variant(), "still": still, "lipschitz": Variant(norm="lipschitz")}
    schedule = Schedule(epochs=16, lr_patience=None)
    settings = dict(seeds=[0], schedule=schedule, progress=False)
    gradients = gradient_evolution(load("citation"), variants, **settings)
    largest = gradients[gradients["kind"] == "weights"].groupby("variant")["norm"].max()
    assert largest["none"] > 1e4
    assert largest["still"] < 2 and largest["lipschitz"] < 2


def test_tracked_studies_are_joined_with_titles(papers, tmp_path):
    variants = [Variant(**SMALL), Variant(norm="lipschitz", scale=4.0, **SMALL)]
    settings = dict(depths=[1], seeds=[0], schedule=SHORT, progress=False)
    depth_study(papers, variants, prefix=tmp_path / "one", **settings)
    for table in ("runs", "curves"):
        tracked = read_depth(tmp_path, table, {"one": "GAT, papers"})
        assert list(tracked["variant"].unique()) == ["no norm", "LipschitzNorm, f = 4"]
        assert set(tracked["run"]) == {"GAT, papers"}


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
    assert table.index.tolist() == [(2, "plain"), (2, "normed")]
    assert table.to_dict("list") == {
        "largest gradient": ["2e+10 [3e+07, 5e+12]", "0.375 [0.25, 0.5]"],
        "last loss": ["10 [10, 10]", "0.5 [0.5, 0.5]"],
        "overflowed": ["0/3", "1/3"],
    }


@pytest.mark.parametrize(("name", "share"), [("cora", 0.32), ("citeseer", 0.235)])
def test_a_network_that_gives_all_nodes_one_class_is_right_for_few(name, share):
    test = planetoid(name).test
    shares = test.graph.y[test.nodes].bincount().double() / len(test.nodes)
    assert share - 0.01 < shares.max() < share


@pytest.fixture
def gradients():
    rows = [
        dict(variant=variant, seed=seed, epoch=epoch, layer=layer, kind="weights")
        | dict(norm=10.0 ** (epoch + layer) * (seed + 1))
        for variant in ("none", "pair")
        for seed in (0, 1, 2)
        for epoch in (1, 2, 3)
        for layer in (0, 1)
    ]
    return pd.DataFrame(rows)


def test_figures_of_gradients_show_the_first_seed_by_layer_and_the_largest_over_all(gradients):
    ax = gradient_heat(gradients).axes_dict["pair"]
    (mesh,) = ax.collections
    expected = [[10.0 ** (epoch + layer) for epoch in (1, 2, 3)] for layer in (0, 1)]
    assert np.allclose(mesh.get_array().reshape(2, 3), expected)
    gradients.loc[(gradients["epoch"] == 3) & (gradients["variant"] == "pair"), "norm"] = np.inf
    (ax,) = largest_gradients(gradients).axes.flat
    first, second = (line.get_xydata() for line in ax.lines[:2])
    assert np.allclose(first, [[e, 2 * 10.0 ** (e + 1)] for e in (1, 2, 3)])
    assert np.allclose(second, first[:2]), "the line ends where a gradient is not finite"
    plt.close("all")


def test_losses_are_cut_above():
    rows = [
        dict(variant=v, num_layers=d, seed=s, epoch=e, train_loss=20 * d / e + s)
        for v in ("none", "pair")
        for d in (1, 5)
        for s in (0, 1, 2)
        for e in (1, 2)
    ]
    axes = loss_by_depth(pd.DataFrame(rows), top=7.0).axes_dict
    assert axes["pair"].get_ylim()[1] == 7
    assert axes["none"].lines[1].get_xydata().tolist() == [[1, 101], [2, 51]]
    plt.close("all")


BRIEF = Schedule(epochs=4, lr=0.01)


def test_a_row_is_what_training_on_hidden_features_gave(papers):
    variant = Variant(architecture="ggnn", **SMALL)
    study = missing_study(
        papers,
        {"GGNN": variant},
        rates=[0.5],
        layers=[3],
        seeds=[2],
        schedule=BRIEF,
        progress=False,
    )
    (row,) = study.runs.to_dict("records")
    data = hide_features(papers, 0.5, seed=2)
    history = fit(variant.build(3, data, 2), data, BRIEF, seed=2, progress=False).history
    assert row["test_last"] == history["test_accuracy"].iloc[-1]
    assert row["val_best"] == history["val_accuracy"].max()
    assert (row["model"], row["rate"], row["num_layers"], row["seed"]) == ("GGNN", 0.5, 3, 2)
    assert study.curves["epoch"].tolist() == [4]


def test_all_networks_are_trained_with_all_numbers_of_layers_and_rates(papers, tmp_path):
    models = {name: Variant(**{**vars(v), **SMALL}) for name, v in MODELS.items()}
    settings = dict(layers=[1, 2], seeds=[0], schedule=Schedule(epochs=1), progress=False)
    runs = missing_study(papers, models, prefix=tmp_path / "m", **settings).runs
    assert len(runs) == 5 * 2 * 2
    assert not runs.duplicated(["model", "num_layers", "rate"]).any()
    again = missing_study(papers, models, prefix=tmp_path / "m", **settings).runs
    assert len(again) == len(runs)


def runs_by_hand():
    rows = []
    for layers, val, test_best, test_last in ((2, 0.9, 0.70, 0.60), (4, 0.8, 0.75, 0.80)):
        for seed, shift in enumerate((-0.01, 0.0, 0.01)):
            row = dict(dataset="Cora", rate=1.0, model="GAT", num_layers=layers, seed=seed)
            row |= dict(val_best=val + shift, test_best=test_best + shift)
            rows.append(row | dict(test_last=test_last + 2 * shift))
    return pd.DataFrame(rows)


def test_layers_are_chosen_on_validation_or_as_such_tables_often_are_on_test():
    (fair,) = best_layers(runs_by_hand()).to_dict("records")
    assert (fair["num_layers"], fair["seeds"]) == (2, 3)
    assert fair["accuracy"] == pytest.approx(70) and fair["deviation"] == pytest.approx(1)
    (flattering,) = best_layers(runs_by_hand(), "test").to_dict("records")
    assert flattering["num_layers"] == 4
    assert flattering["accuracy"] == pytest.approx(80) and flattering["deviation"] == pytest.approx(
        2
    )


def test_ours_stands_beside_the_published_value_and_the_difference():
    (row,) = beside_published(best_layers(runs_by_hand())).to_dict("records")
    assert row["ours"] == "70.0 1.0 (2)" and row["published"] == "65.3 2.1 (4)"
    assert row["difference"] == pytest.approx(4.7)
    unknown = best_layers(runs_by_hand().assign(rate=0.5))
    (row,) = beside_published(unknown).to_dict("records")
    assert row["published"] == "-" and np.isnan(row["difference"])


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_rate_that_is_no_share_is_refused(papers, rate):
    with pytest.raises(ValueError, match="rate: expected a share in"):
        missing_study(papers, rates=[rate], progress=False)


def test_the_command_takes_rates_and_layers(tmp_path, capsys, same_number_of_threads):
    prefix = tmp_path / "missing"
    settings = ["--dataset", "citation", "--rates", "1", "--layers", "1", "--seeds", "0"]
    assert (
        main(["study", "missing", *settings, "--epochs", "1", "--threads", "1", "-o", str(prefix)])
        == 0
    )
    runs = pd.read_csv(f"{prefix}_runs.csv.gz")
    assert runs["model"].tolist() == list(MODELS)
    assert set(runs["rate"]) == {1.0} and set(runs["num_layers"]) == {1}
    some = [*settings, "--epochs", "1", "--models", "GCN", "GAT", "--constant-rate"]
    assert main(["study", "missing", *some, "-o", str(tmp_path / "some")]) == 0
    runs = pd.read_csv(tmp_path / "some_runs.csv.gz")
    assert runs["model"].tolist() == ["GCN", "GAT"] and runs["lr_patience"].isna().all()
    assert main(["study", "missing", *settings, "--models", "MLP", "-o", str(prefix)]) != 0
    assert "--models MLP: expected one of GCN, GGNN," in capsys.readouterr().err
    assert main(["study", "missing", *settings, "--rates", "2", "-o", str(prefix)]) != 0
    assert "rate: expected a share in [0, 1], got 2" in capsys.readouterr().err
