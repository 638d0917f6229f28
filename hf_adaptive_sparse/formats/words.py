"""The arithmetic of the 2:4 format on words: a group of four 16-bit weights is one integer of 64 bits.

Several times as fast on a CPU as indices and comparisons of single weights, and the same to the last bit. Lane p of a
word is bits 16 p to 16 p + 15: input p of the group, on a machine whose numbers begin with their lowest byte.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

_SIGNLESS = 0x7FFF_7FFF_7FFF_7FFF
_SIGNS = ~_SIGNLESS
_LOW = 0xFFFF
# Times this, bits 0, 16, 32 and 48 come to stand at 48, 49, 50 and 51; with ones, their number stands there.
_GATHER = 1 << 48 | 1 << 33 | 1 << 18 | 1 << 3
_COUNT = 1 << 48 | 1 << 32 | 1 << 16 | 1
# What is added to a number without its sign to reach the sign if it is inf or NaN.
_TO_SIGN = {torch.bfloat16: 0x80, torch.float16: 0x400}


def _shifts(slot: int) -> Tensor:
    """[256, 2] by how many bits a lane is moved to the position in a slot, for both groups of a byte of meta."""
    return torch.tensor(
        [[16 * (byte >> 4 * half + 2 * slot & 3) for half in (0, 1)] for byte in range(256)], device="cpu"
    )


_FIRST, _SECOND = _shifts(0), _shifts(1)


def can_hold(tensor: Tensor) -> bool:
    """Whether these functions may be used on weights or values like `tensor`."""
    # Not under torch.compile, which makes its own loops.
    is_here = tensor.device.type == "cpu" and sys.byteorder == "little" and not torch.compiler.is_compiling()
    return is_here and tensor.dtype in _TO_SIGN and tensor.numel() > 0


def groups_of(weight: Tensor) -> Tensor:
    """[rows, in/4] int64 of [rows, in]."""
    weight = weight.contiguous()
    return (weight if weight.storage_offset() % 4 == 0 else weight.clone()).view(torch.int64)


def nonzero_octets(groups: Tensor) -> Tensor:
    """[rows, in/8] uint8: bit p of a byte is set if input p of eight is not zero."""
    nibbles = (_nonzero(groups) >> 15).mul_(_GATHER).bitwise_right_shift_(48).bitwise_and_(15)
    low, high = nibbles.unflatten(1, (-1, 2)).unbind(-1)
    return ((high << 4) | low).to(torch.uint8)


def most_nonzero(groups: Tensor) -> int:
    """How many of its four weights are not zero, in the group that has most of them."""
    if not groups.numel():
        return 0
    return int((_nonzero(groups) >> 15).bitwise_and_(0x0001_0001_0001_0001).mul_(_COUNT).bitwise_right_shift_(48).max())


def are_finite(groups: Tensor, dtype: torch.dtype) -> bool:
    """Whether no weight is inf or NaN."""
    step = _TO_SIGN[dtype] * 0x0001_0001_0001_0001
    return not bool(((groups & _SIGNLESS).add_(step).bitwise_and_(_SIGNS)).any())


def kept_of(groups: Tensor, meta: Tensor, *, out: Tensor) -> None:
    """Write what every group keeps, by its positions, to [rows, in/2]; zeros become +0.0."""
    signs = _nonzero(groups)
    # A lane of ones where the weight is not zero: its highest bit, and that minus its lowest.
    groups = groups & (signs | (signs - (signs >> 15 & 0x0001_0001_0001_0001)))
    first = (groups >> _lookup(_FIRST, meta)).bitwise_and_(_LOW)
    second = (groups >> _lookup(_SECOND, meta)).bitwise_and_(_LOW)
    out.view(torch.int32).copy_(second.bitwise_left_shift_(16).bitwise_or_(first))


def expand(values: Tensor, meta: Tensor, *, out: Tensor) -> None:
    """Write [rows, in] of the kept values [rows, in/2]."""
    pairs = (values if values.storage_offset() % 2 == 0 else values.clone()).view(torch.int32).long()
    first = (pairs & _LOW).bitwise_left_shift_(_lookup(_FIRST, meta))
    second = (pairs >> 16).bitwise_and_(_LOW).bitwise_left_shift_(_lookup(_SECOND, meta))
    torch.bitwise_or(first, second, out=out.view(torch.int64))


def _nonzero(groups: Tensor) -> Tensor:
    """The sign bit of every lane that is not zero, whatever its sign."""
    return (groups & _SIGNLESS).add_(_SIGNLESS).bitwise_and_(_SIGNS)


def _lookup(table: Tensor, meta: Tensor) -> Tensor:
    return table.index_select(0, meta.int().flatten()).view(meta.shape[0], -1)
