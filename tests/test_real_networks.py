"""LipschitzNorm in the networks that people train: flows, half precision, threads, compilers."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch_geometric.nn import GATConv, TransformerConv
from torch_geometric.utils import add_self_loops, remove_self_loops

from mapkg import lipschitz_normalise

N, D, H, C = 9, 5, 2, 4


def graph(seed=0, scale=1.0, dtype=torch.float64):
    torch.manual_seed(seed)
    return scale * torch.randn(N, D, dtype=dtype), torch.randint(N, (2, 30))


def normalised(kind, **options):
    torch.manual_seed(1)
    return lipschitz_normalise(kind(D, C, heads=H, **options).double()).eval()


def gat_by_a_loop(layer, x, edge_index):
    """GAT with the paper's norm, target by target; row 0 of ``edge_index`` has the sources."""
    edge_index = add_self_loops(remove_self_loops(edge_index)[0], num_nodes=N)[0]
    z = layer.lin(x).view(N, H, C)
    out = torch.zeros(N, H, C, dtype=x.dtype)
    for i in range(N):
        sources = edge_index[0][edge_index[1] == i]
        for k in range(H):
            left, right = layer.att_src[0, k], layer.att_dst[0, k]
            norm = torch.cat([left, right]).norm()
            c = norm * (z[sources, k].norm(dim=1).max() ** 2 + z[i, k].norm() ** 2).sqrt()
            score = (z[sources, k] @ left + z[i, k] @ right) / c
            weight = nn.functional.leaky_relu(score, 0.2).softmax(dim=0)
            out[i, k] = weight @ z[sources, k]
    return out.flatten(1) + layer.bias


@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_normalised_gat_takes_the_neighbors_that_its_messages_come_from(flow, when):
    x, edge_index = graph()
    layer = normalised(GATConv, **dict(flow=flow) if when == "before" else {})
    layer.flow = flow
    directed = edge_index if flow == "source_to_target" else edge_index.flip(0)
    torch.testing.assert_close(layer(x, edge_index), gat_by_a_loop(layer, x, directed))
    layer.lin = nn.Linear(D, H * C, bias=False).double()  # another projection
    torch.testing.assert_close(layer(x, edge_index), gat_by_a_loop(layer, x, directed))


@pytest.mark.parametrize("kind", [GATConv, TransformerConv])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_norm_above_256_does_not_overflow_in_half_precision(kind, dtype, autocast):
    x, edge_index = graph(scale=300.0)
    layer = normalised(kind)
    expected, own = layer(x, edge_index), torch.float32 if autocast else dtype
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found = copy.deepcopy(layer).to(own)(x.to(own), edge_index)
    relative = (found.double() - expected).norm() / expected.norm()
    assert relative < {torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]


def test_a_call_that_fails_leaves_the_next_one_as_it_was():
    x, edge_index = graph()
    layer = normalised(GATConv)
    expected = layer(x, edge_index)
    for wrong in (edge_index.float(), edge_index + N):
        with pytest.raises((IndexError, RuntimeError, ValueError, AttributeError)):
            layer(x, wrong)
        assert torch.equal(layer(x, edge_index), expected)
    layer.lin(x)  # alone
    assert torch.equal(layer(x, edge_index), expected)
    assert not layer.lin._forward_hooks


def test_a_pair_of_sources_and_targets_is_refused_each_time():
    x, edge_index = graph()
    layer = normalised(GATConv)
    for other in (x, None, x):
        with pytest.raises(ValueError, match="expected one x for all nodes, got a pair"):
            layer((x, other), edge_index)
    assert layer(x, edge_index).isfinite().all()


def test_threads_do_not_mix_their_passes():
    layer = normalised(GATConv)
    graphs = [graph(seed) for seed in range(2)]
    expected = [layer(*each) for each in graphs]

    def run(place):
        return all(torch.equal(layer(*graphs[place]), expected[place]) for _ in range(100))

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, range(2))) == [True, True]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of what Dynamo does not trace
@pytest.mark.parametrize("kind", [GATConv, TransformerConv])
def test_a_compiled_layer_is_never_silently_without_its_norm(kind):
    x, edge_index = graph()
    layer = normalised(kind)
    expected = layer(x, edge_index)
    with pytest.raises(RuntimeError, match="not normalised: torch"):
        torch.compile(layer, backend="eager")(x, edge_index)
    assert torch.equal(layer(x, edge_index), expected)
    with pytest.raises(RuntimeError, match="not normalised"):
        torch.export.export(layer, (x, edge_index), strict=False)


WAYS = {
    "returned": lambda part: torch.compile(part, backend="eager"),
    "in place": lambda part: part.compile(backend="eager") or part,
    "script": torch.jit.script,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_with_a_part_that_is_compiled_is_refused(way):
    model = nn.Sequential(nn.Linear(D, D), WAYS[way](nn.Linear(D, D)))
    with pytest.raises(TypeError, match="1 is compiled, and compiled code passes over hooks"):
        lipschitz_normalise(model)
