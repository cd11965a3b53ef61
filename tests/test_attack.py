"""Noise on embeddings: its size at every step, its worst case, and that nothing else moves."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.data import Data

from mapkg.attack import Ascent, attack, scaled, where_massive
from mapkg.evaluation import batches, evaluate, predict
from mapkg.hooks import record
from mapkg.measures import activation_ratio
from mapkg.models import build
from studies.data import molecule_graph
from studies.published import CONFIGS

SMALL = CONFIGS["GT-ZINC"].replace(hidden_channels=16, heads=4, num_layers=2)
SHORT = Ascent(lr=0.01, passes=4)
LONG = Ascent(lr=0.05, passes=600, patience=30)
FAR_BELOW = -1e4


class Linear(nn.Module):
    """The sum over a graph of w x + v e: what noise can do to it is known exactly."""

    def __init__(self, channels=5):
        super().__init__()
        self.node_embedding = nn.Embedding(4, channels)
        self.edge_embedding = nn.Embedding(3, channels)
        self.node_weight = nn.Parameter(torch.randn(channels))
        self.edge_weight = nn.Parameter(torch.randn(channels))
        self.register_buffer("seen", torch.zeros(1))
        self.embedded = []

    def forward(self, x, edge_index, edge_attr, batch, batch_size=None):
        nodes, edges = self.node_embedding(x), self.edge_embedding(edge_attr)
        self.embedded.append((nodes.detach().clone(), edges.detach().clone()))
        out = torch.zeros(batch_size, dtype=nodes.dtype)
        out = out.index_add(0, batch, nodes @ self.node_weight)
        out = out.index_add(0, batch[edge_index[0]], edges @ self.edge_weight)
        return out.unsqueeze(1)


def graph(seed):
    generator = torch.Generator().manual_seed(seed)
    nodes = 4 + seed
    return Data(
        x=torch.randint(4, (nodes,), generator=generator),
        edge_index=torch.randint(nodes, (2, 6 + seed), generator=generator),
        edge_attr=torch.randint(3, (6 + seed,), generator=generator),
        y=torch.full((1, 1), FAR_BELOW, dtype=torch.double),  # so that the loss is linear
    )


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return Linear().double().eval()


@pytest.fixture
def graphs():
    return [graph(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def molecules():
    smiles = ("CC#N", "CCO", "c1ccccc1O", "CC(=O)NC", "N#CCCCl", "C1CCCC1F")
    return 4 * [molecule_graph(text, float(i)) for i, text in enumerate(smiles)]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return build(SMALL).eval()


def run(model, graphs, sigma, *, restarts=(0,), ascent=SHORT, **options):
    return attack(
        model, graphs, [sigma], restarts=restarts, ascent=ascent, progress=False, **options
    )


def everywhere(name):
    rows = {"node_embedding": lambda b: b.num_nodes, "edge_embedding": lambda b: b.num_edges}
    return {name: lambda batch: torch.ones(rows[name](batch), 1)}


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_noise_is_scaled_to_its_standard_deviation_where_the_mask_leaves_it(centred, masked):
    torch.manual_seed(0)
    noise = (torch.randn(7, 5) + 3).double()
    mask = (torch.rand(7, 1) < 0.6).double() if masked else None
    found = scaled(noise, 0.1, centred=centred, mask=mask)
    inside = torch.ones(7, dtype=torch.bool) if mask is None else mask.flatten().bool()
    assert (found[~inside] == 0).all()
    rest = noise[inside] - (noise[inside].mean() if centred else 0)
    torch.testing.assert_close(found[inside], 0.1 * rest / noise[inside].std())


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"relative": True}], ids=str)
def test_at_every_step_what_is_added_has_the_standard_deviation_asked_for(linear, graphs, options):
    run(linear, graphs, 0.2, **options)
    clean, _, *steps = linear.embedded
    assert len(steps) == 1 + SHORT.passes + 1  # random, each pass, optimised
    for disturbed in steps:
        for before, after in zip(clean, disturbed, strict=True):
            added, unit = after - before, before.std().item() if "relative" in options else 1
            if "shared" in options:
                torch.testing.assert_close(added, added[:1].expand_as(added))
                added = added[0]
            assert added.std().item() == pytest.approx(0.2 * unit, abs=1e-6)


@pytest.mark.parametrize("name", ["node_embedding", "edge_embedding"])
def test_the_attack_reaches_the_worst_case_of_a_linear_network(linear, graphs, name):
    masks = everywhere(name)
    found = run(linear, graphs, 0.3, centred=True, masks=masks, ascent=LONG, restarts=[0, 1])
    rows = sum(g.num_nodes if name == "node_embedding" else g.num_edges for g in graphs)
    weight = (linear.node_weight if name == "node_embedding" else linear.edge_weight).detach()
    gradient = weight.expand(rows, -1) / len(graphs)
    # Of centred noise with n entries the one along the centred gradient, of length
    # sigma sqrt(n - 1), raises the loss most.
    worst = 0.3 * (gradient.numel() - 1) ** 0.5 * (gradient - gradient.mean()).norm()
    losses = found.set_index(["noise", "restart"])["loss"].unstack("restart")
    raised = losses.loc["optimised"] - losses.loc["none"]
    assert raised.to_numpy() == pytest.approx(worst.item(), rel=1e-3)
    assert (losses.loc["random"] - losses.loc["none"]).abs().max() < 0.9 * worst


def test_rows_losses_and_gain(network, molecules):
    options = dict(restarts=[0, 1], ascent=Ascent(lr=0.05, passes=15), progress=False)
    # Batches of different sizes, each with noise of its own.
    found = attack(network, molecules, [0.01, 0.1], batch_size=10, **options)
    wide = found.pivot(index=["sigma", "restart"], columns="noise")
    assert wide["loss"].shape == (4, 3) and (found["loss"] == found["mae"]).all()
    losses, gain, passes = wide["loss"], wide["gain"], wide["passes"]
    assert losses["none"].tolist() == pytest.approx(4 * [evaluate(network, molecules)])
    assert (losses["optimised"] > losses["random"]).all()
    expected = losses["optimised"] / losses["random"] - 1
    assert gain["optimised"].tolist() == pytest.approx(expected.tolist())
    assert gain[["none", "random"]].isna().all(axis=None)
    assert (gain["optimised"][0.1] > gain["optimised"][0.01]).all()
    assert (passes == {"none": 0, "optimised": 15, "random": 0}).all(axis=None)
    nodes, edges = (sum(getattr(g, n) for g in molecules) for n in ("num_nodes", "num_edges"))
    assert (found["disturbed"] == 16 * (nodes + edges)).all()


def test_by_default_three_restarts_start_at_each_published_sigma(linear, graphs):
    found = attack(linear, graphs, ascent=Ascent(passes=1), progress=False)
    pairs = found.query("noise == 'random'")[["sigma", "restart"]].to_numpy()
    expected = [(sigma, restart) for sigma in (0.01, 0.0316228, 0.1) for restart in (0, 1, 2)]
    assert pairs == pytest.approx(np.array(expected), rel=1e-6)


def test_an_ascent_ends_below_the_least_rate_and_not_at_it(linear, graphs):
    with torch.no_grad():
        linear.node_weight.zero_()
        linear.edge_weight.zero_()
    # The first pass is the best one, each other halves the rate: 1/8, 1/8, 1/16, 1/32.
    for min_lr, passes in ((1 / 16, 3), (1 / 16 + 1e-9, 2)):
        ascent = Ascent(lr=1 / 8, passes=9, patience=0, min_lr=min_lr)
        found = run(linear, graphs, 0.1, ascent=ascent)
        assert found.set_index("noise")["passes"]["optimised"] == passes


def test_a_small_loss_that_grows_is_not_taken_for_one_that_stays(linear, graphs):
    # The rate falls with the first pass that does not raise the mean loss by 1e-4 of itself.
    ascent = Ascent(lr=0.05, passes=10, patience=0, min_lr=0.04)
    with torch.no_grad():
        linear.node_weight.mul_(1e-4)
        linear.edge_weight.mul_(1e-4)
        (batch,) = batches(graphs, 3)
        clean = predict(linear, batch)
    small = [Data(**g.to_dict()) for g in graphs]
    for g, output in zip(small, clean, strict=True):
        g.y = output.unsqueeze(0) - 1e-2  # far below what noise can do
    found = run(linear, small, 0.1, ascent=ascent).set_index("noise")
    assert found.loc["none", "loss"] == pytest.approx(1e-2)
    assert found.loc["optimised", "gain"] > 10 * 1e-4
    assert found.loc["optimised", "passes"] == 10


@pytest.mark.parametrize("by", ["edges", "channels", "largest"])
def test_masks_leave_what_is_massive_and_controls_as_many_others(network, molecules, by):
    threshold = 10.0
    (batch,) = batches(molecules, 100)
    with torch.no_grad(), record(network, "layers.*.score") as seen:
        predict(network, batch)
    scores = [outputs[0] for outputs in seen.values()]
    massive = torch.stack([activation_ratio(s) > threshold for s in scores]).any(0)
    expected = {
        "edges": massive.any(1, keepdim=True),
        "channels": massive,
        "largest": nn.functional.one_hot(scores[0].abs().argmax(1), 16).bool(),
    }[by]
    assert 0 < expected.double().mean() < 1
    mask = where_massive(network, by, threshold=threshold)(batch)
    assert torch.equal(mask.bool(), expected)
    control = where_massive(network, by, threshold=threshold, control=True)(batch).bool()
    assert not (control & expected).any()
    dim = 0 if by == "edges" else 1
    others = (~expected).sum(dim)
    assert torch.equal(control.sum(dim), torch.minimum(expected.sum(dim), others))
    equal = where_massive(network, by, threshold=threshold, equal=True)(batch).bool()
    assert (expected | ~equal).all()
    assert torch.equal(equal.sum(dim), control.sum(dim))
    again = where_massive(network, by, threshold=threshold, control=True)(batch).bool()
    assert torch.equal(again, control)


def test_a_masked_attack_disturbs_nothing_else(linear, graphs):
    chosen = torch.tensor([1.0, 0.0]).repeat(100)[: sum(g.num_edges for g in graphs)]
    linear.embedded.clear()
    masks = {"edge_embedding": lambda batch: chosen.unsqueeze(1)}
    assert set(run(linear, graphs, 0.2, masks=masks)["disturbed"]) == {5 * int(chosen.sum())}
    (nodes, edges), (nodes_after, edges_after) = linear.embedded[0], linear.embedded[-1]
    assert torch.equal(nodes, nodes_after)
    moved = (edges != edges_after).any(1)
    assert torch.equal(moved, chosen.bool())
    assert (edges_after - edges)[moved].std().item() == pytest.approx(0.2, abs=1e-6)


class Checkpointed(Linear):
    """Computes its embeddings again on the way back."""

    def forward(self, x, edge_index, edge_attr, batch, batch_size=None):
        inputs = x, edge_index, edge_attr, batch, batch_size
        return checkpoint(super().forward, *inputs, use_reentrant=False)


class PartlyCheckpointed(Linear):
    """Computes again what comes after the embeddings alone."""

    def forward(self, x, edge_index, edge_attr, batch, batch_size=None):
        nodes, edges = self.node_embedding(x), self.edge_embedding(edge_attr)
        first = batch, batch[edge_index[0]]

        def rest(nodes, edges):
            values = nodes @ self.node_weight, edges @ self.edge_weight
            out = torch.zeros(batch_size, dtype=nodes.dtype)
            return sum(out.index_add(0, *pair) for pair in zip(first, values, strict=True))

        return checkpoint(rest, nodes, edges, use_reentrant=False).unsqueeze(1)


def test_embeddings_that_are_computed_again_on_the_way_back_are_refused_and_others_not(graphs):
    models = []
    for kind in (Linear, PartlyCheckpointed, Checkpointed):
        torch.manual_seed(0)
        models.append(kind().double().eval())
    expected, found = (run(model, graphs, 0.3)["loss"].tolist() for model in models[:2])
    assert found == pytest.approx(expected)
    with pytest.raises(
        RuntimeError, match="'node_embedding' is edited under activation checkpoint"
    ):
        run(models[2], graphs, 0.3)


def with_targets(*values):
    """The graphs with other targets."""
    changed = [graph(seed) for seed in range(len(values))]
    for each, value in zip(changed, values, strict=True):
        each.y = value if value is None else torch.full((1, 1), value).double()
    return changed


NOWHERE = {"node_embedding": lambda batch: torch.zeros(batch.num_nodes, 1)}
BAD = [
    *(({"sigmas": [s]}, "sigma: .* above 0, got " + str(s)) for s in (0.0, -0.1, torch.nan)),
    ({"sigmas": [torch.inf]}, "sigma: expected a standard deviation above 0, got inf"),
    ({"sigmas": []}, "sigmas: expected at least one"),
    ({"restarts": []}, "restarts: expected at least one"),
    ({"batch_size": 0}, "batch_size: expected 1 graph or more, got 0"),
    ({"graphs": []}, "expected graphs to attack, got none"),
    *(
        ({"graphs": with_targets(1.0, bad)}, "targets: expected numbers for loss 'l1', got NaN or")
        for bad in (torch.nan, torch.inf, -torch.inf)
    ),
    ({"graphs": with_targets(1.0, None)}, "graph 1 has no target y"),
    ({"graphs": with_targets(1.0, 2.0), "loss": "bce"}, "loss 'bce': expected targets 0, 1 or NaN"),
    ({"graphs": with_targets(*[torch.nan] * 2), "loss": "bce"}, "every target is NaN"),
    ({"shared": True, "masks": everywhere("node_embedding")}, "masks: expected none with shared"),
    ({"masks": NOWHERE}, "two entries or more to disturb, got 0"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input_is_an_error_that_says_what_was_expected(linear, graphs, changes, words):
    with pytest.raises(ValueError, match=words):
        attack(linear, **{"graphs": graphs, "progress": False} | changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0.0), ("passes", 0), ("patience", -1), ("min_lr", torch.nan), ("lr", torch.inf)],
)
def test_an_ascent_that_cannot_end_or_begin_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a number above 0, got {value}"):
        Ascent(**{name: value})


def test_a_threshold_that_is_no_ratio_an_unknown_mask_and_another_network_are_errors(network):
    for threshold in (torch.nan, 0.0, -1.0):
        with pytest.raises(ValueError, match=f"threshold: .* above 0, got {threshold}"):
            where_massive(network, threshold=threshold)
    with pytest.raises(ValueError, match=r"by: expected one of \('edges', 'channels', 'largest'\)"):
        where_massive(network, "nodes")
    with pytest.raises(KeyError, match="node_embedding"):
        attack(nn.Sequential(nn.Linear(2, 2)), [graph(0)], progress=False)
