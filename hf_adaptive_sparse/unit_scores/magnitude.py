"""L1 and L2: a unit matters as much as its weights are large, over all coupled slices.

Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (L1); the group norm of Fang et al., "DepGraph:
Towards Any Structural Pruning", CVPR 2023 (L2). Both are baselines of LLM-Pruner.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..units import Axis
from .stats import UnitStats, as_scores, unit_sums


def l1_unit_score(axis: Axis, weights: Mapping[str, Tensor], stats: UnitStats) -> Tensor:
    """Sum of |w|.

    Args:
        weights: name of every parameter of the spans -> its values, any float dtype.
        stats: not read.
    Returns:
        [units] float32, >= 0.
    """
    total = weights[axis.spans[0].tensor].new_zeros(axis.count).float()
    for span in axis.spans:
        total = total + unit_sums(span, weights[span.tensor].detach().float().abs())
    return as_scores(total)


def l2_unit_score(axis: Axis, weights: Mapping[str, Tensor], stats: UnitStats) -> Tensor:
    """Root of the sum of w^2; arguments and result as `l1_unit_score`."""
    total = weights[axis.spans[0].tensor].new_zeros(axis.count).float()
    for span in axis.spans:
        total = total + unit_sums(span, weights[span.tensor].detach().float().square())
    return as_scores(total.sqrt())
