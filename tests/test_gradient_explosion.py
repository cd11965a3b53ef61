"""Constants of attention against the size of its input, and gradients of deep networks."""

import numpy as np
import pandas as pd
import pytest

from studies.__main__ import main
from studies.deep import Variant
from studies.gradient_explosion import (
    GRADIENTS,
    constants_against_scale,
    gradient_evolution,
    gradient_table,
)
from studies.schedule import Schedule


def test_raw_constants_grow_normalised_ones_stay_and_none_exceeds_its_bounds():
    table = constants_against_scale((0.1, 100.0), points=12, progress=False)
    assert (table["constant"] <= table["lemma"] * (1 + 1e-9)).all()
    by_kind = table.set_index(["score", "normalised", "scale"])["constant"].unstack()
    assert (by_kind[0.1] < 1.3).all()
    assert by_kind.loc[("linear", False), 100.0] > 50
    assert by_kind.loc[("quadratic", False), 100.0] > 1000
    flat = by_kind.xs(True, level="normalised")
    np.testing.assert_allclose(flat[0.1], flat[100.0], rtol=0.01)
    is_raw = table["theorem"].isna()
    assert is_raw.tolist() == (~table["normalised"]).tolist()
    assert (table["constant"] <= table["theorem"])[~is_raw].all()
    with pytest.raises(ValueError, match="points: expected 2 or more, got 1"):
        constants_against_scale([1.0], points=1)


def test_of_the_gradients_of_every_network_the_largest_and_one_seed_are_tracked(
    papers, tmp_path, monkeypatch
):
    monkeypatch.setattr("studies.commands.load", lambda name: papers)
    options = ["study", "gradients", "--dataset", "citation", "--layers", "3", "--seeds", "5", "6"]
    options += ["--epochs", "2", "--hidden", "4", "--heads", "2", "-o", str(tmp_path / "g")]
    assert main(options) == 0
    heat, largest = (pd.read_csv(tmp_path / f"g_{name}.csv.gz") for name in ("heat", "largest"))
    assert largest["variant"].unique().tolist() == [*GRADIENTS]
    assert len(largest) == len(GRADIENTS) * 2 * 2 * 2  # seeds, epochs, kinds
    assert set(heat["seed"]) == {5} and len(heat) == len(GRADIENTS) * 2 * 3
    plain = {"plain": Variant(hidden_channels=4, heads=2)}
    settings = dict(seeds=[6], schedule=Schedule(epochs=2), progress=False)
    whole = gradient_evolution(papers, plain, num_layers=3, **settings)
    case = "seed == 6 and epoch == 2 and kind == 'attention'"
    row, rows = largest.query(f"variant == 'no norm' and {case}").squeeze(), whole.query(case)
    assert row["norm"] == pytest.approx(rows["norm"].max(), rel=1e-2)
    assert row["train_loss"] == pytest.approx(rows["train_loss"].iloc[0], rel=1e-2)


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
