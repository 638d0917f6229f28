"""2:4 weights, format version 1: the two kept values of every four inputs, and where they stood.

    weight         [out, in]    at most two non-zeros in every four consecutive inputs of a row
    weight_values  [out, in/2]  same dtype; columns 2g, 2g+1 of a row are what group g keeps, in input order
    weight_meta    [out, in/8]  uint8; byte b of a row holds group 2b in its low nibble, 2b+1 in its high one;
                                a nibble is i0 | i1 << 2, the positions of the kept values, i0 < i1

Of 16-bit values this is 0.5625 of the dense bytes. Equal weights give equal bytes: a group with fewer than
two non-zeros always takes the same nibble (none: 14; only 0: 8; only 1: 9; only 2 or only 3: 14), a slot
without a value holds +0.0, and -0.0 becomes +0.0, because a compressor that looks for non-zero bits takes it
for a value. The nibbles and the choice for short groups are those of torch's CUTLASS compressor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import FormatError, PatternError
from . import words

VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Rows are taken in blocks of about this many groups: indices and flags (8 bytes a value) stay in the cache of
# a CPU, and never take more than a few MB beside a large weight.
_GROUPS_PER_BLOCK = 1 << 16

# Nibble of a group, by the bits "position p is not zero"; 0 (no legal nibble) for more than two non-zeros.
_NIBBLE = (14, 8, 9, 4, 14, 8, 9, 0, 14, 12, 13, 0, 14, 0, 0, 0)
_ENTRIES = words.entry_table(_NIBBLE)
_LEGAL_NIBBLES = (4, 8, 9, 12, 13, 14)
_DAMAGED = "The file is damaged or not format v1."


def _byte_table(entry: Callable[[int, int], int | bool], dtype: torch.dtype) -> Tensor:
    """[256] entry(low nibble, high nibble) of every byte."""
    return torch.tensor([entry(byte & 15, byte >> 4) for byte in range(256)], dtype=dtype, device="cpu")


# Byte of two groups of such bits -> byte of `weight_meta`, 0 when one of the groups is not 2:4.
_META = _byte_table(
    lambda low, high: _NIBBLE[low] | _NIBBLE[high] << 4 if _NIBBLE[low] and _NIBBLE[high] else 0, torch.uint8
)
_LEGAL = _byte_table(lambda low, high: low in _LEGAL_NIBBLES and high in _LEGAL_NIBBLES, torch.bool)


def pack(weight: Tensor, where: str = "weight") -> tuple[Tensor, Tensor]:
    """The values and positions of a 2:4 weight.

    Args:
        weight: [out, in], float32, float16 or bfloat16, in a multiple of 8.
        where: name of the layer, for the messages.
    Returns:
        values [out, in/2] of the dtype of `weight`, and meta [out, in/8] uint8; both contiguous.
    Raises:
        PatternError: the weight is not 2:4, or holds NaN or inf, or has a shape or dtype that the format
            lacks. Nothing is ever pruned here.
    """
    check_packable(weight, where)
    rows, columns = weight.shape
    values = weight.new_empty(rows, columns // 2)
    meta = torch.empty(rows, columns // 8, dtype=torch.uint8, device=weight.device)
    for block in row_blocks(rows, columns):
        part = weight[block].detach()
        pack_rows = _pack_words if words.can_hold(part) else _pack_rows
        if not pack_rows(part, values[block], meta[block]):
            raise PatternError(_crowded_group(part, block.start, where))
        if not _are_finite(values[block]):
            row, column = (~part.isfinite()).nonzero()[0].tolist()
            raise PatternError(
                f"{where}: row {block.start + row}, group {column // 4} holds "
                f"{part[row, column].item()}. A checkpoint with NaN or inf is not written; go back to "
                f"the last good weights."
            )
    return values, meta


def unpack(values: Tensor, meta: Tensor) -> Tensor:
    """The weight [out, in] that was packed; every zero is +0.0. Both tensors must be valid (`validate`).

    Args:
        values: [out, in/2], any dtype.
        meta: [out, in/8] uint8.
    """
    rows, octets = meta.shape
    if words.can_hold(values):
        values, weight = values.detach().contiguous(), values.new_empty(rows, octets * 8)
        for block in row_blocks(rows, octets * 8):
            words.expand(values[block], meta[block], out=weight[block])
        return weight
    weight = values.new_zeros(rows, octets, 8)
    quads = values.detach().reshape(rows, octets, 4)
    for block in row_blocks(rows, octets * 8):
        weight[block].scatter_(-1, _positions(meta[block]), quads[block])
    return weight.view(rows, octets * 8)


def validate(values: Tensor, meta: Tensor, where: str = "weight") -> None:
    """Whether two tensors are a weight in this format.

    Raises:
        FormatError: naming the tensor and, for a bad nibble or value, the row, the group and what was found.
    """
    validate_shapes(tuple(values.shape), values.dtype, tuple(meta.shape), meta.dtype, where)
    validate_meta(meta, where)
    for block in row_blocks(*values.shape):
        part = values[block]
        bad = ~part.isfinite() | ((part == 0) & part.signbit())
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            raise FormatError(
                f"{where}.weight_values: row {block.start + row}, group {column // 2} holds "
                f"{part[row, column].item()}, which is never stored. {_DAMAGED}"
            )


def validate_shapes(
    values_shape: tuple[int, ...],
    values_dtype: torch.dtype,
    meta_shape: tuple[int, ...],
    meta_dtype: torch.dtype,
    where: str,
) -> None:
    """The part of `validate` that needs no data, so that it can be asked of the header of a file."""
    if meta_dtype != torch.uint8:
        raise FormatError(f"{where}.weight_meta: must be uint8, found {dtype_name(meta_dtype)}. {_DAMAGED}")
    if values_dtype not in VALUE_DTYPES:
        raise FormatError(
            f"{where}.weight_values: must be one of {', '.join(map(dtype_name, VALUE_DTYPES))}, found "
            f"{dtype_name(values_dtype)}. {_DAMAGED}"
        )
    if len(values_shape) != 2 or values_shape[1] % 4:
        raise FormatError(
            f"{where}.weight_values: must be [out, in/2] with `in` a multiple of 8, found "
            f"{list(values_shape)}. {_DAMAGED}"
        )
    expected = [values_shape[0], values_shape[1] // 4]
    if list(meta_shape) != expected:
        raise FormatError(
            f"{where}.weight_meta: must be {expected} beside values of {list(values_shape)}, found "
            f"{list(meta_shape)}. {_DAMAGED}"
        )


def validate_meta(meta: Tensor, where: str, first_row: int = 0) -> None:
    """The part of `validate` that reads positions. `meta[0]` is row `first_row` of the whole tensor."""
    table = _LEGAL.to(meta.device)
    # Counting bytes is several times as fast as looking each of them up.
    if not torch.bincount(meta.flatten(), minlength=256)[~table].any():
        return
    for block in row_blocks(meta.shape[0], meta.shape[1] * 8):
        legal = table[meta[block].int()]
        if not legal.all():
            row, column = (~legal).nonzero()[0].tolist()
            byte = int(meta[block][row, column])
            high = byte & 15 in _LEGAL_NIBBLES
            raise FormatError(
                f"{where}.weight_meta: row {first_row + block.start + row}, group {2 * column + high} has an "
                f"illegal nibble, {byte >> 4 if high else byte & 15} (byte {column} of the row is {byte}); "
                f"legal are {', '.join(map(str, _LEGAL_NIBBLES))}. {_DAMAGED}"
            )


def check_packable(weight: Tensor, where: str = "weight") -> None:
    """The part of `pack` that needs no data: shape and dtype.

    Raises:
        PatternError: the format cannot hold such a weight.
    """
    if weight.ndim != 2 or weight.shape[1] % 8:
        raise PatternError(
            f"{where}: the packed format needs the input features to be a multiple of 8, got "
            f"{weight.shape[-1]} in a {list(weight.shape)} weight. Leave the layer dense."
        )
    if weight.dtype not in VALUE_DTYPES:
        raise PatternError(
            f"{where}: the packed format holds {', '.join(map(dtype_name, VALUE_DTYPES))}, got "
            f"{dtype_name(weight.dtype)}. Cast the weight first."
        )


def first_violation(weight: Tensor) -> tuple[int, int, int] | None:
    """(row, group, non-zeros) of the first group of a [out, in] weight with more than two non-zeros, or None."""
    in_words = words.can_hold(weight) and weight.shape[1] % 4 == 0
    for block in row_blocks(*weight.shape):
        if in_words and words.most_nonzero(words.groups_of(weight[block].detach())) <= 2:
            continue
        counts = weight[block].ne(0).unflatten(1, (-1, 4)).sum(-1, dtype=torch.uint8)
        if (counts > 2).any():
            row, group = (counts > 2).nonzero()[0].tolist()
            return block.start + row, group, int(counts[row, group])
    return None


def _pack_rows(weight: Tensor, values: Tensor, meta: Tensor) -> bool:
    """Pack some rows into `values` and `meta`. Returns whether they are 2:4; if not, nothing was written."""
    bit = torch.arange(8, dtype=torch.uint8, device=weight.device)
    octets = weight.unflatten(1, (-1, 8))
    nonzero = (octets.ne(0).to(torch.uint8) << bit).sum(-1, dtype=torch.uint8)
    found = _META.to(weight.device)[nonzero.int()]
    if not found.all():
        return False
    meta.copy_(found)
    kept = octets.gather(-1, _positions(found))
    # Not kept + 0.0, which would flush subnormal values on a CPU that is set to do so.
    values.copy_(kept.masked_fill_(kept == 0, 0.0).flatten(1))
    return True


def _pack_words(weight: Tensor, values: Tensor, meta: Tensor) -> bool:
    """As `_pack_rows`."""
    groups = words.groups_of(weight)
    signs = words.signs_of(groups)
    entries = words.entries_of(signs, _ENTRIES)
    if entries is None:
        return False
    meta.copy_(words.meta_of(entries))
    words.kept_of(groups, signs, entries, out=values)
    return True


def _are_finite(values: Tensor) -> bool:
    return words.are_finite(values) if words.can_hold(values) else bool(values.isfinite().all())


def _crowded_group(rows: Tensor, first_row: int, where: str) -> str:
    violation = first_violation(rows)
    assert violation is not None
    row, group, count = violation
    return (
        f"{where}: row {first_row + row}, group {group} (inputs {4 * group} to {4 * group + 3}) has {count} "
        f"non-zeros, 2:4 allows 2. Prune the layer first, or leave it dense."
    )


def _positions(meta: Tensor) -> Tensor:
    """[..., 4] int64: in which of the eight inputs of a byte of meta its four values stand."""
    slot = torch.arange(4, dtype=torch.uint8, device=meta.device)
    return ((meta.unsqueeze(-1) >> (2 * slot)) & 3 | (slot & 2) << 1).long()


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Slices of rows that are worked on one after the other."""
    # One block under torch.compile, which fuses the index arithmetic by itself and would unroll the loop.
    step = rows if torch.compiler.is_compiling() else 4 * _GROUPS_PER_BLOCK // max(columns, 1)
    step = max(step, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def dtype_name(dtype: torch.dtype) -> str:
    """As in a configuration: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
