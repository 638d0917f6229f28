"""Magnitude: a weight matters as much as it is large.

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015.
"""

from __future__ import annotations

from torch import Tensor


def magnitude_score(weight: Tensor, stats: object | None = None, columns: slice = slice(None)) -> Tensor:
    """S_ij = |W_ij|.

    Args:
        weight: [out, k], any float dtype.
        stats: not read; every score takes it, so that scores can be exchanged.
        columns: not read, likewise.
    Returns:
        [out, k] in float32 (float64 stays), >= 0, comparable within the whole matrix.
    """
    magnitude = weight.detach().abs()
    return magnitude if magnitude.element_size() > 4 else magnitude.float()
