"""Mask only: pruned weights become zero, kept weights stay as they are. What Wanda and magnitude pruning do."""

from __future__ import annotations

from torch import Tensor

from .basis import ChooseMask, finished


def zero_fill(weight: Tensor, stats: object | None, choose_mask: ChooseMask) -> tuple[Tensor, Tensor]:
    """Ask for the whole mask once and apply it.

    Args:
        weight: [out, in], any float dtype.
        stats: not read; every solver takes it, so that solvers can be exchanged.
        choose_mask: asked once, for all columns.
    Returns:
        The masked weight [out, in] in the dtype of `weight`, and keep [out, in] bool.
    """
    weight = weight.detach()
    keep = choose_mask(weight, slice(0, weight.shape[1]))
    return finished(weight, keep, weight.dtype), keep
