"""The handles on sparse layers, and what is reported about them."""

from __future__ import annotations

import re

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hf_adaptive_sparse.errors import ConfigError, TargetError
from hf_adaptive_sparse.hf.adapter import (
    AdaptiveSparseConfig,
    ignore_keep_buffers_in_ddp,
    learned_masks_config,
    print_sparsity_report,
    sparse_layers,
    sparsity_report,
)
from hf_adaptive_sparse.hf.sparse_layers import plain_name
from tests.tiny_models import tiny_model

NO_LAYERS = "the model has no sparse layers{}. Add an adapter first: get_peft_model(model, AdaptiveSparseConfig())."


def adapted(**settings):
    return get_peft_model(tiny_model(), AdaptiveSparseConfig(**settings))


def test_handles_come_in_the_order_of_the_plain_model_and_with_its_names():
    names = [name for name, module in tiny_model().named_modules() if isinstance(module, nn.Linear)]
    assert [layer.name for layer in sparse_layers(adapted())] == names[:-1]


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "parallel"])
def test_names_are_those_of_the_plain_model_whatever_is_wrapped_around(wrap):
    model = adapted()
    assert [layer.name for layer in sparse_layers(wrap(model))] == [layer.name for layer in sparse_layers(model)]


@pytest.mark.parametrize(
    "name, plain",
    [
        ("base_model.model.model.layers.0.mlp", "model.layers.0.mlp"),
        ("module.base_model.model.model.layers.0.mlp", "model.layers.0.mlp"),
        ("_orig_mod.base_model.model.model.layers.0._orig_mod.mlp", "model.layers.0.mlp"),
        ("_fsdp_wrapped_module.base_model.model.h.0._fsdp_wrapped_module.mlp", "h.0.mlp"),
        ("model.layers.0._checkpoint_wrapped_module.mlp", "model.layers.0.mlp"),
        ("base_model.layers.0", "base_model.layers.0"),
    ],
)
def test_wrappers_leave_no_trace_in_a_name(name, plain):
    assert plain_name(name) == plain


def test_a_handle_reads_the_tensors_that_the_layer_has_now():
    model = adapted()
    handle = sparse_layers(model)[0]
    replaced = nn.Parameter(torch.zeros_like(handle.weight))
    handle.layer.adaptive_sparse_weight["default"] = replaced
    assert handle.weight is replaced
    assert handle.keep is handle.layer.adaptive_sparse_keep["default"]
    assert handle.config is model.peft_config["default"]


def test_models_without_sparse_layers_are_refused():
    model = adapted()
    for whose, call in [
        ("", lambda: sparse_layers(tiny_model())),
        (" of an adapter 'other'", lambda: sparse_layers(model, "other")),
    ]:
        with pytest.raises(TargetError, match=f"^{re.escape(NO_LAYERS.format(whose))}$"):
            call()
    with pytest.raises(ConfigError, match=f"^{re.escape(NO_LAYERS.format(''))}$"):
        learned_masks_config(tiny_model())


def test_active_adapters_that_disagree_on_their_schedule_are_refused():
    model = adapted(decay=0.5)
    model.add_adapter("second", AdaptiveSparseConfig(decay=0.25))
    assert learned_masks_config(model).decay == 0.5
    assert learned_masks_config(model, "second").decay == 0.25
    model.base_model.set_adapter(["default", "second"])
    message = (
        "the active adapters default, second differ in when their masks change. Activate one of them with "
        "set_adapter(...)."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        learned_masks_config(model)


def test_the_report_counts_what_is_kept_and_which_groups_break_the_pattern():
    model = adapted(target_modules=["q_proj", "down_proj"])
    handles = sparse_layers(model)
    handles[0].keep[3, :4] = True  # one group with four kept
    handles[1].keep[5, 4:12] = False  # two groups with none
    report = sparsity_report(model)
    assert [(entry.name, entry.weights) for entry in report] == [
        (handle.name, handle.weight.numel()) for handle in handles
    ]
    assert [(entry.kept, entry.violations) for entry in report[:2]] == [(512 + 2, 1), (1024 - 4, 0)]
    assert report[2].sparsity == 0.5


def test_the_printed_report_is_one_line_and_one_per_matrix_on_request(capsys):
    model = adapted(target_modules=["q_proj"])
    sparse_layers(model)[0].keep[0, :4] = True
    total = (
        "sparse matrices: 2 || kept weights: 1,026 || all weights: 2,048 || sparsity%: 49.9023 || groups "
        "that are not 2:4: 1\n"
    )
    print_sparsity_report(model)
    assert capsys.readouterr().out == total
    print_sparsity_report(model, per_layer=True)
    assert capsys.readouterr().out == (
        "model.layers.0.self_attn.q_proj  2:4  kept 514 of 1,024\n"
        "model.layers.1.self_attn.q_proj  2:4  kept 512 of 1,024\n" + total
    )


def test_a_peft_model_tells_ddp_to_leave_its_masks_alone():
    model = adapted()
    masks = {name for name, _ in model.named_buffers() if "adaptive_sparse_keep" in name}
    assert len(masks) == 14 and set(model._ddp_params_and_buffers_to_ignore) == masks


def test_a_native_adapter_tells_ddp_on_request_and_keeps_what_was_said_before():
    model = tiny_model()
    model.add_adapter(AdaptiveSparseConfig())
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["lm_head.weight"])
    names = ignore_keep_buffers_in_ddp(model)
    assert set(names) == {name for name, _ in model.named_buffers() if "adaptive_sparse_keep" in name}
    assert set(model._ddp_params_and_buffers_to_ignore) == {*names, "lm_head.weight"}
