"""ISC: the sum of what OBS and OBD say about a weight.

Source: Shao et al., "One-Shot Sensitivity-Aware Mixed Sparsity Pruning for Large Language Models", arXiv 2310.09499,
eq. 4, the improved saliency criterion.
"""

from __future__ import annotations

from torch import Tensor

from ..stats import LayerStats
from .obs import live_energy


def isc_score(weight: Tensor, stats: LayerStats, columns: slice = slice(None)) -> Tensor:
    """S_ij = W_ij^2 * (H_jj + 1 / [(H_{j:,j:})^-1]_jj), with H the damped Gram matrix of unit diagonal.

    Between one and two times the square of Wanda's score, since the second term is at most H_jj. As in `obs_score`,
    the inverse is that of the columns from j on (the paper prints that of all columns, its code and SparseGPT's sweep
    use this one). The authors' code takes the square root of the second term, which then depends on the unit of X;
    here it is as printed. It applies to n:m patterns too, where their code falls back to OBS.

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
    stats.require_gram("isc_score")
    h, m = stats.scaled.matrix.diagonal()[columns], stats.scaled.factor.diagonal()[columns]
    return live_energy(weight, stats, columns) * (h + m.square())
