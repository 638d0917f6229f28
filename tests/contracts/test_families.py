"""What every entry of FAMILIES must obey, held against a random model of that family."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_adaptive_sparse.families import FAMILIES
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


@every_family
def test_a_family_is_frozen_data(name):
    with pytest.raises(AttributeError):
        FAMILIES[name].name = "other"
    assert FAMILIES[name].name == name
    assert not any(isinstance(value, torch.Tensor) or callable(value) for value in vars(FAMILIES[name]).values())
