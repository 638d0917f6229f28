"""ALPS: choose mask and weights together, by the alternating direction method of multipliers.

Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", NeurIPS
2024, algorithm 1 (the iteration and the schedule of rho) and 2 (refinement on the final mask).

    W = (H W0 - V + rho D) (H + rho I)^-1,   D = the kept entries of W + V / rho,   V += rho (W - D)

Departures: the caller's chooser projects, where the paper takes the largest entries in the scaled basis (that is
Wanda's score); one Cholesky factorisation and inverse per distinct rho instead of one eigendecomposition, since a step
is then one matrix product instead of two (a CPU, 1024 inputs, 30 steps: a third less time for 1024 rows, half for
4096); the support is compared with that of three steps ago, and H W0 is computed once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..stats import LayerStats
from .basis import ChooseMask, check_layer, finished, from_scaled, to_scaled
from .pcg import conjugate_gradient

RHO = 0.1
"""First penalty of the difference between W and D, in units of the diagonal of the scaled Hessian."""

_INTERVAL = 3  # steps between two looks at the support
_SETTLING = 30  # steps after which a support that hardly changes is taken as it is,
_SETTLED = 3e-4  # in parts of the kept weights
_LEAST_RHO = 1e-3  # a mask that did not change under any penalty from here on rests


def admm(
    weight: Tensor,
    stats: LayerStats,
    choose_mask: ChooseMask,
    *,
    iterations: int = 300,
    rho: float = RHO,
    refine: int = 10,
) -> tuple[Tensor, Tensor]:
    """Prune [out, in] by ADMM until the support rests, then refine on it.

    Args:
        weight: any float dtype; float64 is solved in float64, anything else in float32.
        stats: reads `scaled`.
        choose_mask: asked once per step, for all columns.
        iterations: steps at most; the support rests after 30 to 60.
        rho: first penalty; divided by 5 while the mask of the dense weight does not change under it.
        refine: iterations of conjugate gradients on the final mask.
    Returns:
        The new weight [out, in] in the dtype of `weight`, and keep [out, in] bool.
    """
    check_layer(weight, stats, "admm")
    dense = to_scaled(weight, stats)
    matrix = stats.scaled.matrix.to(dense.dtype)
    projected, keep = _settle(dense, matrix, stats, choose_mask, iterations, rho)
    solved = conjugate_gradient(projected, dense, matrix, keep, refine)
    return finished(from_scaled(solved, stats), keep, weight.dtype), keep


def _settle(
    dense: Tensor,
    matrix: Tensor,
    stats: LayerStats,
    choose_mask: ChooseMask,
    iterations: int,
    rho: float,
) -> tuple[Tensor, Tensor]:
    """D and its support at the end of the iteration; everything in the scaled basis."""

    def project(point: Tensor) -> tuple[Tensor, Tensor]:
        keep = choose_mask(from_scaled(point, stats), slice(0, point.shape[1]))
        return point * keep, keep

    target = dense @ matrix
    projected, keep = project(dense)
    dual = torch.zeros_like(dense)
    start, before, changed_ever = (projected, keep), keep, False
    inverse = _inverse(matrix, rho)
    for step in range(1, iterations + 1):
        solved = (target - dual).add_(projected, alpha=rho) @ inverse
        point = torch.add(solved, dual, alpha=1 / rho)
        projected, keep = project(point)
        # V + rho (W - D) = rho (W + V / rho - D): what the projection took away.
        dual = point.sub_(projected).mul_(rho)
        if step % _INTERVAL:
            continue
        changed = int((keep != before).sum())
        kept = int(keep.sum())
        before = keep
        if not changed and (changed_ever or rho <= _LEAST_RHO):
            break
        if step >= _SETTLING and changed < _SETTLED * kept:
            break
        if changed:
            changed_ever = True
            rho *= 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1
        else:
            rho /= 5
            dual.zero_()
            projected, keep = start
        inverse = _inverse(matrix, rho)
    return projected, keep


def _inverse(matrix: Tensor, rho: float) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))
