"""Sensitivities against slow, obvious versions, exact Hessians of tiny networks, and the messages of their errors."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from hf_adaptive_sparse.errors import CalibrationError, ConfigError
from hf_adaptive_sparse.sensitivity import (
    FisherTrace,
    TraceEstimate,
    hutchinson_traces,
    outlier_ratio,
    output_error,
    relative_error,
    tail_heaviness,
)
from tests.layers import random_inputs, random_weight, seeded, stats_of
from tests.reference import sensitivity as reference

seeds = st.integers(0, 2**31)
some_examples = settings(max_examples=15)


# -- the Fisher trace -------------------------------------------------------------------------------------------------


def backward_of_the_sum(
    seed: int, where: str = "layer"
) -> tuple[FisherTrace, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Classify every token by one layer; returns the trace, and weight, inputs and labels."""
    inputs, weight = random_inputs(seed, features=5, tokens=12).double(), random_weight(seed, 4, 5).double()
    labels = torch.randint(4, (12,), generator=seeded(seed))
    outputs = (inputs @ weight.T).requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(outputs, labels, reduction="sum"), outputs)
    trace = FisherTrace(where=where)
    trace.update(inputs.view(3, 4, 5), gradient.view(3, 4, 4))
    return trace, weight, inputs, labels


@some_examples
@given(seed=seeds)
def test_the_fisher_trace_is_the_mean_squared_gradient_of_single_tokens(seed):
    fisher, weight, inputs, labels = backward_of_the_sum(seed)
    expected = reference.fisher_trace(
        weight, inputs, lambda output, token: functional.cross_entropy(output, labels[token])
    )
    assert fisher.trace == pytest.approx(expected, rel=1e-5)
    assert fisher.tokens == 12


def test_the_output_gradient_is_the_trace_with_inputs_of_norm_one():
    gradient = torch.randn(7, 3, generator=seeded(0))
    fisher = FisherTrace()
    fisher.update(functional.normalize(torch.randn(7, 5, generator=seeded(1))), gradient)
    assert fisher.output_gradient == pytest.approx(float(gradient.square().sum()) / 7, rel=1e-5)
    assert fisher.trace == pytest.approx(fisher.output_gradient, rel=1e-5)


@some_examples
@given(seed=seeds, cut=st.integers(0, 9))
def test_two_parts_add_up_to_the_whole_whether_updated_or_merged(seed, cut):
    inputs, gradient = torch.randn(9, 4, generator=seeded(seed)), torch.randn(9, 3, generator=seeded(seed + 1))
    whole, updated, left, right = (FisherTrace(where="block.1") for _ in range(4))
    whole.update(inputs, gradient)
    for part, sums in ((slice(0, cut), left), (slice(cut, 9), right)):
        updated.update(inputs[part], gradient[part])
        sums.update(inputs[part], gradient[part])
    merged = left + right
    assert left.tokens == cut and merged.where == "block.1"
    for each in (updated, merged):
        assert each.tokens == 9 and each.trace == pytest.approx(whole.trace, rel=1e-9)
        assert each.output_gradient == pytest.approx(whole.output_gradient, rel=1e-9)


def test_sums_of_bfloat16_tensors_are_not_of_bfloat16():
    inputs, gradient = torch.ones(1000, 1, dtype=torch.bfloat16), torch.ones(1000, 1, dtype=torch.bfloat16)
    fisher = FisherTrace()
    fisher.update(inputs, gradient)
    assert (fisher.weights, fisher.outputs) == (1000.0, 1000.0)


def test_a_layer_that_saw_no_token_has_no_trace():
    for of in (lambda fisher: fisher.trace, lambda fisher: fisher.output_gradient):
        with pytest.raises(CalibrationError) as raised:
            of(FisherTrace(where="model.layers.2.mlp.experts.5"))
        assert str(raised.value) == (
            "model.layers.2.mlp.experts.5: the Fisher trace needs calibration tokens, and none reached this layer. "
            "Calibrate on more text."
        )


@pytest.mark.parametrize("bad", ["inputs", "gradient"])
def test_a_gradient_or_input_that_is_not_finite_is_refused_before_it_counts(bad):
    tensors = {"inputs": torch.ones(3, 2), "gradient": torch.ones(3, 2)}
    tensors[bad][1, 1] = torch.nan
    fisher = FisherTrace(where="block.1")
    with pytest.raises(CalibrationError) as raised:
        fisher.update(tensors["inputs"], tensors["gradient"])
    assert str(raised.value) == (
        "block.1: the inputs or the gradients of its outputs hold NaN or inf. Load the model in float32 or bfloat16, "
        "and check the dense model's loss on this text."
    )
    assert fisher.tokens == 0 and fisher.weights == 0.0


# -- Hutchinson's estimate --------------------------------------------------------------------------------------------


class TinyNetwork:
    """Two layers and a cross-entropy, in float64."""

    def __init__(self, seed: int):
        self.inputs = torch.randn(10, 4, generator=seeded(seed)).double()
        self.labels = torch.randint(3, (10,), generator=seeded(seed))
        self.parameters = {
            "first": torch.randn(5, 4, generator=seeded(seed + 1)).double().requires_grad_(),
            "second": torch.randn(3, 5, generator=seeded(seed + 2)).double().requires_grad_(),
        }

    def loss(self, **replaced: torch.Tensor) -> torch.Tensor:
        weights = {**self.parameters, **replaced}
        outputs = (self.inputs @ weights["first"].T).tanh() @ weights["second"].T
        return functional.cross_entropy(outputs, self.labels)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_estimate_agrees_with_the_exact_trace_within_its_standard_error(seed):
    network = TinyNetwork(seed)
    traces = hutchinson_traces(network.loss, network.parameters, probes=400, generator=seeded(seed))
    assert traces.keys() == network.parameters.keys()
    for name, estimate in traces.items():
        exact = reference.hessian_trace(lambda leaf, name=name: network.loss(**{name: leaf}), network.parameters[name])
        assert estimate.probes == 400 and 0 < estimate.standard_error < 0.2 * abs(exact) + 0.05
        assert abs(estimate.mean - exact) < 4 * estimate.standard_error


def test_the_standard_error_is_the_spread_of_repeated_estimates():
    network = TinyNetwork(3)
    estimates = [hutchinson_traces(network.loss, network.parameters, 8, seeded(seed))["first"] for seed in range(60)]
    spread = torch.tensor([estimate.mean for estimate in estimates]).std()
    mean_error = torch.tensor([estimate.standard_error for estimate in estimates]).mean()
    assert 0.7 < mean_error / spread < 1.4


def test_a_diagonal_hessian_needs_no_luck_and_a_negative_trace_stays_negative():
    w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    curvature = torch.tensor([2.0, -7.0, 1.0])
    traces = hutchinson_traces(lambda: (curvature * w.square()).sum() / 2, {"w": w}, probes=3)
    assert traces == {"w": TraceEstimate(mean=-4.0, standard_error=0.0, probes=3)}


def test_a_loss_that_is_linear_in_a_parameter_has_no_trace_there():
    linear, square = (torch.ones(2, requires_grad=True) for _ in range(2))
    only_linear = hutchinson_traces(lambda: linear.sum(), {"linear": linear}, probes=2)
    assert only_linear["linear"].mean == 0.0
    both = hutchinson_traces(
        lambda: linear.sum() + square.square().sum(), {"linear": linear, "square": square}, probes=2
    )
    assert (both["linear"].mean, both["square"].mean) == (0.0, 4.0)


def test_the_same_seed_gives_the_same_estimate_and_gradients_are_left_alone():
    network = TinyNetwork(4)
    one, again, other = (hutchinson_traces(network.loss, network.parameters, 4, seeded(s)) for s in (7, 7, 8))
    assert one == again != other
    assert all(parameter.grad is None for parameter in network.parameters.values())


def test_the_closure_is_called_once_per_probe():
    w, factors = torch.ones(2, requires_grad=True), iter([1.0, 2.0, 3.0])
    estimate = hutchinson_traces(lambda: next(factors) * w.square().sum() / 2, {"w": w}, probes=3)["w"]
    assert estimate.mean == pytest.approx(4.0)
    assert estimate.standard_error == pytest.approx(2 / math.sqrt(3))


@pytest.mark.parametrize("probes", [1, 0])
def test_one_probe_has_no_standard_error(probes):
    w = torch.ones(1, requires_grad=True)
    with pytest.raises(ConfigError) as raised:
        hutchinson_traces(lambda: w.square().sum(), {"w": w}, probes=probes)
    assert str(raised.value) == f"a standard error needs at least 2 probes, got {probes}. 32 are a good start."


def test_parameters_that_have_no_trace_are_named():
    used, unused, frozen = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True), torch.ones(1)
    for name, parameter, message in (
        ("unused", unused, "unused: the loss does not depend on it, so it has no trace. Leave it out."),
        (
            "frozen",
            frozen,
            "frozen: has no requires_grad, so its trace cannot be taken. Switch it on, or leave it out.",
        ),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            hutchinson_traces(lambda: used.square().sum(), {"used": used, name: parameter}, probes=2)


def test_a_trace_that_is_not_finite_is_named():
    w = torch.ones(1, requires_grad=True)
    with pytest.raises(CalibrationError) as raised:
        hutchinson_traces(lambda: (w.square() * torch.inf).sum(), {"w": w}, probes=2)
    assert str(raised.value) == (
        "w: the trace of its Hessian comes out as NaN or inf. Load the model in float32, and check the dense model's "
        "loss on this text."
    )


def test_attention_that_has_no_second_derivative_says_what_to_do():
    w = torch.randn(1, 1, 8, 16, generator=seeded(0)).requires_grad_()
    with (
        pytest.raises(ConfigError) as raised,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION),
    ):
        hutchinson_traces(lambda: functional.scaled_dot_product_attention(w, w, w).square().sum(), {"w": w}, probes=2)
    assert str(raised.value).startswith("the loss cannot be differentiated twice (")
    assert str(raised.value).endswith(
        "). Load the model with attn_implementation='eager', or take the Fisher trace, which needs one backward pass."
    )


def test_other_errors_of_the_loss_come_through():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context, w):
            return w.clone()

        @staticmethod
        def backward(context, gradient):
            return Fails.apply(gradient)

    class Fails(Broken):
        @staticmethod
        def backward(context, gradient):
            raise RuntimeError("out of memory")

    w = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="^out of memory$"):
        hutchinson_traces(lambda: Broken.apply(w).pow(3).sum(), {"w": w}, probes=2)


# -- of the layer alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dense_outputs_of_16_bits_are_as_large_as_in_float64_to_four_digits(dtype):
    """Wide enough for products in bfloat16, where there are any; with one input that is most of the energy."""
    inputs = random_inputs(0, features=512, tokens=700)
    inputs[:, 3] *= 300.0
    weight = torch.randn(96, 512, generator=seeded(1)).to(dtype)
    energy = float((inputs.double() @ weight.double().T).square().sum())
    assert relative_error(1.0, weight, stats_of(inputs)) * energy == pytest.approx(1.0, rel=1e-4)
    weight[:, 3] = 0.0
    energy = float((inputs.double() @ weight.double().T).square().sum())
    assert relative_error(1.0, weight, stats_of(inputs)) * energy == pytest.approx(1.0, rel=1e-4)


@some_examples
@given(seed=seeds, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_output_error_from_the_gram_matrix_is_that_of_the_outputs(seed, dtype):
    inputs, dense = random_inputs(seed), random_weight(seed).to(dtype)
    weight = torch.where(torch.rand(dense.shape, generator=seeded(seed)) < 0.5, torch.zeros_like(dense), dense)
    relative, absolute = reference.output_error(dense.double(), weight.double(), inputs.double())
    stats = stats_of(inputs)
    assert output_error(dense, weight, stats) == pytest.approx(relative, rel=1e-4)
    assert output_error(dense, weight, stats, relative=False) == pytest.approx(absolute, rel=1e-4)


def test_no_change_is_no_error_and_all_zeros_are_an_error_of_one():
    dense, stats = random_weight(0), stats_of(random_inputs(0))
    assert output_error(dense, dense, stats) == 0.0
    assert output_error(dense, torch.zeros_like(dense), stats) == pytest.approx(1.0)


def test_a_change_that_no_token_sees_is_no_error():
    inputs = random_inputs(0, features=16, tokens=4)
    null = torch.linalg.svd(inputs).Vh[-1]
    dense = random_weight(0)
    assert 0.0 <= output_error(dense, dense + null, stats_of(inputs)) < 1e-6


def test_the_error_relative_to_nothing_is_zero_or_infinite():
    stats = stats_of(random_inputs(0))
    zeros, ones = torch.zeros(2, 16), torch.ones(2, 16)
    assert output_error(zeros, zeros, stats) == 0.0
    assert output_error(zeros, ones, stats) == math.inf


def test_the_output_error_needs_the_gram_matrix():
    stats = replace(stats_of(random_inputs(0)), gram=None, where="block.1")
    with pytest.raises(CalibrationError) as raised:
        output_error(random_weight(0), random_weight(0), stats)
    assert str(raised.value) == ("block.1: output_error needs the Gram matrix of the inputs, which was not collected.")


@some_examples
@given(seed=seeds, threshold=st.floats(0.5, 8.0))
def test_the_outlier_ratio_is_that_of_the_reference(seed, threshold):
    inputs, weight = random_inputs(seed), random_weight(seed)
    expected = reference.outlier_ratio(weight.double(), inputs.double(), threshold)
    assert outlier_ratio(weight, stats_of(inputs), threshold) == pytest.approx(expected, abs=1.5 / weight.numel())


def test_one_massive_channel_gives_outliers_and_equal_inputs_none():
    weight, inputs = torch.ones(4, 100), torch.ones(10, 100)
    assert outlier_ratio(weight, stats_of(inputs)) == 0.0
    inputs[:, 3] = 50.0
    assert outlier_ratio(weight, stats_of(inputs)) == 0.01
    assert outlier_ratio(torch.zeros(4, 100), stats_of(inputs)) == 0.0


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan, math.inf])
def test_a_threshold_that_is_no_positive_number_is_refused(threshold):
    with pytest.raises(ConfigError) as raised:
        outlier_ratio(torch.ones(2, 16), stats_of(random_inputs(0)), threshold)
    assert str(raised.value) == f"threshold of an outlier is a number > 0, got {threshold}. OWL takes 5."


def test_the_outlier_ratio_needs_tokens():
    with pytest.raises(CalibrationError, match="^block.1: outlier_ratio needs calibration tokens, "):
        outlier_ratio(torch.ones(2, 4), stats_of(torch.zeros(0, 4), where="block.1"))


@some_examples
@given(seed=seeds, rows=st.integers(2, 20), columns=st.integers(2, 20))
def test_tail_heaviness_is_minus_the_hill_exponent(seed, rows, columns):
    weight = torch.randn(rows, columns, generator=seeded(seed))
    assert tail_heaviness(weight) == pytest.approx(-reference.hill_exponent(weight.double()), rel=1e-3)


def test_a_power_law_is_recognised_and_large_entries_make_a_heavier_tail():
    quantiles = (torch.arange(400) + 0.5) / 400  # eigenvalues at the quantiles of a density of exponent 3
    assert tail_heaviness((quantiles ** (-1 / 2)).sqrt().diag()) == pytest.approx(-3.0, abs=0.05)
    normal = torch.randn(50, 80, generator=seeded(0))
    assert tail_heaviness(normal**5) > tail_heaviness(normal**3) > tail_heaviness(normal)


def test_tail_heaviness_depends_neither_on_the_unit_nor_on_rank_that_is_missing():
    weight = torch.randn(12, 20, generator=seeded(0))
    assert tail_heaviness(weight * 1e-3) == pytest.approx(tail_heaviness(weight), rel=1e-4)
    assert tail_heaviness(torch.cat([weight, weight])) == pytest.approx(tail_heaviness(weight), rel=1e-4)
    assert tail_heaviness(torch.eye(8)) == -math.inf


@pytest.mark.parametrize("weight, rank", [(torch.zeros(3, 4), 0), (torch.ones(3, 4), 1)])
def test_a_spectrum_without_a_tail_is_refused(weight, rank):
    with pytest.raises(CalibrationError) as raised:
        tail_heaviness(weight, where="block.1")
    assert str(raised.value) == (
        f"block.1: a power law needs at least 2 eigenvalues, and a [3, 4] weight of rank {rank} has no more. Leave the "
        "layer out, or allocate by another measure."
    )


def test_the_spectrum_of_nan_is_refused():
    with pytest.raises(CalibrationError) as raised:
        tail_heaviness(torch.full((3, 4), torch.nan), where="block.1")
    assert str(raised.value) == (
        "block.1: the weight holds NaN or inf, so it has no spectrum. Load a sound checkpoint."
    )


def test_the_output_error_of_a_wide_layer_is_that_of_its_outputs():
    # Wider than the tiles in which the Gram matrix is multiplied, and no multiple of them.
    inputs = torch.randn(40, 1100, generator=torch.Generator().manual_seed(0))
    dense, pruned = torch.randn(2, 3, 1100, generator=torch.Generator().manual_seed(1))
    stats = stats_of(inputs)
    expected = (inputs @ (pruned - dense).T).square().sum() / (inputs @ dense.T).square().sum()
    assert output_error(dense, pruned, stats) == pytest.approx(float(expected), rel=1e-4)
