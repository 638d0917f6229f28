"""How much one unit matters: `score(axis, weights, stats) -> [units] float32`, larger = keep."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .activation import activation_unit_score
from .flap import flap_biases, flap_unit_score
from .fused import fused_unit_score
from .magnitude import l1_unit_score, l2_unit_score
from .perturbation import perturbation_unit_score
from .stats import InputMoments, UnitStats
from .taylor import taylor_unit_score
from .wanda_sp import wanda_sp_unit_score

UNIT_SCORES: dict[str, Callable[..., Tensor]] = {
    "taylor": taylor_unit_score,
    "l1": l1_unit_score,
    "l2": l2_unit_score,
    "wanda_sp": wanda_sp_unit_score,
    "flap": flap_unit_score,
    "activation": activation_unit_score,
    "perturbation": perturbation_unit_score,
    "fused": fused_unit_score,
}

# Which statistics each score reads: attributes of UnitStats.
NEEDS: dict[str, frozenset[str]] = {
    "taylor": frozenset({"gradients"}),
    "l1": frozenset(),
    "l2": frozenset(),
    "wanda_sp": frozenset({"inputs"}),
    "flap": frozenset({"inputs"}),
    "activation": frozenset({"inputs"}),
    "perturbation": frozenset({"losses"}),
    "fused": frozenset({"gradients"}),
}

__all__ = [
    "NEEDS",
    "UNIT_SCORES",
    "InputMoments",
    "UnitStats",
    "activation_unit_score",
    "flap_biases",
    "flap_unit_score",
    "fused_unit_score",
    "l1_unit_score",
    "l2_unit_score",
    "perturbation_unit_score",
    "taylor_unit_score",
    "wanda_sp_unit_score",
]
