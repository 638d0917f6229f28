"""The kernel in torch: expand the weight, a tile at a time, and multiply. Any device, and every dtype torch knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import two_four, value_codes

# Weights that are expanded at once: 8 MB of bfloat16. Smaller layers are expanded whole.
TILE = 1 << 22


class PackedWeight(NamedTuple):
    """A weight [out, in] in the packed format.

    Args:
        values: [out, in/2], or codes of them.
        meta: [out, in/8] uint8.
        scale: [out, groups], of codes; None: they are no codes.
        dtypes: to which values are rounded (`value_codes.decode`); the last is that of the weight.
        transposed: expanded, its memory is that of [in, out], as a Conv1D has it.
    """

    values: Tensor
    meta: Tensor
    scale: Tensor | None
    dtypes: tuple[torch.dtype, ...]
    transposed: bool = False

    @property
    def out_features(self) -> int:
        return self.meta.shape[0]

    @property
    def in_features(self) -> int:
        return 8 * self.meta.shape[1]

    def rows(self, block: slice) -> PackedWeight:
        """Some rows of the weight."""
        scale = None if self.scale is None else self.scale[block]
        return self._replace(values=self.values[block], meta=self.meta[block], scale=scale)

    def columns(self, first: int, last: int) -> PackedWeight:
        """The inputs from `first` to `last`, multiples of 8 and of the inputs that share a scale."""
        places = self.values.shape[1] * first // self.in_features, self.values.shape[1] * last // self.in_features
        scale = self.scale
        if scale is not None and scale.shape[1] > 1:
            group = self.in_features // scale.shape[1]
            scale = scale[:, first // group : last // group]
        values, meta = self.values[:, slice(*places)], self.meta[:, first // 8 : last // 8]
        return self._replace(values=values, meta=meta, scale=scale)


Expand = Callable[[PackedWeight], Tensor]


def expand(weight: PackedWeight) -> Tensor:
    """[out, in] of the last of its dtypes."""
    values = weight.values
    if weight.scale is not None:
        values = value_codes.decode(values, weight.scale, weight.dtypes)
    dense = two_four.unpack(values, weight.meta)
    return dense.t().contiguous().t() if weight.transposed else dense


def linear(input: Tensor, weight: PackedWeight, bias: Tensor | None, expand: Expand = expand) -> Tensor:
    """input @ weight.T + bias.

    Args:
        input: [..., in].
        bias: [out], or None.
        expand: how a tile is expanded.
    """
    blocks = _tiles(weight.out_features, weight.in_features, 1)
    if len(blocks) <= 1:
        return multiply(input, expand(weight), bias, weight.transposed)
    result = None
    for block in blocks:
        part = None if bias is None else bias[block]
        product = multiply(input, expand(weight.rows(block)), part, weight.transposed)
        if result is None:  # its dtype may be that of autocast
            result = product.new_empty(*product.shape[:-1], weight.out_features)
        result[..., block] = product
    assert result is not None
    return result


def backward(gradient: Tensor, weight: PackedWeight, expand: Expand = expand) -> Tensor:
    """gradient @ weight: of the inputs, by that of the outputs.

    A tile is some inputs and all outputs, so that no sum is put together from rounded parts.

    Args:
        gradient: [..., out].
    """
    groups = 1 if weight.scale is None else weight.scale.shape[1]
    unit = 8 if groups == 1 else math.lcm(8, weight.in_features // groups)
    blocks = _tiles(weight.in_features, weight.out_features, unit)
    if len(blocks) <= 1:
        return gradient @ expand(weight).to(gradient.dtype)
    result = gradient.new_empty(*gradient.shape[:-1], weight.in_features)
    for block in blocks:
        part = weight.columns(block.start, block.stop)
        result[..., block] = gradient @ expand(part).to(gradient.dtype)
    return result


def multiply(input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """As `nn.Linear` does it, or, transposed, as transformers' Conv1D: the same to the last bit."""
    if not transposed or bias is None:
        return F.linear(input, weight, bias)
    rows = torch.addmm(bias, input.reshape(-1, input.shape[-1]), weight.t())
    return rows.view(*input.shape[:-1], weight.shape[0])


def _tiles(length: int, other: int, unit: int) -> list[slice]:
    """Slices along `length`, in a multiple of `unit`, of about TILE weights."""
    # One under torch.compile, which would unroll the loop.
    step = length if torch.compiler.is_compiling() else TILE // max(other, 1) // unit * unit
    step = max(step, unit)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
