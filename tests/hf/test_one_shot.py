"""Pruning whole models: budgets, families, what is left untouched, and training that starts from the result."""

from __future__ import annotations

import copy
import math
from itertools import product

import pytest
import torch
from peft import get_peft_model

from hf_adaptive_sparse.errors import CalibrationError, ConfigError, PatternError, TargetError
from hf_adaptive_sparse.families.llama import LLAMA
from hf_adaptive_sparse.hf.adapter import AdaptiveSparseConfig, sparse_layers
from hf_adaptive_sparse.hf.loss_gradients import fisher_traces
from hf_adaptive_sparse.hf.one_shot import one_shot
from hf_adaptive_sparse.hf.warm_start import warm_start
from hf_adaptive_sparse.methods.one_shot import METHODS, OneShotConfig
from hf_adaptive_sparse.patterns import NMPattern

from ..tiny_models import tiny_model, tokens
from .walked_models import any_model

WINDOWS = tokens(8, 16)


def pruned(model_type: str = "llama", *, windows=WINDOWS, **settings):
    model = any_model(model_type)
    return model, one_shot(model, windows, OneShotConfig(**settings))


def refusal(error: type[Exception], model, **settings) -> str:
    """What is said about a model that is refused; nothing of it has changed then."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error) as raised:
        one_shot(model, WINDOWS, OneShotConfig(**settings))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return str(raised.value)


def zeros(model, names) -> float:
    weights = [model.get_submodule(name).weight for name in names]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_to_two_four(method):
    model, report = pruned(method=method)
    assert report.realised == report.target == 0.5
    assert len(report.matrices) == 14
    for row in report.matrices:
        assert NMPattern(2, 4).first_violation(model.get_submodule(row.name).weight) is None
        assert (row.pattern, row.sparsity) == ("2:4", 0.5)
    assert model(WINDOWS).logits.isfinite().all()


@pytest.mark.parametrize("allocation, unit", [
    ("uniform", "matrix"),
    *product(["ranked", "owl", "alpha", "error_curves", "evolutionary"], ["matrix", "block"]),
])  # fmt: skip
def test_every_allocation_meets_the_budget(allocation, unit):
    more = {"generations": 1} if allocation == "evolutionary" else {}
    model, report = pruned(
        method="fast", pattern="unstructured", sparsity=0.6, allocation=allocation, allocation_unit=unit, **more
    )
    names = [row.name for row in report.matrices]
    assert abs(report.realised - 0.6) <= 1e-4
    assert abs(zeros(model, names) - 0.6) <= 1e-4
    sparsities = {round(row.sparsity, 2) for row in report.matrices}
    assert len(sparsities) == 1 if allocation == "uniform" else len(sparsities) > 1 or unit == "block"
    if unit == "block":
        for block in ("layers.0.", "layers.1."):
            within = [row.sparsity for row in report.matrices if block in row.name]
            assert max(within) - min(within) < 2e-3


def test_error_curves_weigh_an_error_by_the_squared_gradient_of_one_output():
    model = any_model("llama")
    traces = fisher_traces(model, WINDOWS)
    widths = {name: model.get_submodule(name).weight.shape[0] for name in traces}
    report = one_shot(model, WINDOWS, OneShotConfig(pattern="unstructured", allocation="error_curves"))
    assert len(set(widths.values())) > 1
    for row in report.matrices:
        assert row.sensitivity == pytest.approx(traces[row.name].output_gradient / widths[row.name], rel=1e-5)


def test_hutchinson_traces_can_rank_the_matrices():
    _, report = pruned(
        method="mixed_sparsity", pattern="unstructured", sensitivity="hutchinson", probes=2, windows=WINDOWS[:2]
    )
    assert abs(report.realised - 0.5) <= 1e-4
    assert all(math.isfinite(row.sensitivity) for row in report.matrices)


def test_hutchinson_traces_of_fused_experts_are_refused():
    with pytest.raises(ConfigError) as error:
        pruned("mixtral", method="mixed_sparsity", pattern="unstructured", sensitivity="hutchinson", probes=2)
    assert str(error.value) == (
        "model.layers.0.mlp.experts.gate_up_proj[0]: is one of several experts in a parameter, whose trace is not "
        "known by expert. Use sensitivity='fisher'."
    )


def test_mixed_patterns_share_one_budget():
    model, report = pruned(pattern="mixed", sparsity=0.5)
    assert report.realised == 0.5
    for row in report.matrices:
        pattern = {"1:1": NMPattern(1, 1), "2:4": NMPattern(2, 4), "1:4": NMPattern(1, 4)}[row.pattern]
        assert pattern.first_violation(model.get_submodule(row.name).weight) is None


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox", "falcon", "bloom", "phi3", "gemma3_text", "mixtral"])
def test_families_are_pruned_where_their_linears_are(model_type):
    before = copy.deepcopy(any_model(model_type).state_dict())
    model, report = pruned(model_type, method="balanced")
    assert report.realised == 0.5
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("norm" not in name and "embed" not in name and "bias" not in name for name in changed)


def test_second_order_pruning_keeps_the_output_closer_than_magnitude_does():
    dense = tiny_model("llama")(WINDOWS).logits.detach()
    distance = {}
    for method in ("magnitude", "sparsegpt", "balanced", "best"):
        model, _ = pruned(method=method, windows=tokens(64, 16))
        distance[method] = (model(WINDOWS).logits - dense).square().mean().item()
    assert distance["sparsegpt"] < distance["magnitude"]
    assert distance["balanced"] < distance["sparsegpt"]
    assert distance["best"] < distance["sparsegpt"]


def test_the_same_run_twice_gives_the_same_bits():
    first, _ = pruned(method="best", pattern="unstructured")
    second, _ = pruned(method="best", pattern="unstructured")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_rounded_values_come_with_codes_and_scales():
    model, report = pruned(bits=4, group_size=8)
    assert set(report.quantized) == {row.name for row in report.matrices}
    for name, matrix in report.quantized.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, matrix.codes * matrix.scales.repeat_interleave(8, dim=1))


# --- what is refused ------------------------------------------------------------------------------------------


def test_a_width_that_the_pattern_does_not_divide_is_refused_before_anything_changes():
    model = any_model("llama", intermediate_size=66)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PatternError) as error:
        one_shot(model, WINDOWS)
    assert str(error.value) == (
        "model.layers.0.mlp.down_proj: 2:4 needs the input features to be a multiple of 4, got 66 in a [32, 66] "
        "weight. Add the layer to `skip`, or pad it."
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert one_shot(model, WINDOWS, skip=["down_proj"]).realised == 0.5


def test_nothing_left_to_prune_is_refused():
    with pytest.raises(TargetError) as error:
        one_shot(any_model("llama"), WINDOWS, skip=LLAMA.targets)
    assert str(error.value) == (
        f"model.layers: no linear layer is left to prune. Skip fewer modules: {', '.join(LLAMA.targets)}."
    )


def test_an_undamped_gram_matrix_of_too_few_tokens_is_refused():
    with pytest.raises(CalibrationError) as error:
        pruned(method="sparsegpt", damping=0.0, windows=tokens(1, 8))
    assert str(error.value) == (
        "model.layers.0.self_attn.(q_proj, k_proj, v_proj): cannot factor the Gram matrix: rank 8 of 32 (8 tokens, "
        "damping=0.0). Calibrate on at least 32 tokens, or set damping=0.01."
    )


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"thanos"}))
def test_how_a_gram_matrix_of_inputs_that_repeat_was_factored_is_reported(method):
    model = any_model("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[1] = block.mlp.up_proj.weight[0]
            block.mlp.gate_proj.weight[1] = block.mlp.gate_proj.weight[0]
    measured = "gram" in OneShotConfig(method=method).needs
    config = OneShotConfig(method=method, **({"damping": 1e-12} if measured else {}))
    report = one_shot(model, WINDOWS, config)
    rungs = {row.rung for row in report.matrices}
    assert ("" not in rungs) if measured else rungs == {""}
    assert rungs <= {"", *(f"{way}damping 1e-{power}" for way in ("", "float64, ") for power in (9, 10, 11, 12)),
                     "eigenvalue floor 1e-06"}  # fmt: skip
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"magnitude"}))
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_weights_of_inputs_that_are_always_0_go_first(method, pattern):
    model = any_model("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.post_attention_layernorm.weight[::2] = 0.0
    one_shot(model, WINDOWS, OneShotConfig(method=method, pattern=pattern, allocation="uniform"))
    for block in model.model.layers:
        assert (block.mlp.up_proj.weight[:, ::2] == 0).all()
        assert (block.mlp.up_proj.weight[:, 1::2] != 0).float().mean() > 0.99
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"taylor"}))
def test_nan_activations_are_refused_by_name(method):
    model = any_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(CalibrationError) as error:
        one_shot(model, WINDOWS, OneShotConfig(method=method))
    assert str(error.value) == (
        "model.layers.1.self_attn.(q_proj, k_proj, v_proj): its inputs hold NaN or inf (input feature 3), the first in "
        "block model.layers.1. Load the model in float32 or bfloat16, and check the dense model on this text."
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_dense_weight_that_is_not_finite_is_refused_by_name(method):
    model = any_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    assert refusal(TargetError, model, method=method) == (
        "model.layers.1.mlp.up_proj: the dense weight holds 1 NaN or infinite values of 2048. Load an intact copy of "
        "the model, in float32 or bfloat16."
    )


@pytest.mark.parametrize("skip, message", [
    (["downproj"], "skip: no module of the model is called 'downproj', and none ends with .downproj."),
    ("down_proj", "skip is a list of names, got the string 'down_proj'. Write ['down_proj']."),
    (["layers"], "skip: model.layers holds all blocks. Name modules in them, such as model.layers.0."),
    (["model"], "skip: model holds all blocks. Name modules in them, such as model.layers.0."),
])  # fmt: skip
def test_a_skip_that_would_leave_nothing_out_is_refused(skip, message):
    with pytest.raises(ConfigError) as error:
        one_shot(any_model("llama"), WINDOWS, skip=skip)
    assert str(error.value) == message


@pytest.mark.parametrize("settings, message", [
    ({"pattern": "mixed", "sparsity": 0.9},
     "a sparsity of 0.9 cannot be reached: the levels given reach from 0 to 0.75. Ask for a target in between, or add "
     "levels."),
    ({"pattern": "mixed", "levels": "dense"},
     "a sparsity of 0.5 cannot be reached: the levels given reach from 0 to 0. Ask for a target in between, or add "
     "levels."),
    ({"pattern": "mixed", "sparsity": 0.55, "allocation_unit": "block"},
     "a sparsity of 0.55 cannot be reached to within 0.0001 with the levels given: next to it are 0.5 and 0.625. Ask "
     "for one of them, or add levels."),
    ({"pattern": "unstructured", "sparsity": 0.95, "allocation": "ranked", "spread": 0.1},
     "spread of a ranked allocation is between 0 and 0.05 at a sparsity of 0.95, got 0.1. Sparsities would leave "
     "[0, 1]: set a smaller spread."),
    *(({"pattern": "unstructured", "sparsity": 0.9999, "allocation": allocation},
       "a sparsity of 0.9999 leaves 2 of 18432 weights, fewer than one for each of 14 layers. Ask for at most "
       "0.99924.") for allocation in ("uniform", "owl", "alpha", "error_curves")),
    ({"bits": 4, "group_size": 5},
     "model.layers.0.self_attn.q_proj: groups of 5 inputs need the input features to be a multiple of 5, got 32 in a "
     "[32, 32] weight. Use a group that divides it, or 0."),
])  # fmt: skip
def test_a_budget_that_cannot_be_met_is_refused_before_the_model_is_run(monkeypatch, settings, message):
    model = any_model("llama")
    monkeypatch.setattr(model, "forward", None)
    assert refusal(ConfigError, model, **settings) == message


# --- training from it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_training_starts_from_the_pruned_weights_with_the_dense_teacher_still_there(model_type):
    dense = any_model(model_type)
    expected = dense(WINDOWS).logits.detach()
    model, _ = pruned(model_type)
    adapted = get_peft_model(any_model(model_type), AdaptiveSparseConfig(target_modules="all-linear")).eval()
    count = warm_start(adapted, model)
    assert count == len(sparse_layers(adapted))
    torch.testing.assert_close(adapted(WINDOWS).logits, model(WINDOWS).logits)
    with adapted.disable_adapter():
        assert torch.equal(adapted(WINDOWS).logits, expected)


def test_a_warm_start_from_another_model_or_pattern_is_refused():
    adapted = get_peft_model(any_model("llama"), AdaptiveSparseConfig())
    before = copy.deepcopy(adapted.state_dict())
    with pytest.raises(PatternError) as error:
        warm_start(adapted, any_model("llama"))
    assert str(error.value) == (
        "model.layers.0.self_attn.q_proj: row 0, group 0 of the pruned weight is not 2:4. Prune the model to 2:4 "
        "first, or exclude the layer from the adapter."
    )
    with pytest.raises(TargetError) as error:
        warm_start(adapted, pruned("gpt2")[0])
    assert str(error.value) == (
        "model.layers.0.self_attn.q_proj: the pruned model has no such linear layer, needed is [32, 32]. Start from a "
        "pruned copy of the same model."
    )
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
