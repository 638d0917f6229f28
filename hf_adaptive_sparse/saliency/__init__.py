"""How much one weight matters: `score(weight, stats, columns) -> scores`, larger = keep."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .isc import isc_score
from .magnitude import magnitude_score
from .obs import obs_score
from .ria import ria_score
from .taylor import taylor_score
from .wanda import wanda_score

SALIENCY: dict[str, Callable[..., Tensor]] = {
    "magnitude": magnitude_score,
    "wanda": wanda_score,
    "obs": obs_score,
    "isc": isc_score,
    "ria": ria_score,
    "taylor": taylor_score,
}

# Which statistics of the layer each score reads: attributes of LayerStats.
NEEDS: dict[str, frozenset[str]] = {
    "magnitude": frozenset(),
    "wanda": frozenset({"squares"}),
    "obs": frozenset({"gram"}),
    "isc": frozenset({"gram"}),
    "ria": frozenset({"squares"}),
    "taylor": frozenset({"gradient"}),
}

# Scores that read the whole matrix, so that a row's score is another where other rows are stacked with it.
WHOLE_MATRIX = frozenset({"ria"})

__all__ = [
    "NEEDS",
    "SALIENCY",
    "WHOLE_MATRIX",
    "isc_score",
    "magnitude_score",
    "obs_score",
    "ria_score",
    "taylor_score",
    "wanda_score",
]
