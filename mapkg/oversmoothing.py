r"""How alike features become on their way forward, and errors on their way back.

Features X are [N, D], one row per node, and the errors :math:`B = \partial L / \partial H` of what
a layer returns have the shape of H.

Source: backward-oversmoothing paper.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, no_type_check

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import linalg, sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor, nn
from torch_geometric.utils import remove_self_loops, to_scipy_sparse_matrix

from mapkg.hooks import edit, resolve


def relative_spread(
    x: Float[Tensor, "N D"], direction: Float[Tensor, " nodes"] | None = None
) -> float:
    r"""How far rows are from being alike, between 0 and 1.

    .. math:: r(X) = \frac{\lVert X - u u^\top X \rVert_F}{\lVert X \rVert_F}

    with the unit vector u along ``direction``; None means a constant, where :math:`u u^\top X` has
    the mean of all rows in every row. It is 0 if all rows are alike (in the ratio of
    ``direction``, see ``limits``), and for a matrix of zeros.
    """
    x = _exact(x)
    size = torch.linalg.matrix_norm(x)
    if direction is None:
        apart = x - x.mean(dim=0)
    elif direction.shape == x.shape[:1]:
        unit = (direction / direction.norm()).to(x)
        apart = x - unit[:, None] * (unit @ x)
    else:
        raise ValueError(
            f"direction: expected one value for each of {len(x)} nodes, got shape "
            f"{tuple(direction.shape)}"
        )
    return 0.0 if size == 0 else (torch.linalg.matrix_norm(apart) / size).item()


def spread(x: Float[Tensor, "N D"]) -> float:
    r"""The root mean squared distance of rows from their mean.

    .. math:: E(X) = \Bigl(\frac{1}{2 N^2} \sum_{ij} \lVert x_i - x_j \rVert^2\Bigr)^{1/2}
        = \frac{1}{\sqrt N} \lVert X - 1 \bar x^\top \rVert_F
    """
    x = _exact(x)
    return (torch.linalg.matrix_norm(x - x.mean(dim=0)) / len(x) ** 0.5).item()


def rank_one_distance(x: Float[Tensor, "N D"]) -> float:
    r"""How far a matrix is from the nearest one of rank one, between 0 and 1.

    .. math:: \Bigl(1 - \frac{\sigma_1^2}{\sum_k \sigma_k^2}\Bigr)^{1/2}

    The ``relative_spread`` from the best direction, for attention, whose limit direction depends
    on its input. With one channel it is always 0, and NaN if an entry is not finite.
    """
    if not x.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(_exact(x)).square()
    total = values.sum()
    return 0.0 if total == 0 else (values[1:].sum() / total).sqrt().item()


@dataclass(frozen=True)
class Limits:
    """Where repeated averaging over neighbors leads.

    Columns of features are drawn to the right eigenvector of the largest eigenvalue, those of
    errors to the left one. In each layer of linear averaging differences shrink by ``contraction``,
    the second largest modulus of an eigenvalue over the largest.
    """

    features: Float[Tensor, " N"]
    errors: Float[Tensor, " N"]
    contraction: float


def limits(operator: Float[Tensor, "N nodes"]) -> Limits:
    """Eigenvectors and contraction of the matrix P with which a layer averages, X -> P X W.

    Entries of P are zero or more; row i has what node i takes from each node. Raises
    ``ValueError`` if P is no square matrix of such entries, its graph is not connected (strongly,
    if it is directed), or it alternates, so that nothing converges.
    """
    matrix = operator.detach().to_dense().double().numpy()
    is_square = matrix.ndim == 2 and len(matrix) == matrix.shape[1] > 0
    if not (is_square and np.isfinite(matrix).all() and (matrix >= 0).all()):
        raise ValueError(
            "operator: expected a square matrix of numbers that are not negative, got "
            + ("others" if is_square else f"shape {tuple(matrix.shape)}")
        )
    parts, _ = connected_components(matrix, connection="strong")
    if parts > 1:
        raise ValueError(
            f"operator: expected a connected graph, got one of {parts} parts; features of "
            "different parts never meet. Take the largest part"
        )
    values, left, right = linalg.eig(matrix, left=True)
    order = np.argsort(-np.abs(values))
    contraction = float(abs(values[order[1]] / values[order[0]])) if len(matrix) > 1 else 0.0
    if contraction > 1 - 1e-12:
        raise ValueError(
            "operator: expected one eigenvalue of the largest modulus, got several (as a bipartite "
            "graph without self-loops, it alternates); add self-loops"
        )
    features, errors = (torch.from_numpy(np.abs(v[:, order[0]].real)) for v in (right, left))
    return Limits(features, errors, contraction)


def uniform_attention_limits(edge_index: Int[Tensor, "2 E"], num_nodes: int) -> Limits:
    r"""Where attention leads that weighs a node and its neighbors alike.

    As ``limits`` of :math:`P = D^{-1} (A + I)`, but sparse, for graphs of 3 to thousands of nodes:
    features become constant, and errors gather in proportion to :math:`D`. Self-loops do not count.
    Raises ``ValueError`` if an edge has one direction only, or the graph is not connected.
    """
    edge_index, _ = remove_self_loops(edge_index)
    adjacency = to_scipy_sparse_matrix(edge_index, num_nodes=num_nodes).tocsr()
    if (adjacency != adjacency.T).nnz > 0:
        raise ValueError("edge_index: expected both directions of each edge; make it undirected")
    parts, _ = connected_components(adjacency)
    if parts > 1:
        raise ValueError(f"edge_index: expected a connected graph, got one of {parts} parts")
    degrees = np.asarray(adjacency.sum(axis=1), dtype=float).ravel() + 1
    roots = sparse.diags(degrees**-0.5)
    symmetric = roots @ (adjacency.astype(float) + sparse.eye(num_nodes)) @ roots  # similar to P
    start = np.random.default_rng(0).standard_normal(num_nodes)
    options = dict(v0=start, return_eigenvectors=False)
    try:
        values = eigsh(symmetric, k=2, which="LM", maxiter=300, **options)
    except ArpackNoConvergence:  # eigenvalues of long graphs crowd, but are told apart by inverses
        symmetric, least = symmetric.tocsc(), 2 / degrees.max() - 1  # no eigenvalue is below
        values = eigsh(symmetric, k=2, sigma=1 + 1e-9, **options)
        low = eigsh(symmetric, k=1, sigma=least - 1e-9, **options)
        values = np.maximum(values, np.abs(low))
    vectors = (torch.from_numpy(x / np.linalg.norm(x)) for x in (np.ones(num_nodes), degrees))
    return Limits(*vectors, contraction=float(np.abs(values).min()))


def smoothing_by_layer(
    model: nn.Module,
    loss: Callable[[], Float[Tensor, ""]],
    features: str | Iterable[str],
    errors: str | Iterable[str] | None = None,
    *,
    errors_direction: Float[Tensor, " nodes"] | None = None,
) -> pd.DataFrame:
    """Smoothness of features and errors in every layer of any network, frozen or not.

    Args:
        model: any module; PyG's layers or others.
        loss: runs the model once and returns the loss.
        features: names or patterns of the submodules whose outputs are the features, one per
            layer, in the model's order, for example ``"convs.*"``; what is inside a submodule
            that matches does not count.
        errors: of those at whose outputs the errors are taken; None means the same.
        errors_direction: of ``relative_spread`` of errors.

    Returns:
        A row per layer, ``layer`` from 0. ``features`` and ``errors`` are the relative spreads,
        ``features_spread`` the absolute one, ``features_rank_one`` and ``errors_rank_one`` the
        distances from rank one, and ``error`` is the Frobenius norm of errors. NaN where there are
        fewer layers with features than with errors, as where the last has no activation.

    Raises ``KeyError`` if a name matches nothing, ``TypeError`` if a layer returns no tensor, and
    ``ValueError`` if it is run more than once, or the loss does not depend on it.
    """
    of_features = _outermost(resolve(model, features))
    of_errors = of_features if errors is None else _outermost(resolve(model, errors))
    seen: dict[str, Tensor] = {}

    @no_type_check
    def keep(name: str, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            what = f"expected a tensor of features, got a {type(output).__name__}"
            raise TypeError(f"{name}: {what}; name a submodule that returns one")
        if name in seen:
            raise ValueError(f"{name}: expected one forward pass, it ran more than once")
        if not output.requires_grad:  # nothing before it is trained
            output = output.detach().requires_grad_()
        seen[name] = output
        return output.clone()  # which the network may change in place

    every = dict.fromkeys([*of_features, *of_errors])
    with edit(model, {name: partial(keep, name) for name in every}), torch.enable_grad():
        value = loss()
    if missing := [name for name in every if name not in seen]:
        raise ValueError(f"{missing[0]}: expected the loss to run it, it did not run")
    gradients = torch.autograd.grad(value, [seen[n] for n in of_errors], allow_unused=True)
    for name, gradient in zip(of_errors, gradients, strict=True):
        if gradient is None:
            raise ValueError(f"{name}: expected a loss that depends on its output")
    forward = [seen[name].detach() for name in of_features]
    columns = {
        "features": [relative_spread(x) for x in forward],
        "features_spread": [spread(x) for x in forward],
        "features_rank_one": [rank_one_distance(x) for x in forward],
        "errors": [relative_spread(b, errors_direction) for b in gradients],
        "errors_rank_one": [rank_one_distance(b) for b in gradients],
        "error": [torch.linalg.matrix_norm(_exact(b)).item() for b in gradients],
    }
    table = pd.DataFrame({name: pd.Series(values) for name, values in columns.items()})
    return table.rename_axis("layer").reset_index()


def _exact(x: Tensor) -> Tensor:
    """In double precision, where squares of tiny errors are not 0, and on the CPU, which has it."""
    return x.detach().cpu().double()


def _outermost(names: Iterable[str]) -> list[str]:
    """Those names of submodules that are not inside another one of them."""
    every = tuple(f"{name}." for name in names)
    return [name for name in names if not name.startswith(every)]
