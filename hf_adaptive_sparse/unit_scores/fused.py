"""Fused: the coarse and the fine Taylor score of a unit, each weighted by how certain it is.

Source: the adaptive importance fusion of SAAP (arXiv 2412.15127) of the element-wise and the vector-wise score of
LLM-Pruner, by homoscedastic uncertainty as in Kendall et al., "Multi-Task Learning Using Uncertainty to Weigh Losses",
CVPR 2018: sum_i I_i / (2 s_i^2) + ln s_i. How SAAP finds s_i was not published in a form that we could read.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..units import Axis
from .stats import UnitStats, as_scores, unit_sums

# Of a score relative to its mean: one that is equal for all units says nothing, and must not outweigh the other.
_LEAST_VARIANCE = 1e-6


def fused_unit_score(axis: Axis, weights: Mapping[str, Tensor], stats: UnitStats) -> Tensor:
    """Element-wise sum |w * g| and vector-wise |sum w * g|, both relative to their mean, over twice their variance.

    Ours, in place of learned noise: s_i^2 is the variance of a score over the units of the axis, after division by its
    mean, so that neither the unit of the loss nor the size of a layer counts. ln s_i, the same for all units of an
    axis, is left out.

    Args:
        weights: name of every parameter of the spans -> its values, any float dtype.
        stats: reads `gradients`.
    Returns:
        [units] float32, >= 0, comparable within an axis.
    Raises:
        CalibrationError: a gradient is missing or not finite.
    """
    fine = weights[axis.spans[0].tensor].new_zeros(axis.count).float()
    coarse = fine
    for span in axis.spans:
        weight = weights[span.tensor].detach().float()
        product = weight * stats.gradient(axis, span.tensor, "fused").to(weight.device)
        fine, coarse = fine + unit_sums(span, product.abs()), coarse + unit_sums(span, product).abs()
    return as_scores(_certain(fine) + _certain(coarse))


def _certain(score: Tensor) -> Tensor:
    relative = score / score.mean().clamp(min=1e-38)
    return relative / (2.0 * relative.var(correction=0).clamp(min=_LEAST_VARIANCE))
