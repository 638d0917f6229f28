"""Error curves: the sparsities with the least sum of measured errors.

Every unit was pruned to several sparsities, and its error measured. On the lower convex hulls of these curves the least
sum under a budget is what a greedy choice gives: always prune where the next weight costs least (Fox, "Discrete
Optimization via Marginal Analysis", Management Science 1966). Frantar and Alistarh, "SPDY", ICML 2022, is the same
problem without hulls; see `levels.py` for that.
"""

from __future__ import annotations

import itertools
import math

from ..errors import ConfigError
from .budget import check_measures, check_names, check_units, whole_weights

Point = tuple[float, float]
Curves = dict[str, list[Point]]


def error_curve_allocation(
    curves: Curves, numel: dict[str, int], target: float, *, importance: dict[str, float] | None = None
) -> dict[str, float]:
    """Minimise the sum of importance * error over all units; any sparsity between the measured ones can be the answer.

    At most one unit ends between two neighbouring points of its hull, to meet the budget.

    Args:
        curves: unit -> measured (sparsity, error) points, at least one, in any order. Nothing outside of them is
            assumed: include (0.0, 0.0) if a unit may stay dense.
        numel: unit -> number of weights.
        target: fraction of zeros over all weights, in [0, 1).
        importance: unit -> what one of its error weighs, >= 0; 1 for all by default. For absolute errors of outputs
            per token that is `FisherTrace.output_gradient` / outputs.
    Returns:
        unit -> sparsity: whole zeros / weights, round(target * all weights) zeros in all.
    Raises:
        ConfigError: points that cannot be used, names that do not agree, or a target that the measured sparsities do
            not reach.
    """
    points = checked_curves(curves, numel, target, importance)
    check_reach(points, numel, target)
    hulls = {name: lower_hull(points[name]) for name in points}
    parts, _ = spend(hulls, numel, target)
    return whole_weights({name: _along(hulls[name], parts[name]) for name in numel}, numel, target)


def spend(hulls: Curves, numel: dict[str, int], target: float) -> tuple[dict[str, float], float]:
    """Prune from the first point of every hull on, always where the next zero costs least, until the target is met.

    Returns:
        unit -> how many parts of its hull were gone through (one of them, of one unit, may be unfinished), and what
        the last zero cost.
    """
    steps = sorted(
        (slope, index, part, name)
        for index, name in enumerate(numel)
        for part, slope in enumerate(slopes(hulls[name], numel[name]))
    )
    parts = dict.fromkeys(numel, 0.0)
    missing = target * sum(numel.values()) - math.fsum(hulls[name][0][0] * numel[name] for name in numel)
    price = -math.inf
    for slope, _, part, name in steps:
        if missing <= 0:
            break
        width = (hulls[name][part + 1][0] - hulls[name][part][0]) * numel[name]
        parts[name] = part + min(missing / width, 1.0)
        missing -= width
        price = slope
    return parts, price


def _along(hull: list[Point], parts: float) -> float:
    """The sparsity after so many parts of a hull."""
    whole = min(math.floor(parts), len(hull) - 1)
    left, right = hull[whole][0], hull[min(whole + 1, len(hull) - 1)][0]
    return left + (parts - whole) * (right - left)


def checked_curves(curves: Curves, numel: dict[str, int], target: float, importance: dict[str, float] | None) -> Curves:
    """The curves by growing sparsity, errors times importance; ConfigError where they cannot be used."""
    check_units(numel, target)
    check_names(curves.keys(), numel, "error curve")
    if importance is not None:
        check_measures(importance, numel, "importance")
    checked = {}
    for name in numel:
        factor = 1.0 if importance is None else importance[name]
        if factor < 0:
            raise ConfigError(f"{name}: its importance is {factor}, and an error cannot count less than nothing.")
        points = sorted(curves[name])
        if not points:
            raise ConfigError(f"{name}: its error curve has no point. Measure it, or leave the layer out.")
        for sparsity, error in points:
            if not 0.0 <= sparsity < 1.0 or not math.isfinite(error):
                raise ConfigError(
                    f"{name}: its error curve has the point ({sparsity}, {error}). A point is a sparsity in [0, 1) "
                    "and a finite error: leave it out."
                )
        for (sparsity, _), (following, _) in itertools.pairwise(points):
            if sparsity == following:
                raise ConfigError(f"{name}: its error curve has two points at sparsity {sparsity}. Leave one out.")
        checked[name] = [(sparsity, factor * error) for sparsity, error in points]
    return checked


def check_reach(points: Curves, numel: dict[str, int], target: float, tolerance: float = 0.0) -> None:
    """Raise ConfigError unless the sparsities of the curves reach the target, to within `tolerance` or one weight."""
    total = sum(numel.values())
    lowest, highest = (
        math.fsum(points[name][end][0] * count for name, count in numel.items()) / total for end in (0, -1)
    )
    slack = max(tolerance, 1.0 / total)
    if not lowest - slack <= target <= highest + slack:
        raise ConfigError(
            f"a sparsity of {target} cannot be reached: the levels given reach from {lowest:.6g} to {highest:.6g}. Ask "
            "for a target in between, or add levels."
        )


def lower_hull(points: list[Point]) -> list[Point]:
    """The points of the lower convex hull, by growing sparsity; first and last are always among them."""
    hull: list[Point] = []
    for point in points:
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _is_above(left: Point, middle: Point, right: Point) -> bool:
    """Whether `middle` is on or above the line from `left` to `right`."""
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (middle[0] - left[0])


def slopes(hull: list[Point], count: int) -> list[float]:
    """What one more zero costs, between each two neighbouring points of the hull of `count` weights; they grow."""
    return [(right[1] - left[1]) / ((right[0] - left[0]) * count) for left, right in itertools.pairwise(hull)]
