"""What sets one score apart from another; what all share is in contracts/test_saliency.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import CalibrationError
from hf_adaptive_sparse.patterns import NMPattern
from hf_adaptive_sparse.saliency import isc_score, obs_score, ria_score, taylor_score, wanda_score
from tests.layers import random_inputs, random_weight, stats_of

seeds = st.integers(0, 2**31)


@settings(max_examples=20)
@given(seed=seeds)
def test_the_obs_score_is_the_least_error_after_the_columns_to_the_right_make_up_for_the_weight(seed):
    """Solved as a least squares problem, without any inverse of a Gram matrix."""
    inputs, weight = random_inputs(seed, features=6).double(), random_weight(seed, rows=1, features=6)
    damping = 0.01
    # Damping is a part of each input's own energy: as if every input had that many tokens of its own.
    rows = torch.cat([inputs, (damping * inputs.square().sum(0)).sqrt().diag()])
    scores = obs_score(weight, stats_of(inputs, damping=damping))[0]
    for column in range(6):
        lost = rows[:, column : column + 1] * weight[0, column].double()
        others = rows[:, column + 1 :]
        left = lost - others @ torch.linalg.lstsq(others, lost).solution if others.shape[1] else lost
        torch.testing.assert_close(scores[column].double(), left.square().sum() / len(inputs), rtol=1e-4, atol=1e-12)


@settings(max_examples=20)
@given(seed=seeds)
def test_isc_lies_between_one_and_two_times_the_square_of_wanda(seed):
    weight, stats = random_weight(seed), stats_of(random_inputs(seed), damping=1e-4)
    wanda = wanda_score(weight, stats).square() / stats.tokens
    isc = isc_score(weight, stats)
    assert (isc >= wanda * 0.999).all() and (isc <= 2 * wanda * 1.001).all()


def test_isc_with_independent_inputs_is_twice_obs_and_ranks_as_wanda():
    inputs = torch.linalg.qr(torch.randn(64, 16, generator=torch.Generator().manual_seed(0))).Q * torch.arange(1, 17)
    weight, stats = random_weight(0), stats_of(inputs)
    torch.testing.assert_close(isc_score(weight, stats), 2 * obs_score(weight, stats))
    two_four = NMPattern(2, 4).keep_mask
    assert torch.equal(two_four(isc_score(weight, stats)), two_four(wanda_score(weight, stats)))


def test_obs_sees_that_an_input_has_a_double_and_wanda_does_not():
    inputs = random_inputs(0, features=4, spread=0.0)
    inputs[:, 1] = inputs[:, 0]  # input 0 can be replaced by input 1, to its right
    weight, stats = torch.ones(1, 4), stats_of(inputs)
    obs, wanda = obs_score(weight, stats)[0], wanda_score(weight, stats)[0]
    assert obs[0] < 0.05 * obs[1] and wanda[0] == wanda[1]


def test_ria_protects_the_largest_weight_of_a_small_row():
    weight = torch.full((4, 4), 10.0)
    weight[3] = torch.tensor([0.1, 0.01, 0.01, 0.01])
    stats = stats_of(torch.eye(4))
    assert ria_score(weight, stats)[3, 0] > ria_score(weight, stats)[:3].max()
    assert wanda_score(weight, stats)[3, 0] < wanda_score(weight, stats)[:3].min()


def test_ria_of_some_columns_is_relative_to_these():
    weight, stats = random_weight(5).abs().add(1.0), stats_of(random_inputs(5))
    some = ria_score(weight[:, :4], stats, slice(0, 4))
    whole = replace(stats, squares=stats.squares[:4])
    torch.testing.assert_close(some, ria_score(weight[:, :4], whole))
    assert (some > ria_score(weight, stats)[:, :4]).all()


def test_taylor_refuses_a_gradient_that_is_not_finite():
    gradient = torch.ones(6, 16)
    gradient[3, 4] = torch.nan
    stats = stats_of(random_inputs(0), gradient=gradient, where="model.layers.3.mlp.down_proj")
    with pytest.raises(CalibrationError) as raised:
        taylor_score(random_weight(0), stats)
    assert str(raised.value) == (
        "model.layers.3.mlp.down_proj: the gradient of the loss holds NaN or inf. Load the model in float32 or "
        "bfloat16, and check the dense model's loss on this text."
    )


def test_a_massive_channel_does_not_drown_the_others():
    """Without scaling, damping by a part of the mean diagonal would be larger than every small input."""
    inputs = random_inputs(0, spread=0.0)
    inputs[:, 3] *= 1e4
    weight = random_weight(0)
    usual = obs_score(weight, stats_of(random_inputs(0, spread=0.0)))
    torch.testing.assert_close(obs_score(weight, stats_of(inputs))[:, :3], usual[:, :3], rtol=1e-3, atol=1e-9)
