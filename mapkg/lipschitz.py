r"""How much attention can amplify a change of its input: local constants and their bounds.

The local Lipschitz constant of a map at a point is the largest singular value of its Jacobian
there, from the Frobenius norm to the Frobenius norm. Nodes are rows: X is [n, d], m queries are
[m, d], scores g are [m, n], and

.. math:: \mathrm{Att}(X) = S X, \qquad S = \mathrm{softmax}(g(X)) .

Source: LipschitzNorm paper (its X has nodes in columns).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor
from torch.func import jacrev, jvp, vjp
from torch_geometric.nn import GATConv
from torch_geometric.utils import add_self_loops, remove_self_loops, scatter

from mapkg.lipschitz_norm import directed

ALPHA = {"linear": 1.0, "quadratic": math.sqrt(2)}
"""The constant of the theorem's conditions. The quadratic one is what our proof needs."""


def local_constant(
    function: Callable[..., Tensor], *inputs: Tensor, exact_size: int = 4096
) -> float:
    """The largest singular value of a function's Jacobian with respect to all its inputs.

    Args:
        function: differentiable twice over by ``torch.func``, from tensors to a tensor.
        *inputs: the point, tensors of one floating type.
        exact_size: the norm of Jacobians with more entries is found by Lanczos iterations
            (``scipy.sparse.linalg.svds``), to a relative 1e-6, from products with vectors alone.

    Raises ``ValueError`` if there is no input, or a value or a derivative is not finite.
    """
    if not inputs:
        raise ValueError("expected one input or more, got none")

    def flat(point: Tensor) -> Tensor:
        parts = point.split([x.numel() for x in inputs])
        return function(*(part.view_as(x) for part, x in zip(parts, inputs, strict=True))).flatten()

    point = torch.cat([x.detach().flatten() for x in inputs])
    value, pull = vjp(flat, point)
    if not value.isfinite().all():
        raise ValueError("expected a function with finite values at this point")
    shape = (value.numel(), point.numel())
    if math.prod(shape) <= exact_size or min(shape) < 3:
        jacobian = jacrev(flat)(point)
        if not jacobian.isfinite().all():
            raise ValueError("expected a function that is differentiable at this point")
        return torch.linalg.matrix_norm(jacobian, ord=2).item()

    def tensor(vector: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ravel(vector)).to(point)

    operator = LinearOperator(
        shape,
        matvec=lambda v: jvp(flat, (point,), (tensor(v),))[1].detach().double().numpy(),
        rmatvec=lambda u: pull(tensor(u))[0].detach().double().numpy(),
        dtype=np.float64,
    )
    start = np.random.default_rng(0).standard_normal(min(shape))
    image = operator.matvec(start) if shape[0] >= shape[1] else operator.rmatvec(start)
    if not np.isfinite(image).all():
        raise ValueError("expected a function that is differentiable at this point")
    if (unit := np.abs(image).max()) == 0:  # of a random vector: all derivatives are zero
        return 0.0
    operator = operator * (1 / unit)  # tiny derivatives are zeros to the iteration
    return float(unit * svds(operator, k=1, tol=1e-6, v0=start, return_singular_vectors=False)[0])


def linear_score(
    x: Float[Tensor, "n d"], query: Float[Tensor, "m d"], *, normalized: bool = False
) -> Float[Tensor, "m n"]:
    r"""Scores :math:`q_i \cdot x_j`, divided by :math:`\lVert Q \rVert_F \max_j \lVert x_j \rVert`
    if normalized.
    """
    score = query @ x.t()
    return score / (query.norm() * _largest_row(x)) if normalized else score


def quadratic_score(
    query: Float[Tensor, "m d"],
    key: Float[Tensor, "n d"],
    value: Float[Tensor, "n dv"],
    *,
    normalized: bool = False,
) -> Float[Tensor, "m n"]:
    r"""Scores :math:`q_i \cdot k_j`, divided by max(u v, u w, v w) if normalized.

    u is the Frobenius norm of the queries, v and w are the largest norms of a key and a value.
    """
    score = query @ key.t()
    if not normalized:
        return score
    u, v, w = query.norm(), _largest_row(key), _largest_row(value)
    return score / torch.stack([u * v, u * w, v * w]).amax()


def attention(score: Float[Tensor, "m n"], value: Float[Tensor, "n dv"]) -> Float[Tensor, "m dv"]:
    """Attended values, one row per query."""
    return score.softmax(dim=-1) @ value


def slope(score: Callable[[Tensor], Tensor], x: Float[Tensor, "..."]) -> float:
    r"""An upper bound of the slope of a score, from the Frobenius to the (2, inf) norm.

    .. math:: \lvert\lvert\lvert Dg \rvert\rvert\rvert_{F, (2, \infty)}
        \le \Bigl(\sum_i \max_j \lVert \nabla g_{ij} \rVert_F^2\Bigr)^{1/2}

    ``score`` maps x, the point, to scores [m, n]. For the linear score the bound is the Frobenius
    norm of Q, where the slope is its spectral norm.
    """
    gradients = jacrev(score)(x).flatten(start_dim=2)  # [m, n, entries of x]
    return gradients.norm(dim=-1).amax(dim=-1).norm().item()


def lemma_bound(
    scores: Float[Tensor, "m n"],
    value: Float[Tensor, "n dv"],
    score_slope: float,
    *,
    tight: bool = False,
) -> float:
    r"""The lemma: a bound of attention's local constant for any differentiable score.

    .. math:: \lVert S \rVert_F + \sqrt 2 \max_j \lVert v_j \rVert \,
        \lvert\lvert\lvert Dg \rvert\rvert\rvert_{F, (2, \infty)}

    Args:
        scores: g at this point.
        value: X, or V for the quadratic score.
        score_slope: of g, or an upper bound, see ``slope``.
        tight: our sharper form, with the spectral norm of S and 1 in place of the root of 2.

    Source: LipschitzNorm paper, lemma; the sharper form and both proofs are on the page.
    """
    weights = scores.softmax(dim=-1)
    of_weights = torch.linalg.matrix_norm(weights, ord=2) if tight else weights.norm()
    factor = 1 if tight else math.sqrt(2)
    return of_weights.item() + factor * _largest_row(value).item() * score_slope


def theorem_bound(alpha: float, queries: int, keys: int, *, tight: bool = False) -> float:
    r"""The theorem: a bound of normalized attention's constant, the same at every point.

    .. math:: e^\alpha \sqrt{m / n} + \alpha \sqrt 8

    ``alpha`` is that of the conditions, see ``ALPHA``, for m queries and n keys; ``tight`` has 2 in
    place of the root of 8. Source: LipschitzNorm paper, theorem.
    """
    if alpha < 0 or queries < 1 or keys < 1:
        raise ValueError(
            "expected alpha of 0 or more and at least one query and key, got "
            f"alpha={alpha}, queries={queries}, keys={keys}"
        )
    return math.exp(alpha) * math.sqrt(queries / keys) + alpha * (2 if tight else math.sqrt(8))


def tied_keys(
    query: Float[Tensor, " d"], keys: int, scale: float, generator: torch.Generator | None = None
) -> Float[Tensor, "keys d"]:
    r"""The worst case for attention, two keys far apart that tie, and all others far below.

    With u a random unit vector orthogonal to the direction q of the query, drawn by ``generator``
    or else torch's global one, these 2 keys or more are s (q + u), s (q - u), and -s q.
    """
    if keys < 2 or len(query) < 2 or not query.any():
        raise ValueError(
            "expected two keys or more and a query other than zero, of two dimensions or more, "
            f"got {keys} keys and a query of {len(query)} dimensions"
        )
    direction = query / query.norm()
    across = torch.randn(len(query), generator=generator, dtype=query.dtype)
    across = across - (across @ direction) * direction
    across = across / across.norm()
    return scale * torch.stack([direction + across, direction - across, *[-direction] * (keys - 2)])


def gat_bound(layer: GATConv, edge_index: Int[Tensor, "2 E"], num_nodes: int) -> float:
    r"""A bound of a normalized GAT layer's constant on a graph, the same for all features.

    With :math:`n_i` neighbors of node i, itself included, and the scale f (over the LeakyReLU's
    negative slope, where the size of that is above 1),

    .. math::
        L_i &= \frac{e^{1/f}}{\sqrt{n_i}} + \frac{4}{f} \\
        L &= \Bigl(\sum_k \lVert W_k \rVert_2^2\Bigr)^{1/2}
            \Bigl(\max_j \sum_{i : j \in N(i)} L_i^2\Bigr)^{1/2} + \lVert W_r \rVert_2

    over heads k, whose outputs are concatenated; where they are averaged, the first factor is the
    mean of the spectral norms. The last term is there with ``residual=True``, see PyG. The weights
    W are not normalized: the bound of a deep network still contains their product.

    Raises ``ValueError`` unless the layer is normalized by ``lipschitz_normalise(layer)``, mode
    ``"paper"``, and every node is its own neighbor, without which scores have no bound.

    Source: derived from the theorem of the LipschitzNorm paper, on the page.
    """
    norm = getattr(getattr(layer, "score_norm", None), "norm", None)
    if norm is None or norm.mode != "paper":
        raise ValueError(
            "layer: expected a GATConv normalized by lipschitz_normalise(layer), mode 'paper', got "
            + ("one that is not normalized" if norm is None else f"mode {norm.mode!r}")
        )
    if edge_index.numel() and not 0 <= edge_index.min() <= edge_index.max() < num_nodes:
        raise ValueError(
            f"edge_index: expected nodes from 0 to {num_nodes - 1}, got {edge_index.min()} to "
            f"{edge_index.max()}"
        )
    if layer.add_self_loops:
        edge_index = add_self_loops(remove_self_loops(edge_index)[0], num_nodes=num_nodes)[0]
    source, target = directed(layer, edge_index)
    without = num_nodes - len(source[source == target].unique())
    if without:
        raise ValueError(
            f"edge_index: expected every node among its own neighbors, but {without} of "
            f"{num_nodes} have no self-loop; the bound needs them: use add_self_loops=True"
        )
    size = torch.bincount(target, minlength=num_nodes)
    scale = norm.scale / max(1, abs(layer.negative_slope))  # LeakyReLU's own constant
    bound = math.exp(1 / scale) / size.double().sqrt() + 4 / scale  # L_i
    sums = scatter(bound.square().index_select(0, target), source, dim_size=num_nodes)
    weights = layer.lin.weight.detach().double().view(layer.heads, layer.out_channels, -1)
    spectral = torch.linalg.matrix_norm(weights, ord=2)  # of each head
    heads = spectral.square().sum().sqrt() if layer.concat else spectral.mean()
    bound_of_attention = heads * sums.max().sqrt()
    if layer.res is not None:
        weight = layer.res.weight.detach().double()
        bound_of_attention += torch.linalg.matrix_norm(weight, ord=2)
    return bound_of_attention.item()


def _largest_row(x: Tensor) -> Tensor:
    return x.norm(dim=-1).amax()
