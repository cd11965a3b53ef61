"""Hidden features: rows, what is hidden, and the choice of the number of layers."""

import numpy as np
import pandas as pd
import pytest

from studies.__main__ import main
from studies.depth import Variant
from studies.missing_features import (
    MODELS,
    beside_published,
    best_layers,
    missing_study,
    published_table,
    read_missing,
)
from studies.schedule import Schedule
from studies.tasks import hide_features
from studies.train import fit

SMALL = dict(hidden_channels=4, heads=2)
SHORT = Schedule(epochs=4, lr=0.01)


def test_a_row_is_what_training_on_hidden_features_gave(papers):
    variant = Variant(architecture="ggnn", **SMALL)
    study = missing_study(
        papers,
        {"GGNN": variant},
        rates=[0.5],
        layers=[3],
        seeds=[2],
        schedule=SHORT,
        progress=False,
    )
    (row,) = study.runs.to_dict("records")
    data = hide_features(papers, 0.5, seed=2)
    history = fit(variant.build(3, data, 2), data, SHORT, seed=2, progress=False).history
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
    with pytest.raises(ValueError, match="choice: expected one of validation, test, got 'train'"):
        best_layers(runs_by_hand(), "train")


def test_ours_stands_beside_the_published_value_and_the_difference():
    (row,) = beside_published(best_layers(runs_by_hand())).to_dict("records")
    assert row["ours"] == "70.0 1.0 (2)" and row["published"] == "65.3 2.1 (4)"
    assert row["difference"] == pytest.approx(4.7)
    unknown = best_layers(runs_by_hand().assign(rate=0.5))
    (row,) = beside_published(unknown).to_dict("records")
    assert row["published"] == "-" and np.isnan(row["difference"])


def test_the_published_table_has_every_model_data_set_and_rate():
    table = published_table()
    assert len(table) == 5 * 3 * 2
    assert set(table["model"]) == set(MODELS)
    best = table.loc[table.groupby(["dataset", "rate"])["accuracy"].idxmax()]
    winners = best.set_index(["dataset", "rate"])["model"].to_dict()
    assert winners.pop(("CiteSeer", 0.0)) == "GCN"
    assert winners.pop(("CiteSeer", 1.0)) == "GAT-Pn"
    assert set(winners.values()) == {"GAT-Lip"}


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_rate_that_is_no_share_is_refused(papers, rate):
    with pytest.raises(ValueError, match="rate: expected a share in"):
        missing_study(papers, rates=[rate], progress=False)


def test_the_command_takes_rates_and_layers(tmp_path, capsys, same_number_of_threads):
    prefix = tmp_path / "missing"
    settings = ["--dataset", "citation", "--rates", "1", "--layers", "1", "--seeds", "0"]
    assert main(["missing", *settings, "--epochs", "1", "--threads", "1", "-o", str(prefix)]) == 0
    runs = pd.read_csv(f"{prefix}_runs.csv.gz")
    assert runs["model"].tolist() == list(MODELS)
    assert set(runs["rate"]) == {1.0} and set(runs["num_layers"]) == {1}
    some = [*settings, "--epochs", "1", "--models", "GCN", "GAT", "--constant-rate"]
    assert main(["missing", *some, "-o", str(tmp_path / "some")]) == 0
    runs = pd.read_csv(tmp_path / "some_runs.csv.gz")
    assert runs["model"].tolist() == ["GCN", "GAT"] and runs["lr_patience"].isna().all()
    assert main(["missing", *settings, "--models", "MLP", "-o", str(prefix)]) != 0
    assert "--models: expected some of GCN, GGNN," in capsys.readouterr().err
    assert main(["missing", *settings, "--rates", "2", "-o", str(prefix)]) != 0
    assert "rate: expected a share in [0, 1], got 2" in capsys.readouterr().err


def test_tables_are_read_as_one_with_the_published_names(tmp_path):
    runs = runs_by_hand()
    runs.to_csv(tmp_path / "missing_cora_runs.csv.gz", index=False)
    hidden = runs.assign(dataset="PubMed, features missing")
    hidden.to_csv(tmp_path / "missing_pubmed_runs.csv.gz", index=False)
    both = read_missing(tmp_path, ["missing_cora", "missing_pubmed"])
    assert both["dataset"].tolist() == ["Cora"] * len(runs) + ["PubMed"] * len(runs)
    assert beside_published(best_layers(both))["published"].tolist() == [
        "65.3 2.1 (4)",
        "63.1 0.7 (4)",
    ]
    with pytest.raises(FileNotFoundError, match="missing_citeseer"):
        read_missing(tmp_path)
