"""Uniform: every unit has the same sparsity."""

from __future__ import annotations

from .budget import check_units, whole_weights


def uniform_allocation(sensitivity: dict[str, float], numel: dict[str, int], target: float) -> dict[str, float]:
    """The target for every unit, in whole weights.

    Args:
        sensitivity: not read; every allocator takes it, so that allocators can be exchanged.
        numel: unit -> number of weights.
        target: fraction of zeros over all weights, in [0, 1).
    Returns:
        unit -> sparsity: whole zeros / weights, round(target * all weights) zeros in all.
    Raises:
        ConfigError: no unit, or a target outside [0, 1).
    """
    check_units(numel, target)
    return whole_weights(dict.fromkeys(numel, target), numel, target)
