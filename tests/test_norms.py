"""Normalised scores against loops over their formulas, on PyG's layers and ours."""

import copy
import gc
import itertools
import math
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from functools import partial

import pytest
import torch
from random_graphs import random_graph
from torch import nn
from torch_geometric import nn as pyg
from torch_geometric.nn import GATConv, GATv2Conv, TransformerConv
from torch_geometric.utils import add_self_loops, coalesce, remove_self_loops

from mapkg.lipschitz_norm import MODES, lipschitz_normalise
from mapkg.models import EdgeAttention
from studies.extras import FullGraphAttention

HEADS, CHANNELS = 3, 4
EXACT = dict(rtol=1e-10, atol=1e-10)


def graph(seed=0, **sizes):
    return random_graph(200 + seed, channels=HEADS * CHANNELS, **sizes)


def with_loops(edge_index, nodes):
    return add_self_loops(remove_self_loops(edge_index)[0], num_nodes=nodes)[0]


def made(kind, *sizes, **options):
    torch.manual_seed(0)
    return kind(HEADS * CHANNELS, *sizes, **options).double().eval()


def gat(heads=HEADS, **options):
    return made(GATConv, CHANNELS, heads, **options)


transformer = partial(made, TransformerConv, CHANNELS, HEADS)
edge_attention = partial(made, EdgeAttention, HEADS)


def gat_by_loop(layer, x, edge_index, mode="paper", scale=1.0):
    """The layer's output, node by node and head by head, from the formulas; row 0 sends."""
    heads = layer.heads
    z = layer.lin(x).view(len(x), heads, CHANNELS)
    att = torch.cat([layer.att_src, layer.att_dst], dim=-1)[0]
    edges = with_loops(edge_index, len(x)).t().tolist()
    neighbors = [[j for j, i in edges if i == node] for node in range(len(x))]
    out = torch.zeros_like(z)

    def largest(i, k):
        return max(z[j, k].norm() ** 2 for j in neighbors[i])

    for i, k in itertools.product(range(len(x)), range(heads)):
        scores = []
        for j in neighbors[i]:
            e = layer.att_src[0, k] @ z[j, k] + layer.att_dst[0, k] @ z[i, k]
            if mode == "paper":
                c = att[k].norm() * (largest(i, k) + z[i, k].norm() ** 2).sqrt()
            else:
                norm = att.norm() if mode == "published" else att[k].norm()
                c = norm * (largest(i // heads, i % heads) + z[j, k].norm() ** 2).sqrt()
            scores.append(nn.functional.leaky_relu(e / (scale * c), 0.2))
        weights = torch.stack(scores).softmax(0)
        out[i, k] = sum(w * z[j, k] for w, j in zip(weights, neighbors[i], strict=True))
    return out.flatten(1) + layer.bias


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("scale", [None, 2.5])
@pytest.mark.parametrize("mode", MODES)
def test_gat_agrees_with_a_loop_over_the_formula(mode, scale, heads):
    (x, edge_index, _), layer = graph(), gat(heads=heads)
    expected = gat_by_loop(layer, x, edge_index, mode, scale or (1.0 if mode == "paper" else 4.0))
    found = lipschitz_normalise(layer, mode, scale=scale)(x, edge_index)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
@pytest.mark.parametrize("later", [True, False])
def test_normalised_gat_takes_the_neighbors_that_its_messages_come_from(flow, later):
    x, edge_index, _ = graph()
    layer = lipschitz_normalise(gat(**{} if later else {"flow": flow}))
    layer.flow = flow
    directed = edge_index if flow == "source_to_target" else edge_index.flip(0)
    torch.testing.assert_close(layer(x, edge_index), gat_by_loop(layer, x, directed), **EXACT)
    layer.lin = nn.Linear(HEADS * CHANNELS, HEADS * CHANNELS, bias=False).double()  # another one
    torch.testing.assert_close(layer(x, edge_index), gat_by_loop(layer, x, directed), **EXACT)


def quadratic_by_loop(q, k, v, edge_index, mode, scale, *, gate=None, eps=0.0):
    """What is attended to, [N, H * C], of queries, keys and values [N, H, C]."""
    edges = edge_index.t().tolist()
    gate = torch.ones(len(edges), HEADS, CHANNELS).to(q) if gate is None else gate
    out = torch.zeros_like(v)
    for i, h in itertools.product(range(len(q)), range(HEADS)):
        incoming = [(e, j) for e, (j, target) in enumerate(edges) if target == i]
        keys = [k[j, h] * gate[e, h] for e, j in incoming]
        values = [v[j, h] for _, j in incoming]
        u, root = q[i, h].norm(), 1.0
        if mode != "paper":
            u, root = sum(q[t, h].norm() ** 2 for _, t in edges).sqrt(), math.sqrt(CHANNELS)
        v_max, w_max = (max((row.norm() for row in rows), default=0) for rows in (keys, values))
        c = scale * max(u * v_max, u * w_max, v_max * w_max)
        weights = [(q[i, h] @ key / root / c).exp() for key in keys]
        for weight, value in zip(weights, values, strict=True):
            out[i, h] += weight / (sum(weights) + eps) * value
    return out.flatten(1)


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("mode", MODES)
def test_transformer_agrees_with_a_loop_over_the_formula(mode, scale):
    (x, edge_index, _), layer = graph(2), transformer()
    maps = layer.lin_query, layer.lin_key, layer.lin_value
    qkv = (linear(x).view(len(x), HEADS, CHANNELS) for linear in maps)
    expected = quadratic_by_loop(*qkv, edge_index, mode, scale or 1.0) + layer.lin_skip(x)
    found = lipschitz_normalise(layer, mode, scale=scale)(x, edge_index)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("attention", ["full", "no_edge"])
def test_our_attention_agrees_with_a_loop_over_the_formula(attention):
    (x, edge_index, edge_attr), layer = graph(3), edge_attention(attention=attention)
    qkv = (linear(x).view(len(x), HEADS, -1) for linear in (layer.query, layer.key, layer.value))
    gate = None if layer.edge is None else layer.edge(edge_attr).view(-1, HEADS, CHANNELS)
    expected = quadratic_by_loop(*qkv, edge_index, "paper", 2.0, gate=gate, eps=1e-6)
    found, _ = lipschitz_normalise(layer, scale=2.0)(x, edge_index, edge_attr)
    torch.testing.assert_close(found, expected, **EXACT)


LAYERS = {
    "gat": partial(gat, bias=False),
    "gat of one head": partial(gat, heads=1, bias=False),
    "transformer": partial(transformer, bias=False),
    "ours": edge_attention,
}
each = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def run(layer, x, edge_index, edge_attr):
    if isinstance(layer, EdgeAttention):
        return layer(x, edge_index, edge_attr)[0]
    return layer(x, edge_index)


@each
@pytest.mark.parametrize(("dtype", "error"), [(torch.half, 0.01), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_norm_above_256_or_a_score_above_65504_does_not_overflow_in_half_precision(
    make, dtype, error, autocast
):
    x, edge_index, edge_attr = (300 * v if v.is_floating_point() else v for v in graph(3))
    layer, own = lipschitz_normalise(make()), torch.float32 if autocast else dtype
    expected = run(layer, x, edge_index, edge_attr)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found = run(copy.deepcopy(layer).to(own), x.to(own), edge_index, edge_attr.to(own))
    assert (found.double() - expected).norm() < error * expected.norm()


@pytest.mark.parametrize("bound", ["clip", "tanh"])
def test_the_bound_comes_before_the_norm(bound):
    example = [300 * v if v.is_floating_point() else v for v in graph(3)]
    free, bounded = (lipschitz_normalise(edge_attention(score_bound=b)) for b in ("none", bound))
    assert not torch.allclose(run(free, *example), run(bounded, *example))


@each
def test_threads_do_not_mix_their_passes(make):
    layer, graphs = lipschitz_normalise(make()), [graph(seed) for seed in range(2)]
    expected = [run(layer, *each) for each in graphs]

    def again(place):
        return all(torch.equal(run(layer, *graphs[place]), expected[place]) for _ in range(100))

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(again, range(2))) == [True, True]


@each
@pytest.mark.parametrize("mode", MODES)
def test_a_neighborhood_of_zeros_has_no_nan(make, mode):
    (x, edge_index, edge_attr), layer = graph(7), lipschitz_normalise(make(), mode)
    x[edge_index[0, edge_index[1] == 0]] = 0
    x[0] = 0
    out = run(layer, x.requires_grad_(), edge_index, edge_attr)
    out.square().sum().backward()
    for tensor in (out, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)):
        assert tensor.isfinite().all()


@each
def test_a_pass_leaves_nothing_alive(make):
    layer, projected = lipschitz_normalise(make()), []
    for module in layer.modules():
        if type(module).__name__ == "Linear":
            keep = lambda _module, _inputs, z: projected.append(weakref.ref(z))  # noqa: E731
            module.register_forward_hook(keep)
    run(layer, *graph())
    gc.collect()
    assert projected and all(reference() is None for reference in projected)


def test_a_normalized_layer_may_run_another_one():
    class Two(GATConv):
        def __init__(self):
            super().__init__(HEADS * CHANNELS, HEADS * CHANNELS)
            self.inner = GATConv(HEADS * CHANNELS, CHANNELS)

        def forward(self, x, edge_index, **options):
            return self.inner(super().forward(x, edge_index), edge_index)

    (x, edge_index, _), layer = graph(), lipschitz_normalise(Two().double())
    assert layer(x, edge_index).isfinite().all()


@each
def test_gradients_flow_through_the_norms(make):
    (x, *rest), layer = graph(8, nodes=6, edges=12), lipschitz_normalise(make())
    assert torch.autograd.gradcheck(
        lambda x: run(layer, x, *rest), (x.requires_grad_(),), atol=1e-6
    )


@each
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_is_normalised_and_independent(make, copied):
    example, plain = graph(13), make()
    layer = lipschitz_normalise(copy.deepcopy(plain))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    twin = copied(layer)
    assert torch.equal(run(twin, *example), run(layer, *example))
    assert not torch.allclose(run(twin, *example), run(plain, *example))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert not torch.allclose(run(twin, *example), run(layer, *example))


@each
def test_a_call_that_fails_and_a_projection_alone_leave_nothing_behind(make):
    (x, edge_index, edge_attr), layer = graph(), lipschitz_normalise(make())
    expected = Context().run(run, layer, x, edge_index, edge_attr)  # as in another thread
    linears = [module for module in layer.modules() if isinstance(module, (nn.Linear, pyg.Linear))]
    hooks = [len(linear._forward_hooks) for linear in linears]
    ends = edge_index + len(x), edge_index.double(), None
    for wrong in (*((x, each) for each in ends), (x[:, 1:], edge_index)):
        with pytest.raises((IndexError, RuntimeError, ValueError, AttributeError, TypeError)):
            run(layer, *wrong, edge_attr)
        if wrong[1] is None:
            linears[0](x)
        assert torch.equal(run(layer, x, edge_index, edge_attr), expected)
        assert [len(linear._forward_hooks) for linear in linears] == hooks


def test_what_cannot_be_normalized_is_refused():
    mixed = nn.ModuleList([gat(), GATConv(2, 2, edge_dim=3)])
    for model, message, *options in (
        (gat(), r"mode: expected one of .*'paper'.* got 'maxnorm'", {"mode": "maxnorm"}),
        (gat(), r"scale: expected a value above 0, got 0\.0", {"scale": 0.0}),
        (nn.Linear(2, 2), "got Linear without any"),
        (mixed, "1: GATConv has edge features in its score"),
        (GATConv((2, 3), 2, add_self_loops=False), "two projections"),
        (TransformerConv(2, 2, edge_dim=3), "has edge features in its score"),
        (EdgeAttention(12, 3, explicit_bias="sink"), "Explicit Bias Term, 'sink'"),
        (EdgeAttention(12, 3, attention="uniform"), "without its score"),
        (FullGraphAttention(12, 3), "over pairs of nodes that are no edges"),
        (lipschitz_normalise(edge_attention()), "normalized already"),
    ):
        with pytest.raises(ValueError, match=message):
            lipschitz_normalise(model, **dict(*options))
    x, edge_index, _ = graph()
    for other in (x, None):
        with pytest.raises(ValueError, match="expected one x for all nodes, got a pair"):
            lipschitz_normalise(gat())((x, other), edge_index)
    assert not hasattr(mixed[0], "score_norm"), "nothing is changed by halves"
    for other in (None, gat().state_dict(), GATConv):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got|did not match"):
            lipschitz_normalise(other)


def test_all_layers_are_normalized_and_those_that_stay_as_they_are_are_named():
    model = nn.ModuleList([gat(), nn.ModuleList([transformer()]), edge_attention()])
    assert lipschitz_normalise(model) is model
    norms = [type(layer.score_norm.norm).__name__ for layer in (model[0], model[1][0], model[2])]
    assert norms == ["LipschitzNorm", "QuadraticLipschitzNorm", "QuadraticLipschitzNorm"]
    named = [GATv2Conv(2, 2), pyg.SuperGATConv(2, 2), nn.MultiheadAttention(4, 2)]
    named += [pyg.GeneralConv(2, 2, attention=True), pyg.attention.PerformerAttention(4, 2)]
    named += [pyg.DNAConv(4), pyg.FeaStConv(2, 2), pyg.FAConv(2)]  # without PyG's softmax
    others = [pyg.GCNConv(2, 2), pyg.GeneralConv(2, 2), pyg.HypergraphConv(2, 2), nn.Linear(2, 2)]
    with pytest.warns(UserWarning, match="is not normalized and stays as it is: ") as caught:
        lipschitz_normalise(nn.ModuleList([*named, *others, gat()]))
    expected = [f"{number} ({type(layer).__name__})" for number, layer in enumerate(named)]
    assert str(caught[0].message).partition(": ")[2] == ", ".join(expected)


@pytest.mark.filterwarnings("ignore:Sparse (CSR tensor|invariant)")
@pytest.mark.parametrize("make", [gat, transformer])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_adjacency_is_its_edges(make, layout):
    (x, edge_index, _), layer = graph(), lipschitz_normalise(make())
    edge_index = coalesce(with_loops(edge_index, len(x)).flip(0)).flip(0)  # sorted by target
    adjacency = torch.zeros(len(x), len(x)).to(x)
    adjacency[edge_index[1], edge_index[0]] = 1
    adjacency = adjacency.to_sparse(layout=layout)
    torch.testing.assert_close(layer(x, adjacency), layer(x, edge_index), **EXACT)


NOTEBOOK = """
class Scores(GATConv):
    def edge_update(self, alpha_j, alpha_i, edge_attr, index, ptr, dim_size):
        return super().edge_update(2 * alpha_j, 2 * alpha_i, edge_attr, index, ptr, dim_size)

class Features(GATConv):
    def forward(self, x, edge_index):
        return super().forward(2 * x, edge_index)

class Queries(TransformerConv):
    def message(self, query_i, key_j, value_j, edge_attr, index, ptr, size_i):
        return super().message(2 * query_i, key_j, value_j, edge_attr, index, ptr, size_i)
"""


KINDS = [("Scores", {}), ("Scores", {"add_self_loops": False}), ("Features", {})]
KINDS += [("Queries", {}), ("Queries", {"beta": True})]


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_a_layer_whose_source_cannot_be_read_is_normalised_too(name, options):
    names = {"GATConv": GATConv, "TransformerConv": TransformerConv, "__name__": "__main__"}
    exec(NOTEBOOK, names)
    x, edge_index, _ = graph()
    layer = names[name](HEADS * CHANNELS, CHANNELS, HEADS, **options).double()
    plain = type(layer).__base__(HEADS * CHANNELS, CHANNELS, HEADS, **options).double()
    plain.load_state_dict(layer.state_dict())
    # Twice the scores are those of half the scale; twice the features change no weight.
    plain = lipschitz_normalise(plain, scale=1.0 if name == "Features" else 0.5)
    expected = plain(2 * x if name == "Features" else x, edge_index)
    found = lipschitz_normalise(layer)(x, edge_index)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of what Dynamo does not trace
def test_our_layer_can_be_compiled_and_a_compiled_or_scripted_network_of_pyg_refuses():
    x, edge_index, edge_attr = graph()
    layer = lipschitz_normalise(edge_attention())
    found = torch.compile(layer, backend="eager")(x, edge_index, edge_attr)[0]
    torch.testing.assert_close(found, layer(x, edge_index, edge_attr)[0], **EXACT)
    network = lipschitz_normalise(pyg.GAT(HEADS * CHANNELS, 4, 2, heads=2).double().eval())
    expected, in_place = network(x, edge_index), copy.deepcopy(network)
    in_place.compile(backend="eager")
    for way in (
        torch.compile(network, backend="eager"),
        in_place,
        torch.compile(lambda *inputs: network(*inputs), backend="eager"),
    ):
        with pytest.raises(RuntimeError, match="scores of GATConv were not normalized: torch"):
            way(x, edge_index)
    assert torch.equal(network(x, edge_index), expected)
    for layer in (gat(), transformer()):
        with pytest.raises(RuntimeError, match="not normalized"):
            torch.export.export(lipschitz_normalise(layer), (x, edge_index), strict=False)
    for model in (network, lipschitz_normalise(transformer())):
        with pytest.raises(TypeError, match="TorchScript leaves out the norm of attention scores"):
            torch.jit.script(model)


WAYS = {
    "returned": lambda part: torch.compile(part, backend="eager"),
    "in place": lambda part: part.compile(backend="eager") or part,
    "script": torch.jit.script,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_with_a_part_that_is_compiled_is_refused(way):
    with pytest.raises(TypeError, match="1 is compiled, and compiled code passes over hooks"):
        lipschitz_normalise(nn.Sequential(nn.Linear(5, 5), WAYS[way](nn.Linear(5, 5))))
