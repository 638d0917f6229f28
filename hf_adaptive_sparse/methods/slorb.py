"""SLoRB: a small dense branch beside a sparse matrix, that gives back what a block of inputs lost on average.

Source: AST (arXiv 2407.20584), "AST-Boosted": y = x (keep * W)^T + (x P^T) S^T, with P [in / k, in] and
S [out, in / k].

The branch cannot be merged into an n:m matrix: the sum has a non-zero in every place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import PatternError

SLORB_INITS = ("mean", "sum", "xavier", "zero")


def check_blocks(in_features: int, k: int, where: str) -> None:
    """Blocks of k inputs must fill a row: raise PatternError, naming `where`, if they do not."""
    if in_features % k:
        raise PatternError(
            f"{where}: blocks of slorb_k={k} inputs do not fill {in_features} input features. Take a "
            "slorb_k that divides it, or add the layer to `exclude_modules`."
        )


def block_sum_projection(in_features: int, k: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """P [in / k, in]: row i is 1 on the k inputs of block i, 0 elsewhere."""
    blocks = torch.eye(in_features // k, dtype=dtype, device=device)
    return blocks.repeat_interleave(k, dim=1)


def initial_scale(weight: Tensor, keep: Tensor, k: int, init: str) -> Tensor:
    """S [out, in / k] of the branch, from the masked part of a weight and its mask.

    Args:
        weight: [out, in], any float dtype.
        keep: [out, in] bool.
        k: inputs per block.
        init: "mean" (the row sum of every block is then as before), "sum" (k times that), "xavier" (random)
            or "zero".
    """
    masked = weight.masked_fill(keep, 0.0).reshape(weight.shape[0], -1, k)
    if init == "mean":
        return masked.mean(dim=-1)
    if init == "sum":
        return masked.sum(dim=-1)
    scale = torch.zeros_like(masked[..., 0])
    return nn.init.xavier_uniform_(scale) if init == "xavier" else scale


@dataclass(frozen=True)
class BranchCost:
    """What a branch adds to one matrix, next to the weights and multiplications that the mask keeps."""

    kept_weights: int
    extra_weights: int
    extra_operations: int

    def __add__(self, other: BranchCost) -> BranchCost:
        return BranchCost(
            self.kept_weights + other.kept_weights,
            self.extra_weights + other.extra_weights,
            self.extra_operations + other.extra_operations,
        )

    @property
    def weights_percent(self) -> float:
        return 100.0 * self.extra_weights / self.kept_weights

    @property
    def operations_percent(self) -> float:
        """Extra multiply-adds per token over those of the kept weights. Summing counts as its additions."""
        return 100.0 * self.extra_operations / self.kept_weights


def branch_cost(out_features: int, in_features: int, k: int, density: float, train_projection: bool) -> BranchCost:
    """Cost of a branch on one [out, in] matrix of which the fraction `density` is kept."""
    blocks = in_features // k
    scale, projection = out_features * blocks, blocks * in_features
    return BranchCost(
        kept_weights=round(out_features * in_features * density),
        extra_weights=scale + projection * train_projection,
        extra_operations=scale + (projection if train_projection else in_features),
    )
