"""Sums over calibration tokens, gathered batch by batch into LayerStats."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor

from ..errors import ConfigError
from ..products import float32_products
from ..stats import DAMPING, LayerStats

STATISTICS = ("squares", "gram", "cross")

# Tokens whose float32 copy is made at a time.
_TOKENS = 8192
# Columns of a Gram matrix computed together: the tiles above its diagonal are not, being copies of those below.
_TILE = 256


def check_needs(needs: Collection[str]) -> frozenset[str]:
    """`needs` as a set; ConfigError where it names no statistic of the inputs."""
    for need in needs:
        if need not in STATISTICS:
            raise ConfigError(f"unknown statistic {need!r}; the walk collects {', '.join(STATISTICS)}.")
    return frozenset(needs)


class StatsSum:
    """Raw float32 sums over the inputs of a layer; nothing is scaled before it is added.

    Departure from the published implementations, which rescale every batch by sqrt(2 / tokens): unscaled, values of
    16 bits are exact in TF32, those of bfloat16 in products of that type, so only the sum rounds.

    Args:
        features: of the input.
        needs: which of STATISTICS; `squares` are always there.
        device: where the sums are held and computed.
    """

    def __init__(self, features: int, needs: Collection[str], device: torch.device) -> None:
        self.tokens = 0
        zeros = partial(torch.zeros, dtype=torch.float32, device=device)  # whatever the default dtype is
        self._squares = zeros(features)
        self._gram = zeros(features, features) if "gram" in needs else None
        self._cross = zeros(features, features) if "cross" in needs else None

    @torch.no_grad()
    def add(self, inputs: Tensor, dense: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            inputs: [..., in] any float dtype.
            dense: of the same shape, what the dense model has in their place; None: the same.
        """
        inputs = inputs.reshape(-1, inputs.shape[-1])
        dense = inputs if dense is None else dense.reshape(-1, dense.shape[-1])
        self.tokens += len(inputs)
        with float32_products(inputs.dtype):
            for x, x_dense in zip(inputs.split(_TOKENS), dense.split(_TOKENS), strict=True):
                x = x.float()
                if self._gram is None:
                    self._squares += x.square().sum(0)
                else:
                    _add_gram(self._gram, x)
                if self._cross is not None:
                    self._cross.addmm_(x_dense.float().t(), x)

    def stats(self, where: str, damping: float = DAMPING) -> LayerStats:
        """The sums so far. They are handed over, not copied: add nothing afterwards."""
        squares = self._squares
        if self._gram is not None:
            _mirror(self._gram)
            squares = self._gram.diagonal().clone()
        return LayerStats(
            tokens=self.tokens, squares=squares, gram=self._gram, cross=self._cross, damping=damping, where=where
        )


def _add_gram(gram: Tensor, x: Tensor) -> None:
    """Add x^T x to the tiles on and below the diagonal."""
    for start in range(0, len(gram), _TILE):
        columns = slice(start, start + _TILE)
        gram[start:, columns].addmm_(x[:, start:].t(), x[:, columns])


def _mirror(gram: Tensor) -> None:
    for start in range(0, len(gram), _TILE):
        end = start + _TILE
        gram[start:end, end:] = gram[end:, start:end].t()
