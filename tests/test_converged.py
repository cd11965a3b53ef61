"""GT on ZINC to the end of its schedule: its tables, from a few numbers and from a small run."""

import json
import sys
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from conftest import REPOSITORY, few_molecules
from scipy import stats

from mapkg.models import build
from studies import converged as study
from studies.published import CONFIGS
from studies.train import fit

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import stacked_tables as tables

CONFIG = CONFIGS["GT-ZINC"].replace(hidden_channels=8, heads=2, num_layers=1)


def rows_of(**columns):
    base = dict(max_ratio=1.0, max_layer_ratio=1.0, sun_molecules=0, max_over_second_q50=1.0)
    base |= dict(max_over_q90_q50=1.0, kurtosis_q50=1.0, spread_mean=1.0, layer=0)
    return pd.DataFrame({**base, **columns})


def test_a_measure_is_beyond_untrained_if_above_all_seeds_of_its_layer():
    table = rows_of(seed=[0, 1, 0, 1], epoch=[0, 0, 5, 5], spread_mean=[2.0, 3.0, 3.0, 3.1])
    assert study.with_measures(table)["spread"].tolist() == [False, False, False, True]


@pytest.fixture
def folder(tmp_path):
    """Two seeds of 20 epochs, the rate halved after 10 and 12, recorded at every fifth."""
    history = pd.DataFrame(
        {"seed": seed, "epoch": epoch, "lr": CONFIG.lr / (1 + (epoch > 10 + 2 * seed))}
        for seed in (0, 1)
        for epoch in range(1, 21)
    ).assign(train_loss=1.0, val_loss=1.0, test_loss=1.0)
    recorded = rows_of(epoch=range(0, 21, 5), rows=9, rows_with_massive=0, max_abs=1.0)
    recorded = recorded.assign(row_median_q50=1.0)
    recorded["max_ratio"] = [1, 2000, 1, 2000, 2000]
    measures = pd.concat([recorded.assign(seed=seed) for seed in (0, 1)])
    every = measures.merge(history, on=["seed", "epoch"], how="outer")
    every.to_csv(tmp_path / "epochs.csv.gz", index=False)
    about = {"config": CONFIG.to_dict(), "config_name": "GT-ZINC", "seeds": [0, 1]}
    about |= {"by_seed": {s: {"best_epoch": 14, "last_epoch": 20} for s in (0, 1)}}
    about |= {f"{state}_weights_dtype": "torch.float32" for state in ("best", "last")}
    (tmp_path / "run.json").write_text(json.dumps(about))
    return tmp_path


def test_states_windows_and_thinning_follow_the_rate(folder):
    _, run = tables.read_run(folder)
    one = run[run["seed"] == 1].set_index("epoch")
    assert one["halved"].unique() == [13] and one["epochs"].unique() == [20]
    states = {0: "untrained", 5: "", 10: "high", 15: "best", 20: "last"}
    assert one["state"].to_dict() == states
    counts = study.windows(run).set_index(["phase", "seed"])
    assert counts.loc[("high", 1), ["recorded", "row"]].tolist() == [2, 1]
    assert counts.loc[("end", 1), ["recorded", "row"]].tolist() == [4, 3]
    assert len(study.thinned(run[run["epoch"] != 5])) == 8
    assert study.steady(study.windows(run)).loc[study.MEASURES["row"]].tolist() == [2, 2]


def test_the_last_epoch_is_the_last_also_where_it_is_the_best(folder):
    _, run = tables.read_run(folder)
    every = run.drop(columns=["state", "halved", "epochs", "best_epoch"])
    again = study.with_measures(study.with_phases(every, {0: 20, 1: 10}, CONFIG.lr))
    states = again.set_index(["seed", "epoch"])["state"]
    assert states[0].to_dict() == {0: "untrained", 5: "", 10: "high", 15: "", 20: "last"}
    assert states[1].to_dict() == {0: "untrained", 5: "", 10: "high", 15: "", 20: "last"}
    for look in (study.seeds_by_layer, study.kept):
        look(again)
        with pytest.raises(ValueError, match=r"seeds \[1\]: expected an epoch of the state 'last'"):
            look(again[(again["seed"] == 0) | (again["epoch"] < 20)])


def test_networks_are_trained_to_the_end_of_their_schedule(tmp_path, capsys):
    splits = few_molecules(9, 5, 3)
    # An error that never falls by enough: the rate is halved after epochs 2, 3 and 4.
    config = CONFIG.replace(lr=1e-9, min_lr=2e-10, lr_patience=0, max_epochs=9)
    settings = dict(prefix=tmp_path / "of", name="GT-ZINC", changes="some")
    study.to_the_end(config, splits, [4], **settings)
    study.to_the_end(config, splits, [3, 4], **settings)
    assert "resumed after epoch 4" in capsys.readouterr().err, "seed 4 is not trained again"
    table = pd.read_csv(tmp_path / "of_epochs.csv.gz", keep_default_na=False)
    assert set(table["stopped"]) == {"min lr"} and set(table["changes"]) == {"some"}
    for seed in (3, 4):
        torch.manual_seed(seed)
        alone = fit(build(config), splits, config, seed=seed, progress=False).history
        assert alone["lr"].tolist() == [1e-9, 1e-9, 5e-10, 2.5e-10]
        rows = table[table["seed"] == seed].set_index("epoch")
        assert rows["state"].to_dict() == {0: "untrained", 1: "best", 2: "high", 4: "last"}
        expected = alone.set_index("epoch").loc[[1, 2, 4], "val_loss"]
        assert rows.loc[[1, 2, 4], "val_loss"].astype(float).tolist() == pytest.approx(
            expected.tolist(), rel=1e-5
        )


def test_a_network_that_cannot_be_stacked_is_trained_to_the_end_too(tmp_path):
    config, splits = CONFIG.replace(architecture="gatv2", max_epochs=2), few_molecules(9, 5, 3)
    study.to_the_end(config, splits, [0, 1], prefix=tmp_path / "of")
    table = pd.read_csv(tmp_path / "of_epochs.csv.gz")
    assert table.groupby("seed")["epoch"].max().tolist() == [2, 2]
    assert table[["max_ratio", "kurtosis_q50", "sun_molecules"]].notna().all(axis=None)


def test_networks_beside_one_another_keep_lose_and_gain_layers():
    places = [*product((0, 1), (0, 1), enumerate(study.STATES))]
    table = pd.concat(
        rows_of(seed=[seed], layer=layer, epoch=epoch, state=state)
        for seed, layer, (epoch, state) in places
    ).reset_index(drop=True)
    # One seed loses its layer, the other one gains two.
    table.loc[table.query("seed == 0 and layer == 1 and state == 'high'").index, "max_ratio"] = 1001
    table.loc[table.query("seed == 1 and state == 'last'").index, "max_ratio"] = 1001
    # By another measure one seed keeps its layer.
    table.loc[table.query("seed == 0 and layer == 0 and epoch > 0").index, "sun_molecules"] = 1
    table = study.with_measures(table)
    windows = pd.DataFrame(
        [*product((0, 1), (0, 1), ("high", "end"))], columns=["seed", "layer", "phase"]
    ).assign(recorded=[9, 10] * 4, row=[4, 5, 0, 0, 5, 5, 5, 4], sun=0)
    row = study.beside_one_another({"a": (table, windows)}, ["row", "sun"]).loc["a"]
    times = ["before", "mostly before", "at the end", "mostly at the end"]
    assert row["", "seeds"] == 2
    assert row[study.MEASURES["row"]][times].tolist() == [1, 1, 1, 2]  # half of 9 is 4.5
    assert row[study.MEASURES["sun"]][times].tolist() == [1, 0, 1, 0]
    of_row, of_sun = (study.kept(table).loc[study.MEASURES[name]] for name in ("row", "sun"))
    assert of_row.columns.tolist() == ["before", "kept", "lost", "gained"]
    assert of_row.to_numpy().tolist() == [[1, 0, 1, 1], [1, 0, 1, 2]]
    assert of_sun.to_numpy().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_the_anchor_is_compared_as_four_seeds_with_its_mean_and_deviation_would_be():
    ours = [0.27, 0.28, 0.3]
    places = product(("train", "test"), ("best", "last"), ours)
    measured = pd.DataFrame(places, columns=["split", "state", "mae_of_batches"])
    row = study.beside_anchor(measured).loc[("test", "last")]
    assert row["anchor deviation"] == pytest.approx(0.008 * (4 / 3) ** 0.5)
    mine, deviation = np.mean(ours), np.std(ours, ddof=1)
    for difference, p in ((0, row["p"]), (row["low"], 0.05), (row["high"], 0.05)):
        theirs = 0.264 + difference, row["anchor deviation"], 4
        welch = stats.ttest_ind_from_stats(mine, deviation, 3, *theirs, equal_var=False)
        assert welch.pvalue == pytest.approx(p)


def test_errors_are_those_of_the_stored_weights(folder):
    splits = few_molecules(9, 5, 3)
    for state in ("best", "last"):
        torch.manual_seed(0)
        networks = [build(CONFIG).eval() for _ in (0, 1)]
        tensors = {f"{s}/{k}": v for s, n in enumerate(networks) for k, v in n.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / f"{state}_0.safetensors")
    found = tables.errors(folder, splits, batch_size=2)
    assert len(found) == 2 * 2 * 3
    row = found.query("seed == 1 and state == 'last' and split == 'val'").iloc[0]
    with torch.no_grad():
        each = [
            abs(networks[1](g.x, g.edge_index, g.edge_attr).item() - g.y.item()) for g in splits.val
        ]
    batches = [np.mean(each[:2]), np.mean(each[2:4]), each[4]]
    assert row["mae"] == pytest.approx(np.mean(each), rel=1e-4)
    assert row["mae_of_batches"] == pytest.approx(np.mean(batches), rel=1e-4)
    assert row["recorded"] == 1.0


def test_further_seeds_are_read_with_the_first(tmp_path):
    windows = pd.DataFrame({"seed": [0], "phase": "end", "layer": 0, "recorded": 10})
    windows = windows.assign(**dict.fromkeys(study.MEASURES, 4) | {"sun": 5})
    for part, seed, spread in (("", 0, 1.0), ("_further", 1, 3.0)):
        rows = rows_of(seed=[seed] * 2, layer=0, epoch=[0, 1], state=["untrained", "last"])
        rows = rows.assign(spread_mean=[spread, 2.0])
        rows.to_csv(tmp_path / f"converged_of{part}_epochs.csv.gz", index=False)
        of_seed = windows.assign(seed=seed)
        of_seed.to_csv(tmp_path / f"converged_of{part}_windows.csv.gz", index=False)
    last = study.read_epochs(tmp_path, "of").query("state == 'last'")
    assert last["seed"].tolist() == [0, 1]
    assert not last["spread"].any(), "untrained are the networks of both"
    steady = study.steady(study.read_windows(tmp_path, "of"))["end"][0]
    names = [study.MEASURES[name] for name in study.WITH_THRESHOLD]
    assert steady.to_dict() == dict(zip(names, (0, 0, 2), strict=True))


def test_figures_show_what_the_tables_say():
    table = study.read_converged(REPOSITORY / "data" / "results")[0]
    counted = study.seeds_by_layer(table)
    first = study.draw_seeds_by_layer(counted, 16).axes[0]
    drawn = {line.get_label(): line.get_ydata().tolist() for line in first.lines}
    rows = counted.loc[first.get_title(), list(range(10))]
    assert drawn["before the rate is halved"] == rows.loc["high"].tolist()
    assert drawn["end of training"] == rows.loc["last"].tolist()
    grid = study.draw_schedule(table, (0, 9), {"max_ratio": "ratio"})
    points = sum(len(line.get_xdata()) for line in grid.axes[0, 1].lines)
    both = (table["layer"] == 9).sum() + 16  # both phases have the last epoch of the first
    assert [ax.get_title() for ax in grid.axes.flat] == ["layer 0", "layer 9"] and points >= both
    last = pd.DataFrame({"epoch": [3, 4], "train": [0.1, 0.2], "test": [0.3, 0.4]})
    for ax, split in zip(study.draw_anchor(last).axes, ("test", "train"), strict=True):
        seeds, published = ax.lines[:2]
        assert seeds.get_xydata().tolist() == last[["epoch", split]].to_numpy().tolist()
        assert published.get_xydata().tolist() == [[321.5, study.ANCHOR[split][0]]]
    plt.close("all")
