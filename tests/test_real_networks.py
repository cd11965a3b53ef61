"""Networks that people train: other flows, half precision, threads, heads called score."""

import copy
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch_geometric.data import Data, HeteroData
from torch_geometric.nn import DenseGCNConv, GATConv, GCNConv, TransformerConv
from torch_geometric.utils import add_self_loops, remove_self_loops

from mapkg import edit, lipschitz_normalise, record, report
from mapkg.lipschitz import gat_bound, local_constant
from mapkg.measures import activation_ratio, is_massive
from mapkg.metrics import best_constant

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
def test_normalised_gat_takes_the_neighbours_that_its_messages_come_from(flow):
    x, edge_index = graph()
    layer = normalised(GATConv, flow=flow)
    directed = edge_index if flow == "source_to_target" else edge_index.flip(0)
    expected = gat_by_a_loop(layer, x, directed)
    torch.testing.assert_close(layer(x, edge_index), expected)


def test_the_flow_may_be_switched_after_normalising():
    x, edge_index = graph()
    layer, reversed_ = normalised(GATConv), normalised(GATConv)
    reversed_.flow = "target_to_source"
    torch.testing.assert_close(reversed_(x, edge_index), layer(x, edge_index.flip(0)))


@pytest.mark.parametrize("options", [{}, {"concat": False}, {"residual": True}])
@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
def test_the_bound_of_a_layer_is_above_its_local_constants(options, flow):
    layer = normalised(GATConv, flow=flow, **options)
    for scale in (0.1, 1.0, 10.0):
        x, edge_index = graph(scale=scale)
        constant = local_constant(lambda x, edges=edge_index: layer(x, edges), x)
        assert constant <= gat_bound(layer, edge_index, N)


def test_a_residual_map_adds_its_spectral_norm_to_the_bound():
    _, edge_index = graph()
    layer = normalised(GATConv, residual=True)
    with_it = gat_bound(layer, edge_index, N)
    norm = torch.linalg.matrix_norm(layer.res.weight, ord=2).item()
    layer.res = None
    assert with_it == pytest.approx(gat_bound(layer, edge_index, N) + norm)


@pytest.mark.parametrize("kind", [GATConv, TransformerConv])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_above_256_does_not_overflow_in_half_precision(kind, dtype):
    x, edge_index = graph(scale=300.0)
    layer = normalised(kind)
    expected = layer(x, edge_index)
    half = copy.deepcopy(layer).to(dtype)
    found = half(x.to(dtype), edge_index)
    assert found.dtype == dtype
    relative = (found.double() - expected).norm() / expected.norm()
    assert relative < {torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]


@pytest.mark.parametrize("kind", [GATConv, TransformerConv])
def test_a_norm_above_256_does_not_overflow_under_autocast(kind):
    x, edge_index = graph(scale=300.0)
    layer = normalised(kind)
    expected = layer(x, edge_index)
    single = copy.deepcopy(layer).float()
    with torch.autocast("cpu", dtype=torch.float16):
        found = single(x.float(), edge_index)
    assert (found.double() - expected).norm() / expected.norm() < 0.01


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


def test_a_projection_may_be_replaced():
    x, edge_index = graph()
    layer = normalised(GATConv)
    layer.lin = nn.Linear(D, H * C, bias=False).double()
    torch.testing.assert_close(layer(x, edge_index), gat_by_a_loop(layer, x, edge_index))


@pytest.mark.parametrize("pair", [True, False])
def test_a_pair_of_sources_and_targets_is_refused_each_time(pair):
    x, edge_index = graph()
    layer = normalised(GATConv)
    for _ in range(2):
        with pytest.raises(ValueError, match="expected one x for all nodes, got a pair"):
            layer((x, x if pair else None), edge_index)
    assert layer(x, edge_index).isfinite().all()


def test_threads_do_not_mix_their_passes():
    layer = normalised(GATConv)
    graphs = [graph(seed) for seed in range(2)]
    expected = [layer(*each) for each in graphs]
    wrong = []

    def run(place):
        for _ in range(100):
            try:
                if not torch.equal(layer(*graphs[place]), expected[place]):
                    wrong.append(place)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("value", "threshold"), [(1000.0, 999.0), (3008.0, 3000.0)])
def test_a_threshold_is_not_rounded_to_half_precision(dtype, value, threshold):
    ratio = torch.tensor([[value]], dtype=dtype)
    assert ratio.item() == value
    assert is_massive(ratio, threshold).item()
    assert not is_massive(ratio, value).item()


def test_ratios_of_half_precision_are_compared_as_they_are():
    ratio = activation_ratio(torch.tensor([[1.0, 1.0, 1.0, 1000.0]], dtype=torch.bfloat16))
    assert is_massive(ratio, 999.0).tolist() == [[False, False, False, True]]


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(D, D)

    def forward(self, x):
        return self.first(x).add_(100)


def test_what_is_recorded_under_inference_mode_is_what_it_was_then():
    model, x = Steps(), torch.randn(3, D)
    with torch.inference_mode(), record(model, "first") as seen:
        after = model(x)
    torch.testing.assert_close(seen["first"][0], after - 100)


class Ranking(nn.Module):
    """A GNN whose head is called ``score``, and one of its parts ``edge_score``."""

    def __init__(self, head):
        super().__init__()
        self.conv = GCNConv(D, D)
        self.edge_score = nn.Identity()
        setattr(self, head, nn.Linear(D, 1))
        self.head = head

    def forward(self, x, edge_index):
        return getattr(self, self.head)(self.edge_score(self.conv(x, edge_index)))


@pytest.mark.parametrize("head", ["score", "out"])
def test_a_head_called_score_does_not_hide_the_layers(head):
    x, edge_index = graph(dtype=torch.float32)
    found = report(Ranking(head), [Data(x=x, edge_index=edge_index)]).table
    assert found["layer"].tolist() == ["conv:message"]


def test_the_best_constant_of_a_task_without_a_positive_is_finite():
    target = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    expected = torch.tensor([1e-6, 1 - 1e-6, 0.5]).logit()
    torch.testing.assert_close(best_constant(target, "bce"), expected)


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


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("way", [compiled, compiled_in_place, torch.jit.script])
def test_hooks_on_compiled_code_are_refused(way):
    model = way(nn.Sequential(nn.Linear(D, D), nn.ReLU()))
    for attempt in (
        lambda: record(model, "*0").__enter__(),
        lambda: edit(model, {"*0": torch.zeros_like}).__enter__(),
        lambda: report(model, [torch.randn(3, D)], names="*0"),
        lambda: lipschitz_normalise(model),
    ):
        with pytest.raises(TypeError, match="is compiled, and compiled code passes over hooks"):
            attempt()


class Handed(nn.Module):
    """Layers that take one object, write into it and hand it on, as those of GraphGym do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Doubling() for _ in range(3))

    def forward(self, batch):
        for layer in self.layers:
            batch = layer(batch)
        return batch.x


class Doubling(nn.Module):
    def forward(self, batch):
        batch.x = 2 * batch.x
        return batch


@dataclass(frozen=True)
class Bag:
    x: torch.Tensor


class Bagged(nn.Module):
    def forward(self, batch):
        object.__setattr__(batch, "x", 2 * batch.x)
        return batch


@pytest.mark.parametrize("kind", [Data, Bag])
def test_an_object_that_is_changed_on_its_way_is_recorded_as_it_was(kind):
    model = Handed()
    if kind is Bag:
        model.layers = nn.ModuleList(Bagged() for _ in range(3))
    x = torch.ones(2, 1, requires_grad=True)
    with record(model, "layers.*") as seen:
        model(kind(x=x))
    kept = [outputs[0].x for outputs in seen.values()]
    assert [each[0].item() for each in kept] == [2, 4, 8]
    assert not any(each.requires_grad for each in kept)


def test_batches_that_a_model_writes_into_are_the_same_in_the_next_pass():
    x, edge_index = graph(dtype=torch.float32)
    loader = [Data(x=x, edge_index=edge_index)]
    rows = dict(names="layers.*", rows=lambda module, output, batch: output.x)
    first, second = (report(Handed(), loader, **rows).table for _ in range(2))
    assert first["max_abs"].tolist() == second["max_abs"].tolist()
    torch.testing.assert_close(loader[0].x, x)


class ByEdges(nn.Module):
    """Embeddings of its own, as LightGCN has: all that it takes is the graph."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(N, D)
        self.conv = GCNConv(D, D)

    def forward(self, edge_index, edge_weight=None):
        return self.conv(self.embedding.weight, edge_index, edge_weight)


def test_a_model_of_edges_alone_is_given_the_edges():
    x, edge_index = graph(dtype=torch.float32)
    assert len(report(ByEdges(), [Data(x=x, edge_index=edge_index)]).table) == 1


class Anything(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = GCNConv(D, D)

    def forward(self, *inputs):
        return self.conv(*inputs)


def test_how_to_call_a_model_is_asked_for_truly():
    x, edge_index = graph(dtype=torch.float32)
    data = Data(x=x, edge_index=edge_index)
    with pytest.raises(TypeError, match=r"Anything\.forward: it names no required argument"):
        report(Anything(), [data])
    with pytest.raises(TypeError, match=r"a HeteroData keeps its features by type.*x_dict"):
        report(GCNConv(D, D), [HeteroData()])
    with pytest.raises(TypeError, match=r"expected batches, got one Data: pass \[data\]"):
        report(GCNConv(D, D), data)


class InPlace(nn.Module):
    def forward(self, batch):
        batch.x.mul_(2)
        return batch


@pytest.mark.parametrize("kind", [Data, Bag])
def test_an_object_whose_tensor_is_changed_in_place_is_noticed(kind):
    model = nn.Sequential(InPlace(), InPlace())
    with (
        pytest.raises(RuntimeError, match="'0' was changed in place after it was recorded"),
        record(model, "0"),
    ):
        model(kind(x=torch.ones(2, 1)))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = DenseGCNConv(8, 16)

    def forward(self, x, adj):
        return self.conv(x, adj)


def padded():
    torch.manual_seed(0)
    x = torch.randn(3, 9, 8)
    x[:, 0] *= 5000
    return Data(x=x, adj=torch.eye(9).expand(3, 9, 9))


TOKENS = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


@pytest.mark.parametrize(
    ("model", "batch", "name"),
    [(Dense(), padded(), "conv"), (TOKENS, torch.randn(2, 7, 8), "linear2")],
    ids=["dense graphs", "tokens"],
)
def test_three_axes_of_which_none_is_known_to_be_the_rows_are_asked_about(model, batch, name):
    with pytest.raises(ValueError, match="the batch does not say what a row is: pass rows="):
        report(model, [batch], names=name)


def test_rows_of_a_padded_batch_are_those_of_a_loop_over_its_nodes():
    model, batch = Dense(), padded()
    joined = report(
        model, [batch], names="conv", rows=lambda module, output, batch: output.flatten(0, 1)
    ).table
    rows = [row for graph in model(batch.x, batch.adj).detach() for row in graph]
    largest = max((row.abs().max() / row.abs().median()).item() for row in rows)
    assert joined["max_ratio"].item() == pytest.approx(largest, rel=1e-5)
    assert joined["rows"].item() == 27


@pytest.mark.parametrize("loops", ["none", "some"])
def test_heads_of_nodes_and_of_edges_with_self_loops_are_known_rows(loops):
    x, edge_index = graph(dtype=torch.float32)
    edge_index = remove_self_loops(edge_index)[0]
    if loops == "some":
        edge_index = torch.cat([edge_index, torch.tensor([[0, 1], [0, 1]])], dim=1)
    found = report(GATConv(D, C, heads=H), [Data(x=x, edge_index=edge_index)], names=":message")
    edges = remove_self_loops(edge_index)[0].size(1) + N
    assert found.table[["rows", "channels"]].values.tolist() == [[edges, H * C]]


def test_a_nested_tensor_is_refused_with_advice():
    nested = torch.nested.nested_tensor([torch.randn(2, D), torch.randn(3, D)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"returned a nested tensor.*pass rows="):
        report(nn.Sequential(nn.Identity()), [nested], names="0")
