"""Sparse weights as compressed-tensors stored them until version 0.14: the kept values, and one bit per weight.

    compressed   [out, in/2] ("sparse-24-bitmask"), or [kept] ("sparse-bitmask"): the kept values, row by row
    bitmask      [out, ceil(in/8)] uint8; bit b of byte i of a row is 1 if input 8i + b is kept
    shape        int64: out, in
    row_offsets  [out] int64, of "sparse-bitmask" alone: how many values stand before each row

Version 0.8 stored every tensor so, also those of one dimension, which are one row here: [ceil(n/8)], n, [].

Only read here. Our own formats are `two_four.py` and `mask_bits.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import FormatError
from .two_four import dtype_name, row_blocks

# Values are moved as integers of their size, so that a bit pattern is never changed by a conversion.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DAMAGED = "The file is damaged; fetch it again."


def unpack(
    values: Tensor,
    bitmask: Tensor,
    shape: tuple[int, ...],
    row_offsets: Tensor | None = None,
    where: str = "weight",
) -> Tensor:
    """The tensor of this shape, of the dtype of `values`, +0.0 wherever the bitmask has no bit.

    Args:
        values: [out, in/2], or [kept], any dtype.
        bitmask: [out, ceil(in/8)] uint8.
        shape: (out, in), by `read_shape`.
        row_offsets: [out] int64, or None.
        where: name of the layer, for the messages.
    Raises:
        FormatError: the tensors do not fit each other; naming the tensor, what was found, and row and group.
    """
    validate_shapes(tuple(values.shape), tuple(bitmask.shape), bitmask.dtype, shape, where)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    bitmask, integers = bitmask.reshape(rows, -1), _INTEGERS[values.dtype.itemsize]
    flat, weight = values.reshape(-1).view(integers), torch.zeros(rows, columns, dtype=integers)
    taken = 0
    for block in row_blocks(rows, columns):
        keep = _kept(bitmask[block], columns, block.start, where)
        if values.ndim > 1:
            _check_two_of_four(keep, block.start, where)
        counts = keep.sum(1)
        if row_offsets is not None:
            _check_offsets(row_offsets, counts, taken, block, where)
        count = int(counts.sum())
        if taken + count > flat.numel():
            raise FormatError(
                f"{where}.bitmask: has more bits than {where}.compressed has values, {flat.numel()}, from row "
                f"{block.start + int((counts.cumsum(0) > flat.numel() - taken).int().argmax())} on. {_DAMAGED}"
            )
        weight[block].masked_scatter_(keep, flat[taken : taken + count])
        taken += count
    if taken != flat.numel():
        raise FormatError(f"{where}.compressed: holds {flat.numel()} values, the bitmask has {taken} bits. {_DAMAGED}")
    return weight.view(values.dtype).view(shape)


def read_shape(shape: Tensor, where: str) -> tuple[int, ...]:
    """What the tensor `shape` says.

    Raises:
        FormatError: it holds no positive whole numbers.
    """
    numbers = shape.flatten().tolist()
    if not numbers or shape.dtype.is_floating_point or min(numbers) < 1:
        raise FormatError(f"{where}.shape: must be positive whole numbers, found {numbers}. {_DAMAGED}")
    return tuple(numbers)


def validate_shapes(
    values_shape: tuple[int, ...],
    bitmask_shape: tuple[int, ...],
    bitmask_dtype: torch.dtype,
    shape: tuple[int, ...],
    where: str,
) -> None:
    """The part of the checks that needs no data, so that it can be asked of the header of a file.

    Raises:
        FormatError: naming the tensor and what was found.
    """
    if bitmask_dtype != torch.uint8:
        raise FormatError(f"{where}.bitmask: must be uint8, found {dtype_name(bitmask_dtype)}. {_DAMAGED}")
    expected = (*shape[:-1], -(-shape[-1] // 8))
    if bitmask_shape != expected:
        raise FormatError(
            f"{where}.bitmask: must be {list(expected)} for a weight of {list(shape)}, found {list(bitmask_shape)}. "
            f"{_DAMAGED}"
        )
    half = (*shape[:-1], shape[-1] // 2)
    if len(values_shape) != 1 and values_shape != half:
        raise FormatError(
            f"{where}.compressed: must be {list(half)} for a weight of {list(shape)}, or have one dimension, found "
            f"{list(values_shape)}. {_DAMAGED}"
        )


def _kept(bitmask: Tensor, columns: int, first_row: int, where: str) -> Tensor:
    """[rows, columns] bool. Bits behind the last column must be 0."""
    bits = (bitmask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).flatten(1).bool()
    if bits[:, columns:].any():
        row = int(bits[:, columns:].any(1).int().argmax())
        raise FormatError(f"{where}.bitmask: row {first_row + row} has bits behind input {columns - 1}. {_DAMAGED}")
    return bits[:, :columns]


def _check_two_of_four(keep: Tensor, first_row: int, where: str) -> None:
    if keep.shape[1] % 4:  # groups cross the ends of rows, so that only their number can be checked
        return
    counts = keep.unflatten(1, (-1, 4)).sum(-1)
    if (counts != 2).any():
        row, group = (counts != 2).nonzero()[0].tolist()
        raise FormatError(
            f"{where}.bitmask: row {first_row + row}, group {group} has {int(counts[row, group])} bits, 2:4 has 2. "
            f"{_DAMAGED}"
        )


def _check_offsets(row_offsets: Tensor, counts: Tensor, taken: int, block: slice, where: str) -> None:
    expected = taken + counts.cumsum(0) - counts
    found = row_offsets.reshape(-1)[block]
    if found.shape != expected.shape or (found != expected).any():
        differs = found != expected if found.shape == expected.shape else torch.ones(1, dtype=torch.bool)
        row = int(differs.int().argmax())
        raise FormatError(
            f"{where}.row_offsets: row {block.start + row} starts at {found[row].item() if len(found) else 'nothing'}, "
            f"by the bitmask at {int(expected[row])}. {_DAMAGED}"
        )
