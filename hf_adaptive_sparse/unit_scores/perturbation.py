"""Perturbation: a unit matters as much as the loss rises when it alone is removed.

Source: the module-wise pruning error of Lin et al., "MoPE-CLIP", CVPR 2024, with the language-modelling loss in place
of a task's metric.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import CalibrationError
from ..units import Axis
from .stats import UnitStats, as_scores


def perturbation_unit_score(axis: Axis, weights: Mapping[str, Tensor], stats: UnitStats) -> Tensor:
    """The measured rise of the loss.

    Args:
        weights: not read.
        stats: reads `losses`.
    Returns:
        [units] float32, below 0 where the model is better without the unit; comparable within the whole model.
    Raises:
        CalibrationError: the losses of this axis were not measured, or not all are finite.
    """
    if axis.name not in stats.losses:
        raise CalibrationError(f"{axis.name}: perturbation needs the loss without each unit, which was not measured.")
    losses = stats.losses[axis.name]
    if not losses.isfinite().all():
        raise CalibrationError(
            f"{axis.name}: the loss without unit {int((~losses.isfinite()).nonzero()[0])} is NaN or inf. Load the "
            "model in float32 or bfloat16, and check its loss on this text."
        )
    return as_scores(losses.clone())
