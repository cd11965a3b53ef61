"""LipschitzNorm in the networks that people train: half precision, threads, compilers."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch_geometric.nn import GATConv, TransformerConv

from mapkg import lipschitz_normalise

N, D, H, C = 9, 5, 2, 4
kinds = pytest.mark.parametrize("kind", [GATConv, TransformerConv])


def graph(seed=0, scale=1.0):
    torch.manual_seed(seed)
    return scale * torch.randn(N, D, dtype=torch.float64), torch.randint(N, (2, 30))


def normalised(kind):
    torch.manual_seed(1)
    return lipschitz_normalise(kind(D, C, heads=H).double()).eval()


@kinds
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


@kinds
def test_a_call_that_is_interrupted_leaves_the_next_one_as_it_was(kind):
    def stop(*_):
        raise KeyboardInterrupt

    (x, edge_index), layer = graph(), normalised(kind)
    expected = layer(x, edge_index)
    part = layer.lin if kind is GATConv else layer.lin_key
    for register in (part.register_forward_hook, layer.register_message_forward_hook):
        handle = register(stop)
        with pytest.raises(KeyboardInterrupt):
            layer(x, edge_index)
        handle.remove()
        assert torch.equal(layer(x, edge_index), expected)


def test_a_pair_of_sources_and_targets_is_refused_each_time():
    (x, edge_index), layer = graph(), normalised(GATConv)
    for other in (x, None, 2 * x):
        with pytest.raises(ValueError, match="expected one x for all nodes, got a pair"):
            layer((x, other), edge_index)
    assert layer(x, edge_index).isfinite().all()


@kinds
def test_threads_do_not_mix_their_passes(kind):
    layer = normalised(kind)
    graphs = [graph(seed) for seed in range(2)]
    expected = [layer(*each) for each in graphs]

    def run(place):
        return all(torch.equal(layer(*graphs[place]), expected[place]) for _ in range(100))

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, range(2))) == [True, True]


@kinds
@pytest.mark.filterwarnings("ignore::UserWarning")  # of what Dynamo does not trace
def test_an_exported_layer_is_never_silently_without_its_norm(kind):
    layer, example = normalised(kind), graph()
    with pytest.raises(RuntimeError, match="not normalised"):
        torch.compile(layer, backend="eager")(*example)
    with pytest.raises(RuntimeError, match="not normalised"):
        torch.export.export(layer, example, strict=False)


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
