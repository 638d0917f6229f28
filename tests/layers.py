"""Random layers with the statistics that calibration would have measured."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_adaptive_sparse.stats import LayerStats


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_inputs(seed: int, features: int = 16, tokens: int = 64, spread: float = 1.0) -> Tensor:
    """[tokens, features] float32: correlated, with channels of different size (10^spread between the extremes)."""
    generator = seeded(seed)
    mix = torch.eye(features) + 0.3 * torch.randn(features, features, generator=generator)
    scale = 10 ** (spread * (torch.rand(features, generator=generator) - 0.5))
    return torch.randn(tokens, features, generator=generator) @ mix * scale


def stats_of(inputs: Tensor, **more: object) -> LayerStats:
    """What calibration measures of [tokens, in] inputs, in float32, with the gradient that `more` may give."""
    x = inputs.double()
    return LayerStats(tokens=len(x), squares=x.square().sum(0).float(), gram=(x.T @ x).float(), **more)


def random_weight(seed: int, rows: int = 6, features: int = 16) -> Tensor:
    """[rows, features] float32 with some exact zeros."""
    generator = seeded(seed + 1)
    weight = torch.randn(rows, features, generator=generator)
    return weight.masked_fill(torch.rand(rows, features, generator=generator) < 0.2, 0.0)
