"""Everything that a peft user does, done to a model with sparse adapters."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_adaptive_sparse.errors import ConfigError, FormatError, PatternError, TargetError
from hf_adaptive_sparse.families import FAMILIES
from hf_adaptive_sparse.hf.adapter import AdaptiveSparseConfig, AdaptiveSparseLinear, AdaptiveSparseModel
from hf_adaptive_sparse.hf.sparse_layers import learned_masks_config, sparse_layers
from hf_adaptive_sparse.methods.learned_masks import LearnedMasksConfig
from hf_adaptive_sparse.patterns import NMPattern
from tests.tiny_models import tiny_model, tokens

INPUT = tokens()
every_family = pytest.mark.parametrize("family", FAMILIES)


def adapted(model_type: str = "llama", seed: int = 0, model: nn.Module | None = None, **settings) -> PeftModel:
    model = tiny_model(model_type, seed) if model is None else model
    return get_peft_model(model, AdaptiveSparseConfig(**settings)).eval()


@torch.no_grad()
def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every trainable parameter and choose the masks anew, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype), alpha=0.05)
    for layer in sparse_layers(model):
        if layer.config.mask_policy == "adaptive":
            layer.keep.copy_(NMPattern(2, 4).keep_mask(layer.weight.abs()))
    return model


def in_first_layout(module: nn.Module) -> torch.Tensor:
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def is_two_four(weight: torch.Tensor) -> bool:
    """Counted by hand: at most two of four neighbours along the inputs, and no -0.0 in the others."""
    groups = weight.reshape(weight.shape[0], -1, 4)
    zeros = groups == 0
    return bool((zeros.sum(-1) >= 2).all()) and not bool((torch.signbit(groups) & zeros).any())


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT).logits


# -- what is injected -----------------------------------------------------------------------------------------


@every_family
def test_exactly_the_linears_of_the_decoder_are_wrapped(family):
    plain = tiny_model(family)
    model = adapted(family)
    wrapped = {name for name, module in model.get_base_model().named_modules() if type(module) is AdaptiveSparseLinear}
    assert wrapped == {name for name, _ in plain.named_modules() if FAMILIES[family].is_target(name)}
    assert [layer.name for layer in sparse_layers(model)] == [name for name, _ in plain.named_modules() if name in wrapped]


@every_family
def test_the_student_is_the_dense_model_with_its_smaller_weights_zeroed(family):
    expected = tiny_model(family)
    for name, module in expected.named_modules():
        if FAMILIES[family].is_target(name):
            weight = in_first_layout(module).detach()
            for group in weight.reshape(-1, 4) if weight.is_contiguous() else [
                row[i : i + 4] for row in weight for i in range(0, len(row), 4)
            ]:
                group[group.abs().argsort()[:2]] = 0.0
    # Conv1D multiplies [in, out] in another order than its [out, in] twin.
    torch.testing.assert_close(logits(adapted(family)), logits(expected), rtol=0.0, atol=1e-5)


@every_family
def test_merging_gives_a_plain_model_whose_targets_are_two_four(family):
    plain, model = tiny_model(family), shake(adapted(family))
    before = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(plain) and merged.state_dict().keys() == plain.state_dict().keys()
    targets = [module for name, module in merged.named_modules() if FAMILIES[family].is_target(name)]
    assert len(targets) == 2 * len(FAMILIES[family].targets)
    assert all(is_two_four(in_first_layout(module)) for module in targets)
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
        assert torch.equal(layer.weight, in_first_layout(base))
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
    assert all(is_two_four(m.weight) for n, m in merged.named_modules() if FAMILIES["llama"].is_target(n))


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


# -- several adapters -----------------------------------------------------------------------------------------


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
        "cannot merge the adapters default, second together: a sum of sparse weights is not sparse. Merge one of "
        "them, with adapter_names=[...] or after set_adapter(...)."
    )
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            merge()
    before = logits(model)
    assert torch.equal(logits(model), before)  # nothing was merged
    assert model.get_model_status().merged_adapters == []
    merged = model.merge_and_unload(adapter_names=["second"])
    assert is_two_four(merged.model.layers[0].self_attn.q_proj.weight)


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
    with pytest.raises(ValueError, match="^NaNs detected in the merged weights. The adapter default seems to be broken$"):
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
        "an adapter cannot be added while another one is merged: it would start from the merged weights. Call "
        "unmerge_adapter() first."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        model.add_adapter("second", AdaptiveSparseConfig())
    model.unmerge_adapter()
    model.add_adapter("second", AdaptiveSparseConfig())


def test_a_batch_cannot_mix_adapters():
    model = adapted()
    message = (
        "adapter_names: one batch cannot mix sparse adapters, each has weights of its own. Call set_adapter(...) "
        "and run one batch per adapter."
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


# -- saving and loading ---------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "norms and head": {"modules_to_save": ["norm", "lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "branch": {"slorb_k": 8},
    "branch that sums": {"slorb_k": 8, "slorb_train_projection": False},
    "inplace": {"layout": "inplace"},
    "frozen": {"mask_policy": "frozen"},
    "biases": {"bias": "all"},
}


def load_peft(base, folder):
    return PeftModel.from_pretrained(base, folder)


def load_peft_low_memory(base, folder):
    return PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)


def load_peft_to_train(base, folder):
    return PeftModel.from_pretrained(base, folder, is_trainable=True).eval()


def load_auto_peft(base, folder):
    return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=base.dtype)


def load_native(base, folder):
    base.load_adapter(folder)
    return base


def load_native_to_train(base, folder):
    base.load_adapter(folder, is_trainable=True)
    return base


def load_auto_native(base, folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype)


LOADERS = [
    load_peft,
    load_peft_low_memory,
    load_peft_to_train,
    load_auto_peft,
    load_native,
    load_native_to_train,
    load_auto_native,
]


def base_of(variant: str, family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_model(family, dtype=dtype)
    return pruned(model, family) if variant == "frozen" else model


def pruned(model: nn.Module, family: str = "llama") -> nn.Module:
    for name, module in model.named_modules():
        if FAMILIES[family].is_target(name):
            weight = in_first_layout(module).data
            weight[~NMPattern(2, 4).keep_mask(weight.abs())] = 0.0
    return model


def saved(variant: str, family: str, folder, dtype: torch.dtype = torch.float32) -> PeftModel:
    base = base_of(variant, family, dtype)
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model = shake(get_peft_model(base, AdaptiveSparseConfig(**VARIANTS[variant]))).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of a tied head among modules_to_save
        model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_loader_brings_back_the_same_model(variant, load, tmp_path):
    model = saved(variant, "llama", tmp_path)
    expected = logits(model)
    loaded = load(base_of(variant, "llama"), str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), expected)
    for before, after in zip(sparse_layers(model), sparse_layers(loaded), strict=True):
        assert before.name == after.name
        assert torch.equal(before.weight, after.weight) and torch.equal(before.keep, after.keep)
        assert after.weight.requires_grad == load.__name__.endswith("train")
        if variant == "inplace":
            assert after.layer.base_layer.weight is after.weight


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_every_loader_brings_back_other_families(family, load, tmp_path):
    expected = logits(saved("plain", family, tmp_path))
    assert torch.equal(logits(load(tiny_model(family), str(tmp_path / "adapter"))), expected)


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
def test_every_loader_keeps_float32_latents_on_a_bfloat16_model(load, tmp_path):
    model = saved("branch", "llama", tmp_path, torch.bfloat16)
    loaded = load(tiny_model(dtype=torch.bfloat16), str(tmp_path / "adapter"))
    assert loaded.dtype == torch.bfloat16
    for before, after in zip(sparse_layers(model), sparse_layers(loaded), strict=True):
        assert after.weight.dtype == torch.float32 and torch.equal(before.weight, after.weight)
        assert not torch.equal(after.weight, after.weight.bfloat16().float())
    assert torch.equal(logits(loaded), logits(model))


def test_tensors_on_disk_have_the_names_and_shapes_of_the_registered_ones(tmp_path):
    model = saved("branch", "llama", tmp_path)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    registered = {
        name.removesuffix(".default"): tensor for name, tensor in model.state_dict().items() if name.endswith(".default")
    }
    assert tensors.keys() == registered.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in registered.items())
    assert {name.rpartition(".")[2] for name in tensors} == {
        "adaptive_sparse_weight", "adaptive_sparse_keep", "adaptive_sparse_S", "adaptive_sparse_P"
    }  # fmt: skip


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
@pytest.mark.parametrize("lost", ["keep", "weight"])
def test_a_file_without_its_masks_or_weights_is_refused(lost, load, tmp_path):
    saved("plain", "llama", tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    name = f"base_model.model.model.layers.1.mlp.up_proj.adaptive_sparse_{lost}"
    save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path, {"format": "pt"})
    message = (
        f"the file of adapter 'default' lacks 1 tensors, the first model.layers.1.mlp.up_proj.adaptive_sparse_{lost}. "
        "A mask cannot be recomputed from the weights. Save the adapter again with save_pretrained; to start a new "
        "one instead, build a new AdaptiveSparseConfig."
    )
    with pytest.raises(FormatError, match=f"^{re.escape(message)}$"):
        logits(load(tiny_model(), str(tmp_path / "adapter")))


def test_a_config_from_a_file_starts_a_fresh_adapter_too(tmp_path):
    AdaptiveSparseConfig(inference_mode=False).save_pretrained(str(tmp_path))
    config = AdaptiveSparseConfig.from_pretrained(str(tmp_path))
    model = get_peft_model(tiny_model(), config).train()
    assert torch.equal(logits(model), logits(adapted()))


def test_several_adapters_are_saved_and_loaded_by_name(tmp_path):
    model = shake(adapted())
    model.add_adapter("second", AdaptiveSparseConfig(target_modules=["q_proj"]))
    model.set_adapter("second")
    shake(model, seed=2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    for name in ("default", "second"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))


def test_a_native_adapter_has_float32_latents_on_a_bfloat16_model_and_trains():
    model = tiny_model(dtype=torch.bfloat16)
    dense = logits(model)
    model.add_adapter(AdaptiveSparseConfig())
    assert {layer.weight.dtype for layer in sparse_layers(model)} == {torch.float32}
    model(INPUT, labels=INPUT).loss.backward()
    assert all(layer.weight.grad is not None for layer in sparse_layers(model))
    model.disable_adapters()
    assert torch.equal(logits(model), dense)
    model.enable_adapters()
    assert not torch.equal(logits(model), dense)
    model.delete_adapter("default")
    assert torch.equal(logits(model), dense)


def test_a_native_adapter_is_saved_and_loaded(tmp_path):
    model = tiny_model()
    model.add_adapter(AdaptiveSparseConfig())
    expected = logits(shake(model))
    model.save_pretrained(tmp_path)
    for load in (load_native, load_peft):
        assert torch.equal(logits(load(tiny_model(), str(tmp_path))), expected)


def test_a_model_with_an_adapter_can_be_copied_and_pickled():
    model = shake(adapted(modules_to_save=["norm"]))
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        shake(other, seed=3)
        assert not torch.equal(logits(other), expected)
    assert torch.equal(logits(model), expected)


# -- one weight for model and adapter ---------------------------------------------------------------------------


def test_inplace_trains_the_weight_of_the_model_and_holds_no_second_one():
    plain, model = tiny_model(), adapted(layout="inplace").train()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    model(INPUT, labels=INPUT).loss.backward()
    for layer in sparse_layers(model):
        assert layer.weight is layer.layer.base_layer.weight and layer.weight.grad is not None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(layer.weight.numel() for layer in sparse_layers(model))
    assert torch.equal(logits(model.eval()), logits(adapted()))


def test_inplace_on_a_bfloat16_model_trains_in_float32_and_merges_to_bfloat16():
    model = shake(adapted(model=tiny_model(dtype=torch.bfloat16), layout="inplace"))
    assert {layer.weight.dtype for layer in sparse_layers(model)} == {torch.float32}
    before = logits(model)
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16} and torch.equal(logits(merged), before)
    assert all(is_two_four(m.weight) for n, m in merged.named_modules() if FAMILIES["llama"].is_target(n))


def test_inplace_refuses_whatever_needs_the_dense_weight():
    model = adapted(layout="inplace")

    def message(what):
        text = (
            f"an adapter with layout='inplace' cannot be {what}: it trains the weights of the model itself, and the "
            "dense ones are gone. Use layout='copy', or load the dense model a second time."
        )
        return f"^{re.escape(text)}$"

    before = logits(model)
    with pytest.raises(ConfigError, match=message("disabled")), model.disable_adapter():
        pass
    with pytest.raises(ConfigError, match=message("deleted")):
        model.delete_adapter("default")
    with pytest.raises(ConfigError, match=message("unloaded")):
        model.unload()
    other = (
        "layout='inplace' trains the weights of the model itself, so a model carries one such adapter and no other; "
        "it has default. Use layout='copy' for all of them."
    )
    for layout in ("copy", "inplace"):
        with pytest.raises(ConfigError, match=f"^{re.escape(other)}$"):
            model.add_adapter("second", AdaptiveSparseConfig(layout=layout))
    assert torch.equal(logits(model), before)


def test_inplace_refuses_a_weight_that_is_stored_across_its_groups():
    message = (
        "transformer.h.0.attn.c_attn: layout='inplace' trains the weight of the model itself, and a Conv1D stores it "
        "[in, out], across the groups. Use layout='copy'."
    )
    with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
        adapted("gpt2", layout="inplace")


# -- zeros that are there already -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_masks_keep_exactly_the_zeros_of_the_model(family):
    model = adapted(model=pruned(tiny_model(family), family), mask_policy="frozen").train()
    before = {layer.name: layer.weight.detach().clone() for layer in sparse_layers(model)}
    for layer in sparse_layers(model):
        assert torch.equal(layer.keep, before[layer.name] != 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(3):
        model(INPUT, labels=INPUT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in sparse_layers(model):
        assert torch.equal(layer.weight != 0, before[layer.name] != 0)
        assert not torch.equal(layer.weight, before[layer.name])


def test_frozen_masks_need_a_model_that_is_sparse():
    model = pruned(tiny_model())
    model.model.layers[1].mlp.up_proj.weight.data[5, 8:12] = 1.0
    message = (
        "model.layers.1.mlp.up_proj: mask_policy='frozen' keeps the zeros that the model has, but row 5, group 2 is "
        "not 2:4. Prune the model first, or use mask_policy='adaptive'."
    )
    with pytest.raises(PatternError, match=f"^{re.escape(message)}$"):
        adapted(model=model, mask_policy="frozen")
    assert not any(isinstance(module, AdaptiveSparseLinear) for module in model.modules())


# -- what is refused ----------------------------------------------------------------------------------------------


def wrapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, AdaptiveSparseLinear)]


def test_a_weight_with_nan_or_inf_is_named():
    for value in (float("nan"), float("inf"), -float("inf")):
        model = tiny_model()
        model.model.layers[1].mlp.down_proj.weight.data[2, 7] = value
        model.model.layers[1].mlp.down_proj.weight.data[9, 1] = value
        message = (
            "model.layers.1.mlp.down_proj: the weight has 2 values that are NaN or inf, the first at row 2, column 7. "
            "The model is damaged; load it again, or from another source."
        )
        with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
            adapted(model=model)
        assert wrapped(model) == []


def test_input_features_that_do_not_fill_groups_are_named():
    model = tiny_model(intermediate_size=66)
    message = (
        "model.layers.0.mlp.down_proj: 2:4 needs the input features to be a multiple of 4, got 66 in a [32, 66] "
        "weight. Add the layer to `exclude_modules`, or pad it."
    )
    with pytest.raises(PatternError, match=f"^{re.escape(message)}$"):
        adapted(model=model)
    assert wrapped(model) == []
    adapted(model=model, exclude_modules=["down_proj"])


@pytest.mark.parametrize(
    "targets, missing, close",
    [
        (["q_prj"], "'q_prj'", "q_proj, v_proj, o_proj"),
        (["q_proj", "up_poj", "zzz"], "'up_poj', 'zzz'", None),
        (r"model\.layers\.9\..*q_proj", r"'model\\.layers\\.9\\..*q_proj'", None),
        (["transformer.h.0.q_proj"], "'transformer.h.0.q_proj'", "q_proj, v_proj, o_proj"),
    ],
)
def test_a_target_that_does_not_exist_is_named_with_the_closest_names(targets, missing, close):
    model = tiny_model()
    names = r"[a-z_, ]+" if close is None else re.escape(close)
    with pytest.raises(TargetError) as caught:
        adapted(model=model, target_modules=targets)
    assert re.fullmatch(
        re.escape(f"target_modules: no module of the model matches {missing}. Closest names: ")
        + names
        + re.escape(
            ". Write the end of a module's name, a regular expression over full names, or 'all-linear'."
        ),
        str(caught.value),
    )
    assert wrapped(model) == []


def test_targets_that_are_all_left_out_again_are_an_error():
    message = (
        "target_modules: every module that it names is left out again by exclude_modules, modules_to_save or "
        "layers_to_transform. Leave at least one to make sparse."
    )
    for settings_ in ({"exclude_modules": ["q_proj"]}, {"layers_to_transform": [7]}, {"modules_to_save": ["q_proj"]}):
        with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
            adapted(target_modules=["q_proj"], **settings_)


def test_an_unknown_family_is_named_with_the_known_ones():
    model = tiny_model()
    model.config.model_type = "mamba"
    message = (
        "no default target modules for a model of type 'mamba'; known: bloom, falcon, gemma, gemma2, gemma3, "
        "gemma3_text, gpt2, gpt_neox, llama, mistral, opt, phi3, qwen2, qwen3. Name them with target_modules=[...], "
        "or write target_modules='all-linear'."
    )
    with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
        adapted(model=model)


@pytest.mark.parametrize(
    "module, name, message",
    [
        (
            lambda: nn.Embedding(8, 32),
            "a torch.nn.modules.sparse.Embedding cannot be made sparse, only torch.nn.Linear and transformers' "
            "Conv1D. Change `target_modules`, or add the module to `exclude_modules`.",
            "kind",
        ),
        (
            lambda: nn.Linear(32, 32, device="meta"),
            "the weight is on the meta device, and sparse training starts from its values. Load the model without "
            "offloading.",
            "meta",
        ),
        (
            lambda: nn.Linear(32, 32).to(torch.float8_e4m3fn),
            "the weight is torch.float8_e4m3fn, and sparse training starts from float weights. Load the model "
            "without quantization.",
            "dtype",
        ),
    ],
    ids=["kind", "meta", "dtype"],
)
def test_a_module_that_cannot_be_sparse_is_named(module, name, message):
    model = tiny_model()
    model.model.layers[0].self_attn.q_proj = module()
    with pytest.raises(TargetError, match=f"^{re.escape(f'model.layers.0.self_attn.q_proj: {name}')}$"):
        adapted(model=model)
    assert len(wrapped(model)) == 0


# -- which modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_all_linear_leaves_the_head_out_also_when_it_is_tied(family):
    for tied in (False, True):
        model = adapted(family, model=tiny_model(family, tie_word_embeddings=tied), target_modules="all-linear")
        assert {layer.name for layer in sparse_layers(model)} == {
            layer.name for layer in sparse_layers(adapted(family))
        }


@pytest.mark.parametrize(
    "family, settings_",
    [
        ("llama", {"layers_to_transform": [1]}),
        ("llama", {"layers_to_transform": 1, "layers_pattern": "layers"}),
        ("llama", {"layers_to_transform": [1], "target_modules": "all-linear"}),
        ("llama", {"target_modules": r"model\.layers\.1\..*_proj"}),
        ("gemma3", {"layers_to_transform": [1]}),
        ("gpt2", {"layers_to_transform": [1]}),
    ],
)
def test_layers_to_transform_is_followed(family, settings_):
    names = [layer.name for layer in sparse_layers(adapted(family, **settings_))]
    assert names == [layer.name for layer in sparse_layers(adapted(family)) if ".1." in layer.name] != []


def test_exclude_modules_is_followed():
    names = [layer.name for layer in sparse_layers(adapted(exclude_modules=["down_proj"]))]
    assert len(names) == 12 and not any("down_proj" in name for name in names)


# -- the config ---------------------------------------------------------------------------------------------------


def test_the_schedule_is_that_of_learned_masks_field_by_field():
    config = AdaptiveSparseConfig(mask_interval=7, decay=0.5, decay_norm="absolute", freeze_fraction=0.1)
    assert config.learned_masks == LearnedMasksConfig(
        mask_interval=7, decay=0.5, decay_norm="absolute", freeze_fraction=0.1
    )
    assert AdaptiveSparseConfig().learned_masks == LearnedMasksConfig()
    assert learned_masks_config(adapted(mask_interval=3)) == LearnedMasksConfig(mask_interval=3)


def test_every_field_has_a_help_text():
    fields = AdaptiveSparseConfig.__dataclass_fields__
    assert [name for name, entry in fields.items() if not entry.metadata.get("help")] == []


@pytest.mark.parametrize(
    "settings_, message",
    [
        ({"pattern": "2/4"}, "unknown pattern '2/4'; known: 2:4, 1:4, 4:8, unstructured, or any n:m such as '2:8'."),
        ({"saliency": "wanda"}, "unknown saliency 'wanda'; known: magnitude."),
        ({"init_mask": "random"}, "unknown init_mask 'random'; known: magnitude, dense."),
        ({"layout": "shared"}, "unknown layout 'shared'; known: copy, inplace."),
        ({"bias": "lora_only"}, "unknown bias 'lora_only'; known: none, all, adaptive_sparse_only."),
        ({"slorb_init": "zeros"}, "unknown slorb_init 'zeros'; known: mean, sum, xavier, zero."),
        ({"slorb_k": 1}, "slorb_k is a number of inputs per block and at least 2, got 1."),
        (
            {"target_modules": []},
            "target_modules is empty. Leave it out for the default of the model's family, or name modules.",
        ),
        (
            {"mask_policy": "frozen", "init_mask": "dense"},
            "mask_policy='frozen' takes its mask from the zeros of the model, so init_mask='dense' can have no "
            "effect. Leave init_mask out, or write mask_policy='adaptive'.",
        ),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [1]},
            "layers_to_transform has no effect with a regular expression as target_modules. Put the layers into the "
            "expression, or give target_modules as a list of names.",
        ),
        (
            {"layers_pattern": "layers"},
            "layers_pattern says where to look for layers_to_transform, which is not set. Set both.",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_exists_is_valid(settings_, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        AdaptiveSparseConfig(**settings_)


# -- peft's own reports -------------------------------------------------------------------------------------------


def test_peft_counts_our_parameters(capsys):
    model = adapted()
    model.print_trainable_parameters()
    trainable = sum(layer.weight.numel() for layer in sparse_layers(model))
    total = sum(p.numel() for p in model.parameters())
    expected = f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}\n"
    assert capsys.readouterr().out == expected


def test_peft_reports_the_state_of_our_layers():
    model = adapted()
    status = model.get_model_status()
    assert (status.peft_types, status.num_adapter_layers, status.enabled) == ({"default": "ADAPTIVE_SPARSE"}, 14, True)
    assert status.active_adapters == status.available_adapters == ["default"]
    assert status.requires_grad == {"default": True} and status.devices == {"default": ["cpu"]}
    layers = model.get_layer_status()
    assert [layer.module_type for layer in layers] == ["adaptive_sparse.AdaptiveSparseLinear"] * 14
    assert layers[0].name == "model.model.layers.0.self_attn.q_proj"
    assert str(sparse_layers(model)[0].layer).startswith("adaptive_sparse.AdaptiveSparseLinear(")
