"""What the kept weights become: `solve(weight, stats, choose_mask) -> (weight, keep)`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .admm import admm
from .basis import ChooseMask
from .fista import fista
from .obs_sweep import obs_sweep, sweep_with_errors
from .pcg import pcg_refine
from .thanos import thanos
from .zero_fill import zero_fill

SOLVERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "zero_fill": zero_fill,
    "obs_sweep": obs_sweep,
    "admm": admm,
    "fista": fista,
    "thanos": thanos,
}

__all__ = [
    "SOLVERS",
    "ChooseMask",
    "admm",
    "fista",
    "obs_sweep",
    "pcg_refine",
    "sweep_with_errors",
    "thanos",
    "zero_fill",
]
