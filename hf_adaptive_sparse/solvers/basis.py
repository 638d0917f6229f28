"""The scaled basis in which solvers work, and the way back: float arithmetic, exact zeros, the caller's dtype.

Inputs are scaled to unit root mean square (see stats.ScaledGram), so a weight there is W * scale, the layer Hessian is
`stats.scaled.matrix`, and its diagonal is constant: Jacobi preconditioning is already done.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..stats import LayerStats

ChooseMask = Callable[[Tensor, slice], Tensor]
"""(weights [out, k] of some columns as they are now, those columns) -> keep [out, k] bool."""


def working_dtype(weight: Tensor) -> torch.dtype:
    """float64 stays float64; anything else is solved in float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def check_layer(weight: Tensor, stats: LayerStats, what: str) -> None:
    """Raise CalibrationError, naming `what`, unless the Gram matrix fits the [out, in] weight."""
    gram = stats.require_gram(what)
    if weight.ndim != 2 or gram.shape != (weight.shape[1], weight.shape[1]):
        raise CalibrationError(
            f"{stats.where}: {what} got a weight of shape {list(weight.shape)} and a Gram matrix of shape "
            f"{list(gram.shape)}. Both must have the same input features: pass the statistics of this layer."
        )


def to_scaled(weight: Tensor, stats: LayerStats) -> Tensor:
    """[out, in] weight, any float dtype -> the same in the scaled basis, in working_dtype."""
    dtype = working_dtype(weight)
    return weight.detach().to(dtype) * stats.scaled.scale.to(dtype)


def from_scaled(scaled: Tensor, stats: LayerStats) -> Tensor:
    """[out, in] in the scaled basis -> unscaled, same dtype."""
    return scaled / stats.scaled.scale.to(scaled.dtype)


def finished(solved: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] solved weight, unscaled -> in `dtype`, +0.0 where it is not kept and never -0.0."""
    return with_positive_zeros(torch.where(keep, solved, 0.0), dtype)


def with_positive_zeros(solved: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor that nobody else holds, in `dtype`, without -0.0."""
    # Adding 0.0 turns -0.0 into +0.0; after the cast, which makes new ones of small negative numbers.
    return solved.to(dtype).add_(0.0)
