"""What cannot be removed is refused before anything is changed."""

from __future__ import annotations

import pytest
import torch

from hf_adaptive_sparse.errors import ConfigError, TargetError
from hf_adaptive_sparse.hf.surgery import remove_units
from hf_adaptive_sparse.hf.unit_gates import gated
from hf_adaptive_sparse.hf.units import find_axes

from ..tiny_models import tokens
from .unit_models import unit_model


def refused(model, keep, optimizer=None) -> str:
    """The message of the error; the model is as it was."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    # A mask that fits comes first: nothing of it may be done either.
    first = {"model.layers.1.mlp": torch.arange(20) < 3} if model.config.model_type == "llama" else {}
    with pytest.raises((ConfigError, TargetError)) as caught:
        remove_units(model, {**first, **keep}, optimizer)
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)
    assert model.config.to_dict() == config
    return str(caught.value)


@pytest.mark.parametrize(
    "mask, found",
    [
        (torch.ones(2, dtype=torch.bool), "torch.bool of [2]"),
        (torch.ones(3), "torch.float32 of [3]"),
        (torch.ones(3, 1, dtype=torch.bool), "torch.bool of [3, 1]"),
        ([True, False, True], "a list"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, found):
    assert refused(unit_model("llama"), {"model.layers.1.self_attn": mask}) == (
        "model.layers.1.self_attn: keep is a bool tensor of [3], True for each unit of kind kv_head that stays; got "
        f"{found}."
    )


@pytest.mark.parametrize(
    "family, name, count, kind",
    [
        ("llama", "model.layers.1.self_attn", 3, "kv_head"),
        ("llama", "model.layers.0.mlp", 20, "mlp_channel"),
        ("llama", "model", 24, "hidden"),
        ("llama", "model.layers", 3, "layer"),
    ],
)
def test_removing_all_units_of_an_axis_is_refused(family, name, count, kind):
    assert refused(unit_model(family), {name: torch.zeros(count, dtype=torch.bool)}) == (
        f"{name}: 0 of {count} units of kind {kind} would stay, and the model needs at least 1. Keep more of them."
    )


def test_fewer_experts_than_a_token_needs_are_refused():
    name = "model.layers.1.mlp.experts"
    assert refused(unit_model("mixtral"), {name: torch.arange(4) < 1}) == (
        f"{name}: 1 of 4 units of kind expert would stay, and the model needs at least 2. Keep more of them."
    )


def test_an_axis_that_does_not_exist_is_refused_with_those_that_do():
    assert refused(unit_model("llama"), {"model.layers.1.attn": torch.ones(3, dtype=torch.bool)}) == (
        "'model.layers.1.attn': is no axis of this LlamaForCausalLM; the closest are model.layers.1.self_attn, "
        "model.layers.2.self_attn, model.layers.0.self_attn. find_axes lists them all."
    )


def test_layers_of_an_attention_that_divides_by_its_number_are_refused():
    model = unit_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert refused(model, {"transformer.h": torch.tensor([True, False, True])}) == (
        "GPT2LMHeadModel: scale_attn_by_inverse_layer_idx divides by the number of the layer, which changes for the "
        "layers behind a removed one. Only heads and channels can be removed from this model."
    )


def test_layers_whose_norms_follow_their_sums_are_refused_and_their_heads_and_channels_are_not():
    model = unit_model("opt", do_layer_norm_before=False)
    assert refused(model, {"model.decoder.layers": torch.tensor([True, False, True])}) == (
        "OPTForCausalLM: do_layer_norm_before=False has the norms of a layer behind its sums, so a layer that adds "
        "nothing still changes what it passes on, and a removed one does not. Only heads and channels can be removed "
        "from this model."
    )
    axes = {axis.name: axis for axis in find_axes(model, ("kv_head", "mlp_channel", "layer"))}
    keep = {name: torch.arange(axis.count) > 0 for name, axis in axes.items() if axis.kind != "layer"}
    gates = {name: each.float() for name, each in keep.items()}
    with torch.no_grad(), gated(model, list(axes.values()), gates):
        expected = model(tokens()).logits
    remove_units(model, {**keep, "model.decoder.layers": torch.ones(3, dtype=torch.bool)})
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, expected)


def test_an_optimizer_of_another_model_is_refused():
    optimizer = torch.optim.AdamW(unit_model("llama", 1).parameters())
    assert refused(unit_model("llama"), {}, optimizer) == (
        "optimizer: this AdamW trains no parameter of the model. Pass the one that was made for it, or None."
    )


def test_a_state_that_is_factored_is_refused():
    model = unit_model("llama")
    optimizer = torch.optim.Adafactor(model.parameters())
    model(tokens(2, 8), labels=tokens(2, 8)).loss.backward()
    optimizer.step()
    assert refused(model, {}, optimizer) == (
        "optimizer: row_var of model.layers.1.mlp.gate_proj.weight is [20, 1] and the parameter [20, 24], so the "
        "Adafactor cannot be cut with it. Pass None, and make a new optimizer; for a Trainer, set reset_moments=True "
        "in the ShrinkConfig."
    )
