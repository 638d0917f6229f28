"""Ranked: sparsity falls linearly with the rank of a unit's sensitivity; how much more sensitive does not count.

Source: Shao et al., "One-Shot Sensitivity-Aware Mixed Sparsity Pruning for Large Language Models", arXiv 2310.09499,
algorithm 1; with matrices as units (the paper's default) or whole layers.
"""

from __future__ import annotations

from ..errors import ConfigError
from .budget import Bounds, check_measures, check_units, fit_budget

SPREAD = 0.1
_ROUNDING = 1e-9  # 1 - 0.9 is less than 0.1 in floats


def ranked_allocation(
    sensitivity: dict[str, float],
    numel: dict[str, int],
    target: float,
    *,
    spread: float | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> dict[str, float]:
    """From target + spread for the least sensitive unit down to target - spread for the most sensitive one.

    The paper leaves the mean over units, not over weights, at the target: big matrices that are sensitive then make
    the model less sparse than asked. Here all sparsities are moved by the same amount until the number of zeros is
    exact, so that they can leave the interval by as much. Units of equal sensitivity share the mean of their ranks.

    Args:
        sensitivity: unit -> any finite number, larger = prune less: the paper's is the trace of the Hessian of the
            loss divided by the number of weights.
        numel: unit -> number of weights.
        target: fraction of zeros over all weights, in [0, 1).
        spread: the paper's alpha, at most min(target, 1 - target). Default: the paper's 0.1, or as much as that allows.
        bounds: lowest and highest sparsity of a unit.
    Returns:
        unit -> sparsity: whole zeros / weights, round(target * all weights) zeros in all.
    Raises:
        ConfigError: names that do not agree, a spread out of range, or bounds that leave no room for the target.
    """
    check_units(numel, target)
    check_measures(sensitivity, numel, "sensitivity")
    room = min(target, 1.0 - target)
    if spread is None:
        spread = min(SPREAD, room)
    if not -_ROUNDING <= spread <= room + _ROUNDING:
        raise ConfigError(
            f"spread of a ranked allocation is between 0 and {room:.6g} at a sparsity of {target}, got {spread}. "
            "Sparsities would leave [0, 1]: set a smaller spread."
        )
    spread = min(max(spread, 0.0), room)
    last = max(len(numel) - 1, 1)
    base = {name: target + spread * (1.0 - 2.0 * rank / last) for name, rank in _ranks(sensitivity).items()}
    if len(numel) == 1:
        base = dict.fromkeys(numel, target)
    return fit_budget(lambda t: {name: base[name] + t for name in numel}, -1.0, 1.0, numel, target, bounds)


def _ranks(values: dict[str, float]) -> dict[str, float]:
    """0 for the smallest value; equal values share the mean of their ranks."""
    ordered = sorted(values.values())
    first: dict[float, int] = {}
    count: dict[float, int] = {}
    for rank, value in enumerate(ordered):
        first.setdefault(value, rank)
        count[value] = count.get(value, 0) + 1
    return {name: first[value] + (count[value] - 1) / 2 for name, value in values.items()}
