"""What every entry of PATTERNS must obey."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.patterns import PATTERNS, parse_pattern

SPARSITY = {"unstructured": 0.6}  # asked for; n:m patterns bring their own
WIDTH = 24  # a multiple of every m in PATTERNS

every_pattern = pytest.mark.parametrize("name", PATTERNS)
seeds = st.integers(0, 2**31)


def keep_mask(name: str, scores: torch.Tensor) -> torch.Tensor:
    return PATTERNS[name].keep_mask(scores, SPARSITY.get(name, getattr(PATTERNS[name], "sparsity", None)))


def random_scores(seed: int, distinct: int = 10**6) -> torch.Tensor:
    return torch.randint(distinct, (5, WIDTH), generator=torch.Generator().manual_seed(seed)).float()


@every_pattern
def test_its_key_is_its_name_and_its_name_finds_it(name):
    assert PATTERNS[name].name == name
    assert parse_pattern(name) == PATTERNS[name]


@every_pattern
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_keep_is_boolean_of_the_same_shape_for_every_dtype(name, dtype):
    scores = random_scores(0, distinct=100)
    keep = keep_mask(name, scores.to(dtype))
    assert keep.dtype == torch.bool and keep.shape == scores.shape
    assert torch.equal(keep, keep_mask(name, scores))  # 0..99 is exact in all of them


@every_pattern
@settings(max_examples=25)
@given(seed=seeds, distinct=st.integers(1, 50))
def test_the_fraction_of_zeros_is_exactly_the_sparsity(name, seed, distinct):
    keep = keep_mask(name, random_scores(seed, distinct))
    asked = SPARSITY.get(name, getattr(PATTERNS[name], "sparsity", None))
    assert int((~keep).sum()) == round(asked * keep.numel())


@every_pattern
@settings(max_examples=25)
@given(seed=seeds)
def test_a_kept_score_that_grows_stays_kept_and_a_dropped_one_that_shrinks_stays_dropped(name, seed):
    scores = random_scores(seed)
    keep = keep_mask(name, scores)
    assert torch.equal(keep, keep_mask(name, torch.where(keep, scores * 2 + 1, scores / 2)))


@every_pattern
@settings(max_examples=25)
@given(seed=seeds, exponent=st.integers(-20, 20))
def test_the_unit_of_the_scores_does_not_matter(name, seed, exponent):
    scores = random_scores(seed, distinct=30)
    assert torch.equal(keep_mask(name, scores), keep_mask(name, scores * 2.0**exponent))


@every_pattern
@settings(max_examples=25)
@given(seed=seeds)
def test_scores_are_read_only_and_their_memory_layout_does_not_matter(name, seed):
    scores = random_scores(seed, distinct=30)
    before = scores.clone()
    keep = keep_mask(name, scores)
    assert torch.equal(scores, before)
    transposed = scores.t().contiguous().t()
    assert not transposed.is_contiguous()
    assert torch.equal(keep, keep_mask(name, transposed))


@every_pattern
def test_a_nan_is_kept_before_any_finite_score(name):
    scores = random_scores(1)
    scores[::2, ::12] = math.nan
    keep = keep_mask(name, scores)
    assert keep[scores.isnan()].all()


@every_pattern
def test_no_gradient_flows_through_a_mask(name):
    assert not keep_mask(name, random_scores(2).requires_grad_()).requires_grad
