"""How much one weight matters: `score(weight, stats, columns) -> scores`, larger = keep."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .magnitude import magnitude_score

SALIENCY: dict[str, Callable[..., Tensor]] = {
    "magnitude": magnitude_score,
}

__all__ = ["SALIENCY", "magnitude_score"]
