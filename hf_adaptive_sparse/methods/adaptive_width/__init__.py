"""Layer-adaptive widths: which units of which block go, so that a model has a given number of parameters.

Source: Adapt-Pruner (arXiv 2502.03460). Scores say which units of an axis go first, an allocator how many of each:

    problem = WidthProblem(axes=axes, costs=unit_costs(axes, shapes), scores=scores, remove=..., importance=...)
    chosen = WIDTH_ALLOCATORS["adaptive"](problem, WidthState.start(axes))

`chosen.keep` is for the surgeon, `chosen.state` for the next step. Allocators:

    adaptive           blocks that turn the residual stream less lose more; reads `importance`
    uniform            the same part of every axis
    global_threshold   the lowest standardised scores of the model (FLAP)
    saap               axes whose scores fluctuate more lose more
"""

from __future__ import annotations

from collections.abc import Callable

from .allocators import (
    adaptive_widths,
    axis_importance,
    global_threshold_widths,
    layer_importance,
    saap_widths,
    uniform_widths,
)
from .budget import (
    Allocation,
    WidthProblem,
    WidthState,
    min_reachable,
    parameters_to_remove,
    unit_costs,
    whole_units,
)
from .repair import repaired_readers
from .rounding import round_widths

WIDTH_ALLOCATORS: dict[str, Callable[[WidthProblem, WidthState], Allocation]] = {
    "adaptive": adaptive_widths,
    "uniform": uniform_widths,
    "global_threshold": global_threshold_widths,
    "saap": saap_widths,
}

__all__ = [
    "WIDTH_ALLOCATORS",
    "Allocation",
    "WidthProblem",
    "WidthState",
    "adaptive_widths",
    "axis_importance",
    "global_threshold_widths",
    "layer_importance",
    "min_reachable",
    "parameters_to_remove",
    "repaired_readers",
    "round_widths",
    "saap_widths",
    "uniform_widths",
    "unit_costs",
    "whole_units",
]
