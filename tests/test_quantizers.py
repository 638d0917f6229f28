"""Grids and rounding, against numbers rounded one at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.quantizers import RTN, Grid, gptq, round_to_nearest
from hf_adaptive_sparse.solvers import obs_sweep
from tests.reference import quantizers as reference
from tests.solver_cases import by_pruning_error, is_negative_zero, layer_error, random_layer

seeds = st.integers(0, 2**31)
all_bits = st.sampled_from([4, 8])
all_groups = st.sampled_from([0, 1, 4, 12])


def sparse_weight(seed: int) -> torch.Tensor:
    """[5, 24] float64 with a row and a group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 24, generator=generator, dtype=torch.float64)
    weight[torch.rand(5, 24, generator=generator) < 0.5] = 0.0
    weight[2], weight[3, :4] = 0.0, 0.0
    return weight


@settings(max_examples=30)
@given(seed=seeds, bits=all_bits, group=all_groups)
def test_codes_and_scales_match_numbers_rounded_one_at_a_time(seed, bits, group):
    weight = sparse_weight(seed)
    grid = RTN(bits=bits, group=group).fit(weight)
    codes, scales = reference.codes(weight.tolist(), bits, group)
    assert grid.codes(weight).tolist() == codes
    torch.testing.assert_close(grid.scales, torch.tensor(scales, dtype=torch.float64))
    assert grid.codes(weight).dtype == torch.int8


@settings(max_examples=30)
@given(seed=seeds, bits=all_bits, group=all_groups, search=st.booleans())
def test_rounded_values_are_the_codes_put_back_to_the_last_bit_and_round_to_themselves(seed, bits, group, search):
    weight = sparse_weight(seed).float()
    grid = RTN(bits=bits, group=group, search=search).fit(weight)
    codes, rounded = grid.codes(weight), grid.round(weight)
    assert torch.equal(grid.dequantize(codes), rounded) and rounded.dtype == torch.float32
    assert torch.equal(grid.codes(rounded), codes) and torch.equal(grid.round(rounded), rounded)
    assert codes.abs().max() <= grid.largest == 2 ** (bits - 1) - 1
    assert (rounded[weight == 0] == 0).all() and not is_negative_zero(rounded).any()


@settings(max_examples=20)
@given(seed=seeds, group=all_groups, start=st.integers(0, 23), length=st.integers(1, 24))
def test_some_columns_are_rounded_as_they_are_in_the_whole_layer(seed, group, start, length):
    weight = sparse_weight(seed)
    grid = RTN(bits=4, group=group).fit(weight)
    columns = slice(start, min(start + length, 24))
    assert torch.equal(grid.round(weight[:, columns], columns), grid.round(weight)[:, columns])


@settings(max_examples=20)
@given(seed=seeds, bits=all_bits, group=all_groups)
def test_without_clipping_no_weight_moves_further_than_half_a_step(seed, bits, group):
    weight = sparse_weight(seed)
    grid = RTN(bits=bits, group=group).fit(weight)
    steps = grid.scales.repeat_interleave(group or 24, dim=1)
    assert ((grid.round(weight) - weight).abs() <= steps / 2 * (1 + 1e-9)).all()


@settings(max_examples=20)
@given(seed=seeds, bits=all_bits, group=all_groups)
def test_the_search_lowers_the_squared_error_of_every_group(seed, bits, group):
    weight = sparse_weight(seed)
    plain, searched = (RTN(bits=bits, group=group, search=search).fit(weight) for search in (False, True))
    errors = [(grid.round(weight) - weight).square().view(5, -1, group or 24).sum(-1) for grid in (plain, searched)]
    assert (errors[1] <= errors[0]).all()
    assert (searched.scales > 0).all()


def test_the_search_clips_an_outlier_at_four_bits():
    weight = torch.cat([torch.linspace(-1.0, 1.0, 400), torch.tensor([2.0])])[None]
    plain, searched = (RTN(bits=4, search=search).fit(weight) for search in (False, True))
    assert searched.scales < 0.9 * plain.scales
    assert (searched.round(weight) - weight).square().sum() < 0.9 * (plain.round(weight) - weight).square().sum()


def test_only_kept_weights_are_fitted():
    weight = torch.tensor([[100.0, 1.0, -2.0, 0.5]])
    keep = torch.tensor([[False, True, True, True]])
    torch.testing.assert_close(RTN(bits=8).fit(weight, keep).scales, torch.tensor([[2.0 / 127]]))
    torch.testing.assert_close(RTN(bits=8).fit(weight).scales, torch.tensor([[100.0 / 127]]))


def test_what_lies_outside_a_grid_goes_to_its_end():
    grid = Grid(torch.ones(1, 1), bits=4)
    assert grid.codes(torch.tensor([[100.0, -100.0, 6.5, 7.5, -0.4]])).tolist() == [[7, -7, 6, 7, 0]]


@settings(max_examples=10)
@given(seed=seeds, bits=all_bits, group=st.sampled_from([0, 12]))
def test_joint_pruning_and_rounding_gives_a_pattern_on_the_grid(seed, bits, group):
    weight, stats = random_layer(seed)
    grid = RTN(bits=bits, group=group).fit(weight)
    solved, keep = obs_sweep(weight, stats, by_pruning_error("2:4", stats), quantizer=grid)
    assert torch.equal(grid.dequantize(grid.codes(solved)), solved)
    assert (keep.view(6, 6, 4).sum(-1) == 2).all() and (solved[~keep] == 0).all()


def test_rounding_in_the_sweep_loses_less_than_rounding_one_by_one():
    """Of 40 random layers at 4 bits; on one layer either may be better."""
    lost = {"rtn": 0.0, "gptq": 0.0, "joint": 0.0, "one after the other": 0.0}
    for seed in range(40):
        weight, stats = random_layer(seed)
        everything = torch.ones_like(weight, dtype=torch.bool)
        grid = RTN(bits=4).fit(weight)
        pruned, keep = obs_sweep(weight, stats, by_pruning_error("2:4", stats))
        found = {
            "rtn": round_to_nearest(weight, stats, everything, grid),
            "gptq": gptq(weight, stats, everything, grid),
            "joint": obs_sweep(weight, stats, by_pruning_error("2:4", stats), quantizer=grid)[0],
            "one after the other": round_to_nearest(pruned, stats, keep, grid),
        }
        for name, each in found.items():
            lost[name] += float(layer_error(each, weight, stats).sum() / layer_error(0 * weight, weight, stats).sum())
    assert lost["gptq"] < 0.7 * lost["rtn"]
    assert lost["joint"] < 0.95 * lost["one after the other"]


def test_gptq_calls_the_sweep_that_it_is_given():
    weight, stats = random_layer(0)
    keep, grid = weight > 0, RTN(bits=4).fit(weight)
    calls = []

    def sweep(weight, stats, choose_mask, *, quantizer):
        calls.append(quantizer)
        return obs_sweep(weight, stats, choose_mask, quantizer=quantizer, leaf=1)

    found = gptq(weight, stats, keep, grid, sweep)
    assert calls == [grid]
    torch.testing.assert_close(found, gptq(weight, stats, keep, grid))


@pytest.mark.parametrize(
    "settings_of, message",
    [
        ({"bits": 3}, "weights are rounded to 4 or 8 bits, got bits=3."),
        (
            {"group": -1},
            "group is how many inputs share a scale, got -1. For one scale per output channel write 0.",
        ),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings_of, message):
    with pytest.raises(ConfigError) as raised:
        RTN(**settings_of)
    assert str(raised.value) == message


def test_groups_that_do_not_fill_the_rows_are_refused():
    with pytest.raises(ConfigError) as raised:
        RTN(group=10).fit(torch.ones(3, 24))
    assert str(raised.value) == (
        "groups of 10 inputs need the input features to be a multiple of 10, got 24 in a [3, 24] weight. Use a group "
        "that divides it, or 0."
    )
