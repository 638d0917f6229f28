"""What allocators share: checks of what they are given, and sparsities that meet a budget to one weight.

A budget is a number of zeros: round(target * weights of all units).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import ConfigError

Bounds = tuple[float, float]


def check_units(numel: dict[str, int], target: float) -> None:
    """Raise ConfigError unless there is something to prune and the target is a fraction of zeros."""
    if not 0.0 <= target < 1.0:
        raise ConfigError(f"sparsity is a fraction of zeros in [0, 1), got {target}. For 50 % write 0.5.")
    if not numel:
        raise ConfigError("there is nothing to allocate a sparsity to: no layer is given. Check the target modules.")
    for name, count in numel.items():
        if count < 1:
            raise ConfigError(f"{name}: a layer has at least one weight, got {count}. Leave it out.")


def check_measures(measures: dict[str, float], numel: dict[str, int], what: str) -> None:
    """Raise ConfigError unless `measures`, called `what`, holds one finite number per unit."""
    check_names(measures.keys(), numel, what)
    for name in numel:
        if not math.isfinite(measures[name]):
            raise ConfigError(f"{name}: its {what} is {measures[name]}. Calibrate again, or leave the layer out.")


def check_names(given: object, numel: dict[str, int], what: str) -> None:
    """Raise ConfigError unless the names `given` are those of `numel`."""
    names = set(given)  # type: ignore[call-overload]
    for name in numel:
        if name not in names:
            raise ConfigError(f"{name}: has no {what}. Measure it, or leave the layer out.")
    for name in sorted(names - numel.keys()):
        raise ConfigError(f"unknown layer {name!r}: it has a {what}, but no number of weights. Leave it out.")


def number_of_zeros(numel: dict[str, int], target: float) -> int:
    """The budget: how many weights of all units together are to be zero."""
    return round(target * sum(numel.values()))


def fit_budget(
    family: Callable[[float], dict[str, float]],
    start: float,
    end: float,
    numel: dict[str, int],
    target: float,
    bounds: Bounds = (0.0, 1.0),
) -> dict[str, float]:
    """The member of a family of allocations that meets the budget, by bisection, in whole weights.

    Args:
        family: t -> sparsity per unit, which grows with t; what leaves `bounds` is moved to the bound.
        start, end: t at which every unit is at or below its lower bound, at or above its upper bound.
        bounds: of the sparsity of every unit, met to one weight.
    Returns:
        Sparsity per unit: whole zeros / weights, with exactly `number_of_zeros` zeros in all.
    Raises:
        ConfigError: the bounds leave no room for the target.
    """
    lowest, highest = bounds
    if not 0.0 <= lowest <= highest <= 1.0:
        raise ConfigError(f"bounds of a layer's sparsity are 0 <= lowest <= highest <= 1, got {lowest} and {highest}.")
    if not lowest <= target <= highest:
        raise ConfigError(
            f"a sparsity of {target} cannot be reached when every layer has between {lowest} and {highest}. Ask for a "
            "target in between, or widen the bounds."
        )

    def clipped(t: float) -> dict[str, float]:
        # One weight of every unit stays: what that costs is spread here, over all, and not by the rounding.
        return {name: min(max(value, lowest), highest, 1.0 - 1.0 / numel[name]) for name, value in family(t).items()}

    zeros = target * sum(numel.values())
    for _ in range(64):
        middle = (start + end) / 2
        if math.fsum(value * numel[name] for name, value in clipped(middle).items()) < zeros:
            start = middle
        else:
            end = middle
    return whole_weights(clipped(end), numel, target)


def whole_weights(sparsity: dict[str, float], numel: dict[str, int], target: float) -> dict[str, float]:
    """Round to whole zeros per unit, exactly `number_of_zeros` in all: the largest remainders are rounded up.

    Every unit keeps at least one weight.

    Args:
        sparsity: per unit, in [0, 1], of weighted mean `target` to within one weight per unit.
    Raises:
        ConfigError: they do not average the target, or every unit would have to lose its last weight.
    """
    check_units(numel, target)
    check_measures(sparsity, numel, "sparsity")
    budget, total = number_of_zeros(numel, target), sum(numel.values())
    asked = math.fsum(sparsity[name] * count for name, count in numel.items())
    if abs(asked - target * total) > len(numel):
        raise ConfigError(f"the sparsities average {asked / total:.6g} over all weights, not {target}.")
    if budget > total - len(numel):
        raise ConfigError(
            f"a sparsity of {target} leaves {total - budget} of {total} weights, fewer than one for each of "
            f"{len(numel)} layers. Ask for at most {(total - len(numel)) / total:.6g}."
        )
    zeros = {name: min(math.floor(sparsity[name] * count), count - 1) for name, count in numel.items()}
    missing = budget - sum(zeros.values())
    step = 1 if missing >= 0 else -1
    # Largest remainder first; sorted() is stable, so that of equal ones the first unit wins.
    order = sorted(numel, key=lambda name: step * (zeros[name] - sparsity[name] * numel[name]))
    while missing:
        for name in order:
            if missing and 0 <= zeros[name] + step < numel[name]:
                zeros[name] += step
                missing -= step
    return {name: zeros[name] / count for name, count in numel.items()}


def normalised(measures: dict[str, float]) -> dict[str, float]:
    """Moved and scaled to [0, 1]; 0.5 for all where all are equal."""
    lowest, highest = min(measures.values()), max(measures.values())
    if highest == lowest:
        return dict.fromkeys(measures, 0.5)
    return {name: (value - lowest) / (highest - lowest) for name, value in measures.items()}
