"""AdaptiveSparseConfig, and what peft reports about a model with it."""

from __future__ import annotations

import re

import pytest

from hf_adaptive_sparse.errors import ConfigError
from hf_adaptive_sparse.hf.adapter import AdaptiveSparseConfig
from hf_adaptive_sparse.hf.sparse_layers import learned_masks_config, sparse_layers
from hf_adaptive_sparse.methods.learned_masks import LearnedMasksConfig
from tests.hf.adapted_models import (
    adapted,
)


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
        (
            {"pattern": "2/4"},
            "unknown pattern '2/4'; known: 2:4, 1:4, 4:8, unstructured, or any n:m such as '2:8'.",
        ),
        ({"saliency": "wanda"}, "unknown saliency 'wanda'; known: magnitude."),
        ({"init_mask": "random"}, "unknown init_mask 'random'; known: magnitude, dense."),
        ({"layout": "shared"}, "unknown layout 'shared'; known: copy, inplace."),
        ({"bias": "lora_only"}, "unknown bias 'lora_only'; known: none, all, adaptive_sparse_only."),
        ({"slorb_init": "zeros"}, "unknown slorb_init 'zeros'; known: mean, sum, xavier, zero."),
        ({"slorb_k": 1}, "slorb_k is a number of inputs per block and at least 2, got 1."),
        (
            {"target_modules": []},
            "target_modules is empty. Leave it out for the default of the model family, or name modules.",
        ),
        (
            {"mask_policy": "frozen", "init_mask": "dense"},
            "mask_policy='frozen' takes its mask from the zeros of the model, so init_mask='dense' can "
            "have no effect. Leave init_mask out, or write mask_policy='adaptive'.",
        ),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [1]},
            "layers_to_transform has no effect with a regular expression as target_modules. Put the "
            "layers into the expression, or give target_modules as a list of names.",
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


def test_peft_counts_our_parameters(capsys):
    model = adapted()
    model.print_trainable_parameters()
    trainable = sum(layer.weight.numel() for layer in sparse_layers(model))
    total = sum(p.numel() for p in model.parameters())
    share = 100 * trainable / total
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}\n"
    )


def test_peft_reports_the_state_of_our_layers():
    model = adapted()
    status = model.get_model_status()
    assert (status.peft_types, status.num_adapter_layers, status.enabled) == (
        {"default": "ADAPTIVE_SPARSE"},
        14,
        True,
    )
    assert status.active_adapters == status.available_adapters == ["default"]
    assert status.requires_grad == {"default": True} and status.devices == {"default": ["cpu"]}
    layers = model.get_layer_status()
    assert [layer.module_type for layer in layers] == ["adaptive_sparse.AdaptiveSparseLinear"] * 14
    assert layers[0].name == "model.model.layers.0.self_attn.q_proj"
    assert str(sparse_layers(model)[0].layer).startswith("adaptive_sparse.AdaptiveSparseLinear(")
