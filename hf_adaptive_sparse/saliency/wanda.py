"""Wanda: a weight matters as much as its magnitude times the norm of its input.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, eq. 1.
"""

from __future__ import annotations

from torch import Tensor

from ..stats import LayerStats
from .magnitude import magnitude_score


def wanda_score(weight: Tensor, stats: LayerStats, columns: slice = slice(None)) -> Tensor:
    """S_ij = |W_ij| * ||X_j||_2, with X_j input feature j over all calibration tokens.

    Args:
        weight: [out, k], any float dtype: the columns of the layer that `columns` names.
        stats: of the whole layer; reads `squares` [in].
        columns: which k of the `in` input features `weight` holds (default: all).
    Returns:
        [out, k] in float32 (float64 stays), >= 0. Made to be compared within a row.
    Raises:
        CalibrationError: no tokens were seen, or not all of them were finite.
    """
    stats.require_tokens("wanda_score")
    return magnitude_score(weight) * stats.squares[columns].sqrt()
