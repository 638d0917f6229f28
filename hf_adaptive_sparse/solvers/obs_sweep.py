"""The SparseGPT sweep: prune (and round) column after column, each error made up for by the columns after it.

Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
algorithm 1: err = (w_j - q_j) / U_jj, then W[:, j:] -= err * U[j, j:], with U^T U = H^-1. Rounding inside the sweep
with nothing pruned is GPTQ (Frantar et al., ICLR 2023).

Departures: H is scaled to unit diagonal before it is damped (see stats.py). Only inside a tile of 256 columns are
errors made up for one by one; what all columns before it ask of a tile comes from the Cholesky factor of H itself. With
M = U^-1, H = M M^T, and D = W - Q the changes of the columns 0:s so far, the columns s:e become
W + D M[0:s, s:e] M[s:e, s:e]^-1: the same arithmetic, and only tiles on the diagonal are inverted. The mask of a block
has exactly the count that its chooser gives it, where the published threshold prunes ties as well and one weight more.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..stats import LayerStats, upper_inverse
from .basis import ChooseMask, check_layer, with_positive_zeros, working_dtype

BLOCK = 128
"""Columns decided at a time where the chooser does not say."""

TILE = 256
"""Columns in which errors are made up for one by one, or the block of the chooser if that is wider."""

_LEAF = 8  # Columns solved one by one; measured best of 4 to 32 on a CPU, for 2048 and 8192 rows.


class Rounding(Protocol):
    """What rounds kept weights inside the sweep, for instance a quantizers.Grid."""

    def round(self, values: Tensor, columns: slice) -> Tensor:
        """[out, k] unscaled weights of `columns` -> what they become when stored, [out, k]."""


def obs_sweep(
    weight: Tensor,
    stats: LayerStats,
    choose_mask: ChooseMask,
    *,
    quantizer: Rounding | None = None,
    leaf: int = _LEAF,
) -> tuple[Tensor, Tensor]:
    """Prune [out, in] from the first input to the last.

    Args:
        weight: any float dtype; float64 is solved in float64, anything else in float32. Inputs that were 0 for every
            token get weight 0 before the sweep.
        stats: reads `scaled`.
        choose_mask: asked for every `choose_mask.width` columns in turn (default BLOCK), with weights that make up for
            everything pruned before.
        quantizer: rounds what is kept, column by column.
        leaf: columns solved one by one; of no effect but on time.
    Returns:
        The new weight [out, in] in the dtype of `weight`, and keep [out, in] bool.
    """
    check_layer(weight, stats, "obs_sweep")
    sweep = _Sweep(weight, stats, choose_mask, quantizer, leaf)
    return sweep.run(weight.dtype)


def sweep_with_errors(weight: Tensor, stats: LayerStats, choose_mask: ChooseMask) -> tuple[Tensor, Tensor, Tensor]:
    """obs_sweep, and what it did to the outputs of every row.

    D H D^T is the sum of what the removals cost one by one: (w_j scale_j M_jj)^2, with w_j as it was removed. So no
    product with H is needed; what damping adds is subtracted.

    Returns:
        The new weight, keep, and [out] squared differences of the outputs, summed over all tokens: of the solved
        weights before they are rounded to the dtype of `weight`.
    """
    check_layer(weight, stats, "obs_sweep")
    sweep = _Sweep(weight, stats, choose_mask, None, _LEAF)
    return *sweep.run(weight.dtype), sweep.output_errors()


class _Sweep:
    """State of one sweep. Row j of every [in, out] tensor is column j of the weight, so that columns are contiguous."""

    def __init__(
        self, weight: Tensor, stats: LayerStats, choose_mask: ChooseMask, quantizer: Rounding | None, leaf: int
    ) -> None:
        self.stats, scaled, dtype = stats, stats.scaled, working_dtype(weight)
        self.scale, self.factor = scaled.scale.to(dtype), scaled.factor.to(dtype)
        self.columns = weight.detach().T.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if bool(scaled.dead.any()):
            self.columns.masked_fill_(scaled.dead[:, None], 0.0)
        self.changes = torch.empty_like(self.columns)  # D, in the scaled basis
        self.keep = torch.empty_like(self.columns, dtype=torch.bool)
        self.errors_of_rows = torch.zeros(len(weight), dtype=dtype, device=weight.device)  # what removals cost
        self.choose_mask, self.quantizer = choose_mask, quantizer
        self.width, self.leaf = getattr(choose_mask, "width", BLOCK), leaf

    def run(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Prune all columns; the weight in `dtype`, and keep."""
        step = max(1, TILE // self.width) * self.width
        solved = torch.empty_like(self.columns.T, memory_format=torch.contiguous_format)
        keep = torch.empty_like(solved, dtype=torch.bool)
        for start in range(0, len(self.columns), step):
            own = slice(start, min(start + step, len(self.columns)))
            self._prune_tile(own)
            # Tile by tile, while it is in the cache.
            solved[:, own] = self.columns[own].T
            keep[:, own] = self.keep[own].T
        return with_positive_zeros(solved, dtype), keep

    def output_errors(self) -> Tensor:
        """[out], after `run` without a quantizer."""
        return self.errors_of_rows.clamp(min=0.0) * self.stats.tokens

    def _prune_tile(self, own: slice) -> None:
        tile, scale = self.columns[own], self.scale[own, None]
        before = tile * scale
        inverse = upper_inverse(self.factor[own, own])
        if own.start:
            asked = self.factor[: own.start, own].T.contiguous() @ self.changes[: own.start]
            tile.addcdiv_(inverse.T @ asked, scale)
        # U_jk / U_jj in the unscaled basis: what one unit of error in column j takes from column k of the tile.
        self.taken = inverse / inverse.diagonal()[:, None] * scale / scale.T
        self.errors = torch.empty_like(tile)
        self._prune(own.start, own.start, own.stop, decided=False)
        if self.quantizer is None:
            # An error is what was removed, and pruned columns hold it still.
            tile -= self.errors
        changes = torch.sub(before, tile * scale, out=self.changes[own])
        if self.quantizer is None:
            scaled = self.stats.scaled
            damping = (scaled.matrix.diagonal()[own] - 1.0).to(changes.dtype)
            self.errors_of_rows += self.errors.mul_(scaled.removal[own, None]).square_().sum(dim=0)
            self.errors_of_rows -= damping @ changes.square()

    def _prune(self, tile: int, start: int, end: int, decided: bool) -> None:
        """Prune the columns start:end of the tile that begins at `tile`, which make up for all before them already."""
        if not decided and end - start <= self.width:
            now = self.columns[start:end].clone().T  # a copy: nobody else holds what the sweep goes on to change
            keep = self.choose_mask(now, slice(start, end)).T
            self.keep[start:end] = keep
            # 1.0 where an error will be: multiplying by it is faster than torch.where in the loop over columns.
            torch.logical_not(keep, out=self.errors[start - tile : end - tile])
            decided = True
        if decided and end - start <= self.leaf:
            self._prune_columns(tile, start, end)
            return
        unit = self.leaf if decided else self.width
        units = -(-(end - start) // unit)
        middle = start + unit * (units // 2)
        self._prune(tile, start, middle, decided)
        own, other = slice(start - tile, middle - tile), slice(middle - tile, end - tile)
        self.columns[middle:end].addmm_(self.taken[own, other].T, self.errors[own], alpha=-1)
        self._prune(tile, middle, end, decided)

    def _prune_columns(self, tile: int, start: int, end: int) -> None:
        own = slice(start - tile, end - tile)
        columns, errors, taken = self.columns[start:end], self.errors[own], self.taken[own, own]
        for j, (column, error) in enumerate(zip(columns.unbind(), errors.unbind(), strict=True)):
            if self.quantizer is None:
                error.mul_(column)
            else:
                rounded = self.quantizer.round(column[:, None], slice(start + j, start + j + 1))[:, 0]
                rounded = torch.where(self.keep[start + j], rounded.to(column.dtype), 0.0)
                torch.sub(column, rounded, out=error)
                column.copy_(rounded)
            if start + j + 1 < end:
                columns[j + 1 :].addr_(taken[j, j + 1 :], error, alpha=-1)
