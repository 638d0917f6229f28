"""Sparse adapters without a dense twin, and on models that are sparse already."""

from __future__ import annotations

import re

import pytest
import torch

from hf_adaptive_sparse.errors import ConfigError, PatternError, TargetError
from hf_adaptive_sparse.hf.adapter import AdaptiveSparseConfig, AdaptiveSparseLinear
from hf_adaptive_sparse.hf.sparse_layers import sparse_layers
from tests.hf.adapted_models import (
    INPUT,
    adapted,
    is_two_four,
    logits,
    pruned,
    shake,
    targets_of,
)
from tests.tiny_models import tiny_model


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
    assert all(is_two_four(module.weight) for module in targets_of(merged))


def test_inplace_refuses_whatever_needs_the_dense_weight():
    model = adapted(layout="inplace")

    def message(what):
        text = (
            f"an adapter with layout='inplace' cannot be {what}: it trains the weights of the model "
            "itself, and the dense ones are gone. Use layout='copy', or load the dense model a second "
            "time."
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
        "layout='inplace' trains the weights of the model itself, so a model carries one such adapter and "
        "no other; it has default. Use layout='copy' for all of them."
    )
    for layout in ("copy", "inplace"):
        with pytest.raises(ConfigError, match=f"^{re.escape(other)}$"):
            model.add_adapter("second", AdaptiveSparseConfig(layout=layout))
    assert torch.equal(logits(model), before)


def test_inplace_refuses_a_weight_that_is_stored_across_its_groups():
    message = (
        "transformer.h.0.attn.c_attn: layout='inplace' trains the weight of the model itself, and a "
        "Conv1D stores it [in, out], across the groups. Use layout='copy'."
    )
    with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
        adapted("gpt2", layout="inplace")


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
        "model.layers.1.mlp.up_proj: mask_policy='frozen' keeps the zeros that the model has, but row 5, "
        "group 2 is not 2:4. Prune the model first, or use mask_policy='adaptive'."
    )
    with pytest.raises(PatternError, match=f"^{re.escape(message)}$"):
        adapted(model=model, mask_policy="frozen")
    assert not any(isinstance(module, AdaptiveSparseLinear) for module in model.modules())
