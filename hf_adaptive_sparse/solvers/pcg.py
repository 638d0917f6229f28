"""Refinement on a fixed mask: what the kept weights must be, by preconditioned conjugate gradients.

Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", NeurIPS
2024, algorithm 2. Departures: the stop test reads the residual of the kept weights alone (the published one reads the
whole residual, which does not become small, and never fires); each row has its own step length, since rows are
independent; one matrix product per iteration instead of three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..stats import LayerStats
from .basis import check_layer, finished, from_scaled, to_scaled

_ROUNDING_ERRORS = 10


def pcg_refine(
    dense_weight: Tensor,
    stats: LayerStats,
    keep: Tensor,
    start: Tensor | None = None,
    iterations: int = 10,
) -> Tensor:
    """Minimise ||(W - dense_weight) X||^2, with the damping of `stats`, over weights W that are 0 where keep is False.

    Args:
        dense_weight: [out, in], any float dtype.
        stats: reads `scaled`.
        keep: [out, in] bool; never changed.
        start: [out, in], where to begin; None: the dense weight, masked.
        iterations: at most; `in` of them solve any problem, up to rounding.
    Returns:
        W [out, in] in the dtype of `dense_weight`. No row's error is larger than at the start: a row that rounding to
        that dtype made worse stays as it was.
    """
    check_layer(dense_weight, stats, "pcg_refine")
    dense = to_scaled(dense_weight, stats)
    before = finished(dense_weight if start is None else start, keep, dense_weight.dtype)
    first = to_scaled(before, stats)
    matrix = stats.scaled.matrix.to(dense.dtype)
    solved = conjugate_gradient(first, dense, matrix, keep, iterations)
    after = finished(from_scaled(solved, stats), keep, dense_weight.dtype)
    # With step s from a difference d to the dense weight, the error of a row falls by <s, (2 d - s) matrix>.
    step = to_scaled(after, stats) - first
    better = (step * ((2 * (dense - first) - step) @ matrix)).sum(dim=1, keepdim=True) > 0
    return torch.where(better, after, before)


def conjugate_gradient(start: Tensor, dense: Tensor, matrix: Tensor, keep: Tensor, iterations: int) -> Tensor:
    """Solve V matrix = dense matrix for the kept entries of V, all rows at once, in the scaled basis.

    A row stops changing when its residual is down to rounding errors of the dense row. The diagonal of `matrix` is
    constant there, so that dividing by it, the Jacobi preconditioner, changes nothing.

    Args:
        start: [out, in], 0 where keep is False.
        dense: [out, in].
        matrix: [in, in], positive definite.
        keep: [out, in] bool.
        iterations: at most.
    Returns:
        V [out, in], 0 where keep is False.
    """
    solution = start.clone()
    enough = (_ROUNDING_ERRORS * torch.finfo(dense.dtype).eps * dense.norm(dim=1)).square()
    residual = ((dense - start) @ matrix).mul_(keep)
    direction = residual.clone()
    squared = residual.square().sum(dim=1)
    for _ in range(iterations):
        active = squared > enough
        if not active.any():
            break
        curved = (direction @ matrix).mul_(keep)
        curvature = (direction * curved).sum(dim=1)
        length = torch.where(active & (curvature > 0), squared / curvature, 0.0)[:, None]
        solution.addcmul_(direction, length)
        residual.addcmul_(curved, length, value=-1)
        previous, squared = squared, residual.square().sum(dim=1)
        direction.mul_((squared / previous.clamp(min=torch.finfo(squared.dtype).tiny))[:, None]).add_(residual)
    return solution
