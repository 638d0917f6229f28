"""Sparse adapters on a model: what is injected, what it computes, and several at a time."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from hf_adaptive_sparse.errors import ConfigError, TargetError
from hf_adaptive_sparse.families import FAMILIES
from hf_adaptive_sparse.hf.adapter import AdaptiveSparseConfig, AdaptiveSparseLinear, AdaptiveSparseModel
from hf_adaptive_sparse.hf.sparse_layers import sparse_layers
from tests.hf.adapted_models import (
    INPUT,
    adapted,
    is_two_four,
    logits,
    out_by_in,
    shake,
    targets_of,
)
from tests.tiny_models import tiny_model

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_exactly_the_linears_of_the_decoder_are_wrapped(family):
    plain = tiny_model(family)
    model = adapted(family)
    wrapped = {name for name, module in model.get_base_model().named_modules() if type(module) is AdaptiveSparseLinear}
    assert wrapped == {name for name, _ in plain.named_modules() if FAMILIES[family].is_target(name)}
    assert [layer.name for layer in sparse_layers(model)] == [
        name for name, _ in plain.named_modules() if name in wrapped
    ]


@every_family
def test_the_student_is_the_dense_model_with_its_smaller_weights_zeroed(family):
    expected = tiny_model(family)
    for module in targets_of(expected, family):
        for row in out_by_in(module).detach():
            for group in row.split(4):
                group[group.abs().argsort()[:2]] = 0.0
    # Conv1D multiplies [in, out] in another order than its [out, in] twin.
    torch.testing.assert_close(logits(adapted(family)), logits(expected), rtol=0.0, atol=1e-5)


@every_family
def test_merging_gives_a_plain_model_whose_targets_are_two_four(family):
    plain, model = tiny_model(family), shake(adapted(family))
    before = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(plain) and merged.state_dict().keys() == plain.state_dict().keys()
    targets = targets_of(merged, family)
    assert len(targets) == 2 * len(FAMILIES[family].targets)
    assert all(is_two_four(out_by_in(module)) for module in targets)
    torch.testing.assert_close(logits(merged), before, rtol=0.0, atol=1e-5)
    others = {key for key in plain.state_dict() if not FAMILIES[family].is_target(key.removesuffix(".weight"))}
    assert all(torch.equal(merged.state_dict()[key], plain.state_dict()[key]) for key in others)


@every_family
def test_the_dense_model_is_untouched_and_one_switch_away(family):
    expected = logits(tiny_model(family))
    model = shake(adapted(family))
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), expected)


def test_a_merged_llama_computes_the_same_to_the_last_bit():
    model = shake(adapted())
    before = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_dense_start_changes_nothing(family):
    expected = logits(tiny_model(family))
    torch.testing.assert_close(logits(adapted(family, init_mask="dense")), expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_latent_weights_are_contiguous_out_by_in_and_copies(family):
    model = adapted(family)
    for layer in sparse_layers(model):
        base = layer.layer.base_layer
        assert layer.weight.shape == (layer.layer.out_features, layer.layer.in_features) == layer.keep.shape
        assert layer.weight.is_contiguous() and layer.keep.dtype == torch.bool
        assert torch.equal(layer.weight, out_by_in(base))
        assert layer.weight.untyped_storage().data_ptr() != base.weight.untyped_storage().data_ptr()


def test_only_the_adapter_trains_and_every_latent_weight_gets_a_gradient():
    model = adapted(modules_to_save=["norm"]).train()
    model(INPUT, labels=INPUT).loss.backward()
    for name, parameter in model.named_parameters():
        of_adapter = "adaptive_sparse_" in name or "modules_to_save" in name
        assert parameter.requires_grad == of_adapter, name
        assert (parameter.grad is not None) == of_adapter, name
    for layer in sparse_layers(model):
        assert (layer.weight.grad[~layer.keep] != 0).any()  # straight through the mask


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 6), groups=st.integers(1, 5), bias=st.booleans())
def test_the_gradient_is_that_of_the_masked_weight_for_all_weights(seed, rows, groups, bias):
    torch.manual_seed(seed)
    linear = nn.Linear(4 * groups, rows, bias=bias)
    layer = AdaptiveSparseLinear(linear, "default", AdaptiveSparseConfig(), "linear")
    x = torch.randn(3, 2, 4 * groups)
    weight = (linear.weight * layer.adaptive_sparse_keep["default"]).detach().requires_grad_()
    expected = functional.linear(x, weight, linear.bias)
    result = layer(x)
    torch.testing.assert_close(result, expected)
    (result**2).sum().backward()
    (expected**2).sum().backward()
    torch.testing.assert_close(layer.adaptive_sparse_weight["default"].grad, weight.grad)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), decay=st.floats(0.01, 10.0))
def test_the_backward_decay_adds_the_pull_of_masked_weights_to_the_gradient(seed, decay):
    torch.manual_seed(seed)
    layer = AdaptiveSparseLinear(nn.Linear(12, 5), "default", AdaptiveSparseConfig(), "linear")
    weight, keep = layer.adaptive_sparse_weight["default"], layer.adaptive_sparse_keep["default"]
    x = torch.randn(4, 12)
    plain = layer(x)
    (plain**2).sum().backward()
    expected = weight.grad + decay * weight.detach() * ~keep
    weight.grad = None
    layer.adaptive_sparse_backward_decay = decay
    pulled = layer(x)
    (pulled**2).sum().backward()
    assert torch.equal(pulled, plain)
    torch.testing.assert_close(weight.grad, expected)
    with torch.no_grad():
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_the_output_has_the_dtype_of_the_input_and_latents_are_float32_or_wider(base, given):
    layer = AdaptiveSparseLinear(nn.Linear(8, 4).to(base), "default", AdaptiveSparseConfig(), "linear")
    assert layer(torch.randn(2, 8).to(given)).dtype == given
    assert layer.adaptive_sparse_weight["default"].dtype == (base if base == torch.float64 else torch.float32)


def test_a_bfloat16_model_computes_in_bfloat16_and_trains_in_float32():
    model = adapted(model=tiny_model(dtype=torch.bfloat16)).train()
    output = model(INPUT, labels=INPUT)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert {layer.weight.grad.dtype for layer in sparse_layers(model)} == {torch.float32}
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert all(is_two_four(module.weight) for module in targets_of(merged))


def test_autocast_computes_in_bfloat16():
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        layer = sparse_layers(model)[0].layer
        assert layer(torch.randn(2, 32)).dtype == torch.bfloat16


def test_a_kept_value_that_underflows_is_merged_as_plus_zero():
    linear = nn.Linear(4, 1, bias=False).to(torch.float16)
    layer = AdaptiveSparseLinear(linear, "default", AdaptiveSparseConfig(), "linear")
    with torch.no_grad():
        layer.adaptive_sparse_weight["default"].copy_(torch.tensor([[-1e-12, -1.0, -0.5, -2e-12]]))
        layer.adaptive_sparse_keep["default"].copy_(torch.tensor([[True, True, False, False]]))
    layer.merge()
    assert linear.weight.tolist() == [[0.0, -1.0, 0.0, 0.0]]
    assert torch.signbit(linear.weight).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("autocast, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_autocast_adapter_dtype_is_followed(autocast, dtype):
    model = tiny_model(dtype=torch.bfloat16)
    model = get_peft_model(model, AdaptiveSparseConfig(slorb_k=8), autocast_adapter_dtype=autocast)
    assert {p.dtype for n, p in model.named_parameters() if "adaptive_sparse_" in n} == {dtype}
    assert model(INPUT).logits.isfinite().all()


def test_adapters_are_independent_and_one_is_active():
    model = adapted()
    first = logits(model)
    model.add_adapter("second", AdaptiveSparseConfig(target_modules=["q_proj", "down_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    shake(model, seed=1)
    second = logits(model)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"second"} and not torch.equal(first, second)
    assert {layer.adapter for layer in sparse_layers(model)} == {"second"} and len(sparse_layers(model)) == 4
    assert len(sparse_layers(model, "default")) == 14
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not [name for name in model.state_dict() if "default" in name]
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), second)


def test_two_active_adapters_add_their_differences_and_are_not_merged_together():
    model = adapted(target_modules=["q_proj"])
    model.add_adapter("second", AdaptiveSparseConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    layer = sparse_layers(model)[0].layer
    weight = layer.base_layer.weight
    deltas = [layer.masked_weight(name) - weight for name in ("default", "second")]
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), functional.linear(x, weight + sum(deltas)))
    message = (
        "cannot merge the adapters default, second together: a sum of sparse weights is not sparse. Merge "
        "one of them, with adapter_names=[...] or after set_adapter(...)."
    )
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            merge()
    before = logits(model)
    assert torch.equal(logits(model), before)  # nothing was merged
    assert model.get_model_status().merged_adapters == []
    merged = model.merge_and_unload(adapter_names=["second"])
    assert is_two_four(merged.model.layers[0].self_attn.q_proj.weight)


def test_a_merge_that_one_layer_refuses_changes_no_other_layer():
    model = adapted()
    model.add_adapter("second", AdaptiveSparseConfig(target_modules=["up_proj"]))
    model.base_model.set_adapter(["default", "second"])  # q_proj, before it, has the first one only
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError):
            merge()
        assert len(sparse_layers(model, "default")) == 14
        assert not any(layer.layer.merged for layer in sparse_layers(model))
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge_go_there_and_back(family, safe):
    dense, model = logits(tiny_model(family)), shake(adapted(family))
    sparse = logits(model)
    model.merge_adapter(safe_merge=safe)
    assert model.get_model_status().merged_adapters == ["default"]
    torch.testing.assert_close(logits(model), sparse, rtol=0.0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), sparse)
    model.merge_adapter()
    with model.disable_adapter():  # unmerges, as in all of peft
        assert torch.equal(logits(model), dense)
    assert torch.equal(logits(model), sparse)


def test_a_safe_merge_refuses_nan_and_changes_nothing():
    model = adapted()
    sparse_layers(model)[3].weight.data[0, 0] = float("nan")
    sparse_layers(model)[3].keep[0, 0] = True
    with pytest.raises(
        ValueError, match="^NaNs detected in the merged weights. The adapter default seems to be broken$"
    ):
        sparse_layers(model)[3].layer.merge(safe_merge=True)
    assert sparse_layers(model)[3].layer.base_layer.weight.isfinite().all()


def test_merging_twice_and_unmerging_twice_warn_as_peft_does():
    model = adapted(target_modules=["q_proj"], layers_to_transform=[0])
    model.merge_adapter()
    with pytest.warns(UserWarning, match="^All adapters are already merged, nothing to do.$"):
        model.merge_adapter()
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="^Already unmerged. Nothing to do.$"):
        model.unmerge_adapter()


def test_an_adapter_is_not_added_to_merged_weights():
    model = adapted()
    model.merge_adapter()
    message = (
        "an adapter cannot be added while another one is merged: it would start from the merged weights. "
        "Call unmerge_adapter() first."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        model.add_adapter("second", AdaptiveSparseConfig())
    model.unmerge_adapter()
    model.add_adapter("second", AdaptiveSparseConfig())


def test_a_batch_cannot_mix_adapters():
    model = adapted()
    message = (
        "adapter_names: one batch cannot mix sparse adapters, each has weights of its own. Call "
        "set_adapter(...) and run one batch per adapter."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        model(INPUT, adapter_names=["default", "__base__"])


def test_a_second_method_on_a_sparse_layer_is_refused_before_anything_changes():
    model = tiny_model()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    before = list(model.state_dict())
    message = (
        "model.layers.0.self_attn.q_proj: a peft.tuners.lora.layer.Linear cannot be made sparse, only "
        "torch.nn.Linear and transformers' Conv1D. Change `target_modules`, or add the module to "
        "`exclude_modules`."
    )
    with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
        AdaptiveSparseModel(model, AdaptiveSparseConfig(), "sparse_one")
    assert list(model.state_dict()) == before
