"""The SLoRB branch: its start, its cost, and how it leaves."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_adaptive_sparse.errors import ConfigError, PatternError
from hf_adaptive_sparse.hf import slorb
from hf_adaptive_sparse.hf.adapter import (
    AdaptiveSparseConfig,
    AdaptiveSparseLinear,
    slorb_cost,
    sparse_layers,
    unload_with_sidecar,
)
from hf_adaptive_sparse.methods.slorb import SLORB_INITS, BranchCost, branch_cost
from tests.hf import adapted_models
from tests.hf.adapted_models import INPUT, is_two_four, logits, out_by_in, shake, targets_of
from tests.tiny_models import tiny_model

seeds = st.integers(0, 2**31)
projections = pytest.mark.parametrize("trained", [True, False], ids=["trained", "sums"])


def layer_with_branch(rows=6, columns=32, k=8, init="mean", trained=True, seed=0) -> AdaptiveSparseLinear:
    torch.manual_seed(seed)
    config = AdaptiveSparseConfig(slorb_k=k, slorb_init=init, slorb_train_projection=trained)
    return AdaptiveSparseLinear(nn.Linear(columns, rows), "default", config, "linear")


def adapted(family: str = "llama", **settings) -> PeftModel:
    return adapted_models.adapted(family, **{"slorb_k": 8, **settings})


@settings(max_examples=25)
@given(seed=seeds, blocks=st.integers(1, 4), k=st.sampled_from([4, 8, 16]), rows=st.integers(1, 5))
def test_the_mean_start_keeps_the_sum_of_every_block_of_every_row(seed, blocks, k, rows):
    layer = layer_with_branch(rows, blocks * k, k, seed=seed)
    # What the layer computes for an input that is 1 on one block: the sum of the row there, plus the bias.
    inputs = torch.eye(blocks).repeat_interleave(k, dim=1)
    expected = nn.functional.linear(inputs, layer.base_layer.weight, layer.base_layer.bias)
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", SLORB_INITS)
def test_every_start_is_what_its_name_says(init):
    torch.manual_seed(0)
    layer = layer_with_branch(init=init)
    weight, keep = layer.base_layer.weight, layer.adaptive_sparse_keep["default"]
    scale = layer.adaptive_sparse_S["default"]
    masked = weight.detach() * ~keep
    lost = torch.stack([masked[:, 8 * i : 8 * i + 8].sum(dim=1) for i in range(4)], dim=1)
    if init == "xavier":
        bound = (6 / (6 + 4)) ** 0.5
        assert scale.abs().max() <= bound and 0.2 * bound < scale.std() < bound
    else:
        factor = {"mean": 1 / 8, "sum": 1.0, "zero": 0.0}[init]
        torch.testing.assert_close(scale.detach(), factor * lost)


@pytest.mark.parametrize("init", SLORB_INITS)
def test_a_trained_projection_starts_as_the_sum_over_blocks(init):
    trained, fixed = (layer_with_branch(init=init, trained=trained, seed=1) for trained in (True, False))
    fixed.load_state_dict(trained.state_dict(), strict=False)  # xavier draws anew
    x = torch.randn(3, 5, 32)
    torch.testing.assert_close(trained(x), fixed(x))
    assert trained.adaptive_sparse_P["default"].shape == (4, 32)
    assert "default" not in fixed.adaptive_sparse_P


@projections
def test_the_branch_trains(trained):
    model = adapted(slorb_train_projection=trained).train()
    model(INPUT, labels=INPUT).loss.backward()
    names = {name.rpartition(".adaptive_sparse_")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert names == {"weight.default", "S.default"} | ({"P.default"} if trained else set())


def test_a_frozen_or_dense_start_has_an_empty_mean_branch():
    for settings_ in ({"init_mask": "dense"}, {"slorb_init": "zero"}):
        model = adapted(**settings_)
        for handle in sparse_layers(model):
            assert not handle.layer.adaptive_sparse_S["default"].any()


@settings(max_examples=30)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 8), k=st.sampled_from([4, 8, 16]), trained=st.booleans())
def test_the_cost_is_what_the_parameters_count(rows, blocks, k, trained):
    layer = layer_with_branch(rows, blocks * k, k, trained=trained)
    extra = sum(p.numel() for n, p in layer.named_parameters() if "_S" in n or "_P" in n)
    cost = branch_cost(rows, blocks * k, k, 0.5, trained)
    assert (cost.kept_weights, cost.extra_weights) == (
        int(layer.adaptive_sparse_keep["default"].sum()),
        extra,
    )


@pytest.mark.parametrize("trained, percent", [(True, 26.2), (False, 12.5)])
def test_the_cost_on_llama_2_7b_is_the_published_count(trained, percent):
    """32 blocks of 4 x [4096, 4096], 2 x [11008, 4096] and [4096, 11008]; k = 16."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    costs = [branch_cost(*shape, 16, 0.5, trained) for shape in shapes * 32]
    total = sum(costs[1:], costs[0])
    assert total.kept_weights == 3_238_002_688
    assert round(total.weights_percent, 1) == percent
    assert total.extra_weights == (848_429_056 if trained else 404_750_336)
    # Of the dense linears: half of the percentage over the kept ones.
    assert round(total.operations_percent / 2, 1) == (13.1 if trained else 6.3)


def test_costs_add_up_over_a_model_and_are_told_when_it_is_made(monkeypatch):
    lines = []
    monkeypatch.setattr(slorb.logger, "info", lines.append)
    model = adapted()
    # 4 heads of width 8, 2 of them for keys and values: per block q, k, v, o, gate, up, down.
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)] * 2
    kept = sum(rows * columns // 2 for rows, columns in shapes)
    extra = sum(rows * columns // 8 + columns * columns // 8 for rows, columns in shapes)
    assert slorb_cost(model) == BranchCost(kept, extra, extra)
    share = 100 * extra / kept
    assert lines == [
        f"SLoRB adds {extra:,} weights to {kept:,} kept ones ({share:.1f} %) and {share:.1f} % to their "
        "operations per token. It cannot be merged into a sparse matrix."
    ]
    assert slorb_cost(get_peft_model(tiny_model(), AdaptiveSparseConfig())) is None


def test_a_block_that_does_not_fill_the_rows_is_named():
    message = (
        "model.layers.0.mlp.down_proj: blocks of slorb_k=32 inputs do not fill 48 input features. Take a "
        "slorb_k that divides it, or add the layer to `exclude_modules`."
    )
    with pytest.raises(PatternError, match=f"^{re.escape(message)}$"):
        get_peft_model(tiny_model(intermediate_size=48), AdaptiveSparseConfig(slorb_k=32))


@projections
def test_merging_a_branch_is_refused_and_names_the_way_out(trained):
    model = adapted(slorb_train_projection=trained)
    before = logits(model)
    message = (
        "cannot merge the adapter 'default': it has a SLoRB branch (slorb_k=8), which would fill every "
        "zero. Use unload_with_sidecar(model), which returns the sparse model and the branch as a LoRA "
        "adapter on top, or train without slorb_k."
    )
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            merge()
    assert torch.equal(logits(model), before)


@projections
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_the_sidecar_is_a_lora_on_a_sparse_model_with_the_same_logits(family, trained, tmp_path):
    norm = "ln_f" if family == "gpt2" else "norm"
    model = shake(adapted(family, slorb_train_projection=trained, modules_to_save=[norm]))
    expected = logits(model)
    plain, sidecar = unload_with_sidecar(model)
    torch.testing.assert_close(logits(sidecar), expected, rtol=0.0, atol=1e-5)
    assert not torch.allclose(logits(plain), expected, rtol=0.0, atol=1e-3)
    assert {type(module) for module in targets_of(plain, family)} <= {nn.Linear, Conv1D}
    assert all(is_two_four(out_by_in(module)) for module in targets_of(plain, family))
    # One set of weights, two models: both are saved on their own and come back.
    assert {p.data_ptr() for p in plain.parameters()} <= {p.data_ptr() for p in sidecar.parameters()}
    plain.save_pretrained(tmp_path / "plain")
    sidecar.save_pretrained(tmp_path / "sidecar")
    again = PeftModel.from_pretrained(type(plain).from_pretrained(tmp_path / "plain"), tmp_path / "sidecar").eval()
    torch.testing.assert_close(logits(again), expected, rtol=0.0, atol=1e-5)


def test_the_sidecar_of_a_named_adapter_leaves_the_others_behind():
    model = adapted()
    model.add_adapter("second", AdaptiveSparseConfig(slorb_k=16, target_modules=["up_proj"]))
    model.set_adapter("second")
    expected = logits(model)
    _, sidecar = unload_with_sidecar(model, "second")
    torch.testing.assert_close(logits(sidecar), expected, rtol=0.0, atol=1e-5)


def test_a_sidecar_without_a_branch_is_refused():
    model = adapted()
    model.add_adapter("second", AdaptiveSparseConfig())
    messages = {
        "second": "unload_with_sidecar: the adapter 'second' has no SLoRB branch (slorb_k is None). Use "
        "merge_and_unload(), which loses nothing.",
        None: "unload_with_sidecar: the adapters default, second are active. Say which one: adapter=...",
    }
    model.base_model.set_adapter(["default", "second"])
    before = logits(model)
    for adapter, message in messages.items():
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            unload_with_sidecar(model, adapter)
    assert torch.equal(logits(model), before)
