"""OBS: a weight matters as much as its removal costs, after the best update of the weights to its right.

Source: Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NeurIPS 1992, as
Frantar and Alistarh use it column by column in "SparseGPT", ICML 2023, eq. 3 and algorithm 1.
"""

from __future__ import annotations

from torch import Tensor

from ..stats import LayerStats
from .magnitude import magnitude_score


def obs_score(weight: Tensor, stats: LayerStats, columns: slice = slice(None)) -> Tensor:
    """S_ij = W_ij^2 / [(H_{j:,j:})^-1]_jj: the rise of the squared error of row i, a mean over tokens.

    H is the damped Gram matrix in the basis of unit diagonal, in which a weight is W * scale: the damping is then the
    same for every input, whatever its unit. It holds only the columns from j on, as in the sweep, which has settled
    those before.

    Args:
        weight: [out, k], any float dtype: the columns of the layer that `columns` names, with all corrections so far.
        stats: of the whole layer; reads `scaled`.
        columns: which k of the `in` input features `weight` holds (default: all).
    Returns:
        [out, k] in float32 (float64 stays), >= 0, comparable within the whole matrix; 0 for an input that was
        always 0.
    Raises:
        CalibrationError: no tokens, no Gram matrix, or one that cannot be factored.
    """
    stats.require_gram("obs_score")
    return (weight.detach() * stats.scaled.removal[columns]).square()


def live_energy(weight: Tensor, stats: LayerStats, columns: slice) -> Tensor:
    """(W_ij * scale_j)^2, and 0 for an input that was always 0: a new [out, k] tensor in float32 or wider."""
    scaled = stats.scaled
    return (magnitude_score(weight) * scaled.scale.masked_fill(scaled.dead, 0.0)[columns]).square()
