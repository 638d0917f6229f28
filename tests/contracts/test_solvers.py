"""What every entry of SOLVERS must obey, with every pattern."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import CalibrationError
from hf_adaptive_sparse.patterns import PATTERNS
from hf_adaptive_sparse.solvers import SOLVERS
from tests.solver_cases import (
    by_input_size,
    fixed,
    is_negative_zero,
    layer_error,
    random_inputs,
    random_layer,
    stats_of,
)

every_solver = pytest.mark.parametrize("name", SOLVERS)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
seeds = st.integers(0, 2**31)
SPARSITY = {name: getattr(pattern, "sparsity", 0.5) for name, pattern in PATTERNS.items()}


@every_solver
@every_pattern
@settings(max_examples=5)
@given(seed=seeds, dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_the_weight_has_the_pattern_and_what_is_pruned_is_positive_zero(name, pattern, seed, dtype):
    weight, stats = random_layer(seed, columns=40, dtype=dtype)
    before = weight.clone()
    gram = stats.gram.clone()
    solved, keep = SOLVERS[name](weight, stats, by_input_size(pattern, stats))
    assert solved.dtype == dtype and solved.shape == weight.shape and solved.is_contiguous()
    assert keep.dtype == torch.bool and keep.shape == weight.shape
    assert int((~keep).sum()) == round(SPARSITY[pattern] * weight.numel())
    if pattern != "unstructured":
        assert PATTERNS[pattern].first_violation(solved) is None
    assert (solved[~keep] == 0).all() and not is_negative_zero(solved).any() and solved.isfinite().all()
    assert torch.equal(weight, before) and torch.equal(stats.gram, gram)


@every_solver
@every_pattern
def test_it_is_no_worse_than_the_masked_weight_over_some_layers(name, pattern):
    """Of one layer that is not promised: a sweep chooses greedily, and a later choice may cost more than it saved."""
    errors = {name: 0.0, "zero_fill": 0.0}
    for seed in range(12):
        weight, stats = random_layer(seed, rows=16)
        whole = layer_error(torch.zeros_like(weight), weight, stats).sum()
        for solver in errors:
            solved, _ = SOLVERS[solver](weight, stats, by_input_size(pattern, stats))
            errors[solver] += float(layer_error(solved, weight, stats).sum() / whole)
    assert errors[name] == errors["zero_fill"] if name == "zero_fill" else errors[name] < 0.9 * errors["zero_fill"]


@every_solver
@settings(max_examples=5)
@given(seed=seeds)
def test_the_mask_that_is_given_is_the_mask_that_comes_back(name, seed):
    weight, stats = random_layer(seed)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    solved, found = SOLVERS[name](weight, stats, fixed(keep))
    assert torch.equal(found, keep) and torch.equal(solved != 0, keep)


@every_solver
def test_a_kept_negative_zero_becomes_a_positive_one(name):
    weight, stats = random_layer(0)
    weight = -torch.zeros_like(weight)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    solved, _ = SOLVERS[name](weight, stats, fixed(keep))
    assert is_negative_zero(weight).all() and not is_negative_zero(solved).any()


@every_solver
def test_with_everything_kept_nothing_changes(name):
    weight, stats = random_layer(0)
    solved, _ = SOLVERS[name](weight, stats, fixed(torch.ones_like(weight, dtype=torch.bool)))
    torch.testing.assert_close(solved, weight, rtol=1e-4, atol=1e-4)


@every_solver
@every_pattern
def test_the_size_of_the_inputs_does_not_count(name, pattern):
    weight, stats = random_layer(7)
    larger = replace(stats, squares=stats.squares * 64, gram=stats.gram * 64)
    solved, keep = SOLVERS[name](weight, stats, by_input_size(pattern, stats))
    again, kept = SOLVERS[name](weight, larger, by_input_size(pattern, larger))
    assert torch.equal(keep, kept)
    torch.testing.assert_close(solved, again, rtol=1e-7, atol=1e-7)


@every_solver
@every_pattern
def test_it_repeats_itself_and_rows_may_change_places(name, pattern):
    weight, stats = random_layer(8)
    solved, keep = SOLVERS[name](weight, stats, by_input_size(pattern, stats))
    again, kept = SOLVERS[name](weight, stats, by_input_size(pattern, stats))
    assert torch.equal(solved, again) and torch.equal(keep, kept)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved, kept = SOLVERS[name](weight[order], stats, by_input_size(pattern, stats))
    assert torch.equal(kept, keep[order])
    torch.testing.assert_close(moved, solved[order], rtol=1e-7, atol=1e-7)


def hard_inputs(kind: str) -> torch.Tensor:
    """[tokens, 24]"""
    inputs = random_inputs(9, 24, 200)
    if kind == "dead":
        inputs[:, [1, 8, 9, 10, 11]] = 0.0
    elif kind == "all dead":
        inputs[:] = 0.0
    elif kind == "duplicate":
        inputs[:, 5] = inputs[:, 6]
    elif kind == "massive":
        inputs[:, 2] *= 1000.0
    elif kind == "few tokens":
        inputs = inputs[:5]
    return inputs


@every_solver
@every_pattern
@pytest.mark.parametrize("kind", ["dead", "all dead", "duplicate", "massive", "few tokens"])
def test_hard_inputs_still_give_finite_weights_with_the_exact_count(name, pattern, kind):
    weight = random_layer(9)[0].float()
    stats = stats_of(hard_inputs(kind).float())
    solved, keep = SOLVERS[name](weight, stats, by_input_size(pattern, stats))
    assert solved.isfinite().all() and (solved[~keep] == 0).all()
    assert int((~keep).sum()) == round(SPARSITY[pattern] * weight.numel())
    masked, _ = SOLVERS["zero_fill"](weight, stats, by_input_size(pattern, stats))
    # Undamped: what the outputs on these inputs lose.
    gram = stats.gram.double()
    lost = [((each - weight).double() @ gram * (each - weight)).sum() for each in (solved, masked)]
    assert lost[0] <= lost[1] * (1 + 1e-3) + 1e-6


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "zero_fill"])
def test_a_solver_that_needs_the_gram_matrix_says_so(name):
    weight, stats = random_layer(0)
    stats = replace(stats, gram=None, where="blocks.3.fc")
    with pytest.raises(CalibrationError) as raised:
        SOLVERS[name](weight, stats, fixed(weight > 0))
    assert str(raised.value) == (f"blocks.3.fc: {name} needs the Gram matrix of the inputs, which was not collected.")
