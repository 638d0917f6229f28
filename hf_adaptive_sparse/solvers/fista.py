"""FISTAPruner: a convex relaxation of pruning, an l1 penalty found by bisection, and rounding to the pattern.

Source: Zhao et al., "A Convex-optimization-based Layer-wise Post-training Pruner for Large Language Models"
(FISTAPruner), EMNLP 2025, arXiv 2408.03728: min_V 0.5 ||V X* - W X||^2 + lambda sum |V|, with X* the inputs that pruned
layers before this one produce, and X those of the dense model.

Departures: `weight` stands for what is wanted on the inputs X*, so a caller who wants the paper's correction passes the
least-squares solution T of ||T X* - W X|| (what is left of that is the same for every V, and no part of the test of
the rounding error); the gradient is that of the objective, with X* (eq. 4a prints X); all is done in the scaled basis,
where one step length fits all inputs; lambda is bisected between powers of the largest one that is of use, for a given
number of rounds, because the published bracket [0, 1e6] takes 30 rounds to come down; places of the pattern that the
penalty leaves empty are given to the largest dense weights; conjugate gradients take the shrinkage of the penalty away
at the end, and fill those places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..stats import LayerStats
from .basis import ChooseMask, check_layer, finished, from_scaled, to_scaled
from .pcg import conjugate_gradient

# Of the penalty from which on every weight is zero: the least one tried.
_LEAST_PENALTY = 1e-6
# Of a dense weight: smaller than what the penalty leaves of another.
_BEHIND = 1e-9


def fista(
    weight: Tensor,
    stats: LayerStats,
    choose_mask: ChooseMask,
    *,
    start: Tensor | None = None,
    iterations: int = 20,
    rounds: int = 12,
    rounding_share: float = 0.3,
    debias: int = 10,
) -> tuple[Tensor, Tensor]:
    """Prune [out, in] from a warm start; the result is never worse than the start, rounded.

    Args:
        weight: any float dtype; float64 is solved in float64, anything else in float32.
        stats: reads `scaled`.
        choose_mask: rounds a relaxed solution to the pattern; asked once per round, for all columns.
        start: [out, in], what another solver made of the weight (the paper: SparseGPT or Wanda); None: the masked
            weight.
        iterations: gradient steps per round.
        rounds: values of the penalty tried.
        rounding_share: the penalty grows while rounding makes more than this part of the error, and shrinks otherwise.
        debias: iterations of conjugate gradients on the final mask.
    Returns:
        The new weight [out, in] in the dtype of `weight`, and keep [out, in] bool.
    Raises:
        ConfigError: `rounding_share` is not between 0 and 1.
    """
    check_layer(weight, stats, "fista")
    if not 0.0 < rounding_share < 1.0:
        raise ConfigError(f"rounding_share is a part of the error, in (0, 1), got {rounding_share}. Try 0.3.")
    dense = to_scaled(weight, stats)
    matrix = stats.scaled.matrix.to(dense.dtype)
    step = 1.0 / torch.linalg.eigvalsh(matrix)[-1].item()

    def error(difference: Tensor) -> float:
        return ((difference @ matrix) * difference).sum().clamp(min=0.0).sqrt().item()

    # Places that the penalty leaves empty go to the largest dense weights, of dead inputs last, and not to low indices.
    behind = (_BEHIND * dense).masked_fill_(stats.scaled.dead, 0.0)

    def rounded(point: Tensor) -> tuple[Tensor, Tensor]:
        ranked = torch.where(point == 0, behind, point)
        keep = choose_mask(from_scaled(ranked, stats), slice(0, point.shape[1]))
        return point * keep, keep

    best, best_keep = rounded(to_scaled(weight if start is None else start, stats))
    best_error = error(best - dense)
    high = (dense @ matrix).abs().amax().item()
    low = _LEAST_PENALTY * high
    for _ in range(rounds):
        penalty = (low * high) ** 0.5
        relaxed = _fista_steps(best, dense, matrix, penalty, step, iterations)
        point, keep = rounded(relaxed)
        total = error(point - dense)
        if error(point - relaxed) > rounding_share * total:
            low = penalty
        else:
            high = penalty
        if total < best_error:
            best, best_keep, best_error = point, keep, total
    solved = conjugate_gradient(best, dense, matrix, best_keep, debias)
    return finished(from_scaled(solved, stats), best_keep, weight.dtype), best_keep


def _fista_steps(start: Tensor, dense: Tensor, matrix: Tensor, penalty: float, step: float, iterations: int) -> Tensor:
    """V after some accelerated proximal gradient steps of length `step` from `start`; everything scaled."""
    solution, ahead, momentum = start, start, 1.0
    for _ in range(iterations):
        moved = torch.addmm(ahead, ahead - dense, matrix, alpha=-step)
        shrunk = torch.nn.functional.softshrink(moved, penalty * step)
        following = (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5) / 2.0
        ahead = torch.lerp(solution, shrunk, 1.0 + (momentum - 1.0) / following)
        solution, momentum = shrunk, following
    return solution
