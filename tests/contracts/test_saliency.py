"""What every entry of SALIENCY must obey."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.saliency import SALIENCY

every_score = pytest.mark.parametrize("name", SALIENCY)
seeds = st.integers(0, 2**31)


def random_layer(seed: int) -> tuple[torch.Tensor, None]:
    """A weight with some exact zeros, and its statistics (the scores of today read none)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 16, generator=generator)
    weight[torch.rand(6, 16, generator=generator) < 0.2] = 0.0
    return weight, None


@every_score
@settings(max_examples=25)
@given(seed=seeds)
def test_scores_are_finite_not_negative_and_zero_for_a_zero_weight(name, seed):
    weight, stats = random_layer(seed)
    scores = SALIENCY[name](weight, stats)
    assert scores.shape == weight.shape
    assert scores.isfinite().all() and (scores >= 0).all()
    assert (scores[weight == 0] == 0).all() and (scores[weight != 0] > 0).all()


@every_score
@settings(max_examples=25)
@given(seed=seeds, factor=st.floats(1.01, 100.0))
def test_a_larger_weight_never_scores_less_and_its_sign_does_not_count(name, seed, factor):
    weight, stats = random_layer(seed)
    scores = SALIENCY[name](weight, stats)
    assert torch.equal(scores, SALIENCY[name](-weight, stats))
    assert (SALIENCY[name](weight * factor, stats) >= scores).all()


@every_score
@settings(max_examples=25)
@given(seed=seeds, start=st.integers(0, 15), length=st.integers(1, 16))
def test_some_columns_score_as_they_do_in_the_whole_layer(name, seed, start, length):
    weight, stats = random_layer(seed)
    columns = slice(start, min(start + length, 16))
    some = SALIENCY[name](weight[:, columns], stats, columns)
    assert torch.equal(some, SALIENCY[name](weight, stats)[:, columns])


@every_score
@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_scores_have_at_least_the_precision_of_float32(name, dtype, expected):
    weight, stats = random_layer(0)
    assert SALIENCY[name](weight.to(dtype), stats).dtype == expected


@every_score
@settings(max_examples=25)
@given(seed=seeds)
def test_the_weight_is_read_only_and_scores_carry_no_gradient(name, seed):
    weight, stats = random_layer(seed)
    before = weight.clone()
    scores = SALIENCY[name](weight.requires_grad_(), stats)
    scores.mul_(0).add_(7)  # scores of their own memory: writing to them cannot reach the weight
    assert torch.equal(weight, before) and not scores.requires_grad
