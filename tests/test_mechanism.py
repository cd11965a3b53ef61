"""Why massive activations emerge: scores of k factors, optimizers, and verdicts by hand."""

from dataclasses import replace
from math import pi, sqrt

import numpy as np
import pandas as pd
import pytest
import torch

from studies import mechanism
from studies.data import load


def attention(factors, gate="E", channels=12, heads=3):
    torch.manual_seed(0)
    return mechanism.ProductAttention(channels, heads, factors, gate).double()


@pytest.mark.parametrize("gate", mechanism.GATES)
@pytest.mark.parametrize("factors", [1, 2, 3, 4])
def test_the_score_is_the_sum_or_the_product_of_its_factors(factors, gate):
    model = attention(factors, gate)
    x, e = torch.randn(4, 12).double(), torch.randn(5, 12).double()
    edge_index = torch.tensor([[0, 1, 2, 3, 3], [1, 2, 3, 0, 1]])
    key, query = model.key(x)[edge_index[0]], model.query(x)[edge_index[1]] / 2
    first, second = (e @ w.T for w in (model.edge.weight[:12], model.edge.weight[-12:]))
    gated = {
        "E": lambda edge: edge,
        "1 + E": lambda edge: 1 + edge,
        "normalized E": lambda edge: edge / edge.norm(dim=1, keepdim=True) * sqrt(12),
    }[gate]
    expected = {
        1: (key + first) / 2 + query,
        2: (key + first) * query,
        3: key * query * gated(first),
        4: key * query * gated(first) * gated(second),
    }[factors]
    torch.testing.assert_close(model(x, edge_index, e)[1], expected)


@pytest.mark.parametrize("factors", [1, 2, 3, 4])
def test_an_untrained_row_has_the_spread_of_a_product_of_normals(factors):
    model = attention(factors, channels=512, heads=8)
    x, e = torch.randn(2, 512).double(), torch.randn(1, 512).double()
    score = model(x, torch.tensor([[0], [1]]), e)[1]
    spread = score.abs().log().std().item()
    assert spread == pytest.approx(sqrt(factors) * pi / sqrt(8), rel=0.1)
    predicted = mechanism.PREDICTED.set_index("arm")["start"]
    arm = "reference" if factors == 3 else f"k = {factors}"
    assert predicted[arm] == round(sqrt(factors) * pi / sqrt(8), 2)


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("SGD", lambda p: torch.optim.SGD(p, lr=0.3)),
        ("Adam", lambda p: torch.optim.Adam(p, lr=3e-3)),
        ("AdamW", lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1)),
        ("Adam with L2", lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=1e-4)),
    ],
)
def test_an_optimizer_is_that_of_torch(name, like):
    update, rate, decay = mechanism.OPTIMIZERS[name]
    weights, steps, active = torch.randn(2, 6).double(), torch.zeros(2).double(), torch.ones(2)
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    expected = torch.nn.Parameter(weights.clone())
    optimizer, lr = like([expected]), torch.full((2,), rate).double()
    for _ in range(3):
        expected.grad = torch.randn(2, 6).double()
        gradient = expected.grad + decay * weights
        update(weights, gradient, first, second, steps, lr, active.double())
        optimizer.step()
    torch.testing.assert_close(weights, expected.data)


def test_the_study_measures_every_network_before_and_after(cache):
    splits = load("moses")
    small = dict(seeds=[3, 5], epochs=1, graphs=16, hidden=8, heads=2, progress=False)
    arms = ["reference", "k = 4", "constant targets"]
    study = mechanism.mechanism(splits, arms=arms, **small)
    settings = study.runs[[*mechanism.REFERENCE]].to_dict("records")
    assert settings == [mechanism.REFERENCE | mechanism.ARMS[arm] for arm in arms]
    assert len(study.curves) == 3 * 2 * 2 * 2 and study.curves["max_ratio"].notna().all()
    change = mechanism.changes(study.curves)
    assert change.shape == (6, 3) and (change.abs() > 0).all(axis=None)
    alike = study.curves[study.curves["state"] == "untrained"].set_index("arm")
    same = [alike.loc[arm].reset_index(drop=True) for arm in ("reference", "constant targets")]
    pd.testing.assert_frame_equal(*same)  # only training knows targets
    with pytest.raises(ValueError, match="--arms k = 5: did you mean k = "):
        mechanism.mechanism(replace(splits), arms=["k = 5"], **small)


def test_verdicts_by_hand():
    grown = dict.fromkeys(mechanism.ARMS, (2.0, 0.5, 0.0)) | {"k = 4": (3.0, 0.8, 1.0)}
    rows = [
        dict(arm=arm, seed=seed, state=state, layer=layer, max_ratio=np.exp(row * after - layer))
        | dict(spread_mean=1 + spread * after, max_abs=np.exp(largest * after - layer))
        for arm, (row, spread, largest) in grown.items()
        for seed in range(3)
        for after, state in ((0, "untrained"), (1, "trained"))
        for layer in range(2)
    ]
    assert mechanism.changes(pd.DataFrame(rows)).loc["k = 4"].to_numpy() == pytest.approx(
        np.array([[3, 0.8, 1]] * 3)
    )
    table = mechanism.verdicts(pd.DataFrame(rows))
    assert table.loc["k = 4"].tolist() == ["grows more: yes"] * 3
    assert table.loc["reference"].tolist() == ["grows: yes", "grows: yes", "grows: stays"]
    assert table.loc["SGD"].tolist() == ["stays: grows", "stays: grows", "stays: yes"]
    assert table.loc["k = 2"].tolist()[0] == "grows less: grows"
    rows[-1]["max_ratio"] = rows[-2]["max_ratio"] = 0.9  # one seed of the last arm does not grow
    assert mechanism.verdicts(pd.DataFrame(rows)).loc["constant targets", "row"] == "stays: yes"
