"""Evolutionary search: let levels of units swap at an equal budget, and keep what makes the whole model better.

Source: Sieberling et al., "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search", ICML 2025,
algorithm 1 and 2: one parent, offspring by level switches, and selection in stages of growing effort.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from .budget import check_names, check_units
from .levels import level_allocation

# Unit -> sparsity, and the effort (say, how many tokens) -> lower is better.
Fitness = Callable[[dict[str, float], int], float]


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        sparsity: unit -> sparsity, one of its levels.
        fitness: of it, at the effort of the last stage.
        history: fitness of the start, then of the parent after every generation.
    """

    sparsity: dict[str, float]
    fitness: float
    history: tuple[float, ...]


def evolutionary_search(
    levels: dict[str, Sequence[float]],
    numel: dict[str, int],
    target: float,
    fitness: Fitness,
    *,
    generator: torch.Generator,
    start: dict[str, float] | None = None,
    generations: int = 50,
    offspring: int = 32,
    stages: Sequence[tuple[int, int]] = ((8, 1), (2, 4), (1, 16)),
    tolerance: float = 1e-4,
) -> SearchResult:
    """The best assignment of levels found, with as many zeros as the start has.

    Every generation draws `offspring` different mutations of the parent: one to three swaps, in which one unit moves
    to a neighbouring level and another takes over exactly as many zeros. Each stage measures who is left, at its
    effort, and keeps its best; in the last one the parent takes part as well, so that with a deterministic fitness it
    is never replaced by a worse one.

    Args:
        levels: unit -> sparsities of which it has stored weights, for example of `level_grid`.
        numel: unit -> number of weights.
        target: fraction of zeros over all weights, in [0, 1).
        fitness: (unit -> sparsity, effort) -> a number, lower = better, such as the KL divergence to the dense model
            on `effort` sequences. NaN counts as infinitely bad.
        generator: of the swaps, on the CPU.
        start: unit -> one of its levels; by default the levels closest to the target.
        stages: (survivors, effort) in order; the last has one survivor.
        tolerance: largest difference between the target and the sparsity of the start.
    Raises:
        ConfigError: names or levels that do not agree, a start off the target, stages that do not narrow to one, or
            levels that no two units can swap.
    """
    check_units(numel, target)
    check_names(levels.keys(), numel, "level")
    _check_plan(generations, offspring, stages)
    if start is None:
        start = _closest(levels, numel, target, tolerance)
    search = _Swaps(levels, numel, generator)
    parent = search.numbers(start, target, tolerance)
    if generations and search.swapped(parent) is None:
        raise ConfigError(
            "no two layers can swap levels at an equal number of zeros. Give levels of equal steps, as level_grid "
            "does, or allocate by error_curves, which swaps nothing."
        )

    def measured(candidate: tuple[int, ...], effort: int) -> float:
        value = float(fitness(search.sparsity(candidate), effort))
        return math.inf if math.isnan(value) else value

    history = [measured(parent, stages[-1][1])]
    for _ in range(generations):
        candidates = search.offspring(parent, offspring)
        for stage, (survivors, effort) in enumerate(stages):
            if stage == len(stages) - 1:
                candidates = [parent, *candidates]  # first: an offspring has to be better, not as good
            ranked = sorted(((measured(each, effort), place) for place, each in enumerate(candidates)))[:survivors]
            candidates = [candidates[place] for _, place in ranked]
        parent = candidates[0]
        history.append(ranked[0][0])
    return SearchResult(sparsity=search.sparsity(parent), fitness=history[-1], history=tuple(history))


def _check_plan(generations: int, offspring: int, stages: Sequence[tuple[int, int]]) -> None:
    if generations < 0 or offspring < 1:
        raise ConfigError(f"a search has generations >= 0 and offspring >= 1, got {generations} and {offspring}.")
    survivors = [offspring, *(count for count, _ in stages)]
    narrows = all(before >= after >= 1 for before, after in zip(survivors, survivors[1:], strict=False))
    if not stages or not narrows or survivors[-1] != 1 or any(effort < 1 for _, effort in stages):
        raise ConfigError(
            f"stages are (survivors, effort) that narrow {offspring} offspring to 1, each of an effort >= 1, got "
            f"{list(stages)}. For example [(8, 1), (2, 4), (1, 16)]."
        )


def _closest(
    levels: dict[str, Sequence[float]], numel: dict[str, int], target: float, tolerance: float
) -> dict[str, float]:
    curves = {name: [(float(level), numel[name] * (level - target) ** 2) for level in levels[name]] for name in numel}
    return level_allocation(curves, numel, target, tolerance=tolerance)


class _Swaps:
    """Candidates as tuples of level numbers, one per unit, and how one becomes another at an equal budget."""

    def __init__(self, levels: dict[str, Sequence[float]], numel: dict[str, int], generator: torch.Generator):
        self.names = list(numel)
        self.levels = [sorted(levels[name]) for name in self.names]
        self.counts = [numel[name] for name in self.names]
        self.zeros = [
            [round(level * count) for level in unit] for unit, count in zip(self.levels, self.counts, strict=True)
        ]
        self.generator = generator

    def numbers(self, sparsity: dict[str, float], target: float, tolerance: float) -> tuple[int, ...]:
        """The candidate that has these sparsities; ConfigError unless they are levels and meet the target."""
        for name, unit in zip(self.names, self.levels, strict=True):
            if sparsity.get(name) not in unit:
                raise ConfigError(f"{name}: starts at a sparsity of {sparsity.get(name)}, which is none of its levels.")
        numbers = tuple(unit.index(sparsity[name]) for name, unit in zip(self.names, self.levels, strict=True))
        total = sum(self.counts)
        realised = sum(unit[number] for unit, number in zip(self.zeros, numbers, strict=True))
        if abs(realised - target * total) > max(tolerance * total, 0.5):
            raise ConfigError(
                f"the search starts at a sparsity of {realised / total:.6g}, and keeps it, but {target} is asked for. "
                "Start elsewhere."
            )
        return numbers

    def sparsity(self, numbers: tuple[int, ...]) -> dict[str, float]:
        return {name: unit[number] for name, unit, number in zip(self.names, self.levels, numbers, strict=True)}

    def offspring(self, parent: tuple[int, ...], wanted: int) -> list[tuple[int, ...]]:
        """At most `wanted` different mutations of the parent; fewer where it has hardly any."""
        found: dict[tuple[int, ...], None] = {}
        for _ in range(4 * wanted):
            child: tuple[int, ...] | None = parent
            # The smaller of two draws: mostly one swap, as in the authors' code.
            for _ in range(min(self._draw(3), self._draw(3)) + 1):
                child = child and self.swapped(child)
            if child and child != parent:
                found[child] = None
            if len(found) == wanted:
                break
        return list(found)

    def swapped(self, numbers: tuple[int, ...]) -> tuple[int, ...] | None:
        """One unit moves to a neighbouring level, another makes up for it; None if no two units can."""
        for move in self._shuffled(2 * len(numbers)):
            unit, step = move // 2, (1, -1)[move % 2]
            if not 0 <= numbers[unit] + step < len(self.levels[unit]):
                continue
            owed = self.zeros[unit][numbers[unit]] - self.zeros[unit][numbers[unit] + step]
            for other in self._shuffled(len(numbers)):
                wanted = self.zeros[other][numbers[other]] + owed
                if other != unit and owed and wanted in self.zeros[other]:
                    changed = list(numbers)
                    changed[unit] += step
                    changed[other] = self.zeros[other].index(wanted)
                    return tuple(changed)
        return None

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))

    def _shuffled(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self.generator).tolist()
