"""Studies of deep networks: rows of trainings, commands, tables; constants of attention."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import not_bundled
from torch import nn

from mapkg.lipschitz import local_constant
from studies import gradient_explosion as explosion
from studies.__main__ import main
from studies.data import KINDS, load
from studies.deep import Variant, gradient_norms
from studies.depth import beside_published, best_layers, depth, missing
from studies.published import Schedule
from studies.tasks import NodeTask, hide_features
from studies.train import fit

SMALL = dict(hidden=8, heads=2, progress=False)
COMMANDS = {
    "gradients --layers 3 --seeds 5 6 --epochs 2": dict(heat=9 * 2 * 3, largest=9 * 2 * 2 * 2),
    "gradients --layers 3 --seeds 5 --epochs 1 --dropouts": dict(heat=2 * 3, largest=2 * 2),
    "dose --rates 0 0.5 --layers 3 --seeds 5 --epochs 2": dict(runs=4 + 4, curves=4 + 4),
    "dose --rates 0 --layers 3 --seeds 5 --epochs 2 --no-rivals": dict(runs=2, curves=2),
    "dose --further --layers 3 --seeds 5 --epochs 2": dict(runs=4, curves=4),
    "amplification --layers 2 --seeds 5 --steps 1 3": dict(constants=2 * 2 + 2 * 2 * 2),
    "depth --architecture gt --norms none lipschitz=4 --layers 1 2 --epochs 2": dict(
        runs=2 * 2 * 3
    ),
    "missing --layers 1 2 --seeds 0 --epochs 1": dict(runs=5 * 2 * 2, curves=5 * 2 * 2),
    "missing --models GCNII --layers 2 --seeds 0 --epochs 1": dict(runs=2, curves=2),
    "smoothing --layers 1 2 --epochs 1 --seeds 0 --depths 1 --steps 10": dict(
        deep=2 * 5 * 2 * (1 + 2), training=4 * 2 * 2
    ),
    "smoothing --further --layers 1 --epochs 1 --seeds 0": dict(deep=4 * 2),
    "smoothing --very-deep --seeds 0": dict(deep=2 + 3),
    "trees --seeds 0 --passes 2 --passes-apart 1 --block 1": dict(runs=15, curves=15 + 11),
}
"""Studies with the number of rows that their tables have, on the smallest data."""


@pytest.fixture
def command(papers, tmp_path, monkeypatch, cache):
    """Runs a study on small data; returns its status and what its tables begin with."""
    monkeypatch.setitem(KINDS, "nodes", (*KINDS["nodes"], "papers"))
    monkeypatch.setattr(
        "studies.commands.load", lambda name: papers if name == "papers" else load(name)
    )
    monkeypatch.setattr("studies.deep.UNTRAINED", (2, 3))

    def run(text):
        study, *options = text.split()
        prefix, data = tmp_path / study, "trees-2" if study == "trees" else "papers"
        if study not in ("smoothing", "trees"):
            options += ["--hidden", "4", "--heads", "2"]
        return main(["study", study, "--dataset", data, "-o", str(prefix), *options]), prefix

    return run


@pytest.mark.parametrize("text", COMMANDS)
def test_a_study_writes_its_tables_and_trains_nothing_twice(command, text):
    status, prefix = command(text)
    assert status == 0
    for name, rows in COMMANDS[text].items():
        table = pd.read_csv(f"{prefix}_{name}.csv.gz")
        assert len(table) == rows and not table.duplicated().any()
        assert name == "curves" or table[["versions", "commit"]].notna().all(axis=None)
    before = {path: path.read_bytes() for path in prefix.parent.iterdir()}
    if "runs" in COMMANDS[text]:
        assert command(text)[0] == 0
        assert {path: path.read_bytes() for path in prefix.parent.iterdir()} == before


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("depth --architecture gat --norms lipschitz=much", "expected NORM or NORM=SCALE"),
        ("depth --architecture gt --norms balanced", "balanced: expected architecture 'gat', got"),
        ("dose --rates 0 1", "dropout: expected a rate in [0, 1), got 1"),
        ("trees --architectures mlp", "--architectures mlp: expected one of gcn, gin,"),
    ],
)
def test_what_is_unknown_is_refused_before_training(command, capsys, text, error):
    assert command(text)[0] == 2
    assert error in capsys.readouterr().err


def test_gradients_are_those_of_fit_and_constants_are_those_of_its_layers(papers):
    variant = Variant(hidden_channels=4, heads=2)
    how = dict(num_layers=3, seeds=[1], schedule=Schedule(epochs=4, lr_patience=None))
    same = variant.build(3, papers, 1)
    task = NodeTask(papers, evaluate=False)
    training = fit(same, task, how["schedule"], seed=1, observe=gradient_norms, progress=False)
    losses = training.history[["epoch", "train_loss"]]
    expected = training.observations.merge(losses, on="epoch")
    table = explosion.gradient_evolution(papers, {"": variant}, **how, progress=False)
    pd.testing.assert_frame_equal(table[[*expected]], expected)
    settings = dict(layers=2, seeds=[1], steps=[1], hidden=4, heads=2)
    table = explosion.amplification(papers, **settings)["constants"].set_index("training")
    plain = replace(variant, dropout=0.0, attention_dropout=0.0).build(2, papers, 1)
    x, edges = plain.embed(papers.train.graph.x).detach(), papers.train.graph.edge_index
    first = [lambda x: nn.functional.elu(plain.layers[0](x, edges)), x]
    second = [lambda x: plain.layers[1](x, edges), first[0](x)]
    constants = [local_constant(*layer, exact_size=10**8) for layer in (first, second)]
    assert table.loc["no dropout", "constant"].tolist() == pytest.approx(constants, rel=0.02)


def test_a_row_is_what_the_training_gave(papers):
    small = dict(dropout=0.0, attention_dropout=0.0, heads=2)
    how = dict(architecture="gat", norms=["pair=2", "none"], layers=[1], seeds=[4], hidden=8)
    study = depth(papers, **how, **small, epochs=40, lr=0.05, progress=False)
    variants = [dict(norm="pair", scale=2.0), {}]
    for settings, row in zip(variants, study.runs.to_dict("records"), strict=True):
        network = Variant(**settings, **small, hidden_channels=8).build(1, papers, 4)
        schedule = Schedule(epochs=40, lr=0.05)
        history = fit(network, papers, schedule, seed=4, progress=False).history
        best, losses = history["val_accuracy"].argmax(), history["train_loss"]
        expected = dict(
            test_last=history["test_accuracy"].iloc[-1],
            test_best=history["test_accuracy"].iloc[best],
            converged=(losses < 0.5).argmax() + 1,
            **dict(best_epoch=best + 1, last_epoch=len(losses), finite=True, num_layers=1, seed=4),
        )
        assert {name: row[name] for name in [*expected, *settings]} == expected | settings
        curve = study.curves[study.curves["norm"] == row["norm"]]
        assert curve["epoch"].tolist() == [e for e in history["epoch"] if e == 1 or e % 5 == 0]
        assert curve["train_loss"].iloc[1] == losses.iloc[4]
    short = depth(papers, **how, **small, epochs=2, lr=1e-4, progress=False)
    assert short.runs["converged"].isna().all()


def test_the_same_seed_gives_every_norm_the_same_initial_weights(papers):
    one, other = (Variant(norm=n).build(2, papers, 3).state_dict() for n in ("none", "lipschitz"))
    assert all((other[name] == value).all() for name, value in one.items())


@pytest.mark.parametrize(("name", "share"), [("cora", 0.32), ("citeseer", 0.235)])
def test_a_network_that_gives_all_nodes_one_class_is_right_for_few(name, share):
    test = not_bundled(name).test
    shares = test.graph.y[test.nodes].bincount().double() / len(test.nodes)
    assert share - 0.01 < shares.max() < share


def test_a_row_is_what_training_on_hidden_features_gave(papers):
    case = dict(models=["GGNN"], rates=[0.5], layers=[3], seeds=[2], epochs=4, lr=0.01)
    study = missing(papers, **case, constant_rate=True, **SMALL)
    data = hide_features(papers, 0.5, seed=2)
    network = Variant(architecture="ggnn", hidden_channels=8, heads=2).build(3, data, 2)
    schedule = Schedule(epochs=4, lr=0.01, lr_patience=None)
    history = fit(network, data, schedule, seed=2, progress=False).history
    expected = dict(
        test_last=history["test_accuracy"].iloc[-1],
        val_best=history["val_accuracy"].max(),
        **dict(model="GGNN", rate=0.5, num_layers=3, seed=2, dataset=papers.description.title),
        lr_patience=None,
    )
    assert study.runs[[*expected]].to_dict("records") == [expected]
    with pytest.raises(ValueError, match=r"rate: expected a share in \[0, 1\], got 2.0"):
        missing(papers, **case | dict(rates=[2.0]), **SMALL)


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
    (row,) = beside_published(best_layers(runs.assign(rate=0.5))).to_dict("records")
    assert row["published"] == "-" and np.isnan(row["difference"])


def test_the_table_of_gradients_has_medians_ranges_and_overflows():
    rows = [
        dict(heads=2, variant=name, seed=s, epoch=e, kind="weights", norm=n, train_loss=5.0 * e)
        for name, peaks in (("plain", [2e10, 3e7, 5e12]), ("normed", [12.5, 25, np.nan]))
        for s, peak in enumerate(peaks)
        for e, n in ((1, 10.0), (2, peak))
    ]
    table = explosion.gradient_table(
        pd.DataFrame(rows + [r | dict(kind="attention", norm=1e30) for r in rows])
    )
    assert table.loc[2].T.to_dict("list") == {
        "plain": ["2e+10 [3e+07, 5e+12]", "10 [10, 10]", "0/3"],
        "normed": ["18.8 [12.5, 25]", "10 [10, 10]", "1/3"],
    }


def test_peaks_by_dose_are_the_largest_gradients_of_networks_with_the_norm(papers):
    sizes = dict(heads=2, seeds=[5], epochs=3)
    study = explosion.dose(
        papers, rates=[0.0], norm="lipschitz", no_rivals=True, layers=3, hidden=4, **sizes
    )
    assert study.runs["norm"].tolist() == ["lipschitz"] * 2
    rates = [(0.0, 0.0), explosion.PUBLISHED_DROPOUTS]
    for peak, (dropout, attention_dropout) in zip(study.runs["peak"], rates, strict=True):
        of_cell = dict(dropout=dropout, attention_dropout=attention_dropout)
        variant = Variant(norm="lipschitz", hidden_channels=4, heads=2, **of_cell)
        about = dict(num_layers=3, seeds=[5], schedule=Schedule(epochs=3), progress=False)
        gradients = explosion.gradient_evolution(papers, {"": variant}, **about)
        expected = gradients.loc[gradients["kind"] == "weights", "norm"].max()
        assert peak == pytest.approx(expected, rel=1e-6)


def test_no_constant_exceeds_its_bounds():
    table = explosion.constants_against_scale((0.1, 100.0), points=12, progress=False)
    assert (table["constant"] <= table["lemma"] * (1 + 1e-9)).all()
    normalized = table[table["normalized"]]
    assert (normalized["constant"] <= normalized["theorem"]).all() and len(normalized) == 4
    with pytest.raises(ValueError, match="points: expected 2 or more, got 1"):
        explosion.constants_against_scale([1.0], points=1)
