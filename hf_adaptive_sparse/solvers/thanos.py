"""Thanos: block after block, all pruned weights of a row of the block removed at once, exactly.

Source: Ilin and Richtarik, "Thanos: A Block-wise Pruning Algorithm for Efficient Large Language Model Compression",
2025, arXiv 2504.05346: for the set P pruned in a row, W -= w_P (H^-1[P, P])^-1 H^-1[P, :], with H^-1 of the columns
that are not done yet. Other than in the sweep, all kept weights of the block make up for its pruned ones, whatever
their order.

Departures: the mask of a block comes from the caller's chooser, where the paper ranks all columns that are left by
Wanda's score; H is scaled to unit diagonal before it is damped; H^-1 of the columns left is read from one
factorisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..stats import LayerStats
from .basis import ChooseMask, check_layer, finished, from_scaled, to_scaled

# Numbers in the batch of small matrices solved at once: 64 MB of float32.
_BATCH_NUMEL = 2**24


def thanos(weight: Tensor, stats: LayerStats, choose_mask: ChooseMask, *, block: int = 128) -> tuple[Tensor, Tensor]:
    """Prune [out, in] from the first block of inputs to the last.

    Args:
        weight: any float dtype; float64 is solved in float64, anything else in float32. Inputs that were 0 for every
            token get weight 0 at the start.
        stats: reads `scaled`.
        choose_mask: asked once per block, with weights that make up for the blocks before.
        block: columns per block, rounded down to a multiple of `choose_mask.width` where it has one.
    Returns:
        The new weight [out, in] in the dtype of `weight`, and keep [out, in] bool.
    Raises:
        CalibrationError: inputs are so alike that weights of a row cannot be removed at once.
    """
    check_layer(weight, stats, "thanos")
    solved = to_scaled(weight, stats).masked_fill_(stats.scaled.dead, 0.0)
    upper = stats.scaled.upper.to(solved.dtype)
    scale = stats.scaled.scale.to(solved.dtype)
    width, columns = getattr(choose_mask, "width", 1), solved.shape[1]
    block = max(width, block // width * width)
    keep = torch.empty_like(solved, dtype=torch.bool)
    for start in range(0, columns, block):
        here = slice(start, min(start + block, columns))
        keep[:, here] = choose_mask(solved[:, here] / scale[here], here)
        # Rows `here` of the inverse of H over the columns from `start` on.
        inverse = upper[here, here].T @ upper[here, start:]
        multipliers, failed = _multipliers(solved[:, here], ~keep[:, here], inverse[:, : here.stop - start])
        if failed is not None:
            raise CalibrationError(
                f"{stats.where}: thanos cannot remove the weights of inputs {here.start} to {here.stop - 1} of row "
                f"{failed} at once, the inputs are too alike for damping {stats.damping:g}. Raise damping, or "
                f"calibrate on more than {stats.tokens} tokens."
            )
        solved[:, start:].addmm_(multipliers, inverse, alpha=-1)
    return finished(from_scaled(solved, stats), keep, weight.dtype), keep


def _multipliers(weight: Tensor, drop: Tensor, inverse: Tensor) -> tuple[Tensor, int | None]:
    """w_P (H^-1[P, P])^-1 of every row, 0 outside P; and the first row whose H^-1[P, P] cannot be factored.

    Args:
        weight: [out, block].
        drop: [out, block] bool, P.
        inverse: [block, block].
    """
    result = torch.zeros_like(weight)
    counts = drop.sum(dim=1)
    most = int(counts.max()) if len(counts) else 0
    if not most:
        return result, None
    # The pruned positions of each row first, in their order; rows with fewer of them are filled up with the identity.
    positions = (~drop).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    chunk = max(1, _BATCH_NUMEL // most**2)
    for rows in torch.arange(len(weight), device=weight.device).split(chunk):
        at = positions[rows]
        real = torch.arange(most, device=at.device) < counts[rows, None]
        system = inverse[at[:, :, None], at[:, None, :]].mul_(real[:, :, None]).mul_(real[:, None, :])
        system.diagonal(dim1=1, dim2=2).add_(~real)
        right = (weight[rows].gather(1, at) * real)[:, :, None]
        lower, info = torch.linalg.cholesky_ex(system)
        if bool(info.any()):
            return result, int(rows[info.nonzero()[0, 0]])
        solution = torch.cholesky_solve(right, lower)[:, :, 0]
        result[rows] = result[rows].scatter_(1, at, solution)
    return result, None
