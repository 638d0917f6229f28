"""Wanda-sp: a unit matters as much as the columns that read it, times the norm of what they read.

Source: the structured baseline of An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language
Models", AAAI 2024, after Sun et al., "Wanda", ICLR 2024, eq. 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..units import Axis
from .stats import UnitStats, as_scores, readers


def wanda_sp_unit_score(axis: Axis, weights: Mapping[str, Tensor], stats: UnitStats) -> Tensor:
    """Sum over the inputs j of a unit of mean_i |W_ij| * ||x_j||_2, on the weights that read it.

    Args:
        weights: name of every reading weight -> its values, any float dtype.
        stats: reads `inputs`.
    Returns:
        [units] float32, >= 0, comparable within an axis.
    Raises:
        CalibrationError: no inputs were collected, or not all were finite.
        TargetError: no linear layer reads these units.
    """
    total = weights[axis.spans[0].tensor].new_zeros(axis.count).float()
    for span, weight in readers(axis, weights, "wanda_sp"):
        norm = stats.moments(axis, span.tensor, "wanda_sp").norm.to(weight.device, weight.dtype)
        total = total + (weight.abs().mean(0) * norm)[span.index.to(weight.device)].sum(1)
    return as_scores(total)
