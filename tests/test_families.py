"""What one family has that the others have not."""

from __future__ import annotations

from torch import nn

from hf_adaptive_sparse.families import FAMILIES, ModelFamily
from tests.tiny_models import tiny_model


def test_the_two_norms_of_large_falcons_are_found():
    family = FAMILIES["falcon"]
    model = tiny_model("falcon", new_decoder_architecture=True, num_kv_heads=2)
    norms = {each.rpartition(".")[2] for each, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert norms == {"ln_attn", "ln_mlp", "ln_f"} and norms <= set(family.norms)
    targets = {each for each, _ in model.named_modules() if family.is_target(each)}
    assert targets == {
        each
        for each, module in model.named_modules()
        if isinstance(module, nn.Linear) and each.startswith("transformer.h.")
    }


def test_is_target_compares_whole_parts_of_a_name():
    family = ModelFamily(name="x", attention=("attn.proj",), mlp=("fc",), blocks="h", norms=())
    assert family.is_target("h.0.attn.proj") and family.is_target("fc")
    assert not family.is_target("h.0.xattn.proj") and not family.is_target("h.0.proj")


def test_a_scope_leaves_other_towers_out():
    family = FAMILIES["gemma3"]
    assert family.is_target("model.language_model.layers.0.self_attn.q_proj")
    assert not family.is_target("model.vision_tower.encoder.layers.0.self_attn.q_proj")
    assert not family.is_target("model.my_language_model.layers.0.self_attn.q_proj")
