"""Look at, or replace, what any submodule of a model returns::

    with record(model, "layers.*.score") as seen:
        model(x, edge_index, edge_attr)
    seen["layers.0.attention.score"]  # a list, one output per forward pass

    with edit(model, {"layers.0.attention.score": torch.zeros_like}):
        model(x, edge_index, edge_attr)

Modules are named as in ``model.named_modules()``; ``*`` stands for any characters. Contexts
nest: an output passes through the hooks in the order in which their contexts were entered,
so a ``record`` inside an ``edit`` sees the edited output, one around it the original.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

Reducer = Callable[[str, Any], None]
"""Called as ``reduce(name, output)`` after each forward pass of a module."""


def resolve(model: nn.Module, names: str | Iterable[str]) -> dict[str, nn.Module]:
    """The submodules that names or patterns stand for, in the model's own order.

    Args:
        model: any module.
        names: a name or several; ``*``, ``?`` and ``[...]`` match as in file names.

    Raises:
        KeyError: if a name or pattern matches nothing; the message lists near matches.
    """
    patterns = [names] if isinstance(names, str) else list(names)
    modules = dict(model.named_modules())
    chosen = set()
    for pattern in patterns:
        found = {pattern} if pattern in modules else _matches(pattern, modules)
        if not found:
            near = difflib.get_close_matches(pattern, modules, n=5, cutoff=0.4)
            hint = f"near matches: {', '.join(near)}" if near else "it has no similar name"
            raise KeyError(
                f"{type(model).__name__} has no submodule {pattern!r}; {hint}. "
                "model.named_modules() lists all names"
            )
        chosen |= found
    return {name: module for name, module in modules.items() if name in chosen}


@contextmanager
def record(
    model: nn.Module, names: str | Iterable[str], reduce: Reducer | None = None
) -> Iterator[dict[str, list[Any]]]:
    """Record what submodules return while the context is open.

    Without a reducer each output is kept, detached but not copied, one list entry per forward
    pass. With a reducer nothing is kept: it is called with each output as it comes, so memory
    does not grow with the number of batches. Outputs are never changed, and hooks are removed
    however the context ends.

    Args:
        model: any module.
        names: names or patterns of submodules, see ``resolve``.
        reduce: called as ``reduce(name, output)``, without gradients; must not change the
            output in place.

    Yields:
        A dict from name to the list of its outputs; the lists stay empty with a reducer.

    Raises:
        KeyError: if a name matches nothing; no hook has been attached then.
        RuntimeError: on leaving, if a kept output was changed in place after it was recorded.
    """
    modules = resolve(model, names)
    outputs: dict[str, list[Any]] = {name: [] for name in modules}
    versions: list[tuple[str, Tensor, int]] = []

    def observe(name: str, output: Any) -> None:
        detached = _detach(output)
        if reduce is not None:
            with torch.no_grad():
                reduce(name, detached)
            return
        outputs[name].append(detached)
        # Inference tensors keep no version counter.
        versions.extend((name, x, x._version) for x in _tensors(detached) if not x.is_inference())

    with _hooked(modules, lambda name, output: observe(name, output)):
        yield outputs
    for name, tensor, version in versions:
        if tensor._version != version:
            raise RuntimeError(
                f"the output of {name!r} was changed in place after it was recorded; record a "
                "copy through a reducer: reduce=lambda name, x: kept.append(x.clone())"
            )


@contextmanager
def edit(model: nn.Module, edits: Mapping[str, Callable[[Any], Any]]) -> Iterator[None]:
    """Replace what submodules return while the context is open.

    Gradients flow through the functions.

    Args:
        model: any module.
        edits: from name or pattern to a function from the output to its replacement.

    Raises:
        KeyError: if a name matches nothing; no hook has been attached then.
        TypeError: in a forward pass, if a function returns None.
    """
    functions: dict[str, list[Callable[[Any], Any]]] = {}
    modules: dict[str, nn.Module] = {}
    for pattern, function in edits.items():
        for name, module in resolve(model, pattern).items():
            modules[name] = module
            functions.setdefault(name, []).append(function)

    def replace(name: str, output: Any) -> Any:
        for function in functions[name]:
            output = function(output)
            if output is None:
                raise TypeError(
                    f"the edit of {name!r} returned None; return the new output, or use record() "
                    "to look at it only"
                )
        return output

    with _hooked(modules, replace):
        yield


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], hook: Callable[[str, Any], Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(
                lambda _module, _inputs, output, name=name: hook(name, output)
            )
            stack.callback(handle.remove)
        yield


def _matches(pattern: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if fnmatchcase(name, pattern)}


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list | dict):
        for item in output.values() if isinstance(output, dict) else output:
            yield from _tensors(item)


def _detach(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, tuple | list):
        items = [_detach(item) for item in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if isinstance(output, dict):
        return {key: _detach(value) for key, value in output.items()}
    return output
