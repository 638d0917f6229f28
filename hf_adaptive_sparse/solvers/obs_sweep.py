"""The SparseGPT sweep: prune (and round) column after column, each error made up for by the columns after it.

Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
algorithm 1: err = (w_j - q_j) / U_jj, then W[:, j:] -= err * U[j, j:], with U^T U = H^-1. Rounding inside the sweep
with nothing pruned is GPTQ (Frantar et al., ICLR 2023).

Departures: H is scaled to unit diagonal before it is damped (see stats.py); updates are applied by halves instead of by
blocks of 128 columns, which is the same arithmetic in another order; the mask of a block has exactly the count that its
chooser gives it, where the published threshold prunes ties as well and one weight more.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..stats import LayerStats
from .basis import ChooseMask, check_layer, finished, working_dtype

BLOCK = 128
"""Columns decided at a time where the chooser does not say."""

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
    sweep.solve(0, weight.shape[1], decided=False)
    keep = sweep.keep.T.contiguous()
    return finished(sweep.columns.T.contiguous(), keep, weight.dtype), keep


class _Sweep:
    """State of one sweep. Row j of every [in, out] tensor is column j of the weight, so that columns are contiguous."""

    def __init__(
        self, weight: Tensor, stats: LayerStats, choose_mask: ChooseMask, quantizer: Rounding | None, leaf: int
    ) -> None:
        scaled, dtype = stats.scaled, working_dtype(weight)
        scale, upper = scaled.scale.to(dtype), scaled.upper.to(dtype)
        # U_jk / U_jj in the unscaled basis: what one unit of error in column j takes from column k.
        self.taken = upper / upper.diagonal()[:, None] * scale[:, None] / scale
        self.columns = weight.detach().T.to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.columns.masked_fill_(scaled.dead[:, None], 0.0)
        self.errors = torch.empty_like(self.columns)
        self.keep = torch.empty_like(self.columns, dtype=torch.bool)
        self.choose_mask, self.quantizer = choose_mask, quantizer
        self.width, self.leaf = getattr(choose_mask, "width", BLOCK), leaf

    def solve(self, start: int, end: int, decided: bool) -> None:
        """Prune the columns start:end, and leave their errors to be made up for by the columns from `end` on."""
        if not decided and end - start <= self.width:
            now = self.columns[start:end].clone().T  # a copy: nobody else holds what the sweep goes on to change
            keep = self.choose_mask(now, slice(start, end)).T
            self.keep[start:end] = keep
            # 1.0 where an error will be: multiplying by it is faster than torch.where in the loop over columns.
            torch.logical_not(keep, out=self.errors[start:end])
            decided = True
        if decided and end - start <= self.leaf:
            self._solve_columns(start, end)
            return
        unit = self.leaf if decided else self.width
        units = -(-(end - start) // unit)
        middle = start + unit * (units // 2)
        self.solve(start, middle, decided)
        self.columns[middle:end].addmm_(self.taken[start:middle, middle:end].T, self.errors[start:middle], alpha=-1)
        self.solve(middle, end, decided)

    def _solve_columns(self, start: int, end: int) -> None:
        for j in range(start, end):
            column, error = self.columns[j], self.errors[j]
            if self.quantizer is None:
                error.mul_(column)
            else:
                rounded = self.quantizer.round(column[:, None], slice(j, j + 1))[:, 0]
                rounded = torch.where(self.keep[j], rounded.to(column.dtype), 0.0)
                torch.sub(column, rounded, out=error)
                column.copy_(rounded)
            if j + 1 < end:
                self.columns[j + 1 : end].addr_(self.taken[j, j + 1 : end], error, alpha=-1)
