"""How what a module returned is read as rows of channels, and what is particular about rows."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import add_remaining_self_loops

from mapkg.calling import call_on_copy
from mapkg.hooks import STAGES

Rows = Callable[[nn.Module, Any, Any], Tensor]
"""Called as ``rows(module, output, batch)``; returns [rows, channels]."""

_ADVICE = """\
name the module that makes such a tensor, or pass rows=lambda module, output, batch: \
output.flatten(1) of [rows, heads, channels]; output.flatten(0, 1) of [graphs, nodes or tokens, \
channels], output[mask] if some are padding; output.transpose(0, 1).flatten(1) of [stacks, rows, \
channels]; torch.cat(output.unbind()) if it is nested"""


def default_names(model: nn.Module) -> str | list[str]:
    """What is looked at in a model if nobody says what, names as for ``hooks.record``.

    Identity modules called ``score``, as in this package's networks, or, where there are none,
    the messages of all PyG ``MessagePassing`` modules; KeyError if the model has neither.
    """
    modules = dict(model.named_modules())
    passes_messages = any(isinstance(module, MessagePassing) for module in modules.values())
    scores = [
        n for n, m in modules.items() if f".{n}".endswith(".score") and type(m) is nn.Identity
    ]
    # At the top of a network of layers it is a head that is left out.
    if passes_messages and not isinstance(model, MessagePassing):
        scores = [name for name in scores if name != "score"]
    if scores:
        return scores
    if passes_messages:
        return "*:message"
    known = ", ".join(filter(None, modules)) or "its submodules (it has none)"
    none = f"{type(model).__name__} has no identity module called 'score' and no MessagePassing"
    raise KeyError(f"{none} module: pass names=, of {known}")


def as_rows(
    name: str, module: nn.Module, output: Any, batch: Any, rows: Rows | None = None
) -> tuple[Float[Tensor, "rows channels"], str]:
    """One row per edge or node, heads side by side, and how the axes were read.

    An output of three axes is [rows, heads, channels] if its module is a layer of PyG that has
    its nodes on the first axis, or if the batch has as many nodes or edges, with self-loops or
    without, as the first axis is long and the second is not, and another number of graphs.
    ``rows`` makes rows of another output. TypeError if the output is not a tensor of real numbers;
    ValueError if it has other axes, or it is not known which of three are rows.
    """
    output = output if rows is None else rows(module, output, batch)
    expected, kind = f"expected {name!r} to return", type(output).__name__
    is_dense = False
    if isinstance(output, Tensor):
        nested = "nested " if output.is_nested else ""
        kind = f"a {nested}tensor of {output.dtype}, {output.layout}, on {output.device}"
        is_dense = not nested and output.layout == torch.strided and not output.is_meta
    if not is_dense or not output.is_floating_point():
        raise TypeError(f"{expected} a tensor of real numbers, got {kind}; {_ADVICE}")
    if output.dim() not in (2, 3) or not output.size(-1):
        shapes = f"[rows, channels] or [rows, heads, channels], got {list(output.shape)}"
        raise ValueError(f"{expected} {shapes}; {_ADVICE}")
    axes = _axes(name, module, output, batch) if rows is None else "made by rows="
    return output.flatten(start_dim=1), axes


def _axes(name: str, module: nn.Module, output: Tensor, batch: Any) -> str:
    axis = 0 if output.dim() == 2 else None
    if isinstance(module, MessagePassing) and name.rpartition(":")[2] in STAGES:
        if module.decomposed_layers > 1:
            pieces = f"{module.decomposed_layers} pieces, each with some of the channels"
            raise ValueError(f"{name!r} is computed in {pieces}: set its decomposed_layers to 1")
        axis = module.node_dim % output.dim()
    elif output.dim() == 3:
        known = _numbers_of_rows(batch)
        axis = 0 if len(output) in known and output.size(1) not in known else None
    if axis == 0:
        return "rows, heads, channels" if output.dim() == 3 else "rows, channels"
    what = "the batch does not say what a row is" if axis is None else f"axis {axis} has the rows"
    raise ValueError(f"{name!r} returned {list(output.shape)}, of which {what}: {_ADVICE}")


def _numbers_of_rows(batch: Any) -> set[int]:
    """How many nodes or edges a batch has, with and without self-loops, but not as many graphs."""
    edge_index = batch.edge_index if isinstance(batch, Data) else None
    if not isinstance(edge_index, Tensor) or edge_index.layout != torch.strided:
        return set()
    nodes, edges = batch.num_nodes, batch.num_edges
    loops = int((edge_index[0] == edge_index[1]).sum())
    graphs = getattr(batch, "num_graphs", 1)
    numbers = {nodes, edges, edges + nodes, edges - loops + nodes}
    return numbers - {graphs} if graphs > 1 else numbers


def graphs_of_rows(name: str, batch: Any, x: Tensor) -> tuple[Int[Tensor, " rows"], int]:
    """Which graph of a batch each row is of, and how many there are; one where it is not said.

    Rows of the stages of PyG's layers are known to be of edges, or of nodes.
    """
    vector = batch.batch if isinstance(batch, Data) else None
    if isinstance(vector, Tensor) and isinstance(batch.edge_index, Tensor):
        source, target = batch.edge_index
        of_edges = vector[target]
        loops = torch.cat([of_edges, vector]), torch.cat([of_edges[source != target], vector])
        is_stage = ":" in name and name.rpartition(":")[2] in STAGES
        of_nodes = [] if is_stage and not name.endswith(":aggregate") else [vector]
        others = [] if name.endswith(":aggregate") else [of_edges, *loops]
        fitting = [each for each in (*of_nodes, *others) if len(each) == len(x)]
        if fitting and all(torch.equal(each, fitting[0]) for each in fitting):
            return fitting[0].to(x.device), int(vector.max()) + 1 if len(vector) else 0
    return torch.zeros(len(x), dtype=torch.long, device=x.device), 1


def off_floor(x: Float[Tensor, "rows channels"]) -> tuple[Float[Tensor, "rows channels"], int]:
    """Rows of which no floor is the median, and how many were changed for that.

    A row stands on a floor if a quarter of its channels or more have one and the same least
    magnitude, a hundredth or less of the median of the others, and the others are more than a
    quarter, too, in this row or in another one of the same floor. Channels on the floor are given
    that median. A median of zero stays.
    """
    magnitude, channels = x.abs(), x.size(1)
    at_floor = magnitude == magnitude.amin(dim=1, keepdim=True)
    ties, least = at_floor.sum(dim=1), magnitude.amin(dim=1)
    tied = ties >= max(2, channels / 4)
    if not tied.any():
        return x, 0
    typical = magnitude.masked_fill(at_floor, torch.nan).nanmedian(dim=1).values
    chosen = tied & (typical >= 100 * least) & ((least > 0) | (ties <= (channels - 1) // 2))
    sure = chosen & (channels - ties > max(1, channels / 4))
    chosen &= torch.isin(least, least[sure])
    return torch.where(at_floor & chosen[:, None], typical[:, None], x), int(chosen.sum())


def row_codes(x: Float[Tensor, "rows channels"]) -> list[int]:
    """A number for each different row, to ten bits of each entry's mantissa."""
    bits = (x.float().contiguous().view(torch.int32) + 0x1000) >> 13
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (x.size(1),), generator=generator) | 1
    return (bits * factors.to(x.device)).sum(dim=1).unique().tolist()


def edge_rows(name: str, module: nn.Module, output: Any, batch: Any) -> Float[Tensor, "E channels"]:
    """One row for each edge of a batch, in the order of its edges.

    A layer that puts self-loops of its own in place of the batch's, as GATConv and GCNConv do,
    has its loops after all other edges; an edge from a node to itself is given its node's.
    Arguments and errors are those of ``as_rows``; ValueError if there is not a row for each edge.
    """
    rows, _ = as_rows(name, module, output, batch)
    if len(rows) == batch.num_edges and not getattr(module, "add_self_loops", False):
        return rows
    others, place = _among_replaced_loops(batch)
    if len(rows) != others + batch.num_nodes:
        raise ValueError(
            f"{name!r}: expected a row for each of {batch.num_edges} edges, got {len(rows)}; name "
            "a module, or the stage ':message' of a layer, that has one row per edge"
        )
    return rows[place]


def with_loops_of_layers(model: nn.Module, batch: Any) -> tuple[Any, Int[Tensor, " E"]]:
    """A batch with self-loops as the layers of a model have them, and where its own edges are.

    It is returned as it is if it has no loops or the model no layers that replace them, see
    ``edge_rows``; ValueError if some layers replace loops and others do not.
    """
    others, place = _among_replaced_loops(batch)
    edges = torch.arange(batch.num_edges, device=place.device)
    replaces = any(getattr(module, "add_self_loops", False) for module in model.modules())
    if others == len(edges) or not replaces:
        return batch, edges
    changed = copy.copy(batch)
    changed.edge_index, taken = add_remaining_self_loops(
        batch.edge_index, edges, fill_value=0, num_nodes=batch.num_nodes
    )
    for key, value in batch:
        if key != "edge_index" and batch.is_edge_attr(key):
            changed[key] = value[taken]
    if not torch.allclose(
        *(call_on_copy(model, b) for b in (batch, changed)), rtol=1e-4, atol=1e-5
    ):
        raise ValueError(
            "expected layers that all replace self-loops or none, got a graph with loops and "
            "layers of both kinds; take them out with torch_geometric.utils.remove_self_loops"
        )
    return changed, place


def _among_replaced_loops(batch: Any) -> tuple[int, Int[Tensor, " E"]]:
    """How many edges are no self-loops, and where edges are if a loop per node follows these."""
    source, target = batch.edge_index
    others = source != target
    return int(others.sum()), torch.where(others, others.cumsum(0) - 1, others.sum() + target)
