"""GPTQ: round column after column, each error made up for by the columns after it.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023,
algorithm 1. It is the OBS sweep with a mask that is known before. To choose the mask in the same sweep (SparseGPT's
joint pruning and quantisation), pass the grid to `obs_sweep` itself.

Departures: no reordering of columns, and grids are symmetric (see rtn.py).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..solvers import obs_sweep
from ..stats import LayerStats
from .rtn import Grid


def gptq(
    weight: Tensor,
    stats: LayerStats,
    keep: Tensor,
    grid: Grid,
    sweep: Callable[..., tuple[Tensor, Tensor]] = obs_sweep,
) -> Tensor:
    """Kept weights rounded in a sweep over the columns, pruned ones 0.

    Args:
        weight: [out, in], any float dtype; usually 0 already where keep is False.
        stats: reads `scaled`.
        keep: [out, in] bool; all True for plain GPTQ.
        grid: fitted to `weight`.
        sweep: a solver with an option `quantizer`.
    Returns:
        [out, in] in the dtype of `grid.scales`: values of the grid, +0.0 where keep is False.
    """
    rounded, _ = sweep(weight.to(grid.scales.dtype), stats, lambda _, columns: keep[:, columns], quantizer=grid)
    return rounded
