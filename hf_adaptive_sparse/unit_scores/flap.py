"""FLAP: a unit matters as much as what it sends on fluctuates; what is constant, a bias can replace.

Source: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, eq. 4 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..units import Axis
from .stats import UnitStats, as_scores, readers


def flap_unit_score(axis: Axis, weights: Mapping[str, Tensor], stats: UnitStats) -> Tensor:
    """Mean over the inputs j of a unit of Var(x_j) * ||W[:, j]||^2, on the weights that read it.

    The raw score: scores of different layers are compared after each axis is standardised, which the allocator
    `global_threshold` does. The published code squares those of attention, which the paper does not; nor is it done
    here.

    Args:
        weights: name of every reading weight -> its values, any float dtype.
        stats: reads `inputs`.
    Returns:
        [units] float32, >= 0, comparable within an axis.
    Raises:
        CalibrationError: no inputs were collected, or not all were finite.
        TargetError: no linear layer reads these units.
    """
    total = weights[axis.spans[0].tensor].new_zeros(axis.count).float()
    for span, weight in readers(axis, weights, "flap"):
        variance = stats.moments(axis, span.tensor, "flap").variance.to(weight.device, weight.dtype)
        total = total + (weight.square().sum(0) * variance)[span.index.to(weight.device)].mean(1)
    return as_scores(total)


def flap_biases(axis: Axis, weights: Mapping[str, Tensor], stats: UnitStats, keep: Tensor) -> dict[str, Tensor]:
    """What a bias must add so that the output of each reading weight keeps its mean when units go.

    W[:, removed] @ mean(x_removed), the paper's baseline bias.

    Args:
        weights: name of every reading weight -> its values before the units go.
        stats: reads `inputs`, measured before the units go.
        keep: [units] bool, True = stays.
    Returns:
        name of every reading weight -> [out] float32.
    Raises:
        CalibrationError, TargetError: as `flap_unit_score`.
    """
    biases: dict[str, Tensor] = {}
    for span, weight in readers(axis, weights, "flap"):
        removed = span.index[~keep.to(span.index.device)].flatten().to(weight.device)
        mean = stats.moments(axis, span.tensor, "flap").mean.to(weight.device, weight.dtype)
        bias = weight[:, removed] @ mean[removed]
        biases[span.tensor] = biases.get(span.tensor, torch.zeros_like(bias)) + bias
    return biases
