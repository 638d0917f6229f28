"""What a kept value is rounded to: `RTN(bits, group).fit(weight) -> Grid`, and how: one by one, or in a sweep.

QUANTIZERS: `quantize(weight, stats, keep, grid) -> weight`, every value on the grid, zeros where they were.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .gptq import gptq
from .rtn import RTN, Grid, round_to_nearest

QUANTIZERS: dict[str, Callable[..., Tensor]] = {
    "rtn": round_to_nearest,
    "gptq": gptq,
}

__all__ = ["QUANTIZERS", "RTN", "Grid", "gptq", "round_to_nearest"]
