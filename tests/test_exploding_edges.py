"""Exploding edges: where they are, what bounds them, and what is left when they are treated."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional
from torch_geometric.data import Batch

from mapkg.hooks import record
from mapkg.models.network import build
from studies import exploding_edges as study
from studies.data.molecules import molecule_graph
from studies.published import CONFIGS
from studies.train import seed_all


@pytest.fixture(scope="module")
def graphs():
    return [molecule_graph(s, 0.5) for s in ("OC1CC1", "C1CCCCCC1CO", "CC(C)(C)C#N", "c1ccccc1C")]


def network():
    """An untrained network whose scores are large enough to matter."""
    seed_all(2)
    sizes = dict(hidden_channels=32, heads=4, num_layers=3)
    model = build(CONFIGS["GT-ZINC"].replace(**sizes)).eval()
    for layer in model.layers:
        layer.attention.edge.weight.data *= 3
    return model


@pytest.fixture
def model():
    return network()


def scores(model, graphs):
    batch = Batch.from_data_list(graphs)
    with torch.no_grad(), record(model, "layers.*.score") as seen:
        predicted = model(batch.x, batch.edge_index, batch.edge_attr, batch.batch)
    return predicted.flatten(), [x[0] for x in seen.values()]


def test_edges_are_described_by_the_atom_and_the_rings_that_they_are_in(model, graphs):
    edges = study.largest_scores(model, graphs)
    first = edges[edges["graph"] == 0].set_index(["source", "target"])
    assert first.loc[(0, 1), ["neighbors", "ring", "largest_ring"]].tolist() == [3, 0, 3]
    assert first.loc[(1, 0), ["neighbors", "ring", "largest_ring"]].tolist() == [1, 0, 3]
    assert first.loc[(1, 2), ["neighbors", "ring", "largest_ring"]].tolist() == [2, 3, 3]
    saturated = edges["atom"] == "saturated carbon"
    assert saturated.groupby(edges["graph"]).sum().tolist() == [7, 17, 7, 1]
    assert (edges["ring"] == 7).sum() == 14 and (edges["ring"] == 6).sum() == 12
    expected = torch.stack([x.abs().amax(dim=1) for x in scores(model, graphs)[1]], dim=1)
    np.testing.assert_allclose(edges[[0, 1, 2]], expected, rtol=1e-5)


def test_shares_count_edges_and_molecules():
    made = {"graph": [0, 0, 1, 1], "ring": [0, 3, 3, 3], 0: [200.0, 1, 2, 3], 1: [1.0, 1, 101, 100]}
    table = study.share_by(pd.DataFrame(made), "ring")
    assert table.loc[0].tolist() == [1, 1, 1, 1]
    assert table.loc[3].tolist() == [3, 1, 2, 1 / 3]


def test_batch_norm_of_the_batch_is_what_torch_has_in_training():
    norm = torch.nn.BatchNorm1d(4)
    norm.weight.data, norm.bias.data = torch.tensor([1.0, -2, 3, 0.5]), torch.randn(4)
    norm.running_mean.normal_(), norm.running_var.uniform_(1, 2)
    x = torch.randn(50, 4)
    expected = functional.batch_norm(x, None, None, norm.weight, norm.bias, True, eps=1e-12)
    torch.testing.assert_close(study._batch_norm(norm, norm.eval()(x)), expected)


def test_parts_of_the_stream_are_taken_away_from_a_layer_on(model, graphs):
    table = study.without(model, graphs, 1)
    edges = study.largest_scores(model, graphs)
    np.testing.assert_allclose(table.loc["nothing"], edges[[0, 1, 2]].max(), rtol=1e-5)
    for name, part in (("feed-forward map", "contract"), ("score in the stream", "project")):
        other = network()
        for layer in other.layers[1:]:
            linear = getattr(layer.edge_block, part)
            linear.weight.data.zero_(), linear.bias.data.zero_()
        largest = [x.abs().max() for x in scores(other, graphs)[1]]
        np.testing.assert_allclose(table.loc[f"the {name}"], largest, rtol=1e-5)


def test_treatments_change_the_exploding_edges_and_as_many_others(model, graphs):
    edges = study.largest_scores(model, graphs)
    edges[[0, 1, 2]] = 0.0
    edges.loc[[3, 4], 1] = study.EXPLODING + 1  # two edges of the first molecule
    with pytest.raises(ValueError, match=r"two molecules or more .* got 1 of 4; look at more"):
        study.treat(model, graphs, edges, first=0)
    edges.loc[len(edges) - 1, 0] = study.EXPLODING + 1  # and one of the last
    treated = study.treat(model, graphs, edges, first=0).set_index(["treatment", "edges"])
    assert (
        treated["graph"].tolist() == [0, 3] * 6 and treated["largest_ring"].tolist() == [3, 6] * 6
    )
    few = [graphs[0], graphs[3]]
    before = (scores(model, few)[0] - 0.5).abs().tolist()
    assert treated["before"].tolist() == pytest.approx(before * 6, rel=1e-5)
    assert (treated.loc["clipped", "after"] == treated.loc["clipped", "before"]).all()

    def averaged(module, inputs, score):
        score = score.clone()
        score[[3, 4, -1]] = score[[0, 1, 2, *range(5, len(score) - 1)]].mean(dim=0)
        return score

    handles = [layer.attention.score.register_forward_hook(averaged) for layer in model.layers]
    after = (scores(model, few)[0] - 0.5).abs().tolist()
    [handle.remove() for handle in handles]
    now = treated.loc[("averaged", "exploding"), "after"]
    assert now.tolist() == pytest.approx(after, rel=1e-5) and abs(after[0] - before[0]) > 1e-5


def test_effects_are_paired_by_molecule():
    made = {"treatment": "clipped", "edges": "other", "before": [1.0, 3.0], "after": [1.1, 3.2]}
    (row,) = study.effects(pd.DataFrame(made), 1).to_dict("records")
    assert row["before"] == 2 and row["after"] == pytest.approx(2.15)
    # Student's interval of 0.1 and 0.2, with one degree of freedom.
    assert row["change"] == pytest.approx(0.15) and row["high"] == pytest.approx(
        0.15 + 0.05 * 12.7062
    )
    assert row["equivalent"] and not study.effects(pd.DataFrame(made), 0.1)["equivalent"].any()
