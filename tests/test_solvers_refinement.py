"""Solvers that iterate: conjugate gradients on a fixed mask, ADMM, FISTA; and how near they come to the best."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import CalibrationError, ConfigError
from hf_adaptive_sparse.solvers import (
    SOLVERS,
    admm,
    fista,
    obs_sweep,
    pcg_refine,
    zero_fill,
)
from hf_adaptive_sparse.solvers.fista import _fista_steps
from tests.layers import random_inputs, stats_of
from tests.reference import solvers as reference
from tests.solver_cases import (
    by_input_size,
    by_pruning_error,
    fixed,
    hessian,
    is_negative_zero,
    layer_error,
    random_layer,
)

seeds = st.integers(0, 2**31)
patterns = st.sampled_from(["2:4", "4:8", "unstructured"])


def random_keep(seed: int, shape: tuple[int, ...], part: float = 0.5) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < part


# Conjugate gradients


@settings(max_examples=20)
@given(seed=seeds, part=st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_pcg_run_to_the_end_solves_the_normal_equations_on_the_support(seed, part):
    weight, stats = random_layer(seed)
    keep = random_keep(seed, weight.shape, part)
    refined = pcg_refine(weight, stats, keep, iterations=200)
    torch.testing.assert_close(refined, reference.best_weights(weight, hessian(stats), keep), rtol=1e-5, atol=1e-5)


@settings(max_examples=20)
@given(seed=seeds, iterations=st.integers(1, 12))
def test_pcg_lowers_the_error_of_every_row_unless_it_is_the_best(seed, iterations):
    weight, stats = random_layer(seed)
    keep = random_keep(seed, weight.shape)
    keep[:, 0], keep[:, 1] = True, False  # so that there is something to win
    masked = weight * keep
    refined = pcg_refine(weight, stats, keep, iterations=iterations)
    assert (layer_error(refined, weight, stats) < layer_error(masked, weight, stats)).all()
    assert torch.equal(refined != 0, keep)


@settings(max_examples=20)
@given(seed=seeds, dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_pcg_never_raises_the_error_in_any_dtype_nor_from_the_best_weights(seed, dtype):
    weight, stats = random_layer(seed, dtype=dtype)
    keep = random_keep(seed, weight.shape)
    best = reference.best_weights(weight.double(), hessian(stats), keep).to(dtype)
    for start in (best, weight * keep):
        refined = pcg_refine(weight, stats, keep, start)
        assert refined.dtype == dtype
        assert (layer_error(refined, weight, stats) <= layer_error(start, weight, stats) * (1 + 1e-5) + 1e-9).all()


def test_pcg_begins_where_it_is_told():
    weight, stats = random_layer(0)
    keep = random_keep(0, weight.shape)
    best = reference.best_weights(weight, hessian(stats), keep)
    one = pcg_refine(weight, stats, keep, best, iterations=1)
    torch.testing.assert_close(one, best, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(pcg_refine(weight, stats, keep, iterations=1), best, rtol=1e-2)
    # Entries of the start outside the mask do not count.
    assert torch.equal(pcg_refine(weight, stats, keep, best + ~keep, iterations=1), one)


def test_pcg_stops_when_the_residual_of_the_kept_weights_is_small(monkeypatch):
    weight, stats = random_layer(0)
    keep = random_keep(0, weight.shape)
    products = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: products.append(1) or matmul(a, b))
    pcg_refine(weight, stats, keep, iterations=10_000)
    assert len(products) < 60  # a residual that is not masked never becomes small


def test_pcg_leaves_rows_without_weights_and_all_kept_rows_alone():
    weight, stats = random_layer(0)
    keep = torch.ones_like(weight, dtype=torch.bool)
    keep[0] = False
    refined = pcg_refine(weight, stats, keep, iterations=50)
    assert (refined[0] == 0).all() and not is_negative_zero(refined).any()
    assert torch.equal(refined[1:], weight[1:])


# ADMM


@pytest.mark.parametrize("steps", [2, 3, 6, 12])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_admm_is_the_published_iteration(steps, pattern):
    weight, stats = random_layer(4, rows=200, columns=32)
    chooser, scale = by_input_size(pattern, stats), stats.scaled.scale
    expected, expected_keep = reference.alps(
        weight * scale, stats.scaled.matrix, lambda scaled: chooser(scaled / scale, slice(None)), 0.1, steps
    )
    solved, keep = admm(weight, stats, by_input_size(pattern, stats), iterations=steps, refine=0)
    torch.testing.assert_close(solved * scale, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(keep, expected != 0) and (steps % 3 or torch.equal(keep, expected_keep))


@settings(max_examples=10)
@given(seed=seeds, pattern=patterns)
def test_admm_finds_better_masks_than_the_sweep_on_the_whole(seed, pattern):
    """One layer of 24 rows: the sum of their errors."""
    weight, stats = random_layer(seed, rows=24)
    swept, keep = obs_sweep(weight, stats, by_pruning_error(pattern, stats))
    swept = pcg_refine(weight, stats, keep, swept, iterations=50)
    solved, _ = admm(weight, stats, by_input_size(pattern, stats), refine=50)
    assert layer_error(solved, weight, stats).sum() < layer_error(swept, weight, stats).sum()


def test_admm_rests_where_the_mask_cannot_change():
    weight, stats = random_layer(0)
    for keep in (torch.ones_like(weight, dtype=torch.bool), random_keep(1, weight.shape)):
        asked: list[slice] = []

        def choose_mask(_, columns, keep=keep, asked=asked):
            asked.append(columns)
            return keep[:, columns]

        solved, _ = admm(weight, stats, choose_mask, refine=100)
        assert len(asked) < 20
        best = reference.best_weights(weight, hessian(stats), keep)
        torch.testing.assert_close(solved, best, rtol=1e-4, atol=1e-4)


def test_admm_takes_a_support_that_hardly_changes_as_it_is():
    weight, stats = random_layer(0, rows=200, columns=40)
    asked = []

    def choose_mask(_, columns):
        asked.append(columns)
        keep = torch.ones_like(weight, dtype=torch.bool)
        keep[0, len(asked) // 3 % 2] = False  # two of 8000 change between any two looks
        return keep

    admm(weight, stats, choose_mask)
    assert len(asked) == 31


def test_admm_with_a_first_penalty_that_is_too_large_begins_again_with_less():
    weight, stats = random_layer(0, rows=12)
    stiff, keep = admm(weight, stats, by_input_size("2:4", stats), rho=1e4)
    _, first = zero_fill(weight, stats, by_input_size("2:4", stats))
    assert not torch.equal(keep, first)
    best_on_first = reference.best_weights(weight, hessian(stats), first)
    assert layer_error(stiff, weight, stats).sum() < layer_error(best_on_first, weight, stats).sum()
    # As if the last of its penalties had been the first.
    others = [admm(weight, stats, by_input_size("2:4", stats), rho=1e4 / 5**power)[0] for power in range(1, 10)]
    assert any(torch.allclose(stiff, other, rtol=1e-9) for other in others)


# FISTA


@settings(max_examples=15)
@given(seed=seeds, penalty=st.floats(1e-4, 1.0), steps=st.integers(1, 25))
def test_the_steps_of_fista_are_the_published_ones(seed, penalty, steps):
    weight, stats = random_layer(seed)
    matrix, start = stats.scaled.matrix, weight * random_keep(seed, weight.shape)
    length = 1.0 / torch.linalg.eigvalsh(matrix)[-1].item()
    found = _fista_steps(start, weight, matrix, penalty, length, steps)
    expected = reference.fista_steps(start, weight @ matrix, matrix, penalty, steps)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=10)
@given(seed=seeds, pattern=patterns)
def test_fista_does_not_worsen_the_solution_that_it_starts_from(seed, pattern):
    weight, stats = random_layer(seed)
    start, _ = obs_sweep(weight, stats, by_pruning_error(pattern, stats))
    # An unstructured mask of a block has the count of the block, as the whole matrix here.
    solved, _ = fista(weight, stats, by_input_size(pattern, stats), start=start, debias=0)
    limit = layer_error(start, weight, stats).sum()
    assert layer_error(solved, weight, stats).sum() <= limit * (1 + 1e-9)
    debiased, _ = fista(weight, stats, by_input_size(pattern, stats), start=start)
    assert layer_error(debiased, weight, stats).sum() < limit


@settings(max_examples=8)
@given(seed=seeds, pattern=patterns, share=st.sampled_from([0.1, 0.3, 0.8]))
def test_fista_is_the_published_bisection(seed, pattern, share):
    weight, stats = random_layer(seed)
    chooser, scale = by_input_size(pattern, stats), stats.scaled.scale
    expected = reference.fista(
        weight * scale, stats.scaled.matrix, lambda scaled: chooser(scaled / scale, slice(None)), share, rounds=6
    )
    solved, _ = fista(weight, stats, chooser, rounding_share=share, rounds=6, debias=0)
    torch.testing.assert_close(solved * scale, expected, rtol=1e-8, atol=1e-8)


def test_places_that_the_penalty_leaves_empty_go_to_no_dead_input():
    inputs = random_inputs(1, 24, 100)
    inputs[:, ::2] = 0.0
    weight, _ = random_layer(1)
    stats = stats_of(inputs)
    _, keep = fista(weight, stats, by_input_size("2:4", stats))
    assert torch.equal(keep, (torch.arange(24) % 2 == 1).expand_as(keep))


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_fewer_tokens_than_features_and_features_that_repeat_leave_finite_weights(name, pattern):
    inputs = random_inputs(2, 24, 7)
    inputs[:, 1] = inputs[:, 0]
    weight, stats = random_layer(2, dtype=torch.float32)[0], stats_of(inputs.float())
    solved, keep = SOLVERS[name](weight, stats, by_input_size(pattern, stats))
    assert solved.isfinite().all() and (solved[~keep] == 0).all()
    refined = pcg_refine(weight, stats, keep, solved)
    assert refined.isfinite().all() and (refined[~keep] == 0).all()
    assert stats.scaled.rung == "damping 0.01"


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"zero_fill"}))
def test_fewer_tokens_than_features_without_damping_are_refused_by_every_solver_that_inverts(name):
    stats = replace(stats_of(random_inputs(3, 24, 7)), damping=0.0, where="model.layers.1.mlp.down_proj")
    with pytest.raises(CalibrationError) as raised:
        SOLVERS[name](random_layer(3)[0], stats, by_input_size("2:4", stats))
    assert str(raised.value) == (
        "model.layers.1.mlp.down_proj: cannot factor the Gram matrix: rank 7 of 24 (7 tokens, damping=0.0). Calibrate "
        "on at least 24 tokens, or set damping=0.01."
    )


def test_fista_refuses_a_share_that_is_none():
    weight, stats = random_layer(0)
    with pytest.raises(ConfigError) as raised:
        fista(weight, stats, by_input_size("2:4", stats), rounding_share=1.0)
    assert str(raised.value) == "rounding_share is a part of the error, in (0, 1), got 1.0. Try 0.3."


# The best of all masks


@settings(max_examples=8)
@given(seed=seeds)
@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8)])
def test_no_solver_beats_the_best_of_all_masks_and_the_good_ones_come_near(n, m, seed):
    weight, stats = random_layer(seed, rows=12, columns=8)
    masks = reference.all_masks(8, n, m)
    least = torch.tensor([reference.least_error(row, hessian(stats), masks) for row in weight])
    for name, solve in SOLVERS.items():
        chooser = by_pruning_error(f"{n}:{m}", stats) if name == "obs_sweep" else by_input_size(f"{n}:{m}", stats)
        solved, keep = solve(weight, stats, chooser)
        if name != "zero_fill":
            solved = pcg_refine(weight, stats, keep, solved, iterations=30)
        error = layer_error(solved, weight, stats)
        assert (error >= least * (1 - 1e-6)).all(), name
        if name == "admm":
            assert error.sum() <= 3.0 * least.sum()


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "zero_fill"])
def test_statistics_of_another_layer_are_refused(name):
    weight, stats = random_layer(0)
    with pytest.raises(CalibrationError) as raised:
        SOLVERS[name](weight[:, :20], replace(stats, where="blocks.3.fc"), fixed(weight > 0))
    assert str(raised.value) == (
        f"blocks.3.fc: {name} got a weight of shape [6, 20] and a Gram matrix of shape [24, 24]. Both must have the "
        "same input features: pass the statistics of this layer."
    )
