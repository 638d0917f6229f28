"""Allocations, slow and obvious: every possibility is tried, and interpolation goes point by point."""

from __future__ import annotations

import itertools

Curves = dict[str, list[tuple[float, float]]]


def best_levels(curves: Curves, numel: dict[str, int], target: float) -> tuple[int, float]:
    """Distance of the total number of zeros to the target, and sum of errors, of the best choice of levels."""
    names, best = list(numel), None
    for choice in itertools.product(*(curves[name] for name in names)):
        zeros = sum(round(sparsity * numel[name]) for name, (sparsity, _) in zip(names, choice, strict=True))
        candidate = (abs(zeros - target * sum(numel.values())), sum(error for _, error in choice))
        if best is None or candidate < best:
            best = candidate
    return best


def hull_error(points: list[tuple[float, float]], sparsity: float) -> float:
    """The largest convex function below the points: the least value that mixing two of them gives."""
    errors = [error for s, error in points if abs(s - sparsity) < 1e-12]
    for (left, low), (right, high) in itertools.permutations(points, 2):
        if left < sparsity < right:
            errors.append(low + (high - low) * (sparsity - left) / (right - left))
    return min(errors)


def best_whole_weights(curves: Curves, numel: dict[str, int], target: float) -> float:
    """Least sum of hull errors of all ways to spread the zeros, one by one, over the units."""
    names, budget = list(numel), round(target * sum(numel.values()))
    ranges = []
    for name in names:
        ends = [sparsity for sparsity, _ in curves[name]]
        ranges.append([z for z in range(numel[name]) if min(ends) <= z / numel[name] <= max(ends)])
    sums = [
        sum(hull_error(curves[name], z / numel[name]) for name, z in zip(names, zeros, strict=True))
        for zeros in itertools.product(*ranges)
        if sum(zeros) == budget
    ]
    return min(sums)


def ranked(sensitivity: dict[str, float], target: float, alpha: float) -> dict[str, float]:
    """Algorithm 1 of the paper as printed, without its correction: densities by ascending rank."""
    left, right = 1 - target - alpha, 1 - target + alpha
    order = sorted(sensitivity, key=sensitivity.__getitem__)
    return {name: 1 - (left + rank * (right - left) / (len(order) - 1)) for rank, name in enumerate(order)}


def owl(ratio: dict[str, float], target: float, width: float) -> dict[str, float]:
    """As the authors' script: to [0, 2 lambda], and the mean over layers to the density."""
    low, high = min(ratio.values()), max(ratio.values())
    density = {name: (value - low) / (high - low) * 2 * width for name, value in ratio.items()}
    mean = sum(density.values()) / len(density)
    return {name: 1 - (value - mean + 1 - target) for name, value in density.items()}


def alpha_pruning(exponent: dict[str, float], numel: dict[str, int], target: float, epsilon: float) -> dict[str, float]:
    """Ratios to [1 - epsilon, 1 + epsilon], and their weighted mean to the target."""
    low, high = min(exponent.values()), max(exponent.values())
    ratio = {name: 1 - epsilon + 2 * epsilon * (value - low) / (high - low) for name, value in exponent.items()}
    scale = target * sum(numel.values()) / sum(ratio[name] * numel[name] for name in numel)
    return {name: value * scale for name, value in ratio.items()}
