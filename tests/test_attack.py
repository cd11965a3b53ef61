"""Noise on embeddings: its size at every step, its worst case, and that nothing else moves."""

from itertools import product

import pytest
import torch
from torch import nn
from torch_geometric.data import Data

from mapkg.attack import Ascent, TooFewEntries, attack, scaled, where_massive
from mapkg.evaluation import batches, evaluate, predict
from mapkg.hooks import record
from mapkg.measures import activation_ratio
from mapkg.models import build
from studies.data import molecule_graph
from studies.published import CONFIGS

SHORT = Ascent(lr=0.01, passes=4)
LONG = Ascent(lr=0.05, passes=600, patience=30)


class Linear(nn.Module):
    """The sum over a graph of w x + v e: what noise can do to it is known exactly."""

    def __init__(self, channels=5):
        super().__init__()
        self.node_embedding = nn.Embedding(4, channels)
        self.edge_embedding = nn.Embedding(3, channels)
        self.node_weight = nn.Parameter(torch.randn(channels))
        self.edge_weight = nn.Parameter(torch.randn(channels))
        self.embedded = []

    def forward(self, x, edge_index, edge_attr, batch, batch_size=None):
        nodes, edges = self.node_embedding(x), self.edge_embedding(edge_attr)
        self.embedded.append((nodes.detach().clone(), edges.detach().clone()))
        out = nodes.new_zeros(batch_size).index_add(0, batch, nodes @ self.node_weight)
        out = out.index_add(0, batch[edge_index[0]], edges @ self.edge_weight)
        return out.unsqueeze(1)


def graph(seed):
    generator = torch.Generator().manual_seed(seed)
    nodes = 4 + seed
    return Data(
        x=torch.randint(4, (nodes,), generator=generator),
        edge_index=torch.randint(nodes, (2, 6 + seed), generator=generator),
        edge_attr=torch.randint(3, (6 + seed,), generator=generator),
        y=torch.full((1, 1), -1e4).double(),  # so that the loss is linear
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
    return build(CONFIGS["GT-ZINC"].replace(hidden_channels=16, heads=4, num_layers=2)).eval()


def run(model, graphs, sigma, **options):
    options = {"restarts": (0,), "ascent": SHORT, "progress": False} | options
    return attack(model, graphs, [sigma], **options)


def mask_of(kind, value):
    """The mask of one embedding with the same value everywhere."""
    return {f"{kind}_embedding": lambda b: torch.full((getattr(b, f"num_{kind}s"), 1), value)}


def test_noise_is_scaled_to_its_standard_deviation_where_the_mask_leaves_it():
    noise, mask = (
        torch.tensor([[1.0, 3.0], [50.0, 60.0], [5.0, 7.0]]),
        torch.tensor([[1.0], [0], [1]]),
    )
    deviation = (20 / 3) ** 0.5  # of 1, 3, 5 and 7, whose mean is 4
    for mean in (0, 4):
        found = scaled(noise, 0.1, centered=mean > 0, mask=mask)
        expected = 0.1 * mask * (noise - mean) / deviation
        torch.testing.assert_close(found, expected)
        whole = scaled(noise[[0, 2]], 0.1, centered=mean > 0)
        torch.testing.assert_close(whole, expected[[0, 2]])


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


@pytest.mark.parametrize("kind", ["node", "edge"])
def test_the_attack_reaches_the_worst_case_of_a_linear_network(linear, graphs, kind):
    masks = mask_of(kind, 1.0)
    found = run(linear, graphs, 0.3, centered=True, masks=masks, ascent=LONG, restarts=[0, 1])
    rows = sum(getattr(graph, f"num_{kind}s") for graph in graphs)
    weight = getattr(linear, f"{kind}_weight").detach()
    gradient = weight.expand(rows, -1) / len(graphs)
    # Of centered noise with n entries the one along the centered gradient, of length
    # sigma sqrt(n - 1), raises the loss most.
    worst = 0.3 * (gradient.numel() - 1) ** 0.5 * (gradient - gradient.mean()).norm()
    losses = found.set_index(["noise", "restart"])["loss"].unstack("restart")
    raised = losses.loc["optimised"] - losses.loc["none"]
    assert raised.to_numpy() == pytest.approx(worst.item(), rel=1e-3)
    assert (losses.loc["random"] - losses.loc["none"]).abs().max() < 0.9 * worst


def test_a_batch_without_edges_is_disturbed_at_its_nodes(linear, graphs):
    alone = graphs[0].clone()
    alone.edge_index, alone.edge_attr = alone.edge_index[:, :0], alone.edge_attr[:0]
    table = run(linear, [alone, graphs[1]], 0.1, batch_size=1)
    assert (table.loc[table["noise"] != "none", "loss"] != table["loss"].iloc[0]).all()
    edges, linear = mask_of("edge", 1.0), linear.requires_grad_(False)
    table = run(linear, [alone, graphs[1]], 0.1, batch_size=1, masks=edges)
    assert table["disturbed"].unique() == graphs[1].num_edges * 5
    with pytest.raises(TooFewEntries, match="got none in any graph"):
        run(linear, [alone], 0.1, masks=edges)


def test_rows_losses_and_gain(network, molecules):
    options = dict(ascent=Ascent(lr=0.05, passes=15), progress=False)
    # Batches of different sizes, each with noise of its own; three restarts of each size.
    found = attack(network, molecules, batch_size=10, **options)
    wide = found.pivot(index=["sigma", "restart"], columns="noise")
    assert wide["loss"].shape == (9, 3) and (found["loss"] == found["mae"]).all()
    assert [*wide.index] == [*product((0.01, 10**-1.5, 0.1), (0, 1, 2))]
    losses, gain, passes = wide["loss"], wide["gain"], wide["passes"]
    assert losses["none"].tolist() == pytest.approx(9 * [evaluate(network, molecules)])
    assert (losses["optimised"] > losses["random"]).all()
    expected = losses["optimised"] / losses["random"] - 1
    assert gain["optimised"].tolist() == pytest.approx(expected.tolist())
    assert gain[["none", "random"]].isna().all(axis=None)
    assert (gain["optimised"][0.1] > gain["optimised"][0.01]).all()
    assert (passes == {"none": 0, "optimised": 15, "random": 0}).all(axis=None)
    nodes, edges = (sum(getattr(g, n) for g in molecules) for n in ("num_nodes", "num_edges"))
    assert (found["disturbed"] == 16 * (nodes + edges)).all()


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
    with torch.no_grad():
        linear.node_weight.mul_(1e-4)
        linear.edge_weight.mul_(1e-4)
        for g, output in zip(graphs, predict(linear, next(batches(graphs, 3))), strict=True):
            g.y = output.unsqueeze(0) - 1e-2  # far below what noise can do
    ascent = Ascent(lr=0.05, passes=10, patience=0, min_lr=0.04)
    found = run(linear, graphs, 0.1, ascent=ascent).set_index("noise")
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
    mask, control, again = (
        where_massive(network, by, threshold=threshold, control=c)(batch).bool()
        for c in (False, True, True)
    )
    assert not (control & expected).any() and (expected | ~mask).all()
    dim = 0 if by == "edges" else 1
    number = torch.minimum(expected.sum(dim), (~expected).sum(dim))
    assert torch.equal(control.sum(dim), number) and torch.equal(mask.sum(dim), number)
    assert torch.equal(again, control)


def test_a_masked_attack_disturbs_nothing_else(linear, graphs):
    chosen = torch.tensor([1.0, 0.0]).repeat(100)[: sum(g.num_edges for g in graphs)]
    masks = {"edge_embedding": lambda batch: chosen.unsqueeze(1)}
    assert set(run(linear, graphs, 0.2, masks=masks)["disturbed"]) == {5 * int(chosen.sum())}
    (nodes, edges), (nodes_after, edges_after) = linear.embedded[0], linear.embedded[-1]
    assert torch.equal(nodes, nodes_after)
    moved = (edges != edges_after).any(1)
    assert torch.equal(moved, chosen.bool())
    assert (edges_after - edges)[moved].std().item() == pytest.approx(0.2, abs=1e-6)


def with_targets(*values):
    as_y = [None if value is None else torch.full((1, 1), value).double() for value in values]
    return [graph(seed).update({"y": y}) for seed, y in enumerate(as_y)]


BAD = [
    *(({"sigmas": [s]}, f"sigma: .* above 0, got {s}") for s in (0.0, -0.1, torch.nan, torch.inf)),
    *(({name: []}, f"{name}: expected at least one") for name in ("sigmas", "restarts", "graphs")),
    ({"batch_size": 0}, "batch_size: expected 1 graph or more, got 0"),
    *(
        ({"graphs": with_targets(1.0, bad)}, "expected numbers as targets of loss 'l1', got NaN or")
        for bad in (torch.nan, torch.inf, -torch.inf)
    ),
    ({"graphs": with_targets(1.0, None)}, "graph 1 has no target y"),
    ({"shared": True, "masks": mask_of("node", 1.0)}, "masks: expected none with shared"),
    ({"masks": mask_of("node", 0.0)}, "two entries or more to disturb, got 0"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input_is_an_error_that_says_what_was_expected(linear, graphs, changes, words):
    with pytest.raises(ValueError, match=words):
        attack(linear, **{"graphs": graphs, "progress": False} | changes)


def test_other_bad_arguments_are_errors_that_say_what_was_expected(network):
    values = ("lr", 0.0), ("passes", 0), ("patience", -1), ("min_lr", torch.nan), ("lr", torch.inf)
    for name, value in values:
        with pytest.raises(ValueError, match=f"{name}: expected a number above 0, got {value}"):
            Ascent(**{name: value})
    for threshold in (torch.nan, 0.0):
        with pytest.raises(ValueError, match=f"threshold: .* above 0, got {threshold}"):
            where_massive(network, threshold=threshold)
    with pytest.raises(ValueError, match=r"by: expected one of \('edges', 'channels', 'largest'\)"):
        where_massive(network, "nodes")
    with pytest.raises(KeyError, match="node_embedding"):
        attack(nn.Sequential(nn.Linear(2, 2)), [graph(0)], progress=False)
