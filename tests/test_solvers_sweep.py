"""Sweeps over the columns, against references that invert anew for every column or block."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import CalibrationError
from hf_adaptive_sparse.quantizers import RTN
from hf_adaptive_sparse.solvers import obs_sweep, pcg_refine, sweep_with_errors, thanos
from hf_adaptive_sparse.stats import LayerStats
from tests.reference import solvers as reference
from tests.solver_cases import by_input_size, by_pruning_error, fixed, hessian, layer_error, random_inputs, random_layer

seeds = st.integers(0, 2**31)
patterns = st.sampled_from(["2:4", "4:8", "1:4", "unstructured"])


@settings(max_examples=15)
@given(seed=seeds, pattern=patterns, leaf=st.integers(1, 9))
def test_obs_sweep_matches_a_fresh_inverse_for_every_column(seed, pattern, leaf):
    weight, stats = random_layer(seed)
    solved, keep = obs_sweep(weight, stats, by_pruning_error(pattern, stats), leaf=leaf)
    chooser = by_pruning_error(pattern, stats)
    expected, expected_keep = reference.obs_sweep(weight, hessian(stats), chooser, getattr(chooser, "width", 128))
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(solved, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [16, 32])
def test_obs_sweep_with_the_settings_of_the_paper_is_sparsegpt(block):
    """Damping 0.01 of the mean diagonal, unscaled; blocks; the published threshold; float64."""
    weight, inputs = random_layer(3, rows=8, columns=64)[0], random_inputs(3, 64, 300)
    h = inputs.T @ inputs / len(inputs)
    h += 0.01 * h.diagonal().mean() * torch.eye(64, dtype=h.dtype)
    factors = torch.linalg.cholesky(torch.linalg.inv(h), upper=True).diagonal()

    def choose_mask(weights, columns):
        return reference.sparsegpt_mask(weights, factors[columns], 0.5)

    choose_mask.width = block
    stats = LayerStats(tokens=1, squares=h.diagonal().clone(), gram=h, damping=0.0)
    solved, keep = obs_sweep(weight, stats, choose_mask)
    expected, expected_keep = reference.obs_sweep(weight, h, choose_mask, block)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(solved, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=10)
@given(seed=seeds, bits=st.sampled_from([4, 8]), group=st.sampled_from([0, 8]), prune=st.booleans())
def test_rounding_in_the_sweep_matches_the_reference(seed, bits, group, prune):
    weight, stats = random_layer(seed)
    grid = RTN(bits=bits, group=group).fit(weight)
    everything = fixed(torch.ones_like(weight, dtype=torch.bool))
    solved, keep = obs_sweep(weight, stats, by_pruning_error("2:4", stats) if prune else everything, quantizer=grid)
    expected, expected_keep = reference.obs_sweep(
        weight, hessian(stats), by_pruning_error("2:4", stats) if prune else everything, 4,
        lambda column, j: grid.round(column[:, None], slice(j, j + 1))[:, 0],
    )  # fmt: skip
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(solved, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=15)
@given(seed=seeds, pattern=patterns, block=st.sampled_from([8, 16, 24, 128]))
def test_thanos_matches_the_best_change_for_every_row_and_block(seed, pattern, block):
    weight, stats = random_layer(seed)
    solved, keep = thanos(weight, stats, by_input_size(pattern, stats), block=block)
    expected, expected_keep = reference.thanos(weight, hessian(stats), by_input_size(pattern, stats), block)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(solved, expected, rtol=1e-8, atol=1e-8)


def test_thanos_removes_rows_of_different_counts_in_several_chunks(monkeypatch):
    weight, stats = random_layer(5, rows=9)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < torch.arange(9)[:, None] / 8
    expected, _ = reference.thanos(weight, hessian(stats), fixed(keep), 12)
    # The package has a function of the name of the module.
    monkeypatch.setattr(import_module("hf_adaptive_sparse.solvers.thanos"), "_BATCH_NUMEL", 300)
    solved, _ = thanos(weight, stats, fixed(keep), block=12)
    torch.testing.assert_close(solved, expected, rtol=1e-8, atol=1e-8)


def test_thanos_names_the_row_whose_weights_cannot_be_removed_at_once():
    weight, stats = random_layer(2)
    stats = replace(stats, where="model.layers.0.mlp.down_proj")
    stats.scaled.upper[:, 9] = 0.0  # what rounding makes of an input that others determine
    keep = torch.ones_like(weight, dtype=torch.bool)
    keep[4, 8:12] = False
    with pytest.raises(CalibrationError) as raised:
        thanos(weight, stats, lambda _, columns: keep[:, columns])
    assert str(raised.value) == (
        "model.layers.0.mlp.down_proj: thanos cannot remove the weights of inputs 0 to 23 of row 4 at once, the inputs "
        "are too alike for damping 0.01. Raise damping, or calibrate on more than 200 tokens."
    )


@settings(max_examples=10)
@given(seed=seeds, pattern=st.sampled_from(["2:4", "4:8"]))
def test_thanos_with_one_block_is_the_best_that_its_mask_allows(seed, pattern):
    weight, stats = random_layer(seed)
    solved, keep = thanos(weight, stats, by_input_size(pattern, stats), block=24)
    best = reference.best_weights(weight, hessian(stats), keep)
    torch.testing.assert_close(solved, best, rtol=1e-7, atol=1e-7)


def test_choosers_are_asked_unit_by_unit_with_weights_that_nobody_changes_later():
    weight, stats = random_layer(0, columns=300)
    for chooser, slices in (
        (by_pruning_error("2:4", stats), [(start, start + 4) for start in range(0, 300, 4)]),
        (by_pruning_error("unstructured", stats), [(0, 128), (128, 256), (256, 300)]),
    ):
        obs_sweep(weight, stats, chooser)
        assert chooser.slices == slices
        torch.testing.assert_close(chooser.seen[0], weight[:, : slices[0][1]])
        assert not torch.allclose(chooser.seen[1], weight[:, slice(*slices[1])])  # already corrected
        again = by_pruning_error(chooser.pattern.name, stats)
        obs_sweep(weight, stats, again)
        assert all(torch.equal(one, other) for one, other in zip(chooser.seen, again.seen, strict=True))


@pytest.mark.parametrize("solve", [obs_sweep, thanos])
def test_weights_of_dead_inputs_are_pruned_first_and_end_as_zero(solve):
    inputs = random_inputs(1, 24, 100)
    inputs[:, [3, 4, 17]] = 0.0
    weight, _ = random_layer(1)
    weight[:, [3, 4, 17]] = 100.0
    gram = inputs.T @ inputs
    stats = LayerStats(tokens=100, squares=gram.diagonal().clone(), gram=gram)
    solved, keep = solve(weight, stats, by_pruning_error("2:4", stats))
    assert (keep.view(6, 6, 4).sum(-1) == 2).all()
    assert not keep[:, [3, 4, 17]].any() and (solved[:, [3, 4, 17]] == 0).all()


@settings(max_examples=10)
@given(seed=seeds, solve=st.sampled_from([obs_sweep, thanos]), pattern=st.sampled_from(["2:4", "4:8"]))
def test_stacked_matrices_are_pruned_as_each_by_itself(seed, solve, pattern):
    weight, stats = random_layer(seed, rows=10)
    stacked, keep = solve(weight, stats, by_pruning_error(pattern, stats))
    for rows in (slice(0, 3), slice(3, 10)):
        alone, alone_keep = solve(weight[rows], stats, by_pruning_error(pattern, stats))
        assert torch.equal(alone_keep, keep[rows])
        torch.testing.assert_close(alone, stacked[rows], rtol=1e-9, atol=1e-9)


@settings(max_examples=10)
@given(seed=seeds, pattern=patterns)
def test_refinement_to_the_end_is_never_worse_than_a_sweep(seed, pattern):
    weight, stats = random_layer(seed)
    for solve in (obs_sweep, thanos):
        solved, keep = solve(weight, stats, by_pruning_error(pattern, stats))
        refined = pcg_refine(weight, stats, keep, solved, iterations=100)
        assert (layer_error(refined, weight, stats) <= layer_error(solved, weight, stats) * (1 + 1e-9)).all()


@settings(max_examples=15)
@given(seed=seeds, pattern=patterns)
def test_what_removals_cost_one_by_one_is_the_error_of_the_outputs(seed, pattern):
    weight, stats = random_layer(seed, columns=160)  # more than one tile
    solved, keep, errors = sweep_with_errors(weight, stats, by_pruning_error(pattern, stats))
    plain, plain_keep = obs_sweep(weight, stats, by_pruning_error(pattern, stats))
    assert torch.equal(solved, plain) and torch.equal(keep, plain_keep)
    change = solved - weight
    torch.testing.assert_close(errors, ((change @ stats.gram) * change).sum(dim=1), rtol=1e-8, atol=1e-8)


def test_float32_is_close_to_float64_on_a_layer_of_several_blocks():
    weight, stats = random_layer(2, rows=32, columns=300, tokens=2000)
    single = LayerStats(tokens=stats.tokens, squares=stats.squares.float(), gram=stats.gram.float())
    keep = by_input_size("2:4", stats)(weight, slice(None))
    exact, _ = obs_sweep(weight, stats, fixed(keep))
    solved, _ = obs_sweep(weight.float(), single, fixed(keep))
    assert solved.dtype == torch.float32
    torch.testing.assert_close(solved.double(), exact, rtol=1e-3, atol=1e-3)
