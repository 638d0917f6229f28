"""What every entry of QUANTIZERS must obey."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.patterns import parse_pattern
from hf_adaptive_sparse.quantizers import QUANTIZERS, RTN
from tests.solver_cases import by_input_size, is_negative_zero, random_layer

every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
seeds = st.integers(0, 2**31)
grids = st.builds(RTN, bits=st.sampled_from([4, 8]), group=st.sampled_from([0, 8]), search=st.booleans())


@every_quantizer
@settings(max_examples=15)
@given(
    seed=seeds, rtn=grids, pattern=st.sampled_from(["2:4", "4:8", "unstructured"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)  # fmt: skip
def test_the_result_is_on_the_grid_and_zero_where_it_was_pruned(name, seed, rtn, pattern, dtype):
    weight, stats = random_layer(seed, dtype=dtype)
    keep = by_input_size(pattern, stats)(weight, slice(None))
    weight = torch.where(keep, weight, 0)
    before = weight.clone()
    grid = rtn.fit(weight, keep)
    rounded = QUANTIZERS[name](weight, stats, keep, grid)
    assert rounded.dtype == grid.scales.dtype and rounded.shape == weight.shape
    assert torch.equal(grid.dequantize(grid.codes(rounded)), rounded)
    assert (rounded[~keep] == 0).all() and not is_negative_zero(rounded).any()
    if pattern != "unstructured":
        assert parse_pattern(pattern).first_violation(rounded) is None
    assert torch.equal(weight, before)


@every_quantizer
@settings(max_examples=10)
@given(seed=seeds, rtn=grids)
def test_a_weight_on_the_grid_stays_as_it_is(name, seed, rtn):
    weight, stats = random_layer(seed)
    keep = by_input_size("2:4", stats)(weight, slice(None))
    weight = torch.where(keep, weight, 0)
    grid = rtn.fit(weight)
    weight = grid.round(weight)
    torch.testing.assert_close(QUANTIZERS[name](weight, stats, keep, grid), weight, rtol=1e-12, atol=1e-12)


@every_quantizer
def test_more_bits_lose_less(name):
    weight, stats = random_layer(0, dtype=torch.float32)
    keep = torch.ones_like(weight, dtype=torch.bool)
    inputs_lose = [
        ((QUANTIZERS[name](weight, stats, keep, RTN(bits=bits).fit(weight)) - weight) ** 2 * stats.squares).sum()
        for bits in (4, 8)
    ]
    assert inputs_lose[1] < 0.05 * inputs_lose[0]
