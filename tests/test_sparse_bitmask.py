"""The bitmask formats of compressed-tensors: what was put in comes out, and damage is named."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import FormatError
from hf_adaptive_sparse.formats import sparse_bitmask
from hf_adaptive_sparse.formats.two_four import row_blocks
from hf_adaptive_sparse.patterns import NMPattern

from .reference import sparse_bitmask as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
DAMAGED = "The file is damaged; fetch it again."

# Written by compressed-tensors 0.14.0.1 for this weight.
GOLDEN = [[0, 1.5, 0, -2, 0.5, 0, 0, 0, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0, -1, 0.25, 0, 7, 0, 8]]
GOLDEN_TWO_FOUR = [[1.5, -2.0, 0.5, 0.0, 0.0, 0.0], [3.0, 4.0, -1.0, 0.25, 7.0, 8.0]], [[90, 12], [195, 10]]
GOLDEN_PLAIN = [1.5, -2.0, 0.5, 3.0, 4.0, -1.0, 0.25, 7.0, 8.0], [[26, 0], [195, 10]], [0, 3]


def random_weight(seed: int, rows: int, columns: int, two_of_four: bool) -> torch.Tensor:
    """Small integers, which every dtype holds; a fifth of the kept ones are zero too."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-8, 9, (rows, columns), generator=generator).float()
    keep = torch.rand(rows, columns, generator=generator) < 0.6
    if two_of_four:
        keep = NMPattern(2, 4).keep_mask(torch.rand(rows, columns, generator=generator))
    return torch.where(keep & (torch.rand(rows, columns, generator=generator) > 0.2), weight, 0)


def encoded(weight: torch.Tensor, two_of_four: bool, dtype=torch.float32):
    values, bitmask, offsets = reference.pack(weight.tolist(), two_of_four)
    return torch.tensor(values).to(dtype), torch.tensor(bitmask, dtype=torch.uint8), torch.tensor(offsets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("two_of_four", [True, False])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 6), groups=st.integers(1, 6))
def test_what_was_encoded_comes_out(two_of_four, dtype, seed, rows, groups):
    columns = 4 * groups if two_of_four else groups * 5 - 2
    weight = random_weight(seed, rows, columns, two_of_four)
    values, bitmask, offsets = encoded(weight, two_of_four, dtype)
    found = sparse_bitmask.unpack(values, bitmask, (rows, columns), None if two_of_four else offsets)
    assert found.dtype == dtype
    assert torch.equal(found.float(), weight)


def test_bytes_of_compressed_tensors_itself_are_read():
    expected = torch.tensor(GOLDEN, dtype=torch.bfloat16)
    values, bits = GOLDEN_TWO_FOUR
    found = sparse_bitmask.unpack(torch.tensor(values).bfloat16(), torch.tensor(bits, dtype=torch.uint8), (2, 12))
    assert torch.equal(found, expected)
    values, bits, offsets = GOLDEN_PLAIN
    arguments = torch.tensor(values).bfloat16(), torch.tensor(bits, dtype=torch.uint8), (2, 12), torch.tensor(offsets)
    assert torch.equal(sparse_bitmask.unpack(*arguments), expected)
    # Which of two zeros of a short group is kept is the only freedom of the format.
    assert reference.pack(GOLDEN, False) == GOLDEN_PLAIN


def test_no_bit_of_a_value_is_changed():
    raw = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = torch.stack([raw[::2], raw[1::2]], 1)
    bitmask = torch.full((values.shape[0], 1), 0b1010, dtype=torch.uint8)
    found = sparse_bitmask.unpack(values.view(torch.float16), bitmask, (values.shape[0], 4))
    assert torch.equal(found.view(torch.int16)[:, 1::2], values)


def test_a_vector_is_one_row():
    found = sparse_bitmask.unpack(
        torch.tensor([2.0, 3.0]), torch.tensor([0b100, 0b10], dtype=torch.uint8), (11,), torch.tensor(0)
    )
    assert found.tolist() == [0, 0, 2, 0, 0, 0, 0, 0, 0, 3, 0]


def test_a_weight_of_several_blocks_of_rows_is_whole():
    weight = random_weight(0, 700, 1024, True)
    assert len(row_blocks(*weight.shape)) > 2
    keep = NMPattern(2, 4).keep_mask(weight.abs())
    values = weight[keep].view(700, 512)
    bits = (keep.unflatten(1, (-1, 8)).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)
    assert torch.equal(sparse_bitmask.unpack(values, bits, (700, 1024)), weight)


def refusal(*arguments) -> str:
    with pytest.raises(FormatError) as caught:
        sparse_bitmask.unpack(*arguments, where="q_proj")
    return str(caught.value)


def test_damage_is_named_with_its_place():
    weight = random_weight(0, 3, 16, True)
    values, bits, _ = encoded(weight, True)
    flat, plain_bits, offsets = encoded(weight, False)
    shape = (3, 16)
    other = bits.clone()
    other[1, 0] ^= 0b10000
    count = (int(other[1, 0]) >> 4).bit_count()
    assert refusal(values, other, shape) == (
        f"q_proj.bitmask: row 1, group 1 has {count} bits, 2:4 has 2. {DAMAGED}"
    )
    assert refusal(values, bits.to(torch.int8), shape) == f"q_proj.bitmask: must be uint8, found int8. {DAMAGED}"
    assert refusal(values, bits[:2], shape) == (
        f"q_proj.bitmask: must be [3, 2] for a weight of [3, 16], found [2, 2]. {DAMAGED}"
    )
    assert refusal(values[:, :4], bits, shape) == (
        f"q_proj.compressed: must be [3, 8] for a weight of [3, 16], or have one dimension, found [3, 4]. {DAMAGED}"
    )
    total = flat.numel()
    assert refusal(torch.cat([flat, flat[:1]]), plain_bits, shape, offsets) == (
        f"q_proj.compressed: holds {total + 1} values, the bitmask has {total} bits. {DAMAGED}"
    )
    assert refusal(flat[:-1], plain_bits, shape, offsets) == (
        f"q_proj.bitmask: has more bits than q_proj.compressed has values, {total - 1}, from row 2 on. {DAMAGED}"
    )
    moved = offsets.clone()
    moved[2] += 1
    assert refusal(flat, plain_bits, shape, moved) == (
        f"q_proj.row_offsets: row 2 starts at {int(moved[2])}, by the bitmask at {int(offsets[2])}. {DAMAGED}"
    )
    assert refusal(flat, plain_bits, shape, offsets[:2]).startswith("q_proj.row_offsets: row ")


def test_bits_behind_the_last_input_are_damage():
    bits = torch.tensor([[0b0011_0110]], dtype=torch.uint8)
    assert refusal(torch.ones(4), bits, (1, 5)) == f"q_proj.bitmask: row 0 has bits behind input 4. {DAMAGED}"


@pytest.mark.parametrize("shape", [torch.tensor([]), torch.tensor([3, 0]), torch.tensor([3.0, 4.0])])
def test_a_shape_that_is_none_is_damage(shape):
    with pytest.raises(FormatError, match=re.escape(f"found {shape.flatten().tolist()}. {DAMAGED}")):
        sparse_bitmask.read_shape(shape, "q_proj")
