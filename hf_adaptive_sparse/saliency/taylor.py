"""Taylor: a weight matters as much as the loss would change, to first order, if it were zero.

Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, eq. 8.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import CalibrationError
from ..stats import LayerStats
from .magnitude import magnitude_score


def taylor_score(weight: Tensor, stats: LayerStats, columns: slice = slice(None)) -> Tensor:
    """S_ij = |W_ij| * (mean over sequences of g_ij^2)^0.5, the square root of the paper's score.

    Args:
        weight: [out, k], any float dtype: the columns of the layer that `columns` names.
        stats: of the whole layer; reads `gradient` [out, in].
        columns: which k of the `in` input features `weight` holds (default: all).
    Returns:
        [out, k] in float32 (float64 stays), >= 0, comparable within the whole model.
    Raises:
        CalibrationError: no tokens, no gradient, or one that is not finite.
    """
    stats.require_tokens("taylor_score")
    if stats.gradient is None:
        raise CalibrationError(f"{stats.where}: taylor_score needs the gradient of the loss, which was not collected.")
    gradient = stats.gradient[:, columns]
    if not gradient.isfinite().all():
        raise CalibrationError(
            f"{stats.where}: the gradient of the loss holds NaN or inf. Load the model in float32 or bfloat16, and "
            "check the dense model's loss on this text."
        )
    return magnitude_score(weight) * gradient
