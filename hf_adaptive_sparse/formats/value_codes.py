"""Quantised values of 2:4 weights, format version 1.1: a small integer for each, times the scale of its group.

    values         [out, in/2]    the kept values, as `two_four.py` has them
    weight_values  [out, in/2]    int8, codes of 8 bits; or
                   [out, in/4]    uint8, codes of 4 bits: byte g of a row holds those of group g, the first of the
                                  two in its low nibble
    weight_scale   [out, groups]  float32 or bfloat16; one for all inputs of a row, or for every `group_size`
                                  consecutive inputs, a multiple of 4

A code is a two's complement number, -8 to 7 or -128 to 127; value = code * scale, multiplied in float32 and rounded
once to the dtype of the values. Of a dense 16-bit weight, 2:4 with codes of 8 bits is 0.3125 of the bytes and with
codes of 4 bits 0.1875, plus the scales.

A scale exceeds the smallest number of the dtype of the values. So a code that is not 0 never becomes 0, and a value
gives back its code: |code| <= 128 moves by less than 1/2 when the product is rounded to 8 bits (bfloat16) or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import FormatError, PatternError
from .two_four import dtype_name, row_blocks

SUFFIX = "weight_scale"
CODE_DTYPES = {8: torch.int8, 4: torch.uint8}
SCALE_DTYPES = (torch.float32, torch.bfloat16)

_DAMAGED = "The file is damaged or not format v1.1."
_REMEDY = "Round the weight to its grid first, or keep it without one (of a loaded model: model.dequantize())."


class StoredGrid(NamedTuple):
    """What a weight was rounded to: every entry is a code, an integer of `bits` bits, times its scale."""

    scales: Tensor
    """[out, groups]"""
    bits: int


def encode(values: Tensor, scale: Tensor, bits: int, dtypes: Sequence[torch.dtype], where: str = "weight") -> Tensor:
    """The codes of values that stand on a grid; nothing is ever rounded here.

    Args:
        values: [out, in/2] kept values, finite, float32, float16 or bfloat16.
        scale: [out, groups], float32 or bfloat16.
        bits: 8 or 4.
        dtypes: to which code * scale was rounded, one after the other; the last is that of `values`.
        where: name of the layer, for the messages.
    Returns:
        int8 [out, in/2], or uint8 [out, in/4]; `decode` gives `values` back, to the last bit.
    Raises:
        PatternError: the grid cannot be stored, or a value is not on it.
    """
    check_grid(StoredGrid(scale, bits), tuple(values.shape), dtypes[0], where)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    for block in row_blocks(*values.shape):
        part = values[block].detach()
        exact = _by_group(part.float(), scale) / scale[block].float().unsqueeze(-1)
        nearest = exact.round().flatten(1)
        outside = (nearest < lowest) | (nearest > highest)
        if outside.any():
            row, column = outside.nonzero()[0].tolist()
            raise PatternError(
                f"{where}: row {block.start + row}, group {column // 2} holds {part[row, column].item():.6g}, which is "
                f"{nearest[row, column].item():.6g} times its scale; codes of {bits} bits are {lowest} to {highest}. "
                f"{_REMEDY}"
            )
        codes[block] = nearest
        stands_for = _products(codes[block], scale[block], dtypes)
        differs = stands_for != part
        if differs.any():
            row, column = differs.nonzero()[0].tolist()
            raise PatternError(
                f"{where}: row {block.start + row}, group {column // 2} holds {part[row, column].item():.6g}, which is "
                f"not on the grid: its nearest code, {codes[block][row, column]}, stands for "
                f"{stands_for[row, column].item():.6g}. {_REMEDY}"
            )
    return codes if bits == 8 else _join(codes)


def decode(codes: Tensor, scale: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """The values [out, in/2] for which codes stand; 0 gives +0.0. Both tensors must be valid.

    Args:
        codes: int8 [out, in/2], or uint8 [out, in/4].
        scale: [out, groups].
        dtypes: to which the float32 product is rounded, one after the other; the last is that of the result.
    """
    if codes.dtype == torch.uint8:
        codes = _split(codes)
    values = torch.empty(codes.shape, dtype=dtypes[-1], device=codes.device)
    for block in row_blocks(*codes.shape):
        values[block] = _products(codes[block], scale[block], dtypes)
    return values


def check_grid(grid: StoredGrid, shape: tuple[int, ...], dtype: torch.dtype, where: str = "weight") -> None:
    """The part of `encode` that needs no values: whether a grid fits values of a shape and dtype.

    Raises:
        PatternError: the format cannot hold such a grid.
    """
    scale, bits = grid.scales, grid.bits
    problem = None
    if bits not in CODE_DTYPES:
        problem = f"are for codes of {bits} bits, the packed format holds codes of 8 or 4"
    problem = problem or _scale_shape_problem(tuple(scale.shape), scale.dtype, *shape)
    problem = problem or _scale_problem(scale, dtype, 0)
    if problem is not None:
        raise PatternError(f"{where}: the scales {problem}. {_REMEDY}")


def validate_shapes(
    codes_shape: tuple[int, ...],
    codes_dtype: torch.dtype,
    scale_shape: tuple[int, ...],
    scale_dtype: torch.dtype,
    bits: int,
    group_size: int | None,
    where: str,
) -> tuple[int, ...]:
    """Whether stored codes and scales fit each other, by what the header of a file says of them.

    Args:
        bits, group_size: as the configuration has them; group_size None: one scale per row.
    Returns:
        The shape [out, in/2] of the values.
    Raises:
        FormatError: naming the tensor and what was found.
    """
    if codes_dtype != CODE_DTYPES[bits]:
        raise FormatError(
            f"{where}.weight_values: must be {dtype_name(CODE_DTYPES[bits])} for codes of {bits} bits, found "
            f"{dtype_name(codes_dtype)}. {_DAMAGED}"
        )
    if len(codes_shape) != 2:
        raise FormatError(f"{where}.weight_values: must be a matrix, found {list(codes_shape)}. {_DAMAGED}")
    rows, columns = codes_shape[0], codes_shape[1] * 8 // bits
    problem = _scale_shape_problem(scale_shape, scale_dtype, rows, columns)
    if problem is None and scale_shape[1] * (group_size or 2 * columns) != 2 * columns:
        groups = 1 if group_size is None else f"{2 * columns}/{group_size}"
        problem = f"must be [{rows}, {groups}] by config.json, found {list(scale_shape)}"
    if problem is not None:
        raise FormatError(f"{where}.{SUFFIX}: {problem}. {_DAMAGED}")
    return rows, columns


def validate_scale(scale: Tensor, dtype: torch.dtype, where: str, first_row: int = 0) -> None:
    """Whether every scale of values of `dtype` is one. `scale[0]` is row `first_row` of the whole tensor.

    Raises:
        FormatError: naming row and group.
    """
    problem = _scale_problem(scale, dtype, first_row)
    if problem is not None:
        raise FormatError(f"{where}.{SUFFIX}: {problem}. {_DAMAGED}")


def after_cast(dtypes: Sequence[torch.dtype], dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """`dtypes` of `decode` for the same values cast once more; to a wider type and back is no cast."""
    rounding = tuple(each for each in dtypes if each.itemsize < 4)
    return rounding if rounding[-1:] == (dtype,) else (*rounding, dtype)


def _scale_shape_problem(shape: tuple[int, ...], dtype: torch.dtype, rows: int, columns: int) -> str | None:
    if dtype not in SCALE_DTYPES:
        return f"must be float32 or bfloat16, found {dtype_name(dtype)}"
    # A whole number of groups of four inputs, which are two values.
    if len(shape) == 2 and shape[0] == rows and shape[1] and columns % (2 * shape[1]) == 0:
        return None
    return (
        f"must be [{rows}, 1], or [{rows}, {2 * columns}/g] for groups of g inputs, a multiple of 4, found "
        f"{list(shape)}"
    )


def _scale_problem(scale: Tensor, dtype: torch.dtype, first_row: int) -> str | None:
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    bad = ~(scale.float() > smallest) | scale.isinf()
    if not bad.any():
        return None
    row, group = bad.nonzero()[0].tolist()
    return (
        f"must be finite and larger than {smallest:.3g}, the smallest {dtype_name(dtype)}; row {first_row + row}, "
        f"group {group} is {scale[row, group].item():.6g}"
    )


def _products(codes: Tensor, scale: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    products = _by_group(codes.float(), scale) * scale.float().unsqueeze(-1)
    for dtype in dtypes:
        products = products.to(dtype)
    return products.flatten(1)


def _by_group(values: Tensor, scale: Tensor) -> Tensor:
    groups = scale.shape[1]
    return values.unflatten(1, (groups, values.shape[1] // groups))


def _join(codes: Tensor) -> Tensor:
    """[out, in/2] int8 in -8 to 7 -> [out, in/4] uint8."""
    low, high = codes.view(torch.uint8).unflatten(1, (codes.shape[1] // 2, 2)).unbind(-1)
    return low & 15 | high << 4


def _split(nibbles: Tensor) -> Tensor:
    """[out, in/4] uint8 -> [out, in/2] int8. Shifting right keeps the sign."""
    low, high = (nibbles << 4).view(torch.int8) >> 4, nibbles.view(torch.int8) >> 4
    return torch.stack((low, high), -1).flatten(1)
