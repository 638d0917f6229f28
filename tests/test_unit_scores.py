"""What single scores of units promise beyond the contract, and what UnitStats says of what is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import CalibrationError, TargetError
from hf_adaptive_sparse.unit_scores import NEEDS, UNIT_SCORES, UnitStats, flap_biases
from hf_adaptive_sparse.units import Axis, Span
from tests.layers import seeded
from tests.unit_axes import KINDS, consecutive, hand_made_axis, moments_of, random_axis, random_inputs

seeds = st.integers(0, 2**31)
OF_INPUTS = [name for name in UNIT_SCORES if "inputs" in NEEDS[name]]


@pytest.mark.parametrize("head", range(6))
def test_a_query_head_is_credited_to_the_kv_head_that_it_reads(head):
    axis, weights, stats = random_axis("kv_head", 0)
    alone = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    alone["attn.q_proj.weight"][4 * head : 4 * head + 4] = 1.0
    for name in ("taylor", "l1", "l2"):
        scores = UNIT_SCORES[name](axis, alone, stats)
        assert scores.nonzero().flatten().tolist() == [head // 2]


def test_taylor_keeps_products_that_float16_rounds_to_zero():
    axis, shapes = hand_made_axis("mlp_channel")
    small = {name: torch.full(shape, 1e-4, dtype=torch.float16) for name, shape in shapes.items()}
    assert (small["mlp.up_proj.weight"] * small["mlp.up_proj.weight"] == 0).all()
    scores = UNIT_SCORES["taylor"](axis, small, UnitStats(gradients=small))
    torch.testing.assert_close(scores, torch.full((7,), 3e-7), rtol=1e-2, atol=0)


def test_flap_scores_a_channel_that_never_changes_zero_however_large_it_is():
    axis, weights, stats = random_axis("mlp_channel", 0)
    inputs = random_inputs(axis, 0)["mlp.down_proj.weight"]
    inputs[:, :, 2] = 1024.0
    stats = replace(stats, inputs={"mlp.down_proj.weight": moments_of(inputs)})
    assert UNIT_SCORES["flap"](axis, weights, stats)[2] == 0
    assert UNIT_SCORES["activation"](axis, weights, stats).argmax() == 2


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(seed=seeds)
def test_the_bias_of_flap_keeps_the_mean_of_what_the_reading_weight_returns(kind, seed):
    axis, weights, stats = random_axis(kind, seed)
    keep = torch.rand(axis.count, generator=seeded(seed)) < 0.5
    (span,) = [span for span in axis.spans if span.reads]
    weight = weights[span.tensor].double().movedim(span.dim, 1)
    inputs = random_inputs(axis, seed)[span.tensor].flatten(0, 1)
    kept = inputs.clone()
    kept[:, span.index[~keep].flatten()] = 0.0
    bias = flap_biases(axis, weights, stats, keep)[span.tensor]
    torch.testing.assert_close((kept @ weight.T).mean(0) + bias, (inputs @ weight.T).mean(0), rtol=1e-5, atol=1e-5)
    assert bias.dtype == torch.float32


@settings(max_examples=20)
@given(seed=seeds, offset=st.floats(-1e4, 1e4))
def test_the_variance_of_an_input_does_not_drown_in_its_mean(seed, offset):
    inputs = torch.randn(4, 8, 3, generator=seeded(seed), dtype=torch.float64)
    variance = moments_of(inputs + offset).variance
    torch.testing.assert_close(variance, inputs.flatten(0, 1).var(0, correction=0), rtol=1e-4, atol=1e-6)


def test_the_granularity_that_says_nothing_of_the_units_does_not_outweigh_the_other():
    axis, weights, stats = random_axis("mlp_channel", 0)
    ones = {name: torch.ones_like(weight) for name, weight in weights.items()}
    equal = UNIT_SCORES["fused"](axis, ones, UnitStats(gradients=ones))
    assert equal.isfinite().all() and (equal == equal[0]).all()
    ones["mlp.gate_proj.weight"][5] = 2.0
    assert UNIT_SCORES["fused"](axis, ones, UnitStats(gradients=ones)).argmax() == 5
    assert UNIT_SCORES["fused"](axis, weights, stats).unique().numel() == 7


def test_a_gradient_or_an_input_that_is_not_finite_is_named():
    axis, weights, stats = random_axis("mlp_channel", 0)
    stats.gradients["mlp.up_proj.weight"][3, 3] = torch.nan
    with pytest.raises(CalibrationError) as raised:
        UNIT_SCORES["taylor"](axis, weights, stats)
    assert str(raised.value) == (
        "mlp: the gradient of mlp.up_proj.weight holds NaN or inf. Load the model in float32 or bfloat16, and check "
        "its loss on this text."
    )
    stats.inputs["mlp.down_proj.weight"].squares[3] = torch.inf
    for name in OF_INPUTS:
        with pytest.raises(CalibrationError) as raised:
            UNIT_SCORES[name](axis, weights, stats)
        assert str(raised.value) == (
            "mlp: the inputs of mlp.down_proj.weight hold NaN or inf. Load the model in float32 or bfloat16, and check "
            "its loss on this text."
        )
    with pytest.raises(CalibrationError) as raised:
        UNIT_SCORES["perturbation"](axis, weights, UnitStats(losses={"mlp": torch.tensor([0.0, torch.nan])}))
    assert str(raised.value) == (
        "mlp: the loss without unit 1 is NaN or inf. Load the model in float32 or bfloat16, and check its loss on this "
        "text."
    )


@pytest.mark.parametrize("name", OF_INPUTS)
def test_inputs_without_a_token_are_refused(name):
    axis, weights, stats = random_axis("mlp_channel", 0)
    nothing = replace(stats.inputs["mlp.down_proj.weight"], tokens=0)
    with pytest.raises(CalibrationError) as raised:
        UNIT_SCORES[name](axis, weights, replace(stats, inputs={"mlp.down_proj.weight": nothing}))
    assert str(raised.value) == ("mlp: no calibration token reached mlp.down_proj.weight. Calibrate on more text.")


def test_what_was_not_collected_is_named():
    axis, weights, _ = random_axis("mlp_channel", 0)
    for name, what in (
        ("taylor", "the gradient of mlp.gate_proj.weight, which was not collected"),
        ("flap", "the inputs of mlp.down_proj.weight, which were not collected"),
        ("perturbation", "the loss without each unit, which was not measured"),
    ):
        with pytest.raises(CalibrationError) as raised:
            UNIT_SCORES[name](axis, weights, UnitStats())
        assert str(raised.value) == f"mlp: {name} needs {what}."


@pytest.mark.parametrize("name", OF_INPUTS)
def test_units_that_no_linear_layer_reads_have_no_score_of_inputs(name):
    axis = Axis("mlp.experts", "expert", 0, 4, (Span("mlp.experts.down_proj", 0, consecutive(4, 1)),))
    with pytest.raises(TargetError) as raised:
        UNIT_SCORES[name](axis, {"mlp.experts.down_proj": torch.ones(4, 3, 5)}, UnitStats())
    assert str(raised.value) == (
        f"mlp.experts: {name} scores a unit by the columns of the linear layer that reads it, and none reads units of "
        "kind expert alone. Use a score of weights, such as taylor or l2."
    )
