"""Masks without weights: which entries of a matrix are kept, in as few bits as have a fixed place.

    "two_of_four"  [rows, ceil(columns/12)] uint8: byte b of a row is d0 + 6 d1 + 36 d2, the patterns of groups 3b,
                   3b+1 and 3b+2 of four consecutive columns; groups behind the last are 0. 0.667 bits per entry,
                   where the six patterns carry log2(6)/4 = 0.646.
    "bits"         [rows, ceil(columns/8)] uint8: bit b of byte i of a row is 1 if column 8i + b is kept. 1 bit per
                   entry. Bits behind the last column are 0.

    pattern    0    1    2    3    4    5
    positions  0,1  0,2  1,2  0,3  1,3  2,3

"two_of_four" says that two of every four are kept. Where fewer are, the pattern is the one that `two_four.py` gives
such a group, and `cleared` names the entries that it has too many. Equal masks give equal bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import FormatError
from .two_four import dtype_name, row_blocks

ENCODINGS = ("two_of_four", "bits")

_PAIRS = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
# Pattern by the bits "position p is kept", 255 for more than two. Of short groups: 0 -> 0,2; 1 -> 1,2; others -> 2,3.
_PATTERN = torch.tensor([5, 1, 2, 0, 5, 1, 2, 255, 5, 3, 4, 255, 5, 255, 255, 255], dtype=torch.uint8)
_KEPT_BITS = torch.tensor([sum(1 << position for position in pair) for pair in _PAIRS], dtype=torch.uint8)
# [256, 12]: what a byte keeps of its twelve columns; a byte that stands for nothing (216 and more) keeps none.
_TWELVE = torch.tensor(
    [
        [byte < 216 and position in _PAIRS[byte // 6**group % 6] for group in range(3) for position in range(4)]
        for byte in range(256)
    ]
)
_DAMAGED = "The file is damaged; fetch it again."


class EncodedMask(NamedTuple):
    """A mask as it is stored."""

    encoding: str
    bits: Tensor
    """uint8, [rows, bytes of a row]"""
    cleared: Tensor | None
    """[n] int64, increasing: places (row * columns + column) that `bits` keeps and the mask does not; None: none."""


def encode(keep: Tensor) -> EncodedMask:
    """The shorter of the two encodings of a mask.

    Args:
        keep: [rows, columns] bool, True = kept.
    """
    rows, columns = keep.shape
    shorter = _encode_two_of_four(keep) if columns % 4 == 0 else None
    if shorter is not None:
        extra = 0 if shorter.cleared is None else shorter.cleared.nbytes
        if shorter.bits.nbytes + extra < rows * -(-columns // 8):
            return shorter
    bits = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8)
    for block in row_blocks(rows, columns):
        padded = torch.nn.functional.pad(keep[block].to(torch.uint8), (0, -columns % 8)).unflatten(1, (-1, 8))
        bits[block] = (padded << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return EncodedMask("bits", bits, None)


def decode(mask: EncodedMask, shape: tuple[int, int], where: str = "mask") -> Tensor:
    """The mask [rows, columns], bool.

    Args:
        shape: (rows, columns).
        where: name of the matrix, for the messages.
    Raises:
        FormatError: the tensors are no mask of this shape; naming row and byte and what was found.
    """
    rows, columns = shape
    check_shape(mask.encoding, tuple(mask.bits.shape), mask.bits.dtype, shape, where)
    keep = torch.empty(rows, columns, dtype=torch.bool)
    for block in row_blocks(rows, columns):
        part = mask.bits[block]
        if mask.encoding == "two_of_four":
            _check_bytes(part, columns, block.start, where)
            keep[block] = _TWELVE[part.int()].flatten(1)[:, :columns]
        else:
            bits = (part.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).flatten(1)
            if bits[:, columns:].any():
                row = int(bits[:, columns:].any(1).int().argmax())
                raise FormatError(f"{where}: row {block.start + row} has bits behind column {columns - 1}. {_DAMAGED}")
            keep[block] = bits[:, :columns].bool()
    if mask.cleared is not None:
        _clear(keep, mask.cleared, where)
    return keep


def check_shape(
    encoding: str, bits_shape: tuple[int, ...], dtype: torch.dtype, shape: tuple[int, int], where: str
) -> None:
    """The part of the checks of `decode` that needs no data.

    Raises:
        FormatError: an unknown encoding, or a wrong shape or dtype.
    """
    rows, columns = shape
    if encoding not in ENCODINGS or (encoding == "two_of_four" and columns % 4):
        raise FormatError(
            f"{where}: has the encoding {encoding!r} for {columns} columns; this hf_adaptive_sparse reads "
            f"{' (of a multiple of 4 columns) and '.join(ENCODINGS)}. Update hf_adaptive_sparse; if that does not "
            f"help, the file is damaged."
        )
    expected = [rows, -(-columns // (12 if encoding == "two_of_four" else 8))]
    if dtype != torch.uint8 or list(bits_shape) != expected:
        raise FormatError(
            f"{where}: must be uint8 {expected} for a mask of {list(shape)}, found {dtype_name(dtype)} "
            f"{list(bits_shape)}. {_DAMAGED}"
        )


def _encode_two_of_four(keep: Tensor) -> EncodedMask | None:
    """None if a group keeps more than two."""
    rows, columns = keep.shape
    bits = torch.zeros(rows, -(-columns // 12), dtype=torch.uint8)
    place, cleared = torch.arange(4, dtype=torch.uint8), []
    for block in row_blocks(rows, columns):
        kept = (keep[block].to(torch.uint8).unflatten(1, (-1, 4)) << place).sum(-1, dtype=torch.uint8)
        pattern = _PATTERN[kept.int()]
        if (pattern == 255).any():
            return None
        too_many = (_KEPT_BITS[pattern.int()] & ~kept).unsqueeze(-1) >> place & 1
        if too_many.any():
            cleared.append(too_many.flatten().nonzero().flatten() + block.start * columns)
        digits = torch.nn.functional.pad(pattern, (0, -(columns // 4) % 3)).unflatten(1, (-1, 3))
        bits[block] = (digits * torch.tensor([1, 6, 36], dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return EncodedMask("two_of_four", bits, torch.cat(cleared) if cleared else None)


def _check_bytes(part: Tensor, columns: int, first_row: int, where: str) -> None:
    bad = part >= 216
    used = columns // 4 % 3  # groups of the last byte of a row, 0: all three
    if used:
        bad[:, -1] |= part[:, -1] >= 6**used
    if bad.any():
        row, byte = bad.nonzero()[0].tolist()
        raise FormatError(
            f"{where}: byte {byte} of row {first_row + row} is {int(part[row, byte])}, which stands for no pattern. "
            f"{_DAMAGED}"
        )


def _clear(keep: Tensor, cleared: Tensor, where: str) -> None:
    increasing = cleared.dtype == torch.int64 and cleared.ndim == 1 and bool((cleared[1:] > cleared[:-1]).all())
    inside = increasing and len(cleared) and int(cleared[0]) >= 0 and int(cleared[-1]) < keep.numel()
    if not inside or not keep.view(-1)[cleared].all():
        raise FormatError(
            f"{where}: `cleared` must be increasing places of a {list(keep.shape)} mask that its bits keep, found "
            f"{dtype_name(cleared.dtype)} {list(cleared.shape)} of something else. {_DAMAGED}"
        )
    keep.view(-1)[cleared] = False
