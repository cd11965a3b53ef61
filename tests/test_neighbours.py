"""Neighbour sampling: incoming edges, uniform subsets, exact neighbourhoods, batches of seeds."""

from collections import Counter
from itertools import combinations

import networkx
import pytest
import torch
from scipy.stats import chisquare
from torch_geometric.nn import TransformerConv
from torch_geometric.utils import to_undirected

from studies.extras.neighbours import ALL, InEdges, SeedNodes, check_fan_outs, sample, subsets

NUM_NODES = 150
NO_EDGES = (37, 149)
"""Nodes of the random graph that no edge touches."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pairs():
    """The undirected edges of a random graph, hubs and unconnected nodes among its nodes."""
    weight = torch.rand(NUM_NODES, generator=generator(1)).pow(-0.5)
    weight[list(NO_EDGES)] = 0
    ends = weight.repeat(400, 1).multinomial(2, generator=generator(2))
    distinct = ends.sort(dim=1).values.unique(dim=0)
    return distinct[torch.randperm(len(distinct), generator=generator(3))]


@pytest.fixture(scope="module")
def edges(pairs):
    return InEdges.of_undirected(pairs.int(), NUM_NODES)


@pytest.fixture(scope="module")
def split(pairs, edges):
    """90 seeds, one of them without edges, on the random graph."""
    seeds = torch.cat([torch.tensor([37]), torch.arange(0, 89).flip(0) + 40])
    return SeedNodes(
        seeds=seeds,
        edges=edges,
        x=torch.arange(NUM_NODES) % 8,
        edge_attr=torch.rand(len(pairs), 8, generator=generator(4)),
        y=torch.rand(NUM_NODES, 5, generator=generator(5)),
        fan_outs=(2, 3, 4),
    )


def distances(pairs, seeds):
    """Hops from the seeds to every node that can be reached, by breadth-first search."""
    graph = networkx.Graph(pairs.tolist())
    graph.add_nodes_from(range(NUM_NODES))
    return networkx.multi_source_dijkstra_path_length(graph, set(seeds.tolist()), weight=None)


# ------------------------------------------------------------------------------
# Incoming edges


def test_the_incoming_edges_of_a_triangle_are_those_written_by_hand():
    edges = InEdges.of_undirected(torch.tensor([[0, 1], [1, 2], [0, 2]]), 4)
    assert edges.num_nodes == 4
    assert edges.indptr.tolist() == [0, 2, 4, 6, 6]
    assert edges.sources.tolist() == [1, 2, 0, 2, 1, 0]
    assert edges.edge_ids.tolist() == [0, 2, 0, 1, 1, 2]


def test_every_edge_comes_in_both_directions_with_its_own_row(pairs, edges):
    targets = torch.arange(NUM_NODES).repeat_interleave(edges.indptr.diff())
    found = sorted(
        zip(edges.sources.tolist(), targets.tolist(), edges.edge_ids.tolist(), strict=True)
    )
    edge_index, rows = to_undirected(pairs.t(), torch.arange(len(pairs)))
    assert found == sorted(zip(*edge_index.tolist(), rows.tolist(), strict=True))


def test_the_large_arrays_keep_the_narrow_type_of_the_edges(edges):
    assert edges.sources.dtype == edges.edge_ids.dtype == torch.int32


def test_a_repeated_edge_and_a_self_loop_stay_as_they_are():
    edges = InEdges.of_undirected(torch.tensor([[0, 1], [0, 1], [1, 1]]), 2)
    assert edges.sources.tolist() == [1, 1, 0, 0, 1, 1]
    assert edges.edge_ids.tolist() == [0, 1, 0, 1, 2, 2]


# ------------------------------------------------------------------------------
# Drawing


def test_every_subset_is_equally_likely():
    drawn = subsets(torch.full((40_000,), 6), 3, generator())
    counts = Counter(map(tuple, drawn.sort(dim=1).values.tolist()))
    assert set(counts) == set(combinations(range(6), 3))
    assert chisquare(list(counts.values())).pvalue > 0.01


def test_subsets_are_distinct_numbers_below_each_size():
    sizes = torch.arange(4, 3000)
    drawn = subsets(sizes, 4, generator()).sort(dim=1).values
    assert (drawn.diff(dim=1) > 0).all()
    assert (drawn >= 0).all() and (drawn < sizes[:, None]).all()
    assert drawn[0].tolist() == [0, 1, 2, 3]


def test_every_neighbour_is_drawn_equally_often(edges):
    degree = edges.indptr.diff()
    node = int(degree.argmax())
    target, drawn = edges.draw(torch.full((20_000,), node), 5, generator())
    assert target.bincount().unique().tolist() == [5]
    counts = (drawn - edges.indptr[node]).bincount(minlength=int(degree[node]))
    # Draws without replacement vary less than chisquare's independent ones, by this factor.
    spread = (degree[node] - 5) / (degree[node] - 1)
    statistic, _ = chisquare(counts.numpy())
    expected = float(spread * (degree[node] - 1))
    assert abs(statistic - expected) < 3 * (2 * float(spread) * expected) ** 0.5


def test_each_node_gives_the_fan_out_or_all_it_has(edges):
    nodes = torch.arange(NUM_NODES).flip(0)
    degree = edges.indptr.diff()[nodes]
    assert degree.min() == 0 and degree.max() > 4
    target, drawn = edges.draw(nodes, 4, generator())
    assert torch.equal(target.bincount(minlength=NUM_NODES), degree.clamp(max=4))
    assert (drawn >= edges.indptr[nodes[target]]).all()
    assert (drawn < edges.indptr[nodes[target] + 1]).all()
    assert len(drawn.unique()) == len(drawn)


def test_all_edges_are_drawn_once_in_their_order(edges):
    _, drawn = edges.draw(torch.arange(NUM_NODES), ALL)
    assert torch.equal(drawn, torch.arange(len(edges.sources)))


# ------------------------------------------------------------------------------
# Neighbourhoods


def test_with_all_edges_the_sample_is_what_can_reach_the_seeds_in_time(pairs, edges):
    seeds = torch.tensor([60, 3])
    hops = distances(pairs, seeds)
    n_id, edge_index, edge_ids = sample(edges, seeds, (ALL, ALL))
    assert set(n_id.tolist()) == {node for node, hop in hops.items() if hop <= 2}
    assert 10 < len(n_id) < NUM_NODES - len(NO_EDGES), "the test needs nodes out of reach"
    in_time = {
        (source, target, row)
        for row, pair in enumerate(pairs.tolist())
        for source, target in (pair, pair[::-1])
        if hops.get(target, NUM_NODES) <= 1
    }
    found = list(zip(*n_id[edge_index].tolist(), edge_ids.tolist(), strict=True))
    assert len(found) == len(in_time)
    assert set(found) == in_time


def test_sampled_edges_are_real_distinct_and_have_their_own_row(pairs, edges):
    seeds = torch.tensor([60, 3, 99])
    n_id, edge_index, edge_ids = sample(edges, seeds, (3, 2, 4), generator())
    assert torch.equal(n_id[:3], seeds)
    assert len(n_id.unique()) == len(n_id)
    ends = n_id[edge_index].t().sort(dim=1).values
    assert torch.equal(ends, pairs[edge_ids])
    directed = list(zip(*edge_index.tolist(), strict=True))
    assert len(set(directed)) == len(directed)


def test_the_last_fan_out_is_that_of_the_seeds():
    complete = torch.combinations(torch.arange(60))
    edges = InEdges.of_undirected(complete, 60)
    n_id, edge_index, _ = sample(edges, torch.tensor([7]), (1, 2, 3), generator())
    in_degree = edge_index[1].bincount(minlength=len(n_id)).tolist()
    assert in_degree[:4] == [3, 2, 2, 2], "a seed with 3 in-neighbours, and theirs"
    outer = in_degree[4:]
    reached = outer.count(1)
    assert 1 <= reached <= 6 and outer == [1] * reached + [0] * (len(outer) - reached)


def test_a_node_is_expanded_once_however_often_it_is_reached():
    pair = InEdges.of_undirected(torch.tensor([[0, 1]]), 2)
    n_id, edge_index, edge_ids = sample(pair, torch.tensor([0]), (5, 5, 5), generator())
    assert n_id.tolist() == [0, 1]
    assert edge_index.tolist() == [[1, 0], [0, 1]]
    assert edge_ids.tolist() == [0, 0]


def test_a_seed_without_edges_is_alone(edges):
    n_id, edge_index, edge_ids = sample(edges, torch.tensor([37]), (2, 3, 4), generator())
    assert n_id.tolist() == [37]
    assert edge_index.shape == (2, 0) and edge_ids.shape == (0,)


def test_one_random_seed_gives_one_sample(edges):
    seeds = torch.arange(10)
    one, same, other = (sample(edges, seeds, (2, 2), generator(seed)) for seed in (1, 1, 2))
    assert all(map(torch.equal, one, same))
    assert not torch.equal(one[2], other[2])


def test_a_seed_that_occurs_twice_is_refused(edges):
    with pytest.raises(ValueError, match="distinct seeds"):
        sample(edges, torch.tensor([4, 5, 4]), (2,))


class Network(torch.nn.Module):
    """Attention with edge features, in float64."""

    def __init__(self, num_layers):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(8, 6, dtype=torch.double)
        self.layers = torch.nn.ModuleList(
            TransformerConv(6, 3, heads=2, edge_dim=8).double() for _ in range(num_layers)
        )

    def forward(self, x, edge_index, edge_attr):
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x, edge_index, edge_attr.double()).tanh()
        return x


@torch.no_grad()
def largest_error(network, split, fan_outs):
    """Largest difference between the seeds' outputs in batches and on the whole graph."""
    edges = split.edges
    whole = network(
        split.x,
        torch.stack(
            [
                edges.sources.long(),
                torch.arange(edges.num_nodes).repeat_interleave(edges.indptr.diff()),
            ]
        ),
        split.edge_attr[edges.edge_ids],
    )
    batched = SeedNodes(**{**vars(split), "fan_outs": fan_outs}).loader(4, shuffle=False)
    outputs = [
        network(batch.x, batch.edge_index, batch.edge_attr)[: batch.batch_size] for batch in batched
    ]
    return (torch.cat(outputs) - whole[split.seeds]).abs().max().item()


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_with_all_edges_the_seeds_get_what_the_whole_graph_gives_them(num_layers, split):
    network = Network(num_layers)
    assert largest_error(network, split, (ALL,) * num_layers) < 1e-12
    if num_layers > 1:  # one hop too few must show, or the test shows nothing
        assert largest_error(network, split, (ALL,) * (num_layers - 1)) > 1e-6
    assert largest_error(network, split, (2,) * num_layers) > 1e-6


# ------------------------------------------------------------------------------
# Fan-outs


@pytest.mark.parametrize(
    ("fan_outs", "num_layers", "message"),
    [
        ((5, 10, 15, 1), 3, r"each of the 3 layers, got 4: \(5, 10, 15, 1\)"),
        ((5, 10), 3, "each of the 3 layers, got 2"),
        ((5, 0, 15), 3, "must be positive, or -1 for all edges; got 0"),
        ((5, -2, 15), 3, "got -2"),
    ],
)
def test_fan_outs_that_do_not_fit_are_refused(fan_outs, num_layers, message):
    with pytest.raises(ValueError, match=message):
        check_fan_outs(fan_outs, num_layers)


def test_a_split_refuses_a_fan_out_of_nothing(split):
    with pytest.raises(ValueError, match="must be positive"):
        SeedNodes(**{**vars(split), "fan_outs": (2, 0)})


# ------------------------------------------------------------------------------
# Seeds in batches


def signature(batches):
    """Everything that was drawn, as plain values."""
    return [(batch.n_id.tolist(), batch.edge_index.tolist()) for batch in batches]


def test_batches_hold_every_seed_once_and_in_order(split):
    loader = split.loader(40, shuffle=False)
    batches = list(loader)
    assert len(split) == 90 and len(loader) == 3
    assert [batch.batch_size for batch in batches] == [40, 40, 10]
    seeds = torch.cat([batch.n_id[: batch.batch_size] for batch in batches])
    assert torch.equal(seeds, split.seeds)


def test_a_batch_carries_the_features_of_its_own_nodes_and_edges(pairs, split):
    rows = {tuple(pair): row for row, pair in enumerate(pairs.tolist())}
    for batch in split.loader(40, shuffle=True):
        assert batch.validate()
        assert torch.equal(batch.x, batch.n_id % 8)
        assert torch.equal(batch.y, split.y[batch.n_id[: batch.batch_size]])
        assert batch.num_edges > 100
        for edge, attr, edge_type in zip(
            batch.edge_index.t(), batch.edge_attr, batch.edge_type, strict=True
        ):
            row = rows[tuple(batch.n_id[edge].sort().values.tolist())]
            assert torch.equal(attr, split.edge_attr[row])
            assert attr[edge_type] == attr.max()


def test_the_first_of_equal_weights_is_the_type_of_an_edge():
    pair = InEdges.of_undirected(torch.tensor([[0, 1]]), 2)
    split = SeedNodes(
        seeds=torch.tensor([0]),
        edges=pair,
        x=torch.zeros(2, dtype=torch.long),
        edge_attr=torch.tensor([[0.1, 0.7, 0.3, 0.7]]),
        y=torch.zeros(2, 1),
        fan_outs=(1,),
    )
    (batch,) = split.loader(1, shuffle=False)
    assert batch.edge_type.tolist() == [1]


def test_evaluation_gives_the_same_batches_and_leaves_the_random_state_alone(split):
    loader = split.loader(40, shuffle=False)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = signature(loader)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert signature(loader) == first
    assert signature(split.loader(40, shuffle=False)) == first


def test_shuffling_follows_the_global_seed(split):
    loader = split.loader(40, shuffle=True)
    torch.manual_seed(1)
    first, second = signature(loader), signature(loader)
    assert first != second
    torch.manual_seed(1)
    assert signature(loader) == first
    seeds = [batch.n_id[: batch.batch_size] for batch in loader]
    assert not torch.equal(torch.cat(seeds), split.seeds)
    assert torch.equal(torch.cat(seeds).sort().values, split.seeds.sort().values)


def test_what_a_model_draws_between_two_batches_does_not_change_the_second(split):
    torch.manual_seed(1)
    undisturbed = signature(split.loader(40, shuffle=True))
    torch.manual_seed(1)
    disturbed = []
    for batch in split.loader(40, shuffle=True):
        disturbed += signature([batch])
        torch.rand(3)
    assert disturbed == undisturbed


def test_a_slice_has_fewer_seeds_on_the_same_graph(split):
    few = split[:5]
    assert len(few) == 5
    assert torch.equal(few.seeds, split.seeds[:5])
    assert few.edges is split.edges and few.fan_outs == split.fan_outs
    (batch,) = few.loader(40, shuffle=False)
    assert batch.batch_size == 5 and batch.y.shape == (5, 5)
    assert not split[:0] and list(split[:0].loader(40, shuffle=True)) == []


def test_a_single_seed_is_not_an_item(split):
    with pytest.raises(TypeError, match=r"a slice like split\[:100\], got 3"):
        split[3]


def test_a_batch_of_nothing_is_refused(split):
    with pytest.raises(ValueError, match="batch size must be positive, got 0"):
        split.loader(0, shuffle=False)
