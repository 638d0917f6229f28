"""First-order Taylor: a unit matters as much as the loss would change, weight by weight, if its weights were zero.

Source: Ma et al., "LLM-Pruner", NeurIPS 2023, eq. 5 without the term of second order; Adapt-Pruner (arXiv 2502.03460),
which sums over the coupled slices.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..units import Axis
from .stats import UnitStats, as_scores, unit_sums


def taylor_unit_score(axis: Axis, weights: Mapping[str, Tensor], stats: UnitStats) -> Tensor:
    """Sum over all coupled slices of |w * g|, with g the gradient of the loss over all calibration tokens.

    Departures from the published code: products are formed in float32, where those of float16 mostly are zero; and the
    slices of a query head are credited to the KV head that it reads, which `axis.spans` names.

    Args:
        weights: name of every parameter of the spans -> its values, any float dtype.
        stats: reads `gradients`.
    Returns:
        [units] float32, >= 0, comparable within the whole model.
    Raises:
        CalibrationError: a gradient is missing or not finite.
    """
    total = weights[axis.spans[0].tensor].new_zeros(axis.count).float()
    for span in axis.spans:
        weight = weights[span.tensor].detach().float()
        gradient = stats.gradient(axis, span.tensor, "taylor").to(weight.device)
        total = total + unit_sums(span, (weight * gradient).abs())
    return as_scores(total)
