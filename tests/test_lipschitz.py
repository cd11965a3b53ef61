"""Local constants against exact Jacobians, and bounds that nothing exceeds."""

import itertools
import math

import pytest
import torch
from random_graphs import random_graph
from torch_geometric.nn import GATConv

from mapkg.lipschitz import (
    ALPHA,
    attention,
    gat_bound,
    lemma_bound,
    linear_score,
    local_constant,
    quadratic_score,
    slope,
    theorem_bound,
    tied_keys,
)
from mapkg.lipschitz_norm import lipschitz_normalise


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_the_constant_of_a_linear_map_is_its_largest_singular_value():
    matrix = normal(5, 7)
    expected = torch.linalg.svdvals(matrix)[0].item()
    both = normal(3, seed=1), normal(4, seed=2)
    for size in (4096, 0):  # of all inputs together, written out or by Lanczos iterations
        found = local_constant(lambda x, y: matrix @ torch.cat([x, y]), *both, exact_size=size)
        assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="one input or more"):
        local_constant(lambda: torch.ones(1))
    with pytest.raises(ValueError, match="finite values"):
        local_constant(lambda x: x / 0, torch.ones(2))
    tiny = local_constant(lambda x: 1e-30 * (matrix @ x), normal(7), exact_size=0)
    assert tiny == pytest.approx(1e-30 * expected, rel=1e-5)
    for size in (4096, 0):  # where derivatives vanish, or are infinite
        assert local_constant(lambda x: (x - 9).relu(), both[0], exact_size=size) == 0
        with pytest.raises(ValueError, match="differentiable"):
            local_constant(torch.sqrt, torch.zeros(3).double(), exact_size=size)


def test_scores_by_hand():
    query = torch.tensor([[3.0, 0.0], [0.0, 4.0]])  # of norm 5
    key = torch.tensor([[1.0, 2.0], [2.0, 0.0], [0.0, 0.0]])  # of norms up to sqrt 5
    value = torch.tensor([[0.0, 7.0], [1.0, 0.0], [0.0, 0.0]])  # of norms up to 7
    score = torch.tensor([[3.0, 6.0, 0.0], [8.0, 0.0, 0.0]])
    torch.testing.assert_close(linear_score(key, query), score)
    normalized = linear_score(key, query, normalized=True)
    torch.testing.assert_close(normalized, score / (5 * math.sqrt(5)))
    torch.testing.assert_close(quadratic_score(query, key, value), score)
    # The largest product of two of the norms is that of the first, the second and third, in turn.
    uvw = (((1, 1, 1), 35.0), ((1, 1, 1 / 7), 5 * 5**0.5), ((0.1, 1, 1), 7 * 5**0.5))
    for factors, largest in uvw:
        q, k, v = (f * x for f, x in zip(factors, (query, key, value), strict=True))
        found = quadratic_score(q, k, v, normalized=True)
        torch.testing.assert_close(found, factors[0] * score / largest)


def test_tied_keys_by_hand():
    # In the plane there are two directions across: keys 10 (q + u), 10 (q - u), -10 q for q = e1.
    found = tied_keys(torch.tensor([2.0, 0.0]), 3, 10.0)
    assert found[:, 0].tolist() == [10, 10, -10]
    assert found[0, 1] == -found[1, 1] and found[0, 1].abs() == 10
    assert found[2, 1] == 0
    assert len(tied_keys(torch.ones(2), 2, 1.0)) == 2


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_the_lemma_holds_and_of_normalized_attention_the_theorem(kind, normalized):
    closest = 0.0
    for seed, scale in itertools.product(range(3), (0.1, 1.0, 10.0, 100.0)):
        query = normal(6, 4, seed=seed)

        def score(point, query=query):
            if kind == "linear":
                return linear_score(point, query, normalized=normalized)
            return quadratic_score(*point.split(6), normalized=normalized)

        drawn = tied_keys(query[0], 6, scale, torch.Generator().manual_seed(0))
        for x in (scale * normal(6, 4, seed=1000 + seed), drawn):
            point = x if kind == "linear" else torch.cat([query, x, x])
            found = local_constant(lambda p: attention(score(p), p[-6:]), point)
            steep = slope(score, point)
            if kind == "linear" and not normalized:
                steep = torch.linalg.matrix_norm(query, 2).item()
            tight, loose = (lemma_bound(score(point), x, steep, tight=t) for t in (True, False))
            assert found <= tight * (1 + 1e-9) <= loose * (1 + 2e-9)
            if normalized:
                assert found <= theorem_bound(ALPHA[kind], 6, 6, tight=True)
            closest = max(closest, found / loose)
    assert closest > 0.1  # no idle bound


def test_the_lemma_and_the_theorem_in_numbers():
    # Each of two queries attends to one key: S is the identity, of norms sqrt 2 and 1.
    scores = 1000 * torch.eye(2)
    value = torch.tensor([[3.0, 4.0], [0.0, 1.0]])  # the larger one of norm 5
    assert lemma_bound(scores, value, 2.0) == pytest.approx(11 * math.sqrt(2))
    assert lemma_bound(scores, value, 2.0, tight=True) == pytest.approx(11)
    # Both attend to the first key: S has a column of ones.
    together = torch.tensor([[1000.0, 0.0], [1000.0, 0.0]])
    assert lemma_bound(together, value, 2.0, tight=True) == pytest.approx(math.sqrt(2) + 10)
    assert theorem_bound(1.0, 4, 16) == pytest.approx(math.e / 2 + math.sqrt(8))
    assert theorem_bound(0.0, 3, 3) == 1
    assert theorem_bound(1.0, 1, 1, tight=True) == pytest.approx(math.e + 2)
    for alpha, queries in ((-1.0, 3), (1.0, 0)):
        with pytest.raises(
            ValueError, match=f"alpha of 0 or more.*alpha={alpha}, queries={queries}"
        ):
            theorem_bound(alpha, queries, 3)


def gat(seed=0, heads=2, scale=1.0, **options):
    torch.manual_seed(seed)
    return lipschitz_normalise(GATConv(5, 3, heads, **options).double().eval(), scale=scale)


def test_the_bound_of_a_layer_in_numbers():
    # Of four nodes that all see each other L_i = e^(1/f) / 2 + 4 / f, and the sum of four squares
    # of it has the root 2 L_i. Two heads of spectral norms 3 and 4 have 5 together, or 3.5 on
    # average.
    everyone = torch.cartesian_prod(torch.arange(4), torch.arange(4)).t()
    for scale, concat, heads in ((1.0, True, 5.0), (2.0, True, 5.0), (1.0, False, 3.5)):
        layer = gat(scale=scale, concat=concat)
        with torch.no_grad():
            layer.lin.weight.zero_()
            layer.lin.weight[0, 0], layer.lin.weight[3, 1] = 3.0, 4.0  # each head has three rows
        expected = heads * (math.exp(1 / scale) + 8 / scale)
        assert gat_bound(layer, everyone, 4) == pytest.approx(expected)
        layer.negative_slope, layer.score_norm.norm.scale = -5.0, 5 * scale
        assert gat_bound(layer, everyone, 4) == pytest.approx(expected)
    # A star: all send to node 0, which has four neighbors, and to themselves.
    star, layer = torch.tensor([[1, 2, 3], [0, 0, 0]]), gat(heads=1, residual=True)
    with torch.no_grad():
        layer.lin.weight.copy_(torch.eye(3, 5))
        layer.res.weight.copy_(7 * torch.eye(3, 5))
    center, alone = math.e / 2 + 4, math.e + 4
    assert gat_bound(layer, star, 4) == pytest.approx(math.hypot(center, alone) + 7)
    layer.flow = "target_to_source"  # all have two neighbors, and node 0 is one of all
    alone, others = math.e + 4, math.e / math.sqrt(2) + 4
    expected = math.hypot(alone, *[others] * 3) + 7
    assert gat_bound(layer, star, 4) == pytest.approx(expected)


OPTIONS = [{}, {"heads": 3, "concat": False}, {"residual": True}, {"scale": 4.0}]
OPTIONS += [{"residual": True, "concat": False}, {"residual": True, "heads": 3}]


@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_normalised_layer_stays_below_its_bound(options, flow):
    closest = 0.0
    for seed in range(4):
        x, edge_index, _ = random_graph(300 + seed, channels=5)
        layer = gat(seed, flow=flow, **options)
        bound = gat_bound(layer, edge_index, len(x))
        for size in (0.1, 1.0, 1e3):
            found = local_constant(lambda x, layer=layer, e=edge_index: layer(x, e), size * x)
            assert found <= bound
            closest = max(closest, found / bound)
    assert closest > 0.05


def test_a_graph_without_self_loops_and_a_raw_layer_are_refused():
    x, edge_index, _ = random_graph(0, channels=5)
    for layer, words in (
        (gat(add_self_loops=False), "of 9 have no self-loop; the bound needs them"),
        (GATConv(5, 3), "got one that is not normalized"),
        (lipschitz_normalise(GATConv(5, 3), "published"), "got mode 'published'"),
    ):
        with pytest.raises(ValueError, match=words):
            gat_bound(layer, edge_index, len(x))
    for far in (edge_index + 9, edge_index - 9):
        with pytest.raises(ValueError, match="edge_index: expected nodes from 0 to 8, got"):
            gat_bound(gat(), far, 9)
    some = torch.tensor([0, 0, 1]).repeat(2, 1)  # loops of two nodes, one of them twice
    with pytest.raises(ValueError, match="7 of 9 have no self-loop"):
        gat_bound(gat(add_self_loops=False), some, 9)
