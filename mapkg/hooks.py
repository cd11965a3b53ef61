"""Look at, or replace, what any submodule of a model returns::

    with record(model, "layers.*.score") as seen:
        model(x, edge_index, edge_attr)
    seen["layers.0.attention.score"]  # a list, one output per forward pass

    with edit(model, {"layers.0.attention.score": torch.zeros_like}):
        model(x, edge_index, edge_attr)

    for batch, seen in scan(model, loader, "layers.*.score"):  # in evaluation mode
        seen["layers.0.attention.score"]  # the output for this batch

Modules are named as in ``model.named_modules()``; ``*`` stands for any characters. Contexts
nest: a ``record`` inside an ``edit`` sees the edited output, one around it the original. While one
is open, what ``torch.compile`` has made runs uncompiled, since compiled code passes over hooks.

What a PyG ``MessagePassing`` module computes inside itself is named ``"module:stage"``::

    with record(model, "convs.*:message") as seen:  # E messages per layer, of any PyG model

The stages are ``message`` (one row per edge), ``aggregate`` (one row per target),
``edge_update`` (one row per edge, in GATConv and GATv2Conv the attention weights), and
``message_inputs`` and ``edge_update_inputs``, a dict from name to argument of these methods,
as ``x_j`` (source) and ``x_i`` (target) of each edge. PyG's own hooks read them.
"""

import difflib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, no_type_check  # of what is made anew in every call

import torch
from torch import Tensor, fx, nn
from torch.utils import checkpoint
from torch.utils.hooks import RemovableHandle
from torch_geometric.data.data import BaseData
from torch_geometric.nn import MessagePassing

from mapkg.calling import Forward, call, map_tensors

STAGES = ("message_inputs", "message", "aggregate", "edge_update_inputs", "edge_update")
"""What can be seen inside a PyG ``MessagePassing`` module, as ``"module:stage"``."""

Reducer = Callable[[str, Any], None]  # reduce(name, output), after each pass of a module
BatchReducer = Callable[[str, Any, Any], None]  # reduce(name, output, batch)
_PASS = threading.RLock()  # one pass at a time: passes change modes and have hooks
_STANCE, _stances = threading.Lock(), []  # of the compiler, one for each open context


def resolve(model: nn.Module, names: str | Iterable[str]) -> dict[str, nn.Module]:
    """The submodules that names or patterns stand for, in the model's own order.

    A pattern with a stage stands for the modules that have this stage, under keys that end in
    the stage: ``"*:message"`` finds every ``MessagePassing`` module of a model.

    Args:
        model: any module.
        names: a name or several, with a stage or without; ``*``, ``?`` and ``[...]`` match as
            in file names.

    Raises:
        KeyError: if a name or pattern matches nothing; the message lists near matches, or the
            stages there are.
        TypeError: if the model is no module, the names are no strings, or all that a name stands
            for is in code of ``torch.jit``, ``torch.export`` or ``torch.fx`` that does not call it.
    """
    return {name: module for name, (module, _) in _places(model, names).items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode while the context is open.

    Afterwards, also after an exception, each submodule is in the mode it was in: a BatchNorm that
    is frozen in a training model stays frozen, a dropout that is left on stays on.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        # Not by train(), which sets all submodules of a module, too.
        for module, mode in training.items():
            module.training = mode


@contextmanager
def record(
    model: nn.Module, names: str | Iterable[str], reduce: Reducer | None = None
) -> Iterator[dict[str, list[Any]]]:
    """Record what submodules return while the context is open, in any thread.

    Without a reducer each output is kept, detached but not copied (copied under
    ``torch.inference_mode``), one list entry each time it is computed. A reducer is called with
    each output as it comes, and nothing is kept. Outputs are never changed, and hooks are removed
    however the context ends.

    Args:
        model: any module.
        names: names or patterns of submodules or their stages, see ``resolve``.
        reduce: called as ``reduce(name, output)``, without gradients; must not change the
            output in place.

    Yields:
        A dict from name to the list of its outputs; the lists stay empty with a reducer.

    Raises:
        KeyError, TypeError: as ``resolve``; no hook has been attached then.
        RuntimeError: on leaving, if a kept output was changed in place after it was recorded
            (changes through ``.data`` cannot be seen); in a forward pass, if a module skips the
            stage, as PyG does for sparse adjacencies, or if an output that is to be kept belongs
            to ``torch.vmap`` or ``torch.func``.
    """
    places = _places(model, names)
    outputs: dict[str, list[Any]] = {name: [] for name in places}
    versions: list[tuple[str, Tensor, int]] = []

    @no_type_check
    def observe(name: str, output: Any) -> None:
        if torch.is_grad_enabled() and _checkpoint() in ("recompute_fn", "backward"):
            return  # computed once more for the backward pass
        tensors: list[Tensor] = []
        detached = map_tensors(output, lambda x: tensors.append(_detached(x)) or tensors[-1])
        if reduce is not None:
            with torch.no_grad():
                reduce(name, detached)
            return
        if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
            raise RuntimeError(
                f"the output of {name!r} lives only inside of torch.vmap or torch.func, where it "
                "was computed: look at it there, through reduce="
            )
        outputs[name].append(detached)
        versions.extend((name, x, x._version) for x in tensors if not x.is_inference())

    with _hooked(places, observe):
        yield outputs
    for name, tensor, version in versions:
        if tensor._version != version:
            raise RuntimeError(
                f"the output of {name!r} was changed in place after it was recorded; record a "
                "copy through a reducer: reduce=lambda name, x: kept.append(x.clone())"
            )


def scan(
    model: nn.Module,
    loader: Iterable[Any],
    names: str | Iterable[str],
    *,
    forward: Forward | None = None,
    reduce: BatchReducer | None = None,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Run a model over batches in evaluation mode and yield what its submodules return.

    Each batch is one forward pass without gradients, made when the loop asks for it, on a copy:
    what a model writes into the batch is not in the loader's. Modes and hooks are changed during
    a pass only, and threads make one pass at a time. In the body of the loop, and however it ends,
    the model is as it was. The outputs of a batch are held as long as the loop holds them.

    Args:
        model: any module.
        loader: batches, for example of a PyG ``DataLoader``; a batch with a method ``to`` is
            moved to the device of the model's first parameter.
        names: names or patterns of submodules or their stages, see ``resolve``; ``""`` is the
            model itself, whose output is its prediction.
        forward: how to run the model on a batch; None means ``calling.call``.
        reduce: called as ``reduce(name, output, batch)`` with each output as it comes, without
            gradients; nothing is kept then, and ``seen`` is empty.

    Yields:
        Each batch and a dict ``seen`` from name to output, detached, in the model's order.

    Raises:
        KeyError, TypeError: as ``resolve``, before the first pass.
        TypeError: if the loader is one graph, or it is not clear how to call the model.
        RuntimeError: without a reducer, if a submodule runs not once but never or several times
            in a pass; where ``record`` raises it; or if a layer of PyG still has the mask of an
            explainer.
    """
    names = list(resolve(model, names))
    if isinstance(loader, BaseData | Tensor | Mapping) or not isinstance(loader, Iterable):
        raise TypeError(f"expected batches, got one {type(loader).__name__}: pass [data]")
    for name, module in model.named_modules():
        if getattr(module, "_edge_mask", None) is not None:
            raise RuntimeError(
                f"{name!r} still has the edge mask of an explainer, which scales its messages: "
                "torch_geometric.explain.algorithm.utils.clear_masks(model) takes it away"
            )
    parameter = next(model.parameters(), None)
    for batch in loader:
        if parameter is not None and hasattr(batch, "to"):
            batch = batch.to(parameter.device)
        yield batch, _seen(model, batch, names, forward or call, reduce)


@contextmanager
def edit(model: nn.Module, edits: Mapping[str, Callable[[Any], Any]]) -> Iterator[None]:
    """Replace what submodules return, or stages compute, while the context is open.

    Gradients flow through the functions.

    Args:
        model: any module.
        edits: from name or pattern to a function from the output to its replacement.

    Raises:
        KeyError, TypeError: as ``resolve``; no hook has been attached then.
        TypeError: in a forward pass, if a function returns None.
        RuntimeError: in a forward pass, if a module skips the stage, or runs under activation
            checkpointing, whose backward pass may come when the edit is gone.
    """
    found = [(_places(model, pattern), function) for pattern, function in edits.items()]

    @no_type_check
    def replace(function: Callable[[Any], Any], name: str, output: Any) -> Any:
        if (where := _checkpoint()) and (where != "checkpoint" or torch.is_grad_enabled()):
            raise RuntimeError(
                f"{name!r} is edited under activation checkpointing, which runs it again in the "
                "backward pass, with the edit or without: switch checkpointing off for it"
            )
        if (edited := function(output)) is None:
            raise TypeError(
                f"the edit of {name!r} returned None; return the new output, or use record() to "
                "look at it only"
            )
        return edited

    with ExitStack() as stack:
        for places, function in found:
            stack.enter_context(_hooked(places, partial(replace, function)))
        yield


def _seen(
    model: nn.Module, batch: Any, names: list[str], forward: Forward, reduce: BatchReducer | None
) -> dict[str, Any]:
    """One pass; a function of its own, so that ``scan`` holds no outputs while it waits."""
    given = map_tensors(batch, torch.clone)  # models may write into what they are given
    of_batch = None if reduce is None else lambda name, output: reduce(name, output, batch)
    with _PASS, evaluating(model), torch.no_grad(), record(model, names, of_batch) as seen:
        forward(model, given)
    if reduce is not None:
        return {}
    for name, outputs in seen.items():
        if len(outputs) != 1:
            raise RuntimeError(
                f"expected {name!r} to run once for each batch, it ran {len(outputs)} times; pass "
                "reduce=, which is called each time, or leave the name out"
            )
    return {name: output for name, (output,) in seen.items()}


def _places(model: nn.Module, names: str | Iterable[str]) -> dict[str, tuple[nn.Module, str]]:
    """Modules and their stages, which are empty for a module's output, by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    patterns = [names] if isinstance(names, str) or not isinstance(names, Iterable) else [*names]
    modules = dict(model.named_modules())
    chosen: set[tuple[str, str]] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"names: expected a string or several, got {pattern!r}")
        matches, stage = _matches(pattern, modules), ""
        if not matches:
            matches, stage = _with_stage(model, pattern, modules)
        if not (called := _called(matches, modules)):
            raise TypeError(
                f"{pattern!r} is in code made by torch.jit, torch.export or torch.fx, which does "
                "not call it and passes over hooks: expected the model as it was before"
            )
        chosen |= {(name, stage) for name in called}
    ordered = [(n, stage) for n in modules for stage in ("", *STAGES) if (n, stage) in chosen]
    return {f"{n}:{stage}" if stage else n: (modules[n], stage) for n, stage in ordered}


def _matches(pattern: str, names: Iterable[str]) -> set[str]:
    return {pattern} & {*names} or {name for name in names if fnmatchcase(name, pattern)}


def _with_stage(
    model: nn.Module, pattern: str, modules: Mapping[str, nn.Module]
) -> tuple[set[str], str]:
    """The modules whose stage a pattern names; KeyError if there are none."""
    name, _, stage = pattern.rpartition(":")
    matches = _matches(name, modules) if ":" in pattern else set()
    if not matches:
        pattern = name if stage in STAGES else pattern
        again = dict(model.named_modules(remove_duplicate=False))
        if pattern in again:
            first = next(name for name, module in modules.items() if module is again[pattern])
            raise KeyError(f"{pattern!r} is one module with {first!r} (tied): name that one")
        near = difflib.get_close_matches(pattern, modules, n=5, cutoff=0.4)
        hint = f"near matches: {', '.join(near)}" if near else "it has no similar name"
        raise KeyError(
            f"{type(model).__name__} has no submodule {pattern!r}; {hint}. "
            "model.named_modules() lists all names"
        )
    if stage not in STAGES:
        raise KeyError(f"{pattern!r}: unknown stage {stage!r}; stages: {', '.join(STAGES)}")
    if staged := {match for match in matches if stage in _stages(modules[match])}:
        return staged, stage
    first = modules[min(matches)]
    only = "is not a PyG MessagePassing module, only its output can be seen"
    if there := ", ".join(_stages(first)):
        unread = stage == STAGES[3] and STAGES[4] in there
        only = f"shows only {there}" + (": PyG cannot read its source" if unread else "")
    raise KeyError(f"{pattern!r} has no {stage!r}: {type(first).__name__} {only}")


def _stages(module: nn.Module) -> tuple[str, ...]:
    """Which of ``STAGES`` can be seen of a module."""
    if not isinstance(module, MessagePassing):
        return ()
    if type(module).edge_update is MessagePassing.edge_update:
        return STAGES[:3]
    # Without the source of a class PyG has hooks on what its edge_updater is given, per node.
    has_source = type(module).edge_updater is not MessagePassing.edge_updater
    return STAGES if has_source else (*STAGES[:3], STAGES[4])


def _called(names: set[str], modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of modules that are called, and not passed over by code that was made of a model."""
    for outer, made in modules.items():
        if isinstance(made, torch.jit.ScriptModule | fx.GraphModule):
            nodes = made.graph.nodes if isinstance(made, fx.GraphModule) else ()
            calls = tuple(f"{node.target}." for node in nodes if node.op == "call_module")
            inside = f"{outer}." if outer else ""
            skipped = {name for name in names if f"{name}.".startswith(inside or name)}
            skipped -= {outer} if isinstance(made, fx.GraphModule) else set()  # which is called
            names -= {n for n in skipped if not f"{n.removeprefix(inside)}.".startswith(calls)}
    return names


@contextmanager
def _hooked(
    places: Mapping[str, tuple[nn.Module, str]], hook: Callable[[str, Any], Any]
) -> Iterator[None]:
    with ExitStack() as stack:
        with suppress(RuntimeError):  # inside of compiled code, which stops at a context anyway
            with _STANCE:
                _stances.append(torch.compiler.set_stance("force_eager"))
            stack.callback(_leave_stance)
        for name, (module, stage) in places.items():
            for handle in _attach(name, module, stage, hook):
                stack.callback(handle.remove)
        yield


def _leave_stance() -> None:
    # The last one, whosever it is: what was there before the first comes back with the first.
    with _STANCE:
        _stances.pop().__exit__(None, None, None)


def _attach(
    name: str, module: nn.Module, stage: str, hook: Callable[[str, Any], Any]
) -> Iterator[RemovableHandle]:
    @no_type_check
    def see(_module: nn.Module, _inputs: tuple, output: Any) -> Any:
        return hook(name, output)

    @no_type_check
    def see_inputs(_module: nn.Module, inputs: tuple) -> tuple | None:
        arguments = hook(name, inputs[-1])  # PyG puts the keyword arguments last
        return None if arguments is None else (*inputs[:-1], arguments)

    @no_type_check
    def refuse(_module: nn.Module, _inputs: tuple) -> None:
        raise RuntimeError(
            f"{name!r} is not computed: for a sparse adjacency or a sorted EdgeIndex "
            f"{type(module).__name__} fuses messages and their aggregation; pass edge_index as "
            "a plain tensor of shape [2, E]"
        )

    if stage.endswith("_inputs"):
        register = f"register_{stage.removesuffix('_inputs')}_forward_pre_hook"
        yield getattr(module, register)(see_inputs)
    else:
        kind = stage and f"{stage}_"
        yield getattr(module, f"register_{kind}forward_hook")(see)
    if stage and not stage.startswith("edge_update"):
        yield module.register_message_and_aggregate_forward_pre_hook(refuse)


def _detached(x: Tensor) -> Tensor:
    # An inference tensor has no version that tells of a change in place: it is copied.
    return x.clone() if x.is_inference() else x.detach()


def _checkpoint() -> str:
    """The innermost function of torch's activation checkpointing that is running, or nothing."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_filename != checkpoint.__file__:
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_name
