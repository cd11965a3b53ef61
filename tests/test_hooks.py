"""Recording and editing what submodules return: names, order, removal, and what is kept."""

import weakref
from collections import UserDict, deque, namedtuple
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch_geometric import EdgeIndex
from torch_geometric.data import Batch, Data, HeteroData, TemporalData
from torch_geometric.nn import APPNP, GATConv, GATv2Conv, GINEConv, GraphConv, TransformerConv
from torch_geometric.utils import scatter, to_torch_csr_tensor

from mapkg.calling import call, map_tensors
from mapkg.hooks import STAGES, edit, evaluating, record, resolve, scan
from mapkg.rows import as_rows, default_names, with_loops_of_layers

Pair = namedtuple("Pair", "first second")
INPUT = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])


def sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def num_hooks(model):
    """Hooks of torch and of PyG on all modules: every attribute of theirs that ends in _hooks."""
    return sum(
        len(hooks)
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name.endswith(("forward_hooks", "forward_pre_hooks"))
    )


def edit_nothing(model, names):
    return edit(model, dict.fromkeys(names, lambda output: output))


contexts = pytest.mark.parametrize("context", [record, edit_nothing])


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


NODES, EDGES, WIDTH, HEADS = 5, 7, 6, 2  # node 3 has no incoming edge
EDGE_INDEX = torch.tensor([[0, 1, 2, 3, 0, 3, 2], [1, 2, 0, 4, 2, 4, 4]])
X, EDGE_ATTR = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(2)).split([5, 7])
CONVOLUTIONS = {
    "gat": lambda **kw: GATConv(WIDTH, 3, HEADS, edge_dim=WIDTH, **kw),
    "gatv2": lambda **kw: GATv2Conv(WIDTH, 3, HEADS, edge_dim=WIDTH, **kw),
    "transformer": lambda: TransformerConv(WIDTH, 3, HEADS, edge_dim=WIDTH),
    "gine": lambda: GINEConv(nn.Linear(WIDTH, WIDTH)),
}


class Convolutions(nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.convs = nn.ModuleList(map(convolution, names))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x, edge_index, edge_attr):
        for conv in self.convs:
            x = conv(x, edge_index, edge_attr)
        return self.head(x)


def convolution(name, **options):
    torch.manual_seed(1)
    return CONVOLUTIONS[name](**options)


SCORES = nn.ModuleDict({"a[1]": nn.ReLU(), "a1": nn.ReLU(), "b:message": nn.ReLU()})


@pytest.mark.parametrize(
    ("make", "names", "expected"),
    [
        (sequential, ["2", "[0-1]", "0"], "0 1 2"),  # once each, in the model's order
        (sequential, "?", "0 1 2"),
        (sequential, "", ""),
        # Where there is this stage; an exact name comes before its reading as a pattern or a stage.
        (lambda: Convolutions("gat", "transformer"), "*:edge_update", "convs.0:edge_update"),
        (lambda: Convolutions("gat"), ["head", "*:message"], "convs.0:message head"),
        (lambda: SCORES, "a[1]", "a[1]"),
        (lambda: SCORES, "b:message", "b:message"),
    ],
)
def test_names_and_patterns_resolve_in_the_order_of_the_model(make, names, expected):
    model = make()
    found = resolve(model, names)
    assert [*found] == expected.split(" ")
    assert [*resolve(model, "*")] == [*dict(model.named_modules())], "and no stages"
    for name, module in found.items():
        exact = name in dict(model.named_modules())
        assert module is model.get_submodule(name if exact else name.partition(":")[0])


@contexts
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convs.O", r"Convolutions has no submodule 'convs.O'; near matches: .*convs.0"),
        ("HEAD", "no submodule 'HEAD'; it has no similar name"),
        ("convs.0:mesage", "unknown stage 'mesage'; stages: message_inputs, message, aggregate, "),
        ("convs.1:edge_update", "TransformerConv shows only message_inputs, message, aggregate"),
        ("head:message", "Linear is not a PyG MessagePassing module, only its output can be seen"),
        ("conv.0:message", "no submodule 'conv.0'; near matches: convs.0"),
        ("tied", r"'tied' is one module with 'head' \(tied\): name that one"),
    ],
)
def test_a_name_that_is_not_there_is_an_error_before_the_first_hook(context, name, message):
    model = Convolutions("gat", "transformer")
    model.tied = model.head
    with pytest.raises(KeyError, match=message), context(model, ["convs.0:message", name]):
        pytest.fail("the context was entered")
    assert num_hooks(model) == 0


@pytest.mark.parametrize("names", [None, 3, [0]])
def test_what_is_no_model_or_no_name_is_refused(names):
    # Our words, or in tests those of the checked types.
    with pytest.raises(TypeError, match="names"):
        resolve(sequential(), names)
    with pytest.raises(TypeError, match="Module"):
        resolve(torch.relu, "0")


def test_outputs_are_recorded_in_order_detached_and_not_copied_and_gradients_stay_the_same():
    model, inputs = sequential(), (INPUT, 2 * INPUT, INPUT[:1])
    expected = [torch.autograd.grad(model(x).sum(), model[0].weight)[0] for x in inputs]
    with record(model, "*") as seen:
        outputs = [model(x) for x in inputs]
    model(INPUT)  # outside
    reduced = []

    def reduce(name, x):
        assert (name, torch.is_grad_enabled(), x.requires_grad) == ("2", False, False)
        reduced.append(x)

    with record(model, "2", reduce=reduce) as none:
        output = model(INPUT)
    assert torch.equal(reduced[0], output) and (none, len(reduced)) == ({"2": []}, 1)
    hidden = [(x @ model[0].weight.T + model[0].bias).detach() for x in inputs]
    torch.testing.assert_close(seen["0"], hidden)
    torch.testing.assert_close(seen["1"], [x.clamp(min=0) for x in hidden])
    for recorded, output, gradient in zip(seen["2"], outputs, expected, strict=True):
        assert torch.equal(recorded, output)
        assert recorded.data_ptr() == output.data_ptr() and not recorded.requires_grad
        assert torch.equal(torch.autograd.grad(output.sum(), model[0].weight)[0], gradient)


@dataclass(frozen=True)
class Bag:
    x: torch.Tensor


class Custom:
    def __init__(self, x):
        self.x, self.itself = x, self


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Outputs(dict):
    x = property(lambda self: self["x"])


OBJECTS = {
    "Data": (lambda x: Data(x=x), "batch.x"),
    "TemporalData": (lambda x: TemporalData(t=torch.arange(2), msg=x), "batch.msg"),
    "frozen dataclass": (Bag, "batch.__dict__['x']"),
    "object": (Custom, "batch.x"),
    "slots": (Slotted, "batch.x"),
    "dict with attributes": (lambda x: Outputs(x=x), "batch['x']"),
    "UserDict": (lambda x: UserDict(x=x), "batch['x']"),
    "deque": (lambda x: deque([x]), "batch[0]"),
    "list in an object": (lambda x: SimpleNamespace(all=[x]), "batch.all[0]"),
    "dict in an object": (lambda x: SimpleNamespace(all={"x": x}), "batch.all['x']"),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_an_object_that_layers_change_and_hand_on_is_recorded_as_it_was(kind):
    make, place = OBJECTS[kind]

    def get(batch):
        return eval(place, {"batch": batch})

    def double(batch):
        exec(f"{place} = 2 * {place}", {"batch": batch})
        return batch

    model, given = nn.Sequential(*(Returns(double) for _ in range(3))), make(torch.ones(2, 1))
    with record(model, "?") as seen:
        model(make(torch.ones(2, 1, requires_grad=True)))
    kept = [get(outputs[0]) for outputs in seen.values()]
    assert [each[0].item() for each in kept] == [2, 4, 8]
    assert not any(each.requires_grad for each in kept)
    in_place = nn.Sequential(nn.Identity(), Returns(lambda batch: get(batch).mul_(2)))
    for of_scan, name in ((model, "2"), (in_place, "1")):
        list(scan(of_scan, [given], name))
        assert get(given)[0] == 1, "the loader's batch is not changed"
    words = r"output of '0' was changed in place.*reduce=lambda"
    with pytest.raises(RuntimeError, match=words), record(in_place, "0"):
        in_place(given)
    with record(in_place, "0") as seen, torch.inference_mode():  # where tensors have no versions
        in_place(make(torch.ones(2, 1)))
    assert get(seen["0"][0])[0] == 1


@contexts
@pytest.mark.parametrize("end", ["nowhere", "body", "forward"])
def test_hooks_are_there_inside_the_context_and_gone_after_it(context, end):
    model = Convolutions("gat", "transformer")
    model.head.register_forward_hook(lambda *_: None)
    model.convs[0].register_message_forward_hook(lambda *_: None)
    names = ["head", *(f"*:{stage}" for stage in STAGES)]
    inside = None
    try:
        with context(model, names):
            inside = num_hooks(model)
            if end == "body":
                raise ArithmeticError
            model(X if end == "nowhere" else X.T, EDGE_INDEX, EDGE_ATTR)
    except (ArithmeticError, RuntimeError):
        assert end != "nowhere"
    # GATConv: 5 stages, TransformerConv: 3; 3 of each with a guard against fused aggregation.
    assert inside == 2 + 1 + 5 + 3 + 2 * 3
    assert num_hooks(model) == 2, "the hooks of somebody else stay"


def test_edits_are_applied_in_the_order_given_and_gradients_flow_through_them():
    model, scale = sequential(), torch.tensor(3.0, requires_grad=True)
    plain, hidden = model(INPUT), model[:2](INPUT)
    with edit(model, {"1": lambda x: x + 1, "[1-9]": lambda x: x * scale, "": lambda x: -x}):
        found = model(INPUT)
    expected = -(3 * (3 * (hidden + 1) @ model[2].weight.T + model[2].bias))
    torch.testing.assert_close(found, expected)
    of_scale, of_weight = torch.autograd.grad(found.sum(), (scale, model[0].weight))
    torch.testing.assert_close(of_weight, torch.autograd.grad(expected.sum(), model[0].weight)[0])
    torch.testing.assert_close(
        of_scale, -(6 * (hidden + 1) @ model[2].weight.T + model[2].bias).sum()
    )
    assert torch.equal(model(INPUT), plain)


def test_a_record_sees_the_edits_around_it_and_not_those_inside_it():
    model = sequential()
    plain, edits = model(INPUT), {"2": lambda x: x + 1, "": lambda x: -x}
    with record(model, "2") as around, edit(model, edits), record(model, ["2", ""]) as inside:
        model(INPUT)
        with record(model, "2") as inner:
            model(INPUT)
    assert torch.equal(around["2"][0], plain)
    assert torch.equal(inside["2"][0], plain + 1) and torch.equal(inside[""][0], -(plain + 1))
    assert (len(inside["2"]), len(inner["2"])) == (2, 1)


def test_structures_are_recorded_detached_and_replaced_and_an_edit_returns_something():
    nested = Returns(lambda x: (Pair(x, 2 * x), [3 * x, {"deep": (4 * x,)}], 7))
    model = nn.Sequential(nested, Returns(lambda found: sum(found[0])))
    with record(model, "0") as seen:
        model(INPUT.clone().requires_grad_())
    ((pair, (third, deep), seven),) = seen["0"]
    assert isinstance(pair, Pair) and seven == 7
    for factor, tensor in enumerate((*pair, third, *deep["deep"]), start=1):
        assert torch.equal(tensor, factor * INPUT) and not tensor.requires_grad
    with edit(model, {"0": lambda found: (found[0]._replace(second=0 * INPUT), *found[1:])}):
        assert torch.equal(model(INPUT), INPUT)
    conv = convolution("gine")
    for name in ("", ":message", ":message_inputs"):
        words = rf"edit of '{name}' returned None; .*record\(\)"
        with pytest.raises(TypeError, match=words), edit(conv, {name: lambda _: None}):
            conv(X, EDGE_INDEX, EDGE_ATTR)
    assert num_hooks(conv) == 0


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_stages_of_a_convolution_are_recorded_and_messages_sum_to_what_is_aggregated(name):
    conv = convolution(name, **dict(add_self_loops=False) if "gat" in name else {})
    output = conv(X, EDGE_INDEX, EDGE_ATTR)
    stages = STAGES if name.startswith("gat") else STAGES[:3]
    with record(conv, [f":{stage}" for stage in reversed(stages)]) as seen:
        assert torch.equal(conv(X, EDGE_INDEX, EDGE_ATTR), output)
    assert [*seen] == [f":{stage}" for stage in stages]
    assert [len(outputs) for outputs in seen.values()] == [1] * len(stages)
    (message,), (aggregate,) = seen[":message"], seen[":aggregate"]
    assert not message.requires_grad and not aggregate.requires_grad
    expected = torch.zeros_like(aggregate)
    for edge, target in enumerate(EDGE_INDEX[1].tolist()):
        expected[target] += message[edge]
    torch.testing.assert_close(aggregate, expected)
    assert aggregate[3].abs().max() == 0 < aggregate[4].abs().max()


SIMPLE = EDGE_INDEX[:, [2, 0, 1, 4, 3]]  # no parallel edges, sorted by target
FUSED = {
    "csr": lambda: to_torch_csr_tensor(SIMPLE.flip(0), size=(NODES, NODES)),
    "coo": lambda: torch.sparse_coo_tensor(SIMPLE.flip(0), torch.ones(5), (NODES, NODES)),
    "edge index": lambda: EdgeIndex(SIMPLE, sparse_size=(NODES, NODES), sort_order="col"),
}


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.filterwarnings("ignore:Sparse|Converting sparse:UserWarning")  # of torch and PyG
def test_messages_that_pyg_fuses_away_are_an_error_not_an_empty_list(kind):
    conv, fused = GraphConv(WIDTH, WIDTH), FUSED[kind]()
    torch.testing.assert_close(conv(X, fused), conv(X, SIMPLE))
    for stage in STAGES[:3]:
        words = rf"':{stage}' is not computed.*GraphConv.*\[2, E\]"
        with pytest.raises(RuntimeError, match=words), record(conv, f":{stage}"):
            conv(X, fused)
    conv(X, fused)


def test_edited_attention_weights_inputs_and_aggregates_are_used():
    conv = convolution("gat", add_self_loops=False)
    in_degree = torch.bincount(EDGE_INDEX[1], minlength=NODES)
    uniform = (1 / in_degree[EDGE_INDEX[1]]).unsqueeze(-1).expand(-1, HEADS)
    with edit(conv, {":edge_update": lambda _: uniform}):
        found = conv(X, EDGE_INDEX, EDGE_ATTR)
    expected = scatter((X @ conv.lin.weight.T)[EDGE_INDEX[0]], EDGE_INDEX[1], reduce="mean")
    torch.testing.assert_close(found, expected + conv.bias)
    conv = convolution("transformer")
    with edit(conv, {":message_inputs": lambda i: i | {"query_i": 0 * i["query_i"]}}):
        _, (_, weight) = conv(X, EDGE_INDEX, EDGE_ATTR, return_attention_weights=True)
    torch.testing.assert_close(weight, uniform)
    conv = convolution("gatv2", add_self_loops=False)
    with edit(conv, {":edge_update_inputs": lambda i: i | {"edge_attr": 0 * i["edge_attr"]}}):
        found = conv(X, EDGE_INDEX, EDGE_ATTR)
    assert torch.equal(found, conv(X, EDGE_INDEX, 0 * EDGE_ATTR))
    conv, total = convolution("gine"), torch.ones(NODES, WIDTH)
    with edit(conv, {":aggregate": lambda _: total}), record(conv, ":aggregate") as seen:
        torch.testing.assert_close(conv(X, EDGE_INDEX, EDGE_ATTR), conv.nn(X + total))
    assert torch.equal(seen[":aggregate"][0], total)


# Batch by batch, in evaluation mode.


def network():
    """A training model with a frozen BatchNorm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model[1].eval()
    return model


def state(model):
    """What a scan may change: the mode and the hooks of each module, and whether gradients flow."""
    modules = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    return modules, torch.is_grad_enabled()


@pytest.fixture
def loader():
    torch.manual_seed(1)
    return [torch.randn(rows, 3) for rows in (2, 5, 3)]


def test_each_batch_comes_when_it_is_asked_for_and_no_output_outlives_it(loader):
    def forward(model, x):
        assert not model(x).requires_grad

    model, taken, kept, reduced = network(), [], [], []
    with evaluating(model), record(model, ["", "0"]) as expected:
        predicted = [model(x) for x in loader]

    def watched():
        for batch in loader:
            assert all(output() is None for output in kept)
            taken.append(batch)
            yield batch

    passes = scan(model, watched(), ["0", ""], forward=forward)
    assert taken == []
    for batch, seen in passes:
        index = len(taken) - 1
        assert batch is loader[index]
        assert [*seen] == ["", "0"] and torch.equal(seen[""], predicted[index])
        assert all(torch.equal(x, expected[name][index]) for name, x in seen.items())
        kept += [weakref.ref(output) for output in seen.values()]
        del seen
    assert len(kept) == 6
    with pytest.raises(KeyError, match="no submodule '7'"):
        next(scan(network(), map(pytest.fail, "x"), "7"))
    ((batch, seen), *_) = scan(network().to("meta"), loader, "")
    assert batch.device.type == seen[""].device.type == "meta"
    keep = lambda name, output, batch: reduced.append((name, weakref.ref(output), batch))  # noqa: E731
    for _, seen in scan(network(), loader, "[03]", reduce=keep):
        assert seen == {} and all(output() is None for _, output, _ in reduced)
    assert [name for name, _, _ in reduced] == ["0", "3"] * 3
    assert all(reduced[index][2] is loader[index // 2] for index in range(6))


@pytest.mark.parametrize("end", ["none", "break", "exception", "close", "forward", "reduce"])
def test_in_the_loop_and_however_it_ends_the_model_is_as_it_was(end, loader):
    def fail(*_):
        raise KeyboardInterrupt

    model, fails = network(), end in ("exception", "forward", "reduce")
    before = state(model)
    passes = scan(model, loader, "*", **{end: fail} if end in ("forward", "reduce") else {})
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        for _ in passes:  # held by its name, so that it is not closed by going away
            assert state(model) == before
            if end == "exception":
                fail()
            if end != "none":
                break
    if end == "close":
        passes.close()
    assert state(model) == before


def test_without_a_reducer_a_module_runs_once_in_a_pass():
    steps, found = APPNP(K=3, alpha=0.1), []
    about = dict(names=":message", forward=lambda model, x: model(x, EDGE_INDEX))
    with pytest.raises(RuntimeError, match=r"expected ':message' to run once .* ran 3 times; pass"):
        next(scan(steps, [torch.ones(5, 1)], **about))
    list(scan(steps, [torch.ones(5, 1)], **about, reduce=lambda *each: found.append(each)))
    assert len(found) == 3
    with pytest.raises(RuntimeError, match="expected '1' to run once for each batch, it ran 0"):
        next(scan(network(), [torch.ones(1, 3)], "[01]", forward=lambda model, x: model[0](x)))


# Where hooks do not see what they seem to.


def compiled(function):
    """The function, which has run without hooks."""
    function = torch.compile(function, backend="eager")
    function(INPUT)
    return function


def compiled_in_place(model):
    model[0].compile(backend="eager")
    model[0](INPUT)
    model.forward = compiled(model.forward)
    return model, model


COMPILED = {
    "returned": lambda model: [compiled(model)] * 2,
    "in place": compiled_in_place,
    "a function around it": lambda model: (model, compiled(lambda x: model(x))),
    "unflattened": lambda model: [torch.export.unflatten(torch.export.export(model, (INPUT,)))] * 2,
}


@pytest.mark.parametrize("way", COMPILED)
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
def test_hooks_see_what_compiled_code_computes(way):
    plain = sequential()
    model, run = COMPILED[way](sequential())
    (name,) = resolve(model, "*0")
    with torch.compiler.set_stance("fail_on_recompile"):
        first, second = record(model, name), record(model, name)
        with first as other, nullcontext(second.__enter__()) as seen:
            assert torch.equal(run(INPUT), plain(INPUT))
        assert torch.equal(run(INPUT), plain(INPUT))  # the first is left, the second is not
        second.__exit__(None, None, None)
        with pytest.raises(RuntimeError, match="recompile"):  # again as it was asked for
            torch.compile(lambda x: x + 1, backend="eager")(INPUT)
    assert [len(other[name]), len(seen[name])] == [1, 2]
    assert all(torch.equal(x, plain[0](INPUT)) for x in seen[name])
    with edit(model, {name: torch.zeros_like}):
        zero = run(INPUT)
    assert torch.equal(zero[0], zero[1]) and torch.equal(run(INPUT), plain(INPUT))


MADE = {
    "script": ("0", torch.jit.script),
    "trace": ("0", lambda model: torch.jit.trace(model, INPUT)),
    "export": ("0.0", lambda model: torch.export.export(model, (INPUT,)).module()),
    "symbolic trace": ("0", torch.fx.symbolic_trace),
    "script of a part": ("1.0", lambda model: nn.Sequential(nn.ReLU(), torch.jit.script(model))),
}


@pytest.mark.parametrize("way", MADE)
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_what_code_made_of_a_model_does_not_call_is_refused(way):
    name, make = MADE[way]
    model = make(nn.Sequential(sequential()))
    words = f"'{name}' is in code made by torch.jit, torch.export or torch.fx, which does not call"
    with pytest.raises(TypeError, match=words):
        resolve(model, name)
    if way == "symbolic trace":  # which calls the layers, not what holds them
        with record(model, "*") as seen:
            model(INPUT)
        assert [*seen] == ["", "0.0", "0.1", "0.2"] and all(map(len, seen.values()))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_edits_under_activation_checkpointing_are_refused_and_records_are_not_doubled(
    use_reentrant,
):
    inner = sequential()
    model = Returns(lambda x: checkpoint(inner, x, use_reentrant=use_reentrant))
    model.inner, x = inner, INPUT.clone().requires_grad_()
    with record(model, ["inner.0", "inner"]) as seen:
        model(x).sum().backward()
    assert [len(outputs) for outputs in seen.values()] == [1, 1]
    doubled = {"inner.0": lambda x: 2 * x}
    words = "'inner.0' is edited under activation checkpointing"
    with pytest.raises(RuntimeError, match=words), edit(model, doubled):
        model(x)
    output = model(x).sum()
    with pytest.raises(RuntimeError, match=words), edit(model, doubled):
        output.backward()


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.jacrev, torch.func.jacfwd])
def test_tensors_that_live_only_inside_of_a_transform_are_not_kept(transform):
    model, shapes = sequential(), []
    words = "'0' lives only inside of torch.vmap or torch.func"
    with pytest.raises(RuntimeError, match=words), record(model, "0"):
        transform(lambda x: model(x))(INPUT)
    with record(model, "0", reduce=lambda name, x: shapes.append(x.shape)):
        transform(lambda x: model(x))(INPUT)
    assert len(shapes) == 1


OWN = """
from torch_geometric.nn import MessagePassing
class Own(MessagePassing):
    def forward(self, x, edge_index):
        a = self.edge_updater(edge_index, x=x)
        return self.propagate(edge_index, x=x, a=a)
    def edge_update(self, x_i, x_j): return x_i * x_j
    def message(self, x_j, a): return a * x_j
"""


def test_of_a_layer_without_source_what_pyg_shows_per_node_is_refused():
    exec(OWN, names := {})
    conv = names["Own"]()
    with pytest.raises(KeyError, match=r"shows only .*edge_update: PyG cannot read its source"):
        resolve(conv, ":edge_update_inputs")
    with record(conv, [":message_inputs", ":edge_update", ":message"]) as seen:
        conv(X, EDGE_INDEX)
    source, target = X[EDGE_INDEX]
    assert torch.equal(seen[":message_inputs"][0]["x_j"], source)
    assert torch.equal(seen[":edge_update"][0], target * source)
    assert torch.equal(seen[":message"][0], target * source * source)
    with edit(conv, {":edge_update": torch.zeros_like}):
        assert not conv(X, EDGE_INDEX).any()


# How a model is called, and which axes of what it returns are rows; more in test_reporting.


def one_edge_each(nodes):
    return Data(x=torch.randn(nodes, WIDTH), edge_index=torch.tensor([[0], [1]]))


NINE = Batch.from_data_list([one_edge_each(3)] * 9)  # 27 nodes, 9 edges
LOOP = NINE.clone()
LOOP.edge_index[1, 0] = 0


@pytest.mark.parametrize(
    ("shape", "batch", "axes"),
    [
        ((27, 2, 5), NINE, "rows, heads, channels"),
        ((36, 2, 5), NINE, "rows, heads, channels"),  # edges and a loop for each node
        ((35, 2, 5), LOOP, "rows, heads, channels"),  # with a loop in place of one of its own
        ((9, 3, 5), NINE, None),  # edges or padded graphs
        ((9, 2, 5), one_edge_each(9), "rows, heads, channels"),
        ((1, 9, 5), one_edge_each(9), None),  # an edge or the graph
        ((9, 2, 5), Data(x=X, edge_index=torch.eye(9).to_sparse()), None),
        ((9, 2, 5), Data(x=X), None),
        ((9, 2, 5), torch.randn(9, 4), None),
    ],
)
def test_three_axes_are_rows_and_heads_where_the_batch_leaves_no_doubt(shape, batch, axes):
    output = torch.randn(shape)
    if axes:
        rows, found = as_rows("layer", nn.Identity(), output, batch)
        assert found == axes and torch.equal(rows, output.flatten(1))
        return
    with pytest.raises(ValueError, match=r"does not say what a row is: name .* rows=lambda"):
        as_rows("layer", nn.Identity(), output, batch)


def of_parts(**parts):
    return nn.ModuleDict(parts)


ATTENTION = GraphConv(WIDTH, WIDTH)
ATTENTION.score = nn.Identity()


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (of_parts(score=nn.Identity()), ["score"]),
        (ATTENTION, ["score"]),
        (of_parts(layer=ATTENTION, score=nn.Identity()), ["layer.score"]),  # without the head
        (of_parts(conv=GraphConv(2, 2), score=nn.Identity()), "*:message"),
        (of_parts(conv=GraphConv(2, 2), score=nn.Linear(2, 2)), "*:message"),
        (of_parts(conv=GraphConv(2, 2), edge_score=nn.Identity()), "*:message"),
    ],
)
def test_the_scores_of_layers_are_looked_at_by_default_and_no_head_of_that_name(model, names):
    assert default_names(model) == names


def test_edges_keep_their_features_where_self_loops_are_put_last():
    loop = torch.tensor([[1], [1]])
    edge_index = torch.cat([EDGE_INDEX[:, :3], loop, EDGE_INDEX[:, 3:]], dim=1)
    data = Data(x=X, edge_index=edge_index, edge_attr=torch.randn(EDGES + 1, WIDTH))
    changed, place = with_loops_of_layers(GATConv(WIDTH, 2, edge_dim=WIDTH), data)
    assert changed.num_edges == EDGES + NODES and place[3] == EDGES + 1
    assert torch.equal(changed.edge_index[:, place], edge_index)
    assert torch.equal(changed.edge_attr[place], data.edge_attr)


class Pooled(nn.Module):
    """Takes what PyG's models take if it is there."""

    def forward(self, x, batch=None, batch_size=None):
        return batch_size


class Seeds(nn.Module):
    def forward(self, x, batch_size):
        return batch_size


class Typed(nn.Module):
    def forward(self, x_dict, edge_attr_dict=None):
        return edge_attr_dict


def test_what_is_optional_is_given_where_a_batch_carries_it():
    sampled = Data(x=X, batch_size=3)  # of a NeighborLoader: its seed nodes, not graphs
    assert (call(Pooled(), sampled), call(Pooled(), NINE)) == (None, 9)
    assert call(Seeds(), sampled) == 3
    hetero = HeteroData(a={"x": X})
    assert call(Typed(), hetero) is None
    hetero["a", "to", "a"].edge_attr = EDGE_ATTR
    assert [*call(Typed(), hetero)] == [("a", "to", "a")]


class Opaque:
    """Says itself what goes to a device."""

    def __init__(self, x):
        self.x, self.moved = x, None

    def to(self, device):
        other = Opaque(self.x.to(device))
        other.moved = device.type
        return other


def test_what_has_a_way_of_its_own_to_a_device_is_asked():
    settings = dict(names=(), forward=lambda model, batch: None)
    ((batch, _),) = scan(sequential().to("meta"), [Opaque(X)], **settings)
    assert (batch.moved, batch.x.device.type) == ("meta", "meta")
    packed = pack_sequence([torch.ones(3, 4), torch.ones(2, 4)])
    ((batch, _),) = scan(sequential().to("meta"), [packed], **settings)
    assert (batch.data.device.type, batch.batch_sizes.device.type) == ("meta", "cpu")


@pytest.mark.parametrize("make", [lambda x: Data(x=x), lambda x: {"x": x}, lambda x: (x, [x])])
def test_a_scan_leaves_batches_where_they_are(make):
    given, model = make(X), sequential().to("meta")
    ((batch, _),) = scan(model, [given], (), forward=lambda model, batch: None)
    devices = []
    map_tensors(batch, lambda x: devices.append(x.device.type))
    map_tensors(given, lambda x: devices.append(x.device.type))
    number = len(devices) // 2
    assert devices == ["meta"] * number + ["cpu"] * number


def test_a_module_that_refuses_to_change_its_mode_is_evaluated_as_it_is():
    class Exported(nn.Module):
        def train(self, mode=True):
            raise NotImplementedError

    class Flushing(nn.Module):
        def train(self, mode=True):
            self.flushed = not mode
            return super().train(mode)

    model = nn.Sequential(Flushing(), Exported(), nn.Dropout())
    with evaluating(model):
        assert not model[2].training and model[0].flushed, "what a module does itself is done"
    assert model[0].training and model[2].training


def test_models_that_are_wrapped_are_called_by_name_and_a_failing_call_says_how_it_was_made():
    conv, data = GraphConv(WIDTH, WIDTH), Data(x=X, edge_index=EDGE_INDEX)
    compiled_conv = torch.compile(conv, backend="eager")
    for wrapped in (nn.DataParallel(conv), nn.DataParallel(AveragedModel(conv)), compiled_conv):
        assert torch.equal(call(wrapped, data), conv(X, EDGE_INDEX))
    for model, batch, words in (
        (sequential(), [INPUT, INPUT], "called with the whole batch, a list; otherwise, pass forw"),
        (conv, Data(x=X.T, edge_index=EDGE_INDEX), "called with x, edge_index, which the batch"),
    ):
        with pytest.raises((TypeError, RuntimeError)) as caught:
            call(model, batch)
        assert words in caught.value.__notes__[0]
