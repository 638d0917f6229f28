"""LayerStats: merging, scaling, the ladder of factorisations, and the messages of its errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse import stats as stats_module
from hf_adaptive_sparse.errors import CalibrationError
from hf_adaptive_sparse.stats import LayerStats
from tests.layers import random_inputs, seeded, stats_of

seeds = st.integers(0, 2**31)


def correlated(correlation: float, features: int = 8, **more: object) -> LayerStats:
    """Statistics of unit inputs, of which each two have the same correlation; beyond 1 no inputs can have it."""
    gram = torch.full((features, features), correlation)
    gram.diagonal().fill_(1.0)
    return LayerStats(tokens=1, squares=gram.diagonal().clone(), gram=gram, **more)


@settings(max_examples=25)
@given(seed=seeds, cut=st.integers(1, 63))
def test_statistics_of_two_parts_add_up_to_those_of_the_whole(seed, cut):
    inputs = random_inputs(seed)
    merged = stats_of(inputs[:cut]) + stats_of(inputs[cut:])
    whole = stats_of(inputs)
    assert merged.tokens == whole.tokens == 64
    torch.testing.assert_close(merged.squares, whole.squares)
    torch.testing.assert_close(merged.gram, whole.gram, rtol=1e-5, atol=1e-4)


def test_merging_leaves_both_parts_alone_and_keeps_the_name():
    one, other = stats_of(random_inputs(0), where="block.1"), stats_of(random_inputs(1))
    before = [one.gram.clone(), other.gram.clone(), one.squares.clone()]
    merged = one + other
    merged.gram.zero_(), merged.squares.zero_()
    assert all(map(torch.equal, before, [one.gram, other.gram, one.squares]))
    assert merged.where == "block.1" and merged.tokens == 128


def test_what_one_part_did_not_collect_the_merged_statistics_do_not_claim():
    full = replace(stats_of(random_inputs(0)), cross=torch.ones(16, 16))
    assert torch.equal((full + full).cross, torch.full((16, 16), 2.0))
    part = replace(full, gram=None, cross=None)
    for merged in (full + part, part + full):
        assert merged.gram is None and merged.cross is None and merged.tokens == 128


def test_the_gradient_is_not_a_sum():
    gradient = torch.ones(6, 16)
    one = stats_of(random_inputs(0), gradient=gradient)
    assert torch.equal((one + one).gradient, gradient)


@settings(max_examples=25)
@given(seed=seeds, features=st.integers(1, 24), damping=st.sampled_from([0.003, 0.01, 0.5]))
def test_the_factor_is_that_of_the_inverse_of_the_scaled_and_damped_matrix(seed, features, damping):
    stats = stats_of(random_inputs(seed, features), damping=damping)
    scaled = stats.scaled
    gram = stats.gram.double() / stats.tokens
    torch.testing.assert_close(scaled.scale.double(), gram.diagonal().sqrt(), rtol=1e-5, atol=0)
    expected = gram / gram.diagonal().sqrt()[:, None] / gram.diagonal().sqrt() + damping * torch.eye(features)
    torch.testing.assert_close(scaled.matrix.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(scaled.upper, scaled.upper.triu()) and (scaled.upper.diagonal() > 0).all()
    inverse = (scaled.upper.T @ scaled.upper).double()
    torch.testing.assert_close(inverse @ expected, torch.eye(features).double(), rtol=0, atol=2e-3)
    assert scaled.rung == f"damping {damping:g}"


@settings(max_examples=25)
@given(seed=seeds, exponent=st.integers(-15, 15))
def test_the_unit_of_the_inputs_is_in_the_scale_alone(seed, exponent):
    stats = stats_of(random_inputs(seed))
    other = replace(stats, gram=stats.gram * 4.0**exponent, squares=stats.squares * 4.0**exponent)
    assert torch.equal(stats.scaled.upper, other.scaled.upper)
    assert torch.equal(stats.scaled.scale * 2.0**exponent, other.scaled.scale)


def test_it_is_factored_once():
    stats = stats_of(random_inputs(0))
    assert stats.scaled is stats.scaled


def test_an_input_that_was_always_zero_is_dead_and_touches_no_other():
    inputs = random_inputs(0)
    inputs[:, [2, 9]] = 0.0
    scaled = stats_of(inputs).scaled
    alive = torch.tensor([j not in (2, 9) for j in range(16)])
    assert torch.equal(scaled.dead, ~alive)
    assert (scaled.scale[~alive] == 1).all()
    assert torch.equal(scaled.matrix[~alive], 1.01 * torch.eye(16)[~alive])
    without = stats_of(inputs[:, alive]).scaled
    torch.testing.assert_close(scaled.upper[alive][:, alive], without.upper, rtol=1e-4, atol=1e-5)


def test_dead_inputs_do_not_lower_the_rank():
    inputs = random_inputs(0)
    inputs[:, 4] = 0.0
    assert stats_of(inputs, damping=0.0).scaled.rung == "damping 0"


@pytest.mark.parametrize(
    "correlation, rung",
    [
        (0.5, "damping 0.01"),
        (1.0, "damping 0.01"),
        (1.05, "damping 0.1"),
        (1.5, "damping 1"),
        (5.0, "damping 10"),
        (20.0, "eigenvalue floor 1e-06"),
    ],
)
def test_the_first_rung_of_the_ladder_that_carries_is_taken_and_named(correlation, rung):
    scaled = correlated(correlation).scaled
    assert scaled.rung == rung
    inverse = scaled.upper.double().T @ scaled.upper.double()
    torch.testing.assert_close(
        inverse @ scaled.matrix.double(), torch.eye(8).double(), rtol=0, atol=0.05 if "floor" in rung else 1e-4
    )


def test_float64_carries_where_float32_rounds_a_pivot_away(monkeypatch):
    """A factorisation that fails in float32 whatever is added, as on matrices with overflowing rows."""
    factor = stats_module._factor
    monkeypatch.setattr(stats_module, "_factor", lambda m: None if m.dtype == torch.float32 else factor(m))
    scaled = stats_of(random_inputs(0)).scaled
    assert scaled.rung == "float64, damping 0.01"
    assert scaled.upper.dtype == scaled.matrix.dtype == torch.float32
    monkeypatch.undo()
    torch.testing.assert_close(scaled.upper, stats_of(random_inputs(0)).scaled.upper, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_factored_at_all_is_an_error(monkeypatch):
    monkeypatch.setattr(stats_module, "_factor", lambda matrix: None)
    with pytest.raises(CalibrationError) as raised:
        stats_of(random_inputs(0), where="model.layers.7.self_attn.o_proj").scaled  # noqa: B018
    assert str(raised.value) == (
        "model.layers.7.self_attn.o_proj: the Gram matrix cannot be factored, not even in float64 with its eigenvalues "
        "lifted. Calibrate on more than 64 tokens."
    )


@pytest.mark.parametrize("features, tokens", [(16, 4), (16, 15), (64, 40), (256, 200)])
@pytest.mark.parametrize("seed", range(3))
def test_too_few_tokens_without_damping_are_an_error(features, tokens, seed):
    inputs = torch.randn(tokens, features, generator=seeded(seed))
    stats = stats_of(inputs, damping=0.0, where="model.layers.7.self_attn.o_proj")
    with pytest.raises(CalibrationError) as raised:
        stats.scaled  # noqa: B018
    assert str(raised.value) == (
        f"model.layers.7.self_attn.o_proj: cannot factor the Gram matrix: rank {tokens} of {features} ({tokens} "
        f"tokens, damping=0.0). Calibrate on at least {features} tokens, or set damping=0.01."
    )
    assert replace(stats, damping=0.01).scaled.rung == "damping 0.01"


@pytest.mark.parametrize("seed", range(5))
def test_a_rank_that_only_rounding_completes_is_an_error_too(seed):
    """The Cholesky factorisation of many of these succeeds, with a last pivot of rounding errors."""
    stats = stats_of(torch.randn(255, 256, generator=seeded(seed)), damping=0.0)
    with pytest.raises(CalibrationError, match=r"^layer: cannot factor the Gram matrix: rank 25\d of 256 "):
        stats.scaled  # noqa: B018


def test_a_double_input_without_damping_is_an_error_and_with_it_is_not():
    inputs = random_inputs(0)
    inputs[:, 3] = inputs[:, 11]
    with pytest.raises(CalibrationError, match="^layer: cannot factor the Gram matrix: rank 15 of 16 "):
        stats_of(inputs, damping=0.0).scaled  # noqa: B018
    assert stats_of(inputs).scaled.upper.isfinite().all()


def test_no_tokens_are_an_error():
    stats = stats_of(torch.zeros(0, 4), where="model.layers.2.mlp.experts.5")
    for use in (lambda: stats.require_tokens("wanda_score"), lambda: stats.require_gram("wanda_score")):
        with pytest.raises(CalibrationError) as raised:
            use()
        assert str(raised.value) == (
            "model.layers.2.mlp.experts.5: wanda_score needs calibration tokens, and none reached this layer. "
            "Calibrate on more text."
        )
    with pytest.raises(CalibrationError, match="a solver or score of second order needs calibration tokens"):
        stats.scaled  # noqa: B018


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_an_error_that_names_the_first(value):
    inputs = random_inputs(0)
    inputs[5, [6, 9]] = value
    with pytest.raises(CalibrationError) as raised:
        stats_of(inputs, where="model.layers.3.mlp.down_proj").require_tokens("wanda_score")
    assert str(raised.value) == (
        "model.layers.3.mlp.down_proj: the calibration inputs hold NaN or inf (input feature 6). Load the model in "
        "float32 or bfloat16, and check the dense model on this text."
    )


def test_a_gram_matrix_that_was_not_collected_is_an_error():
    stats = replace(stats_of(random_inputs(0)), gram=None, where="block.1")
    stats.require_tokens("wanda_score")
    with pytest.raises(CalibrationError) as raised:
        stats.require_gram("obs_score")
    assert str(raised.value) == ("block.1: obs_score needs the Gram matrix of the inputs, which was not collected.")


def test_factoring_reads_only():
    stats = stats_of(random_inputs(0))
    before = stats.gram.clone()
    assert stats.scaled.upper is not None and torch.equal(stats.gram, before)


def test_the_factor_of_a_wide_gram_matrix_inverts_it():
    # Wider than the tiles in which the inverse is computed, and no multiple of them.
    inputs = torch.randn(3000, 1100, generator=torch.Generator().manual_seed(0))
    scaled = LayerStats(tokens=3000, squares=inputs.square().sum(0), gram=inputs.T @ inputs).scaled
    assert torch.equal(scaled.upper, scaled.upper.triu())
    product = scaled.upper.double().T @ scaled.upper.double() @ scaled.matrix.double()
    torch.testing.assert_close(product, torch.eye(1100, dtype=torch.float64), rtol=0.0, atol=1e-4)
