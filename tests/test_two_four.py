"""The packed 2:4 format: against a slow reference, against torch's own converter, and its error messages."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse import _semi_structured_conversions as cutlass

from hf_adaptive_sparse.errors import FormatError, PatternError
from hf_adaptive_sparse.formats import two_four
from hf_adaptive_sparse.formats.two_four import pack, unpack, validate

from .reference import two_four as reference

LEGAL = (4, 8, 9, 12, 13, 14)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
seeds = st.integers(0, 2**31)


def random_two_four(seed: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every kind of group: none, one or two non-zeros at any position, and zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(rows * columns // 4, 4, generator=generator).to(dtype)
    order = torch.rand(groups.shape, generator=generator).argsort(dim=-1)
    kept = torch.randint(0, 3, (len(groups), 1), generator=generator)
    groups[order >= kept] *= 0  # also -0.0
    return groups.view(rows, columns)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30)
@given(seed=seeds, rows=st.integers(0, 5), octets=st.integers(0, 4))
def test_it_packs_and_unpacks_as_the_slow_reference_does(dtype, seed, rows, octets):
    empty = torch.zeros(rows, 8 * octets, dtype=dtype)
    weight = random_two_four(seed, rows, 8 * octets, dtype) if rows * octets else empty
    values, meta = pack(weight)
    expected_values, expected_meta = reference.pack(weight.tolist())
    assert values.tolist() == expected_values and meta.tolist() == expected_meta
    assert unpack(values, meta).tolist() == reference.unpack(expected_values, expected_meta)


def test_every_kind_of_group_gets_the_nibble_of_the_format():
    def nibble(*group: float) -> int:
        return int(pack(torch.tensor([[*group, 0, 0, 0, 0]], dtype=torch.float32))[1][0, 0]) & 15

    assert nibble(0, 0, 0, 0) == 14
    assert [nibble(*(1.0 if i == p else 0.0 for i in range(4))) for p in range(4)] == [8, 9, 14, 14]
    pairs = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert [nibble(*(1.0 if i in pair else 0.0 for i in range(4))) for pair in pairs] == [4, 8, 9, 12, 13, 14]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@settings(max_examples=25)
@given(seed=seeds, rows=st.integers(1, 3), columns=st.integers(1, 4))
def test_it_equals_the_cutlass_converter_of_torch_in_both_directions(dtype, seed, rows, columns):
    weight = random_two_four(seed, 32 * rows, 64 * columns, dtype).abs()  # its values may be -0.0, ours never
    values, meta = pack(weight)
    expected_values, reordered = cutlass.sparse_semi_structured_from_dense_cutlass(weight)
    # Four of our nibbles are one of its elements, in the same order; it then shuffles these.
    words = meta.view(torch.int16)
    place = cutlass._calculate_meta_reordering_scatter_offsets(*words.shape, torch.int16, "cpu")
    shuffled = torch.empty_like(words).view(-1).scatter_(0, place, words.reshape(-1)).view(words.shape)
    assert torch.equal(values, expected_values) and torch.equal(shuffled, reordered)
    assert torch.equal(cutlass.sparse_semi_structured_to_dense_cutlass(values, shuffled), weight)
    back = torch.gather(reordered.view(-1), 0, place).view(words.shape).view(torch.uint8)
    assert torch.equal(unpack(expected_values, back), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@given(seed=seeds)
def test_no_negative_zero_is_stored_or_comes_back(dtype, seed):
    weight = -random_two_four(seed, 4, 32, dtype).abs()
    values, meta = pack(weight)
    assert not (values.signbit() & (values == 0)).any()
    restored = unpack(values, meta)
    assert not (restored.signbit() & (restored == 0)).any() and torch.equal(restored, weight)


@settings(max_examples=20)
@given(seed=seeds)
def test_equal_weights_give_equal_bytes(seed):
    weight = random_two_four(seed, 4, 32)
    values, meta = pack(weight)
    negated_zeros = torch.where(weight == 0, -0.0, weight)
    for other in (unpack(values, meta), negated_zeros, weight.t().contiguous().t(), weight.clone()):
        assert all(torch.equal(a, b) for a, b in zip(pack(other), (values, meta), strict=True))
        assert pack(other)[0].numpy().tobytes() == values.numpy().tobytes()


def test_subnormal_and_extreme_values_survive():
    for dtype in DTYPES:
        info = torch.finfo(dtype)
        extremes = [info.max, 0, 0, info.min, info.smallest_normal / 2, info.tiny, 0, 0]
        weight = torch.tensor([extremes], dtype=dtype)
        assert torch.equal(unpack(*pack(weight)), weight)


@pytest.mark.parametrize(
    "dtype, ratio", [(torch.bfloat16, 0.5625), (torch.float16, 0.5625), (torch.float32, 0.53125)]
)
def test_the_size_is_exactly_what_the_format_promises(dtype, ratio):
    weight = random_two_four(0, 24, 40, dtype)
    assert sum(tensor.nbytes for tensor in pack(weight)) == ratio * weight.nbytes


def test_large_weights_are_taken_in_blocks_without_a_seam(monkeypatch):
    weight = random_two_four(1, 50, 64)
    whole = pack(weight)
    monkeypatch.setattr(two_four, "_GROUPS_PER_BLOCK", 40)  # two rows and a bit
    assert all(torch.equal(a, b) for a, b in zip(pack(weight), whole, strict=True))
    assert torch.equal(unpack(*whole), weight)
    validate(*whole)
    weight[37, 8:12] = 1.0
    with pytest.raises(PatternError, match="^weight: row 37, group 2 "):
        pack(weight)
    assert two_four.first_violation(weight) == (37, 2, 4)
    whole[1][41, 3] = 0
    with pytest.raises(FormatError, match="^weight.weight_meta: row 41, group 6 "):
        validate(*whole)


def test_a_weight_that_is_not_two_four_is_refused_with_its_place():
    weight = random_two_four(0, 4, 16)
    weight[2, 4:8] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    with pytest.raises(PatternError) as error:
        pack(weight, "model.layers.3.mlp.up_proj")
    assert str(error.value) == (
        "model.layers.3.mlp.up_proj: row 2, group 1 (inputs 4 to 7) has 3 non-zeros, 2:4 allows 2. Prune the "
        "layer first, or leave it dense."
    )


def test_nan_is_refused_with_its_place():
    weight = torch.zeros(3, 16)
    weight[1, 9] = float("nan")
    with pytest.raises(PatternError) as error:
        pack(weight, "layer")
    assert str(error.value) == (
        "layer: row 1, group 2 holds nan. A checkpoint with NaN or inf is not written; go back to the last "
        "good weights."
    )


@pytest.mark.parametrize(
    "weight, message",
    [
        (
            torch.zeros(4, 172),
            "layer: the packed format needs the input features to be a multiple of 8, got 172 in a [4, 172] "
            "weight. Leave the layer dense.",
        ),
        (
            torch.zeros(8),
            "layer: the packed format needs the input features to be a multiple of 8, got 8 in a [8] weight. "
            "Leave the layer dense.",
        ),
        (
            torch.zeros(4, 8, dtype=torch.float64),
            "layer: the packed format holds float32, float16, bfloat16, got float64. Cast the weight first.",
        ),
    ],
)
def test_a_shape_or_dtype_that_the_format_lacks_is_refused(weight, message):
    with pytest.raises(PatternError, match=f"^{re.escape(message)}$"):
        pack(weight, "layer")


@settings(max_examples=60)
@given(seed=seeds, byte=st.integers(0, 255), row=st.integers(0, 3), column=st.integers(0, 3))
def test_exactly_the_bytes_with_an_illegal_nibble_are_refused_and_named(seed, byte, row, column):
    values, meta = pack(random_two_four(seed, 4, 32))
    meta[row, column] = byte
    low, high = byte & 15, byte >> 4
    if low in LEGAL and high in LEGAL:
        validate(values, meta, "layer")
        return
    group, nibble = (2 * column, low) if low not in LEGAL else (2 * column + 1, high)
    with pytest.raises(FormatError) as error:
        validate(values, meta, "layer")
    assert str(error.value) == (
        f"layer.weight_meta: row {row}, group {group} has an illegal nibble, {nibble} (byte {column} of the "
        f"row is {byte}); legal are 4, 8, 9, 12, 13, 14. The file is damaged or not format v1."
    )


@pytest.mark.parametrize("value, text", [(float("nan"), "nan"), (float("-inf"), "-inf"), (-0.0, "-0.0")])
def test_values_that_are_never_stored_are_not_valid(value, text):
    values, meta = pack(random_two_four(0, 4, 32))
    values[3, 5] = value
    with pytest.raises(FormatError) as error:
        validate(values, meta, "layer")
    assert str(error.value) == (
        f"layer.weight_values: row 3, group 2 holds {text}, which is never stored. The file is damaged or "
        f"not format v1."
    )


DAMAGED = "The file is damaged or not format v1."


@pytest.mark.parametrize(
    "values, meta, message",
    [
        (
            torch.zeros(4, 8),
            torch.zeros(4, 2, dtype=torch.int16),
            f"layer.weight_meta: must be uint8, found int16. {DAMAGED}",
        ),
        (
            torch.zeros(4, 8, dtype=torch.int32),
            torch.zeros(4, 2, dtype=torch.uint8),
            f"layer.weight_values: must be one of float32, float16, bfloat16, found int32. {DAMAGED}",
        ),
        (
            torch.zeros(4, 6),
            torch.zeros(4, 2, dtype=torch.uint8),
            f"layer.weight_values: must be [out, in/2] with `in` a multiple of 8, found [4, 6]. {DAMAGED}",
        ),
        (
            torch.zeros(4, 8),
            torch.zeros(4, 3, dtype=torch.uint8),
            f"layer.weight_meta: must be [4, 2] beside values of [4, 8], found [4, 3]. {DAMAGED}",
        ),
    ],
)
def test_wrong_shapes_and_dtypes_are_named(values, meta, message):
    with pytest.raises(FormatError, match=f"^{re.escape(message)}$"):
        validate(values, meta, "layer")


def test_unpacking_works_on_the_meta_device_and_compiled():
    values, meta = pack(random_two_four(0, 4, 32))
    assert unpack(values.to("meta"), meta.to("meta")).shape == (4, 32)
    compiled = torch.compile(unpack, fullgraph=True, backend="eager")
    assert torch.equal(compiled(values, meta), unpack(values, meta))


# --- words of 64 bits, which 16-bit weights take -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("view", ["whole", "transposed", "odd offset"])
def test_words_give_the_bytes_that_single_weights_give(dtype, view, monkeypatch):
    weight = random_two_four(5, 24, 40, dtype)
    if view == "transposed":
        weight = weight.t().contiguous().t()
    if view == "odd offset":
        weight = torch.cat([torch.zeros(1, dtype=dtype), weight.flatten()])[1:].view(24, 40)
    info = torch.finfo(dtype)
    weight[0, :8] = torch.tensor([info.max, 0, -info.max, 0, 0, info.tiny * info.eps, 0, -info.tiny], dtype=dtype)
    assert two_four.words.can_hold(weight)
    values, meta = pack(weight)
    assert torch.equal(unpack(values, meta), weight) and two_four.first_violation(weight) is None
    shifted = torch.cat([torch.zeros(1, dtype=dtype), values.flatten()])[1:].view(values.shape)
    assert torch.equal(unpack(shifted, meta), weight)
    monkeypatch.setattr(two_four.words, "can_hold", lambda tensor: False)
    slow = pack(weight)
    assert torch.equal(values.view(torch.int16), slow[0].view(torch.int16)) and torch.equal(meta, slow[1])
    assert torch.equal(unpack(*slow).view(torch.int16), unpack(values, meta).view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(seed=seeds, row=st.integers(0, 4), column=st.integers(0, 39), bad=st.sampled_from(["nan", "inf", "-inf"]))
def test_one_nan_or_inf_anywhere_is_found(dtype, seed, row, column, bad):
    weight = random_two_four(seed, 5, 40, dtype)
    weight[row, column // 4 * 4 : column // 4 * 4 + 4] = 0
    weight[row, column] = float(bad)
    with pytest.raises(PatternError) as error:
        pack(weight, "w")
    assert str(error.value) == (
        f"w: row {row}, group {column // 4} holds {bad}. A checkpoint with NaN or inf is not written; go back to the "
        f"last good weights."
    )


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(seed=seeds, row=st.integers(0, 4), group=st.integers(0, 9), missing=st.integers(0, 4))
def test_one_group_with_three_or_four_non_zeros_is_found_anywhere(dtype, seed, row, group, missing):
    weight = random_two_four(seed, 5, 40, dtype)
    crowded = torch.tensor([1.0 if position != missing else -0.0 for position in range(4)], dtype=dtype)
    weight[row, 4 * group : 4 * group + 4] = crowded
    count = 4 if missing == 4 else 3
    assert two_four.first_violation(weight) == (row, group, count)
    with pytest.raises(PatternError, match=f"^w: row {row}, group {group} .* has {count} non-zeros, 2:4 allows 2"):
        pack(weight, "w")
