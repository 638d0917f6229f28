"""What the layers that read removed units must become, so that they return what they returned before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...solvers.basis import check_layer, finished, from_scaled, to_scaled
from ...unit_scores import UnitStats
from ...units import Axis


def repaired_readers(
    axis: Axis, weights: Mapping[str, Tensor], stats: UnitStats, keep: Tensor
) -> dict[str, Tensor]:  # fmt: skip
    """Minimise ||(V - W) X||^2, with the damping of the statistics, over V that is 0 for the units that go.

    The same problem as that of the one-shot engine, but all rows of W lose the same columns, so that one factor solves
    for all of them: in the scaled basis V = W H[:, K] H[K, K]^-1, with K the columns that stay and H the damped Gram
    matrix. Done at each of many small steps, on inputs of the model as it is then.

    Args:
        axis: whose readers (o_proj, down_proj) are solved.
        weights: name of every reading weight -> its values before the units go, any float dtype.
        stats: reads `grams`.
        keep: [units] bool, True = stays.
    Returns:
        name of every reading weight -> values of its shape and dtype, zeros where units go.
    Raises:
        CalibrationError: a Gram matrix is missing or cannot be factored.
    """
    found = {}
    for span in axis.spans:
        if not span.reads:
            continue
        weight = weights[span.tensor].detach().movedim(span.dim, 1)
        layer = stats.gram(axis, span.tensor, "repair")
        check_layer(weight, layer, "repair")
        stays = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        stays[span.index[~keep.to(span.index.device)].flatten().to(weight.device)] = False
        dense = to_scaled(weight, layer)
        matrix = layer.scaled.matrix.to(dense)
        # A principal part of a positive definite matrix is positive definite.
        factor = torch.linalg.cholesky(matrix[stays][:, stays])
        solved = torch.zeros_like(dense)
        solved[:, stays] = torch.cholesky_solve((dense @ matrix[:, stays]).T, factor).T
        whole = finished(from_scaled(solved, layer), stays.expand(weight.shape), weight.dtype)
        found[span.tensor] = whole.movedim(1, span.dim)
    return found
