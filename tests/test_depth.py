"""Training by depth and with hidden features: rows of trainings, commands, tables."""

import numpy as np
import pandas as pd
import pytest
from conftest import planetoid

from studies.__main__ import main
from studies.deep import Variant
from studies.depth import MODELS, beside_published, best_layers, depth, missing, named
from studies.schedule import Schedule
from studies.tasks import hide_features
from studies.train import fit

SMALL = dict(hidden=8, heads=2, progress=False)


def test_a_row_is_what_the_training_gave(papers):
    settings = dict(norms=["pair=2"], layers=[3], seeds=[4], epochs=12, lr=0.01)
    study = depth(papers, architecture="gat", **settings, **SMALL)
    (row,) = study.runs.to_dict("records")
    network = Variant(norm="pair", scale=2.0, hidden_channels=8, heads=2).build(3, papers, 4)
    schedule = Schedule(epochs=12, lr=0.01)
    history = fit(network, papers, schedule, seed=4, progress=False).history
    first_best = history["val_accuracy"].argmax()
    assert row["test_last"] == history["test_accuracy"].iloc[-1]
    assert row["test_best"] == history["test_accuracy"].iloc[first_best]
    assert (row["best_epoch"], row["last_epoch"], row["finite"]) == (first_best + 1, 12, True)
    assert (row["norm"], row["scale"], row["num_layers"], row["seed"]) == ("pair", 2.0, 3, 4)
    assert study.curves["epoch"].tolist() == [1, 5, 10]
    assert study.curves["train_loss"].tolist() == history["train_loss"].iloc[[0, 4, 9]].tolist()


def test_convergence_is_the_first_epoch_below_the_target_or_never(papers):
    settings = dict(architecture="gat", norms=["none"], layers=[2], seeds=[0], lr=0.02, **SMALL)
    still = dict(dropout=0.0, attention_dropout=0.0)
    (epoch,) = depth(papers, epochs=80, **still, **settings).runs["converged"]
    network = Variant(hidden_channels=8, heads=2, **still).build(2, papers, 0)
    losses = fit(network, papers, Schedule(epochs=80, lr=0.02), progress=False).history
    assert epoch == (losses["train_loss"] < 0.5).argmax() + 1 > 2
    assert np.isnan(depth(papers, epochs=2, **settings).runs["converged"].item())


def test_the_same_seed_gives_every_norm_the_same_initial_weights(papers):
    one, other = (Variant(norm=n).build(2, papers, 3).state_dict() for n in ("none", "lipschitz"))
    assert all((other[name] == value).all() for name, value in one.items())


def test_the_command_trains_what_it_is_told_and_nothing_again(
    papers, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("studies.commands.load", lambda name: papers)
    options = ["study", "depth", "--dataset", "citation", "--architecture", "gt", "--heads", "2"]
    options += ["--layers", "1", "2", "--seeds", "3", "--epochs", "2", "--hidden", "4"]
    options += ["-o", str(tmp_path / "depth"), "--norms"]
    assert main([*options, "none", "lipschitz=4"]) == 0
    assert main([*options, "none", "--constant-rate"]) == 0, "another schedule is another training"
    assert main([*options, "none"]) == 0
    runs = pd.read_csv(tmp_path / "depth_runs.csv.gz")
    assert runs["num_layers"].tolist() == [1, 1, 2, 2, 1, 2]
    assert runs["lr_patience"].isna().tolist() == [False] * 4 + [True] * 2
    titles = ["no norm", "LipschitzNorm, f = 4"] * 2 + ["no norm"] * 2
    assert named(runs)["variant"].tolist() == titles
    capsys.readouterr()
    for norm, error in (("lipschitz=much", "NORM=SCALE"), ("maxnorm", "one of none, layer")):
        assert main([*options, norm]) == 2
        assert error in capsys.readouterr().err


@pytest.mark.parametrize(("name", "share"), [("cora", 0.32), ("citeseer", 0.235)])
def test_a_network_that_gives_all_nodes_one_class_is_right_for_few(name, share):
    test = planetoid(name).test
    shares = test.graph.y[test.nodes].bincount().double() / len(test.nodes)
    assert share - 0.01 < shares.max() < share


def test_a_row_is_what_training_on_hidden_features_gave(papers):
    case = dict(models=["GGNN"], rates=[0.5], layers=[3], seeds=[2], epochs=4, lr=0.01)
    study = missing(papers, **case, **SMALL)
    (row,) = study.runs.to_dict("records")
    data = hide_features(papers, 0.5, seed=2)
    network = Variant(architecture="ggnn", hidden_channels=8, heads=2).build(3, data, 2)
    history = fit(network, data, Schedule(epochs=4, lr=0.01), seed=2, progress=False).history
    assert row["test_last"] == history["test_accuracy"].iloc[-1]
    assert row["val_best"] == history["val_accuracy"].max()
    assert (row["model"], row["rate"], row["num_layers"], row["seed"]) == ("GGNN", 0.5, 3, 2)
    assert study.curves["epoch"].tolist() == [4]


def test_the_command_hides_features_at_rates(papers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("studies.commands.load", lambda name: papers)
    settings = ["study", "missing", "--dataset", "citation", "--layers", "1", "2", "--seeds", "0"]
    settings += ["--epochs", "1", "--hidden", "4", "--heads", "2", "-o", str(tmp_path / "m")]
    assert main(settings) == 0
    runs = pd.read_csv(tmp_path / "m_runs.csv.gz")
    assert len(runs) == len(MODELS) * 2 * 2
    assert not runs.duplicated(["model", "num_layers", "rate"]).any()
    capsys.readouterr()
    for option, value, error in (
        ("--models", "MLP", "--models MLP: expected one of GCN, GGNN,"),
        ("--rates", "2", "rate: expected a share in [0, 1], got 2"),
    ):
        assert main([*settings, option, value]) == 2
        assert error in capsys.readouterr().err


def test_layers_are_chosen_on_validation_or_on_test_and_stand_beside_the_published():
    runs = pd.DataFrame(
        dict(dataset="Cora", rate=1.0, model="GAT", num_layers=layers, seed=seed)
        | dict(val_best=val + shift, test_best=best + shift, test_last=last + 2 * shift)
        for layers, val, best, last in ((2, 0.9, 0.70, 0.60), (4, 0.8, 0.75, 0.80))
        for seed, shift in enumerate((-0.01, 0.0, 0.01))
    )
    for choice, expected in (("validation", [2, 70, 1, 3]), ("test", [4, 80, 2, 3])):
        (row,) = best_layers(runs, choice).values.tolist()
        assert row == ["Cora", 1, "GAT", *map(pytest.approx, expected)]
    (row,) = beside_published(best_layers(runs)).to_dict("records")
    assert (row["ours"], row["published"]) == ("70.0 1.0 (2)", "65.3 2.1 (4)")
    assert row["difference"] == pytest.approx(4.7)
    (row,) = beside_published(best_layers(runs.assign(rate=0.5))).to_dict("records")
    assert row["published"] == "-" and np.isnan(row["difference"])
