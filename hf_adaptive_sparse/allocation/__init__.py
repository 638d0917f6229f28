"""How sparse each unit becomes: `allocate(sensitivity, numel, target) -> {unit: sparsity}`.

A unit is whatever gets a sparsity of its own: a matrix, or all matrices of a block. Sparsities are whole zeros divided
by weights, with exactly round(target * all weights) zeros in all. `sensitivity` is one number per unit, larger = prune
less; which one depends on the allocator:

    uniform   none: every unit gets the target
    ranked    any, of which only the order counts: a trace of the Fisher matrix (`FisherTrace.trace`) or of the Hessian
              (`hutchinson_traces`), divided by the number of weights in the paper
    owl       `outlier_ratio`
    alpha     `tail_heaviness`

Others read more than one number per unit and stand beside the dict:

    error_curve_allocation   errors measured at several sparsities; any sparsity between them
    level_allocation         errors measured at several sparsities; one of these, such as mixed n:m patterns
    evolutionary_search      a function that measures the whole model; one of several sparsities per unit
"""

from __future__ import annotations

from collections.abc import Callable

from .alpha import alpha_allocation
from .budget import number_of_zeros, whole_weights
from .error_curves import error_curve_allocation
from .evolutionary import SearchResult, evolutionary_search
from .levels import level_allocation, level_grid
from .owl import owl_allocation
from .ranked import ranked_allocation
from .uniform import uniform_allocation

ALLOCATORS: dict[str, Callable[..., dict[str, float]]] = {
    "uniform": uniform_allocation,
    "ranked": ranked_allocation,
    "owl": owl_allocation,
    "alpha": alpha_allocation,
}

__all__ = [
    "ALLOCATORS",
    "SearchResult",
    "alpha_allocation",
    "error_curve_allocation",
    "evolutionary_search",
    "level_allocation",
    "level_grid",
    "number_of_zeros",
    "owl_allocation",
    "ranked_allocation",
    "uniform_allocation",
    "whole_weights",
]
