"""Activation: a unit matters as much as what it sends on is large.

Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (Minitron), NeurIPS 2024,
section 2.2, with the mean over the sequence and the L2 norm over the batch.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..units import Axis
from .stats import UnitStats, as_scores, readers


def activation_unit_score(axis: Axis, weights: Mapping[str, Tensor], stats: UnitStats) -> Tensor:
    """L2 over windows, and over the inputs j of a unit, of the mean over tokens of |x_j|, on the weights that read it.

    Args:
        weights: name of every reading weight -> its values; only their shapes are read.
        stats: reads `inputs`.
    Returns:
        [units] float32, >= 0, comparable within an axis.
    Raises:
        CalibrationError: no inputs were collected, or not all were finite.
        TargetError: no linear layer reads these units.
    """
    total = weights[axis.spans[0].tensor].new_zeros(axis.count).double()
    for span, weight in readers(axis, weights, "activation"):
        magnitudes = stats.moments(axis, span.tensor, "activation").magnitudes.to(weight.device)
        total = total + magnitudes[span.index.to(weight.device)].sum(1)
    return as_scores(total.sqrt())
