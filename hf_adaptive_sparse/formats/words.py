"""The arithmetic of the 2:4 format on words: a group of four 16-bit weights is one integer of 64 bits.

Several times as fast on a CPU as indices and comparisons of single weights, and the same to the last bit. Lane p of a
word is bits 16 p to 16 p + 15: input p of the group, on a machine whose numbers begin with their lowest byte.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_SIGNLESS = 0x7FFF_7FFF_7FFF_7FFF
_SIGNS = ~_SIGNLESS
_LOW = 0xFFFF
# Times this, bits 0, 16, 32 and 48 come to stand at 48, 49, 50 and 51; with ones, their number stands there.
_GATHER = 1 << 48 | 1 << 33 | 1 << 18 | 1 << 3
_COUNT = 1 << 48 | 1 << 32 | 1 << 16 | 1
_TOO_MANY = 1 << 40  # above every other entry, since the largest of many numbers is found fastest
# What is added to a number without its sign to reach the sign if it is inf or NaN.
_TO_SIGN = {torch.bfloat16: 0x80, torch.float16: 0x400}


def entry_table(nibbles: Sequence[int]) -> Tensor:
    """[16] for `entries_of`: what is to be known of a group, by the bits "position p is not zero".

    Args:
        nibbles: the nibble of the group in meta; 0 for more than two non-zeros.
    """
    entries = [16 * (nibble & 3) | 16 * (nibble >> 2) << 8 | nibble << 16 or _TOO_MANY for nibble in nibbles]
    return torch.tensor(entries, device="cpu")


def can_hold(tensor: Tensor) -> bool:
    """Whether these functions may be used on weights or values like `tensor`."""
    # Not under torch.compile, which makes its own loops.
    is_here = tensor.device.type == "cpu" and sys.byteorder == "little" and not torch.compiler.is_compiling()
    return is_here and tensor.dtype in _TO_SIGN and tensor.numel() > 0


def groups_of(weight: Tensor) -> Tensor:
    """[rows, in/4] int64 of [rows, in]."""
    weight = weight.contiguous()
    return (weight if weight.storage_offset() % 4 == 0 else weight.clone()).view(torch.int64)


def signs_of(groups: Tensor) -> Tensor:
    """The sign bit of every lane that is not zero, whatever its sign."""
    return (groups & _SIGNLESS).add_(_SIGNLESS).bitwise_and_(_SIGNS)


def entries_of(signs: Tensor, table: Tensor) -> Tensor | None:
    """[rows, in/4] int64, the entry of every group: the first shift, the second shift << 8, the nibble << 16.

    A shift is by how many bits a kept weight stands above the lowest lane. None: a group has too many non-zeros.
    """
    bits = (signs >> 15).mul_(_GATHER).bitwise_right_shift_(48).bitwise_and_(15)
    entries = table.index_select(0, bits.flatten()).view(signs.shape)
    return None if entries.amax() == _TOO_MANY else entries


def meta_of(entries: Tensor) -> Tensor:
    """[rows, in/8] uint8."""
    nibbles = (entries >> 16).to(torch.uint8).view(torch.int16)
    return (nibbles >> 4).bitwise_or_(nibbles).to(torch.uint8)


def most_nonzero(groups: Tensor) -> int:
    """How many of its four weights are not zero, in the group that has most of them."""
    if not groups.numel():
        return 0
    ones = (signs_of(groups) >> 15).bitwise_and_(0x0001_0001_0001_0001)
    return int(ones.mul_(_COUNT).amax()) >> 48


def kept_of(groups: Tensor, signs: Tensor, entries: Tensor, *, out: Tensor) -> None:
    """Write what every group keeps to [rows, in/2]; zeros become +0.0."""
    # A lane of ones where the weight is not zero: its highest bit, and that minus its lowest.
    lowest = (signs >> 15).bitwise_and_(0x0001_0001_0001_0001)
    groups = torch.sub(signs, lowest, out=lowest).bitwise_or_(signs).bitwise_and_(groups)
    second = (groups >> (entries >> 8).bitwise_and_(63)).bitwise_and_(_LOW).bitwise_left_shift_(16)
    first = groups.bitwise_right_shift_(entries & 63).bitwise_and_(_LOW)
    out.view(torch.int32).copy_(second.bitwise_or_(first))


def are_finite(values: Tensor) -> bool:
    """Whether none of the kept values [rows, in/2] is inf or NaN."""
    pairs, step = values.view(torch.int32), _TO_SIGN[values.dtype] * 0x0001_0001
    low, high = (pairs & 0x7FFF_7FFF).add_(step).bitwise_and_(-0x7FFF_8000).aminmax()
    return not (low or high)


def expand(values: Tensor, meta: Tensor, *, out: Tensor) -> None:
    """Write [rows, in] of the kept values [rows, in/2]."""
    pairs = (values if values.storage_offset() % 2 == 0 else values.clone()).view(torch.int32).long()
    octets = meta.long()
    nibbles = torch.empty(*meta.shape, 2, dtype=torch.int64, device=meta.device)
    torch.bitwise_and(octets, 15, out=nibbles[..., 0])
    torch.bitwise_right_shift(octets, 4, out=nibbles[..., 1])
    nibbles = nibbles.flatten(1)
    first = (pairs & _LOW).bitwise_left_shift_((nibbles & 3).bitwise_left_shift_(4))
    # Its lane is the second or a later one: from where it stands in a pair, it moves by one lane less.
    second = pairs.bitwise_and_(_LOW << 16).bitwise_left_shift_((nibbles.bitwise_and_(12) << 2).sub_(16))
    torch.bitwise_or(first, second, out=out.view(torch.int64))
