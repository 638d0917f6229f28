"""What every entry of FORMATS must obey."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import FormatError, PatternError
from hf_adaptive_sparse.formats import FORMATS, value_codes
from hf_adaptive_sparse.patterns import parse_pattern

every_format = pytest.mark.parametrize("name", FORMATS)
seeds = st.integers(0, 2**31)
WIDTH = 48


def sparse_weight(name: str, seed: int, dtype: torch.dtype = torch.float32, rows: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    keep = parse_pattern(name).keep_mask(torch.rand(rows, WIDTH, generator=generator))
    emptied = torch.rand(rows, WIDTH, generator=generator) < 0.2  # so that groups have fewer than they may
    return torch.where(keep & ~emptied, weight, 0)


@every_format
def test_its_key_is_the_name_of_a_pattern(name):
    assert parse_pattern(name).name == name


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=25)
@given(seed=seeds)
def test_nothing_is_lost(name, dtype, seed):
    weight = sparse_weight(name, seed, dtype)
    tensors = FORMATS[name].pack(weight)
    restored = FORMATS[name].unpack(*tensors)
    assert restored.dtype == weight.dtype and torch.equal(restored, weight)


@every_format
@settings(max_examples=25)
@given(seed=seeds)
def test_packing_leaves_its_input_alone_and_repeats_itself(name, seed):
    weight = sparse_weight(name, seed)
    before = weight.clone()
    first, second = FORMATS[name].pack(weight), FORMATS[name].pack(weight)
    assert torch.equal(weight, before)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@every_format
@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=15)
@given(seed=seeds, groups=st.sampled_from([1, 3]))
def test_values_on_a_grid_can_be_stored_as_codes_and_nothing_is_lost(name, bits, seed, groups):
    scales = 0.1 + torch.rand(6, groups, generator=torch.Generator().manual_seed(seed))
    codes = sparse_weight(name, seed).mul(2 ** (bits - 2)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    weight = (codes.unflatten(1, (groups, -1)) * scales.unsqueeze(-1)).flatten(1).to(torch.bfloat16)
    values, *positions = FORMATS[name].pack(weight)
    stored = value_codes.encode(values, scales, bits, (torch.bfloat16,))
    assert stored.nbytes == values.numel() * bits / 8 and stored.is_contiguous()
    assert torch.equal(FORMATS[name].unpack(value_codes.decode(stored, scales, (torch.bfloat16,)), *positions), weight)


@every_format
def test_there_is_a_name_for_every_tensor(name):
    assert len(FORMATS[name].pack(sparse_weight(name, 0))) == len(set(FORMATS[name].suffixes))


@every_format
@settings(max_examples=25)
@given(seed=seeds)
def test_it_is_smaller_and_contiguous(name, seed):
    weight = sparse_weight(name, seed, torch.bfloat16)
    tensors = FORMATS[name].pack(weight)
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert sum(tensor.nbytes for tensor in tensors) < 0.75 * weight.nbytes


@every_format
@settings(max_examples=25)
@given(seed=seeds)
def test_what_was_packed_is_valid(name, seed):
    FORMATS[name].validate(*FORMATS[name].pack(sparse_weight(name, seed)), where="layer")


@every_format
@settings(max_examples=25)
@given(seed=seeds, row=st.integers(0, 5))
def test_a_weight_without_the_pattern_is_refused_and_the_layer_named(name, seed, row):
    weight = sparse_weight(name, seed)
    weight[row] = 1.0
    with pytest.raises(PatternError, match=rf"model\.layer: row {row}, group 0 .* has 4 non-zeros"):
        FORMATS[name].pack(weight, where="model.layer")


@every_format
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(name, value):
    weight = sparse_weight(name, 0)
    weight[3, :4] = torch.tensor([0.0, value, 0.0, 0.0])
    with pytest.raises(PatternError, match=r"layer: row 3, group 0 holds"):
        FORMATS[name].pack(weight, where="layer")


@every_format
@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_other_shapes_and_dtypes_are_not_valid(name, change):
    tensors = list(FORMATS[name].pack(sparse_weight(name, 0)))
    for index in range(len(tensors)):
        wrong = list(tensors)
        wrong[index] = wrong[index][:-1] if change == "shape" else wrong[index].to(torch.int64)
        with pytest.raises(FormatError, match="^layer\\."):
            FORMATS[name].validate(*wrong, where="layer")
