"""Recording and editing what submodules return: names, order, removal, and what is kept."""

import weakref
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import (
    APPNP,
    GATConv,
    GATv2Conv,
    GCNConv,
    GINEConv,
    GraphConv,
    TransformerConv,
)
from torch_geometric.utils import scatter, to_torch_csr_tensor

from mapkg.hooks import STAGES, edit, record, resolve
from mapkg.models import build
from studies.published import CONFIGS

Pair = namedtuple("Pair", "first second")


def sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def graph_network():
    torch.manual_seed(0)
    config = CONFIGS["GT-ZINC"].replace(hidden_channels=8, heads=2, num_layers=3)
    return build(config).eval()


GRAPH = (
    torch.tensor([0, 1, 2, 3, 1]),
    torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]]),
    torch.tensor([1, 2, 3, 1, 1, 2]),
)
INPUT = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])


def num_hooks(model):
    """Hooks of torch and of PyG on all modules: every attribute of theirs that ends in _hooks."""
    return sum(
        len(hooks)
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name.endswith(("forward_hooks", "forward_pre_hooks"))
    )


# Names.


def test_names_and_patterns_resolve_in_the_order_of_the_model():
    model = graph_network()
    found = resolve(model, ["layers.2.attention.score", "layers.[01].*.score", "node_embedding"])
    assert list(found) == [
        "node_embedding",
        "layers.0.attention.score",
        "layers.1.attention.score",
        "layers.2.attention.score",
    ]
    for name, module in found.items():
        assert module is model.get_submodule(name)


def test_a_module_that_several_patterns_match_is_resolved_once():
    model = sequential()
    assert list(resolve(model, ["0", "0", "[0-2]", "?"])) == ["0", "1", "2"]
    with record(model, ["0", "[01]"]) as seen:
        model(INPUT)
    assert {name: len(outputs) for name, outputs in seen.items()} == {"0": 1, "1": 1}


def test_patterns_match_whole_names_and_their_case():
    model = sequential()
    assert list(resolve(graph_network(), "*.score")) == [
        f"layers.{number}.attention.score" for number in range(3)
    ]
    with pytest.raises(KeyError):
        resolve(graph_network(), "score")
    with pytest.raises(KeyError):
        resolve(nn.ModuleDict({"a": model}), "A.*")


def test_an_exact_name_wins_over_its_reading_as_a_pattern():
    model = nn.ModuleDict({"a[1]": nn.ReLU(), "a1": nn.Tanh()})
    assert list(resolve(model, "a[1]")) == ["a[1]"]


def test_the_star_stands_for_every_module_and_the_empty_name_for_the_model():
    model = sequential()
    assert list(resolve(model, "*")) == ["", "0", "1", "2"]
    assert resolve(model, "") == {"": model}


@pytest.mark.parametrize("context", ["record", "edit"])
@pytest.mark.parametrize("unknown", ["layers.0.atention.score", "layers.*.scores"])
def test_an_unknown_name_is_an_error_before_the_first_hook(context, unknown):
    model = graph_network()
    names = ["layers.0.attention.score", unknown]
    opened = {
        "record": lambda: record(model, names),
        "edit": lambda: edit(model, dict.fromkeys(names, torch.zeros_like)),
    }[context]()
    with pytest.raises(KeyError) as caught, opened:
        pytest.fail("the context was entered")
    message = str(caught.value)
    assert f"GraphNetwork has no submodule '{unknown}'" in message
    assert "near matches: " in message
    assert "layers.0.attention.score" in message
    assert num_hooks(model) == 0


def test_a_name_like_no_other_says_so():
    with pytest.raises(KeyError, match="no submodule 'zzzzzz'; it has no similar name"):
        resolve(sequential(), "zzzzzz")


# Recording.


def test_every_output_is_recorded_and_none_is_changed():
    model = sequential()
    expected = model(INPUT)
    with record(model, "*") as seen:
        found = model(INPUT)
    assert torch.equal(found, expected)
    hidden = INPUT @ model[0].weight.T + model[0].bias
    torch.testing.assert_close(seen["0"], [hidden])
    torch.testing.assert_close(seen["1"], [hidden.clamp(min=0)])
    assert torch.equal(seen["2"][0], expected)
    assert torch.equal(seen[""][0], expected)


@pytest.mark.parametrize("training", [False, True])
def test_a_network_gives_bitwise_the_same_recorded_or_not(training):
    model = graph_network().train(training)
    expected = model(*GRAPH)
    loss = expected.square().sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    with record(model, "*"):
        found = model(*GRAPH)
        own = torch.autograd.grad(found.square().sum(), list(model.parameters()), allow_unused=True)
    assert torch.equal(found, expected)
    for ours, theirs in zip(own, gradients, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert model.training == training


def test_repeated_forward_passes_are_recorded_in_order():
    model = sequential()
    inputs = [INPUT, 2 * INPUT, INPUT[:1]]
    with record(model, ["0", "2"]) as seen:
        outputs = [model(x) for x in inputs]
    for name in ("0", "2"):
        assert len(seen[name]) == 3
    for recorded, output in zip(seen["2"], outputs, strict=True):
        assert torch.equal(recorded, output)
    model(INPUT)
    assert len(seen["2"]) == 3, "recorded after the context was left"


def test_records_are_detached_and_share_memory_with_the_outputs():
    model = sequential()
    with record(model, "2") as seen:
        output = model(INPUT)
    assert output.requires_grad
    assert not seen["2"][0].requires_grad
    assert seen["2"][0].data_ptr() == output.data_ptr()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_recording_works_without_gradients(mode):
    model = sequential()
    expected = model(INPUT)
    with mode(), record(model, ["1", "2"]) as seen:
        assert torch.equal(model(INPUT), expected)
    assert torch.equal(seen["2"][0], expected)


def test_a_module_used_twice_in_a_forward_pass_is_recorded_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(3, 3)

        def forward(self, x):
            return self.shared(self.shared(x))

    torch.manual_seed(0)
    model = Twice()
    with record(model, "shared") as seen:
        output = model(INPUT)
    first, second = seen["shared"]
    assert torch.equal(first, model.shared(INPUT))
    assert torch.equal(second, output)
    assert torch.equal(model.shared(first), second)


class Returns(nn.Module):
    """Returns a structure made from its input."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (x, 2 * x),
        lambda x: [x, 2 * x],
        lambda x: {"first": x, "second": 2 * x},
        lambda x: Pair(x, 2 * x),
        lambda x: (x, [2 * x, {"deep": Pair(3 * x, None)}], 7),
    ],
    ids=["tuple", "list", "dict", "namedtuple", "nested"],
)
def test_structures_of_tensors_are_recorded_as_they_are_and_detached(make):
    model = nn.Sequential(Returns(make))
    x = INPUT.clone().requires_grad_()
    with record(model, "0") as seen:
        output = model(x)
    (recorded,) = seen["0"]

    def check(recorded, output):
        assert type(recorded) is type(output)
        if isinstance(output, torch.Tensor):
            assert torch.equal(recorded, output)
            assert not recorded.requires_grad
            assert output.requires_grad
        elif isinstance(output, dict):
            assert recorded.keys() == output.keys()
            for key in output:
                check(recorded[key], output[key])
        elif isinstance(output, tuple | list):
            for pair in zip(recorded, output, strict=True):
                check(*pair)
        else:
            assert recorded == output

    check(recorded, output)


@pytest.mark.parametrize("make", [lambda x: x, lambda x: Pair({"deep": [x]}, 1)])
def test_an_output_that_is_changed_in_place_afterwards_is_reported(make):
    def first_tensor(output):
        return output if isinstance(output, torch.Tensor) else output.first["deep"][0]

    model = nn.Sequential(nn.Identity(), Returns(make))
    with (
        pytest.raises(RuntimeError, match=r"output of '1' was changed in place.*reduce=lambda"),
        record(model, "1"),
    ):
        first_tensor(model(INPUT.clone())).add_(1)
    assert num_hooks(model) == 0


def test_an_in_place_module_behind_a_recorded_one_is_reported():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    with pytest.raises(RuntimeError, match="output of '0'"), record(model, "0"), torch.no_grad():
        model(INPUT)
    kept = []
    with record(model, "0", reduce=lambda name, x: kept.append(x.clone())), torch.no_grad():
        model(INPUT)
    torch.testing.assert_close(kept[0], model[0](INPUT).detach())
    assert (kept[0] < 0).any()


# A reducer.


def test_a_reducer_gets_every_output_by_name_without_gradients():
    model = sequential()
    calls = []

    def reduce(name, x):
        assert not torch.is_grad_enabled()
        calls.append((name, x.requires_grad, x.square().sum().item()))

    with record(model, ["0", "2"], reduce=reduce) as seen:
        first, second = model(INPUT), model(2 * INPUT)
        assert torch.is_grad_enabled()
    assert seen == {"0": [], "2": []}
    assert [name for name, *_ in calls] == ["0", "2", "0", "2"]
    assert not any(requires_grad for _, requires_grad, _ in calls)
    assert calls[1][2] == first.square().sum().item()
    assert calls[3][2] == second.square().sum().item()
    assert second.requires_grad


def test_with_a_reducer_no_output_outlives_its_forward_pass():
    model = sequential()
    outputs, given = [], []
    for module in model.modules():
        module.register_forward_hook(lambda _module, _x, y: outputs.append(weakref.ref(y)))
    with torch.no_grad(), record(model, "*", reduce=lambda _, x: given.append(weakref.ref(x))):
        for _ in range(5):
            model(INPUT)
            assert all(reference() is None for reference in outputs + given)
    assert len(outputs) == len(given) == 5 * 4


# Removal of hooks.


@pytest.mark.parametrize("context", ["record", "edit"])
@pytest.mark.parametrize("where", ["nowhere", "body", "forward"])
def test_hooks_are_there_inside_the_context_and_gone_after_it(context, where):
    model = sequential()
    foreign = []
    model[0].register_forward_hook(lambda *_: foreign.append(1))
    opened = {
        "record": lambda: record(model, ["0", "2"]),
        "edit": lambda: edit(model, {"0": torch.relu, "2": torch.relu}),
    }[context]()
    inside = None
    try:
        with opened:
            inside = num_hooks(model)
            if where == "body":
                raise ArithmeticError
            model(INPUT if where == "nowhere" else INPUT.T)  # the second has the wrong width
    except (ArithmeticError, RuntimeError):
        assert where != "nowhere"
    assert inside == 3
    assert num_hooks(model) == 1, "the hook of somebody else stays"
    model(INPUT)
    assert foreign


# Editing.


def test_an_edit_replaces_the_output_for_what_follows():
    model = sequential()
    with edit(model, {"1": lambda x: x + 10}):
        found = model(INPUT)
    hidden = (INPUT @ model[0].weight.T + model[0].bias).clamp(min=0) + 10
    torch.testing.assert_close(found, hidden @ model[2].weight.T + model[2].bias)
    assert not torch.allclose(model(INPUT), found)


def test_gradients_flow_through_an_edit():
    model = sequential()
    scale = torch.tensor(3.0, requires_grad=True)
    with edit(model, {"2": lambda x: x * scale}):
        output = model(INPUT)
    weight_gradient, scale_gradient = torch.autograd.grad(output.sum(), (model[0].weight, scale))
    plain = model(INPUT)
    torch.testing.assert_close(scale_gradient, plain.sum())
    (expected,) = torch.autograd.grad(plain.sum(), model[0].weight)
    torch.testing.assert_close(weight_gradient, 3 * expected)


def test_an_edit_of_the_score_stops_attention_from_choosing():
    model = graph_network()
    with (
        edit(model, {"layers.*.score": torch.zeros_like}),
        record(model, "layers.*.attention_weight") as seen,
    ):
        model(*GRAPH)
    in_degree = torch.bincount(GRAPH[1][1], minlength=5)[GRAPH[1][1]]
    expected = (1 / in_degree).unsqueeze(1).expand(-1, 2)
    for (weight,) in seen.values():
        torch.testing.assert_close(weight, expected, rtol=2e-6, atol=0)


def test_edits_of_one_module_are_applied_in_the_order_given():
    model = sequential()
    expected = 2 * (model(INPUT) + 1)
    with edit(model, {"2": lambda x: x + 1, "[2-9]": lambda x: 2 * x}):
        assert torch.equal(model(INPUT), expected)
    with edit(model, {"[2-9]": lambda x: 2 * x, "2": lambda x: x + 1}):
        assert not torch.equal(model(INPUT), expected)


def test_an_edit_of_the_model_itself_changes_what_it_returns():
    model = sequential()
    with edit(model, {"": lambda x: -x}):
        found = model(INPUT)
    assert torch.equal(found, -model(INPUT))


def test_an_edit_that_returns_nothing_is_an_error():
    model = sequential()
    with (
        pytest.raises(TypeError, match=r"edit of '1' returned None; .*record\(\)"),
        edit(model, {"1": lambda x: None}),
    ):
        model(INPUT)
    assert num_hooks(model) == 0


def test_an_edit_can_replace_a_structure():
    model = nn.Sequential(Returns(lambda x: Pair(x, 2 * x)), Returns(lambda pair: sum(pair)))
    with edit(model, {"0": lambda pair: pair._replace(second=0 * pair.second)}):
        assert torch.equal(model(INPUT), INPUT)
    assert torch.equal(model(INPUT), 3 * INPUT)


def test_a_record_inside_an_edit_sees_the_edited_output():
    model = sequential()
    expected = model(INPUT)
    with edit(model, {"2": lambda x: x + 1}), record(model, "2") as seen:
        output = model(INPUT)
    assert torch.equal(seen["2"][0], expected + 1)
    assert torch.equal(output, expected + 1)


def test_a_record_around_an_edit_sees_the_original_output():
    model = sequential()
    expected = model(INPUT)
    with record(model, ["0", "2"]) as seen, edit(model, {"2": lambda x: x + 1}):
        output = model(INPUT)
    assert torch.equal(seen["2"][0], expected)
    assert torch.equal(output, expected + 1)


def test_records_nest_and_an_inner_one_ends_alone():
    model = sequential()
    with record(model, "0") as outer:
        with record(model, "0") as inner:
            model(INPUT)
        model(INPUT)
    assert (len(outer["0"]), len(inner["0"])) == (2, 1)


# Other people's models.


def test_a_pyg_model_is_recorded_and_edited_like_any_other():
    class TwoLayers(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = GATConv(3, 4, heads=2)
            self.second = GATConv(8, 2)

        def forward(self, x, edge_index):
            return self.second(self.first(x, edge_index).relu(), edge_index)

    torch.manual_seed(0)
    model, edge_index = TwoLayers(), torch.tensor([[0, 1], [1, 0]])
    expected = model(INPUT, edge_index)
    with record(model, ["first", "second"]) as seen:
        assert torch.equal(model(INPUT, edge_index), expected)
    assert torch.equal(seen["first"][0], model.first(INPUT, edge_index))
    assert torch.equal(seen["second"][0], expected)
    with edit(model, {"first": torch.zeros_like}):
        found = model(INPUT, edge_index)
    torch.testing.assert_close(found, model.second.bias.expand(2, 2))


# Inside the message passing of PyG. Five nodes, seven edges, node 3 without incoming edges.

NODES, EDGES, WIDTH, HEADS = 5, 7, 6, 2
EDGE_INDEX = torch.tensor([[0, 1, 2, 3, 0, 3, 2], [1, 2, 0, 4, 2, 4, 4]])
CONVOLUTIONS = {
    "gat": lambda **kw: GATConv(WIDTH, 3, HEADS, edge_dim=WIDTH, **kw),
    "gatv2": lambda **kw: GATv2Conv(WIDTH, 3, HEADS, edge_dim=WIDTH, **kw),
    "transformer": lambda: TransformerConv(WIDTH, 3, HEADS, edge_dim=WIDTH),
    "gine": lambda: GINEConv(nn.Linear(WIDTH, WIDTH)),
    "gcn": lambda: GCNConv(WIDTH, WIDTH),
}


class Convolutions(nn.Module):
    """Several convolutions one after another, and a head."""

    def __init__(self, *convs):
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x, edge_index, edge_attr):
        for conv in self.convs:
            x = conv(x, edge_index) if isinstance(conv, GCNConv) else conv(x, edge_index, edge_attr)
        return self.head(x)


def convolution(name, **options):
    torch.manual_seed(1)
    return CONVOLUTIONS[name](**options)


def node_and_edge_features():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(NODES, WIDTH, generator=generator), torch.randn(
        EDGES, WIDTH, generator=generator
    )


def call(conv, x, edge_index, edge_attr, **options):
    if isinstance(conv, GCNConv):
        return conv(x, edge_index)
    return conv(x, edge_index, edge_attr, **options)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_stages_of_a_convolution_are_recorded_and_its_output_is_bitwise_the_same(name):
    x, edge_attr = node_and_edge_features()
    conv = convolution(name)
    expected = call(conv, x, EDGE_INDEX, edge_attr)
    stages = STAGES if name.startswith("gat") else STAGES[:3]
    with record(conv, [f":{stage}" for stage in reversed(stages)]) as seen:
        assert torch.equal(call(conv, x, EDGE_INDEX, edge_attr), expected)
    assert list(seen) == [f":{stage}" for stage in stages]
    assert [len(outputs) for outputs in seen.values()] == [1] * len(stages)
    assert not any(
        x.requires_grad for x in (*seen[":message"], *seen[":aggregate"], seen[":message"][0])
    )
    assert num_hooks(conv) == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gat", dict(add_self_loops=False)),
        ("gatv2", dict(add_self_loops=False)),
        ("transformer", {}),
        ("gine", {}),
    ],
)
def test_the_messages_to_a_node_sum_to_what_it_aggregates(name, options):
    x, edge_attr = node_and_edge_features()
    conv = convolution(name, **options)
    with record(conv, [":message", ":aggregate"]) as seen:
        call(conv, x, EDGE_INDEX, edge_attr)
    (message,), (aggregate,) = seen[":message"], seen[":aggregate"]
    assert len(message) == EDGES
    expected = torch.zeros_like(aggregate)
    for edge, target in enumerate(EDGE_INDEX[1].tolist()):
        expected[target] += message[edge]
    torch.testing.assert_close(aggregate, expected)
    assert aggregate[3].abs().max() == 0
    assert aggregate[4].abs().max() > 0


def test_what_a_gcn_aggregates_is_the_normalised_adjacency_times_its_features():
    x, edge_attr = node_and_edge_features()
    conv = convolution("gcn")
    with record(conv, ["lin", ":message", ":aggregate"]) as seen:
        call(conv, x, EDGE_INDEX, edge_attr)
    adjacency = torch.eye(NODES)
    for source, target in EDGE_INDEX.T.tolist():
        adjacency[target, source] += 1
    root = adjacency.sum(dim=1).sqrt()
    expected = (adjacency / root[:, None] / root[None, :]) @ (x @ conv.lin.weight.T)
    torch.testing.assert_close(seen[":aggregate"][0], expected)
    assert len(seen[":message"][0]) == EDGES + NODES  # with PyG's self-loops
    torch.testing.assert_close(seen[":message"][0].sum(dim=0), expected.sum(dim=0))


@pytest.mark.parametrize("name", ["gat", "gatv2"])
def test_recorded_attention_weights_are_those_that_pyg_returns(name):
    x, edge_attr = node_and_edge_features()
    conv = convolution(name)
    with record(conv, ":edge_update") as seen:
        _, (edge_index, weight) = conv(x, EDGE_INDEX, edge_attr, return_attention_weights=True)
    assert torch.equal(seen[":edge_update"][0], weight)
    sums = scatter(seen[":edge_update"][0], edge_index[1], reduce="sum")
    torch.testing.assert_close(sums, torch.ones(NODES, HEADS))


def test_recorded_inputs_are_the_features_of_source_and_target():
    x, edge_attr = node_and_edge_features()
    conv = convolution("gine")
    with record(conv, [":message_inputs", ":message"]) as seen:
        call(conv, x, EDGE_INDEX, edge_attr)
    (inputs,) = seen[":message_inputs"]
    assert set(inputs) == {"x_j", "edge_attr"}
    assert torch.equal(inputs["x_j"], x[EDGE_INDEX[0]])
    assert torch.equal(seen[":message"][0], (x[EDGE_INDEX[0]] + edge_attr).relu())
    conv = convolution("gatv2", add_self_loops=False)
    with record(conv, [":edge_update_inputs", "lin_l", "lin_r"]) as seen:
        call(conv, x, EDGE_INDEX, edge_attr)
    (inputs,) = seen[":edge_update_inputs"]
    assert torch.equal(inputs["x_j"].flatten(1), seen["lin_l"][0][EDGE_INDEX[0]])
    assert torch.equal(inputs["x_i"].flatten(1), seen["lin_r"][0][EDGE_INDEX[1]])
    assert torch.equal(inputs["edge_attr"], edge_attr)


def test_a_module_that_propagates_several_times_is_recorded_each_time():
    x, _ = node_and_edge_features()
    conv = APPNP(K=3, alpha=0.1)
    with record(conv, [":message", ":aggregate"]) as seen:
        output = conv(x, EDGE_INDEX)
        conv(x, EDGE_INDEX)
    assert [len(outputs) for outputs in seen.values()] == [6, 6]
    torch.testing.assert_close(output, 0.9 * seen[":aggregate"][2] + 0.1 * x)


def test_parts_of_decomposed_messages_are_recorded_one_by_one():
    # PyG takes its other implementation of propagate here.
    x, edge_attr = node_and_edge_features()
    conv = convolution("gcn")
    with record(conv, ":message") as whole:
        call(conv, x, EDGE_INDEX, edge_attr)
    conv.decomposed_layers = 2
    with record(conv, ":message") as parts:
        call(conv, x, EDGE_INDEX, edge_attr)
    assert len(parts[":message"]) == 2
    assert torch.equal(torch.cat(parts[":message"], dim=-1), whole[":message"][0])


def test_a_stage_streams_through_a_reducer():
    x, edge_attr = node_and_edge_features()
    model = Convolutions(convolution("gat"), convolution("gine"))
    calls = []
    with record(model, "convs.*:message", lambda name, m: calls.append((name, m.requires_grad))):
        model(x, EDGE_INDEX, edge_attr)
    assert calls == [("convs.0:message", False), ("convs.1:message", False)]


def test_a_pattern_with_a_stage_stands_for_the_modules_that_have_it():
    model = Convolutions(convolution("gat"), convolution("transformer"))
    assert list(resolve(model, "*:edge_update")) == ["convs.0:edge_update"]
    found = resolve(model, ["*:message", "head"])
    assert list(found) == ["convs.0:message", "convs.1:message", "head"]
    assert found["convs.1:message"] is model.convs[1]
    assert list(resolve(graph_network(), "layers.*:message")) == [
        f"layers.{number}.attention:message" for number in range(3)
    ]


def test_our_own_attention_has_messages_too():
    model = graph_network()
    names = ["layers.0.attention:message", "layers.0.attention.attended"]
    with record(model, names) as seen:
        model(*GRAPH)
    (message,), (attended,) = seen.values()
    torch.testing.assert_close(scatter(message, GRAPH[1][1], reduce="sum").flatten(1), attended)


def test_a_name_with_a_colon_wins_over_its_reading_as_a_stage():
    model = nn.ModuleDict({"a": convolution("gat"), "a:message": nn.ReLU()})
    assert list(resolve(model, "a:message")) == ["a:message"]
    with record(model, "a:message") as seen:
        model["a:message"](INPUT)
    assert torch.equal(seen["a:message"][0], INPUT.relu())


@pytest.mark.parametrize("context", ["record", "edit"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convs.0:mesage", "unknown stage 'mesage'; stages: message_inputs, message, aggregate, "),
        ("convs.1:edge_update", "TransformerConv computes only message_inputs, message, aggregate"),
        ("head:message", "Linear is not a PyG MessagePassing module, only its output can be seen"),
        ("conv.0:message", "no submodule 'conv.0'; near matches: convs.0"),
        ("zzz:zzz", "no submodule 'zzz:zzz'"),
    ],
)
def test_a_stage_that_is_not_there_is_an_error_before_the_first_hook(context, name, message):
    model = Convolutions(convolution("gat"), convolution("transformer"))
    opened = {
        "record": lambda: record(model, ["convs.0:message", name]),
        "edit": lambda: edit(model, dict.fromkeys(["convs.0:message", name], torch.zeros_like)),
    }[context]()
    with pytest.raises(KeyError, match=message), opened:
        pytest.fail("the context was entered")
    assert num_hooks(model) == 0


@pytest.mark.parametrize("context", ["record", "edit"])
@pytest.mark.parametrize("where", ["nowhere", "body", "forward"])
def test_hooks_of_stages_are_gone_after_the_context_however_it_ends(context, where):
    x, edge_attr = node_and_edge_features()
    model = Convolutions(convolution("gat"), convolution("transformer"))
    model.convs[0].register_message_forward_hook(lambda *_: None)
    names = [f"*:{stage}" for stage in STAGES]
    opened = {
        "record": lambda: record(model, names),
        "edit": lambda: edit(model, dict.fromkeys(names, lambda output: output)),
    }[context]()
    try:
        with opened:
            inside = num_hooks(model)
            if where == "body":
                raise ArithmeticError
            model(x if where == "nowhere" else x.T, EDGE_INDEX, edge_attr)
    except (ArithmeticError, RuntimeError):
        assert where != "nowhere"
    # GATConv: 5 stages, TransformerConv: 3; 3 of each with a guard against fused aggregation.
    assert inside == 1 + 5 + 3 + 2 * 3
    assert num_hooks(model) == 1, "the hook of somebody else stays"


@pytest.mark.parametrize("stage", ["message_inputs", "message", "aggregate"])
@pytest.mark.parametrize("kind", ["sparse tensor", "edge index"])
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")  # torch calls its sparse tensors beta
def test_messages_that_pyg_fuses_away_are_an_error_not_an_empty_list(stage, kind):
    x, _ = node_and_edge_features()
    conv = GraphConv(WIDTH, WIDTH)
    simple = EDGE_INDEX[:, [2, 0, 1, 4, 3]]  # no parallel edges, sorted by target
    fused = {
        "sparse tensor": lambda: to_torch_csr_tensor(simple.flip(0), size=(NODES, NODES)),
        "edge index": lambda: EdgeIndex(simple, sparse_size=(NODES, NODES), sort_order="col"),
    }[kind]()
    torch.testing.assert_close(conv(x, fused), conv(x, simple))
    with (
        pytest.raises(RuntimeError, match=rf"':{stage}' is not computed.*GraphConv.*\[2, E\]"),
        record(conv, f":{stage}"),
    ):
        conv(x, fused)
    assert num_hooks(conv) == 0
    conv(x, fused)


def test_without_its_message_an_edge_is_gone():
    x, edge_attr = node_and_edge_features()
    conv = convolution("gine")
    kept = torch.arange(EDGES) != 4
    expected = conv(x, EDGE_INDEX[:, kept], edge_attr[kept])
    with edit(conv, {":message": lambda m: m * kept.unsqueeze(-1)}):
        found = conv(x, EDGE_INDEX, edge_attr)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(conv(x, EDGE_INDEX, edge_attr), expected)


def test_edited_attention_weights_are_used():
    x, edge_attr = node_and_edge_features()
    conv = convolution("gat", add_self_loops=False)
    in_degree = torch.bincount(EDGE_INDEX[1], minlength=NODES)
    uniform = (1 / in_degree[EDGE_INDEX[1]]).unsqueeze(-1).expand(-1, HEADS)
    with edit(conv, {":edge_update": lambda _: uniform}):
        found = conv(x, EDGE_INDEX, edge_attr)
    expected = scatter((x @ conv.lin.weight.T)[EDGE_INDEX[0]], EDGE_INDEX[1], reduce="mean")
    torch.testing.assert_close(found, expected + conv.bias)


def test_edited_inputs_are_used():
    x, edge_attr = node_and_edge_features()
    conv = convolution("transformer")
    with edit(conv, {":message_inputs": lambda i: i | {"query_i": 0 * i["query_i"]}}):
        _, (_, weight) = conv(x, EDGE_INDEX, edge_attr, return_attention_weights=True)
    in_degree = torch.bincount(EDGE_INDEX[1])[EDGE_INDEX[1]]
    torch.testing.assert_close(weight, (1 / in_degree).unsqueeze(-1).expand(-1, HEADS))
    conv = convolution("gatv2", add_self_loops=False)
    with edit(conv, {":edge_update_inputs": lambda i: i | {"edge_attr": 0 * i["edge_attr"]}}):
        found = conv(x, EDGE_INDEX, edge_attr)
    assert torch.equal(found, conv(x, EDGE_INDEX, 0 * edge_attr))
    assert not torch.allclose(found, conv(x, EDGE_INDEX, edge_attr))


def test_an_edited_aggregate_is_used_and_gradients_flow_through_it():
    x, edge_attr = node_and_edge_features()
    conv = convolution("gine")
    scale = torch.tensor(0.5, requires_grad=True)
    with edit(conv, {":aggregate": lambda a: scale * a}), record(conv, ":aggregate") as seen:
        output = conv(x, EDGE_INDEX, edge_attr)
    message = (x[EDGE_INDEX[0]] + edge_attr).relu()
    total = scatter(message, EDGE_INDEX[1], dim_size=NODES, reduce="sum")
    torch.testing.assert_close(seen[":aggregate"][0], 0.5 * total)
    torch.testing.assert_close(output, conv.nn(x + 0.5 * total))
    (gradient,) = torch.autograd.grad(output.sum(), scale)
    torch.testing.assert_close(gradient, (total @ conv.nn.weight.T).sum())


def test_an_edit_of_a_stage_that_returns_nothing_is_an_error():
    x, edge_attr = node_and_edge_features()
    conv = convolution("gine")
    for stage in ("message", "message_inputs"):
        with (
            pytest.raises(TypeError, match=f"edit of ':{stage}' returned None"),
            edit(conv, {f":{stage}": lambda _: None}),
        ):
            conv(x, EDGE_INDEX, edge_attr)
    assert num_hooks(conv) == 0
