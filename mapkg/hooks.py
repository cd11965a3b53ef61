"""Look at, or replace, what any submodule of a model returns::

    with record(model, "layers.*.score") as seen:
        model(x, edge_index, edge_attr)
    seen["layers.0.attention.score"]  # a list, one output per forward pass

    with edit(model, {"layers.0.attention.score": torch.zeros_like}):
        model(x, edge_index, edge_attr)

    for batch, seen in scan(model, loader, "layers.*.score"):  # in evaluation mode
        seen["layers.0.attention.score"]  # the output for this batch

Modules are named as in ``model.named_modules()``; ``*``, ``?`` and ``[...]`` match as in names of
files. Contexts nest: a ``record`` inside an ``edit`` sees the edited output, one around it the
original. While one is open, what ``torch.compile`` has made runs uncompiled.

What a PyG ``MessagePassing`` module computes inside itself is named ``"module:stage"``, as in
``"convs.*:message"``. The stages are ``message`` (one row per edge), ``aggregate`` (one row per
target), ``edge_update`` (one row per edge, in GATConv and GATv2Conv the attention weights), and
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

Reducer = Callable[..., None]  # reduce(name, output), in a scan reduce(name, output, batch)
_ENDS = tuple(f":{stage}" for stage in STAGES)
_PASS = threading.RLock()  # one pass at a time: passes change modes and have hooks
_STANCE, _stances = threading.Lock(), []  # of the compiler, one for each open context


def resolve(model: nn.Module, names: str | Iterable[str]) -> dict[str, nn.Module]:
    """The submodules that names or patterns stand for, in the model's own order.

    Raises:
        KeyError: if a name or pattern matches nothing; lists near matches, or the stages there are.
        TypeError: if the model is no module, the names are no strings, or all that a name stands
            for is in code of ``torch.jit``, ``torch.export`` or ``torch.fx`` that does not call it.
    """
    return {name: module for name, (module, _) in _places(model, names).items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and afterwards each submodule into the mode it was in.

    A part that ``torch.export`` has fixed in one mode stays in that.
    """
    modes = {m: m.training for m in model.modules() if hasattr(m, "training")}
    try:
        with suppress(NotImplementedError):
            model.eval()
        for module in modes:
            module.training = False
        yield
    finally:
        # Not by train(), which sets all submodules of a module, too.
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def record(
    model: nn.Module, names: str | Iterable[str], reduce: Reducer | None = None
) -> Iterator[dict[str, list[Any]]]:
    """Record what submodules return while the context is open, in any thread.

    Args:
        model, names: as for ``resolve``, whose errors come before any hook is attached.
        reduce: called as ``reduce(name, output)``, without gradients, with each output as it
            comes; must not change it in place.

    Yields:
        A dict from name to the list of its outputs, one each time it is computed, detached but not
        copied (copied under ``torch.inference_mode``); the lists stay empty with a reducer.

    Raises:
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
        # An inference tensor has no version that tells of a change in place: it is copied.
        copy = lambda x: x.clone() if x.is_inference() else x.detach()  # noqa: E731
        detached = map_tensors(output, lambda x: tensors.append(copy(x)) or tensors[-1])
        if reduce is not None:
            with torch.no_grad():
                reduce(name, detached)
            return
        if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
            where = "torch.vmap or torch.func, where it was computed: look at it there, by reduce="
            raise RuntimeError(f"the output of {name!r} lives only inside of {where}")
        outputs[name].append(detached)
        versions.extend((name, x, x._version) for x in tensors if not x.is_inference())

    with _hooked(places, observe):
        yield outputs
    if changed := [name for name, tensor, version in versions if tensor._version != version]:
        how = "record a copy through a reducer: reduce=lambda name, x: kept.append(x.clone())"
        raise RuntimeError(f"the output of {changed[0]!r} was changed in place afterwards; {how}")


def scan(
    model: nn.Module,
    loader: Iterable[Any],
    names: str | Iterable[str],
    *,
    forward: Forward | None = None,
    reduce: Reducer | None = None,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Run a model over batches in evaluation mode and yield what its submodules return.

    Each batch is one forward pass without gradients, made when the loop asks for it, on a copy:
    what a model writes into the batch is not in the loader's. In the body of the loop, and however
    it ends, the model is as it was; threads make one pass at a time. The outputs of a batch are
    held as long as the loop holds them.

    Args:
        model, names: as for ``resolve``; ``""`` is the model itself.
        loader: batches, moved to the device of the model's first parameter.
        forward: how to run the model on a batch; None means ``calling.call``.
        reduce: called as ``reduce(name, output, batch)`` with each output as it comes; nothing is
            kept then, and ``seen`` is empty.

    Yields:
        Each batch and a dict ``seen`` from name to output, detached, in the model's order.

    Raises:
        TypeError: if the loader is one graph, or it is not clear how to call the model.
        RuntimeError: as ``record``; if a submodule without a reducer runs not once in a pass; or if
            a layer of PyG still has the mask of an explainer.
    """
    names = list(resolve(model, names))
    if isinstance(loader, BaseData | Tensor | Mapping) or not isinstance(loader, Iterable):
        raise TypeError(f"expected batches, got one {type(loader).__name__}: pass [data]")
    for name, module in model.named_modules():
        if getattr(module, "_edge_mask", None) is not None:
            how = "torch_geometric.explain.algorithm.utils.clear_masks(model) takes it away"
            raise RuntimeError(f"{name!r} still has the edge mask of an explainer: {how}")
    parameter = next(model.parameters(), None)
    for batch in loader:
        if parameter is not None:
            batch = _on(parameter.device, batch)
        yield batch, _seen(model, batch, names, forward or call, reduce)


@contextmanager
def edit(model: nn.Module, edits: Mapping[str, Callable[[Any], Any]]) -> Iterator[None]:
    """Replace what submodules return, or stages compute, while the context is open.

    ``edits`` has for each name or pattern a function from the output to its replacement, through
    which gradients flow. In a forward pass it is a TypeError if that returns None, and a
    RuntimeError if a module skips the stage or runs under activation checkpointing, whose backward
    pass may come when the edit is gone.
    """
    found = [(_places(model, pattern), function) for pattern, function in edits.items()]

    @no_type_check
    def replace(function: Callable[[Any], Any], name: str, output: Any) -> Any:
        if (where := _checkpoint()) and (where != "checkpoint" or torch.is_grad_enabled()):
            why = "which runs it again in the backward pass, maybe without: switch it off"
            raise RuntimeError(f"{name!r} is edited under activation checkpointing, {why}")
        if (edited := function(output)) is None:
            how = "return the new output, or use record() to look at it only"
            raise TypeError(f"the edit of {name!r} returned None; {how}")
        return edited

    with ExitStack() as stack:
        for places, function in found:
            stack.enter_context(_hooked(places, partial(replace, function)))
        yield


def _on(device: torch.device, batch: Any) -> Any:
    """A copy of a batch on a device; the batch itself if all of it is there."""
    devices: list[Any] = []
    copied = map_tensors(batch, lambda x: devices.append(getattr(x, "device", device)) or x)
    batch = batch if all(each == device for each in devices) else copied
    if hasattr(batch, "to"):
        return batch.to(device)  # what knows which part of it goes where
    return batch if batch is not copied else map_tensors(batch, lambda x: x.to(device))


def _seen(model, batch, names: list[str], forward: Forward, reduce: Reducer | None) -> dict:
    """One pass; a function of its own, so that ``scan`` holds no outputs while it waits."""
    given = map_tensors(batch, torch.clone)  # models may write into what they are given
    of_batch = None if reduce is None else lambda name, output: reduce(name, output, batch)
    with _PASS, evaluating(model), torch.no_grad(), record(model, names, of_batch) as seen:
        forward(model, given)
    if reduce is not None:
        return {}
    for name, outputs in seen.items():
        if len(outputs) != 1:
            ran = f"expected {name!r} to run once for each batch, it ran {len(outputs)} times"
            raise RuntimeError(f"{ran}; pass reduce=, which is called each time")
    return {name: output for name, (output,) in seen.items()}


def _places(model: nn.Module, names: str | Iterable[str]) -> dict[str, tuple[nn.Module, str]]:
    """Modules and their stages, which are empty for a module's output, by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    places: dict[str, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules():
        places[name] = module, ""
        places |= {f"{name}:{stage}": (module, stage) for stage in _stages(module)}
    chosen: set[str] = set()
    skipped = _skipped(model)
    for pattern in [names] if isinstance(names, str) or not isinstance(names, Iterable) else names:
        if not isinstance(pattern, str):
            raise TypeError(f"names: expected a string or several, got {pattern!r}")
        stage = pattern.rpartition(":")[2] if pattern.endswith(_ENDS) else ""
        matches = {pattern} & places.keys() or {
            name for name in places if places[name][1] == stage and fnmatchcase(name, pattern)
        }
        if not matches:
            raise KeyError(_why_unknown(model, pattern))
        if not (called := {name for name in matches if places[name][0] not in skipped}):
            made = "made by torch.jit, torch.export or torch.fx, which does not call it"
            raise TypeError(f"{pattern!r} is in code {made}: expected the model as it was before")
        chosen |= called
    return {name: place for name, place in places.items() if name in chosen}


def _why_unknown(model: nn.Module, pattern: str) -> str:
    """Why a name or pattern stands for nothing."""
    modules = dict(model.named_modules())
    name, _, stage = pattern.rpartition(":")
    matches = [each for each in modules if name == each or fnmatchcase(each, name)]
    if ":" not in pattern or not matches:
        pattern = name if stage in STAGES else pattern
        again = dict(model.named_modules(remove_duplicate=False))
        if pattern in again:
            first = next(name for name, module in modules.items() if module is again[pattern])
            return f"{pattern!r} is one module with {first!r} (tied): name that one"
        near = ", ".join(difflib.get_close_matches(pattern, modules, n=5, cutoff=0.4))
        hint = f"near matches: {near}" if near else "it has no similar name"
        return f"{type(model).__name__} has no submodule {pattern!r}; {hint}, see named_modules()"
    if stage not in STAGES:
        return f"{pattern!r}: unknown stage {stage!r}; stages: {', '.join(STAGES)}"
    first = modules[min(matches)]
    only = "is not a PyG MessagePassing module, only its output can be seen"
    if there := ", ".join(_stages(first)):
        unread = stage == STAGES[3] and STAGES[4] in there
        only = f"shows only {there}" + (": PyG cannot read its source" if unread else "")
    return f"{pattern!r} has no {stage!r}: {type(first).__name__} {only}"


def _stages(module: nn.Module) -> tuple[str, ...]:
    """Which of ``STAGES`` can be seen of a module."""
    if not isinstance(module, MessagePassing):
        return ()
    if type(module).edge_update is MessagePassing.edge_update:
        return STAGES[:3]
    # Without the source of a class PyG has hooks on what its edge_updater is given, per node.
    has_source = type(module).edge_updater is not MessagePassing.edge_updater
    return STAGES if has_source else (*STAGES[:3], STAGES[4])


def _skipped(model: nn.Module) -> set[nn.Module]:
    """Modules that are passed over by code that was made of a model."""
    skipped = set()
    for made in model.modules():
        if isinstance(made, torch.jit.ScriptModule | fx.GraphModule):
            of_graph = isinstance(made, fx.GraphModule)  # which is called itself
            nodes = made.graph.nodes if of_graph else ()
            calls = tuple(f"{node.target}." for node in nodes if node.op == "call_module")
            inside = [*made.named_modules()][of_graph:]
            skipped |= {module for name, module in inside if not f"{name}.".startswith(calls)}
    return skipped


@contextmanager
def _hooked(places: dict[str, tuple[nn.Module, str]], hook: Callable) -> Iterator[None]:
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


def _attach(name: str, module, stage: str, hook: Callable) -> Iterator[RemovableHandle]:
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
            f"{name!r} is not computed: of a sparse adjacency or a sorted EdgeIndex "
            f"{type(module).__name__} fuses all messages; pass a plain edge_index, [2, E]"
        )

    kind = f"{stage and stage + '_'}forward_hook".replace("inputs_forward", "forward_pre")
    yield getattr(module, f"register_{kind}")(see_inputs if "_pre_" in kind else see)
    if stage and not stage.startswith("edge_update"):
        yield module.register_message_and_aggregate_forward_pre_hook(refuse)


def _checkpoint() -> str:
    """The innermost function of torch's activation checkpointing that is running, or nothing."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_filename != checkpoint.__file__:
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_name
