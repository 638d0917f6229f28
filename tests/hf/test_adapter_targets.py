"""Which modules become sparse, and what is refused with which message."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from hf_adaptive_sparse.errors import PatternError, TargetError
from hf_adaptive_sparse.hf.adapter import AdaptiveSparseLinear
from hf_adaptive_sparse.hf.sparse_layers import sparse_layers
from tests.hf.adapted_models import (
    adapted,
)
from tests.tiny_models import tiny_model


def wrapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, AdaptiveSparseLinear)]


def test_a_weight_with_nan_or_inf_is_named():
    for value in (float("nan"), float("inf"), -float("inf")):
        model = tiny_model()
        model.model.layers[1].mlp.down_proj.weight.data[2, 7] = value
        model.model.layers[1].mlp.down_proj.weight.data[9, 1] = value
        message = (
            "model.layers.1.mlp.down_proj: the weight has 2 values that are NaN or inf, the first at row "
            "2, column 7. The model is damaged; load it again, or from another source."
        )
        with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
            adapted(model=model)
        assert wrapped(model) == []


def test_input_features_that_do_not_fill_groups_are_named():
    model = tiny_model(intermediate_size=66)
    message = (
        "model.layers.0.mlp.down_proj: 2:4 needs the input features to be a multiple of 4, got 66 in a "
        "[32, 66] weight. Add the layer to `exclude_modules`, or pad it."
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
        + re.escape(". Write the end of a module's name, a regular expression over full names, or 'all-linear'."),
        str(caught.value),
    )
    assert wrapped(model) == []


def test_targets_that_are_all_left_out_again_are_an_error():
    message = (
        "target_modules: every module that it names is left out again by exclude_modules, modules_to_save or "
        "layers_to_transform. Leave at least one to make sparse."
    )
    for settings_ in (
        {"exclude_modules": ["q_proj"]},
        {"layers_to_transform": [7]},
        {"modules_to_save": ["q_proj"]},
    ):
        with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
            adapted(target_modules=["q_proj"], **settings_)


def test_an_unknown_family_is_named_with_the_known_ones():
    model = tiny_model()
    model.config.model_type = "mamba"
    message = (
        "no default target modules for a model of type 'mamba'; known: bloom, falcon, gemma, gemma2, "
        "gemma3, gemma3_text, gpt2, gpt_neox, llama, mistral, opt, phi3, qwen2, qwen3. Name them with "
        "target_modules=[...], or write target_modules='all-linear'."
    )
    with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
        adapted(model=model)


@pytest.mark.parametrize(
    "module, name, message",
    [
        (
            lambda: nn.Embedding(8, 32),
            "a torch.nn.modules.sparse.Embedding cannot be made sparse, only torch.nn.Linear and "
            "transformers' Conv1D. Change `target_modules`, or add the module to `exclude_modules`.",
            "kind",
        ),
        (
            lambda: nn.Linear(32, 32, device="meta"),
            "the weight is on the meta device, and sparse training starts from its values. Load the model "
            "without offloading.",
            "meta",
        ),
        (
            lambda: nn.Linear(32, 32).to(torch.float8_e4m3fn),
            "the weight is torch.float8_e4m3fn, and sparse training starts from float weights. Load the "
            "model without quantization.",
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
