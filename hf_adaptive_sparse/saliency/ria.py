"""RIA: a weight matters by its part of its row and of its column, and mildly by its input.

Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024,
eq. 3 and 4 (relative importance and activations), with the exponent 0.5 that the paper found best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..stats import LayerStats
from .magnitude import magnitude_score


def ria_score(weight: Tensor, stats: LayerStats, columns: slice = slice(None)) -> Tensor:
    """S_ij = (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * ||X_j||_2^0.5.

    Both sums are over the weights given: some columns of a layer score otherwise than in the whole layer, and so do
    the rows of several layers stacked.

    Args:
        weight: [out, k], any float dtype: the columns of the layer that `columns` names.
        stats: of the whole layer; reads `squares` [in].
        columns: which k of the `in` input features `weight` holds (default: all).
    Returns:
        [out, k] in float32 (float64 stays), >= 0, comparable within the whole matrix; 0 for a zero weight, also in a
        row or column of zeros.
    Raises:
        CalibrationError: no tokens were seen, or not all of them were finite.
    """
    stats.require_tokens("ria_score")
    magnitude = magnitude_score(weight)
    smallest = torch.finfo(magnitude.dtype).tiny
    of_row = magnitude / magnitude.sum(dim=1, keepdim=True).clamp(min=smallest)
    of_column = magnitude / magnitude.sum(dim=0).clamp(min=smallest)
    return (of_row + of_column) * stats.squares[columns].pow(0.25)
