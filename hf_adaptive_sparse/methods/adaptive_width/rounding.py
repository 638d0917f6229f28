"""Widths that hardware and file formats like: multiples of a number, and the same in every block."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import ConfigError
from .budget import Allocation, WidthProblem, allocation


def round_widths(
    problem: WidthProblem, chosen: Allocation, multiple_of: Mapping[str, int], equal: bool = False
) -> Allocation:
    """Move the widths of an allocation to multiples, as close to the budget as multiples come.

    Every width goes to the multiple nearest to it; then one multiple at a time is added or taken away, where the width
    is furthest from what was allocated, as long as this brings the parameters closer to `problem.remove`. An axis that
    is narrower than one multiple already keeps its width. `removed` of the result says what was reached; the state
    stays, so that a later step makes up for it.

    Args:
        chosen: of an allocator, on the same problem.
        multiple_of: kind -> number, for example {"mlp_channel": 64}; other kinds stay as they are.
        equal: whether all axes of one kind get one width, no larger than the narrowest is now. Then all kinds are
            moved, by 1 where `multiple_of` names no number.
    Raises:
        ConfigError: a multiple below 1.
    """
    for kind, number in multiple_of.items():
        if number < 1:
            raise ConfigError(f"widths of {kind} are multiples of a number of at least 1, got {number}.")
    axes = problem.axes
    groups: dict[object, list[int]] = {}
    for a, axis in enumerate(axes):
        if equal or axis.kind in multiple_of:
            groups.setdefault(axis.kind if equal else a, []).append(a)
    wanted = [int(chosen.keep[axis.name].sum()) for axis in axes]
    widths = list(wanted)
    steps: dict[object, int] = {}
    narrowest: dict[object, int] = {}
    for key, members in groups.items():
        step = multiple_of.get(axes[members[0]].kind, 1)
        mean = sum(wanted[a] for a in members) / len(members)
        narrowest[key] = min(axes[a].count for a in members)
        lowest, highest = -(-problem.min_units // step) * step, narrowest[key] // step * step
        fits = lowest <= highest
        steps[key] = step if fits else 0
        for a in members:
            widths[a] = min(max(int(mean / step + 0.5) * step, lowest), highest) if fits else narrowest[key]

    def excess() -> int:
        removed = sum((axis.count - width) * problem.costs[axis.name] for axis, width in zip(axes, widths, strict=True))
        return removed - problem.remove

    while surplus := excess():
        best: tuple[float, object, int] | None = None
        for key, members in groups.items():
            move = steps[key] if surplus > 0 else -steps[key]
            width = widths[members[0]] + move
            count = narrowest[key]
            price = move * sum(problem.costs[axes[a].name] for a in members)
            if not move or not problem.min_units <= width <= count or abs(surplus - price) >= abs(surplus):
                continue
            off = abs(width - sum(wanted[a] for a in members) / len(members)) / count
            if best is None or off < best[0]:
                best = (off, key, move)
        if best is None:
            break
        for a in groups[best[1]]:
            widths[a] += best[2]
    taken = [axis.count - width for axis, width in zip(axes, widths, strict=True)]
    return allocation(problem, taken, chosen.state)
