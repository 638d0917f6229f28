"""One-shot solvers, slow and obvious: a fresh inverse for every column, one row at a time, in the unscaled basis."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product

import torch
from torch import Tensor


def obs_sweep(
    weight: Tensor,
    hessian: Tensor,
    choose_mask: Callable[[Tensor, slice], Tensor],
    width: int,
    round_column: Callable[[Tensor, int], Tensor] = lambda column, _: column,
) -> tuple[Tensor, Tensor]:
    """Every pruned or rounded column is made up for by the best change of the columns after it."""
    weight, keep = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    for j in range(weight.shape[1]):
        if j % width == 0:
            keep[:, j : j + width] = choose_mask(weight[:, j : j + width].clone(), slice(j, j + width))
        inverse = torch.linalg.inv(hessian[j:, j:])
        rounded = torch.where(keep[:, j], round_column(weight[:, j], j), 0.0)
        for row, value in enumerate(rounded):
            error = (weight[row, j] - value) / inverse[0, 0]
            weight[row, j:] -= error * inverse[0]
            weight[row, j] = value
    return weight, keep


def sparsegpt_mask(block: Tensor, factor: Tensor, sparsity: float) -> Tensor:
    """The published choice for a block of columns: the smallest w^2 / U_jj^2, all rows together.

    Args:
        block: [out, k] corrected weights.
        factor: [k], U_jj of these columns.
    """
    scores = block.square() / factor.square()
    pruned = sorted((float(score), place) for place, score in enumerate(scores.flatten()))
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    for _, place in pruned[: int(sparsity * len(pruned))]:
        keep[place] = False
    return keep.view(block.shape)


def thanos(
    weight: Tensor, hessian: Tensor, choose_mask: Callable[[Tensor, slice], Tensor], block: int
) -> tuple[Tensor, Tensor]:
    """Per block and row: the best change of all columns from the block on that makes the pruned ones zero."""
    weight, keep = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], block):
        keep[:, start : start + block] = choose_mask(
            weight[:, start : start + block].clone(), slice(start, start + block)
        )
        for row in range(len(weight)):
            free = [j for j in range(start, weight.shape[1]) if j >= start + block or keep[row, j]]
            pruned = [j for j in range(start, start + block) if j < weight.shape[1] and not keep[row, j]]
            # With the pruned ones at zero, the gradient of the error for the free ones must vanish.
            change = torch.linalg.solve(hessian[free][:, free], hessian[free][:, pruned] @ weight[row, pruned])
            weight[row, free] += change
            weight[row, pruned] = 0.0
    return weight, keep


def best_weights(dense: Tensor, hessian: Tensor, keep: Tensor) -> Tensor:
    """The normal equations on the support of every row."""
    solved = torch.zeros_like(dense)
    for row in range(len(dense)):
        support = keep[row].nonzero()[:, 0]
        right = (hessian @ dense[row])[support]
        solved[row, support] = torch.linalg.solve(hessian[support][:, support], right)
    return solved


def all_masks(columns: int, n: int, m: int) -> Tensor:
    """[masks, columns] bool: every way to keep n of every m."""
    groups = [[position in kept for position in range(m)] for kept in combinations(range(m), n)]
    rows = [sum(choice, []) for choice in product(groups, repeat=columns // m)]
    return torch.tensor(rows)


def least_error(dense_row: Tensor, hessian: Tensor, masks: Tensor) -> float:
    """The error of the best of all masks, with the best weights on it."""
    dense = dense_row.expand(len(masks), -1)
    difference = best_weights(dense, hessian, masks) - dense
    return float(((difference @ hessian) * difference).sum(dim=1).min())


def alps(
    dense: Tensor, matrix: Tensor, choose_mask: Callable[[Tensor], Tensor], rho: float, steps: int
) -> tuple[Tensor, Tensor]:
    """The published iteration in the scaled basis with every step written out: D and its support after some steps."""
    identity = torch.eye(len(matrix), dtype=dense.dtype)
    d = torch.where(choose_mask(dense), dense, 0.0)
    before, v = d != 0, torch.zeros_like(dense)
    for step in range(1, steps + 1):
        w = torch.linalg.solve(matrix + rho * identity, (dense @ matrix - v + rho * d).T).T
        keep = choose_mask(w + v / rho)
        d = torch.where(keep, w + v / rho, 0.0)
        v = v + rho * (w - d)
        if step % 3 == 0:
            changed, kept = (keep != before).sum(), keep.sum()
            assert changed, "a case in which the mask rests says nothing about the schedule"
            rho *= 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1
            before = keep
    return d, before


def fista_steps(start: Tensor, target: Tensor, matrix: Tensor, penalty: float, steps: int) -> Tensor:
    """FISTA for 0.5 <V A, V> - <V, target> + penalty sum |V|."""
    length = 1.0 / torch.linalg.eigvalsh(matrix).max()
    v, y, t = start.clone(), start.clone(), 1.0
    for _ in range(steps):
        z = y - length * (y @ matrix - target)
        new = z.sign() * (z.abs() - penalty * length).clamp(min=0.0)
        grown = (1.0 + (1.0 + 4.0 * t * t) ** 0.5) / 2.0
        y = new + (t - 1.0) / grown * (new - v)
        v, t = new, grown
    return v


def fista(dense: Tensor, matrix: Tensor, choose_mask: Callable[[Tensor], Tensor], share: float, rounds: int) -> Tensor:
    """FISTAPruner from the masked weight in the scaled basis, with the logarithm of lambda bisected."""

    def error(difference: Tensor) -> float:
        return float((difference @ matrix * difference).sum()) ** 0.5

    target = dense @ matrix
    candidates = [torch.where(choose_mask(dense), dense, 0.0)]
    high = float(target.abs().max())
    low = 1e-6 * high
    for _ in range(rounds):
        penalty = (low * high) ** 0.5
        best = min(candidates, key=lambda candidate: error(candidate - dense))
        relaxed = fista_steps(best, target, matrix, penalty, 20)
        candidates.append(torch.where(choose_mask(relaxed), relaxed, 0.0))
        if error(candidates[-1] - relaxed) / error(candidates[-1] - dense) > share:
            low = penalty
        else:
            high = penalty
    return min(candidates, key=lambda candidate: error(candidate - dense))
