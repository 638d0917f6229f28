"""Levels: one of a few sparsities per unit, such as dense, 2:4 or 1:4, with the least sum of errors under a budget.

The multiple-choice knapsack problem, by dynamic programming over the number of zeros (Dudzinski and Walukiewicz, "Exact
Methods for the Knapsack Problem and its Generalizations", EJOR 1987). Of very many units only those whose choice is
close are open; the others take what the convex hull of their errors says (the core of Pisinger, "A Minimal Algorithm
for the Multiple-Choice Knapsack Problem", EJOR 1995).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError
from .budget import check_units, whole_weights
from .error_curves import Curves, check_reach, checked_curves, lower_hull, slopes, spend

CORE = 256
BUCKETS = 1 << 16


def level_allocation(
    curves: Curves,
    numel: dict[str, int],
    target: float,
    *,
    importance: dict[str, float] | None = None,
    tolerance: float = 1e-4,
) -> dict[str, float]:
    """One of its measured sparsities for every unit, so that they meet the target and the sum of errors is least.

    Of all choices the closest to the target wins, and of those the one with the least sum. That is exact for at most
    CORE units and at most BUCKETS different totals (n:m patterns in a language model have some ten thousand); beyond,
    it is close.

    Args:
        curves: unit -> its levels, (sparsity, error) points: for mixed n:m patterns for example [(0.0, 0.0),
            (0.5, error of 2:4), (0.75, error of 1:4)].
        numel: unit -> number of weights.
        target: fraction of zeros over all weights, in [0, 1).
        importance: unit -> what one of its error weighs, >= 0; 1 for all by default.
        tolerance: largest difference between the target and what is realised; a model that is too small for it may
            miss the target by half a weight.
    Returns:
        unit -> sparsity, as `curves` has it.
    Raises:
        ConfigError: points that cannot be used, names that do not agree, or a target that no choice meets; the
            message says what can be reached next to it.
    """
    points = checked_curves(curves, numel, target, importance)
    check_reach(points, numel, target, tolerance)
    chosen, open_units = _settled(points, numel, target)
    total = sum(numel.values())
    table = _Table(max(total // BUCKETS, 1), sum(round(points[name][chosen[name]][0] * numel[name]) for name in chosen))
    for name in open_units:
        table.add([round(sparsity * numel[name]) for sparsity, _ in points[name]], [error for _, error in points[name]])
    distance = table.zeros.double() - target * total
    end = int(distance.abs().argmin())
    if abs(float(distance[end])) > max(tolerance * total, 0.5):
        near = (table.zeros[distance < 0].amax(0, keepdim=True), table.zeros[distance > 0].amin(0, keepdim=True))
        raise ConfigError(
            f"a sparsity of {target} cannot be reached to within {tolerance:g} with the levels given: next to it are "
            f"{' and '.join(f'{int(zeros) / total:.6g}' for zeros in near)}. Ask for one of them, or add levels."
        )
    chosen.update(zip(open_units, table.path(end), strict=True))
    return {name: points[name][chosen[name]][0] for name in numel}


def level_grid(numel: dict[str, int], target: float, *, step: float = 0.05, reach: int = 4) -> dict[str, list[float]]:
    """Levels around the target, `reach` below and above, that units of the same size can swap at an equal budget.

    Neighbours differ by the same whole number of weights, round(step * numel). Levels outside [0, 1) are left out.

    Raises:
        ConfigError: no unit, a target or step outside [0, 1), or a negative reach.
    """
    check_units(numel, target)
    if not 0.0 < step < 1.0 or reach < 0:
        raise ConfigError(f"levels have a step in (0, 1) and a reach >= 0, got {step} and {reach}.")
    base = whole_weights(dict.fromkeys(numel, target), numel, target)
    grid = {}
    for name, count in numel.items():
        zeros = (round(base[name] * count) + k * max(round(step * count), 1) for k in range(-reach, reach + 1))
        grid[name] = [each / count for each in zeros if 0 <= each < count]
    return grid


def _settled(points: Curves, numel: dict[str, int], target: float) -> tuple[dict[str, int], list[str]]:
    """Units whose level the convex hulls settle, and those, at most CORE, whose next zero costs about the last one."""
    if len(numel) <= CORE:
        return {}, list(numel)
    hulls = {name: lower_hull(points[name]) for name in numel}
    parts, price = spend(hulls, numel, target)
    doubt = {
        name: min((abs(slope - price) for slope in slopes(hulls[name], numel[name])), default=math.inf)
        for name in numel
    }
    open_units = set(sorted(numel, key=doubt.__getitem__)[:CORE])
    levels = {
        name: points[name].index(hulls[name][math.floor(parts[name])]) for name in numel if name not in open_units
    }
    return levels, [name for name in numel if name in open_units]


class _Table:
    """Every total of zeros that the units so far can have, and the least sum of errors that has it.

    Totals of one bucket share a place; the one with the least sum of errors is kept, with its exact total.
    """

    def __init__(self, bucket: int, start: int):
        self.bucket = bucket
        self.zeros = torch.tensor([start])
        self._errors = torch.zeros(1, dtype=torch.float64)
        self._origins: list[tuple[int, Tensor]] = []

    def add(self, zeros: list[int], errors: list[float]) -> None:
        """Let one more unit choose one of its levels."""
        totals = (torch.tensor(zeros)[:, None] + self.zeros).flatten()
        sums = (torch.tensor(errors, dtype=torch.float64)[:, None] + self._errors).flatten()
        place = totals // self.bucket
        place -= place.min()
        places = int(place.max()) + 1
        least = sums.new_full((places,), math.inf).scatter_reduce_(0, place, sums, "amin")
        number = torch.where(sums == least[place], torch.arange(len(sums)), len(sums))
        first = number.new_full((places,), len(sums)).scatter_reduce_(0, place, number, "amin")
        first = first[first < len(sums)]
        self._origins.append((len(self.zeros), first.int()))
        self.zeros, self._errors = totals[first], sums[first]

    def path(self, end: int) -> list[int]:
        """The level of every unit that leads to entry `end` of `zeros`."""
        levels = []
        for entries, origins in reversed(self._origins):
            level, end = divmod(int(origins[end]), entries)
            levels.append(level)
        return levels[::-1]
