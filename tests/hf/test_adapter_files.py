"""Sparse adapters on disk: every way to save and load them, and files that lack something."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_adaptive_sparse.errors import FormatError
from hf_adaptive_sparse.hf.adapter import AdaptiveSparseConfig
from hf_adaptive_sparse.hf.sparse_layers import sparse_layers
from tests.hf.adapted_models import (
    INPUT,
    adapted,
    logits,
    pruned,
    shake,
)
from tests.tiny_models import tiny_model

VARIANTS = {
    "plain": {},
    "norms and head": {"modules_to_save": ["norm", "lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "branch": {"slorb_k": 8},
    "branch that sums": {"slorb_k": 8, "slorb_train_projection": False},
    "inplace": {"layout": "inplace"},
    "frozen": {"mask_policy": "frozen"},
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


@pytest.mark.parametrize("load", [load_peft, load_peft_low_memory, load_native], ids=lambda load: load.__name__)
@pytest.mark.parametrize("bias", ["all", "adaptive_sparse_only"])
def test_biases_train_in_place_and_are_saved(bias, load, tmp_path):
    model = adapted("opt", bias=bias).train()
    model(INPUT, labels=INPUT).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and name.endswith(".bias")}
    every = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    of_targets = {name for name in every if name.endswith(".base_layer.bias")}
    # The keys' bias shifts all scores of a query alike: it has a gradient, and it is zero up to rounding.
    assert trained == (every if bias == "all" else of_targets) and of_targets < every
    expected = logits(shake(model.eval()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tiny_model("opt"), str(tmp_path))), expected)


def test_tensors_on_disk_have_the_names_and_shapes_of_the_registered_ones(tmp_path):
    model = saved("branch", "llama", tmp_path)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    registered = {
        name.removesuffix(".default"): tensor
        for name, tensor in model.state_dict().items()
        if name.endswith(".default")
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
        "the file of adapter 'default' lacks 1 tensors, the first "
        f"model.layers.1.mlp.up_proj.adaptive_sparse_{lost}. A mask cannot be recomputed from the weights. "
        "Save the adapter again with save_pretrained; to start a new one instead, build a new "
        "AdaptiveSparseConfig."
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
