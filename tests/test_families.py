"""Every family names exactly the linears of its decoder blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_adaptive_sparse.families import FAMILIES, ModelFamily
from tests.tiny_models import CONFIGS, tiny_model

every_family = pytest.mark.parametrize("name", FAMILIES)


def linears(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def test_every_family_has_a_tiny_model_here():
    assert CONFIGS.keys() == FAMILIES.keys()


@every_family
def test_the_targets_are_the_linears_of_the_blocks_and_nothing_else(name):
    model, family = tiny_model(name), FAMILIES[name]
    # Independent of the names: whatever linear stands in the list of blocks.
    in_blocks = {each for each in linears(model) if each.startswith(f"{family.blocks}.")}
    targets = {each for each, _ in model.named_modules() if family.is_target(each)}
    assert targets == in_blocks
    assert len(targets) == 2 * len(family.targets)


@every_family
def test_every_name_of_a_family_is_found_in_its_model(name):
    model, family = tiny_model(name), FAMILIES[name]
    assert len(model.get_submodule(family.blocks)) == 2
    modules = [each for each, _ in model.named_modules()]
    # Falcons have one norm per block, or these: the large ones two, the oldest one after the attention.
    optional = {"falcon": {"ln_attn", "ln_mlp", "post_attention_layernorm"}}.get(name, set())
    for part in {*family.targets, *family.norms} - optional:
        assert any(f".{each}".endswith(f".{part}") for each in modules), part


@every_family
def test_the_norms_are_all_the_norms_of_the_language_model(name):
    model, family = tiny_model(name), FAMILIES[name]
    tower = family.blocks.rpartition(".")[0]
    norms = {each for each, module in model.named_modules() if type(module).__name__.endswith("Norm")}
    named = {each for each in norms if each.rpartition(".")[2] in family.norms and each.startswith(tower)}
    assert named == {each for each in norms if each.startswith(tower)}


@every_family
def test_neither_embeddings_nor_head_are_targets(name):
    model, family = tiny_model(name), FAMILIES[name]
    outside = [model.get_input_embeddings(), model.get_output_embeddings()]
    assert not [each for each, module in model.named_modules() if module in outside and family.is_target(each)]


def test_the_two_norms_of_large_falcons_are_found():
    family = FAMILIES["falcon"]
    model = tiny_model("falcon", new_decoder_architecture=True, num_kv_heads=2)
    norms = {each.rpartition(".")[2] for each, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert norms == {"ln_attn", "ln_mlp", "ln_f"} and norms <= set(family.norms)
    targets = {each for each, _ in model.named_modules() if family.is_target(each)}
    assert targets == {each for each in linears(model) if each.startswith("transformer.h.")}


def test_is_target_compares_whole_parts_of_a_name():
    family = ModelFamily(name="x", attention=("attn.proj",), mlp=("fc",), blocks="h", norms=())
    assert family.is_target("h.0.attn.proj") and family.is_target("fc")
    assert not family.is_target("h.0.xattn.proj") and not family.is_target("h.0.proj")


def test_a_scope_leaves_other_towers_out():
    family = FAMILIES["gemma3"]
    assert family.is_target("model.language_model.layers.0.self_attn.q_proj")
    assert not family.is_target("model.vision_tower.encoder.layers.0.self_attn.q_proj")
    assert not family.is_target("model.my_language_model.layers.0.self_attn.q_proj")


@every_family
def test_a_family_is_frozen_data(name):
    with pytest.raises(AttributeError):
        FAMILIES[name].name = "other"
    assert FAMILIES[name].name == name
    assert not any(isinstance(value, torch.Tensor) or callable(value) for value in vars(FAMILIES[name]).values())
