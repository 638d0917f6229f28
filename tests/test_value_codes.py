"""Codes of quantised values: against a slow reference, exact sizes, what is refused and how."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import FormatError, PatternError
from hf_adaptive_sparse.formats import two_four, value_codes
from hf_adaptive_sparse.formats.value_codes import StoredGrid, after_cast, check_grid, decode, encode

from .reference import value_codes as reference
from .test_two_four import random_two_four

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_bits = pytest.mark.parametrize("bits", [8, 4])
seeds = st.integers(0, 2**31)
REMEDY = "Round the weight to its grid first, or keep it without one (of a loaded model: model.dequantize())."
DAMAGED = "The file is damaged or not format v1.1."


def random_codes(seed, bits, rows, columns, groups, scale_dtype=torch.float32):
    """Codes [rows, columns] int8, all of them possible, and scales over nine powers of two."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator, dtype=torch.int8)
    scales = (torch.rand(rows, groups, generator=generator) * 9 - 12).exp2().to(scale_dtype)
    return codes, scales


def values_of(codes, scales, dtype):
    """As `decode`, of codes that are not joined yet."""
    return decode(codes.to(torch.int8), scales, (dtype,))


@every_dtype
@every_bits
@settings(max_examples=20)
@given(
    seed=seeds, rows=st.integers(1, 4), pairs=st.integers(1, 3), groups=st.integers(1, 3), narrow_scale=st.booleans()
)
def test_it_encodes_and_decodes_as_the_slow_reference_does(dtype, bits, seed, rows, pairs, groups, narrow_scale):
    columns = 4 * pairs * groups
    codes, scales = random_codes(seed, bits, rows, columns, groups, torch.bfloat16 if narrow_scale else torch.float32)
    exact = reference.products(codes.tolist(), scales.tolist(), 2 * columns // groups)
    values = torch.tensor(exact, dtype=torch.float64).float().to(dtype)
    stored = encode(values, scales, bits, (dtype,))
    assert stored.dtype == {8: torch.int8, 4: torch.uint8}[bits]
    assert stored.view(torch.uint8).tolist() == reference.code_bytes(codes.tolist(), bits)
    assert torch.equal(decode(stored, scales, (dtype,)), values)


def test_the_first_code_of_a_group_of_four_inputs_is_in_the_low_nibble():
    values = torch.tensor([[1.0, -1.0, 7.0, -8.0]])
    assert encode(values, torch.ones(1, 1), 4, (torch.float32,)).tolist() == [[0xF1, 0x87]]
    assert encode(values, torch.ones(1, 1), 8, (torch.float32,)).tolist() == [[1, -1, 7, -8]]


@every_dtype
@every_bits
@settings(max_examples=25)
@given(seed=seeds, exponent=st.integers(-40, 6), fraction=st.floats(1.01, 1.99))
def test_every_code_comes_back_from_its_value_whatever_the_scale(dtype, bits, seed, exponent, fraction):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    scale = torch.tensor([[max(fraction * 2.0**exponent, 1.01 * smallest)]])
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8).unsqueeze(0)
    stored = encode(values_of(codes, scale, dtype), scale, bits, (dtype,))
    assert stored.view(torch.uint8).tolist() == reference.code_bytes(codes.tolist(), bits)


@every_dtype
@every_bits
def test_a_code_of_zero_is_positive_zero_and_no_other_code_is_zero(dtype, bits):
    codes, scales = random_codes(0, bits, 4, 32, 2)
    values = values_of(codes, scales, dtype)
    assert torch.equal(values == 0, codes == 0) and (codes == 0).any()
    assert not (values.signbit() & (values == 0)).any()


@every_bits
@settings(max_examples=20)
@given(seed=seeds)
def test_equal_weights_on_one_grid_give_equal_bytes_also_where_kept_codes_are_zero(bits, seed):
    codes, scales = random_codes(seed, bits, 4, 16, 2)
    codes[torch.rand(codes.shape, generator=torch.Generator().manual_seed(seed)) < 0.4] = 0
    meta = torch.full((4, 4), 0x44, dtype=torch.uint8)  # positions 0 and 1 of every group, also where a code is 0
    weight = two_four.unpack(values_of(codes, scales, torch.float32), meta)
    values, positions = two_four.pack(weight)
    stored = encode(values, scales, bits, (torch.float32,))
    restored = two_four.unpack(decode(stored, scales, (torch.float32,)), positions)
    assert torch.equal(restored, weight)
    first, second = codes.unflatten(1, (8, 2)).unbind(-1)
    nibbles = torch.where(second != 0, torch.where(first != 0, 4, 9), torch.where(first != 0, 8, 14))
    assert torch.equal(positions, (nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(torch.uint8))
    negated = torch.where(weight == 0, -0.0, weight)
    again = two_four.pack(negated)
    assert torch.equal(again[1], positions) and torch.equal(encode(again[0], scales, bits, (torch.float32,)), stored)


@pytest.mark.parametrize("bits, ratio", [(8, 0.3125), (4, 0.1875)])
@pytest.mark.parametrize("groups, scale_dtype", [(1, torch.float32), (4, torch.bfloat16)])
def test_the_size_is_exactly_what_the_format_promises(bits, ratio, groups, scale_dtype):
    codes, scales = random_codes(0, bits, 24, 32, groups, scale_dtype)
    weight = two_four.unpack(values_of(codes, scales, torch.bfloat16), torch.full((24, 8), 0x44, dtype=torch.uint8))
    values, meta = two_four.pack(weight)
    stored = encode(values, scales, bits, (torch.bfloat16,))
    assert stored.nbytes + meta.nbytes == ratio * weight.nbytes
    assert scales.nbytes == 24 * groups * scale_dtype.itemsize
    assert all(tensor.is_contiguous() for tensor in (stored, meta))


@every_bits
def test_large_weights_are_taken_in_blocks_without_a_seam(bits, monkeypatch):
    codes, scales = random_codes(1, bits, 50, 32, 4)
    values = values_of(codes, scales, torch.float32)
    whole = encode(values, scales, bits, (torch.float32,))
    monkeypatch.setattr(two_four, "_GROUPS_PER_BLOCK", 20)  # two rows and a bit
    assert torch.equal(encode(values, scales, bits, (torch.float32,)), whole)
    assert torch.equal(decode(whole, scales, (torch.float32,)), values)
    values[37, 9] *= 1.001
    with pytest.raises(PatternError, match="^layer: row 37, group 4 holds "):
        encode(values, scales, bits, (torch.float32,), "layer")


def test_encoding_leaves_its_inputs_alone_and_repeats_itself():
    codes, scales = random_codes(0, 4, 4, 16, 2)
    values = values_of(codes, scales, torch.bfloat16)
    before = values.clone(), scales.clone()
    first, second = (encode(values, scales, 4, (torch.bfloat16,)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(values, before[0]) and torch.equal(scales, before[1])


# --- casts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "casts, expected",
    [
        ((torch.bfloat16,), (torch.bfloat16,)),
        ((torch.bfloat16, torch.bfloat16), (torch.bfloat16,)),
        ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.float32)),
        ((torch.bfloat16, torch.float32, torch.bfloat16), (torch.bfloat16,)),
        ((torch.bfloat16, torch.float64, torch.float32, torch.float16), (torch.bfloat16, torch.float16)),
        ((torch.float32, torch.bfloat16), (torch.bfloat16,)),
        ((torch.float16, torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16, torch.float16)),
    ],
)
def test_a_chain_of_casts_is_shortened_where_a_cast_changes_nothing(casts, expected):
    found = (casts[0],)
    for dtype in casts[1:]:
        found = after_cast(found, dtype)
    assert found == expected
    codes, scales = random_codes(0, 8, 8, 64, 2)
    values = values_of(codes, scales, casts[0])
    for dtype in casts[1:]:
        values = values.to(dtype)
    assert torch.equal(decode(codes, scales, found), values)
    assert torch.equal(encode(values, scales, 8, found), codes)


# --- refusals -------------------------------------------------------------------------------------------------

SHAPE = "the scales must be [4, 1], or [4, 32/g] for groups of g inputs, a multiple of 4, found"
SMALLEST = "the scales must be finite and larger than 1.4e-45, the smallest float32; row 2, group 1 is"


def scales_with(value: float) -> torch.Tensor:
    scales = torch.ones(4, 2)
    scales[2, 1] = value
    return scales


@pytest.mark.parametrize(
    "scales, bits, message",
    [
        (torch.ones(4, 1), 3, "the scales are for codes of 3 bits, the packed format holds codes of 8 or 4"),
        (torch.ones(4, 1, dtype=torch.float16), 8, "the scales must be float32 or bfloat16, found float16"),
        (torch.ones(4, 1, dtype=torch.float64), 8, "the scales must be float32 or bfloat16, found float64"),
        (torch.ones(4), 8, f"{SHAPE} [4]"),
        (torch.ones(4, 0), 8, f"{SHAPE} [4, 0]"),
        (torch.ones(3, 1), 8, f"{SHAPE} [3, 1]"),
        (torch.ones(4, 3), 8, f"{SHAPE} [4, 3]"),
        (torch.ones(4, 16), 8, f"{SHAPE} [4, 16]"),  # of two inputs each
        (scales_with(float("nan")), 8, f"{SMALLEST} nan"),
        (scales_with(float("inf")), 8, f"{SMALLEST} inf"),
        (scales_with(-1.0), 8, f"{SMALLEST} -1"),
        (scales_with(0.0), 4, f"{SMALLEST} 0"),
    ],
)
def test_a_grid_that_cannot_be_stored_is_refused(scales, bits, message):
    expected = f"^{re.escape(f'layer: {message}. {REMEDY}')}$"
    with pytest.raises(PatternError, match=expected):
        encode(torch.zeros(4, 16), scales, bits, (torch.float32,), "layer")
    with pytest.raises(PatternError, match=expected):
        check_grid(StoredGrid(scales, bits), (4, 16), torch.float32, "layer")


def test_a_scale_that_the_dtype_of_the_values_does_not_hold_is_refused():
    with pytest.raises(PatternError) as error:
        encode(torch.zeros(4, 16, dtype=torch.float16), scales_with(5e-8), 8, (torch.float16,), "layer")
    assert str(error.value) == (
        "layer: the scales must be finite and larger than 5.96e-08, the smallest float16; row 2, group 1 is 5e-08. "
        f"{REMEDY}"
    )
    encode(torch.zeros(4, 16, dtype=torch.bfloat16), scales_with(5e-8), 8, (torch.bfloat16,), "layer")


@pytest.mark.parametrize("bits, value, code", [(8, 32.0, 128), (8, -32.25, -129), (4, 2.0, 8), (4, -2.25, -9)])
def test_a_value_outside_the_range_of_the_codes_is_refused(bits, value, code):
    values = torch.zeros(4, 16)
    values[3, 5] = value
    with pytest.raises(PatternError) as error:
        encode(values, torch.full((4, 1), 0.25), bits, (torch.float32,), "layer")
    lowest, highest = {8: (-128, 127), 4: (-8, 7)}[bits]
    assert str(error.value) == (
        f"layer: row 3, group 2 holds {value:.6g}, which is {code} times its scale; codes of {bits} bits are {lowest} "
        f"to {highest}. {REMEDY}"
    )
    values[3, 5] = value - value / abs(value) * 0.25  # one less is in range
    encode(values, torch.full((4, 1), 0.25), bits, (torch.float32,), "layer")


@every_bits
def test_a_value_off_the_grid_is_refused_and_never_rounded(bits):
    values = torch.zeros(4, 16)
    values[1, 2] = 0.6
    with pytest.raises(PatternError) as error:
        encode(values, torch.full((4, 1), 0.25), bits, (torch.float32,), "layer")
    assert str(error.value) == (
        f"layer: row 1, group 1 holds 0.6, which is not on the grid: its nearest code, 2, stands for 0.5. {REMEDY}"
    )


@every_dtype
@settings(max_examples=20)
@given(seed=seeds)
def test_the_smallest_change_of_a_value_is_noticed(dtype, seed):
    codes, scales = random_codes(seed, 8, 2, 8, 1)
    values = values_of(codes, scales, dtype)
    row, column = divmod(seed % 16, 8)
    word = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    values.view(word)[row, column] += 1  # the next number of this dtype
    if dtype == torch.bfloat16:  # may be the next code: then it is that one, and nothing else
        with contextlib.suppress(PatternError):
            stored = encode(values, scales, 8, (dtype,), "layer")
            assert torch.equal(decode(stored, scales, (dtype,)), values) and not torch.equal(stored, codes)
        return
    with pytest.raises(PatternError, match=f"^layer: row {row}, group {column // 2} holds .* not on the grid"):
        encode(values, scales, 8, (dtype,), "layer")


# --- what a file says -----------------------------------------------------------------------------------------


def validate(codes, scale, bits, group_size, where="layer"):
    return value_codes.validate_shapes(
        tuple(codes.shape), codes.dtype, tuple(scale.shape), scale.dtype, bits, group_size, where
    )


@pytest.mark.parametrize("bits, width", [(8, 16), (4, 8)])
@pytest.mark.parametrize("groups, group_size", [(1, None), (1, 32), (2, 16), (8, 4)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_what_fits_is_valid(bits, width, groups, group_size, scale_dtype):
    codes = torch.zeros(4, width, dtype=value_codes.CODE_DTYPES[bits])
    assert validate(codes, torch.ones(4, groups, dtype=scale_dtype), bits, group_size) == (4, 16)


INT8, UINT8 = torch.zeros(4, 16, dtype=torch.int8), torch.zeros(4, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    "codes, scale, bits, group_size, message",
    [
        (UINT8, torch.ones(4, 1), 8, None, "weight_values: must be int8 for codes of 8 bits, found uint8"),
        (INT8, torch.ones(4, 1), 4, None, "weight_values: must be uint8 for codes of 4 bits, found int8"),
        (INT8[0], torch.ones(4, 1), 8, None, "weight_values: must be a matrix, found [16]"),
        (INT8, torch.ones(4, 1).half(), 8, None, "weight_scale: must be float32 or bfloat16, found float16"),
        (
            UINT8,
            torch.ones(4, 3),
            4,
            None,
            "weight_scale: must be [4, 1], or [4, 32/g] for groups of g inputs, a multiple of 4, found [4, 3]",
        ),
        (INT8, torch.ones(4, 2), 8, None, "weight_scale: must be [4, 1] by config.json, found [4, 2]"),
        (INT8, torch.ones(4, 2), 8, 8, "weight_scale: must be [4, 32/8] by config.json, found [4, 2]"),
    ],
)
def test_wrong_shapes_and_dtypes_are_named(codes, scale, bits, group_size, message):
    with pytest.raises(FormatError, match=f"^{re.escape(f'layer.{message}. {DAMAGED}')}$"):
        validate(codes, scale, bits, group_size)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1.0, -0.0, 0.0, 5e-8])
def test_scales_that_are_never_stored_are_not_valid(value):
    with pytest.raises(FormatError) as error:
        value_codes.validate_scale(scales_with(value), torch.float16, "layer", 40)
    assert str(error.value) == (
        f"layer.weight_scale: must be finite and larger than 5.96e-08, the smallest float16; row 42, group 1 is "
        f"{value:.6g}. {DAMAGED}"
    )
    value_codes.validate_scale(scales_with(6e-8), torch.float16, "layer")


@every_bits
def test_decoding_works_on_the_meta_device_and_compiled(bits):
    values, _ = two_four.pack(random_two_four(0, 4, 32).sign())
    scales = torch.ones(4, 2)
    stored = encode(values, scales, bits, (torch.float32,))
    assert decode(stored.to("meta"), scales.to("meta"), (torch.float32,)).shape == (4, 16)
    compiled = torch.compile(lambda codes: decode(codes, scales, (torch.float32,)), fullgraph=True, backend="eager")
    assert torch.equal(compiled(stored), values)
