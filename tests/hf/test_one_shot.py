"""Pruning whole models: budgets, families, what is left untouched, and training that starts from the result."""

from __future__ import annotations

import copy
import math
import re
from importlib import import_module
from itertools import product

import pytest
import torch
import torch.nn.utils.prune
from peft import get_peft_model
from transformers import ViTConfig, ViTModel

from hf_adaptive_sparse.errors import CalibrationError, ConfigError, DataError, PatternError, TargetError
from hf_adaptive_sparse.families.llama import LLAMA
from hf_adaptive_sparse.hf.adapter import AdaptiveSparseConfig, sparse_layers
from hf_adaptive_sparse.hf.loss_gradients import fisher_traces
from hf_adaptive_sparse.hf.one_shot import one_shot
from hf_adaptive_sparse.hf.walk_progress import PruningProgress
from hf_adaptive_sparse.hf.warm_start import warm_start
from hf_adaptive_sparse.methods.one_shot import METHODS, OneShotConfig
from hf_adaptive_sparse.patterns import NMPattern

from ..tiny_models import tiny_model, tokens
from .walked_models import any_model

one_shot_module = import_module("hf_adaptive_sparse.hf.one_shot")  # the package exports the function by this name

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


def test_hutchinson_traces_leave_gradients_modes_and_device_as_they_were():
    model = any_model("llama").train()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    moved = []
    move = model.to
    model.to = lambda device: moved.append(str(device)) or move(device)
    config = OneShotConfig(method="mixed_sparsity", pattern="unstructured", sensitivity="hutchinson", probes=2)
    one_shot(model, WINDOWS[:2], config, device="cpu")
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert moved == ["cpu", "cpu"]  # there for the loss, and home again


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


EXPERTS = tuple(f"experts.{key}_proj[{expert}]" for key in ("gate_up", "down") for expert in range(4))


@pytest.mark.parametrize("method", ["fast", "sparsegpt", "balanced"])
@pytest.mark.parametrize("skip", [
    ["experts.gate_up_proj[0]"], ["experts.gate_up_proj[0]", "experts.gate_up_proj[1]", "experts.down_proj[3]"],
    ["experts.gate_up_proj"], ["experts.down_proj"], [name for name in EXPERTS if "[2]" not in name],
], ids=lambda skip: "+".join(skip))  # fmt: skip
@pytest.mark.parametrize("at_once", [1, 4])
def test_of_an_expert_one_projection_can_stay_dense(method, skip, at_once, monkeypatch):
    monkeypatch.setattr("hf_adaptive_sparse.hf.visits._EXPERT_BYTES", at_once * 4 * (32**2 + 64**2))
    model, before = any_model("mixtral"), any_model("mixtral")
    report = one_shot(model, WINDOWS, OneShotConfig(method=method), skip=skip)
    left = {name for name in EXPERTS if name in skip or name.partition("[")[0] in skip}
    found = {row.name.partition("mlp.")[2] for row in report.matrices if "experts" in row.name}
    assert found == set(EXPERTS) - left
    assert len(report.matrices) == 2 * (4 + len(EXPERTS) - len(left))
    for layer, dense in zip(model.model.layers, before.model.layers, strict=True):
        for name in EXPERTS:
            key, expert = name[len("experts.") : -1].split("[")
            weight = getattr(layer.mlp.experts, key)[int(expert)]
            same = torch.equal(weight, getattr(dense.mlp.experts, key)[int(expert)])
            assert same if name in left else NMPattern(2, 4).first_violation(weight) is None


def test_a_weight_that_the_walk_leaves_out_is_named(monkeypatch):
    prune = one_shot_module._prune_block
    monkeypatch.setattr(one_shot_module, "_prune_block", lambda *args: prune(*args)[1:])
    with pytest.raises(PatternError) as error:
        pruned(method="fast")
    assert str(error.value) == (
        "model.layers.0.self_attn.q_proj: was pruned 0 times, and 1 was asked for (the first of 2 such weights). The "
        "model must not be used; report this."
    )


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
    (["q_proj.weight"], "skip: 'q_proj.weight' is a parameter of model.layers.0.self_attn.q_proj, and modules are "
     "skipped as a whole. Write 'q_proj'."),
    (["layers.1.mlp.up_proj.weight"], "skip: 'layers.1.mlp.up_proj.weight' is a parameter of model.layers.1.mlp."
     "up_proj, and modules are skipped as a whole. Write 'layers.1.mlp.up_proj'."),
    (["experts.down_proj[4]"],
     "skip: no module of the model is called 'experts.down_proj[4]', and none ends with .experts.down_proj[4]."),
    (["down_proj[x]"], "skip: no module of the model is called 'down_proj[x]', and none ends with .down_proj[x]."),
    ([""], "skip: no module of the model is called '', and none ends with .."),
    ([3], "skip is a list of names, got 3 in it. Write names of modules."),
])  # fmt: skip
def test_a_skip_that_would_leave_nothing_out_is_refused(skip, message):
    with pytest.raises(ConfigError) as error:
        one_shot(any_model("mixtral" if "[" in str(skip[0]) else "llama"), WINDOWS, skip=skip)
    assert str(error.value) == message


@pytest.mark.parametrize("skip", [["lm_head"], ["embed_tokens.weight"], ["mlp.gate"], ["norm"], ["rotary_emb"]])
def test_a_skip_of_what_stays_dense_anyway_changes_nothing(skip):
    model_type = "mixtral" if "gate" in skip[0] else "llama"
    expected, _ = pruned(model_type, method="fast")
    model = any_model(model_type)
    one_shot(model, WINDOWS, OneShotConfig(method="fast"), skip=skip)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_layer_that_cannot_be_pruned_can_be_skipped_in_every_pass_over_the_model():
    model = any_model("llama")
    torch.nn.utils.prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.3)
    report = one_shot(model, WINDOWS, OneShotConfig(method="best", pattern="unstructured"), skip=["0.mlp.up_proj"])
    assert len(report.matrices) == 13


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


READERS = [
    ({"method": "best", "pattern": "unstructured"}, "allocation 'error_curves'", "allocation=alpha or owl or uniform"),
    ({"pattern": "unstructured", "allocation": "evolutionary"}, "allocation 'evolutionary'",
     "allocation=alpha or owl or uniform"),
    ({"method": "mixed_sparsity", "pattern": "unstructured"}, "allocation 'ranked'",
     "allocation=alpha or owl or uniform"),
    ({"method": "mixed_sparsity", "pattern": "unstructured", "sensitivity": "hutchinson"}, "allocation 'ranked'",
     "allocation=alpha or owl or uniform"),
    ({"pattern": "mixed"}, "pattern 'mixed'",
     "an n:m pattern, or pattern 'unstructured' with allocation=alpha or owl or uniform"),
    ({"method": "taylor"}, "saliency 'taylor'", "saliency=isc or magnitude or obs or ria or wanda"),
]  # fmt: skip


@pytest.mark.parametrize("settings, reader, instead", READERS, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("kind", ["bert", "base"])
def test_what_reads_the_loss_of_a_language_model_is_refused_for_others(settings, reader, instead, kind, tmp_path):
    model = any_model("bert") if kind == "bert" else any_model("llama").model
    model.forward = None
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError) as error:
        one_shot(model, WINDOWS, OneShotConfig(**settings), progress=PruningProgress(tmp_path / "progress"))
    assert str(error.value) == (
        f"{type(model).__name__}: is no causal language model, and {reader} reads the loss of one. Use {instead}."
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not (tmp_path / "progress").exists()


@pytest.mark.parametrize("settings", [
    {}, {"method": "best"}, {"pattern": "unstructured", "allocation": "owl"},
    {"pattern": "unstructured", "allocation": "alpha"}, {"method": "ria", "pattern": "unstructured"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["bert", "base"])
def test_what_reads_no_loss_prunes_encoders_and_base_models(settings, kind):
    model = any_model("bert") if kind == "bert" else any_model("llama").model
    assert abs(one_shot(model, WINDOWS, OneShotConfig(**settings)).realised - 0.5) <= 1e-4


@pytest.mark.parametrize("windows, options, error, message", [
    (["some", "text"], {}, DataError, "calibration needs a [windows, length] tensor of tokens, got list."),
    (WINDOWS.float(), {}, DataError,
     "calibration needs the whole numbers that a tokenizer returns, got torch.float32."),
    (WINDOWS, {"batch_size": 0}, ConfigError, "batch_size is at least 1, got 0."),
    (WINDOWS, {"offload": "gpu"}, ConfigError, "unknown offload 'gpu'; known: none, cpu, disk."),
    (WINDOWS, {"device": "meta"}, ConfigError,
     "device 'meta' holds no values, so nothing can be computed on it. Pass cpu or cuda."),
], ids=lambda value: str(value)[:20])  # fmt: skip
@pytest.mark.parametrize("settings", [READERS[3][0], READERS[0][0], {"method": "taylor"}, {}], ids=str)
def test_what_cannot_be_walked_is_refused_before_anything_is_written(
    windows, options, error, message, settings, tmp_path
):
    progress = PruningProgress(tmp_path / "progress")
    with pytest.raises(error) as raised:
        one_shot(any_model("llama"), windows, OneShotConfig(**settings), progress=progress, **options)
    assert str(raised.value) == message
    assert not (tmp_path / "progress").exists()


@pytest.mark.parametrize("settings", [reader for reader, _, _ in READERS], ids=str)
def test_windows_without_a_prediction_are_refused_where_the_loss_is_read(settings, tmp_path):
    progress = PruningProgress(tmp_path / "progress")
    with pytest.raises(DataError) as error:
        one_shot(any_model("llama"), WINDOWS[:, :1], OneShotConfig(**settings), progress=progress)
    assert str(error.value) == (
        "windows of 1 token hold nothing to predict, so the model has no loss on them. Give windows of at least 2."
    )
    assert not progress.folder.exists()
    assert one_shot(any_model("llama"), WINDOWS[:, :1]).realised == 0.5


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ConfigError) as error:
        one_shot(any_model("llama"), WINDOWS, device=device)
    assert re.fullmatch(
        rf"device '{device}' cannot be used here: .+[^.]\. Pass cpu or an accelerator that torch finds, or None for "
        r"where the model is\.",
        str(error.value),
    )


def test_a_model_that_reads_no_tokens_is_refused():
    model = ViTModel(ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32
    ))  # fmt: skip
    assert refusal(TargetError, model) == "ViTModel: reads no tokens, and calibration is on tokens alone."


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


# --- what is set around it ------------------------------------------------------------------------------------


EVERY_PASS = [
    {}, {"method": "sparsegpt"}, {"method": "best", "pattern": "unstructured"}, {"method": "alps"},
    {"method": "taylor"}, {"pattern": "unstructured", "allocation": "evolutionary", "generations": 1},
    {"pattern": "unstructured", "allocation": "ranked", "sensitivity": "hutchinson", "probes": 2},
]  # fmt: skip


@pytest.mark.parametrize("settings", EVERY_PASS, ids=lambda settings: "-".join(map(str, settings.values())))
@pytest.mark.parametrize("around", [
    torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16),
], ids=["inference_mode", "no_grad", "autocast"])  # fmt: skip
def test_a_mode_of_torch_around_it_decides_nothing(settings, around):
    expected, _ = pruned(**settings)
    model = any_model("llama")
    with around():
        one_shot(model, WINDOWS.clone(), OneShotConfig(**settings))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_autocast_after_it_sees_the_pruned_weights():
    model = any_model("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = model(WINDOWS).logits
        one_shot(model, WINDOWS)
        after = model(WINDOWS).logits
        assert torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(WINDOWS).logits, after) and not torch.equal(dense, after)


def test_a_model_that_was_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = any_model("llama")
    assert refusal(ConfigError, model) == (
        "model.embed_tokens.weight: was made in torch.inference_mode(), and cannot be written to outside of it. Load "
        "the model outside of it; one_shot may be called inside."
    )


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def other_default_dtype(request):
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("settings", [
    *({"method": method} for method in ("fast", "balanced", "taylor", "fista", "isc")),
    *({"method": "best", "pattern": "unstructured", "allocation": allocation}
      for allocation in ("error_curves", "owl", "alpha", "ranked")),
    {"pattern": "unstructured", "allocation": "evolutionary", "generations": 1}, {"pattern": "mixed"},
    {"pattern": "unstructured", "allocation": "ranked", "sensitivity": "hutchinson", "probes": 2},
    {"bits": 4, "group_size": 8},
], ids=lambda settings: "-".join(map(str, settings.values())))  # fmt: skip
def test_the_default_dtype_decides_nothing(settings, other_default_dtype):
    expected, expected_report = pruned(**settings)
    model = any_model("llama")
    torch.set_default_dtype(other_default_dtype)
    report = one_shot(model, WINDOWS, OneShotConfig(**settings))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    for row, other in zip(report.matrices, expected_report.matrices, strict=True):
        assert (row.error, row.sensitivity) == (other.error, other.sensitivity)
